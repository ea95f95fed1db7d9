"""The blocking facade of command line tools."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

from raftfs.client.meta import connect_tool
from raftfs.errors import LinkError, UserError
from raftfs.wire import messages as m
from tests.unit.mount.fake_cluster import FakeCluster


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    """A fake cluster in a thread of its own."""
    fake = FakeCluster(1)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(fake.start(), loop).result(10)
    yield fake
    asyncio.run_coroutine_threadsafe(fake.stop(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


def test_calls_block_and_make_no_session(cluster: FakeCluster) -> None:
    with connect_tool(cluster.masters.addresses) as tool:
        assert tool.call(m.GetGoal(1, False)) == m.GoalTable({2: 1}, {})
    assert cluster.state.counts["NewSession"] == 0


def test_every_master_can_be_asked_itself(cluster: FakeCluster) -> None:
    with connect_tool([*cluster.masters.addresses, ("127.0.0.1", 1)]) as tool:
        answers = tool.ask_each(m.WhoLeads(), settle_s=0.3)
    assert isinstance(answers.pop(("127.0.0.1", 1)), LinkError)
    assert [a.name for a in answers.values()] == ["m0"] * 3


def test_nobody_there_is_one_sentence() -> None:
    with pytest.raises(UserError), connect_tool([("127.0.0.1", 1)], timeout_s=0.2) as tool:
        tool.call(m.GetAttr(1))
