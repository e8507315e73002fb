//! The conformance suite on redb, and what only a file can do.

use std::sync::Arc;

use keybrake::audit::{Entry, Event};
use keybrake::call::Outcome;
use keybrake::hold::{Facts, Lane};
use keybrake::id::KeyId;
use keybrake::ledger::query::AuditFilter;
use keybrake::ledger::{Admitted, Ledger, LedgerError, Ticked};
use keybrake::refusal::{Code, Refusal};
use keybrake::time::DAY_MS;
use redb::{Database, TableDefinition};
use serde_json::{Value, json};

use crate::ledger::backend::{File, Image};
use crate::ledger::suite::conformance;
use crate::ledger::world::{Ask, Place, START, World, admin, usd};

/// A ledger in memory, so that the suite costs no syncs.
fn in_memory() -> Place {
    of_file(File::default())
}

fn of_file(file: File) -> Place {
    Arc::new(move |opening| file.ledger(opening))
}

/// A ledger in a file of this name. The handle before may take a moment to close.
pub(super) fn on_disk(path: std::path::PathBuf) -> Place {
    Arc::new(move |opening| {
        let mut tries = 0;
        loop {
            match Ledger::open(&path, opening.clone()) {
                Err(LedgerError::Locked) if tries < 200 => tries += 1,
                other => return other,
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    })
}

conformance!(in_memory);

#[tokio::test]
async fn a_file_is_kept_and_opened_by_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("keybrake.redb");
    let mut world = World::new(on_disk(path.clone()));
    let key = world.key("k", |_| ()).await;
    world.charged(key, "a", 100).await;
    let second = Ledger::open(&path, world.opening());
    assert!(matches!(second, Err(LedgerError::Locked)), "{second:?}");
    world.restart();
    assert_eq!(world.total(key, Lane::In).spent, usd("1.00"));
    world.check();
}

/// A file that was cut short while it was made cannot be opened, so it must not have the ledger's name yet.
#[tokio::test]
async fn a_ledger_that_was_cut_short_while_it_was_made_is_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("keybrake.redb");
    std::fs::write(dir.path().join("keybrake.ledger_0.new"), [0; 4_096]).unwrap();
    let world = World::new(on_disk(path.clone()));
    let key = world.key("k", |_| ()).await;
    world.charged(key, "a", 100).await;
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    let files = std::fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(files, 3, "of the making nothing is left beside the ledger and its log");
}

#[tokio::test]
async fn a_newer_format_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("keybrake.redb");
    drop(World::new(on_disk(path.clone())));
    let meta: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
    let audit: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("audit");
    let db = loop {
        match Database::create(&path) {
            Ok(db) => break db,
            Err(_) => std::thread::sleep(std::time::Duration::from_millis(5)),
        }
    };
    let txn = db.begin_write().unwrap();
    txn.open_table(meta).unwrap().insert("format", [1, 3].as_slice()).unwrap();
    // Nothing else of a newer file needs to be readable.
    txn.open_table(audit).unwrap().insert(2, [0_u8; 40].as_slice()).unwrap();
    txn.commit().unwrap();
    drop(db);
    let refused = Ledger::open(&path, World::new(in_memory()).opening());
    assert!(matches!(refused, Err(LedgerError::NewerFormat { found: 3, known: 2 })), "{refused:?}");
}

#[tokio::test]
async fn a_write_that_fails_latches() {
    let file = File::default();
    let mut world = World::new(of_file(file.clone()));
    let key = world.key("k", |_| ()).await;
    let held = world.held(key, &Ask::charge("a", 100)).await;
    file.fail_after(0);
    let resolve = world.resolve(Outcome::Declined, &[], Some(402));
    let failed = world.ledger().resolve(held, resolve).await;
    assert!(matches!(failed, Err(LedgerError::Unavailable(_))), "{failed:?}");
    assert!(world.ledger().failure().is_some());
    file.mend();
    let after = world.admit(key, &Ask::charge("b", 100)).await;
    assert!(matches!(after, Err(LedgerError::Unavailable(_))), "nothing is written until the next start");
    world.restart();
    assert_eq!(world.total(key, Lane::In).counted(), usd("1.00"));
    let again = world.held(key, &Ask::charge("a", 100)).await;
    assert!(!again.first_send());
    world.check();
}

