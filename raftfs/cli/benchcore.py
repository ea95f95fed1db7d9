"""`raftfs bench-core`: the replicated core alone: three processes on loopback, every fdatasync on.

Each process is a replica with journal, LMDB state and proposer, without clients and chunkservers.
The one that is elected makes directories, each with a session and a sequence number of its own as a
mount's would have, at 1, 32 and 1,000 outstanding commands; before it measures what one fdatasync
of its disk and one round trip on loopback cost. Every figure is measured here and now.
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from raftfs import daemon, log
from raftfs.const import ROOT_INODE, SESSION_WINDOW
from raftfs.errors import UserError, invariant
from raftfs.meta.proposer import Proposer
from raftfs.meta.raft.replica import Replica, ReplicaConfig
from raftfs.meta.store import MetaStore
from raftfs.wire import ops
from raftfs.wire.auth import ClusterKey
from raftfs.wire.rpc import decode

OUTSTANDING = (1, 32, 1_000)
_START_S = 30.0
_WARM_UP_S = 0.5
_LANE = min(32, SESSION_WINDOW)  # outstanding commands of one session
_PROBES = 300


class Series(NamedTuple):
    """One measurement. CPU in microseconds a command, of the leader and of all three."""

    outstanding: int
    commands: int
    per_second: float
    p50_ms: float
    p99_ms: float
    leader_us: float
    all_us: float


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="raftfs bench-core", description="Measure three replicas without anything around them."
    )
    p.add_argument("--dir", type=Path, metavar="DIR",
                   help="a folder on the disk to measure (default: the temporary folder)")
    p.add_argument("--seconds", type=float, default=3.0, metavar="S",
                   help="for each number of outstanding commands (default: %(default)s)")
    p.add_argument("--json", action="store_true")
    p.add_argument("--replica", type=int, help=argparse.SUPPRESS)
    p.add_argument("--peers", help=argparse.SUPPRESS)
    p.add_argument("--profile", type=Path, metavar="FILE",
                   help="write a cProfile of the leader's loop to FILE (slows it down)")
    return p  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    args = parser().parse_args(argv)
    if args.replica is not None:
        return _replica(args)
    try:
        report = measure(args.dir, args.seconds, args.profile)
    except UserError as e:
        print(f"raftfs bench-core: {e}", file=sys.stderr)
        return e.exit_status
    print(json.dumps(report, indent=2) if args.json else _table(report))
    return 0


def _table(report: dict[str, Any]) -> str:
    lines = [
        f"one fdatasync {report['fdatasync_ms']:.2f} ms, one round trip on loopback "
        f"{report['round_trip_ms']:.2f} ms (medians)",
        "outstanding  commands/s   p50 ms   p99 ms   CPU us/command: leader   all three",
    ]
    for raw in report["series"]:
        s = Series(**raw)
        lines.append(
            f"{s.outstanding:11}  {s.per_second:10.0f}  {s.p50_ms:7.2f}  {s.p99_ms:7.2f}   "
            f"{s.leader_us:22.0f}   {s.all_us:9.0f}"
        )
    return "\n".join(lines)


# --- the process that measures


def measure(folder: Path | None, seconds: float, profile: Path | None = None) -> dict[str, Any]:
    """Run three replicas in a new folder; gives the leader's report. UserError."""
    try:
        made = Path(tempfile.mkdtemp(prefix="raftfs-bench-core-", dir=folder))
    except OSError as e:
        raise UserError(f"{e.filename} cannot be used: {e.strerror}; give a --dir") from None
    try:
        ClusterKey.generate(made / "key")
        peers = ",".join(f"127.0.0.1:{port}" for port in free_ports(3))
        with _replicas(made, peers, seconds, profile) as children:
            try:
                return _report(children, seconds)
            except UserError as e:
                raise UserError(f"{e}; they said: {_last_words(made)}") from None
    finally:
        shutil.rmtree(made)


