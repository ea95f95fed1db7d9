"""Keeps a link to every master and knows which one leads.

Tasks: one `_keep` per master (connect, ask who leads, wait for the end, again), one `_steer` that
registers the session with the leader whenever none is at hand, and one `_watch` that asks every
link for a sign of life each second, so that a peer that died without a word is noticed.

How a failover is seen, whichever comes first:

    leader's process dies      its link closes                       -> leave it, wait for news
    leader is deposed          it answers NOT_LEADER                 -> leave it, follow its hint
    leader is silent           another master announces a newer term -> leave it, follow the news
    leader's machine is gone   `_watch` gets no answer               -> close the link
"""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import structlog

from raftfs.client.session import Session
from raftfs.errors import LinkError, ReplyError, Status, UserError
from raftfs.wire import messages as m
from raftfs.wire.frame import FrameError
from raftfs.wire.rpc import Link, connect, decode

log = structlog.get_logger("raftfs.masters")

Address = tuple[str, int]

MASTERS_MAX = 15  # configured ones and those that the cluster itself named
_CONNECT_TIMEOUT_S = 1.0
_ALIVE_EVERY_S = 1.0
_ALIVE_TIMEOUT_S = 3.0  # no failover waits for this: the other masters announce the new leader
_PROBE_PAUSE_S = 0.03


