//! What each command does to rows, and to whom that is told once it is durable.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::SyncSender;

use crate::id::{BootId, KeyId};
use crate::ledger::command::{Command, Reply};
use crate::ledger::notes::Note;
use crate::ledger::row::meta;
use crate::ledger::rules::{self, Verdict};
use crate::ledger::tx::{Judged, Tx};
use crate::ledger::writer::Chore;
use crate::ledger::{Admitted, Held, LedgerError, Sending, Ticked};
use crate::refusal::{CapKind, Code};
use crate::time::UnixMs;

/// What waits for the commit of a command: it is told why there was none.
pub(in crate::ledger) type Waiting = Box<dyn FnOnce(&mut Command, Option<&LedgerError>)>;

/// What a command came to; with an error of storage, which breaks its batch.
pub(in crate::ledger) type Executed = Result<Waiting, (Waiting, LedgerError)>;

/// Holds that were let through for somebody who had gone: nothing of them was sent, nor will be.
pub(in crate::ledger) type Unclaimed = Rc<RefCell<Vec<Sending>>>;

/// What a command needs to know beside rows.
pub(in crate::ledger) struct Around<'a> {
    /// This run of the process.
    pub(in crate::ledger) boot: BootId,
    /// The machine's clock.
    pub(in crate::ledger) wall: UnixMs,
    /// The time, which never goes back but by an operator's word.
    pub(in crate::ledger) mark: &'a Arc<AtomicU64>,
    /// Who goes on with what need not be done before an answer, where there is somebody.
    pub(in crate::ledger) keeper: Option<&'a SyncSender<Chore>>,
    /// Where it is noted that nobody waits for a hold any more.
    pub(in crate::ledger) unclaimed: &'a Unclaimed,
}

/// Pairs what a command came to with whoever is told of it. An error of storage breaks the batch; any other error is the
/// command's own, and it has written nothing.
fn told<T: 'static>(
    result: Result<T, LedgerError>,
    tell: impl FnOnce(&mut Command, Result<T, LedgerError>) + 'static,
) -> Executed {
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
    let waiting: Waiting = Box::new(move |command, failed| {
        tell(
            command,
            match failed {
                Some(error) => Err(error.clone()),
                None => result,
            },
        );
    });
    match breaks {
        Some(error) => Err((waiting, error)),
        None => Ok(waiting),
    }
}

/// What tells a command of one kind what it came to.
macro_rules! answer {
    ($kind:ident, $result:expr) => {
        told($result, |command, result| {
            if let Command::$kind { reply, .. } = command {
                // Whoever asked may have gone; what was done stays done.
                drop(reply.tell(result));
            }
        })
    };
}

/// Answers everything with an error.
pub(in crate::ledger) fn refuse_all(commands: &mut [Command], error: &LedgerError) {
    for command in commands {
        refuse(command, error);
    }
}