def _last_words(folder: Path) -> str:
    said = [line for n in range(3) for line in (folder / f"{n}.log").read_text().splitlines()]
    return " / ".join(said[-3:]) or "nothing"


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@contextmanager
def _replicas(
    folder: Path, peers: str, seconds: float, profile: Path | None
) -> Iterator[list["subprocess.Popen[str]"]]:
    words = [sys.executable, "-m", "raftfs.cli.benchcore", "--dir", str(folder), "--peers", peers,
             "--seconds", str(seconds)]  # fmt: skip
    words += ["--profile", str(profile.absolute())] if profile else []
    children: list[subprocess.Popen[str]] = []
    try:
        for number in range(3):
            with open(folder / f"{number}.log", "w") as errors:
                children.append(subprocess.Popen(
                    [*words, "--replica", str(number)], stdout=subprocess.PIPE, stderr=errors,
                    text=True,
                ))  # fmt: skip
        yield children
    finally:
        for child in children:
            child.send_signal(signal.SIGTERM)
        for child in children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(10)
            child.kill()
            child.wait()
            assert child.stdout is not None
            child.stdout.close()


def _report(children: list["subprocess.Popen[str]"], seconds: float) -> dict[str, Any]:
    """Relay between the leader and the accounts of the kernel until the leader has finished."""
    limit_s = _START_S + 3 * len(OUTSTANDING) * (seconds + _WARM_UP_S)
    with _any_line(children, limit_s) as lines:
        report: dict[str, Any] = {}
        began: list[float] = []
        for said in lines:
            cpu = [_cpu_s(child.pid) for child in children]
            if "begin" in said:
                began = cpu
            elif "outstanding" in said:
                spent = sum(cpu) - sum(began)
                said["all_us"] = 1e6 * spent / max(1, said["commands"])
                report.setdefault("series", []).append(said)
            else:
                report |= said
            if len(report.get("series", ())) == len(OUTSTANDING):
                return report
    raise UserError(f"no leader finished the measurement within {limit_s:.0f} s")


@contextmanager
def _any_line(
    children: list["subprocess.Popen[str]"], limit_s: float
) -> Iterator[Iterator[dict[str, Any]]]:
    """What the children print, line by line, until one ends or the time is over."""
    import selectors

    selector = selectors.DefaultSelector()
    for child in children:
        selector.register(child.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]

    def lines() -> Iterator[dict[str, Any]]:
        until = time.monotonic() + limit_s
        while (left_s := until - time.monotonic()) > 0:
            for key, _ in selector.select(left_s):
                file: IO[str] = key.fileobj  # type: ignore[assignment]
                line = file.readline()
                if not line:
                    raise UserError("a replica ended before the measurement did")
                yield json.loads(line)

    try:
        yield lines()
    finally:
        selector.close()


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- a replica


def _replica(args: argparse.Namespace) -> int:
    import uvloop

    log.setup("raftfs-bench-core", "warning")
    daemon.collect_rarely()
    uvloop.run(_serve(args))
    return 0


async def _serve(args: argparse.Namespace) -> None:
    peers = tuple(args.peers.split(","))
    folder = args.dir / f"r{args.replica}"
    folder.mkdir()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    store = MetaStore(folder / "state.mdb")
    replica = Replica(
        ReplicaConfig(peers[args.replica], peers, folder), store, ClusterKey.load(args.dir / "key")
    )
    await replica.start()
    elected = asyncio.Event()
    replica.on_role.append(lambda: elected.set() if replica.is_leader else None)
    load = asyncio.ensure_future(_lead(args, replica, store, elected))
    ends: set[asyncio.Future[Any]] = {asyncio.ensure_future(stop.wait()), replica.failed, load}
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if load.done():
            load.result()
            await stop.wait()
    finally:
        load.cancel()
        await replica.stop()
        store.close()


