"""One master replica: the store, the Raft replica and the services around them.

Tasks besides the loop's callbacks: the replica's own, the healer's (while leading), `_watch` (each
second: vanished sessions, role of the moment), `_audit` (reads the whole state, slowly) and the
servers' links.
"""

import asyncio
from pathlib import Path
from typing import NamedTuple

import structlog

from raftfs import daemon
from raftfs.conf import exports
from raftfs.const import PORT_RAFT, TICKET_LIFETIME_S
from raftfs.errors import RaftfsError, UserError
from raftfs.meta.chunkhub import ChunkHub
from raftfs.meta.explainer import Explainer
from raftfs.meta.grants import Grants
from raftfs.meta.healer import Healer, HealingConfig
from raftfs.meta.proposer import Proposer
from raftfs.meta.raft.checkpoints import CheckpointLimits
from raftfs.meta.raft.replica import Replica, ReplicaConfig
from raftfs.meta.raft.surroundings import Surroundings
from raftfs.meta.service import ClientService
from raftfs.meta.state import read
from raftfs.meta.store import MetaStore
from raftfs.meta.stories import Stories
from raftfs.meta.tickets import Tickets
from raftfs.wire import messages as m
from raftfs.wire import rpc
from raftfs.wire.auth import ClusterKey

log = structlog.get_logger("raftfs.master")

_AUDIT_EVERY_S = 3_600.0
_AUDIT_PAUSE_S = 0.02  # between slices of a millisecond

# A master's ports, counted from its Raft port (its item in --peers, by default 9418).
CHUNKSERVERS, CLIENTS = 2, 3
# After a bootstrap, for chunkservers to come back whose copies may be newer than the metadata.
_PATIENCE_S = 60.0


class MasterConfig(NamedTuple):
    """What `raftfs-master` was told. `name` and `peers` are `host:port` with the Raft ports."""

    name: str
    peers: tuple[str, ...]
    data_dir: Path
    listen: str = "0.0.0.0"
    join: bool = False
    export_lines: tuple[exports.ExportLine, ...] = ()
    healing: HealingConfig = HealingConfig()
    checkpoints: CheckpointLimits = CheckpointLimits()
    bootstrapped: bool = False  # just now, in this process
    ticket_lifetime_s: float = TICKET_LIFETIME_S

    @property
    def port(self) -> int:
        """The Raft port, from which the others are counted."""
        return int(self.name.rpartition(":")[2])


def _chunkserver_address(name: str) -> str:
    host, _, port = name.rpartition(":")
    return f"{host}:{int(port) + CHUNKSERVERS}"


