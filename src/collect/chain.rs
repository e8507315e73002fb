//! The rules by which a collector takes records: every record of a chain once, in order, and nothing that contradicts what
//! it has. Pure: no storage, clock or socket.
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions)]

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

use crate::audit::{FIRST_PREV_HASH, Sealed};
use crate::id::{from_hex, hex};
use crate::time::UnixMs;

/// Gaps that a chain remembers one by one.
const GAPS_MAX: usize = 64;

/// One record of a batch, read.
#[derive(Clone, Debug)]
pub struct Shipped {
    /// Its bytes and their hash.
    pub sealed: Sealed,
    /// Its place in its chain.
    pub seq: u64,
    /// The hash of the record before.
    pub prev_hash: [u8; 32],
    /// Its fields.
    pub fields: Map<String, Value>,
}

/// Whose records a batch holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The chain.
    pub chain_id: String,
    /// The ledger.
    pub ledger_id: String,
    /// The sidecar's label.
    pub node: String,
}

/// A batch that agrees with itself: one chain, in order, each record the successor of the one before.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Whose.
    pub origin: Origin,
    /// At least one record.
    pub records: Vec<Shipped>,
}

/// Why a batch is not taken. Nothing of it is kept but as evidence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It is no batch.
    #[error("line {0} is no audit record of a batch of one chain")]
    Unreadable(usize),
    /// A record was changed, or does not continue the one before it in the batch.
    #[error("record {0} was changed, or does not continue the record before it")]
    Broken(u64),
    /// Records between what is held and the batch are missing, and the sender does not say that they are gone.
    #[error("record {next} is expected")]
    Gap {
        /// What has to come next.
        next: u64,
    },
    /// It says something else than what is held.
    #[error("record {0} contradicts the record that is held")]
    Forked(u64),
    /// It is of another node than the token, or the chain is another node's or ledger's.
    #[error("the chain belongs to another node or ledger")]
    Foreign,
}

/// What is known of a chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chain {
    /// The collector's own number of it.
    pub number: u32,
    /// The ledger.
    pub ledger_id: String,
    /// The sidecar's label.
    pub node: String,
    /// The Stripe account that the ledger said it is bound to.
    pub account: Option<String>,
    /// `test` or `live`.
    pub mode: Option<String>,
    /// The first record that is held.
    pub first_seq: u64,
    /// The last.
    pub head_seq: u64,
    /// Its hash, hexadecimal.
    pub head_hash: String,
    /// When the chain came up.
    pub first_seen: u64,
    /// When its sidecar last sent something.
    pub last_seen: u64,
    /// Records that its sidecar said were waiting.
    pub backlog: u64,
    /// Ranges that came too late to be had: first and last.
    pub missing: Vec<(u64, u64)>,
    /// The first record that contradicted what was held.
    pub forked_at: Option<u64>,
}

impl Chain {
    /// The hash of its last record.
    pub fn head(&self) -> [u8; 32] {
        from_hex(&self.head_hash).and_then(|hash| hash.try_into().ok()).unwrap_or_default()
    }

    /// How it stands.
    pub fn state(&self) -> &'static str {
        match (self.forked_at, self.missing.is_empty()) {
            (Some(_), _) => "forked",
            (None, false) => "incomplete",
            (None, true) => "whole",
        }
    }
}

/// Reads the lines of a batch.
///
/// # Errors
/// [`Refused::Unreadable`] or [`Refused::Broken`].
pub fn read(body: &[u8]) -> Result<Batch, Refused> {
    let mut records: Vec<Shipped> = Vec::new();
    let mut origin: Option<Origin> = None;
    for (at, line) in body.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).enumerate() {
        let unreadable = || Refused::Unreadable(at.saturating_add(1));
        let record = shipped(line).ok_or_else(unreadable)?;
        let own = origin_of(&record.fields).ok_or_else(unreadable)?;
        if *origin.get_or_insert_with(|| own.clone()) != own {
            return Err(unreadable());
        }
        let hash: [u8; 32] = Sha256::digest(&record.sealed.bytes).into();
        let follows = records.last().is_none_or(|before| {
            before.seq.checked_add(1) == Some(record.seq) && before.sealed.hash == record.prev_hash
        });
        if hash != record.sealed.hash || !follows {
            return Err(Refused::Broken(record.seq));
        }
        records.push(record);
    }
    let origin = origin.ok_or(Refused::Unreadable(1))?;
    Ok(Batch { origin, records })
}

