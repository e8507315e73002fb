//! Rows that were loaded from a store across a wire, and what else would have to be loaded or locked: rules run over them in
//! memory, and run again when something was missing.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::marker::PhantomData;
use std::ops::Bound;

use redb::{Key, Value};

use crate::ledger::LedgerError;
use crate::ledger::changes::Changes;
use crate::ledger::row::{Lock, Span, TABLES, Table};
use crate::ledger::source::Order;

/// Rows of a range that are loaded at first; four times as many each time that they were too few.
const RANGE_ROWS_FIRST: usize = 256;

type Bytes = Box<[u8]>;
/// Key and value.
type Row = (Bytes, Bytes);

/// A part of a table, as bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Part {
    pub(crate) table: u8,
    pub(crate) from: Bound<Box<[u8]>>,
    pub(crate) to: Bound<Box<[u8]>>,
    pub(crate) order: Order,
}

/// The first rows of a part.
#[derive(Debug)]
pub(crate) struct PartRows {
    pub(crate) rows: Vec<Row>,
    /// How many were asked for. When there are as many, there may be more.
    pub(crate) limit: usize,
}

/// What has to be loaded and locked.
#[derive(Clone, Debug, Default)]
pub(crate) struct Needs {
    pub(crate) rows: [HashSet<Box<[u8]>>; TABLES],
    /// Parts, and how many rows of them.
    pub(crate) parts: HashMap<Part, usize>,
    pub(crate) locks: BTreeSet<u32>,
}

impl Needs {
    pub(crate) fn is_empty(&self) -> bool {
        self.rows.iter().all(HashSet::is_empty) && self.parts.is_empty() && self.locks.is_empty()
    }

    pub(crate) fn join(&mut self, more: Self) {
        for (rows, more) in self.rows.iter_mut().zip(more.rows) {
            rows.extend(more);
        }
        for (part, limit) in more.parts {
            let known = self.parts.entry(part).or_default();
            *known = limit.max(*known);
        }
        self.locks.extend(more.locks);
    }
}

/// Rows that were seen lately: what a row probably is, to find out what has to be loaded. Nothing is decided by them.
#[derive(Debug, Default)]
pub(crate) struct Hints {
    young: [HashMap<Bytes, Bytes>; TABLES],
    old: [HashMap<Bytes, Bytes>; TABLES],
    count: usize,
}

/// Rows that are remembered as young ones; as many are remembered as old ones.
const HINTS_MAX: usize = 8_192;

impl Hints {
    pub(crate) fn note(&mut self, table: usize, key: &[u8], value: Option<&[u8]>) {
        let (Some(young), Some(old)) = (self.young.get_mut(table), self.old.get_mut(table)) else { return };
        if let Some(value) = value {
            self.count += 1;
            young.insert(key.into(), value.into());
        } else {
            young.remove(key);
            old.remove(key);
        }
        if self.count > HINTS_MAX {
            self.count = 0;
            self.old = std::mem::take(&mut self.young);
        }
    }

    fn get(&self, table: usize, key: &[u8]) -> Option<&[u8]> {
        [&self.young, &self.old].into_iter().find_map(|rows| rows.get(table)?.get(key)).map(|value| &**value)
    }
}

/// Rows that were loaded. One that was not seems not to be there, or to be what it probably is, so that all that is needed
/// is found out at once; what was done on such rows is thrown away, and done again.
#[derive(Debug, Default)]
pub(crate) struct Loaded {
    rows: [HashMap<Bytes, Option<Bytes>>; TABLES],
    parts: HashMap<Part, PartRows>,
    /// What is locked. Whoever only reads locks nothing.
    locks: Option<BTreeSet<u32>>,
    /// What rows probably are, where it is only to be found out what is needed.
    hints: Option<Hints>,
    needs: RefCell<Needs>,
}

impl Loaded {
    /// For whoever only reads.
    pub(crate) fn to_read() -> Self {
        Self::default()
    }

    /// For whoever writes, under these locks.
    pub(crate) fn to_write(locks: BTreeSet<u32>) -> Self {
        Self { locks: Some(locks), ..Self::default() }
    }

    /// To find out what whoever writes will need: rows are what they probably are.
    pub(crate) fn to_guess(hints: Hints) -> Self {
        Self { locks: Some(BTreeSet::new()), ..Self::to_guess_reads(hints) }
    }

    /// To find out what whoever only reads will need.
    pub(crate) fn to_guess_reads(hints: Hints) -> Self {
        Self { hints: Some(hints), ..Self::default() }
    }

    pub(crate) fn into_hints(self) -> Hints {
        self.hints.unwrap_or_default()
    }

    /// What was missing since it was asked last.
    pub(crate) fn take_needs(&self) -> Needs {
        self.needs.take()
    }

    pub(crate) fn add_row(&mut self, table: usize, key: Box<[u8]>, value: Option<Box<[u8]>>) {
        if let Some(rows) = self.rows.get_mut(table) {
            rows.insert(key, value);
        }
    }

    pub(crate) fn add_part(&mut self, part: Part, rows: PartRows) {
        self.parts.insert(part, rows);
    }

    /// What is locked.
    pub(crate) fn locks(&self) -> impl Iterator<Item = u32> {
        self.locks.iter().flatten().copied()
    }

