//! Records at the end of the chain, and refusals, which are counted with their equals.

use sha2::{Digest as _, Sha256};

use crate::audit::{self, Entry, Place};
use crate::hold::Facts;
use crate::id::{KeyId, hex};
use crate::key::Key;
use crate::ledger::row::{self, AUDIT, REFUSALS, RefusalRow};
use crate::ledger::tx::{Head, MINUTE_MS, Tx};
use crate::ledger::{LedgerError, entry};
use crate::refusal::Refusal;
use crate::time::UnixMs;

/// Refusals of one key in one minute that are told apart; a script that never asks the same twice must not fill the log.
const REFUSALS_TOLD_MAX: u64 = 30;
/// The row of the others.
const OTHERS: &str = "others";

impl Tx<'_> {
    pub(in crate::ledger) fn refused(
        &mut self,
        key_id: KeyId,
        facts: &Facts,
        refusal: &Refusal,
        duration_ms: u64,
        now: UnixMs,
    ) -> Result<(), LedgerError> {
        let key = self.key(key_id)?.ok_or(LedgerError::NotFound)?;
        self.count_refusal(&key, facts, refusal, duration_ms, now)?;
        self.stop_budget(&key, refusal, now)
    }

    /// The first refusal of a minute is a record at once; its equals are counted and recorded together later.
    pub(in crate::ledger) fn count_refusal(
        &mut self,
        key: &Key,
        facts: &Facts,
        refusal: &Refusal,
        duration_ms: u64,
        now: UnixMs,
    ) -> Result<(), LedgerError> {
        let minute = now.millis() / MINUTE_MS;
        let mut equal = format!("{}:{}", refusal.code.as_str(), hex(&subject_of(facts)));
        let mut entry = entry::of_refusal(now, key, facts, refusal, duration_ms);
        let mut before = self.refusals(key.id, &equal, minute)?;
        if before.is_none() {
            let told = self.refusals(key.id, "", minute)?.map_or(0, |row| row.count);
            if told < REFUSALS_TOLD_MAX {
                let row = RefusalRow { count: told.saturating_add(1), entry: String::new() };
                self.put(&REFUSALS, &(key.id.as_bytes(), "", minute), &row::encode(&row).as_slice());
            } else {
                OTHERS.clone_into(&mut equal);
                // Of all that they were about, only what they have in common is told.
                let (request_id, method) = (facts.request_id.clone(), facts.method.clone());
                let common = Facts { request_id, method, ..Facts::default() };
                entry = entry::of_refusal(now, key, &common, refusal, duration_ms);
                entry.flags = Some(vec![OTHERS.to_owned()]);
                before = self.refusals(key.id, &equal, minute)?;
            }
        }
        let row = match before {
            None => {
                self.append(&entry)?;
                RefusalRow { count: 0, entry: String::new() }
            }
            Some(before) => RefusalRow {
                count: before.count.saturating_add(1),
                entry: serde_json::to_string(&entry).unwrap_or_default(),
            },
        };
        self.put(&REFUSALS, &(key.id.as_bytes(), &equal, minute), &row::encode(&row).as_slice());
        Ok(())
    }

    fn refusals(&self, key: KeyId, equal: &str, minute: u64) -> Result<Option<RefusalRow>, LedgerError> {
        self.get(&REFUSALS, &(key.as_bytes(), equal, minute), row::decode)
    }

    pub(in crate::ledger) fn append(&mut self, entry: &Entry) -> Result<(), LedgerError> {
        let (Some(at), Some(seq)) = (self.head.place.checked_add(1), self.head.seq.checked_add(1)) else {
            return Err(LedgerError::Unavailable("the audit log has no more numbers".to_owned()));
        };
        let place = Place {
            seq,
            ledger_id: &self.ledger_id,
            node: &self.opening.node,
            chain_id: &self.chain_id,
            prev_hash: self.head.hash,
        };
        let sealed = audit::seal(&place, entry);
        self.put(&AUDIT, &at, &[sealed.hash.as_slice(), &sealed.bytes].concat().as_slice());
        let time = UnixMs::parse(&entry.at).unwrap_or(self.head.at);
        self.head = Head { place: at, seq, hash: sealed.hash, at: time };
        Ok(())
    }
}

/// What a refused request was about. Two that are about the same thing under one key are one in the log.
fn subject_of(facts: &Facts) -> [u8; 8] {
    let parts = [
        Some(facts.method.as_str()),
        Some(facts.endpoint.as_str()),
        facts.customer.as_deref(),
        facts.object_id.as_deref(),
    ];
    let mut hash = Sha256::new();
    let context = facts.context.iter().flat_map(|(name, value)| [name.as_str(), value.as_str()]);
    for part in parts.into_iter().flatten().chain(context) {
        hash.update(part);
        hash.update([0]);
    }
    let digest: [u8; 32] = hash.finalize().into();
    digest.first_chunk().copied().unwrap_or_default()
}
