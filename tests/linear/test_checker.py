"""The checker of histories: what it must accept, what it must find.

Each history is written as lines `client what where -> outcome [called, returned]`, in a tree whose
directories are `a` and `b`. A checker that accepts everything, or nothing, is worth nothing.
"""

import math
import random
from typing import Any

import pytest

from chaos import linear
from chaos.linear import Found, Operation, TooWideError, check, perform

ROOTS = ("a", "b")
FILE, DIR = "file", "dir"


def op(client: str, what: str, where: str, called: float, returned: float, heard: Any = "") -> Any:
    """`heard`: an errno's name, or the value."""
    place: tuple[Any, ...] = tuple(int(w) if w.isdigit() else w for w in where.split("/"))
    if isinstance(heard, str):
        return Operation(client, what, place, called, returned, heard)
    return Operation(client, what, place, called, returned, "", heard)


def seen(*entries: tuple[str, int, str]) -> frozenset[tuple[str, int, str]]:
    """A listing."""
    return frozenset(entries)


NEVER = math.inf

GOOD = {
    "one after the other": [
        op("p", "create", "a/x", 0, 1, 7),
        op("q", "lookup", "a/x", 2, 3, Found(7, FILE, 1)),
        op("p", "unlink", "a/x", 4, 5),
        op("q", "lookup", "a/x", 6, 7, "ENOENT"),
    ],
    "a read beside a write may be early": [
        op("p", "create", "a/x", 0, 10, 7),
        op("q", "lookup", "a/x", 1, 9, "ENOENT"),
    ],
    "a read beside a write may be late": [
        op("p", "create", "a/x", 0, 10, 7),
        op("q", "lookup", "a/x", 1, 2, Found(7, FILE)),
        op("r", "lookup", "a/x", 3, 4, Found(7, FILE)),
    ],
    "of two that make one name one wins": [
        op("p", "mkdir", "a/x", 0, 10, 7),
        op("q", "mkdir", "a/x", 0, 10, "EEXIST"),
    ],
    "the loser may return first": [
        op("p", "mkdir", "a/x", 0, 10, 7),
        op("q", "mkdir", "a/x", 0, 1, "EEXIST"),
        op("q", "rmdir", "a/x", 2, 3),
        op("q", "mkdir", "a/x", 4, 5, 8),
    ],
    "an unknown outcome may be a success": [
        op("p", "mkdir", "a/x", 0, NEVER),
        op("q", "lookup", "a/x", 5, 6, "ENOENT"),
        op("q", "lookup", "a/x", 7, 8, Found(9, DIR)),
        op("q", "lookup", "a/x", 9, 10, Found(9, DIR)),
    ],
    "an unknown outcome may be none": [
        op("p", "unlink", "a/x", 5, NEVER),
        op("q", "create", "a/x", 0, 1, 7),
        op("q", "lookup", "a/x", 7, 8, Found(7, FILE, 1)),
    ],
    "an unknown file may be linked by its number": [
        op("p", "create", "a/x", 0, NEVER),
        op("q", "lookup", "a/x", 5, 6, Found(9, FILE)),
        op("q", "link", "9/b/y", 7, 8),
        op("q", "lookup", "b/y", 9, 10, Found(9, FILE, 2)),
    ],
    "a rename across directories is one moment": [
        op("p", "create", "a/x", 0, 1, 7),
        op("p", "rename", "a/x/b/y", 2, 10),
        op("q", "lookup", "b/y", 3, 4, "ENOENT"),
        op("q", "lookup", "a/x", 5, 6, "ENOENT"),
        op("q", "lookup", "b/y", 7, 8, Found(7, FILE)),
    ],
    "two names of one file: rename does nothing": [
        op("p", "create", "a/x", 0, 1, 7),
        op("p", "link", "7/b/y", 2, 3),
        op("p", "rename", "a/x/b/y", 4, 5),
        op("p", "list", "a", 6, 7, seen(("x", 7, FILE))),
    ],
    "a directory that is removed takes nothing": [
        op("p", "mkdir", "a/d", 0, 1, 7),
        op("p", "rmdir", "a/d", 2, 9),
        op("q", "create", "7/x", 3, 8, "ENOENT"),
    ],
    "what a directory holds keeps it": [
        op("p", "mkdir", "a/d", 0, 1, 7),
        op("q", "create", "7/x", 2, 9, 8),
        op("p", "rmdir", "a/d", 3, 8, "ENOTEMPTY"),
        op("p", "mkdir", "b/d", 10, 11, 12),
        op("p", "rename", "b/d/a/d", 12, 13, "ENOTEMPTY"),
    ],
    "a listing sees all or nothing of a rename": [
        op("p", "create", "a/x", 0, 1, 7),
        op("p", "rename", "a/x/a/y", 2, 9),
        op("q", "list", "a", 3, 4, seen(("x", 7, FILE))),
        op("q", "list", "a", 5, 6, seen(("y", 7, FILE))),
    ],
    "a move may be refused for either name": [
        op("p", "create", "a/x", 0, 1, 7),
        op("p", "move", "a/y/a/x", 2, 3, "EEXIST"),
        op("p", "move", "a/y/a/x", 4, 5, "ENOENT"),
        op("p", "move", "a/x/b/x", 6, 7),
        op("p", "lookup", "b/x", 8, 9, Found(7, FILE, 1)),
    ],
    "a number that nobody heard equals any": [
        op("p", "mkdir", "a/d", 0, 1, 0),
        op("q", "lookup", "a/d", 2, 3, Found(5, DIR)),
        op("q", "list", "a", 4, 5, seen(("d", 5, DIR))),
    ],
}

