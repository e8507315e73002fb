//! The ledger in a real PostgreSQL: what every store must do, and what only becomes of a commit that nobody knows of.

use std::sync::Arc;
use std::time::Duration;

use keybrake::call::Outcome;
use keybrake::hold::Lane;
use keybrake::ledger::{Admitted, Ledger, LedgerError, Opening};
use keybrake::postgres::Target;
use keybrake::tls;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::fleet::proxy::{AtCommit, Proxy};
use crate::ledger::reads::wait;
use crate::ledger::suite::conformance;
use crate::ledger::world::{Ask, Place, World, admin, usd};
use crate::postgres::{self, Server};
use crate::support::PATIENCE;

/// A schema of a test's own; `None` where there is no server.
fn in_a_schema() -> Option<Place> {
    let target = postgres::server()?.schema("ledger").target();
    Some(Arc::new(move |opening| wait(Ledger::open_postgres(target.clone(), opening))))
}

conformance!(in_a_schema);

/// A ledger behind a proxy.
async fn behind_a_proxy(server: &Server) -> (Proxy, World) {
    let (proxy, schema) = (Proxy::before(server.url()).await, server.schema("ledger"));
    let trust = tls::client_config(None).unwrap();
    let target = Target::parse(&proxy.url(server.url()), None, schema.name(), trust).unwrap();
    let world = World::new(Arc::new(move |opening| wait(Ledger::open_postgres(target.clone(), opening))));
    (proxy, world)
}

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

/// The same call is asked for once more while it is being sent, and the commit of that answer is not known of.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_being_sent_is_not_taken_back_with_what_nobody_had() {
    let Some(server) = postgres::server() else { return };
    let (proxy, world) = behind_a_proxy(server).await;
    let key = world.key("a", |_| ()).await;
    let ask = Ask::charge("one", 500);
    let held = world.held(key, &ask).await;
    proxy.at_commit_then_down(AtCommit::LoseAnswer);
    let again = world.admit(key, &ask).await;
    assert!(matches!(again, Err(LedgerError::Unavailable(_))), "{again:?}");
    proxy.set_down(false);
    let settled = world.resolve(Outcome::Spent { minor: 500 }, &["ch_one"], Some(200));
    world.ledger().resolve(held, settled).await.unwrap();
    let counted = world.total(key, Lane::In);
    assert_eq!((counted.spent, counted.held), (usd("5.00"), usd("0.00")));
}

