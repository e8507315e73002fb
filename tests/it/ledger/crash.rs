//! Crashes: a history is recorded write by write. At every sync the process dies, the writes since the sync before
//! survive in several ways, and what can be opened then must be what was told, or one command further.
//!
//! `KEYBRAKE_TEST_CRASH_STEP` looks at every so many of the syncs only.

use std::collections::BTreeMap;
use std::sync::Arc;

use keybrake::call::{Call, CallState};
use keybrake::hold::{Hold, HoldState};
use keybrake::id::{CallId, HoldId, hex};
use keybrake::key::Status;
use keybrake::ledger::Admitted;
use keybrake::ledger::query::{CallFilter, KeyFilter};
use keybrake::money::MicroUsd;
use serde_json::{Map, Value};

use crate::ledger::backend::{File, Image, Op, put};
use crate::ledger::table::Run;
use crate::ledger::world::{Place, World};

/// What is done, a command at a time; the words are those of [`crate::ledger::table`].
const HISTORY: &str = "
    key z
    key k daily=50 out=9
    key c content
    key o
    k charge a 600
    answer a moved 600 ch_a
    k charge b 500
    answer b silence
    k charge b 500
    answer b moved 500 ch_b
    k charge d 400
    answer d declined
    k charge d 400
    answer d moved 400 ch_d
    k charge e 300
    answer e not_sent
    c charge x 200
    answer x declined
    c charge x 200 source=new
    c charge y 100
    answer x moved 200 ch_x
    k intent f 700
    answer f pending 700 pi_f
    k confirm g pi_f
    answer g pending 700 pi_f ch_f
    z increment h pi_f 900
    answer h pending 900 pi_f
    restart
    z capture i pi_f 800
    k charge a 600
    answer i moved 800 pi_f
    k charge a 700
    k charge a 9900
    k refund r ch_a 100
    answer r pending 100 re_r
    observe re_r moved 100
    k intent j 300
    answer j pending 300 pi_j
    k confirm l pi_j
    answer l silence
    observe pi_j ended
    pass 2m
    tick
    o charge m 100
    answer m moved 150 ch_m
    revoke c
    k charge n 100
    restart
    k charge n 100
    k charge p 100
    k charge q 100
    answer p moved 100 ch_p
    tick";

/// What a reader can see.
#[derive(Clone, Debug, Default, PartialEq)]
struct Picture {
    calls: BTreeMap<CallId, (CallState, u32, Option<CallState>)>,
    holds: BTreeMap<HoldId, (&'static str, MicroUsd)>,
    keys: Vec<(String, String)>,
}

/// What was told when a command was answered.
struct Mark {
    line: &'static str,
    /// How many writes and syncs had happened.
    log_len: usize,
    picture: Picture,
    records: Vec<String>,
}

/// How the writes after the last sync survive.
#[derive(Clone, Copy, Debug)]
enum Survival {
    None,
    All,
    Odd,
    Even,
    FirstHalf,
    Last,
    TornLast,
    TornAll,
}

const SURVIVALS: [Survival; 8] = [
    Survival::None,
    Survival::All,
    Survival::Odd,
    Survival::Even,
    Survival::FirstHalf,
    Survival::Last,
    Survival::TornLast,
    Survival::TornAll,
];

#[tokio::test]
async fn a_crash_at_any_sync_loses_nothing_that_was_told() {
    let file = File::recording();
    let mut world = World::new(place_of(&file));
    let mut run = Run::default();
    let mut marks = vec![mark_of(&world, &file, "")];
    for line in HISTORY.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let words: Vec<&str> = line.split_whitespace().collect();
        run.execute(&mut world, &words).await;
        marks.push(mark_of(&world, &file, line));
    }
    let given = std::env::vars_os().find(|(name, _)| name == "KEYBRAKE_TEST_CRASH_STEP");
    let step = given.and_then(|(_, step)| step.to_str()?.parse().ok()).unwrap_or(1);
    let log = file.log();
    let (mut durable, mut pending) = (Image::default(), Vec::new());
    let (mut n, mut images) = (0, 0);
    for (at, op) in log.iter().map(Some).chain([None]).enumerate() {
        if let Some(op @ (Op::Write { .. } | Op::SetLen(..))) = op {
            pending.push(op);
            continue;
        }
        for survival in SURVIVALS {
            if n % step == 0 && (!pending.is_empty() || matches!(survival, Survival::None)) {
                let image = image_of(&durable, &pending, survival);
                let told = marks.iter().rposition(|mark| mark.log_len <= at);
                let what = format!("sync {n}, {survival:?}");
                // A file gets its name when it is whole, so nobody meets an earlier image.
                let Some(told) = told else { continue };
                check(&world, &run, image, &marks[told..], &what).await;
                images += 1;
            }
        }
        // A sync keeps what was written to its own file.
        pending.retain(|written| {
            let kept = op.is_some_and(|op| op.part() == written.part());
            if kept {
                apply(&mut durable, written);
            }
            !kept
        });
        n += 1;
    }
    // How many there are follows from how the store lays out its writes; far fewer would mean that nothing is swept.
    assert!(images > 400 / step, "{images} images");
}

