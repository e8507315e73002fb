"""stripe-python, through a sidecar, against localstripe: a fake of Stripe that keeps state and that others wrote.

It knows no idempotency keys: whatever reaches it twice is done twice. So what happens once here happens once because
of the sidecar. What it did is counted by asking it directly.
"""

from __future__ import annotations

import json
import secrets
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
import stripe

import setup
from conftest import HERE, charge, client_of
from rig.http import Refused
from rig.process import Child, wait_until
from rig.sidecar import Sidecar

GOOD_CARD = "4242424242424242"
# It can be attached to a customer; charges of it are declined.
DECLINED_CARD = "4000000000000341"


class LocalStripe:
    """localstripe as a process of its own on loopback, without a file."""

    def __init__(self, workdir: Path) -> None:
        self.secret_key = f"sk_test_{secrets.token_hex(24)}"
        python = setup.localstripe_home() / "bin" / "python"
        command = [str(python), str(HERE / "localstripe" / "serve.py"), f"acct_{secrets.token_hex(8)}"]
        self._child = Child(command, {}, workdir / "localstripe.log")
        try:
            self.url = f"http://{wait_until('localstripe prints its address', self._address)}"
        except BaseException:
            self.stop()
            raise

    def _address(self) -> str | None:
        self._child.must_run("localstripe")
        line, end, _ = self._child.log.read_text().partition("\n")
        return json.loads(line)["listening"] if end else None

    def stop(self) -> None:
        self._child.stop()

    def client(self) -> stripe.StripeClient:
        """Past the sidecar: what a customer's browser does, what the test counts, and how it would go without."""
        return stripe.StripeClient(self.secret_key, base_addresses={"api": self.url})


@dataclass
class Shop:
    """localstripe, a sidecar in front of it, and a customer with a card."""

    direct: stripe.StripeClient
    sidecar: Sidecar
    customer: str

    def key(self, *endpoints: str, **fields: Any) -> dict[str, Any]:
        """A vault key with room for one charge of these tests and a little more."""
        policy = {"allowed_endpoints": list(endpoints) or ["POST /v1/charges"], "daily_usd_cap": "32.99", **fields}
        return self.sidecar.issue(self.customer, **policy)

    def client(self, *endpoints: str, **fields: Any) -> stripe.StripeClient:
        return client_of(self.sidecar, self.key(*endpoints, **fields)["vault_key"])

    def counted(self, key: dict[str, Any], lane: str = "in") -> tuple[str, str]:
        """What is spent and held today, money in or money out."""
        today = self.sidecar.spend_today(key["id"])
        told = today if lane == "in" else today["out"]
        return told["spent"], told["held"]

    def charges(self) -> list[stripe.Charge]:
        """What localstripe charged the customer: the oracle."""
        return self.direct.v1.charges.list({"customer": self.customer, "limit": 100}).data

    def refunds(self, of: str) -> list[stripe.Refund]:
        return self.direct.v1.refunds.list({"charge": of, "limit": 100}).data

    def plan(self, amount: int) -> stripe.Plan:
        product = self.direct.v1.products.create({"name": "Pro"})
        params = {"product": product.id, "amount": amount, "currency": "usd", "interval": "month"}
        return self.direct.v1.plans.create(params)

    def subscribe_for_nothing(self) -> None:
        """localstripe makes invoices only for customers with a subscription."""
        plan = self.plan(0)
        self.direct.v1.subscriptions.create({"customer": self.customer, "items": [{"plan": plan.id}]})

    def items(self) -> list[stripe.InvoiceItem]:
        """Invoice items that wait for an invoice."""
        return self.direct.v1.invoice_items.list({"customer": self.customer}).data

    def add_card(self, number: str) -> None:
        """As a browser does with Stripe's script: card numbers never pass a sidecar."""
        token = self.direct.v1.tokens.create({"card": card(number)})
        self.direct.raw_request("post", f"/v1/customers/{self.customer}/sources", source=token.id)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[stripe.StripeClient, Sidecar]]:
    workdir = tmp_path_factory.mktemp("localstripe")
    local_stripe = LocalStripe(workdir)
    try:
        with Sidecar(workdir, stripe_base=local_stripe.url, stripe_key=local_stripe.secret_key) as sidecar:
            yield local_stripe.client(), sidecar
    finally:
        local_stripe.stop()


