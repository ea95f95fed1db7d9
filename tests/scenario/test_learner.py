"""A metalogger is away, paused, killed: its files stay complete, or say loudly what is missing."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.scenario.cluster import ScenarioCluster

TARGET = "x" * 4_000  # a symbolic link to there takes as much of the log


class Symlinks(threading.Thread):
    """Makes symbolic links until it is stopped or has made `most`; each is one entry of the log."""

    def __init__(self, folder: Path, most: int) -> None:
        super().__init__()
        folder.mkdir()
        self.folder, self.most = folder, most
        self.made, self.stopping = 0, False
        self.error: OSError | None = None

    def run(self) -> None:
        try:
            while self.made < self.most and not self.stopping:
                (self.folder / f"s{self.made}").symlink_to(TARGET)
                self.made += 1
        except OSError as e:
            self.error = e


def symlinks(cluster: ScenarioCluster, name: str, number: int) -> None:
    """So many, by eight at once."""
    threads = [Symlinks(cluster.mnt / f"{name}{n}", number // 8) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert [t.error for t in threads] == [None] * 8
    assert sum(t.made for t in threads) == number


class Metalogger:
    """The only one of a cluster."""

    def __init__(self, cluster: ScenarioCluster) -> None:
        self.cluster = cluster
        self.folder = cluster.dir / "ml1"

    def kill(self, signal: str = "KILL") -> None:
        self.cluster.raftfs("cluster", "kill", "ml1", "--signal", signal)

    def start(self) -> None:
        self.cluster.raftfs("cluster", "start", "ml1")

    def state(self) -> str:
        """Of its process."""
        (found,) = [p for p in self.cluster.status()["processes"] if p["name"] == "ml1"]
        return str(found["state"])

    def ask(self, question: str, ok: bool = True) -> Any:
        """Run `raftfs-metalogger --data FOLDER QUESTION`; gives the JSON that it prints."""
        done = subprocess.run(
            ["timeout", "-s", "KILL", "90", sys.executable, "-m", "raftfs.cli.metalogger",
             "--data", str(self.folder), question],
            capture_output=True, text=True,
        )  # fmt: skip
        assert (done.returncode == 0) is ok, f"{question}: {done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
        return json.loads(done.stdout)

    def changelog(self) -> str:
        """The lines of the newest file."""
        return (self.folder / "changelog_ml.0.mfs").read_text()

    def wait_until_equal(self) -> str:
        """Until it and all masters have checkpoints of the same state, and nothing goes on any
        more; gives the digest.
        """
        seen = [("", time.monotonic())]

        def quiet() -> bool:
            views = self.cluster.status()["replicas"].values()
            mine = json.loads((self.folder / "learner.json").read_text())
            if len(views) < 3 or {v["digest"] for v in views} != {mine["digest"]}:
                return False
            if seen[-1][0] != mine["digest"]:
                seen.append((mine["digest"], time.monotonic()))
            return time.monotonic() > seen[-1][1] + 2.5

        # Something new makes everybody's next checkpoint due.
        (self.cluster.mnt / f"mark{time.time_ns()}").mkdir()
        self.cluster.wait("the metalogger to be where the masters are", quiet)
        return seen[-1][0]

    def check_complete(self) -> None:
        """All lines from the first one on are there, and give the masters' digest."""
        digest = self.wait_until_equal()
        assert "# HOLE" not in self.changelog()
        lines = [x for x in self.changelog().splitlines() if not x.startswith("#")]
        assert [int(x.partition(":")[0]) for x in lines] == list(range(1, len(lines) + 1))
        rehearsed = self.ask("--rehearse")
        assert rehearsed["digest"] == digest
        # The image was made at the very beginning, so the lines themselves have given this state.
        assert rehearsed["lines"] > len(lines) - 50 and rehearsed["digests"] > 1

    def snapshots(self) -> int:
        """How many it was sent."""
        logs = (self.cluster.dir / "log").glob("m?.log")
        return sum(log.read_text().count('"event": "snapshot begins"') for log in logs)


with_metalogger = pytest.mark.parametrize(
    "cluster", [("--metaloggers", "1", "--keep-log-mib", "16")], indirect=True
)


@with_metalogger
def test_a_metalogger_that_was_away_misses_nothing(cluster: ScenarioCluster) -> None:
    """For longer than another master could be without getting a snapshot."""
    metalogger = Metalogger(cluster)
    symlinks(cluster, "before", 40)
    metalogger.wait_until_equal()
    metalogger.kill()
    symlinks(cluster, "meanwhile", 1_600)
    kept = cluster.dir / "m1" / "journal" / "kept.idx"
    cluster.wait("masters to keep only for learners what it lacks", kept.exists)
    metalogger.start()
    metalogger.check_complete()
    assert metalogger.snapshots() == 0
    assert metalogger.ask("--status")["problems"] == []
    newest = metalogger.folder / "changelog_ml.0.mfs"
    text = newest.read_text()
    newest.write_text(text.replace("meanwhile3,", "meanwhile4,", 1))
    problem = json.dumps(metalogger.ask("--rehearse", ok=False))
    assert "checksum mismatch" in problem
    assert metalogger.ask("--status", ok=False)["problems"]
    newest.write_text(text)
    metalogger.ask("--rehearse")


