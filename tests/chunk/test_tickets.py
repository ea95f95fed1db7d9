"""The data port without a valid ticket: refused, counted, nothing read or written."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
from msgspec.structs import replace

from raftfs.chunk import tickets as gates
from raftfs.chunk.tickets import CLOCKS_MAX, VERIFIED_MAX, TicketGate
from raftfs.errors import ReplyError, Status
from raftfs.meta.tickets import REPLICATION_S, Tickets
from raftfs.wire import frame
from raftfs.wire import messages as m
from raftfs.wire.auth import ClusterKey
from raftfs.wire.ticket import Right, Ticket, seal, ticket_key, unseal
from tests.chunk.parts import CLUSTER, KEY, MASTER, Server, grant, noise, read, servers, write

OLD, NEW = noise(1, 100_000), noise(2, 100_000)
SIGNING = ticket_key(KEY, CLUSTER)
# Of chunk 1, which every server of these tests has, at version 1 and token 1.
GRANT = grant(1)
READER = MASTER.for_reader(m.ChunkMap(1, 1, 0, []), 1).ticket


def write_data(ticket: bytes, *, chunk: int = 1, create: bool = False, lock: int = 1,
               version: int = 1, chain: list[m.Hop] | None = None) -> m.WriteData:  # fmt: skip
    return m.WriteData(5, chunk, version, lock, create, 0, frame.piece_crcs(0, NEW), chain or [],
                       ticket)  # fmt: skip


def ask(server: Server, head: Any, payload: bytes = b"") -> tuple[m.DataReply, bytes]:
    with socket.create_connection(("127.0.0.1", server.data.port), 5) as sock:
        frame.send_data(sock, head, payload)
        reply, data = frame.recv_data(sock, m.DataReply)
        return reply, bytes(data)


def changed(raw: bytes, **fields: Any) -> bytes:
    """Made by somebody who knows the key: a valid ticket for something else."""
    return seal(SIGNING, replace(unseal(SIGNING, raw), **fields))


@contextmanager
def one(folder: Path) -> Iterator[Server]:
    with servers(folder, 1) as (server,):
        write(server.store, 1, 0, OLD)
        write(server.store, 2, 0, OLD)
        yield server


def refused(server: Server, head: Any, reason: str, payload: bytes = b"") -> None:
    """Nothing is said, nothing is done, and it is counted."""
    before = server.tickets.refused.copy()
    reply, data = ask(server, head, payload)
    status = Status.TICKET_EXPIRED if reason == "expired" else Status.NO_TICKET
    assert (reply.id, reply.status, reply.failed) == (head.id, status, server.store.server)
    assert (data, reply.crcs) == (b"", ())
    assert server.tickets.refused - before == {reason: 1}
    assert read(server.store, 1, 0, len(OLD)) == OLD and len(server.store) == 2


BAD = {
    "none": b"",
    "forged": READER[:-1] + bytes([READER[-1] ^ 1]),
    "expired": changed(READER, expires_ms=1),
    "chunk": MASTER.for_reader(m.ChunkMap(2, 1, 0, []), 1).ticket,
    "right": changed(READER, rights=0),
}


@pytest.mark.parametrize("reason", BAD)
def test_nothing_is_read_without_a_valid_ticket(tmp_path: Path, reason: str) -> None:
    with one(tmp_path) as server:
        for head in (
            m.ReadData(3, 1, 1, 0, len(OLD), BAD[reason]), m.ListBlocks(4, 1, 1, BAD[reason]),
            m.SyncData(6, 1, 1, [], BAD[reason]),
        ):  # fmt: skip
            refused(server, head, reason)
            reply, _ = ask(server, replace(head, ticket=READER))
            assert reply.status == 0, "the ticket was what it lacked"


@pytest.mark.parametrize("reason", BAD)
def test_nothing_is_written_without_a_valid_ticket(tmp_path: Path, reason: str) -> None:
    bad = BAD[reason]
    if reason in ("expired", "chunk"):
        bad = changed(GRANT.ticket, **{"expires_ms": 1} if reason == "expired" else {"chunk": 2})
    with one(tmp_path) as server:
        refused(server, write_data(bad), reason, NEW)
        refused(server, m.ZeroData(5, 1, 1, 1, False, 0, 100_000, [], bad), reason)
        assert ask(server, write_data(GRANT.ticket), NEW)[0].status == 0
        assert read(server.store, 1, 0, len(NEW)) == NEW


def test_a_ticket_is_good_for_its_right_and_grant_only(tmp_path: Path) -> None:
    with one(tmp_path) as server:
        refused(server, write_data(READER), "right", NEW)  # a reader's
        listing = MASTER.for_list(1, 1)
        refused(server, m.ReadData(3, 1, 1, 0, 10, listing), "right")
        assert ask(server, m.ListBlocks(3, 1, 1, listing))[0].status == 0
        later = grant(1, lock=9, fresh=False).ticket
        refused(server, write_data(later), "grant", NEW)
        refused(server, write_data(GRANT.ticket, lock=2), "grant", NEW)
        refused(server, write_data(GRANT.ticket, version=2), "grant", NEW)
        # Only a fresh grant makes copies: else anybody could make an empty one pass for the data.
        again = grant(3, fresh=False).ticket
        refused(server, write_data(again, chunk=3, create=True), "right", NEW)
        assert ask(server, write_data(grant(3).ticket, chunk=3, create=True), NEW)[0].status == 0


def test_tickets_of_other_clusters_are_forged(tmp_path: Path) -> None:
    with one(tmp_path) as server:
        for key, cluster in ((ClusterKey(b"x" * 32), CLUSTER), (KEY, b"d" * 16)):
            there = Tickets(key, lambda cluster=cluster: cluster)  # type: ignore[misc]
            server.tickets.heard(there.clock())
            other = there.for_writer(m.ChunkMap(1, 1, 0, [], 1, True), 1).ticket
            refused(server, m.ReadData(3, 1, 1, 0, 10, other), "forged")
            refused(server, write_data(other), "forged", NEW)


def test_a_server_without_a_cluster_gives_nothing(tmp_path: Path) -> None:
    gate = TicketGate(KEY, lambda: b"")
    with pytest.raises(ReplyError):
        gate.check(m.ReadData(1, 1, 1, 0, 1, seal(ticket_key(KEY, b""), Ticket(b"", 1, 1, 15, 1))),
                   "peer")  # fmt: skip
    assert gate.refused == {"none": 1}


def test_a_connection_goes_on_after_a_refusal_and_asks_for_each_request(tmp_path: Path) -> None:
    """What one request of a connection may do says nothing of the next one."""
    with one(tmp_path) as server, socket.create_connection(
        ("127.0.0.1", server.data.port), 5
    ) as sock:
        statuses = []
        for ticket in (READER, b"", BAD["chunk"], READER):
            frame.send_data(sock, m.ReadData(1, 1, 1, 0, 10, ticket))
            statuses.append(frame.recv_data(sock, m.DataReply)[0].status)
        assert statuses == [0, Status.NO_TICKET, Status.NO_TICKET, 0]


# --- chains -------------------------------------------------------------------------------------


def test_the_client_s_ticket_goes_down_the_chain(tmp_path: Path) -> None:
    with servers(tmp_path, 3) as made:
        chain = [s.hop for s in made[1:]]
        head = write_data(GRANT.ticket, create=True, chain=chain)
        assert ask(made[0], head, NEW)[0].status == 0
        assert ask(made[0], m.SyncData(6, 1, 1, chain, READER))[0].status == 0
        for server in made:
            assert read(server.store, 1, 0, len(NEW)) == NEW and not server.tickets.refused


def test_without_a_ticket_nothing_goes_down_the_chain(tmp_path: Path) -> None:
    with servers(tmp_path, 2) as made:
        for server in made:
            write(server.store, 1, 0, OLD)
        for ticket in (b"", READER):
            reply, _ = ask(made[0], write_data(ticket, chain=[made[1].hop]), NEW)
            assert (reply.status, reply.failed) == (Status.NO_TICKET, made[0].store.server)
        assert read(made[1].store, 1, 0, len(OLD)) == OLD
        assert not made[1].tickets.refused and not made[1].data._connections


def test_each_server_of_a_chain_checks_for_itself(tmp_path: Path) -> None:
    with servers(tmp_path, 2) as made:
        made[1].tickets.heard(m.MasterClock(MASTER.clock().clock, 2**60))  # knows that it is over
        head = write_data(GRANT.ticket, create=True, chain=[made[1].hop])
        reply, _ = ask(made[0], head, NEW)
        assert (reply.status, reply.failed) == (Status.TICKET_EXPIRED, made[1].store.server)
        assert made[1].tickets.refused == {"expired": 1} and len(made[1].store) == 0


# --- time, bounds -------------------------------------------------------------------------------


def reading(ticket: bytes) -> m.ReadData:
    return m.ReadData(1, 1, 1, 0, 1, ticket)


def fails(gate: TicketGate, ticket: bytes) -> bool:
    try:
        gate.check(reading(ticket), "peer")
    except ReplyError as e:
        assert e.status == Status.TICKET_EXPIRED
        return True
    return False


def test_time_is_the_signing_master_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks of the machines may differ by years, and masters' from each other's."""
    now = {"gate": 10.0, "a": 5e6, "b": 7.0}
    monkeypatch.setattr(gates, "_now_ms", lambda: round(1000 * now["gate"]))
    who = "a"
    monkeypatch.setattr("raftfs.meta.tickets._now_ms", lambda: round(1000 * now[who]))
    a, b = Tickets(KEY, lambda: CLUSTER, 60.0), Tickets(KEY, lambda: CLUSTER, 60.0)
    gate = TicketGate(KEY, lambda: CLUSTER)
    of_a = a.for_reader(m.ChunkMap(1, 1, 0, []), 1)
    assert of_a.ticket_s == 60.0
    assert fails(gate, of_a.ticket), "of a clock that was never heard of"
    gate.heard(a.clock())
    who = "b"
    of_b = b.for_reader(m.ChunkMap(1, 1, 0, []), 1).ticket
    gate.heard(b.clock())
    assert not fails(gate, of_a.ticket) and not fails(gate, of_b)
    now["gate"] += 59.0  # and nothing was heard of either since
    assert not fails(gate, of_a.ticket) and not fails(gate, of_b)
    now["b"] += 30.0  # our clock was fast
    gate.heard(b.clock())
    now["gate"] += 1.0
    assert fails(gate, of_a.ticket) and not fails(gate, of_b)
    now["gate"] += 29.0
    assert fails(gate, of_b)


