"""The journal's crash matrix: a stop, a full disk or an I/O error at every single call that changes
the disk, through all that a journal lives through.
"""

import errno
import random
from collections import Counter
from pathlib import Path

import pytest

from raftfs.errors import InvariantError, UserError
from raftfs.meta.raft.journal import DurableJournal, JournalError
from tests.unit.raft.disks import FakeFiles, PowerCut

FOLDER = Path("journal")
SEGMENT = 1_500
Entry = tuple[bytes, int, int]


def entry(index: int, term: int) -> Entry:
    return (b"\x00entry %d of %d " % (index, term) + b"x" * (index % 41), index, term)


class Life:
    """Starts, entries, votes, conflicts, checkpoints with compaction, a snapshot, restarts. What
    was confirmed is remembered, and what the state machine has.
    """

    def __init__(self, files: FakeFiles) -> None:
        self.files = files
        self.confirmed: dict[int, Entry] = {}
        self.pending: dict[int, Entry] = {}
        self.written: set[Entry] = set()
        self.votes: list[tuple[int, str]] = [(0, "")]
        self.machine = (0, 0)  # where its last checkpoint is
        self.journals: list[DurableJournal] = []

    def start(self) -> DurableJournal:
        j = DurableJournal(FOLDER, self.files, SEGMENT, checkpointed=self.machine[0])
        self.journals.append(j)
        return j

    def add(self, j: DurableJournal, indexes: range, term: int) -> None:
        for index in indexes:
            one = entry(index, term)
            self.written.add(one)
            self.pending[index] = one
            j.add(*one)
            if index % 2 == 0:
                self.sync(j)
        self.sync(j)

    def sync(self, j: DurableJournal) -> None:
        j.sync()
        self.confirmed |= self.pending
        self.pending = {}

    def vote(self, j: DurableJournal, term: int, vote: str) -> None:
        self.votes.append((term, vote))
        j.setCurrentTerm(term, vote)
        self.votes = [(term, vote)]

    def conflict(self, j: DurableJournal, index: int) -> None:
        """Entries from `index` on were of a leader that is none any more."""
        self.confirmed = {i: e for i, e in self.confirmed.items() if i < index}
        self.pending = {}
        j.deleteEntriesFrom(index - j.first_index)

    def checkpoint(self, j: DurableJournal, index: int, term: int) -> None:
        """As `Checkpoints.make`."""
        self.machine = (index, term)
        self.confirmed = {i: e for i, e in self.confirmed.items() if i >= index}
        j.unlink_before(j.compact(index, keep_entries=3, keep_bytes=10_000))

    def snapshot(self, j: DurableJournal, index: int, term: int) -> None:
        """As `Replica._install`."""
        j.expect(index, term)
        self.machine = (index, term)
        self.confirmed = {}
        j.reset_to(index, term)

    def run(self) -> None:
        j = self.start()
        self.add(j, range(1, 30), 1)
        self.vote(j, 2, "b")
        self.conflict(j, 25)
        self.add(j, range(25, 60), 2)
        self.checkpoint(j, 50, 2)
        j = self.start()
        self.vote(j, 3, "me")
        self.add(j, range(60, 100), 3)
        self.checkpoint(j, 90, 3)
        self.checkpoint(j, 98, 3)
        self.vote(j, 5, "")
        self.snapshot(j, 500, 4)
        self.add(j, range(501, 540), 5)
        self.vote(j, 6, "c")
        j = self.start()
        self.conflict(j, 530)
        self.add(j, range(530, 560), 6)
        self.checkpoint(j, 550, 6)
        self.start()

    def check(self, disk: FakeFiles, where: str) -> None:
        """The next start finds everything that was confirmed, and can go on."""
        j = DurableJournal(FOLDER, disk, SEGMENT, checkpointed=self.machine[0])
        assert j.fits(*self.machine), f"{where}: {self.machine}, {j.oldest_index}-{j.last_index}"
        have = {e[1]: e for e in j[:]}
        for index, one in self.confirmed.items():
            assert have.get(index) == one, f"{where}: entry {index}"
        for one in have.values():
            base = one[0] == b"\x01" and one[1:] == self.machine
            assert base or one in self.written, f"{where}: phantom {one[:2]}"
        vote = (j.getCurrentTerm(), j.getVotedForNodeId() or "")
        assert vote in self.votes, f"{where}: {vote} is none of {self.votes}"
        index = j.last_index + 1
        j.add(*entry(index, 99))
        j.sync()
        again = DurableJournal(FOLDER, disk.after_kill(), SEGMENT, checkpointed=self.machine[0])
        assert again.last_index == index and again.fits(*self.machine), f"{where}: no going on"


def disks_after(files: FakeFiles, how: str, chance: random.Random) -> list[FakeFiles]:
    """Every disk that the next start may find."""
    if how == "kill":
        return [files.after_kill()]
    if how == "power cut":
        return [files.after_power_cut()]
    if how == "undone unlinks":
        return [files.after_power_cut(undone_unlinks=n) for n in range(len(files.gone) + 1)]
    return [files.after_power_cut(chance) for _ in range(3)]


@pytest.mark.parametrize("how", ["kill", "power cut", "torn sectors", "undone unlinks"])
def test_a_stop_at_every_call_loses_nothing(how: str) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance, stopped = random.Random(seed), Counter[str]()
    for at in range(1, 10_000):
        files = FakeFiles(fail_at=at)
        life = Life(files)
        try:
            life.run()
        except PowerCut:
            stopped.update(files.failed_in)
        else:
            break
        for disk in disks_after(files, how, chance):
            life.check(disk, f"{how} at call {at}, {files.failed_in[0]}")
    assert stopped["create"] > 8 and stopped["write"] > 100 and stopped["sync"] > 100
    assert stopped["unlink"] > 5 and stopped["sync_folder"] > 10


@pytest.mark.parametrize("partly", [False, True], ids=["not at all", "half of it"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_an_error_at_every_call_stops_the_journal_for_good(number: int, partly: bool) -> None:
    failed = Counter[str]()
    for at in range(1, 10_000):
        files = FakeFiles(at, OSError, number=number, partly=partly)
        life = Life(files)
        try:
            life.run()
        except JournalError as e:
            assert "cannot be written" in str(e) and "injected" in str(e)
            failed.update(files.failed_in)
        else:
            assert not files.failed_in, f"nobody heard of the error at call {at}"
            break
        where = f"error at call {at}, {files.failed_in[0]}"
        if life.journals and life.journals[-1]._failed:
            _no_more(life.journals[-1], files, where)
        for disk in (files.after_kill(), files.after_power_cut()):
            life.check(disk, where)
    assert failed["create"] > 8 and failed["write"] > 100 and failed["sync"] > 100
    assert failed["unlink"] > 5 and failed["sync_folder"] > 10


def _no_more(j: DurableJournal, files: FakeFiles, where: str) -> None:
    """A journal that failed writes nothing more, whatever is asked of it."""
    calls = files.calls
    j.add(b"after", j.last_index + 1, 99)
    for ask in (j.sync, lambda: j.setCurrentTerm(100, "me")):
        with pytest.raises(InvariantError):
            ask()
    assert files.calls == calls and j.durable < j.mark, where
    j._destroy()


def test_a_disk_that_cannot_be_read_is_a_sentence() -> None:
    class Unreadable(FakeFiles):
        def read(self, path: Path) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    files = Unreadable()
    files.content["000000000001.seg"] = bytearray(10)
    with pytest.raises(UserError, match="cannot be read"):
        DurableJournal(FOLDER, files, SEGMENT)
