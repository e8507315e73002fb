//! What a record says, in plain words: the one table from an event and its outcome to sentences.
//!
//! For whoever asks, weeks later, why a customer was charged or was not. Only what the record holds is told; what it leaves
//! out is left out here too.

use std::fmt::Write as _;

use serde_json::Value;

use crate::audit::{Entry, Event, RecordedOutcome};
use crate::refusal::Code;

/// What happened, then the figures and reasons, then who asked for it.
pub fn sentences(entry: &Entry) -> Vec<String> {
    let mut said = vec![happened(entry)];
    said.extend(refused(entry));
    said.extend(figures(entry));
    said.extend(answered(entry));
    said.extend(ended_by(entry));
    said.extend(given(entry, "reason").map(|reason| format!("The reason given: \"{reason}\".")));
    if has_flag(entry, "over_hold") {
        said.push(
            "Stripe executed more than was reserved: all of it is booked, and the key was closed.".to_owned(),
        );
    }
    said.extend(entry.idempotency_key.as_ref().map(|key| format!("Its idempotency key is \"{key}\".")));
    said.extend(who(entry));
    // What a script has chosen must not be able to move the cursor of whoever reads it.
    said.iter().map(|sentence| sentence.replace(char::is_control, "\u{fffd}")).collect()
}

fn happened(entry: &Entry) -> String {
    let by = entry.actor.as_deref().unwrap_or("somebody");
    match entry.event {
        Event::ChainStarted => "The log begins here.".to_owned(),
        Event::Admitted if has_flag(entry, "resend") => format!(
            "The same call was let through once more, to learn what became of it: {} stays reserved once, under the \
             same idempotency key.",
            money(entry)
        ),
        Event::Admitted => {
            format!("It was let through: {} was reserved before anything was sent.", money(entry))
        }
        Event::Settled | Event::Voided => outcome(entry),
        Event::Doubt if has_flag(entry, "restart") => format!(
            "The sidecar ended while the call was on its way, so nobody here knows whether Stripe executed it: {} \
             stays counted.",
            money(entry)
        ),
        Event::Doubt => format!(
            "No answer came that proves anything, so nobody here knows whether Stripe executed it: {} stays counted.",
            money(entry)
        ),
        Event::Resolved => format!("The doubt ended. {}", outcome(entry)),
        Event::Replayed => {
            "The same call had been made before: its answer was given again, and nothing was sent.".to_owned()
        }
        Event::Joined => {
            "An equal request was on its way: this one waited for its answer, and nothing was sent for it."
                .to_owned()
        }
        Event::Refused => match entry.count.filter(|count| *count > 1) {
            Some(count) => format!("{count} requests like this one were refused within a minute."),
            None => "It was refused.".to_owned(),
        },
        Event::Forwarded => "It was passed on to Stripe; it moves no money.".to_owned(),
        Event::KeyIssued => format!("{by} made this vault key."),
        Event::KeyRevoked => format!("{by} revoked this vault key: it opens nothing any more."),
        Event::IssuerCreated => format!("{by} made this issuer key."),
        Event::IssuerRevoked => {
            format!("{by} revoked this issuer key, and with it every key that it minted.")
        }
        Event::BudgetStopped => format!("A refusal stopped all keys of the budget{}.", budget(entry)),
        Event::BudgetResumed => format!("{by} let the keys of the budget{} spend again.", budget(entry)),
        Event::KillSwitch => match entry.detail.as_ref().and_then(|detail| detail.get("on")) {
            Some(Value::Bool(false)) => format!("{by} let calls through again."),
            Some(_) | None => format!("{by} stopped every call."),
        },
        Event::AccountBound => {
            format!(
                "The ledger was bound to the Stripe account {}.",
                given(entry, "account").unwrap_or("of its key")
            )
        }
        Event::ClockLowered => format!(
            "{by} set the ledger's clock from {} to {}.",
            given(entry, "before").unwrap_or("a time ahead"),
            given(entry, "after").unwrap_or("the machine's")
        ),
        Event::CallForgotten => format!(
            "{by} took the call back, which was {}: the same call can be made again.",
            given(entry, "was").unwrap_or("over")
        ),
    }
}

/// What became of the money.
fn outcome(entry: &Entry) -> String {
    match entry.outcome {
        Some(RecordedOutcome::Held) => format!("{} is reserved.", money(entry)),
        Some(RecordedOutcome::Spent) => format!("Stripe executed it: {} is spent.", money(entry)),
        Some(RecordedOutcome::NotSent) => "Nothing was sent, so nothing moved.".to_owned(),
        Some(RecordedOutcome::Declined) => "The payment was declined: no money moved.".to_owned(),
        Some(RecordedOutcome::Pending) => {
            format!("Stripe took it, and it is not final yet: {} stays reserved.", money(entry))
        }
        Some(RecordedOutcome::Doubt) => {
            format!("Nobody knows what became of it: {} stays counted.", money(entry))
        }
        Some(RecordedOutcome::None) | None => "Stripe did not execute it: no money moved.".to_owned(),
    }
}

