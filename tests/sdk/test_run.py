"""`make run`: asks by name for what it lacks, keeps one admin key, and prints snippets that work."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import urllib.error
from pathlib import Path

from rig.http import Refused, call
from rig.process import REPO, Child, clean_environment, free_port, wait_until
from rig.standin import Standin

SCRIPT = ["sh", str(REPO / "docker" / "run.sh")]
# It builds before it serves, and cargo may have to wait for another one.
READY_TIMEOUT_S = 100


def test_without_a_stripe_key_it_says_which_variable_is_missing(tmp_path: Path) -> None:
    done = subprocess.run(
        SCRIPT,
        env=clean_environment({"KEYBRAKE_DATA_DIR": str(tmp_path / "data")}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 64
    assert "KEYBRAKE_STRIPE_SECRET_KEY" in done.stderr
    assert not (tmp_path / "data").exists()


def test_at_a_terminal_it_asks_for_the_key_and_does_not_show_it(tmp_path: Path) -> None:
    typed = f"sk_test_{secrets.token_hex(24)}"
    environment = {
        "KEYBRAKE_DATA_DIR": str(tmp_path / "data"),
        "KEYBRAKE_LISTEN": f"127.0.0.1:{free_port()}",
        "KEYBRAKE_OPS_LISTEN": f"127.0.0.1:{free_port()}",
        # Nobody is there: this is about the question, not about Stripe.
        "KEYBRAKE_STRIPE_API_BASE": f"http://127.0.0.1:{free_port()}",
    }
    keyboard, terminal = os.openpty()
    child = Child(SCRIPT, environment, tmp_path / "run.log", stdin=terminal)
    try:
        wait_until("it asks", lambda: "(rk_test_...): " in child.log.read_text())
        os.write(keyboard, f"{typed}\n".encode())
        wait_until("it takes the answer", lambda: "address " in child.log.read_text(), READY_TIMEOUT_S)
        os.set_blocking(keyboard, False)
        try:
            shown = os.read(keyboard, 4096)
        except BlockingIOError:
            shown = b""
    finally:
        child.stop()
        os.close(keyboard)
        os.close(terminal)
    assert typed not in shown.decode() and typed not in child.log.read_text()


def test_it_serves_keeps_its_admin_key_and_its_snippet_charges_once(tmp_path: Path) -> None:
    data = tmp_path / "data"
    admin_key = data / "admin.key"
    kept = []
    with Standin(tmp_path) as standin:
        for run in range(2):
            port, ops_port = free_port(), free_port()
            environment = {
                "STRIPE_SECRET_KEY": standin.secret_key,
                "KEYBRAKE_STRIPE_API_BASE": standin.url,
                "KEYBRAKE_DATA_DIR": str(data),
                "KEYBRAKE_LISTEN": f"127.0.0.1:{port}",
                "KEYBRAKE_OPS_LISTEN": f"127.0.0.1:{ops_port}",
            }
            child = Child(SCRIPT, environment, tmp_path / f"run{run}.log")
            try:

                def ready() -> bool:
                    child.must_run("docker/run.sh")
                    try:
                        return call("GET", f"http://127.0.0.1:{ops_port}/readyz") is not None
                    except (Refused, urllib.error.URLError, ConnectionError):
                        return False

                wait_until("the sidecar of docker/run.sh is ready", ready, READY_TIMEOUT_S)
                key = admin_key.read_text()
                kept.append(key)
                told = child.log.read_text()
                snippet = "import os" + told.split("import os", 1)[1].split("# end", 1)[0]
                done = subprocess.run(
                    [sys.executable, "-c", snippet],
                    env=clean_environment({"KEYBRAKE_ADMIN_KEY": key}),
                    capture_output=True,
                    text=True,
                    timeout=60,
                )
                assert done.returncode == 0, done.stderr
            finally:
                # The script has become the sidecar: the process is the same.
                code = child.stop()
            assert code == 0
            assert key not in told and standin.secret_key not in told
        assert [money["amount"] for money in standin.executed()] == [2999]
    assert kept[0] == kept[1] and len(kept[0]) == 64 and int(kept[0], 16) > 0
    assert os.stat(admin_key).st_mode & 0o777 == 0o600
    assert os.stat(data).st_mode & 0o777 == 0o700
