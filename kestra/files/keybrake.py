"""Keybrake in a script of a Kestra task: mint a vault key, charge with it, ask what was charged before.

    import keybrake

    key = keybrake.issue("kestra-billing-L1", cap_usd="29.99", scope="billing:2026-07",
                         fields=["customer", "metadata[line_id]"])
    client = keybrake.client(key)
    charge = client.v1.charges.create({"amount": 2999, "currency": "usd", "customer": "cus_9",
                                       "metadata": {"line_id": "L1"}})
    print(charge.id, keybrake.replayed(charge))

A namespace file: `namespaceFiles: {enabled: true, include: [keybrake.py]}` puts it beside the script. It needs `stripe`
(with `requests`, which comes along) and the standard library, Python 3.9 or later. What it reads of the environment:

    KEYBRAKE_URL          where the sidecar is; https://localhost:8443 unless given
    KEYBRAKE_CA           file with the CA that the sidecar's certificate is checked against; required
    KEYBRAKE_ISSUER_KEY   what `issue` and `charged` show; an issuer key (`keybrake issuers create`), never the admin key
    KEYBRAKE_CONTEXT      `name=value` pairs, separated by spaces, that stand in every audit record of the client's calls:
                          "flow={{ flow.id }} execution={{ execution.id }} attempt={{ taskrun.attemptsCount }}"

A script sees more than it needs of its worker's environment, so it must not be given the real Stripe key anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Mapping, Sequence

import requests
import stripe

__all__ = ["Refused", "VaultKey", "charged", "client", "code", "idempotency_key", "issue", "replayed", "usd"]

TIMEOUT_S = 30.0
# A sidecar that was killed is back within seconds; a key that nobody received does no harm.
PAUSES_S = (0.25, 0.5, 1.0, 2.0, 4.0)
CONTEXT_CHARS_MAX = 200
# Of 1,000 rows each.
PAGES_MAX = 20
# Outcomes after which money moved, may still move, or nobody knows.
COUNTED = frozenset({"spent", "held", "pending", "doubt"})


class Refused(Exception):
    """The sidecar said no; `code` is one of those that https://localhost:8443/keybrake/errors explains."""

    def __init__(self, status: int, code: str, message: str, param: str | None) -> None:
        super().__init__(f"{code} ({status}): {message}")
        self.status = status
        self.code = code
        self.param = param


@dataclass(frozen=True)
class VaultKey:
    """A key that was minted. Give `secret` to a Stripe SDK; do not print it, nor give it to another task."""

    id: str
    label: str
    expires_at: str
    secret: str = field(repr=False)


def issue(
    label: str,
    *,
    cap_usd: Decimal | str | int,
    scope: str | None = None,
    fields: Sequence[str] | None = None,
    endpoints: Sequence[str] = ("POST /v1/charges",),
    minutes: int = 60,
    **more: Any,
) -> VaultKey:
    """Mints a vault key with the issuer key.

    `cap_usd` is all that the key may spend, in dollars: from a price list, not from the amount about to be charged.

    With a `scope` the key is in `content` mode: operation, scope and the values of `fields` (the customer unless given)
    are what makes two calls the same, and idempotency keys are ignored. The scope is what is billed for: a period, the
    id of an event; never an execution, an attempt or a time, which are new on each retry, restart or replay. Without a
    scope each money call needs an idempotency key of its own: see `idempotency_key`.

    `more` is any other field of a vault key: `budget`, `stop_budget_on_refusal`, `max_usd_per_request`, `metadata`, …

    Raises `Refused`, or `OSError` when no sidecar answers.
    """
    policy: dict[str, Any] = {
        "label": label,
        "vendor": "stripe",
        "allowed_endpoints": list(endpoints),
        "daily_usd_cap": _dollars(cap_usd),
        "expires_in_seconds": minutes * 60,
        **more,
    }
    if scope is not None:
        policy.update(idempotency="content", idempotency_scope=scope)
    if fields is not None:
        policy["idempotency_fields"] = list(fields)
    told = _call("POST", "/admin/vault_keys", policy)
    return VaultKey(told["id"], told["label"], told["expires_at"], told["vault_key"])


def client(key: VaultKey) -> stripe.StripeClient:
    """A Stripe client that goes through the sidecar with this key, and tells it which execution is asking."""
    stripe.ca_bundle_path = _required("KEYBRAKE_CA")
    session = requests.Session()
    # A proxy that the environment names is not asked: the sidecar is next door.
    session.trust_env = False
    session.headers.update(_context())
    return stripe.StripeClient(
        key.secret,
        base_addresses={"api": f"{_url()}/stripe"},
        http_client=stripe.RequestsClient(session=session),
    )


