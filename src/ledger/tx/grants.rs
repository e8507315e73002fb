//! Keys, issuers and budgets: the rows that say who may spend.

use serde_json::{Map, Value};

use crate::audit::Event;
use crate::id::{BudgetId, IssuerId, KeyId};
use crate::issuer::Issuer;
use crate::key::{Idempotency, Key};
use crate::ledger::row::{
    self, BUDGETS, BudgetRow, DUE_KEY, ISSUERS, KEY_DIGESTS, KEY_KIND_ISSUER, KEY_KIND_VAULT, KEYS,
};
use crate::ledger::tx::Tx;
use crate::ledger::{Actor, LedgerError, entry};
use crate::refusal::{Code, Refusal};
use crate::time::{DAY_MS, UnixMs};

impl Tx<'_> {
    pub(in crate::ledger) fn put_key(&mut self, key: &Key) {
        self.put(&KEYS, &key.id.as_bytes(), &row::encode(key).as_slice());
    }

    pub(in crate::ledger) fn issue_key(
        &mut self,
        key: &Key,
        actor: &Actor,
        now: UnixMs,
    ) -> Result<(), LedgerError> {
        self.put_key(key);
        self.put(&KEY_DIGESTS, &&key.digest, &(KEY_KIND_VAULT, key.id.as_bytes()));
        let look_at = key.expires_at.plus_millis(u64::from(key.remember_days).saturating_mul(DAY_MS));
        self.put_due(look_at, DUE_KEY, key.id.as_bytes());
        self.append(&entry::of_admin(now, Event::KeyIssued, &actor.0, Some(key), policy_detail(key)))
    }

    pub(in crate::ledger) fn revoke_key(
        &mut self,
        id: KeyId,
        actor: &Actor,
        now: UnixMs,
    ) -> Result<Key, LedgerError> {
        let mut key = self.key(id)?.ok_or(LedgerError::NotFound)?;
        if key.revoked_at.is_none() {
            key.revoked_at = Some(now);
            self.put_key(&key);
            self.append(&entry::of_admin(now, Event::KeyRevoked, &actor.0, Some(&key), Map::new()))?;
        }
        Ok(key)
    }

    fn issuer(&self, id: IssuerId) -> Result<Option<Issuer>, LedgerError> {
        self.get(&ISSUERS, &id.as_bytes(), row::decode)
    }

    /// The issuer that minted a key. One that is gone is a contradiction: its limits would be gone with it.
    pub(in crate::ledger) fn issuer_of(&self, key: &Key) -> Result<Option<Issuer>, LedgerError> {
        let Some(id) = key.issuer else { return Ok(None) };
        let issuer = self.issuer(id)?;
        Ok(Some(issuer.ok_or(LedgerError::Contradiction("a key has no issuer"))?))
    }

    pub(in crate::ledger) fn create_issuer(
        &mut self,
        issuer: &Issuer,
        actor: &Actor,
        now: UnixMs,
    ) -> Result<(), LedgerError> {
        self.put_issuer(issuer);
        self.put(&KEY_DIGESTS, &&issuer.digest, &(KEY_KIND_ISSUER, issuer.id.as_bytes()));
        self.append(&entry::of_issuer(now, Event::IssuerCreated, &actor.0, issuer))
    }

    pub(in crate::ledger) fn revoke_issuer(
        &mut self,
        id: IssuerId,
        actor: &Actor,
        now: UnixMs,
    ) -> Result<Issuer, LedgerError> {
        let mut issuer = self.issuer(id)?.ok_or(LedgerError::NotFound)?;
        if issuer.revoked_at.is_none() {
            issuer.revoked_at = Some(now);
            self.put_issuer(&issuer);
            self.append(&entry::of_issuer(now, Event::IssuerRevoked, &actor.0, &issuer))?;
        }
        Ok(issuer)
    }

    fn put_issuer(&mut self, issuer: &Issuer) {
        self.put(&ISSUERS, &issuer.id.as_bytes(), &row::encode(issuer).as_slice());
    }

    // --- budgets

    pub(in crate::ledger) fn is_stopped(&self, key: &Key) -> Result<bool, LedgerError> {
        let Some(budget) = key.budget_id() else { return Ok(false) };
        Ok(self.get(&BUDGETS, &budget.as_bytes(), |_| Ok(()))?.is_some())
    }

    /// The first cap refusal under a budget whose keys want it so stops them all.
    pub(in crate::ledger) fn stop_budget(
        &mut self,
        key: &Key,
        refusal: &Refusal,
        now: UnixMs,
    ) -> Result<(), LedgerError> {
        let by_cap = matches!(refusal.code, Code::SpendCapExceeded | Code::CallLimitExceeded);
        let (true, true, Some(name), Some(budget)) =
            (by_cap, key.stop_budget_on_refusal, key.budget.clone(), key.budget_id())
        else {
            return Ok(());
        };
        if self.is_stopped(key)? {
            return Ok(());
        }
        let row = BudgetRow { since: now, name: name.clone(), code: refusal.code.as_str().to_owned() };
        self.put(&BUDGETS, &budget.as_bytes(), &row::encode(&row).as_slice());
        let mut detail = Map::new();
        detail.insert("budget".to_owned(), Value::from(name));
        detail.insert("code".to_owned(), Value::from(refusal.code.as_str()));
        self.append(&entry::of_admin(now, Event::BudgetStopped, "keybrake", Some(key), detail))
    }

    pub(in crate::ledger) fn resume_budget(
        &mut self,
        issuer: Option<IssuerId>,
        name: &str,
        reason: &str,
        actor: &Actor,
        now: UnixMs,
    ) -> Result<bool, LedgerError> {
        let budget = BudgetId::of(issuer, name);
        let was_stopped = self.get(&BUDGETS, &budget.as_bytes(), |_| Ok(()))?.is_some();
        if was_stopped {
            self.remove(&BUDGETS, &budget.as_bytes());
            let mut detail = Map::new();
            detail.insert("budget".to_owned(), Value::from(name));
            detail.insert("reason".to_owned(), Value::from(reason));
            self.append(&entry::of_admin(now, Event::BudgetResumed, &actor.0, None, detail))?;
        }
        Ok(was_stopped)
    }
}

