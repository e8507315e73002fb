//! SIGKILL at random moments under load: what a power cut may do to money, which is nothing.
//!
//! Sixteen clients make calls that each are wanted once, and make them again and again under whatever key of their group
//! is at hand, as re-runs of a flow do. Stripe is slow, cuts answers, declines and fails meanwhile, and the sidecar is
//! killed. After each restart, and when all doubts are resolved by making the same calls again, the stand-in's ledger of
//! what really moved is the judge.
//!
//! `KEYBRAKE_TEST_KILL_ROUNDS` sets the number of kills, `KEYBRAKE_TEST_SEED` repeats the choices of a run.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::standin::bank::{Executed, Kind};
use crate::standin::faults::Fault;
use crate::standin::{Options, Standin};
use crate::support::{PATIENCE, Sidecar, client, environment};

const CLIENTS: usize = 16;
/// Kills, unless the environment says otherwise.
const ROUNDS: u64 = 5;
/// Calls that each group wants in each round.
const WANTED_PER_ROUND: u64 = 16;
/// Faults that are scripted for each round; those that are left act in the next one.
const FAULTS_PER_ROUND: u64 = 120;
/// The cap of each key, in cents: less than its group wants in one round.
const CAP: u64 = 50_00;
/// The cap of each key's refunds, in cents.
const OUT_CAP: u64 = 8_00;

/// `SplitMix64`: small, and the same on every machine.
#[derive(Clone)]
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.roll() % bound
    }

    fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        let bound = u64::try_from(items.len()).unwrap();
        &items[usize::try_from(self.below(bound)).unwrap()]
    }
}

#[expect(clippy::disallowed_methods, reason = "two knobs of this test, not of the program")]
fn knob(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

/// How the keys of a group count calls as the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Group {
    /// The caller's key, under whichever vault key; refunds too.
    Required,
    /// The caller's key, capped by the UTC day.
    Daily,
    /// What is charged.
    Content,
    /// No key at all: every request is a call of its own, and its doubts stay.
    Lone,
}

const GROUPS: [Group; 4] = [Group::Required, Group::Daily, Group::Content, Group::Lone];

#[derive(Clone, Copy, Debug)]
enum Way {
    Charge,
    Intent,
    /// Authorised, then captured.
    TwoSteps,
    /// Charged, then refunded in part.
    Refund,
}

/// A call that is wanted once. Its customer is its own, so that executions can be told apart.
#[derive(Clone, Debug)]
struct Wanted {
    group: Group,
    way: Way,
    customer: String,
    amount: u64,
}

/// A minted key.
#[derive(Clone, Debug)]
struct Minted {
    group: Group,
    secret: String,
    id: String,
}

/// What is known of an answer; nothing when the sidecar was killed before it came.
#[derive(Clone, Debug)]
struct Answer {
    status: u16,
    replayed: bool,
    body: Value,
}

impl Answer {
    fn code(&self) -> &str {
        self.body["error"]["code"].as_str().unwrap_or_default()
    }

    /// Stripe keeps a 500 and repeats it: its doubt cannot be resolved by asking again.
    fn is_stuck(&self) -> bool {
        self.status == 500 && self.replayed
    }

    fn is_definite(&self) -> bool {
        self.is_stuck() || matches!(self.status, 200 | 400 | 402 | 403 | 429)
    }
}

/// What clients share.
struct Load {
    http: reqwest::Client,
    base: String,
    keys: Vec<Minted>,
    wanted: Vec<Wanted>,
    /// One permit for each answer.
    answers: Semaphore,
    over: AtomicBool,
    lone: AtomicUsize,
}

impl Load {
    async fn post(
        &self,
        secret: &str,
        path: &str,
        key: Option<&str>,
        form: &[(&str, &str)],
    ) -> Option<Answer> {
        let pairs: Vec<_> =
            form.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let mut request = self
            .http
            .post(format!("{}{path}", self.base))
            .bearer_auth(secret)
            .header("content-type", "application/x-www-form-urlencoded")
            .body(keybrake::vendor::stripe::form::serialise(&pairs));
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        let reply = request.send().await.ok()?;
        let status = reply.status().as_u16();
        let replayed = reply.headers().get("idempotent-replayed").is_some_and(|value| value == "true");
        let body = serde_json::from_slice(&reply.bytes().await.ok()?).unwrap_or_default();
        self.answers.add_permits(1);
        Some(Answer { status, replayed, body })
    }