/// The disk fails at each write and each sync of an admission, once at every place: what was not acknowledged was not let
/// through, and may at most be a doubt; what was acknowledged stays.
#[tokio::test]
async fn a_disk_that_fails_at_any_write_or_sync_loses_nothing_that_was_told() {
    for writes in 0.. {
        let file = File::default();
        let mut world = World::new(of_file(file.clone()));
        let key = world.key("k", |_| ()).await;
        world.charged(key, "a", 100).await;
        file.fail_after(writes);
        let told = world.admit(key, &Ask::charge("b", 200)).await;
        let latched = world.ledger().failure().is_some();
        file.mend();
        match &told {
            Ok(Admitted::Held(held)) => assert!(held.first_send() && !latched, "{writes}"),
            Ok(other) => panic!("{writes}: {other:?}"),
            Err(error) => {
                assert!(matches!(error, LedgerError::Unavailable(_)) && latched, "{writes}: {error}");
                let after = world.admit(key, &Ask::charge("c", 100)).await;
                assert!(matches!(after, Err(LedgerError::Unavailable(_))), "{writes}: {after:?}");
            }
        }
        world.restart();
        let total = world.total(key, Lane::In);
        assert_eq!(total.spent, usd("1.00"), "{writes}");
        let in_doubt = total.doubt == usd("2.00");
        assert!(in_doubt || (told.is_err() && total.counted() == usd("1.00")), "{writes}: {total:?}");
        let again = world.admit(key, &Ask::charge("a", 100)).await.unwrap();
        assert!(matches!(again, Admitted::Replay { .. }), "{writes}: {again:?}");
        let held = world.held(key, &Ask::charge("b", 200)).await;
        assert_eq!(held.first_send(), !in_doubt, "{writes}");
        world.check();
        if told.is_ok() {
            assert!(writes > 1, "only {writes} places to fail at");
            return;
        }
    }
}

/// The disk fails at each write and each sync while the log is taken into the tree: all of it is there after the next start.
#[tokio::test]
async fn a_disk_that_fails_while_the_log_is_taken_in_loses_nothing() {
    for writes in 0.. {
        let file = File::default();
        let mut world = World::new(of_file(file.clone()));
        let key = world.key("k", |_| ()).await;
        world.charged(key, "a", 100).await;
        world.charged(key, "b", 200).await;
        file.fail_after(writes);
        let ticked = world.ledger().tick().await;
        assert_eq!(ticked.is_err(), world.ledger().failure().is_some(), "{writes}");
        assert_eq!(world.total(key, Lane::In).spent, usd("3.00"), "{writes}: what is durable is seen");
        file.mend();
        world.restart();
        assert_eq!(world.total(key, Lane::In).spent, usd("3.00"), "{writes}");
        let again = world.admit(key, &Ask::charge("b", 200)).await.unwrap();
        assert!(matches!(again, Admitted::Replay { .. }), "{writes}: {again:?}");
        world.check();
        if ticked.is_ok() {
            assert!(writes > 3, "only {writes} places to fail at");
            return;
        }
    }
}

