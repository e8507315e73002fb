//! The table of answers, one row at a time: what each answer of Stripe's, or its absence, does to the money, to the
//! call and to the next same call.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde_json::{Value, json};

use crate::standin::engine::Seen;
use crate::standin::faults::{Fault, On};
use crate::standin::{Options, Standin};
use crate::support::{Reply, STRIPE_KEY, Sidecar, free_port, world, world_of, world_with};

/// What one send is expected to leave behind.
#[derive(Debug, PartialEq, Eq)]
struct Trace {
    status: u16,
    code: String,
    /// `Stripe-Should-Retry`.
    retry: Option<String>,
    /// `Keybrake-Outcome`.
    outcome: Option<String>,
    /// Spent, held, doubt.
    spend: (String, String, String),
    holds: Vec<String>,
    /// The call's state and how its attempts ended.
    call: String,
    executed: usize,
    sent: usize,
}

/// Reads `502 outcome_unknown retry=true doubt 0/10/10 [doubt] doubt(-) executed=1 sent=1`.
fn trace(text: &str) -> Trace {
    let words: Vec<&str> = text.split_whitespace().collect();
    let value = |name: &str| words.iter().find_map(|word| word.strip_prefix(name)).map(str::to_owned);
    let money: Vec<String> = words[words.len() - 5].split('/').map(|usd| format!("{usd}.00")).collect();
    let holds = words[words.len() - 4].trim_matches(['[', ']']);
    Trace {
        status: words[0].parse().unwrap(),
        code: words[1].trim_matches('-').to_owned(),
        retry: value("retry="),
        outcome: words.contains(&"doubt").then(|| "doubt".to_owned()),
        spend: (money[0].clone(), money[1].clone(), money[2].clone()),
        holds: holds.split(',').filter(|hold| !hold.is_empty()).map(str::to_owned).collect(),
        call: words[words.len() - 3].to_owned(),
        executed: value("executed=").unwrap().parse().unwrap(),
        sent: value("sent=").unwrap().parse().unwrap(),
    }
}

/// One call under a vault key and a name of its own.
struct Case<'a> {
    standin: &'a Standin,
    sidecar: &'a Sidecar,
    key: String,
    key_id: String,
    name: String,
    source: &'static str,
}

impl<'a> Case<'a> {
    async fn new(standin: &'a Standin, sidecar: &'a Sidecar, name: &str) -> Self {
        let (key, key_id) = sidecar.mint("10.00", json!({})).await;
        Self { standin, sidecar, key, key_id, name: name.to_owned(), source: "tok_visa" }
    }

    async fn send(&self, version: &str) -> Reply {
        let form = [
            ("amount", "1000"),
            ("currency", "usd"),
            ("customer", "cus_1"),
            ("source", self.source),
            ("metadata[line]", "a b&c"),
        ];
        let headers = [("idempotency-key", &*self.name), ("stripe-version", version)];
        self.sidecar.call("POST", "/v1/charges", &self.key, &headers, &form).await
    }

    /// What reached the stand-in of this call.
    fn requests(&self) -> Vec<Seen> {
        let all = self.standin.requests().into_iter();
        all.filter(|seen| seen.header("idempotency-key") == Some(&self.name)).collect()
    }

    fn executed(&self) -> usize {
        let moved = self.standin.executed();
        moved.iter().filter(|moved| moved.idempotency_key.as_deref() == Some(&*self.name)).count()
    }

    async fn trace(&self, reply: &Reply) -> Trace {
        let calls = self.sidecar.list(&format!("/admin/calls?idempotency_key={}", self.name)).await;
        assert_eq!(calls.len(), 1, "{}", self.name);
        let attempts = calls[0]["attempts"].as_array().unwrap();
        let ends: Vec<_> = attempts.iter().map(|attempt| attempt["end"].as_str().unwrap_or("-")).collect();
        assert!(attempts.iter().all(|attempt| attempt["upstream_key"] == *self.name));
        Trace {
            status: reply.status,
            code: reply.code().to_owned(),
            retry: reply.header("stripe-should-retry").map(str::to_owned),
            outcome: reply.header("keybrake-outcome").map(str::to_owned),
            spend: self.sidecar.spend(&self.key_id).await,
            holds: self.sidecar.holds(&self.key_id).await,
            call: format!("{}({})", calls[0]["state"].as_str().unwrap(), ends.join(",")),
            executed: self.executed(),
            sent: self.requests().len(),
        }
    }

