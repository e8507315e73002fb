//! The stores of a collector in this process, fed by chains that are made up.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use keybrake::audit::{Decision, Entry, Event, FIRST_PREV_HASH, Place, RecordedOutcome, Sealed, seal};
use keybrake::collect::chain::{self, Batch, Chain};
use keybrake::collect::store::{Incoming, Store, StoreError};
use keybrake::collect::{postgres, redb};
use keybrake::id::CallId;
use keybrake::journal::AuditFilter;
use keybrake::time::{Clock, DAY_MS, UnixMs};
use serde_json::{Map, Value};
use tokio::time::{Duration, Instant, sleep};

use crate::collector::{Kept, schema_of};
use crate::dice::Dice;
use crate::postgres::Schema;
use crate::support::PATIENCE;

pub(super) const START: UnixMs = UnixMs::from_millis(1_784_000_000_000);

/// What a store keeps, from one handle to the next.
pub(super) struct Records {
    dir: tempfile::TempDir,
    pub(super) schema: Option<Arc<Schema<'static>>>,
}

impl Records {
    pub(super) fn of(kept: Kept) -> Self {
        Self { dir: tempfile::tempdir().unwrap(), schema: schema_of(kept) }
    }

    /// Opens it, once the writer of the handle before has let go. Records are kept for two days.
    pub(super) async fn open(&self, clock: &Clock) -> Store {
        if let Some(schema) = &self.schema {
            return Store::Postgres(postgres::Store::open(schema.target(), clock.clone(), 2).await.unwrap());
        }
        let path: &Path = &self.dir.path().join("collector.redb");
        loop {
            match redb::Store::open(path, clock.clone(), 2) {
                Err(StoreError::Locked) => sleep(Duration::from_millis(5)).await,
                other => return Store::Redb(other.unwrap()),
            }
        }
    }
}

/// A ledger's chain, as long as is asked of it.
pub(super) struct Ledger {
    pub(super) name: String,
    pub(super) records: Vec<Sealed>,
}

impl Ledger {
    pub(super) fn new(name: &str) -> Self {
        Self { name: format!("ledger_{name}"), records: Vec::new() }
    }

    pub(super) fn append(&mut self, entry: &Entry) {
        let prev_hash = self.records.last().map_or(FIRST_PREV_HASH, |last| last.hash);
        let (seq, name) = (self.records.len() as u64 + 1, self.name.as_str());
        let place =
            Place { seq, ledger_id: name, node: &format!("node of {name}"), chain_id: name, prev_hash };
        self.records.push(seal(&place, entry));
    }

    /// Makes it so long, of records that say little.
    pub(super) fn fill(&mut self, records: usize) {
        while self.records.len() < records {
            self.append(&Entry { at: START.to_string(), event: Event::Refused, ..Entry::default() });
        }
    }

    /// The records from one to another, both included, as they travel.
    pub(super) fn sent(&self, from: usize, to: usize) -> Incoming {
        let lines =
            self.records[from - 1..to].iter().flat_map(|one| [one.to_line(), b"\n".to_vec()].concat());
        let batch: Batch = chain::read(&lines.collect::<Vec<u8>>()).unwrap();
        Incoming { batch, floor: 1, backlog: 0 }
    }
}

pub(super) async fn all(store: &Store, filter: &AuditFilter, limit: usize) -> Vec<Map<String, Value>> {
    let (mut found, mut after) = (Vec::new(), None);
    loop {
        let page = store.query(filter.clone(), after, limit).await.unwrap();
        assert!(page.items.len() <= limit);
        found.extend(page.items);
        let Some(next) = page.next else { return found };
        let goes_on = after.is_none_or(|after| if filter.ascending { next > after } else { next < after });
        assert!(goes_on, "a page got nowhere: {after:?}, {next}");
        after = Some(next);
    }
}

pub(super) async fn seqs(store: &Store) -> Vec<u64> {
    let everything = AuditFilter { all_events: true, ascending: true, ..AuditFilter::default() };
    all(store, &everything, 100).await.iter().map(|record| record["seq"].as_u64().unwrap()).collect()
}

pub(super) async fn chain_of(store: &Store, ledger: &Ledger) -> Option<Chain> {
    let chains = store.chains().await.unwrap();
    chains.into_iter().find(|(id, _)| *id == ledger.name).map(|(_, chain)| chain)
}

