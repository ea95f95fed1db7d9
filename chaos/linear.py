"""Is a history of namespace operations linearizable?

A history is what concurrent clients asked and heard: each operation with the time before it was
called, the time after it returned, and its outcome. It is linearizable if every operation can be
given one moment between the two at which it alone took effect, so that all outcomes are those of a
single tree that does one thing at a time. An operation whose outcome nobody heard may have taken
effect at any moment after its call, or never.

The search is Wing and Gong's with Lowe's cache, in the order of time: a *configuration* is a tree
and the set of open operations that took effect already; a call opens an operation, and at a return
every configuration must be led, through some order of the open ones, to one in which the returning
operation took effect. Configurations that are equal are searched once. Operations that change
nothing (reads and refusals) take effect as soon as the tree agrees with them, which never hurts.

Parts of a history that share no directory and no file are checked each for itself (`parts`).
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

CONFIGURATIONS_MAX = 50_000  # at one return; only very many unknown outcomes come near
READS = frozenset({"lookup", "list"})
_SHOWN = 3


class Node(NamedTuple):
    """What a name leads to. `inode` 0: nobody has heard its number, it equals any."""

    inode: int
    kind: str  # "file" or "dir"


class Found(NamedTuple):
    """A lookup's outcome. `nlink` 0: not asked for."""

    inode: int
    kind: str
    nlink: int = 0


@dataclass(frozen=True)
class Operation:
    """One operation of one client. Directories are given by inode, or by any name that stays.

    what     where                              value on success
    create   (dir, name)                        the file's inode, or 0
    mkdir    (dir, name)                        the directory's inode, or 0
    unlink   (dir, name)                        None
    rmdir    (dir, name)                        None
    rename   (dir, name, new dir, new name)     None
    move     the same, never replacing          None
    link     (inode, dir, name)                 None
    lookup   (dir, name)                        `Found`
    list     (dir,)                             frozenset of (name, inode, kind)

    `error` is "" for success, else the errno's name. `returned` of infinity: nobody knows whether
    and when it took effect, whatever `error` says.
    """

    client: str
    what: str
    where: tuple[Any, ...]
    called: float
    returned: float = math.inf
    error: str = ""
    value: Any = None

    @property
    def unknown(self) -> bool:
        """Whether the outcome was never heard."""
        return self.returned == math.inf

    @property
    def idle(self) -> bool:
        """Whether it changes nothing, so that it only has to agree with the tree."""
        return self.what in READS or (bool(self.error) and not self.unknown)

    def __str__(self) -> str:
        if self.unknown:
            outcome = self.error or "?"
        else:
            outcome = self.error or ("ok" if self.value is None else str(self.value))
        return (f"{self.client}: {self.what}{self.where} -> {outcome} "
                f"[{self.called:.6f}, {self.returned:.6f}]")  # fmt: skip


Tree = Mapping[tuple[Any, str], Node]  # (directory, name) -> node; never changed once made
Outcome = tuple[str, Any, Tree]  # error, value, the tree afterwards


# --- the model: a tree that does one thing at a time


def _is_dir(tree: Tree, roots: frozenset[Any], directory: Any) -> bool:
    return directory in roots or Node(directory, "dir") in tree.values()


def _empty(tree: Tree, node: Node) -> bool:
    return not node.inode or not any(parent == node.inode for parent, _ in tree)


def perform(tree: Tree, roots: frozenset[Any], op: Operation) -> Outcome:
    """What `op` gives on this tree. A new node gets the number that the history has heard."""
    return _MODEL[op.what](tree, roots, op)


def _make(kind: str) -> Callable[[Tree, frozenset[Any], Operation], Outcome]:
    def make(tree: Tree, roots: frozenset[Any], op: Operation) -> Outcome:
        directory, name = op.where
        if not _is_dir(tree, roots, directory):
            return "ENOENT", None, tree
        if (directory, name) in tree:
            return "EEXIST", None, tree
        inode = op.value or 0
        return "", op.value, {**tree, (directory, name): Node(inode, kind)}

    return make


def _remove(kind: str) -> Callable[[Tree, frozenset[Any], Operation], Outcome]:
    def remove(tree: Tree, roots: frozenset[Any], op: Operation) -> Outcome:
        node = tree.get(op.where)
        if node is None:
            return "ENOENT", None, tree
        if node.kind != kind:
            return ("EISDIR" if kind == "file" else "ENOTDIR"), None, tree
        if kind == "dir" and not _empty(tree, node):
            return "ENOTEMPTY", None, tree
        return "", None, {place: n for place, n in tree.items() if place != op.where}

    return remove


