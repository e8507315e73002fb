"""stripe-node against a sidecar, over TLS with verification on, each attempt in a fresh process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import pytest

import setup
from conftest import HERE, World
from rig.process import clean_environment
from test_python import WAYS_OUT

NODE_TIMEOUT_S = 60
ATTEMPTS = 4

Charge = Callable[..., "dict[str, Any]"]


@pytest.fixture(scope="session")
def node_task(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of the task, beside a node_modules that holds stripe-node: imports look there."""
    home = setup.node_home(Path(sys.executable))
    directory = tmp_path_factory.mktemp("node")
    (directory / "node_modules").symlink_to(home / "node_modules")
    script = shutil.copy(HERE / "node" / "charge.mjs", directory)
    return [str(setup.node(home)), str(script)]


@pytest.fixture
def node_charge(world: World, customer: str, node_task: list[str]) -> Charge:
    def run(vault_key: str, amount: int, key: str = "", **environment: str) -> dict[str, Any]:
        given = {
            "KEYBRAKE_URL": world.sidecar.url,
            "NODE_EXTRA_CA_CERTS": str(world.sidecar.ca),
            "STRIPE_SECRET_KEY": vault_key,
            "CUSTOMER": customer,
            "AMOUNT_CENTS": str(amount),
            "IDEMPOTENCY_KEY": key,
            **environment,
        }
        done = subprocess.run(
            node_task, env=clean_environment(given), capture_output=True, text=True, timeout=NODE_TIMEOUT_S
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_a_charge_goes_to_the_root_mount_and_its_retry_is_a_replay(
    world: World, customer: str, node_charge: Charge
) -> None:
    first = node_charge(world.sidecar.issue("node")["vault_key"], 2999, f"{customer}:2026-07")
    assert first["paid"] and first["replayed"] is None, first
    again = node_charge(world.sidecar.issue("node")["vault_key"], 2999, f"{customer}:2026-07")
    assert again == {**first, "replayed": "true"}
    assert len(world.arrived(customer)) == 1


def test_the_cap_is_a_rate_limit_error_that_no_sdk_retries(world: World, customer: str, node_charge: Charge) -> None:
    key = world.sidecar.issue("node-cap", daily_usd_cap="10.00")
    with world.refuses("spend_cap_exceeded", requests=1):
        refused = node_charge(key["vault_key"], 1001, f"{customer}-1")
    assert (refused["type"], refused["status"]) == ("StripeRateLimitError", 429)
    assert refused["code"] == "spend_cap_exceeded"
    assert refused["message"].startswith("Spend cap exceeded")
    assert not world.arrived(customer)


def test_a_random_key_is_refused_and_told_both_ways_out(world: World, customer: str, node_charge: Charge) -> None:
    key = world.sidecar.issue("node-random")
    with world.refuses("idempotency_key_required", requests=1):
        refused = node_charge(key["vault_key"], 2999)
    assert (refused["type"], refused["code"]) == ("StripeInvalidRequestError", "idempotency_key_required")
    assert all(words in refused["message"] for words in WAYS_OUT), refused["message"]
    assert not world.arrived(customer)


def test_content_mode_charges_once_over_four_attempts(world: World, customer: str, node_charge: Charge) -> None:
    fields = {"idempotency": "content", "idempotency_scope": "billing:2026-07"}
    told = [node_charge(world.sidecar.issue("node-content", **fields)["vault_key"], 2999) for _ in range(ATTEMPTS)]
    assert len({answer["id"] for answer in told}) == 1
    assert [answer["replayed"] for answer in told] == [None, "true", "true", "true"]
    assert len(world.standin.executed(customer)) == 1


def test_a_certificate_that_nobody_vouches_for_is_refused(world: World, customer: str, node_charge: Charge) -> None:
    vault_key = world.sidecar.issue("node-ca")["vault_key"]
    refused = node_charge(vault_key, 2999, f"{customer}-1", NODE_EXTRA_CA_CERTS="")
    assert refused["type"] == "StripeConnectionError", refused
    assert not world.arrived(customer)
