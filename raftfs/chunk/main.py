"""`raftfs-chunk`: options and start-up of a chunkserver."""

import argparse
import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from raftfs import daemon
from raftfs.chunk.disk import Disk
from raftfs.chunk.masterlink import MasterLinks
from raftfs.chunk.moving import Mover
from raftfs.chunk.scrub import DEFAULT_MIB_S, MIB_S_MAX, Scrubber
from raftfs.chunk.server import DataServer
from raftfs.chunk.store import ChunkStore
from raftfs.chunk.tickets import TicketGate
from raftfs.conf import hdd
from raftfs.const import PORT_CHUNK_DATA, PORT_CHUNKSERVERS
from raftfs.errors import RaftfsError, UserError
from raftfs.wire.auth import ClusterKey

log = structlog.get_logger("raftfs.chunkserver")


def parser() -> argparse.ArgumentParser:
    """The command line of `raftfs-chunk`."""
    p = argparse.ArgumentParser(prog="raftfs-chunk", description="A raftfs chunkserver.")
    disks = p.add_mutually_exclusive_group(required=True)
    disks.add_argument("--hdd", type=Path, action="append", metavar="DIR",
                       help="folder on a disk for chunks; may be given several times")
    disks.add_argument("--hdd-config", type=Path, metavar="FILE",
                       help="the disks as in mfshdd.cfg: [*]PATH [LIMIT or -LEAVE_FREE] a line, * "
                       "for removal; read again on SIGHUP")
    p.add_argument("-H", "--masters", default="mfsmaster", metavar="A,B,C",
                   help="all masters, as host[:port of the chunkservers] (default: %(default)s)")
    p.add_argument("--listen", default="0.0.0.0", metavar="ADDRESS",
                   help="address of the data port (default: %(default)s)")
    p.add_argument("--port", type=int, default=PORT_CHUNK_DATA, help="default: %(default)s")
    p.add_argument("--announce", metavar="HOST",
                   help="address under which clients reach this server (default: found out)")
    p.add_argument("--key", type=Path, default=Path("/etc/raftfs/cluster.key"), metavar="FILE",
                   help="the cluster key (default: %(default)s)")
    p.add_argument("--scrub-mib-s", type=float, default=DEFAULT_MIB_S, metavar="N",
                   help="MiB that the scrub reads of each disk in a second, 0: none "
                   "(default: %(default)s)")
    p.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    return p  # fmt: skip


def parse_masters(text: str) -> list[tuple[str, int]]:
    """`a,b:9420` as addresses. UserError names what is wrong."""
    masters = []
    for item in filter(None, (i.strip() for i in text.split(","))):
        host, colon, port = item.rpartition(":")
        if not colon:
            host, port = item, str(PORT_CHUNKSERVERS)
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise UserError(f"-H: {item!r} is not host or host:port")
        masters.append((host, int(port)))
    if not masters:
        raise UserError("-H names no master: give host[:port] of each, separated by commas")
    return masters


def _own_address(masters: list[tuple[str, int]]) -> str:
    """The address from which the first resolvable master is reached (nothing is sent)."""
    for host, port in masters:
        with contextlib.suppress(OSError), socket.socket(
            socket.AF_INET, socket.SOCK_DGRAM
        ) as sock:
            sock.connect((host, port))
            return str(sock.getsockname()[0])
    raise UserError(
        "cannot find out this server's own address: no master's name resolves; "
        "check -H, or give --announce HOST"
    )


async def serve(args: argparse.Namespace, stop: daemon.Stop) -> None:
    """Run a chunkserver until `stop` is set."""
    masters = parse_masters(args.masters)
    if not 0 <= args.scrub_mib_s <= MIB_S_MAX:
        raise UserError(f"--scrub-mib-s {args.scrub_mib_s:g}: must be 0 to {MIB_S_MAX:g}")
    key = ClusterKey.load(args.key)
    announce = args.announce or _own_address(masters)
    store = ChunkStore(open_disks(disk_lines(args)))
    if args.hdd_config:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload, args, store)
    try:
        tickets = TicketGate(key, lambda: store.cluster)
        server = DataServer(store, args.listen, args.port, tickets)
        scrubber, mover = Scrubber(store, args.scrub_mib_s), Mover(store)
        try:
            links = MasterLinks(store, masters, (announce, server.port), key, tickets,
                                scrubber.disk_statuses, tuner(store, scrubber))  # fmt: skip
            scrubber.start()
            mover.start()
            await _serve(store, scrubber, server, links, stop)
        finally:
            await asyncio.to_thread(mover.stop)
            await asyncio.to_thread(scrubber.stop)
            await asyncio.to_thread(server.close)
    finally:
        await asyncio.to_thread(store.close)