fn refused(entry: &Entry) -> Option<String> {
    let name = entry.code.as_deref().or_else(|| given(entry, "code"))?;
    let known = Code::ALL.iter().find(|code| code.as_str() == name);
    Some(known.map_or_else(|| format!("Why: {name}."), |code| format!("Why: {name}. {}", code.meaning())))
}

/// The figures of a cap, as they were when it was asked.
fn figures(entry: &Entry) -> Option<String> {
    let [cap, limit, spent, held, left] =
        ["cap", "limit", "spent", "held", "remaining"].map(|name| given(entry, name));
    Some(format!(
        "It asked for {}. Of the limit ({}) of {} USD, {} were spent and {} held: {} were left.",
        money(entry),
        cap?,
        limit?,
        spent?,
        held?,
        left?
    ))
}

fn answered(entry: &Entry) -> Option<String> {
    let status = entry.upstream_status?;
    let id = entry.stripe_request_id.as_ref().map_or(String::new(), |id| format!(" ({id})"));
    let object = entry.object_id.as_ref().map_or(String::new(), |object| format!(", about {object}"));
    Some(format!("Stripe answered {status}{id}{object}."))
}

fn ended_by(entry: &Entry) -> Option<String> {
    if entry.event != Event::Resolved {
        return None;
    }
    Some(match (&entry.actor, given(entry, "found_by")) {
        (Some(actor), _) => format!("{actor} said so."),
        (None, Some(read)) => format!("It was found at Stripe by {read}."),
        (None, None) if has_flag(entry, "resend") => {
            "The answer to the same call, sent again, says so.".to_owned()
        }
        (None, None) => "Stripe's own record of the object says so.".to_owned(),
    })
}

/// Who asked for what.
fn who(entry: &Entry) -> Option<String> {
    let key = entry.key_id.as_ref().map(|id| format!("the key {id}"));
    let issuer = entry.issuer_id.as_ref().map(|id| format!("the issuer {id}"));
    let mut about = key.into_iter().chain(issuer).collect::<Vec<_>>().join(" of ");
    if about.is_empty() {
        return None;
    }
    if let Some(label) = &entry.label {
        let _ = write!(about, ", labelled \"{label}\"");
    }
    if let Some(customer) = &entry.customer {
        let _ = write!(about, ", for {customer}");
    }
    let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    for (name, value) in entry.metadata.iter().flatten() {
        let _ = write!(about, ", {name} {}", plain(value));
    }
    Some(match (&entry.method, &entry.endpoint) {
        (Some(method), Some(endpoint)) => format!("The request was {method} {endpoint}, with {about}."),
        (Some(_) | None, _) => format!("This is about {about}."),
    })
}

fn money(entry: &Entry) -> String {
    match (&entry.usd, entry.amount, entry.currency.as_deref()) {
        (Some(usd), Some(amount), Some(currency)) if currency != "usd" => {
            format!("{usd} USD (for {amount} of the smallest unit of {currency})")
        }
        (Some(usd), _, _) => format!("{usd} USD"),
        (None, _, _) => "an amount that nobody could tell".to_owned(),
    }
}

fn budget(entry: &Entry) -> String {
    given(entry, "budget").map_or(String::new(), |name| format!(" \"{name}\""))
}

fn has_flag(entry: &Entry, flag: &str) -> bool {
    entry.flags.iter().flatten().any(|found| found == flag)
}