    /// Makes a call, all steps of it; the answer to the last step that was made.
    async fn make(&self, wanted: &Wanted, secret: &str) -> Option<Answer> {
        let Wanted { group, way, customer, amount } = wanted;
        let (amount, half) = (amount.to_string(), (amount / 2).to_string());
        let lone = format!("{customer}_{}", self.lone.fetch_add(1, Ordering::SeqCst));
        let customer = if *group == Group::Lone { &lone } else { customer };
        let named = |step: &str| (*group != Group::Lone).then(|| format!("{customer}:{step}"));
        let mut form =
            vec![("amount", amount.as_str()), ("currency", "usd"), ("customer", customer.as_str())];
        let path = match way {
            Way::Intent => {
                form.extend([("payment_method", "pm_card_visa"), ("confirm", "true")]);
                "/v1/payment_intents"
            }
            Way::TwoSteps => {
                form.extend([("source", "tok_visa"), ("capture", "false")]);
                "/v1/charges"
            }
            Way::Charge | Way::Refund => {
                form.push(("source", "tok_visa"));
                "/v1/charges"
            }
        };
        let first = self.post(secret, path, named("make").as_deref(), &form).await?;
        let (200, Some(id)) = (first.status, first.body["id"].as_str()) else { return Some(first) };
        match way {
            Way::Charge | Way::Intent => Some(first),
            Way::TwoSteps => {
                let path = format!("/v1/charges/{id}/capture");
                self.post(secret, &path, named("capture").as_deref(), &[]).await
            }
            Way::Refund => {
                let form = [("charge", id), ("amount", half.as_str())];
                self.post(secret, "/v1/refunds", named("refund").as_deref(), &form).await
            }
        }
    }

    /// Makes calls until it is over.
    async fn run(&self, mut dice: Dice) {
        while !self.over.load(Ordering::SeqCst) {
            let wanted = dice.pick(&self.wanted);
            let key = self.key_of(wanted.group, &mut dice);
            if self.make(wanted, &key.secret).await.is_none() {
                tokio::task::yield_now().await;
            }
        }
    }

    /// Mostly the newest keys: the older ones are full.
    fn key_of(&self, group: Group, dice: &mut Dice) -> &Minted {
        let keys: Vec<&Minted> = self.keys.iter().filter(|key| key.group == group).collect();
        let newest = &keys[keys.len().saturating_sub(2)..];
        let among: &[&Minted] = if dice.below(8) == 0 { &keys } else { newest };
        dice.pick::<&Minted>(among)
    }

    /// Makes one call until its outcome is known. No fault stands in the way any more.
    async fn resolve(&self, wanted: &Wanted, mut dice: Dice) -> Answer {
        let settled = async {
            loop {
                let key = self.key_of(wanted.group, &mut dice);
                match self.make(wanted, &key.secret).await {
                    Some(answer) if answer.is_definite() => return answer,
                    Some(_) | None => tokio::task::yield_now().await,
                }
            }
        };
        timeout(PATIENCE, settled).await.unwrap_or_else(|_| panic!("{wanted:?} has no outcome"))
    }
}

/// The whole run.
struct Trial {
    standin: Standin,
    sidecar: Sidecar,
    load: Load,
    dice: Dice,
    rounds: u64,
}

impl Trial {
    async fn start(seed: u64) -> (Self, tempfile::TempDir) {
        let standin = Standin::start(Options::default());
        let dir = tempfile::tempdir().unwrap();
        let mut env = environment(standin.addr(), dir.path());
        env.insert("KEYBRAKE_LOG".to_owned(), "error".to_owned());
        let mut sidecar = Sidecar::spawn(env);
        sidecar.ready().await;
        let load = Load {
            http: client(),
            base: sidecar.base.clone(),
            keys: Vec::new(),
            wanted: Vec::new(),
            answers: Semaphore::new(0),
            over: AtomicBool::new(false),
            lone: AtomicUsize::new(0),
        };
        (Self { standin, sidecar, load, dice: Dice(seed), rounds: 0 }, dir)
    }