def checkpoint_limits(kept_log_bytes: int) -> CheckpointLimits:
    """What is kept of the log: all of it for learners, a small part of it for other masters, which
    are brought up to date by a snapshot sooner than by an hour's entries.
    """
    usual = CheckpointLimits()
    tail_bytes = min(usual.tail_bytes, kept_log_bytes // 16)
    return usual._replace(tail_bytes=tail_bytes, kept_bytes=kept_log_bytes)


def parse_peer(item: str) -> str:
    """`host` or `host:port` as `host:port`. UserError if it is neither."""
    host, colon, port = item.strip().rpartition(":")
    if not colon:
        host, port = item.strip(), str(PORT_RAFT)
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--peers: {item!r} is not host or host:port")
    return f"{host}:{port}"


class Master:
    """Everything that one master process runs."""

    def __init__(
        self,
        config: MasterConfig,
        key: ClusterKey,
        store: MetaStore | None = None,
        around: Surroundings | None = None,
    ) -> None:
        around = around or Surroundings()
        self._config = config
        self._key = key
        self.store = store or MetaStore(config.data_dir / "state.mdb")
        self.replica = Replica(
            ReplicaConfig(
                name=config.name, peers=config.peers, data_dir=config.data_dir,
                join=config.join, checkpoints=config.checkpoints,
                cluster=read.totals(self.store).cluster,
            ),
            self.store,
            key,
            around,
        )  # fmt: skip
        self.proposer = Proposer(self.replica, around.wall_ns)
        self.tickets = Tickets(
            key, lambda: read.totals(self.store).cluster, config.ticket_lifetime_s
        )
        self.hub = ChunkHub(
            cluster=lambda: read.totals(self.store).cluster,
            term=lambda: self.replica.term,
            on_change=lambda chunks: self.healer.examine(chunks),
            masters=lambda: [_chunkserver_address(name) for name in self.replica.members],
            stories=Stories(self._is_owned, around.wall_ns),
            tickets=self.tickets,
        )
        self.grants = Grants(
            self.store, self.hub, self.proposer, lambda: self.replica.term,
            patience_s=_PATIENCE_S if config.bootstrapped else 0.0,
        )  # fmt: skip
        self.healer = Healer(self.store, self.hub, self.grants, self.proposer, config.healing)
        self.service = ClientService(
            self.store, self.replica, self.proposer, self.grants, self.healer,
            list(config.export_lines), self.status, self.hub.space, key, self.hub.tune,
            self.tickets,
        )  # fmt: skip
        explainer = Explainer(self.store, self.hub, self.grants, self.healer)
        self.service.answers(explainer.questions())
        self._servers: list[rpc.Server] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._led_term = 0
        self._audits = 0

    def _is_owned(self, chunk: int) -> bool:
        row = read.chunk(self.store, chunk)
        return row is not None and row.refs > 0

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set or the replica fails. UserError if it cannot begin."""
        stopping = asyncio.ensure_future(stop.wait())
        try:
            await self._listen()
            starting = asyncio.ensure_future(self.replica.start())
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
                return
            starting.result()
            self.replica.on_role.append(self._role_changed)
            self._role_changed()
            self._tasks += map(asyncio.ensure_future, (self._watch(), self._audit()))
            log.info("master serves", name=self._config.name, peers=list(self._config.peers))
            await daemon.until(stop, self.replica.failed)
        finally:
            stopping.cancel()
            await self._shut_down()

    async def _listen(self) -> None:
        base = self._config.port
        hub, clients = self.hub, self.service
        try:
            self._servers = [
                await rpc.serve(
                    self._config.listen, base + CHUNKSERVERS, incoming=m.ChunkEvent,
                    handler=hub.handle, key=self._key, role="master", name=self._config.name,
                    on_close=hub.closed,
                ),
                await rpc.serve(
                    self._config.listen, base + CLIENTS, incoming=m.ClientRequest,
                    handler=clients.handle, on_open=clients.opened, on_close=clients.closed,
                ),
            ]  # fmt: skip
        except OSError as e:
            raise UserError(
                f"cannot listen on {self._config.listen}, ports {base + CHUNKSERVERS} and "
                f"{base + CLIENTS}: {e.strerror}; is another master running?"
            ) from None

    def _role_changed(self) -> None:
        leads, term = self.replica.is_leader, self.replica.term
        if leads and self._led_term != term:
            log.info("leading", term=term)
            self._led_term = term
            self.grants.reset()
            self.service.presence.reset()
            self.hub.lead()
            self.healer.lead()
        elif not leads and self._led_term:
            log.info("following", term=term, leader=self.replica.leader)
            self._led_term = 0
            self.grants.reset()
            self.hub.follow()
            self._tasks.append(asyncio.ensure_future(self.healer.follow()))
        self.service.role_changed()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self._tasks = [t for t in self._tasks if not t.done()]
            if self.store.damage is not None:  # a request has met it
                self.replica.must_stop(self.store.damage)
                return
            if not self.replica.is_leader:
                continue
            try:
                await self.service.sweep_sessions()
            except RaftfsError as e:
                log.warning("session sweep interrupted", reason=str(e))

    async def _audit(self) -> None:
        """Whether the rows in the file are those that were written, at the start and ever again.
        A row that rotted would else be found when a client asks for it, or never.
        """
        while True:
            try:
                while not (rows := await asyncio.to_thread(self.store.audit_some)):
                    await asyncio.sleep(_AUDIT_PAUSE_S)
            except UserError as e:
                self.replica.must_stop(e)
                return
            self._audits += 1
            log.info("the whole state is as it was written", rows=rows)
            await asyncio.sleep(_AUDIT_EVERY_S)

    async def _shut_down(self) -> None:
        for server in self._servers:
            await server.close()
        await self.healer.follow()
        await self.hub.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.replica.stop()
        self.store.close()

    def figures(self) -> dict[str, float]:
        """What `status` does not say: see `Replica.figures`."""
        return self.replica.figures() | {"raftfs_state_audits_total": self._audits}

    def status(self) -> m.ReplicaStatus:
        """This replica's view of itself and the cluster."""
        totals = read.totals(self.store)
        replica = self.replica
        role = "leader" if replica.is_leader else "follower" if replica.leader else "candidate"
        return m.ReplicaStatus(
            name=self._config.name, cluster=totals.cluster, role=role,
            leader=self.service.leader(), applied=self.store.applied[0],
            committed=replica.commit_index, last_index=replica.last_index,
            checkpoint=self.store.checkpointed[0], digest=self.store.digests[-1][1],
            digest_index=self.store.digests[-1][0], peers=replica.peers_connected(),
            servers=[s.status() for s in self.hub.servers.values()], sessions=totals.sessions,
            nodes=totals.nodes, chunks=totals.chunks, undergoal=len(self.healer.undergoal),
            missing=len(self.healer.missing),
        )  # fmt: skip
