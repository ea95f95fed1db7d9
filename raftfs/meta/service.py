"""The masters' service for clients (port 9421): from request to barrier, proposal or grant.

Every replica listens. Any of them tells who leads and its own status; everything else is answered
by the leader only, reads after a read barrier, mutations when they are committed and applied.
"""

import errno
import functools
import hmac
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, cast

import msgspec
import structlog

from raftfs.conf import exports
from raftfs.const import ROOT_INODE, SESSION_SUSTAIN_S, WRITE_LOCK_GRACE_S
from raftfs.errors import NotLeader, RaftfsError, ReplyError, Status
from raftfs.meta.goals import Goals
from raftfs.meta.grants import Grants
from raftfs.meta.healer import Healer
from raftfs.meta.membership import Membership
from raftfs.meta.proposer import Proposer
from raftfs.meta.raft.replica import Replica
from raftfs.meta.sessions import ClientContext, Presence, same_secret
from raftfs.meta.state import read
from raftfs.meta.state.model import Rows
from raftfs.meta.tickets import Tickets
from raftfs.wire import messages as m
from raftfs.wire import ops
from raftfs.wire.auth import ClusterKey
from raftfs.wire.frame import encode
from raftfs.wire.rpc import Link

log = structlog.get_logger("raftfs.service")

FILE_CHUNKS_MAX = 1_000
READDIR_MAX = 4_000
_TOOL_REQUESTS = (
    m.GetGoal, m.SetGoalTree, m.FileChunks, m.GetAttr, m.Lookup, m.StatFs, m.ReadDir,
    m.ListMembers, m.Admin,
)  # fmt: skip


