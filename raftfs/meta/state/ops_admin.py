"""Goals, sessions, the cluster's beginning, its members, the digest."""

import errno

from msgspec.structs import replace

from raftfs.const import GOAL_DEFAULT, GOAL_MAX, GOAL_MIN, ROOT_INODE
from raftfs.errors import ReplyError, invariant
from raftfs.meta.state import model, read
from raftfs.meta.state.change import Change
from raftfs.meta.state.model import MapEntry, MemberRow, Node, SessionRow
from raftfs.meta.state.ops_data import end_grant
from raftfs.meta.state.ops_namespace import let_go
from raftfs.wire import ops
from raftfs.wire.ops import GoalCounts, NodeType

_SET, _RAISE, _LOWER = 0, 1, 2


def set_goal(c: Change, op: ops.SetGoal) -> GoalCounts:
    """The goal of one file or directory; only its owner and root may."""
    if not GOAL_MIN <= op.goal <= GOAL_MAX or op.mode not in (_SET, _RAISE, _LOWER):
        raise ReplyError(errno.EINVAL)
    node = c.node(op.inode)
    if node.type not in (NodeType.FILE, NodeType.DIR):
        raise ReplyError(errno.EPERM)
    if op.uid not in (0, node.uid):
        return GoalCounts(0, 0, 1)
    higher, lower = op.goal > node.goal, op.goal < node.goal
    if not (higher and op.mode != _LOWER) and not (lower and op.mode != _RAISE):
        return GoalCounts(0, 1, 0)
    c.put_node(op.inode, replace(node, goal=op.goal, ctime=c.now))
    if node.type == NodeType.FILE:
        for _, entry in list(c.rows.scan(model.map_prefix(op.inode))):
            assert isinstance(entry, MapEntry)
            chunk = c.chunk(entry.chunk)
            c.rows.put(model.chunk_key(chunk.id), replace(chunk, goal=op.goal))
    return GoalCounts(1, 0, 0)


def new_session(c: Change, op: ops.NewSession) -> int:
    """A client's session; gives its number."""
    c.directory(op.root)
    number = c.tally.next_session
    c.tally.next_session += 1
    c.tally.sessions += 1
    row = SessionRow(number, op.secret, op.info, op.root, op.readonly, c.now)
    c.rows.put(model.session_key(number), row)
    return number


def end_session(c: Change, op: ops.EndSession) -> None:
    """Let go of all that the session held."""
    if c.rows.get(model.session_key(op.session)) is None:
        raise ReplyError(errno.ENOENT)
    for key, _ in list(c.rows.scan(model.lock_prefix(op.session))):
        end_grant(c, c.chunk(model.number_at(key, 9)))
    for key, _ in list(c.rows.scan(model.held_prefix(op.session))):
        let_go(c, model.number_at(key, 9), op.session)
    for key, _ in list(c.rows.scan(model.result_prefix(op.session))):
        c.rows.delete(key)
    c.rows.delete(model.session_key(op.session))
    c.tally.sessions -= 1


def found(c: Change, op: ops.Found) -> None:
    """The cluster begins: its UUID, its masters, the root directory."""
    if read.members(c.rows):
        c.no_line = True  # two leaders may both have thought that they were the first
        return
    for name, uuid in sorted(op.members.items()):
        c.rows.put(model.member_key(name), MemberRow(uuid))
    if c.tally.cluster:
        return  # bootstrapped from an image: everything else is there
    c.tally.cluster = op.cluster
    invariant(c.tally.next_inode == ROOT_INODE, "the root directory must be the first node")
    c.tally.next_inode += 1
    c.tally.nodes += 1
    root = Node(
        NodeType.DIR, 0o777, 0, 0, c.now, c.now, c.now, 2, 0, 0, GOAL_DEFAULT, ROOT_INODE
    )
    c.put_node(ROOT_INODE, root)


def change_members(c: Change, op: ops.MembershipOp) -> None:
    """Who votes from now on. ENOENT, EEXIST: it would change nothing; EPERM: nobody would vote."""
    before = read.members(c.rows)
    if isinstance(op, ops.AddMember) == (op.name in before):
        raise ReplyError(errno.EEXIST if op.name in before else errno.ENOENT)
    after = members_after(op, before)
    if not after:
        raise ReplyError(errno.EPERM)
    if op.name in after:
        c.rows.put(model.member_key(op.name), MemberRow(after[op.name]))
    else:
        c.rows.delete(model.member_key(op.name))


def members_after(op: ops.MembershipOp, before: dict[str, bytes]) -> dict[str, bytes]:
    """The voters, name -> identity, when `op` has been applied."""
    if isinstance(op, ops.RemoveMember):
        return {name: uuid for name, uuid in before.items() if name != op.name}
    if isinstance(op, ops.ReplaceMember) and op.name not in before:
        return before
    return {**before, op.name: op.uuid}


def checkpoint(c: Change, op: ops.Checkpoint) -> None:
    """Nothing changes; whoever drives the state machine makes the checkpoint."""
    c.no_line = True


def digest(c: Change, op: ops.Digest) -> None:
    """Stop if this replica's checkpoint is not the leader's."""
    c.no_line = True
    c.rows.compare_digest(op.index, op.value)
