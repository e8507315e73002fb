//! Every state of a call and its hold against everything that can happen to it. What comes out is the table in
//! `src/ledger/rules/states.md`, which the documentation of the rules shows; another table than that one fails, and
//! `UPDATE_EXPECT=1` rewrites it.

use std::fmt::Write as _;
use std::sync::Arc;

use keybrake::call::{Outcome, Reading, Record, conclude};
use keybrake::hold::Facts;
use keybrake::id::{CallId, KeyId};
use keybrake::key::Idempotency;
use keybrake::ledger::rules::resolve::{EndDoubt, Known};
use keybrake::ledger::{Admitted, Ending, Held};
use keybrake::time::{DAY_MS, HOUR_MS};
use serde_json::Map;

use crate::ledger::backend::File;
use crate::ledger::world::{Ask, Deed, World, admin};

/// The object of every call here.
const OBJECT: &str = "pi_1";
const MINOR: u64 = 600;
const MOVED: Reading = Reading::Moved { minor: MINOR };
const PENDING: Reading = Reading::Pending { minor: MINOR };

/// Where a call stands before something happens.
#[derive(Clone, Copy)]
enum State {
    Unknown,
    Sending,
    Doubt,
    Resending,
    Open,
    Spent,
    Told,
    Declined,
    Refused,
    NotExecuted,
    Forgotten,
}

/// What happens.
#[derive(Clone)]
enum Event {
    /// The same request, after so many hours.
    Asked(u64),
    AskedForOther,
    Answer(Reading),
    /// The same with `Idempotent-Replayed`.
    Repeated(Reading),
    Record(Record),
    Found(Outcome),
    Executed,
    NotExecuted,
    Forget,
    Restart,
    Time,
}

const STATES: [(State, &str); 11] = [
    (State::Unknown, "not known"),
    (State::Sending, "sent first"),
    (State::Doubt, "in doubt"),
    (State::Resending, "sent again"),
    (State::Open, "open"),
    (State::Spent, "spent"),
    (State::Told, "spent, answer never seen"),
    (State::Declined, "declined"),
    (State::Refused, "refused"),
    (State::NotExecuted, "not executed"),
    (State::Forgotten, "forgotten"),
];

const EVENTS: [(Event, &str); 28] = [
    (Event::Asked(0), "the same call"),
    (Event::Asked(2), "the same call, 2 hours later"),
    (Event::Asked(24), "the same call, a day later"),
    (Event::AskedForOther, "the same identity with another amount"),
    (Event::Answer(MOVED), "2xx, final"),
    (Event::Answer(PENDING), "2xx, not final"),
    (Event::Answer(Reading::NotMoved), "2xx, failed or canceled"),
    (Event::Answer(Reading::Declined), "402"),
    (Event::Answer(Reading::Invalid), "400, 403 or 404"),
    (Event::Repeated(Reading::Invalid), "the same, marked as repeated"),
    (Event::Answer(Reading::KeyMismatch), "400 `idempotency_error`"),
    (Event::Answer(Reading::OwnKeyRefused), "401, or 403 about our own key"),
    (Event::Answer(Reading::Throttled), "429"),
    (Event::Answer(Reading::Unclear { is_5xx: false }), "409, 424, not readable"),
    (Event::Answer(Reading::Unclear { is_5xx: true }), "5xx"),
    (Event::Repeated(Reading::Unclear { is_5xx: true }), "5xx, marked as repeated"),
    (Event::Answer(Reading::NotSent), "nothing was sent"),
    (Event::Answer(Reading::Silence), "no whole answer"),
    (Event::Record(Record::Moved { minor: MINOR }), "the object's record: moved"),
    (Event::Record(Record::Ended), "the object's record: failed or canceled"),
    (Event::Found(Outcome::Spent { minor: MINOR }), "recovery finds it: moved"),
    (Event::Found(Outcome::Pending { minor: MINOR }), "recovery finds it: not final"),
    (Event::Found(Outcome::Declined), "recovery finds it: failed or canceled"),
    (Event::Executed, "an operator: spent"),
    (Event::NotExecuted, "an operator: not executed"),
    (Event::Forget, "an operator: forget"),
    (Event::Restart, "a restart"),
    (Event::Time, "30 days"),
];