async def _lead(
    args: argparse.Namespace, replica: Replica, store: MetaStore, elected: asyncio.Event
) -> None:
    await elected.wait()
    while not store.members():
        await asyncio.sleep(0.05)
    # In a thread: a leader whose loop waits for a slow disk would lose its office.
    fdatasync_ms = await asyncio.to_thread(_fdatasync_ms, args.dir)
    _say({"fdatasync_ms": fdatasync_ms, "round_trip_ms": await _round_trip_ms()})
    for outstanding in OUTSTANDING:
        await _load(Proposer(replica), f"warm{outstanding}", outstanding, _WARM_UP_S)
        _say({"begin": outstanding})
        began, cpu = time.monotonic(), time.process_time()
        with _profiled(args.profile if outstanding == OUTSTANDING[-1] else None):
            took = await _load(Proposer(replica), f"load{outstanding}", outstanding, args.seconds)
        wall_s, cpu_s = time.monotonic() - began, time.process_time() - cpu
        took.sort()
        invariant(len(took) > 0, "no command was committed")
        _say(Series(
            outstanding, len(took), len(took) / wall_s, 1e3 * took[len(took) // 2],
            1e3 * took[len(took) * 99 // 100], 1e6 * cpu_s / len(took), 0.0,
        )._asdict())  # fmt: skip


@contextmanager
def _profiled(path: Path | None) -> Iterator[None]:
    if path is None:
        yield
        return
    import cProfile

    profile = cProfile.Profile()
    profile.enable()
    try:
        yield
    finally:
        profile.disable()
        profile.dump_stats(path)


async def _load(proposer: Proposer, name: str, outstanding: int, seconds: float) -> list[float]:
    """Keep so many commands under way; gives the seconds that each took."""
    took: list[float] = []
    until = time.monotonic() + seconds

    async def lane(number: int, size: int) -> None:
        new = ops.NewSession(b"", f"{name}/{number}", ROOT_INODE, False)
        session = decode(int, await proposer.commit(new))
        numbers = iter(range(1, 1 << 60))
        parent = decode(ops.Attr, await proposer.commit(
            _mkdir(ROOT_INODE, f"{name}-{number}"), session, next(numbers)
        )).inode  # fmt: skip

        async def worker() -> None:
            while (began := time.monotonic()) < until:
                seq = next(numbers)
                await proposer.commit(_mkdir(parent, str(seq)), session, seq)
                took.append(time.monotonic() - began)

        await asyncio.gather(*(worker() for _ in range(size)))

    lanes = [min(_LANE, outstanding - at) for at in range(0, outstanding, _LANE)]
    await asyncio.gather(*(lane(number, size) for number, size in enumerate(lanes)))
    return took


def _mkdir(parent: int, name: str) -> ops.Create:
    return ops.Create(parent, name.encode(), ops.NodeType.DIR, 0o755, 0, 0, 0)


def _say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


def _fdatasync_ms(folder: Path) -> float:
    """Median of writing 4 KiB in place and fdatasync, as the journal does."""
    took = []
    with tempfile.TemporaryFile(dir=folder) as file:
        os.pwrite(file.fileno(), bytes(4096 * _PROBES), 0)
        os.fsync(file.fileno())
        for at in range(_PROBES):
            began = time.monotonic()
            os.pwrite(file.fileno(), b"x" * 4096, 4096 * at)
            os.fdatasync(file.fileno())
            took.append(time.monotonic() - began)
    return 1e3 * statistics.median(took)


async def _round_trip_ms() -> float:
    """Median of 100 bytes there and back between two event-loop streams of this process."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4096):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    took = []
    for _ in range(_PROBES):
        began = time.monotonic()
        writer.write(b"x" * 100)
        await reader.readexactly(100)
        took.append(time.monotonic() - began)
    writer.close()
    server.close()
    await server.wait_closed()
    return 1e3 * statistics.median(took)


if __name__ == "__main__":
    raise SystemExit(main())
