"""Names and attributes: create, link, unlink, rename, setattr, open and release."""

import errno

from msgspec.structs import replace

from raftfs.const import LINK_MAX, ROOT_INODE, SYMLINK_MAX
from raftfs.errors import ReplyError
from raftfs.meta.state import model
from raftfs.meta.state.change import Change, attr, check_name, without_setid
from raftfs.meta.state.model import MARK, Node, Target
from raftfs.wire import ops
from raftfs.wire.ops import Attr, NodeType, Removed

_TYPES = range(NodeType.FILE, NodeType.SOCKET + 1)
_DEVICES = (NodeType.BLOCKDEV, NodeType.CHARDEV)
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2


def _new_node(
    c: Change, parent: int, name: bytes, kind: int, mode: int, uid: int, gid: int, rdev: int,
    length: int = 0,
) -> tuple[int, Node]:  # fmt: skip
    """Make a node and its edge; everything has been checked."""
    above = c.directory(parent)
    is_dir = kind == NodeType.DIR
    if above.mode & 0o2000:  # setgid directory: its group, and the bit for directories
        gid = above.gid
        if is_dir:
            mode |= 0o2000
    inode = c.tally.next_inode
    c.tally.next_inode += 1
    c.tally.nodes += 1
    node = Node(
        kind, mode, uid, gid, c.now, c.now, c.now, 2 if is_dir else 1, length, rdev, above.goal,
        parent,
    )  # fmt: skip
    c.put_node(inode, node)
    c.add_edge(parent, name, inode)
    c.touch_parent(parent, above, links=1 if is_dir else 0, entries=1)
    return inode, node


def create(c: Change, op: ops.Create) -> Attr:
    """create, mkdir, mknod."""
    if op.type not in _TYPES or op.type == NodeType.SYMLINK:
        raise ReplyError(errno.EINVAL)
    _check_parent(c, op.parent)
    c.free_name(op.parent, op.name)
    mode = op.mode & 0o7777 & ~op.umask
    rdev = op.rdev if op.type in _DEVICES else 0
    inode, node = _new_node(c, op.parent, op.name, op.type, mode, op.uid, op.gid, rdev)
    if op.opened and op.type == NodeType.FILE and c.session:
        _hold(c, inode)
    return attr(inode, node)


def symlink(c: Change, op: ops.Symlink) -> Attr:
    """A symbolic link, whose length is its target's."""
    if not op.target:
        raise ReplyError(errno.ENOENT)
    if len(op.target) > SYMLINK_MAX:
        raise ReplyError(errno.ENAMETOOLONG)
    _check_parent(c, op.parent)
    c.free_name(op.parent, op.name)
    inode, node = _new_node(
        c, op.parent, op.name, NodeType.SYMLINK, 0o777, op.uid, op.gid, 0, len(op.target)
    )
    c.rows.put(model.target_key(inode), Target(op.target))
    return attr(inode, node)


def link(c: Change, op: ops.Link) -> Attr:
    """Another name for a node that is no directory."""
    node = c.node(op.inode)
    if node.type == NodeType.DIR:
        raise ReplyError(errno.EPERM)
    if node.nlink == 0:
        raise ReplyError(errno.ENOENT)  # sustained: it has no name to be linked from
    if node.nlink >= LINK_MAX:
        raise ReplyError(errno.EMLINK)
    above = _check_parent(c, op.parent)
    c.free_name(op.parent, op.name)
    node = replace(node, nlink=node.nlink + 1, ctime=c.now, parent=op.parent)
    c.put_node(op.inode, node)
    c.add_edge(op.parent, op.name, op.inode)
    c.touch_parent(op.parent, above, entries=1)
    return attr(op.inode, node)


def unlink(c: Change, op: ops.Unlink) -> Removed:
    """Remove a name of anything but a directory."""
    above = c.directory(op.parent)
    inode = c.edge(op.parent, op.name)
    node = c.node(inode)
    if node.type == NodeType.DIR:
        raise ReplyError(errno.EISDIR)
    c.rows.delete(model.edge_key(op.parent, op.name))
    c.touch_parent(op.parent, above, entries=-1)
    return Removed(inode, c.drop_link(inode, node))


def rmdir(c: Change, op: ops.Rmdir) -> Removed:
    """Remove an empty directory."""
    above = c.directory(op.parent)
    inode = c.edge(op.parent, op.name)
    node = c.directory(inode)
    if node.entries:
        raise ReplyError(errno.ENOTEMPTY)
    c.rows.delete(model.edge_key(op.parent, op.name))
    c.touch_parent(op.parent, above, links=-1, entries=-1)
    c.destroy(inode, node)
    return Removed(inode, True)