pub(in crate::ledger) fn refuse(command: &mut Command, error: &LedgerError) {
    fn tell<T>(reply: &mut Reply<T>, error: &LedgerError) {
        drop(reply.tell(Err(error.clone())));
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
#[expect(clippy::too_many_lines, reason = "one arm for each verb")]
pub(in crate::ledger) fn execute(
    around: &Around<'_>,
    tx: &mut Tx<'_>,
    command: &mut Command,
    now: UnixMs,
) -> Executed {
    if let Err(error) = tx.note_clock(now, around.wall) {
        let why = error.clone();
        return Err((Box::new(move |command, _| refuse(command, &why)), error));
    }
    match command {
        Command::Admit { key_id, admit, .. } => {
            admit.boot = around.boot;
            let admitted = admit_call(tx, *key_id, admit, now);
            let unclaimed = Rc::clone(around.unclaimed);
            told(admitted, move |command, result| {
                let Command::Admit { reply, .. } = command else { return };
                if let Err(Ok(Admitted::Held(held))) = reply.tell(result) {
                    unclaimed.borrow_mut().push(held.sending());
                }
            })
        }
        Command::Resolve { sending, resolve, .. } => {
            answer!(Resolve, tx.resolve(*sending, resolve, now))
        }
        Command::CreateIssuer { issuer, actor, .. } => {
            answer!(CreateIssuer, tx.create_issuer(issuer, actor, now))
        }
        Command::RevokeIssuer { issuer_id, actor, .. } => {
            answer!(RevokeIssuer, tx.revoke_issuer(*issuer_id, actor, now))
        }
        Command::ResumeBudget { issuer, name, reason, actor, .. } => {
            answer!(ResumeBudget, tx.resume_budget(*issuer, name, reason, actor, now))
        }
        Command::EndDoubt { hold_id, end, .. } => answer!(EndDoubt, tx.end_doubt(*hold_id, end, now)),
        Command::NoteSearch { hold_id, read, came_to, .. } => {
            answer!(NoteSearch, tx.note_search(*hold_id, read, came_to, now))
        }
        Command::ForgetCall { call_id, reason, actor, .. } => {
            answer!(ForgetCall, tx.forget_call(*call_id, reason, actor, now))
        }
        Command::Observe { account, object, facts, record, .. } => {
            answer!(Observe, tx.observe(account, object, facts, *record, now))
        }
        Command::Refused { key_id, facts, refusal, duration_ms, .. } => {
            answer!(Refused, tx.refused(*key_id, facts, refusal, *duration_ms, now))
        }
        Command::Record { entry, .. } => {
            entry.at = now.to_string();
            answer!(Record, tx.append(entry))
        }
        Command::Note { note, .. } => note_down(tx, note, now),
        Command::IssueKey { key, actor, .. } => answer!(IssueKey, tx.issue_key(key, actor, now)),
        Command::RevokeKey { key_id, actor, .. } => answer!(RevokeKey, tx.revoke_key(*key_id, actor, now)),
        Command::KillSwitch { on, reason, actor, .. } => {
            answer!(KillSwitch, tx.kill_switch(*on, reason, actor, now))
        }
        Command::Bind { account, key_digest, .. } => answer!(Bind, tx.bind(account, *key_digest, now)),
        Command::LowerClock { reason, actor, .. } => {
            let lowered = tx.lower_clock(reason, actor, now, around.wall);
            let mark = Arc::clone(around.mark);
            told(lowered, move |command, lowered| {
                let Command::LowerClock { reply, .. } = command else { return };
                if let Ok((_, after)) = lowered {
                    mark.store(after.millis(), Ordering::SeqCst);
                }
                drop(reply.tell(lowered));
            })
        }
        Command::Shipped { to, .. } => {
            tx.put_meta(meta::SHIPPED_TO, to);
            answer!(Shipped, Ok(()))
        }
        Command::NoteLoss { collector_seq, .. } => answer!(NoteLoss, tx.note_loss(*collector_seq, now)),
        Command::AcceptLoss { fresh, reason, actor, .. } => {
            answer!(AcceptLoss, tx.accept_loss(*fresh, reason, actor, now))
        }
        Command::Flush { .. } => answer!(Flush, Ok(())),
        Command::Close { .. } => match around.keeper.cloned() {
            None => answer!(Close, Ok(())),
            Some(keeper) => told(Ok(()), move |command, closed| {
                let Command::Close { reply } = command else { return };
                go_on(&keeper, closed, reply, |(), reply| Chore::Close(reply));
            }),
        },
        Command::Tick { .. } => match around.keeper.cloned() {
            None => {
                let ticked = tx
                    .tick(now)
                    .and_then(|left| Ok(left | tx.drop_old_records(now)?))
                    .map(|left| if left { Ticked::GoOn } else { Ticked::Done });
                answer!(Tick, ticked)
            }
            Some(keeper) => told(tx.tick(now), move |command, left| {
                let Command::Tick { reply } = command else { return };
                go_on(&keeper, left, reply, |left, reply| Chore::KeepUp { left, reply });
            }),
        },
    }
}

fn note_down(tx: &mut Tx<'_>, note: &mut Note, now: UnixMs) -> Executed {
    let noted = match note {
        Note::Record(entry) => {
            entry.at = now.to_string();
            tx.append(entry)
        }
        Note::Refused { key_id, facts, refusal, duration_ms } => {
            tx.refused(*key_id, facts, refusal, *duration_ms, now)
        }
    };
    told(noted, |command, noted| {
        let Command::Note { ticket, .. } = command else { return };
        // Not settled, it counts as lost.
        if let (Some(ticket), Ok(())) = (ticket.take(), noted) {
            ticket.settle();
        }
    })
}

/// When what was written is durable, the keeper goes on, and answers.
fn go_on<W, T>(
    keeper: &SyncSender<Chore>,
    written: Result<W, LedgerError>,
    reply: &mut Reply<T>,
    chore: impl FnOnce(W, Reply<T>) -> Chore,
) {
    match written {
        // Without it nobody is answered, which says that the writer stops.
        Ok(written) => drop(keeper.send(chore(written, reply.take()))),
        Err(error) => drop(reply.tell(Err(error))),
    }
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
        Verdict::Refuse(refusal)
            if refusal.code == Code::IdempotencyKeyInUse
                && admit.may_wait
                && tx.is_sent_elsewhere(&admit.intent.identity, admit.boot)? =>
        {
            Ok(Admitted::Elsewhere)
        }
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
