"""A metalogger: follows the masters, writes changelogs, makes images, rehearses a restore.

Tasks: the replica's own, and `_tend`, which each second looks whether the hour has changed (rotate,
compress, drop) and whether an image or a rehearsal is due. Each night first the rehearsal of what
there is, then a new image. Nobody waits for a learner: it has no vote, and what the leader cannot
send it is bounded (`SEND_QUEUE_MAX`).

A hole (`files.py`) is an error in the log, stands in `learner.json`, and makes an image due at
once, so that restores work again from there on.
"""

import asyncio
import signal
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from raftfs import daemon
from raftfs.errors import UserError
from raftfs.meta.changelogfiles import digest_comment
from raftfs.meta.learner import images, rehearsal, status, work
from raftfs.meta.learner.files import ChangelogFiles, Hole
from raftfs.meta.learner.store import LearnerStore, Point
from raftfs.meta.raft.checkpoints import CheckpointLimits
from raftfs.meta.raft.replica import Replica, ReplicaConfig
from raftfs.meta.state import changelog
from raftfs.meta.state.apply import Applied
from raftfs.wire import ops
from raftfs.wire.auth import ClusterKey
from raftfs.wire.ops import decode_batch

log = structlog.get_logger("raftfs.learner")

_LOOK_S = 1.0
_HOUR_S = 3_600
_AGAIN_S = 600.0  # after an image or a rehearsal that failed
_WORK_S = 6 * 3_600.0  # no image and no rehearsal takes so long
_HOLES_KEPT = 100  # in learner.json
_MARKS_KEPT = 16  # checkpoints whose digest the leader may still tell
_COPY = "image.copy"
# It never leads: nobody else needs its log.
_LIMITS = CheckpointLimits(every_s=2.0, tail_entries=1_000, tail_bytes=1 << 20)


class LearnerConfig(NamedTuple):
    """What `raftfs-metalogger` was told. `peers`: the masters' Raft addresses."""

    peers: tuple[str, ...]
    data_dir: Path
    back_logs: int = 50
    compress: bool = False
    images: int = 3
    night_hour: int = 3  # local time


