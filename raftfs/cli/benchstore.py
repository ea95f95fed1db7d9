"""`raftfs bench-store`: what many files cost a master: memory, start, look-ups, pauses of its loop.

Makes the files through the state machine of a single replica in this process (create, write grant,
commit, so that every file has its node, its name and a chunk), 1,000 to a directory, with the
journal and the checkpoints of a real master. Then starts `raftfs-master` on the folder. Every
figure is measured here and now.
"""

import argparse
import asyncio
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import uvloop

from raftfs import daemon, log
from raftfs.cli.benchcore import free_ports
from raftfs.client.meta import connect_tool, parse_masters
from raftfs.const import ROOT_INODE
from raftfs.errors import ReplyError, Status, UserError, invariant
from raftfs.meta.raft.checkpoints import CheckpointLimits
from raftfs.meta.raft.replica import Replica, ReplicaConfig
from raftfs.meta.state import read
from raftfs.meta.state.apply import Applied
from raftfs.meta.store import MetaStore
from raftfs.wire import messages as m
from raftfs.wire import ops
from raftfs.wire.auth import ClusterKey
from raftfs.wire.ops import Batch, Command, encode_batch
from raftfs.wire.rpc import decode

PER_DIR = 1_000
_BATCH = 250  # commands an entry
_BUSY_S = 0.05
_LOOKUPS = 20_000
_START_S = 120.0
_MASTER_CLIENTS = 3  # the client port, counted from the Raft port


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="raftfs bench-store", description="Measure a master that holds many files."
    )
    p.add_argument("--files", type=int, default=1_000_000, metavar="N")
    p.add_argument("--dir", type=Path, metavar="DIR",
                   help="a folder on the disk to measure (default: the temporary folder)")
    p.add_argument("--keep", action="store_true", help="leave the data behind")
    p.add_argument("--json", action="store_true")
    return p  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    args = parser().parse_args(argv)
    log.setup("raftfs-bench-store", "warning")
    daemon.collect_rarely()
    try:
        folder = Path(tempfile.mkdtemp(prefix="raftfs-bench-store-", dir=args.dir))
    except OSError as e:
        print(f"raftfs bench-store: {e.filename}: {e.strerror}; give a --dir", file=sys.stderr)
        return 1
    try:
        name = f"127.0.0.1:{free_ports(1)[0]}"
        ClusterKey.generate(folder / "key")
        report = uvloop.run(_fill(folder, name, args.files))
        report |= _look_up(folder, args.files)
        report |= _start(folder, name, args.files)
    except UserError as e:
        print(f"raftfs bench-store: {e}", file=sys.stderr)
        return e.exit_status
    finally:
        if not args.keep:
            shutil.rmtree(folder)
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        print("\n".join(f"{key:44} {value:14,.2f}".rstrip("0").rstrip(".")
                        for key, value in report.items()))  # fmt: skip
    return 0


# --- filling