@pytest.fixture
def shop(local: tuple[stripe.StripeClient, Sidecar]) -> Shop:
    """Each test has a customer of its own, so that what it counts is its own."""
    direct, sidecar = local
    made = Shop(direct, sidecar, direct.v1.customers.create({"name": "Ada"}).id)
    made.add_card(GOOD_CARD)
    return made


def card(number: str) -> dict[str, Any]:
    return {"number": number, "exp_month": 12, "exp_year": 2040, "cvc": "123"}


def replayed(answer: stripe.StripeObject) -> bool:
    return answer.last_response.headers.get("Idempotent-Replayed") == "true"


def cents(counted: tuple[str, str]) -> int:
    """Spent and held together."""
    return sum(int(dollars.replace(".", "")) for dollars in counted)


def refusal(call: Callable[[], Any]) -> tuple[int, str]:
    """Status and code of the error with which a call has to end."""
    with pytest.raises(stripe.StripeError) as raised:
        call()
    return raised.value.http_status, raised.value.json_body["error"]["code"]


# One call is one execution.


def test_a_key_that_charges_twice_at_localstripe_charges_once_through_the_sidecar(shop: Shop) -> None:
    """Both halves: without the second one the first would prove nothing."""
    key = f"{shop.customer}:2026-07"
    ids = [charge(shop.direct, shop.customer, 2999, key).id for _ in range(2)]
    assert len(set(ids)) == 2
    assert {paid.id for paid in shop.charges()} == set(ids)

    vault_key = shop.key()
    client = client_of(shop.sidecar, vault_key["vault_key"])
    first = charge(client, shop.customer, 2999, key)
    again = charge(client, shop.customer, 2999, key)
    assert (replayed(first), replayed(again)) == (False, True)
    assert again.to_dict() == first.to_dict()
    assert {paid.id for paid in shop.charges()} == {*ids, first.id}
    assert shop.counted(vault_key) == ("29.99", "0.00")


def test_the_memory_is_the_accounts_and_survives_a_restart(shop: Shop) -> None:
    key = f"{shop.customer}:2026-07"
    first = charge(shop.client(), shop.customer, 2999, key)
    shop.sidecar.restart()
    again = charge(shop.client(), shop.customer, 2999, key)
    assert (again.id, replayed(again)) == (first.id, True)
    assert len(shop.charges()) == 1


def test_equal_calls_at_once_are_one_charge(shop: Shop) -> None:
    client = shop.client()
    with ThreadPoolExecutor(16) as pool:
        ids = list(pool.map(lambda _: charge(client, shop.customer, 2999, f"{shop.customer}:2026-07").id, range(32)))
    assert ids == [ids[0]] * 32
    assert len(shop.charges()) == 1


def test_content_mode_makes_two_runs_one_charge(shop: Shop) -> None:
    """Each run has a vault key of its own, and a key that the SDK made up."""
    fields = {"idempotency": "content", "idempotency_scope": "billing:2026-07"}
    first, again = [charge(shop.client(**fields), shop.customer, 2999) for _ in range(2)]
    assert (again.id, replayed(again)) == (first.id, True)
    assert len(shop.charges()) == 1


def test_the_cap_holds_at_an_upstream_that_knows_none(shop: Shop) -> None:
    client = shop.client()
    charge(client, shop.customer, 2999, f"{shop.customer}:1")
    assert refusal(lambda: charge(client, shop.customer, 301, f"{shop.customer}:2")) == (429, "spend_cap_exceeded")
    charge(client, shop.customer, 300, f"{shop.customer}:3")
    assert sorted(paid.amount for paid in shop.charges()) == [300, 2999]


