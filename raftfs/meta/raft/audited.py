"""The version of pysyncobj for which the overrides of `safety.py` are written, and its hooks."""

import hashlib
from pathlib import Path
from typing import Any

import pysyncobj
from pysyncobj import syncobj
from pysyncobj.journal import Journal

from raftfs.errors import UserError

# The sources that were read line by line; another version may have moved what is overridden.
_AUDITED = {
    "syncobj.py": "e8bdf06797085d734df86e24ab4802fe87893dff77268565ec036f7ad4a1cfe4",
    "journal.py": "9cf1eaf6acc704581a4cf7d3de330a404403913107adc91c929778b7e3f35edf",
    "transport.py": "0c9d89f9c4781ec9772df8011d7975a1a4a1a5f541357e12eae85a813e92b50b",
    "serializer.py": "4d39fde2f15000ad8f507ec229ebd4f6a86371b6f84d4dc1439a9cccd52857ee",
}


def check_pysyncobj() -> None:
    """UserError unless the installed pysyncobj is the audited one."""
    folder = Path(pysyncobj.__file__).parent
    for name, digest in _AUDITED.items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise UserError(
                f"pysyncobj's {name} is not that of 0.3.17, for which raftfs' safety overrides are "
                "written: install pysyncobj==0.3.17"
            )


class _NoPoller:
    """pysyncobj's poller seam: the event loop owns the sockets."""

    def subscribe(self, *_: Any) -> None:
        """Nothing."""

    def unsubscribe(self, *_: Any) -> None:
        """Nothing."""

    def poll(self, timeout: float) -> None:
        """Nothing."""


def _hook_pysyncobj() -> None:
    """Let it take our journal object, and keep it from making a poller or a pipe."""
    original = syncobj.createJournal
    syncobj.createJournal = lambda j: j if isinstance(j, Journal) else original(j)
    syncobj.createPoller = lambda kind: _NoPoller()
    syncobj.PIPE_NOTIFIER_ENABLED = False


_hook_pysyncobj()
