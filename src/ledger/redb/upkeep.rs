//! What is done on a tick, in bounded steps: counted refusals become records, rows whose time has come go, the index
//! follows the log, old records are deleted.

use std::collections::HashSet;

use minicbor::bytes::ByteArray;
use redb::ReadableTable;

use crate::audit::Entry;
use crate::id::{CallId, HoldId, KeyId};
use crate::journal::{self, AUDIT, split_sealed};
use crate::ledger::redb::tx::{MINUTE_MS, Tx, time_of};
use crate::ledger::row::{
    self, AuditFloorRow, COUNTERS, DUE, DUE_CALL, DUE_HOLD, DUE_KEY, HOLDS, KEY_DIGESTS, KEY_KIND_VAULT,
    KEYS, OBJECTS, PHASE_ENDED, REFUSALS, RefusalRow, meta,
};
use crate::ledger::rules::resolve::{self, Prune};
use crate::ledger::{LedgerError, Ticked};
use crate::time::{DAY_MS, UnixMs};

/// Rows that one step of one kind of upkeep touches at most, so that it never stalls a request for long.
const STEP_ROWS_MAX: usize = 1_000;
/// Records that one step takes into the index, or out of it: each is some twenty rows.
const INDEX_ROWS_MAX: usize = 500;

impl Tx<'_> {
    pub(super) fn tick(&mut self, now: UnixMs) -> Result<Ticked, LedgerError> {
        self.keep_mark(now)?;
        self.record_counted_refusals(now)?;
        self.look_at_due(now)?;
        let (behind, old) = (self.index_log()?, self.drop_old_records(now)?);
        Ok(if behind || old { Ticked::GoOn } else { Ticked::Done })
    }

    /// Time that passes without a record must not be lost when the clock is set back over a restart.
    fn keep_mark(&mut self, now: UnixMs) -> Result<(), LedgerError> {
        if now.millis_since(self.mark()?) >= MINUTE_MS {
            self.put_meta(meta::CLOCK_MARK, &now)?;
        }
        Ok(())
    }

    fn record_counted_refusals(&mut self, now: UnixMs) -> Result<(), LedgerError> {
        let this_minute = now.millis() / MINUTE_MS;
        let mut over = Vec::new();
        for found in self.txn().open_table(REFUSALS)?.iter()? {
            let (place, value) = found?;
            let (id, code, minute) = place.value();
            if minute < this_minute {
                over.push((*id, code.to_owned(), minute, row::decode::<RefusalRow>(value.value())?));
            }
            if over.len() == STEP_ROWS_MAX {
                break;
            }
        }
        for (id, code, minute, refusals) in over {
            // That of how many are told apart has none.
            if refusals.count > 0 && !refusals.entry.is_empty() {
                let entry: Entry =
                    serde_json::from_str(&refusals.entry).map_err(|_| LedgerError::Corrupt("refusal"))?;
                self.append(&Entry { at: now.to_string(), count: Some(refusals.count), ..entry })?;
            }
            self.wrote_rows();
            self.txn().open_table(REFUSALS)?.remove((&id, code.as_str(), minute))?;
        }
        Ok(())
    }

    fn look_at_due(&mut self, now: UnixMs) -> Result<(), LedgerError> {
        let mut due = Vec::new();
        let until = (now.millis().saturating_add(1), 0, &[0; 16]);
        for found in self.txn().open_table(DUE)?.range((0, 0, &[0; 16])..until)?.take(STEP_ROWS_MAX) {
            let (at, kind, id) = found.map(|(place, _)| {
                let (at, kind, id) = place.value();
                (at, kind, *id)
            })?;
            due.push((at, kind, id));
        }
        let mut in_use = None;
        for (at, kind, id) in due {
            self.wrote_rows();
            self.txn().open_table(DUE)?.remove((at, kind, &id))?;
            match kind {
                DUE_CALL => self.look_at_call(CallId::from_bytes(id), now)?,
                DUE_KEY => {
                    // The live holds are looked through once for all keys of a step.
                    let in_use = match &in_use {
                        Some(in_use) => in_use,
                        None => in_use.insert(self.keys_in_use()?),
                    };
                    self.look_at_key(KeyId::from_bytes(id), in_use, now)?;
                }
                DUE_HOLD => self.look_at_hold(HoldId::from_bytes(id), now)?,
                _ => return Err(LedgerError::Corrupt("due row")),
            }
        }
        Ok(())
    }

    fn look_at_call(&mut self, id: CallId, now: UnixMs) -> Result<(), LedgerError> {
        let Some(call) = self.call_by_id(id)? else { return Ok(()) };
        let live = self.hold(call.hold_id)?.is_some_and(|hold| hold.state.is_live());
        match resolve::prune(&call, self.has_answer(id)?, live, now) {
            Prune::All => self.remove_call(&call),
            Prune::Answer(again) => {
                self.remove_answer(id)?;
                self.put_call(&resolve::stripped(&call))?;
                self.put_due(again, DUE_CALL, id.as_bytes())
            }
            Prune::Later(again) => self.put_due(again, DUE_CALL, id.as_bytes()),
        }
    }

    /// A dead key goes when no live hold counts on it any more.
    fn look_at_key(&mut self, id: KeyId, in_use: &HashSet<KeyId>, now: UnixMs) -> Result<(), LedgerError> {
        let Some(key) = self.key(id)? else { return Ok(()) };
        if in_use.contains(&id) {
            return self.put_due(now.plus_millis(DAY_MS), DUE_KEY, id.as_bytes());
        }
        self.txn().open_table(KEYS)?.remove(id.as_bytes())?;
        self.txn().open_table(KEY_DIGESTS)?.remove(&key.digest)?;
        let counters =
            (KEY_KIND_VAULT, id.as_bytes(), 0, 0)..=(KEY_KIND_VAULT, id.as_bytes(), u32::MAX, u8::MAX);
        self.txn().open_table(COUNTERS)?.retain_in(counters, |_, _| false)?;
        Ok(())
    }

    /// The keys that pay for live holds, or under which they are being sent.
    fn keys_in_use(&self) -> Result<HashSet<KeyId>, LedgerError> {
        let mut keys = HashSet::new();
        for hold in self.live_holds()? {
            keys.insert(hold.key_id);
            keys.extend(hold.live.map(|live| live.key_id));
        }
        Ok(keys)
    }

    fn look_at_hold(&mut self, id: HoldId, now: UnixMs) -> Result<(), LedgerError> {
        let Some(hold) = self.hold(id)? else { return Ok(()) };
        if hold.state.is_live() {
            return self.put_due(now.plus_millis(DAY_MS), DUE_HOLD, id.as_bytes());
        }
        self.txn().open_table(HOLDS)?.remove((PHASE_ENDED, id.as_bytes()))?;
        let mut objects = self.txn().open_table(OBJECTS)?;
        for object in hold.object_id.iter().chain(&hold.aliases) {
            let place = (hold.account.as_str(), object.as_str());
            // The object may belong to a newer hold by now.
            let ours = objects.get(place)?.is_some_and(|found| found.value() == id.as_bytes());
            if ours {
                objects.remove(place)?;
            }
        }
        Ok(())
    }

    /// The index follows the log, so that a money commit has one table to touch.
    fn index_log(&mut self) -> Result<bool, LedgerError> {
        let indexed = journal::index_step(self.txn(), INDEX_ROWS_MAX)?;
        if indexed.rows > 0 {
            self.wrote_rows();
        }
        Ok(indexed.more)
    }

    fn drop_old_records(&mut self, now: UnixMs) -> Result<bool, LedgerError> {
        let keep_ms = u64::from(self.opening().audit_days).saturating_mul(DAY_MS);
        let shipped: u64 = self.meta(meta::SHIPPED_TO)?.unwrap_or(0);
        let mut floor = None;
        let mut rows = 0;
        for found in self.txn().open_table(AUDIT)?.iter()?.take(INDEX_ROWS_MAX) {
            let (seq, stored) = found?;
            let (hash, bytes) = split_sealed(stored.value())?;
            let kept = now.millis_since(time_of(bytes)?) <= keep_ms;
            let waits = self.opening().ships && seq.value() > shipped;
            // The last record stays: the next one continues it.
            if kept || waits || seq.value() >= self.head().place {
                break;
            }
            floor =
                Some(AuditFloorRow { seq: seq.value().saturating_add(1), prev_hash: ByteArray::from(hash) });
            rows += 1;
        }
        let Some(floor) = floor else { return Ok(false) };
        // First what can fail without having written: the floor belongs to what was dropped.
        journal::drop_below(self.txn(), floor.seq, rows)?;
        self.put_meta(meta::AUDIT_FLOOR, &floor)?;
        Ok(rows == INDEX_ROWS_MAX)
    }
}
