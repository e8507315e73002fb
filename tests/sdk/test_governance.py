"""The five promises of the two-layer pattern, each as a test that fails when the promise is broken."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import stripe

from conftest import World, charge
from rig.kestra import finish

BARRIER_TIMEOUT_S = 20


def billing_idempotency_key(customer_id: str, amount_cents: int, period: str, context: str = "kestra-billing") -> str:
    raw = f"{customer_id}:{amount_cents}:{period}:{context}"
    return hashlib.sha256(raw.encode()).hexdigest()[:32]


def test_the_idempotency_key_is_stable_across_task_retries(world: World, customer: str, tmp_path: Path) -> None:
    """Four fresh processes, each under a vault key of its own: what reaches Stripe carries one key, once."""
    task = world.task("task_idempotent_vault.py", {customer: 2999}, tmp_path, DATABASE_DOWN="1")
    attempts = task.run(max_attempts=4)
    assert len(attempts) == 4
    assert all("the database is down" in attempt.failure for attempt in attempts), attempts[-1].output
    assert len(world.sidecar.keys(label=f"kestra-billing-{customer}")) == 4

    records = world.sidecar.audit(customer=customer)
    assert [record["decision"] for record in records] == ["forwarded", "replayed", "replayed", "replayed"]
    assert len({record["idempotency_key"] for record in records}) == 1
    [arrived] = world.arrived(customer)
    assert arrived["headers"]["idempotency-key"] == records[0]["idempotency_key"]


def test_each_parallel_item_has_a_vault_key_of_its_own(world: World, customer: str) -> None:
    """Ten keys minted at once are ten keys, and each stands only for its own item's money."""
    items = [(f"{customer}_{n}", (n + 1) * 1499) for n in range(10)]
    with ThreadPoolExecutor(len(items)) as pool:
        keys = list(
            pool.map(
                lambda item: world.sidecar.issue(item[0], daily_usd_cap=f"{item[1] * 11 // 10 / 100:.2f}"),
                items,
            )
        )
    assert len({key["vault_key"] for key in keys}) == len({key["id"] for key in keys}) == len(items)

    with pytest.raises(stripe.RateLimitError):
        charge(world.client(keys[0]["vault_key"]), items[0][0], items[0][1] * 100, f"{customer}-wrong")
    world.sidecar.revoke(keys[1]["id"])
    with pytest.raises(stripe.AuthenticationError):
        charge(world.client(keys[1]["vault_key"]), *items[1], f"{customer}-revoked")
    # Neither touches the other eight.
    for key, (name, amount) in list(zip(keys, items))[2:]:
        charge(world.client(key["vault_key"]), name, amount, billing_idempotency_key(name, amount, "2026-07"))
    paid = {name: [money["amount"] for money in world.standin.executed(name)] for name, _ in items}
    assert paid == {name: [amount] if n > 1 else [] for n, (name, amount) in enumerate(items)}


def test_overlapping_runs_of_a_period_charge_each_customer_once(world: World, customer: str, tmp_path: Path) -> None:
    customers = {f"{customer}_{n}": 1499 for n in range(5)}
    task = world.task("task_idempotent_vault.py", customers, tmp_path)
    runs = [task.start(), task.start()]
    for ended in [finish(run) for run in runs]:
        assert ended.exit_code == 0, ended.output
    assert {name: len(world.standin.executed(name)) for name in customers} == dict.fromkeys(customers, 1)
    # Both runs asked: an overlap that did not happen would prove nothing.
    assert {name: len(world.sidecar.audit(customer=name)) for name in customers} == dict.fromkeys(customers, 2)


def racing_tasks(client: stripe.StripeClient, customer: str) -> list[str]:
    """Two tasks that use Kestra's KV store as a lock: each looks, sees nothing, and charges."""
    kv_store: dict[str, str] = {}
    both_have_looked = threading.Barrier(2)

    def task(_: int) -> str:
        charged = kv_store.get(customer)
        both_have_looked.wait(BARRIER_TIMEOUT_S)
        if charged is None:
            charged = kv_store[customer] = charge(client, customer, 2999).id
        return charged

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(task, range(2)))


def test_check_then_act_loses_money_without_the_sidecar(world: World, customer: str) -> None:
    client = stripe.StripeClient(world.standin.secret_key, base_addresses={"api": world.standin.url})
    assert len(set(racing_tasks(client, customer))) == 2
    assert len(world.standin.executed(customer)) == 2


def test_check_then_act_loses_none_with_it(world: World, customer: str) -> None:
    client = world.client_with("race", idempotency="content", idempotency_scope="billing:2026-07")
    assert len(set(racing_tasks(client, customer))) == 1
    assert len(world.standin.executed(customer)) == 1


def test_an_audit_scope_key_reads_and_cannot_charge(world: World, customer: str) -> None:
    paid = charge(world.client_with("payer"), customer, 2999, f"{customer}:2026-07")
    key = world.sidecar.issue("audit", allowed_endpoints=["GET /v1/charges"], daily_usd_cap=None)
    auditor = world.client(key["vault_key"])
    assert paid.id in [seen.id for seen in auditor.v1.charges.list({"customer": customer}).data]
    with pytest.raises(stripe.PermissionError) as raised:
        charge(auditor, customer, 2999, f"{customer}:2026-08")
    assert raised.value.json_body["error"]["code"] == "endpoint_not_allowed"
    # Nor may it see the answer of a charge that another key made.
    with pytest.raises(stripe.PermissionError):
        charge(auditor, customer, 2999, f"{customer}:2026-07")
    assert len(world.standin.executed(customer)) == 1
    [refused] = world.sidecar.audit(key_id=key["id"], decision="refused")
    assert (refused["code"], refused["endpoint"]) == ("endpoint_not_allowed", "/v1/charges")
