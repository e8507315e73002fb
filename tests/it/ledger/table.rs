//! Histories as text: one line for each command, with the reply that it must get.
//!
//! | command | reply |
//! |---|---|
//! | `key K [setting=value…]` | nothing |
//! | `K charge\|intent NAME AMOUNT [param=value…]` | `send UPSTREAM-KEY [again]`, `replay`, `refuse CODE [cap, param or retry]` |
//! | `K confirm\|capture\|increment\|refund NAME OBJECT [AMOUNT]`, `K unpriced NAME` | the same |
//! | `K ceiling NAME [OBJECT]` | the same: 50.00 for one call |
//! | `record OBJECT AMOUNT [CURRENCY] [moved=AMOUNT] [customer=ID]` | nothing: what a read tells; without it: `look` |
//! | an object that is called `in_…` | can still be paid after a decline |
//! | `answer NAME READING [AMOUNT] [OBJECT…] [replayed]` | state of the hold and what it holds |
//! | `found NAME moved\|pending\|declined [AMOUNT] [OBJECT]` | the same: what recovery found |
//! | `resolve NAME spent AMOUNT OBJECT`, `resolve NAME not_executed` | the same, or `conflict`: what an operator says |
//! | `forget NAME` | `forgotten` or `conflict` |
//! | `observe OBJECT ended\|moved [AMOUNT]` | the same |
//! | `sum K [today\|out]` | what is counted, zeros left out |
//! | `call NAME` | its state, and how each attempt ended |
//! | `pass 23h` (`m`, `d`), `tick`, `restart`, `revoke K` | nothing |
//! | `status K` | status |
//!
//! NAME is the caller's key or, under a `content` key, what is charged. Upstream keys of `content` mode are shown as
//! `kb:1`, `kb:2`, … in the order in which they were first seen. A replay must give the bytes that were answered.

use std::collections::HashMap;

use keybrake::call::{Call, Outcome, Reading, Record, conclude};
use keybrake::hold::{Facts, Hold, Lane, Subject};
use keybrake::id::{CallId, HoldId, KeyId};
use keybrake::intent::Seen;
use keybrake::key::{Idempotency, Key};
use keybrake::ledger::counter::Counter;
use keybrake::ledger::query::CallFilter;
use keybrake::ledger::rules::resolve::{EndDoubt, Known};
use keybrake::ledger::{Admitted, Ending, Held, LedgerError};
use keybrake::money::{Currency, Money};
use keybrake::refusal::{Code, Refusal};
use keybrake::time::{DAY_MS, HOUR_MS};

use crate::ledger::world::{Ask, Deed, World, admin, usd};

