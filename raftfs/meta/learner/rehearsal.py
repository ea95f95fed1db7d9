"""A rehearsal: can the state be restored from a learner's own files, today?

The newest image and the changelogs behind it are restored into a scratch folder, up to the last
checkpoint of the learner. Every line is checked by the restore (`restore.py`), the digests that the
masters agreed on are compared where the files tell them, and at the end the digest must be the one
that the learner itself has there. The result stands in `rehearsal.json`.

The files may be in use: the daemon may rotate, compress and drop them meanwhile. So they are linked
into the scratch folder first.
"""

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from raftfs.errors import UserError
from raftfs.meta import restore as restoring
from raftfs.meta.image import read_head
from raftfs.meta.learner import status
from raftfs.meta.learner.files import changelogs
from raftfs.meta.learner.images import NAME, images
from raftfs.meta.restore import Until

RESULT = "rehearsal.json"
_TRIES = 20
_AGAIN_S = 0.05


class RehearsalError(UserError):
    """The learner's files do not give its state; the message says why."""


def rehearse(folder: Path) -> dict[str, Any]:
    """Restore, compare, and write down what came of it. Gives what is written; `problem` is empty
    if all is well. UserError if it cannot even begin.
    """
    began = time.time()
    result: dict[str, Any] = {"time": int(began), "problem": ""}
    for left in folder.glob(".rehearsal-*"):  # of one that was killed
        if time.time() - left.stat().st_mtime > 86_400:
            shutil.rmtree(left, ignore_errors=True)
    try:
        scratch = Path(tempfile.mkdtemp(prefix=".rehearsal-", dir=folder))
    except OSError as e:
        raise UserError(f"{folder} cannot be used for a rehearsal: {e.strerror}") from None
    try:
        result |= _restore(folder, scratch)
    except UserError as e:
        result["problem"] = str(e).replace(f"{scratch}/", "")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    result["took_s"] = round(time.time() - began, 1)
    status.replace(folder / RESULT, result)
    return result


def _restore(folder: Path, scratch: Path) -> dict[str, Any]:
    version, digest, start, logs = _gather(folder, scratch)
    target = scratch / "restored"
    done = restoring.restore(start, logs, target, until=Until(version))
    if done.version != version or done.digest.hex() != digest:
        raise RehearsalError(
            f"the files give the state with digest {done.digest.hex()} after line {done.version}, "
            f"the learner has {digest} after line {version}"
        )
    return {
        "version": done.version, "digest": digest, "lines": done.lines, "digests": done.digests,
        "older_images": len(images(folder)) - 1,
    }  # fmt: skip


def _gather(folder: Path, scratch: Path) -> tuple[int, str, Path | None, list[Path]]:
    """What the learner has after which line, and the image and the changelogs that must give it."""
    newest = scratch / NAME
    for _ in range(_TRIES):
        # In this order: the lines that the status speaks of are in files that are there by then.
        said = status.read(folder)
        version, digest = said.get("version", 0), said.get("digest", "")
        if not version:
            raise RehearsalError(f"{folder} has no {status.NAME}: no metalogger has run there yet")
        logs = _link(folder, scratch)
        if not newest.exists():
            return version, digest, None, logs
        head = read_head(newest)
        if head.version <= version:
            return version, digest, newest, logs
        time.sleep(_AGAIN_S)  # the image is newer than the status that was just read
    raise RehearsalError(
        f"{NAME} is the state after line {head.version}, later than the learner's own state, "
        f"{version}: {status.NAME} is not of this folder"
    )


def _link(folder: Path, scratch: Path) -> list[Path]:
    """Links to all files of one moment, which nothing can move or remove."""
    for _ in range(_TRIES):
        there = _inodes(folder)
        linked = {}
        for path in there.values():
            target = scratch / path.name
            target.unlink(missing_ok=True)
            try:
                os.link(path, target)
                linked[target.stat().st_ino] = target
            except FileNotFoundError:
                break
        if linked.keys() == there.keys() == _inodes(folder).keys():
            return [p for p in linked.values() if p.name != NAME]
    raise RehearsalError(f"the files of {folder} were moved again and again: try once more")


def _inodes(folder: Path) -> dict[int, Path]:
    found = {}
    for path in [*changelogs(folder).values(), folder / NAME]:
        try:
            found[path.stat().st_ino] = path
        except FileNotFoundError:
            continue
    return found