def test_a_ticket_for_replication_lasts_as_long_as_the_order() -> None:
    short = Tickets(KEY, lambda: CLUSTER, 1.0)
    order = short.for_replication(m.Replicate(3, 1, 1, "h", 1))
    ticket = unseal(SIGNING, order.ticket)
    assert ticket.expires_ms - short.clock().now_ms > 1000 * (REPLICATION_S - 5)
    assert (ticket.chunk, ticket.rights) == (1, Right.LIST | Right.READ)


def test_memory_is_bounded() -> None:
    gate = TicketGate(KEY, lambda: CLUSTER)
    gate.heard(MASTER.clock())
    for session in range(VERIFIED_MAX + 100):
        gate.check(reading(MASTER.for_reader(m.ChunkMap(1, 1, 0, []), session).ticket), "peer")
    assert 0 < len(gate._verified) <= VERIFIED_MAX
    for number in range(2 * CLOCKS_MAX):
        gate.heard(MASTER.clock())
        gate.heard(m.MasterClock(number.to_bytes(8, "big"), 1))
    assert len(gate._ahead_ms) == CLOCKS_MAX and not fails(gate, READER)
    for number in range(1000):
        with pytest.raises(ReplyError):
            gate.check(reading(number.to_bytes(60, "big")), "peer")
    assert number.to_bytes(60, "big") not in gate._verified, "forged ones take no room"


def test_a_ticket_is_verified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = TicketGate(KEY, lambda: CLUSTER)
    gate.heard(MASTER.clock())
    verified = []
    monkeypatch.setattr(gates, "unseal", lambda *a: verified.append(1) or unseal(*a))
    for _ in range(100):
        gate.check(reading(READER), "peer")
    assert len(verified) == 1


def test_the_log_has_one_line_a_second_and_the_counters_have_all() -> None:
    gate = TicketGate(KEY, lambda: CLUSTER)
    gate.heard(MASTER.clock())

    def knock() -> None:
        for _ in range(200):
            with pytest.raises(ReplyError):
                gate.check(reading(b"forged"), "10.0.0.9")

    threads = [threading.Thread(target=knock) for _ in range(4)]
    with structlog.testing.capture_logs() as said:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        gate._logged_at -= 1.0
        knock()
    assert gate.refused == {"forged": 1_000}
    assert 2 <= len(said) <= 20  # on a machine of any speed, far from a thousand
    assert said[0]["peer"] == "10.0.0.9" and said[0]["reason"] == "forged"
    assert said[0]["log_level"] == "warning" and said[0]["request"] == "ReadData"
