//! What the index answers is what reading the whole log answers, wherever it stands; and it reads little for it.

use std::collections::BTreeMap;

use redb::backends::InMemoryBackend;
use redb::{Database, ReadableDatabase as _, ReadableTableMetadata as _};
use serde_json::{Map, Value};

use super::query::{Cost, search};
use super::*;
use crate::audit::{Decision, Entry, Event, FIRST_PREV_HASH, Place, RecordedOutcome, seal};
use crate::id::CallId;
use crate::time::HOUR_MS;

const START_MS: u64 = 1_784_000_000_000;

/// Numbers by chance, the same for a seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[usize::try_from(self.below(all.len() as u64)).unwrap()]
    }
}

/// A log, and the same as a list.
struct Log {
    db: Database,
    kept: BTreeMap<u64, Map<String, Value>>,
}

impl Log {
    fn new() -> Self {
        let db = Database::builder().create_with_backend(InMemoryBackend::new()).unwrap();
        Self { db, kept: BTreeMap::new() }
    }

    fn write<T>(&self, write: impl FnOnce(&WriteTransaction) -> T) -> T {
        let txn = self.db.begin_write().unwrap();
        let done = write(&txn);
        txn.commit().unwrap();
        done
    }

    fn append(&mut self, records: Vec<(u64, Entry)>) {
        let txn = self.db.begin_write().unwrap();
        for (place, entry) in records {
            let of = Place {
                seq: place % 7,
                ledger_id: if place % 2 == 0 { "ledger_even" } else { "ledger_odd" },
                node: "node-1",
                chain_id: "chain-1",
                prev_hash: FIRST_PREV_HASH,
            };
            let sealed = seal(&of, &entry);
            append(&txn, place, &sealed).unwrap();
            self.kept.insert(place, sealed.to_json());
        }
        txn.commit().unwrap();
    }

    fn index(&self, rows_max: usize) -> Indexed {
        self.write(|txn| index_step(txn, rows_max).unwrap())
    }

    fn index_all(&self) {
        while self.index(5_000).more {}
    }

    fn drop_below(&mut self, place: u64, rows_max: usize) -> usize {
        let dropped = self.write(|txn| drop_below(txn, place, rows_max).unwrap());
        let expected: Vec<u64> = self.kept.range(..place).map(|(place, _)| *place).take(rows_max).collect();
        assert_eq!(dropped, expected.len());
        for place in &expected {
            self.kept.remove(place);
        }
        dropped
    }

    /// By reading everything.
    fn expected(&self, filter: &AuditFilter) -> Vec<Map<String, Value>> {
        let mut last = BTreeMap::new();
        let call_of = |record: &Map<String, Value>| {
            let event: Event = serde_json::from_value(record["event"].clone()).unwrap();
            record["call_id"].as_str().filter(|_| event.is_of_a_call()).map(str::to_owned)
        };
        for (place, record) in &self.kept {
            last.extend(call_of(record).map(|call| (call, *place)));
        }
        let is_last = |(place, record): &(&u64, &Map<String, Value>)| {
            filter.all_events || call_of(record).is_none_or(|call| last[&call] == **place)
        };
        let found = self.kept.iter().filter(is_last).map(|(_, record)| record);
        let mut found: Vec<_> = found.filter(|record| filter.matches(record)).cloned().collect();
        if !filter.ascending {
            found.reverse();
        }
        found
    }

    /// By pages.
    fn found(&self, filter: &AuditFilter, limit: usize, cost_max: usize) -> (Vec<Map<String, Value>>, Cost) {
        let txn = self.db.begin_read().unwrap();
        let (mut found, mut after, mut all) = (Vec::new(), None, Cost::default());
        loop {
            let (page, cost) = search(&txn, filter, after, limit, cost_max).unwrap();
            assert!(page.items.len() <= limit);
            found.extend(page.items);
            all = Cost { index: all.index + cost.index, records: all.records + cost.records };
            let Some(next) = page.next else { return (found, all) };
            let goes_on =
                after.is_none_or(|after| if filter.ascending { next > after } else { next < after });
            assert!(goes_on, "a page got nowhere: {after:?}, {next}");
            after = Some(next);
        }
    }

