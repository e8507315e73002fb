//! What is done on a tick, in bounded steps: counted refusals become records, rows whose time has come go.

use std::collections::HashSet;
use std::ops::Bound;

use minicbor::bytes::ByteArray;

use crate::audit::Entry;
use crate::id::{CallId, HoldId, KeyId};
use crate::journal::split_sealed;
use crate::ledger::LedgerError;
use crate::ledger::row::{
    self, AUDIT, AuditFloorRow, COUNTERS, DUE, DUE_CALL, DUE_HOLD, DUE_KEY, HOLDS, KEY_DIGESTS,
    KEY_KIND_VAULT, KEYS, OBJECTS, PHASE_ENDED, REFUSALS, RefusalRow, all, meta,
};
use crate::ledger::rules::resolve::{self, Prune};
use crate::ledger::tx::{MINUTE_MS, Tx, time_of};
use crate::time::{DAY_MS, UnixMs};

/// Rows that one step of one kind of upkeep touches at most: calls wait for it.
const STEP_ROWS_MAX: usize = 250;

impl Tx<'_> {
    /// Answers whether there may be more rows whose time has come.
    pub(in crate::ledger) fn tick(&mut self, now: UnixMs) -> Result<bool, LedgerError> {
        self.keep_mark(now)?;
        let refusals = self.record_counted_refusals(now)?;
        let due = self.look_at_due(now)?;
        Ok(refusals.max(due) == STEP_ROWS_MAX)
    }

    /// Deletes records whose time has come at the beginning of the chain, where the log has no index of its own. Answers
    /// whether there may be more of them.
    pub(in crate::ledger) fn drop_old_records(&mut self, now: UnixMs) -> Result<bool, LedgerError> {
        let (ships, days) = (self.opening.ships, self.opening.audit_days);
        let keep_ms = u64::from(days).saturating_mul(DAY_MS);
        let shipped = self.meta::<u64>(meta::SHIPPED_TO)?.unwrap_or(0);
        let last = self.head().place;
        let (mut gone, mut floor) = (Vec::new(), None);
        let first = self.range(&AUDIT, all(), |place, stored| {
            let (hash, bytes) = split_sealed(stored)?;
            Ok((place, hash, time_of(bytes)?))
        })?;
        for found in first.take(STEP_ROWS_MAX) {
            let (place, hash, at) = found?;
            let kept = now.millis_since(at) <= keep_ms;
            let waits = ships && place > shipped;
            // The last record stays: the next one continues it.
            if kept || waits || place >= last {
                break;
            }
            gone.push(place);
            floor = Some(AuditFloorRow { seq: place.saturating_add(1), prev_hash: ByteArray::from(hash) });
        }
        if let Some(floor) = floor {
            self.put_meta(meta::AUDIT_FLOOR, &floor);
        }
        for place in &gone {
            self.remove(&AUDIT, place);
        }
        Ok(gone.len() == STEP_ROWS_MAX)
    }

    /// Time that passes without a record must not be lost when the clock is set back over a restart.
    fn keep_mark(&mut self, now: UnixMs) -> Result<(), LedgerError> {
        if now.millis_since(self.mark()?) >= MINUTE_MS {
            self.put_meta(meta::CLOCK_MARK, &now);
        }
        Ok(())
    }

    /// Answers how many there were.
    fn record_counted_refusals(&mut self, now: UnixMs) -> Result<usize, LedgerError> {
        let this_minute = now.millis() / MINUTE_MS;
        let rows = self.range(&REFUSALS, all(), |(id, code, minute), row| {
            Ok((*id, code.to_owned(), minute, row::decode::<RefusalRow>(row)?))
        })?;
        let is_over =
            |row: &Result<_, _>| row.as_ref().map_or(true, |(_, _, minute, _)| *minute < this_minute);
        let over: Vec<_> = rows.filter(is_over).take(STEP_ROWS_MAX).collect::<Result<_, LedgerError>>()?;
        let count = over.len();
        for (id, code, minute, refusals) in over {
            // That of how many are told apart has none.
            if refusals.count > 0 && !refusals.entry.is_empty() {
                let entry: Entry =
                    serde_json::from_str(&refusals.entry).map_err(|_| LedgerError::Corrupt("refusal"))?;
                self.append(&Entry { at: now.to_string(), count: Some(refusals.count), ..entry })?;
            }
            self.remove(&REFUSALS, &(&id, &code, minute));
        }
        Ok(count)
    }

    /// Answers how many there were.
    fn look_at_due(&mut self, now: UnixMs) -> Result<usize, LedgerError> {
        let until = (Bound::Unbounded, Bound::Excluded((now.millis().saturating_add(1), 0, &[0; 16])));
        let rows = self.range(&DUE, until, |(at, kind, id), ()| Ok((at, kind, *id)))?;
        let due: Vec<_> = rows.take(STEP_ROWS_MAX).collect::<Result<_, _>>()?;
        let (mut in_use, count) = (None, due.len());
        for (at, kind, id) in due {
            self.remove(&DUE, &(at, kind, &id));
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
        Ok(count)
    }

    fn look_at_call(&mut self, id: CallId, now: UnixMs) -> Result<(), LedgerError> {
        let Some(call) = self.call_by_id(id)? else { return Ok(()) };
        let live = self.hold(call.hold_id)?.is_some_and(|hold| hold.state.is_live());
        match resolve::prune(&call, self.has_answer(id)?, live, now) {
            Prune::All => self.remove_call(&call),
            Prune::Answer(again) => {
                self.remove_answer(id);
                self.put_call(&resolve::stripped(&call))?;
                self.put_due(again, DUE_CALL, id.as_bytes());
            }
            Prune::Later(again) => self.put_due(again, DUE_CALL, id.as_bytes()),
        }
        Ok(())
    }

    /// A dead key goes when no live hold counts on it any more.
    fn look_at_key(&mut self, id: KeyId, in_use: &HashSet<KeyId>, now: UnixMs) -> Result<(), LedgerError> {
        let Some(key) = self.key(id)? else { return Ok(()) };
        if in_use.contains(&id) {
            self.put_due(now.plus_millis(DAY_MS), DUE_KEY, id.as_bytes());
            return Ok(());
        }
        self.remove(&KEYS, &id.as_bytes());
        self.remove(&KEY_DIGESTS, &&key.digest);
        let ours = (
            Bound::Included((KEY_KIND_VAULT, id.as_bytes(), 0, 0)),
            Bound::Included((KEY_KIND_VAULT, id.as_bytes(), u32::MAX, u8::MAX)),
        );
        let counters = self.range(&COUNTERS, ours, |(kind, id, day, lane), _| Ok((kind, *id, day, lane)))?;
        for (kind, id, day, lane) in counters.collect::<Result<Vec<_>, _>>()? {
            self.remove(&COUNTERS, &(kind, &id, day, lane));
        }
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
            self.put_due(now.plus_millis(DAY_MS), DUE_HOLD, id.as_bytes());
            return Ok(());
        }
        self.remove(&HOLDS, &(PHASE_ENDED, id.as_bytes()));
        for object in hold.object_id.iter().chain(&hold.aliases) {
            let place = (hold.account.as_str(), object.as_str());
            // The object may belong to a newer hold by now.
            if self.get(&OBJECTS, &place, |found| Ok(found == id.as_bytes()))? == Some(true) {
                self.remove(&OBJECTS, &place);
            }
        }
        Ok(())
    }
}
