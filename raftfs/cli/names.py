"""From nodes back to the paths that lead to them, page by page through the directories.

A directory does not know the names of what is below it the other way round, so its entries are
looked through. Only files with several names need a look at all directories.
"""

from collections.abc import Iterator, Sequence

from raftfs.client.meta import ToolClient
from raftfs.const import ROOT_INODE
from raftfs.errors import ReplyError, UserError
from raftfs.wire import inquiries as q
from raftfs.wire import messages as m

_PLACES_ASKED = 1_000
_NAMES_ASKED = 10_000


class Names:
    """Paths by inode, as they were while they were looked for: names may change meanwhile."""

    def __init__(self, client: ToolClient) -> None:
        self._client = client
        self._directories: dict[int, str] = {ROOT_INODE: ""}

    def paths(self, inodes: Sequence[int], *, everywhere: bool) -> dict[int, list[str]]:
        """The paths of files; none for one that has no name any more.

        `everywhere`: all names of files that have several, which may take a look at every
        directory; otherwise at least one, where that is easily found.
        """
        places = self._places(inodes)
        found: dict[int, set[str]] = {inode: set() for inode in inodes}
        below: dict[int, list[int]] = {}
        for place in places.values():
            below.setdefault(place.parent, []).append(place.inode)
        for parent, those in below.items():
            self._look(those, parent, found)
        if everywhere:
            short = [p.inode for p in places.values() if len(found[p.inode]) < p.nlink]
            self._look(short, 0, found)
        return {inode: sorted(paths) for inode, paths in found.items()}

    def _places(self, inodes: Sequence[int]) -> dict[int, q.NodePlace]:
        places = {}
        for some in _parts(inodes, _PLACES_ASKED):
            answer: list[q.NodePlace] = self._client.call(q.WhereNodes(some))
            places.update({place.inode: place for place in answer})
        return places

    def _look(self, inodes: list[int], parent: int, found: dict[int, set[str]]) -> None:
        for some in _parts(inodes, _NAMES_ASKED):
            for inode, directory, name in self._entries(some, parent):
                above = self._directory(directory)
                if above is not None:
                    found[inode].add(f"{above}/{shown(name)}")

    def _entries(self, inodes: list[int], parent: int) -> Iterator[tuple[int, int, bytes]]:
        after = b""
        while True:
            page: q.NamesPage = self._client.call(q.FindNames(inodes, parent, after))
            yield from page.names
            after = page.after
            if not after:
                return

    def _directory(self, inode: int) -> str | None:
        """The path of a directory; None if it went meanwhile."""
        missing = []
        while inode not in self._directories:
            place = self._places([inode]).get(inode)
            if place is None:
                return None
            names = [name for _, _, name in self._entries([inode], place.parent)]
            if not names:
                return None
            missing.append((inode, shown(names[0])))
            inode = place.parent
        path = self._directories[inode]
        for below, name in reversed(missing):
            path = self._directories[below] = f"{path}/{name}"
        return path


def _parts(inodes: Sequence[int], size: int) -> Iterator[list[int]]:
    for at in range(0, len(inodes), size):
        yield list(inodes[at : at + size])


def shown(name: bytes) -> str:
    """A name as text on one line, whatever its bytes are."""
    text = name.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def lookup(client: ToolClient, path: str) -> int:
    """The inode at an absolute path within the file system. UserError if there is none."""
    inode = ROOT_INODE
    for name in path.split("/"):
        if name in ("", "."):
            continue
        try:
            inode = client.call(m.Lookup(inode, name.encode("utf-8", "surrogateescape"))).inode
        except ReplyError as e:
            raise UserError(f"{path}: no such path in the file system ({name}: {e})") from None
    return inode
