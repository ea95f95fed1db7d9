"""pysyncobj as it is shipped, driven message by message: what the cured node is compared with.

Each fault is a question that is put to both sides. `verdict` wants yes of stock pysyncobj and no of
ours: a test that could not tell them apart proves nothing, and an upgrade that cures a fault is
noticed.
"""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
from pysyncobj import SyncObj, SyncObjConf, replicated, syncobj
from pysyncobj.node import Node
from pysyncobj.transport import Transport

B, C = Node("b"), Node("c")
both = pytest.mark.parametrize("side", ["stock", "ours"])


def verdict(side: str, fault: bool) -> None:
    """The fault is there in stock pysyncobj, and not here."""
    if side == "stock":
        assert fault, "stock pysyncobj has no such fault any more: correct docs/known-faults.md"
    else:
        assert not fault


class StockWire(Transport):  # type: ignore[misc]
    """Remembers what was sent; `up` False: nothing leaves."""

    def __init__(self, *_: Any) -> None:
        super().__init__(None, None, [])
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.up = True

    @property
    def ready(self) -> bool:
        """pysyncobj asks before it works."""
        return True

    def send(self, node: Node, message: dict[str, Any]) -> bool:
        """Remember it."""
        if self.up:
            self.sent.append((node.id, message))
        return self.up

    def take(self, kind: str) -> list[dict[str, Any]]:
        """Messages of a kind that were sent since the last call."""
        found = [m for _, m in self.sent if m["type"] == kind]
        self.sent = []
        return found


class StockNode(SyncObj):  # type: ignore[misc]
    """Node a of a, b, c. Its state is the list of what was put."""

    def __init__(self, others: tuple[str, ...] = ("b", "c"), **conf: Any) -> None:
        self.values: list[str] = []
        self.attempts = 0
        self.wire = StockWire()
        super().__init__(
            Node("a"), [Node(n) for n in others], SyncObjConf(autoTick=False, **conf),
            transport=self.wire,
        )  # fmt: skip
        for other in others:
            self.wire._onNodeConnected(Node(other))

    @replicated  # type: ignore[untyped-decorator]
    def put(self, value: str) -> int:
        """The only command."""
        self.attempts += 1
        if value == "boom":
            raise ZeroDivisionError
        self.values.append(value)
        return len(self.values)

    def command(self, value: str) -> bytes:
        """An entry of the log that puts a value."""
        return b"\x00" + pickle.dumps((self._methodToID["put_v0"], (value,)))

    def private(self, name: str) -> Any:
        """A field that SyncObj hides."""
        return self.__dict__[f"_SyncObj__{name}"]

    def indexes(self) -> list[int]:
        """Of the log."""
        journal = self.private("raftLog")
        return [journal[k][1] for k in range(len(journal))]

    def receive(self, node: Node, kind: str, **fields: Any) -> None:
        """A message from a node."""
        self._SyncObj__onMessageReceived(node, {"type": kind, **fields})

    def append(
        self, numbers: range | list[int], prev: int, prev_term: int, *, term: int = 1,
        commit: int = 1, node: Node = B,
    ) -> None:  # fmt: skip
        """Entries from a leader."""
        made = [(self.command(f"e{n}"), n, term) for n in numbers]
        self.receive(
            node, "append_entries", term=term, commit_index=commit, prevLogIdx=prev,
            prevLogTerm=prev_term, entries=made,
        )  # fmt: skip

    def acknowledge(self, next_index: int, node: Node = B) -> None:
        """A follower has everything before `next_index`."""
        self.receive(node, "next_node_idx", next_node_idx=next_index, reset=False, success=True)

    def lead(self, term: int = 1) -> None:
        """Be the leader of a term."""
        self._SyncObj__setCurrentTerm(term, "a")
        self._SyncObj__onBecomeLeader()

    def serve(self) -> int:
        """Be the leader, with the no-op committed; gives the next index."""
        self.lead()
        last: int = self.indexes()[-1]
        self.acknowledge(last + 1)
        self.doTick(0)
        return last + 1


class Clock:
    """Virtual time for pysyncobj."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(syncobj, "monotonicTime", lambda: self.now)

    def run(self, tick: Callable[[], Any], seconds: float, step: float = 0.05) -> None:
        """Time passes; the node ticks."""
        until = self.now + seconds
        while self.now < until:
            self.now += step
            tick()
