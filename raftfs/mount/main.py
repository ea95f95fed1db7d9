"""raftfs-mount: connect, register, mount, go to the background, serve until unmounted.

    parent                         child, grandchild (the daemon)
      fork ───────────────────────▶ setsid, fork, connect to the masters, register, mount
      waits on a pipe  ◀─────────── verdict, once the kernel has accepted the mount (or not)
      prints it, exits 0 or 1       serves; on unmount or SIGTERM writes everything out and ends

The forks come before any thread or loop is made. The daemon never opens, stats or lists its own
mount: it would wait for itself, unkillably.
"""

import asyncio
import importlib
import json
import os
import re
import signal
import socket
import stat
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from raftfs.client.meta import CONNECT_TIMEOUT_S, MetaClient
from raftfs.client.session import Session, banner
from raftfs.errors import UserError
from raftfs.mount.options import MountOptions, parse
from raftfs.mount.volume import Volume, VolumeSettings

log = structlog.get_logger("raftfs.mount")

PROGRAM = "raftfs-mount"
READ_AHEAD_KIB = 1024  # measured knee; the INIT request cannot raise it (fuse notes, section 1)
MAX_BACKGROUND = 64
MAX_READAHEAD = 1024 * 1024
WORKERS_MAX = 256  # requests that may wait at the same time, each with a buffer of 1 MiB
INIT_TIMEOUT_S = 10.0
_SWITCH_INTERVAL_S = 0.001  # data threads hand the interpreter back to the loop sooner

# FUSE INIT flags and capabilities (linux/fuse.h, fuse_common.h)
_PARALLEL_DIROPS = 1 << 18
_HANDLE_KILLPRIV_V2 = 1 << 28
_CAP_DONT_MASK = 1 << 6

Tell = Callable[[str], None]


def main(argv: Sequence[str] | None = None) -> int:
    """The command. 0 only after the mount works (in the foreground: after it has ended)."""
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        _check_mountpoint(options.mountpoint)
        if options.foreground:
            return _serve(options, lambda text: print(text, flush=True))
        return _in_background(options)
    except UserError as e:
        print(f"{PROGRAM}: {e}", file=sys.stderr)
        return e.exit_status


# --- background ---------------------------------------------------------------------------------


def _in_background(options: MountOptions) -> int:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.setsid()
        if os.fork():
            os._exit(0)
        _daemon(options, writing)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        verdict = pipe.read()
    if not verdict:
        raise UserError("the daemon died while mounting; run it with -f to see why")
    status, text = json.loads(verdict)
    print(text, file=sys.stderr if status else sys.stdout)
    return int(status)


def _daemon(options: MountOptions, pipe: int) -> None:
    """The grandchild: never returns."""
    told = False

    def tell(text: str, status: int = 0) -> None:
        nonlocal told
        if not told:
            told = True
            os.write(pipe, json.dumps([status, text]).encode())
            _detach()
            os.close(pipe)

    status = 1
    try:
        os.chdir("/")
        status = _serve(options, tell)
    except UserError as e:
        if options.logfile:
            log.error("not mounted", reason=str(e))
        tell(f"{PROGRAM}: {e}", 1)
    except BaseException as e:
        log.exception("mount daemon failed")
        tell(f"{PROGRAM}: internal error: {e!r}", 1)
    finally:
        os._exit(status)


def _detach() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)


# --- serving ------------------------------------------------------------------------------------


def _serve(options: MountOptions, tell: Tell) -> int:
    import uvloop

    from raftfs import log as logging_setup

    # Without a log file, what is logged in the background ends with the terminal: only what the
    # caller should read before is worth a line.
    quiet = not options.logfile and not options.foreground
    file = Path(options.logfile) if options.logfile else None
    logging_setup.setup(PROGRAM, level="warning" if quiet else "info", file=file)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    hook = _load_hook()
    uvloop.run(_mounted(options, tell, hook))
    return 0


def _load_hook() -> types.ModuleType | None:
    """Import our libfuse extension, which must come before pyfuse3, with its symbols global."""
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
    try:
        hook = importlib.import_module("raftfs.mount._fusehook")
    except ImportError as e:
        log.warning("module _fusehook is not built: lookups in one directory are serialised and "
                    "writes cost more", reason=str(e))  # fmt: skip
        return None
    finally:
        sys.setdlopenflags(flags)
    hook.configure(
        want=_CAP_DONT_MASK,
        max_background=MAX_BACKGROUND,
        max_readahead=MAX_READAHEAD,
        init_flags=_PARALLEL_DIROPS | _HANDLE_KILLPRIV_V2,
    )
    return hook


