"""A master whose state is not what the log says stops with an alarm; the others go on without it,
and it comes back by the command that its last words name.
"""

import json
import subprocess
from pathlib import Path

import lmdb
import msgspec
import pytest

from raftfs.meta.state import digest
from raftfs.meta.store import AppliedRow
from tests.scenario.cluster import KILLED, ScenarioCluster
from tests.scenario.test_membership import Writer

APPLIED = b"\0applied"


def plant(state: Path, *, hidden: bool) -> None:
    """Give an entry of the root directory another inode. `hidden`: and the digest that fits, as a
    program that applies otherwise would have; else the digest is as it was, as on a rotten disk.
    """
    env = lmdb.open(str(state), subdir=False, map_size=1 << 40)
    with env.begin(write=True) as txn, txn.cursor() as cursor:
        assert cursor.set_range(b"E" + (1).to_bytes(8, "big") + b"file")
        key, old = cursor.item()
        new = old[:-1] + bytes([old[-1] ^ 1])
        cursor.put(key, new)
        if hidden:
            row = msgspec.msgpack.decode(txn.get(APPLIED) or b"", type=AppliedRow)
            total = digest.change(int.from_bytes(row.digest, "big"), key, old, new)
            row = AppliedRow(row.format, row.index, row.term, digest.to_bytes(total))
            txn.put(APPLIED, msgspec.msgpack.encode(row))
    env.close()


def command_line(cluster: ScenarioCluster, name: str) -> list[str]:
    """What `raftfs cluster start` runs."""
    nodes = json.loads((cluster.dir / "cluster.json").read_text())["nodes"]
    argv: list[str] = next(n["argv"] for n in nodes if n["name"] == name)
    return argv


@pytest.mark.parametrize("hidden", [False, True], ids=["rotten row", "applied otherwise"])
def test_a_master_whose_state_differs_stops_and_is_replaced(
    cluster: ScenarioCluster, hidden: bool
) -> None:
    cluster.expect(*KILLED, "replica stops")
    (cluster.mnt / "file0").write_text("before")
    writer = Writer(cluster.mnt)
    writer.start()
    cluster.wait("files", lambda: writer.done > 20)
    before = cluster.status()
    name = next(n for n in before["replicas"] if n != before["leader"])
    (pid,) = (p["pid"] for p in before["processes"] if p["name"] == name)
    cluster.raftfs("cluster", "kill", name, "--signal", "TERM")
    cluster.wait(f"the end of {name}", lambda: not Path(f"/proc/{pid}").exists())
    plant(cluster.dir / name / "state.mdb", hidden=hidden)

    run = subprocess.run(
        command_line(cluster, name), capture_output=True, text=True, timeout=90, check=False
    )
    assert run.returncode == 1, f"{run.returncode}: {run.stderr}"
    *log, sentence = run.stderr.splitlines()
    (alarm,) = (x for x in map(json.loads, log) if x["event"] == "replica stops")
    assert alarm["level"] == "error"
    assert "raftfs cluster replace NAME" in sentence and "--replace" in sentence
    assert ("differs from the leader's" if hidden else "is damaged: its rows") in sentence

    done = writer.done
    cluster.wait("files without it", lambda: writer.done > done + 20)
    said = cluster.raftfs("cluster", "replace", name)
    assert f"{name} is back and votes" in said

    def agree() -> bool:
        digests = {(v["digest_index"], v["digest"]) for v in cluster.status()["replicas"].values()}
        return len(digests) == 1

    writer.check()
    cluster.wait("one checkpoint of all three", agree)
    cluster.raftfs("cluster", "kill", next(n for n in before["replicas"] if n != name))
    (cluster.mnt / "after").write_text("needs the replaced one's vote")
