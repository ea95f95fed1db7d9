"""From a batch to results: exactly once, one command after another, the same on every replica.

A command whose sequence number is in the session's slots gets the answer of the first time and
changes nothing. Only successes are remembered: a refused command changed nothing, so a retry that
runs it again is no second effect.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from raftfs.const import SESSION_WINDOW
from raftfs.errors import ReplyError, Status
from raftfs.meta.state import model, ops_admin, ops_data, ops_namespace
from raftfs.meta.state.change import Change, Tally
from raftfs.meta.state.model import COUNTERS_KEY, NO_COUNTERS, Counters, ResultRow, Rows
from raftfs.wire import ops
from raftfs.wire.frame import encode
from raftfs.wire.ops import Batch, Command, Result


class Applied(NamedTuple):
    """A command and its answer; `version` numbers its changelog line, 0: it changed nothing."""

    version: int
    command: Command
    result: Result


_OPS: dict[type, Callable[[Change, Any], Any]] = {
    ops.Create: ops_namespace.create,
    ops.Symlink: ops_namespace.symlink,
    ops.Link: ops_namespace.link,
    ops.Unlink: ops_namespace.unlink,
    ops.Rmdir: ops_namespace.rmdir,
    ops.Rename: ops_namespace.rename,
    ops.SetAttr: ops_namespace.setattr_,
    ops.Acquire: ops_namespace.acquire,
    ops.Release: ops_namespace.release,
    ops.Length: ops_data.length,
    ops.GrantWrite: ops_data.grant_write,
    ops.SetVersion: ops_data.set_version,
    ops.CommitWrite: ops_data.commit_write,
    ops.Unlock: ops_data.unlock,
    ops.DropCopy: ops_data.drop_copy,
    ops.ForgetChunk: ops_data.forget_chunk,
    ops.SetGoal: ops_admin.set_goal,
    ops.NewSession: ops_admin.new_session,
    ops.EndSession: ops_admin.end_session,
    ops.Found: ops_admin.found,
    ops.ReplaceMember: ops_admin.change_members,
    ops.AddMember: ops_admin.change_members,
    ops.RemoveMember: ops_admin.change_members,
    ops.Digest: ops_admin.digest,
    ops.Checkpoint: ops_admin.checkpoint,
}


def apply_batch(rows: Rows, index: int, batch: Batch) -> list[Applied]:
    """Apply one entry of the log; gives an answer for each command. Raises only for bugs.

    `index` is the entry's place in the log (the state does not depend on it).
    """
    row = rows.get(COUNTERS_KEY)
    tally = Tally(row if isinstance(row, Counters) else NO_COUNTERS)
    applied = [_apply(rows, tally, batch.time, command) for command in batch.commands]
    now = tally.row()
    if now != row:
        rows.put(COUNTERS_KEY, now)
    return applied


def _apply(rows: Rows, tally: Tally, now: int, command: Command) -> Applied:
    session, seq = command.session, command.seq
    slot = b""
    if session:
        if rows.get(model.session_key(session)) is None:
            return Applied(0, command, Result(Status.NO_SESSION))
        if seq:
            slot = model.result_key(session, seq % SESSION_WINDOW)
            kept = rows.get(slot)
            if isinstance(kept, ResultRow) and kept.seq == seq:
                return Applied(0, command, Result(0, kept.value))
            if isinstance(kept, ResultRow) and kept.seq > seq:
                return Applied(0, command, Result(Status.STALE_SEQ))
    change = Change(rows, tally, now, session)
    try:
        value = encode(_OPS[type(command.op)](change, command.op))
    except ReplyError as refused:
        return Applied(0, command, Result(refused.status))
    if slot:
        rows.put(slot, ResultRow(seq, value))
    if change.no_line:
        return Applied(0, command, Result(0, value))
    tally.version += 1
    return Applied(tally.version, command, Result(0, value))
