"""The long work of a learner, in a process of its own: `python -m raftfs.meta.learner.work`.

    image FOLDER COPY KEEP     an image of a copy of the state
    rehearse FOLDER            a rehearsal of a restore

It runs at the lowest priority, and ends when whoever started it does (its standard input closes).
The result is one line of JSON; a `UserError` is one sentence on stderr and exit status 1.
"""

import asyncio
import contextlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import raftfs
from raftfs import log as logging_setup
from raftfs.errors import UserError
from raftfs.meta.learner.images import add_image
from raftfs.meta.learner.rehearsal import rehearse

_NICENESS = 19


async def run(*words: str, timeout_s: float) -> dict[str, Any]:
    """Have it done by a process. UserError says why it was not; cancelling kills it."""
    source = str(Path(raftfs.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "raftfs.meta.learner.work", *words,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert child.stdout is not None and child.stderr is not None
    try:
        async with asyncio.timeout(timeout_s):
            out, said = await asyncio.gather(child.stdout.read(), child.stderr.read())
            await child.wait()
    except TimeoutError:
        raise UserError(f"{words[0]} of {words[1]}: not done within {timeout_s:.0f} s") from None
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
    if child.returncode:
        last_words = said.decode(errors="replace").strip().rpartition("\n")[2]
        raise UserError(last_words or f"{words[0]} of {words[1]}: the process was killed")
    result: dict[str, Any] = json.loads(out)
    return result


def _end_with_parent() -> None:
    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(words: list[str]) -> int:
    """Do one piece of work. Returns the exit status."""
    logging_setup.setup("raftfs-metalogger-work", level="warning")
    _end_with_parent()
    os.nice(_NICENESS)
    try:
        if words[0] == "image":
            head = add_image(Path(words[1]), Path(words[2]), int(words[3]))
            result: dict[str, Any] = {"version": head.version, "digest": head.digest.hex()}
        else:
            result = rehearse(Path(words[1]))
    except UserError as e:
        print(e, file=sys.stderr)
        return e.exit_status
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
