"""What a learner says of itself: `learner.json` in its folder, written by the daemon.

`version` and `digest` are those of its last checkpoint: the lines up to there are on the disk, and
whoever replays them must get this digest.
"""

import json
import os
from pathlib import Path
from typing import Any

from raftfs.errors import UserError

NAME = "learner.json"


def read(folder: Path) -> dict[str, Any]:
    """What was said last; empty if nothing was. UserError if it is unreadable."""
    return read_json(folder / NAME)


def read_json(path: Path) -> dict[str, Any]:
    """The content of a small file; empty if there is none. UserError if it is unreadable."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read: {e}; remove it") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not what a metalogger writes: remove it")
    return content


def replace(path: Path, content: dict[str, Any]) -> None:
    """Write it in one step: readers see the old or the new one. UserError."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        new.write_text(json.dumps(content, indent=1) + "\n")
        new.replace(path)
    except OSError as e:
        raise UserError(f"{path} cannot be written: {e.strerror}") from None
