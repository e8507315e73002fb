//! Files written by earlier builds must open for ever, and mean what they meant.
//!
//! `tests/data/redb/format-1.redb` was written by [`history`], in the build that first had the format, and
//! `format-1-objects.redb` by [`history_of_objects`], in the build that first read objects and counted other currencies. A
//! new format, or new fields of an old one, get a new file beside them:
//! `KEYBRAKE_TEST_WRITE_FORMAT=path cargo test --test it a_file_of_format_1_opens` writes one.

use keybrake::call::{CallState, Outcome};
use keybrake::hold::Lane;
use keybrake::intent::Seen;
use keybrake::key::{Idempotency, Key};
use keybrake::ledger::Admitted;
use keybrake::ledger::query::{AuditFilter, CallFilter, KeyFilter};
use keybrake::money::{Currency, Money};
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

/// A copy of a kept file, opened an hour later, and its only key.
fn opened(name: &str) -> (World, Key, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("keybrake.redb");
    std::fs::copy(format!("{}/tests/data/redb/{name}", env!("CARGO_MANIFEST_DIR")), &path).unwrap();
    let mut world = World::new(on_disk(path));
    // Ids are counted here, so the first run takes itself for the one that wrote the file.
    world.restart();
    world.pass(HOUR_MS);
    let keys = world.reads().keys(&KeyFilter::default(), None, 10, world.ledger().now()).unwrap().items;
    let [key] = keys.as_slice() else { panic!("{keys:?}") };
    world.knows(key.id, Idempotency::Required);
    (world, key.clone(), dir)
}

/// What holds say of objects that somebody else made, of other currencies and of ceilings.
async fn history_of_objects(world: &World) {
    let key = world.key("kept", |key| key.caps.daily = Some(usd("500.00"))).await;
    let of = |deed, object: &str| Ask {
        deed,
        object: Some(object.to_owned()),
        minor: None,
        ..Ask::charge(object, 0)
    };
    for (object, minor, moved, currency) in [("pi_eur", 1_000, 0, "eur"), ("pi_part", 600, 400, "usd")] {
        let currency = Currency::parse(currency).unwrap();
        let ceiling = Some(Money { minor, currency });
        let customer = Some("cus_1".to_owned());
        world.tells(object, Seen { ceiling, currency: Some(currency), moved, customer });
        let held = world.held(key, &of(Deed::Confirm, object)).await;
        let resolve = world.resolve(Outcome::Pending { minor }, &[object], Some(200));
        world.ledger().resolve(held, resolve).await.unwrap();
    }
    let held = world.held(key, &of(Deed::Ceiling, "in_ceiling")).await;
    let resolve = world.resolve(Outcome::Pending { minor: 0 }, &["in_ceiling"], Some(200));
    world.ledger().resolve(held, resolve).await.unwrap();
}

#[tokio::test]
async fn a_file_of_format_1_opens_and_keeps_what_it_says_of_objects() {
    if let Some(path) = std::env::var_os("KEYBRAKE_TEST_WRITE_FORMAT") {
        let path = std::path::PathBuf::from(path).with_extension("objects.redb");
        history_of_objects(&World::new(on_disk(path))).await;
        return;
    }
    let (world, key, _dir) = opened("format-1-objects.redb");
    assert_eq!(world.total(key.id, Lane::In).held, usd("76.00"));
    let capture = |name: &str, object: &str| Ask {
        deed: Deed::Capture,
        object: Some(object.to_owned()),
        minor: None,
        ..Ask::charge(name, 0)
    };
    for (name, object, minor, spent) in
        [("a", "pi_eur", 1_000, "20.00"), ("b", "pi_part", 1_000, "26.00"), ("c", "in_ceiling", 100, "27.00")]
    {
        let held = world.held(key.id, &capture(name, object)).await;
        let resolve = world.resolve(Outcome::Spent { minor }, &[object], Some(200));
        world.ledger().resolve(held, resolve).await.unwrap();
        assert_eq!(world.total(key.id, Lane::In).spent, usd(spent), "{object}");
    }
    world.check();
}

#[tokio::test]
async fn a_file_of_format_1_opens_and_means_what_it_meant() {
    if let Some(path) = std::env::var_os("KEYBRAKE_TEST_WRITE_FORMAT") {
        history(&World::new(on_disk(path.into()))).await;
        return;
    }
    let (world, key, _dir) = opened("format-1.redb");
    // It has no index of its log, or an older one.
    let in_doubt = AuditFilter { equal: vec![("outcome", "doubt".to_owned())], ..AuditFilter::default() };
    let id = world.log().iter().find_map(|record| Some(record.get("hold_id")?.as_str()?.to_owned())).unwrap();
    let one = AuditFilter { equal: vec![("hold_id", id)], all_events: true, ..AuditFilter::default() };
    let told = || (world.log(), world.audit(&in_doubt), world.audit(&one));
    let not_indexed = told();
    world.ledger().tick().await.unwrap();
    assert_eq!(told(), not_indexed);
    assert_eq!((not_indexed.1.len(), not_indexed.2.len()), (2, 2));
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