    /// Sends with a fault in wait and compares.
    async fn step(&self, fault: Option<Fault>, expected: &str) -> Reply {
        if let Some(fault) = fault {
            self.standin.fault(fault.on(On::IdempotencyKey(self.name.clone())));
        }
        // Later sends name another version: a doubt keeps the one of its first send.
        let version = if self.requests().is_empty() { "2024-06-20" } else { "2025-03-31.basil" };
        let reply = self.send(version).await;
        assert_eq!(self.trace(&reply).await, trace(expected), "{}: {}", self.name, reply.text);
        reply
    }

    /// Every send of this call is byte for byte the first one.
    fn sends_are_equal(&self) {
        let essence = |seen: &Seen| {
            let header = |name: &str| seen.header(name).map(str::to_owned);
            let headers = ["idempotency-key", "stripe-version", "stripe-account", "content-type"].map(header);
            (seen.method.clone(), seen.path.clone(), seen.query.clone(), seen.body.clone(), headers)
        };
        let sends = self.requests();
        assert!(sends.iter().all(|seen| essence(seen) == essence(&sends[0])), "{}: {sends:#?}", self.name);
        assert!(sends[0].body.contains("metadata[keybrake_call]"), "{}", sends[0].body);
    }
}

fn answer(status: u16, body: Value, headers: &[(&str, &str)]) -> Fault {
    let headers: BTreeMap<_, _> =
        headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Fault::Answer { status, body, headers }
}

fn error(status: u16, kind: &str, message: &str) -> Fault {
    answer(status, json!({"error": {"type": kind, "message": message}}), &[])
}

const OWN_KEY: &str =
    "The provided key 'rk_test_***' does not have the required permissions for this endpoint.";

const SPENT_AT_ONCE: &str = "200 - 10/0/0 [] spent(spent) executed=1 sent=1";
/// What follows a doubt that a re-send ends.
const SPENT_BY_RESEND: &str = "200 - retry=false 10/0/0 [] spent(spent) executed=1 sent=2";

#[tokio::test]
async fn no_answer_is_a_doubt_until_a_re_send_brings_one() {
    let (standin, sidecar) = world().await;
    for (name, fault, executed) in [
        ("drop-before", Fault::DropBefore, 0),
        ("drop-after", Fault::DropAfter, 1),
        ("reset", Fault::Reset, 0),
        ("reset-after", Fault::ResetAfter, 1),
        ("half-body", Fault::HalfBody, 1),
        ("garbage", Fault::Garbage, 1),
        ("redirect", answer(302, json!(""), &[("location", "https://elsewhere.example/")]), 0),
        ("empty-200", answer(200, json!(""), &[]), 0),
        ("html-502", answer(502, json!("<html>bad gateway</html>"), &[]), 0),
        ("html-400", answer(400, json!("<html>bad request</html>"), &[]), 0),
        (
            "other-currency",
            answer(
                200,
                json!({"object": "charge", "id": "ch_1", "amount": 1000, "currency": "eur", "status": "succeeded", "captured": true}),
                &[],
            ),
            0,
        ),
    ] {
        let case = Case::new(&standin, &sidecar, name).await;
        let doubt = format!(
            "502 outcome_unknown retry=true doubt 0/10/10 [doubt] doubt(-) executed={executed} sent=1"
        );
        let first = case.step(Some(fault), &doubt).await;
        assert_eq!(first.body["error"]["type"], "api_error");
        let second = case.step(None, SPENT_BY_RESEND).await;
        let stripe_replayed = second.header("idempotent-replayed") == Some("true");
        assert_eq!(stripe_replayed, executed == 1, "{name}: Stripe says whether it had executed before");
        case.sends_are_equal();
        let third = case.send("2024-06-20").await;
        assert_eq!((third.status, &third.text, case.requests().len()), (200, &second.text, 2));
        assert_eq!(third.header("original-request"), second.header("original-request"), "{name}");
    }
}

