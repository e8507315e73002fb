//! One write transaction: rows in, rows out, and the verbs that change them.

mod endings;
mod grants;
mod opening;
mod records;
mod upkeep;

use std::ops::Bound;

use minicbor::bytes::ByteArray;
use minicbor::{Decode, Encode};
use serde_json::{Map, Value};

use crate::audit::{Event, FIRST_PREV_HASH};
use crate::call::{CLOCK_SLACK_MS, Call, EXECUTED_KNOWN_MS, Outcome, Record, StoredAnswer};
use crate::hold::{Facts, Hold, HoldState, Lane};
use crate::id::{BootId, CallId, HoldId, Identity, KeyId, LedgerId};
use crate::intent::Claim;
use crate::journal::split_sealed;
use crate::key::Key;
use crate::ledger::changes::{Change, Changes};
use crate::ledger::counter::{CounterKey, Counters, keys_of};
use crate::ledger::row::{
    self, ANSWERS, AUDIT, BindingRow, CALL_IDS, CALLS, COUNTERS, ChainRow, DUE, DUE_CALL, DUE_HOLD, HOLDS,
    KEYS, KillSwitchRow, LossRow, META, OBJECTS, PHASE_ENDED, PHASE_LIVE, Span, Table, meta,
};
use crate::ledger::rules::resolve::{self, InFlight, Resolve};
use crate::ledger::rules::{self, Admit, Effects, Loaded, Verdict, limits};
use crate::ledger::source::{Order, Source, SourceRows};
use crate::ledger::{Actor, LedgerError, Opening, Sending, entry};
use crate::time::UnixMs;

/// One minute, the window in which equal refusals are counted together.
pub(in crate::ledger) const MINUTE_MS: u64 = 60_000;

/// The end of the audit chain.
#[derive(Clone, Copy, Debug)]
pub(in crate::ledger) struct Head {
    /// In the log.
    pub(in crate::ledger) place: u64,
    /// In its chain.
    pub(in crate::ledger) seq: u64,
    pub(in crate::ledger) hash: [u8; 32],
    /// The time of the last record: the clock does not go below it.
    pub(in crate::ledger) at: UnixMs,
}

/// What was decided about a money call, and whose caps decided.
pub(in crate::ledger) struct Judged {
    /// The key under which it was made.
    pub(in crate::ledger) key: Key,
    /// The key that pays.
    pub(in crate::ledger) payer: Key,
    pub(in crate::ledger) verdict: Verdict,
}

/// A write transaction with what every command needs at hand.
pub(in crate::ledger) struct Tx<'t> {
    source: Source<'t>,
    /// What this transaction changes.
    changes: Changes,
    opening: &'t Opening,
    head: Head,
    ledger_id: String,
    chain_id: String,
}

impl<'t> Tx<'t> {
    pub(in crate::ledger) fn open(
        source: Source<'t>,
        opening: &'t Opening,
        head: Option<Head>,
    ) -> Result<Self, LedgerError> {
        let head = match head {
            Some(head) => head,
            None => stored_head(source)?,
        };
        let (ledger_id, chain_id) = (String::new(), String::new());
        let mut tx = Self { source, changes: Changes::default(), opening, head, ledger_id, chain_id };
        if let Some(id) = tx.meta::<LedgerId>(meta::LEDGER_ID)? {
            tx.ledger_id = id.to_string();
            tx.chain_id = tx.meta::<ChainRow>(meta::CHAIN)?.map_or(id, |chain| chain.id).to_string();
        }
        Ok(tx)
    }

    /// All that it changes.
    pub(in crate::ledger) fn into_changes(self) -> Changes {
        self.changes
    }

