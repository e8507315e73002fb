// One charge in Node, without a helper: mint a vault key, charge with it under a key made from what is billed.
// `NODE_EXTRA_CA_CERTS` in the task's env names the sidecar's CA for both the minting and the SDK.
import {createHash} from 'node:crypto';
import {readFileSync} from 'node:fs';
import Stripe from 'stripe';

const sidecar = new URL(process.env.KEYBRAKE_URL ?? 'https://localhost:8443');
const period = process.env.PERIOD;
const line = JSON.parse(readFileSync('line.json', 'utf8'));
const price = JSON.parse(readFileSync('prices.json', 'utf8'))[line.plan];

const answer = await fetch(new URL('/admin/vault_keys', sidecar), {
  method: 'POST',
  headers: {Authorization: `Bearer ${process.env.KEYBRAKE_ISSUER_KEY}`, 'Content-Type': 'application/json'},
  body: JSON.stringify({
    label: `kestra-billing-${line.line_id}`,
    vendor: 'stripe',
    allowed_endpoints: ['POST /v1/charges'],
    daily_usd_cap: (price / 100).toFixed(2), // from the price list, not from the amount
    expires_in_seconds: 3600,
    constraints: {customer: [line.customer]}, // and nobody else
    remember_days: 400, // a replay may come months later
  }),
  signal: AbortSignal.timeout(30_000),
});
const told = await answer.json();
if (!answer.ok) throw new Error(`${told.error.code}: ${told.error.message}`);

// Node's SDK has no base path: it goes to the root of the sidecar.
const stripe = new Stripe(told.vault_key, {
  host: sidecar.hostname,
  port: Number(sidecar.port || 443),
  protocol: 'https',
});
// From what is billed: no amount, no execution, no attempt, no time.
const parts = [period, line.customer, line.line_id];
if (parts.some((part) => part === undefined || part === null || part === '')) {
  throw new Error('PERIOD, customer and line_id must all be given: they are what tells one charge from another');
}
const billed = JSON.stringify(parts.map(String));
const charge = await stripe.charges.create(
  {amount: line.cents, currency: 'usd', customer: line.customer},
  {idempotencyKey: `content-${createHash('sha256').update(billed).digest('hex')}`},
);
const replayed = charge.lastResponse.headers['idempotent-replayed'] === 'true';
console.log(JSON.stringify({id: charge.id, replayed}));
