"""Clients that work on the same few names through mounts, and write down what they asked and heard.

`chaos.linear` then tells whether the file system was one tree. A system call is often several
requests of the kernel (look the name up, then act), and only each request is of one moment. So the
clients do only what can be explained by one request, whatever happens between it and the others:

    mkdir, create (O_EXCL), unlink, rmdir    refused by the look-up, or decided by the request
    lookup    opens with O_PATH, which asks for the name alone; stat(2) asks again for the inode
    link      names an open file, /proc/self/fd/N, so it does not look a second name up
    list      a short directory is one request
    move      refuses to replace (RENAME_NOREPLACE)
    rename    puts a file in place whose old name no other client uses. If the kernel's two look-ups
              of old and new name find one file, it has nothing to do, and two clients that rename
              alike may both succeed

Directories move only within their parent (the kernel may refuse others by chance, ESTALE), and
their inodes are not compared. A `link` that the kernel refuses with ENOENT says nothing: it trusts
its own count of links. The mounts must not let the kernel keep names (mfsentrycacheto=0,
mfsdirentrycacheto=0), else the history is that of the kernel's cache.
"""

import ctypes
import errno
import json
import math
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from chaos.linear import READS, Found, Operation

DIRECTORIES = ("one", "two", "three")
FILES, DIRS, LINKS = ("f0", "f1", "f2"), ("d0", "d1"), ("l0", "l1")
REFUSALS = {"ENOENT", "EEXIST", "ENOTDIR", "EISDIR", "ENOTEMPTY"}
_AT_FDCWD, _NOREPLACE = -100, 1
_PAUSE_S = 0.004  # leaves the machine to the servers and keeps histories short
_WEIGHTS = {
    "create": 5, "mkdir": 3, "unlink": 4, "rmdir": 3, "rename": 3, "move": 4, "link": 3,
    "lookup": 8, "list": 3,
}  # fmt: skip


