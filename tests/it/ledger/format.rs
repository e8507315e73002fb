//! Files written by earlier builds must open for ever, and mean what they meant.
//!
//! `tests/data/redb/format-1.redb` was written by [`history`], in the build that first had the format. A new format gets
//! a new file beside it: `KEYBRAKE_TEST_WRITE_FORMAT=path cargo test --test it a_file_of_format` writes one.

use keybrake::call::{CallState, Outcome};
use keybrake::hold::Lane;
use keybrake::key::Idempotency;
use keybrake::ledger::Admitted;
use keybrake::ledger::query::{CallFilter, KeyFilter};
use keybrake::time::HOUR_MS;

use crate::ledger::redb::on_disk;
use crate::ledger::world::{Ask, Deed, World, usd};

/// One of everything that a file holds.
async fn history(world: &World) {
    let key = world.key("kept", |key| key.remember_days = 400).await;
    world.charged(key, "spent", 100).await;
    let intent = Ask { deed: Deed::Intent, ..Ask::charge("open", 200) };
    let held = world.held(key, &intent).await;
    let resolve = world.resolve(Outcome::Pending { minor: 200 }, &["pi_open"], Some(200));
    world.ledger().resolve(held, resolve).await.unwrap();
    let held = world.held(key, &Ask::charge("doubt", 300)).await;
    world.ledger().resolve(held, world.resolve(Outcome::Unknown, &[], Some(500))).await.unwrap();
    let held = world.held(key, &Ask::charge("declined", 400)).await;
    world.ledger().resolve(held, world.resolve(Outcome::Declined, &["ch_no"], Some(402))).await.unwrap();
    // Still being sent when the process ended.
    drop(world.held(key, &Ask::charge("sending", 500)).await);
}

#[tokio::test]
async fn a_file_of_format_1_opens_and_means_what_it_meant() {
    if let Some(path) = std::env::var_os("KEYBRAKE_TEST_WRITE_FORMAT") {
        history(&World::new(on_disk(path.into()))).await;
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("keybrake.redb");
    let kept = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/redb/format-1.redb");
    std::fs::copy(kept, &path).unwrap();
    let mut world = World::new(on_disk(path));
    // Ids are counted here, so the first run takes itself for the one that wrote the file.
    world.restart();
    world.pass(HOUR_MS);
    let keys = world.reads().keys(&KeyFilter::default(), None, 10, world.ledger().now()).unwrap().items;
    let [key] = keys.as_slice() else { panic!("{keys:?}") };
    world.knows(key.id, Idempotency::Required);
    let total = world.total(key.id, Lane::In);
    assert_eq!((total.spent, total.held, total.doubt), (usd("1.00"), usd("2.00"), usd("8.00")));
    let states = |name: &str| {
        let filter = CallFilter { idempotency_key: Some(name.to_owned()), ..CallFilter::default() };
        world.reads().calls(&filter, None, 10).unwrap().items[0].state
    };
    assert_eq!(
        ["spent", "open", "doubt", "declined", "sending"].map(states),
        [CallState::Spent, CallState::Open, CallState::Doubt, CallState::Declined, CallState::Doubt]
    );
    let again = world.admit(key.id, &Ask::charge("spent", 100)).await.unwrap();
    assert!(matches!(again, Admitted::Replay { .. }), "{again:?}");
    for name in ["doubt", "sending"] {
        let minor = if name == "doubt" { 300 } else { 500 };
        let held = world.held(key.id, &Ask::charge(name, minor)).await;
        assert!(!held.first_send(), "{name} is sent again, equal");
        let resolve = world.resolve(Outcome::Spent { minor }, &[&format!("ch_{name}")], Some(200));
        world.ledger().resolve(held, resolve).await.unwrap();
    }
    assert_eq!(world.total(key.id, Lane::In).spent, usd("9.00"));
    world.check();
}
