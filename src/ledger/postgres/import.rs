//! Takes the file of a stopped sidecar into a schema that has no ledger yet: every row as it is, under the sidecar's node,
//! in one transaction. The file is read beside it in bounded pieces, and given another name when all of it is there.
//!
//! Why only into a schema without a ledger: calls are remembered by digests with the ledger's salt, and a collector takes no
//! chain whose ledger changes. Rows of two ledgers would be neither of them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_postgres::Transaction;

use crate::id::LedgerId;
use crate::ledger::postgres::session::{Own, STEPS};
use crate::ledger::postgres::writer::unavailable;
use crate::ledger::redb::stopped::{Last, Stopped, put_away};
use crate::ledger::row::{self, AUDIT, BindingRow, Lock, META, TABLE_NAMES, TABLES, meta};
use crate::ledger::{LedgerError, Opening};
use crate::postgres::{self, DatabaseError, Target};

/// Rows that go over in one statement.
const PIECE_ROWS_MAX: usize = 2_000;
/// Bytes that go over in one statement, but for a row that is longer.
const PIECE_BYTES_MAX: usize = 1 << 20;
/// Pieces that are read ahead.
const PIECES_AHEAD: usize = 2;
/// How long one statement, or the next read of the file, may take: disks are slow when they are read through.
const STEP_MS: u64 = 60_000;

/// Why a file was not taken in.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The file or the database cannot be used.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// There is no file.
    #[error("{} is not there", .0.display())]
    NoFile(PathBuf),
    /// An earlier one was taken from here.
    #[error("{} is there already: move it away first", .0.display())]
    PutAwayBefore(PathBuf),
    /// Its chain would go on under another name.
    #[error(
        "the file's last record is of node {found}, and NODE says {node}: set NODE to what the sidecar has"
    )]
    OtherNode {
        /// Whose it is.
        found: String,
        /// What is set.
        node: String,
    },
    /// Another account or mode.
    #[error("the schema belongs to {there}, and the file to {here}")]
    Elsewhere {
        /// Whose the schema is.
        there: String,
        /// Whose the file is.
        here: String,
    },
    /// The node has started there before.
    #[error(
        "node {0} has a chain of its own in the schema already: import before its first start, into an empty schema"
    )]
    HasChain(String),
    /// There is a ledger, and not this one.
    #[error(
        "the schema has a ledger already, {there}, and the file is another one, {here}: its calls are remembered by digests \
         with another salt and would not be known again; name an empty schema (LEDGER_SCHEMA)"
    )]
    OtherLedger {
        /// That of the schema.
        there: LedgerId,
        /// That of the file.
        here: LedgerId,
    },
    /// It was taken in before, and used since.
    #[error(
        "the file was imported into this schema before, and a sidecar has gone on with it since: the two differ"
    )]
    WentOn,
    /// The connection broke when it should have become true.
    #[error("whether the file was taken in is not known ({0}): run the same again, and it tells")]
    Unknown(String),
    /// It is all there, and would be started from again.
    #[error(
        "the file was taken in, but cannot be given another name: {0}; move keybrake.redb and keybrake.wal away"
    )]
    NotPutAway(std::io::Error),
}

impl From<DatabaseError> for ImportError {
    fn from(error: DatabaseError) -> Self {
        Self::Ledger(unavailable(error))
    }
}

impl From<tokio_postgres::Error> for ImportError {
    fn from(error: tokio_postgres::Error) -> Self {
        DatabaseError::from(error).into()
    }
}

