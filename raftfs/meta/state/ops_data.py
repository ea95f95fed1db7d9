"""Lengths, chunks, grants and versions. `docs/decisions/005` tells the protocol's story."""

import errno

from msgspec.structs import replace

from raftfs.const import CHUNK_INDEX_MAX, CHUNK_SIZE, FILE_LENGTH_MAX
from raftfs.errors import ReplyError, Status
from raftfs.meta.state import model
from raftfs.meta.state.change import Change, attr, without_setid
from raftfs.meta.state.model import MARK, ChunkRow, MapEntry, Node
from raftfs.wire import ops
from raftfs.wire.ops import Attr, Granted


def length(c: Change, op: ops.Length) -> Attr:
    """truncate: exactly this length from now on."""
    node = c.file(op.inode)
    if not 0 <= op.length <= FILE_LENGTH_MAX:
        raise ReplyError(errno.EFBIG if op.length > 0 else errno.EINVAL)
    if op.length < node.length:
        _check_unlocked(c, op.inode, op.length // CHUNK_SIZE)
        c.cut_map(op.inode, -(-op.length // CHUNK_SIZE))
    node = replace(
        node, length=op.length, mtime=c.now, ctime=c.now, mode=without_setid(node.mode)
    )
    c.put_node(op.inode, node)
    return attr(op.inode, node)


def _check_unlocked(c: Change, inode: int, first: int) -> None:
    """LOCKED if another session writes a chunk of the file from index `first` on."""
    after = (first - 1).to_bytes(8, "big") if first else b""
    for _, entry in c.rows.scan(model.map_prefix(inode), after):
        assert isinstance(entry, MapEntry)
        chunk = c.chunk(entry.chunk)
        if chunk.lock and chunk.lock_session not in (0, c.session):
            raise ReplyError(Status.LOCKED)


def grant_write(c: Change, op: ops.GrantWrite) -> Granted:
    """Lock a chunk, allocating it if need be; perhaps reserve its next version.

    The lock's number comes from a counter and not from the log's index: an entry holds many
    commands under one index, and no two grants may share a token. The leader's own lock (session
    0) gives way: a leader that died while it settled left it, and the new number fences its orders.
    """
    node = c.file(op.inode)
    if not 0 <= op.index <= CHUNK_INDEX_MAX:
        raise ReplyError(errno.EFBIG)
    entry = c.rows.get(model.map_key(op.inode, op.index))
    old = c.chunk(entry.chunk) if isinstance(entry, MapEntry) else None
    if old is None and not c.session:
        raise ReplyError(errno.ENOENT)  # the leader settles chunks, it never allocates one
    if old is not None and old.lock and old.lock_session not in (0, c.session):
        raise ReplyError(Status.LOCKED)
    if op.replace and old is not None:
        if old.born:
            raise ReplyError(errno.EINVAL)  # somebody may have been promised what is in it
        c.unref(old)
        old = None
    chunk = c.unlock(old) if old is not None else _new_chunk(c, op.inode, op.index, node)
    reserved = max(chunk.version, chunk.reserved) + 1 if op.raise_version and old else 0
    lock = c.tally.next_lock
    c.tally.next_lock += 1
    if op.source and chunk.restored and not chunk.settled:
        # Before any copy is raised, so that nobody who dies in between makes it forgotten.
        chunk = replace(chunk, settled=op.source)
    chunk = replace(
        chunk, reserved=reserved or chunk.reserved, lock=lock, lock_session=c.session,
        lock_time=c.now,
    )  # fmt: skip
    c.rows.put(model.chunk_key(chunk.id), chunk)
    c.rows.put(model.lock_key(c.session, chunk.id), MARK)
    return Granted(chunk.id, chunk.version, reserved, lock, not chunk.born, node.length)


def _new_chunk(c: Change, inode: int, index: int, node: Node) -> ChunkRow:
    number = c.tally.next_chunk
    c.tally.next_chunk += 1
    c.tally.chunks += 1
    c.rows.put(model.map_key(inode, index), MapEntry(number))
    return ChunkRow(
        id=number, version=1, reserved=1, refs=1, goal=node.goal, lock=0, lock_session=0,
        lock_time=0, born=False, owner=inode, index=index,
    )  # fmt: skip


def set_version(c: Change, op: ops.SetVersion) -> None:
    """The reserved version becomes the committed one: older copies are stale."""
    chunk = c.chunk(op.chunk)
    if not op.lock or op.lock != chunk.lock:
        raise ReplyError(errno.ESTALE)
    if not chunk.version < op.version <= chunk.reserved:
        raise ReplyError(errno.ESTALE)
    chunk = replace(chunk, version=op.version)
    c.rows.put(model.chunk_key(chunk.id), chunk)
    if op.unlock:
        c.unlock(chunk)


def commit_write(c: Change, op: ops.CommitWrite) -> Attr:
    """Data has reached every copy: length, mtime, and the end of grants."""
    node = c.file(op.inode)
    if op.length > FILE_LENGTH_MAX:
        raise ReplyError(errno.EFBIG)
    if op.length < -1 or len({w.chunk for w in op.chunks}) != len(op.chunks):
        raise ReplyError(errno.EINVAL)
    chunks = [_still_locked(c, op.inode, w) for w in op.chunks]
    for chunk, written in zip(chunks, op.chunks, strict=True):
        if not chunk.born:
            chunk = replace(chunk, born=True)
            c.rows.put(model.chunk_key(chunk.id), chunk)
        if written.unlock:
            c.unlock(chunk)
    mtime = c.now if op.mtime == -1 else op.mtime
    node = replace(
        node, length=max(node.length, op.length), mtime=mtime, ctime=c.now,
        mode=without_setid(node.mode),
    )  # fmt: skip
    c.put_node(op.inode, node)
    return attr(op.inode, node)


def _still_locked(c: Change, inode: int, written: ops.Written) -> ChunkRow:
    """The chunk; ESTALE unless this session's grant of it for this file is the current one."""
    chunk = c.rows.get(model.chunk_key(written.chunk))
    if (
        not isinstance(chunk, ChunkRow) or not written.lock or chunk.lock != written.lock
        or chunk.lock_session != c.session or chunk.owner != inode
    ):  # fmt: skip
        raise ReplyError(errno.ESTALE)
    return chunk


def unlock(c: Change, op: ops.Unlock) -> None:
    """End a grant by force."""
    chunk = c.chunk(op.chunk)
    if not op.lock or op.lock != chunk.lock:
        raise ReplyError(errno.ESTALE)
    end_grant(c, chunk)


def end_grant(c: Change, chunk: ChunkRow) -> None:
    """A vanished writer's grant ends; a chunk that nothing was ever committed on goes."""
    chunk = c.unlock(chunk)
    if not chunk.born and chunk.refs == 1:
        c.rows.delete(model.map_key(chunk.owner, chunk.index))
        c.unref(chunk)


def drop_copy(c: Change, op: ops.DropCopy) -> None:
    """Condemn one copy of a live, unlocked chunk. Nothing changes but that the log says so."""
    chunk = c.chunk(op.chunk)
    if chunk.lock:
        raise ReplyError(errno.EBUSY)
    if chunk.version != op.version:
        raise ReplyError(errno.ESTALE)


def forget_chunk(c: Change, op: ops.ForgetChunk) -> None:
    """The last trace of a doomed chunk."""
    chunk = c.chunk(op.chunk)
    if chunk.refs:
        raise ReplyError(errno.EBUSY)
    c.rows.delete(model.doomed_key(chunk.id))
    c.rows.delete(model.chunk_key(chunk.id))
    c.tally.chunks -= 1
