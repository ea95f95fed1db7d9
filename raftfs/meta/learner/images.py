"""The images of a learner: the newest and a few older ones, so that one that is lost costs nothing.

    metadata_ml.mfs.back       the newest
    metadata_ml.mfs.back.N     older ones
    sessions_ml.mfs            the sessions in the newest, as text; the image has them as well

Between the oldest image and now no changelog is dropped: each of them can be restored from.
"""

import os
import re
import time
from pathlib import Path
from typing import NamedTuple

from raftfs.errors import UserError
from raftfs.meta.image import ImageError, ImageHead, read_head, read_sections, write_image

NAME = "metadata_ml.mfs.back"
SESSIONS = "sessions_ml.mfs"
_OLDER = re.compile(re.escape(NAME) + r"\.(\d+)")


class Image(NamedTuple):
    """An image and what it says of itself."""

    path: Path
    head: ImageHead


def images(folder: Path) -> list[Image]:
    """The readable images of a folder, the newest first."""
    found = []
    for path in folder.glob(f"{NAME}*"):
        if path.name == NAME or _OLDER.fullmatch(path.name):
            try:
                found.append(Image(path, read_head(path)))
            except ImageError:
                continue  # the rehearsal is loud about it
    return sorted(found, key=lambda image: image.head.version, reverse=True)


def add_image(folder: Path, copy: Path, keep: int) -> ImageHead:
    """Make an image of a copy of the state; it becomes the newest of `keep`. UserError.

    At every moment there is a newest one under its name.
    """
    fresh = folder / f"{NAME}.fresh"
    head = write_image(copy, fresh)
    fresh.chmod(0o600)  # the secrets of sessions are in it
    try:
        _write_sessions(folder, fresh)
        for number in range(keep - 1, 1, -1):
            younger = folder / f"{NAME}.{number - 1}"
            if younger.exists():
                younger.rename(folder / f"{NAME}.{number}")
        newest = folder / NAME
        if newest.exists() and keep > 1:
            os.link(newest, folder / f"{NAME}.1")
        fresh.replace(newest)
        for path in folder.glob(f"{NAME}.*"):
            if (match := _OLDER.fullmatch(path.name)) and int(match[1]) >= keep:
                path.unlink()
    except OSError as e:
        raise UserError(f"images in {folder} cannot be moved: {e.strerror}") from None
    return head


def _write_sessions(folder: Path, image: Path) -> None:
    new = folder / f"{SESSIONS}.new"
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        for section, values in read_sections(image):
            if section.name == "SESS":
                row = dict(zip(section.fields, values, strict=False))
                since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(row["since"] // 10**9))
                info = str(row["info"]).encode("ascii", "backslashreplace").decode()
                file.write(f"{row['session']} {since} {info}\n")
    new.replace(folder / SESSIONS)
