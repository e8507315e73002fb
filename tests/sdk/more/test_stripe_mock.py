"""stripe-python, through a sidecar, against stripe-mock: Stripe's own check of paths and parameters, from its OpenAPI
document.

It keeps no state and answers with fixtures, so whether an answer settles a call is not asked here, only what was
forwarded and whether Stripe's check let it pass.
"""

from __future__ import annotations

import re
import secrets
import sys
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
import stripe

import setup
from conftest import client_of
from rig.process import Child, wait_until
from rig.recorder import Exchange, Recorder
from rig.sidecar import Sidecar

STAMP = "metadata[keybrake_call]"
# What has to survive being read and written again.
ODD = "Müller & Söhne = 50% +tax; [x] 日本"


class StripeMock:
    """stripe-mock as a process of its own, on two loopback ports."""

    def __init__(self, workdir: Path) -> None:
        # It wants a key of three parts.
        self.secret_key = f"sk_test_{secrets.token_hex(24)}"
        # Without an address for TLS it would take one on every interface.
        anywhere = [option for scheme in ("http", "https") for option in (f"-{scheme}-addr", "127.0.0.1:0")]
        program = setup.go_home(Path(sys.executable)) / "stripe-mock"
        self._child = Child([str(program), *anywhere], {}, workdir / "stripe-mock.log")
        try:
            self.url = f"http://{wait_until('stripe-mock prints its address', self._address)}"
        except BaseException:
            self.stop()
            raise

    def _address(self) -> str | None:
        self._child.must_run("stripe-mock")
        found = re.search(r"HTTP at address: (127\.0\.0\.1:\d+)\n", self._child.log.read_text())
        return found[1] if found else None

    def stop(self) -> None:
        self._child.stop()


@dataclass
class Shop:
    """A client under a key that grants one operation and what that one needs."""

    client: stripe.StripeClient

    def options(self) -> stripe.RequestOptions:
        return {"idempotency_key": f"order-{secrets.token_hex(8)}"}

    def charge(self) -> str:
        """A charge that this ledger knows."""
        params = {"amount": 2000, "currency": "usd", "source": "tok_visa", "capture": False}
        return self.client.v1.charges.create(params, self.options()).id

    def intent(self) -> str:
        """A payment intent that this ledger knows."""
        params = {"amount": 2000, "currency": "usd", "capture_method": "manual", "confirm": True}
        return self.client.v1.payment_intents.create(
            {**params, "payment_method": "pm_card_visa", "return_url": "https://example.com/back"}, self.options()
        ).id


# With the object's id, parameters and options.
Call = Callable[[Shop, str, "dict[str, Any]", stripe.RequestOptions], Any]


@dataclass(frozen=True)
class Operation:
    """An operation with parameters as rich as a flow would send them."""

    name: str
    call: Call
    params: dict[str, Any]
    # What makes the object that it is about, and the operation that does; otherwise an id of anything will do.
    needs: Callable[[Shop], str] | None = None
    also: str = ""
    policy: dict[str, Any] = field(default_factory=dict)
    stamped: bool = False


def on(service: str, method: str) -> Call:
    """A method of the SDK about an object."""

    def call(shop: Shop, target: str, params: dict[str, Any], options: stripe.RequestOptions) -> Any:
        return getattr(getattr(shop.client.v1, service), method)(target, params, options)

    return call


def new(service: str) -> Call:
    """A method of the SDK that makes an object."""

    def call(shop: Shop, _: str, params: dict[str, Any], options: stripe.RequestOptions) -> Any:
        made = shop.client.v1
        for name in service.split("."):
            made = getattr(made, name)
        return made.create(params, options)

    return call


ADDRESS = {"line1": "1 Main St", "city": "Town", "postal_code": "12345", "country": "US"}
METADATA = {"order": "6735", "odd": ODD}
PRICE_DATA = {"currency": "usd", "unit_amount": 1500, "product": "prod_1"}
ITEMS = [{"price": "price_1", "quantity": 2}, {"price": "price_2", "quantity": 1, "metadata": {"seat": "b"}}]
CHARGES, INTENTS = "POST /v1/charges", "POST /v1/payment_intents"
INVOICE = "/v1/invoices/{invoice}"
SUBSCRIPTION = "/v1/subscriptions/{subscription_exposed_id}"