#[tokio::test]
async fn an_answer_after_the_deadline_is_a_doubt() {
    let (standin, sidecar) = world_with(&[("UPSTREAM_TIMEOUT_MS", "1000")]).await;
    let late = |executed| {
        format!("504 outcome_unknown retry=true doubt 0/10/10 [doubt] doubt(-) executed={executed} sent=1")
    };
    let executed_and_late = async {
        let case = Case::new(&standin, &sidecar, "slow-after").await;
        case.step(Some(Fault::SlowAfterMs(60_000)), &late(1)).await;
        case.step(None, SPENT_BY_RESEND).await;
        case.sends_are_equal();
    };
    // Still under way at Stripe: its 409 passes through, and nothing is known better than before.
    let under_way = async {
        let case = Case::new(&standin, &sidecar, "slow").await;
        case.step(Some(Fault::Hold), &late(0)).await;
        let told = "409 idempotency_key_in_use doubt 0/10/10 [doubt] doubt(-) executed=0 sent=2";
        case.step(None, told).await;
        standin.release();
        while case.executed() == 0 {
            tokio::task::yield_now().await;
        }
        case.step(None, "200 - retry=false 10/0/0 [] spent(spent) executed=1 sent=3").await;
        case.sends_are_equal();
    };
    let slow = async {
        let case = Case::new(&standin, &sidecar, "slow-ms").await;
        case.step(Some(Fault::SlowMs(60_000)), &late(0)).await;
    };
    tokio::join!(executed_and_late, under_way, slow);
}

#[tokio::test]
async fn readable_errors_that_prove_nothing_pass_through_as_doubts() {
    let (standin, sidecar) = world().await;
    // Stripe has stored its 500, so it repeats it: that is for an operator, not for an SDK to retry.
    for (name, fault, executed) in
        [("500-before", Fault::Status500Before, 0), ("500-after", Fault::Status500After, 1)]
    {
        let case = Case::new(&standin, &sidecar, name).await;
        let told = |retry: bool, sent: u32| {
            format!("500 - retry={retry} doubt 0/10/10 [doubt] doubt(-) executed={executed} sent={sent}")
        };
        let first = case.step(Some(fault), &told(true, 1)).await;
        assert_eq!(first.body["error"]["type"], "api_error");
        let second = case.step(None, &told(false, 2)).await;
        assert_eq!(second.header("idempotent-replayed"), Some("true"));
        case.sends_are_equal();
    }
    let case = Case::new(&standin, &sidecar, "409").await;
    case.step(
        Some(Fault::Conflict409),
        "409 idempotency_key_in_use doubt 0/10/10 [doubt] doubt(-) executed=0 sent=1",
    )
    .await;
    case.step(None, SPENT_BY_RESEND).await;
    case.sends_are_equal();
    let case = Case::new(&standin, &sidecar, "424").await;
    let told = |sent: u32| format!("424 - retry=false doubt 0/10/10 [doubt] doubt(-) executed=0 sent={sent}");
    case.step(Some(Fault::Status424), &told(1)).await;
    case.step(None, &told(2)).await;
    case.sends_are_equal();
}

#[tokio::test]
async fn final_and_open_answers_are_remembered() {
    let (standin, sidecar) = world().await;
    let case = Case::new(&standin, &sidecar, "paid").await;
    case.step(None, &SPENT_AT_ONCE.replace("200 -", "200 - retry=false")).await;
    let again = case.step(None, SPENT_AT_ONCE).await;
    assert_eq!(again.header("idempotent-replayed"), Some("true"));

    let mut case = Case::new(&standin, &sidecar, "pending").await;
    case.source = "pm_usBankAccount_processing";
    let first = case.step(None, "200 - retry=false 0/10/0 [open] open(open) executed=0 sent=1").await;
    assert_eq!(first.body["status"], "pending");
    let again = case.step(None, "200 - 0/10/0 [open] open(open) executed=0 sent=1").await;
    assert_eq!((again.header("idempotent-replayed"), &again.text), (Some("true"), &first.text));

    // Readable, final, and nothing moved.
    let case = Case::new(&standin, &sidecar, "failed").await;
    let failed =
        json!({"object": "charge", "id": "ch_1", "amount": 1000, "currency": "usd", "status": "failed"});
    case.step(Some(answer(200, failed, &[])), "200 - 0/0/0 [] declined(declined) executed=0 sent=1").await;
    case.step(None, "200 - retry=false 10/0/0 [] spent(declined,spent) executed=1 sent=2").await;
}

