"""Tickets cannot be made or changed without the key."""

import hmac
import os
from unittest.mock import patch

import msgspec
import pytest

from raftfs.wire import ticket as tickets
from raftfs.wire.auth import AuthError, ClusterKey
from raftfs.wire.frame import encode
from raftfs.wire.ticket import Right, Ticket, seal, ticket_key, unseal

KEY = ticket_key(ClusterKey(b"k" * 32), b"c" * 16)
TICKET = Ticket(b"12345678", 300_000, 0xABCDEF, Right.READ | Right.LIST, 7, 3, 99)


def test_a_ticket_comes_back_as_it_was_made() -> None:
    assert unseal(KEY, seal(KEY, TICKET)) == TICKET
    largest = Ticket(b"12345678", 2**63 - 1, 2**64 - 1, 255, 2**63 - 1, 2**63 - 1, 2**63 - 1)
    assert unseal(KEY, seal(KEY, largest)) == largest


@pytest.mark.parametrize("field", Ticket.__struct_fields__)
def test_no_field_can_be_changed(field: str) -> None:
    value = getattr(TICKET, field)
    other = b"87654321" if field == "clock" else value + 1
    changed = msgspec.structs.replace(TICKET, **{field: other})
    mac = seal(KEY, TICKET)[:16]
    with pytest.raises(AuthError):
        unseal(KEY, mac + encode(changed))
    assert seal(KEY, changed)[:16] != mac


def test_no_bit_can_be_changed_and_nothing_be_cut_or_added() -> None:
    raw = seal(KEY, TICKET)
    for bit in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(AuthError):
            unseal(KEY, bytes(flipped))
    for wrong in (raw[:-1], raw[1:], raw + b"\0", raw[:16], b"", raw[16:], raw + bytes(1000)):
        with pytest.raises(AuthError):
            unseal(KEY, wrong)


def test_another_cluster_s_ticket_is_refused() -> None:
    for other in (
        ticket_key(ClusterKey(b"k" * 32), b"d" * 16), ticket_key(ClusterKey(b"x" * 32), b"c" * 16),
        os.urandom(32), b"",
    ):  # fmt: skip
        with pytest.raises(AuthError):
            unseal(KEY, seal(other, TICKET))


def test_a_ticket_of_a_kind_that_is_not_known_is_refused() -> None:
    for body in (encode([1, 2]), encode("text"), b"", b"\xc1"):
        with pytest.raises(AuthError):
            unseal(KEY, hmac.digest(KEY, body, "sha256")[:16] + body)


def test_macs_are_compared_in_constant_time() -> None:
    with patch.object(tickets.hmac, "compare_digest", wraps=hmac.compare_digest) as compared:
        unseal(KEY, seal(KEY, TICKET))
    (call,) = compared.call_args_list
    assert [len(side) for side in call.args] == [16, 16]