@with_metalogger
def test_each_hour_and_each_night_bring_what_is_due(cluster: ScenarioCluster) -> None:
    """The files are made to look as if they were written two days ago."""
    metalogger = Metalogger(cluster)
    symlinks(cluster, "one", 40)
    metalogger.wait_until_equal()
    newest, image = (metalogger.folder / n for n in ("changelog_ml.0.mfs", "metadata_ml.mfs.back"))
    text, two_days_ago = newest.read_text(), time.time() - 2 * 86_400
    os.utime(newest, (two_days_ago, two_days_ago))
    rotated = metalogger.folder / "changelog_ml.1.mfs"
    cluster.wait("a rotation", rotated.exists)
    assert rotated.read_text() == text and newest.read_text() == ""
    symlinks(cluster, "two", 40)
    digest = metalogger.wait_until_equal()
    os.utime(image, (two_days_ago, two_days_ago))
    older = image.with_name(f"{image.name}.1")
    cluster.wait("a new image", older.exists)
    rehearsed = json.loads((metalogger.folder / "rehearsal.json").read_text())
    assert (rehearsed["problem"], rehearsed["digest"]) == ("", digest)
    assert rehearsed["lines"] > 80, "of both files, and behind the old image"
    said = [json.loads(x)["event"]
            for x in (cluster.dir / "log" / "ml1.log").read_text().splitlines()]  # fmt: skip
    cluster.wait("the image to be told", lambda: metalogger.ask("--status")["image_version"] > 80)
    assert said.index("changelogs rotated") < said.index("restore rehearsed")
    made = subprocess.run(
        [sys.executable, "-m", "raftfs.cli.metalogger", "--data", str(metalogger.folder),
         "--image"], capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert made.returncode == 0 and f"{image}: the metadata after line" in made.stdout
    assert metalogger.ask("--rehearse")["lines"] == 0


@pytest.mark.parametrize(
    "cluster", [("--metaloggers", "1", "--keep-log-mib", "1")], indirect=True
)  # fmt: skip
def test_a_true_hole_is_loud_and_an_image_closes_it(cluster: ScenarioCluster) -> None:
    cluster.expect("hole in the changelog")
    metalogger = Metalogger(cluster)
    symlinks(cluster, "before", 40)
    metalogger.wait_until_equal()
    last = json.loads((metalogger.folder / "learner.json").read_text())["version"]
    metalogger.kill()
    symlinks(cluster, "meanwhile", 160)
    time.sleep(3)  # a checkpoint, behind which the masters keep next to nothing
    metalogger.start()
    cluster.wait("the hole", lambda: "# HOLE" in metalogger.changelog())
    told = metalogger.folder / "learner.json"
    cluster.wait("the hole to be told", lambda: json.loads(told.read_text())["holes"])
    (hole,) = json.loads(told.read_text())["holes"]
    assert hole["first"] > last and hole["last"] > hole["first"] + 100
    marked = f"# HOLE: lines {hole['first']} to {hole['last']} missing\n"
    assert marked in metalogger.changelog()
    log = (cluster.dir / "log" / "ml1.log").read_text()
    assert log.count('"event": "hole in the changelog"') == 1 and metalogger.snapshots() == 1
    cluster.wait("an image", lambda: not json.loads(_status(metalogger))["problems"])
    digest = metalogger.wait_until_equal()
    rehearsed = metalogger.ask("--rehearse")
    assert rehearsed["digest"] == digest and rehearsed["version"] > hole["last"]
    metalogger.kill()  # it would make another image at once
    (metalogger.folder / "metadata_ml.mfs.back").unlink()
    problem = json.dumps(metalogger.ask("--rehearse", ok=False))
    assert "are missing" in problem, "without the image the hole is what it is"


def _status(metalogger: Metalogger) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "raftfs.cli.metalogger", "--data", str(metalogger.folder),
         "--status"], capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.stdout


@with_metalogger
def test_a_paused_metalogger_delays_nobody_and_catches_up(cluster: ScenarioCluster) -> None:
    metalogger = Metalogger(cluster)
    symlinks(cluster, "before", 40)
    metalogger.wait_until_equal()
    metalogger.kill("STOP")
    before = metalogger.changelog()
    symlinks(cluster, "meanwhile", 800)
    assert metalogger.state() == "paused" and metalogger.changelog() == before
    metalogger.kill("CONT")
    metalogger.check_complete()
    assert metalogger.snapshots() == 0


@with_metalogger
def test_a_metalogger_that_is_killed_again_and_again_has_every_line(
    cluster: ScenarioCluster,
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    metalogger = Metalogger(cluster)
    writer = Symlinks(cluster.mnt / "writer", 10**9)
    writer.start()
    written = []
    try:
        for _ in range(6):
            time.sleep(chance.uniform(0.2, 2.5))
            metalogger.kill()
            written.append(len(metalogger.changelog()))
            metalogger.start()
    finally:
        writer.stopping = True
        writer.join(60)
    assert writer.error is None and writer.made > 100
    assert len(set(written)) > 3, f"it must have been killed while it wrote: {written}"
    metalogger.check_complete()