#[tokio::test]
async fn a_no_on_the_first_send_voids_and_the_next_call_is_sent_anew() {
    let (standin, sidecar) = world().await;
    let invalid = "invalid_request_error";
    for (name, fault, first, end) in [
        ("400", error(400, invalid, "Received unknown parameter"), "400 -", "refused"),
        ("404", error(404, invalid, "No such customer: 'cus_1'"), "404 -", "refused"),
        ("403", error(403, invalid, "This object cannot be accessed."), "403 -", "refused"),
        ("mismatch", error(400, "idempotency_error", "Keys for idempotent requests …"), "400 -", "refused"),
        ("429", Fault::RateLimited, "429 rate_limit", "not_executed"),
        ("lock", Fault::LockTimeout, "429 lock_timeout", "not_executed"),
    ] {
        let case = Case::new(&standin, &sidecar, name).await;
        let void = format!("{first} 0/0/0 [] {end}({end}) executed=0 sent=1");
        case.step(Some(fault), &void).await;
        case.step(None, &format!("200 - retry=false 10/0/0 [] spent({end},spent) executed=1 sent=2")).await;
    }
    let case = Case::new(&standin, &sidecar, "declined").await;
    let void = "402 card_declined retry=false 0/0/0 [] declined(declined) executed=0 sent=1";
    case.step(Some(Fault::Decline), void).await;
    let again = "402 card_declined retry=false 0/0/0 [] declined(declined,declined) executed=0 sent=2";
    case.step(None, again).await;
}

/// A key that Stripe knows with other parameters: nobody here has an open attempt under it, so nothing is in doubt.
#[tokio::test]
async fn a_callers_key_that_was_used_elsewhere_is_refused_by_stripe() {
    let (standin, sidecar) = world().await;
    let case = Case::new(&standin, &sidecar, "used-elsewhere").await;
    let elsewhere = crate::support::client().post(format!("{}/v1/charges", standin.base_url()));
    let elsewhere = elsewhere.bearer_auth(STRIPE_KEY).header("idempotency-key", "used-elsewhere");
    let form = "amount=700&currency=usd&source=tok_visa";
    let form = elsewhere.header("content-type", "application/x-www-form-urlencoded").body(form);
    assert_eq!(form.send().await.unwrap().status(), 200);
    let told = "400 - retry=false 0/0/0 [] refused(refused) executed=1 sent=2";
    let reply = case.step(None, told).await;
    assert_eq!(reply.body["error"]["type"], "idempotency_error");

    // Under a key of our own making it cannot be: somebody must look.
    let policy = json!({"idempotency": "content", "idempotency_scope": "s"});
    let (key, id) = sidecar.mint("10.00", policy).await;
    standin.fault(error(400, "idempotency_error", "Keys for idempotent requests …"));
    let reply = sidecar.charge(&key, "ignored", 1000, "cus_content").await;
    assert_eq!((reply.status, reply.header("keybrake-outcome")), (400, Some("doubt")), "{}", reply.text);
    assert_eq!(sidecar.spend(&id).await, ("0.00".into(), "10.00".into(), "10.00".into()));
}

#[tokio::test]
async fn our_own_key_turned_away_is_our_own_trouble() {
    let (standin, sidecar) = world().await;
    let refused =
        "502 upstream_key_refused retry=false 0/0/0 [] not_executed(not_executed) executed=0 sent=1";
    let later = "200 - retry=false 10/0/0 [] spent(not_executed,spent) executed=1 sent=2";
    let case = Case::new(&standin, &sidecar, "401").await;
    standin.set_secret_keys(vec!["sk_test_anotherkey00000000000001".into()]);
    case.step(None, refused).await;
    assert_eq!(sidecar.readyz().await, 503);
    standin.set_secret_keys(vec![STRIPE_KEY.into()]);
    case.step(None, later).await;
    assert_eq!(sidecar.readyz().await, 200);
    let case = Case::new(&standin, &sidecar, "403-own").await;
    let reply = case.step(Some(error(403, "invalid_request_error", OWN_KEY)), refused).await;
    assert!(
        !reply.text.contains("rk_test"),
        "what Stripe says of our key is not the caller's: {}",
        reply.text
    );
    assert_eq!(sidecar.readyz().await, 503);
    case.step(None, later).await;
    assert_eq!(sidecar.readyz().await, 200);
}

