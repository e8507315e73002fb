#!/bin/sh
# A sidecar in front of your own Stripe account, on the defaults. Asks for what it lacks, makes an admin key once and
# keeps it, says how to use both, and becomes `keybrake serve`. Any KEYBRAKE_* variable is honoured.
set -eu
cd "$(dirname "$0")/.."

if [ -z "${KEYBRAKE_STRIPE_SECRET_KEY:-}${KEYBRAKE_STRIPE_SECRET_KEY_FILE:-}" ]; then
  KEYBRAKE_STRIPE_SECRET_KEY=${STRIPE_SECRET_KEY:-}
  if [ -z "$KEYBRAKE_STRIPE_SECRET_KEY" ] && [ -t 0 ]; then
    # Not shown, and not on the disk: it is asked for again next time.
    trap 'stty echo' EXIT
    trap 'exit 130' INT TERM
    stty -echo
    echo 'KEYBRAKE_STRIPE_SECRET_KEY is not set.' >&2
    printf 'Your Stripe key, best a restricted one of test mode (rk_test_...): ' >&2
    IFS= read -r KEYBRAKE_STRIPE_SECRET_KEY || :
    stty echo
    trap - EXIT INT TERM
    printf '\n' >&2
  fi
  if [ -z "$KEYBRAKE_STRIPE_SECRET_KEY" ]; then
    echo 'run: no Stripe key. Set KEYBRAKE_STRIPE_SECRET_KEY (or STRIPE_SECRET_KEY) to rk_test_... or sk_test_...,' >&2
    echo 'run: or KEYBRAKE_STRIPE_SECRET_KEY_FILE to a file that holds it.' >&2
    exit 64
  fi
  export KEYBRAKE_STRIPE_SECRET_KEY
fi
# One copy of the real key is enough.
unset STRIPE_SECRET_KEY

case ${KEYBRAKE_STRIPE_SECRET_KEY:-} in
  sk_live_* | rk_live_*) echo 'run: this is a live key: charges move real money.' >&2 ;;
esac

cargo build --locked --quiet --bin keybrake

data=${KEYBRAKE_DATA_DIR:-keybrake-data}
if [ -n "${KEYBRAKE_ADMIN_KEY:-}" ]; then
  admin_key='the value of KEYBRAKE_ADMIN_KEY'
else
  KEYBRAKE_ADMIN_KEY_FILE=${KEYBRAKE_ADMIN_KEY_FILE:-$data/admin.key}
  if [ ! -s "$KEYBRAKE_ADMIN_KEY_FILE" ]; then
    (
      umask 077
      mkdir -p "$(dirname "$KEYBRAKE_ADMIN_KEY_FILE")"
      od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$KEYBRAKE_ADMIN_KEY_FILE.new"
      mv "$KEYBRAKE_ADMIN_KEY_FILE.new" "$KEYBRAKE_ADMIN_KEY_FILE"
    )
  fi
  export KEYBRAKE_ADMIN_KEY_FILE
  unset KEYBRAKE_ADMIN_KEY
  admin_key="$KEYBRAKE_ADMIN_KEY_FILE (made once, kept)"
fi

listen=${KEYBRAKE_LISTEN:-127.0.0.1:8443}
listen=${listen%%,*}
url=https://localhost:${listen##*:}
ca=$data/tls/ca.pem
export KEYBRAKE_LOG_FORMAT="${KEYBRAKE_LOG_FORMAT:-pretty}"

cat <<EOF
address    $url/stripe   (SDKs without a base path, Node and Go: $url)
CA file    $ca
admin key  $admin_key

In another terminal, in $(pwd):

EOF
[ -n "${KEYBRAKE_ADMIN_KEY:-}" ] || printf 'export KEYBRAKE_ADMIN_KEY=$(cat %s)\n' "'$KEYBRAKE_ADMIN_KEY_FILE'"
cat <<EOF

# curl: a vault key for one charge of at most 32.99 USD within the hour
curl --cacert '$ca' $url/admin/vault_keys \\
  -H "Authorization: Bearer \$KEYBRAKE_ADMIN_KEY" -H 'Content-Type: application/json' \\
  -d '{"label": "first-try", "vendor": "stripe", "allowed_endpoints": ["POST /v1/charges"],
       "daily_usd_cap": 32.99, "expires_in_seconds": 3600}'

# Python (pip install stripe httpx): the same, then the charge. Run it twice: one charge.
import os, ssl, httpx, stripe

resp = httpx.post(
    "$url/admin/vault_keys",
    headers={"Authorization": f"Bearer {os.environ['KEYBRAKE_ADMIN_KEY']}"},
    json={
        "label": "first-try",
        "vendor": "stripe",
        "allowed_endpoints": ["POST /v1/charges"],
        "daily_usd_cap": 32.99,
        "expires_in_seconds": 3600,
    },
    verify=ssl.create_default_context(cafile="$ca"),
)
resp.raise_for_status()
stripe.ca_bundle_path = "$ca"
client = stripe.StripeClient(resp.json()["vault_key"], base_addresses={"api": "$url/stripe"})
charge = client.v1.charges.create(
    {"amount": 2999, "currency": "usd", "source": "tok_visa"},
    {"idempotency_key": "first-try"},
)
print(charge.id, charge.last_response.headers.get("Idempotent-Replayed"))
# end

EOF
exec "${CARGO_TARGET_DIR:-target}/debug/keybrake" serve
