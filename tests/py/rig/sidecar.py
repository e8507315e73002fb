"""A sidecar as its own process, and its admin and audit API."""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import urllib.error
from pathlib import Path
from typing import Any, Iterator

from .http import Refused, call, query, strict_context
from .process import RigError, Child, built, clean_environment, free_port, wait_until

CLI_TIMEOUT_S = 30.0
START_TRIES = 3


class Sidecar:
    """Runs on two loopback ports and one data directory, which it keeps from start to start."""

    def __init__(
        self, workdir: Path, *, stripe_base: str, stripe_key: str, settings: dict[str, str] | None = None
    ) -> None:
        self.workdir = workdir
        self.admin_key = secrets.token_hex(32)
        self._issuer_key: str | None = None
        self.ca = workdir / "ca.pem"
        self.log = workdir / "sidecar.log"
        self._settings = {
            "KEYBRAKE_DATA_DIR": str(workdir / "data"),
            "KEYBRAKE_ADMIN_KEY": self.admin_key,
            "KEYBRAKE_STRIPE_SECRET_KEY": stripe_key,
            "KEYBRAKE_STRIPE_API_BASE": stripe_base,
            "KEYBRAKE_CA_OUT": str(self.ca),
            "KEYBRAKE_NODE": "worker-1",
            **(settings or {}),
        }
        self._child: Child | None = None
        self._ports: tuple[int, int] | None = None
        self.start()

    # The process.

    def start(self) -> None:
        """Starts it and waits until it is ready; after the first time on the ports it had."""
        for attempt in range(START_TRIES):
            port, ops_port = self._ports or (free_port(), free_port())
            listen = {"KEYBRAKE_LISTEN": f"127.0.0.1:{port}", "KEYBRAKE_OPS_LISTEN": f"127.0.0.1:{ops_port}"}
            self._child = Child([str(built("keybrake")), "serve"], {**self._settings, **listen}, self.log)
            try:
                wait_until("the sidecar is ready", lambda: self._ready(ops_port))
            except BaseException as error:
                self.stop()
                # Between our look and its bind somebody else may have taken the port.
                lost = isinstance(error, RigError) and "in use" in self.log.read_text(errors="replace").lower()
                if lost and self._ports is None and attempt + 1 < START_TRIES:
                    continue
                raise
            self._ports = (port, ops_port)
            return

    def _ready(self, ops_port: int) -> bool:
        assert self._child is not None
        self._child.must_run("the sidecar")
        try:
            call("GET", f"http://127.0.0.1:{ops_port}/readyz")
        except (Refused, urllib.error.URLError, ConnectionError, TimeoutError):
            return False
        return True

    def stop(self) -> int | None:
        return self._child.stop() if self._child else None

    def kill(self) -> None:
        """SIGKILL, as the kernel does when memory runs out."""
        assert self._child is not None
        self._child.kill()

    def restart(self) -> None:
        self.stop()
        self.start()

    def __enter__(self) -> Sidecar:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    def must_run(self) -> None:
        assert self._child is not None
        self._child.must_run("the sidecar")

    @property
    def url(self) -> str:
        """For the admin API, and for SDKs that know no base path."""
        assert self._ports is not None
        return f"https://localhost:{self._ports[0]}"

    @property
    def port(self) -> int:
        assert self._ports is not None
        return self._ports[0]

    @property
    def stripe_url(self) -> str:
        """The base address for stripe-python."""
        return f"{self.url}/stripe"

    def task_environment(self) -> dict[str, str]:
        """What a flow gives its tasks so that they find the sidecar."""
        return {
            "KEYBRAKE_URL": self.url,
            "KEYBRAKE_CA": str(self.ca),
            "KEYBRAKE_ADMIN_KEY": self.admin_key,
        }

    def issuer_key(self) -> str:
        """What tasks mint with: bounds that their scripts do not choose. Made once; the ledger keeps it."""
        if self._issuer_key is None:
            bounds = {
                "name": "billing flows",
                "label_prefix": "kestra-",
                "allowed_endpoints": ["POST /v1/charges"],
                "max_cap_usd": "1000.00",
                "daily_usd_cap": "5000.00",
                "max_expires_in_seconds": 7200,
                "expires_in_seconds": 86400,
            }
            self._issuer_key = self.api("POST", "/admin/issuers", bounds)["issuer_key"]
        return self._issuer_key

    def flow_environment(self) -> dict[str, str]:
        """What a flow gives a task that mints its own vault key."""
        return {"KEYBRAKE_URL": self.url, "KEYBRAKE_CA": str(self.ca), "KEYBRAKE_ISSUER_KEY": self.issuer_key()}

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A client command of the same program."""
        return subprocess.run(
            [str(built("keybrake")), *arguments],
            env=clean_environment(self.task_environment()),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CLI_TIMEOUT_S,
        )

    def refused(self, code: str) -> int:
        """How many requests were refused with this code since the start; the audit log counts equal ones later."""
        assert self._ports is not None
        metrics = call("GET", f"http://127.0.0.1:{self._ports[1]}/metrics")
        found = re.search(rf'^keybrake_calls_total{{[^}}]*code="{code}"[^}}]*}} (\d+)$', metrics, re.MULTILINE)
        return int(found[1]) if found else 0

    # The admin and audit API.

    def api(self, method: str, path: str, body: Any = None, bearer: str | None = None) -> Any:
        context = strict_context(self.ca)
        return call(method, f"{self.url}{path}", body, bearer=bearer or self.admin_key, context=context)

    def issue(self, label: str, bearer: str | None = None, **fields: Any) -> dict[str, Any]:
        """A vault key for charges; named fields replace or join the usual ones."""
        policy = {
            "label": label,
            "vendor": "stripe",
            "allowed_endpoints": ["POST /v1/charges"],
            "daily_usd_cap": "100.00",
            "expires_in_seconds": 3600,
            **fields,
        }
        return self.api("POST", "/admin/vault_keys", policy, bearer)

    def revoke(self, key_id: str) -> None:
        self.api("DELETE", f"/admin/vault_keys/{key_id}")

    def keys(self, **filters: Any) -> list[dict[str, Any]]:
        return list(self.pages("/admin/vault_keys", **filters))

    def spend_today(self, key_id: str) -> dict[str, Any]:
        return self.api("GET", f"/admin/vault_keys/{key_id}")["spend"]["today"]

    def audit(self, **filters: Any) -> list[dict[str, Any]]:
        """All records that match, oldest first."""
        return sorted(self.pages("/audit", **filters), key=lambda record: record["seq"])

    def holds_in_doubt(self) -> list[dict[str, Any]]:
        return list(self.pages("/admin/holds", state="doubt"))

    def verify_audit(self) -> dict[str, Any]:
        """`keybrake audit verify`, with its exit code as `exit_code`."""
        done = self.cli("audit", "verify", "--json")
        try:
            told = json.loads(done.stdout)
        except ValueError:
            told = {"stdout": done.stdout, "stderr": done.stderr}
        return {**told, "exit_code": done.returncode}

    def pages(self, path: str, **filters: Any) -> Iterator[dict[str, Any]]:
        """All rows of a list, one after the other."""
        cursor = None
        while True:
            page = self.api("GET", query(path, **filters, limit=1000, cursor=cursor))
            yield from page["data"]
            if not page["has_more"]:
                return
            cursor = page["next_cursor"]
