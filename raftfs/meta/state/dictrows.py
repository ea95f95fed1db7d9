"""Rows in a dictionary: for tests, the simulator and small offline work."""

from collections.abc import Iterator

from sortedcontainers import SortedDict

from raftfs.meta.state import digest as digests
from raftfs.meta.state.model import Row


class DictRows:
    """The simplest `Rows`: everything in memory, the digest computed when asked."""

    def __init__(self) -> None:
        self.rows: SortedDict = SortedDict()
        self.checkpoints: dict[int, bytes] = {}  # index -> digest

    def get(self, key: bytes) -> Row | None:
        """As `Rows.get`."""
        row: Row | None = self.rows.get(key)
        return row

    def put(self, key: bytes, row: Row) -> None:
        """As `Rows.put`."""
        self.rows[key] = row

    def delete(self, key: bytes) -> None:
        """As `Rows.delete`."""
        self.rows.pop(key, None)

    def scan(self, prefix: bytes, after: bytes = b"") -> Iterator[tuple[bytes, Row]]:
        """As `Rows.scan`."""
        start = prefix + after
        for key in self.rows.irange(start, inclusive=(not after, False)):
            if not key.startswith(prefix):
                return
            yield key, self.rows[key]

    def compare_digest(self, index: int, digest: bytes) -> None:
        """As `Rows.compare_digest`; checkpoints are what was put into `checkpoints`."""
        digests.compare(self.checkpoints.get(index), index, digest)

    def digest(self) -> bytes:
        """Of all rows as they are."""
        total = digests.EMPTY
        for key, row in self.rows.items():
            total = digests.change(total, key, None, digests.encode_row(row))
        return digests.to_bytes(total)