def _rename(tree: Tree, roots: frozenset[Any], op: Operation) -> Outcome:
    source, target = op.where[:2], op.where[2:]
    node, replaced = tree.get(source), tree.get(target)
    if node is None or not _is_dir(tree, roots, target[0]):
        return "ENOENT", None, tree
    if source == target or (node.inode and node == replaced):
        return "", None, tree  # two names of one file: POSIX has nothing happen
    if replaced is not None:
        if node.kind != replaced.kind:
            return ("ENOTDIR" if node.kind == "dir" else "EISDIR"), None, tree
        if replaced.kind == "dir" and not _empty(tree, replaced):
            return "ENOTEMPTY", None, tree
    return "", None, {**{p: n for p, n in tree.items() if p != source}, target: node}


def _move(tree: Tree, roots: frozenset[Any], op: Operation) -> Outcome:
    source, target = op.where[:2], op.where[2:]
    refusals = ["EEXIST"] * (target in tree) + ["ENOENT"] * (source not in tree)
    if refusals:
        return _any_of(refusals, op), None, tree
    moved = {place: node for place, node in tree.items() if place != source}
    return "", None, {**moved, target: tree[source]}


def _any_of(refusals: list[str], op: Operation) -> str:
    """Of several reasons the one that was heard: whoever looks may find either first."""
    return op.error if op.error in refusals else refusals[0]


def _link(tree: Tree, roots: frozenset[Any], op: Operation) -> Outcome:
    inode, directory, name = op.where
    there = Node(inode, "file") in tree.values() and _is_dir(tree, roots, directory)
    refusals = ["EEXIST"] * ((directory, name) in tree) + ["ENOENT"] * (not there)
    if refusals:
        return _any_of(refusals, op), None, tree
    return "", None, {**tree, (directory, name): Node(inode, "file")}


def _lookup(tree: Tree, roots: frozenset[Any], op: Operation) -> Outcome:
    node = tree.get(op.where)
    if node is None:
        return "ENOENT", None, tree
    links = sum(n == node for n in tree.values()) if node.inode and node.kind == "file" else 0
    return "", Found(node.inode, node.kind, links), tree


def _list(tree: Tree, roots: frozenset[Any], op: Operation) -> Outcome:
    if not _is_dir(tree, roots, op.where[0]):
        return "ENOENT", None, tree
    found = {(name, *node) for (parent, name), node in tree.items() if parent == op.where[0]}
    return "", frozenset(found), tree


_MODEL: dict[str, Callable[[Tree, frozenset[Any], Operation], Outcome]] = {
    "create": _make("file"), "mkdir": _make("dir"), "unlink": _remove("file"),
    "rmdir": _remove("dir"), "rename": _rename, "move": _move, "link": _link, "lookup": _lookup,
    "list": _list,
}  # fmt: skip


def agrees(op: Operation, error: str, value: Any) -> bool:
    """Whether what the client heard is what the model gives."""
    if op.error or error:
        return op.error == error
    if op.what == "lookup":
        return op.value.kind == value.kind and all(
            heard == known or not heard or not known
            for heard, known in ((op.value.inode, value.inode), (op.value.nlink, value.nlink))
        )
    if op.what == "list":
        heard, known = sorted(op.value), sorted(value)
        return len(heard) == len(known) and all(
            a[0] == b[0] and a[2] == b[2] and (a[1] == b[1] or not a[1] or not b[1])
            for a, b in zip(heard, known, strict=True)
        )
    return True


# --- the search


class TooWideError(Exception):
    """More configurations than can be searched: too many operations of unknown outcome."""


class Violation:
    """No order explains the history up to this return."""

    def __init__(self, op: Operation, still_open: list[Operation], trees: list[Outcome]) -> None:
        self.op = op
        self.still_open = still_open
        self.trees = trees

    def __str__(self) -> str:
        lines = [f"no order of the operations explains {self.op}"]
        lines += [f"  open at that time: {op}" for op in self.still_open]
        for error, value, tree in self.trees[:_SHOWN]:
            lines.append(f"  a tree until then: {dict(tree)}; it gives {error or value or 'ok'}")
        return "\n".join(lines)


Configuration = tuple[frozenset[tuple[tuple[Any, str], Node]], frozenset[int]]


