"""Three real master processes that a test kills, pauses, and cuts from one another."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from raftfs.client.meta import Address
from raftfs.wire.auth import ClusterKey

_CLIENTS = 3
_STOP_S = 10.0


class Masters:
    """Use as a context. `planted`: they answer reads without proof that they still lead."""

    def __init__(self, folder: Path, port_base: int, *, planted: bool = False) -> None:
        self.folder = folder
        self._ports = [port_base + 10 * n for n in range(3)]
        self._planted = planted
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        ClusterKey.generate(folder / "cluster.key")

    @property
    def addresses(self) -> list[Address]:
        """Where clients connect."""
        return [("127.0.0.1", port + _CLIENTS) for port in self._ports]

    def start(self, number: int) -> None:
        """Start a master, with the data that it has."""
        peers = ",".join(f"127.0.0.1:{port}" for port in self._ports)
        argv = [
            sys.executable, "-m", "tests.linear.cutmaster", "--cut", str(self._cut(number)),
            *(["--planted"] if self._planted else []), "--peers", peers, "--name",
            f"127.0.0.1:{self._ports[number]}", "--listen", "127.0.0.1", "--data",
            str(self.folder / f"m{number}"), "--key", str(self.folder / "cluster.key"),
        ]  # fmt: skip
        with open(self.folder / f"m{number}.log", "ab") as log:
            self._running[number] = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def signal(self, number: int, what: signal.Signals) -> None:
        """Send a signal."""
        self._running[number].send_signal(what)

    def kill(self, number: int) -> None:
        """kill -9."""
        process = self._running.pop(number)
        process.kill()
        process.wait(_STOP_S)

    def cut(self, number: int) -> None:
        """No message between this master and the others, while its clients still reach it."""
        self._cut(number).touch()

    def mend(self, number: int) -> None:
        """It is connected again."""
        self._cut(number).unlink()

    def _cut(self, number: int) -> Path:
        return self.folder / f"m{number}.cut"

    def log(self) -> str:
        """What all of them wrote."""
        return "".join(p.read_text(errors="replace") for p in sorted(self.folder.glob("m*.log")))

    def __enter__(self) -> "Masters":
        try:
            for number in range(3):
                self.start(number)
            until = time.monotonic() + 20
            while not all(map(_answers, self.addresses)):
                assert time.monotonic() < until, f"the masters do not start:\n{self.log()}"
                time.sleep(0.05)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        for process in self._running.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self._running.values():
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(_STOP_S)


def _answers(address: Address) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(address) == 0
