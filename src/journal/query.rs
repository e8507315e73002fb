//! What is asked of the log: lists of the index are followed side by side, block by block, and only records that stand in
//! all of them are read and compared.
//!
//! Where one of the lists is short, a page costs a row for every segment of the log ([`crate::journal::postings`]), and each
//! other list is looked up once for each block of that one. Two lists that are both long and hardly overlap cost one row
//! each for every 4,096 places, which is what their sets are compared by. A page that has cost [`COST_MAX`] ends, and says
//! from where to go on.

use std::collections::HashMap;

use redb::{ReadOnlyTable, ReadTransaction, ReadableTable};
use serde_json::{Map, Value};

use crate::id::CallId;
use crate::journal::bits::{Bits, block_of, first_of, last_of};
use crate::journal::fields::Fields;
use crate::journal::postings::{self, Sought};
use crate::journal::terms::{self, Term};
use crate::journal::zones::{self, Window};
use crate::journal::{
    AUDIT, AuditFilter, Bytes, INDEX, INDEX_VERSION, INDEXED_TO, JournalError, POSTINGS, Page, VERSION,
    ZONES, open, sealed_of,
};
use crate::time::UnixMs;

/// Rows that one page may read before it is cut short and told to go on.
const COST_MAX: usize = 10_000;

/// Records, and the place behind which to go on.
type Records = Page<Map<String, Value>, u64>;

/// One page of what a filter finds, behind the place `after` in the order that the filter asks for; by default one row for
/// each call, in its last outcome, and every other record.
///
/// A page may be short, or empty, and have a `next` all the same.
///
/// # Errors
/// [`JournalError`].
pub fn query(
    txn: &ReadTransaction,
    filter: &AuditFilter,
    after: Option<u64>,
    limit: usize,
) -> Result<Records, JournalError> {
    Ok(search(txn, filter, after, limit, COST_MAX)?.0)
}

/// What a page cost, in rows read.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cost {
    /// Of the index.
    pub(super) index: usize,
    /// Of the log.
    pub(super) records: usize,
}

pub(super) fn search(
    txn: &ReadTransaction,
    filter: &AuditFilter,
    after: Option<u64>,
    limit: usize,
    cost_max: usize,
) -> Result<(Records, Cost), JournalError> {
    let Some(audit) = open(txn, AUDIT)? else {
        return Ok((Page { items: Vec::new(), next: None }, Cost::default()));
    };
    let indexed_to = indexed_to(txn)?;
    // Both ends belong to it.
    let (low, high) = match (after, filter.ascending) {
        (None, _) => (0, u64::MAX),
        (Some(after), true) => (after.saturating_add(1), u64::MAX),
        (Some(after), false) => (0, after.saturating_sub(1)),
    };
    let newest = if filter.all_events { HashMap::new() } else { newest_events(&audit, indexed_to)? };
    let page = Search {
        audit,
        filter,
        newest,
        limit,
        cost_max,
        items: Vec::new(),
        done: None,
        cost: Cost::default(),
    };
    page.run(txn, indexed_to, low, high)
}

/// Up to which place the index covers the log; 0 where there is none that this build can read.
fn indexed_to(txn: &ReadTransaction) -> Result<u64, JournalError> {
    let Some(state) = open(txn, INDEX)? else { return Ok(0) };
    let number = |name| Ok::<_, JournalError>(state.get(name)?.map(|found| found.value()));
    if number(VERSION)? != Some(INDEX_VERSION) {
        return Ok(0);
    }
    Ok(number(INDEXED_TO)?.unwrap_or(0))
}

/// The last event of each call in the part of the log that the index does not cover yet.
fn newest_events(
    audit: &impl ReadableTable<u64, Bytes>,
    indexed_to: u64,
) -> Result<HashMap<CallId, u64>, JournalError> {
    let mut newest = HashMap::new();
    for found in audit.range(indexed_to.saturating_add(1)..)? {
        let (place, stored) = found?;
        if let Some(call) = Fields::read(&sealed_of(stored.value())?.bytes)?.call()? {
            newest.insert(call, place.value());
        }
    }
    Ok(newest)
}

/// Whether a page has room for more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Go {
    On,
    Stop,
}

struct Search<'a> {
    audit: ReadOnlyTable<u64, Bytes>,
    filter: &'a AuditFilter,
    /// [`newest_events`].
    newest: HashMap<CallId, u64>,
    limit: usize,
    cost_max: usize,
    items: Vec<Map<String, Value>>,
    /// How far the page got: everything up to here was looked at, or need not be.
    done: Option<u64>,
    cost: Cost,
}

