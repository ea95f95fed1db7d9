"""What tickets cost: `python -m tests.chunk.ticketbench [--rounds N] [--dir D]`.

One chunkserver in a process of its own, first with its gate and then with one that admits
everybody, in turn. CPU time is that server's, per MiB written and read in frames of 64 KiB (the
smallest that a mount streams) and of 1 MiB, and per small file: a chunk of its own with 4 KiB,
written and read back, each with tickets that the server has never seen.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from raftfs.client.chunk import ChunkPool, ChunkReader
from raftfs.const import KIB, MIB
from raftfs.wire.messages import Hop
from tests.chunk.chainwriter import ChainWriter
from tests.chunk.parts import grant, ticket

_SERVER = """
import sys, pathlib, time
from tests.chunk.parts import Server
server = Server(pathlib.Path(sys.argv[1]))
if sys.argv[2] == "without":
    server.tickets.check = lambda head, peer: None
print(server.hop.server.hex(), server.hop.port, flush=True)
while sys.stdin.readline():
    print(time.process_time(), flush=True)
server.close()
"""
_STREAM_MIB = 64
_FILES = 300


class Bench:
    """A server process, with or without its gate."""

    def __init__(self, folder: Path, how: str) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-c", _SERVER, str(folder), how], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        server, port = self._line().split()
        self.address = ("127.0.0.1", int(port))
        self.server = bytes.fromhex(server)
        self.pool = ChunkPool()

    def _line(self) -> str:
        assert self.child.stdout is not None
        return self.child.stdout.readline()

    def cpu_s(self) -> float:
        """CPU time that the server has used."""
        assert self.child.stdin is not None
        self.child.stdin.write("\n")
        self.child.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        """Stop it."""
        self.pool.close()
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait(20)

    def stream(self, chunk: int, size: int) -> None:
        """Write and read so many MiB in frames of `size`."""
        data, granted = os.urandom(size), grant(chunk)
        with ChainWriter(self.pool, [Hop(self.server, *self.address)]) as writer:
            for at in range(0, _STREAM_MIB * MIB, size):
                writer.write(granted, at, data)
            writer.drain()
        reader = ChunkReader(self.pool, self.address, ticket=ticket(chunk))
        for at in range(0, _STREAM_MIB * MIB, size):
            reader.read(chunk, 1, at, size)

    def files(self, first: int) -> None:
        """Small ones."""
        data = os.urandom(4 * KIB)
        for chunk in range(first, first + _FILES):
            with ChainWriter(self.pool, [Hop(self.server, *self.address)]) as writer:
                writer.write(grant(chunk), 0, data)
                writer.drain()
            reader = ChunkReader(self.pool, self.address, ticket=ticket(chunk))
            assert reader.read(chunk, 1, 0, len(data)) == data


def measure(folder: Path, how: str) -> dict[str, float]:
    """One run: figures by name."""
    bench, figures = Bench(folder, how), {}
    try:
        for name, size in (("64 KiB frames", 64 * KIB), ("1 MiB frames", MIB)):
            before = bench.cpu_s()
            bench.stream(size, size)
            used_s = bench.cpu_s() - before
            figures[f"{name}: CPU ms per MiB"] = 1000 * used_s / (2 * _STREAM_MIB)
        before, began = bench.cpu_s(), time.perf_counter()
        bench.files(10_000_000)
        figures["small files: CPU us each"] = 1e6 * (bench.cpu_s() - before) / _FILES
        figures["small files: us each"] = 1e6 * (time.perf_counter() - began) / _FILES
    finally:
        bench.close()
    return figures


def main() -> None:
    """Alternate, and print medians and the median of the ratios."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--dir", type=Path, help="on the disk to use (default: a temporary folder)")
    args = p.parse_args()
    runs: dict[str, list[dict[str, float]]] = {"with": [], "without": []}
    with tempfile.TemporaryDirectory(prefix="tickets-bench-", dir=args.dir) as folder:
        for number in range(args.rounds):
            for how in ("with", "without") if number % 2 else ("without", "with"):
                runs[how].append(measure(Path(folder) / f"{how}{number}", how))
    for name in runs["with"][0]:
        pairs = [(a[name], b[name]) for a, b in zip(runs["with"], runs["without"], strict=True)]
        tickets, nothing = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{name}: {tickets:.2f} with, {nothing:.2f} without tickets, ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
