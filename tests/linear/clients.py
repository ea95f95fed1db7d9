"""Clients that work on the same few names through `MetaClient` and write down what they heard.

One operation here is exactly one request, so its outcome is that of one moment; nothing is cached.
"""

import asyncio
import errno
import math
import random
import time
from typing import Any

from chaos.linear import Found, Operation
from raftfs.client.meta import Address, MetaClient
from raftfs.errors import LinkError, ReplyError
from raftfs.wire import messages as m
from raftfs.wire import ops
from raftfs.wire.ops import NodeType

NAMES = ("x", "y", "z")
ROOT = 1
_KINDS = {NodeType.FILE: "file", NodeType.DIR: "dir"}
_WEIGHTS = {
    "create": 4, "mkdir": 3, "unlink": 3, "rmdir": 3, "rename": 4, "link": 2,
    "lookup": 6, "list": 2,
}  # fmt: skip


class Recorder:
    """One client; its operations go to `history`, which all clients of a test share."""

    def __init__(
        self, name: str, addresses: list[Address], seed: int, history: list[Operation]
    ) -> None:
        self.name = name
        self.meta = MetaClient(addresses, timeout_s=30.0)
        self.done = 0
        self._chance = random.Random(f"{seed}/{name}")
        self._history = history
        self._dirs: list[int] = []
        self._files: list[int] = []

    async def work(self, roots: list[int], stop: asyncio.Event) -> None:
        """One random operation after the other."""
        while not stop.is_set():
            what = self._chance.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
            await self.do(what, self._somewhere(what, roots))

    def _somewhere(self, what: str, roots: list[int]) -> tuple[Any, ...]:
        root, name = self._chance.choice(roots), self._chance.choice(NAMES)
        below = self._chance.choice(self._dirs) if self._dirs else root
        place = root if self._chance.random() < 0.8 else below
        if what == "mkdir":
            return (root, name)
        if what == "rename":
            return (place, name, self._chance.choice(roots), self._chance.choice(NAMES))
        if what == "link":
            return (self._chance.choice(self._files) if self._files else 0, place, name)
        return (place,) if what == "list" else (place, name)

    async def do(self, what: str, where: tuple[Any, ...], label: str = "") -> None:
        """One operation, written down."""
        if what == "link" and not where[0]:
            return
        called, returned, error, value = time.monotonic(), math.inf, "", None
        try:
            value = await self._ask(what, where)
            returned = time.monotonic()
        except ReplyError as e:
            error, returned = errno.errorcode[e.status], time.monotonic()
        except LinkError:
            pass  # its outcome is unknown
        name = f"{self.name}{label}"
        self._history.append(Operation(name, what, where, called, returned, error, value))
        self.done += 1

    async def _ask(self, what: str, where: tuple[Any, ...]) -> Any:
        if what == "lookup":
            attr = await self.meta.call(m.Lookup(where[0], where[1].encode()))
            nlink = attr.nlink if attr.type == NodeType.FILE else 0
            self._remember(attr)
            return Found(attr.inode, _KINDS[attr.type], nlink)
        if what == "list":
            page = await self.meta.call(m.ReadDir(where[0], b"", 1_000))
            assert not page.more
            return frozenset((n.decode(), a.inode, _KINDS[a.type]) for n, a in page.entries)
        answer = await self.meta.mutate(_request(what, where))
        if what in ("create", "mkdir"):
            self._remember(answer)
            return answer.inode
        return None

    def _remember(self, attr: ops.Attr) -> None:
        known = self._files if attr.type == NodeType.FILE else self._dirs
        if attr.inode not in known:
            known.append(attr.inode)
            del known[:-4]


def _request(what: str, where: tuple[Any, ...]) -> ops.Op:
    places = [p.encode() if isinstance(p, str) else p for p in where]
    if what in ("create", "mkdir"):
        kind = NodeType.FILE if what == "create" else NodeType.DIR
        return ops.Create(*places, kind, 0o755, 0, 0, 0)
    kinds: dict[str, Any] = {
        "unlink": ops.Unlink, "rmdir": ops.Rmdir, "rename": ops.Rename, "link": ops.Link,
    }  # fmt: skip
    made: ops.Op = kinds[what](*places)
    return made


async def make_roots(meta: MetaClient) -> list[int]:
    """Two directories that stay."""
    made = [
        await meta.mutate(ops.Create(ROOT, name, NodeType.DIR, 0o755, 0, 0, 0))
        for name in (b"a", b"b")
    ]
    return [attr.inode for attr in made]