    async fn mint(&mut self, group: Group) {
        let dollars = |cents: u64| format!("{}.{:02}", cents / 100, cents % 100);
        let mut more = json!({
            "label": format!("{group:?}"),
            "allowed_endpoints": [
                "POST /v1/charges", "POST /v1/charges/{charge}/capture", "POST /v1/payment_intents", "POST /v1/refunds",
            ],
            "daily_usd_out_cap": dollars(OUT_CAP),
        });
        let own = match group {
            Group::Required => json!({}),
            Group::Daily => json!({"idempotency": "client", "expires_in_seconds": 2 * 86_400}),
            Group::Content => json!({"idempotency": "content", "idempotency_scope": "trial"}),
            Group::Lone => json!({"idempotency": "client", "total_usd_cap": dollars(CAP)}),
        };
        more.as_object_mut().unwrap().extend(own.as_object().unwrap().clone());
        let (secret, id) = self.sidecar.mint(&dollars(CAP), more).await;
        self.load.keys.push(Minted { group, secret, id });
    }

    /// New keys and new wishes; the old ones stay.
    async fn plan(&mut self) {
        self.rounds += 1;
        for group in GROUPS {
            self.mint(group).await;
            if group == Group::Required {
                self.mint(group).await;
            }
            for n in 0..WANTED_PER_ROUND {
                let way = match (group, self.dice.below(8)) {
                    (Group::Content, _) | (_, 0..=2) => Way::Charge,
                    (_, 3..=4) => Way::Intent,
                    (Group::Required, 6..) => Way::Refund,
                    (Group::Required | Group::Daily | Group::Lone, _) => Way::TwoSteps,
                };
                let customer = format!("cus_{group:?}_{}_{n}", self.rounds);
                let amount = 100 + self.dice.below(800);
                self.load.wanted.push(Wanted { group, way, customer, amount });
            }
        }
        for _ in 0..FAULTS_PER_ROUND {
            let fault = match self.dice.below(100) {
                0..=4 => Fault::DropAfter,
                5..=9 => Fault::ResetAfter,
                10..=14 => Fault::HalfBody,
                15..=16 => Fault::Status500After,
                17..=19 => Fault::DropBefore,
                20..=21 => Fault::Reset,
                22..=23 => Fault::Decline,
                24..=25 => Fault::RateLimited,
                26..=27 => Fault::Garbage,
                28..=60 => Fault::SlowAfterMs(self.dice.below(10)),
                _ => Fault::SlowMs(self.dice.below(10)),
            };
            self.standin.fault(fault);
        }
    }

    /// Load, until the sidecar is killed in the middle of it.
    async fn run_and_kill(mut self) -> Self {
        let (answers, micros) = (20 + self.dice.below(100), self.dice.below(4_000));
        let load = Arc::new(self.load);
        load.over.store(false, Ordering::SeqCst);
        let mut clients = JoinSet::new();
        for _ in 0..CLIENTS {
            let (load, dice) = (Arc::clone(&load), Dice(self.dice.roll()));
            clients.spawn(async move { load.run(dice).await });
        }
        let enough = load.answers.acquire_many(u32::try_from(answers).unwrap());
        timeout(PATIENCE, enough).await.expect("the load should go on").unwrap().forget();
        // Not waiting for anything: a moment of no meaning.
        tokio::time::sleep(Duration::from_micros(micros)).await;
        self.sidecar.kill();
        load.over.store(true, Ordering::SeqCst);
        while let Some(ended) = clients.join_next().await {
            ended.unwrap();
        }
        self.load = Arc::into_inner(load).expect("all clients have ended");
        self
    }

    async fn list(&self, path: &str) -> Vec<Value> {
        let (mut rows, mut cursor) = (Vec::new(), String::new());
        loop {
            let page = self.sidecar.admin("GET", &format!("{path}&limit=1000{cursor}"), None).await;
            assert_eq!(page.status, 200, "{}", page.text);
            rows.extend(page.body["data"].as_array().unwrap().clone());
            match page.body["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => return rows,
            }
        }
    }

    /// Spent and held of a key in cents, in and out. The longest window: the whole life.
    async fn figures(&self, key: &Minted) -> [(u64, u64); 2] {
        let shown = self.sidecar.admin("GET", &format!("/admin/vault_keys/{}", key.id), None).await;
        let total = &shown.body["spend"]["total"];
        [total, &total["out"]].map(|lane| (cents(&lane["spent"]), cents(&lane["held"])))
    }

