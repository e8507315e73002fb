"""stripe-python against a sidecar, over TLS with verification on: what its exceptions say, and what reaches Stripe."""

from __future__ import annotations

import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import requests.adapters
import stripe

from conftest import World, charge
from rig.http import Refused, call, strict_context
from rig.process import REPO, clean_environment, wait_until

ATTEMPTS = 4
# A key of the caller's own, or a vault key in content mode, by the names that a user has to type.
WAYS_OUT = ["your own", '"content"', '"idempotency_scope"']


def code_of(error: stripe.StripeError) -> str:
    # `.code` is None for several of its exceptions: the constructors drop it.
    return error.json_body["error"]["code"]


# A task as the design has it. Only the host of the address is another one.
DESIGN = """
import httpx
import os

customer_id = "{customer}"
amount_cents = 2999

def issue_vault_key(cid, amt):
    resp = httpx.post(
        "{url}/admin/vault_keys",
        headers={{"Authorization": f"Bearer {{os.environ['KEYBRAKE_ADMIN_KEY']}}"}},
        json={{
            "label": f"kestra-billing-{{cid}}",
            "vendor": "stripe",
            "allowed_endpoints": ["POST /v1/charges"],
            "daily_usd_cap": round(amt / 100 * 1.1, 2), # cap at amount + 10%
            "expires_in_seconds": 3600,
        }},
        timeout=5.0,
    )
    resp.raise_for_status()
    return resp.json()["vault_key"]

print(issue_vault_key(customer_id, amount_cents))
"""


