//! The control endpoints, for tests of another process: `/_standin/…`, JSON in and out, no key, loopback only.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::engine::{Engine, Reply, Seen};
use super::faults::Scripted;
use super::intents::Settlement;
use super::stage::Play;

pub(crate) const PREFIX: &str = "/_standin/";

#[derive(Deserialize)]
#[serde(untagged)]
enum Faults {
    Many(Vec<Scripted>),
    One(Scripted),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Advance {
    seconds: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Settle {
    id: String,
    status: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SecretKeys {
    secret_keys: Vec<String>,
}

pub(crate) fn answer(engine: &Engine, request: &Seen) -> Reply {
    let name = request.path.strip_prefix(PREFIX).unwrap_or_default();
    let since = request.query.strip_prefix("since=").and_then(|digits| digits.parse().ok()).unwrap_or(0);
    let done = match (request.method.as_str(), name) {
        ("GET", "executed") => Ok(json!({ "data": engine.executed(since) })),
        ("GET", "requests") => Ok(json!({ "data": engine.requests(since) })),
        ("GET", "state") => Ok(engine.summary()),
        ("POST", "faults") => read(request).map(|faults| {
            match faults {
                Faults::Many(many) => many.into_iter().for_each(|one| engine.fault(one)),
                Faults::One(one) => engine.fault(one),
            }
            engine.summary()
        }),
        ("POST", "play") => read::<Play>(request).map(|play| {
            engine.play(play);
            engine.summary()
        }),
        ("POST", "release") => {
            engine.release();
            Ok(engine.summary())
        }
        ("POST", "advance") => read(request).map(|Advance { seconds }| {
            engine.advance(seconds);
            engine.summary()
        }),
        ("POST", "reset") => {
            engine.reset();
            Ok(engine.summary())
        }
        ("POST", "settle") => read(request).and_then(|settle| self::settle(engine, &settle)),
        ("POST", "secret_keys") => read(request).map(|SecretKeys { secret_keys }| {
            engine.set_secret_keys(secret_keys);
            engine.summary()
        }),
        _ => return Reply::json(404, &json!({"error": "no such control endpoint"})),
    };
    match done {
        Ok(body) => Reply::json(200, &body),
        Err(message) => Reply::json(400, &json!({ "error": message })),
    }
}

fn read<T: DeserializeOwned>(request: &Seen) -> Result<T, String> {
    serde_json::from_str(&request.body).map_err(|error| error.to_string())
}

fn settle(engine: &Engine, settle: &Settle) -> Result<Value, String> {
    let to = match settle.status.as_str() {
        "succeeded" => Settlement::Succeeded,
        "failed" => Settlement::Failed,
        "canceled" => Settlement::Canceled,
        _ => return Err("status is succeeded, failed or canceled".to_owned()),
    };
    engine.settle(&settle.id, to).map(|()| engine.summary())
}
