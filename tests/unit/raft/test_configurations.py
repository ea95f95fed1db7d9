"""Majorities under changes of the membership: whatever the change, two never miss each other."""

from itertools import combinations

from raftfs.meta.raft.configurations import Configurations, Members

A, B, C, D, E = "abcde"


def members(names: str, identity: bytes = b"1") -> Members:
    return dict.fromkeys(names, identity)


def subsets(names: set[str]) -> list[set[str]]:
    return [set(s) for n in range(len(names) + 1) for s in combinations(sorted(names), n)]


def test_a_majority_is_more_than_half() -> None:
    three = Configurations(members("abc"))
    assert three.agree({A, B}) and not three.agree({A}) and not three.agree({A, D, E})
    four = Configurations(members("abcd"))
    assert four.agree({A, B, C}) and not four.agree({A, B})
    assert Configurations(members("a")).agree({A})


def test_reached_is_what_a_majority_has() -> None:
    three = Configurations(members("abc"))
    assert three.reached({A: 9, B: 7, C: 1}) == 7
    assert three.reached({A: 9}) == 0
    three.propose(5, members("abcde"))
    assert three.reached({A: 9, B: 7, C: 1}) == 1
    assert three.reached({A: 9, B: 7, C: 6, "d#31": 8, E: 0}) == 7, "of five, three have 7"


def test_both_sides_of_a_change_must_agree_until_it_is_applied() -> None:
    c = Configurations(members("abc"))
    c.propose(5, members("abcde"))
    assert c.changing and not c.agree({A, B}) and not c.agree({D, E, A}) and c.agree({A, B, D})
    c.apply(4, members("abc"))
    assert c.changing, "the change is not applied yet"
    c.apply(5, members("abcde"))
    assert not c.changing and c.agree({C, D, E})


def test_who_is_to_become_a_voter_is_known_by_both_of_its_names() -> None:
    c = Configurations(members("abc"))
    c.propose(5, members("abcd"))
    assert c.agree({A, B, D}) and c.agree({A, B, "d#31"}) and not c.agree({A, B, "d#32"})
    assert c.electorate() == {A, B, C, D, "a#31", "b#31", "c#31", "d#31"}
    c.apply(5, members("abcd"))
    assert c.agree({A, B, "d#31"}), "it was made a voter and does not know yet"
    assert not c.agree({A, B, "d#32"})


def test_a_change_that_is_cut_from_the_log_counts_no_more() -> None:
    c = Configurations(members("abc"))
    c.propose(5, members("abcd"))
    c.propose(7, members("abcde"))
    assert not c.agree({A, B}), "two of four"
    c.cut(6)
    assert c.latest == members("abcd")
    c.cut(5)
    assert not c.changing and c.agree({A, B})


def test_a_replaced_master_and_its_replacement_are_two() -> None:
    """One out and one in at once: the old and the new majority could miss each other."""
    new = b"2"
    c = Configurations(members("abc"))
    c.propose(5, {**members("ab"), C: new})
    replacement = f"{C}#{new.hex()}"
    assert not c.agree({A, replacement}) and not c.agree({B, C})
    assert c.agree({A, B}) and c.agree({A, C, replacement})
    c.apply(5, {**members("ab"), C: new})
    assert c.agree({A, C})


def test_the_founding_gives_the_names_their_identities() -> None:
    c = Configurations(dict.fromkeys("abc", b""))
    assert c.agree({A, B})
    c.propose(5, {**members("ab"), C: b"2"})
    assert c.agree({A, B}) and c.agree({A, C})


def test_whoever_knows_a_change_overlaps_with_whoever_applied_it() -> None:
    """For every pair of configurations and all majorities: who has applied `after` and who has it
    in the log (and needs both) never decide without a common node.
    """
    everybody = set("abcde")
    for before in ("abc", "abcd", "abcde"):
        for after in ("abd", "abcd", "ade", "de", "abcde"):
            coming = Configurations(members(before))
            coming.propose(5, members(after))
            there = Configurations(members(after))
            was = Configurations(members(before))
            for one in subsets(everybody):
                if not coming.agree({n if n in before else f"{n}#31" for n in one}):
                    continue
                for other in subsets(everybody):
                    if there.agree(other) or was.agree(other):
                        assert one & other, f"{before} to {after}: {one} and {other}"