OPERATIONS = [
    Operation(
        CHARGES,
        new("charges"),
        {
            "amount": 2000,
            "currency": "usd",
            "customer": "cus_1",
            "source": "tok_visa",
            "description": ODD,
            "receipt_email": "a+b@example.com",
            "statement_descriptor_suffix": "JULY",
            "shipping": {"name": ODD, "address": ADDRESS},
            "capture": False,
            "metadata": METADATA,
        },
        stamped=True,
    ),
    Operation(
        f"{CHARGES}/{{charge}}/capture",
        on("charges", "capture"),
        {"amount": 1500, "statement_descriptor_suffix": "JULY"},
        needs=Shop.charge,
        also=CHARGES,
    ),
    Operation(
        INTENTS,
        new("payment_intents"),
        {
            "amount": 2000,
            "currency": "usd",
            "customer": "cus_1",
            "payment_method": "pm_card_visa",
            "payment_method_types": ["card", "link"],
            "payment_method_options": {"card": {"request_three_d_secure": "any"}},
            "confirm": True,
            "off_session": True,
            "description": ODD,
            "shipping": {"name": ODD, "address": ADDRESS},
            "metadata": METADATA,
        },
        stamped=True,
    ),
    Operation(
        f"{INTENTS}/{{intent}}/confirm",
        on("payment_intents", "confirm"),
        {"payment_method": "pm_card_visa", "return_url": "https://example.com/back?a=b&c=d"},
        needs=Shop.intent,
        also=INTENTS,
    ),
    Operation(
        f"{INTENTS}/{{intent}}/capture",
        on("payment_intents", "capture"),
        {"amount_to_capture": 1500, "metadata": METADATA},
        needs=Shop.intent,
        also=INTENTS,
    ),
    Operation(
        f"{INTENTS}/{{intent}}/increment_authorization",
        on("payment_intents", "increment_authorization"),
        {"amount": 2500, "description": ODD},
        needs=Shop.intent,
        also=INTENTS,
    ),
    Operation(
        f"{INTENTS}/{{intent}}/cancel",
        on("payment_intents", "cancel"),
        {"cancellation_reason": "requested_by_customer"},
        needs=Shop.intent,
        also=INTENTS,
    ),
    Operation(
        "POST /v1/refunds",
        new("refunds"),
        {"amount": 500, "reason": "requested_by_customer", "metadata": METADATA},
        needs=Shop.charge,
        also=CHARGES,
        stamped=True,
    ),
    Operation(
        "POST /v1/customers",
        new("customers"),
        {
            "name": ODD,
            "email": "a+b@example.com",
            "address": ADDRESS,
            "preferred_locales": ["de", "en"],
            "invoice_settings": {"custom_fields": [{"name": "VAT", "value": "1"}, {"name": "Ref", "value": ODD}]},
            "metadata": METADATA,
        },
    ),
    Operation("POST /v1/customers/{customer}", on("customers", "update"), {"name": ODD, "metadata": {"order": ""}}),
    Operation("DELETE /v1/customers/{customer}", on("customers", "delete"), {}),
    Operation("POST /v1/payment_methods/{payment_method}", on("payment_methods", "update"), {"metadata": METADATA}),
    Operation(
        "POST /v1/payment_methods/{payment_method}/attach", on("payment_methods", "attach"), {"customer": "cus_1"}
    ),
    Operation("POST /v1/products", new("products"), {"name": ODD, "metadata": METADATA}),
    Operation(
        "POST /v1/prices",
        new("prices"),
        {"currency": "usd", "unit_amount": 1500, "recurring": {"interval": "month"}, "product": "prod_1"},
    ),
    Operation(
        "POST /v1/plans",
        new("plans"),
        {"currency": "usd", "amount": 1500, "interval": "month", "product": {"name": ODD}},
    ),
    Operation(
        "POST /v1/subscriptions",
        new("subscriptions"),
        {
            "customer": "cus_1",
            "items": ITEMS,
            "add_invoice_items": [{"price_data": PRICE_DATA, "quantity": 1}],
            "payment_behavior": "error_if_incomplete",
            "metadata": METADATA,
        },
    ),
    Operation(
        f"POST {SUBSCRIPTION}",
        on("subscriptions", "update"),
        {"items": [{"id": "si_1", "quantity": 3}, {"id": "si_2", "deleted": True}], "metadata": METADATA},
    ),
    Operation(
        f"DELETE {SUBSCRIPTION}",
        on("subscriptions", "cancel"),
        {"invoice_now": True, "prorate": True, "cancellation_details": {"comment": ODD}},
    ),
    Operation(
        "POST /v1/invoiceitems",
        new("invoice_items"),
        {"customer": "cus_1", "amount": 1500, "currency": "usd", "description": ODD, "metadata": METADATA},
    ),
    Operation(
        "POST /v1/invoices",
        new("invoices"),
        {
            "customer": "cus_1",
            "currency": "usd",
            "auto_advance": False,
            "pending_invoice_items_behavior": "include",
            "custom_fields": [{"name": "Order", "value": ODD}],
            "metadata": METADATA,
        },
    ),
    Operation(f"POST {INVOICE}", on("invoices", "update"), {"description": ODD, "metadata": METADATA}),
    Operation(
        f"POST {INVOICE}/add_lines",
        on("invoices", "add_lines"),
        {"lines": [{"amount": 700, "description": ODD}, {"price_data": PRICE_DATA, "quantity": 2}]},
    ),
    Operation(f"POST {INVOICE}/finalize", on("invoices", "finalize_invoice"), {"auto_advance": False}),
    Operation(f"POST {INVOICE}/pay", on("invoices", "pay"), {"payment_method": "pm_1", "off_session": True}),
    Operation(
        "POST /v1/transfers",
        new("transfers"),
        {
            "amount": 700,
            "currency": "usd",
            "destination": "acct_1032D82eZvKYlo2C",
            "transfer_group": "ORDER_95",
            "metadata": METADATA,
        },
        policy={"constraints": {"destination": ["acct_1032D82eZvKYlo2C"]}},
    ),
    Operation(
        "POST /v1/payouts",
        new("payouts"),
        {"amount": 700, "currency": "usd", "description": ODD, "metadata": METADATA},
    ),
    Operation(
        "POST /v1/checkout/sessions",
        new("checkout.sessions"),
        {
            "mode": "payment",
            "line_items": [
                {"price": "price_1", "quantity": 2},
                {
                    "price_data": {"currency": "usd", "unit_amount": 1500, "product_data": {"name": ODD}},
                    "quantity": 1,
                },
            ],
            "success_url": "https://example.com/done?session={CHECKOUT_SESSION_ID}",
            "metadata": METADATA,
        },
    ),
]

