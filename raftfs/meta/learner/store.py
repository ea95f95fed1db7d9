"""The state of a learner: its checkpoints never get ahead of the changelog on the disk."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import structlog

from raftfs.errors import invariant
from raftfs.meta.learner.files import ChangelogFiles
from raftfs.meta.state import read
from raftfs.meta.store import MetaStore

log = structlog.get_logger("raftfs.learner.store")


class Point(NamedTuple):
    """A state: after this entry of the log, whose last line has this number."""

    entry: int
    version: int
    digest: bytes


class LearnerStore(MetaStore):
    """As `MetaStore`; `files` must be set before the first entry is applied."""

    def __init__(self, path: Path, on_checkpoint: Callable[[Point], None]) -> None:
        self.files: ChangelogFiles | None = None
        self._on_checkpoint = on_checkpoint
        super().__init__(path)
        self._frozen_version = 0

    @property
    def version(self) -> int:
        """Number of the last line."""
        return read.totals(self).version

    @property
    def settled(self) -> Point:
        """The last checkpoint, when nothing was applied since."""
        invariant(self.applied == self.checkpointed, "lines were applied since the checkpoint")
        index, digest = self.digests[-1]
        return Point(index, self.version, digest)

    def freeze(self) -> bool:
        """As `MetaStore.freeze`."""
        began = super().freeze()
        if began:
            self._frozen_version = self.version
        return began

    def write_frozen(self) -> None:
        """Thread: first the lines, then the state that has their effect."""
        assert self.files is not None
        self.files.sync()
        super().write_frozen()

    def thaw(self) -> None:
        """As `MetaStore.thaw`."""
        super().thaw()
        index, digest = self.digests[-1]
        self._on_checkpoint(Point(index, self._frozen_version, digest))

    def install(self, path: Path) -> None:
        """Become the state in the file; the lines that it takes the place of are a hole. Should the
        process end in between, the next start finds it.
        """
        assert self.files is not None
        version = _version_of(path)
        if version < self.files.last:
            aside = self.files.set_aside(version)
            log.error("the masters went back in time", line=version, set_aside=str(aside))
        super().install(path)
        self.files.jump(self.version)
        self._on_checkpoint(self.settled)


def _version_of(path: Path) -> int:
    """Number of the last line of a state file that nobody has open."""
    store = MetaStore(path)
    try:
        return read.totals(store).version
    finally:
        store.close()
        path.with_name(f"{path.name}-lock").unlink(missing_ok=True)
