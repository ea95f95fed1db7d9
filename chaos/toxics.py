"""The real toxiproxy between machines of a `chaos.network`: slow, thin, cut up, broken connections.

The server runs in the hub. Every connection between two members that can be poisoned is led through
a proxy of its own (`Network.detour`), so each flow (from whom, to whom) can be poisoned alone,
whoever of the two dialled. The server is built with Go, once, into the user's cache.
"""

import os
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from toxiproxy import Toxiproxy

from chaos.netcluster import CLIENTS, MASTERS, MOUNTS, RAFT
from chaos.network import Network

VERSION = "v2.12.0"
_SERVER = f"github.com/Shopify/toxiproxy/v2/cmd/server@{VERSION}"
_API, _FIRST_PORT = 8474, 20_000
BUILD_S = 600.0  # at most; on a slow machine it takes minutes, once
_START_S = 10.0

# What each does to a flow. Times in milliseconds (slicer: microseconds), rate in KB/s.
TOXICS: dict[str, dict[str, int]] = {
    "latency": {"latency": 80, "jitter": 0},
    "jitter": {"latency": 60, "jitter": 60},
    "bandwidth": {"rate": 30},
    "slicer": {"average_size": 40, "size_variation": 30, "delay": 300},
    "timeout": {"timeout": 0},  # swallows everything; connections stay open
    "reset_peer": {"timeout": 0},
}
_TYPE = {"jitter": "latency"}


def _binary() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "raftfs" / f"toxiproxy-{VERSION}" / "server"


def missing() -> str:
    """Why there can be no toxiproxy here, or ""; builds it if necessary."""
    binary = _binary()
    if binary.exists():
        return ""
    go = shutil.which("go")
    if go is None:
        return "toxiproxy is built with Go 1.23 or newer, and there is no go command"
    print(f"building {_SERVER} into {binary.parent} (once)")
    done = subprocess.run(
        [go, "install", _SERVER], env={**os.environ, "GOBIN": str(binary.parent)}, check=False,
        timeout=BUILD_S, capture_output=True, text=True,
    )  # fmt: skip
    why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return "" if done.returncode == 0 else f"toxiproxy cannot be built: {why}"


class Toxics:
    """Use as a context, before anything connects."""

    def __init__(self, network: Network, log: Path) -> None:
        self._network = network
        self._log = log
        self._server: subprocess.Popen[bytes] | None = None
        self._api = Toxiproxy()
        self._api.update_api_consumer("127.0.0.1", _API)
        self._proxies: dict[tuple[str, str], Any] = {}  # (who dials, who listens) -> proxy
        self._before: dict[tuple[str, str], int] = {}  # poisoned -> bytes sent until then

    def __enter__(self) -> "Toxics":
        with open(self._log, "ab") as log:
            self._server = subprocess.Popen(
                [_binary(), "-host", "127.0.0.1", "-port", str(_API)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        until = time.monotonic() + _START_S
        while not self._answers():
            if time.monotonic() > until or self._server.poll() is not None:
                self.__exit__(None, None, None)
                raise RuntimeError(f"toxiproxy does not start; see {self._log}")
            time.sleep(0.05)
        for dialer in (*MASTERS, *MOUNTS):
            for listener in MASTERS:
                if dialer != listener:
                    self._lead(dialer, listener, RAFT if dialer in MASTERS else CLIENTS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self._server is not None:
            self._server.kill()
            self._server.wait(_START_S)

    def _answers(self) -> bool:
        try:
            return bool(self._get("/version"))
        except OSError:
            return False

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{_API}{path}", timeout=5.0) as answer:
            return str(answer.read().decode())

    def _lead(self, dialer: str, listener: str, port: int) -> None:
        by_port = _FIRST_PORT + len(self._proxies)
        self._proxies[dialer, listener] = self._api.create(
            upstream=f"{self._network.address(listener)}:{port}", name=f"{dialer}-{listener}",
            listen=f"{self._network.address('hub')}:{by_port}",
        )  # fmt: skip
        self._network.detour(dialer, listener, port, by_port)

    # --- faults

    def poison(self, sender: str, receiver: str, toxic: str) -> None:
        """Do that (a key of TOXICS) to what the one sends to the other; "down" to both ways."""
        for pair, stream in (((sender, receiver), "upstream"), ((receiver, sender), "downstream")):
            proxy = self._proxies.get(pair)
            if proxy is None:
                continue
            self._before.setdefault(pair, self._sent(pair))
            if toxic == "down":
                proxy.disable()
                continue
            name = f"{toxic}_{stream}"
            if proxy.get_toxic(name) is None:
                proxy.add_toxic(name=name, type=_TYPE.get(toxic, toxic), stream=stream,
                                attributes=TOXICS[toxic])  # fmt: skip
            if proxy.get_toxic(name) is None:
                raise RuntimeError(f"toxiproxy does not take {toxic} on {pair}")

    def heal(self) -> None:
        """Everything flows again."""
        self._api.reset()
        self._before.clear()

    def met(self) -> int:
        """Bytes that have been sent to links since they were poisoned."""
        return sum(self._sent(pair) - before for pair, before in self._before.items())

    def _sent(self, pair: tuple[str, str]) -> int:
        own = [(dialer, listener) for dialer, listener in self._proxies if dialer == pair[0]]
        return self._network.detoured(pair[0])[own.index(pair)]
