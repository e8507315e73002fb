//! Commits batches: every command in turn on one view, one frame for all, and only then the answers.

use std::sync::mpsc::SyncSender;

use crate::ledger::command::Command;
use crate::ledger::execute::{Around, Unclaimed, Waiting, execute, refuse_all};
use crate::ledger::redb::RedbStore;
use crate::ledger::source::Source;
use crate::ledger::tx::{Head, Tx};
use crate::ledger::writer::Chore;
use crate::ledger::{LedgerError, Opening, Sending};

/// Commits batches. Owned by the writer thread.
#[derive(Debug)]
pub(in crate::ledger) struct Writer<'a> {
    store: &'a RedbStore,
    opening: Opening,
    /// The end of the chain as the last commit left it.
    head: Option<Head>,
    /// Who does what need not be done before an answer.
    keeper: SyncSender<Chore>,
    unclaimed: Unclaimed,
}

impl<'a> Writer<'a> {
    pub(in crate::ledger) fn new(store: &'a RedbStore, opening: &Opening, keeper: SyncSender<Chore>) -> Self {
        Self { store, opening: opening.clone(), head: None, keeper, unclaimed: Unclaimed::default() }
    }

    /// Executes a batch, commits once, and only then answers.
    pub(in crate::ledger) fn commit(&mut self, batch: Vec<Command>) {
        self.commit_one(batch);
        let unclaimed = self.unclaimed.take();
        if !unclaimed.is_empty() {
            self.commit_one(unclaimed.into_iter().map(Sending::was_not_sent).collect());
        }
    }

    fn commit_one(&mut self, mut batch: Vec<Command>) {
        if let Some(why) = self.store.failure() {
            refuse_all(&mut batch, &LedgerError::Unavailable(why));
            return;
        }
        let mut waiting = Vec::with_capacity(batch.len());
        let failed = self.try_commit(&mut batch, &mut waiting).err();
        if let Some(error) = &failed {
            self.store.fail(error);
        }
        let (executed, others) = batch.split_at_mut(waiting.len());
        for (command, answer) in executed.iter_mut().zip(waiting) {
            answer(command, failed.as_ref());
        }
        if let Some(error) = &failed {
            refuse_all(others, error);
        }
    }

    fn try_commit(&mut self, batch: &mut [Command], waiting: &mut Vec<Waiting>) -> Result<(), LedgerError> {
        let view = self.store.view();
        let mut tx = Tx::open(Source::View(&view), &self.opening, self.head)?;
        for command in batch {
            let around = Around {
                boot: self.opening.boot,
                wall: self.store.clock.now(),
                mark: &self.store.mark,
                keeper: Some(&self.keeper),
                unclaimed: &self.unclaimed,
            };
            match execute(&around, &mut tx, command, self.store.now()) {
                Ok(answer) => waiting.push(answer),
                Err((answer, error)) => {
                    waiting.push(answer);
                    return Err(error);
                }
            }
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
