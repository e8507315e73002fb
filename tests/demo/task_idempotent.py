"""The billing task with an idempotency key of its own, and the real Stripe key."""

import hashlib
import json
import os

import stripe

client = stripe.StripeClient(
    os.environ["STRIPE_SECRET_KEY"],
    base_addresses={"api": os.environ.get("STRIPE_API_BASE", "https://api.stripe.com")},
    max_network_retries=2,
)
period = os.environ["BILLING_PERIOD"]


def idempotency_key(customer):
    # Not of the amount: a corrected amount must not become a second charge.
    return hashlib.sha256(f"{customer}:{period}:kestra-billing".encode()).hexdigest()[:32]


def write_charge_to_database(customer, charge_id):
    if os.environ.get("DATABASE_DOWN"):
        raise ConnectionError("the database is down")
    print(f"{customer} {charge_id}")


for item in json.loads(os.environ["ITEMS"]):
    charge = client.v1.charges.create(
        params={
            "amount": item["amount_cents"],
            "currency": "usd",
            "customer": item["id"],
            "description": f"Subscription {period}",
        },
        options={"idempotency_key": idempotency_key(item["id"])},
    )
    write_charge_to_database(item["id"], charge.id)
