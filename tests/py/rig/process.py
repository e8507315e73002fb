"""Processes: where the built programs are, how one is started, watched and ended."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Callable, Iterator, TypeVar

REPO = Path(__file__).resolve().parents[3]
START_TIMEOUT_S = 30.0
# More than the sidecar's default DRAIN_MS.
STOP_TIMEOUT_S = 12.0
POLL_S = 0.01

T = TypeVar("T")


class RigError(Exception):
    """Something that the tests stand on did not work; the message holds the end of the log."""


def built(name: str) -> Path:
    """A program that cargo built with the dev profile."""
    target = Path(os.environ.get("CARGO_TARGET_DIR") or REPO / "target")
    path = target / "debug" / name
    if not path.is_file():
        raise RigError(f"{path} is not there: run `cargo build --bin keybrake --example stripe-standin` first")
    return path


# Below the ports that systems give to outgoing connections, so that none of those takes a port between its choice and
# its use, or while a sidecar is down.
_PORTS = range(18_000, 32_000)
_next_port = iter([])


def free_port() -> int:
    """A loopback port that nobody has now, and that this process gives out once."""
    global _next_port
    for _ in _PORTS:
        port = next(_next_port, None)
        if port is None:
            start = random.randrange(len(_PORTS))
            _next_port = iter([*_PORTS[start:], *_PORTS[:start]])
            port = next(_next_port)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise RigError("no port is free")


def wait_until(what: str, probe: Callable[[], T | None], timeout_s: float = START_TIMEOUT_S) -> T:
    """Asks again and again until the answer is something; an error names what was waited for."""
    deadline = time.monotonic() + timeout_s
    while True:
        answer = probe()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise RigError(f"waited {timeout_s:.0f} s in vain: {what}")
        time.sleep(POLL_S)


@contextlib.contextmanager
def within(seconds: int, what: str = "the test") -> Iterator[None]:
    """Ends what hangs, whatever it waits for. For the main thread."""

    def late(*_: object) -> None:
        raise TimeoutError(f"{what} took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def clean_environment(extra: dict[str, str]) -> dict[str, str]:
    """This process's environment without anything that would change what is tested."""
    ours = ("KEYBRAKE_", "STRIPE_")
    loud = {"NODE_EXTRA_CA_CERTS", "NODE_OPTIONS", "SSL_CERT_FILE", "SSL_CERT_DIR", "PYTHONPATH", "PYTHONWARNINGS"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours) and name not in loud}
    # The SDKs honour proxies of the environment; a loopback address must never go to one.
    kept = {name: value for name, value in kept.items() if not name.lower().endswith("_proxy")}
    return {**kept, **extra}


class Child:
    """One process, with everything it says in one file."""

    def __init__(
        self, command: list[str], environment: dict[str, str], log: Path, stdin: int = subprocess.DEVNULL
    ) -> None:
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                env=clean_environment(environment),
                stdin=stdin,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def tail(self, lines: int = 15) -> str:
        text = self.log.read_text(errors="replace").splitlines()
        return "\n".join(text[-lines:])

    def must_run(self, what: str) -> None:
        code = self.exit_code()
        if code is not None:
            raise RigError(f"{what} ended with exit code {code}:\n{self.tail()}")

    def stop(self) -> int:
        """SIGTERM, then SIGKILL when that takes too long. Answers the exit code."""
        if self.exit_code() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.kill()
        return self._process.returncode

    def kill(self) -> None:
        """SIGKILL: nothing in the process runs any more."""
        self._process.kill()
        self._process.wait(STOP_TIMEOUT_S)
