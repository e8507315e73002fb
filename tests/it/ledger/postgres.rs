//! The ledger in a real PostgreSQL: what every store must do.

use std::sync::Arc;

use keybrake::ledger::Ledger;

use crate::ledger::reads::wait;
use crate::ledger::suite::conformance;
use crate::ledger::world::Place;
use crate::postgres;

/// A schema of a test's own; `None` where there is no server.
fn in_a_schema() -> Option<Place> {
    let target = postgres::server()?.schema("ledger").target();
    Some(Arc::new(move |opening| wait(Ledger::open_postgres(target.clone(), opening))))
}

conformance!(in_a_schema);