/// One call, in a state.
struct Cell {
    world: World,
    key: KeyId,
    held: Option<Held>,
    call: Option<CallId>,
}

fn ask(minor: u64) -> Ask {
    Ask { deed: Deed::Intent, ..Ask::charge("a", minor) }
}

impl Cell {
    async fn new(state: State, by_content: bool) -> Self {
        let file = File::default();
        let world = World::new(Arc::new(move |opening| file.ledger(opening)));
        let key = world.key("k", |key| {
            if by_content {
                key.idempotency = Idempotency::Content { scope: "billing:1".to_owned(), fields: Vec::new() };
            }
        });
        let key = key.await;
        let mut cell = Self { world, key, held: None, call: None };
        if matches!(state, State::Unknown) {
            return cell;
        }
        cell.send().await;
        match state {
            State::Unknown | State::Sending => {}
            State::Doubt => cell.answer(&Reading::Silence, false).await,
            State::Resending => {
                cell.answer(&Reading::Silence, false).await;
                cell.send().await;
            }
            State::Open => cell.answer(&PENDING, false).await,
            State::Spent => cell.answer(&MOVED, false).await,
            State::Told => {
                cell.answer(&Reading::Silence, false).await;
                assert!(cell.end_doubt(Known::Executed { minor: MINOR }, true).await);
            }
            State::Declined => cell.answer(&Reading::Declined, false).await,
            State::Refused => cell.answer(&Reading::Invalid, false).await,
            State::NotExecuted => {
                cell.answer(&Reading::Silence, false).await;
                assert!(cell.end_doubt(Known::NotExecuted, true).await);
            }
            State::Forgotten => {
                cell.answer(&MOVED, false).await;
                assert!(cell.forget().await);
            }
        }
        cell
    }

    async fn send(&mut self) {
        let held = self.world.held(self.key, &ask(MINOR)).await;
        self.call = Some(held.call_id());
        self.held = Some(held);
    }

    async fn answer(&mut self, reading: &Reading, repeated: bool) {
        let held = self.held.take().unwrap();
        let outcome = conclude(reading, held.first_send(), repeated, held.basis());
        let objects = if has_object(outcome) { &[OBJECT][..] } else { &[] };
        let resolve = self.world.resolve(outcome, objects, Some(200));
        self.world.ledger().resolve(held, resolve).await.unwrap();
    }

    async fn end_doubt(&self, outcome: Known, by_operator: bool) -> bool {
        let hold = self.world.call(self.call.unwrap()).hold_id;
        let (objects, answer) = match outcome {
            Known::Record(found) => (&[OBJECT][..], self.world.resolve(found, &[], Some(200)).answer),
            Known::Executed { .. } => (&[OBJECT][..], None),
            Known::NotExecuted => (&[][..], None),
        };
        let objects = objects.iter().map(|object| (*object).to_owned()).collect();
        let actor = by_operator.then(|| "admin".to_owned());
        let end = EndDoubt { outcome, objects, answer, actor, evidence: Map::new() };
        self.world.ledger().end_doubt(hold, end).await.unwrap() == Ending::Ended
    }

    async fn forget(&self) -> bool {
        let call = self.call.unwrap();
        let done = self.world.ledger().forget_call(call, "a test".to_owned(), admin());
        done.await.unwrap().is_some()
    }

