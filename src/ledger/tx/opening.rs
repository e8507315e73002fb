//! What is done when a ledger is opened: its first rows, whose it is, and what an earlier run was sending.

use minicbor::bytes::ByteArray;
use serde_json::{Map, Value};

use crate::audit::Event;
use crate::hold::{Hold, HoldState};
use crate::id::{BootId, HoldId, LedgerId};
use crate::ledger::row::{self, BindingRow, ChainRow, FORMAT_CLOSED, HOLDS, META, live_holds, meta};
use crate::ledger::rules::resolve;
use crate::ledger::tx::Tx;
use crate::ledger::{LedgerError, Opening, entry};
use crate::time::UnixMs;

impl Tx<'_> {
    pub(in crate::ledger) fn create(&mut self, opening: &Opening, now: UnixMs) -> Result<(), LedgerError> {
        self.put_meta(meta::FORMAT, &FORMAT_CLOSED);
        self.put_meta(meta::LEDGER_ID, &opening.fresh_id);
        self.put_meta(meta::SALT, &ByteArray::from(opening.fresh_salt));
        let binding =
            BindingRow { account: None, mode: opening.mode.as_str().to_owned(), verified_key: None };
        self.put_meta(meta::BINDING, &binding);
        self.begin_first_chain(opening.fresh_id, opening.fresh_id);
        let mut detail = Map::new();
        detail.insert("format".to_owned(), Value::from(FORMAT_CLOSED));
        detail.insert("mode".to_owned(), Value::from(opening.mode.as_str()));
        self.append(&entry::of_admin(now, Event::ChainStarted, "keybrake", None, detail))
    }

    pub(in crate::ledger) fn check_mode(&mut self, opening: &Opening) -> Result<(), LedgerError> {
        let binding: BindingRow = self.binding()?;
        if binding.mode == opening.mode.as_str() {
            return Ok(());
        }
        Err(LedgerError::BoundElsewhere {
            bound: format!("{} mode", binding.mode),
            offered: format!("{} mode", opening.mode.as_str()),
        })
    }

    pub(in crate::ledger) fn doubt_orphans(&mut self, boot: BootId, now: UnixMs) -> Result<(), LedgerError> {
        for hold in self.live_holds()? {
            self.doubt_orphan(&hold, boot, now)?;
        }
        Ok(())
    }

    fn doubt_orphan(&mut self, hold: &Hold, boot: BootId, now: UnixMs) -> Result<(), LedgerError> {
        let Some(key) = self.key(hold.live.as_ref().map_or(hold.key_id, |live| live.key_id))? else {
            return Err(LedgerError::Contradiction("a live hold has no key"));
        };
        let call = self.call_by_id(hold.call_id)?;
        match resolve::orphan(hold, call.as_ref(), &key, boot, now) {
            Some(effects) => self.write(&effects, now),
            None => Ok(()),
        }
    }

    /// The first rows of a ledger that several sidecars have together, where there are none, and of this one's own chain.
    pub(in crate::ledger) fn join(&mut self, opening: &Opening, now: UnixMs) -> Result<(), LedgerError> {
        if self.meta::<LedgerId>(meta::LEDGER_ID)?.is_none() {
            self.put_meta(meta::LEDGER_ID, &opening.fresh_id);
            self.put_meta(meta::SALT, &ByteArray::from(opening.fresh_salt));
            let binding =
                BindingRow { account: None, mode: opening.mode.as_str().to_owned(), verified_key: None };
            self.put_meta(meta::BINDING, &binding);
        }
        self.check_mode(opening)?;
        if self.meta::<ChainRow>(meta::CHAIN)?.is_none() {
            self.put_meta(meta::CHAIN, &ChainRow { id: opening.fresh_id, base: 0 });
            self.begin_first_chain(self.ledger_id()?, opening.fresh_id);
            let mut detail = Map::new();
            detail.insert("mode".to_owned(), Value::from(opening.mode.as_str()));
            self.append(&entry::of_admin(now, Event::ChainStarted, "keybrake", None, detail))?;
        }
        Ok(())
    }

    /// What a start does, and what makes a file's rows those of one sidecar of many: its chain has a row of its own, and
    /// what only a file says of itself goes. Answers how many doubts it made.
    pub(in crate::ledger) fn move_out(
        &mut self,
        opening: &Opening,
        now: UnixMs,
    ) -> Result<usize, LedgerError> {
        self.check_mode(opening)?;
        self.note_clock(now, opening.clock.now())?;
        let is_sent = |hold: &&Hold| matches!(hold.state, HoldState::Sending { .. });
        let doubts = self.live_holds()?.iter().filter(is_sent).count();
        self.doubt_orphans(opening.boot, now)?;
        if self.meta::<ChainRow>(meta::CHAIN)?.is_none() {
            let id = self.ledger_id()?;
            self.put_meta(meta::CHAIN, &ChainRow { id, base: 0 });
        }
        self.remove(&META, &meta::FORMAT);
        self.remove(&META, &meta::WAL);
        Ok(doubts)
    }

    /// Doubts what runs of the process that are gone were sending, so many at most. Answers how many there were.
    pub(in crate::ledger) fn doubt_those_of(
        &mut self,
        gone: &[BootId],
        own: BootId,
        most: usize,
        now: UnixMs,
    ) -> Result<usize, LedgerError> {
        let is_theirs =
            |hold: &Hold| matches!(hold.state, HoldState::Sending { boot } if gone.contains(&boot));
        let theirs: Vec<HoldId> =
            self.live_holds()?.iter().filter(|hold| is_theirs(hold)).map(|hold| hold.id).take(most).collect();
        let mut failed = Ok(());
        for id in &theirs {
            // Again, now that it is known which one has to be locked. All are looked at, so that all that is missing is known
            // at once.
            let doubted = match self.hold(*id) {
                Ok(hold) => match hold.filter(is_theirs) {
                    Some(hold) => self.doubt_orphan(&hold, own, now),
                    None => Ok(()),
                },
                Err(error) => Err(error),
            };
            failed = failed.and(doubted);
        }
        failed.map(|()| theirs.len())
    }

    pub(in crate::ledger) fn live_holds(&self) -> Result<Vec<Hold>, LedgerError> {
        self.range(&HOLDS, live_holds(), |_, hold| row::decode(hold))?.collect()
    }
}
