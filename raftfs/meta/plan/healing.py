"""What a chunk's copies are worth, and what is to be done about them. Pure.

A copy at the committed version, or at a higher one that an unfinished grant reserved, has every
acknowledged byte: it is good. An older one is stale. Good copies of different versions may differ
in bytes that nobody acknowledged, so one group of equal version is chosen before the next write.

A *doubtful* copy may have lost acknowledged writes in a power cut. It is as good as none as long as
there is a sure one. Where all are doubtful, what was synced is in each of them, and one is chosen.

After a restore the metadata may be older than the copies: whatever raised their versions meanwhile
is forgotten. Then the newest copies have every acknowledged byte, and only they.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple


class Verdict(NamedTuple):
    """`chosen`: the good copies that count, all of one version. `settle`: they must be raised
    first.

    `stale`: copies (server, version) that no longer count. `wanted`: how many copies are missing to
    the goal. `surplus`: how many there are beyond it.
    """

    chosen: tuple[bytes, ...]
    version: int
    settle: bool
    stale: tuple[tuple[bytes, int], ...]
    wanted: int
    surplus: int


def good(
    committed: int, reserved: int, copies: Mapping[bytes, int], restored: int = 0,
    doubtful: Collection[bytes] = (),
) -> dict[bytes, int]:  # fmt: skip
    """The copies (server -> version) that have all that is to be had: the sure ones, if any."""
    found = _current(committed, reserved, copies, restored)
    sure = {s: v for s, v in found.items() if s not in doubtful}
    return sure or found


def _current(
    committed: int, reserved: int, copies: Mapping[bytes, int], restored: int
) -> dict[bytes, int]:
    found = {s: v for s, v in copies.items() if committed <= v <= max(committed, reserved)}
    if unsettled(committed, restored):
        newest = max(found.values(), default=0)
        found = {server: version for server, version in found.items() if version == newest}
    return found


def unsettled(committed: int, restored: int) -> bool:
    """Whether a restored chunk has not been written since, so that unknown copies may be newer."""
    return restored > 0 and committed <= restored


def spared(committed: int, restored: int, settled: int, version: int) -> bool:
    """Whether a copy that does not count any more has bytes that those which count lack: it is
    of the time that a restore forgot, and was not there when the others were chosen.
    """
    return not unsettled(committed, restored) and settled < version <= restored


def judge(
    committed: int, reserved: int, goal: int, copies: Mapping[bytes, int], restored: int = 0,
    doubtful: Collection[bytes] = (), leaving: Collection[bytes] = (),
) -> Verdict:  # fmt: skip
    """Weigh `copies` (server -> version) of a chunk at version `committed`, up to `reserved`.

    Of several groups of good copies the largest is chosen (losing a copy costs more than bytes that
    nobody acknowledged); of equally large ones, and after a restore, the newest. Of doubtful ones
    just one: they may differ. Doubtful ones have the rest raised, so that they become stale. Copies
    on servers that are `leaving` are as good as others, but the goal has to be met without them.
    """
    groups: dict[int, list[bytes]] = {}
    best = good(committed, reserved, copies, restored, doubtful)
    for server, version in best.items():
        groups.setdefault(version, []).append(server)
    version = max(groups, key=lambda v: (len(groups[v]), v), default=committed)
    chosen = tuple(sorted(groups.get(version, ())))
    if any(server in doubtful for server in chosen):
        chosen = chosen[:1]
    current = _current(committed, reserved, copies, restored)
    doubts = any(server in doubtful for server in current)
    wanted = max(0, goal - sum(server not in leaving for server in chosen))
    stale = tuple((s, v) for s, v in sorted(copies.items()) if s not in chosen)
    return Verdict(
        chosen=chosen,
        version=version,
        settle=bool(chosen) and (version != committed or doubts),
        stale=stale,
        wanted=wanted,
        surplus=0 if wanted else max(0, len(chosen) - goal),
    )