def test_a_declined_card_holds_nothing_and_is_asked_again(shop: Shop) -> None:
    shop.customer = shop.direct.v1.customers.create({"name": "Ada"}).id
    shop.add_card(DECLINED_CARD)
    key = shop.key()
    client = client_of(shop.sidecar, key["vault_key"])
    for asked in (1, 2):
        with pytest.raises(stripe.CardError):
            charge(client, shop.customer, 2999, f"{shop.customer}:2026-07")
        assert shop.counted(key) == ("0.00", "0.00")
        assert [paid.status for paid in shop.charges()] == ["failed"] * asked


# Charges and payment intents.


def test_a_charge_is_authorised_then_captured_on_one_hold(shop: Shop) -> None:
    key = shop.key("POST /v1/charges", "POST /v1/charges/*/capture")
    client = client_of(shop.sidecar, key["vault_key"])
    params = {"amount": 2999, "currency": "usd", "customer": shop.customer, "capture": False}
    held = client.v1.charges.create(params, {"idempotency_key": f"{shop.customer}:hold"})
    assert (held.captured, shop.counted(key)) == (False, ("0.00", "29.99"))
    for again in (False, True):
        taken = client.v1.charges.capture(held.id, {}, {"idempotency_key": f"{shop.customer}:take"})
        assert (taken.captured, replayed(taken)) == (True, again)
    assert shop.counted(key) == ("29.99", "0.00")
    assert [(paid.id, paid.captured) for paid in shop.charges()] == [(held.id, True)]


def test_part_of_a_charge_is_captured_once(shop: Shop) -> None:
    """localstripe captures all and refunds the rest, and says no `amount_captured`: all of it stays counted."""
    key = shop.key("POST /v1/charges", "POST /v1/charges/*/capture")
    client = client_of(shop.sidecar, key["vault_key"])
    params = {"amount": 2999, "currency": "usd", "customer": shop.customer, "capture": False}
    held = client.v1.charges.create(params, {"idempotency_key": f"{shop.customer}:hold"})
    for _ in range(2):
        client.v1.charges.capture(held.id, {"amount": 2000}, {"idempotency_key": f"{shop.customer}:take"})
    assert [(paid.amount, paid.amount_refunded) for paid in shop.charges()] == [(2999, 999)]
    assert shop.counted(key) == ("29.99", "0.00")


INTENTS = [
    "POST /v1/payment_intents",
    *(f"POST /v1/payment_intents/{{intent}}/{step}" for step in ("confirm", "capture", "cancel")),
]


def make_intent(shop: Shop, client: stripe.StripeClient, **params: Any) -> stripe.PaymentIntent:
    method = shop.direct.v1.payment_methods.attach("pm_card_visa", {"customer": shop.customer}).id
    params = {"amount": 2999, "currency": "usd", "customer": shop.customer, "payment_method": method, **params}
    intent = client.v1.payment_intents.create(params, {"idempotency_key": f"{shop.customer}:create"})
    assert (intent.status, intent.client_secret) == ("requires_confirmation", None)
    return intent


def test_an_intent_that_does_not_say_what_it_received_stays_in_doubt(shop: Shop) -> None:
    """Stripe's intents have `amount_received`, localstripe's do not: the whole stays counted."""
    key = shop.key(*INTENTS)
    client = client_of(shop.sidecar, key["vault_key"])
    intent = make_intent(shop, client)
    assert shop.counted(key) == ("0.00", "29.99")
    confirm = {"idempotency_key": f"{shop.customer}:confirm"}
    assert refusal(lambda: client.v1.payment_intents.confirm(intent.id, {}, confirm)) == (502, "outcome_unknown")
    [paid] = shop.charges()
    assert (paid.amount, paid.payment_intent) == (2999, intent.id)
    assert shop.counted(key) == ("0.00", "29.99")
    [hold] = [hold for hold in shop.sidecar.holds_in_doubt() if hold["key_id"] == key["id"]]
    assert (hold["object_id"], hold["usd"]) == (intent.id, "29.99")


