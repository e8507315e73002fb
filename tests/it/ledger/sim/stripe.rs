//! A Stripe without sockets that executes each key once in a day, loses answers and declines cards.

use std::collections::{BTreeMap, HashMap};

use keybrake::call::Reading;
use keybrake::hold::{ExactRequest, Lane};
use keybrake::intent::Seen;
use keybrake::money::{Currency, Money};
use keybrake::time::DAY_MS;

use crate::dice::Dice;
use crate::ledger::world::STAMP_PARAM;

/// How long this Stripe remembers a key: no longer than it promises.
const REMEMBERS_MS: u64 = DAY_MS;

/// What Stripe has of an object.
#[derive(Clone, Debug)]
pub(super) struct Object {
    pub(super) minor: u64,
    pub(super) state: State,
}

impl Object {
    /// What a read of it tells.
    pub(super) fn record(&self) -> Seen {
        Seen {
            ceiling: Some(Money { minor: self.minor, currency: Currency::USD }),
            currency: Some(Currency::USD),
            moved: if self.state == State::Moved { self.minor } else { 0 },
            customer: None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Unconfirmed,
    Authorized,
    Moved,
    Canceled,
}

/// What Stripe said under a key.
#[derive(Clone, Debug)]
struct Said {
    at: u64,
    request: (String, Vec<(String, String)>),
    answer: Answer,
}

#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) reading: Reading,
    pub(super) objects: Vec<String>,
    pub(super) replayed: bool,
}

/// Money that moved, or an object that now stands for money.
#[derive(Clone, Debug)]
pub(super) struct Executed {
    pub(super) object: String,
    pub(super) lane: Lane,
    /// What moved.
    pub(super) minor: u64,
}

/// A Stripe that executes each key once in 24 hours, and no longer remembers it afterwards.
#[derive(Default)]
pub(super) struct Stripe {
    keys: HashMap<String, Said>,
    /// How many answers it has stored.
    pub(super) stored: u64,
    pub(super) objects: BTreeMap<String, Object>,
}

impl Stripe {
    pub(super) fn send(
        &mut self,
        dice: &mut Dice,
        request: &ExactRequest,
        at: u64,
    ) -> (Answer, Option<Executed>) {
        // Turned away at the door, which says nothing about what was let in before.
        match dice.below(100) {
            0..4 => return (plain(Reading::Throttled), None),
            4..8 => return (plain(Reading::Invalid), None),
            _ => {}
        }
        let key = request.idempotency_key.clone().unwrap();
        let compared = (request.path.clone(), request.params.clone());
        let said = self.keys.get(&key).filter(|said| at < said.at + REMEMBERS_MS);
        match said {
            Some(said) if said.request == compared => {
                return (Answer { replayed: true, ..said.answer.clone() }, None);
            }
            Some(_) => return (plain(Reading::KeyMismatch), None),
            None => {}
        }
        let (answer, executed) = self.execute(dice, request);
        self.stored += 1;
        self.keys.insert(key, Said { at, request: compared, answer: answer.clone() });
        (answer, executed)
    }

    /// When the answer that it still remembers under a key was stored.
    pub(super) fn stored_at(&self, key: &str, now: u64) -> Option<u64> {
        self.keys.get(key).map(|said| said.at).filter(|at| now < at + REMEMBERS_MS)
    }

    /// Whether a request differs from the one that it remembers in more than the sidecar's own mark.
    pub(super) fn differs(&self, request: &ExactRequest) -> bool {
        let own = |params: &[(String, String)]| -> Vec<(String, String)> {
            params.iter().filter(|(name, _)| name != STAMP_PARAM).cloned().collect()
        };
        let said = &self.keys[request.idempotency_key.as_deref().unwrap()].request;
        said.0 != request.path || own(&said.1) != own(&request.params)
    }