    /// What a row is, by `read`.
    pub(in crate::ledger) fn get<K: redb::Key, V: redb::Value, T>(
        &self,
        table: &Table<K, V>,
        key: &K::SelfType<'_>,
        read: impl FnOnce(V::SelfType<'_>) -> Result<T, LedgerError>,
    ) -> Result<Option<T>, LedgerError> {
        match self.changes.get(table, K::as_bytes(key).as_ref()) {
            Change::None => self.source.get(table, key, read),
            Change::Removed => Ok(None),
            Change::Put(value) => read(V::from_bytes(value)).map(Some),
        }
    }

    /// Rows in their order, each by `read`.
    pub(in crate::ledger) fn range<K: redb::Key, V: redb::Value, T, F>(
        &self,
        table: &Table<K, V>,
        range: Span<K::SelfType<'_>>,
        read: F,
    ) -> Result<SourceRows<'t, K, V, F>, LedgerError>
    where
        F: FnMut(K::SelfType<'_>, V::SelfType<'_>) -> Result<T, LedgerError>,
    {
        self.source.range(table, range, Order::Ascending, Some(&self.changes), read)
    }

    pub(in crate::ledger) fn put<K: redb::Key, V: redb::Value>(
        &mut self,
        table: &Table<K, V>,
        key: &K::SelfType<'_>,
        value: &V::SelfType<'_>,
    ) {
        self.source.will_write(table, key);
        self.changes.put(table, key, value);
    }

    pub(in crate::ledger) fn remove<K: redb::Key, V: redb::Value>(
        &mut self,
        table: &Table<K, V>,
        key: &K::SelfType<'_>,
    ) {
        self.source.will_write(table, key);
        self.changes.remove(table, key);
    }

    pub(in crate::ledger) fn begin_first_chain(&mut self, ledger: LedgerId, chain: LedgerId) {
        (self.ledger_id, self.chain_id) = (ledger.to_string(), chain.to_string());
    }

    /// Whether a collector knows more of this ledger than it does itself, and no operator has accepted that.
    pub(in crate::ledger) fn has_loss(&self) -> Result<bool, LedgerError> {
        Ok(self.meta::<LossRow>(meta::LOSS)?.is_some())
    }

    /// Notes that a collector knows more of this ledger than it does itself.
    pub(in crate::ledger) fn note_loss(
        &mut self,
        collector_seq: u64,
        now: UnixMs,
    ) -> Result<(), LedgerError> {
        if self.has_loss()? {
            return Ok(());
        }
        self.put_meta(meta::LOSS, &LossRow { since: now, collector_seq });
        Ok(())
    }

    /// An operator takes the ledger as it is: what was lost stays lost, and a new chain begins behind the old one.
    /// Answers whether there was a loss.
    pub(in crate::ledger) fn accept_loss(
        &mut self,
        fresh: LedgerId,
        reason: &str,
        actor: &Actor,
        now: UnixMs,
    ) -> Result<bool, LedgerError> {
        let Some(loss) = self.meta::<LossRow>(meta::LOSS)? else { return Ok(false) };
        let binding = self.binding()?;
        let before = [
            ("chain_id", Value::from(self.chain_id.as_str())),
            ("seq", Value::from(self.head.seq)),
            ("collector_seq", Value::from(loss.collector_seq)),
        ];
        let before: Map<String, Value> =
            before.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let mut detail = Map::new();
        detail.insert("mode".to_owned(), Value::from(binding.mode));
        detail.extend(binding.account.map(|account| ("account".to_owned(), Value::from(account))));
        detail.insert("before".to_owned(), Value::Object(before));
        detail.insert("reason".to_owned(), Value::from(reason));
        self.remove(&META, &meta::LOSS);
        self.put_meta(meta::CHAIN, &ChainRow { id: fresh, base: self.head.place });
        self.chain_id = fresh.to_string();
        (self.head.seq, self.head.hash) = (0, FIRST_PREV_HASH);
        self.append(&entry::of_admin(now, Event::ChainStarted, &actor.0, None, detail))?;
        Ok(true)
    }

    pub(in crate::ledger) fn head(&self) -> Head {
        self.head
    }

    /// The highest time that the file knows to have been used.
    pub(in crate::ledger) fn mark(&self) -> Result<UnixMs, LedgerError> {
        let mark: UnixMs = self.meta(meta::CLOCK_MARK)?.unwrap_or_default();
        Ok(mark.max(self.head.at))
    }

    // --- meta

    pub(in crate::ledger) fn meta<T: for<'b> Decode<'b, ()>>(
        &self,
        name: &str,
    ) -> Result<Option<T>, LedgerError> {
        self.get(&META, &name, row::decode)
    }

    pub(in crate::ledger) fn put_meta<T: Encode<()>>(&mut self, name: &str, value: &T) {
        self.put(&META, &name, &row::encode(value).as_slice());
    }

    pub(in crate::ledger) fn ledger_id(&self) -> Result<LedgerId, LedgerError> {
        self.meta(meta::LEDGER_ID)?.ok_or(LedgerError::Corrupt("ledger id"))
    }

    pub(in crate::ledger) fn salt(&self) -> Result<[u8; 32], LedgerError> {
        let salt: Option<ByteArray<32>> = self.meta(meta::SALT)?;
        Ok(salt.ok_or(LedgerError::Corrupt("salt"))?.into())
    }

    pub(in crate::ledger) fn binding(&self) -> Result<BindingRow, LedgerError> {
        self.meta(meta::BINDING)?.ok_or(LedgerError::Corrupt("binding"))
    }

    /// While the mark is ahead of the machine's clock, time seems to stand still, and the window in which a doubt may be
    /// sent again would stay open for longer than Stripe remembers keys.
    pub(in crate::ledger) fn note_clock(&mut self, now: UnixMs, wall: UnixMs) -> Result<(), LedgerError> {
        let is_back = now.millis_since(wall) > CLOCK_SLACK_MS;
        if is_back && self.meta::<UnixMs>(meta::RESEND_FLOOR)?.unwrap_or_default() < now {
            self.put_meta(meta::RESEND_FLOOR, &now);
        }
        Ok(())
    }

    pub(in crate::ledger) fn lower_clock(
        &mut self,
        reason: &str,
        actor: &Actor,
        now: UnixMs,
        wall: UnixMs,
    ) -> Result<(UnixMs, UnixMs), LedgerError> {
        self.put_meta(meta::CLOCK_MARK, &wall);
        self.put_meta(meta::RESEND_FLOOR, &UnixMs::from_millis(wall.millis().saturating_sub(1)));
        for hold in self.live_holds()? {
            let Some(mut call) = self.call_by_id(hold.call_id)? else { continue };
            // First sent by a clock that was wrong: nobody knows how long ago.
            if let Some(attempt) = call.attempts.last_mut().filter(|attempt| attempt.first_send >= wall) {
                attempt.first_send = UnixMs::default();
                self.put_call(&call)?;
            }
        }
        let mut detail = Map::new();
        detail.insert("before".to_owned(), Value::from(now.to_string()));
        detail.insert("after".to_owned(), Value::from(wall.to_string()));
        detail.insert("reason".to_owned(), Value::from(reason));
        // The record carries the lowered time, so that it becomes the mark.
        self.append(&entry::of_admin(wall, Event::ClockLowered, &actor.0, None, detail))?;
        Ok((now, wall))
    }

    pub(in crate::ledger) fn bind(
        &mut self,
        account: &str,
        key_digest: [u8; 32],
        now: UnixMs,
    ) -> Result<BindingRow, LedgerError> {
        let was = self.binding()?;
        if let Some(bound) = was.account.as_ref().filter(|bound| *bound != account) {
            return Err(LedgerError::BoundElsewhere {
                bound: format!("account {bound}"),
                offered: format!("account {account}"),
            });
        }
        let is = BindingRow {
            account: Some(account.to_owned()),
            verified_key: Some(ByteArray::from(key_digest)),
            ..was.clone()
        };
        if is != was {
            self.put_meta(meta::BINDING, &is);
        }
        if was.account.is_none() {
            let mut detail = Map::new();
            detail.insert("account".to_owned(), Value::from(account));
            detail.insert("mode".to_owned(), Value::from(is.mode.as_str()));
            self.append(&entry::of_admin(now, Event::AccountBound, "keybrake", None, detail))?;
        }
        Ok(is)
    }

    pub(in crate::ledger) fn kill_switch(
        &mut self,
        on: bool,
        reason: &str,
        actor: &Actor,
        now: UnixMs,
    ) -> Result<(), LedgerError> {
        if on {
            self.put_meta(meta::KILL_SWITCH, &KillSwitchRow { since: now, reason: reason.to_owned() });
        } else {
            self.remove(&META, &meta::KILL_SWITCH);
        }
        let mut detail = Map::new();
        detail.insert("on".to_owned(), Value::from(on));
        detail.insert("reason".to_owned(), Value::from(reason));
        self.append(&entry::of_admin(now, Event::KillSwitch, &actor.0, None, detail))
    }

    // --- keys

    pub(in crate::ledger) fn key(&self, id: KeyId) -> Result<Option<Key>, LedgerError> {
        self.get(&KEYS, &id.as_bytes(), row::decode)
    }

    // --- calls, holds, objects, counters

    pub(in crate::ledger) fn call(&self, identity: &Identity) -> Result<Option<Call>, LedgerError> {
        self.get(&CALLS, &&identity.0, row::decode)
    }

    pub(in crate::ledger) fn call_by_id(&self, id: CallId) -> Result<Option<Call>, LedgerError> {
        let identity = self.get(&CALL_IDS, &id.as_bytes(), |identity| Ok(Identity(*identity)))?;
        // A newer call may have taken the identity.
        Ok(identity.map(|identity| self.call(&identity)).transpose()?.flatten().filter(|call| call.id == id))
    }

    pub(in crate::ledger) fn put_call(&mut self, call: &Call) -> Result<(), LedgerError> {
        let before = self.call(&call.identity)?;
        self.put(&CALLS, &&call.identity.0, &row::encode(call).as_slice());
        if before.as_ref().is_some_and(|before| before.id == call.id) {
            return Ok(());
        }
        if let Some(before) = before {
            self.remove_answer(before.id);
            self.remove(&CALL_IDS, &before.id.as_bytes());
        }
        self.put(&CALL_IDS, &call.id.as_bytes(), &&call.identity.0);
        Ok(())
    }

    pub(in crate::ledger) fn remove_call(&mut self, call: &Call) {
        self.remove_answer(call.id);
        self.remove(&CALL_IDS, &call.id.as_bytes());
        self.remove(&CALLS, &&call.identity.0);
    }

    pub(in crate::ledger) fn answer(&self, id: CallId) -> Result<Option<StoredAnswer>, LedgerError> {
        self.get(&ANSWERS, &id.as_bytes(), row::decode)
    }

    pub(in crate::ledger) fn has_answer(&self, id: CallId) -> Result<bool, LedgerError> {
        Ok(self.get(&ANSWERS, &id.as_bytes(), |_| Ok(()))?.is_some())
    }

    pub(in crate::ledger) fn remove_answer(&mut self, id: CallId) {
        self.remove(&ANSWERS, &id.as_bytes());
    }

    pub(in crate::ledger) fn hold(&self, id: HoldId) -> Result<Option<Hold>, LedgerError> {
        for phase in [PHASE_LIVE, PHASE_ENDED] {
            if let Some(hold) = self.get(&HOLDS, &(phase, id.as_bytes()), row::decode)? {
                return Ok(Some(hold));
            }
        }
        Ok(None)
    }

    pub(in crate::ledger) fn hold_of_object(
        &self,
        account: &str,
        object: &str,
    ) -> Result<Option<Hold>, LedgerError> {
        let id = self.get(&OBJECTS, &(account, object), |id| Ok(HoldId::from_bytes(*id)))?;
        id.map(|id| self.hold(id)).transpose().map(Option::flatten)
    }

    fn load_counter(&self, counters: &mut Counters, key: CounterKey) -> Result<(), LedgerError> {
        if counters.0.contains_key(&key) {
            return Ok(());
        }
        let (kind, id, day, lane) = row::counter_key(&key.0, key.1, key.2);
        if let Some(counter) = self.get(&COUNTERS, &(kind, &id, day, lane), row::decode)? {
            counters.0.insert(key, counter);
        }
        Ok(())
    }

    pub(in crate::ledger) fn put_due(&mut self, at: UnixMs, kind: u8, id: &[u8; 16]) {
        self.put(&DUE, &(at.millis(), kind, id), &());
    }

    // --- verbs

    pub(in crate::ledger) fn judge(
        &self,
        key_id: KeyId,
        admit: &Admit,
        now: UnixMs,
    ) -> Result<Judged, LedgerError> {
        let key = self.key(key_id)?.ok_or(LedgerError::NotFound)?;
        let kill_switch = self.meta::<KillSwitchRow>(meta::KILL_SWITCH)?.is_some();
        let call = self.call(&admit.intent.identity)?;
        let call_hold = call.as_ref().map(|call| self.hold(call.hold_id)).transpose()?.flatten();
        let answer_kept = call.as_ref().map(|call| self.has_answer(call.id)).transpose()?.unwrap_or(false);
        let object_hold = match &admit.intent.claim {
            Claim::Return { of: object, .. }
            | Claim::Use { object, .. }
            | Claim::Ceiling { object: Some(object), .. }
            // What an operation without a price is about may be held under a price.
            | Claim::Unpriced { object: Some(object) } => {
                let account = admit.intent.request.account.as_deref().unwrap_or_default();
                self.hold_of_object(account, object)?
            }
            Claim::Create { .. } | Claim::Ceiling { object: None, .. } | Claim::Unpriced { object: None } => None,
        };
        let owner = object_hold.as_ref().map(|hold| self.key(hold.key_id)).transpose()?.flatten();
        let mut counters = Counters::default();
        for payer in [Some(&key), owner.as_ref()].into_iter().flatten() {
            for day in limits::days_of(payer, object_hold.as_ref(), now) {
                for subject in limits::subjects_of(payer) {
                    for lane in [Lane::In, Lane::Out] {
                        self.load_counter(&mut counters, (subject, day, lane))?;
                    }
                }
            }
        }
        // A call on a live hold is paid for by the hold's key.
        let payer = match (&admit.intent.claim, &object_hold, &owner) {
            (Claim::Use { .. } | Claim::Ceiling { on_its_hold: true, .. }, Some(hold), Some(owner))
                if hold.state.is_live() =>
            {
                owner
            }
            _ => &key,
        };
        let issuer = self.issuer_of(&key)?;
        let owner_issuer = owner.as_ref().map(|owner| self.issuer_of(owner)).transpose()?.flatten();
        let loaded = Loaded {
            key: &key,
            kill_switch,
            resend_floor: self.meta(meta::RESEND_FLOOR)?.unwrap_or_default(),
            call: call.as_ref(),
            call_hold: call_hold.as_ref(),
            answer_kept,
            object_hold: object_hold.as_ref(),
            owner: owner.as_ref(),
            issuer: issuer.as_ref(),
            owner_issuer: owner_issuer.as_ref(),
            budget_stopped: self.is_stopped(&key)? || self.is_stopped(payer)?,
            counters: &counters,
        };
        let verdict = rules::admit(&loaded, admit, now);
        let payer = payer.clone();
        Ok(Judged { key, payer, verdict })
    }

    /// Whether another run of a process is sending a call.
    pub(in crate::ledger) fn is_sent_elsewhere(
        &self,
        identity: &Identity,
        boot: BootId,
    ) -> Result<bool, LedgerError> {
        let Some(call) = self.call(identity)? else { return Ok(false) };
        let hold = self.hold(call.hold_id)?;
        Ok(hold.is_some_and(|hold| {
            hold.call_id == call.id
                && matches!(hold.state, HoldState::Sending { boot: sender } if sender != boot)
        }))
    }

    pub(in crate::ledger) fn resolve(
        &mut self,
        Sending { hold_id, call_id, sends }: Sending,
        command: &Resolve,
        now: UnixMs,
    ) -> Result<(), LedgerError> {
        let hold = self.hold(hold_id)?.ok_or(LedgerError::NotFound)?;
        let may_end = match hold.state {
            HoldState::Sending { .. } => true,
            // Others took its sender for dead, and it comes back with what it knows.
            HoldState::Doubt => command.outcome != Outcome::Unknown,
            HoldState::Open | HoldState::Spent | HoldState::Void => false,
        };
        let call = self.call_by_id(call_id)?.ok_or(LedgerError::Contradiction("a hold has no call"))?;
        // One that was sent again since is ended by whoever did that.
        let is_last = call.last_attempt().is_some_and(|attempt| attempt.sends == sends);
        if !may_end || !is_last || hold.call_id != call_id {
            return Err(LedgerError::Contradiction("a hold is resolved that this call is not sending"));
        }
        let caller = hold.live.as_ref().map_or(hold.key_id, |live| live.key_id);
        let missing = LedgerError::Contradiction("a hold has no key");
        let key = self.key(caller)?.ok_or_else(|| missing.clone())?;
        // Mostly one and the same: a key's row is long.
        let other = if hold.key_id == caller { None } else { Some(self.key(hold.key_id)?.ok_or(missing)?) };
        let owner = other.as_ref().unwrap_or(&key);
        let mut others = Vec::new();
        for other in resolve::others_of(&hold) {
            others.extend(self.call_by_id(other)?);
        }
        let known =
            command.objects.first().map(|object| self.hold_of_object(&hold.account, object)).transpose()?;
        let object_over = known.flatten().is_some_and(|known| known.id != hold.id && known.object_over);
        let state = InFlight { hold: &hold, call: &call, others: &others, key: &key, owner, object_over };
        let effects = resolve::resolve(&state, command, now);
        self.write(&effects, now)
    }

    pub(in crate::ledger) fn observe(
        &mut self,
        account: &str,
        object: &str,
        facts: &Facts,
        record: Record,
        now: UnixMs,
    ) -> Result<(), LedgerError> {
        let Some(hold) = self.hold_of_object(account, object)? else { return Ok(()) };
        let mut calls = Vec::new();
        for id in &hold.calls {
            calls.extend(self.call_by_id(*id)?);
        }
        let effects = if hold.state.is_live() {
            let owner = self.key(hold.key_id)?.ok_or(LedgerError::Contradiction("a hold has no key"))?;
            resolve::observe(&hold, &calls, &owner, facts, record, now)
        } else {
            // It may be older than its key's row, and has no money left to end.
            resolve::forget_open(&hold, &calls, record, now)
        };
        match effects {
            Some(effects) => self.write(&effects, now),
            None => Ok(()),
        }
    }

    /// Writes all effects, the counters that follow from them included. Everything that can contradict is computed
    /// before the first row is touched.
    pub(in crate::ledger) fn write(&mut self, effects: &Effects, now: UnixMs) -> Result<(), LedgerError> {
        let mut counters = Counters::default();
        if let Some((was, is)) = &effects.hold {
            for key in was.iter().chain([is]).flat_map(keys_of) {
                self.load_counter(&mut counters, key)?;
            }
        }
        rules::shift(&mut counters, effects)?;
        // From here it succeeds, or the whole batch is gone: half of it must never be committed.
        self.store(&counters, effects, now).map_err(|error| LedgerError::Unavailable(error.to_string()))
    }

    fn store(&mut self, counters: &Counters, effects: &Effects, now: UnixMs) -> Result<(), LedgerError> {
        for ((subject, day, lane), counter) in &counters.0 {
            let (kind, id, day, lane) = row::counter_key(subject, *day, *lane);
            self.put(&COUNTERS, &(kind, &id, day, lane), &row::encode(counter).as_slice());
        }
        for call in &effects.calls {
            self.put_call(call)?;
        }
        if let Some((was, is)) = &effects.hold {
            self.put_hold(was.as_ref(), is, now);
            for object in &effects.objects {
                // An object belongs to the hold that counts it, for as long as that does.
                let known = self.hold_of_object(&is.account, object)?;
                if known.is_some_and(|known| known.id != is.id && known.state.is_live()) {
                    continue;
                }
                self.put(&OBJECTS, &(is.account.as_str(), object.as_str()), &is.id.as_bytes());
            }
        }
        if let Some((call, answer)) = &effects.answer {
            self.put(&ANSWERS, &call.as_bytes(), &row::encode(answer).as_slice());
        }
        for call in &effects.drop_answers {
            self.remove_answer(*call);
        }
        if let Some(key) = &effects.key {
            self.put_key(key);
        }
        if let Some((at, call)) = &effects.look_at_call {
            self.put_due(*at, DUE_CALL, call.as_bytes());
        }
        effects.audit.iter().try_for_each(|entry| self.append(entry))
    }

    fn put_hold(&mut self, was: Option<&Hold>, is: &Hold, now: UnixMs) {
        let phase = |hold: &Hold| if hold.state.is_live() { PHASE_LIVE } else { PHASE_ENDED };
        if let Some(was) = was.filter(|was| phase(was) != phase(is)) {
            self.remove(&HOLDS, &(phase(was), was.id.as_bytes()));
        }
        self.put(&HOLDS, &(phase(is), is.id.as_bytes()), &row::encode(is).as_slice());
        if !is.state.is_live() {
            self.put_due(now.plus_millis(EXECUTED_KNOWN_MS), DUE_HOLD, is.id.as_bytes());
        }
    }
}

fn stored_head(source: Source<'_>) -> Result<Head, LedgerError> {
    let all = (Bound::Unbounded, Bound::Unbounded);
    let mut rows = source.range(&AUDIT, all, Order::Descending, None, |place, stored| {
        let (hash, bytes) = split_sealed(stored)?;
        let record: Map<String, Value> =
            serde_json::from_slice(bytes).map_err(|_| LedgerError::Corrupt("record"))?;
        let seq = record.get("seq").and_then(Value::as_u64).ok_or(LedgerError::Corrupt("record"))?;
        Ok(Head { place, seq, hash, at: time_of(bytes)? })
    })?;
    let none = Head { place: 0, seq: 0, hash: FIRST_PREV_HASH, at: UnixMs::default() };
    Ok(rows.next().transpose()?.unwrap_or(none))
}

/// When a stored record was written.
pub(in crate::ledger) fn time_of(record: &[u8]) -> Result<UnixMs, LedgerError> {
    let corrupt = || LedgerError::Corrupt("record");
    let record: Map<String, Value> = serde_json::from_slice(record).map_err(|_| corrupt())?;
    record.get("at").and_then(Value::as_str).and_then(UnixMs::parse).ok_or_else(corrupt)
}
