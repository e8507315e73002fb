//! A run of a sidecar, and the wire to its ledger where that is in a database.

use std::sync::Arc;
use std::time::Duration;

use keybrake::ledger::rules::resolve::Resolve;
use keybrake::ledger::{Held, Ledger, LedgerError};
use keybrake::tls;
use tokio::time::Instant;

use crate::ledger::line::{Cut, Line};
use crate::ledger::reads::wait;
use crate::ledger::world::{Place, World};
use crate::postgres::Schema;

/// How long a ledger may need until it is well again, once its database can be reached.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
/// How often somebody who waits looks whether there is still somebody to wait for.
const LOOK: Duration = Duration::from_millis(20);

pub(in crate::ledger) struct Process {
    pub(in crate::ledger) world: World,
    line: Option<Line>,
}

impl Process {
    /// One with a disk of its own.
    pub(super) const fn alone(world: World) -> Self {
        Self { world, line: None }
    }

    /// One of several that have a schema together, by a wire of its own.
    pub(in crate::ledger) fn of(schema: &Schema<'_>, number: usize, other: Option<&World>) -> Self {
        let (line, url) = Line::to(schema.url());
        let trust = tls::client_config(None).unwrap();
        let target = keybrake::postgres::Target::parse(&url, None, schema.name(), trust).unwrap();
        let place: Place = Arc::new(move |mut opening| {
            opening.node = node_of(number);
            wait(Ledger::open_postgres(target.clone(), opening))
        });
        let world = match other {
            Some(other) => other.beside(place),
            None => World::new(place),
        };
        // What reads has its session from now on: it is what writes that is cut off.
        world.reads().kill_switch().unwrap();
        Self { world, line: Some(line) }
    }

    pub(in crate::ledger) fn breaks(&self, cut: Cut, then_down: bool) {
        if let Some(line) = &self.line {
            line.breaks(cut, then_down);
        }
    }

    pub(super) fn keeps(&self) {
        if let Some(line) = &self.line {
            line.keeps();
        }
    }

    pub(super) fn is_down(&self) -> bool {
        self.line.as_ref().is_some_and(Line::is_down)
    }

    /// Mends the wire, and waits until all that was asked before is written or never will be.
    pub(in crate::ledger) async fn mend(&self) {
        let Some(line) = &self.line else { return };
        line.mend();
        let since = Instant::now();
        // Once for what was kept, and once for what is taken back after it.
        for _ in 0..2 {
            while let Err(error) = self.world.ledger().flush().await {
                assert!(matches!(error, LedgerError::Unavailable(_)), "{error}");
                assert!(since.elapsed() < PATIENCE, "it does not come back: {error}");
                tokio::time::sleep(LOOK).await;
            }
        }
    }

    /// Drops the process and starts the next, which may need several attempts.
    pub(super) fn restart(&mut self) {
        let since = Instant::now();
        while let Err(error) = self.world.restart_with(|_| ()) {
            assert!(since.elapsed() < PATIENCE, "it does not start: {error}");
            assert!(matches!(error, LedgerError::Unavailable(_)), "{error}");
            let line = self.line.as_ref().expect("a disk that is there");
            line.mend();
        }
        self.world.reads().kill_switch().unwrap();
    }

    /// Tells what a call came to. Nobody waits for a database that cannot be reached.
    pub(super) async fn resolve(&self, held: Held, resolve: Resolve) -> Result<(), LedgerError> {
        let mut asked = Box::pin(self.world.ledger().resolve(held, resolve));
        if self.line.is_none() {
            return asked.await;
        }
        loop {
            if let Ok(told) = tokio::time::timeout(LOOK, &mut asked).await {
                return told;
            }
            if self.is_down() {
                return Err(LedgerError::Unavailable("nobody waits for it".to_owned()));
            }
        }
    }
}

/// The name of a sidecar.
pub(super) fn node_of(number: usize) -> String {
    format!("node-{number}")
}
