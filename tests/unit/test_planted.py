"""Do the unit tests bite? Each fault that is planted turns the test red that is there for it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.planted import PLANTED

ROOT = Path(__file__).parent.parent.parent
_ALL_S = 600  # the first test waits for all of them, each a run of pytest
pytestmark = pytest.mark.timeout(_ALL_S + 20)


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """What `python -m tests.unit.planted` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.planted"], cwd=ROOT, timeout=_ALL_S, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", list(PLANTED))
def test_a_planted_fault_is_found(name: str, lines: list[str]) -> None:
    if "test_syncs" in PLANTED[name].test and shutil.which("strace") is None:
        pytest.skip("strace is not installed: apt-get install strace")
    (line,) = (line for line in lines if line.startswith(f"{name} "))
    assert line.endswith(" found"), f"python -m tests.unit.planted --verbose --only '{name}'"
