// One charge, as a Kestra Node task makes it. Node's SDK has no base path: it goes to the root of the sidecar.
import Stripe from 'stripe';

const sidecar = new URL(process.env.KEYBRAKE_URL);
const stripe = new Stripe(process.env.STRIPE_SECRET_KEY, {
  host: sidecar.hostname,
  port: sidecar.port,
  protocol: 'https',
});

const params = {amount: Number(process.env.AMOUNT_CENTS), currency: 'usd', customer: process.env.CUSTOMER};
const key = process.env.IDEMPOTENCY_KEY;
let told;
try {
  const charge = await stripe.charges.create(params, key ? {idempotencyKey: key} : {});
  told = {id: charge.id, paid: charge.paid, replayed: charge.lastResponse.headers['idempotent-replayed'] ?? null};
} catch (error) {
  told = {type: error.type, code: error.code, message: error.message, status: error.statusCode ?? null};
}
console.log(JSON.stringify(told));