def idempotency_key(*parts: str | int) -> str:
    """An idempotency key made from what is billed, the same in every run: `idempotency_key("2026-07", "cus_9", "L1")`.

    Give it what tells one charge from another and nothing that changes when the script runs again. The amount is none
    of it: with another amount the same charge is an error (`idempotency_error`), not a second charge.
    """
    if not parts or any(part is None or part == "" for part in parts):
        raise ValueError("an idempotency key is made from at least one part, and no part may be empty")
    # As JSON, so that ("a", "bc") and ("ab", "c") are two; of characters, as every language writes it.
    content = json.dumps([str(part) for part in parts], separators=(",", ":"), ensure_ascii=False)
    return f"content-{hashlib.sha256(content.encode()).hexdigest()}"


def charged(**filters: str) -> list[dict[str, Any]]:
    """Calls that the audit log has with these filters and that moved money, may have, or still may.

    `charged(customer="cus_9", **{"metadata[period]": "2026-07"})`. Filters are those of `GET /audit`; an issuer key sees
    the records under its label prefix. This is advice: between the answer and the charge somebody else may charge, and
    another sidecar's ledger is not asked. What keeps a customer from being charged twice is the scope or the
    idempotency key of the charge itself. Raises `Refused`, or `OSError` when no sidecar answers: that is not "no".
    """
    rows: list[dict[str, Any]] = []
    cursor: str | None = None
    for _ in range(PAGES_MAX):
        asked = {**filters, "limit": "1000", **({"cursor": cursor} if cursor else {})}
        page = _call("GET", f"/audit?{urllib.parse.urlencode(asked)}")
        rows += [row for row in page["data"] if row["outcome"] in COUNTED]
        cursor = page["next_cursor"]
        if not page["has_more"]:
            return rows
    raise ValueError(f"more than {PAGES_MAX * 1000} records: ask with more filters")


def replayed(answer: stripe.StripeObject) -> bool:
    """Whether this answer was remembered: nothing was sent to Stripe for it."""
    response = answer.last_response
    headers = response.headers if response is not None else {}
    return any(name.lower() == "idempotent-replayed" and value == "true" for name, value in headers.items())


def code(error: stripe.StripeError) -> str | None:
    """The code of a refusal, such as `spend_cap_exceeded`; the SDK's own `.code` is None for several of its errors."""
    body = error.json_body
    told = body.get("error") if isinstance(body, Mapping) else None
    return told.get("code") if isinstance(told, Mapping) else None


def usd(cents: int) -> Decimal:
    """Dollars of a price in cents, exactly."""
    return Decimal(cents) / 100


def _dollars(amount: Decimal | str | int) -> str:
    if isinstance(amount, (bool, float)):
        raise TypeError("give dollars as a str, an int or a Decimal: a float is not what the price list says")
    return str(amount)


def _url() -> str:
    return (os.environ.get("KEYBRAKE_URL") or "https://localhost:8443").rstrip("/")


def _required(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise KeyError(f"{name} is not set: the flow must give it in `env`")
    return value


def _context() -> dict[str, str]:
    pairs = (pair.partition("=") for pair in os.environ.get("KEYBRAKE_CONTEXT", "").split())
    # One that Kestra rendered as nothing is left out, and a long one is cut: the sidecar refuses such headers, and no label
    # that somebody chose may keep a charge from being made.
    return {f"Keybrake-Context-{name}": value[:CONTEXT_CHARS_MAX] for name, _, value in pairs if value}


def _call(method: str, path: str, body: Any = None) -> Any:
    trust = ssl.create_default_context(cafile=_required("KEYBRAKE_CA"))
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trust)
    )
    request = urllib.request.Request(
        f"{_url()}{path}",
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={
            "Authorization": f"Bearer {_required('KEYBRAKE_ISSUER_KEY')}",
            "Content-Type": "application/json",
        },
    )
    pauses = iter(PAUSES_S)
    while True:
        try:
            with opener.open(request, timeout=TIMEOUT_S) as answer:
                return json.load(answer)
        except OSError as error:
            pause = next(pauses, None) if _may_pass(error) else None
            if pause is None:
                raise (_refused(error) if isinstance(error, urllib.error.HTTPError) else error) from None
        time.sleep(pause)


def _may_pass(error: OSError) -> bool:
    """Whether the same question may get an answer in a moment: nobody listens yet, or it is not ready."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code == 503
    # A certificate that does not verify will not do so later.
    return not isinstance(getattr(error, "reason", None), ssl.SSLError)


def _refused(error: urllib.error.HTTPError) -> Refused:
    with error:
        try:
            told = json.load(error)["error"]
            return Refused(error.code, told["code"], told["message"], told.get("param"))
        except (ValueError, KeyError, TypeError):
            return Refused(error.code, "unreadable", "the answer is not one of Keybrake's: is KEYBRAKE_URL right?", None)
