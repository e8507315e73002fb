//! What is done when a ledger is opened: its first rows, whose it is, and what an earlier run was sending.

use minicbor::bytes::ByteArray;
use serde_json::{Map, Value};

use crate::audit::Event;
use crate::hold::Hold;
use crate::id::BootId;
use crate::ledger::row::{self, BindingRow, FORMAT_CLOSED, HOLDS, live_holds, meta};
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
        self.begin_first_chain(opening.fresh_id);
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
            let Some(key) = self.key(hold.live.as_ref().map_or(hold.key_id, |live| live.key_id))? else {
                return Err(LedgerError::Contradiction("a live hold has no key"));
            };
            let call = self.call_by_id(hold.call_id)?;
            if let Some(effects) = resolve::orphan(&hold, call.as_ref(), &key, boot, now) {
                self.write(&effects, now)?;
            }
        }
        Ok(())
    }

    pub(in crate::ledger) fn live_holds(&self) -> Result<Vec<Hold>, LedgerError> {
        self.range(&HOLDS, live_holds(), |_, hold| row::decode(hold))?.collect()
    }
}