    fn rows(&self) -> [u64; 4] {
        let txn = self.db.begin_read().unwrap();
        [
            txn.open_table(AUDIT).unwrap().len().unwrap(),
            txn.open_table(AUDIT_LAST).unwrap().len().unwrap(),
            txn.open_table(POSTINGS).unwrap().len().unwrap(),
            txn.open_table(ZONES).unwrap().len().unwrap(),
        ]
    }
}

fn at(ms: u64) -> UnixMs {
    UnixMs::from_millis(START_MS + ms)
}

fn call_id(number: u64) -> String {
    CallId::new(UnixMs::from_millis(number), [7; 10]).to_string()
}

const LABELS: &[&str] = &["kestra-cus_1", "kestra-cus_2", "kestra", "billing-a", "bill", "ü-1"];
const OUTCOMES: &[(&str, RecordedOutcome)] =
    &[("held", RecordedOutcome::Held), ("spent", RecordedOutcome::Spent), ("doubt", RecordedOutcome::Doubt)];
const EVENTS: &[Event] = &[Event::Admitted, Event::Settled, Event::Doubt, Event::Refused, Event::Replayed];

fn entry(dice: &mut Dice, ms: u64) -> Entry {
    let text = |text: String| Value::String(text);
    let flow = |dice: &mut Dice| Map::from_iter([("flow".to_owned(), text(format!("f{}", dice.below(3))))]);
    let event = dice.of(EVENTS);
    Entry {
        at: at(ms).to_string(),
        event,
        call_id: event.is_of_a_call().then(|| call_id(dice.below(60))),
        label: (dice.below(5) > 0).then(|| dice.of(LABELS).to_owned()),
        decision: (dice.below(2) > 0).then_some(Decision::Forwarded),
        outcome: (dice.below(4) > 0).then(|| dice.of(OUTCOMES).1),
        customer: (dice.below(4) > 0).then(|| format!("cus_{}", dice.below(20))),
        metadata: (dice.below(3) > 0).then(|| flow(dice)),
        stripe_metadata: (dice.below(3) > 0).then(|| flow(dice)),
        hold_id: (dice.below(3) > 0).then(|| format!("hold_{}", dice.below(30))),
        request_id: (dice.below(3) > 0).then(|| format!("req_{}", dice.below(30))),
        stripe_request_id: (dice.below(3) > 0).then(|| format!("req_{}", dice.below(30))),
        ..Entry::default()
    }
}

fn filter(dice: &mut Dice, now_ms: u64) -> AuditFilter {
    let mut filter =
        AuditFilter { all_events: dice.below(2) > 0, ascending: dice.below(2) > 0, ..AuditFilter::default() };
    let flow = format!("f{}", dice.below(3));
    for (chance, field, value) in [
        (3, "label", dice.of(LABELS).to_owned()),
        (3, "outcome", dice.of(OUTCOMES).0.to_owned()),
        (4, "customer", format!("cus_{}", dice.below(22))),
        (6, "call_id", call_id(dice.below(60))),
        (9, "hold_id", format!("hold_{}", dice.below(32))),
        (9, "request_id", format!("req_{}", dice.below(32))),
        (9, "stripe_request_id", format!("req_{}", dice.below(32))),
        (6, "ledger_id", dice.of(&["ledger_even", "ledger_odd", "ledger_none"]).to_owned()),
        (9, "endpoint", "/v1/none".to_owned()),
        // No list of the index has it.
        (9, "method", "POST".to_owned()),
    ] {
        if dice.below(chance) == 0 {
            filter.equal.push((field, value));
        }
    }
    if dice.below(4) == 0 {
        filter.within.push((dice.of(&["metadata", "stripe_metadata"]), "flow".to_owned(), flow));
    }
    if dice.below(4) == 0 {
        filter.label_prefix =
            Some(dice.of(&["", "k", "kestra", "kestra-", "kestra-cus", "bil", "x-", "ü"]).to_owned());
    }
    let mut instant = |chance| (dice.below(chance) == 0).then(|| at(dice.below(now_ms + 1)));
    (filter.since, filter.until) = (instant(4), instant(4));
    filter
}

