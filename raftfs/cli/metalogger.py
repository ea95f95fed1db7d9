"""`raftfs-metalogger`: options and start-up of a learner, and questions about its folder."""

import argparse
import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

from raftfs import daemon
from raftfs.errors import UserError
from raftfs.meta.learner import images, rehearsal, status
from raftfs.meta.learner.service import Learner, LearnerConfig, problems
from raftfs.meta.master import parse_peer
from raftfs.wire.auth import ClusterKey

_PROGRAM = "raftfs-metalogger"
_IMAGE_S = 6 * 3_600.0
_LOOK_S = 0.1

_EPILOG = """\
Files in DIR:
  changelog_ml.0.mfs            the lines of this hour; changelog_ml.N.mfs[.zst] those before
  metadata_ml.mfs.back          an image of the metadata, new each night; .back.N older ones
  sessions_ml.mfs               the sessions in that image, as text
  learner.json, rehearsal.json  what the metalogger and its last rehearsal say of themselves

A changelog goes when there are more than --back-logs rotated ones and the oldest image has the
effect of all its lines; so every image can be restored from. Lines that the masters had no more
when this metalogger came back are a hole: a `# HOLE` comment in the file, an error in the log, and
a new image at once. raftfs-master --keep-log-mib says how much the masters keep.
"""


def parser() -> argparse.ArgumentParser:
    """The command line of `raftfs-metalogger`."""
    defaults = LearnerConfig((), Path("/var/lib/raftfs/metalogger"))
    p = argparse.ArgumentParser(
        prog=_PROGRAM, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Follows the masters without a vote and keeps the classic changelogs, with "
        "images from\nwhich the metadata can be restored (raftfs-metarestore).",
    )  # fmt: skip
    p.add_argument("--peers", metavar="A,B,C", help="all masters, as host[:port]")
    p.add_argument("--data", type=Path, default=defaults.data_dir, metavar="DIR",
                   help="folder of its files (default: %(default)s)")
    p.add_argument("--key", type=Path, default=Path("/etc/raftfs/cluster.key"), metavar="FILE",
                   help="the cluster key (default: %(default)s)")
    p.add_argument("--back-logs", type=int, default=defaults.back_logs, metavar="N",
                   help="hourly changelogs to keep at least (default: %(default)s)")
    p.add_argument("--compress", action="store_true",
                   help="compress changelogs with zstd when they are rotated")
    p.add_argument("--images", type=int, default=defaults.images, metavar="N",
                   help="images to keep (default: %(default)s)")
    p.add_argument("--night-hour", type=int, default=defaults.night_hour, metavar="HOUR",
                   help="when, by this machine's clock, a restore is rehearsed and a new image "
                   "made (default: %(default)s)")
    p.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    asking = p.add_mutually_exclusive_group()
    asking.add_argument("--rehearse", action="store_true",
                        help="restore from the files in DIR into a scratch folder and compare, "
                        "whether a metalogger runs there or not; exit status 1 if it fails")
    asking.add_argument("--image", action="store_true",
                        help="have the metalogger that runs in DIR make an image now")
    asking.add_argument("--status", action="store_true",
                        help="say what is known of DIR, as JSON; exit status 1 if there are "
                        "problems: a hole that no image covers, a failed image or rehearsal")
    return p  # fmt: skip


def configure(args: argparse.Namespace) -> LearnerConfig:
    """Check the options. UserError names what is wrong."""
    peers = tuple(parse_peer(item) for item in (args.peers or "").split(",") if item.strip())
    if not peers:
        raise UserError("--peers names no master: give host[:port] of each, separated by commas")
    for option, value, low, high in (
        ("--back-logs", args.back_logs, 0, 10_000),
        ("--images", args.images, 1, 100),
        ("--night-hour", args.night_hour, 0, 23),
    ):
        if not low <= value <= high:
            raise UserError(f"{option} {value}: must be between {low} and {high}")
    return LearnerConfig(
        peers, args.data, args.back_logs, args.compress, args.images, args.night_hour
    )


async def _serve(args: argparse.Namespace, stop: daemon.Stop) -> None:
    config = configure(args)
    key = ClusterKey.load(args.key)
    with daemon.data_folder(args.data):
        await Learner(config, key).run(stop)


def _rehearse(folder: Path) -> int:
    result = rehearsal.rehearse(_existing(folder))
    print(json.dumps(result, indent=1))
    if result["problem"]:
        raise UserError(f"a restore would fail: {result['problem']}")
    return 0


def _image(folder: Path) -> int:
    """Ask the daemon, and wait for what comes of it."""
    pid = _daemon(_existing(folder))
    before = {i.path.stat().st_ino for i in images.images(folder)}
    asked = time.time()
    os.kill(pid, signal.SIGUSR1)
    while time.time() < asked + _IMAGE_S:
        time.sleep(_LOOK_S)
        newest = images.images(folder)[:1]
        if newest and newest[0].path.stat().st_ino not in before:
            print(f"{newest[0].path}: the metadata after line {newest[0].head.version}")
            return 0
        said = status.read(folder)
        if said.get("image_problem") and said["time"] > asked:
            raise UserError(f"no image was made: {said['image_problem']}")
        _daemon(folder)
    raise UserError(f"no image was made within {_IMAGE_S:.0f} s")


def _daemon(folder: Path) -> int:
    """The pid of the metalogger that runs in a folder. UserError if none does."""
    try:
        with open(folder / ".lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return int((folder / ".lock").read_text())
    except FileNotFoundError:
        pass
    raise UserError(f"no metalogger runs in {folder}: start it first")


def _status(folder: Path) -> int:
    found = problems(_existing(folder))
    said = status.read(folder)
    rehearsed = status.read_json(folder / rehearsal.RESULT)
    print(json.dumps({**said, "rehearsal": rehearsed, "problems": found}, indent=1))
    return 1 if found else 0


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give --data")
    return folder


def main(argv: list[str] | None = None) -> int:
    """Run a metalogger until it is stopped, or answer a question. Returns the exit status."""
    args = parser().parse_args(argv)
    for asked, answer in ((args.rehearse, _rehearse), (args.image, _image), (args.status, _status)):
        if asked:
            try:
                return answer(args.data)
            except UserError as e:
                daemon.say(_PROGRAM, e)
                return e.exit_status
    return daemon.run(_PROGRAM, lambda stop: _serve(args, stop), level=args.log_level)


if __name__ == "__main__":
    sys.exit(main())