/// Runs a table and compares every reply.
pub(super) async fn check(mut world: World, table: &str) {
    let mut run = Run::default();
    let mut wrong = Vec::new();
    for line in table.lines().map(|line| line.split('#').next().unwrap_or_default().trim()) {
        if line.is_empty() {
            continue;
        }
        let (command, expected) = line.split_once("->").unwrap_or((line, ""));
        let words: Vec<&str> = command.split_whitespace().collect();
        let reply = run.execute(&mut world, &words).await;
        if reply != expected.trim() {
            wrong.push(format!("{line}\n    but: {reply}"));
        }
        world.check();
    }
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

/// What a table has named so far.
#[derive(Default)]
pub(super) struct Run {
    pub(super) keys: HashMap<String, KeyId>,
    held: HashMap<String, Held>,
    holds: HashMap<CallId, HoldId>,
    calls: HashMap<String, CallId>,
    /// What was answered.
    pub(super) bodies: HashMap<CallId, Vec<u8>>,
    /// What was asked last, and under which key.
    pub(super) asked: HashMap<CallId, (KeyId, Ask)>,
    upstream_keys: Vec<String>,
}

impl Run {
    /// Executes one command and tells the reply.
    pub(super) async fn execute(&mut self, world: &mut World, words: &[&str]) -> String {
        match words {
            ["key", name, settings @ ..] => {
                let key = world.key(name, |key| settings.iter().for_each(|text| set(key, text))).await;
                self.keys.insert((*name).to_owned(), key);
            }
            ["answer", name, rest @ ..] => return self.answer(world, name, rest).await,
            ["record", object, rest @ ..] => world.tells(object, seen(rest)),
            ["found", name, rest @ ..] => return self.end(world, name, found(rest), rest).await,
            ["resolve", name, rest @ ..] => return self.end(world, name, said(rest), rest).await,
            ["forget", name] => {
                let call = self.calls[*name];
                return match world.ledger().forget_call(call, "again".to_owned(), admin()).await.unwrap() {
                    Some(call) => call.state.as_str().to_owned(),
                    None => "conflict".to_owned(),
                };
            }
            ["observe", object, rest @ ..] => return self.observe(world, object, rest).await,
            ["sum", name, rest @ ..] => return self.sum(world, name, rest),
            ["call", name] => return self.call(world, name),
            ["status", name] => {
                let key = world.reads().key(self.keys[*name]).unwrap();
                return key.map_or("gone", |key| key.status(world.ledger().now()).as_str()).to_owned();
            }
            ["pass", time] => world.pass(millis(time)),
            ["tick"] => {
                world.ledger().tick().await.unwrap();
            }
            ["restart"] => {
                self.held.clear();
                world.restart();
            }
            ["revoke", name] => {
                world.ledger().revoke_key(self.keys[*name], admin()).await.unwrap();
            }
            [key, deed, name, rest @ ..] => return self.ask(world, key, &ask(deed, name, rest)).await,
            _ => panic!("{words:?}"),
        }
        String::new()
    }

    async fn ask(&mut self, world: &World, key: &str, ask: &Ask) -> String {
        match world.admit(self.keys[key], ask).await {
            Ok(Admitted::Held(held)) => {
                let call = world.call(held.call_id());
                self.calls.insert(ask.name.clone(), call.id);
                self.holds.insert(call.id, call.hold_id);
                self.asked.insert(call.id, (self.keys[key], ask.clone()));
                let again = if held.first_send() { "" } else { " again" };
                let reply = format!("send {}{again}", self.upstream_key(&held));
                self.held.insert(ask.name.clone(), held);
                reply
            }
            Ok(Admitted::Replay { call_id, answer }) => {
                assert_eq!(Some(&answer.body), self.bodies.get(&call_id), "the bytes of a replay");
                "replay".to_owned()
            }
            Ok(Admitted::Refused(refusal)) => refused(&refusal),
            Ok(Admitted::Look(_)) => "look".to_owned(),
            Ok(Admitted::Elsewhere) => "elsewhere".to_owned(),
            Ok(Admitted::Tell(executed)) => format!("tell {}", executed.object_id),
            Err(error) => failed(&error),
        }
    }

    fn upstream_key(&mut self, held: &Held) -> String {
        let Some(key) = held.request().idempotency_key.clone() else { return "-".to_owned() };
        if !key.starts_with("kb1_") {
            return key;
        }
        let known = self.upstream_keys.iter().position(|known| *known == key);
        let n = known.unwrap_or_else(|| {
            self.upstream_keys.push(key);
            self.upstream_keys.len() - 1
        });
        format!("kb:{}", n + 1)
    }

    async fn answer(&mut self, world: &World, name: &str, rest: &[&str]) -> String {
        let held = self.held.remove(name).unwrap();
        let call = held.call_id();
        let replayed = rest.last() == Some(&"replayed");
        let minor = rest.get(1).and_then(|text| text.parse().ok()).unwrap_or(0);
        let objects: Vec<&str> = rest.iter().copied().filter(|word| word.contains('_')).skip_reading();
        let (reading, status) = reading(rest[0], minor);
        let outcome = conclude(&reading, held.first_send(), replayed, held.basis());
        let resolve = world.resolve(outcome, &objects, status);
        if let (Some(answer), Outcome::Spent { .. } | Outcome::Pending { .. }) = (&resolve.answer, outcome) {
            self.bodies.insert(call, answer.body.clone());
        }
        match world.ledger().resolve(held, resolve).await {
            Ok(()) => shown(&world.hold(self.holds[&call])),
            Err(error) => failed(&error),
        }
    }

    /// Ends a doubt by what was found, or by what an operator says.
    async fn end(&self, world: &World, name: &str, outcome: Known, rest: &[&str]) -> String {
        let objects = rest.iter().skip(1).filter(|word| word.contains('_')).map(|word| (*word).to_owned());
        let end = EndDoubt {
            outcome,
            objects: objects.collect(),
            answer: None,
            actor: Some("admin".to_owned()),
            evidence: serde_json::Map::new(),
        };
        let hold = self.holds[&self.calls[name]];
        match world.ledger().end_doubt(hold, end).await {
            Ok(Ending::Ended) => shown(&world.hold(hold)),
            Ok(Ending::NotInDoubt) => "conflict".to_owned(),
            Ok(Ending::OfAnother) => "of another".to_owned(),
            Err(error) => failed(&error),
        }
    }

    async fn observe(&mut self, world: &World, object: &str, rest: &[&str]) -> String {
        let record = match rest {
            ["moved", minor] => Record::Moved { minor: minor.parse().unwrap() },
            _ => Record::Ended,
        };
        if let Err(error) =
            world.ledger().observe(String::new(), object.to_owned(), Facts::default(), record).await
        {
            return failed(&error);
        }
        let of_object = |hold: &Hold| {
            hold.object_id.as_deref() == Some(object) || hold.aliases.iter().any(|alias| alias == object)
        };
        let mut holds: Vec<HoldId> = self.holds.values().copied().collect();
        holds.sort();
        let found = holds.iter().rev().filter_map(|id| world.reads().hold(*id).unwrap());
        found.into_iter().find(of_object).map_or("nothing".to_owned(), |hold| shown(&hold))
    }

    fn sum(&self, world: &World, name: &str, rest: &[&str]) -> String {
        let key = self.keys[name];
        let counter = match rest {
            ["today"] => {
                world.reads().counter(Subject::Key(key), world.ledger().now().day(), Lane::In).unwrap()
            }
            ["out"] => world.total(key, Lane::Out),
            _ => world.total(key, Lane::In),
        };
        summed(&counter)
    }

    fn call(&self, world: &World, name: &str) -> String {
        let filter = CallFilter { idempotency_key: Some(name.to_owned()), ..CallFilter::default() };
        let by_key = || world.reads().calls(&filter, None, 1).unwrap().items.pop();
        let known = self.calls.get(name).and_then(|id| world.reads().call_by_id(*id).unwrap());
        let Some(call): Option<Call> = known.or_else(by_key) else { return "gone".to_owned() };
        let ends = call.attempts.iter().map(|attempt| {
            let end = attempt.end.map_or("unknown", keybrake::call::CallState::as_str);
            format!("{}:{end}", attempt.n)
        });
        format!("{} {}", call.state.as_str(), ends.collect::<Vec<_>>().join(" "))
    }
}

/// Objects are written `pi_1`; of the readings only a few contain the same sign.
trait SkipReading<'a> {
    fn skip_reading(self) -> Vec<&'a str>;
}

