"""The session's words: what is proved, what is printed, what is refused."""

import hashlib

import pytest

from raftfs.client.meta import parse_masters
from raftfs.client.session import Session, banner, password_proof
from raftfs.errors import ReplyError, Status, UserError
from raftfs.wire import messages as m


def registered(**changes: object) -> m.Registered:
    """Root stays root, nobody else is mapped."""
    plain = {
        "session": 1, "cluster": b"", "root": 1, "readonly": False, "restricted_ip": True,
        "map_all": False, "root_uid": 0, "root_gid": 0, "all_uid": 0, "all_gid": 0,
    }  # fmt: skip
    return m.Registered(**(plain | changes))  # type: ignore[arg-type]


def test_banner_is_the_classic_line() -> None:
    assert banner(registered()) == (
        "mfsmaster accepted connection with parameters: read-write,restricted_ip ; "
        "root mapped to root:root"
    )


def test_banner_names_users_only_when_all_are_mapped() -> None:
    line = banner(registered(map_all=True, root_uid=987654, root_gid=987655, readonly=True))
    assert line == (
        "mfsmaster accepted connection with parameters: read-only,restricted_ip,map_all ; "
        "root mapped to 987654:987655 ; users mapped to root:root"
    )


def test_proof_is_md5_of_the_halves_around_the_passwords_md5() -> None:
    challenge = bytes(range(32))
    inner = hashlib.md5(b"secret").digest()
    expected = hashlib.md5(challenge[:16] + inner + challenge[16:]).digest()
    assert password_proof(challenge, "secret") == expected
    assert password_proof(challenge, "Secret") != expected


def test_final_refusals_are_sentences_and_others_are_not() -> None:
    session = Session(path=b"/sub")
    assert "password" in str(session.refusal(ReplyError(Status.BAD_PASSWORD)))
    assert "/sub" in str(session.refusal(ReplyError(2)))
    assert session.refusal(ReplyError(Status.UNKNOWN)) is None
    assert session.refusal(ReplyError(5)) is None


def test_masters_are_parsed_with_and_without_ports() -> None:
    assert parse_masters("a,b:1, [::1]:2", 9) == [("a", 9), ("b", 1), ("::1", 2)]
    for wrong in ("", "a:x", "a:0", ":5", "a:70000"):
        with pytest.raises(UserError):
            parse_masters(wrong)