class _Client:
    """One client in its own process, on a mount; with `weights` it chooses among its operations."""

    def __init__(
        self, root: Path, name: str, weights: dict[str, int], seed: int, record: Path
    ) -> None:
        self._root = root
        self._name = name
        self._weights = weights
        self._chance = random.Random(f"{seed}/{name}")
        self._record = open(record, "a", buffering=1, encoding="ascii")  # noqa: SIM115
        # With a descriptor of its folder, os.link follows /proc/self/fd/N to the open file.
        self._mine = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY)
        self._count = 0

    def work(self, stop: Event) -> None:
        """One random operation after the other."""
        while not stop.is_set():
            what = self._chance.choices(list(self._weights), list(self._weights.values()))[0]
            getattr(self, f"_{what}")()
            time.sleep(self._chance.uniform(0, 2 * _PAUSE_S))
        self._record.close()

    def _do(self, what: str, where: tuple[Any, ...], ask: Callable[[], Any]) -> Any:
        """Write the call down, ask, write the outcome down; None if it was refused."""
        self._count += 1
        ident = f"{self._name}/{self._count}"
        self._line(ident, time.monotonic(), what=what, where=where)
        error, value = "", None
        try:
            value = ask()
        except OSError as e:
            error = errno.errorcode.get(e.errno or 0, str(e.errno))
        self._line(ident, time.monotonic(), error=error, value=value)
        return None if error else value

    def _line(self, ident: str, at: float, **more: Any) -> None:
        self._record.write(json.dumps({"id": ident, "at": at, **more}) + "\n")

    def _place(self, *names: str) -> tuple[str, str]:
        return self._chance.choice(DIRECTORIES), self._chance.choice(names)

    def _path(self, place: tuple[str, ...]) -> str:
        return str(self._root.joinpath(*place))

    def _create(self) -> None:
        self._make(self._place(*FILES))

    def _make(self, place: tuple[str, str]) -> bool:
        """Make a file; whether it was made."""
        opened: list[int] = []

        def create() -> int:
            opened.append(os.open(self._path(place), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            return os.fstat(opened[0]).st_ino

        made = self._do("create", place, create)
        for fd in opened:
            os.close(fd)
        return bool(made)

    def _mkdir(self) -> None:
        place = self._place(*DIRS)
        self._do("mkdir", place, lambda: os.mkdir(self._path(place)))

    def _unlink(self) -> None:
        place = self._place(*FILES, *LINKS, DIRS[0])
        self._do("unlink", place, lambda: os.unlink(self._path(place)))

    def _rmdir(self) -> None:
        place = self._place(*DIRS, FILES[0])
        self._do("rmdir", place, lambda: os.rmdir(self._path(place)))

    def _rename(self) -> None:
        own = (self._chance.choice(DIRECTORIES), f"t-{self._name}")
        new = self._place(*FILES)
        if self._make(own):
            self._do("rename", (*own, *new), lambda: os.rename(self._path(own), self._path(new)))

    def _move(self) -> None:
        if self._chance.random() < 0.7:
            old, new = self._place(*FILES), self._place(*FILES)
        else:
            old = self._place(*DIRS)
            new = (old[0], self._chance.choice(DIRS))
        self._do("move", (*old, *new), lambda: _move(self._path(old), self._path(new)))

    def _lookup(self) -> None:
        found = self._look(self._place(*FILES, *DIRS, *LINKS))
        if found is not None:
            os.close(found[0])

    def _link(self) -> None:
        place = self._place(*LINKS)
        found = self._look(self._place(*FILES))
        if found is None:
            return
        fd, inode = found
        try:
            self._do("link", (inode, *place),
                     lambda: os.link(str(fd), self._path(place), src_dir_fd=self._mine))
        finally:
            os.close(fd)

    def _look(self, place: tuple[str, str]) -> tuple[int, int] | None:
        """Look a name up; an open descriptor and its inode if it is there."""
        opened: list[int] = []

        def look() -> tuple[int, str]:
            opened.append(os.open(self._path(place), os.O_PATH | os.O_NOFOLLOW))
            if place[1] in DIRS:
                return 0, "dir"
            return os.fstat(opened[0]).st_ino, "file"

        found = self._do("lookup", place, look)
        if found is None:
            for fd in opened:
                os.close(fd)
            return None
        return opened[0], found[0]

    def _list(self) -> None:
        place = (self._chance.choice(DIRECTORIES),)

        def look() -> list[tuple[str, int, str]]:
            with os.scandir(self._path(place)) as entries:
                return [
                    (e.name, 0, "dir") if e.is_dir(follow_symlinks=False)
                    else (e.name, e.inode(), "file")
                    for e in entries
                ]  # fmt: skip

        self._do("list", place, look)


def _move(old: str, new: str) -> None:
    """renameat2(2) with RENAME_NOREPLACE."""
    libc: Any = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, old.encode(), _AT_FDCWD, new.encode(), _NOREPLACE):
        raise OSError(ctypes.get_errno(), "rename refused", old)


def _work(
    root: Path, name: str, weights: dict[str, int], seed: int, record: Path, stop: Event
) -> None:
    _Client(root, name, weights, seed, record).work(stop)


class Clients:
    """Several clients on each of several mounts; on those of `readers` they only look.

    (A change that waits for an answer makes the kernel hold the directory: nobody on that mount
    would see a stale answer about it.)
    """

    def __init__(
        self, mounts: dict[str, Path], readers: set[str], records: Path, each: int, seed: int
    ) -> None:
        records.mkdir(parents=True, exist_ok=True)
        self._stop = multiprocessing.Event()
        self.records = []
        self._processes = []
        for mount, root in mounts.items():
            weights = {w: n for w, n in _WEIGHTS.items() if w in READS or mount not in readers}
            for number in range(each):
                name = f"{mount}{number}"
                record = records / f"client-{name}.jsonl"
                self.records.append(record)
                self._processes.append(multiprocessing.Process(
                    target=_work, args=(root, name, weights, seed, record, self._stop), daemon=True
                ))  # fmt: skip

    def start(self) -> None:
        """Begin."""
        for process in self._processes:
            process.start()

    def stop(self, timeout_s: float = 90.0) -> None:
        """Let each end its operation; RuntimeError if one hangs."""
        self._stop.set()
        for process in self._processes:
            process.join(timeout_s)
            if process.is_alive():
                process.kill()
                raise RuntimeError(f"client {process.name} hangs")

    def crashes(self) -> list[str]:
        """Clients that ended in another way than told to."""
        return [f"client {n} crashed with status {p.exitcode}"
                for n, p in enumerate(self._processes) if p.exitcode]  # fmt: skip

    def history(self) -> list[Operation]:
        """Everything that was asked; what has no answer in the records has none."""
        return [op for record in self.records for op in read(record)]


def read(record: Path) -> Iterator[Operation]:
    """One client's operations, without links of which the kernel alone said ENOENT."""
    called: dict[str, Any] | None = None
    for text in record.read_text("ascii").splitlines() if record.exists() else []:
        if not text.endswith("}"):
            continue  # its writer was killed
        line = json.loads(text)
        if "what" in line:
            called = line
            continue
        assert called is not None and called["id"] == line["id"]
        op = _operation(called, line["at"], line["error"], line["value"])
        called = None
        if (op.what, op.error) != ("link", "ENOENT"):
            yield op
    if called is not None:
        yield _operation(called, math.inf, "", None)


def _operation(called: dict[str, Any], returned: float, error: str, value: Any) -> Operation:
    if value is not None and called["what"] == "lookup":
        value = Found(*value)
    elif value is not None and called["what"] == "list":
        value = frozenset(map(tuple, value))
    client = called["id"].partition("/")[0]
    where = tuple(called["where"])
    if error and error not in REFUSALS:
        returned = math.inf  # it failed on its way: perhaps there, perhaps back
    return Operation(client, called["what"], where, called["at"], returned, error, value)


def strange(history: list[Operation]) -> list[str]:
    """Errors that no tree gives: something failed and a client saw it."""
    return [str(op) for op in history if op.error and op.error not in REFUSALS]


def longest_stall_s(history: list[Operation], since: float, until: float) -> float:
    """The longest that an operation took which was under way in this time."""
    waits = (
        op.returned - op.called
        for op in history
        if op.called < until and op.returned > since and not op.unknown
    )
    return max(waits, default=0.0)


def done_between(history: list[Operation], since: float, until: float) -> int:
    """Operations that returned in this time."""
    return sum(since <= op.returned < until for op in history)
