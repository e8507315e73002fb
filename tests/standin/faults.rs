//! What may go wrong on the way to Stripe, at Stripe, and on the way back: a script of faults, first in, first out.

use std::collections::{BTreeMap, VecDeque};

use serde::Deserialize;
use serde_json::Value;

/// One thing that goes wrong. Faults of the wire act on every request that matches, replays included; those that
/// change the execution (`Status500Before`, `Status500After`, `Status424`, `Decline`) have no effect on a replay.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Fault {
    /// The request is read and the connection closed: nothing is executed, nothing stored under the key.
    DropBefore,
    /// Executed and stored, then closed without an answer.
    DropAfter,
    /// Executed, then a 500 is stored and answered.
    Status500After,
    /// Nothing is executed, a 500 is stored and answered.
    Status500Before,
    /// The card is declined, whatever it is.
    Decline,
    /// 429 of the rate limiter, which runs before the idempotency layer: nothing is executed or stored.
    RateLimited,
    /// 429 of an object that another request has locked: nothing is executed or stored.
    LockTimeout,
    /// Milliseconds of waiting before the execution, with the key in flight.
    SlowMs(u64),
    /// Milliseconds of waiting between execution and answer.
    SlowAfterMs(u64),
    /// Executed; the head announces the whole body, half of it follows, then the connection closes.
    HalfBody,
    /// Executed; the answer is a 200 whose body is not JSON.
    Garbage,
    /// The request is read and the connection reset: nothing is executed or stored.
    Reset,
    /// Executed and stored, then the connection is reset.
    ResetAfter,
    /// Executed only after the next release, with the key in flight until then.
    Hold,
    /// Executed and stored at once, answered after the next release.
    HoldAfter,
    /// 409 as for a key in flight: nothing is executed or stored.
    Conflict409,
    /// 424 of a failed external dependency: nothing is executed, the 424 is stored.
    Status424,
    /// This very answer, without headers of Stripe's but those given; nothing is executed or stored. A body that is a
    /// JSON string is sent as its bare text.
    Answer {
        status: u16,
        #[serde(default)]
        body: Value,
        #[serde(default)]
        headers: BTreeMap<String, String>,
    },
}

/// The requests that a fault waits for.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum On {
    /// Any POST under charges, payment intents or refunds.
    #[default]
    Money,
    /// Any request to the API, reads included.
    Any,
    Path {
        method: String,
        prefix: String,
    },
    IdempotencyKey(String),
    Customer(String),
}

/// A fault, the requests it waits for, and how many of them it meets.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Scripted {
    pub(crate) fault: Fault,
    #[serde(default)]
    pub(crate) on: On,
    #[serde(default = "once")]
    pub(crate) count: u32,
}

fn once() -> u32 {
    1
}

impl From<Fault> for Scripted {
    fn from(fault: Fault) -> Self {
        Self { fault, on: On::default(), count: once() }
    }
}

#[cfg(test)]
impl Fault {
    /// The same fault for other requests than the next one that moves money.
    pub(crate) fn on(self, on: On) -> Scripted {
        Scripted { fault: self, on, count: once() }
    }

    /// The same fault several times.
    pub(crate) fn times(self, count: u32) -> Scripted {
        Scripted { fault: self, on: On::default(), count }
    }
}

/// What a fault looks at in a request.
pub(crate) struct Traits<'a> {
    pub(crate) method: &'a str,
    pub(crate) path: &'a str,
    pub(crate) idempotency_key: Option<&'a str>,
    pub(crate) customer: Option<&'a str>,
}

impl On {
    fn meets(&self, request: &Traits<'_>) -> bool {
        match self {
            Self::Money => request.method == "POST" && moves_money(request.path),
            Self::Any => true,
            Self::Path { method, prefix } => {
                request.method.eq_ignore_ascii_case(method) && request.path.starts_with(prefix.as_str())
            }
            Self::IdempotencyKey(key) => request.idempotency_key == Some(key.as_str()),
            Self::Customer(customer) => request.customer == Some(customer.as_str()),
        }
    }
}

fn moves_money(path: &str) -> bool {
    ["/v1/charges", "/v1/payment_intents", "/v1/refunds"].iter().any(|prefix| path.starts_with(prefix))
}

#[derive(Debug, Default)]
pub(crate) struct Script(VecDeque<Scripted>);

impl Script {
    pub(crate) fn push(&mut self, scripted: Scripted) {
        self.0.push_back(scripted);
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Takes the oldest fault that waits for such a request.
    pub(crate) fn take(&mut self, request: &Traits<'_>) -> Option<Fault> {
        let index = self.0.iter().position(|scripted| scripted.count > 0 && scripted.on.meets(request))?;
        let scripted = self.0.get_mut(index)?;
        scripted.count -= 1;
        let fault = scripted.fault.clone();
        if scripted.count == 0 {
            self.0.remove(index);
        }
        Some(fault)
    }
}
