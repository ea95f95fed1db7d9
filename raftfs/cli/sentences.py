"""What masters know of chunks, as sentences. Pure: from answers to text."""

import time

from raftfs.wire import inquiries as q

_NS = 1e9


def when(at_ns: int) -> str:
    """A moment in local time, to the second."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_ns / _NS))


def span(seconds: float) -> str:
    """A duration for people: the two largest units."""
    left, parts = max(0, round(seconds)), []
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        if left >= size:
            parts.append(f"{left // size} {unit}")
            left %= size
    return " ".join(parts[:2]) or "0 s"


def copies_word(number: int) -> str:
    """`1 copy`, `2 copies`."""
    return f"{number} {'copy' if number == 1 else 'copies'}"


_STATES = {
    "good": "good",
    "damaged": "damaged: it does not count",
    "doubtful": "doubtful: a power cut may have taken writes from it",
    "stale": "stale: it missed a write",
    "ahead": "of a version that the metadata do not know",
    "orphan": "an orphan: the metadata know no such chunk",
}
_WHY_LEFT = {
    "damaged": "it was found damaged",
    "gone": "its server reported that it is gone",
    "absent": "its server no longer has it, or came back without it",
    "destroyed": "a leader had it destroyed",
}


def copy(c: q.CopyStory) -> str:
    """One copy: where, which version, what it is worth."""
    where = f"{c.address} (server {c.server.hex()[:8]})"
    if c.state == "away":
        since = f" since {when(c.since)}" if c.since else ""
        return f"{where}: version {c.version}, out of reach: its server is away{since}"
    if c.state == "left":
        return f"{where}: had version {c.version} until {when(c.since)}: {_WHY_LEFT[c.why]}"
    text = f"{where}: version {c.version}, {_STATES[c.state]}"
    if not c.fenced:
        text += "; the server has not yet acknowledged this leader"
    if c.kept_s >= 0:
        text += f"; kept for another {span(c.kept_s)}"
    elif c.state == "orphan":
        text += "; not looked at yet"
    if c.scrubbed:
        text += f"; last read through {when(c.scrubbed * 10**9)}"
    return text


_DELAYS = {
    "endangered": "only one copy is left, but its servers may come back",
    "disconnected": "a server is away and may come back with its copy",
}
_STEPS = {
    "repair": "a repair is under way",
    "writer": "nothing: a session writes it and looks after its copies",
    "unwritten": "nothing: nothing was ever committed to it",
    "missing": "nothing can be done: no connected server has a good copy; bring one back that had",
    "await": "waits for servers that may have better copies",
    "aside": "a damaged copy goes to quarantine",
    "settle": "the good copies are brought to one new version",
    "stale": "copies that no longer count are destroyed",
    "none": "nothing: it has as many good copies as its goal asks for",
    "doomed": "no file owns it: its copies are destroyed",
}


def plan(p: q.Plan) -> str:
    """What comes next, and what it waits for."""
    if p.step == "start":
        text = (f"nothing for another {span(p.wait_s)}: the leader is new, chunkservers are still "
                "announcing themselves")  # fmt: skip
    elif p.step == "add" and p.wait_s > 0:
        text = (f"{copies_word(p.wanted)} will be made in {span(p.wait_s)}: {_DELAYS[p.delay]}, so "
                f"{span(p.delay_s)} are waited")  # fmt: skip
    elif p.step == "add":
        text = f"{copies_word(p.wanted)} will be made now"
    elif p.step == "room":
        text = f"{copies_word(p.wanted)} wanted, but no other connected server can take one"
    elif p.step == "surplus":
        text = f"{copies_word(p.surplus)} beyond the goal will be destroyed"
    elif p.step == "orphan":
        text = "its copies are destroyed" + (f" in {span(p.wait_s)}" if p.wait_s >= 0 else " later")
    else:
        text = _STEPS[p.step]
    if p.error:
        text += f" (what failed last, {when(p.error_at)}: {p.error})"
    return text


def incident(i: q.Incident) -> str:
    """One line of a chunk's history."""
    where = f" at {i.address}" if i.address else ""
    version = f", version {i.version}" if i.version else ""
    detail = f": {i.detail}" if i.detail else ""
    return f"{when(i.at)} {i.what}{where}{version}{detail}"


def last_seen(problem: q.ChunkProblem, watching: int) -> list[str]:
    """Why a chunk has no good copy: which servers had one, and what became of it."""
    if problem.copies:
        return [copy(c) for c in problem.copies]
    return [f"not known: no copy has been seen since this master started, {when(watching)}"]


def story(s: q.ChunkStory, paths: list[str]) -> list[str]:
    """A chunk's whole explanation, line by line."""
    lines = [f"chunk {s.chunk:016X}"]
    if s.known:
        files = ", ".join(paths) if s.refs else "none: it is doomed"
        lines.append(f"  file      {files} (inode {s.owner}, chunk {s.index} of it)")
        reserved = f", reserved up to {s.reserved}" if s.reserved > s.version else ""
        lines.append(f"  version   {s.version}{reserved}")
        counted = sum(1 for c in s.copies if c.state == "good")
        lines.append(f"  goal      {copies_word(s.goal)}, {counted} good connected")
        lines += [f"  lock      {_lock(s)}"] if s.lock else []
    else:
        lines.append("  file      none: the metadata know no such chunk")
    lines += [f"  copy      {copy(c)}" for c in s.copies] or ["  copy      none is known"]
    lines.append(f"  plan      {plan(s.plan)}")
    lines += [f"  history   {incident(i)}" for i in s.incidents]
    lines.append(f"  known     of copies since {when(s.watching)}, of orders since "
                 f"{when(s.leading)}; what was before is not known")  # fmt: skip
    return lines


def _lock(s: q.ChunkStory) -> str:
    who = f"session {s.lock_session} ({s.locked_by})" if s.lock_session else "the leader, to settle"
    return f"{who} since {when(s.lock_time)}"
