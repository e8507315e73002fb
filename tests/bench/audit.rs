//! What the audit log answers over 1,000 records and over a million (`KEYBRAKE_BENCH_RECORDS`), and how much longer the
//! second takes. Both logs hold the same few records of interest, spread over all the others.
#![expect(clippy::disallowed_methods, reason = "a benchmark asks the machine's clock")]
#![expect(clippy::unwrap_used, reason = "a benchmark that cannot measure stops")]
#![expect(clippy::print_stdout, reason = "what it measures is told on standard output")]

use std::time::{Duration, Instant};

use keybrake::audit::{Decision, Entry, Event, FIRST_PREV_HASH, Place, RecordedOutcome, seal};
use keybrake::id::CallId;
use keybrake::journal::{self, AuditFilter};
use keybrake::time::UnixMs;
use redb::{Database, ReadableDatabase as _};
use serde_json::{Map, Value};

const SMALL: u64 = 1_000;
const LARGE: u64 = 1_000_000;
/// Records of interest in each log.
const OF_INTEREST: u64 = 20;
/// Records that are written, and taken into the index, by one commit: the latter as many as the ledger's own step.
const WRITTEN: u64 = 2_000;
const INDEXED: usize = 2_000;
const PAGE: usize = 100;
const ROUNDS: usize = 9;
const START_MS: u64 = 1_784_000_000_000;

/// The record at a place of a log of `records`: two for each call, ten a second.
fn entry(place: u64, records: u64) -> Entry {
    let call = place.div_ceil(2);
    let is_of_interest = call % (records / 2 / OF_INTEREST) == 1;
    let is_first = place % 2 == 1;
    let text = |text: String| Value::String(text);
    let settled = if is_of_interest { RecordedOutcome::Doubt } else { RecordedOutcome::Spent };
    let is_refund = call.is_multiple_of(2);
    Entry {
        at: UnixMs::from_millis(START_MS + place * 100).to_string(),
        event: if is_first { Event::Admitted } else { Event::Settled },
        call_id: Some(CallId::new(UnixMs::from_millis(call), [7; 10]).to_string()),
        hold_id: Some(format!("hold_{call:032x}")),
        request_id: Some(format!("req_{place:014x}")),
        key_id: Some(format!("vk_id_{:032x}", call % 50)),
        label: Some(
            if is_of_interest { "rare-flow" } else { "kestra-billing" }.to_owned()
                + &format!("-{}", call % 500),
        ),
        metadata: Some(Map::from_iter([
            ("flow".to_owned(), text(format!("flow-{}", call % 30))),
            ("execution".to_owned(), text(format!("exec-{}", call / 10))),
        ])),
        method: Some("POST".to_owned()),
        endpoint: Some(if is_refund { "/v1/refunds" } else { "/v1/charges" }.to_owned()),
        // Hardly any refund is.
        decision: (!is_refund || is_of_interest && is_first).then_some(Decision::Forwarded),
        outcome: Some(if is_first { RecordedOutcome::Held } else { settled }),
        amount: Some(2_999),
        currency: Some("usd".to_owned()),
        usd: Some("29.99".to_owned()),
        idempotency_key: Some(format!("order-{call}")),
        customer: Some(if is_of_interest { "cus_rare".to_owned() } else { format!("cus_{}", call % 5_000) }),
        object_id: (!is_first).then(|| format!("ch_{call:024x}")),
        stripe_metadata: Some(Map::from_iter([("invoice".to_owned(), text(format!("in_{call}")))])),
        ..Entry::default()
    }
}

struct Log {
    db: Database,
    records: u64,
    _dir: tempfile::TempDir,
}

/// Writes a log, and lets its index follow; tells how long each took, and how large the file is.
fn fill(records: u64) -> Log {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.redb");
    let db = Database::create(&path).unwrap();
    let begun = Instant::now();
    let mut prev_hash = FIRST_PREV_HASH;
    for first in (1..=records).step_by(usize::try_from(WRITTEN).unwrap()) {
        let txn = db.begin_write().unwrap();
        for seq in first..(first + WRITTEN).min(records + 1) {
            let place = Place { seq, ledger_id: "ledger_1", node: "node-1", chain_id: "ledger_1", prev_hash };
            let sealed = seal(&place, &entry(seq, records));
            journal::append(&txn, seq, &sealed).unwrap();
            prev_hash = sealed.hash;
        }
        txn.commit().unwrap();
    }
    let (written, log_bytes) = (begun.elapsed(), std::fs::metadata(&path).unwrap().len());
    let begun = Instant::now();
    let mut longest = Duration::ZERO;
    loop {
        let step = Instant::now();
        let txn = db.begin_write().unwrap();
        let indexed = journal::index_step(&txn, INDEXED).unwrap();
        txn.commit().unwrap();
        longest = longest.max(step.elapsed());
        if !indexed.more {
            break;
        }
    }
    let (indexed, bytes) = (begun.elapsed(), std::fs::metadata(&path).unwrap().len());
    println!(
        "{records} records: written in {written:.1?} ({} MB), indexed in {indexed:.1?} ({} MB in all), \
         {:.0} records/s, a step of {INDEXED} took {longest:.1?} at most",
        log_bytes / 1_000_000,
        bytes / 1_000_000,
        f64::from(u32::try_from(records).unwrap()) / indexed.as_secs_f64(),
    );
    Log { db, records, _dir: dir }
}