    fn execute(&mut self, dice: &mut Dice, request: &ExactRequest) -> (Answer, Option<Executed>) {
        if dice.percent(6) {
            return (plain(Reading::Unclear { is_5xx: true }), None);
        }
        let param = |name: &str| {
            let found = request.params.iter().find(|(found, _)| found == name);
            found.map(|(_, value)| value.clone())
        };
        let amount = param("amount").map(|text| text.parse::<u64>().unwrap());
        let words: Vec<&str> = request.path.split('/').skip(2).collect();
        let (answer, executed) = match words.as_slice() {
            ["charges" | "payment_intents"] if dice.percent(15) => (plain(Reading::Declined), None),
            ["charges"] => self.create(dice, "ch", amount.unwrap(), State::Moved),
            ["payment_intents"] => self.create(dice, "pi", amount.unwrap(), State::Unconfirmed),
            ["payment_intents", object, verb] => self.act(dice, object, verb, amount),
            ["refunds"] => self.refund(&param("charge").unwrap(), amount.unwrap()),
            other => panic!("{other:?}"),
        };
        if executed.is_some() && dice.percent(4) {
            return (plain(Reading::Unclear { is_5xx: true }), executed);
        }
        (answer, executed)
    }

    fn create(
        &mut self,
        dice: &mut Dice,
        prefix: &str,
        minor: u64,
        state: State,
    ) -> (Answer, Option<Executed>) {
        let over = if state == State::Moved && dice.percent(2) { 50 } else { 0 };
        let minor = minor + over;
        let object = format!("{prefix}_{}", self.objects.len());
        self.objects.insert(object.clone(), Object { minor, state });
        let reading = said_of(state, minor);
        let moved = if state == State::Moved { minor } else { 0 };
        let executed = Executed { object: object.clone(), lane: Lane::In, minor: moved };
        (Answer { reading, objects: vec![object], replayed: false }, Some(executed))
    }

    fn act(
        &mut self,
        dice: &mut Dice,
        id: &str,
        verb: &str,
        amount: Option<u64>,
    ) -> (Answer, Option<Executed>) {
        let Some(object) = self.objects.get_mut(id) else { return (plain(Reading::Invalid), None) };
        let mut moved = 0;
        match (verb, object.state) {
            ("confirm", State::Unconfirmed) if dice.percent(25) => {
                let objects = vec![id.to_owned()];
                return (Answer { objects, ..plain(Reading::Declined) }, None);
            }
            ("confirm", State::Unconfirmed) if dice.percent(50) => object.state = State::Authorized,
            ("confirm", State::Unconfirmed) => (moved, object.state) = (object.minor, State::Moved),
            ("capture", State::Authorized) => {
                moved = amount.unwrap_or(object.minor).min(object.minor);
                object.state = State::Moved;
            }
            ("increment_authorization", State::Authorized) if amount.unwrap() > object.minor => {
                object.minor = amount.unwrap();
            }
            _ => return (plain(Reading::Invalid), None),
        }
        if object.state == State::Moved {
            object.minor = moved;
        }
        let reading = said_of(object.state, object.minor);
        let executed = Executed { object: id.to_owned(), lane: Lane::In, minor: moved };
        (Answer { reading, objects: vec![id.to_owned()], replayed: false }, Some(executed))
    }

    fn refund(&mut self, of: &str, minor: u64) -> (Answer, Option<Executed>) {
        if self.objects.get(of).is_none_or(|object| object.state != State::Moved) {
            return (plain(Reading::Invalid), None);
        }
        let id = format!("re_{}", self.objects.len());
        self.objects.insert(id.clone(), Object { minor, state: State::Moved });
        let executed = Executed { object: id.clone(), lane: Lane::Out, minor };
        (Answer { reading: Reading::Moved { minor }, objects: vec![id], replayed: false }, Some(executed))
    }
}

pub(super) fn plain(reading: Reading) -> Answer {
    Answer { reading, objects: Vec::new(), replayed: false }
}

fn said_of(state: State, minor: u64) -> Reading {
    match state {
        State::Moved => Reading::Moved { minor },
        State::Unconfirmed | State::Authorized => Reading::Pending { minor },
        State::Canceled => Reading::NotMoved,
    }
}