class _Pauses:
    """The longest time that the event loop was not free, apart from this program's own work."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.001)
            self.longest_s = max(self.longest_s, time.monotonic() - began - 0.001)

    def stop(self) -> float:
        """Milliseconds."""
        self._task.cancel()
        return 1e3 * self.longest_s


async def _fill(folder: Path, name: str, files: int) -> dict[str, float]:
    store = MetaStore(folder / "state.mdb")
    limits = CheckpointLimits(rows=200_000, every_s=1e9, quiet_s=1e9)
    config = ReplicaConfig(name, (name,), folder, checkpoints=limits)
    replica = Replica(config, store, ClusterKey.load(folder / "key"))
    await replica.start()
    while not store.members():
        await asyncio.sleep(0.05)
    began = time.monotonic()
    await _make_files(replica, files)
    took_s = time.monotonic() - began
    pause_ms, rows = await _checkpoint_pause(replica, store)
    await replica.stop()
    store.close()
    return {
        "files": files,
        "files made a second": files / took_s,
        "state file, MiB": (folder / "state.mdb").stat().st_size / 2**20,
        "rows in the measured checkpoint": rows,
        "longest pause of the loop in it, ms": pause_ms,
    }


async def _make_files(replica: Replica, files: int) -> None:
    session = decode(int, (await _commit(replica, 0, [
        ops.NewSession(b"", "bench", ROOT_INODE, False)
    ]))[0].result.value)  # fmt: skip
    for at in range(0, files, PER_DIR):
        made = await _commit(replica, session, [_create(ROOT_INODE, f"d{at // PER_DIR}", 2)])
        parent = decode(ops.Attr, made[0].result.value).inode
        names = [f"file{n}" for n in range(min(PER_DIR, files - at))]
        await asyncio.gather(*(
            _make(replica, session, parent, names[start : start + _BATCH])
            for start in range(0, len(names), _BATCH)
        ))  # fmt: skip


def _create(parent: int, name: str, kind: int) -> ops.Create:
    return ops.Create(parent, name.encode(), kind, 0o644, 0, 0, 0)


async def _make(replica: Replica, session: int, parent: int, names: list[str]) -> None:
    made = await _commit(replica, session, [_create(parent, n, ops.NodeType.FILE) for n in names])
    inodes = [decode(ops.Attr, a.result.value).inode for a in made]
    granted = await _commit(replica, session, [ops.GrantWrite(i, 0, False) for i in inodes])
    grants = [decode(ops.Granted, a.result.value) for a in granted]
    await _commit(replica, session, [
        ops.CommitWrite(i, 4096, 10**18, [ops.Written(g.chunk, g.lock, True)])
        for i, g in zip(inodes, grants, strict=True)
    ])  # fmt: skip


async def _commit(replica: Replica, session: int, batch: Sequence[ops.Op]) -> list[Applied]:
    data = encode_batch(Batch(time.time_ns(), [Command(session, 0, op) for op in batch]))
    while True:
        try:
            applied: list[Applied] = await replica.submit(data)
            break
        except ReplyError as e:
            if e.status != Status.BUSY:
                raise
            await asyncio.sleep(_BUSY_S)  # the disk takes checkpoints more slowly than we change
    for one in applied:
        if one.result.status:
            raise ReplyError(one.result.status)
    return applied


async def _checkpoint_pause(replica: Replica, store: MetaStore) -> tuple[float, int]:
    """Have 200,000 rows changed since the last checkpoint, then watch the next one."""
    while store.freezing is not None:
        await asyncio.sleep(0.01)
    session = decode(int, (await _commit(replica, 0, [
        ops.NewSession(b"", "bench", ROOT_INODE, False)
    ]))[0].result.value)  # fmt: skip
    number = 0
    while store.dirty() < 190_000:
        ops_ = [_create(ROOT_INODE, f"extra{number + n}", ops.NodeType.FILE) for n in range(100)]
        await _commit(replica, session, ops_)
        number += 100
    rows, before = store.dirty(), store.checkpointed
    pauses = _Pauses()
    await asyncio.sleep(0.05)
    await _commit(replica, 0, [ops.Checkpoint()])
    while store.checkpointed == before:
        await asyncio.sleep(0.01)
    while store.tidy():
        await asyncio.sleep(0.01)
    return pauses.stop(), rows


# --- looking


def _look_up(folder: Path, files: int) -> dict[str, float]:
    """Names taken by chance, on a store that was just opened."""
    began = time.monotonic()
    store = MetaStore(folder / "state.mdb")
    opened_s = time.monotonic() - began
    chance = random.Random(1)
    took = []
    for _ in range(_LOOKUPS):
        number = chance.randrange(files)
        began = time.perf_counter()
        directory = read.lookup(store, ROOT_INODE, b"d%d" % (number // PER_DIR)).inode
        found = read.lookup(store, directory, b"file%d" % (number % PER_DIR))
        took.append(time.perf_counter() - began)
        invariant(found.length == 4096, "a file that was committed")
    took.sort()
    store.close()
    return {
        "opening the state, ms": 1e3 * opened_s,
        "two look-ups, p50, us": 1e6 * took[len(took) // 2],
        "two look-ups, p99, us": 1e6 * took[len(took) * 99 // 100],
    }


def _start(folder: Path, name: str, files: int) -> dict[str, float]:
    """A real master on this folder."""
    began = time.monotonic()
    with open(folder / "master.log", "w") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "raftfs.cli.master", "--peers", name, "--data", str(folder),
             "--key", str(folder / "key"), "--listen", "127.0.0.1"], stderr=errors, stdout=errors,
        )  # fmt: skip
    try:
        host, _, port = name.rpartition(":")
        masters = parse_masters(f"{host}:{int(port) + _MASTER_CLIENTS}")
        with connect_tool(masters, timeout_s=_START_S) as client:
            client.call(m.Lookup(ROOT_INODE, b"d0"))
            started_s = time.monotonic() - began
            chance = random.Random(2)
            for _ in range(2_000):
                number = chance.randrange(files)
                directory = client.call(m.Lookup(ROOT_INODE, b"d%d" % (number // PER_DIR))).inode
                client.call(m.Lookup(directory, b"file%d" % (number % PER_DIR)))
            time.sleep(20)  # the healer goes through all chunks meanwhile
            anonymous = _anonymous_mib(child.pid)
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(60)
    return {"start to first answer, s": started_s, "anonymous memory, MiB": anonymous}


def _anonymous_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) / 1024
    raise UserError(f"/proc/{pid}/smaps_rollup has no line Anonymous")


if __name__ == "__main__":
    raise SystemExit(main())