    /// What must be true at every moment.
    async fn check(&self) {
        // First what was executed, then what is counted: what is executed meanwhile was counted before.
        let executed = self.standin.executed();
        let mut counted: BTreeMap<Group, [u64; 2]> = BTreeMap::new();
        for key in &self.load.keys {
            let [inward, outward] = self.figures(key).await;
            assert!(inward.0 + inward.1 <= CAP, "{key:?} counts more than its cap: {inward:?}");
            assert!(
                outward.0 + outward.1 <= OUT_CAP,
                "{key:?} counts more refunds than its cap: {outward:?}"
            );
            let sums = counted.entry(key.group).or_default();
            sums[0] += inward.0 + inward.1;
            sums[1] += outward.0 + outward.1;
        }
        for group in GROUPS {
            let moved = moved(executed.iter().filter(|one| is_of(one, group)));
            let counted = counted[&group];
            assert!(moved[0] <= counted[0] && moved[1] <= counted[1], "{group:?}: {moved:?} of {counted:?}");
        }
        check_once(&executed);
        self.check_records(&executed).await;
        let verdict = self.sidecar.admin("GET", "/audit/verify", None).await;
        assert_eq!(verdict.body["whole"], true, "{}", verdict.text);
    }

    /// Every execution was admitted on the record, and no key's executions exceed its cap.
    async fn check_records(&self, executed: &[Executed]) {
        let admitted = self.list("/audit?events=all&order=asc&event=admitted").await;
        let text = |record: &Value, field: &str| record[field].as_str().map(str::to_owned);
        let keys: BTreeSet<String> = admitted.iter().filter_map(|one| text(one, "idempotency_key")).collect();
        // Who pays: the key of the last admission that was not the re-send of a doubt.
        let payers: BTreeMap<String, String> = admitted
            .iter()
            .filter(|one| one["flags"].is_null())
            .filter_map(|one| Some((text(one, "customer")?, text(one, "key_id")?)))
            .collect();
        let mut paid: BTreeMap<&str, u64> = BTreeMap::new();
        for one in executed {
            let customer = one.customer.as_deref().unwrap_or_default();
            let recorded = match &one.idempotency_key {
                Some(key) => keys.contains(key),
                None => payers.contains_key(customer),
            };
            assert!(recorded, "{one:?} has no record");
            if matches!(one.kind, Kind::Charge | Kind::Capture) {
                let payer = payers.get(customer).unwrap_or_else(|| panic!("nobody pays for {one:?}"));
                *paid.entry(payer.as_str()).or_default() += one.amount;
            }
        }
        for (key, paid) in paid {
            assert!(paid <= CAP, "{paid} were executed under {key}, whose cap is {CAP}");
        }
    }

    /// Makes every wish once more, without faults, until its outcome is known: then nothing is held for nothing.
    async fn resolve(mut self) -> Self {
        self.standin.clear_faults();
        let load = Arc::new(self.load);
        let mut waiting = JoinSet::new();
        let room = Arc::new(Semaphore::new(CLIENTS));
        for wanted in load.wanted.iter().filter(|wanted| wanted.group != Group::Lone) {
            let (load, room, wanted) = (Arc::clone(&load), Arc::clone(&room), wanted.clone());
            let dice = Dice(self.dice.roll());
            waiting.spawn(async move {
                let _slot = room.acquire().await.unwrap();
                let answer = load.resolve(&wanted, dice).await;
                (wanted.customer, answer)
            });
        }
        let mut stuck = BTreeSet::new();
        while let Some(ended) = waiting.join_next().await {
            let (customer, answer) = ended.unwrap();
            if answer.is_stuck() {
                stuck.insert(customer);
            } else if answer.status != 200 {
                let caps = ["spend_cap_exceeded", "card_declined"];
                assert!(caps.contains(&answer.code()), "{customer}: {answer:?}");
            }
        }
        self.load = Arc::into_inner(load).expect("all have ended");
        self.check_equal(&stuck).await;
        self
    }

