//! Records of reads: nobody waits for them, they cost next to no commits, and what a power cut takes is bounded.

use std::sync::Arc;
use std::time::Duration;

use keybrake::audit::{Entry, Event};
use keybrake::hold::Facts;
use keybrake::id::KeyId;
use keybrake::ledger::LedgerError;
use keybrake::ledger::notes::{NOTES_WAIT_MS, NOTES_WAITING_MAX, Note};
use keybrake::refusal::{Code, Refusal};
use tokio::time::{Instant, timeout};

use crate::ledger::backend::File;
use crate::ledger::world::World;
use crate::support::PATIENCE;

/// Long enough for everything that does not wait.
const AT_ONCE: Duration = Duration::from_millis(300);

fn world_of(file: &File) -> World {
    let file = file.clone();
    World::new(Arc::new(move |opening| file.ledger(opening)))
}

fn read(n: usize) -> Note {
    let request_id = Some(format!("req_{n}"));
    Note::Record(Box::new(Entry { event: Event::Forwarded, request_id, ..Entry::default() }))
}

fn refused(key_id: KeyId, endpoint: &str) -> Note {
    let facts = Facts { method: "GET".into(), endpoint: endpoint.into(), ..Facts::default() };
    let refusal = Box::new(Refusal::new(Code::EndpointNotAllowed, "no"));
    Note::Refused { key_id, facts: Box::new(facts), refusal, duration_ms: 1 }
}

/// The reads that the log tells of, in its order.
fn reads(world: &World) -> Vec<String> {
    let log = world.log();
    let of_reads = log.iter().filter(|record| record["event"] == "forwarded");
    of_reads.map(|record| record["request_id"].as_str().unwrap().to_owned()).collect()
}

fn ids(count: usize) -> Vec<String> {
    (0..count).map(|n| format!("req_{n}")).collect()
}

#[tokio::test]
async fn a_thousand_reads_are_a_handful_of_commits() {
    let file = File::recording();
    let world = world_of(&file);
    let before = file.syncs();
    for n in 0..1_000 {
        world.ledger().note(read(n)).await.unwrap();
    }
    world.ledger().flush().await.unwrap();
    let syncs = file.syncs() - before;
    // Full batches of 256 are four commits; a machine that stalls for a tenth of a second makes one more of it.
    assert!((1..=100).contains(&syncs), "{syncs} syncs");
    assert_eq!(reads(&world), ids(1_000), "all of them, in order");
    assert_eq!(world.ledger().notes_lost(), 0);
    world.check();
}

#[tokio::test]
async fn a_read_is_recorded_by_itself_before_long_and_sooner_beside_money() {
    let file = File::recording();
    let world = world_of(&file);
    let key = world.key("k", |_| ()).await;
    let asked = Instant::now();
    world.ledger().note(read(0)).await.unwrap();
    assert_eq!(reads(&world), [""; 0], "nobody waited");
    while reads(&world).is_empty() {
        assert!(asked.elapsed() < PATIENCE, "it is never written");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(asked.elapsed() >= Duration::from_millis(NOTES_WAIT_MS), "no commit of its own at once");
    let before = file.syncs();
    // As many refusals as are told apart in a minute.
    for n in 0..30 {
        for at in 0..10 {
            world.ledger().note(read(1 + n * 10 + at)).await.unwrap();
        }
        world.ledger().note(refused(key, &format!("/v1/charges/ch_{n}"))).await.unwrap();
        world.charged(key, &n.to_string(), 1).await;
    }
    // A commit is one sync, and two where the file grows.
    let syncs = file.syncs() - before;
    assert!((60..=140).contains(&syncs), "{syncs} syncs for 60 commits of money and 330 reads");
    assert_eq!(reads(&world), ids(301));
    let refusals = world.log().iter().filter(|record| record["event"] == "refused").count();
    assert_eq!(refusals, 30);
    world.check();
}

#[tokio::test]
async fn too_many_reads_wait_for_room_and_none_is_dropped() {
    let file = File::default();
    let world = world_of(&file);
    file.hang(true);
    for n in 0..NOTES_WAITING_MAX {
        timeout(PATIENCE, world.ledger().note(read(n)))
            .await
            .unwrap_or_else(|_| panic!("no room for {n}"))
            .unwrap();
    }
    let one_more = world.ledger().note(read(NOTES_WAITING_MAX));
    tokio::pin!(one_more);
    assert!(timeout(AT_ONCE, &mut one_more).await.is_err(), "more than may be lost were taken");
    file.hang(false);
    timeout(PATIENCE, one_more).await.expect("there is room").unwrap();
    world.ledger().flush().await.unwrap();
    assert_eq!(reads(&world), ids(NOTES_WAITING_MAX + 1));
    world.check();
}

/// What the file holds at any moment is what a power cut would leave.
#[tokio::test]
async fn a_power_cut_takes_the_last_reads_and_nothing_else() {
    let file = File::default();
    let mut world = world_of(&file);
    let key = world.key("k", |_| ()).await;
    for n in 0..300 {
        world.ledger().note(read(n)).await.unwrap();
    }
    world.charged(key, "paid", 100).await;
    for n in 300..600 {
        world.ledger().note(read(n)).await.unwrap();
    }
    // A commit that is under way would not be whole yet.
    file.hang(true);
    let image = File::of(file.image());
    file.hang(false);
    world.ledger().flush().await.unwrap();
    let after_cut = world.beside(Arc::new(move |opening| image.ledger(opening)));
    after_cut.check();
    let kept = reads(&after_cut);
    assert!((300..=600).contains(&kept.len()), "those before the money came with it: {}", kept.len());
    assert_eq!(kept, ids(kept.len()), "only the last ones are missing");
    let spent = after_cut.log().iter().any(|record| record["outcome"] == "spent");
    assert!(spent, "money was told, so it is there");
    world.restart();
    assert_eq!(reads(&world), ids(600));
}

#[tokio::test]
async fn what_could_not_be_written_is_counted() {
    let file = File::default();
    let world = world_of(&file);
    let key = world.key("k", |_| ()).await;
    world.ledger().note(read(0)).await.unwrap();
    world.ledger().flush().await.unwrap();
    file.fail_after(0);
    for n in 1..=3 {
        world.ledger().note(read(n)).await.unwrap();
    }
    world.ledger().note(refused(key, "/v1/balance")).await.unwrap();
    assert!(world.ledger().flush().await.is_err());
    assert_eq!(world.ledger().notes_lost(), 4);
    // From now on whoever reads is told, so nothing more is lost in silence.
    let refused = world.ledger().note(read(4)).await;
    assert!(matches!(refused, Err(LedgerError::Unavailable(_))), "{refused:?}");
    assert_eq!(world.ledger().notes_lost(), 4);
}