/// A key that may not read its own account serves with `STRIPE_ACCOUNT`, and a read that it may not make says so.
#[tokio::test]
async fn a_restricted_key_serves_an_account_that_it_is_told() {
    let standin = Standin::start(Options { restricted: true, ..Options::default() });
    let base = standin.base_url();
    let account = Options::default().account;
    let (_unused, sidecar) = world_with(&[("STRIPE_API_BASE", &base), ("STRIPE_ACCOUNT", &account)]).await;
    let endpoints = json!({"allowed_endpoints": ["POST /v1/charges", "GET /v1/account"]});
    let (key, _) = sidecar.mint("10.00", endpoints).await;
    assert_eq!(sidecar.charge(&key, "order-1", 500, "cus_1").await.status, 200);
    let read = sidecar.call("GET", "/v1/account", &key, &[], &[]).await;
    assert_eq!(read.verdict(), (502, "upstream_key_refused"), "{}", read.text);
    assert_eq!(sidecar.readyz().await, 503);
}

#[tokio::test]
async fn what_was_never_sent_is_void() {
    let listen = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let (standin, sidecar) = world_of(Options { listen, ..Options::default() }, &[]).await;
    let (key, id) = sidecar.mint("30.00", json!({})).await;
    assert_eq!(sidecar.charge(&key, "warm", 500, "cus_1").await.status, 200);
    standin.fault(Fault::DropBefore);
    assert_eq!(sidecar.charge(&key, "doubtful", 700, "cus_1").await.verdict(), (502, "outcome_unknown"));
    drop(standin);
    let gone = sidecar.charge(&key, "order-1", 1000, "cus_1").await;
    assert_eq!(gone.verdict(), (502, "upstream_unreachable"), "{}", gone.text);
    assert_eq!(gone.header("stripe-should-retry"), Some("true"));
    assert_eq!(gone.header("keybrake-outcome"), None);
    assert_eq!(sidecar.spend(&id).await, ("5.00".into(), "7.00".into(), "7.00".into()));
    let call = &sidecar.list("/admin/calls?idempotency_key=order-1").await[0];
    assert_eq!(
        (&call["state"], &call["attempts"][0]["end"]),
        (&json!("not_executed"), &json!("not_executed"))
    );
    let events = sidecar.audit("events=all&idempotency_key=order-1").await;
    let told: Vec<_> = events.iter().map(|one| (one["event"].as_str(), one["outcome"].as_str())).collect();
    assert_eq!(told, [(Some("admitted"), Some("held")), (Some("voided"), Some("not_sent"))]);

    // Not sent now says nothing about what was sent before.
    let still = sidecar.charge(&key, "doubtful", 700, "cus_1").await;
    assert_eq!(still.verdict(), (502, "outcome_unknown"), "{}", still.text);
    assert_eq!(sidecar.spend(&id).await.2, "7.00");

    let standin = Standin::start(Options { listen, ..Options::default() });
    assert_eq!(sidecar.charge(&key, "order-1", 1000, "cus_1").await.status, 200);
    assert_eq!(sidecar.charge(&key, "doubtful", 700, "cus_1").await.status, 200);
    assert_eq!(standin.executed().len(), 2);
    assert_eq!(sidecar.spend(&id).await, ("22.00".into(), "0.00".into(), "0.00".into()));
}