def test_an_intent_is_confirmed_then_captured_on_one_hold(shop: Shop) -> None:
    key = shop.key(*INTENTS)
    client = client_of(shop.sidecar, key["vault_key"])
    intent = make_intent(shop, client, capture_method="manual")
    for again in (False, True):
        confirmed = client.v1.payment_intents.confirm(intent.id, {}, {"idempotency_key": f"{shop.customer}:confirm"})
        assert (confirmed.status, confirmed.client_secret, replayed(confirmed)) == ("requires_capture", None, again)
    assert [paid.captured for paid in shop.charges()] == [False]
    capture = {"idempotency_key": f"{shop.customer}:capture"}
    # Again it is not said what was received.
    assert refusal(lambda: client.v1.payment_intents.capture(intent.id, {}, capture)) == (502, "outcome_unknown")
    assert [paid.captured for paid in shop.charges()] == [True]
    assert shop.counted(key) == ("0.00", "29.99")


def test_a_cancel_that_does_not_say_what_was_received_gives_nothing_back(shop: Shop) -> None:
    key = shop.key(*INTENTS)
    client = client_of(shop.sidecar, key["vault_key"])
    intent = make_intent(shop, client)
    canceled = client.v1.payment_intents.cancel(intent.id, {}, {"idempotency_key": f"{shop.customer}:cancel"})
    assert canceled.status == "canceled"
    assert shop.charges() == []
    assert shop.counted(key) == ("0.00", "29.99")


# Money out.

REFUNDS = ["POST /v1/charges", "POST /v1/refunds"]


def test_a_refund_is_made_once_within_its_own_cap(shop: Shop) -> None:
    key = shop.key(*REFUNDS, daily_usd_out_cap="29.99")
    client = client_of(shop.sidecar, key["vault_key"])
    paid = charge(client, shop.customer, 2999, f"{shop.customer}:charge")

    def refund(amount: int, name: str) -> stripe.Refund:
        params = {"charge": paid.id, "amount": amount}
        return client.v1.refunds.create(params, {"idempotency_key": f"{shop.customer}:{name}"})

    first = refund(1000, "refund")
    again = refund(1000, "refund")
    assert (again.id, replayed(again)) == (first.id, True)
    assert refusal(lambda: refund(2000, "more")) == (429, "spend_cap_exceeded")
    assert [made.amount for made in shop.refunds(paid.id)] == [1000]
    assert shop.counted(key, "out") == ("10.00", "0.00")
    # What went out gives nothing back.
    assert shop.counted(key) == ("29.99", "0.00")


def test_a_refund_without_an_amount_counts_all_of_the_charge(shop: Shop) -> None:
    key = shop.key(*REFUNDS, daily_usd_out_cap="29.99")
    client = client_of(shop.sidecar, key["vault_key"])
    paid = charge(client, shop.customer, 2999, f"{shop.customer}:charge")
    for again in (False, True):
        refund = client.v1.refunds.create({"charge": paid.id}, {"idempotency_key": f"{shop.customer}:refund"})
        assert (refund.amount, replayed(refund)) == (2999, again)
    assert len(shop.refunds(paid.id)) == 1
    assert shop.counted(key, "out") == ("29.99", "0.00")


def test_a_refund_without_an_amount_needs_room_for_all_that_is_left(shop: Shop) -> None:
    key = shop.key(*REFUNDS, daily_usd_out_cap="29.98")
    client = client_of(shop.sidecar, key["vault_key"])
    paid = charge(client, shop.customer, 2999, f"{shop.customer}:charge")
    whole = {"idempotency_key": f"{shop.customer}:refund"}
    assert refusal(lambda: client.v1.refunds.create({"charge": paid.id}, whole)) == (429, "spend_cap_exceeded")
    assert shop.refunds(paid.id) == []


