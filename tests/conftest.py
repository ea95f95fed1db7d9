"""What all tests share: a look at the logs, and clusters of their own for the scenarios."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scenario.cluster import ScenarioCluster

# Programs that the tests start come from this tree, whatever is installed.
os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)

NEEDS_FUSE = not Path("/dev/fuse").exists() or shutil.which("fusermount3") is None


def free_port_base() -> int:
    """A base from which the ports of a whole cluster are free."""
    # Below the kernel's range for outgoing connections (from 32768 on), which could take a port
    # between this look and the start of its daemon.
    bases = list(range(10_000, 31_500, 620))
    first = os.getpid() % len(bases)
    for base in bases[first:] + bases[:first]:
        wanted = [base + 10 * i + k for i in range(3) for k in (0, 2, 3, 7)]
        wanted += [base + 500 + j for j in range(1, 10)]
        if all(_is_free(port) for port in wanted):
            return base
    raise RuntimeError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as sock:
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@pytest.fixture
def cluster(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ScenarioCluster]:
    """A running cluster, mounted at `cluster.mnt`; everything is stopped afterwards. A parameter
    (`indirect`) gives more options for `raftfs cluster up`.

    A warning in any log that the test did not announce (`cluster.expect`) fails the test.
    """
    if NEEDS_FUSE:
        pytest.skip("this machine has no /dev/fuse or no fusermount3: the mount cannot be tested")
    made = ScenarioCluster(tmp_path, free_port_base())
    try:
        made.raftfs("cluster", "up", "--port-base", str(made.port_base), "--mount", str(made.mnt),
                    *getattr(request, "param", ()))  # fmt: skip
        yield made
        unexpected = made.unexpected_log_lines()
        assert not unexpected, "unexpected in the logs:\n" + "\n".join(unexpected[:20])
    finally:
        subprocess.run(
            [sys.executable, "-m", "raftfs.cli.raftfs", "cluster", "down", "--dir", str(made.dir)],
            timeout=120, check=False, capture_output=True,
        )  # fmt: skip
