//! When the records of a stretch of the log were made: the earliest and the latest time of every 64 places, of every
//! 64 of those, and so on up. A window of time is found by going up and down this tree, wherever the log grows to.
//!
//! Not a search by halves: an operator may lower a ledger's clock, and what many nodes send arrives in any order. Where
//! the log is in order of time, at most two zones of 64 reach into a window without lying in it; where a late node's
//! records stand among newer ones, the zones that hold both reach into every window between.

use std::collections::BTreeMap;

use redb::{ReadableTable, Table};

use crate::journal::bits::Bits;
use crate::journal::{Bytes, JournalError};

/// Levels above each other, enough for every place.
const LEVELS: u8 = 10;
/// Bits of a place that one level tells apart.
const LEVEL_BITS: u32 = 6;
const CHILD_MASK: u64 = 63;
const CHILD_BYTES: usize = 17;

/// Key: level, and the number of the row in it. A row of level 0 tells of one block.
pub(super) type Key = (u8, u64);

/// The earliest and the latest time of a zone, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    min: u64,
    max: u64,
}

impl Span {
    fn join(self, other: Self) -> Self {
        Self { min: self.min.min(other.min), max: self.max.max(other.max) }
    }
}

/// One row: its children that hold anything.
#[derive(Debug, Default)]
struct Row(BTreeMap<u8, Span>);

impl Row {
    fn decode(stored: &[u8]) -> Result<Self, JournalError> {
        let (children, rest) = stored.as_chunks::<CHILD_BYTES>();
        if !rest.is_empty() {
            return Err(JournalError::Corrupt("zone"));
        }
        let number = |bytes: &[u8]| bytes.first_chunk().copied().map_or(0, u64::from_be_bytes);
        let child = |bytes: &[u8; CHILD_BYTES]| {
            (bytes[0], Span { min: number(&bytes[1..]), max: number(&bytes[9..]) })
        };
        Ok(Self(children.iter().map(child).collect()))
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.0.len() * CHILD_BYTES);
        for (child, span) in &self.0 {
            bytes.push(*child);
            bytes.extend(span.min.to_be_bytes());
            bytes.extend(span.max.to_be_bytes());
        }
        bytes
    }
}

fn child_of(number: u64) -> u8 {
    u8::try_from(number & CHILD_MASK).unwrap_or_default()
}

/// Notes the times of records, given as place and milliseconds.
pub(super) fn note(
    table: &mut Table<'_, Key, Bytes>,
    times: impl Iterator<Item = (u64, u64)>,
) -> Result<(), JournalError> {
    let mut zones: BTreeMap<u64, Span> = BTreeMap::new();
    let join = |zones: &mut BTreeMap<u64, Span>, number, span: Span| {
        zones.entry(number).and_modify(|known| *known = known.join(span)).or_insert(span);
    };
    for (place, at) in times {
        join(&mut zones, place >> LEVEL_BITS, Span { min: at, max: at });
    }
    for level in 0..LEVELS {
        let mut rows: BTreeMap<u64, Vec<(u8, Span)>> = BTreeMap::new();
        let mut above = BTreeMap::new();
        for (number, span) in zones {
            rows.entry(number >> LEVEL_BITS).or_default().push((child_of(number), span));
            join(&mut above, number >> LEVEL_BITS, span);
        }
        for (number, children) in rows {
            let mut row = read(table, (level, number))?;
            for (child, span) in children {
                row.0.entry(child).and_modify(|known| *known = known.join(span)).or_insert(span);
            }
            table.insert((level, number), row.encode().as_slice())?;
        }
        zones = above;
    }
    Ok(())
}

/// Forgets the zones that lie wholly below a place; all of them, or none where one cannot be read.
pub(super) fn forget_below(table: &mut Table<'_, Key, Bytes>, place: u64) -> Result<(), JournalError> {
    let mut touched = Vec::new();
    for level in 0..LEVELS {
        let kept = place >> (LEVEL_BITS * (u32::from(level) + 1));
        for found in table.range((level, 0)..=(level, kept >> LEVEL_BITS))? {
            let (key, stored) = found?;
            let (_, number) = key.value();
            let mut row = Row::decode(stored.value())?;
            row.0.retain(|child, _| number << LEVEL_BITS | u64::from(*child) >= kept);
            touched.push((key.value(), row));
        }
    }
    for (key, row) in touched {
        if row.0.is_empty() {
            table.remove(key)?;
        } else {
            table.insert(key, row.encode().as_slice())?;
        }
    }
    Ok(())
}

fn read(table: &impl ReadableTable<Key, Bytes>, key: Key) -> Result<Row, JournalError> {
    let found = table.get(key)?;
    Ok(found.map(|stored| Row::decode(stored.value())).transpose()?.unwrap_or_default())
}

/// A window of time: what may lie in it.
#[derive(Debug)]
pub(super) struct Window<T> {
    pub(super) table: T,
    /// Milliseconds, the first that is in it.
    pub(super) since: u64,
    /// Milliseconds, the first that is in it no more.
    pub(super) until: u64,
    /// Rows that were read.
    pub(super) rows: usize,
}

impl<T: ReadableTable<Key, Bytes>> Window<T> {
    fn reaches(&self, span: Span) -> bool {
        span.min < self.until && span.max >= self.since
    }

    fn read(&mut self, level: u8, number: u64) -> Result<Row, JournalError> {
        self.rows += 1;
        read(&self.table, (level, number))
    }

    /// The block at or behind `target` (before it, when descending) that comes next and may hold something of the window.
    pub(super) fn seek(&mut self, target: u64, ascending: bool) -> Result<Option<u64>, JournalError> {
        // `at` is a child of a row of `level`.
        let (mut level, mut at) = (1, target);
        loop {
            let row = self.read(level, at >> LEVEL_BITS)?;
            let from = child_of(at);
            let mut reached = row.0.iter().filter(|(_, span)| self.reaches(**span)).map(|(child, _)| *child);
            let child = if ascending {
                reached.find(|child| *child >= from)
            } else {
                reached.rev().find(|child| *child <= from)
            };
            match child {
                Some(child) => {
                    let found = at & !CHILD_MASK | u64::from(child);
                    if level == 1 {
                        return Ok(Some(found));
                    }
                    // All of it lies beyond: what was left behind was left for the row beside it.
                    level -= 1;
                    at = found << LEVEL_BITS | if ascending { 0 } else { CHILD_MASK };
                }
                None if level + 1 == LEVELS => return Ok(None),
                None => {
                    let row = at >> LEVEL_BITS;
                    let Some(next) = (if ascending { row.checked_add(1) } else { row.checked_sub(1) }) else {
                        return Ok(None);
                    };
                    level += 1;
                    at = next;
                }
            }
        }
    }

    /// The places of a block that may lie in the window.
    pub(super) fn places(&mut self, block: u64) -> Result<Bits, JournalError> {
        let row = self.read(0, block)?;
        let mut bits = Bits::NONE;
        for (child, span) in &row.0 {
            if self.reaches(*span) {
                bits.add_word(*child);
            }
        }
        Ok(bits)
    }
}
