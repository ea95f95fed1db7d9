"""The log kept for learners: read back as it was, through restarts, cuts and damage."""

import random
from pathlib import Path

import pytest

from raftfs.errors import UserError
from raftfs.meta.raft.journal import DurableJournal
from raftfs.meta.raft.keptlog import FILE_NAME, KeptDamaged
from tests.unit.raft.disks import FakeFiles, PowerCut

FOLDER = Path("journal")
SMALL = 600
Entry = tuple[bytes, int, int]


class WatchedFiles(FakeFiles):
    """Remembers which files were read whole."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def read(self, path: Path) -> bytes:
        """And notes it."""
        self.reads.append(path.name)
        return super().read(path)

    @classmethod
    def of(cls, other: FakeFiles) -> "WatchedFiles":
        new = cls()
        new.__dict__.update({k: v for k, v in other.__dict__.items() if k != "reads"})
        return new


def journal(files: FakeFiles, checkpointed: int = 0) -> DurableJournal:
    return DurableJournal(FOLDER, files, SMALL, checkpointed)


def entry(index: int, term: int = 1) -> Entry:
    return (b"\x00entry %d/%d " % (index, term) + b"x" * (index % 37), index, term)


def compact(j: DurableJournal, index: int, segments: int = 100) -> None:
    """As a checkpoint does it; of the tail almost nothing stays."""
    j.unlink_before(j.compact(index, 2, 10_000, segments * SMALL))


def everything(j: DurableJournal) -> list[Entry]:
    """From the oldest entry on, as a learner gets it; kept segments are loaded as they come."""
    found: list[Entry] = []
    at = max(1, j.oldest_index)
    while at <= j.last_index:
        part = j.entries_from(at, 300)
        if not part:
            number = j.kept.wanted
            assert number, f"entry {at} is nowhere"
            loaded = j.load_kept(number)
            assert loaded is not None
            j.kept.adopt(loaded)
            continue
        assert [e[1] for e in part] == list(range(at, at + len(part)))
        found += part
        at += len(part)
    return found


def filled(files: FakeFiles, last: int = 120) -> DurableJournal:
    j = journal(files)
    for index in range(1, last + 1):
        j.add(*entry(index, 1 + index // 40))
        if index % 3 == 0:
            j.sync()
    j.sync()
    return j


def test_what_is_kept_comes_back_and_is_not_read_at_start() -> None:
    files = FakeFiles()
    j = filled(files)
    compact(j, 110)
    want = [entry(i, 1 + i // 40) for i in range(1, 121)]
    assert (j.oldest_index, j.first_index) == (1, 110)
    assert 100 < j.oldest_behind_kept <= 108 and len(j.kept) >= 10
    assert everything(j) == want
    watched = WatchedFiles.of(files.after_power_cut())
    again = journal(watched, checkpointed=110)
    read = [int(n[:-4]) for n in watched.reads if n.endswith(".seg")]
    assert read and min(read) == again.kept.last_segment + 1, "a start reads no kept segment"
    assert again.oldest_index == 1 and again.first_index == 110
    assert everything(again) == want
    assert [again.term_at(i) for i in (1, 39, 40, 79, 80, 115)] == [1, 1, 2, 2, 3, 3]
    assert len(again.kept._loaded) <= 3, "only a few segments stay in memory"
    again.add(*entry(121, 4))
    again.sync()
    compact(again, 121)
    assert everything(journal(files.after_power_cut(), 110))[:120] == want


def test_the_kept_log_is_bounded_and_goes_when_it_is_not_wanted() -> None:
    files = FakeFiles()
    j = filled(files, 300)
    compact(j, 290, segments=5)
    assert len(j.kept) == 5 and len(files.content) <= 5 + 4
    assert everything(j)[-1] == entry(300, 8)
    again = journal(files.after_power_cut(), 290)
    assert again.oldest_index == j.oldest_index > 200
    again.unlink_before(again.compact(290, 2, 10_000, 0))
    assert len(again.kept) == 0 and again.oldest_index >= 280
    files = again._files  # type: ignore[assignment]
    assert 280 <= journal(files.after_power_cut(), 290).oldest_index <= again.oldest_index


@pytest.mark.parametrize("lost", ["missing", "torn", "older state"])
def test_without_a_usable_index_everything_is_replayed(lost: str) -> None:
    files = FakeFiles()
    compact(filled(files), 110)
    after = files.after_power_cut()
    if lost == "missing":
        del after.content[FILE_NAME]
    elif lost == "torn":
        del after.content[FILE_NAME][-3:]
    again = journal(after, checkpointed=50 if lost == "older state" else 110)
    if lost == "older state":
        assert again.first_index == 50, "what the state lacks must be in memory"
        assert 0 < again.kept.end <= 50
    assert everything(again) == [entry(i, 1 + i // 40) for i in range(1, 121)]


def test_a_damaged_kept_segment_costs_the_history_but_not_the_master() -> None:
    files = FakeFiles()
    compact(filled(files), 110)
    after = files.after_power_cut()
    number = journal(after.after_kill(), 110).kept.first_segment + 3
    after.content[f"{number:012d}.seg"][100] ^= 4
    j = journal(after, 110)
    first, _ = j.kept.range_of(number) or (0, 0)
    assert j.entries_from(first, 100) == [] and j.kept.wanted == number
    with pytest.raises(KeptDamaged, match="lost"):
        j.load_kept(number)
    j.forget_kept(number)
    assert j.kept.first_segment == number + 1 and j.oldest_index > first
    rest = everything(j)
    assert rest == [entry(i, 1 + i // 40) for i in range(j.oldest_index, 121)]
    compact(j, 115)
    again = journal(after.after_power_cut(), 115)
    assert everything(again) == rest and f"{number:012d}.seg" not in after.content


def test_a_lost_segment_behind_the_kept_ones_stops_the_node() -> None:
    files = FakeFiles()
    j = filled(files)
    compact(j, 60)
    for number in range(j.kept.last_segment + 1, j._segments[-1]):
        after = files.after_power_cut()
        del after.content[f"{number:012d}.seg"]
        with pytest.raises(UserError, match=r"missing|damaged|follows"):
            journal(after, 60)
        after = files.after_power_cut()
        after.content[f"{number:012d}.seg"][:] = bytes(SMALL)
        with pytest.raises(UserError, match=r"missing|damaged|follows"):
            journal(after, 60)


def test_a_lost_kept_segment_costs_what_stands_before_it() -> None:
    files = FakeFiles()
    j = filled(files)
    compact(j, 110)
    after = files.after_power_cut()
    number = j.kept.first_segment + 2
    del after.content[f"{number:012d}.seg"]
    again = journal(after, 110)
    assert again.kept.first_segment == number + 1
    assert everything(again)[-1] == entry(120, 4)


class Story:
    """Random entries, conflicts, elections, checkpoints and snapshots; `want` is what must be."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.want: dict[int, Entry] = {}
        self.last = self.checkpointed = self.sure = 0
        self.term = 1

    def run(self, files: FakeFiles, steps: int) -> None:
        j = journal(files, self.checkpointed)
        for _ in range(steps):
            self.step(j)

    def step(self, j: DurableJournal) -> None:
        what = self.chance.random()
        if what < 0.70 or self.last < 3:
            self.last += 1
            self.want[self.last] = entry(self.last, self.term)
            j.add(*self.want[self.last])
        elif what < 0.80:
            j.sync()
            self.sure = self.last
        elif what < 0.88:
            self.term += 1
            self._cut(j, self.chance.randint(max(self.checkpointed, 1) + 1, self.last + 1))
            j.setCurrentTerm(self.term, "me")
            self.sure = self.last
        else:
            j.sync()
            self.sure = self.last
            self.checkpointed = self.chance.randint(max(self.checkpointed, 1), self.last)
            compact(j, self.checkpointed, self.chance.choice((3, 20, 20)))

    def _cut(self, j: DurableJournal, index: int) -> None:
        self.sure = min(self.sure, index - 1)
        if index <= self.last:
            j.deleteEntriesFrom(index - j.first_index)
        for gone in range(index, self.last + 1):
            del self.want[gone]
        self.last = index - 1

    def check(self, j: DurableJournal) -> None:
        """Everything that was sure is there, as it was."""
        found = {e[1]: e for e in everything(j)}
        assert j.last_index >= self.sure and j.oldest_index <= max(1, self.checkpointed)
        for index in range(max(1, j.oldest_index), self.sure + 1):
            assert found[index] == self.want[index], f"entry {index}"
            assert j.term_at(index) == self.want[index][2]


@pytest.mark.parametrize("case", range(60))
def test_random_stories_with_power_cuts(case: int) -> None:
    """Each is cut at a random call, comes back, and is cut once more."""
    print(f"case {case}: pytest tests/unit/raft/test_keptlog.py -k 'stories and {case}'")
    chance = random.Random(case)
    story = Story(case)
    files: FakeFiles = FakeFiles(fail_at=chance.randint(5, 400))
    kept = 0
    for _ in range(4):
        try:
            story.run(files, 400)
        except PowerCut:
            pass
        files = files.after_power_cut() if chance.random() < 0.5 else files.after_kill()
        again = journal(files, story.checkpointed)
        story.check(again)
        kept = max(kept, len(again.kept))
        # Whatever survived is the truth from now on.
        story.want.update({e[1]: e for e in everything(again)})
        for gone in [i for i in story.want if i > again.last_index]:
            del story.want[gone]
        story.last = story.sure = again.last_index
        files._fail_at, files.calls = chance.randint(5, 400), 0
    assert kept, "the stories must keep something"
