"""System calls of a real master: nobody is answered before the disk has it."""

import asyncio
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from raftfs.client.meta import MetaClient, parse_masters
from raftfs.wire import ops
from tests.scenario.test_damage import Lone

OPERATIONS = 50
NEEDS_STRACE = shutil.which("strace") is None


@pytest.mark.skipif(NEEDS_STRACE, reason="strace is not installed: apt-get install strace")
def test_every_answer_to_a_change_leaves_after_an_fdatasync_that_returned(tmp_path: Path) -> None:
    lone, trace = Lone(tmp_path), tmp_path / "trace"

    async def story(pid: int) -> None:
        client = MetaClient(parse_masters(f"127.0.0.1:{lone.port + 3}"))
        await client.start(20.0)
        tracer = subprocess.Popen(
            ["strace", "-f", "-yy", "-s", "200", "-o", str(trace), "-p", str(pid), "-e",
             "trace=fdatasync,read,recvfrom,recvmsg,write,writev,sendto,sendmsg"],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert tracer.stderr is not None
        try:
            attached = await asyncio.to_thread(tracer.stderr.readline)
            assert "attached" in attached, attached
            for number in range(OPERATIONS):
                name = b"traced%d" % number
                await client.mutate(ops.Create(1, name, ops.NodeType.DIR, 0o755, 0, 0, 0), 20.0)
        finally:
            tracer.terminate()
            tracer.wait(20)
        await client.close()

    with lone.running(lone.data) as process:
        asyncio.run(story(process.pid))
    answers = _answers(trace.read_text(), lone.port + 3)
    assert len(answers) == OPERATIONS and all(answers), f"{answers.count(False)} too early"


def _answers(trace: str, port: int) -> list[bool]:
    """For each answer to a change: whether a sync returned between the request and it. Questions
    that change nothing come in between; an answer names its request.
    """
    asked, synced = b"", False
    found = []
    for line in trace.splitlines():
        returned = re.search(r"= (\d+)$", line)
        if "fdatasync" in line and returned:
            synced = True
        elif f"TCP:[127.0.0.1:{port}->" not in line:
            continue
        elif re.search(r"\d+ +(read|recvfrom|recvmsg)\(.*traced\d", line):
            asked, synced = _request(line), False
        elif re.search(r"\d+ +(write|writev|sendto|sendmsg)\(", line) and asked == _request(line):
            found.append(synced)
            asked = b""
    return found


def _request(line: str) -> bytes:
    """The number of the request that the first frame in this line is, or answers (`wire/frame.py`:
    a length of 4 bytes, the kind in one, the number in 8).
    """
    text = re.search(r'"((?:[^"\\]|\\.)*)"', line)
    assert text is not None, line
    return text[1].encode("ascii").decode("unicode_escape").encode("latin-1")[5:13]
