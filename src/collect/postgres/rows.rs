//! What is written: batches that come, and records whose time is over. Each in one transaction, which holds the one row of
//! `head` from its beginning to its end.

use std::collections::BTreeMap;

use serde_json::Value;
use tokio_postgres::Transaction;
use tokio_postgres::types::Type;

use super::{chain_of, number_of};
use crate::collect::chain::{self, Batch, Chain, Refused, Shipped, Taken};
use crate::collect::store::{
    CHAINS_MAX, DROP_ROWS, EVIDENCE_MAX, Incoming, evidence_of, report_fork, report_new,
};
use crate::journal;
use crate::postgres::{Connection, DatabaseError};
use crate::time::{HOUR_MS, UnixMs};

/// Stands between words. None has it.
const BETWEEN: &str = "\u{1f}";
/// Longest name of a node, ledger or chain.
const NAME_BYTES_MAX: usize = 255;

/// What became of each batch of a commit that held.
pub(super) type Verdicts = Vec<Result<Chain, Refused>>;

/// Begins to write, when no other collector does; answers the next place.
async fn begin(session: &mut Connection) -> Result<(Transaction<'_>, i64), DatabaseError> {
    let txn = session.transaction().await?;
    let head = txn.query_typed_one("SELECT next_place FROM head WHERE id = 1 FOR UPDATE", &[]).await?;
    let next = head.try_get(0)?;
    Ok((txn, next))
}

/// Takes batches in one transaction.
pub(super) async fn keep(
    session: &mut Connection,
    incoming: &[Incoming],
    now: UnixMs,
) -> Result<Verdicts, DatabaseError> {
    let (txn, first) = begin(session).await?;
    let storable = incoming.iter().filter(|one| is_storable(&one.batch));
    let ids: Vec<&str> = storable.map(|one| one.batch.origin.chain_id.as_str()).collect();
    let known = "SELECT chain_id, chain::text FROM chains WHERE chain_id = ANY($1)";
    let mut chains = BTreeMap::new();
    for row in txn.query_typed(known, &[(&ids, Type::TEXT_ARRAY)]).await? {
        chains.insert(row.try_get::<_, String>(0)?, chain_of(row.try_get(1)?)?);
    }
    let (mut next, mut verdicts) = (first, Vec::new());
    for one in incoming {
        verdicts.push(take(&txn, one, now, &mut chains, &mut next).await?);
    }
    let hour = i64::try_from(now.millis() / HOUR_MS).unwrap_or(i64::MAX);
    let end = "WITH noted AS (INSERT INTO arrivals VALUES ($1, $2) ON CONFLICT DO NOTHING)
               UPDATE head SET next_place = $3 WHERE id = 1";
    txn.execute_typed(end, &[(&hour, Type::INT8), (&first, Type::INT8), (&next, Type::INT8)]).await?;
    txn.commit().await?;
    Ok(verdicts)
}

async fn take(
    txn: &Transaction<'_>,
    incoming: &Incoming,
    now: UnixMs,
    chains: &mut BTreeMap<String, Chain>,
    next: &mut i64,
) -> Result<Result<Chain, Refused>, DatabaseError> {
    let Incoming { batch, floor, backlog } = incoming;
    if !is_storable(batch) {
        return Ok(Err(Refused::Unreadable(1)));
    }
    let id = &batch.origin.chain_id;
    let before = chains.get(id).cloned();
    let (number, other) = match &before {
        Some(chain) => (chain.number, None),
        None => match new_number(txn, batch).await? {
            Some(number) => number,
            None => return Ok(Err(Refused::Foreign)),
        },
    };
    let held_hashes = held_hashes(txn, before.as_ref(), batch).await?;
    let hash_of = |seq: u64| held_hashes.get(&seq).copied();
    let verdict = match chain::judge(before.as_ref(), number, batch, *floor, now, hash_of) {
        Ok(Taken { held, mut chain }) => {
            if let Some(other) = other {
                report_new(&chain.node, id, &other);
            }
            chain.backlog = *backlog;
            let new = batch.records.get(held..).unwrap_or_default();
            tokio::try_join!(put_chain(txn, id, &chain), put_records(txn, &chain, new, *next))?;
            *next = next.saturating_add(i64::try_from(new.len()).unwrap_or(i64::MAX));
            chains.insert(id.clone(), chain.clone());
            Ok(chain)
        }
        Err(refused @ Refused::Forked(seq)) => {
            report_fork(batch, seq);
            if let Some(mut chain) = before {
                chain.forked_at = chain.forked_at.or(Some(seq));
                chain.last_seen = now.millis();
                put_chain(txn, id, &chain).await?;
                chains.insert(id.clone(), chain);
            }
            keep_evidence(txn, batch, seq, now).await?;
            Err(refused)
        }
        Err(refused) => Err(refused),
    };
    Ok(verdict)
}

