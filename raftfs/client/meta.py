"""Requests to the masters that are answered, exactly once, whatever happens to the leader.

`MetaClient.call` is for reads, `mutate` for operations that change something. Both survive any
number of leader changes: all that is outstanding is sent again, unchanged and in order, as soon as
a new leader has accepted the session; mutations carry a sequence number under which the state
machine remembers its first answer. Only the deadline ends a request without an answer.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Self

import structlog

from raftfs.client.masters import Address, Masters
from raftfs.client.session import Session
from raftfs.const import PORT_CLIENTS, SESSION_WINDOW
from raftfs.errors import LinkError, ReplyError, Status, UserError
from raftfs.wire import inquiries as q
from raftfs.wire import messages as m
from raftfs.wire import ops
from raftfs.wire.frame import FrameError
from raftfs.wire.rpc import Link, decode

log = structlog.get_logger("raftfs.client")

TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 10.0
_BUSY_PAUSE_S = 0.03
_SWEEP_S = 0.25

# What each request answers; anything not listed answers None.
_ANSWERS: dict[type, Any] = {
    m.WhoLeads: m.Leader,
    m.Lookup: ops.Attr,
    m.GetAttr: ops.Attr,
    m.ReadLink: bytes,
    m.ReadDir: m.DirPage,
    m.ReadChunk: m.ChunkMap,
    m.WriteChunk: m.ChunkMap,
    m.StatFs: m.FsStat,
    m.GetGoal: m.GoalTable,
    m.SetGoalTree: ops.GoalCounts,
    m.FileChunks: list[m.FileChunk],
    m.AskStatus: m.ReplicaStatus,
    m.ListMembers: list[m.MemberStatus],
    q.WhereNodes: list[q.NodePlace],
    q.FindNames: q.NamesPage,
    q.ExplainChunk: q.ChunkStory,
    q.ListMissing: q.MissingPage,
    q.CheckChunks: q.CheckedPage,
    q.CheckRows: q.RowsPage,
    q.ListOrphans: q.OrphansPage,
    m.Challenge: bytes,
    m.Admin: str,
    ops.Create: ops.Attr,
    ops.Symlink: ops.Attr,
    ops.Link: ops.Attr,
    ops.Unlink: ops.Removed,
    ops.Rmdir: ops.Removed,
    ops.Rename: ops.Removed,
    ops.SetAttr: ops.Attr,
    ops.Length: ops.Attr,
    ops.Acquire: ops.Attr,
    ops.Release: bool,
    ops.CommitWrite: ops.Attr,
    ops.SetGoal: ops.GoalCounts,
}


class _Ask:
    """One outstanding request. `link`: where it was sent last, None when it must be sent again."""

    __slots__ = ("answer", "deadline", "future", "link", "message", "number", "seq")

    def __init__(self, number: int, message: Any, answer: Any, seq: int, deadline: float) -> None:
        self.number = number
        self.message = message
        self.answer = answer
        self.seq = seq
        self.deadline = deadline
        self.link: Link | None = None
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()


class MetaClient:
    """A client of the masters. Made, started and used in one event loop."""

    def __init__(
        self,
        masters: Sequence[Address],
        session: Session | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.session = session or Session()
        self.timeout_s = timeout_s
        self.masters = Masters(masters, self.session, self._resend, self._session_lost)
        self.on_new_session: list[Any] = []  # callables: acquisitions of the old session are gone
        self._loop = asyncio.get_running_loop()
        self._asks: dict[int, _Ask] = {}  # in the order of asking
        self._next_ask = 0
        self._next_seq = 1
        self._unanswered: dict[int, None] = {}  # sequence numbers, oldest first
        self._window: deque[asyncio.Future[None]] = deque()  # mutations that wait for a number
        self._sweeping = False

    async def start(self, timeout_s: float = CONNECT_TIMEOUT_S) -> m.Registered:
        """Connect and register. UserError when refused or when no leader answers in time."""
        self.masters.start()
        deadline = time.monotonic() + timeout_s
        while self.masters.leader is None:
            if self.masters.refused.done():
                raise self.masters.refused.result()
            if time.monotonic() > deadline:
                raise UserError(
                    f"can't connect to mfsmaster: no leader within {timeout_s:g} s, tried "
                    f"{self.masters.describe()}; are the masters running?"
                )
            await asyncio.sleep(0.01)
        assert self.session.registered is not None
        return self.session.registered

    async def close(self) -> None:
        """Drop the links. What is outstanding fails."""
        await self.masters.close()
        for ask in list(self._asks.values()):
            self._fail(ask, LinkError("the client was closed"))

    # --- requests

    async def call(self, request: Any, timeout_s: float | None = None) -> Any:
        """Ask the leader: the decoded answer. ReplyError as answered, LinkError when too late."""
        ask = self._new_ask(request, _ANSWERS.get(type(request)), 0, timeout_s)
        return await self._answer(ask)

    async def mutate(self, op: ops.Op, timeout_s: float | None = None) -> Any:
        """Perform `op` exactly once; its documented result. Errors as for `call`.

        After a LinkError (deadline) the outcome is unknown.
        """
        while self._window_full():
            waiter = self._loop.create_future()
            self._window.append(waiter)
            await waiter
        seq = self._next_seq
        self._next_seq += 1
        self._unanswered[seq] = None
        ask = self._new_ask(m.Mutate(seq, op), _ANSWERS.get(type(op)), seq, timeout_s)
        return await self._answer(ask)

    async def ask_each(self, request: Any, timeout_s: float = 2.0) -> dict[Address, Any]:
        """Ask every master itself, leader or not: address -> answer, or the error."""

        async def one(address: Address) -> Any:
            link = self.masters.links.get(address)
            if link is None:
                return LinkError(f"cannot connect to {address[0]}:{address[1]}")
            try:
                return decode(_ANSWERS[type(request)], await link.call(request, timeout_s))
            except (LinkError, ReplyError, FrameError) as e:
                return e

        addresses = list(self.masters.addresses)
        return dict(zip(addresses, await asyncio.gather(*map(one, addresses)), strict=True))

    def _new_ask(self, message: Any, answer: Any, seq: int, timeout_s: float | None) -> _Ask:
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        self._next_ask += 1
        ask = _Ask(self._next_ask, message, answer, seq, time.monotonic() + timeout_s)
        self._asks[self._next_ask] = ask
        if not self._sweeping:
            self._sweeping = True
            self._loop.call_later(_SWEEP_S, self._sweep)
        self._send(ask)
        return ask

    async def _answer(self, ask: _Ask) -> Any:
        try:
            return await ask.future
        finally:
            del self._asks[ask.number]
            if ask.seq:
                self._unanswered.pop(ask.seq, None)
                while self._window and not self._window_full():
                    waiter = self._window.popleft()
                    if not waiter.done():
                        waiter.set_result(None)  # it looks again itself

    def _window_full(self) -> bool:
        oldest = next(iter(self._unanswered), self._next_seq)
        return self._next_seq - oldest >= SESSION_WINDOW - 1

    # --- sending and being answered

    def _send(self, ask: _Ask) -> None:
        link = self.masters.leader
        ask.link = link
        if link is None:
            return  # `_resend` sends it once a leader is known
        future = link.call(ask.message, max(0.05, ask.deadline - time.monotonic()))
        future.add_done_callback(lambda f: self._replied(ask, link, f))

    def _replied(self, ask: _Ask, link: Link, reply: "asyncio.Future[bytes]") -> None:
        error = reply.exception()
        if ask.future.done():
            return
        if error is None:
            self._decoded(ask, reply.result())
        elif ask.link is not link:
            return  # superseded: it has been sent to another leader since
        elif isinstance(error, ReplyError):
            self._replied_error(ask, link, error)
        elif link.closed.done():
            ask.link = None  # `_resend` follows, here only the link is gone
        # else: past its deadline; `_sweep` says so

    def _replied_error(self, ask: _Ask, link: Link, error: ReplyError) -> None:
        status = error.status
        if status in (Status.NOT_LEADER, Status.UNKNOWN, Status.NO_SESSION):
            ask.link = None
            hint = error.value if status == Status.NOT_LEADER else b""
            self.masters.doubt(link, hint)
            if self.masters.leader is not None:
                self._send(ask)
        elif status == Status.BUSY:
            self._loop.call_later(_BUSY_PAUSE_S, self._again, ask, link)
        else:
            ask.future.set_exception(error)

    def _again(self, ask: _Ask, link: Link) -> None:
        if not ask.future.done() and ask.link is link:
            self._send(ask)

    def _decoded(self, ask: _Ask, raw: bytes) -> None:
        try:
            ask.future.set_result(None if ask.answer is None else decode(ask.answer, raw))
        except FrameError as e:
            log.error("answer does not decode", request=type(ask.message).__name__, reason=str(e))
            ask.future.set_exception(LinkError(f"strange answer from a master: {e}"))

    def _resend(self, _leader: Link) -> None:
        """A new leader took the session: everything that is outstanding goes there at once."""
        outstanding = [ask for ask in self._asks.values() if not ask.future.done()]
        if outstanding:
            log.info("sent again to the new leader", requests=len(outstanding))
        for ask in outstanding:
            self._send(ask)

    def _session_lost(self) -> None:
        """Under a new session old numbers mean nothing: whether those took effect stays unknown."""
        for ask in list(self._asks.values()):
            if ask.seq:
                self._fail(ask, LinkError("the session was lost"))
        self._next_seq = 1
        self._unanswered.clear()
        for callback in self.on_new_session:
            callback()

    def _fail(self, ask: _Ask, error: LinkError) -> None:
        if not ask.future.done():
            ask.future.set_exception(error)
            ask.future.exception()  # its task may be cancelled already: not a lost exception

    def _sweep(self) -> None:
        now = time.monotonic()
        for ask in list(self._asks.values()):
            if ask.deadline <= now and not ask.future.done():
                log.error("request given up", request=_describe(ask.message),
                          masters=self.masters.describe())  # fmt: skip
                self._fail(ask, LinkError(f"no leader answered; tried {self.masters.describe()}"))
        self._sweeping = bool(self._asks)
        if self._sweeping:
            self._loop.call_later(_SWEEP_S, self._sweep)


def _describe(message: Any) -> str:
    return type(message.op if isinstance(message, m.Mutate) else message).__name__


def parse_masters(text: str, port: int = PORT_CLIENTS) -> list[Address]:
    """`a,b:9421,[::1]:9421` -> addresses. UserError if an item is none."""
    found: list[Address] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        host, colon, number = item.rpartition(":")
        if (item.startswith("[") and item.endswith("]")) or not colon:
            host, number = item, str(port)
        if not number.isdigit() or not 0 < int(number) < 65536 or not host:
            raise UserError(f"master address {item!r} is not host or host:port")
        found.append((host.strip("[]"), int(number)))
    if not found:
        raise UserError("no master named: give -H host[:port][,host[:port]...]")
    return found


class ToolClient:
    """The masters for a command line tool: blocking calls over a loop of its own.

    Leaves nothing behind; use it in a `with` block. Errors as in `MetaClient`.
    """

    def __init__(self, masters: Sequence[Address], session: int, timeout_s: float) -> None:
        self._loop = asyncio.new_event_loop()
        self._timeout_s = timeout_s
        who = Session(info="tool", tool=True, number=session)

        async def make() -> MetaClient:
            client = MetaClient(masters, who, timeout_s=timeout_s)
            client.masters.start()
            return client

        self.client = self._loop.run_until_complete(make())

    def register(self) -> m.Registered:
        """Wait until a leader took us. UserError if none does in time, or it refuses."""

        async def wait() -> m.Registered:
            deadline = time.monotonic() + self._timeout_s
            while self.client.masters.leader is None and time.monotonic() < deadline:
                if self.client.masters.refused.done():
                    raise self.client.masters.refused.result()
                await asyncio.sleep(0.005)
            if self.client.session.registered is None:
                raise UserError(
                    f"can't connect to mfsmaster: no leader within {self._timeout_s:g} s, tried "
                    f"{self.client.masters.describe()}; are the masters running?"
                )
            return self.client.session.registered

        return self._loop.run_until_complete(wait())

    def call(self, request: Any, timeout_s: float | None = None) -> Any:
        """As `MetaClient.call`."""
        self.register()
        return self._loop.run_until_complete(self.client.call(request, timeout_s))

    def mutate(self, op: ops.Op) -> Any:
        """As `MetaClient.mutate`; of a tool the masters take SetGoal only."""
        self.register()
        return self._loop.run_until_complete(self.client.mutate(op))

    def ask_each(self, request: Any, settle_s: float = 1.0) -> dict[Address, Any]:
        """As `MetaClient.ask_each`, after up to `settle_s` for all links to come up."""

        async def ask() -> dict[Address, Any]:
            deadline = time.monotonic() + settle_s
            masters = self.client.masters
            while len(masters.links) < len(masters.addresses) and time.monotonic() < deadline:
                await asyncio.sleep(0.005)
            return await self.client.ask_each(request)

        return self._loop.run_until_complete(ask())

    def close(self) -> None:
        """Drop the links."""
        if not self._loop.is_closed():
            self._loop.run_until_complete(self.client.close())
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def connect_tool(
    masters: Sequence[Address], session: int = 0, timeout_s: float = CONNECT_TIMEOUT_S
) -> ToolClient:
    """A `ToolClient`; `session` names the living mount under which SetGoal is asked for."""
    return ToolClient(masters, session, timeout_s)
