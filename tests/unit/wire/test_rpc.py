"""Links: deadlines, statuses, broken links, and the proof of the cluster key."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from raftfs.errors import LinkError, ReplyError, Status, UserError
from raftfs.log import SERVED
from raftfs.wire import messages as m
from raftfs.wire import rpc
from raftfs.wire.auth import AuthError, ClusterKey, Handshake

KEY = ClusterKey(b"k" * 32)


def handle(link: rpc.Link, ask: Any) -> Any:
    """Answers by inode: 1 a value, 2 an errno, 3 never, 4 a bug, 5 later, 6 raw."""
    if ask.inode == 2:
        raise ReplyError(2)
    if ask.inode == 3:
        return asyncio.get_running_loop().create_future()
    if ask.inode == 4:
        raise ZeroDivisionError
    if ask.inode == 5:
        return asyncio.sleep(0.01, "later")
    if ask.inode == 6:
        return msgspec.Raw(b"\x93\x01\x02\x03")
    return ask.inode


def with_server(test: Callable[[rpc.Link, rpc.Server], Awaitable[None]], key: Any = None) -> None:
    """Run `test` on a link to a server of `handle`."""

    async def main() -> None:
        server = await rpc.serve("127.0.0.1", 0, incoming=m.ClientRequest, handler=handle, key=key)
        port = server._server.sockets[0].getsockname()[1]
        link = await rpc.connect("127.0.0.1", port, key=key, role="test", name="me")
        try:
            await test(link, server)
        finally:
            link.close()
            await server.close()

    asyncio.run(main())


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "sealed"])
def test_calls_give_values_errors_and_deadlines(key: ClusterKey | None) -> None:
    async def story(link: rpc.Link, server: rpc.Server) -> None:
        assert msgspec.msgpack.decode(await link.call(m.GetAttr(1), 1.0)) == 1
        assert msgspec.msgpack.decode(await link.call(m.GetAttr(5), 1.0)) == "later"
        assert await link.call(m.GetAttr(6), 1.0) == b"\x93\x01\x02\x03"
        with pytest.raises(ReplyError) as error:
            await link.call(m.GetAttr(2), 1.0)
        assert error.value.status == 2
        with pytest.raises(LinkError, match="in time"):
            await link.call(m.GetAttr(3), 0.1)
        # the link still works afterwards
        assert msgspec.msgpack.decode(await link.call(m.GetAttr(1), 1.0)) == 1

    with_server(story, key)


def test_a_bug_in_a_handler_is_answered_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def story(link: rpc.Link, server: rpc.Server) -> None:
        with pytest.raises(ReplyError) as error:
            await link.call(m.GetAttr(4), 1.0)
        assert error.value.status == 5  # EIO

    with_server(story)


def test_a_broken_link_fails_what_waits_and_what_comes_after() -> None:
    async def story(link: rpc.Link, server: rpc.Server) -> None:
        waiting = link.call(m.GetAttr(3), 30.0)
        await asyncio.sleep(0.05)
        for other in list(server.links):
            other.close()
        with pytest.raises(LinkError):
            await asyncio.wait_for(waiting, 1.0)
        with pytest.raises(LinkError):
            await link.call(m.GetAttr(1), 1.0)
        assert link.closed.done()

    with_server(story)


def test_many_calls_in_flight_each_get_their_own_answer() -> None:
    async def story(link: rpc.Link, server: rpc.Server) -> None:
        calls = [link.call(m.GetAttr(10 + i), 5.0) for i in range(2000)]
        values = [msgspec.msgpack.decode(v) for v in await asyncio.gather(*calls)]
        assert values == [10 + i for i in range(2000)]

    with_server(story)


@pytest.mark.parametrize("mine", [None, ClusterKey(b"x" * 32)], ids=["no key", "other key"])
def test_who_does_not_know_the_key_is_refused(mine: ClusterKey | None) -> None:
    async def main() -> None:
        served = []
        server = await rpc.serve(
            "127.0.0.1", 0, incoming=m.ClientRequest,
            handler=lambda link, ask: served.append(ask), key=KEY,
        )  # fmt: skip
        port = server._server.sockets[0].getsockname()[1]
        with pytest.raises(LinkError):
            link = await rpc.connect("127.0.0.1", port, key=mine, timeout_s=1.0)
            await link.call(m.GetAttr(1), 1.0)
        assert served == []
        await server.close()

    asyncio.run(main())


def test_nobody_listens() -> None:
    with pytest.raises(LinkError, match="cannot connect"):
        asyncio.run(rpc.connect("127.0.0.1", 1, timeout_s=0.5))


def _shaken() -> tuple[Handshake, Handshake]:
    client = Handshake(KEY, "chunkserver", "a", connecting=True)
    server = Handshake(KEY, "master", "b", connecting=False)
    answer = server.step(client.first())
    assert answer is not None
    proof = client.step(answer)
    assert proof is not None
    assert server.step(proof) is None
    return client, server


def test_sealed_frames_open_once_in_order_and_unchanged() -> None:
    client, server = _shaken()
    assert client.sealer and server.sealer
    first = client.sealer.seal(b"one")
    assert server.sealer.open(first) == b"one"
    with pytest.raises(AuthError):
        server.sealer.open(first)  # replayed
    client, server = _shaken()
    assert client.sealer and server.sealer
    sealed = client.sealer.seal(b"one")
    with pytest.raises(AuthError):
        server.sealer.open(sealed[:-1] + bytes([sealed[-1] ^ 1]))


def test_a_reflected_proof_is_refused() -> None:
    client = Handshake(KEY, "x", "a", connecting=True)
    mirror = Handshake(ClusterKey(b"?" * 32), "x", "b", connecting=False)
    answer = mirror.step(client.first())
    assert answer is not None
    with pytest.raises(AuthError):
        client.step(answer)


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(UserError, match="does not exist"):
        ClusterKey.load(path)
    ClusterKey.generate(path)
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert ClusterKey.load(path).derive(b"x") == ClusterKey.load(path).derive(b"x")
    with pytest.raises(UserError, match="never overwritten"):
        ClusterKey.generate(path)
    path.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        ClusterKey.load(path)
    path.chmod(0o600)
    path.write_text("abc")
    with pytest.raises(UserError):
        ClusterKey.load(path)


def test_status_numbers_have_names() -> None:
    assert str(ReplyError(Status.LOCKED)) == "LOCKED"
    assert str(ReplyError(2)) == "ENOENT (No such file or directory)"


def test_log_lines_of_a_request_name_it() -> None:
    seen: list[Any] = []

    async def later() -> None:
        await asyncio.sleep(0)
        seen.append(SERVED.get())

    def note(link: rpc.Link, ask: Any) -> Any:
        seen.append(SERVED.get())
        return later()

    async def main() -> None:
        server = await rpc.serve("127.0.0.1", 0, incoming=m.ClientRequest, handler=note)
        port = server._server.sockets[0].getsockname()[1]
        link = await rpc.connect("127.0.0.1", port)
        await link.call(m.GetAttr(1), 1.0)
        await link.call(m.GetAttr(2), 1.0)
        link.close()
        await server.close()

    asyncio.run(main())
    assert [number for _, number in seen] == [1, 1, 2, 2]
    assert SERVED.get() is None


def test_a_write_that_finds_nobody_there_any_more_ends_quietly() -> None:
    """uvloop's transport closes itself in such a write, and refuses every question after it."""

    class Gone:
        closing = False

        def is_closing(self) -> bool:
            return self.closing

        def write(self, data: bytes) -> None:
            self.closing = True

        def get_write_buffer_size(self) -> int:
            if self.closing:
                raise RuntimeError("the handler is closed")
            return 0

        def close(self) -> None:
            self.closing = True

    async def story(link: rpc.Link, server: rpc.Server) -> None:
        transport, link._transport = link._transport, Gone()  # type: ignore[assignment]
        assert transport is not None
        answer = link.call(m.GetAttr(1), 1.0)
        link.flush()
        assert link.queued_bytes() == 0
        link._transport = transport
        answer.cancel()

    with_server(story)
