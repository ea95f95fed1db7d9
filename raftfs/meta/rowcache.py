"""Rows in memory: changes since a checkpoint, and a bounded cache, neither with a long pause.

Nothing here copies or frees many rows at once: whole dictionaries change hands, and what is given
up is freed in small pieces (`Trash.empty_some`), because freeing 200,000 rows takes as long as a
lost heartbeat.
"""

from typing import Any

from raftfs.meta.state.model import GROUP_LEN, Row

# Tables that the leader goes through again and again (sessions, chunks, doomed chunks): their
# changed rows are found without looking at all the others.
SWEPT = b"SCD"
MISSING: Any = object()


class Overlay:
    """Rows changed since some moment; None: deleted. `groups` finds them for scans: their keys, or
    the key, as most groups have one. A set for each would be many times the size of the keys, and
    what the garbage collector has to walk through again and again.
    """

    def __init__(self) -> None:
        self.rows: dict[bytes, Row | None] = {}
        self.groups: dict[bytes, bytes | set[bytes]] = {}
        self.tables: dict[int, set[bytes]] = {table: set() for table in SWEPT}

    def put(self, key: bytes, row: Row | None) -> None:
        """Set or delete a row."""
        if key not in self.rows:
            self._add_to_group(key)
            if key[0] in SWEPT:
                self.tables[key[0]].add(key)
        self.rows[key] = row

    def _add_to_group(self, key: bytes) -> None:
        group = key[:GROUP_LEN]
        there = self.groups.get(group)
        if there is None:
            self.groups[group] = key
        elif isinstance(there, bytes):
            self.groups[group] = {there, key}
        else:
            there.add(key)

    def matching(self, prefix: bytes, after: bytes) -> list[bytes]:
        """Changed keys that a scan has to look at, sorted."""
        if len(prefix) >= GROUP_LEN:
            group = self.groups.get(prefix[:GROUP_LEN], ())
            keys: Any = (group,) if isinstance(group, bytes) else group
        elif prefix and prefix[0] in SWEPT:
            keys = self.tables[prefix[0]]
        else:
            keys = self.rows
        start = prefix + after
        return sorted(
            k for k in keys if k.startswith(prefix) and (k > start or (not after and k == start))
        )


class Trash:
    """Dictionaries and sets that nobody uses any more."""

    def __init__(self) -> None:
        self._heap: list[dict[Any, Any] | set[Any]] = []

    def throw(self, *unused: dict[Any, Any] | set[Any]) -> None:
        """Give them up; nobody else may still hold them."""
        self._heap += [u for u in unused if u]

    def empty_some(self, count: int) -> int:
        """Free at most `count` items; gives how many were."""
        left = count
        while left and self._heap:
            last = self._heap[-1]
            if isinstance(last, dict):
                while left and last:
                    _, value = last.popitem()
                    left -= 1
                    if isinstance(value, set):
                        self._heap.append(value)
                        break
            else:
                while left and last:
                    last.pop()
                    left -= 1
            if not last:
                self._heap.remove(last)
        return count - left


class RowCache:
    """At most about `limit` rows, in two generations: what is used moves to the young one; when
    that is full, the old one goes and the young one becomes old.
    """

    def __init__(self, limit: int, trash: Trash) -> None:
        self._half = max(1, limit // 2)
        self._trash = trash
        self._young: dict[bytes, Row | None] = {}
        self._old: dict[bytes, Row | None] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def get(self, key: bytes) -> Any:
        """The row, None if there is none, MISSING if that is not known."""
        row = self._young.get(key, MISSING)
        if row is MISSING:
            row = self._old.get(key, MISSING)
            if row is not MISSING:
                self.put(key, row)
        return row

    def put(self, key: bytes, row: Row | None) -> None:
        """Remember."""
        self._young[key] = row
        if len(self._young) >= self._half:
            self._grow_old(self._young)
            self._young = {}

    def forget(self, key: bytes) -> None:
        """The row changes: what is known of it is wrong from now on."""
        self._young.pop(key, None)
        self._old.pop(key, None)

    def adopt(self, rows: dict[bytes, Row | None]) -> None:
        """Remember all these (forgotten before, each of them) without copying them."""
        self._grow_old(rows)

    def _grow_old(self, rows: dict[bytes, Row | None]) -> None:
        self._trash.throw(self._old)
        self._old = rows
