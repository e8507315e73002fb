//! How doubts end otherwise than by an answer, and how calls are taken back.

use serde_json::{Map, Value};

use crate::audit::{Entry, Event};
use crate::call::{Call, EXECUTED_KNOWN_MS};
use crate::hold::{Hold, HoldState, Search};
use crate::id::{CallId, HoldId};
use crate::ledger::row::{self, HOLDS, PHASE_LIVE};
use crate::ledger::rules::Effects;
use crate::ledger::rules::resolve::{self, EndDoubt, InFlight};
use crate::ledger::tx::Tx;
use crate::ledger::{Actor, Ending, LedgerError, entry};
use crate::time::UnixMs;

impl Tx<'_> {
    pub(in crate::ledger) fn end_doubt(
        &mut self,
        hold_id: HoldId,
        end: &EndDoubt,
        now: UnixMs,
    ) -> Result<Ending, LedgerError> {
        let hold = self.hold(hold_id)?.ok_or(LedgerError::NotFound)?;
        for object in &end.objects {
            let other = self.hold_of_object(&hold.account, object)?;
            if other.is_some_and(|other| other.id != hold.id) {
                return Ok(Ending::OfAnother);
            }
        }
        let call = self.call_by_id(hold.call_id)?.ok_or(LedgerError::Contradiction("a hold has no call"))?;
        let missing = LedgerError::Contradiction("a hold has no key");
        let owner = self.key(hold.key_id)?.ok_or(missing)?;
        // The key under which the call was made may have gone before the one that pays.
        let caller = hold.live.as_ref().map_or(hold.key_id, |live| live.key_id);
        let key = self.key(caller)?.unwrap_or_else(|| owner.clone());
        let mut others = Vec::new();
        for other in resolve::others_of(&hold) {
            others.extend(self.call_by_id(other)?);
        }
        let state = InFlight {
            hold: &hold,
            call: &call,
            others: &others,
            key: &key,
            owner: &owner,
            object_over: false,
        };
        let Some(effects) = resolve::end_doubt(&state, end, now) else { return Ok(Ending::NotInDoubt) };
        self.write(&effects, now)?;
        Ok(Ending::Ended)
    }

    /// Keeps what was looked for to end a doubt.
    pub(in crate::ledger) fn note_search(
        &mut self,
        hold_id: HoldId,
        read: &str,
        came_to: &str,
        now: UnixMs,
    ) -> Result<(), LedgerError> {
        let Some(hold) = self.hold(hold_id)?.filter(|hold| hold.state == HoldState::Doubt) else {
            return Ok(());
        };
        let (times, first_at) =
            hold.search.as_ref().map_or((1, now), |search| (search.times.saturating_add(1), search.first_at));
        let search = Some(Search {
            times,
            first_at,
            last_at: now,
            read: read.to_owned(),
            came_to: came_to.to_owned(),
        });
        let row = row::encode(&Hold { search, ..hold });
        self.put(&HOLDS, &(PHASE_LIVE, hold_id.as_bytes()), &row.as_slice());
        Ok(())
    }

    pub(in crate::ledger) fn forget_call(
        &mut self,
        call_id: CallId,
        reason: &str,
        actor: &Actor,
        now: UnixMs,
    ) -> Result<Option<Call>, LedgerError> {
        let call = self.call_by_id(call_id)?.ok_or(LedgerError::NotFound)?;
        let live = self.hold(call.hold_id)?.is_some_and(|hold| hold.state.is_live());
        let Some(forgotten) = resolve::forget(&call, live) else { return Ok(None) };
        let mut detail = Map::new();
        detail.insert("reason".to_owned(), Value::from(reason));
        detail.insert("was".to_owned(), Value::from(call.state.as_str()));
        let key = self.key(call.key_id)?;
        let entry = Entry {
            call_id: Some(call.id.to_string()),
            object_id: call.object_id.clone(),
            customer: call.customer.clone(),
            ..entry::of_admin(now, Event::CallForgotten, &actor.0, key.as_ref(), detail)
        };
        let effects = Effects {
            calls: vec![forgotten.clone()],
            drop_answers: vec![call.id],
            look_at_call: Some((now.plus_millis(EXECUTED_KNOWN_MS), call.id)),
            audit: vec![entry],
            ..Effects::default()
        };
        self.write(&effects, now)?;
        Ok(Some(forgotten))
    }
}