impl<'a, I: Iterator<Item = &'a str>> SkipReading<'a> for I {
    fn skip_reading(self) -> Vec<&'a str> {
        self.filter(|word| !["not_moved", "not_sent", "own_key"].contains(word)).collect()
    }
}

fn set(key: &mut Key, setting: &str) {
    let (name, value) = setting.split_once('=').unwrap_or((setting, ""));
    let number = || value.parse::<u64>().unwrap();
    match name {
        "daily" => key.caps.daily = Some(usd(value)),
        "total" => key.caps.total = Some(usd(value)),
        "per_request" => key.caps.per_request = Some(usd(value)),
        "out" => key.caps.daily_out = Some(usd(value)),
        "max_calls" => key.caps.max_calls = Some(number()),
        "uncapped" => (key.caps.uncapped, key.caps.daily) = (true, None),
        "capless" => key.caps.daily = None,
        "client" => key.idempotency = Idempotency::Client,
        "content" => {
            key.idempotency = Idempotency::Content { scope: "billing:1".to_owned(), fields: Vec::new() };
        }
        "retry_declined" => key.retry_declined_after_s = Some(number()),
        "remember" => key.remember_days = number().try_into().unwrap(),
        "lives" => key.expires_at = key.created_at.plus_millis(millis(value)),
        other => panic!("{other}"),
    }
}

