"""Goals of whole trees: counted and changed page by page, so that no entry of the log is unbounded.

A recursive change is therefore not one atomic step: a file created meanwhile inherits from its
directory, which is changed before what lies below it.
"""

import asyncio
import errno
from collections.abc import AsyncIterator

from raftfs.errors import ReplyError
from raftfs.meta.healer import Healer
from raftfs.meta.proposer import Proposer
from raftfs.meta.raft.replica import Replica
from raftfs.meta.state import read
from raftfs.meta.state.model import Rows
from raftfs.wire import messages as m
from raftfs.wire.ops import Attr, GoalCounts, NodeType, SetGoal
from raftfs.wire.rpc import decode

PAGE = 500
_WITH_GOAL = (NodeType.FILE, NodeType.DIR)


class Goals:
    """Answers GetGoal and SetGoalTree on the leader."""

    def __init__(
        self, rows: Rows, replica: Replica, proposer: Proposer, healer: Healer
    ) -> None:
        self._rows = rows
        self._replica = replica
        self._proposer = proposer
        self._healer = healer

    async def table(self, ask: m.GetGoal) -> m.GoalTable:
        """How many files and directories have which goal. EPERM for a node that has none."""
        table = m.GoalTable({}, {})
        async for page in self._pages(ask.inode, recursive=ask.recursive):
            for attr in page:
                counts = table.dirs if attr.type == NodeType.DIR else table.files
                counts[attr.goal] = counts.get(attr.goal, 0) + 1
        return table

    async def set_tree(self, ask: m.SetGoalTree) -> GoalCounts:
        """Change the goal of a node, or of it and everything below it."""
        changed = unchanged = denied = 0
        async for page in self._pages(ask.inode, recursive=ask.recursive):
            results = await asyncio.gather(
                *(
                    self._proposer.propose(0, 0, SetGoal(a.inode, ask.uid, ask.goal, ask.mode))
                    for a in page
                )
            )
            for result in results:
                if result.status and not ask.recursive:
                    raise ReplyError(result.status)
                if result.status == 0:
                    counts = decode(GoalCounts, result.value)
                    changed += counts.changed
                    unchanged += counts.unchanged
                    denied += counts.denied
            for attr in page:
                if attr.type == NodeType.FILE:
                    self._examine(attr.inode)
        return GoalCounts(changed, unchanged, denied)

    async def _pages(self, inode: int, *, recursive: bool) -> AsyncIterator[list[Attr]]:
        """The node, then everything below it that has a goal, in pages; the loop gets its turns."""
        await self._replica.read_barrier()
        top = read.getattr(self._rows, inode)
        if top.type not in _WITH_GOAL:
            raise ReplyError(errno.EPERM)
        yield [top]
        todo = [inode] if recursive and top.type == NodeType.DIR else []
        while todo:
            directory, after, more = todo.pop(), b"", True
            while more:
                await asyncio.sleep(0)
                try:
                    page = read.readdir(self._rows, directory, after, PAGE)
                except ReplyError:
                    break  # removed while we walked
                more = page.more
                after = page.entries[-1][0] if page.entries else after
                found = [attr for _, attr in page.entries if attr.type in _WITH_GOAL]
                todo += [attr.inode for attr in found if attr.type == NodeType.DIR]
                yield found

    def _examine(self, inode: int) -> None:
        """Have the healer look at the file's chunks now: their goal may have changed."""
        first = 0
        while rows := read.file_chunks(self._rows, inode, first, 1_000):
            self._healer.examine([row.id for _, row in rows if row is not None], delay_s=0.0)
            first = rows[-1][0] + 1
