"""Registering with a leader, without any process."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

import raftfs
from raftfs.conf import exports
from raftfs.errors import ReplyError, Status
from raftfs.meta.service import ClientService
from raftfs.meta.state.dictrows import DictRows
from raftfs.wire import messages as m


class Founding:
    """A replica that leads; its cluster has no masters yet, so the state is empty."""

    members: dict[str, bytes]

    def __init__(self) -> None:
        self.members = {}

    async def read_barrier(self) -> None:
        """It leads."""


def test_who_comes_before_the_cluster_is_founded_is_asked_to_come_again() -> None:
    """The state has no root yet: it was once told, for good, that / does not exist."""
    stub: Any = SimpleNamespace()
    founding: Any = Founding()
    service = ClientService(
        DictRows(), founding, stub, stub, stub, list(exports.default_lines()), stub, stub, stub
    )
    link: Any = SimpleNamespace(peer=("127.0.0.1", 1), context=None)
    ask = m.Register(m.PROTOCOL, raftfs.__version__, 0, b"s" * 16, b"/", "", b"", False)
    with pytest.raises(ReplyError) as error:
        asyncio.run(service._register(link, ask))
    assert error.value.status == Status.BUSY