/// The policy of a key for the record of its making: what stays known after the row is gone.
fn policy_detail(key: &Key) -> Map<String, Value> {
    let (scope, fields) = match &key.idempotency {
        Idempotency::Content { scope, fields } => (Value::from(scope.as_str()), Value::from(fields.clone())),
        Idempotency::Required | Idempotency::Client => (Value::Null, Value::Null),
    };
    let usd = |cap: Option<crate::money::MicroUsd>| cap.map_or(Value::Null, |cap| cap.to_string().into());
    let grants: Vec<Value> = key.grants.iter().map(|grant| Value::from(grant.written.as_str())).collect();
    [
        ("allowed_endpoints", Value::from(grants)),
        ("constraints", entry::written(&key.constraints)),
        ("accounts", Value::from(key.accounts.clone())),
        ("stop_budget_on_refusal", Value::from(key.stop_budget_on_refusal)),
        ("idempotency_scope", scope),
        ("idempotency_fields", fields),
        ("budget", key.budget.clone().map_or(Value::Null, Value::from)),
        ("daily_usd_cap", usd(key.caps.daily)),
        ("total_usd_cap", usd(key.caps.total)),
        ("max_usd_per_request", usd(key.caps.per_request)),
        ("daily_usd_out_cap", usd(key.caps.daily_out)),
        ("max_calls", key.caps.max_calls.map_or(Value::Null, Value::from)),
        ("uncapped", Value::from(key.caps.uncapped)),
        ("idempotency", Value::from(key.idempotency.as_str())),
        ("remember_days", Value::from(key.remember_days)),
        ("retry_declined_after_seconds", key.retry_declined_after_s.map_or(Value::Null, Value::from)),
        ("requests_per_second", Value::from(key.rate())),
        ("client_secrets", Value::from(key.client_secrets)),
        ("expires_at", Value::from(key.expires_at.to_string())),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .collect()
}