/// A text of the record's `detail`.
fn given<'a>(entry: &'a Entry, name: &str) -> Option<&'a str> {
    entry.detail.as_ref()?.get(name)?.as_str()
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, json};

    use super::*;

    const EVENTS: [Event; 20] = [
        Event::ChainStarted,
        Event::Admitted,
        Event::Settled,
        Event::Voided,
        Event::Doubt,
        Event::Resolved,
        Event::Replayed,
        Event::Joined,
        Event::Refused,
        Event::Forwarded,
        Event::KeyIssued,
        Event::KeyRevoked,
        Event::IssuerCreated,
        Event::IssuerRevoked,
        Event::BudgetStopped,
        Event::BudgetResumed,
        Event::KillSwitch,
        Event::AccountBound,
        Event::ClockLowered,
        Event::CallForgotten,
    ];
    const OUTCOMES: [Option<RecordedOutcome>; 8] = [
        None,
        Some(RecordedOutcome::Held),
        Some(RecordedOutcome::Spent),
        Some(RecordedOutcome::NotSent),
        Some(RecordedOutcome::Declined),
        Some(RecordedOutcome::Pending),
        Some(RecordedOutcome::Doubt),
        Some(RecordedOutcome::None),
    ];

    fn object(value: &Value) -> Option<Map<String, Value>> {
        value.as_object().cloned()
    }

    /// A record with everything that any record has.
    fn full(event: Event, outcome: Option<RecordedOutcome>) -> Entry {
        let text = |text: &str| Some(text.to_owned());
        Entry {
            event,
            outcome,
            key_id: text("vk_id_1"),
            issuer_id: text("ik_id_1"),
            label: text("kestra-cus_9"),
            metadata: object(&json!({"execution": "4Xy", "attempt": 2})),
            method: text("POST"),
            endpoint: text("/v1/charges"),
            code: text("spend_cap_exceeded"),
            amount: Some(2_999),
            currency: text("eur"),
            usd: text("32.54"),
            idempotency_key: text("billing:2026-07:cus_9"),
            customer: text("cus_9"),
            object_id: text("ch_1"),
            stripe_request_id: text("req_1"),
            upstream_status: Some(200),
            count: Some(3),
            flags: Some(vec!["over_hold".to_owned()]),
            actor: text("admin"),
            detail: object(&json!({
                "cap": "daily", "limit": "40.00", "spent": "20.00", "held": "5.00", "remaining": "15.00",
                "reason": "looked it up", "budget": "july", "on": true, "account": "acct_1", "before": "then",
                "after": "now", "was": "spent",
            })),
            ..Entry::default()
        }
    }

    #[test]
    fn every_event_and_outcome_is_told_in_whole_sentences() {
        let mut firsts = std::collections::BTreeMap::new();
        for event in EVENTS {
            for outcome in OUTCOMES {
                for entry in [full(event, outcome), Entry { event, outcome, ..Entry::default() }] {
                    let said = sentences(&entry);
                    for sentence in &said {
                        let whole = sentence.ends_with(['.', '"'])
                            && !sentence.contains("  ")
                            && !["{", "None", "null", "Some("].iter().any(|bad| sentence.contains(bad));
                        assert!(whole, "{event:?} {outcome:?}: {sentence}");
                    }
                    let by_outcome = matches!(event, Event::Settled | Event::Voided | Event::Resolved);
                    let (full, first) = (entry.key_id.is_some(), said[0].clone());
                    let at = (format!("{event:?}"), full, by_outcome.then_some(format!("{outcome:?}")));
                    let before = firsts.insert(at, first.clone());
                    assert!(before.is_none_or(|before| before == first), "{event:?} depends on its outcome");
                }
            }
        }
        // Two events never have the same words, but for those that say no more than what became of the money.
        let mut distinct = std::collections::BTreeMap::new();
        for ((event, full, outcome), first) in &firsts {
            let event = if event == "Voided" { "Settled" } else { event };
            let known = distinct.entry((first, full)).or_insert((event, outcome));
            let no_outcome = |outcome: &Option<String>| {
                outcome.as_deref().is_some_and(|outcome| outcome == "None" || outcome == "Some(None)")
            };
            assert!(known.0 == event && (known.1 == outcome || no_outcome(outcome)), "{event}: {first}");
        }
    }

    #[test]
    fn a_refusal_has_its_reason_and_its_figures() {
        let entry = Entry { count: Some(1), ..full(Event::Refused, Some(RecordedOutcome::None)) };
        let said = sentences(&entry).join(" ");
        for told in [
            "It was refused.",
            "Why: spend_cap_exceeded. The call would exceed a cap",
            "It asked for 32.54 USD (for 2999 of the smallest unit of eur). Of the limit (daily) of 40.00 USD, 20.00 \
             were spent and 5.00 held: 15.00 were left.",
            "The request was POST /v1/charges, with the key vk_id_1 of the issuer ik_id_1, labelled \
             \"kestra-cus_9\", for cus_9, execution 4Xy, attempt 2.",
            "Its idempotency key is \"billing:2026-07:cus_9\".",
        ] {
            assert!(said.contains(told), "{told}\n{said}");
        }
    }

    #[test]
    fn the_end_of_a_doubt_says_who_knew() {
        let resolved = full(Event::Resolved, Some(RecordedOutcome::Spent));
        let told = |entry: &Entry| sentences(entry).join(" ");
        let by_operator = told(&resolved);
        assert!(by_operator.contains("admin said so. The reason given: \"looked it up\"."), "{by_operator}");
        let found =
            Entry { actor: None, detail: object(&json!({"found_by": "GET /v1/charges"})), ..resolved };
        assert!(told(&found).contains("It was found at Stripe by GET /v1/charges."));
        let resent = Entry { detail: None, flags: Some(vec!["resend".to_owned()]), ..found };
        assert!(told(&resent).contains("sent again, says so."));
        assert!(told(&Entry { flags: None, ..resent }).contains("Stripe's own record"));
    }
}
