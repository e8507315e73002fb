//! Reads: they see what is durable, and do not wait for the writer. A query of the audit log has what it asks about taken
//! into the tree first, where its index is.

use std::collections::{BTreeMap, HashSet};
use std::ops::Bound;

use serde_json::{Map, Value};

use crate::audit::{Broken, Sealed, Verifier};
use crate::call::{Call, CallState};
use crate::hold::{Hold, HoldState, Lane, Subject};
use crate::id::{BudgetId, CallId, HoldId, IssuerId, KeyId, LedgerId};
use crate::issuer::Issuer;
use crate::journal::{self, sealed_of};
use crate::key::{Key, Status};
use crate::ledger::counter::Counter;
use crate::ledger::row::{
    self, AUDIT, AuditFloorRow, BUDGETS, BindingRow, BudgetRow, CALL_IDS, CALLS, COUNTERS, ChainRow, HOLDS,
    ISSUERS, KEY_DIGESTS, KEY_KIND_ISSUER, KEY_KIND_VAULT, KEYS, KillSwitchRow, LossRow, META, OBJECTS,
    PHASE_ENDED, PHASE_LIVE, Span, Table, all, live_holds, meta,
};
use crate::ledger::source::{Order, Source, SourceRows};
use crate::ledger::{HoldView, LedgerError};
use crate::time::{Day, UnixMs};

pub use crate::journal::{AuditFilter, Page};

/// Rows that one page may look at before it is cut short and told to go on.
const SCAN_ROWS_MAX: usize = 100_000;

/// Which keys to list.
#[derive(Clone, Debug, Default)]
pub struct KeyFilter {
    /// With exactly this label.
    pub label: Option<String>,
    /// Of this status.
    pub status: Option<Status>,
    /// Minted by this issuer.
    pub issuer: Option<IssuerId>,
    /// Of this budget.
    pub budget: Option<String>,
}

/// Which calls to list.
#[derive(Clone, Debug, Default)]
pub struct CallFilter {
    /// The caller's key, or the key that Stripe saw.
    pub idempotency_key: Option<String>,
    /// The customer.
    pub customer: Option<String>,
    /// The object at Stripe.
    pub object_id: Option<String>,
    /// The state.
    pub state: Option<CallState>,
}

/// The state of a whole chain.
#[derive(Clone, Debug)]
pub struct ChainState {
    /// Records that were followed.
    pub records: u64,
    /// The hash of the last.
    pub head: [u8; 32],
    /// What is wrong with the first bad one.
    pub broken: Option<Broken>,
}

/// The log as a shipper sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogState {
    /// The chain that is written now.
    pub chain_id: LedgerId,
    /// The place before its record 1.
    pub base: u64,
    /// The place of the first record that is kept.
    pub first: u64,
    /// The place of the last.
    pub last: u64,
}

/// A vault key, and how it stands.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The key.
    pub key: Key,
    /// What it does not say itself.
    pub standing: Standing,
}

/// What can keep a key from opening anything, whatever it says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Whether its issuer is none, or not revoked.
    pub issuer_lives: bool,
    /// Whether everything is stopped.
    pub is_stopped: bool,
}

/// Reads the ledger.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'s> {
    source: Source<'s>,
    id: LedgerId,
}

impl<'s> Reader<'s> {
    pub(crate) const fn of(source: Source<'s>, id: LedgerId) -> Self {
        Self { source, id }
    }

    fn meta_row<T: for<'b> minicbor::Decode<'b, ()>>(&self, name: &str) -> Result<Option<T>, LedgerError> {
        self.source.get(&META, &name, row::decode)
    }

    /// Rows of this moment. Whoever goes through them keeps nobody from writing.
    fn rows<K: redb::Key, V: redb::Value, T, F>(
        &self,
        table: &Table<K, V>,
        range: Span<K::SelfType<'_>>,
        order: Order,
        read: F,
    ) -> Result<SourceRows<'s, K, V, F>, LedgerError>
    where
        F: FnMut(K::SelfType<'_>, V::SelfType<'_>) -> Result<T, LedgerError>,
    {
        self.source.range(table, range, order, None, read)
    }

    /// To which account and mode the ledger is bound.
    ///
    /// # Errors
    /// [`LedgerError`] when it cannot be read; the same for every read here.
    pub fn binding(&self) -> Result<BindingRow, LedgerError> {
        self.meta_row(meta::BINDING)?.ok_or(LedgerError::Corrupt("binding"))
    }