def test_a_refund_of_the_rest_is_of_what_was_read(shop: Shop) -> None:
    """Without an amount localstripe refunds the whole charge again, whatever was refunded before: it is sent with one."""
    key = shop.key(*REFUNDS, daily_usd_out_cap="100.00")
    client = client_of(shop.sidecar, key["vault_key"])
    paid = charge(client, shop.customer, 2999, f"{shop.customer}:charge")
    first = {"charge": paid.id, "amount": 1000}
    client.v1.refunds.create(first, {"idempotency_key": f"{shop.customer}:part"})
    rest = client.v1.refunds.create({"charge": paid.id}, {"idempotency_key": f"{shop.customer}:rest"})
    assert rest.amount == 1999
    assert sorted(made.amount for made in shop.refunds(paid.id)) == [1000, 1999]
    assert shop.counted(key, "out") == ("29.99", "0.00")


# Objects that this ledger does not know are read first.


def test_a_refund_of_a_charge_that_was_made_elsewhere(shop: Shop) -> None:
    paid = charge(shop.direct, shop.customer, 2999)
    key = shop.key("POST /v1/refunds", daily_usd_out_cap="15.00")
    client = client_of(shop.sidecar, key["vault_key"])

    def refund(name: str) -> stripe.Refund:
        params = {"charge": paid.id, "amount": 1000}
        return client.v1.refunds.create(params, {"idempotency_key": f"{shop.customer}:{name}"})

    assert [refund("refund").id, refund("refund").id] == [made.id for made in shop.refunds(paid.id)] * 2
    assert refusal(lambda: refund("more")) == (429, "spend_cap_exceeded")
    assert shop.counted(key, "out") == ("10.00", "0.00")


def test_a_capture_of_a_charge_that_was_made_elsewhere(shop: Shop) -> None:
    params = {"amount": 2999, "currency": "usd", "customer": shop.customer, "capture": False}
    held = shop.direct.v1.charges.create(params)
    tight = shop.client("POST /v1/charges/{charge}/capture", daily_usd_cap="29.98")
    take = {"idempotency_key": f"{shop.customer}:take"}
    assert refusal(lambda: tight.v1.charges.capture(held.id, {}, take)) == (429, "spend_cap_exceeded")
    assert [paid.captured for paid in shop.charges()] == [False]
    key = shop.key("POST /v1/charges/{charge}/capture")
    client = client_of(shop.sidecar, key["vault_key"])
    for again in (False, True):
        taken = client.v1.charges.capture(held.id, {}, take)
        assert (taken.captured, replayed(taken)) == (True, again)
    assert shop.counted(key) == ("29.99", "0.00")


def test_a_confirm_of_an_intent_that_was_made_elsewhere(shop: Shop) -> None:
    method = shop.direct.v1.payment_methods.attach("pm_card_visa", {"customer": shop.customer}).id
    params = {"amount": 2999, "currency": "usd", "customer": shop.customer, "payment_method": method}
    intent = shop.direct.v1.payment_intents.create({**params, "capture_method": "manual"})
    confirm = {"idempotency_key": f"{shop.customer}:confirm"}
    tight = shop.client(*INTENTS, daily_usd_cap="29.98")
    assert refusal(lambda: tight.v1.payment_intents.confirm(intent.id, {}, confirm)) == (429, "spend_cap_exceeded")
    assert shop.charges() == []
    # localstripe does not know `amount_to_confirm`, which pins what was read: the one thing that it refuses. Stripe
    # takes it; the Rust tests confirm such an intent.
    key = shop.key(*INTENTS)
    client = client_of(shop.sidecar, key["vault_key"])
    with pytest.raises(stripe.InvalidRequestError, match="Unexpected amount_to_confirm"):
        client.v1.payment_intents.confirm(intent.id, {}, confirm)
    assert shop.counted(key) == ("0.00", "0.00")
    assert shop.charges() == []


