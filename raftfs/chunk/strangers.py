"""Files in the chunks' folders that are no copy by their name: a bit of the name has rotted, or an
administrator put them there.

A file's header says what it is. One that is whole takes its name back and counts again, unless
there is a copy of its chunk that is as new; everything else goes to the quarantine with its story.
"""

import time
from pathlib import Path

import structlog
from msgspec.structs import replace

from raftfs.chunk import layout
from raftfs.chunk.chunkfile import DamageError, UnfinishedError
from raftfs.chunk.copyfile import Copy
from raftfs.chunk.store import ChunkStore
from raftfs.const import MIB
from raftfs.errors import ReplyError, Status
from raftfs.wire.messages import CopyId, Damage

log = structlog.get_logger("raftfs.strangers")


def take_in_strangers(store: ChunkStore, number: int) -> int:
    """Deal with all of them on one disk; gives how many there were."""
    found = 0
    disk = store.disks()[number]
    if disk.health.evidence:
        return 0  # nothing on it is moved
    try:
        for path in disk.files():
            if not _is_known(store, path):
                found += take_in(store, number, path)
    except OSError as e:
        log.error("folders not readable", disk=str(disk.path), reason=str(e))
    return found


def _is_known(store: ChunkStore, path: Path) -> bool:
    named = layout.parse_name(path.name)
    return named is not None and store.path_of(named[0]) == path


def take_in(store: ChunkStore, number: int, path: Path) -> bool:
    """Deal with one; False if it was a copy on its way to another name, or is dealt with later."""
    disk = store.disks()[number]
    try:
        header = _header(store, path)
        version = header.raised_from or header.version
        if _is_ours(store, header.chunk, path):
            return False
        copy = Copy(disk, store.door, header.chunk, version)
        _check_whole(store, copy, path)
        if not store.reclaim(header.chunk, version, path):
            store.adopt(header.chunk, version, disk, path)
    except (FileNotFoundError, UnfinishedError):
        return False  # it is being made just now, or removed, or renamed
    except (DamageError, layout.LayoutError) as e:
        return _set_aside(store, number, path, str(e))
    except ReplyError as e:
        if e.status == Status.WRONG_VERSION and not _is_ours(store, header.chunk, path):
            return _set_aside(store, number, path, "another file is the copy of its chunk")
        return False  # somebody uses that chunk just now: the next scrub comes here again
    except OSError as e:
        log.error("file not readable", file=str(path), reason=str(e))
        return False
    log.error("name of a copy mended", file=str(path), name=str(copy.path),
              chunk=f"{header.chunk:016X}", version=version)  # fmt: skip
    story = Damage(header.chunk, version, str(disk.path), "name", -1, copy.path.name, path.name,
                   "scrub", int(time.time()), "the file had another name, and has its own again")
    store.report([CopyId(header.chunk, version)], [], [story])
    return True


def _header(store: ChunkStore, path: Path) -> layout.Header:
    page = memoryview(bytearray(layout.HEADER_SIZE))
    fd = store.door.open(path)
    try:
        got = store.door.pread(fd, page, 0)
    finally:
        store.door.close(fd)
    if not got:
        raise UnfinishedError
    return layout.Header.unpack(page[:got])


def _is_ours(store: ChunkStore, chunk: int, path: Path) -> bool:
    """Whether the file is a copy of ours after all, whose version is being raised just now."""
    return store.settled_path(chunk) == path


def _check_whole(store: ChunkStore, copy: Copy, path: Path) -> None:
    """DamageError if not."""
    room = memoryview(bytearray(MIB))
    with copy.lock:
        try:
            copy.open(store.cluster, path)
            further, _ = copy.check_blocks(0, room, cold=True)
            while further:
                further, _ = copy.check_blocks(further, room, cold=True)
            copy.retire()
        finally:
            copy.close()


def _set_aside(store: ChunkStore, number: int, path: Path, reason: str) -> bool:
    chunk, version = layout.parse_name(path.name) or (0, 0)
    if _is_ours(store, chunk, path):
        return False
    story = Damage(chunk, version, str(store.disks()[number].path), "name", -1, "", path.name,
                   "scrub", int(time.time()), reason)  # fmt: skip
    try:
        kept = store.quarantines()[number].take(path, story)
    except OSError as e:
        log.error("file not set aside", file=str(path), reason=str(e))
        return False
    log.error("strange file set aside", file=str(path), kept=str(kept), reason=reason)
    # Of no chunk, for the masters: one that its name or header tells may be here and good.
    store.report([], [], [replace(story, chunk=0, version=0)])
    return True
