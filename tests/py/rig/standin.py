"""The Stripe stand-in: a process that plays Stripe on loopback and keeps the list of money that really moved."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

from .http import call
from .process import Child, built, wait_until


class Standin:
    def __init__(self, workdir: Path, latency_ms: int = 0) -> None:
        self.secret_key = f"sk_test_{secrets.token_hex(24)}"
        self.account = f"acct_{secrets.token_hex(8)}"
        log = workdir / "standin.log"
        options = ["--listen", "127.0.0.1:0", "--secret-key", self.secret_key, "--account", self.account]
        command = [str(built("examples/stripe-standin")), *options, "--latency-ms", str(latency_ms)]
        self._child = Child(command, {}, log)
        try:
            self.url = f"http://{wait_until('the stand-in prints its address', self._address)}"
        except BaseException:
            self.stop()
            raise

    def _address(self) -> str | None:
        self._child.must_run("the stand-in")
        line, end, _ = self._child.log.read_text().partition("\n")
        return json.loads(line)["listening"] if end else None

    def stop(self) -> None:
        self._child.stop()

    def __enter__(self) -> Standin:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def executed(self, customer: str | None = None, since: int = 0) -> list[dict[str, Any]]:
        """Money that moved at Stripe, oldest first: the oracle of everything that is claimed here."""
        every = call("GET", f"{self.url}/_standin/executed?since={since}")["data"]
        return [row for row in every if customer in (None, row["customer"])]

    def requests(self, method: str = "POST") -> list[dict[str, Any]]:
        """Requests as they arrived, without those to the control API."""
        every = call("GET", f"{self.url}/_standin/requests")["data"]
        return [row for row in every if row["method"] == method]

    def holding(self) -> int:
        """How many answers a fault keeps back right now."""
        return call("GET", f"{self.url}/_standin/state")["held"]

    def fault(self, name: str | dict[str, Any], count: int = 1, **on: Any) -> None:
        """The next requests that move money meet this fault; `customer=…` names whose, `path={…}` any others."""
        scripted: dict[str, Any] = {"fault": name, "count": count}
        if on:
            scripted["on"] = on
        call("POST", f"{self.url}/_standin/faults", scripted)

    def release(self) -> None:
        call("POST", f"{self.url}/_standin/release")

    def advance(self, seconds: int) -> None:
        """Moves Stripe's clock: a day later it has forgotten its idempotency keys."""
        call("POST", f"{self.url}/_standin/advance", {"seconds": seconds})
