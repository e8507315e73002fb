//! The index follows the log in bounded steps, by a cursor that is kept beside it, and forgets what the log drops.

use std::collections::BTreeMap;

use crate::journal::bits::{Bits, block_of};
use crate::journal::fields::Fields;
use crate::journal::postings;
use crate::journal::terms::{self, Term};
use crate::journal::{
    AUDIT, AUDIT_LAST, Bytes, INDEX, INDEX_VERSION, INDEXED_TO, JournalError, POSTINGS, VERSION, ZONES,
    split_sealed, zones,
};
use crate::time::UnixMs;
use redb::{ReadableTable, Table, WriteTransaction};

/// What one step of the index came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Indexed {
    /// Records that it took in.
    pub rows: usize,
    /// Whether there may be more.
    pub more: bool,
}

/// One change of the index: a term, and a place under it.
type Posting = (Term, u64);

/// Lets the index follow the log by at most so many records.
///
/// All postings of a step are written in their order, and those of one block to one list are one row: what all records
/// share costs a row for each step, not for each record.
///
/// # Errors
/// [`JournalError`]: the cursor has not moved.
pub fn index_step(txn: &WriteTransaction, rows_max: usize) -> Result<Indexed, JournalError> {
    let from = start_of(txn)?;
    let (mut to, mut rows) = (from, 0);
    let (mut postings, mut times, mut calls) = (Vec::new(), Vec::new(), Vec::new());
    for found in txn.open_table(AUDIT)?.range(from.saturating_add(1)..)?.take(rows_max) {
        let (place, stored) = found?;
        (to, rows) = (place.value(), rows + 1);
        let record = Record::read(stored.value())?;
        postings.extend(record.terms.iter().map(|term| (*term, to)));
        times.push((to, record.at));
        calls.extend(record.call.map(|call| (call, to)));
    }
    let indexed = Indexed { rows, more: rows == rows_max };
    if rows == 0 {
        return Ok(indexed);
    }
    let mut calls_last = txn.open_table(AUDIT_LAST)?;
    let (last, superseded) = last_events(&calls_last, &calls)?;
    postings.extend(superseded.into_iter().map(|place| (Term::SUPERSEDED, place)));
    let mut table = txn.open_table(POSTINGS)?;
    // Everything is read before the first row is written: a step that fails can be made again.
    let rows = changed(&table, postings, Bits::join)?;
    write(&mut table, rows)?;
    for (call, place) in last {
        calls_last.insert(&call, place)?;
    }
    zones::note(&mut txn.open_table(ZONES)?, times.into_iter())?;
    txn.open_table(INDEX)?.insert(INDEXED_TO, to)?;
    Ok(indexed)
}

/// Deletes at most so many of the records below a place, with everything that the index knows of them. Answers how many
/// there were.
///
/// # Errors
/// [`JournalError`].
pub fn drop_below(txn: &WriteTransaction, place: u64, rows_max: usize) -> Result<usize, JournalError> {
    let (mut postings, mut calls, mut places) = (Vec::new(), Vec::new(), Vec::new());
    for found in txn.open_table(AUDIT)?.range(..place)?.take(rows_max) {
        let (place, stored) = found?;
        let (place, record) = (place.value(), Record::read(stored.value())?);
        postings.extend(record.terms.iter().chain([&Term::SUPERSEDED]).map(|term| (*term, place)));
        calls.extend(record.call.map(|call| (call, place)));
        places.push(place);
    }
    let Some(last) = places.last() else { return Ok(0) };
    // Everything is read before the first row goes: a record must not stay without its postings.
    let mut table = txn.open_table(POSTINGS)?;
    let rows = changed(&table, postings, Bits::remove)?;
    zones::forget_below(&mut txn.open_table(ZONES)?, last.saturating_add(1))?;
    write(&mut table, rows)?;
    let mut lasts = txn.open_table(AUDIT_LAST)?;
    for (call, place) in calls {
        let gone = lasts.get(&call)?.is_some_and(|last| last.value() <= place);
        if gone {
            lasts.remove(&call)?;
        }
    }
    let mut audit = txn.open_table(AUDIT)?;
    for place in &places {
        audit.remove(place)?;
    }
    Ok(places.len())
}