BAD = {
    "a stale read": [
        op("p", "create", "a/x", 0, 1, 7),
        op("q", "lookup", "a/x", 2, 3, "ENOENT"),
    ],
    "a read that goes back in time": [
        op("p", "create", "a/x", 0, 10, 7),
        op("q", "lookup", "a/x", 1, 2, Found(7, FILE)),
        op("r", "lookup", "a/x", 3, 4, "ENOENT"),
    ],
    "a lost acknowledgement": [
        op("p", "mkdir", "a/x", 0, 1, 7),
        op("q", "mkdir", "a/x", 2, 3, 8),
    ],
    "two winners": [
        op("p", "mkdir", "a/x", 0, 10, 7),
        op("q", "mkdir", "a/x", 0, 10, 8),
    ],
    "no winner": [
        op("p", "mkdir", "a/x", 0, 10, "EEXIST"),
        op("q", "mkdir", "a/x", 0, 10, "EEXIST"),
    ],
    "an unknown outcome that is there, gone and there again": [
        op("p", "mkdir", "a/x", 0, NEVER),
        op("q", "lookup", "a/x", 1, 2, Found(9, DIR)),
        op("q", "lookup", "a/x", 3, 4, "ENOENT"),
    ],
    "an effect before its call": [
        op("q", "lookup", "a/x", 0, 1, Found(7, FILE)),
        op("p", "create", "a/x", 2, 3, 7),
    ],
    "done twice": [
        op("p", "create", "a/x", 0, 1, 7),
        op("p", "unlink", "a/x", 2, 3),
        op("q", "unlink", "a/x", 2, 3),
    ],
    "a rename that is seen in two moments": [
        op("p", "create", "a/x", 0, 1, 7),
        op("p", "rename", "a/x/b/y", 2, 10),
        op("q", "lookup", "b/y", 3, 4, Found(7, FILE)),
        op("q", "lookup", "a/x", 5, 6, Found(7, FILE)),
    ],
    "a move that replaced": [
        op("p", "create", "a/x", 0, 1, 7),
        op("p", "create", "a/y", 2, 3, 8),
        op("p", "move", "a/x/a/y", 4, 5),
    ],
    "a listing with the file under both names": [
        op("p", "create", "a/x", 0, 1, 7),
        op("p", "rename", "a/x/a/y", 2, 9),
        op("q", "list", "a", 3, 4, seen(("x", 7, FILE), ("y", 7, FILE))),
    ],
    "another node under the name": [
        op("p", "create", "a/x", 0, 1, 7),
        op("q", "lookup", "a/x", 2, 3, Found(8, FILE)),
    ],
    "a stale count of links": [
        op("p", "create", "a/x", 0, 1, 7),
        op("p", "link", "7/b/y", 2, 3),
        op("q", "lookup", "a/x", 4, 5, Found(7, FILE, 1)),
    ],
    "a file in a directory that was removed": [
        op("p", "mkdir", "a/d", 0, 1, 7),
        op("p", "rmdir", "a/d", 2, 3),
        op("q", "create", "7/x", 4, 5, 8),
    ],
    "each directory is right alone, not together": [
        op("p", "create", "a/x", 0, 1, 7),
        op("p", "rename", "a/x/b/x", 2, 9),
        op("q", "list", "b", 3, 4, seen(("x", 7, FILE))),
        op("q", "list", "a", 5, 6, seen(("x", 7, FILE))),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_accepts(name: str) -> None:
    found = check(GOOD[name], ROOTS)
    assert found is None, str(found)


@pytest.mark.parametrize("name", BAD)
def test_finds(name: str) -> None:
    found = check(BAD[name], ROOTS)
    assert found is not None
    assert str(found.op) in str(found)


def test_what_shares_nothing_is_checked_apart() -> None:
    history = GOOD["one after the other"] + [
        op("p", "create", "b/x", 0, 1, 70),
        op("p", "lookup", "b/x", 2, 3, Found(70, FILE)),
    ]
    assert [len(part) for part in linear.parts(history)] == [4, 2]
    history.append(op("p", "link", "70/a/z", 20, 21))
    assert [len(part) for part in linear.parts(history)] == [7]


def test_too_many_unknown_outcomes_are_said_not_guessed() -> None:
    history = [op(f"p{n}", "mkdir", f"a/x{n}", 0, NEVER) for n in range(30)]
    history.append(op("q", "list", "a", 1, 2, seen(("y", 1, DIR))))
    with pytest.raises(TooWideError, match="30 outcomes are unknown"):
        check(history, ROOTS, configurations_max=300)


# --- histories made by chance, on a tree that is right and on trees that are not


class Toy:
    """A tree that clients of a simulated time ask; `stale` answers some reads of another moment."""

    def __init__(self, chance: random.Random, stale: float, forgets: float) -> None:
        self._chance = chance
        self._stale, self._forgets = stale, forgets
        self._past: list[linear.Tree] = [{}]
        self._inode = 100
        self.wrong = 0

    def do(self, what: str, where: tuple[Any, ...]) -> tuple[str, Any]:
        """Error and value; acknowledged changes may be forgotten, reads may see the past."""
        self._inode += 1
        tree = self._past[-1]
        asked = Operation("", what, where, 0, value=self._inode if what in MAKES else None)
        right = perform(tree, frozenset(ROOTS), asked)
        if what in linear.READS and self._chance.random() < self._stale:
            old = self._chance.choice(self._past[-6:])
            given = perform(old, frozenset(ROOTS), asked)
            self.wrong += given[:2] != right[:2]
            return given[0], given[1]
        if right[2] != tree and self._chance.random() < self._forgets:
            self.wrong += 1
        else:
            self._past.append(right[2])
        return right[0], right[1]


MAKES = ("create", "mkdir")
NAMES = ("x", "y")


def toy_history(seed: int, stale: float, forgets: float) -> tuple[list[Operation], int]:
    """600 operations of six clients; gives how many answers were wrong as well."""
    chance = random.Random(seed)
    toy = Toy(chance, stale, forgets)
    free = [0.0] * 6
    moments = sorted(chance.uniform(0, 400) for _ in range(600))
    history = []
    for moment in moments:
        idle = [n for n in range(6) if free[n] <= moment]
        if not idle:
            continue
        client = chance.choice(idle)
        called = max(free[client], moment - chance.expovariate(1))
        returned = moment + chance.expovariate(1)
        free[client] = returned
        what = chance.choice(["create", "mkdir", "unlink", "rmdir", "rename", "lookup", "list"])
        where = (chance.choice(ROOTS), chance.choice(NAMES))
        if what == "rename":
            where += (chance.choice(ROOTS), chance.choice(NAMES))
        elif what == "list":
            where = where[:1]
        error, value = toy.do(what, where)
        lost = what not in linear.READS and chance.random() < 0.004
        history.append(
            Operation(f"c{client}", what, where, called, math.inf if lost else returned,
                      "" if lost else error, None if lost else value)
        )  # fmt: skip
    return history, toy.wrong


@pytest.mark.parametrize("seed", range(12))
def test_a_right_tree_is_accepted(seed: int) -> None:
    history, wrong = toy_history(seed, 0, 0)
    assert wrong == 0 and len(history) > 300
    found = check(history, ROOTS)
    assert found is None, f"seed {seed}: {found}"


@pytest.mark.parametrize(("stale", "forgets"), [(0.06, 0.0), (0.0, 0.02)])
def test_a_tree_that_lies_is_found(stale: float, forgets: float) -> None:
    lied = found = 0
    for seed in range(12):
        history, wrong = toy_history(seed, stale, forgets)
        lied += wrong > 0
        found += check(history, ROOTS) is not None
    # A lie about something that overlaps with a change is no lie: not every one can be found.
    assert lied >= 9 and found >= 0.7 * lied, f"{found} of {lied} found"
