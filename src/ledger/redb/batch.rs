//! Executes batches: every command in turn on one view, one frame for all, and only then the answers.

use std::sync::atomic::Ordering;
use std::sync::mpsc::SyncSender;

use crate::audit::Entry;
use crate::ledger::notes::{Note, Ticket};
use crate::ledger::redb::RedbStore;
use crate::ledger::row::meta;
use crate::ledger::rules::{self, Verdict};
use crate::ledger::tx::{Head, Judged, Tx};
use crate::ledger::writer::{Chore, Command, Reply};
use crate::ledger::{Actor, Admitted, Held, LedgerError, Opening};
use crate::refusal::CapKind;
use crate::time::UnixMs;

/// Executes batches. Owned by the writer thread.
#[derive(Debug)]
pub(in crate::ledger) struct Writer<'a> {
    store: &'a RedbStore,
    opening: Opening,
    /// The end of the chain as the last commit left it.
    head: Option<Head>,
    /// Who does what need not be done before an answer.
    keeper: SyncSender<Chore>,
}

/// An answer that waits for the commit.
type Waiting = Box<dyn FnOnce(Option<&LedgerError>)>;

impl<'a> Writer<'a> {
    pub(in crate::ledger) fn new(store: &'a RedbStore, opening: &Opening, keeper: SyncSender<Chore>) -> Self {
        Self { store, opening: opening.clone(), head: None, keeper }
    }

    /// Executes a batch, commits once, and only then answers.
    pub(in crate::ledger) fn commit(&mut self, batch: Vec<Command>) {
        if let Some(why) = self.store.failure() {
            let error = LedgerError::Unavailable(why);
            refuse_all(batch, &error);
            return;
        }
        let mut waiting = Vec::with_capacity(batch.len());
        let result = self.try_commit(batch, &mut waiting);
        if let Err(error) = &result {
            self.store.fail(error);
        }
        for answer in waiting {
            answer(result.as_ref().err());
        }
    }

    fn try_commit(&mut self, batch: Vec<Command>, waiting: &mut Vec<Waiting>) -> Result<(), LedgerError> {
        let view = self.store.view();
        let mut commands = batch.into_iter();
        let mut tx = match Tx::open(&view, &self.opening, self.head) {
            Ok(tx) => tx,
            Err(error) => {
                refuse_all(commands, &error);
                return Err(error);
            }
        };
        let mut broken = None;
        for command in commands.by_ref() {
            let now = self.store.now();
            match execute(self, &mut tx, command, now) {
                Ok(answer) => waiting.push(answer),
                Err((answer, error)) => {
                    waiting.push(answer);
                    broken = Some(error);
                    break;
                }
            }
        }
        if let Some(error) = broken {
            refuse_all(commands, &error);
            return Err(error);
        }
        let (head, changes) = (tx.head(), tx.into_changes());
        drop(view);
        if !changes.is_empty() {
            self.store.keep(changes)?;
            self.head = Some(head);
        }
        Ok(())
    }
}

type Executed = Result<Waiting, (Waiting, LedgerError)>;

fn answer<T: 'static>(reply: Reply<T>, result: Result<T, LedgerError>) -> Executed {
    told(result, move |result| {
        // Whoever asked may have gone; what was done stays done.
        let _ = reply.send(result);
    })
}