def test_an_object_that_does_not_exist_reserves_nothing(shop: Shop) -> None:
    key = shop.key("POST /v1/charges/{charge}/capture")
    client = client_of(shop.sidecar, key["vault_key"])
    take = {"idempotency_key": f"{shop.customer}:take"}
    with pytest.raises(stripe.StripeError) as raised:
        client.v1.charges.capture("ch_nobody", {}, take)
    assert raised.value.http_status in (403, 404)
    assert shop.counted(key) == ("0.00", "0.00")


# What moves no money.

SETTING_UP = [
    "POST /v1/customers",
    "POST /v1/customers/{customer}",
    "POST /v1/customers/{customer}/sources",
    "POST /v1/payment_methods/{payment_method}/attach",
    "POST /v1/products",
    "POST /v1/plans",
]


def test_a_key_with_a_cap_sets_a_customer_up_and_charges_him(shop: Shop) -> None:
    key = shop.key(*SETTING_UP, "POST /v1/charges", "GET /v1/customers/{customer}")
    client = client_of(shop.sidecar, key["vault_key"])
    customer = client.v1.customers.create({"name": "Grace", "metadata": {"plan": "pro"}})
    token = shop.direct.v1.tokens.create({"card": card(GOOD_CARD)})
    client.raw_request("post", f"/v1/customers/{customer.id}/sources", source=token.id)
    method = client.v1.payment_methods.attach("pm_card_visa", {"customer": customer.id})
    client.v1.customers.update(customer.id, {"invoice_settings": {"default_payment_method": method.id}})
    product = client.v1.products.create({"name": "Pro"})
    plan = client.v1.plans.create({"product": product.id, "amount": 1500, "currency": "usd", "interval": "month"})
    assert shop.counted(key) == ("0.00", "0.00")

    found = shop.direct.v1.customers.retrieve(customer.id)
    assert (found.name, found.metadata["plan"]) == ("Grace", "pro")
    assert found.invoice_settings.default_payment_method == method.id
    assert shop.direct.v1.plans.retrieve(plan.id).amount == 1500
    # Nothing that is no money object is stamped.
    assert found.metadata.to_dict() == {"plan": "pro"}
    paid = charge(client, customer.id, 2999, f"{customer.id}:2026-07")
    assert paid.payment_method == method.id
    assert client.v1.customers.retrieve(customer.id).id == customer.id
    assert shop.counted(key) == ("29.99", "0.00")


def test_a_card_number_does_not_pass(shop: Shop) -> None:
    client = shop.client("POST /v1/tokens", "POST /v1/payment_methods")
    assert refusal(lambda: client.v1.tokens.create({"card": card(GOOD_CARD)})) == (403, "parameter_not_allowed")
    method = {"type": "card", "card": card(GOOD_CARD)}
    assert refusal(lambda: client.v1.payment_methods.create(method)) == (403, "parameter_not_allowed")


def test_what_the_key_does_not_name_is_not_done(shop: Shop) -> None:
    client = shop.client()
    assert refusal(lambda: client.v1.customers.create({"name": "Grace"})) == (403, "endpoint_not_allowed")
    assert refusal(lambda: client.v1.customers.delete(shop.customer)) == (403, "endpoint_not_allowed")
    assert shop.direct.v1.customers.retrieve(shop.customer).id == shop.customer


# Subscriptions and invoices.

SUBSCRIPTIONS = ["POST /v1/subscriptions", "DELETE /v1/subscriptions/{subscription_exposed_id}"]
INVOICES = ["POST /v1/invoiceitems", "POST /v1/invoices", "POST /v1/invoices/{invoice}/pay"]


@pytest.mark.parametrize("endpoint", ["POST /v1/subscriptions", "POST /v1/invoices"])
def test_a_cap_alone_does_not_open_what_has_no_price(shop: Shop, endpoint: str) -> None:
    with pytest.raises(Refused) as refused:
        shop.key(endpoint)
    assert (refused.value.status, refused.value.error["param"]) == (400, "allowed_endpoints")