/// What takes the log in may panic anywhere, in a query of the log too, where nobody catches it for the ledger. What it had
/// begun to take in must not be taken for taken in.
#[tokio::test]
async fn a_panic_while_the_log_is_taken_in_loses_nothing() {
    let file = File::default();
    let world = World::new(of_file(file.clone()));
    let key = world.key("k", |_| ()).await;
    world.charged(key, "a", 100).await;
    file.panic_next();
    let asked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.log()));
    assert!(asked.is_err(), "it panicked on purpose");
    assert_eq!(world.total(key, Lane::In).spent, usd("1.00"), "what is durable is seen");
    let ticked = world.ledger().tick().await;
    assert!(matches!(ticked, Err(LedgerError::Unavailable(_))), "{ticked:?}");
    let after = world.admit(key, &Ask::charge("b", 100)).await;
    assert!(matches!(after, Err(LedgerError::Unavailable(_))), "nothing is written until the next start");
    let next = world.beside(of_file(File::of(file.image())));
    // The store panics once more when it is dropped.
    std::mem::forget(world);
    assert_eq!(next.total(key, Lane::In).spent, usd("1.00"));
    let again = next.admit(key, &Ask::charge("a", 100)).await.unwrap();
    assert!(matches!(again, Admitted::Replay { .. }), "{again:?}");
    next.check();
}

/// A start that fails at any write, twice, leaves a ledger that starts: it has not lost its log by beginning a new one.
#[tokio::test]
async fn starts_that_fail_do_not_lose_the_log() {
    let file = File::default();
    let world = World::new(of_file(file.clone()));
    let key = world.key("k", |_| ()).await;
    world.charged(key, "a", 100).await;
    let killed = file.image();
    world.ledger().close().await.unwrap();
    for image in [killed, file.image()] {
        starts_that_fail(&world, key, &image);
    }
}

fn starts_that_fail(world: &World, key: KeyId, image: &Image) {
    // How many writes and syncs a start may make, the first and the next.
    for first in 0.. {
        for second in 0.. {
            let file = File::of(image.clone());
            let failed = [first, second].map(|writes| {
                file.fail_after(writes);
                let started = file.ledger(world.opening());
                let failed = started.is_err();
                file.mend();
                failed
            });
            let next = world.beside(of_file(file));
            assert_eq!(next.total(key, Lane::In).spent, usd("1.00"), "{first} {second}");
            next.check();
            match failed {
                [false, _] => {
                    assert!(first > 3, "only {first} places to fail at");
                    return;
                }
                [true, false] => break,
                [true, true] => {}
            }
        }
    }
}

/// More than a half of the log holds at once, and a batch that no half could hold.
#[tokio::test]
async fn what_has_no_room_in_the_log_is_durable_too() {
    let file = File::default();
    let mut world = World::new(of_file(file.clone()));
    let big = "x".repeat(40_000);
    for n in 0..20 {
        let customer = Some(if n % 3 == 0 { big.clone() } else { "x".repeat(n * 400) });
        world.record(Entry { event: Event::Forwarded, customer, ..Entry::default() }).await;
    }
    let log = world.log();
    assert_eq!(log.len(), 21);
    let image = world.beside(of_file(File::of(file.image())));
    assert_eq!(image.log(), log, "as a crash would leave it");
    world.restart();
    assert_eq!(world.log(), log);
    world.check();
}

/// A file whose last calls are in a log that is gone, or another's, must not be opened without them. A file that was closed
/// needs none.
#[tokio::test]
async fn a_ledger_is_not_opened_without_its_log() {
    let file = File::default();
    let world = World::new(of_file(file.clone()));
    let key = world.key("k", |_| ()).await;
    world.charged(key, "a", 100).await;
    let image = file.image();
    let other = File::default();
    drop(world.beside(of_file(other.clone())));
    let opened = |wal: Vec<u8>| File::of(Image { tree: image.tree.clone(), wal }).ledger(world.opening());
    for wal in [vec![], vec![0; image.wal.len()], other.image().wal] {
        let refused = opened(wal);
        assert!(matches!(refused, Err(LedgerError::Corrupt(_))), "{refused:?}");
    }
    drop(opened(image.wal.clone()).unwrap());
    world.ledger().close().await.unwrap();
    let after = world.admit(key, &Ask::charge("b", 100)).await;
    assert!(matches!(after, Err(LedgerError::Unavailable(_))), "{after:?}");
    for wal in [vec![], image.wal] {
        let closed = world.beside(of_file(File::of(Image { tree: file.image().tree, wal })));
        assert_eq!(closed.total(key, Lane::In).spent, usd("1.00"));
        closed.charged(key, "b", 100).await;
        closed.check();
    }
}

