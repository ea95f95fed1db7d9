"""docs/known-faults.md names tests that exist and faults that are planted, and lacks none."""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.sim import mutants as whole
from tests.sim.core import mutants as core
from tests.unit.planted import PLANTED

ROOT = Path(__file__).parent.parent.parent
WANTED = {*(f"H{n}" for n in range(1, 29)), *(f"T{n}" for n in range(1, 19)),
          *(f"O{n}" for n in range(1, 17))}  # fmt: skip


class Line(NamedTuple):
    """A row of the page."""

    fault: str
    number: str
    test: str
    bites: list[str]


def rows() -> list[Line]:
    """Of all its tables."""
    found = []
    for line in (ROOT / "docs/known-faults.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        number = re.match(r"([HTO]\d+): ", cells[0])
        if line.startswith("|") and number:
            assert len(cells) == 5 and all(cells), line
            found.append(Line(cells[0], number[1], cells[3].strip("`"), cells[4].split("; ")))
    return found


@pytest.fixture(scope="module")
def collected() -> set[str]:
    """Ids of all tests in the files that the page names."""
    files = sorted({row.test.partition("::")[0] for row in rows()})
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *files], cwd=ROOT, timeout=120,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {line for line in done.stdout.splitlines() if "::" in line}


def test_no_fault_is_missing() -> None:
    assert {row.number for row in rows()} == WANTED
    names = {bite.partition(": ")[2] for row in rows() for bite in row.bites}
    assert set(PLANTED) <= names, "planted, but not on the page"


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.fault.replace("::", ":"))
def test_a_row_tells_the_truth(row: Line, collected: set[str]) -> None:
    cases = {i for i in collected if i == row.test or i.startswith(row.test + "[")}
    assert cases, f"there is no {row.test}"
    for bite in row.bites:
        kind, _, name = bite.partition(": ")
        if kind == "stock":
            assert any("[stock" in case or "-stock" in case for case in cases)
        elif kind == "planted":
            assert PLANTED[name].test.partition("[")[0] == row.test
        else:
            assert kind == "simulated" and name in {**core.MUTANTS, **whole.MUTANTS}