/// What the index knows of one record.
struct Record {
    terms: Vec<Term>,
    at: u64,
    call: Option<Call>,
}

impl Record {
    fn read(stored: &[u8]) -> Result<Self, JournalError> {
        let (_, bytes) = split_sealed(stored)?;
        let record: Fields<'_> =
            serde_json::from_slice(bytes).map_err(|_| JournalError::Corrupt("record"))?;
        Ok(Self {
            terms: terms::of_record(&record),
            at: record.text("at").and_then(UnixMs::parse).unwrap_or_default().millis(),
            call: record.call()?.map(|call| *call.as_bytes()),
        })
    }
}

/// Where the index stands. One that another build made by other rules is thrown away and made anew.
fn start_of(txn: &WriteTransaction) -> Result<u64, JournalError> {
    let mut state = txn.open_table(INDEX)?;
    let version = state.get(VERSION)?.map(|version| version.value());
    if version != Some(INDEX_VERSION) {
        txn.delete_table(POSTINGS)?;
        txn.delete_table(ZONES)?;
        state.remove(INDEXED_TO)?;
        state.insert(VERSION, INDEX_VERSION)?;
    }
    let to = state.get(INDEXED_TO)?;
    Ok(to.map_or(0, |to| to.value()))
}

/// A call's id.
type Call = [u8; 16];

/// The last events of the calls of a step, and the records that are not the last of their calls any more.
///
/// When the index is made anew, `audit_last` may be ahead of it, and the records of the step are those that are not the
/// last.
fn last_events(
    table: &impl ReadableTable<&'static Call, u64>,
    calls: &[(Call, u64)],
) -> Result<(BTreeMap<Call, u64>, Vec<u64>), JournalError> {
    let (mut lasts, mut superseded) = (BTreeMap::new(), Vec::new());
    for (call, place) in calls {
        let known = match lasts.get(call) {
            Some(known) => Some(*known),
            None => table.get(call)?.map(|known| known.value()),
        };
        superseded.extend(known.filter(|known| known != place).map(|known| known.min(*place)));
        lasts.insert(*call, known.map_or(*place, |known| known.max(*place)));
    }
    Ok((lasts, superseded))
}

/// Rows of postings as they are to be; empty ones go.
type Rows = Vec<(postings::Key, Bits)>;

/// The rows of postings that are changed, by the sets that make up the change.
fn changed(
    table: &impl ReadableTable<postings::Key, Bytes>,
    mut postings: Vec<Posting>,
    by: impl Fn(&mut Bits, &Bits),
) -> Result<Rows, JournalError> {
    let mut rows = Vec::new();
    // As the rows are: neighbours share pages.
    postings.sort_unstable_by_key(|(term, place)| (postings::key(*term, block_of(*place)), *place));
    for row in postings.chunk_by(|(a, of), (b, next)| a == b && block_of(*of) == block_of(*next)) {
        let Some((term, place)) = row.first() else { continue };
        let mut change = Bits::NONE;
        for (_, place) in row {
            change.add(*place);
        }
        let key = postings::key(*term, block_of(*place));
        let known = table.get(key)?.map(|stored| Bits::decode(stored.value())).transpose()?;
        let known = known.unwrap_or(Bits::NONE);
        let mut bits = known.clone();
        by(&mut bits, &change);
        if bits != known {
            rows.push((key, bits));
        }
    }
    Ok(rows)
}

fn write(table: &mut Table<'_, postings::Key, Bytes>, rows: Rows) -> Result<(), JournalError> {
    for (key, bits) in rows {
        if bits.is_empty() {
            table.remove(key)?;
        } else {
            table.insert(key, bits.encode().as_slice())?;
        }
    }
    Ok(())
}