/// Whether the database has room for its names and numbers.
fn is_storable(batch: &Batch) -> bool {
    let origin = &batch.origin;
    let is_name = |name: &String| name.len() <= NAME_BYTES_MAX && !name.contains(char::is_control);
    [&origin.chain_id, &origin.ledger_id, &origin.node].into_iter().all(is_name)
        && batch.records.iter().all(|record| i64::try_from(record.seq).is_ok_and(|seq| seq < i64::MAX))
}

/// The number of a chain that is not known yet, and another chain of its node; `None` where there are too many.
async fn new_number(
    txn: &Transaction<'_>,
    batch: &Batch,
) -> Result<Option<(u32, Option<String>)>, DatabaseError> {
    let counted = "SELECT count(*), (SELECT chain_id FROM chains WHERE node = $1 LIMIT 1) FROM chains";
    let row = txn.query_typed_one(counted, &[(&batch.origin.node, Type::TEXT)]).await?;
    let count = u32::try_from(row.try_get::<_, i64>(0)?).unwrap_or(u32::MAX);
    let has_room = usize::try_from(count).is_ok_and(|count| count < CHAINS_MAX);
    Ok(if has_room { Some((count, row.try_get(1)?)) } else { None })
}

/// The hashes of those records of a batch that are held already.
async fn held_hashes(
    txn: &Transaction<'_>,
    chain: Option<&Chain>,
    batch: &Batch,
) -> Result<BTreeMap<u64, [u8; 32]>, DatabaseError> {
    let (Some(chain), Some(first)) = (chain, batch.records.first()) else { return Ok(BTreeMap::new()) };
    if first.seq > chain.head_seq {
        return Ok(BTreeMap::new());
    }
    let [from, to] = [first.seq, batch.records.last().map_or(0, |last| last.seq)]
        .map(|seq| i64::try_from(seq).unwrap_or(i64::MAX));
    let held = "SELECT seq, hash FROM records WHERE chain = $1 AND seq BETWEEN $2 AND $3";
    let number = number_of(chain);
    let rows =
        txn.query_typed(held, &[(&number, Type::INT4), (&from, Type::INT8), (&to, Type::INT8)]).await?;
    let mut hashes = BTreeMap::new();
    for row in rows {
        let (seq, hash): (i64, &[u8]) = (row.try_get(0)?, row.try_get(1)?);
        hashes.extend(hash.try_into().ok().map(|hash| (seq.unsigned_abs(), hash)));
    }
    Ok(hashes)
}

async fn put_chain(txn: &Transaction<'_>, id: &str, chain: &Chain) -> Result<(), DatabaseError> {
    // Strings and integers always serialise.
    let (number, text) = (number_of(chain), serde_json::to_string(chain).unwrap_or_default());
    let put = "INSERT INTO chains VALUES ($1, $2, $3, $4::jsonb)
               ON CONFLICT (chain_id) DO UPDATE SET chain = EXCLUDED.chain";
    txn.execute_typed(
        put,
        &[(&id, Type::TEXT), (&number, Type::INT4), (&chain.node, Type::TEXT), (&text, Type::TEXT)],
    )
    .await?;
    Ok(())
}

/// Puts new records of a chain at the places from `first` on, and has their calls end there.
async fn put_records(
    txn: &Transaction<'_>,
    chain: &Chain,
    new: &[Shipped],
    first: i64,
) -> Result<(), DatabaseError> {
    if new.is_empty() {
        return Ok(());
    }
    let (mut seqs, mut ats, mut calls, mut words) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut hashes, mut bytes, mut lasts) = (Vec::new(), Vec::new(), BTreeMap::new());
    for (record, place) in new.iter().zip(first..) {
        // It was read as one before it came here.
        let marks = journal::marks_of(&record.sealed.bytes)
            .map_err(|error| DatabaseError::Unavailable(error.to_string()))?;
        let at = record.fields.get("at").and_then(Value::as_str).and_then(UnixMs::parse).unwrap_or_default();
        seqs.push(i64::try_from(record.seq).unwrap_or(i64::MAX));
        ats.push(i64::try_from(at.millis()).unwrap_or(i64::MAX));
        words.push(marks.words.join(BETWEEN));
        hashes.push(record.sealed.hash.as_slice());
        bytes.push(record.sealed.bytes.as_slice());
        lasts.extend(marks.call.iter().map(|call| (call.clone(), place)));
        calls.push(marks.call);
    }
    let (lasts, ends): (Vec<String>, Vec<i64>) = lasts.into_iter().unzip();
    let number = number_of(chain);
    let put = "INSERT INTO records
               SELECT $1 + n - 1, $2, seq, at_ms, call, string_to_array(words, $3), hash, record
               FROM unnest($4, $5, $6, $7, $8, $9) WITH ORDINALITY AS new (seq, at_ms, call, words, hash, record, n)";
    let end = "INSERT INTO calls SELECT * FROM unnest($1, $2)
               ON CONFLICT (call) DO UPDATE SET place = EXCLUDED.place";
    txn.execute_typed(
        put,
        &[
            (&first, Type::INT8),
            (&number, Type::INT4),
            (&BETWEEN, Type::TEXT),
            (&seqs, Type::INT8_ARRAY),
            (&ats, Type::INT8_ARRAY),
            (&calls, Type::TEXT_ARRAY),
            (&words, Type::TEXT_ARRAY),
            (&hashes, Type::BYTEA_ARRAY),
            (&bytes, Type::BYTEA_ARRAY),
        ],
    )
    .await?;
    txn.execute_typed(end, &[(&lasts, Type::TEXT_ARRAY), (&ends, Type::INT8_ARRAY)]).await?;
    Ok(())
}