/// What was taken in.
#[derive(Clone, Debug)]
pub struct Imported {
    /// The ledger's id, now the schema's.
    pub ledger: LedgerId,
    /// How many rows each table got; `None` where all of it was there already.
    pub rows: Option<Vec<(&'static str, u64)>>,
    /// Calls that were being sent when the sidecar ended, which are doubts now.
    pub doubts: usize,
    /// What the file is called now.
    pub file: PathBuf,
}

/// Takes the file of a stopped sidecar into a schema. `account` is the one that must be its, where it is known.
///
/// # Errors
/// [`ImportError`]. But for [`ImportError::Unknown`] and [`ImportError::NotPutAway`], the schema has none of it.
pub async fn import(
    path: &Path,
    target: &Target,
    opening: &Opening,
    account: Option<&str>,
) -> Result<Imported, ImportError> {
    if !path.exists() {
        return Err(ImportError::NoFile(path.to_owned()));
    }
    let name_then = put_away(path);
    if name_then.exists() {
        return Err(ImportError::PutAwayBefore(name_then));
    }
    let mut stopped = Stopped::open(path)?;
    let (ledger, binding, last) = (stopped.id()?, stopped.binding()?, stopped.last()?);
    if let (Some(known), Some(bound)) = (account, &binding.account)
        && known != bound
    {
        return Err(LedgerError::BoundElsewhere {
            bound: format!("account {bound}"),
            offered: format!("account {known} (STRIPE_ACCOUNT)"),
        }
        .into());
    }
    if last.node != opening.node {
        return Err(ImportError::OtherNode { found: last.node, node: opening.node.clone() });
    }
    let doubts = stopped.move_out(opening)?;
    let stopped = Arc::new(stopped);
    let rows = take_in(target, &stopped, opening, &Whose { ledger, binding, last }).await?;
    // Its reader has ended: nobody else has it.
    let Some(stopped) = Arc::into_inner(stopped) else {
        return Err(ImportError::NotPutAway(std::io::Error::other("it is being read")));
    };
    let file = stopped.put_away().map_err(ImportError::NotPutAway)?;
    Ok(Imported { ledger, doubts: if rows.is_some() { doubts } else { 0 }, rows, file })
}

/// What decides whether a file may go in.
struct Whose {
    ledger: LedgerId,
    binding: BindingRow,
    last: Last,
}

async fn take_in(
    target: &Target,
    stopped: &Arc<Stopped>,
    opening: &Opening,
    whose: &Whose,
) -> Result<Option<Vec<(&'static str, u64)>>, ImportError> {
    let mut connection = postgres::connect(target).await?;
    postgres::migrate(&mut connection, target.schema(), STEPS).await?;
    // What a first start locks, too: it finds this ledger, or this finds that of the start.
    let mut slots: Vec<i32> = [meta::LEDGER_ID, meta::SALT, meta::BINDING]
        .into_iter()
        .filter_map(|name| match (META.lock)(&name) {
            Lock::ToWrite(slot) | Lock::Always(slot) => i32::try_from(slot).ok(),
            Lock::Nothing => None,
        })
        .collect();
    slots.sort_unstable();
    connection
        .execute("INSERT INTO locks SELECT unnest($1::integer[]) ON CONFLICT DO NOTHING", &[&slots])
        .await?;
    let txn = connection.transaction().await?;
    txn.batch_execute(&format!(
        "SET LOCAL statement_timeout TO {STEP_MS}; SET LOCAL idle_in_transaction_session_timeout TO {STEP_MS}"
    ))
    .await?;
    txn.query("SELECT slot FROM locks WHERE slot = ANY($1::integer[]) ORDER BY slot FOR UPDATE", &[&slots])
        .await?;
    let own = sidecar(&txn, opening).await?;
    if is_there(&txn, own, opening, whose).await? {
        txn.rollback().await?;
        return Ok(None);
    }
    let counts = copy(&txn, own, stopped).await?;
    match txn.commit().await.map_err(DatabaseError::from) {
        Ok(()) => Ok(Some(counts)),
        Err(DatabaseError::Unavailable(why)) => Err(ImportError::Unknown(why)),
        Err(error) => Err(error.into()),
    }
}

/// The row of the file's sidecar. Its runs register by it.
async fn sidecar(txn: &Transaction<'_>, opening: &Opening) -> Result<Own, ImportError> {
    let (fresh, boot) = (opening.fresh_id.as_bytes().as_slice(), opening.boot.as_bytes().as_slice());
    txn.execute(
        "INSERT INTO sidecars (node, id, boot) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
        &[&opening.node, &fresh, &boot],
    )
    .await?;
    let row = txn.query_one("SELECT id FROM sidecars WHERE node = $1 FOR UPDATE", &[&opening.node]).await?;
    let id: &[u8] = row.try_get(0)?;
    Ok(Own(id.try_into().map_err(|_| LedgerError::Corrupt("sidecar's id"))?))
}

/// Whether all of the file is in the schema. Where that has something else, it is refused.
async fn is_there(
    txn: &Transaction<'_>,
    own: Own,
    opening: &Opening,
    whose: &Whose,
) -> Result<bool, ImportError> {
    let of_meta = async |name: &str| -> Result<Option<Vec<u8>>, ImportError> {
        let key = own.stored(usize::from(META.number), name.as_bytes());
        let row = txn.query_opt("SELECT v FROM meta WHERE k = $1", &[&key]).await?;
        Ok(row.map(|row| row.try_get(0)).transpose()?)
    };
    let Some(there) = of_meta(meta::LEDGER_ID).await? else { return Ok(false) };
    let (there, here): (LedgerId, LedgerId) = (row::decode(&there)?, whose.ledger);
    if there == here {
        let place = own.stored(usize::from(AUDIT.number), &whose.last.place.to_le_bytes());
        let known = txn.query_opt("SELECT v FROM audit WHERE k = $1", &[&place]).await?;
        let known: Option<Vec<u8>> = known.map(|row| row.try_get(0)).transpose()?;
        return if known.as_ref() == Some(&whose.last.stored) { Ok(true) } else { Err(ImportError::WentOn) };
    }
    if let Some(bound) = of_meta(meta::BINDING).await? {
        let bound: BindingRow = row::decode(&bound)?;
        let accounts = [bound.account.as_ref(), whose.binding.account.as_ref()];
        let is_another = matches!(accounts, [Some(there), Some(here)] if there != here);
        if bound.mode != whose.binding.mode || is_another {
            return Err(ImportError::Elsewhere { there: named(&bound), here: named(&whose.binding) });
        }
    }
    if of_meta(meta::CHAIN).await?.is_some() {
        return Err(ImportError::HasChain(opening.node.clone()));
    }
    Err(ImportError::OtherLedger { there, here })
}

fn named(binding: &BindingRow) -> String {
    let account = binding.account.as_deref().unwrap_or("no account yet");
    format!("{} mode, {account}", binding.mode)
}

/// Rows of one table.
struct Piece {
    table: usize,
    keys: Vec<Vec<u8>>,
    values: Vec<Vec<u8>>,
    bytes: usize,
}

impl Piece {
    fn of(table: usize) -> Self {
        Self { table, keys: Vec::new(), values: Vec::new(), bytes: 0 }
    }

