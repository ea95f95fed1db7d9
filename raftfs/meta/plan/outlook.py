"""What the healer will do with a chunk next, and what it waits for: in the order of its own
decisions (`meta/healer.py`, `_examine`), told instead of done. Pure.

| step | what comes next |
|---|---|
| start | nothing yet: after an election, chunkservers are given time to announce themselves |
| repair | a repair is under way |
| writer | nothing: a session writes the chunk and looks after its copies |
| unwritten | nothing: no byte was ever committed |
| missing | nothing can be done: there is no good copy |
| await | copies that may be better are given time to come |
| aside | a damaged copy goes to quarantine |
| settle | the good copies are raised to one new version |
| add | copies are made; after `delay` |
| room | copies are wanted, but no further server has room |
| surplus | copies beyond the goal are destroyed, one by one |
| stale | copies that no longer count are destroyed |
| none | all is as it should be |
| doomed | no file owns it: its copies are destroyed |
| orphan | the state does not know it: its copies are kept for a while, and then destroyed |
"""

from typing import NamedTuple

from raftfs.meta.plan.healing import Verdict

# What `add` waits for.
ENDANGERED, DISCONNECTED = "endangered", "disconnected"


class Facts(NamedTuple):
    """What the healer knows of a chunk beside the copies' worth."""

    starts_in_s: float  # until the healer begins
    repairing: bool
    session: int  # that writes it, 0: none
    born: bool
    awaits: bool  # copies that may be better
    damaged: bool  # a damaged copy is to be set aside
    unfinished: bool  # a settling that its leader did not end
    can_add: bool  # a server without a copy has room
    short_for_s: float  # since when copies are wanted
    delay: str  # why copies are not made at once; "": they are
    delay_s: float


class Outlook(NamedTuple):
    """`wait_s`: until the step is taken; -1: it is no matter of time."""

    step: str
    delay: str = ""
    delay_s: float = 0.0
    wait_s: float = -1.0


def outlook(verdict: Verdict, facts: Facts) -> Outlook:
    """The next step for a chunk that files own."""
    if facts.repairing:
        return Outlook("repair")
    if facts.session:
        return Outlook("writer")
    if not verdict.chosen and not facts.born:
        return Outlook("unwritten")
    if facts.starts_in_s > 0:
        return Outlook("start", wait_s=facts.starts_in_s)
    if not verdict.chosen:
        return Outlook("missing")
    if facts.awaits:
        return Outlook("await")
    if facts.damaged:
        return Outlook("aside", wait_s=0.0)
    if verdict.settle or facts.unfinished:
        return Outlook("settle", wait_s=0.0)
    if verdict.wanted and facts.can_add:
        wait_s = max(0.0, facts.delay_s - facts.short_for_s)
        return Outlook("add", facts.delay, facts.delay_s, wait_s)
    if verdict.surplus:
        return Outlook("surplus", wait_s=0.0)
    if verdict.stale:
        return Outlook("stale", wait_s=0.0)
    return Outlook("room" if verdict.wanted else "none")