    async fn asks(&mut self, minor: u64) -> String {
        let before = self.call.map(|id| self.world.call(id).attempts.len());
        match self.world.admit(self.key, &ask(minor)).await.unwrap() {
            Admitted::Held(held) => {
                let call = self.world.call(held.call_id());
                match before {
                    None => "sent".to_owned(),
                    Some(_) if self.call != Some(call.id) => "sent as a new call".to_owned(),
                    Some(before) if call.attempts.len() == before => "sent again, the same key".to_owned(),
                    Some(_) => {
                        let keys: Vec<_> = call.attempts.iter().map(|one| &one.upstream_key).collect();
                        let [.., last, new] = keys.as_slice() else { panic!("{keys:?}") };
                        let key = if last == new { "the same" } else { "a new" };
                        format!("next attempt, {key} key")
                    }
                }
            }
            Admitted::Replay { .. } => "replayed".to_owned(),
            Admitted::Tell(_) => "told its object".to_owned(),
            Admitted::Refused(refusal) => format!("`{}`", refusal.code.as_str()),
            Admitted::Look(_) => panic!("nothing is read for a creation"),
            Admitted::Elsewhere => panic!("it was not asked to wait"),
        }
    }

    /// Where hold and call stand.
    fn stands(&self) -> String {
        let call = self.world.call(self.call.unwrap());
        let hold = self.world.hold(call.hold_id);
        format!("{}, {}", hold.state.as_str(), call.state.as_str())
    }

    /// What an event comes to.
    async fn meets(&mut self, event: Event) -> String {
        let before = self.call.map(|_| self.stands());
        match event {
            Event::Asked(hours) => {
                self.world.pass(hours * HOUR_MS);
                return self.asks(MINOR).await;
            }
            Event::AskedForOther => return self.asks(MINOR + 100).await,
            Event::Answer(reading) => self.answer(&reading, false).await,
            Event::Repeated(reading) => self.answer(&reading, true).await,
            Event::Record(record) => {
                let seen = self.world.ledger();
                seen.observe(String::new(), OBJECT.to_owned(), Facts::default(), record).await.unwrap();
            }
            Event::Found(outcome) => drop(self.end_doubt(Known::Record(outcome), false).await),
            Event::Executed => drop(self.end_doubt(Known::Executed { minor: MINOR }, true).await),
            Event::NotExecuted => drop(self.end_doubt(Known::NotExecuted, true).await),
            Event::Forget => drop(self.forget().await),
            Event::Restart => {
                self.held = None;
                self.world.restart();
            }
            Event::Time => {
                self.world.pass(30 * DAY_MS);
                self.world.ledger().tick().await.unwrap();
            }
        }
        self.world.check();
        let after = self.stands();
        if before.as_ref() == Some(&after) { "stays".to_owned() } else { after }
    }
}

/// Who has nothing on the way gets no answer: the value that proves a hold is consumed by the first one.
fn can_happen(state: State, event: &Event) -> bool {
    match event {
        Event::Asked(_) | Event::AskedForOther => true,
        Event::Answer(_) | Event::Repeated(_) => matches!(state, State::Sending | State::Resending),
        Event::Record(_)
        | Event::Found(_)
        | Event::Executed
        | Event::NotExecuted
        | Event::Forget
        | Event::Restart
        | Event::Time => !matches!(state, State::Unknown),
    }
}

fn has_object(outcome: Outcome) -> bool {
    match outcome {
        Outcome::Spent { .. } | Outcome::Pending { .. } => true,
        Outcome::Declined | Outcome::Refused | Outcome::TurnedAway | Outcome::NotSent | Outcome::Unknown => {
            false
        }
    }
}

async fn table(by_content: bool) -> String {
    let names: Vec<&str> = STATES.iter().map(|(_, name)| *name).collect();
    let mut table =
        format!("| what happens | {} |\n|{}\n", names.join(" | "), "---|".repeat(names.len() + 1));
    for (event, name) in EVENTS {
        let mut row = format!("| {name} |");
        for (state, _) in STATES {
            if can_happen(state, &event) {
                let told = Cell::new(state, by_content).await.meets(event.clone()).await;
                write!(row, " {told} |").unwrap();
            } else {
                row += " · |";
            }
        }
        table += &row;
        table.push('\n');
    }
    table
}

#[tokio::test]
async fn every_state_meets_every_event() {
    let (of_caller, of_content) = (table(false).await, table(true).await);
    let text = format!(
        "Under a caller's key (`required`, `client`):\n\n{of_caller}\nIn `content` mode:\n\n{of_content}"
    );
    expect_test::expect_file!["../../../src/ledger/rules/states.md"].assert_eq(&text);
}