    /// Who stopped everything, if somebody did.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn kill_switch(&self) -> Result<Option<KillSwitchRow>, LedgerError> {
        self.meta_row(meta::KILL_SWITCH)
    }

    /// What every request asks first.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn caller(&self, digest: &[u8; 32]) -> Result<Option<Caller>, LedgerError> {
        // Asked in any case, so that whoever has to fetch rows fetches it with the others.
        let is_stopped = self.kill_switch()?.is_some();
        let Some(key) = self.key_by_digest(digest)? else { return Ok(None) };
        let standing = Standing { is_stopped, issuer_lives: self.has_issuer(&key)? };
        Ok(Some(Caller { key, standing }))
    }

    /// How a key stands.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn standing(&self, key: &Key) -> Result<Standing, LedgerError> {
        Ok(Standing { is_stopped: self.kill_switch()?.is_some(), issuer_lives: self.has_issuer(key)? })
    }

    fn has_issuer(&self, key: &Key) -> Result<bool, LedgerError> {
        let Some(issuer) = key.issuer else { return Ok(true) };
        Ok(self.issuer(issuer)?.is_some_and(|issuer| issuer.revoked_at.is_none()))
    }

    /// The vault key with a secret's digest.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn key_by_digest(&self, digest: &[u8; 32]) -> Result<Option<Key>, LedgerError> {
        let found = self
            .source
            .get(&KEY_DIGESTS, &digest, |(kind, id)| Ok((kind == KEY_KIND_VAULT).then_some(*id)))?;
        found.flatten().map(|id| self.source.get(&KEYS, &&id, row::decode)).transpose().map(Option::flatten)
    }

    /// One key.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn key(&self, id: KeyId) -> Result<Option<Key>, LedgerError> {
        self.source.get(&KEYS, &id.as_bytes(), row::decode)
    }

    /// Keys, newest first.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn keys(
        &self,
        filter: &KeyFilter,
        after: Option<KeyId>,
        limit: usize,
        now: UnixMs,
    ) -> Result<Page<Key, KeyId>, LedgerError> {
        let end = after.map_or([255; 16], |id| *id.as_bytes());
        let mut rows = self.rows(&KEYS, below(&end), Order::Descending, |_, key| row::decode(key))?;
        page(
            &mut rows,
            limit,
            |key: &Key| key.id,
            |key| {
                filter.label.as_ref().is_none_or(|label| key.label == *label)
                    && filter.status.is_none_or(|status| key.status(now) == status)
                    && filter.issuer.is_none_or(|issuer| key.issuer == Some(issuer))
                    && filter.budget.as_ref().is_none_or(|budget| key.budget.as_ref() == Some(budget))
            },
        )
    }

    /// The issuer key with a secret's digest.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn issuer_by_digest(&self, digest: &[u8; 32]) -> Result<Option<Issuer>, LedgerError> {
        let found = self
            .source
            .get(&KEY_DIGESTS, &digest, |(kind, id)| Ok((kind == KEY_KIND_ISSUER).then_some(*id)))?;
        found
            .flatten()
            .map(|id| self.source.get(&ISSUERS, &&id, row::decode))
            .transpose()
            .map(Option::flatten)
    }

    /// One issuer key.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn issuer(&self, id: IssuerId) -> Result<Option<Issuer>, LedgerError> {
        self.source.get(&ISSUERS, &id.as_bytes(), row::decode)
    }

    /// Issuer keys, newest first.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn issuers(
        &self,
        after: Option<IssuerId>,
        limit: usize,
    ) -> Result<Page<Issuer, IssuerId>, LedgerError> {
        let end = after.map_or([255; 16], |id| *id.as_bytes());
        let mut rows =
            self.rows(&ISSUERS, below(&end), Order::Descending, |_, issuer| row::decode(issuer))?;
        page(&mut rows, limit, |issuer: &Issuer| issuer.id, |_| true)
    }

    /// Why a budget is stopped, if it is.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn stopped_budget(&self, budget: BudgetId) -> Result<Option<BudgetRow>, LedgerError> {
        self.source.get(&BUDGETS, &budget.as_bytes(), row::decode)
    }

    /// A subject's counter of one day, or of all days, in one lane.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn counter(&self, subject: Subject, day: Day, lane: Lane) -> Result<Counter, LedgerError> {
        let (kind, id, day, lane) = row::counter_key(&subject, day, lane);
        Ok(self.source.get(&COUNTERS, &(kind, &id, day, lane), row::decode)?.unwrap_or_default())
    }

    /// Doubts and open holds, at most so many.
    ///
    /// # Errors
    /// [`LedgerError`] when the ledger cannot be read.
    pub fn unsettled_holds(&self, limit: usize) -> Result<Vec<Hold>, LedgerError> {
        let mut holds = Vec::new();
        for hold in self.rows(&HOLDS, live_holds(), Order::Ascending, |_, hold| row::decode::<Hold>(hold))? {
            let hold = hold?;
            match hold.state {
                HoldState::Doubt | HoldState::Open => holds.push(hold),
                HoldState::Sending { .. } | HoldState::Spent | HoldState::Void => {}
            }
            if holds.len() == limit {
                break;
            }
        }
        Ok(holds)
    }

    /// Live holds, newest first, with their calls; of one state when it is named.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn holds(
        &self,
        state: Option<&str>,
        after: Option<HoldId>,
        limit: usize,
    ) -> Result<Page<HoldView, HoldId>, LedgerError> {
        let end = after.map_or([255; 16], |id| *id.as_bytes());
        let live = (Bound::Included((PHASE_LIVE, &[0; 16])), Bound::Excluded((PHASE_LIVE, &end)));
        let mut rows = self.rows(&HOLDS, live, Order::Descending, |_, hold| row::decode(hold))?;
        let holds = page(
            &mut rows,
            limit,
            |hold: &Hold| hold.id,
            |hold| state.is_none_or(|state| hold.state.as_str() == state),
        )?;
        let items = holds
            .items
            .into_iter()
            .map(|hold| Ok(HoldView { call: self.call_by_id(hold.call_id)?, hold }))
            .collect::<Result<_, LedgerError>>()?;
        Ok(Page { items, next: holds.next })
    }

    /// How many live holds there are in each state, and since when the oldest doubt is one.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn hold_census(&self) -> Result<(BTreeMap<&'static str, u64>, Option<UnixMs>), LedgerError> {
        let mut counts = BTreeMap::from([("sending", 0), ("open", 0), ("doubt", 0)]);
        let mut oldest: Option<UnixMs> = None;
        for hold in self.rows(&HOLDS, live_holds(), Order::Ascending, |_, hold| row::decode::<Hold>(hold))? {
            let hold = hold?;
            *counts.entry(hold.state.as_str()).or_default() += 1;
            if hold.state == HoldState::Doubt {
                oldest = Some(oldest.map_or(hold.since, |oldest| oldest.min(hold.since)));
            }
        }
        Ok((counts, oldest))
    }

    /// The hold of an object at the vendor.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn hold_of_object(&self, account: &str, object: &str) -> Result<Option<Hold>, LedgerError> {
        let id = self.source.get(&OBJECTS, &(account, object), |id| Ok(HoldId::from_bytes(*id)))?;
        id.map(|id| self.hold(id)).transpose().map(Option::flatten)
    }

    /// One hold, live or ended.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn hold(&self, id: HoldId) -> Result<Option<Hold>, LedgerError> {
        for phase in [PHASE_LIVE, PHASE_ENDED] {
            if let Some(hold) = self.source.get(&HOLDS, &(phase, id.as_bytes()), row::decode)? {
                return Ok(Some(hold));
            }
        }
        Ok(None)
    }

    /// One call.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn call_by_id(&self, id: CallId) -> Result<Option<Call>, LedgerError> {
        let identity = self.source.get(&CALL_IDS, &id.as_bytes(), |identity| Ok(*identity))?;
        let call =
            identity.map(|identity| self.source.get(&CALLS, &&identity, row::decode::<Call>)).transpose()?;
        Ok(call.flatten().filter(|call| call.id == id))
    }

    /// Calls, newest first.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn calls(
        &self,
        filter: &CallFilter,
        after: Option<CallId>,
        limit: usize,
    ) -> Result<Page<Call, CallId>, LedgerError> {
        let end = after.map_or([255; 16], |id| *id.as_bytes());
        let ids =
            self.rows(&CALL_IDS, below(&end), Order::Descending, |id, _| Ok(CallId::from_bytes(*id)))?;
        // One that went meanwhile is left out.
        let mut rows = ids.filter_map(|id| id.and_then(|id| self.call_by_id(id)).transpose());
        page(&mut rows, limit, |call: &Call| call.id, |call| matches_call(filter, call))
    }

    /// Audit records, where the log has no index: all of it that is kept is looked through, the newest first.
    ///
    /// # Errors
    /// [`LedgerError`], also when there is more of it than one answer may look through.
    pub fn audit_without_index(
        &self,
        filter: &AuditFilter,
        after: Option<u64>,
        limit: usize,
    ) -> Result<Page<Map<String, Value>, u64>, LedgerError> {
        let log = self.rows(&AUDIT, all(), Order::Descending, |place, stored| {
            let sealed = sealed_of(stored)?;
            Ok((place, journal::call_of(&sealed)?, sealed.to_json()))
        })?;
        let (mut told, mut found) = (HashSet::new(), Vec::new());
        for record in log {
            let (place, call, record) = record?;
            let is_last = filter.all_events || call.is_none_or(|call| told.insert(call));
            if is_last && filter.matches(&record) {
                found.push((place, record));
            }
        }
        if filter.ascending {
            found.reverse();
        }
        let is_behind = |place: u64| match (after, filter.ascending) {
            (None, _) => true,
            (Some(after), true) => place > after,
            (Some(after), false) => place < after,
        };
        let mut rest = found.into_iter().filter(|(place, _)| is_behind(*place)).peekable();
        let (mut items, mut at) = (Vec::new(), None);
        for (place, record) in rest.by_ref().take(limit) {
            at = Some(place);
            items.push(record);
        }
        Ok(Page { items, next: at.filter(|_| rest.peek().is_some()) })
    }

    /// What a shipper has to know of the log.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn log_state(&self) -> Result<LogState, LedgerError> {
        let chain: Option<ChainRow> = self.source.get(&META, &meta::CHAIN, row::decode)?;
        let (chain_id, base) = chain.map_or((self.id, 0), |chain| (chain.id, chain.base));
        let end =
            |order| self.source.range(&AUDIT, all(), order, None, |place, _| Ok(place))?.next().transpose();
        let (first, last) = (end(Order::Ascending)?.unwrap_or(1), end(Order::Descending)?.unwrap_or(0));
        Ok(LogState { chain_id, base, first, last })
    }

    /// Records behind a place, in order: so many at most, and no more once they have so many bytes.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn records_after(
        &self,
        place: u64,
        rows_max: usize,
        bytes_max: usize,
    ) -> Result<Vec<(u64, Sealed)>, LedgerError> {
        let behind = (Bound::Excluded(place), Bound::Unbounded);
        let rows =
            self.rows(&AUDIT, behind, Order::Ascending, |place, stored| Ok((place, sealed_of(stored)?)))?;
        journal::within(rows, rows_max, bytes_max)
    }

    /// The hash of the record at a place; `None` when it is not kept any more.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn record_hash(&self, place: u64) -> Result<Option<[u8; 32]>, LedgerError> {
        self.source.get(&AUDIT, &place, |stored| Ok(sealed_of(stored)?.hash))
    }

    /// The place of the last record that a collector is known to have.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn shipped_to(&self) -> Result<u64, LedgerError> {
        Ok(self.meta_row(meta::SHIPPED_TO)?.unwrap_or(0))
    }

    /// What a collector has and this ledger lost, while no operator has accepted it.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn loss(&self) -> Result<Option<LossRow>, LedgerError> {
        self.meta_row(meta::LOSS)
    }

    /// Follows the whole chain that is kept.
    ///
    /// # Errors
    /// [`LedgerError`] when it cannot be read; a chain that is broken is a result.
    pub fn verify_chain(&self) -> Result<ChainState, LedgerError> {
        let floor: Option<AuditFloorRow> = self.meta_row(meta::AUDIT_FLOOR)?;
        let log = self.rows(&AUDIT, all(), Order::Ascending, |_, stored| Ok(sealed_of(stored)?))?;
        let mut verifier = match floor {
            Some(floor) => Verifier::from_record(floor.seq, floor.prev_hash.into()),
            None => Verifier::default(),
        };
        let mut records = 0;
        for sealed in log {
            let sealed = sealed?;
            if let Err(broken) = verifier.follow(&sealed) {
                return Ok(ChainState { records, head: verifier.head(), broken: Some(broken) });
            }
            records += 1;
        }
        Ok(ChainState { records, head: verifier.head(), broken: None })
    }
}

