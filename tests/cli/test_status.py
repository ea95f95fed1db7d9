"""The word that `raftfs status` says, its reasons, and what the monitor makes of the same view."""

from msgspec.structs import replace

from raftfs.cli.monitor.web import metrics_text, page, status_object
from raftfs.cli.status import judge
from raftfs.wire import messages as m

UP = m.ServerStatus(b"a" * 16, "10.0.0.1", 9422, 1000, 100, 7, True)
LEADER = m.ReplicaStatus(
    name="m1:9418", cluster=b"c" * 16, role="leader", leader=m.Leader(3, "m1:9418", "m1:9421"),
    applied=10, committed=10, last_index=11, checkpoint=5, digest=b"d" * 16, digest_index=10,
    peers=[("m2:9418", True), ("m3:9418", False)], servers=[UP], sessions=1, nodes=2, chunks=3,
    undergoal=0, missing=0,
)  # fmt: skip
FOLLOWER = replace(LEADER, name="m2:9418", role="follower")


def word(*views: m.ReplicaStatus | None) -> tuple[str, set[str]]:
    said, reasons = judge({str(n): v for n, v in enumerate(views)})
    return said, {r.partition(":")[0] for r in reasons}

FIGURES = {"raftfs_journal_syncs_total": 7, "raftfs_loop_stall_longest_seconds": 0.25}


def test_all_is_well() -> None:
    assert word(LEADER, FOLLOWER, FOLLOWER) == ("OK", set())


def test_what_is_only_a_warning() -> None:
    assert word(LEADER, FOLLOWER, None) == ("WARN", {"MASTER_DOWN"})
    assert word(replace(LEADER, undergoal=1), FOLLOWER) == ("WARN", {"UNDERGOAL"})
    down = replace(UP, connected=False)
    assert word(replace(LEADER, servers=[UP, down])) == ("WARN", {"CHUNKSERVER_DOWN"})
    full = replace(UP, used=990)
    assert word(replace(LEADER, servers=[full])) == ("WARN", {"NEARLY_FULL"})


def test_what_is_an_error() -> None:
    assert word(FOLLOWER, FOLLOWER, None) == ("ERR", {"NO_LEADER", "MASTER_DOWN"})
    assert word(None, None) == ("ERR", {"NO_LEADER", "MASTER_DOWN"})
    assert word(replace(LEADER, missing=2)) == ("ERR", {"MISSING"})
    assert word(replace(LEADER, servers=[])) == ("ERR", {"NO_CHUNKSERVER"})
    other = replace(FOLLOWER, digest=b"x" * 16)
    assert word(LEADER, other) == ("ERR", {"DIVERGED"})
    assert word(LEADER, replace(other, digest_index=9)) == ("OK", set())


def test_the_monitor_shows_the_same() -> None:
    shown = status_object(LEADER)
    assert shown["leader"] == {"term": 3, "name": "m1:9418", "clients": "m1:9421"}
    assert shown["servers"][0]["address"] == "10.0.0.1:9422"
    text = metrics_text(LEADER, FIGURES)
    assert "raftfs_is_leader 1\n" in text and "raftfs_peers_connected 1\n" in text
    assert "# TYPE raftfs_journal_syncs_total counter\nraftfs_journal_syncs_total 7\n" in text
    assert "# TYPE raftfs_loop_stall_longest_seconds gauge\n" in text
    assert "raftfs_loop_stall_longest_seconds 0.25\n" in text
    assert "raftfs_is_leader 0\n" in metrics_text(FOLLOWER, {})


def test_the_page_escapes_what_it_shows() -> None:
    shown = page(replace(LEADER, name="<script>alert(1)</script>"))
    assert "<script>" not in shown and "&lt;script&gt;" in shown
    assert "10.0.0.1:9422" in shown