fn place_of(file: &File) -> Place {
    let file = file.clone();
    Arc::new(move |opening| file.ledger(opening))
}

fn image_of(durable: &Image, pending: &[&Op], survival: Survival) -> Image {
    let mut image = durable.clone();
    let last = pending.len().saturating_sub(1);
    for (n, op) in pending.iter().enumerate() {
        let (survives, torn) = match survival {
            Survival::None => (false, false),
            Survival::All => (true, false),
            Survival::Odd => (n % 2 == 1, false),
            Survival::Even => (n % 2 == 0, false),
            Survival::FirstHalf => (n < pending.len() / 2, false),
            Survival::Last => (n == last, false),
            Survival::TornLast => (true, n == last),
            Survival::TornAll => (true, true),
        };
        match op {
            _ if !survives => {}
            Op::Write { part, offset, data } if torn => {
                put(image.part(*part), *offset, &data[..data.len() / 2]);
            }
            Op::Write { .. } | Op::SetLen(..) | Op::Sync(_) => apply(&mut image, op),
        }
    }
    image
}

fn apply(image: &mut Image, op: &Op) {
    match op {
        Op::Write { part, offset, data } => put(image.part(*part), *offset, data),
        Op::SetLen(part, len) => image.part(*part).resize(*len, 0),
        Op::Sync(_) => {}
    }
}

/// Opens an image. `marks` begins with the last command that was answered; the next may or may not be there.
async fn check(world: &World, run: &Run, image: Image, marks: &[Mark], what: &str) {
    let file = File::of(image);
    let after = world.beside(place_of(&file));
    let (picture, records) = (picture_of(&after), after.log());
    let is = |mark: &&Mark| mark.picture == picture && continues(&records, &mark.records);
    let Some(mark) = marks.iter().take(2).find(is) else {
        let Mark { line, picture: told, .. } = &marks[0];
        panic!("{what}: after '{line}'\n{picture:#?}\nis neither\n{told:#?}\nnor the next");
    };
    // A part of the answers, another one for each image.
    let answers: BTreeMap<_, _> = run.bodies.iter().collect();
    for (call, body) in answers.into_iter().skip(what.len() % 4).step_by(4) {
        let Some((CallState::Spent | CallState::Open, ..)) = mark.picture.calls.get(call) else { continue };
        let (key, ask) = &run.asked[call];
        let now = after.ledger().now();
        if after.reads().key(*key).unwrap().is_some_and(|key| key.status(now) == Status::Active) {
            match after.admit(*key, ask).await.unwrap() {
                Admitted::Replay { answer, .. } => assert_eq!(answer.body, *body, "{what}"),
                other @ (Admitted::Held(_)
                | Admitted::Refused(_)
                | Admitted::Look(_)
                | Admitted::Elsewhere
                | Admitted::Tell(_)) => {
                    panic!("{what}: {ask:?} got {other:?}")
                }
            }
        }
    }
    if after.reads().key(run.keys["z"]).unwrap().is_some() {
        after.charged(run.keys["z"], "afterwards", 100).await;
    }
    after.check();
}

/// The records that were told, and after them none but those of the restart.
fn continues(records: &[Map<String, Value>], told: &[String]) -> bool {
    let (before, since) = records.split_at(told.len().min(records.len()));
    let hashes = before.iter().map(|record| record["hash"].as_str().unwrap());
    hashes.eq(told.iter().map(String::as_str))
        && since.iter().all(|record| record["flags"].to_string().contains("restart"))
}

fn mark_of(world: &World, file: &File, line: &'static str) -> Mark {
    // Not by a query of the log, which takes everything into the tree first.
    let records = world.reads().records_after(0, usize::MAX, usize::MAX).unwrap();
    let records = records.iter().map(|(_, sealed)| hex(&sealed.hash)).collect();
    Mark { line, log_len: file.log_len(), picture: picture_of(world), records }
}

/// What is being sent is a doubt for whoever starts next.
fn picture_of(world: &World) -> Picture {
    let reads = world.reads();
    let calls: Vec<Call> = reads.calls(&CallFilter::default(), None, 1_000).unwrap().items;
    let holds = calls.iter().flat_map(|call| call.attempts.iter().map(|attempt| attempt.hold_id));
    let shown = |hold: Hold| match hold.state {
        HoldState::Sending { .. } => (hold.id, ("doubt", hold.usd)),
        HoldState::Open | HoldState::Doubt | HoldState::Spent | HoldState::Void => {
            (hold.id, (hold.state.as_str(), hold.usd))
        }
    };
    let holds = holds.map(|id| shown(world.hold(id))).collect();
    let of_call = |call: &Call| {
        let state = if call.state == CallState::InFlight { CallState::Doubt } else { call.state };
        let last = call.last_attempt().unwrap();
        (call.id, (state, last.n, last.end))
    };
    let now = world.ledger().now();
    let keys = reads.keys(&KeyFilter::default(), None, 100, now).unwrap().items;
    let keys = keys.iter().map(|key| (key.label.clone(), key.status(now).as_str().to_owned())).collect();
    Picture { calls: calls.iter().map(of_call).collect(), holds, keys }
}
