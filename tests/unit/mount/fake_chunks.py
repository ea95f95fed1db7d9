"""Chunkservers in memory: the data port's protocol with threads, chains, versions and faults."""

import socket
import threading
from typing import Any

from raftfs.chunk.tickets import TicketGate
from raftfs.const import CHUNK_SIZE
from raftfs.errors import ReplyError, Status
from raftfs.wire import messages as m
from raftfs.wire.frame import piece_crcs, recv_data, send_data


class Copy:
    """One copy: its bytes (grown as needed) and the highest token that it saw."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.lock = 0
        self.data = bytearray()
        self.synced = 0  # bytes that survive a power cut, for tests

    def write(self, offset: int, data: Any) -> None:
        """Put bytes."""
        end = offset + len(data)
        if len(self.data) < end:
            self.data.extend(bytes(end - len(self.data)))
        self.data[offset:end] = data

    def read(self, offset: int, length: int) -> bytes:
        """Get bytes; zeros beyond the end."""
        found = bytes(memoryview(self.data)[offset : offset + length])
        return found + bytes(length - len(found))


class FakeChunkServer:
    """Listens on a port of its own. Attributes may be set at any time to make it misbehave."""

    def __init__(self, uuid: bytes) -> None:
        self.uuid = uuid
        self.copies: dict[int, Copy] = {}
        self.refuse_writes = 0  # this many writes are answered DISK_ERROR
        self.mute = False  # takes requests, never answers
        self.corrupt = False  # reads give bytes that do not match their checksums
        self.drop_after = -1  # close the connection after so many more requests
        self.gate: TicketGate | None = None  # asks for tickets as a real one
        self.requests: list[Any] = []
        self.keep_requests = True
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._mutex = threading.Lock()
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def location(self) -> m.Location:
        """For the fake masters."""
        return m.Location(self.uuid, "127.0.0.1", self.port, 0)

    def close(self) -> None:
        """As a killed process."""
        self._closed = True
        self._listener.close()
        self.drop_connections()

    def drop_connections(self) -> None:
        """Break what is open."""
        for sock in list(self._open):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def _accept(self) -> None:
        while not self._closed:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._open.add(sock)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        links: dict[tuple[str, int], socket.socket] = {}
        try:
            while not self._closed:
                head, payload = recv_data(sock, m.DataRequest)
                if self.keep_requests:
                    self.requests.append(head)
                if self.drop_after == 0:
                    self.drop_after = -1
                    return
                self.drop_after -= self.drop_after > 0
                if self.mute:
                    continue
                reply, data = self._handle(head, payload, links)
                send_data(sock, reply, data)
        except (OSError, EOFError):
            return
        finally:
            self._open.discard(sock)
            sock.close()
            for link in links.values():
                link.close()

    def _handle(self, head: Any, payload: Any, links: Any) -> tuple[m.DataReply, bytes]:
        try:
            if self.gate is not None:
                self.gate.check(head, "a test")
            with self._mutex:
                status, data = self._apply(head, payload)
        except ReplyError as e:
            status, data = e.status, b""
        if status:
            return m.DataReply(head.id, status, self.uuid), b""
        if isinstance(head, m.ReadData):
            crcs = piece_crcs(head.offset, data)
            if self.corrupt:
                data = bytes([data[0] ^ 1]) + data[1:]
            return m.DataReply(head.id, 0, b"", crcs), data
        chain = getattr(head, "chain", [])
        if chain:
            return self._forward(head, payload, chain, links), b""
        return m.DataReply(head.id, 0), b""

    def _forward(self, head: Any, payload: Any, chain: list[m.Hop], links: Any) -> m.DataReply:
        import msgspec

        hop = chain[0]
        try:
            link = links.get((hop.host, hop.port))
            if link is None:
                link = socket.create_connection((hop.host, hop.port), timeout=1.0)
                link.settimeout(1.0)
                links[hop.host, hop.port] = link
            send_data(link, msgspec.structs.replace(head, chain=chain[1:]), payload)
            reply, _ = recv_data(link, m.DataReply)
            return reply
        except (OSError, EOFError):
            links.pop((hop.host, hop.port), None)
            return m.DataReply(head.id, Status.CHAIN_BROKEN, hop.server)

    def _apply(self, head: Any, payload: Any) -> tuple[int, bytes]:
        copy = self.copies.get(head.chunk)
        if isinstance(head, m.WriteData | m.ZeroData):
            if self.refuse_writes:
                self.refuse_writes -= 1
                return Status.DISK_ERROR, b""
            if copy is None and head.create:
                copy = self.copies[head.chunk] = Copy(head.version)
            if copy is None:
                return Status.NO_CHUNK, b""
            if copy.version > head.version or head.lock < copy.lock:
                return Status.WRONG_VERSION, b""
            copy.version, copy.lock = head.version, head.lock  # the fake masters raise no copies
            if isinstance(head, m.ZeroData):
                copy.write(head.offset, bytes(head.length))
            elif piece_crcs(head.offset, payload) != list(head.crcs):
                return Status.BAD_CRC, b""
            else:
                copy.write(head.offset, payload)
            assert len(copy.data) <= CHUNK_SIZE
            return 0, b""
        if copy is None:
            return Status.NO_CHUNK, b""
        if isinstance(head, m.SyncData):
            copy.synced = len(copy.data)
            return 0, b""
        if isinstance(head, m.ReadData):
            return 0, copy.read(head.offset, head.length)
        return 95, b""


