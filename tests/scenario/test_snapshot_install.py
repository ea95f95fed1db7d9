"""The chaos story of the lost follower, small: it comes back by a snapshot, killed on the way."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import NEEDS_FUSE, free_port_base

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.skipif(NEEDS_FUSE, reason="this machine has no /dev/fuse or no fusermount3")
def test_a_follower_that_lost_everything_is_killed_while_it_comes_back(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "chaos.snapshot_install", "--files", "4000", "--kills", "2",
         "--before", "3", "--dir", str(tmp_path), "--port-base", str(free_port_base())],
        cwd=ROOT, timeout=240, capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "digests equal, nothing lost" in said, said
    (killed,) = (line for line in said.splitlines() if line.startswith("killed when"))
    assert killed.count("0.") + killed.count("1.") == 2, killed