def test_a_subscription_is_made_and_ended_once_within_the_limit_per_request(shop: Shop) -> None:
    plan = shop.plan(1500)
    key = shop.key(*SUBSCRIPTIONS, daily_usd_cap="45.00", max_usd_per_request="20.00")
    client = client_of(shop.sidecar, key["vault_key"])
    params = {"customer": shop.customer, "items": [{"plan": plan.id}]}

    def subscribe(name: str) -> stripe.Subscription:
        return client.v1.subscriptions.create(params, {"idempotency_key": f"{shop.customer}:{name}"})

    first, again = subscribe("pro"), subscribe("pro")
    assert (first.status, replayed(first)) == ("active", False)
    assert (again.id, replayed(again)) == (first.id, True)
    assert [paid.amount for paid in shop.charges()] == [1500]
    assert 1500 <= cents(shop.counted(key)) <= 2000
    # A plain cancel bills nothing, so it is no money call.
    ended = client.v1.subscriptions.cancel(first.id)
    assert ended.status == "canceled"
    made = shop.direct.v1.subscriptions.list({"customer": shop.customer, "status": "all"}).data
    assert [subscription.id for subscription in made] == [first.id]
    assert cents(shop.counted(key)) <= 4500


def test_an_invoice_is_made_and_paid_once(shop: Shop) -> None:
    shop.subscribe_for_nothing()
    key = shop.key(*INVOICES, daily_usd_cap="100.00", max_usd_per_request="30.00")
    client = client_of(shop.sidecar, key["vault_key"])
    item = {"customer": shop.customer, "amount": 1500, "currency": "usd"}

    def once(name: str, call: Callable[[stripe.RequestOptions], Any]) -> Any:
        first, again = [call({"idempotency_key": f"{shop.customer}:{name}"}) for _ in range(2)]
        assert (again.id, replayed(first), replayed(again)) == (first.id, False, True)
        return first

    once("item", lambda options: client.v1.invoice_items.create(item, options))
    assert cents(shop.counted(key)) == 1500
    assert [added.amount for added in shop.items()] == [1500]
    invoice = once("invoice", lambda options: client.v1.invoices.create({"customer": shop.customer}, options))
    assert (invoice.amount_due, invoice.status) == (1500, "draft")
    paid = once("pay", lambda options: client.v1.invoices.pay(invoice.id, {}, options))
    assert (paid.id, paid.status, paid.amount_paid) == (invoice.id, "paid", 1500)
    assert [charged.amount for charged in shop.charges()] == [1500]
    assert 1500 <= cents(shop.counted(key)) <= 10_000


def test_an_invoice_item_above_the_cap_is_not_made(shop: Shop) -> None:
    client = shop.client("POST /v1/invoiceitems")
    item = {"customer": shop.customer, "amount": 3300, "currency": "usd"}
    add = {"idempotency_key": f"{shop.customer}:item"}
    assert refusal(lambda: client.v1.invoice_items.create(item, add)) == (429, "spend_cap_exceeded")
    assert shop.items() == []


def test_an_invoice_that_was_made_elsewhere_is_paid_within_the_cap(shop: Shop) -> None:
    item = {"customer": shop.customer, "amount": 3300, "currency": "usd"}
    shop.subscribe_for_nothing()
    shop.direct.v1.invoice_items.create(item)
    invoice = shop.direct.v1.invoices.create({"customer": shop.customer})
    pay = {"idempotency_key": f"{shop.customer}:pay"}
    tight = shop.client("POST /v1/invoices/{invoice}/pay")
    assert refusal(lambda: tight.v1.invoices.pay(invoice.id, {}, pay)) == (429, "spend_cap_exceeded")
    assert shop.charges() == []
    key = shop.key("POST /v1/invoices/{invoice}/pay", daily_usd_cap="33.00")
    client = client_of(shop.sidecar, key["vault_key"])
    for again in (False, True):
        paid = client.v1.invoices.pay(invoice.id, {}, pay)
        assert (paid.status, replayed(paid)) == ("paid", again)
    assert [charged.amount for charged in shop.charges()] == [3300]
    assert shop.counted(key) == ("33.00", "0.00")