#[tokio::test]
async fn a_re_send_ends_a_doubt_only_by_an_answer_that_proves() {
    let (standin, sidecar) = world().await;
    let doubt =
        |status: &str, sent: u32| format!("{status} doubt 0/10/10 [doubt] doubt(-) executed=0 sent={sent}");
    let lost = doubt("502 outcome_unknown retry=true", 1);
    let replayed = [("idempotent-replayed", "true")];
    let told = json!({"error": {"type": "invalid_request_error", "message": "No such customer"}});
    for (name, fault, second) in [
        ("429-again", Fault::RateLimited, "429 rate_limit"),
        ("400-again", answer(400, told.clone(), &[]), "400 -"),
        ("404-again", answer(404, told.clone(), &[]), "404 -"),
        ("403-again", answer(403, told.clone(), &[]), "403 -"),
        ("mismatch-again", error(400, "idempotency_error", "Keys …"), "400 -"),
        ("409-replayed", answer(409, told.clone(), &replayed), "409 -"),
        ("424-replayed", answer(424, told.clone(), &replayed), "424 -"),
        ("500-again", error(500, "api_error", "Sorry"), "500 - retry=true"),
        ("403-own-again", error(403, "invalid_request_error", OWN_KEY), "502 outcome_unknown retry=true"),
        ("dropped-again", Fault::DropBefore, "502 outcome_unknown retry=true"),
    ] {
        let case = Case::new(&standin, &sidecar, name).await;
        case.step(Some(Fault::DropBefore), &lost).await;
        case.step(Some(fault), &doubt(second, 2)).await;
        case.step(None, "200 - retry=false 10/0/0 [] spent(spent) executed=1 sent=3").await;
        case.sends_are_equal();
    }
    for (name, fault, second) in [
        ("402-again", Fault::Decline, "402 card_declined retry=false 0/0/0 [] declined(declined)"),
        ("400-replayed", answer(400, told.clone(), &replayed), "400 - 0/0/0 [] refused(refused)"),
        ("404-replayed", answer(404, told.clone(), &replayed), "404 - 0/0/0 [] refused(refused)"),
    ] {
        let case = Case::new(&standin, &sidecar, name).await;
        case.step(Some(Fault::DropBefore), &lost).await;
        case.step(Some(fault), &format!("{second} executed=0 sent=2")).await;
        case.sends_are_equal();
        let events = sidecar.audit(&format!("events=all&idempotency_key={name}")).await;
        let told: Vec<_> = events.iter().map(|one| one["event"].as_str().unwrap()).collect();
        assert_eq!(told, ["admitted", "doubt", "admitted", "resolved"], "{name}");
    }
}

/// A re-send needs no budget: its money is held already. And whoever comes next may send it.
#[tokio::test]
async fn a_doubt_is_sent_again_under_another_key_and_a_full_cap() {
    let (standin, sidecar) = world().await;
    let (key, id) = sidecar.mint("10.00", json!({})).await;
    let (other, other_id) = sidecar.mint("0.50", json!({})).await;
    standin.fault(Fault::DropAfter);
    assert_eq!(sidecar.charge(&key, "order-1", 1000, "cus_1").await.verdict(), (502, "outcome_unknown"));
    let full = sidecar.charge(&key, "order-2", 100, "cus_1").await;
    assert_eq!(full.verdict(), (429, "spend_cap_exceeded"), "a doubt counts");
    let wrong = sidecar.charge(&other, "order-1", 1001, "cus_1").await;
    assert_eq!(wrong.verdict(), (400, "idempotency_error"), "{}", wrong.text);
    let again = sidecar.charge(&other, "order-1", 1000, "cus_1").await;
    assert_eq!(again.status, 200, "{}", again.text);
    assert_eq!(sidecar.spend(&id).await, ("10.00".into(), "0.00".into(), "0.00".into()));
    assert_eq!(sidecar.spend(&other_id).await, ("0.00".into(), "0.00".into(), "0.00".into()));
    assert_eq!(standin.executed().len(), 1);
}