/// A writer that panicked was gone without a word: every call was refused, and `/readyz` went on saying that all is well.
#[tokio::test]
async fn a_writer_that_panics_latches() {
    let file = File::default();
    let world = World::new(of_file(file.clone()));
    let key = world.key("k", |_| ()).await;
    world.charged(key, "a", 100).await;
    file.panic_next();
    let failed = world.admit(key, &Ask::charge("b", 200)).await;
    let after = world.admit(key, &Ask::charge("c", 100)).await;
    let failure = world.ledger().failure();
    let next = world.beside(of_file(File::of(file.image())));
    // The store panics once more when it is dropped.
    std::mem::forget(world);
    assert!(matches!(failed, Err(LedgerError::Unavailable(_))), "{failed:?}");
    assert!(matches!(after, Err(LedgerError::Unavailable(_))), "nothing is written until the next start");
    assert!(failure.is_some());
    assert_eq!(next.total(key, Lane::In).spent, usd("1.00"));
    next.charged(key, "c", 100).await;
    next.check();
}

/// A doubt of a key with a long memory was sent again under a key with a short one, and forgotten by the short one's
/// measure: days later the same call was a new charge.
#[tokio::test]
async fn who_sends_a_doubt_again_does_not_shorten_its_memory() {
    let world = World::new(in_memory());
    let long = world.key("long", |_| ()).await;
    let short = world.key("short", |key| key.remember_days = 2).await;
    let ask = Ask::charge("k", 100);
    let held = world.held(long, &ask).await;
    world.ledger().resolve(held, world.resolve(Outcome::Unknown, &[], Some(500))).await.unwrap();
    let held = world.held(short, &ask).await;
    let resolve = world.resolve(Outcome::Spent { minor: 100 }, &["ch_k"], Some(200));
    world.ledger().resolve(held, resolve).await.unwrap();
    for _ in 0..3 {
        world.pass(DAY_MS);
        world.ledger().tick().await.unwrap();
    }
    let again = world.admit(long, &ask).await.unwrap();
    assert!(matches!(again, Admitted::Replay { .. }), "{again:?}");
}

/// A step is bounded, so that no call waits for long; whoever ticks is told that there is more.
#[tokio::test]
async fn a_tick_does_not_do_everything_at_once() {
    let mut world = World::new(in_memory());
    world.restart_with(|opening| opening.audit_days = 10).unwrap();
    for n in 0..2_400 {
        let customer = Some(format!("cus_{n}"));
        world.record(Entry { event: Event::Forwarded, customer, ..Entry::default() }).await;
    }
    let found = |world: &World, n: u32| {
        let equal = vec![("customer", format!("cus_{n}"))];
        world.audit(&AuditFilter { equal, ..AuditFilter::default() }).len()
    };
    for left in [Ticked::Lags, Ticked::Done] {
        assert_eq!(world.ledger().tick().await.unwrap(), left, "of 2,401 records to index");
        assert_eq!([found(&world, 0), found(&world, 2_399), found(&world, 2_400)], [1, 1, 0]);
    }
    world.pass(11 * DAY_MS);
    for (left, kept) in [(Ticked::Lags, 401), (Ticked::Done, 1)] {
        assert_eq!(world.ledger().tick().await.unwrap(), left, "of 2,400 records to drop");
        assert_eq!(world.log().len(), kept);
        assert_eq!([found(&world, 0), found(&world, 2_399)], [0, 1]);
    }
    world.check();
}