/// The same questions to a log of any length.
fn questions(records: u64) -> Vec<(&'static str, AuditFilter)> {
    let equal = |pairs: &[(&'static str, &str)]| AuditFilter {
        equal: pairs.iter().map(|(field, value)| (*field, (*value).to_owned())).collect(),
        ..AuditFilter::default()
    };
    let all = |filter: AuditFilter| AuditFilter { all_events: true, ..filter };
    let prefix = |prefix: &str| AuditFilter { label_prefix: Some(prefix.to_owned()), ..equal(&[]) };
    let middle = records / 2;
    let at = |place: u64| Some(UnixMs::from_millis(START_MS + place * 100));
    let call = CallId::new(UnixMs::from_millis(middle / 2), [7; 10]).to_string();
    let flow = vec![("metadata", "flow".to_owned(), "flow-7".to_owned())];
    vec![
        ("the newest", equal(&[])),
        ("the oldest", AuditFilter { ascending: true, ..equal(&[]) }),
        ("one call, all its events", all(equal(&[("call_id", &call)]))),
        ("one hold, all its events", all(equal(&[("hold_id", &format!("hold_{:032x}", middle / 2))]))),
        ("one request", equal(&[("request_id", &format!("req_{:014x}", middle / 2 * 2))])),
        ("one idempotency key", equal(&[("idempotency_key", &format!("order-{}", middle / 2))])),
        ("one customer", equal(&[("customer", "cus_rare")])),
        ("one customer's doubts", equal(&[("customer", "cus_rare"), ("outcome", "doubt")])),
        ("a prefix of labels, rare", prefix("rare-")),
        ("a prefix of labels, frequent", prefix("kestra-")),
        ("ten seconds", all(AuditFilter { since: at(middle), until: at(middle + 100), ..equal(&[]) })),
        (
            "ten seconds of an endpoint",
            AuditFilter {
                since: at(middle),
                until: at(middle + 100),
                ..equal(&[("endpoint", "/v1/charges")])
            },
        ),
        ("an endpoint's spent", equal(&[("endpoint", "/v1/charges"), ("outcome", "spent")])),
        ("a flow", AuditFilter { within: flow, ..equal(&[]) }),
        ("what is in doubt", equal(&[("outcome", "doubt")])),
        ("nothing: two frequent values", equal(&[("outcome", "held"), ("decision", "forwarded")])),
        ("nothing: an unknown value", equal(&[("customer", "cus_none")])),
    ]
}

/// The shortest of several times for one page, and its rows.
fn ask(log: &Log, filter: &AuditFilter) -> (Duration, usize) {
    let mut rows = 0;
    let times = (0..ROUNDS).map(|_| {
        let begun = Instant::now();
        let txn = log.db.begin_read().unwrap();
        rows = journal::query(&txn, filter, None, PAGE).unwrap().items.len();
        begun.elapsed()
    });
    (times.min().unwrap_or_default(), rows)
}

fn main() {
    let asked = std::env::var_os("KEYBRAKE_BENCH_RECORDS")
        .map(|text| text.to_str().and_then(|text| text.parse().ok()));
    let large = asked.map_or(LARGE, |asked| asked.expect("KEYBRAKE_BENCH_RECORDS is a number of records"));
    assert!((SMALL..=u64::from(u32::MAX)).contains(&large), "KEYBRAKE_BENCH_RECORDS: {SMALL} or more");
    let (small, large) = (fill(SMALL), fill(large));
    println!(
        "\n{:<32}{:>6}{:>12}{:>6}{:>12}{:>8}",
        "page of 100", "rows", SMALL, "rows", large.records, "ratio"
    );
    for ((name, of_small), (_, of_large)) in
        questions(small.records).into_iter().zip(questions(large.records))
    {
        let ((short, few), (long, many)) = (ask(&small, &of_small), ask(&large, &of_large));
        let ratio = long.as_secs_f64() / short.as_secs_f64();
        println!(
            "{name:<32}{few:>6}{:>12}{many:>6}{:>12}{ratio:>8.1}",
            format!("{short:.0?}"),
            format!("{long:.0?}")
        );
    }
}
