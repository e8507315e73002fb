//! What a collector keeps: the records of all chains in order of arrival, the chains, and what it had to refuse, as
//! evidence. In a file of its own ([`redb`]), or in a PostgreSQL that several collectors share ([`postgres`]); both take
//! records by the same rules ([`crate::collect::chain`]) and answer the
//! same.
//!
//! Nobody is told that a record is held before it is durable.

use serde_json::{Map, Value, json};
use tokio::sync::oneshot;

use crate::audit::{Broken, Sealed, Verifier};
use crate::collect::chain::{Batch, Chain, Refused};
use crate::collect::{postgres, redb};
use crate::id::{from_hex, hex};
use crate::journal::{AuditFilter, Page};
use crate::time::UnixMs;

/// Batches that may wait to be taken.
pub(super) const BATCHES_WAITING_MAX: usize = 256;
/// Batches that share one commit.
pub(super) const BATCHES_MAX: usize = 64;
/// Records that one step of retention deletes.
pub(super) const DROP_ROWS: usize = 5_000;
/// How often old records are looked for.
pub(super) const DROP_EVERY_MS: u64 = 60_000;
/// Refused batches that are kept; of the next ones only the chain's mark tells.
pub(super) const EVIDENCE_MAX: u64 = 1_000;
/// Records of such a batch that are kept, from the first that contradicts.
const EVIDENCE_RECORDS_MAX: usize = 20;
/// Chains that are kept. A new one beyond is refused: each start of a sidecar that lost its volume makes one.
pub(super) const CHAINS_MAX: usize = 100_000;

/// Why the store gave no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// It cannot be read or written; it is tried again. What was sent is held or not: the sender finds out by sending it
    /// again.
    #[error("the store cannot be used: {0}")]
    Unavailable(String),
    /// Another process has it open.
    #[error("another process is using this store; every collector needs a COLLECT_DATA_DIR of its own")]
    Locked,
    /// A batch that is not taken.
    #[error(transparent)]
    Refused(#[from] Refused),
}

/// A batch on its way in.
#[derive(Debug)]
pub struct Incoming {
    /// The records.
    pub batch: Batch,
    /// The first record that its sender still has.
    pub floor: u64,
    /// Records that wait at the sender.
    pub backlog: u64,
}

pub(super) type Reply = oneshot::Sender<Result<Chain, StoreError>>;

/// The handle that everybody holds.
#[derive(Clone, Debug)]
pub enum Store {
    /// A file of this process alone.
    Redb(redb::Store),
    /// A database that other collectors may use as well.
    Postgres(postgres::Store),
}

/// How one chain verifies.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// The chain.
    pub chain_id: String,
    /// Records that were followed.
    pub records: u64,
    /// The hash of the last.
    pub head: [u8; 32],
    /// What is wrong with the first bad one.
    pub broken: Option<Broken>,
}

impl Store {
    /// Takes a batch; durable when it returns. Answers the chain as it then is.
    ///
    /// # Errors
    /// [`StoreError::Refused`]: nothing of it is held. Else it may be held, and nothing else is.
    pub async fn take(&self, incoming: Incoming) -> Result<Chain, StoreError> {
        match self {
            Self::Redb(store) => store.take(incoming).await,
            Self::Postgres(store) => store.take(incoming).await,
        }
    }

    /// All chains, by id.
    ///
    /// # Errors
    /// [`StoreError`], as for every read here.
    pub async fn chains(&self) -> Result<Vec<(String, Chain)>, StoreError> {
        match self {
            Self::Redb(store) => store.chains(),
            Self::Postgres(store) => store.chains().await,
        }
    }

