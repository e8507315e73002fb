//! Reads, on snapshots: they see what is durable and never wait for the writer.

use std::collections::BTreeMap;

use redb::{ReadableTable, TableError};
use serde_json::{Map, Value};

use crate::audit::{Broken, Sealed, Verifier};
use crate::call::{Call, CallState};
use crate::hold::{Hold, HoldState, Lane, Subject};
use crate::id::{BudgetId, CallId, HoldId, Identity, IssuerId, KeyId, LedgerId};
use crate::issuer::Issuer;
use crate::journal::{self, AUDIT, sealed_of};
use crate::key::{Key, Status};
use crate::ledger::counter::Counter;
use crate::ledger::redb::RedbStore;
use crate::ledger::row::{
    self, AuditFloorRow, BUDGETS, BindingRow, BudgetRow, CALL_IDS, CALLS, COUNTERS, ChainRow, HOLDS, ISSUERS,
    KEY_DIGESTS, KEY_KIND_ISSUER, KEY_KIND_VAULT, KEYS, KillSwitchRow, LossRow, META, OBJECTS, PHASE_LIVE,
    meta,
};
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

/// A table that nobody has written yet is empty, not an error.
macro_rules! open_or {
    ($txn:expr, $table:expr, $empty:expr) => {
        match $txn.open_table($table) {
            Ok(table) => table,
            Err(TableError::TableDoesNotExist(_)) => return Ok($empty),
            Err(error) => return Err(error.into()),
        }
    };
}

impl RedbStore {
    fn meta_row<T: for<'b> minicbor::Decode<'b, ()>>(&self, name: &str) -> Result<Option<T>, LedgerError> {
        meta_of(&self.read()?, name)
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

    /// The vault key with a secret's digest, and whether everything is stopped: what every request asks first.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn key_by_digest(&self, digest: &[u8; 32]) -> Result<Option<Key>, LedgerError> {
        let txn = self.read()?;
        let id = {
            let table = open_or!(txn, KEY_DIGESTS, None);
            let found = table.get(digest)?;
            found.filter(|found| found.value().0 == KEY_KIND_VAULT).map(|found| *found.value().1)
        };
        let Some(id) = id else { return Ok(None) };
        let table = open_or!(txn, KEYS, None);
        let found = table.get(&id)?;
        found.map(|bytes| row::decode(bytes.value())).transpose()
    }