POLICIES = {
    "capped": {"daily_usd_cap": "1000.00", "max_usd_per_request": "100.00", "daily_usd_out_cap": "1000.00"},
    "uncapped": {"daily_usd_cap": None, "uncapped": True},
}


@pytest.fixture(scope="module")
def stripe_mock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StripeMock]:
    mock = StripeMock(tmp_path_factory.mktemp("stripe-mock"))
    yield mock
    mock.stop()


@pytest.fixture
def recorded(stripe_mock: StripeMock, tmp_path: Path) -> Iterator[tuple[Sidecar, Recorder]]:
    """A ledger for each test: every charge that stripe-mock makes has the same id."""
    with Recorder(stripe_mock.url) as recorder:
        with Sidecar(tmp_path, stripe_base=recorder.url, stripe_key=stripe_mock.secret_key) as sidecar:
            yield sidecar, recorder


@pytest.mark.parametrize("limits", POLICIES)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_what_is_forwarded_passes_stripes_own_check(
    recorded: tuple[Sidecar, Recorder], stripe_mock: StripeMock, operation: Operation, limits: str
) -> None:
    sidecar, recorder = recorded
    endpoints = [name for name in (operation.name, operation.also) if name]
    policy = {"allowed_endpoints": endpoints, **POLICIES[limits], **operation.policy}
    shop = Shop(client_of(sidecar, sidecar.issue("stripe-mock", **policy)["vault_key"]))
    target = operation.needs(shop) if operation.needs else "xx_123"
    params = dict(operation.params)
    if operation.name == "POST /v1/refunds":
        params["charge"] = target
    options = shop.options()
    may_be_in_doubt(lambda: operation.call(shop, target, params, options))

    key = options["idempotency_key"]
    [forwarded] = [seen for seen in recorder.requests if seen.headers.get("idempotency-key") == key]
    assert forwarded.status == 200, forwarded.answer
    assert forwarded.method == operation.name.split(" ")[0]
    assert forwarded.headers["authorization"] == f"Bearer {stripe_mock.secret_key}"
    assert_parameters(forwarded, params, operation.stamped)


def test_stripes_own_check_is_one(recorded: tuple[Sidecar, Recorder]) -> None:
    """Without this one the others would prove nothing."""
    sidecar, recorder = recorded
    key = sidecar.issue("stripe-mock")
    client = client_of(sidecar, key["vault_key"])
    params = {"amount": 2000, "currency": "usd", "source": "tok_visa"}
    for wrong in ({"capture": "perhaps"}, {"no_such_parameter": "1"}, {"shipping": {"no_such_parameter": "1"}}):
        with pytest.raises(stripe.InvalidRequestError):
            client.v1.charges.create({**params, **wrong}, {"idempotency_key": f"order-{secrets.token_hex(8)}"})
    assert [seen.status for seen in recorder.requests if seen.path == "/v1/charges"] == [400] * 3
    assert sidecar.spend_today(key["id"])["held"] == "0.00"


def may_be_in_doubt(call: Callable[[], Any]) -> None:
    """A fixture may not say what became of the money; every other error is one."""
    try:
        call()
    except stripe.APIError as error:
        assert error.json_body["error"]["code"] == "outcome_unknown", error


def assert_parameters(forwarded: Exchange, params: dict[str, Any], stamped: bool) -> None:
    """All that the SDK was given arrived as it would have without a sidecar, and nothing else but the stamp."""
    sent = dict(flat(params))
    arrived = forwarded.form
    stamp = arrived.pop(STAMP, None)
    assert arrived == sent
    assert stamp or not stamped


def flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Parameters as the SDK writes them: `items[0][price]`."""
    if isinstance(value, (dict, list)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            yield from flat(inner, f"{name}[{key}]" if name else str(key))
    else:
        yield name, str(value).lower() if isinstance(value, bool) else str(value)
