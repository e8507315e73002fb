//! Everything that changes the ledger, as data: a store may look at what a whole batch needs, and do it again.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::oneshot;

use crate::audit::Entry;
use crate::call::{Call, Record};
use crate::hold::Facts;
use crate::id::{CallId, HoldId, IssuerId, KeyId, LedgerId};
use crate::issuer::Issuer;
use crate::key::Key;
use crate::ledger::notes::{Note, Ticket};
use crate::ledger::row::BindingRow;
use crate::ledger::rules::Admit;
use crate::ledger::rules::resolve::{EndDoubt, Resolve};
use crate::ledger::{Actor, Admitted, Ending, LedgerError, Sending, Ticked};
use crate::refusal::Refusal;
use crate::time::UnixMs;

/// Where the answer to a command goes, once it is durable.
#[derive(Debug)]
pub struct Reply<T>(Option<oneshot::Sender<Result<T, LedgerError>>>);

impl<T> Reply<T> {
    /// A place for an answer, and where it can be waited for.
    pub(super) fn channel() -> (Self, oneshot::Receiver<Result<T, LedgerError>>) {
        let (sender, answer) = oneshot::channel();
        (Self(Some(sender)), answer)
    }

    /// Answers, once. Gives the answer back when whoever asked has gone.
    pub(super) fn tell(&mut self, result: Result<T, LedgerError>) -> Result<(), Result<T, LedgerError>> {
        match self.0.take() {
            Some(sender) => sender.send(result),
            None => Err(result),
        }
    }

    /// Whoever takes it answers.
    pub(super) const fn take(&mut self) -> Self {
        Self(self.0.take())
    }
}

/// Everything that changes the ledger.
#[derive(Debug)]
#[expect(missing_docs, reason = "each variant is the verb of the same name on `Ledger`, with its arguments")]
pub enum Command {
    Admit { key_id: KeyId, admit: Box<Admit>, reply: Reply<Admitted> },
    Resolve { sending: Sending, resolve: Box<Resolve>, reply: Reply<()> },
    CreateIssuer { issuer: Box<Issuer>, actor: Actor, reply: Reply<()> },
    RevokeIssuer { issuer_id: IssuerId, actor: Actor, reply: Reply<Issuer> },
    ResumeBudget { issuer: Option<IssuerId>, name: String, reason: String, actor: Actor, reply: Reply<bool> },
    EndDoubt { hold_id: HoldId, end: Box<EndDoubt>, reply: Reply<Ending> },
    NoteSearch { hold_id: HoldId, read: String, came_to: String, reply: Reply<()> },
    ForgetCall { call_id: CallId, reason: String, actor: Actor, reply: Reply<Option<Call>> },
    Observe { account: String, object: String, facts: Box<Facts>, record: Record, reply: Reply<()> },
    Refused { key_id: KeyId, facts: Box<Facts>, refusal: Box<Refusal>, duration_ms: u64, reply: Reply<()> },
    Record { entry: Box<Entry>, reply: Reply<()> },
    Note { note: Note, ticket: Option<Ticket> },
    IssueKey { key: Box<Key>, actor: Actor, reply: Reply<()> },
    RevokeKey { key_id: KeyId, actor: Actor, reply: Reply<Key> },
    KillSwitch { on: bool, reason: String, actor: Actor, reply: Reply<()> },
    Bind { account: String, key_digest: [u8; 32], reply: Reply<BindingRow> },
    LowerClock { reason: String, actor: Actor, reply: Reply<(UnixMs, UnixMs)> },
    Shipped { to: u64, reply: Reply<()> },
    NoteLoss { collector_seq: u64, reply: Reply<()> },
    AcceptLoss { fresh: LedgerId, reason: String, actor: Actor, reply: Reply<bool> },
    Flush { reply: Reply<()> },
    Close { reply: Reply<()> },
    Tick { reply: Reply<Ticked> },
}

/// What calls came to for which the writer's queue had no room for as long as anybody waited. More than so many, and they
/// stay held as if they were being sent.
const LATE_MAX: usize = 4_096;

/// What calls came to and no place was found for in the queue: the writer takes it along with its next batch.
#[derive(Clone, Debug, Default)]
pub(super) struct Late(Arc<Mutex<Vec<Command>>>);

impl Late {
    /// Keeps what a call came to; anything else was for somebody who does not wait for it any more.
    pub(super) fn put(&self, command: Command) {
        let Command::Resolve { sending, .. } = &command else { return };
        let mut late = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if late.len() < LATE_MAX {
            late.push(command);
        } else {
            tracing::error!(?sending, "what a call came to is lost; its money stays counted");
        }
    }

    /// The first of them, at most so many.
    pub(super) fn take(&self, at_most: usize) -> Vec<Command> {
        let mut late = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = at_most.min(late.len());
        late.drain(..taken).collect()
    }
}