class _Search:
    """The configurations after what has been read of the history so far."""

    def __init__(
        self, history: list[Operation], roots: frozenset[Any], configurations_max: int
    ) -> None:
        self._history = history
        self._max = configurations_max
        self._roots = roots
        self._orphans = _orphans(history)
        self._open: set[int] = set()
        self._now: set[Configuration] = {(frozenset(), frozenset())}

    def call(self, number: int) -> None:
        """An operation is open from now on."""
        self._open.add(number)
        if self._history[number].idle:
            self._now = {self._settle(tree, done) for tree, done in self._now}

    def back(self, number: int) -> Violation | None:
        """An operation has returned: only configurations in which it took effect go on."""
        todo, seen, after = list(self._now), set(self._now), set()
        while todo:
            tree, done = todo.pop()
            if number in done:
                after.add((tree, done - {number}))
                continue
            for following in self._steps(tree, done):
                if following not in seen:
                    seen.add(following)
                    todo.append(following)
            if len(seen) > self._max:
                raise TooWideError(
                    f"more than {self._max} ways to explain {self._history[number]}; "
                    f"{sum(self._history[n].unknown for n in self._open)} outcomes are unknown"
                )
        self._open.remove(number)
        if after:
            self._now = after
            return None
        op = self._history[number]
        trees = [perform(dict(tree), self._roots, op) for tree, _ in itertools.islice(seen, _SHOWN)]
        return Violation(op, [self._history[n] for n in sorted(self._open)], trees)

    def _steps(self, tree: Any, done: frozenset[int]) -> Iterable[Configuration]:
        names = dict(tree)
        for number in self._open - done:
            op = self._history[number]
            if op.idle:
                continue  # it would have settled
            for meant in self._meanings(op):
                error, _, following = perform(names, self._roots, meant)
                if not error:
                    yield self._settle(frozenset(following.items()), done | {number})

    def _meanings(self, op: Operation) -> list[Operation]:
        """What was made without an answer may be any node of which nobody knows who made it."""
        if not op.unknown or op.what not in ("create", "mkdir"):
            return [op]
        return [replace(op, value=inode) for inode in (0, *self._orphans)]

    def _settle(self, tree: Any, done: frozenset[int]) -> Configuration:
        """Let every open operation that changes nothing and agrees with the tree take effect."""
        names = dict(tree)
        agreed = []
        for number in self._open - done:
            op = self._history[number]
            if op.idle and agrees(op, *perform(names, self._roots, op)[:2]):
                agreed.append(number)
        return tree, done.union(agreed)


def _orphans(history: list[Operation]) -> list[int]:
    """Inodes that were seen, and whose maker was never heard."""
    made = {op.value for op in history if op.what in ("create", "mkdir")}
    seen = {op.where[0] for op in history if op.what == "link"}
    for op in history:
        if not op.error and op.value and op.what in READS:
            found = [op.value.inode] if op.what == "lookup" else [n for _, n, _ in op.value]
            seen.update(found)
    return sorted(seen - made - {0})


def check(
    history: Iterable[Operation], roots: Iterable[Any], configurations_max: int = CONFIGURATIONS_MAX
) -> Violation | None:
    """The first operation that no order explains; None: the history is linearizable.

    `roots` are directories that are there, and empty, from the beginning and are never removed.
    TooWideError if it cannot be decided.
    """
    stay = frozenset(roots)
    for part in parts(history):
        found = _check_part(part, _Search(part, stay, configurations_max))
        if found is not None:
            return found
    return None


def _check_part(history: list[Operation], search: _Search) -> Violation | None:
    events = [(op.called, 0, n) for n, op in enumerate(history)]
    events += [(op.returned, 1, n) for n, op in enumerate(history) if not op.unknown]
    for _, returns, number in sorted(events):
        if not returns:
            search.call(number)
            continue
        found = search.back(number)
        if found is not None:
            return found
    return None


def parts(history: Iterable[Operation]) -> list[list[Operation]]:
    """The history in parts that have no directory and no file in common, each in time's order."""
    known = [op for op in history if not (op.unknown and op.what in READS)]
    leader: dict[Any, Any] = {}

    def find(token: Any) -> Any:
        while leader.setdefault(token, token) != token:
            leader[token] = token = leader[leader[token]]
        return token

    for op in known:
        first, *others = tokens(op)
        for token in others:
            leader[find(token)] = find(first)
    together: dict[Any, list[Operation]] = {}
    for op in sorted(known, key=lambda o: o.called):
        together.setdefault(find(tokens(op)[0]), []).append(op)
    return list(together.values())


def tokens(op: Operation) -> list[Any]:
    """The directories and inodes that an operation has to do with; a directory comes first."""
    if op.what == "link":
        found = [op.where[1], op.where[0]]
    elif op.what in ("rename", "move"):
        found = [op.where[0], op.where[2]]
    else:
        found = [op.where[0]]
    if not op.error and op.what in ("create", "mkdir") and op.value:
        found.append(op.value)
    elif not op.error and op.what == "lookup" and op.value and op.value.inode:
        found.append(op.value.inode)
    elif not op.error and op.what == "list" and op.value:
        found += [inode for _, inode, _ in op.value if inode]
    return found