    /// Spent is what was executed. Exceptions: a 500 that Stripe stored stays a doubt, and so does a call without a key,
    /// which nobody can make again.
    async fn check_equal(&self, stuck: &BTreeSet<String>) {
        let doubts = self.list("/admin/holds?state=doubt").await;
        let mut unresolved = BTreeSet::new();
        for doubt in &doubts {
            let key = self.load.keys.iter().find(|key| doubt["key_id"] == key.id.as_str()).unwrap();
            if key.group == Group::Lone {
                continue;
            }
            let name = doubt["idempotency_key"].as_str().unwrap().to_owned();
            let of_stuck = |customer: &String| {
                name.starts_with(&format!("{customer}:")) || doubt["customer"] == **customer
            };
            assert!(stuck.iter().any(of_stuck), "nothing explains this doubt: {doubt}");
            unresolved.insert(name);
        }
        let sending = self.list("/admin/holds?state=sending").await;
        assert!(sending.is_empty(), "{sending:?}");
        let executed = self.standin.executed();
        let known =
            |one: &&Executed| one.idempotency_key.as_ref().is_some_and(|key| !unresolved.contains(key));
        let mut spent: BTreeMap<Group, [u64; 2]> = BTreeMap::new();
        for key in &self.load.keys {
            let figures = self.figures(key).await;
            let sums = spent.entry(key.group).or_default();
            sums[0] += figures[0].0;
            sums[1] += figures[1].0;
        }
        for group in [Group::Required, Group::Daily, Group::Content] {
            let moved = moved(executed.iter().filter(|one| is_of(one, group)).filter(known));
            assert_eq!(spent[&group], moved, "{group:?}: spent, executed");
        }
        let lone = moved(executed.iter().filter(|one| is_of(one, Group::Lone)));
        assert!(spent[&Group::Lone][0] <= lone[0], "more is booked than was executed");
    }
}

/// Each upstream key is executed once at most, and so is each wish.
fn check_once(executed: &[Executed]) {
    let mut keys = BTreeSet::new();
    let mut wishes = BTreeSet::new();
    for one in executed {
        if let Some(key) = &one.idempotency_key {
            assert!(keys.insert(key.clone()), "{key} was executed twice");
        }
        if one.kind == Kind::Charge {
            let customer = one.customer.clone().unwrap();
            assert!(wishes.insert(customer.clone()), "{customer} was charged twice");
        }
    }
}

fn cents(figure: &Value) -> u64 {
    let (dollars, cents) = figure.as_str().unwrap().split_once('.').unwrap();
    assert_eq!(cents.len(), 2);
    dollars.parse::<u64>().unwrap() * 100 + cents.parse::<u64>().unwrap()
}

/// Every customer is named after its group.
fn is_of(one: &Executed, group: Group) -> bool {
    one.customer.as_ref().is_some_and(|customer| customer.starts_with(&format!("cus_{group:?}_")))
}

/// Money in and money out, in cents. An authorization moves none yet.
fn moved<'a>(executed: impl Iterator<Item = &'a Executed>) -> [u64; 2] {
    executed.fold([0, 0], |[inward, outward], one| match one.kind {
        Kind::Charge | Kind::Capture => [inward + one.amount, outward],
        Kind::Refund => [inward, outward + one.amount],
        Kind::Authorization => [inward, outward],
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[expect(clippy::print_stdout, reason = "a failed run can be repeated only with its seed")]
async fn a_kill_at_any_moment_costs_nobody_anything() {
    let random: [u8; 8] = keybrake::random::bytes();
    let seed = knob("KEYBRAKE_TEST_SEED").unwrap_or_else(|| u64::from_be_bytes(random));
    println!("KEYBRAKE_TEST_SEED={seed}");
    let (mut trial, _dir) = Trial::start(seed).await;
    for _ in 0..knob("KEYBRAKE_TEST_KILL_ROUNDS").unwrap_or(ROUNDS) {
        trial.plan().await;
        trial = trial.run_and_kill().await;
        trial.sidecar.restart().await;
        trial.check().await;
    }
    trial = trial.resolve().await;
    trial.check().await;
    let executed = trial.standin.executed();
    let money = executed.iter().filter(|one| one.kind == Kind::Charge).count();
    assert!(money > 10, "hardly anything was executed: {money}");
    println!("{money} charges, {} movements, {} requests", executed.len(), trial.standin.requests().len());
    assert!(trial.sidecar.terminate().success());
}
