"""Which copies count, and what a chunk needs: every case of versions against the committed one."""

import pytest

from raftfs.meta.plan.healing import good, judge, spared
from raftfs.meta.plan.placement import Candidate, choose_servers, read_order

A, B, C, D = b"a", b"b", b"c", b"d"


@pytest.mark.parametrize(
    ("committed", "reserved", "goal", "copies", "chosen", "settle", "wanted", "surplus", "stale"),
    [
        (1, 1, 2, {A: 1, B: 1}, (A, B), False, 0, 0, ()),
        (1, 1, 3, {A: 1, B: 1}, (A, B), False, 1, 0, ()),
        (1, 1, 1, {A: 1, B: 1}, (A, B), False, 0, 1, ()),
        # an older copy never counts, however many there are
        (2, 2, 2, {A: 2, B: 1, C: 1}, (A,), False, 1, 0, ((B, 1), (C, 1))),
        # an unfinished grant raised one of three: the larger group holds every acknowledged byte
        (1, 2, 3, {A: 2, B: 1, C: 1}, (B, C), False, 1, 0, ((A, 2),)),
        # it raised two of three: those are the larger group, and must be settled first
        (1, 2, 3, {A: 2, B: 2, C: 1}, (A, B), True, 1, 0, ((C, 1),)),
        # equally many: the newer
        (1, 2, 2, {A: 2, B: 1}, (A,), True, 1, 0, ((B, 1),)),
        # beyond what was ever reserved: never trusted
        (1, 2, 2, {A: 3, B: 1}, (B,), False, 1, 0, ((A, 3),)),
        (1, 1, 2, {}, (), False, 2, 0, ()),
        (5, 6, 2, {A: 4}, (), False, 2, 0, ((A, 4),)),
    ],
)
def test_judge(committed, reserved, goal, copies, chosen, settle, wanted, surplus, stale) -> None:
    verdict = judge(committed, reserved, goal, copies)
    assert verdict.chosen == chosen
    assert verdict.settle is settle
    assert (verdict.wanted, verdict.surplus) == (wanted, surplus)
    assert verdict.stale == stale


@pytest.mark.parametrize(
    ("committed", "reserved", "copies", "chosen", "settle", "readable"),
    [
        # as the image says; unknown copies may still come, but nothing need be raised for that
        (3, 100, {A: 3, B: 3}, (A, B), False, {A, B}),
        # the lost masters went on with fewer copies: these count, alone
        (3, 100, {A: 3, B: 3, C: 5}, (C,), True, {C}),
        (3, 100, {A: 4, B: 5, C: 5, D: 3}, (B, C), True, {B, C}),
        # being raised by the new masters
        (3, 102, {A: 3, B: 101, C: 5}, (B,), True, {B}),
        # raised: judged like any other, what is of the lost time is stale
        (101, 101, {A: 101, B: 99}, (A,), False, {A}),
        (101, 103, {A: 101, B: 101, C: 103}, (A, B), False, {A, B, C}),
        (3, 100, {A: 2}, (), False, set()),
        (3, 100, {A: 101}, (), False, set()),
    ],
)
def test_judge_after_a_restore(committed, reserved, copies, chosen, settle, readable) -> None:
    verdict = judge(committed, reserved, 2, copies, restored=100)
    assert (verdict.chosen, verdict.settle) == (chosen, settle)
    assert set(good(committed, reserved, copies, restored=100)) == readable


def test_what_is_spared() -> None:
    """Copies of the lost time that are newer than those which were raised."""
    assert [v for v in range(1, 105) if spared(101, 100, 98, v)] == [99, 100]
    assert not any(spared(50, 100, 0, v) for v in range(105)), "not raised yet: nothing is stale"
    assert not any(spared(7, 0, 0, v) for v in range(9)), "never restored"


def _draws(*numbers: float):
    it = iter(numbers)
    return lambda: next(it)


GIB = 2**30
SERVERS = [Candidate(A, "h1", 10 * GIB), Candidate(B, "h2", 30 * GIB), Candidate(C, "h3", 1000)]


def test_placement_weighs_by_free_space_and_skips_the_full() -> None:
    assert choose_servers(SERVERS, 3, [], _draws(0.0, 0.0)) == [A, B]
    assert choose_servers(SERVERS, 1, [], _draws(0.24)) == [A]
    assert choose_servers(SERVERS, 1, [], _draws(0.26)) == [B]
    assert choose_servers(SERVERS, 2, [A], _draws(0.5)) == [B]
    assert choose_servers([], 2, [], _draws()) == []


def test_readers_prefer_their_own_host() -> None:
    copies = [(A, "h1"), (B, "h2"), (C, "h3")]
    assert read_order(copies, "h2", _draws(0.9, 0.5, 0.1)) == [B, C, A]


def test_a_copy_that_leaves_counts_for_readers_but_not_for_the_goal() -> None:
    verdict = judge(5, 5, 2, {A: 5, B: 5}, leaving={A})
    assert (verdict.chosen, verdict.wanted, verdict.surplus) == ((A, B), 1, 0)
    verdict = judge(5, 5, 2, {A: 5, B: 5, C: 5}, leaving={A})
    assert (verdict.wanted, verdict.surplus) == (0, 1)
    assert judge(5, 5, 1, {A: 5}, leaving={A}).wanted == 1
    verdict = judge(5, 5, 2, {A: 5, B: 5, C: 5}, leaving={A, B})
    assert (verdict.wanted, verdict.surplus) == (1, 0), "none goes before there are enough"
