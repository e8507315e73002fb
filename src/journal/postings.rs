//! Where the rows of the index stand: those of one segment of the log together, and within it those of one term.
//!
//! A segment is [`SEGMENT_BLOCKS`] blocks, 32,768 places. What is written are rows of the newest segment, wherever its
//! terms fall: some megabytes of pages, however long the log is. By term alone each new id would be a row on a page of its
//! own, and each step of the index would write all over the file. The price is paid by a question, which looks into every
//! segment for a term that is rare: one row for 32,768 places.

use redb::ReadableTable;

use crate::journal::bits::Bits;
use crate::journal::terms::Term;
use crate::journal::{Bytes, JournalError};

/// What a term's number leaves free for it.
pub(super) const SEGMENT_BITS: u32 = 3;
/// Blocks of one segment.
const SEGMENT_BLOCKS: u64 = 1 << SEGMENT_BITS;

/// Segment, then the term and in its lowest bits the block within the segment.
pub(super) type Key = (u64, u64);

/// Where the places of a block stand that have a term.
pub(super) fn key(term: Term, block: u64) -> Key {
    (block >> SEGMENT_BITS, term.0 << SEGMENT_BITS | block & (SEGMENT_BLOCKS - 1))
}

/// The term and the block of a row.
fn of_key((segment, within): Key) -> (Term, u64) {
    (Term(within >> SEGMENT_BITS), segment << SEGMENT_BITS | within & (SEGMENT_BLOCKS - 1))
}

/// What is found of a term from a block on.
#[expect(clippy::large_enum_variant, reason = "it is taken apart where it is made")]
pub(super) enum Sought {
    /// In this block, these places.
    Row(u64, Bits),
    /// Nothing before this block, which is another segment's.
    NotBefore(u64),
    /// Nothing any more.
    End,
}

/// Looks for a term in the segment of a block, from that block on.
pub(super) fn seek(
    table: &impl ReadableTable<Key, Bytes>,
    term: Term,
    from: u64,
    ascending: bool,
) -> Result<Sought, JournalError> {
    let here = key(term, from);
    let found = if ascending { table.range(here..)?.next() } else { table.range(..=here)?.next_back() };
    let Some((at, stored)) = found.transpose()? else { return Ok(Sought::End) };
    let (segment, (found, block)) = (here.0, of_key(at.value()));
    if (at.value().0, found) == (segment, term) {
        return Ok(Sought::Row(block, Bits::decode(stored.value())?));
    }
    // The row that was found is another term's. Where it is in a segment further on, none between has anything.
    let next = if ascending {
        segment.checked_add(1).map(|next| next.max(at.value().0) << SEGMENT_BITS)
    } else {
        segment.checked_sub(1).map(|next| next.min(at.value().0) << SEGMENT_BITS | (SEGMENT_BLOCKS - 1))
    };
    Ok(next.map_or(Sought::End, Sought::NotBefore))
}