/// Pairs what a command came to with whoever is told of it. An error of storage breaks the batch; any other error is the
/// command's own, and it has written nothing.
fn told<T: 'static>(
    result: Result<T, LedgerError>,
    tell: impl FnOnce(Result<T, LedgerError>) + 'static,
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
    let waiting: Waiting = Box::new(move |failed| {
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

fn refuse_all(commands: impl IntoIterator<Item = Command>, error: &LedgerError) {
    for command in commands {
        refuse_command(command, error);
    }
}

fn refuse_command(command: Command, error: &LedgerError) {
    fn tell<T>(reply: Reply<T>, error: &LedgerError) {
        // Whoever asked may have gone.
        let _ = reply.send(Err(error.clone()));
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
        Command::Note { ticket, .. } => drop(ticket),
    }
}

fn execute(writer: &Writer<'_>, tx: &mut Tx<'_>, command: Command, now: UnixMs) -> Executed {
    let (store, boot) = (writer.store, writer.opening.boot);
    if let Err(error) = tx.note_clock(now, store.clock.now()) {
        refuse_command(command, &error);
        return Err((Box::new(|_| ()), error));
    }
    match command {
        Command::Admit { key_id, admit, reply } => answer(reply, admit_call(tx, key_id, &admit, now)),
        Command::Resolve { hold_id, call_id, resolve, reply } => {
            answer(reply, tx.resolve(hold_id, call_id, &resolve, boot, now))
        }
        Command::CreateIssuer { issuer, actor, reply } => {
            answer(reply, tx.create_issuer(&issuer, &actor, now))
        }
        Command::RevokeIssuer { issuer_id, actor, reply } => {
            answer(reply, tx.revoke_issuer(issuer_id, &actor, now))
        }
        Command::ResumeBudget { issuer, name, reason, actor, reply } => {
            answer(reply, tx.resume_budget(issuer, &name, &reason, &actor, now))
        }
        Command::EndDoubt { hold_id, end, reply } => answer(reply, tx.end_doubt(hold_id, &end, now)),
        Command::NoteSearch { hold_id, read, came_to, reply } => {
            answer(reply, tx.note_search(hold_id, &read, &came_to, now))
        }
        Command::ForgetCall { call_id, reason, actor, reply } => {
            answer(reply, tx.forget_call(call_id, &reason, &actor, now))
        }
        Command::Observe { account, object, facts, record, reply } => {
            answer(reply, tx.observe(&account, &object, &facts, record, now))
        }
        Command::Refused { key_id, facts, refusal, duration_ms, reply } => {
            answer(reply, tx.refused(key_id, &facts, &refusal, duration_ms, now))
        }
        Command::Record { entry, reply } => {
            answer(reply, tx.append(&Entry { at: now.to_string(), ..*entry }))
        }
        Command::Note { note, ticket } => note_down(tx, note, ticket, now),
        Command::IssueKey { key, actor, reply } => answer(reply, tx.issue_key(&key, &actor, now)),
        Command::RevokeKey { key_id, actor, reply } => answer(reply, tx.revoke_key(key_id, &actor, now)),
        Command::KillSwitch { on, reason, actor, reply } => {
            answer(reply, tx.kill_switch(on, &reason, &actor, now))
        }
        Command::Bind { account, key_digest, reply } => answer(reply, tx.bind(&account, key_digest, now)),
        Command::LowerClock { reason, actor, reply } => {
            answer(reply, lower_clock(store, tx, &reason, &actor, now))
        }
        Command::Shipped { to, reply } => {
            tx.put_meta(meta::SHIPPED_TO, &to);
            answer(reply, Ok(()))
        }
        Command::NoteLoss { collector_seq, reply } => answer(reply, tx.note_loss(collector_seq, now)),
        Command::AcceptLoss { fresh, reason, actor, reply } => {
            answer(reply, tx.accept_loss(fresh, &reason, &actor, now))
        }
        Command::Flush { reply } => answer(reply, Ok(())),
        Command::Close { reply } => then_beside(writer, Ok(()), reply, |(), reply| Chore::Close(reply)),
        Command::Tick { reply } => {
            then_beside(writer, tx.tick(now), reply, |left, reply| Chore::KeepUp { left, reply })
        }
    }
}

fn note_down(tx: &mut Tx<'_>, note: Note, ticket: Ticket, now: UnixMs) -> Executed {
    let noted = match note {
        Note::Record(entry) => tx.append(&Entry { at: now.to_string(), ..*entry }),
        Note::Refused { key_id, facts, refusal, duration_ms } => {
            tx.refused(key_id, &facts, &refusal, duration_ms, now)
        }
    };
    told(noted, move |noted| {
        if noted.is_ok() {
            ticket.settle();
        }
    })
}

/// When what was written is durable, the keeper goes on, and answers.
fn then_beside<W: 'static, T: 'static>(
    writer: &Writer<'_>,
    written: Result<W, LedgerError>,
    reply: Reply<T>,
    chore: impl FnOnce(W, Reply<T>) -> Chore + 'static,
) -> Executed {
    let keeper = writer.keeper.clone();
    told(written, move |written| match written {
        // Without it nobody is answered, which says that the writer stops.
        Ok(written) => drop(keeper.send(chore(written, reply))),
        Err(error) => drop(reply.send(Err(error))),
    })
}

fn lower_clock(
    store: &RedbStore,
    tx: &mut Tx<'_>,
    reason: &str,
    actor: &Actor,
    now: UnixMs,
) -> Result<(UnixMs, UnixMs), LedgerError> {
    let wall = store.clock.now();
    let lowered = tx.lower_clock(reason, actor, now, wall)?;
    store.mark.store(wall.millis(), Ordering::SeqCst);
    Ok(lowered)
}

fn admit_call(
    tx: &mut Tx<'_>,
    key_id: crate::id::KeyId,
    admit: &rules::Admit,
    now: UnixMs,
) -> Result<Admitted, LedgerError> {
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
