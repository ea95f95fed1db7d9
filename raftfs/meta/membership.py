"""Which masters there are: listing, adding and removing them, handing leadership over.

Runs on the leader. Every change is checked here for what it would do to the majority; that two
never overlap is the log's own rule (`raft/configurations.py`).
"""

import asyncio
import time

import structlog

from raftfs.const import HEARTBEAT_S
from raftfs.errors import RaftfsError, ReplyError, Status
from raftfs.meta.raft.replica import BEHIND_MAX, Replica
from raftfs.wire import messages as m
from raftfs.wire import ops

log = structlog.get_logger("raftfs.membership")

CATCH_UP_S = 60.0  # a new master that has not caught up by then is refused for now
_HAND_OVER_S = 5.0
_LOOK_S = 0.05
_HEARD_S = 3 * HEARTBEAT_S


class Membership:
    """Carries out what `raftfs member` and `raftfs leader` ask for. Errors are RaftfsErrors whose
    text is for the operator; NotLeader.
    """

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def list(self) -> list[m.MemberStatus]:
        """The masters by name, then those that wait to become masters."""
        replica = self._replica
        behind = replica.behind()
        up = {name for name, connected in replica.peers_connected() if connected}
        found = [
            m.MemberStatus(name, uuid, "leader" if name == replica.leader else "voter",
                           name in up or name == replica.config.name,
                           0 if name == replica.config.name else behind.get(name, -1))
            for name, uuid in sorted(replica.members.items())
        ]  # fmt: skip
        for name, uuid in sorted(replica.joining().items()):
            entries = behind.get(f"{name}#{uuid.hex()}", -1)
            found.append(m.MemberStatus(name, uuid, "joining", True, entries))
        return found

    async def add(self, name: str) -> str:
        """Make a replica that was started with --join a voter, once it has caught up."""
        self._not_yet(name)
        until = time.monotonic() + CATCH_UP_S
        while (uuid := self._replica.joining().get(name)) is None or self._lag(name, uuid) is None:
            if time.monotonic() > until:
                state = "has not connected" if uuid is None else "has not caught up"
                raise RaftfsError(
                    f"{name} {state} within {CATCH_UP_S:.0f} s: start it with `raftfs-master "
                    f"--join --name {name} --peers ...` and try again"
                )
            await asyncio.sleep(_LOOK_S)
            self._not_yet(name)
        self._check_majority({*self._connected(), name}, {*self._replica.members, name}, "adding")
        await self._change(ops.AddMember(name, uuid))
        # Chunkservers hear of it with a heartbeat; a leader that they do not know has no servers.
        await asyncio.sleep(_HEARD_S)
        return f"{name} votes now; {self._count()}"

    def _not_yet(self, name: str) -> None:
        if name in self._replica.members:
            raise RaftfsError(f"{name} is a master already")

    def _lag(self, name: str, uuid: bytes) -> int | None:
        """Entries that it lacks, None if they are too many."""
        behind = self._replica.behind().get(f"{name}#{uuid.hex()}")
        return behind if behind is not None and behind <= BEHIND_MAX else None

    async def remove(self, name: str) -> str:
        """Let a master vote no more. The leader hands over first, and the new one is asked."""
        members = self._replica.members
        if name not in members:
            raise RaftfsError(f"{name} is no master: they are {','.join(sorted(members))}")
        rest = set(members) - {name}
        if len(rest) in (0, 2):
            raise RaftfsError(
                f"removing {name} would leave {len(rest)} masters, of which losing one stops all: "
                "add another first"
            )
        self._check_majority(self._connected() - {name}, rest, "removing")
        if name == self._replica.config.name:
            await self.transfer("")
            raise ReplyError(Status.NOT_LEADER)  # whoever asked asks the next leader
        await self._change(ops.RemoveMember(name))
        return f"{name} votes no more; {self._count()}"

    async def transfer(self, to: str) -> str:
        """Hand leadership to a voter, and return when another one leads."""
        replica = self._replica
        if to == replica.config.name:
            return f"{to} leads already"
        if to and to not in replica.members:
            masters = ",".join(sorted(replica.members))
            raise RaftfsError(f"{to} is no master: they are {masters}")
        if to and to not in self._connected():
            raise RaftfsError(f"{to} is not connected: it cannot lead")
        if not (self._connected() - {replica.config.name}):
            raise RaftfsError("no other master is connected: nobody can lead instead")
        until = time.monotonic() + _HAND_OVER_S
        while replica.is_leader and time.monotonic() < until:
            await replica.hand_over(to)
        while not replica.leader and time.monotonic() < until:
            await asyncio.sleep(_LOOK_S / 10)
        leader = replica.leader
        if leader in ("", replica.config.name) or to not in ("", leader):
            raise RaftfsError(f"{to or 'another master'} did not take over; {leader or 'nobody'} "
                              "leads now: try again")  # fmt: skip
        return f"{leader} leads now"

    # --- the majority

    def _connected(self) -> set[str]:
        up = {name for name, connected in self._replica.peers_connected() if connected}
        return {*up, self._replica.config.name}

    def _check_majority(self, up: set[str], voters: set[str], doing: str) -> None:
        """Refuse what would leave a cluster that cannot decide anything."""
        there = up & voters
        if 2 * len(there) <= len(voters):
            raise RaftfsError(
                f"refused: after {doing} it, only {len(there)} of {len(voters)} masters would be "
                "connected, which is no majority; bring the others back first"
            )

    async def _change(self, op: ops.MembershipOp) -> None:
        (applied,) = await self._replica.change_members(op)
        if applied.result.status:
            raise ReplyError(applied.result.status)
        log.info("membership changed", change=type(op).__name__, name=op.name)

    def _count(self) -> str:
        count = len(self._replica.members)
        lost = (count - 1) // 2
        return f"{count} masters, of which {lost} may be lost"
