"""`raftfs-chunk`: options and start-up of a chunkserver."""

import argparse
import asyncio
import contextlib
import socket
from pathlib import Path
from typing import Any

import structlog

from raftfs import daemon
from raftfs.chunk.disk import Disk
from raftfs.chunk.masterlink import MasterLinks
from raftfs.chunk.server import DataServer
from raftfs.chunk.store import ChunkStore
from raftfs.chunk.tickets import TicketGate
from raftfs.const import PORT_CHUNK_DATA, PORT_CHUNKSERVERS
from raftfs.errors import UserError
from raftfs.wire.auth import ClusterKey

log = structlog.get_logger("raftfs.chunkserver")


def parser() -> argparse.ArgumentParser:
    """The command line of `raftfs-chunk`."""
    p = argparse.ArgumentParser(prog="raftfs-chunk", description="A raftfs chunkserver.")
    p.add_argument("--hdd", type=Path, action="append", required=True, metavar="DIR",
                   help="folder on a disk for chunks; may be given several times")
    p.add_argument("-H", "--masters", default="mfsmaster", metavar="A,B,C",
                   help="all masters, as host[:port of the chunkservers] (default: %(default)s)")
    p.add_argument("--listen", default="0.0.0.0", metavar="ADDRESS",
                   help="address of the data port (default: %(default)s)")
    p.add_argument("--port", type=int, default=PORT_CHUNK_DATA, help="default: %(default)s")
    p.add_argument("--announce", metavar="HOST",
                   help="address under which clients reach this server (default: found out)")
    p.add_argument("--key", type=Path, default=Path("/etc/raftfs/cluster.key"), metavar="FILE",
                   help="the cluster key (default: %(default)s)")
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
    key = ClusterKey.load(args.key)
    announce = args.announce or _own_address(masters)
    store = ChunkStore(open_disks(args.hdd))
    try:
        tickets = TicketGate(key, lambda: store.cluster)
        server = DataServer(store, args.listen, args.port, tickets)
        try:
            address = (announce, server.port)
            links = MasterLinks(store, masters, address, key, tickets)
            await _serve(store, server, links, stop)
        finally:
            await asyncio.to_thread(server.close)
    finally:
        await asyncio.to_thread(store.close)


async def _serve(
    store: ChunkStore, server: DataServer, links: MasterLinks, stop: daemon.Stop
) -> None:
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
    finally:
        stopping.cancel()
        await links.stop()


def open_disks(paths: list[Path]) -> list[Disk]:
    """Lock all disk folders. UserError if one cannot be used; then none is locked."""
    disks: list[Disk] = []
    try:
        for path in paths:
            if any(path.resolve() == d.path.resolve() for d in disks):
                raise UserError(f"--hdd {path} is given twice: give each folder once")
            disks.append(Disk(path))
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
