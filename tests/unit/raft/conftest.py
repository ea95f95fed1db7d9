"""What the tests of the replication share."""

import pytest

from tests.unit.raft.stock import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Virtual time, set by the test."""
    return Clock(monkeypatch)