async def _mounted(options: MountOptions, tell: Tell, hook: types.ModuleType | None) -> None:
    """From connecting to the end of the session."""
    session = Session(
        path=os.fsencode(options.subfolder),
        info=f"{socket.gethostname()}:{options.mountpoint}",
        password=options.password,
    )
    meta = MetaClient(options.masters, session, timeout_s=options.timeout_s)
    try:
        registered = await meta.start(min(CONNECT_TIMEOUT_S, options.timeout_s))
    except UserError:
        await meta.close()
        raise
    settings = VolumeSettings(
        options.masters, options.mountpoint, options.write_cache_bytes, options.timeout_s,
        options.close_sync,
    )  # fmt: skip
    volume = Volume(meta, registered, settings)
    try:
        await _fuse(options, volume, lambda: tell(banner(registered)), hook)
    finally:
        await volume.close()


async def _fuse(
    options: MountOptions, volume: Volume, ready: Callable[[], None], hook: types.ModuleType | None
) -> None:
    """Mount and serve until unmounted or told to stop."""
    import pyfuse3  # not before the hook

    from raftfs.mount import fastloop
    from raftfs.mount.operations import Operations, Timeouts

    loop = asyncio.get_running_loop()
    initialised = asyncio.Event()
    timeouts = Timeouts(options.attr_s, options.entry_s, options.dir_entry_s)
    operations = Operations(volume, timeouts, initialised.set)
    fastloop.install()
    try:
        pyfuse3.init(operations, options.mountpoint, _fuse_options(options, volume))
    except RuntimeError as e:
        raise UserError(f"cannot mount on {options.mountpoint}: {e}") from None
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, pyfuse3.terminate)
    serving = loop.create_task(pyfuse3.main(1, WORKERS_MAX))
    try:
        started = loop.create_task(initialised.wait())
        await asyncio.wait(
            [serving, started], timeout=INIT_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
        )
        started.cancel()
        if not initialised.is_set():
            pyfuse3.terminate()
            raise UserError(f"cannot mount on {options.mountpoint}: the kernel does not answer")
        log.info("mounted", mountpoint=options.mountpoint, session=volume.meta.session.number,
                 hook=hook.status() if hook is not None else None)  # fmt: skip
        _raise_read_ahead(options.mountpoint)
        ready()
        await serving
        log.info("unmounted", mountpoint=options.mountpoint)
    finally:
        await volume.flush_all()
        pyfuse3.close(unmount=True)


def _fuse_options(options: MountOptions, volume: Volume) -> set[str]:
    chosen = {f"fsname={options.fsname}", "subtype=mfs"} | (options.kernel_flags - {"rw"})
    if options.standard_options:
        chosen.add("default_permissions")
        if os.geteuid() == 0:
            chosen |= {"allow_other"}
            chosen |= {f for f in ("suid", "dev") if f"no{f}" not in chosen}
    if volume.registered.readonly:
        chosen.add("ro")
    return chosen


# --- the mountpoint -----------------------------------------------------------------------------


def _check_mountpoint(path: str) -> None:
    """UserError unless it is a directory on which nothing of ours is mounted yet."""
    if _mounted_device(path) is not None:
        raise UserError(f"{path} is already mounted; umount it first")
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise UserError(f"mountpoint {path} does not exist; create the directory first") from None
    except OSError as e:
        raise UserError(f"mountpoint {path} cannot be used: {e.strerror}") from None
    if not stat.S_ISDIR(mode):
        raise UserError(f"mountpoint {path} is not a directory")


def _mounted_device(path: str) -> str | None:
    """`MAJ:MIN` of a raftfs mount on `path`. Read from /proc: the mount itself is not touched."""
    found = None
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            words = line.split()
            where = re.sub(r"\\([0-7]{3})", lambda o: chr(int(o[1], 8)), words[4])
            kind = words[words.index("-") + 1]
            if where == path and kind == "fuse.mfs":
                found = words[2]
    return found


def _raise_read_ahead(mountpoint: str) -> None:
    device = _mounted_device(mountpoint)
    try:
        with open(f"/sys/class/bdi/{device}/read_ahead_kb", "w", encoding="ascii") as knob:
            knob.write(f"{READ_AHEAD_KIB}\n")
    except OSError as e:
        log.info("read-ahead of the kernel stays as it is", reason=e.strerror)


if __name__ == "__main__":
    sys.exit(main())