    fn is_full(&self) -> bool {
        self.keys.len() >= PIECE_ROWS_MAX || self.bytes >= PIECE_BYTES_MAX
    }
}

async fn copy(
    txn: &Transaction<'_>,
    own: Own,
    stopped: &Arc<Stopped>,
) -> Result<Vec<(&'static str, u64)>, ImportError> {
    let (pieces, mut read) = mpsc::channel(PIECES_AHEAD);
    let stopped = Arc::clone(stopped);
    let reading = tokio::task::spawn_blocking(move || read_all(&stopped, own, &pieces));
    let mut counts = [0_u64; TABLES];
    let mut written = Ok(());
    while let Some(piece) = read.recv().await {
        let Piece { table, keys, values, .. } = piece;
        let (Some(name), Some(count)) = (TABLE_NAMES.get(table), counts.get_mut(table)) else { continue };
        let put = format!("INSERT INTO {name} (k, v) SELECT * FROM unnest($1::bytea[], $2::bytea[])");
        match txn.execute(&put, &[&keys, &values]).await {
            Ok(rows) => *count += rows,
            Err(error) => {
                written = Err(error);
                break;
            }
        }
    }
    // The reader ends when nobody takes what it reads, and is waited for: it has the file.
    drop(read);
    let whole =
        reading.await.unwrap_or_else(|_| Err(LedgerError::Unavailable("its reader panicked".to_owned())));
    written?;
    whole?;
    Ok(TABLE_NAMES.into_iter().zip(counts).collect())
}

/// Reads a file to its end, or until nobody takes it any more.
fn read_all(stopped: &Stopped, own: Own, pieces: &mpsc::Sender<Piece>) -> Result<(), LedgerError> {
    let gone = |_| LedgerError::Unavailable("nobody takes what is read".to_owned());
    let mut piece = Piece::of(0);
    stopped.each_row(|table, key, value| {
        if piece.table != table || piece.is_full() {
            let full = std::mem::replace(&mut piece, Piece::of(table));
            if !full.keys.is_empty() {
                pieces.blocking_send(full).map_err(gone)?;
            }
        }
        piece.bytes += key.len() + value.len();
        piece.keys.push(own.stored(table, &key));
        piece.values.push(value);
        Ok(())
    })?;
    if piece.keys.is_empty() { Ok(()) } else { pieces.blocking_send(piece).map_err(gone) }
}
