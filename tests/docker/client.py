"""What a task asks of its sidecar, and what it is told, as one line of JSON.

    client.py mint CAP                                    a vault key for charges, with the worker's issuer key
    client.py charge VAULT_KEY CUSTOMER CENTS IDEMPOTENCY_KEY

Standard library only: SDKs would repeat a request by themselves.
"""

from __future__ import annotations

import json
import os
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request

TIMEOUT_S = 30.0


def ask(path: str, body: bytes, headers: dict[str, str]) -> dict[str, object]:
    request = urllib.request.Request(os.environ["KEYBRAKE_URL"] + path, body, headers)
    context = ssl.create_default_context(cafile=os.environ["KEYBRAKE_CA"])
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT_S, context=context)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        replayed = answer.headers["Idempotent-Replayed"] == "true"
        return {"status": answer.status, "replayed": replayed, "body": json.load(answer)}


def mint(cap: str) -> dict[str, object]:
    policy = {
        "label": "kestra-fleet",
        "vendor": "stripe",
        "allowed_endpoints": ["POST /v1/charges"],
        "daily_usd_cap": cap,
        "expires_in_seconds": 3600,
    }
    headers = {"Authorization": f"Bearer {os.environ['KEYBRAKE_ISSUER_KEY']}", "Content-Type": "application/json"}
    return ask("/admin/vault_keys", json.dumps(policy).encode(), headers)


def charge(vault_key: str, customer: str, cents: str, key: str) -> dict[str, object]:
    form = urllib.parse.urlencode({"amount": cents, "currency": "usd", "customer": customer})
    return ask("/v1/charges", form.encode(), {"Authorization": f"Bearer {vault_key}", "Idempotency-Key": key})


if __name__ == "__main__":
    print(json.dumps({"mint": mint, "charge": charge}[sys.argv[1]](*sys.argv[2:])))