fn ask(deed: &str, name: &str, rest: &[&str]) -> Ask {
    let deed = match deed {
        "charge" => Deed::Charge,
        "intent" => Deed::Intent,
        "confirm" => Deed::Confirm,
        "capture" => Deed::Capture,
        "increment" => Deed::Increment,
        "refund" => Deed::Refund,
        "ceiling" => Deed::Ceiling,
        "unpriced" => Deed::Unpriced,
        other => panic!("{other}"),
    };
    let pair = |word: &&str| word.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
    Ask {
        name: name.to_owned(),
        deed,
        object: rest
            .iter()
            .find(|word| word.contains('_') && !word.contains('='))
            .map(|word| (*word).to_owned()),
        minor: rest.iter().find_map(|word| word.parse().ok()),
        params: rest.iter().filter_map(pair).collect(),
    }
}

fn found(rest: &[&str]) -> Known {
    let minor = rest.get(1).and_then(|text| text.parse().ok()).unwrap_or(0);
    let outcome = match rest[0] {
        "moved" => Outcome::Spent { minor },
        "pending" => Outcome::Pending { minor },
        "declined" => Outcome::Declined,
        other => panic!("{other}"),
    };
    Known::Record(outcome)
}

fn said(rest: &[&str]) -> Known {
    match rest[0] {
        "spent" => Known::Executed { minor: rest[1].parse().unwrap() },
        "not_executed" => Known::NotExecuted,
        other => panic!("{other}"),
    }
}

fn seen(rest: &[&str]) -> Seen {
    let value = |name: &str| rest.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    let minor = rest[0].parse().unwrap();
    let currency = rest.iter().skip(1).find_map(|word| Currency::parse(word)).unwrap_or(Currency::USD);
    Seen {
        ceiling: Some(Money { minor, currency }),
        currency: Some(currency),
        moved: value("moved").map_or(0, |text| text.parse().unwrap()),
        customer: value("customer").map(str::to_owned),
    }
}

fn reading(word: &str, minor: u64) -> (Reading, Option<u16>) {
    match word {
        "moved" => (Reading::Moved { minor }, Some(200)),
        "pending" => (Reading::Pending { minor }, Some(200)),
        "not_moved" => (Reading::NotMoved, Some(200)),
        "declined" => (Reading::Declined, Some(402)),
        "invalid" => (Reading::Invalid, Some(404)),
        "mismatch" => (Reading::KeyMismatch, Some(400)),
        "own_key" => (Reading::OwnKeyRefused, Some(401)),
        "throttled" => (Reading::Throttled, Some(429)),
        "unclear" => (Reading::Unclear { is_5xx: true }, Some(500)),
        "not_sent" => (Reading::NotSent, None),
        "silence" => (Reading::Silence, None),
        other => panic!("{other}"),
    }
}

fn millis(time: &str) -> u64 {
    let (number, unit) = time.split_at(time.len() - 1);
    let unit = match unit {
        "m" => 60_000,
        "h" => HOUR_MS,
        "d" => DAY_MS,
        other => panic!("{other}"),
    };
    number.parse::<u64>().unwrap() * unit
}

fn refused(refusal: &Refusal) -> String {
    let mut reply = format!("refuse {}", refusal.code.as_str());
    if let Some(figures) = &refusal.figures {
        reply = format!("{reply} {}", figures.cap.as_str());
    }
    if let Some(param) = &refusal.param {
        reply = format!("{reply} {param}");
    }
    if refusal.code == Code::OutcomeUnknown && refusal.retry {
        reply.push_str(" retry");
    }
    reply
}

fn failed(error: &LedgerError) -> String {
    format!("error: {error}")
}

fn shown(hold: &Hold) -> String {
    format!("{} {}", hold.state.as_str(), hold.usd)
}

fn summed(counter: &Counter) -> String {
    let parts = [
        ("spent", counter.spent.to_string()),
        ("held", counter.held.to_string()),
        ("doubt", counter.doubt.to_string()),
        ("calls", counter.calls.to_string()),
    ];
    let told: Vec<String> = parts
        .iter()
        .filter(|(_, value)| value != "0.00" && value != "0")
        .map(|(name, value)| format!("{name} {value}"))
        .collect();
    if told.is_empty() { "nothing".to_owned() } else { told.join(" ") }
}