impl Search<'_> {
    fn run(
        mut self,
        txn: &ReadTransaction,
        indexed_to: u64,
        low: u64,
        high: u64,
    ) -> Result<(Records, Cost), JournalError> {
        let (tail, covered) = ((low.max(indexed_to.saturating_add(1)), high), (low, high.min(indexed_to)));
        let went = if self.filter.ascending {
            match self.covered(txn, covered)? {
                Go::On => self.tail(tail)?,
                Go::Stop => Go::Stop,
            }
        } else {
            match self.tail(tail)? {
                Go::On => self.covered(txn, covered)?,
                Go::Stop => Go::Stop,
            }
        };
        let next = self.done.filter(|_| went == Go::Stop);
        Ok((Page { items: self.items, next }, self.cost))
    }

    /// A page that has cost enough ends, if it got anywhere.
    fn is_spent(&self) -> bool {
        self.cost.index + self.cost.records >= self.cost_max && self.done.is_some()
    }

    /// A full page ends where there is something for the next.
    fn is_over(&self) -> bool {
        self.items.len() >= self.limit || self.is_spent()
    }

    /// The part of the log that the index does not cover yet, record by record.
    fn tail(&mut self, (low, high): (u64, u64)) -> Result<Go, JournalError> {
        if low > high {
            return Ok(Go::On);
        }
        let mut range = self.audit.range(low..=high)?;
        while let Some(found) = if self.filter.ascending { range.next() } else { range.next_back() } {
            if self.is_over() {
                return Ok(Go::Stop);
            }
            let (place, stored) = found?;
            self.look(place.value(), stored.value())?;
        }
        Ok(Go::On)
    }

    /// The part that the index covers, block by block.
    fn covered(&mut self, txn: &ReadTransaction, (low, high): (u64, u64)) -> Result<Go, JournalError> {
        let (Some(postings), true) = (open(txn, POSTINGS)?, low <= high) else { return Ok(Go::On) };
        let mut lists = Lists::of(self.filter, postings, open(txn, ZONES)?);
        let ascending = self.filter.ascending;
        // What is done never lies beyond the part: the tail that follows it would be taken for done, too.
        let before = |block: u64| {
            if ascending { first_of(block).saturating_sub(1).min(high) } else { last_of(block) + 1 }
        };
        let mut target = block_of(if ascending { low } else { high });
        loop {
            self.cost.index = lists.cost();
            if self.is_spent() {
                return Ok(Go::Stop);
            }
            let Some(found) = lists.agree(target, ascending)? else { return Ok(Go::On) };
            if found != target {
                // Nothing lies between.
                (target, self.done) = (found, Some(before(found)));
                continue;
            }
            let mut places = lists.places(target, self.filter.all_events)?.places(target);
            places.retain(|place| (low..=high).contains(place));
            if !ascending {
                places.reverse();
            }
            self.cost.index = lists.cost();
            for place in places {
                if self.is_over() {
                    return Ok(Go::Stop);
                }
                // The index may know more than the log holds, where a build without it dropped records.
                if let Some(stored) = self.audit.get(place)? {
                    self.look(place, stored.value())?;
                }
            }
            let next = if ascending { target.checked_add(1) } else { target.checked_sub(1) };
            let Some(next) = next else { return Ok(Go::On) };
            (target, self.done) = (next, Some(before(next)));
        }
    }

    /// Compares one record, and takes it if it is one of those that are asked for.
    fn look(&mut self, place: u64, stored: &[u8]) -> Result<(), JournalError> {
        self.cost.records += 1;
        self.done = Some(place);
        let sealed = sealed_of(stored)?;
        let newest = if self.newest.is_empty() { None } else { Fields::read(&sealed.bytes)?.call()? };
        if newest.and_then(|call| self.newest.get(&call)).is_some_and(|newest| *newest != place) {
            return Ok(());
        }
        let record = sealed.to_json();
        if self.filter.matches(&record) {
            self.items.push(record);
        }
        Ok(())
    }
}

/// The lists in all of which a record must stand, and the window of time.
struct Lists {
    postings: ReadOnlyTable<postings::Key, Bytes>,
    terms: Vec<Found>,
    window: Option<Window<ReadOnlyTable<zones::Key, Bytes>>>,
    /// Rows of postings that were read.
    rows: usize,
}

/// One list, and its row that was read last.
struct Found {
    term: Term,
    row: Option<(u64, Bits)>,
}

impl Lists {
    fn of(
        filter: &AuditFilter,
        postings: ReadOnlyTable<postings::Key, Bytes>,
        zones: Option<ReadOnlyTable<zones::Key, Bytes>>,
    ) -> Self {
        let is_windowed = filter.since.is_some() || filter.until.is_some();
        let window = zones.filter(|_| is_windowed).map(|table| Window {
            table,
            since: filter.since.map_or(0, UnixMs::millis),
            until: filter.until.map_or(u64::MAX, UnixMs::millis),
            rows: 0,
        });
        let terms = terms::of_filter(filter).into_iter().map(|term| Found { term, row: None }).collect();
        Self { postings, terms, window, rows: 0 }
    }

    fn cost(&self) -> usize {
        self.rows + self.window.as_ref().map_or(0, |window| window.rows)
    }

    /// `target` where every list has something in that block; else a block that comes later, before which they cannot all
    /// have anything. `None` when one of them has no more.
    fn agree(&mut self, target: u64, ascending: bool) -> Result<Option<u64>, JournalError> {
        for list in &mut self.terms {
            let is_ahead = |block: u64| if ascending { block >= target } else { block <= target };
            if list.row.as_ref().is_none_or(|(block, _)| !is_ahead(*block)) {
                self.rows += 1;
                match postings::seek(&self.postings, list.term, target, ascending)? {
                    Sought::Row(block, bits) => list.row = Some((block, bits)),
                    Sought::NotBefore(block) => return Ok(Some(block)),
                    Sought::End => return Ok(None),
                }
            }
            if let Some((block, _)) = list.row.as_ref().filter(|(block, _)| *block != target) {
                return Ok(Some(*block));
            }
        }
        match &mut self.window {
            Some(window) => window.seek(target, ascending),
            None => Ok(Some(target)),
        }
    }

    /// What all lists have in the block on which they agree.
    fn places(&mut self, block: u64, all_events: bool) -> Result<Bits, JournalError> {
        let mut places = Bits::ALL;
        for (_, bits) in self.terms.iter().filter_map(|list| list.row.as_ref()) {
            places.keep(bits);
        }
        if let Some(window) = &mut self.window {
            places.keep(&window.places(block)?);
        }
        if !all_events && !places.is_empty() {
            self.rows += 1;
            if let Some(stored) = self.postings.get(postings::key(Term::SUPERSEDED, block))? {
                places.remove(&Bits::decode(stored.value())?);
            }
        }
        Ok(places)
    }
}