    /// One key.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn key(&self, id: KeyId) -> Result<Option<Key>, LedgerError> {
        let txn = self.read()?;
        let table = open_or!(txn, KEYS, None);
        let found = table.get(id.as_bytes())?;
        found.map(|bytes| row::decode(bytes.value())).transpose()
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
        let txn = self.read()?;
        let table = open_or!(txn, KEYS, Page { items: Vec::new(), next: None });
        let end = after.map_or([255; 16], |id| *id.as_bytes());
        let mut rows = table.range::<&[u8; 16]>(..&end)?.rev().map(|found| row::decode(found?.1.value()));
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
        let txn = self.read()?;
        let table = open_or!(txn, KEY_DIGESTS, None);
        let found = table.get(digest)?;
        let id = found.filter(|found| found.value().0 == KEY_KIND_ISSUER).map(|found| *found.value().1);
        id.map(|id| self.issuer(IssuerId::from_bytes(id))).transpose().map(Option::flatten)
    }

    /// One issuer key.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn issuer(&self, id: IssuerId) -> Result<Option<Issuer>, LedgerError> {
        let txn = self.read()?;
        let table = open_or!(txn, ISSUERS, None);
        let found = table.get(id.as_bytes())?;
        found.map(|bytes| row::decode(bytes.value())).transpose()
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
        let txn = self.read()?;
        let table = open_or!(txn, ISSUERS, Page { items: Vec::new(), next: None });
        let end = after.map_or([255; 16], |id| *id.as_bytes());
        let mut rows = table.range::<&[u8; 16]>(..&end)?.rev().map(|found| row::decode(found?.1.value()));
        page(&mut rows, limit, |issuer: &Issuer| issuer.id, |_| true)
    }

    /// Why a budget is stopped, if it is.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn stopped_budget(&self, budget: BudgetId) -> Result<Option<BudgetRow>, LedgerError> {
        let txn = self.read()?;
        let table = open_or!(txn, BUDGETS, None);
        let found = table.get(budget.as_bytes())?;
        found.map(|bytes| row::decode(bytes.value())).transpose()
    }

    /// A subject's counter of one day, or of all days, in one lane.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn counter(&self, subject: Subject, day: Day, lane: Lane) -> Result<Counter, LedgerError> {
        let txn = self.read()?;
        let table = open_or!(txn, COUNTERS, Counter::default());
        let (kind, id, day, lane) = row::counter_key(&subject, day, lane);
        let found = table.get((kind, &id, day, lane))?;
        Ok(found.map(|bytes| row::decode(bytes.value())).transpose()?.unwrap_or_default())
    }

    /// Doubts and open holds, at most so many.
    ///
    /// # Errors
    /// [`LedgerError`] when the ledger cannot be read.
    pub fn unsettled_holds(&self, limit: usize) -> Result<Vec<Hold>, LedgerError> {
        let txn = self.read()?;
        let table = open_or!(txn, HOLDS, Vec::new());
        let mut holds = Vec::new();
        for found in table.range((PHASE_LIVE, &[0; 16])..=(PHASE_LIVE, &[255; 16]))? {
            let hold: Hold = row::decode(found?.1.value())?;
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
        let txn = self.read()?;
        let table = open_or!(txn, HOLDS, Page { items: Vec::new(), next: None });
        let end = after.map_or([255; 16], |id| *id.as_bytes());
        let mut rows = table
            .range((PHASE_LIVE, &[0; 16])..(PHASE_LIVE, &end))?
            .rev()
            .map(|found| row::decode(found?.1.value()));
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
        let txn = self.read()?;
        let table = open_or!(txn, HOLDS, (counts, None));
        let mut oldest: Option<UnixMs> = None;
        for found in table.range((PHASE_LIVE, &[0; 16])..=(PHASE_LIVE, &[255; 16]))? {
            let hold: Hold = row::decode(found?.1.value())?;
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
        let id = {
            let txn = self.read()?;
            let table = open_or!(txn, OBJECTS, None);
            table.get((account, object))?.map(|found| HoldId::from_bytes(*found.value()))
        };
        id.map(|id| self.hold(id)).transpose().map(Option::flatten)
    }

    /// One hold, live or ended.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn hold(&self, id: HoldId) -> Result<Option<Hold>, LedgerError> {
        let txn = self.read()?;
        let table = open_or!(txn, HOLDS, None);
        for phase in [PHASE_LIVE, row::PHASE_ENDED] {
            if let Some(bytes) = table.get((phase, id.as_bytes()))? {
                return Ok(Some(row::decode(bytes.value())?));
            }
        }
        Ok(None)
    }

    /// One call.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn call_by_id(&self, id: CallId) -> Result<Option<Call>, LedgerError> {
        let txn = self.read()?;
        let ids = open_or!(txn, CALL_IDS, None);
        let Some(identity) = ids.get(id.as_bytes())?.map(|found| Identity(*found.value())) else {
            return Ok(None);
        };
        let calls = open_or!(txn, CALLS, None);
        let call: Option<Call> =
            calls.get(&identity.0)?.map(|bytes| row::decode(bytes.value())).transpose()?;
        Ok(call.filter(|call| call.id == id))
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
        let txn = self.read()?;
        let ids = open_or!(txn, CALL_IDS, Page { items: Vec::new(), next: None });
        let calls = open_or!(txn, CALLS, Page { items: Vec::new(), next: None });
        let end = after.map_or([255; 16], |id| *id.as_bytes());
        let mut rows = ids.range::<&[u8; 16]>(..&end)?.rev().map(|found| {
            let bytes = calls.get(found?.1.value())?;
            row::decode(bytes.ok_or(LedgerError::Corrupt("call"))?.value())
        });
        page(&mut rows, limit, |call: &Call| call.id, |call| matches_call(filter, call))
    }

    /// Audit records; by default one row for each call, in its last outcome, and every other record.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn audit(
        &self,
        filter: &AuditFilter,
        after: Option<u64>,
        limit: usize,
    ) -> Result<Page<Map<String, Value>, u64>, LedgerError> {
        Ok(journal::query(&self.read()?, filter, after, limit)?)
    }

    /// What a shipper has to know of the log.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn log_state(&self) -> Result<LogState, LedgerError> {
        let txn = self.read()?;
        let chain: Option<ChainRow> = meta_of(&txn, meta::CHAIN)?;
        let (chain_id, base) = chain.map_or((self.id(), 0), |chain| (chain.id, chain.base));
        let table = txn.open_table(AUDIT)?;
        let first = table.first()?.map_or(1, |(place, _)| place.value());
        let last = table.last()?.map_or(0, |(place, _)| place.value());
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
        Ok(journal::read_from(&self.read()?, place, rows_max, bytes_max)?)
    }

    /// The hash of the record at a place; `None` when it is not kept any more.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn record_hash(&self, place: u64) -> Result<Option<[u8; 32]>, LedgerError> {
        Ok(journal::get(&self.read()?, place)?.map(|sealed| sealed.hash))
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
        let txn = self.read()?;
        let mut verifier = match meta_of::<AuditFloorRow>(&txn, meta::AUDIT_FLOOR)? {
            Some(floor) => Verifier::from_record(floor.seq, floor.prev_hash.into()),
            None => Verifier::default(),
        };
        let empty = ChainState { records: 0, head: verifier.head(), broken: None };
        let table = open_or!(txn, AUDIT, empty);
        let mut records = 0;
        for found in table.iter()? {
            let sealed = sealed_of(found?.1.value())?;
            if let Err(broken) = verifier.follow(&sealed) {
                return Ok(ChainState { records, head: verifier.head(), broken: Some(broken) });
            }
            records += 1;
        }
        Ok(ChainState { records, head: verifier.head(), broken: None })
    }
}

/// A row of `meta` in the snapshot of the rows that it speaks of.
fn meta_of<T: for<'b> minicbor::Decode<'b, ()>>(
    txn: &redb::ReadTransaction,
    name: &str,
) -> Result<Option<T>, LedgerError> {
    let table = open_or!(txn, META, None);
    let found = table.get(name)?;
    found.map(|bytes| row::decode(bytes.value())).transpose()
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