/// What lies below an id.
fn below(end: &[u8; 16]) -> Span<&[u8; 16]> {
    (Bound::Unbounded, Bound::Excluded(end))
}

fn page<T, C>(
    rows: &mut dyn Iterator<Item = Result<T, LedgerError>>,
    limit: usize,
    cursor: impl Fn(&T) -> C,
    wanted: impl Fn(&T) -> bool,
) -> Result<Page<T, C>, LedgerError> {
    let mut items = Vec::new();
    let (mut looked_at, mut at) = (0, None);
    for item in rows {
        let item = item?;
        if items.len() == limit || looked_at == SCAN_ROWS_MAX {
            return Ok(Page { items, next: at });
        }
        (looked_at, at) = (looked_at + 1, Some(cursor(&item)));
        if wanted(&item) {
            items.push(item);
        }
    }
    Ok(Page { items, next: None })
}

fn matches_call(filter: &CallFilter, call: &Call) -> bool {
    let same = |wanted: &Option<String>, found: &Option<String>| {
        wanted.as_ref().is_none_or(|wanted| found.as_ref() == Some(wanted))
    };
    let key = filter.idempotency_key.as_ref().is_none_or(|wanted| {
        call.caller_key.as_ref() == Some(wanted)
            || call.attempts.iter().any(|attempt| attempt.upstream_key.as_ref() == Some(wanted))
    });
    key && same(&filter.customer, &call.customer)
        && same(&filter.object_id, &call.object_id)
        && filter.state.is_none_or(|state| call.state == state)
}