pub(super) async fn old_records_go_and_what_comes_later_is_found(kept: Kept) {
    let records = Records::of(kept);
    let (clock, hand) = Clock::manual(START);
    let store = records.open(&clock).await;
    let mut ledger = Ledger::new("1");
    ledger.fill(7);
    store.take(ledger.sent(1, 4)).await.unwrap();
    drop(store);
    // Nobody sent anything for longer than records are kept.
    hand.fetch_add(5 * DAY_MS, Ordering::SeqCst);
    let store = records.open(&clock).await;
    let since = Instant::now();
    while seqs(&store).await.len() > 1 {
        assert!(since.elapsed() < PATIENCE, "old records stay");
        sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(seqs(&store).await, [4], "the last one stays");
    store.take(ledger.sent(3, 7)).await.unwrap();
    // It may go now that it is not the last one any more.
    let left = seqs(&store).await;
    assert!(matches!(left.as_slice(), [4, 5, 6, 7] | [5, 6, 7]), "{left:?}");
    let chain = chain_of(&store, &ledger).await.unwrap();
    let verdict = store.verify(&ledger.name, &chain).await.unwrap();
    assert_eq!((verdict.records, verdict.broken), (8 - chain.first_seq, None));
}

/// Something that a record may say, with what makes it hard to find: letters of two bytes, what no database takes, and
/// what differs only far behind.
fn made_up(dice: &mut Dice, n: usize) -> Entry {
    let long = |end: usize| format!("{}{end}", "x".repeat(250));
    let texts = ["cus_1", "cus_2", "kestra-a", "kestra-b_1", "ü\u{0}", "'; --", "\\", "{\"a\"}", "%"]
        .map(str::to_owned);
    let mut text = |often: usize| -> Option<String> {
        let at = dice.below(texts.len() + 4);
        let text = texts.get(at).cloned().unwrap_or_else(|| long(at % 2));
        dice.percent(often).then_some(text)
    };
    let mut entry = Entry {
        label: text(90),
        key_id: text(50),
        customer: text(70),
        endpoint: text(50),
        idempotency_key: text(60),
        object_id: text(30),
        hold_id: text(30),
        request_id: text(50),
        code: text(20),
        metadata: text(60).map(|value| Map::from_iter([("flow".to_owned(), Value::from(value))])),
        stripe_metadata: text(30).map(|value| Map::from_iter([("x]=y".to_owned(), Value::from(value))])),
        ..Entry::default()
    };
    // Now and then out of order, as a clock that was set back writes.
    let at = START.millis() + 1_000 * n as u64 - 40_000 * u64::from(dice.percent(10)).min(n as u64 / 40);
    entry.at = UnixMs::from_millis(at).to_string();
    let call = u64::try_from(dice.below(n / 3 + 1)).unwrap();
    (entry.event, entry.outcome) = match dice.below(5) {
        0 => (Event::Admitted, Some(RecordedOutcome::Held)),
        1 => (Event::Settled, Some(RecordedOutcome::Spent)),
        2 => (Event::Doubt, Some(RecordedOutcome::Doubt)),
        3 => (Event::Replayed, Some(RecordedOutcome::None)),
        _ => (Event::Refused, Some(RecordedOutcome::None)),
    };
    entry.decision =
        Some(if entry.event == Event::Refused { Decision::Refused } else { Decision::Forwarded });
    entry.call_id = dice.percent(80).then(|| CallId::new(UnixMs::from_millis(call), [7; 10]).to_string());
    entry
}

/// Something that may be asked for: most of it of a record that there is.
fn asked(dice: &mut Dice, records: &[Map<String, Value>]) -> AuditFilter {
    const FIELDS: &[&str] = &[
        "label",
        "key_id",
        "customer",
        "endpoint",
        "idempotency_key",
        "object_id",
        "hold_id",
        "request_id",
        "code",
        "outcome",
        "decision",
        "event",
        "call_id",
        "node",
        "chain_id",
    ];
    let record = &records[dice.below(records.len())];
    let mut filter =
        AuditFilter { all_events: dice.percent(50), ascending: dice.percent(50), ..AuditFilter::default() };
    for _ in 0..dice.below(4) {
        let field = FIELDS[dice.below(FIELDS.len())];
        let value = record[field].as_str().unwrap_or("nothing").to_owned();
        filter.equal.push((field, if dice.percent(10) { format!("{value}!") } else { value }));
    }
    for (field, name) in [("metadata", "flow"), ("stripe_metadata", "x]=y")] {
        if dice.percent(15) {
            let value = record[field][name].as_str().unwrap_or("nothing").to_owned();
            filter.within.push((field, name.to_owned(), value));
        }
    }
    if dice.percent(25) {
        let prefixes = ["", "k", "kestra-", "kestra-b", "ü", "x", "'"];
        filter.label_prefix = Some(prefixes[dice.below(prefixes.len())].to_owned());
    }
    let mut instant = || {
        let other = &records[dice.below(records.len())];
        dice.percent(25).then(|| UnixMs::parse(other["at"].as_str().unwrap()).unwrap())
    };
    (filter.since, filter.until) = (instant(), instant());
    filter
}

/// Whatever is asked, both stores answer the same records in the same order, page by page.
pub(super) async fn answer_alike(one: &Store, other: &Store, seed: u64) {
    let mut dice = Dice::new(seed);
    let mut ledgers = ["a", "b", "c"].map(Ledger::new);
    let mut sent = [0; 3];
    for n in 0..400 {
        let at = dice.below(3);
        ledgers[at].append(&made_up(&mut dice, n));
        let (length, held) = (ledgers[at].records.len(), sent[at]);
        if dice.percent(15) {
            // Some of it once more.
            let from = held + 1 - dice.below(held + 1).min(3);
            let incoming = || ledgers[at].sent(from, length);
            let (taken, also) = tokio::join!(one.take(incoming()), other.take(incoming()));
            assert_eq!(taken.unwrap(), also.unwrap());
            sent[at] = length;
        }
    }
    let everything = AuditFilter { all_events: true, ..AuditFilter::default() };
    let records = all(one, &everything, 1_000).await;
    assert_eq!(records.len(), sent.iter().sum::<usize>());
    for _ in 0..200 {
        let (filter, limit) = (asked(&mut dice, &records), 1 + dice.below(60));
        let (expected, found) = (all(one, &filter, limit).await, all(other, &filter, limit).await);
        assert_eq!(found, expected, "{filter:?}, {limit}");
    }
}