/// What no collector has acknowledged is kept, however old.
#[tokio::test]
async fn old_records_wait_for_the_collector() {
    let mut world = World::new(in_memory());
    let ships = |opening: &mut keybrake::ledger::Opening| (opening.audit_days, opening.ships) = (10, true);
    world.restart_with(ships).unwrap();
    let key = world.key("k", |_| ()).await;
    world.charged(key, "a", 100).await;
    let all = world.log();
    world.pass(20 * DAY_MS);
    world.ledger().tick().await.unwrap();
    assert_eq!(world.log(), all, "nobody has them");
    world.ledger().shipped(2).await.unwrap();
    world.restart_with(ships).unwrap();
    world.ledger().tick().await.unwrap();
    assert_eq!(world.log(), all[2..], "the first two are elsewhere");
    world.check();
}

/// A chain that follows another one in the same ledger is verified over to it, stored and exported.
#[tokio::test]
async fn a_loss_is_accepted_once_and_a_new_chain_follows() {
    let mut world = World::new(in_memory());
    let key = world.key("k", |_| ()).await;
    world.charged(key, "a", 100).await;
    let fresh = |n: u8| keybrake::id::LedgerId::new(START, [n; 10]);
    let accept = async |world: &World, n| {
        world.ledger().accept_loss(fresh(n), "a test".to_owned(), admin()).await.unwrap()
    };
    assert!(!accept(&world, 1).await, "nothing is lost");
    world.ledger().note_loss(99).await.unwrap();
    let lost = world.admit(key, &Ask::charge("b", 100)).await;
    assert!(matches!(lost, Err(LedgerError::Lost)), "{lost:?}");
    world.restart();
    let lost = world.admit(key, &Ask::charge("a", 100)).await;
    assert!(matches!(lost, Err(LedgerError::Lost)), "{lost:?}");
    assert!(accept(&world, 2).await && !accept(&world, 3).await);
    world.restart();
    world.charged(key, "b", 100).await;
    let log = world.log();
    let seqs: Vec<u64> = log.iter().map(|record| record["seq"].as_u64().unwrap()).collect();
    assert_eq!(seqs, [1, 2, 3, 4, 1, 2, 3]);
    assert_eq!(
        (&log[4]["chain_id"], &log[4]["ledger_id"]),
        (&json!(fresh(2).to_string()), &log[0]["ledger_id"])
    );
    assert_eq!(
        log[4]["detail"]["before"],
        json!({"chain_id": log[0]["chain_id"], "seq": 4, "collector_seq": 99})
    );
    world.check();
    let mut exported = keybrake::audit::Verifier::default();
    for record in &log {
        exported.follow_json(record).unwrap();
    }
    assert_eq!(exported.records(), 7);
    let mut cut = keybrake::audit::Verifier::default();
    let broken =
        log.iter().enumerate().filter(|(at, _)| *at != 3).try_for_each(|(_, record)| cut.follow_json(record));
    assert!(broken.is_err(), "the old chain's end is missing");
}

/// A script that never asks the same twice does not fill the log.
#[tokio::test]
async fn refusals_of_one_key_are_told_apart_within_bounds() {
    let world = World::new(in_memory());
    let key = world.key("k", |_| ()).await;
    let refused = async |n: u64| {
        let customer = Some(format!("cus_{n}"));
        let facts =
            Facts { request_id: format!("req_{n}"), method: "POST".to_owned(), customer, ..Facts::default() };
        let no = Refusal::new(Code::EndpointNotAllowed, "no");
        world.ledger().refused(key, facts, no, 3).await.unwrap();
    };
    let before = world.log().len();
    for n in 0..100 {
        refused(n).await;
    }
    assert_eq!(world.log().len() - before, 31, "thirty, and the first of the others");
    refused(5).await;
    world.pass(60_000);
    world.ledger().tick().await.unwrap();
    let log = world.log();
    let counted: Vec<(&Value, &Value, &Value)> =
        log[before + 31..].iter().map(|one| (&one["count"], &one["customer"], &one["flags"])).collect();
    let told = [(&json!(1), &json!("cus_5"), &Value::Null), (&json!(69), &Value::Null, &json!(["others"]))];
    assert_eq!(counted, told);
    refused(7).await;
    assert_eq!(world.log().len(), log.len() + 1, "the next minute begins anew");
    world.check();
}