#[tokio::test]
async fn a_call_without_a_key_is_never_sent_again() {
    let (standin, sidecar) = world().await;
    let (key, id) = sidecar.mint("30.00", json!({"idempotency": "client"})).await;
    let form = [("amount", "1000"), ("currency", "usd"), ("customer", "cus_1")];
    for (fault, status) in [(Fault::DropAfter, 502), (Fault::Status500After, 500)] {
        standin.fault(fault);
        let reply = sidecar.call("POST", "/v1/charges", &key, &[], &form).await;
        assert_eq!(reply.status, status, "{}", reply.text);
        assert_eq!(reply.header("stripe-should-retry"), Some("false"));
        assert_eq!(reply.header("keybrake-outcome"), Some("doubt"));
    }
    assert_eq!(sidecar.spend(&id).await, ("0.00".into(), "20.00".into(), "20.00".into()));
    // The next one is another call.
    assert_eq!(sidecar.call("POST", "/v1/charges", &key, &[], &form).await.status, 200);
    assert_eq!(sidecar.spend(&id).await, ("10.00".into(), "20.00".into(), "20.00".into()));
    let requests = standin.requests();
    let posts: Vec<_> = requests.iter().filter(|seen| seen.method == "POST").collect();
    assert_eq!((posts.len(), standin.executed().len()), (3, 3));
    assert!(posts.iter().all(|seen| seen.header("idempotency-key").is_none()));
    let doubts = sidecar.list("/admin/calls?state=doubt").await;
    assert_eq!(doubts.len(), 2);
    assert!(doubts.iter().all(|call| call["attempts"][0]["upstream_key"].is_null()));
}

/// Recovery asks at the start of a process, and gets no answer.
pub(crate) fn nothing_is_found(standin: &Standin) {
    let on = On::Path { method: "GET".to_owned(), prefix: "/v1/charges".to_owned() };
    standin.fault(Fault::RateLimited.on(on));
}

/// Power fails between the execution and its answer.
#[tokio::test]
async fn a_kill_between_execution_and_answer_is_one_charge_with_a_whole_trail() {
    let (standin, mut sidecar) = world().await;
    let (key, id) = sidecar.mint("32.99", json!({})).await;
    standin.fault(Fault::HoldAfter);
    let mut caller = {
        let http = crate::support::client();
        let form = "amount=2999&currency=usd&customer=cus_9&source=tok_visa";
        let request = http.post(format!("{}/v1/charges", sidecar.base)).bearer_auth(&key);
        let request = request.header("idempotency-key", "order-1");
        let request = request.header("content-type", "application/x-www-form-urlencoded").body(form);
        tokio::spawn(async move { request.send().await.is_err() })
    };
    tokio::select! {
        () = standin.until_held(1) => {}
        answered = &mut caller => panic!("answered before the stand-in was reached: {answered:?}"),
    }
    sidecar.kill();
    assert!(caller.await.unwrap(), "the caller hears nothing");
    assert_eq!(standin.executed().len(), 1);
    nothing_is_found(&standin);
    sidecar.restart().await;
    assert_eq!(sidecar.spend(&id).await, ("0.00".into(), "29.99".into(), "29.99".into()));
    assert_eq!(sidecar.holds(&id).await, ["doubt"]);
    let retry = sidecar.charge(&key, "order-1", 2999, "cus_9").await;
    assert_eq!(retry.status, 200, "{}", retry.text);
    assert_eq!(standin.executed().len(), 1);
    assert_eq!(sidecar.spend(&id).await, ("29.99".into(), "0.00".into(), "0.00".into()));
    let trail = sidecar.audit("events=all&idempotency_key=order-1").await;
    let told: Vec<_> = trail
        .iter()
        .map(|one| (one["event"].as_str().unwrap(), one["outcome"].as_str().unwrap(), one["flags"].clone()))
        .collect();
    assert_eq!(
        told,
        [
            ("admitted", "held", Value::Null),
            ("doubt", "doubt", json!(["restart"])),
            ("admitted", "held", json!(["resend"])),
            ("resolved", "spent", json!(["resend"])),
        ]
    );
    let same = |field: &str| trail.iter().all(|one| one[field] == trail[0][field] && !one[field].is_null());
    assert!(same("call_id") && same("hold_id") && same("key_id") && same("amount") && same("endpoint"));
    let row = sidecar.audit("outcome=spent&idempotency_key=order-1").await;
    assert_eq!((row.len(), &row[0]["object_id"]), (1, &json!(standin.executed()[0].object_id)));
    let verified = sidecar.admin("GET", "/audit/verify", None).await;
    assert_eq!(verified.body["whole"], true, "{}", verified.text);
    standin.release();
}