#[test]
fn the_index_finds_what_reading_everything_finds() {
    let mut answers = 0;
    for seed in 0..5 {
        let mut dice = Dice(seed);
        let (mut log, mut place, mut ms) = (Log::new(), 0, HOUR_MS);
        // Places next to each other, or far apart: within one zone, one block, or over many.
        let stride = [1, 40, 900, 100_000, 1 << 40][usize::try_from(seed % 5).unwrap()];
        for _ in 0..8 {
            let records = (0..dice.below(50)).map(|_| {
                place += 1 + dice.below(stride);
                ms += dice.below(HOUR_MS / 10);
                // What comes late, and a clock that is set back.
                let late = if dice.below(10) == 0 { dice.below(ms) } else { 0 };
                (place, entry(&mut dice, ms - late))
            });
            let records = records.collect();
            log.append(records);
            if dice.below(3) > 0 {
                log.index(usize::try_from(dice.below(90)).unwrap());
            }
            if dice.below(4) == 0 {
                log.drop_below(dice.below(place + 2), usize::try_from(dice.below(40)).unwrap());
            }
            for _ in 0..8 {
                let filter = filter(&mut dice, ms);
                let expected = log.expected(&filter);
                let limit = 1 + usize::try_from(dice.below(7)).unwrap();
                let cost_max = dice.of(&[1, 5, 30, 10_000]);
                let (found, _) = log.found(&filter, limit, cost_max);
                assert_eq!(found, expected, "seed {seed}, {filter:?}, {limit} a page for {cost_max}");
                answers += expected.len();
            }
        }
    }
    assert!(answers > 1_500, "only {answers} rows were compared");
}

#[test]
fn what_is_dropped_leaves_nothing_behind() {
    let mut dice = Dice(1);
    let mut log = Log::new();
    log.append((1..=6_000).map(|place| (place, entry(&mut dice, place))).collect());
    log.index(5_500);
    let whole = log.rows();
    while log.drop_below(4_500, 700) > 0 {}
    let half = log.rows();
    assert_eq!(half[0], 1_501);
    assert!(half[2] < whole[2] && half[3] < whole[3], "{whole:?}, {half:?}");
    log.index_all();
    while log.drop_below(u64::MAX, 1_000) > 0 {}
    assert_eq!(log.rows()[..3], [0; 3]);
    assert!(log.rows()[3] <= 10, "the zone in which the log goes on, and those above it");
    log.append(vec![(6_001, entry(&mut dice, 1))]);
    assert_eq!(log.index(9), Indexed { rows: 1, more: false });
    assert_eq!(log.found(&AuditFilter::default(), 9, 99).0.len(), 1);
}

/// An index of other rules is none: nothing of it is believed, and it is made anew.
#[test]
fn an_index_by_other_rules_is_made_anew() {
    let mut dice = Dice(2);
    let mut log = Log::new();
    log.append((1..=500).map(|place| (place, entry(&mut dice, place))).collect());
    log.index_all();
    log.write(|txn| {
        txn.open_table(INDEX).unwrap().insert(VERSION, INDEX_VERSION + 1).unwrap();
        // By those rules, nothing is found.
        txn.open_table(POSTINGS).unwrap().retain(|_, _| false).unwrap();
    });
    for rows_max in [0, 200, 500] {
        if rows_max > 0 {
            log.index(rows_max);
        }
        for _ in 0..15 {
            let filter = filter(&mut dice, 500);
            assert_eq!(log.found(&filter, 5, 10_000).0, log.expected(&filter), "{rows_max}: {filter:?}");
        }
    }
}

