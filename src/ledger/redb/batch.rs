//! Commits batches: every command in turn on one view, one frame for all, and only then the answers.

use std::sync::mpsc::SyncSender;

use crate::ledger::command::Command;
use crate::ledger::execute::{Around, Waiting, execute, refuse_all};
use crate::ledger::redb::RedbStore;
use crate::ledger::source::Source;
use crate::ledger::tx::{Head, Tx};
use crate::ledger::writer::Chore;
use crate::ledger::{LedgerError, Opening};

/// Commits batches. Owned by the writer thread.
#[derive(Debug)]
pub(in crate::ledger) struct Writer<'a> {
    store: &'a RedbStore,
    opening: Opening,
    /// The end of the chain as the last commit left it.
    head: Option<Head>,
    /// Who does what need not be done before an answer.
    keeper: SyncSender<Chore>,
}

impl<'a> Writer<'a> {
    pub(in crate::ledger) fn new(store: &'a RedbStore, opening: &Opening, keeper: SyncSender<Chore>) -> Self {
        Self { store, opening: opening.clone(), head: None, keeper }
    }

    /// Executes a batch, commits once, and only then answers.
    pub(in crate::ledger) fn commit(&mut self, mut batch: Vec<Command>) {
        if let Some(why) = self.store.failure() {
            refuse_all(&mut batch, &LedgerError::Unavailable(why));
            return;
        }
        let mut waiting = Vec::with_capacity(batch.len());
        let result = self.try_commit(&mut batch, &mut waiting);
        if let Err(error) = &result {
            self.store.fail(error);
        }
        for answer in waiting {
            answer(result.as_ref().err());
        }
    }

    fn try_commit<'c>(
        &mut self,
        batch: &'c mut [Command],
        waiting: &mut Vec<Waiting<'c>>,
    ) -> Result<(), LedgerError> {
        let view = self.store.view();
        let mut tx = match Tx::open(Source::View(&view), &self.opening, self.head) {
            Ok(tx) => tx,
            Err(error) => {
                refuse_all(batch, &error);
                return Err(error);
            }
        };
        let mut commands = batch.iter_mut();
        let mut broken = None;
        for command in commands.by_ref() {
            let around = Around {
                boot: self.opening.boot,
                wall: self.store.clock.now(),
                mark: &self.store.mark,
                keeper: &self.keeper,
            };
            match execute(&around, &mut tx, command, self.store.now()) {
                Ok(answer) => waiting.push(answer),
                Err((answer, error)) => {
                    waiting.push(answer);
                    broken = Some(error);
                    break;
                }
            }
        }
        if let Some(error) = broken {
            refuse_all(commands.into_slice(), &error);
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