class Learner:
    """Everything that one metalogger process runs."""

    def __init__(self, config: LearnerConfig, key: ClusterKey) -> None:
        self._config = config
        self._folder = config.data_dir
        self._said = status.read(self._folder)
        self._said.setdefault("holes", [])
        self._image_wanted = False
        self._not_before = 0.0
        self._marks: OrderedDict[int, int] = OrderedDict()  # checkpoint's entry -> last line
        (self._folder / _COPY).unlink(missing_ok=True)
        self._store = LearnerStore(self._folder / "state.mdb", self._checkpoint_made)
        self._files = ChangelogFiles(self._folder, self._store.version, self._hole)
        self._store.files = self._files
        replica = ReplicaConfig(
            "metalogger", config.peers, config.data_dir, learner=True, checkpoints=_LIMITS
        )
        self._replica = Replica(replica, self._store, key)
        self._replica.on_applied.append(self._applied)

    async def run(self, stop: daemon.Stop) -> None:
        """Follow until `stop` is set. UserError if it must not or cannot."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, self.want_image)
        tending = asyncio.ensure_future(self._tend())
        try:
            self._checkpoint_made(self._store.settled)
            await self._replica.start()
            log.info("metalogger follows", peers=list(self._config.peers))
            either: set[asyncio.Future[Any]] = {tending, self._replica.failed}
            failed = loop.create_future()
            for one in either:
                one.add_done_callback(lambda f: _pass_on(f, failed))
            await daemon.until(stop, failed)
        finally:
            tending.cancel()
            await asyncio.gather(tending, return_exceptions=True)
            await self._replica.stop()
            self._files.close()
            self._store.close()

    def want_image(self) -> None:
        """Make an image at the next look."""
        self._image_wanted = True
        self._not_before = 0.0

    # --- lines

    def _applied(self, index: int, data: bytes, results: list[Applied]) -> None:
        if not data:
            return
        time_ns = decode_batch(data).time
        lines = []
        for one in results:
            op = one.command.op
            if one.version > self._files.last:
                line = changelog.render(one.version, time_ns, one.command, one.result)
                lines.append((one.version, line))
            elif isinstance(op, ops.Digest) and op.index in self._marks:
                self._files.comment(digest_comment(self._marks[op.index], op.index, op.value))
        self._files.append(lines)
        if any(isinstance(one.command.op, ops.Checkpoint) for one in results):
            self._marks[index] = self._store.version
            if len(self._marks) > _MARKS_KEPT:
                self._marks.popitem(last=False)

    def _hole(self, hole: Hole) -> None:
        if hole.first == 1 and not images.images(self._folder):
            log.info("the changelogs begin here: an image has what was before", line=hole.last + 1)
        else:
            log.error("hole in the changelog", first=hole.first, last=hole.last)
            holes = [*self._said["holes"], {**hole._asdict(), "time": int(time.time())}]
            self._said["holes"] = holes[-_HOLES_KEPT:]
        self.want_image()

    def _checkpoint_made(self, point: Point) -> None:
        self._said |= {
            "entry": point.entry, "version": point.version, "digest": point.digest.hex(),
        }  # fmt: skip
        self._tell()

    def _tell(self) -> None:
        self._said["time"] = int(time.time())
        status.replace(self._folder / status.NAME, self._said)

    # --- what is due

    async def _tend(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            await self._rotate_if_due()
            now = time.time()
            if now < self._not_before or not self._said["version"]:
                continue
            try:
                made = (self._folder / images.NAME).stat().st_mtime
            except FileNotFoundError:
                made = 0.0
            nightly = made and made < _last_night(now, self._config.night_hour)
            if nightly:
                await self._rehearse()
            if nightly or self._image_wanted or not made:
                await self._make_image()

    async def _rotate_if_due(self) -> None:
        written = self._files.written_at()
        if written is None or int(written) // _HOUR_S == int(time.time()) // _HOUR_S:
            return
        self._files.rotate()
        covered = min((i.head.version for i in images.images(self._folder)), default=0)
        if self._config.compress:
            await asyncio.to_thread(self._files.compress_old)
        dropped = await asyncio.to_thread(self._files.drop_old, self._config.back_logs, covered)
        log.info("changelogs rotated", dropped=len(dropped))

    async def _rehearse(self) -> None:
        """Loud if it fails; nothing else depends on it."""
        try:
            result = await work.run("rehearse", str(self._folder), timeout_s=_WORK_S)
        except UserError as e:
            result = {"problem": str(e)}
        if result["problem"]:
            log.error("a restore of these files would fail", reason=result["problem"])
        else:
            log.info("restore rehearsed", version=result["version"], took_s=result["took_s"])

    async def _make_image(self) -> None:
        self._image_wanted = False
        copy = self._folder / _COPY
        try:
            await asyncio.to_thread(self._store.copy_to, copy)
            made = await work.run(
                "image", str(self._folder), str(copy), str(self._config.images),
                timeout_s=_WORK_S,
            )  # fmt: skip
        except (UserError, OSError) as e:
            log.error("no image was made", reason=str(e))
            self._said["image_problem"] = str(e)
            self._image_wanted, self._not_before = True, time.time() + _AGAIN_S
        else:
            log.info("image made", version=made["version"])
            self._said |= {"image_version": made["version"], "image_problem": ""}
        finally:
            copy.unlink(missing_ok=True)
        self._tell()


def _pass_on(ended: "asyncio.Future[Any]", failed: "asyncio.Future[None]") -> None:
    if not ended.cancelled() and not failed.done() and (error := ended.exception()) is not None:
        failed.set_exception(error)


def _last_night(now: float, hour: int) -> float:
    """The last moment at which the clock of this place showed that hour."""
    year, month, day = time.localtime(now)[:3]
    nights = (
        time.mktime((year, month, d, hour, 0, 0, 0, 0, -1)) for d in (day, day - 1, day - 2)
    )
    return next(night for night in nights if night <= now)


def problems(folder: Path) -> list[str]:
    """What somebody should look at: a hole that no image covers, a failed image or rehearsal."""
    said = status.read(folder)
    found = []
    covered = max((i.head.version for i in images.images(folder)), default=0)
    for hole in said.get("holes", []):
        if hole["last"] > covered:
            found.append(f"lines {hole['first']} to {hole['last']} are missing, in no image")
    if said.get("image_problem"):
        found.append(f"no image was made: {said['image_problem']}")
    rehearsed = status.read_json(folder / rehearsal.RESULT)
    if rehearsed.get("problem"):
        found.append(f"the last rehearsal failed: {rehearsed['problem']}")
    return found