def rename(c: Change, op: ops.Rename) -> Removed:
    """Move a name, replacing what is there; or exchange two names."""
    if op.flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE) or op.flags == 3:
        raise ReplyError(errno.EINVAL)
    c.directory(op.src_parent)
    _check_parent(c, op.dst_parent)
    check_name(op.dst_name)
    inode = c.edge(op.src_parent, op.src_name)
    node = c.node(inode)
    there = c.rows.get(model.edge_key(op.dst_parent, op.dst_name))
    other = there.inode if isinstance(there, model.Edge) else 0
    if node.type == NodeType.DIR and _below(c, op.dst_parent, inode):
        raise ReplyError(errno.EINVAL)
    if op.flags & RENAME_EXCHANGE:
        return _exchange(c, op, inode, node, other)
    if other and op.flags & RENAME_NOREPLACE:
        raise ReplyError(errno.EEXIST)
    if other == inode:
        return Removed(inode, False)  # two names of one node: POSIX asks for nothing to happen
    freed = bool(other) and _replace(c, op, node, other)
    c.rows.delete(model.edge_key(op.src_parent, op.src_name))
    c.add_edge(op.dst_parent, op.dst_name, inode)
    links = 1 if node.type == NodeType.DIR else 0
    c.touch_parent(op.src_parent, c.directory(op.src_parent), links=-links, entries=-1)
    c.touch_parent(op.dst_parent, c.directory(op.dst_parent), links=links, entries=1)
    c.put_node(inode, replace(c.node(inode), parent=op.dst_parent, ctime=c.now))
    return Removed(inode, freed)


def _replace(c: Change, op: ops.Rename, node: Node, other: int) -> bool:
    """Remove what stands at a rename's destination; gives whether its last link went."""
    victim = c.node(other)
    if victim.type == NodeType.DIR:
        if node.type != NodeType.DIR:
            raise ReplyError(errno.EISDIR)
        if victim.entries:
            raise ReplyError(errno.ENOTEMPTY)
    elif node.type == NodeType.DIR:
        raise ReplyError(errno.ENOTDIR)
    is_dir = victim.type == NodeType.DIR
    c.rows.delete(model.edge_key(op.dst_parent, op.dst_name))
    c.touch_parent(
        op.dst_parent, c.directory(op.dst_parent), links=-1 if is_dir else 0, entries=-1
    )
    if is_dir:
        c.destroy(other, victim)
        return True
    return c.drop_link(other, victim)


def _exchange(c: Change, op: ops.Rename, inode: int, node: Node, other: int) -> Removed:
    if not other:
        raise ReplyError(errno.ENOENT)
    if other == inode:
        return Removed(inode, False)
    second = c.node(other)
    if second.type == NodeType.DIR and _below(c, op.src_parent, other):
        raise ReplyError(errno.EINVAL)
    c.add_edge(op.dst_parent, op.dst_name, inode)
    c.add_edge(op.src_parent, op.src_name, other)
    shift = (node.type == NodeType.DIR) - (second.type == NodeType.DIR)
    c.touch_parent(op.src_parent, c.directory(op.src_parent), links=-shift)
    c.touch_parent(op.dst_parent, c.directory(op.dst_parent), links=shift)
    c.put_node(inode, replace(c.node(inode), parent=op.dst_parent, ctime=c.now))
    c.put_node(other, replace(c.node(other), parent=op.src_parent, ctime=c.now))
    return Removed(inode, False)


def _below(c: Change, inode: int, top: int) -> bool:
    """Whether directory `inode` is `top` or lies below it."""
    while inode != top:
        if inode == ROOT_INODE:
            return False
        inode = c.directory(inode).parent
    return True


def _check_parent(c: Change, parent: int) -> Node:
    above = c.directory(parent)
    if above.nlink == 0:
        raise ReplyError(errno.ENOENT)
    return above


def setattr_(c: Change, op: ops.SetAttr) -> Attr:
    """Mode, owner, times."""
    node = c.node(op.inode)
    mode = node.mode if op.mode is None else op.mode & 0o7777
    owned_anew = op.uid is not None or op.gid is not None
    if owned_anew and op.mode is None and node.type == NodeType.FILE:
        mode = without_setid(mode)
    node = replace(
        node,
        mode=mode,
        uid=node.uid if op.uid is None else op.uid,
        gid=node.gid if op.gid is None else op.gid,
        atime=_time(c, op.atime, node.atime),
        mtime=_time(c, op.mtime, node.mtime),
        ctime=c.now,
    )
    c.put_node(op.inode, node)
    return attr(op.inode, node)


def _time(c: Change, asked: int | None, now: int) -> int:
    if asked is None:
        return now
    return c.now if asked == -1 else asked


def _hold(c: Change, inode: int) -> None:
    c.rows.put(model.hold_key(inode, c.session), MARK)
    c.rows.put(model.held_key(c.session, inode), MARK)


def acquire(c: Change, op: ops.Acquire) -> Attr:
    """The session holds the file from now on."""
    node = c.node(op.inode)
    if node.type == NodeType.FILE and c.session:
        _hold(c, op.inode)
    return attr(op.inode, node)


def release(c: Change, op: ops.Release) -> bool:
    """The session holds the file no longer; gives whether it is gone now."""
    return let_go(c, op.inode, c.session)


def let_go(c: Change, inode: int, session: int) -> bool:
    """End a session's hold; a sustained file that nobody else holds goes."""
    if c.rows.get(model.hold_key(inode, session)) is None:
        return False
    c.rows.delete(model.hold_key(inode, session))
    c.rows.delete(model.held_key(session, inode))
    node = c.rows.get(model.node_key(inode))
    if not isinstance(node, Node) or node.nlink or c.is_held(inode):
        return False
    c.destroy(inode, node)
    return True