    /// Records of all chains.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn query(
        &self,
        filter: AuditFilter,
        after: Option<u64>,
        limit: usize,
    ) -> Result<Page<Map<String, Value>, u64>, StoreError> {
        match self {
            Self::Redb(store) => {
                let store = store.clone();
                beside(move || store.query(&filter, after, limit)).await
            }
            Self::Postgres(store) => store.query(&filter, after, limit).await,
        }
    }

    /// Follows a chain from the first record that is held, over what came too late to be had.
    ///
    /// # Errors
    /// [`StoreError`] when it cannot be read; a chain that is broken is a result.
    pub async fn verify(&self, chain_id: &str, chain: &Chain) -> Result<Verdict, StoreError> {
        match self {
            Self::Redb(store) => {
                let (store, chain_id, chain) = (store.clone(), chain_id.to_owned(), chain.clone());
                beside(move || store.verify(&chain_id, &chain)).await
            }
            Self::Postgres(store) => store.verify(chain_id, chain).await,
        }
    }

    /// Refused batches, the newest first.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn evidence(&self, limit: usize) -> Result<Vec<Value>, StoreError> {
        match self {
            Self::Redb(store) => store.evidence(limit),
            Self::Postgres(store) => store.evidence(limit).await,
        }
    }
}

/// On another thread than those that serve requests.
async fn beside<T: Send + 'static>(
    look: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    let cut_off = |_| Err(StoreError::Unavailable("the question was cut off".to_owned()));
    tokio::task::spawn_blocking(look).await.unwrap_or_else(cut_off)
}

/// Follows the records of one chain that are held.
pub(super) struct Following<'a> {
    chain: &'a Chain,
    verifier: Verifier,
    records: u64,
    next: Option<u64>,
}

impl<'a> Following<'a> {
    pub(super) fn of(chain: &'a Chain) -> Self {
        Self { chain, verifier: Verifier::default(), records: 0, next: None }
    }

    /// The next one that is held.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn follow(&mut self, seq: u64, sealed: &Sealed) -> Result<(), Broken> {
        let is_after_gap = self.chain.missing.iter().any(|(_, last)| last.saturating_add(1) == seq);
        if self.next != Some(seq) && (self.records == 0 || is_after_gap) && seq > 1 {
            self.verifier = Verifier::from_record(seq, prev_hash_of(&sealed.bytes));
        }
        self.verifier.follow(sealed)?;
        self.records += 1;
        self.next = Some(seq.saturating_add(1));
        Ok(())
    }

    pub(super) fn verdict(self, chain_id: &str, broken: Option<Broken>) -> Verdict {
        let (records, head) = (self.records, self.verifier.head());
        Verdict { chain_id: chain_id.to_owned(), records, head, broken }
    }
}

fn prev_hash_of(record: &[u8]) -> [u8; 32] {
    let fields: Map<String, Value> = serde_json::from_slice(record).unwrap_or_default();
    let hash = fields.get("prev_hash").and_then(Value::as_str).and_then(from_hex);
    hash.and_then(|hash| hash.try_into().ok()).unwrap_or_default()
}

/// A node that starts another chain has lost, replaced or restored its ledger.
pub(super) fn report_new(node: &str, chain_id: &str, before: &str) {
    tracing::warn!(
        node,
        chain_id,
        before,
        "a known node started a new chain: its ledger was lost, replaced or restored"
    );
}

pub(super) fn report_fork(batch: &Batch, seq: u64) {
    let (chain_id, node) = (&batch.origin.chain_id, &batch.origin.node);
    tracing::error!(chain_id, node, seq, "records contradict those that are held");
}

/// What is kept of a batch that contradicts from a record on, and what tells it from another: the same batch comes again
/// with every try.
pub(super) fn evidence_of(batch: &Batch, seq: u64, now: UnixMs) -> (String, Value) {
    let from = batch.records.iter().skip_while(|one| one.seq < seq).take(EVIDENCE_RECORDS_MAX);
    let records: Vec<Value> = from.map(|one| Value::Object(one.sealed.to_json())).collect();
    let digest = hex(&batch.records.last().map(|one| one.sealed.hash).unwrap_or_default());
    let kept = json!({
        "at": now.to_string(),
        "chain_id": batch.origin.chain_id,
        "node": batch.origin.node,
        "seq": seq,
        "last_hash": digest,
        "records": records,
    });
    (digest, kept)
}
