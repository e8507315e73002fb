"""A sidecar and a stand-in for Stripe, as processes of their own, for tests that use the SDKs as customers do."""

from __future__ import annotations

import contextlib
import json
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

import pytest
import stripe

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "py"))

from rig.kestra import Task  # noqa: E402
from rig.process import within  # noqa: E402
from rig.sidecar import Sidecar  # noqa: E402
from rig.standin import Standin  # noqa: E402

TEST_TIMEOUT_S = 120
DEMO = HERE.parent / "demo"


@dataclass
class World:
    """Stripe's stand-in and a sidecar in front of it."""

    standin: Standin
    sidecar: Sidecar

    def client(self, vault_key: str, **options: Any) -> stripe.StripeClient:
        return client_of(self.sidecar, vault_key, **options)

    def client_with(self, label: str, **fields: Any) -> stripe.StripeClient:
        """The same with a new vault key."""
        return self.client(self.sidecar.issue(label, **fields)["vault_key"])

    def arrived(self, text: str) -> list[dict[str, Any]]:
        """Money calls that reached Stripe with this text in the body."""
        return [seen for seen in self.standin.requests() if text in seen["body"]]

    @contextlib.contextmanager
    def refuses(self, code: str, requests: int) -> Iterator[None]:
        """So many requests must come and be refused with this code, not one more."""
        before = self.sidecar.refused(code)
        yield
        assert self.sidecar.refused(code) - before == requests

    def task(self, script: str, customers: dict[str, int], workdir: Path, **environment: str) -> Task:
        """A task of the demo that charges each customer its amount, which is also its price."""
        prices = workdir / "price_list.json"
        prices.write_text(json.dumps(customers))
        given = {
            "BILLING_PERIOD": "2026-07",
            "ITEMS": json.dumps([{"id": name, "amount_cents": cents} for name, cents in customers.items()]),
            "PRICE_LIST": str(prices),
            **self.sidecar.flow_environment(),
            **environment,
        }
        return Task(Path(sys.executable), DEMO / script, given)


def make_world(workdir: Path) -> Iterator[World]:
    with Standin(workdir) as standin:
        with Sidecar(workdir, stripe_base=standin.url, stripe_key=standin.secret_key) as sidecar:
            yield World(standin, sidecar)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Shared: each test uses customers and keys of its own and restarts nothing."""
    yield from make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def own_world(tmp_path: Path) -> Iterator[World]:
    """For tests that stop the sidecar or advance Stripe's clock."""
    yield from make_world(tmp_path)


@pytest.fixture
def customer() -> str:
    return f"cus_{secrets.token_hex(8)}"


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    """No test may hang, whatever it waits for."""
    with within(TEST_TIMEOUT_S):
        yield


def client_of(sidecar: Sidecar, vault_key: str, **options: Any) -> stripe.StripeClient:
    """stripe-python as the README configures it: the address, the CA, nothing else."""
    stripe.ca_bundle_path = str(sidecar.ca)
    return stripe.StripeClient(vault_key, base_addresses={"api": sidecar.stripe_url}, **options)


def charge(client: stripe.StripeClient, customer: str, amount: int, key: str | None = None) -> stripe.Charge:
    """One charge, with an idempotency key of the caller's or the one that the SDK makes up."""
    params = {"amount": amount, "currency": "usd", "customer": customer}
    return client.v1.charges.create(params, {"idempotency_key": key} if key else {})