/// Calls that nobody made before have locks that are not there yet. Whoever made them in another order than others would wait
/// in a circle with them.
#[tokio::test(flavor = "multi_thread")]
async fn locks_are_made_in_their_order() {
    let Some(server) = postgres::server() else { return };
    let in_a_schema = || {
        let schema = server.schema("ledger");
        let target = schema.target();
        let place: Place = Arc::new(move |opening| wait(Ledger::open_postgres(target.clone(), opening)));
        (schema, World::new(place))
    };
    let ask = Ask::charge("one", 500);
    // Locks go by ids, and both worlds have the same.
    let (schema, world) = in_a_schema();
    let key = world.key("a", |_| ()).await;
    let slots = async || -> Vec<i32> {
        let rows = schema.sql("SELECT slot FROM locks ORDER BY slot").await;
        rows.into_iter().map(|row| row[0].parse().unwrap()).collect()
    };
    let before = slots().await;
    drop(world.held(key, &ask).await);
    let made: Vec<i32> = slots().await.into_iter().filter(|slot| !before.contains(slot)).collect();
    let (Some(low), Some(high)) = (made.first(), made.last().filter(|_| made.len() > 1)) else {
        panic!("{made:?}")
    };

    let (schema, world) = in_a_schema();
    let key = world.key("a", |_| ()).await;
    let other = schema.connect().await;
    let pid: i32 = other.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    other.batch_execute(&format!("BEGIN; INSERT INTO locks VALUES ({low})")).await.unwrap();
    let (ledger, command) = (world.ledger().clone(), world.command(key, &ask));
    let admitted = tokio::spawn(async move { ledger.admit(key, command).await });
    let waits = format!("SELECT 1 FROM pg_stat_activity WHERE {pid} = ANY (pg_blocking_pids(pid))");
    let since = Instant::now();
    while schema.sql(&waits).await.is_empty() {
        assert!(since.elapsed() < PATIENCE, "nobody waits");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // Sooner than the server looks for circles.
    let next = format!("SET LOCAL lock_timeout TO '300ms'; INSERT INTO locks VALUES ({high}); COMMIT");
    other.batch_execute(&next).await.unwrap();
    let admitted = admitted.await.unwrap().unwrap();
    assert!(matches!(admitted, Admitted::Held(_)), "{admitted:?}");
}

/// More commands wait than the queue holds, for longer than anybody waits for an answer.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_call_came_to_is_written_though_the_queue_was_full() {
    /// The queue, and what the writer has taken from it.
    const MORE_THAN_THERE_IS_ROOM_FOR: usize = 4_096 + 2 * 256;
    let Some(server) = postgres::server() else { return };
    let (proxy, schema) = (Proxy::before(server.url()).await, server.schema("ledger"));
    let (direct, trust) = (schema.target(), tls::client_config(None).unwrap());
    let target = Target::parse(&proxy.url(server.url()), None, schema.name(), trust).unwrap();
    let world = World::new(Arc::new(move |opening| wait(Ledger::open_postgres(target.clone(), opening))));
    let observer = world.beside(Arc::new(move |opening| {
        wait(Ledger::open_postgres(direct.clone(), Opening { node: "node-2".to_owned(), ..opening }))
    }));
    let key = world.key("a", |_| ()).await;
    let ask = Ask::charge("one", 500);
    let held = world.held(key, &ask).await;
    let settled = world.resolve(Outcome::Spent { minor: 500 }, &["ch_one"], Some(200));
    proxy.hang();
    let mut waiting = JoinSet::new();
    for _ in 0..MORE_THAN_THERE_IS_ROOM_FOR {
        let ledger = world.ledger().clone();
        waiting.spawn(async move { ledger.flush().await });
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let told = world.ledger().resolve(held, settled).await;
    assert!(matches!(told, Err(LedgerError::Unavailable(_))), "{told:?}");
    let counted = || observer.total(key, Lane::In);
    assert_eq!((counted().spent, counted().held), (usd("0.00"), usd("5.00")));
    proxy.let_new_ones_through();
    let since = Instant::now();
    while counted().held != usd("0.00") {
        assert!(since.elapsed() < PATIENCE * 2, "never written");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(counted().spent, usd("5.00"));
    observer.knows(key, world.mode_of(key));
    let again = observer.admit(key, &ask).await.unwrap();
    assert!(matches!(again, Admitted::Replay { .. }), "{again:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reserve_and_a_settle_are_two_round_trips_each() {
    let Some(server) = postgres::server() else { return };
    let (proxy, world) = behind_a_proxy(server).await;
    let key = world.key("a", |_| ()).await;
    // Statements are made when they are wanted first.
    for warm in 0..3 {
        world.charged(key, &format!("warm-{warm}"), 1).await;
    }
    let before = proxy.turns();
    for number in 0..5 {
        world.charged(key, &format!("charge-{number}"), 1).await;
    }
    assert_eq!(proxy.turns() - before, 5 * 2 * 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_is_looked_up_in_one_round_trip() {
    let Some(server) = postgres::server() else { return };
    let (proxy, world) = behind_a_proxy(server).await;
    let key = world.key("a", |_| ()).await;
    let digest = world.reads().key(key).unwrap().unwrap().digest;
    let looked = || async {
        let before = proxy.turns();
        let caller = world.ledger().read(|reader| reader.caller(&digest)).await.unwrap().unwrap();
        (proxy.turns() - before, caller)
    };
    // What it leads to is not known at first, nor the statement that asks for all of it.
    for _ in 0..2 {
        looked().await;
    }
    let (turns, caller) = looked().await;
    assert_eq!((turns, caller.standing.is_stopped, caller.key.revoked_at), (1, false, None));
    // And nothing is answered by what was seen before.
    world.ledger().revoke_key(key, admin()).await.unwrap();
    world.ledger().set_kill_switch(true, "drill".to_owned(), admin()).await.unwrap();
    let (turns, caller) = looked().await;
    assert!(
        turns == 1 && caller.standing.is_stopped && caller.key.revoked_at.is_some(),
        "{turns} {caller:?}"
    );
}
