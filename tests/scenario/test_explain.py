"""Nothing is unexplained: what the tools say about chunks that lost copies, all copies, their file.
"""

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from tests.scenario.cluster import KILLED, ScenarioCluster
from tests.scenario.test_power import holders
from tests.scenario.test_stories import write_synced


def explained(cluster: ScenarioCluster, what: str) -> dict[str, Any]:
    """What is told of one chunk: a file in the mount, or a number."""
    hosts = () if "/" in what else ("-H", masters(cluster))
    (story,) = json.loads(cluster.raftfs("explain", "chunk", what, *hosts, "--json"))
    assert isinstance(story, dict)
    return story


def tell(cluster: ScenarioCluster, *words: str) -> tuple[int, str]:
    """`raftfs ...` whatever it finds: exit status and stdout. It must not fail."""
    done = subprocess.run(
        ["timeout", "-s", "KILL", "180", sys.executable, "-m", "raftfs.cli.raftfs", *words, "-H",
         masters(cluster)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


def masters(cluster: ScenarioCluster) -> str:
    """For -H."""
    return ",".join(
        f"127.0.0.1:{p['ports']['clients']}"
        for p in cluster.status()["processes"] if p["role"] == "master"
    )  # fmt: skip


@pytest.mark.parametrize("cluster", [("--chunkservers", "4")], indirect=True)
def test_a_chunk_tells_why_it_waits_for_a_copy_and_what_was_done(
    cluster: ScenarioCluster,
) -> None:
    cluster.expect(*KILLED)
    path = cluster.mnt / "file"
    write_synced(path, b"x" * 100_000)
    cluster.raftfs("setgoal", "3", str(path))
    cluster.wait("three copies", lambda: len(holders(cluster, path)) == 3)
    whole = explained(cluster, str(path))
    assert whole["paths"] == ["/file"] and whole["plan"]["step"] in ("none", "repair")
    assert [c["state"] for c in whole["copies"]] == ["good"] * 3
    first, second, _ = ports = holders(cluster, path)

    cluster.raftfs("cluster", "kill", first)
    cluster.wait("the loss is seen", lambda: explained(cluster, str(path))["plan"]["wanted"] == 1)
    story = explained(cluster, whole["id"])
    away = [c for c in story["copies"] if c["state"] == "away"]
    assert [c["address"] for c in away] == [f"127.0.0.1:{ports[first]}"] and away[0]["since"]
    plan = story["plan"]
    assert (plan["step"], plan["delay"], plan["delay_s"]) == ("add", "disconnected", 300.0)
    assert 0 < plan["wait_s"] <= 300
    status, said = tell(cluster, "explain", "chunk", "/file")
    assert status == 0 and "may come back" in said
    assert re.search(r"1 copy will be made in [45] min", said), said
    assert f"127.0.0.1:{ports[first]}" in said

    cluster.raftfs("cluster", "kill", second)  # one copy is left: others are made soon

    def made() -> int:
        happened = explained(cluster, str(path))["incidents"]
        return sum(i["what"] == "replicated" for i in happened)

    before = made()
    cluster.wait("a copy is made", lambda: made() > before)
    assert "replicated at 127.0.0.1:" in cluster.raftfs("explain", "chunk", str(path))


def test_missing_chunks_are_listed_with_path_and_who_had_them(cluster: ScenarioCluster) -> None:
    cluster.expect(*KILLED)
    os.mkdir(cluster.mnt / "dir")
    path = cluster.mnt / "dir" / "only one"
    cluster.raftfs("setgoal", "1", str(cluster.mnt / "dir"))
    write_synced(path, b"x" * 100_000)
    ((server, port),) = holders(cluster, path).items()
    number = explained(cluster, str(path))["id"]
    assert tell(cluster, "missing") == (0, "0 missing\n")
    status, said = tell(cluster, "fsck")
    assert status == 0 and "1 chunks looked at; all is well" in said

    cluster.raftfs("cluster", "kill", server)
    cluster.wait("it is missed", lambda: tell(cluster, "missing")[0] == 2)
    status, said = tell(cluster, "missing")
    assert f"chunk {number} " in said and "/dir/only one" in said and said.endswith("1 missing\n")
    assert f"127.0.0.1:{port} " in said and "its server is away since 2" in said
    status, said = tell(cluster, "fsck")
    assert status == 2
    assert f"chunk {number}, chunk 0 of /dir/only one: without a good copy" in said
    assert "nothing can be done" in explained(cluster, str(path))["next"]

    cluster.raftfs("cluster", "kill", "leader")  # the others saw the server go, too
    cluster.wait("another leads", lambda: cluster.status()["leader"] != "")
    status, said = tell(cluster, "missing")
    assert status == 2 and f"127.0.0.1:{port} " in said and "is away since 2" in said

    for process in cluster.status()["processes"]:
        if process["role"] == "master" and process["state"] == "running":
            cluster.raftfs("cluster", "kill", process["name"])
    for name in ("m1", "m2", "m3"):
        cluster.raftfs("cluster", "start", name)
    cluster.wait("one leads", lambda: cluster.status()["leader"] != "")
    status, said = tell(cluster, "missing")
    assert status == 2 and "/dir/only one" in said
    assert "not known: no copy has been seen since" in said and f":{port}" not in said

    cluster.raftfs("cluster", "start", server)
    cluster.wait("it is back", lambda: tell(cluster, "missing") == (0, "0 missing\n"))


def test_a_copy_that_came_back_after_its_file_was_removed_is_an_orphan(
    cluster: ScenarioCluster,
) -> None:
    cluster.expect(*KILLED)
    path = cluster.mnt / "file"
    write_synced(path, b"x" * 100_000)
    number = explained(cluster, str(path))["id"]
    server, port = next(iter(holders(cluster, path).items()))
    assert tell(cluster, "whois", number) == (0, "/file (chunk 0 of it)\n")

    cluster.raftfs("cluster", "kill", server)
    path.unlink()

    def checked() -> Any:
        return json.loads(tell(cluster, "fsck", "--json")[1])

    cluster.wait("the chunk is forgotten", lambda: checked()["counts"].get("chunks", 0) == 0)
    assert checked()["orphans"] == []
    cluster.raftfs("cluster", "start", server)
    cluster.wait("the orphan is listed", lambda: checked()["orphans"] != [])
    (copy,) = checked()["orphans"]
    assert (copy["chunk"], copy["address"]) == (number, f"127.0.0.1:{port}")
    assert 6 * 86_400 < copy["kept_s"] <= 7 * 86_400
    status, said = tell(cluster, "fsck")
    assert status == 1
    assert f"copy of chunk {number} at 127.0.0.1:{port}" in said and "kept for another 6 d" in said
    status, said = tell(cluster, "explain", "chunk", number)
    assert status == 0 and "the metadata know no such chunk" in said
    assert "its copies are destroyed in 6 d 23 h" in said
    assert tell(cluster, "whois", number) == (1, f"no file owns chunk {number}\n")
