"""A billing task as most are written: it charges, then records the charge.

What Kestra would fill in ({{ inputs.… }}, {{ secret(…) }}) comes from the environment. With a Stripe key in it the
task talks to Stripe; with a vault key, the sidecar's address and its CA file in the same variables, to the sidecar.
"""

import json
import os

import stripe

stripe.api_key = os.environ["STRIPE_SECRET_KEY"]
stripe.api_base = os.environ.get("STRIPE_API_BASE", stripe.api_base)
stripe.ca_bundle_path = os.environ.get("STRIPE_CA_FILE", stripe.ca_bundle_path)

period = os.environ["BILLING_PERIOD"]


def write_charge_to_database(customer, charge_id):
    if os.environ.get("DATABASE_DOWN"):
        raise ConnectionError("the database is down")
    print(f"{customer} {charge_id}")


for item in json.loads(os.environ["ITEMS"]):
    charge = stripe.Charge.create(
        amount=item["amount_cents"],
        currency="usd",
        customer=item["id"],
        description=f"Subscription {period}",
    )
    write_charge_to_database(item["id"], charge["id"])