def test_the_design_issues_a_key_to_the_letter(world: World, customer: str) -> None:
    script = DESIGN.format(customer=customer, url=world.sidecar.url)
    environment = {"KEYBRAKE_ADMIN_KEY": world.sidecar.admin_key, "SSL_CERT_FILE": str(world.sidecar.ca)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=clean_environment(environment),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    vault_key = done.stdout.strip()
    assert vault_key.startswith("vk_test_")

    [listed] = world.sidecar.keys(label=f"kestra-billing-{customer}")
    assert listed["daily_usd_cap"] == "32.99"
    assert listed["allowed_endpoints"] == ["POST /v1/charges"]
    client = world.client(vault_key)
    with pytest.raises(stripe.RateLimitError):
        charge(client, customer, 3300, "over-the-cap")
    assert charge(client, customer, 2999, f"{customer}:2026-07").paid


def test_the_snippet_of_the_readme_charges_once(world: World) -> None:
    """The first Python block, with only the address and the CA file replaced; run twice."""
    readme = (REPO / "README.md").read_text()
    script = readme.split("```python\n", 1)[1].split("```", 1)[0]
    replaced = script.replace("https://localhost:8443", world.sidecar.url)
    replaced = replaced.replace("keybrake-data/tls/ca.pem", str(world.sidecar.ca))
    # Otherwise it would ask a sidecar that happens to run here.
    assert "8443" not in replaced and "keybrake-data" not in replaced
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", replaced],
            env=clean_environment({"KEYBRAKE_ADMIN_KEY": world.sidecar.admin_key}),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
    assert [money["amount"] for money in world.standin.executed("cus_9")] == [2999]


def test_the_question_of_the_readme_knows_who_was_charged(world: World, customer: str) -> None:
    """Its block is asked before and after a charge whose headers say which execution makes it."""
    blocks = (REPO / "README.md").read_text().split("```python\n")[1:]
    [block] = [block.split("```", 1)[0] for block in blocks if "def charged(" in block]
    key = world.sidecar.issue("question")["vault_key"]
    script = block.replace("https://localhost:8443", world.sidecar.url).replace("KEYBRAKE_ISSUER_KEY", "ANY_KEY")
    assert "8443" not in script
    asked = f"import httpx, os, ssl\nCA = {str(world.sidecar.ca)!r}\n{script}\nprint(charged({customer!r}, '2026-07'))"

    def answer() -> str:
        environment = clean_environment({"ANY_KEY": key})
        done = subprocess.run(
            [sys.executable, "-c", asked], env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert answer() == "set()"
    world.client(key).v1.charges.create(
        {"amount": 2999, "currency": "usd", "customer": customer, "source": "tok_visa"},
        {
            "idempotency_key": f"billing:2026-07:{customer}",
            "headers": {"Keybrake-Context-Execution": "4XyAb", "Keybrake-Context-Original-Execution": "4XyAa"},
        },
    )
    assert answer() == "{'spent'}"
    [record] = world.sidecar.audit(**{"customer": customer, "metadata[execution]": "4XyAb"})
    assert record["metadata"]["original_execution"] == "4XyAa"
    sent = world.arrived(customer)
    assert sent and not any("keybrake-context" in name for seen in sent for name in seen["headers"])


@pytest.mark.parametrize("retries", [0, 2])
def test_the_cap_is_a_rate_limit_error_that_no_sdk_retries(world: World, customer: str, retries: int) -> None:
    key = world.sidecar.issue("cap", daily_usd_cap="10.00")
    client = world.client(key["vault_key"], max_network_retries=retries)
    charge(client, customer, 600, f"{customer}-1")
    with world.refuses("spend_cap_exceeded", requests=1):
        with pytest.raises(stripe.RateLimitError, match="Spend cap exceeded") as raised:
            charge(client, customer, 500, f"{customer}-2")
    error = raised.value.json_body["error"]
    assert (error["code"], error["cap"]) == ("spend_cap_exceeded", "daily")
    told = {name: error[name] for name in ("limit", "spent", "held", "requested")}
    assert told == {"limit": "10.00", "spent": "6.00", "held": "0.00", "requested": "5.00"}
    assert raised.value.headers["Stripe-Should-Retry"] == "false"
    [record] = world.sidecar.audit(key_id=key["id"], decision="refused")
    assert (record["code"], record["customer"]) == ("spend_cap_exceeded", customer)
    assert [money["amount"] for money in world.standin.executed(customer)] == [600]


def test_what_the_key_does_not_grant_is_a_permission_error(world: World, customer: str) -> None:
    client = world.client_with("scope")
    paid = charge(client, customer, 500, f"{customer}-1")
    for outside in (
        lambda: client.v1.refunds.create({"charge": paid.id, "amount": 500}, {"idempotency_key": f"{customer}-2"}),
        lambda: client.v1.charges.retrieve(paid.id),
        lambda: client.v1.customers.delete(customer),
    ):
        with pytest.raises(stripe.PermissionError) as raised:
            outside()
        assert code_of(raised.value) == "endpoint_not_allowed"
    assert [money["kind"] for money in world.standin.executed(customer)] == ["charge"]


def test_a_bad_key_is_an_authentication_error(world: World, own_world: World, customer: str) -> None:
    good = world.sidecar.issue("bad")["vault_key"]
    bad = {
        "a slip of the pen": good[:-1] + ("a" if good[-1] != "a" else "b"),
        "no key at all": "vk_test_nonsense",
        "the key of another sidecar": own_world.sidecar.issue("elsewhere")["vault_key"],
        "the real key, which nobody may use here": world.standin.secret_key,
    }
    for what, key in bad.items():
        with pytest.raises(stripe.AuthenticationError) as raised:
            charge(world.client(key), customer, 500, f"{customer}-1")
        assert code_of(raised.value) == "vault_key_invalid", what
        assert key not in str(raised.value), what
        # Who asks the wrong worker has to see whom he asked.
        assert ("worker-1" in str(raised.value)) or what != "the key of another sidecar", str(raised.value)
    assert not world.arrived(customer)


def test_a_revoked_key_is_an_authentication_error_at_once(world: World, customer: str) -> None:
    key = world.sidecar.issue("revoked")
    client = world.client(key["vault_key"])
    charge(client, customer, 500, f"{customer}-1")
    world.sidecar.revoke(key["id"])
    with pytest.raises(stripe.AuthenticationError) as raised:
        charge(client, customer, 500, f"{customer}-2")
    assert code_of(raised.value) == "vault_key_revoked"
    assert len(world.standin.executed(customer)) == 1


def test_an_expired_key_is_an_authentication_error(world: World, customer: str) -> None:
    vault_key = world.sidecar.issue("expired", expires_in_seconds=1)["vault_key"]

    def expired() -> bool:
        try:
            world.sidecar.api("GET", "/keybrake/key", bearer=vault_key)
        except Refused as refused:
            return refused.status == 401
        return False

    wait_until("a key of one second expires", expired, timeout_s=10)
    with pytest.raises(stripe.AuthenticationError) as raised:
        charge(world.client(vault_key), customer, 500, f"{customer}-1")
    assert code_of(raised.value) == "vault_key_expired"
    assert not world.arrived(customer)


def test_other_parameters_are_an_idempotency_error(world: World, customer: str) -> None:
    client = world.client_with("other")
    charge(client, customer, 500, f"{customer}-1")
    # Under another vault key too: what is the same call does not depend on who asks.
    for asking in (client, world.client_with("another")):
        with pytest.raises(stripe.IdempotencyError, match="amount") as raised:
            charge(asking, customer, 700, f"{customer}-1")
        assert code_of(raised.value) == "idempotency_error"
    assert [money["amount"] for money in world.standin.executed(customer)] == [500]
    assert len(world.arrived(customer)) == 1


def test_a_random_key_is_refused_and_told_both_ways_out(world: World, customer: str) -> None:
    client = world.client(world.sidecar.issue("random")["vault_key"], max_network_retries=2)
    for made_up in (None, str(uuid.uuid4())):
        with world.refuses("idempotency_key_required", requests=1):
            with pytest.raises(stripe.InvalidRequestError) as raised:
                charge(client, customer, 500, made_up)
        assert code_of(raised.value) == "idempotency_key_required"
        for words in WAYS_OUT:
            assert words in str(raised.value)
    assert not world.arrived(customer)


def test_the_unchanged_script_charges_once_over_four_attempts(world: World, customer: str, tmp_path: Path) -> None:
    attempts = []
    for _ in range(ATTEMPTS):
        # A new vault key for each, as when the task before it is run again too.
        key = world.sidecar.issue("content", idempotency="content", idempotency_scope="billing:2026-07")
        environment = {
            "STRIPE_SECRET_KEY": key["vault_key"],
            "STRIPE_API_BASE": world.sidecar.stripe_url,
            "STRIPE_CA_FILE": str(world.sidecar.ca),
            "DATABASE_DOWN": "1",
        }
        attempts.append(world.task("task_plain.py", {customer: 2999}, tmp_path, **environment).attempt())
    assert ["the database is down" in attempt.failure for attempt in attempts] == [True] * ATTEMPTS
    assert [money["amount"] for money in world.standin.executed(customer)] == [2999]
    assert len(world.arrived(customer)) == 1


def test_a_new_period_is_a_new_charge(world: World, customer: str) -> None:
    """Without this, a scope that is ignored would pass for one that dedups well."""
    for period in ("2026-07", "2026-07", "2026-08"):
        scope = f"billing:{period}"
        charge(world.client_with("period", idempotency="content", idempotency_scope=scope), customer, 2999)
    assert len(world.standin.executed(customer)) == 2


def test_a_retry_under_a_new_vault_key_and_after_a_restart_is_a_replay(own_world: World, customer: str) -> None:
    first = charge(own_world.client_with("first"), customer, 2999, f"{customer}:2026-07")
    assert "Idempotent-Replayed" not in first.last_response.headers

    def again() -> None:
        replay = charge(own_world.client_with("again"), customer, 2999, f"{customer}:2026-07")
        headers = replay.last_response.headers
        assert headers["Idempotent-Replayed"] == "true"
        assert headers["Original-Request"] == first.last_response.request_id
        assert headers["Keybrake-Replayed-From"]
        assert headers["Request-Id"] != first.last_response.request_id
        assert replay.id == first.id

    again()
    own_world.sidecar.restart()
    again()
    own_world.sidecar.kill()
    own_world.sidecar.start()
    again()
    assert len(own_world.arrived(customer)) == 1
    assert len(own_world.standin.executed(customer)) == 1


def test_a_declined_card_is_asked_again(own_world: World, customer: str) -> None:
    """No 402 is kept here: Stripe repeats its own for a day, and after that the same key charges."""
    key = own_world.sidecar.issue("declined", daily_usd_cap="32.99")
    client = own_world.client(key["vault_key"])
    own_world.standin.fault("decline", customer=customer)
    for asked in (1, 2):
        with pytest.raises(stripe.CardError):
            charge(client, customer, 2999, f"{customer}:2026-07")
        assert len(own_world.arrived(customer)) == asked
        assert own_world.sidecar.spend_today(key["id"])["held"] == "0.00"
    own_world.standin.advance(25 * 3600)
    assert charge(client, customer, 2999, f"{customer}:2026-07").paid
    assert len(own_world.standin.executed(customer)) == 1
    assert own_world.sidecar.spend_today(key["id"])["spent"] == "29.99"


def test_equal_calls_at_once_are_one_charge_and_equal_answers(world: World, customer: str) -> None:
    client = world.client_with("at-once")
    with ThreadPoolExecutor(16) as pool:
        ids = list(pool.map(lambda _: charge(client, customer, 2999, f"{customer}:2026-07").id, range(32)))
    assert len(set(ids)) == 1
    assert len(world.arrived(customer)) == 1


def test_a_refund_has_a_cap_of_its_own_and_is_not_repeated(world: World, customer: str) -> None:
    endpoints = ["POST /v1/charges", "POST /v1/refunds"]
    client = world.client_with("refund", allowed_endpoints=endpoints, daily_usd_out_cap="30.00")
    paid = charge(client, customer, 2999, f"{customer}:charge")

    def refund(amount: int, key: str) -> stripe.Refund:
        return client.v1.refunds.create({"charge": paid.id, "amount": amount}, {"idempotency_key": key})

    first = refund(1000, f"{customer}:refund")
    assert refund(1000, f"{customer}:refund").id == first.id
    with pytest.raises(stripe.RateLimitError) as raised:
        refund(2001, f"{customer}:more")
    assert raised.value.json_body["error"]["cap"] == "daily_out"
    assert [money["amount"] for money in world.standin.executed() if money["kind"] == "refund"] == [1000]


def test_a_payment_intent_is_one_hold_and_shows_no_client_secret(world: World, customer: str) -> None:
    endpoints = ["POST /v1/payment_intents", "POST /v1/payment_intents/*/confirm", "GET /v1/payment_intents/*"]
    key = world.sidecar.issue("intent", allowed_endpoints=endpoints, daily_usd_cap="32.99")
    client = world.client(key["vault_key"])
    params = {"amount": 2999, "currency": "usd", "customer": customer, "payment_method": "pm_card_visa"}
    intent = client.v1.payment_intents.create(params, {"idempotency_key": f"{customer}:create"})
    assert intent.client_secret is None
    assert world.sidecar.spend_today(key["id"])["held"] == "29.99"
    for _ in range(2):
        confirmed = client.v1.payment_intents.confirm(intent.id, {}, {"idempotency_key": f"{customer}:confirm"})
        assert (confirmed.status, confirmed.client_secret) == ("succeeded", None)
    assert client.v1.payment_intents.retrieve(intent.id).client_secret is None
    today = world.sidecar.spend_today(key["id"])
    assert (today["spent"], today["held"]) == ("29.99", "0.00")
    assert len(world.standin.executed(customer)) == 1


def test_the_certificate_passes_a_strict_verifier(world: World, customer: str) -> None:
    """Python 3.13 verifies strictly by itself; here whatever Python runs does."""
    context = strict_context(world.sidecar.ca)
    vault_key = world.sidecar.issue("strict")["vault_key"]
    for host in ("localhost", "127.0.0.1"):
        told = call("GET", f"https://{host}:{world.sidecar.port}/keybrake/key", bearer=vault_key, context=context)
        assert told["label"] == "strict"

    class Strict(requests.adapters.HTTPAdapter):
        def init_poolmanager(self, *args: object, **options: object) -> None:
            super().init_poolmanager(*args, **options, ssl_context=context)

    session = requests.Session()
    session.mount("https://", Strict())
    client = world.client(vault_key, http_client=stripe.RequestsClient(session=session))
    assert charge(client, customer, 500, f"{customer}-1").paid


def test_a_certificate_that_nobody_vouches_for_is_refused(world: World, customer: str) -> None:
    client = world.client_with("unknown-ca")
    stripe.ca_bundle_path = str(Path(stripe.__file__).parent / "data" / "ca-certificates.crt")
    with pytest.raises(stripe.APIConnectionError, match="(?i)certificate"):
        charge(client, customer, 500, f"{customer}-1")
    assert not world.arrived(customer)
