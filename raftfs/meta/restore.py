"""From an image and changelogs to the state after any line of them, as an image again.

The lines are replayed through the state machine on a scratch state file, so memory stays bounded.
Nothing is believed: every line must carry its checksum, be the next one, and give the result that
it says; wherever the files tell a digest that the masters agreed on, the replayed state must have
it; and the result must pass the invariants of the state (`state/invariants.py`), unless it is
huge.
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from raftfs.errors import InvariantError, ReplyError, UserError, status_text
from raftfs.meta import changelogfiles, image, statefile
from raftfs.meta.changelogfiles import Numbered, Survey
from raftfs.meta.image import ImageHead
from raftfs.meta.state import changelog, invariants, mend, read
from raftfs.meta.state.changelog import ChangelogError, Line
from raftfs.meta.store import MetaStore
from raftfs.wire.ops import Batch, encode_batch

# The checks hold all nodes in memory, about 0.8 GB for so many nodes and chunks.
CHECKED_MAX = 1_000_000
_DIRTY_ROWS = 100_000  # then the scratch state is written


class RestoreError(UserError):
    """The state cannot be restored, or not beyond some line; the message says why."""


class Until(NamedTuple):
    """Where to stop: behind the line of this number, or before the first line later than `time`
    (ns).
    """

    version: int | None = None
    time: int | None = None


class Restored(msgspec.Struct, frozen=True):
    """What came out. `index`: the last entry of the Raft log that is known to be in it. `time` (ns)
    of the last line. `lines` were replayed, `digests` compared. `problem`: why the replay ended
    early ("": it did not). `mended`: what was edited to make the structure sound.
    `structure_checked`: False for a state so large that it was not.
    """

    version: int
    index: int
    time: int
    digest: bytes
    lines: int
    digests: int
    problem: str
    mended: list[str]
    nodes: int
    chunks: int
    sessions: int
    structure_checked: bool


def restore(
    start: Path | None,
    changelogs: Sequence[Path],
    target: Path | None,
    *,
    until: Until = Until(),  # noqa: B008
    best_effort: bool = False,
    ignore_structure: bool = False,
    force: bool = False,
    report: Callable[[str], None] = lambda text: None,
) -> Restored:
    """The state of the image `start` (None: the empty one) after the lines behind it in
    `changelogs`, written to `target` as an image (None: nothing is written, only checked).

    `best_effort`: at the first line that is missing or bad, keep what there is.
    `ignore_structure`: mend what breaks the invariants instead of refusing it. `force`: read and
    check all changelogs, also those that the image makes needless, and the structure of any number
    of files. `report` hears what is being done. RestoreError, ImageError or another UserError.
    """
    folder = target.parent if target else None
    try:
        scratch = Path(tempfile.mkdtemp(prefix=".restore-", dir=folder))
    except OSError as e:
        raise RestoreError(f"no scratch files can be made in {folder}: {e.strerror}") from None
    try:
        replay = _Replay(start, scratch / "state.mdb", until, report)
        try:
            surveys = _needed(changelogs, replay.version, best_effort, force, report)
            replay.run(surveys, best_effort, force)
            if replay.spoiled:  # the bad line has changed something: once more, up to before it
                replay.close()
                problem, good = replay.problem, Until(replay.version)
                replay = _Replay(start, scratch / "again.mdb", good, report)
                replay.run(surveys, best_effort, force)
                replay.problem = problem
            if ignore_structure or force or replay.is_small():
                replay.check_structure(ignore_structure)
        finally:
            replay.close()
        if target is not None:
            at = (replay.index, replay.term)
            image.write_image(replay.path, target, time_ns=replay.time, at=at)
        return replay.result()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _needed(
    changelogs: Sequence[Path], version: int, best_effort: bool, force: bool,
    report: Callable[[str], None],
) -> list[Survey]:  # fmt: skip
    """The files that may have lines behind `version`. RestoreError if one cannot be read."""
    surveys, needed = [changelogfiles.survey(path) for path in changelogs], []
    for one in surveys:
        covered = any(one.first < other.first <= version + 1 for other in surveys)
        if not force and (covered if one.problem else one.last <= version):
            report(f"{one.path}: lines {one.first} to {one.last}: not needed")
            continue
        if one.problem and not best_effort:
            raise RestoreError(f"{one.problem} (-b restores up to there)")
        report(f"{one.path}: lines {one.first} to {one.last}")
        needed.append(one)
    return needed


class _Replay:
    """A scratch state, and how far it has come."""

    def __init__(
        self, start: Path | None, path: Path, until: Until, report: Callable[[str], None]
    ) -> None:
        self.path = path
        self._until = until
        self.version = self.index = self.term = self.time = 0
        self.lines = self.digests = 0
        self.problem = ""
        self.mended: list[str] = []
        self.structure_checked = False
        self.spoiled = False  # a line was applied that should not have been
        self._last_text = ""
        self._open: MetaStore | None = None
        if start is not None:
            head = image.read_head(start)
            self._check_until(start, head)
            report(f"{start}: the state after line {head.version}")
            statefile.build(path, image.read_rows(start), head.index, head.term)
            self.version, self.index, self.term = head.version, head.index, head.term
            self.time = head.time
        self._store = self._open = MetaStore(path, durable=False)

    def _check_until(self, start: Path, head: ImageHead) -> None:
        limit = self._until
        late = limit.time is not None and head.time > limit.time
        if late or (limit.version is not None and head.version > limit.version):
            raise RestoreError(
                f"image {start} is later than --until: it is the state after line {head.version}; "
                "give an older image"
            )

    # --- lines

    def run(self, surveys: list[Survey], best_effort: bool, force: bool) -> None:
        """Replay what follows; afterwards `problem` says why it ended early, if it did."""
        claims = {d.version: d for s in surveys for d in s.digests}
        try:
            self._compare(claims)
            for text in changelogfiles.merged(surveys):
                if not self._take(text, force):
                    return
                self._compare(claims)
            if self._until.version is not None and self.version < self._until.version:
                raise RestoreError(
                    f"the changelogs end with line {self.version}, before --until "
                    f"{self._until.version}"
                )
        except UserError as e:
            if not best_effort:
                raise
            self.problem = str(e)

    def _take(self, numbered: Numbered, force: bool) -> bool:
        """One line; False if it is beyond where to stop."""
        if self._until.version is not None and self.version >= self._until.version:
            return False
        where = f"{numbered.path}, line {numbered.line}"
        if numbered.version <= self.version and not force:
            self._check_repeated(numbered, where)
            return True
        try:
            line = changelog.parse(numbered.text)
        except ChangelogError as e:
            raise RestoreError(f"{where}: {e}; {self._so_far()}") from None
        if numbered.version <= self.version:
            self._check_repeated(numbered, where)
            return True
        if line.version != self.version + 1:
            raise RestoreError(
                f"{where}: lines {self.version + 1} to {line.version - 1} are missing; "
                f"{self._so_far()}"
            )
        if self._until.time is not None and line.time > self._until.time:
            return False
        self._apply(line, where)
        self._last_text = numbered.text
        return True

    def _so_far(self) -> str:
        return f"everything up to line {self.version} is good (-b saves that)"

    def _check_repeated(self, numbered: Numbered, where: str) -> None:
        """The same number again, of another file: the same line, or of another history."""
        if numbered.version == self.version and self._last_text not in ("", numbered.text):
            raise RestoreError(
                f"{where}: this line {self.version} is not the one that was replayed: the "
                "changelogs are of different clusters, or one is damaged"
            )

    def _apply(self, line: Line, where: str) -> None:
        store = self._store
        data = encode_batch(Batch(line.time, [line.command]))
        applied = store.apply_entry(store.applied[0] + 1, self.term, data)[0]
        if (applied.version, applied.result) != (line.version, line.result):
            self.spoiled = True
            status = applied.result.status
            instead = f": it is refused with {status_text(status)}" if status else ""
            raise RestoreError(
                f"{where}: line {line.version} does not give the result that it says{instead}: "
                "the image or the changelogs are not of this cluster, or not whole; "
                f"{self._so_far()}"
            )
        self.version, self.time = line.version, line.time
        self.lines += 1
        if store.dirty() >= _DIRTY_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._store.freeze():
            self._store.write_frozen()
            self._store.thaw()
            while self._store.tidy():
                pass

    def _compare(self, claims: dict[int, changelogfiles.Digest]) -> None:
        """The masters' digest of this very state, if the files tell it."""
        claim = claims.pop(self.version, None)
        if claim is None:
            return
        self._flush()
        mine = self._store.digests[-1][1]
        if mine != claim.digest:
            raise RestoreError(
                f"after line {self.version} the digest is {mine.hex()}, the masters had "
                f"{claim.digest.hex()}: the image or the changelogs are not of this cluster"
            )
        self.index = max(self.index, claim.index)
        self.digests += 1

    # --- the result

    def is_small(self) -> bool:
        """Whether the structure can be checked in moderate memory."""
        totals = read.totals(self._store)
        return totals.nodes + totals.chunks <= CHECKED_MAX

    def check_structure(self, mend_it: bool) -> None:
        """RestoreError unless all invariants hold, if need be after mending."""
        self.structure_checked = True
        try:
            invariants.check_all(self._store)
        except (InvariantError, LookupError, ReplyError) as e:
            if not mend_it:
                raise RestoreError(
                    f"the structure of the state after line {self.version} is not sound: {e} "
                    "(-i mends it)"
                ) from None
            self.mended = mend.mend(self._store)
            invariants.check_all(self._store)
            self._store.applied = (self._store.applied[0] + 1, self.term)  # there is news to write

    def result(self) -> Restored:
        """What there is now."""
        return Restored(
            self.version, self.index, self.time, self._digest, self.lines, self.digests,
            self.problem, self.mended, self._totals.nodes, self._totals.chunks,
            self._totals.sessions, self.structure_checked,
        )  # fmt: skip

    def close(self) -> None:
        """Write the state file and give it back."""
        if self._open is not None:
            self._flush()
            self._digest, self._totals = self._store.digests[-1][1], read.totals(self._store)
            self._open.close()
            self._open = None
