"""The same log gives the same state, whatever the process: its hash seed, its clock, its time zone,
its moments of checkpoints.
"""

import hashlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from raftfs.meta.state.changelog import render
from raftfs.meta.store import MetaStore
from raftfs.wire import ops
from raftfs.wire.ops import Batch, Command, decode_batch, encode_batch
from tests.unit.planted import plant_from_environment

ENTRIES = 600


def chance_log(seed: int) -> list[bytes]:
    """Everything that clients and leaders ask for, much of it refused."""
    chance = random.Random(seed)
    names = [b"n%d" % n for n in range(12)]

    def op() -> ops.Op:
        inode, other = chance.randint(1, 25), chance.randint(1, 25)
        name, new = chance.choice(names), chance.choice(names)
        match chance.randrange(10):
            case 0 | 1 | 2:
                kind = chance.choice([ops.NodeType.FILE, ops.NodeType.DIR])
                return ops.Create(inode, name, kind, 0o755, 0, 0, 0)
            case 3:
                return ops.Unlink(inode, name)
            case 4:
                return ops.Rename(inode, name, other, new)
            case 5:
                return ops.Link(inode, other, new)
            case 6:
                return ops.Acquire(inode)
            case 7:
                return ops.GrantWrite(inode, chance.randrange(3), chance.random() < 0.3)
            case 8:
                written = [ops.Written(chance.randint(1, 9), chance.randint(1, 30), True)]
                return ops.CommitWrite(inode, chance.randrange(1 << 20), -1, written)
        return ops.Rmdir(inode, name)

    log = [
        encode_batch(Batch(10**18, [Command(0, 0, ops.Found(b"c" * 16, {"a:1": b"1" * 16}))])),
        encode_batch(Batch(10**18, [Command(0, 0, ops.NewSession(b"s", "x"))])),
    ]
    for number in range(ENTRIES):
        commands = [Command(1, 0, op()) for _ in range(chance.randint(1, 5))]
        log.append(encode_batch(Batch(10**18 + number, commands)))
    return log


def replay(log: Path, folder: Path, checkpoint_every: int) -> str:
    """Digest of the state and of all results and changelog lines."""
    store, told = MetaStore(folder / "state.mdb", cache_rows=50), hashlib.sha256()
    entries = msgspec.msgpack.decode(log.read_bytes(), type=list[bytes])
    done = 0
    for index, data in enumerate(entries, 1):
        time_ns = decode_batch(data).time
        for one in store.apply_entry(index, 1, data):
            done += one.result.status == 0
            told.update(repr(one.result).encode())
            if one.version:
                told.update(render(one.version, time_ns, one.command, one.result).encode())
        if index % checkpoint_every == 0 and store.freeze():
            store.write_frozen()
            store.thaw()
    assert done > ENTRIES // 4
    return f"{store.digest().hex()} {told.hexdigest()}"


def test_three_processes_that_differ_in_everything_else_agree(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    log = tmp_path / "log"
    log.write_bytes(msgspec.msgpack.encode(chance_log(seed)))
    found = set()
    for number, (hash_seed, shift_s, zone) in enumerate(
        [("0", 0, "UTC"), ("1", 10**8, "Asia/Tokyo"), ("4242", -(10**9), "America/New_York")]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-m", "tests.unit.state.test_determinism", str(log), str(folder),
             str(shift_s), str(7 + 13 * number)],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "TZ": zone}, timeout=60, check=True,
            capture_output=True, text=True,
        )  # fmt: skip
        found.add(done.stdout)
    assert len(found) == 1, found


def main() -> None:
    """One process of the test above: LOG FOLDER SHIFT_S CHECKPOINT_EVERY."""
    log, folder, shift_s, every = sys.argv[1:]
    now, now_ns, tick = time.time, time.time_ns, time.monotonic
    time.time = lambda: now() + int(shift_s)
    time.time_ns = lambda: now_ns() + int(shift_s) * 10**9
    time.monotonic = lambda: tick() * 3
    random.seed(shift_s)
    plant_from_environment()
    print(replay(Path(log), Path(folder), int(every)))


if __name__ == "__main__":
    main()
