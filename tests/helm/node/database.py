"""A PostgreSQL of this machine, for pods: on their bridge's address here, with TLS of an authority of its own."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Iterator

from rig.process import Child, RigError, free_port, wait_until

from chart import HELM
from cluster import GATEWAY, PODS, START_TIMEOUT_S, run

# PostgreSQL does not run as root.
NOBODY = 65534
# Where Debian has them.
PLACES = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)


class Database:
    def __init__(self, directory: Path) -> None:
        if not PLACES:
            raise RigError("this machine lacks Debian's postgresql")
        self._programs, self._directory, self._data = PLACES[0], directory, directory / "data"
        self._port = free_port()
        self.password = secrets.token_hex(16)
        self.url = f"postgres://keybrake@{GATEWAY}:{self._port}/keybrake"
        self._server: Child | None = None

    def make(self) -> None:
        """The server, and in it what the README of the chart says."""
        os.chown(self._directory, NOBODY, NOBODY)
        self._certify()
        self._run(["initdb", "--pgdata", str(self._data), "--username=admin", "--auth=trust", "--no-sync"])
        rules = f"local all admin trust\nhostssl keybrake keybrake {PODS} scram-sha-256\n"
        (self._data / "pg_hba.conf").write_text(rules)
        self.start()
        (text,) = re.findall(r"^```sql\n(.+?)^```$", (HELM / "README.md").read_text(), re.MULTILINE | re.DOTALL)
        self.sql(text.replace("…", self.password))

    def start(self) -> None:
        settings = {
            "listen_addresses": GATEWAY,
            "port": str(self._port),
            "unix_socket_directories": str(self._directory),
            "ssl": "on",
            "ssl_cert_file": str(self._directory / "server.pem"),
            "ssl_key_file": str(self._directory / "server.key"),
        }
        given = [part for pair in settings.items() for part in ("-c", "=".join(pair))]
        log = self._directory / "log"
        self._server = Child(self._as_nobody(["postgres", "-D", str(self._data), *given]), {}, log)

        def answers() -> bool:
            assert self._server
            self._server.must_run("PostgreSQL")
            with contextlib.suppress(RigError):
                return self.sql("SELECT 1").strip() == "1"
            return False

        wait_until("PostgreSQL answers", answers, START_TIMEOUT_S)

    def crash(self) -> None:
        """Ends it without a word to anybody; a SIGKILL would leave processes that keep the next one from starting."""
        server = self._server
        if server and server.exit_code() is None:
            os.kill(server.pid, signal.SIGQUIT)
            wait_until("PostgreSQL ends", lambda: server.exit_code() is not None)

    def sql(self, text: str) -> str:
        where = ["--host", str(self._directory), "--port", str(self._port), "--username=admin", "--dbname=postgres"]
        ask = ["psql", "--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--set=ON_ERROR_STOP=1", *where]
        return self._run(ask, text)

    @property
    def authority(self) -> str:
        return (self._directory / "ca.pem").read_text()

    def _certify(self) -> None:
        names = self._directory / "names"
        names.write_text(f"subjectAltName=IP:{GATEWAY}\n")
        request = ["req", "-newkey", "rsa:2048", "-nodes"]
        authority = ["-x509", "-addext", "basicConstraints=critical,CA:TRUE", "-days", "2"]
        signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names"]
        for command in (
            [*request, *authority, "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.pem"],
            [*request, "-subj", "/CN=database", "-keyout", "server.key", "-out", "server.csr"],
            ["x509", "-req", "-in", "server.csr", *signed, "-out", "server.pem"],
        ):
            subprocess.run(["openssl", *command], cwd=self._directory, check=True, capture_output=True, timeout=60)
        key = self._directory / "server.key"
        os.chown(key, NOBODY, NOBODY)
        key.chmod(0o600)

    def _as_nobody(self, command: list[str]) -> list[str]:
        program = str(self._programs / command[0])
        return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", program, *command[1:]]

    def _run(self, command: list[str], stdin: str | None = None) -> str:
        done = run(self._as_nobody(command), stdin)
        if done.returncode != 0:
            raise RigError(f"{command[0]}: {done.stdout}{done.stderr}")
        return done.stdout


@contextlib.contextmanager
def database() -> Iterator[Database]:
    # Not below the cluster's directory, into which nobody but root may go.
    with tempfile.TemporaryDirectory(prefix="kb-postgres-") as directory:
        made = Database(Path(directory))
        try:
            made.make()
            yield made
        finally:
            made.crash()
