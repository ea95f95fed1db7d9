"""Two short stories of bad networks, and that nothing is left behind when one is killed.

The long ones are run by hand: `python -m chaos.partition --help`.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chaos import network, toxics
from tests.conftest import NEEDS_FUSE

_LIMIT_S = 110.0


@pytest.fixture(autouse=True)
def machines() -> None:
    """Skip, with the reason, where no network namespaces can be made."""
    if NEEDS_FUSE:
        pytest.skip("this machine has no /dev/fuse or no fusermount3: the mount cannot be tested")
    why = network.missing()
    if why:
        pytest.skip(f"no partitions on this machine: {why}")


def tell(folder: Path, *words: str) -> tuple[int, str]:
    """Run the story; its exit status and everything it said."""
    done = subprocess.run(
        ["timeout", "-s", "KILL", str(_LIMIT_S), sys.executable, "-m", "chaos.partition", "--dir",
         str(folder), *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def left_behind(pid: int) -> list[str]:
    """Namespaces whose names carry the story's pid."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    names = [line.split()[0] for line in listed.stdout.splitlines()]
    return [name for name in names if name.startswith(f"{network.PREFIX}-{pid}-")]


def mounted_below(folder: Path) -> bool:
    """Whether anything is mounted there."""
    return f" {folder}/" in Path("/proc/self/mountinfo").read_text()


def test_masters_cut_from_one_another_or_asleep(tmp_path: Path) -> None:
    status, said = tell(
        tmp_path, "--faults", "heardnot,sides,pause", "--seconds", "2", "--clients", "2"
    )
    assert status == 0, said
    assert not mounted_below(tmp_path)


def test_masters_that_answer_without_proof_are_found(tmp_path: Path) -> None:
    status, said = tell(
        tmp_path, "--faults", "sides", "--clients", "2",
        "--master=-m tests.linear.cutmaster --planted",
    )  # fmt: skip
    assert status == 1 and "no order of the operations explains" in said, said


@pytest.mark.timeout(toxics.BUILD_S + 120)
def test_links_that_are_slow_thin_and_broken(tmp_path: Path) -> None:
    why = toxics.missing()
    if why:
        pytest.skip(f"no bad links on this machine: {why}")
    status, said = tell(
        tmp_path, "--faults", "slicer:clients>masters,timeout:leader>masters,"
        "reset_peer:masters>clients,mix", "--seconds", "2", "--clients", "2",
    )  # fmt: skip
    assert status == 0, said


def test_what_a_killed_story_leaves_is_removed_by_the_next(tmp_path: Path) -> None:
    story = subprocess.Popen(
        [sys.executable, "-m", "chaos.partition", "--namespaces", "--dir", str(tmp_path)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until = time.monotonic() + _LIMIT_S
    while not mounted_below(tmp_path):
        assert time.monotonic() < until and story.poll() is None, "the story does not mount"
        time.sleep(0.05)
    os.kill(story.pid, signal.SIGKILL)
    story.wait(10)
    assert left_behind(story.pid)
    network.sweep()
    assert not left_behind(story.pid) and not mounted_below(tmp_path)


def test_a_fault_that_does_not_exist_is_named(tmp_path: Path) -> None:
    status, said = tell(tmp_path, "--faults", "pause,earthquake")
    assert status == 2 and "earthquake is none of isolated," in said and "Traceback" not in said