async fn keep_evidence(
    txn: &Transaction<'_>,
    batch: &Batch,
    seq: u64,
    now: UnixMs,
) -> Result<(), DatabaseError> {
    let (last_hash, kept) = evidence_of(batch, seq, now);
    let kept = kept.to_string();
    // Unless it is the last one once more, or there is no room.
    let put = "INSERT INTO evidence
               SELECT coalesce(max(number), 0) + 1, $1, $2 FROM evidence
               HAVING count(*) < $3
                  AND $1 IS DISTINCT FROM (SELECT last_hash FROM evidence ORDER BY number DESC LIMIT 1)";
    let most = i64::try_from(EVIDENCE_MAX).unwrap_or(i64::MAX);
    txn.execute_typed(put, &[(&last_hash, Type::TEXT), (&kept, Type::TEXT), (&most, Type::INT8)]).await?;
    Ok(())
}

/// Deletes records that arrived before an hour; says how many.
pub(super) async fn drop_before(session: &mut Connection, first_kept: u64) -> Result<usize, DatabaseError> {
    let hour = i64::try_from(first_kept).unwrap_or(i64::MAX);
    // The last record stays, as in a file. Nobody is kept waiting where there is nothing to do.
    let below = "SELECT coalesce(least((SELECT min(place) FROM arrivals WHERE hour >= $1), max(place)), 0),
                        coalesce(min(place), 0) FROM records";
    let row = session.query_typed_one(below, &[(&hour, Type::INT8)]).await?;
    let (below, first): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
    if first >= below {
        return Ok(0);
    }
    let (txn, _) = begin(session).await?;
    let most = i64::try_from(DROP_ROWS).unwrap_or(i64::MAX);
    let drop = "DELETE FROM records
                WHERE place IN (SELECT place FROM records WHERE place < $1 ORDER BY place LIMIT $2)
                RETURNING place, chain, seq, call";
    let dropped = txn.query_typed(drop, &[(&below, Type::INT8), (&most, Type::INT8)]).await?;
    let (mut ends, mut lasts, mut places) = (BTreeMap::new(), Vec::new(), Vec::new());
    for row in &dropped {
        let (place, number, seq): (i64, i32, i64) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        let end = ends.entry(number).or_insert(seq);
        *end = seq.max(*end);
        if let Some(call) = row.try_get::<_, Option<String>>(3)? {
            lasts.push(call);
            places.push(place);
        }
    }
    let gone = "DELETE FROM calls USING unnest($1, $2) AS gone (call, place)
                WHERE calls.call = gone.call AND calls.place = gone.place";
    txn.execute_typed(gone, &[(&lasts, Type::TEXT_ARRAY), (&places, Type::INT8_ARRAY)]).await?;
    let numbers: Vec<i32> = ends.keys().copied().collect();
    let chains = "SELECT chain_id, chain::text FROM chains WHERE number = ANY($1)";
    for row in txn.query_typed(chains, &[(&numbers, Type::INT4_ARRAY)]).await? {
        let mut chain = chain_of(row.try_get(1)?)?;
        let end = ends.get(&number_of(&chain)).copied().unwrap_or_default();
        chain.first_seq = chain.first_seq.max(end.unsigned_abs().saturating_add(1));
        put_chain(&txn, row.try_get(0)?, &chain).await?;
    }
    let old = "DELETE FROM arrivals WHERE hour < $1 AND place < $2";
    txn.execute_typed(old, &[(&hour, Type::INT8), (&below, Type::INT8)]).await?;
    txn.commit().await?;
    Ok(dropped.len())
}