fn shipped(line: &[u8]) -> Option<Shipped> {
    let sealed = Sealed::from_line(line)?;
    let fields: Map<String, Value> = serde_json::from_slice(&sealed.bytes).ok()?;
    let seq = fields.get("seq").and_then(Value::as_u64).filter(|seq| *seq > 0)?;
    let prev_hash = fields.get("prev_hash").and_then(Value::as_str).and_then(from_hex)?.try_into().ok()?;
    fields.get("at").and_then(Value::as_str).and_then(UnixMs::parse)?;
    Some(Shipped { sealed, seq, prev_hash, fields })
}

fn origin_of(fields: &Map<String, Value>) -> Option<Origin> {
    let text = |name: &str| fields.get(name).and_then(Value::as_str).map(str::to_owned);
    Some(Origin { chain_id: text("chain_id")?, ledger_id: text("ledger_id")?, node: text("node")? })
}

/// What of a batch is new, and the chain as it becomes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taken {
    /// How many records at its beginning are held already.
    pub held: usize,
    /// The chain afterwards.
    pub chain: Chain,
}

/// Judges a batch of a chain. `floor` is the first record that its sender still has; `known` gives the hash of a record
/// that is held, `None` where it is not held any more.
///
/// # Errors
/// [`Refused`]: the chain stays as it was, but for [`Refused::Forked`], which marks it.
pub fn judge(
    chain: Option<&Chain>,
    number: u32,
    batch: &Batch,
    floor: u64,
    now: UnixMs,
    known: impl Fn(u64) -> Option<[u8; 32]>,
) -> Result<Taken, Refused> {
    let Origin { ledger_id, node, .. } = &batch.origin;
    let (Some(first), Some(last)) = (batch.records.first(), batch.records.last()) else {
        return Err(Refused::Unreadable(1));
    };
    if let Some(chain) = chain.filter(|chain| chain.node != *node || chain.ledger_id != *ledger_id) {
        tracing::debug!(chain.node, node, "a chain of another node");
        return Err(Refused::Foreign);
    }
    let (last_seq, last_hash) = chain.map_or((0, FIRST_PREV_HASH), |chain| (chain.head_seq, chain.head()));
    let next = last_seq.saturating_add(1);
    let known_before = batch.records.iter().take_while(|record| record.seq < next);
    let held = known_before.clone().count();
    let differs = |record: &&Shipped| known(record.seq).is_some_and(|hash| hash != record.sealed.hash);
    if let Some(other) = known_before.clone().find(differs) {
        return Err(Refused::Forked(other.seq));
    }
    let mut missing = chain.map(|chain| chain.missing.clone()).unwrap_or_default();
    match batch.records.get(held) {
        Some(new) if new.seq == next && new.prev_hash != last_hash => return Err(Refused::Forked(new.seq)),
        // What is before it cannot be sent any more: the sender has dropped it, or this collector has lost it.
        Some(new) if new.seq > next && new.seq == floor => {
            missing.push((next, new.seq.saturating_sub(1)));
            missing.truncate(GAPS_MAX);
        }
        Some(new) if new.seq > next => return Err(Refused::Gap { next }),
        Some(_) | None => {}
    }
    let new = batch.records.get(held..).unwrap_or_default();
    let is_longer = !new.is_empty();
    let account = new.iter().rev().find_map(|record| detail_of(record, "account_bound", "account"));
    let mode = new.iter().rev().find_map(|record| {
        detail_of(record, "account_bound", "mode").or_else(|| detail_of(record, "chain_started", "mode"))
    });
    let chain = Chain {
        number: chain.map_or(number, |chain| chain.number),
        ledger_id: ledger_id.clone(),
        node: node.clone(),
        account: account.or_else(|| chain?.account.clone()),
        mode: mode.or_else(|| chain?.mode.clone()),
        first_seq: chain.map_or(first.seq, |chain| chain.first_seq),
        head_seq: if is_longer { last.seq } else { last_seq },
        head_hash: hex(if is_longer { &last.sealed.hash } else { &last_hash }),
        first_seen: chain.map_or(now.millis(), |chain| chain.first_seen),
        last_seen: now.millis(),
        backlog: chain.map_or(0, |chain| chain.backlog),
        missing,
        forked_at: chain.and_then(|chain| chain.forked_at),
    };
    Ok(Taken { held, chain })
}

