"""The journal keeps everything that `sync` confirmed, through every cut; damage stops it."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from raftfs.errors import InvariantError, UserError
from raftfs.meta.raft.journal import DurableJournal, JournalError
from tests.unit.raft.disks import FakeFiles, PowerCut

FOLDER = Path("journal")
SMALL = 600  # bytes a segment, so that stories cross many


def journal(files: FakeFiles, segment: int = SMALL) -> DurableJournal:
    return DurableJournal(FOLDER, files, segment)


def entries(j: DurableJournal) -> list[tuple[bytes, int, int]]:
    return [j[i] for i in range(len(j))]


def entry(index: int, term: int = 1) -> tuple[bytes, int, int]:
    return (b"\x00entry %d " % index + b"x" * (index % 37), index, term)


def test_everything_comes_back_over_many_segments() -> None:
    files = FakeFiles()
    j = journal(files)
    for index in range(1, 60):
        j.add(*entry(index))
        if index % 3 == 0:
            j.sync()
        if index % 10 == 0:
            j.setCurrentTerm(index, f"node{index}")
    j.sync()
    again = journal(files.after_power_cut())
    assert entries(again) == [entry(i) for i in range(1, 60)]
    assert (again.getCurrentTerm(), again.getVotedForNodeId()) == (50, "node50")
    assert len(files.content) > 5


def test_cut_and_reset_come_back() -> None:
    files = FakeFiles()
    j = journal(files)
    for index in range(1, 21):
        j.add(*entry(index))
    j.sync()
    j.deleteEntriesFrom(9)
    for index in range(10, 13):
        j.add(*entry(index, term=2))
    j.sync()
    want = [entry(i) for i in range(1, 10)] + [entry(i, 2) for i in range(10, 13)]
    assert entries(journal(files.after_power_cut())) == want
    j.reset_to(500, 7)
    again = journal(files.after_power_cut())
    assert [(i, t) for _, i, t in entries(again)] == [(500, 7)]
    j.add(*entry(501, 7))
    j.sync()
    assert [i for _, i, _ in entries(journal(files.after_power_cut()))] == [500, 501]


def test_compaction_unlinks_whole_segments_and_keeps_the_rest() -> None:
    files = FakeFiles()
    j = journal(files)
    for index in range(1, 101):
        j.add(*entry(index))
        j.sync()
    before = len(files.content)
    j.setCurrentTerm(9, "me")
    j.unlink_before(j.compact(90, keep_entries=5, keep_bytes=10_000))
    assert (j.oldest_index, j.first_index, j.last_index) == (85, 90, 100)
    assert len(files.content) < before / 3
    again = journal(files.after_power_cut())
    assert again.first_index <= 85 and again.last_index == 100
    assert [e for e in entries(again) if e[1] >= 85] == [entry(i) for i in range(85, 101)]
    assert (again.getCurrentTerm(), again.getVotedForNodeId()) == (9, "me")


def test_the_kept_tail_is_bounded_in_bytes() -> None:
    j = journal(FakeFiles(), 10_000)
    for index in range(1, 51):
        j.add(b"y" * 1000, index, 1)
    j.sync()
    j.compact(50, keep_entries=1000, keep_bytes=5_000)
    assert 44 <= j.oldest_index <= 46
    assert len(j) == 1 and j.bytes_kept == 1_000, "what the checkpoint has is not kept in memory"


def _with_tail(cut: Callable[[bytearray, int, int], None]) -> list[tuple[bytes, int, int]]:
    """Five durable entries, then a blob of two more that `cut` damages; what comes back."""
    files = FakeFiles()
    j = journal(files, 4096)
    for index in range(1, 6):
        j.add(*entry(index))
        j.sync()
    (name,) = files.content
    start = j._offset
    j.add(*entry(6))
    j.add(*entry(7))
    j.sync()
    after = files.after_kill()
    cut(after.content[name], start, j._offset)
    again = journal(after, 4096)
    found = entries(again)
    again.add(*entry(len(found) + 1, 2))  # it must be able to go on, and to start once more
    again.sync()
    once_more = journal(after.after_kill(), 4096)
    assert entries(once_more) == [*found, entry(len(found) + 1, 2)]
    return found


def _tail_length() -> int:
    lengths: list[int] = []
    _with_tail(lambda data, start, end: lengths.append(end - start))
    return lengths[0]


@pytest.mark.parametrize("kept", range(_tail_length()))
def test_a_tail_cut_at_any_byte_is_forgotten_whole(kept: int) -> None:
    def cut(data: bytearray, start: int, end: int) -> None:
        data[start + kept : end] = bytes(end - start - kept)

    found = _with_tail(cut)
    assert found in ([entry(i) for i in range(1, 6)], [entry(i) for i in range(1, 8)])
    # A cut that only removes zeros of the last entry's end may leave the blob whole.
    assert len(found) == 5 or kept > _tail_length() - 40


def test_a_tail_with_any_byte_changed_is_forgotten_whole() -> None:
    for at in range(_tail_length()):
        def flip(data: bytearray, start: int, end: int, at: int = at) -> None:
            data[start + at] ^= 0x40

        assert _with_tail(flip) == [entry(i) for i in range(1, 6)], f"byte {at}"


def test_damage_before_durable_data_stops_the_node() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(200):
        files = FakeFiles()
        j = journal(files)
        ends = []
        for index in range(1, 40):
            j.add(*entry(index))
            j.sync()
            ends.append((j._segments[-1], j._offset))
        after = files.after_power_cut()
        number, offset = ends[chance.randrange(len(ends) - 1)]
        name = f"{number:012d}.seg"
        after.content[name][chance.randrange(offset)] ^= 1 << chance.randrange(8)
        with pytest.raises(UserError, match="damaged"):
            journal(after)


def test_a_missing_segment_stops_the_node() -> None:
    files = FakeFiles()
    j = journal(files)
    for index in range(1, 60):
        j.add(*entry(index))
        j.sync()
    after = files.after_power_cut()
    names = sorted(after.content)
    del after.content[names[len(names) // 2]]
    with pytest.raises(UserError, match=r"damaged|follows"):
        journal(after)


class Story:
    """A fixed sequence of everything that a journal is asked; remembers what was confirmed."""

    def __init__(self) -> None:
        self.confirmed: list[tuple[bytes, int, int]] = []
        self.written: list[tuple[bytes, int, int]] = []
        self.vote = (0, "")
        self.first_kept = 1

    def run(self, files: FakeFiles) -> None:
        j = journal(files)
        for index in range(1, 30):
            j.add(*entry(index))
            self.written.append(entry(index))
            if index % 2 == 0:
                j.sync()
                self.confirmed = list(self.written)
            if index == 11:
                j.deleteEntriesFrom(8)
                j.sync()
                # a cut never removes what the leader confirmed; here it stands for a conflict
                j.add(b"new9", 9, 2)
                j.add(b"new10", 10, 2)
                j.add(b"new11", 11, 2)
                self.written[8:] = [(b"new9", 9, 2), (b"new10", 10, 2), (b"new11", 11, 2)]
                self.confirmed = self.written[:8]
            if index % 7 == 0:
                j.setCurrentTerm(index, "me")
                self.vote = (index, "me")
                self.confirmed = list(self.written)
            if index == 20:
                self.first_kept = 14
                j.unlink_before(j.compact(16, keep_entries=2, keep_bytes=10_000))


@pytest.mark.parametrize("how", ["power cut", "kill"])
def test_a_stop_at_every_write_and_sync_loses_nothing_confirmed(how: str) -> None:
    at = 0
    while True:
        at += 1
        files, story = FakeFiles(fail_at=at), Story()
        try:
            story.run(files)
        except PowerCut:
            pass
        else:
            break
        after = files.after_power_cut() if how == "power cut" else files.after_kill()
        again = journal(after)
        found = entries(again)
        have = {index: e for e in found for index in (e[1],)}
        for e in story.confirmed:
            if e[1] >= story.first_kept and not (8 < e[1] < 12):
                assert have.get(e[1]) == e, f"stop at call {at}: entry {e[1]}"
        for e in found:
            assert e in story.written or e == entry(e[1]), f"stop at call {at}: phantom {e[:2]}"
        assert again.getCurrentTerm() >= story.vote[0], f"stop at call {at}: the term went back"
        if again.getCurrentTerm() == story.vote[0]:
            assert (again.getVotedForNodeId() or "") == story.vote[1]
    assert at > 40, "the story must cross many writes and syncs"


def test_after_a_failed_sync_the_journal_is_never_used_again() -> None:
    files = FakeFiles()
    j = journal(files)
    j.add(*entry(1))
    files._fail_at, files._error = files.calls + 2, OSError
    with pytest.raises(JournalError, match="cannot be written"):
        j.sync()
    j.add(*entry(2))
    with pytest.raises(InvariantError):
        j.sync()


def test_a_gap_is_a_bug() -> None:
    j = journal(FakeFiles())
    j.add(*entry(1))
    with pytest.raises(InvariantError, match="gap"):
        j.add(*entry(3))


def test_what_a_checkpoint_has_is_read_from_the_disk() -> None:
    files = FakeFiles()
    j = journal(files)
    for index in range(1, 101):
        j.add(*entry(index, 1 + index // 40))
        if index % 3 == 0:
            j.sync()
    j.sync()
    j.unlink_before(j.compact(80, keep_entries=60, keep_bytes=1_000_000))
    assert (j.oldest_index, j.first_index) == (20, 80)
    found: list[tuple[bytes, int, int]] = []
    while len(found) < 81:
        part = j.entries_from(20 + len(found), 400)
        assert part, "reading must go on"
        assert sum(len(e[0]) for e in part[:-1]) <= 400 + len(part) * 25, "messages are bounded"
        found += part
    assert found == [entry(i, 1 + i // 40) for i in range(20, 101)]
    assert [j.term_at(i) for i in (20, 39, 40, 79, 80, 100)] == [1, 1, 2, 2, 3, 3]
    again = DurableJournal(FOLDER, files.after_power_cut(), SMALL, checkpointed=80)
    assert again.first_index == 80 and again.oldest_index <= 20
    assert again.entries_from(21, 1)[0] == entry(21)


def test_a_cut_tail_is_not_read_from_the_disk_again() -> None:
    files = FakeFiles()
    j = journal(files)
    for index in range(1, 31):
        j.add(*entry(index))
        j.sync()
    j.deleteEntriesFrom(9)
    for index in range(10, 41):
        j.add(*entry(index, 2))
        j.sync()
    j.compact(40, keep_entries=100, keep_bytes=1_000_000)
    want = [entry(i) for i in range(1, 10)] + [entry(i, 2) for i in range(10, 41)]
    for again in (j, DurableJournal(FOLDER, files.after_power_cut(), SMALL, checkpointed=40)):
        found: list[tuple[bytes, int, int]] = []
        while len(found) < 40:
            found += again.entries_from(1 + len(found), 10_000)
        assert found == want


def test_an_entry_that_rots_on_the_disk_is_never_handed_out() -> None:
    files = FakeFiles()
    j = journal(files, 4096)
    for index in range(1, 11):
        j.add(*entry(index))
    j.sync()
    j.compact(10, keep_entries=100, keep_bytes=1_000_000)
    (name,) = files.content
    files.content[name][j._tail.place(4).offset + 3] ^= 1
    with pytest.raises(JournalError, match="entry 4 is not as written"):
        j.entries_from(1, 10_000)


def test_what_a_thread_has_written_counts_only_when_it_says_so() -> None:
    j = journal(FakeFiles(), 10_000)
    j.sync()
    j.add(*entry(1))
    j.add(*entry(2))
    assert j.take() and (j.durable_index, j.durable < j.mark) == (0, True)
    j.add(*entry(3))  # comes in while the thread writes
    j.write_taken()
    assert j.durable_index == 0, "the loop has not heard of it"
    j.settle()
    assert j.durable_index == 2 and j.durable == j.mark - 1
    j.setCurrentTerm(5, "me")  # at once, and everything before it
    assert j.durable_index == 3 and j.durable == j.mark


def test_a_cut_during_a_sync_is_not_forgotten() -> None:
    """The entries that the thread writes are gone from the log; others come in their places."""
    j = journal(FakeFiles(), 10_000)
    for index in range(1, 11):
        j.add(*entry(index))
    assert j.take()
    j.deleteEntriesFrom(4)
    j.add(*entry(5, 2))
    j.write_taken()
    j.settle()
    assert j.durable_index == 4, "entry 5 of term 2 is not on the disk"
    j.sync()
    assert j.durable_index == 5
    j.compact(5, keep_entries=100, keep_bytes=1_000_000)
    assert j.entries_from(1, 10_000) == [entry(i) for i in range(1, 5)]
    assert j.term_at(4) == 1 and j.term_at(5) == 2
