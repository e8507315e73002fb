"""The billing task with a vault key for each customer, but without idempotency keys."""

import json
import os
import ssl

import httpx
import stripe

period = os.environ["BILLING_PERIOD"]
stripe.ca_bundle_path = os.environ["KEYBRAKE_CA"]
with open(os.environ["PRICE_LIST"]) as file:
    price_list = json.load(file)


def issue_vault_key(customer):
    # The cap comes from the price list, never from the amount about to be charged: that may be the very mistake.
    price_cents = price_list[customer]
    resp = httpx.post(
        f"{os.environ['KEYBRAKE_URL']}/admin/vault_keys",
        headers={"Authorization": f"Bearer {os.environ['KEYBRAKE_ISSUER_KEY']}"},
        json={
            "label": f"kestra-billing-{customer}",
            "vendor": "stripe",
            "allowed_endpoints": ["POST /v1/charges"],
            "daily_usd_cap": round(price_cents / 100 * 1.1, 2),
            "expires_in_seconds": 3600,
            # The default mode refuses a money call without a key of the caller's own.
            "idempotency": "client",
        },
        verify=ssl.create_default_context(cafile=os.environ["KEYBRAKE_CA"]),
        timeout=5.0,
    )
    resp.raise_for_status()
    return resp.json()["vault_key"]


def write_charge_to_database(customer, charge_id):
    if os.environ.get("DATABASE_DOWN"):
        raise ConnectionError("the database is down")
    print(f"{customer} {charge_id}")


for item in json.loads(os.environ["ITEMS"]):
    client = stripe.StripeClient(
        issue_vault_key(item["id"]),
        base_addresses={"api": f"{os.environ['KEYBRAKE_URL']}/stripe"},
    )
    charge = client.v1.charges.create(
        params={
            "amount": item["amount_cents"],
            "currency": "usd",
            "customer": item["id"],
            "description": f"Subscription {period}",
        },
    )
    write_charge_to_database(item["id"], charge.id)
