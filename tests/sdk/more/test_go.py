"""stripe-go against a sidecar: it has no base path, and it sends its bodies in chunks without a length."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("scenarios")

import setup  # noqa: E402
from conftest import World  # noqa: E402
from rig.process import clean_environment  # noqa: E402
from rig.recorder import Recorder  # noqa: E402
from scenarios import TASK_TIMEOUT_S, Program, Scenarios  # noqa: E402


@pytest.fixture(scope="session")
def program(world: World, tmp_path_factory: pytest.TempPathFactory) -> Program:
    home = setup.go_home(Path(sys.executable))
    # Beside the roots of a file, Go trusts those of a directory.
    empty = tmp_path_factory.mktemp("no-roots")
    nobody = {"SSL_CERT_FILE": "/dev/null", "SSL_CERT_DIR": str(empty)}
    trusts = {**nobody, "SSL_CERT_FILE": str(world.sidecar.ca)}
    return Program([str(home / "charge")], trusts=trusts, trusts_nobody=nobody)


class TestGo(Scenarios):
    # Go has one type of error, and shows the type that the answer says.
    invalid = "invalid_request_error"
    too_much = "invalid_request_error"

    def is_connection_error(self, told: dict[str, Any]) -> bool:
        return told["type"] == "connection"

    def test_its_bodies_come_in_chunks_and_are_read_like_others(
        self, world: World, customer: str, program: Program
    ) -> None:
        """What it sends is looked at in front of nobody, then the same goes through the sidecar."""
        with Recorder() as nobody:
            given = {
                "KEYBRAKE_URL": nobody.url,
                "STRIPE_SECRET_KEY": world.sidecar.issue("go-chunked")["vault_key"],
                "CUSTOMER": customer,
                "AMOUNT_CENTS": "2999",
                "IDEMPOTENCY_KEY": f"{customer}:chunked",
            }
            done = subprocess.run(
                program.command, env=clean_environment(given), capture_output=True, text=True, timeout=TASK_TIMEOUT_S
            )
        assert done.returncode == 0, done.stderr
        [sent] = nobody.requests
        assert json.loads(done.stdout)["status"] == sent.status
        assert (sent.headers["transfer-encoding"], "content-length" in sent.headers) == ("chunked", False)
        charged = program.charge(world, customer, given["STRIPE_SECRET_KEY"], 2999, f"{customer}:chunked")
        assert charged["paid"], charged
        [arrived] = world.arrived(customer)
        assert arrived["headers"]["content-length"] == str(len(arrived["body"]))
        for part in sent.body.split("&"):
            assert part in arrived["body"].split("&")
