//! What the keeper does on a tick: the index follows the log, old records are deleted.

use minicbor::bytes::ByteArray;
use redb::{ReadableTable, WriteTransaction};

use crate::journal::{self, split_sealed};
use crate::ledger::redb::RedbStore;
use crate::ledger::row::{self, AUDIT, AuditFloorRow, META, meta};
use crate::ledger::tx::time_of;
use crate::ledger::{LedgerError, Opening, Ticked};
use crate::time::{DAY_MS, UnixMs};

/// Records that one step takes into the index, or out of it: each is some twenty rows, and those of many records share
/// pages. No call waits for it.
const INDEX_ROWS_MAX: usize = 2_000;

impl RedbStore {
    /// Takes everything into the tree, lets the index of the audit log follow, and deletes old records.
    pub(in crate::ledger) fn keep_up(&self, opening: &Opening) -> Result<Ticked, LedgerError> {
        let now = self.now();
        self.settle_with(None, |txn| {
            let behind = journal::index_step(txn, INDEX_ROWS_MAX)?.more;
            let old = drop_old_records(txn, opening, now)?;
            Ok(if behind || old { Ticked::Lags } else { Ticked::Done })
        })
    }
}

/// Answers whether there may be more of them.
fn drop_old_records(txn: &WriteTransaction, opening: &Opening, now: UnixMs) -> Result<bool, LedgerError> {
    let keep_ms = u64::from(opening.audit_days).saturating_mul(DAY_MS);
    let shipped: Option<u64> = {
        let table = txn.open_table(META.definition)?;
        table.get(meta::SHIPPED_TO)?.map(|to| row::decode(to.value())).transpose()?
    };
    let last = journal::last_place_in(txn)?;
    let mut floor = None;
    let mut rows = 0;
    for found in txn.open_table(AUDIT.definition)?.iter()?.take(INDEX_ROWS_MAX) {
        let (place, stored) = found?;
        let (hash, bytes) = split_sealed(stored.value())?;
        let kept = now.millis_since(time_of(bytes)?) <= keep_ms;
        let waits = opening.ships && place.value() > shipped.unwrap_or(0);
        // The last record stays: the next one continues it.
        if kept || waits || place.value() >= last {
            break;
        }
        floor =
            Some(AuditFloorRow { seq: place.value().saturating_add(1), prev_hash: ByteArray::from(hash) });
        rows += 1;
    }
    let Some(floor) = floor else { return Ok(false) };
    // First what can fail without having written: the floor belongs to what was dropped.
    journal::drop_below(txn, floor.seq, rows)?;
    txn.open_table(META.definition)?.insert(meta::AUDIT_FLOOR, row::encode(&floor).as_slice())?;
    Ok(rows == INDEX_ROWS_MAX)
}
