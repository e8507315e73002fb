//! What each command does to rows, and to whom that is told once it is durable.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::SyncSender;

use crate::id::{BootId, KeyId};
use crate::ledger::command::{Command, Reply};
use crate::ledger::notes::{Note, Ticket};
use crate::ledger::row::meta;
use crate::ledger::rules::{self, Verdict};
use crate::ledger::tx::{Judged, Tx};
use crate::ledger::writer::Chore;
use crate::ledger::{Actor, Admitted, Held, LedgerError};
use crate::refusal::CapKind;
use crate::time::UnixMs;

/// An answer that waits for the commit: it is told why there was none.
pub(in crate::ledger) type Waiting<'c> = Box<dyn FnOnce(Option<&LedgerError>) + 'c>;

/// What a command came to; with an error of storage, which breaks its batch.
pub(in crate::ledger) type Executed<'c> = Result<Waiting<'c>, (Waiting<'c>, LedgerError)>;

/// What a command needs to know beside rows.
pub(in crate::ledger) struct Around<'a> {
    /// This run of the process.
    pub(in crate::ledger) boot: BootId,
    /// The machine's clock.
    pub(in crate::ledger) wall: UnixMs,
    /// The time, which never goes back but by an operator's word.
    pub(in crate::ledger) mark: &'a AtomicU64,
    /// Who goes on with what need not be done before an answer.
    pub(in crate::ledger) keeper: &'a SyncSender<Chore>,
}

fn answer<T>(reply: &mut Reply<T>, result: Result<T, LedgerError>) -> Executed<'_>
where
    T: 'static,
{
    told(result, |result| reply.tell(result))
}

/// Pairs what a command came to with whoever is told of it. An error of storage breaks the batch; any other error is the
/// command's own, and it has written nothing.
fn told<'c, T: 'static>(
    result: Result<T, LedgerError>,
    tell: impl FnOnce(Result<T, LedgerError>) + 'c,
) -> Executed<'c> {
    let breaks = match &result {
        Err(error @ LedgerError::Unavailable(_)) => Some(error.clone()),
        Err(
            LedgerError::Corrupt(_)
            | LedgerError::Locked
            | LedgerError::NewerFormat { .. }
            | LedgerError::BoundElsewhere { .. }
            | LedgerError::NotFound
            | LedgerError::Lost
            | LedgerError::Contradiction(_),
        )
        | Ok(_) => None,
    };
    let waiting: Waiting<'c> = Box::new(move |failed| {
        tell(match failed {
            Some(error) => Err(error.clone()),
            None => result,
        });
    });
    match breaks {
        Some(error) => Err((waiting, error)),
        None => Ok(waiting),
    }
}

/// Answers everything with an error.
pub(in crate::ledger) fn refuse_all(commands: &mut [Command], error: &LedgerError) {
    for command in commands {
        refuse(command, error);
    }
}

pub(in crate::ledger) fn refuse(command: &mut Command, error: &LedgerError) {
    fn tell<T>(reply: &mut Reply<T>, error: &LedgerError) {
        reply.tell(Err(error.clone()));
    }
    match command {
        Command::Admit { reply, .. } => tell(reply, error),
        Command::RevokeKey { reply, .. } => tell(reply, error),
        Command::RevokeIssuer { reply, .. } => tell(reply, error),
        Command::ResumeBudget { reply, .. } | Command::AcceptLoss { reply, .. } => tell(reply, error),
        Command::Bind { reply, .. } => tell(reply, error),
        Command::LowerClock { reply, .. } => tell(reply, error),
        Command::EndDoubt { reply, .. } => tell(reply, error),
        Command::ForgetCall { reply, .. } => tell(reply, error),
        Command::Tick { reply } => tell(reply, error),
        Command::Resolve { reply, .. }
        | Command::CreateIssuer { reply, .. }
        | Command::Observe { reply, .. }
        | Command::NoteSearch { reply, .. }
        | Command::Refused { reply, .. }
        | Command::Record { reply, .. }
        | Command::IssueKey { reply, .. }
        | Command::KillSwitch { reply, .. }
        | Command::Shipped { reply, .. }
        | Command::NoteLoss { reply, .. }
        | Command::Flush { reply }
        | Command::Close { reply } => tell(reply, error),
        // It counts as lost.
        Command::Note { ticket, .. } => drop(ticket.take()),
    }
}

