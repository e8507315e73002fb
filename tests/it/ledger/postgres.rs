//! The ledger in a real PostgreSQL: what every store must do.

use std::sync::Arc;

use keybrake::ledger::{Ledger, Opening};

use crate::ledger::reads::wait;
use crate::ledger::suite::conformance;
use crate::ledger::world::{Place, World};
use crate::postgres;

/// A schema of a test's own; `None` where there is no server.
fn in_a_schema() -> Option<Place> {
    let target = postgres::server()?.schema("ledger").target();
    Some(Arc::new(move |opening| wait(Ledger::open_postgres(target.clone(), opening))))
}

conformance!(in_a_schema);

/// Recovery asks Stripe about every doubt: of a fleet one sidecar does.
#[tokio::test]
async fn one_sidecar_at_a_time_looks_for_doubts() {
    let Some(place) = in_a_schema() else { return };
    let mut first = World::new(Arc::clone(&place));
    let second = place(Opening { node: "node-2".to_owned(), ..first.opening() }).unwrap();
    let lead = async |first: &World| {
        for ledger in [first.ledger(), &second] {
            ledger.tick().await.unwrap();
            // What a tick does beside the rules is done before the next command.
            ledger.flush().await.unwrap();
        }
        (first.ledger().leads(), second.leads())
    };
    let (one, other) = lead(&first).await;
    assert!(one != other, "{one} {other}");
    first.restart();
    let (one, other) = lead(&first).await;
    assert!(one != other, "{one} {other}");
}
