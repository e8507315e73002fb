//! Calls as the proxy has them, for a ledger alone: what one says is made before the time is taken.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use keybrake::call::{Estate, KeyBasis, Outcome, StoredAnswer, fingerprint, identity_of_caller_key};
use keybrake::hold::{ExactRequest, Facts, Lane};
use keybrake::id::{CallId, HoldId, KeyId};
use keybrake::intent::{Claim, Intent};
use keybrake::key::{Caps, Idempotency, Key};
use keybrake::ledger::rules::Admit;
use keybrake::ledger::rules::resolve::Resolve;
use keybrake::ledger::{Admitted, Ledger};
use keybrake::money::{Currency, MicroUsd, Money, Rate, Rates};
use keybrake::random;
use keybrake::secret::Mode;
use keybrake::time::{DAY_MS, UnixMs};

use crate::stub;

const MINOR: u64 = 100;
const OPERATION: &str = "POST /v1/charges";

/// A call that only has to be made.
pub(crate) struct Call {
    key: KeyId,
    pub(crate) admit: Admit,
    pub(crate) resolve: Resolve,
}

/// What calls came to.
pub(crate) struct Pass {
    /// Ascending.
    latencies: Vec<Duration>,
    pub(crate) elapsed: Duration,
    /// Of this whole process, callers and writer.
    pub(crate) cpu: Duration,
}

impl Pass {
    pub(crate) fn new(mut latencies: Vec<Duration>, elapsed: Duration, cpu: Duration) -> Self {
        latencies.sort_unstable();
        Self { latencies, elapsed, cpu }
    }

    pub(crate) fn percentile_us(&self, per_cent: usize) -> f64 {
        let at = (self.latencies.len() * per_cent).div_ceil(100).saturating_sub(1);
        self.latencies.get(at).map_or(f64::NAN, |latency| latency.as_secs_f64() * 1e6)
    }

    pub(crate) fn worst_us(&self) -> f64 {
        self.percentile_us(100)
    }

    pub(crate) fn calls(&self) -> f64 {
        f64::from(u32::try_from(self.latencies.len()).unwrap_or(u32::MAX))
    }
}

impl Call {
    /// A charge under an idempotency key of its own, and its answer.
    pub(crate) fn new(ledger: &Ledger, key: KeyId, number: u64, at: UnixMs) -> Self {
        // Not a name of the load's, which asks the sidecar on the same ledger for other charges.
        let name = format!("billing:ledger:{number}");
        let customer = format!("cus_{}", number % 5_000);
        let params = [
            ("amount", MINOR.to_string()),
            ("currency", "usd".to_owned()),
            ("customer", customer.clone()),
            ("description", "billing run".to_owned()),
            ("source", "tok_visa".to_owned()),
        ];
        let request = ExactRequest {
            method: "POST".to_owned(),
            path: "/v1/charges".to_owned(),
            params: params.map(|(name, value)| (name.to_owned(), value)).into(),
            version: None,
            account: None,
            idempotency_key: None,
        };
        let estate = Estate { account: "acct_1PBenchBench".to_owned(), mode: Mode::Test };
        let (fingerprint, digests) =
            fingerprint(ledger.salt(), OPERATION, &request.path, "", &request.params);
        let object = format!("ch_1PBench{number:014}");
        let seen_request_id = format!("req_kb_{number:014}");
        let facts = Facts {
            request_id: seen_request_id.clone(),
            method: request.method.clone(),
            endpoint: request.path.clone(),
            customer: Some(customer),
            ..Facts::default()
        };
        let intent = Intent {
            operation: OPERATION.to_owned(),
            claim: Claim::Create {
                lane: Lane::In,
                money: Money { minor: MINOR, currency: Currency::USD },
                rate: Rate::USD,
            },
            identity: identity_of_caller_key(&estate, &name),
            basis: KeyBasis::Caller(name),
            fingerprint,
            params: digests,
            request,
            stamp_param: Some("metadata[keybrake_call]".to_owned()),
            facts,
            estate,
            open_constraints: Vec::new(),
            rates: Arc::new(Rates::new(Vec::new())),
            seen: None,
            payable_after_decline: false,
            read_against: None,
            pin: None,
        };
        let admit = Admit {
            intent,
            call_id: CallId::new(at, random::bytes()),
            hold_id: HoldId::new(at, random::bytes()),
            boot: ledger.boot(),
            may_go: true,
            may_wait: false,
            duration_ms: 1,
        };
        Self { key, admit, resolve: answered(number, object, seen_request_id, at) }
    }

    /// Reserves and settles, and tells how long both took.
    pub(crate) async fn make(self, ledger: &Ledger) -> Result<Duration> {
        let begun = Instant::now();
        let Admitted::Held(held) = ledger.admit(self.key, self.admit).await? else {
            bail!("a call was not let through");
        };
        ledger.resolve(held, self.resolve).await?;
        Ok(begun.elapsed())
    }
}

/// Stripe executed it.
fn answered(number: u64, object: String, seen_request_id: String, at: UnixMs) -> Resolve {
    let stripe_request_id = format!("req_{number:014}");
    let answer = StoredAnswer {
        status: 200,
        content_type: "application/json".to_owned(),
        request_id: stripe_request_id.clone(),
        body: stub::charge(&object, &MINOR.to_string()).into_bytes(),
        at,
    };
    Resolve {
        outcome: Outcome::Spent { minor: MINOR },
        objects: vec![object],
        answer: Some(answer),
        seen_request_id,
        stripe_request_id: Some(stripe_request_id),
        upstream_status: Some(200),
        duration_ms: 80,
    }
}

/// A key that lives for 31 days and is not refused anything.
pub(crate) fn vault_key(number: u64, now: UnixMs, remember_days: u32) -> Result<Key> {
    Ok(Key {
        id: KeyId::new(now, random::bytes()),
        digest: random::bytes(),
        label: format!("kestra-billing-{}", number % 500),
        vendor: "stripe".to_owned(),
        grants: Vec::new(),
        caps: Caps { daily: Some(dollars("900000000.00")?), ..Caps::default() },
        idempotency: Idempotency::Required,
        remember_days,
        client_secrets: false,
        metadata: vec![("flow".to_owned(), format!("flow-{}", number % 30))],
        created_at: now,
        expires_at: now.plus_millis(31 * DAY_MS),
        revoked_at: None,
        closed_at: None,
        issuer: None,
        budget: None,
        constraints: Vec::new(),
        accounts: Vec::new(),
        stop_budget_on_refusal: false,
        retry_declined_after_s: None,
        requests_per_second: None,
    })
}

fn dollars(text: &str) -> Result<MicroUsd> {
    MicroUsd::parse_dollars(text).ok().context("no dollars")
}

/// The time on a processor of all threads that run, which the kernel tells in nanoseconds.
pub(crate) fn cpu() -> Result<Duration> {
    let mut total = 0;
    for thread in std::fs::read_dir("/proc/self/task")? {
        // A thread that has just ended tells nothing.
        let told = std::fs::read_to_string(thread?.path().join("schedstat")).unwrap_or_default();
        total += told.split_whitespace().next().and_then(|nanos| nanos.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(Duration::from_nanos(total))
}