#[test]
fn records_are_read_in_order_and_within_bounds() {
    let mut log = Log::new();
    let places = |log: &Log, after: u64, rows_max, bytes_max| -> Vec<u64> {
        let txn = log.db.begin_read().unwrap();
        let stored =
            log.kept.range(after + 1..).map(|(place, _)| (*place, get(&txn, *place).unwrap().unwrap()));
        let rows = stored.map(Ok::<_, JournalError>);
        let records = within(rows, rows_max, bytes_max).unwrap();
        for (place, sealed) in &records {
            assert_eq!(get(&txn, *place).unwrap().as_ref(), Some(sealed));
            assert_eq!(sealed.to_json(), log.kept[place]);
        }
        records.into_iter().map(|(place, _)| place).collect()
    };
    let last = |log: &Log| last_place(&log.db.begin_read().unwrap()).unwrap();
    assert_eq!((places(&log, 0, 9, 9_999), last(&log)), (vec![], 0));
    log.append([3, 5, 8, 13].into_iter().map(|place| (place, entry(&mut Dice(0), 0))).collect());
    let bytes = get(&log.db.begin_read().unwrap(), 5).unwrap().unwrap().bytes.len();
    assert_eq!(places(&log, 0, 9, 9 * bytes), [3, 5, 8, 13]);
    assert_eq!(places(&log, 3, 2, 9 * bytes), [5, 8]);
    assert_eq!(places(&log, 4, 9, 2 * bytes + bytes / 2), [5, 8], "whole records only");
    assert_eq!(places(&log, 0, 9, 1), [3], "one, however long");
    assert_eq!(places(&log, 13, 9, 9 * bytes), [] as [u64; 0]);
    assert_eq!(last(&log), 13);
    assert_eq!(get(&log.db.begin_read().unwrap(), 4), Ok(None));
}

/// What nearly every record has of its own costs no row of its own.
#[test]
fn ids_share_their_lists() {
    let rows = |with_ids: bool| {
        let mut log = Log::new();
        let id = |kind: &str, n: u64| with_ids.then(|| format!("{kind}_{n}"));
        let entry = |n: u64| Entry {
            at: at(n).to_string(),
            hold_id: id("hold", n),
            request_id: id("req_own", n),
            stripe_request_id: id("req", n),
            ..Entry::default()
        };
        log.append((1..=4_000).map(|n| (n, entry(n))).collect());
        log.index_all();
        log.rows()[2]
    };
    let more = rows(true) - rows(false);
    assert!((250..=256).contains(&more), "{more} rows for 12,000 ids");
}