fn detail_of(record: &Shipped, event: &str, name: &str) -> Option<String> {
    let is_it = record.fields.get("event").and_then(Value::as_str) == Some(event);
    let detail = record.fields.get("detail").filter(|_| is_it)?;
    detail.get(name).and_then(Value::as_str).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::{Entry, Event, Place, seal};

    /// A chain of so many records; from `other` on they say something else.
    fn chain_of(records: u64, other: u64) -> Vec<Sealed> {
        let mut prev_hash = FIRST_PREV_HASH;
        (1..=records)
            .map(|seq| {
                let place = Place { seq, ledger_id: "ledger_1", node: "n", chain_id: "ledger_1", prev_hash };
                let at = "2026-07-14T03:33:20.123Z".to_owned();
                let customer = (seq >= other).then(|| "cus_other".to_owned());
                let sealed = seal(&place, &Entry { at, event: Event::Refused, customer, ..Entry::default() });
                prev_hash = sealed.hash;
                sealed
            })
            .collect()
    }

    fn body(records: &[Sealed]) -> Vec<u8> {
        records.iter().flat_map(|sealed| [sealed.to_line(), b"\n".to_vec()].concat()).collect()
    }

    fn judged(chain: Option<&Chain>, held: &[Sealed], sent: &[Sealed], floor: u64) -> Result<Taken, Refused> {
        let batch = read(&body(sent)).unwrap();
        let known = |seq: u64| {
            let before = usize::try_from(seq).unwrap().checked_sub(1);
            before.and_then(|at| held.get(at)).map(|sealed| sealed.hash)
        };
        judge(chain, 7, &batch, floor, UnixMs::from_millis(1_000), known)
    }

    #[test]
    fn each_record_is_taken_once_and_in_order() {
        let all = chain_of(9, u64::MAX);
        let Taken { held, chain } = judged(None, &[], &all[..4], 1).unwrap();
        assert_eq!(
            (held, chain.number, chain.first_seq, chain.head_seq, chain.state()),
            (0, 7, 1, 4, "whole")
        );
        // Sent again, with more behind.
        for (from, to, known, head) in [(0, 4, 4, 4), (2, 6, 2, 6), (4, 9, 0, 9)] {
            let taken = judged(Some(&chain), &all[..4], &all[from..to], 1).unwrap();
            assert_eq!((taken.held, taken.chain.head_seq), (known, head), "{from}..{to}");
            assert_eq!(taken.chain.head(), all[..to].last().unwrap().hash);
        }
        assert_eq!(judged(Some(&chain), &all[..4], &all[5..], 1), Err(Refused::Gap { next: 5 }));
        assert_eq!(judged(None, &[], &all[2..], 1), Err(Refused::Gap { next: 1 }));
        // What its sender has dropped cannot come any more.
        let taken = judged(Some(&chain), &all[..4], &all[5..], 6).unwrap();
        assert_eq!((taken.chain.missing.as_slice(), taken.chain.state()), (&[(5, 5)][..], "incomplete"));
        let late = judged(None, &[], &all[2..], 3).unwrap().chain;
        assert_eq!((late.first_seq, late.missing), (3, vec![(1, 2)]));
    }

    #[test]
    fn what_contradicts_is_a_fork() {
        let (all, other) = (chain_of(9, u64::MAX), chain_of(9, 4));
        let chain = judged(None, &[], &all[..6], 1).unwrap().chain;
        assert_eq!(judged(Some(&chain), &all[..6], &other, 1), Err(Refused::Forked(4)));
        assert_eq!(judged(Some(&chain), &all[..6], &other[4..], 1), Err(Refused::Forked(5)));
        assert_eq!(judged(Some(&chain), &all[..6], &other[6..], 1), Err(Refused::Forked(7)));
        // What is not kept any more is not compared.
        assert!(judged(Some(&chain), &[], &all, 1).is_ok());
    }

    #[test]
    fn a_batch_has_to_agree_with_itself() {
        let all = chain_of(3, u64::MAX);
        let lines = body(&all);
        assert_eq!(read(&lines).unwrap().records.len(), 3);
        let text = String::from_utf8(lines).unwrap();
        let refused = |text: &str| read(text.as_bytes()).unwrap_err();
        assert_eq!(refused(&text.replacen("refused", "refusee", 1)), Refused::Broken(1));
        assert_eq!(refused(&text.replacen("\"hash\":\"", "\"hash\":\"x", 1)), Refused::Unreadable(1));
        assert_eq!(read(&body(&[all[0].clone(), all[2].clone()])).unwrap_err(), Refused::Broken(3));
        assert_eq!(read(&body(&[all[1].clone(), all[0].clone()])).unwrap_err(), Refused::Broken(1));
        assert_eq!(read(b"").unwrap_err(), Refused::Unreadable(1));
        let foreign = text.lines().last().unwrap().replace("\"node\":\"n\"", "\"node\":\"m\"");
        assert_eq!(refused(&format!("{text}{foreign}")), Refused::Unreadable(4));
    }
}