class ClientService:
    """Handles the requests of mounts and tools."""

    def __init__(
        self,
        rows: Rows,
        replica: Replica,
        proposer: Proposer,
        grants: Grants,
        healer: Healer,
        export_lines: list[exports.ExportLine],
        status: Callable[[], m.ReplicaStatus],
        fs_space: Callable[[], tuple[int, int]],
        key: ClusterKey,
        tune: Callable[[str, str, str], Awaitable[str]],
        tickets: Tickets,
    ) -> None:
        """`tune(name, action, value)`: as in `wire.TuneDisks`."""
        self._tune = tune
        self._rows = rows
        self._replica = replica
        self._proposer = proposer
        self._grants = grants
        self._healer = healer
        self._exports = export_lines
        self._status = status
        self._fs_space = fs_space
        self._goals = Goals(rows, replica, proposer, healer)
        self._membership = Membership(replica)
        self._key = key
        self._tickets = tickets
        self._challenges: dict[Link, bytes] = {}
        self._links: set[Link] = set()
        self._for_tools: set[type] = set(_TOOL_REQUESTS)
        self.presence = Presence()
        self._anyone: dict[type, Callable[[Link, Any], Any]] = {
            m.WhoLeads: lambda link, ask: self.leader(),
            m.AskStatus: lambda link, ask: self._status(),
            m.Challenge: self._challenge,
            m.Keepalive: lambda link, ask: None,
        }
        self._reads: dict[type, Callable[[Link, Any], Any]] = {
            m.Lookup: lambda link, a: read.lookup(self._rows, a.parent, a.name),
            m.GetAttr: lambda link, a: read.getattr(self._rows, a.inode),
            m.ReadLink: lambda link, a: read.readlink(self._rows, a.inode),
            m.ReadDir: self._read_dir,
            m.ReadChunk: self._read_chunk,
            m.StatFs: self._stat_fs,
            m.FileChunks: self._file_chunks,
            m.ListMembers: lambda link, a: self._membership.list(),
        }
        self._writes: dict[type, Callable[[Link, Any], Awaitable[Any]]] = {
            m.Mutate: self._mutate,
            m.WriteChunk: self._write_chunk,
            m.GetGoal: lambda link, a: self._goals.table(a),
            m.SetGoalTree: lambda link, a: self._goals.set_tree(a),
            m.EndMySession: self._end_session,
            m.Admin: self._admin,
        }

    def answers(self, questions: dict[type, Callable[[Any], Any]]) -> None:
        """Have these requests, which tools may make, answered as all reads are."""
        for kind, answer in questions.items():
            self._reads[kind] = functools.partial(_ask_only, answer)
            self._for_tools.add(kind)

    # --- links

    def opened(self, link: Link) -> None:
        """A client connected: tell it at once who leads."""
        self._links.add(link)
        link.notify(m.LeaderNotice(self.leader()))

    def closed(self, link: Link) -> None:
        """A client's link is gone."""
        self._links.discard(link)
        self._challenges.pop(link, None)
        if isinstance(link.context, ClientContext) and link.context.session:
            self.presence.left(link.context.session, link)

    def leader(self) -> m.Leader:
        """Who leads, as far as this replica knows; names no one before it can serve."""
        name = self._replica.leader
        if name == self._replica.config.name and not self._serves():
            name = ""
        host, _, port = name.rpartition(":")
        clients = f"{host}:{int(port) + 3}" if name else ""
        return m.Leader(self._replica.term, name, clients)

    def role_changed(self) -> None:
        """Push the news to every client, so that none has to find out by waiting."""
        notice = m.LeaderNotice(self.leader())
        for link in self._links:
            link.notify(notice)

    def handle(self, link: Link, ask: m.ClientRequest) -> Any:
        """One request (an RPC handler)."""
        kind = type(ask)
        if kind in self._anyone:
            return self._anyone[kind](link, ask)
        if not self._serves():
            raise self._not_leader()
        if kind is m.Register:
            return self._led(self._register(link, cast(m.Register, ask)))
        if not isinstance(link.context, ClientContext):
            raise ReplyError(Status.NO_SESSION)
        if not link.context.session and kind not in self._for_tools:
            raise ReplyError(errno.EPERM)
        if kind in self._reads:
            return self._read(link, ask)
        return self._led(self._writes[kind](link, ask))

    def _serves(self) -> bool:
        """Leads, and the cluster is founded: a new one has no root directory for a moment."""
        return bool(self._replica.members) and self._replica.is_leader

    def _not_leader(self) -> ReplyError:
        return ReplyError(Status.NOT_LEADER, encode(self.leader()))

    async def _led(self, work: Awaitable[Any]) -> Any:
        """Translate a loss of leadership on the way into a status that the client understands."""
        try:
            return await work
        except NotLeader:
            raise self._not_leader() from None
        except ReplyError as e:
            if e.status == Status.NOT_LEADER:
                raise self._not_leader() from None
            raise

    async def _read(self, link: Link, ask: Any) -> Any:
        try:
            await self._replica.read_barrier()
        except NotLeader:
            raise self._not_leader() from None
        # no await until the answer is made: it is of one moment of the state
        return self._reads[type(ask)](link, ask)

    # --- sessions

    def _challenge(self, link: Link, ask: m.Challenge) -> bytes:
        self._challenges[link] = secrets.token_bytes(32)
        return self._challenges[link]

    async def _register(self, link: Link, ask: m.Register) -> m.Registered:
        if ask.protocol != m.PROTOCOL:
            raise RaftfsError(f"protocol {ask.protocol} is not spoken here ({m.PROTOCOL} is)")
        if ask.tool:
            registered = self._registered(0, ROOT_INODE, None)
            link.context = ClientContext(0, registered)
            return registered
        line = self._choose_export(link, ask)
        await self._replica.read_barrier()
        root = self._resolve(ask.path)
        if ask.session:
            row = read.session(self._rows, ask.session)
            if row is None or not same_secret(ask.secret, row.secret):
                raise ReplyError(Status.NO_SESSION)
            session = ask.session
        else:
            new = ops.NewSession(ask.secret, ask.info[:1024], root, line.readonly)
            session = msgspec.msgpack.decode(await self._proposer.commit(new), type=int)
            log.info("session opened", session=session, client=ask.info, peer=link.peer[0])
        registered = self._registered(session, root, line)
        if not link.closed.done():
            link.context = ClientContext(session, registered)
            self.presence.came(session, link)
        return registered

    def _choose_export(self, link: Link, ask: m.Register) -> exports.ExportLine:
        chosen = exports.choose(
            self._exports, link.peer[0], ask.version, ask.path.decode("utf-8", "surrogateescape"),
            ask.proof, self._challenges.pop(link, b""),
        )  # fmt: skip
        if isinstance(chosen, exports.ExportLine):
            return chosen
        log.warning("client refused", peer=link.peer[0], reason=str(chosen))
        raise ReplyError(Status.BAD_PASSWORD if "password" in str(chosen) else Status.NO_EXPORT)

    def _resolve(self, path: bytes) -> int:
        inode = ROOT_INODE
        for name in path.split(b"/"):
            if name not in (b"", b"."):
                inode = read.lookup(self._rows, inode, name).inode
        if read.getattr(self._rows, inode).type != ops.NodeType.DIR:
            raise ReplyError(errno.ENOTDIR)
        return inode

    def _registered(
        self, session: int, root: int, line: exports.ExportLine | None
    ) -> m.Registered:
        cluster = read.totals(self._rows).cluster
        if line is None:
            return m.Registered(session, cluster, root, False, True, False, 0, 0, 0, 0)
        all_uid, all_gid = line.mapall or (0, 0)
        return m.Registered(
            session, cluster, root, line.readonly, not line.dynamicip, line.mapall is not None,
            line.maproot[0], line.maproot[1], all_uid, all_gid,
        )  # fmt: skip

    async def _end_session(self, link: Link, ask: m.EndMySession) -> None:
        session = link.context.session
        await self._proposer.commit(ops.EndSession(session))
        self.presence.forget(session)
        log.info("session closed", session=session, peer=link.peer[0])

    async def sweep_sessions(self) -> None:
        """Leader, now and then: let go what vanished clients hold, after their grace."""
        for row in list(read.sessions(self._rows)):
            absent_s = self.presence.absent_s(row.id)
            if absent_s > SESSION_SUSTAIN_S:
                await self._proposer.commit(ops.EndSession(row.id))
                self.presence.forget(row.id)
                log.info("session expired", session=row.id, client=row.info)
            elif absent_s > WRITE_LOCK_GRACE_S:
                for chunk in read.session_locks(self._rows, row.id):
                    await self._proposer.commit(ops.Unlock(chunk.id, chunk.lock))
                    self._grants.doubt(chunk.id)
                    log.warning("write grant ended by force", session=row.id,
                                chunk=f"{chunk.id:016X}")  # fmt: skip
                    await self._settle(chunk.id)

    async def _settle(self, chunk_id: int) -> None:
        row = read.chunk(self._rows, chunk_id)
        if row is not None and row.refs:
            try:
                await self._grants.settle(row)
            except ReplyError as e:
                log.warning("chunk not settled yet", chunk=f"{chunk_id:016X}", reason=str(e))

    # --- administration

    async def _admin(self, link: Link, ask: m.Admin) -> str:
        challenge = self._challenges.pop(link, b"")
        if not challenge:  # it was given by another leader
            raise ReplyError(errno.EAGAIN)
        proof = self._key.derive(b"admin", challenge, encode(ask.action))
        if not hmac.compare_digest(proof, ask.proof):
            log.warning("administration refused", peer=link.peer[0])
            raise RaftfsError("the cluster key does not match: give the masters' own with --key")
        log.info("administration", action=type(ask.action).__name__, name=ask.action.name,
                 peer=link.peer[0])  # fmt: skip
        if isinstance(ask.action, m.AddMember):
            return await self._membership.add(ask.action.name)
        if isinstance(ask.action, m.TuneDisks):
            return await self._tune(ask.action.name, ask.action.action, ask.action.value)
        if isinstance(ask.action, m.RemoveMember):
            return await self._membership.remove(ask.action.name)
        return await self._membership.transfer(ask.action.name)

    # --- reads

    def _read_dir(self, link: Link, ask: m.ReadDir) -> m.DirPage:
        return read.readdir(self._rows, ask.inode, ask.after, min(ask.limit, READDIR_MAX))

    def _read_chunk(self, link: Link, ask: m.ReadChunk) -> m.ChunkMap:
        found = self._grants.locate(ask.inode, ask.index, link.peer[0])
        return self._tickets.for_reader(found, link.context.session)

    def _stat_fs(self, link: Link, ask: m.StatFs) -> m.FsStat:
        total, available = self._fs_space()
        return m.FsStat(total, available, read.totals(self._rows).nodes)

    def _file_chunks(self, link: Link, ask: m.FileChunks) -> list[m.FileChunk]:
        found = []
        for index, row in read.file_chunks(self._rows, ask.inode, ask.first, FILE_CHUNKS_MAX):
            if row is None:
                found.append(m.FileChunk(index, 0, 0, []))
            else:
                copies = self._grants.locations(row, "")
                copies.sort(key=lambda c: (c.host, c.port))
                ticket = self._tickets.for_list(row.id, link.context.session)
                found.append(m.FileChunk(index, row.id, row.version, copies, ticket))
        return found

    # --- mutations

    async def _mutate(self, link: Link, ask: m.Mutate) -> msgspec.Raw:
        context: ClientContext = link.context
        if not isinstance(ask.op, ops.CLIENT_OPS):
            raise ReplyError(errno.EPERM)
        if context.registered.readonly and not isinstance(ask.op, ops.Acquire | ops.Release):
            raise ReplyError(errno.EROFS)
        op = _map_identity(ask.op, context.registered)
        result = await self._proposer.propose(context.session, ask.seq, op)
        if result.status:
            raise ReplyError(result.status, result.value)
        if isinstance(op, ops.CommitWrite):
            ended = [c.chunk for c in op.chunks if c.unlock]
            for chunk in ended:
                self._grants.settled(chunk)
            self._healer.examine(ended)
        return msgspec.Raw(result.value)

    async def _write_chunk(self, link: Link, ask: m.WriteChunk) -> m.ChunkMap:
        if link.context.registered.readonly:
            raise ReplyError(errno.EROFS)
        granted = await self._grants.grant(link.context.session, ask)
        return self._tickets.for_writer(granted, link.context.session)


def _ask_only(answer: Callable[[Any], Any], link: Link, ask: Any) -> Any:
    return answer(ask)


def _map_identity(op: ops.Op, who: m.Registered) -> ops.Op:
    """Apply maproot and mapall to the identity under which something is created or changed."""
    if not isinstance(op, ops.Create | ops.Symlink | ops.SetGoal):
        return op
    if who.map_all:
        uid, gid = who.all_uid, who.all_gid
    elif op.uid == 0 and who.root_uid:
        uid, gid = who.root_uid, who.root_gid
    else:
        return op
    if isinstance(op, ops.SetGoal):
        return msgspec.structs.replace(op, uid=uid)
    return msgspec.structs.replace(op, uid=uid, gid=gid)