async def _serve(
    store: ChunkStore, scrubber: Scrubber, server: DataServer, links: MasterLinks,
    stop: daemon.Stop,
) -> None:  # fmt: skip
    links.start()
    log.info("chunkserver serves", server=store.server.hex(), port=server.port, copies=len(store))
    stopping: asyncio.Future[Any] = asyncio.ensure_future(stop.wait())
    try:
        while not stopping.done():
            await asyncio.wait(
                {stopping, links.failed}, timeout=1.0, return_when=asyncio.FIRST_COMPLETED
            )
            if links.failed.done():
                links.failed.result()
            await asyncio.to_thread(store.rest_idle)
            await asyncio.to_thread(scrubber.clean)
    finally:
        stopping.cancel()
        await links.stop()


def disk_lines(args: argparse.Namespace) -> list[hdd.HddLine]:
    """The disks, from the options or the file. UserError."""
    if args.hdd_config:
        return hdd.parse_file(args.hdd_config)
    return [hdd.HddLine(0, path) for path in args.hdd]


def reload(args: argparse.Namespace, store: ChunkStore) -> None:
    """SIGHUP: marks and limits apply at once; other disks only after a restart. A bad file changes
    nothing.
    """
    try:
        lines = {line.path.resolve(): line for line in hdd.parse_file(args.hdd_config)}
    except UserError as e:
        log.error("disks not read again", reason=str(e))
        return
    for disk in store.disks():
        line = lines.pop(disk.path.resolve(), None)
        if line is None:
            log.warning("disk is no longer listed: it goes on until a restart; to empty it first, "
                        "mark it with *", disk=str(disk.path))  # fmt: skip
            continue
        if disk.leaving != line.leaving:
            log.info("disk marked", disk=str(disk.path), leaving=line.leaving or "no")
        disk.leave_free, disk.limit, disk.leaving = line.leave_free, line.limit, line.leaving
    for path in lines:
        log.warning("another disk is used only after a restart", disk=str(path))
    log.info("disks read again", file=str(args.hdd_config))


def tuner(store: ChunkStore, scrubber: Scrubber) -> Callable[[str, str], None]:
    """What carries out `wire.Tune`. RaftfsError says why something cannot be done."""

    def tune(action: str, value: str) -> None:
        if action == "retest":
            store.retest(value)
            return
        try:
            mib_s = float(value)
        except ValueError:
            mib_s = -1.0
        if action != "scrub-rate" or not 0 <= mib_s <= MIB_S_MAX:
            raise RaftfsError(f"{action} {value!r} is not known here")
        scrubber.set_rate(mib_s)

    return tune


def open_disks(lines: list[hdd.HddLine]) -> list[Disk]:
    """Lock all disk folders. UserError if one cannot be used; then none is locked."""
    disks: list[Disk] = []
    try:
        for line in lines:
            if any(line.path.resolve() == d.path.resolve() for d in disks):
                raise UserError(f"disk {line.path} is given twice: give each folder once")
            disks.append(Disk(line.path, leave_free=line.leave_free, limit=line.limit,
                              leaving=line.leaving))  # fmt: skip
    except UserError:
        for disk in disks:
            disk.close()
        raise
    return disks


def main(argv: list[str] | None = None) -> int:
    """Run a chunkserver until it is stopped. Returns the exit status."""
    args = parser().parse_args(argv)
    return daemon.run("raftfs-chunk", lambda stop: serve(args, stop), level=args.log_level)


if __name__ == "__main__":
    raise SystemExit(main())