class Masters:
    """Links to all masters; `leader` is the one on which the session is registered, or None.

    `on_leader(link)` is called as soon as a (new) leader has accepted the session, `on_new_session`
    when the cluster had forgotten the old one.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        session: Session,
        on_leader: Callable[[Link], None],
        on_new_session: Callable[[], None],
    ) -> None:
        self.addresses = list(addresses)
        self.session = session
        self.leader: Link | None = None
        self.links: dict[Address, Link] = {}
        self.refused: asyncio.Future[UserError] = asyncio.get_running_loop().create_future()
        self._on_leader = on_leader
        self._on_new_session = on_new_session
        self._known = m.Leader(0, "", "")
        self._needed = asyncio.Event()
        self._needed.set()
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin to connect."""
        for address in self.addresses:
            self._spawn(self._keep(address))
        self._spawn(self._steer())
        self._spawn(self._watch())

    async def close(self) -> None:
        """Drop all links and end the tasks."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for link in list(self.links.values()):
            link.close()

    def doubt(self, link: Link, hint: bytes = b"") -> None:
        """`link` said that it does not lead (`hint`: the reply's value) or lost our session."""
        self._learn_from(hint)
        if link is self.leader:
            self._leave("told so")

    def describe(self) -> str:
        """The masters and how each link stands, for messages."""
        return ", ".join(
            f"{host}:{port} ({'connected' if (host, port) in self.links else 'unreachable'})"
            for host, port in self.addresses
        )

    # --- tasks

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _keep(self, address: Address) -> None:
        while True:
            try:
                link = await connect(
                    *address, incoming=m.ClientNotice, handler=self._notice,
                    timeout_s=_CONNECT_TIMEOUT_S,
                )  # fmt: skip
            except LinkError:
                link = None
            if link is not None:
                self.links[address] = link
                self._news.set()
                self._ask_who_leads(link)
                await asyncio.wait([link.closed])
                del self.links[address]
                if link is self.leader:
                    self._leave("link lost")
            await asyncio.sleep(random.uniform(0.05, 0.2))

    async def _steer(self) -> None:
        while True:
            await self._needed.wait()
            self._news.clear()
            if await self._try_all():
                self._needed.clear()
                continue
            try:
                async with asyncio.timeout(_PROBE_PAUSE_S):
                    await self._news.wait()
            except TimeoutError:
                pass  # nobody knew more: ask round again

    async def _try_all(self) -> bool:
        """Offer the session to the likely leader, then to all others. True once one took it."""
        for link in self._candidates():
            if await self._enlist(link):
                return True
            if self._news.is_set():
                return False  # somebody knows better by now: begin again with that one
        return False

    async def _enlist(self, link: Link) -> bool:
        def outdated() -> bool:
            return self._known.term > term and self._first() is not link

        term = self._known.term
        attempt = asyncio.ensure_future(self.session.register(link))
        news = asyncio.ensure_future(self._news.wait())
        try:
            while not attempt.done():
                await asyncio.wait([attempt, news], return_when=asyncio.FIRST_COMPLETED)
                if news.done() and not attempt.done():
                    if self._first() not in (None, link):
                        return False  # another one leads, and says so: do not wait for this one
                    self._news.clear()
                    news = asyncio.ensure_future(self._news.wait())
            attempt.result()
            if link.closed.done() or outdated():
                return False
        except LinkError:
            return False
        except (ReplyError, FrameError) as e:
            await self._not_enlisted(link, e)
            return False
        finally:
            attempt.cancel()
            news.cancel()
        self.leader = link
        log.info("registered", master=f"{link.peer[0]}:{link.peer[1]}", term=self._known.term,
                 session=self.session.number)  # fmt: skip
        self._on_leader(link)
        return True

    async def _not_enlisted(self, link: Link, error: ReplyError | FrameError) -> None:
        if isinstance(error, FrameError):
            log.warning("strange answer", master=link.peer, reason=str(error))
            return
        if error.status == Status.NOT_LEADER:
            self._learn_from(error.value)
            return
        if error.status == Status.NO_SESSION and self.session.number:
            log.error("session forgotten by the cluster", session=self.session.number)
            self.session.forget_number()
            self._on_new_session()
            self._news.set()
            return
        refusal = self.session.refusal(error)
        if refusal is not None:
            if not self.refused.done():
                self.refused.set_result(refusal)
            if self.session.registered is not None:  # else `start` tells the user
                log.error("registration refused", reason=str(refusal))
            await asyncio.sleep(1.0)  # an administrator must act: no hurry

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_ALIVE_EVERY_S)
            for link in list(self.links.values()):
                if link is self.leader:
                    self._expect_life(link, link.call(m.Keepalive(), _ALIVE_TIMEOUT_S))
                else:
                    self._ask_who_leads(link)

    # --- news

    def _ask_who_leads(self, link: Link) -> None:
        future = link.call(m.WhoLeads(), _ALIVE_TIMEOUT_S)
        self._expect_life(link, future)
        future.add_done_callback(
            lambda f: None if f.exception() is not None else self._learn_from(f.result())
        )

    def _expect_life(self, link: Link, future: "asyncio.Future[bytes]") -> None:
        def check(done: "asyncio.Future[bytes]") -> None:
            silent = time.monotonic() - link.last_heard >= _ALIVE_TIMEOUT_S
            if isinstance(done.exception(), LinkError) and silent:
                link.close()  # `_keep` sees it and connects again
            elif isinstance(done.exception(), ReplyError) and link is self.leader:
                error = done.exception()
                assert isinstance(error, ReplyError)
                if error.status in (Status.NOT_LEADER, Status.NO_SESSION):
                    self.doubt(link, error.value if error.status == Status.NOT_LEADER else b"")

        future.add_done_callback(check)

    def _notice(self, _link: Link, notice: m.LeaderNotice) -> None:
        self._learn(notice.leader)

    def _learn_from(self, raw: bytes) -> None:
        """A `Leader | None` as it came in a reply."""
        if not raw:
            return
        try:
            leader = decode(m.Leader | None, raw)  # type: ignore[arg-type]
        except FrameError:
            return  # some other value: no hint
        if leader is not None:
            self._learn(leader)

    def _learn(self, leader: m.Leader) -> None:
        known = self._known
        if leader.term == known.term and leader.name == known.name and self.leader is None:
            self._news.set()  # it was asked before it could lead; now it can
        if leader.term < known.term or (leader.term == known.term and known.name):
            return
        self._known = leader
        if not leader.name:
            return  # a term without a leader yet: nobody better to go to
        address = _parse(leader.clients)
        if address is not None and address not in self.addresses:
            self._add(address)
        link = self.links.get(address) if address is not None else None
        if self.leader is not None and link is not self.leader:
            self._leave(f"{leader.name} leads in term {leader.term}")
        self._news.set()

    def _add(self, address: Address) -> None:
        """The leader is not among the configured masters (or is spelt otherwise): link to it."""
        if len(self.addresses) < MASTERS_MAX:
            self.addresses.append(address)
            self._spawn(self._keep(address))

    def _leave(self, why: str) -> None:
        log.info("leader left", why=why)
        self.leader = None
        self._needed.set()

    def _first(self) -> Link | None:
        """The link to the leader that is known, if there is one."""
        address = _parse(self._known.clients)
        return self.links.get(address) if address is not None else None

    def _candidates(self) -> list[Link]:
        first = self._first()
        rest = [link for link in self.links.values() if link is not first]
        return rest if first is None else [first, *rest]


def _parse(text: str) -> Address | None:
    host, _, port = text.rpartition(":")
    return (host, int(port)) if host and port.isdigit() else None
