"""Where a disk keeps what is damaged: stories of damaged copies, and the files that were set aside.

    quarantine/chunk_<id>_<version>.story         a copy that is damaged and still in its place
    quarantine/chunk_<id>_<version>.<at>.mfs      a file that was set aside ...
    quarantine/chunk_<id>_<version>.<at>.story    ... and why (CBOR: what the masters were told)

A damaged copy stays in its place, because its good blocks may be the last ones that there are,
until a good copy is known to exist elsewhere. Only then is it set aside, and only after `KEEP_S`
does it go; sooner if the quarantine takes more than its share of the disk, the oldest first.

Whoever wants a file back renames it into its folder: the next scrub takes it in, if it is good.
"""

import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import cbor2
import structlog

from raftfs.chunk import layout
from raftfs.chunk.door import FileDoor
from raftfs.wire.messages import Damage

log = structlog.get_logger("raftfs.quarantine")

FOLDER = "quarantine"
KEEP_S = 7 * 86_400.0  # as long as copies that no metadata knows
SHARE_MAX = 0.1  # of the disk: rot of a whole disk must not fill it
_COUNT_AGE_S = 5.0
_STORY_MAX = 64 * 1024
_STORY = ".story"
_FIELDS = Damage.__struct_fields__


class Kept(NamedTuple):
    """A file in quarantine. `story` is None if it cannot be read."""

    path: Path
    size: int
    since: float
    story: Damage | None


class Quarantine:
    """The quarantine of one disk. Thread-safe: every file of it belongs to one copy's lock."""

    def __init__(self, disk: Path, door: FileDoor) -> None:
        self._disk = disk
        self._door = door
        self.folder = disk / FOLDER
        self._counted = (0, 0)
        self._counted_at = -_COUNT_AGE_S

    # --- copies in their place

    def note(self, story: Damage) -> None:
        """A copy is damaged and stays where it is; durable, so that it does not count after a
        restart either. OSError.
        """
        self._write(self._story_in_place(story.chunk, story.version), story)

    def forget(self, chunk: int, version: int) -> None:
        """The damaged copy is no longer in its place."""
        with suppress(OSError):  # a story without its copy is removed at the next start
            self._door.unlink(self._story_in_place(chunk, version))

    def in_place(self) -> list[Damage]:
        """The stories of copies in their place; for a start."""
        found = []
        for path in self._files(_STORY):
            if path.name.count(".") == 1 and (story := read_story(path)) is not None:
                found.append(story)
        return found

    # --- files that are set aside

    def take(self, path: Path, story: Damage) -> Path:
        """Move a file here with its story; gives where it is. Durable, story first. OSError."""
        stem = f"chunk_{story.chunk:016X}_{story.version:08X}.{time.time_ns() // 1_000_000}"
        self._write(self.folder / (stem + _STORY), story)
        kept = self.folder / (stem + ".mfs")
        self._door.rename(path, kept)
        self._door.sync_folder(self.folder)
        self._door.sync_folder(path.parent)
        self.forget(story.chunk, story.version)
        return kept

    def kept(self) -> list[Kept]:
        """What was set aside, the oldest first."""
        found = []
        for path in self._files(".mfs"):
            with suppress(OSError, ValueError, IndexError):  # dropped just now, or a stranger
                stat, story_file = path.stat(), path.with_suffix(_STORY)
                since = float(path.name.split(".")[1]) / 1000
                found.append(Kept(path, stat.st_blocks * 512, since, read_story(story_file)))
        return sorted(found, key=lambda k: k.since)

    def size(self) -> tuple[int, int]:
        """How many files were set aside, and their bytes; at most `_COUNT_AGE_S` old."""
        now = time.monotonic()
        if now - self._counted_at > _COUNT_AGE_S:
            sizes = []
            for path in self._files(".mfs"):
                with suppress(OSError):  # it was dropped just now
                    sizes.append(path.stat().st_blocks * 512)
            self._counted, self._counted_at = (len(sizes), sum(sizes)), now
        return self._counted

    def drop_old(self, *, now: float, disk_bytes: int, keep_s: float = KEEP_S) -> int:
        """Remove what was kept long enough or is too much; gives how many files went."""
        kept = self.kept()
        excess = sum(k.size for k in kept) - SHARE_MAX * disk_bytes
        dropped = 0
        for one in kept:
            if now - one.since < keep_s and excess <= 0:
                break
            log.info("quarantined file removed", file=str(one.path), size=one.size,
                     days=round((now - one.since) / 86_400, 1))  # fmt: skip
            self._door.unlink(one.path)
            self._door.unlink(one.path.with_suffix(_STORY))
            excess -= one.size
            dropped += 1
        return dropped

    # --- files

    def _story_in_place(self, chunk: int, version: int) -> Path:
        name = Path(layout.file_name(chunk, version)).name
        return self.folder / name.replace(".mfs", _STORY)

    def _files(self, suffix: str) -> list[Path]:
        try:
            return [p for p in self.folder.iterdir() if p.name.endswith(suffix)]
        except FileNotFoundError:
            return []
        except OSError as e:
            log.error("quarantine not readable", folder=str(self.folder), reason=str(e))
            return []

    def _write(self, path: Path, story: Damage) -> None:
        if not self.folder.exists():
            self.folder.mkdir(mode=0o750)
        new = path.with_suffix(".new")
        self._door.unlink(new)  # of an attempt that failed
        fd = self._door.create(new)
        try:
            told = {field: getattr(story, field) for field in _FIELDS}
            self._door.pwrite(fd, [cbor2.dumps(told, canonical=True)], 0)
            self._door.sync(fd)
        finally:
            self._door.close(fd)
        self._door.rename(new, path)
        self._door.sync_folder(self.folder)
        self._door.sync_folder(self._disk)


def read_story(path: Path) -> Damage | None:
    """What the file says; None, and a line in the log, if it cannot be read."""
    try:
        with open(path, "rb") as file:
            told = cbor2.loads(file.read(_STORY_MAX))
        return Damage(**{field: told[field] for field in _FIELDS})
    except (OSError, cbor2.CBORError, ValueError, EOFError, TypeError, KeyError) as e:
        log.warning("story not readable", file=str(path), reason=str(e))
        return None