/// 24,000 records, two for each call, six blocks: what is asked for is found by reading hardly more than what it is.
#[test]
fn little_is_read_for_little() {
    let record = |n: u64| {
        let of_call = |event, outcome| Entry {
            at: at(n * 1_000).to_string(),
            event,
            call_id: Some(call_id(n.div_ceil(2))),
            outcome: Some(outcome),
            label: Some(format!("{}-{}", if n % 4 < 2 { "even" } else { "odd" }, n / 2 % 100)),
            endpoint: Some(if n % 4 < 2 { "/v1/charges" } else { "/v1/refunds" }.to_owned()),
            // One refund alone was forwarded.
            decision: (n % 4 < 2 || n == 1_554).then_some(Decision::Forwarded),
            customer: Some(format!("cus_{n}")),
            hold_id: Some(format!("hold_{}", n.div_ceil(2))),
            request_id: Some(format!("req_{n}")),
            stripe_request_id: n.is_multiple_of(2).then(|| format!("req_{n}")),
            ..Entry::default()
        };
        match n {
            // In the place of the end of a call: that one is under way, as no other.
            12_346 => Entry {
                at: at(n * 1_000).to_string(),
                event: Event::Refused,
                label: Some("rare-1".to_owned()),
                ..Entry::default()
            },
            _ if n % 2 == 1 => of_call(Event::Admitted, RecordedOutcome::Held),
            _ => of_call(Event::Settled, RecordedOutcome::Spent),
        }
    };
    let mut log = Log::new();
    log.append((1..=24_000).map(|n| (n, record(n))).collect());
    log.index_all();
    let equal = |pairs: &[(&'static str, &str)]| AuditFilter {
        equal: pairs.iter().map(|(field, value)| (*field, (*value).to_owned())).collect(),
        ..AuditFilter::default()
    };
    let all = |filter: AuditFilter| AuditFilter { all_events: true, ..filter };
    let label_prefix = Some("rare-".to_owned());
    let window = AuditFilter { since: Some(at(9_000_500)), until: Some(at(9_001_500)), ..equal(&[]) };
    // Lists that are long cost a row of each for every block, whether they have anything in common or not.
    let long_index = 2 * 6 + 2;
    // Lists that ids share have a row for each block, and of each record two places among 256 lists.
    let shared_records = 24_000 * 2 / 256 * 5 / 4;
    for (what, filter, count, index_max, records_max) in [
        ("a value", equal(&[("customer", "cus_5000")]), 1, 4, 1),
        ("a value among many", equal(&[("customer", "cus_5000"), ("outcome", "spent")]), 1, 8, 1),
        ("a call", all(equal(&[("call_id", &call_id(3_000))])), 2, 4, 2),
        ("a hold", all(equal(&[("hold_id", "hold_3000")])), 2, long_index, shared_records),
        ("a request", equal(&[("request_id", "req_6000")]), 1, long_index, shared_records),
        ("a request of no call", equal(&[("stripe_request_id", "req_0")]), 0, long_index, shared_records),
        ("a request of a customer", equal(&[("request_id", "req_6000"), ("customer", "cus_6000")]), 1, 8, 1),
        ("a prefix", AuditFilter { label_prefix, ..AuditFilter::default() }, 1, 4, 1),
        ("a window", all(window), 1, 30, 64),
        ("what is under way", equal(&[("outcome", "held")]), 1, long_index, 1),
        (
            "a rare pair",
            all(equal(&[("endpoint", "/v1/refunds"), ("decision", "forwarded")])),
            1,
            long_index,
            1,
        ),
        ("no such pair", all(equal(&[("event", "admitted"), ("outcome", "spent")])), 0, long_index, 0),
    ] {
        for ascending in [false, true] {
            let filter = AuditFilter { ascending, ..filter.clone() };
            let (found, cost) = log.found(&filter, 1_000, 10_000);
            assert_eq!(found.len(), count, "{what}");
            assert!(cost.index <= index_max && cost.records <= records_max, "{what}: {cost:?}");
        }
    }
}

/// Where a term is rare, every segment of the log is asked once whether it has it, and gaps between segments are not.
#[test]
fn a_rare_term_costs_a_row_for_each_segment() {
    const SEGMENT: u64 = 8 * 4_096;
    let mut log = Log::new();
    let mut dice = Dice(3);
    let places = (0..40).chain(1_000_000..1_000_040).flat_map(|n| [n * SEGMENT + 1, n * SEGMENT + 20_000]);
    let mut rare = |place| Entry {
        label: (place == 30 * SEGMENT + 1).then(|| "rare".to_owned()),
        ..entry(&mut dice, place)
    };
    log.append(places.map(|place| (place, rare(place))).collect::<Vec<_>>());
    log.index_all();
    for ascending in [false, true] {
        let equal = vec![("label", "rare".to_owned())];
        let filter = AuditFilter { equal, ascending, all_events: true, ..AuditFilter::default() };
        let (found, cost) = log.found(&filter, 9, 10_000);
        assert_eq!(found.len(), 1);
        assert!((30..=90).contains(&cost.index) && cost.records == 1, "{cost:?}");
    }
}