/// Does a command on rows. Nothing of it is durable yet, and nobody is told before that; it can be done again.
pub(in crate::ledger) fn execute<'c>(
    around: &Around<'_>,
    tx: &mut Tx<'_>,
    command: &'c mut Command,
    now: UnixMs,
) -> Executed<'c> {
    if let Err(error) = tx.note_clock(now, around.wall) {
        let why = error.clone();
        return Err((Box::new(move |_| refuse(command, &why)), error));
    }
    match command {
        Command::Admit { key_id, admit, reply } => answer(reply, admit_call(tx, *key_id, admit, now)),
        Command::Resolve { hold_id, call_id, resolve, reply } => {
            answer(reply, tx.resolve(*hold_id, *call_id, resolve, around.boot, now))
        }
        Command::CreateIssuer { issuer, actor, reply } => answer(reply, tx.create_issuer(issuer, actor, now)),
        Command::RevokeIssuer { issuer_id, actor, reply } => {
            answer(reply, tx.revoke_issuer(*issuer_id, actor, now))
        }
        Command::ResumeBudget { issuer, name, reason, actor, reply } => {
            answer(reply, tx.resume_budget(*issuer, name, reason, actor, now))
        }
        Command::EndDoubt { hold_id, end, reply } => answer(reply, tx.end_doubt(*hold_id, end, now)),
        Command::NoteSearch { hold_id, read, came_to, reply } => {
            answer(reply, tx.note_search(*hold_id, read, came_to, now))
        }
        Command::ForgetCall { call_id, reason, actor, reply } => {
            answer(reply, tx.forget_call(*call_id, reason, actor, now))
        }
        Command::Observe { account, object, facts, record, reply } => {
            answer(reply, tx.observe(account, object, facts, *record, now))
        }
        Command::Refused { key_id, facts, refusal, duration_ms, reply } => {
            answer(reply, tx.refused(*key_id, facts, refusal, *duration_ms, now))
        }
        Command::Record { entry, reply } => {
            entry.at = now.to_string();
            answer(reply, tx.append(entry))
        }
        Command::Note { note, ticket } => note_down(tx, note, ticket, now),
        Command::IssueKey { key, actor, reply } => answer(reply, tx.issue_key(key, actor, now)),
        Command::RevokeKey { key_id, actor, reply } => answer(reply, tx.revoke_key(*key_id, actor, now)),
        Command::KillSwitch { on, reason, actor, reply } => {
            answer(reply, tx.kill_switch(*on, reason, actor, now))
        }
        Command::Bind { account, key_digest, reply } => answer(reply, tx.bind(account, *key_digest, now)),
        Command::LowerClock { reason, actor, reply } => {
            answer(reply, lower_clock(around, tx, reason, actor, now))
        }
        Command::Shipped { to, reply } => {
            tx.put_meta(meta::SHIPPED_TO, to);
            answer(reply, Ok(()))
        }
        Command::NoteLoss { collector_seq, reply } => answer(reply, tx.note_loss(*collector_seq, now)),
        Command::AcceptLoss { fresh, reason, actor, reply } => {
            answer(reply, tx.accept_loss(*fresh, reason, actor, now))
        }
        Command::Flush { reply } => answer(reply, Ok(())),
        Command::Close { reply } => then_beside(around, Ok(()), reply, |(), reply| Chore::Close(reply)),
        Command::Tick { reply } => {
            then_beside(around, tx.tick(now), reply, |left, reply| Chore::KeepUp { left, reply })
        }
    }
}

fn note_down<'c>(
    tx: &mut Tx<'_>,
    note: &mut Note,
    ticket: &'c mut Option<Ticket>,
    now: UnixMs,
) -> Executed<'c> {
    let noted = match note {
        Note::Record(entry) => {
            entry.at = now.to_string();
            tx.append(entry)
        }
        Note::Refused { key_id, facts, refusal, duration_ms } => {
            tx.refused(*key_id, facts, refusal, *duration_ms, now)
        }
    };
    told(noted, |noted| {
        // Not settled, it counts as lost.
        let ticket = ticket.take();
        if noted.is_ok() {
            ticket.map(Ticket::settle);
        }
    })
}

/// When what was written is durable, the keeper goes on, and answers.
fn then_beside<'c, W: 'static, T: 'static>(
    around: &Around<'_>,
    written: Result<W, LedgerError>,
    reply: &'c mut Reply<T>,
    chore: impl FnOnce(W, Reply<T>) -> Chore + 'c,
) -> Executed<'c> {
    let keeper = around.keeper.clone();
    told(written, move |written| match written {
        // Without it nobody is answered, which says that the writer stops.
        Ok(written) => drop(keeper.send(chore(written, reply.take()))),
        Err(error) => reply.tell(Err(error)),
    })
}

fn lower_clock(
    around: &Around<'_>,
    tx: &mut Tx<'_>,
    reason: &str,
    actor: &Actor,
    now: UnixMs,
) -> Result<(UnixMs, UnixMs), LedgerError> {
    let lowered = tx.lower_clock(reason, actor, now, around.wall)?;
    around.mark.store(around.wall.millis(), Ordering::SeqCst);
    Ok(lowered)
}

fn admit_call(
    tx: &mut Tx<'_>,
    key_id: KeyId,
    admit: &rules::Admit,
    now: UnixMs,
) -> Result<Admitted, LedgerError> {
    if tx.has_loss()? {
        return Err(LedgerError::Lost);
    }
    let Judged { key, payer, verdict } = tx.judge(key_id, admit, now)?;
    match verdict {
        Verdict::Send(effects) => {
            let held = Held::of(&effects, admit.intent.basis.clone())?;
            tx.write(&effects, now)?;
            Ok(Admitted::Held(held))
        }
        Verdict::Replay(call_id, effects) => {
            let answer = tx.answer(call_id)?.ok_or(LedgerError::Contradiction("a kept answer is gone"))?;
            tx.write(&effects, now)?;
            Ok(Admitted::Replay { call_id, answer })
        }
        Verdict::Look(mark) => Ok(Admitted::Look(mark)),
        Verdict::Tell(executed) => Ok(Admitted::Tell(executed)),
        Verdict::Refuse(refusal) => {
            tx.count_refusal(&key, &admit.intent.facts, &refusal, admit.duration_ms, now)?;
            // The limit of one call is the caller's own; all other caps are the payer's.
            let of_one_call =
                refusal.figures.as_ref().is_some_and(|figures| figures.cap == CapKind::PerRequest);
            tx.stop_budget(if of_one_call { &key } else { &payer }, &refusal, now)?;
            Ok(Admitted::Refused(refusal))
        }
    }
}