    /// All rows that were loaded by their keys.
    pub(crate) fn rows(&self) -> impl Iterator<Item = (usize, &[u8], Option<&[u8]>)> {
        let tables = self.rows.iter().enumerate();
        tables
            .flat_map(|(table, rows)| rows.iter().map(move |(key, value)| (table, &**key, value.as_deref())))
    }

    fn need_lock(&self, lock: u32) {
        if self.locks.as_ref().is_some_and(|locks| !locks.contains(&lock)) {
            self.needs.borrow_mut().locks.insert(lock);
        }
    }

    pub(crate) fn will_write<K: Key, V: Value>(&self, table: &Table<K, V>, key: &K::SelfType<'_>) {
        match (table.lock)(key) {
            Lock::Nothing => {}
            Lock::ToWrite(lock) | Lock::Always(lock) => self.need_lock(lock),
        }
    }

    pub(crate) fn get<K: Key, V: Value, T>(
        &self,
        table: &Table<K, V>,
        key: &K::SelfType<'_>,
        read: impl FnOnce(V::SelfType<'_>) -> Result<T, LedgerError>,
    ) -> Result<Option<T>, LedgerError> {
        if let Lock::Always(lock) = (table.lock)(key) {
            self.need_lock(lock);
        }
        let (number, bytes) = (usize::from(table.number), K::as_bytes(key));
        let bytes = bytes.as_ref();
        if let Some(row) = self.rows.get(number).and_then(|rows| rows.get(bytes)) {
            return row.as_deref().map(|value| read(V::from_bytes(value))).transpose();
        }
        if let Some(rows) = self.needs.borrow_mut().rows.get_mut(number) {
            rows.insert(bytes.into());
        }
        let hint = self.hints.as_ref().and_then(|hints| hints.get(number, bytes));
        hint.map(|value| read(V::from_bytes(value))).transpose()
    }

    pub(crate) fn range<'s, K: Key, V: Value, T, F>(
        &'s self,
        table: &Table<K, V>,
        range: &Span<K::SelfType<'_>>,
        order: Order,
        beside: Option<&Changes>,
        read: F,
    ) -> LoadedRows<'s, K, V, F>
    where
        F: FnMut(K::SelfType<'_>, V::SelfType<'_>) -> Result<T, LedgerError>,
    {
        let bytes =
            |bound: &Bound<K::SelfType<'_>>| bound.as_ref().map(|key| K::as_bytes(key).as_ref().into());
        let part = Part { table: table.number, from: bytes(&range.0), to: bytes(&range.1), order };
        let ahead = |a: &[u8], b: &[u8]| match order {
            Order::Ascending => K::compare(a, b),
            Order::Descending => K::compare(b, a),
        };
        let known = self.parts.get(&part);
        let mut rows = known.map_or_else(Vec::new, |known| known.rows.clone());
        let next_limit = match known {
            None => Some(RANGE_ROWS_FIRST),
            Some(known) => (known.rows.len() == known.limit).then(|| known.limit.saturating_mul(4)),
        };
        let last = rows.last().map(|(key, _)| key.clone());
        if let Some(beside) = beside {
            let is_in = |key: &[u8]| {
                part.has::<K>(key)
                    // Behind the last that was loaded there may be others before it.
                    && (next_limit.is_none() || last.as_ref().is_some_and(|last| ahead(key, last).is_le()))
            };
            let changed: HashMap<&[u8], Option<&[u8]>> =
                beside.of(table).filter(|(key, _)| is_in(key)).collect();
            rows.retain(|(key, _)| !changed.contains_key(&**key));
            rows.extend(changed.into_iter().filter_map(|(key, value)| Some((key.into(), value?.into()))));
            rows.sort_by(|(a, _), (b, _)| ahead(a, b));
        }
        let more = next_limit.map(|limit| (self, part, limit));
        LoadedRows { rows: rows.into_iter(), more, read, of: PhantomData }
    }
}

impl Part {
    fn has<K: Key>(&self, key: &[u8]) -> bool {
        let starts = match &self.from {
            Bound::Included(from) => K::compare(from, key).is_le(),
            Bound::Excluded(from) => K::compare(from, key).is_lt(),
            Bound::Unbounded => true,
        };
        let ends = match &self.to {
            Bound::Included(to) => K::compare(key, to).is_le(),
            Bound::Excluded(to) => K::compare(key, to).is_lt(),
            Bound::Unbounded => true,
        };
        starts && ends
    }
}

/// Rows of a part in order, as far as they were loaded; whoever comes to the end of those needs more.
pub(crate) struct LoadedRows<'s, K, V, F> {
    rows: std::vec::IntoIter<Row>,
    more: Option<(&'s Loaded, Part, usize)>,
    read: F,
    of: PhantomData<(K, V)>,
}

impl<K: Key, V: Value, T, F> Iterator for LoadedRows<'_, K, V, F>
where
    F: FnMut(K::SelfType<'_>, V::SelfType<'_>) -> Result<T, LedgerError>,
{
    type Item = Result<T, LedgerError>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some((key, value)) = self.rows.next() {
            return Some((self.read)(K::from_bytes(&key), V::from_bytes(&value)));
        }
        let (loaded, part, limit) = self.more.take()?;
        loaded.needs.borrow_mut().parts.insert(part, limit);
        None
    }
}
