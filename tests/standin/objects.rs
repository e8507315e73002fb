//! The objects that the stand-in keeps, and how they look on the wire.

use std::collections::{HashMap, VecDeque};

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::errors::{self, Failure};
use super::orders::{Capture, Listing};

/// Beyond this many of one kind the oldest are forgotten.
const OBJECTS_MAX: usize = 250_000;
/// An uncaptured charge of a card lapses after seven days by default.
const CAPTURE_WITHIN_SECONDS: u64 = 7 * 86_400;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ChargeStatus {
    Succeeded,
    Pending,
    Failed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum IntentStatus {
    RequiresPaymentMethod,
    RequiresConfirmation,
    RequiresAction,
    Processing,
    RequiresCapture,
    Succeeded,
    Canceled,
}

impl IntentStatus {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::RequiresPaymentMethod => "requires_payment_method",
            Self::RequiresConfirmation => "requires_confirmation",
            Self::RequiresAction => "requires_action",
            Self::Processing => "processing",
            Self::RequiresCapture => "requires_capture",
            Self::Succeeded => "succeeded",
            Self::Canceled => "canceled",
        }
    }
}

/// Why a card was refused.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Decline {
    pub(crate) code: &'static str,
    pub(crate) reason: &'static str,
    pub(crate) message: &'static str,
}

impl Decline {
    /// The error object of a 402, which an intent also keeps as its last payment error.
    pub(crate) fn failure(self, charge: &str) -> Failure {
        Failure::new(402, "card_error", self.message)
            .code(self.code)
            .with("charge", charge)
            .with("decline_code", self.reason)
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Charge {
    pub(crate) id: String,
    pub(crate) account: String,
    pub(crate) created: u64,
    pub(crate) amount: u64,
    pub(crate) amount_captured: u64,
    pub(crate) amount_refunded: u64,
    pub(crate) captured: bool,
    pub(crate) currency: String,
    pub(crate) customer: Option<String>,
    pub(crate) description: Option<String>,
    pub(crate) metadata: Map<String, Value>,
    pub(crate) intent: Option<String>,
    pub(crate) method: Option<String>,
    pub(crate) status: ChargeStatus,
    pub(crate) decline: Option<Decline>,
}

#[derive(Clone, Debug)]
pub(crate) struct Intent {
    pub(crate) id: String,
    pub(crate) account: String,
    pub(crate) created: u64,
    pub(crate) amount: u64,
    pub(crate) amount_capturable: u64,
    pub(crate) amount_received: u64,
    pub(crate) capture: Capture,
    pub(crate) client_secret: String,
    pub(crate) currency: String,
    pub(crate) customer: Option<String>,
    pub(crate) description: Option<String>,
    pub(crate) metadata: Map<String, Value>,
    pub(crate) method: Option<String>,
    pub(crate) latest_charge: Option<String>,
    pub(crate) last_error: Value,
    pub(crate) canceled_at: Option<u64>,
    pub(crate) cancel_reason: Option<String>,
    pub(crate) status: IntentStatus,
    /// The idempotency key of the request that created or last confirmed it: a later settlement is told under it.
    pub(crate) key: Option<String>,
}

#[derive(Clone, Debug)]
pub(crate) struct Refund {
    pub(crate) id: String,
    pub(crate) account: String,
    pub(crate) created: u64,
    pub(crate) amount: u64,
    pub(crate) currency: String,
    pub(crate) charge: String,
    pub(crate) intent: Option<String>,
    pub(crate) reason: Option<String>,
    pub(crate) metadata: Map<String, Value>,
}

#[derive(Clone, Debug)]
pub(crate) struct Customer {
    pub(crate) id: String,
    pub(crate) account: String,
    pub(crate) created: u64,
    pub(crate) fields: Map<String, Value>,
}

pub(crate) trait Object {
    /// The name in "No such …".
    const NAME: &'static str;
    /// The list's address.
    const URL: &'static str;
    /// The parameter that a 404 blames.
    const PARAM: &'static str;

    fn id(&self) -> &str;
    fn account(&self) -> &str;
    fn created(&self) -> u64;
    /// A field that a list can be filtered by.
    fn field(&self, name: &str) -> Option<&str>;
    fn json(&self, livemode: bool) -> Value;
}

impl Object for Charge {
    const NAME: &'static str = "charge";
    const URL: &'static str = "/v1/charges";
    const PARAM: &'static str = "charge";

    fn id(&self) -> &str {
        &self.id
    }

    fn account(&self) -> &str {
        &self.account
    }

    fn created(&self) -> u64 {
        self.created
    }

    fn field(&self, name: &str) -> Option<&str> {
        match name {
            "customer" => self.customer.as_deref(),
            "payment_intent" => self.intent.as_deref(),
            _ => None,
        }
    }

    fn json(&self, livemode: bool) -> Value {
        let held = self.status == ChargeStatus::Succeeded && !self.captured;
        let capture_before = held.then(|| self.created.saturating_add(CAPTURE_WITHIN_SECONDS));
        let outcome = match (self.status, self.decline) {
            (ChargeStatus::Pending, _) => Value::Null,
            (_, None) => {
                json!({"network_status": "approved_by_network", "reason": null, "type": "authorized",
                "seller_message": "Payment complete."})
            }
            (_, Some(decline)) => {
                json!({"network_status": "declined_by_network", "reason": decline.reason,
                "type": "issuer_declined", "seller_message": "The bank did not return any further details."})
            }
        };
        json!({
            "id": self.id,
            "object": "charge",
            "amount": self.amount,
            "amount_captured": self.amount_captured,
            "amount_refunded": self.amount_refunded,
            "application_fee_amount": null,
            "balance_transaction": null,
            "captured": self.captured,
            "created": self.created,
            "currency": self.currency,
            "customer": self.customer,
            "description": self.description,
            "disputed": false,
            "failure_code": self.decline.map(|decline| decline.code),
            "failure_message": self.decline.map(|decline| decline.message),
            "livemode": livemode,
            "metadata": self.metadata,
            "outcome": outcome,
            "paid": self.status == ChargeStatus::Succeeded,
            "payment_intent": self.intent,
            "payment_method": self.method,
            "payment_method_details": {"card": {"brand": "visa", "capture_before": capture_before, "last4": "4242"},
                "type": "card"},
            "refunded": self.amount_refunded >= self.amount && self.status == ChargeStatus::Succeeded,
            "status": self.status,
            "transfer_group": null,
        })
    }
}

impl Object for Intent {
    const NAME: &'static str = "payment_intent";
    const URL: &'static str = "/v1/payment_intents";
    const PARAM: &'static str = "intent";

    fn id(&self) -> &str {
        &self.id
    }

    fn account(&self) -> &str {
        &self.account
    }

    fn created(&self) -> u64 {
        self.created
    }

    fn field(&self, name: &str) -> Option<&str> {
        if name == "customer" { self.customer.as_deref() } else { None }
    }

    fn json(&self, livemode: bool) -> Value {
        let next_action = match self.status {
            IntentStatus::RequiresAction => json!({"type": "use_stripe_sdk",
                "use_stripe_sdk": {"type": "three_d_secure_redirect", "stripe_js": "https://hooks.stripe.com/redirect"}}),
            IntentStatus::RequiresPaymentMethod
            | IntentStatus::RequiresConfirmation
            | IntentStatus::Processing
            | IntentStatus::RequiresCapture
            | IntentStatus::Succeeded
            | IntentStatus::Canceled => Value::Null,
        };
        json!({
            "id": self.id,
            "object": "payment_intent",
            "amount": self.amount,
            "amount_capturable": self.amount_capturable,
            "amount_details": {"tip": {}},
            "amount_received": self.amount_received,
            "application_fee_amount": null,
            "automatic_payment_methods": null,
            "canceled_at": self.canceled_at,
            "cancellation_reason": self.cancel_reason,
            "capture_method": if self.capture == Capture::Later { "manual" } else { "automatic_async" },
            "client_secret": self.client_secret,
            "confirmation_method": "automatic",
            "created": self.created,
            "currency": self.currency,
            "customer": self.customer,
            "description": self.description,
            "last_payment_error": self.last_error,
            "latest_charge": self.latest_charge,
            "livemode": livemode,
            "metadata": self.metadata,
            "next_action": next_action,
            "payment_method": self.method,
            "payment_method_types": ["card"],
            "processing": null,
            "receipt_email": null,
            "setup_future_usage": null,
            "shipping": null,
            "status": self.status,
            "transfer_group": null,
        })
    }
}

impl Object for Refund {
    const NAME: &'static str = "refund";
    const URL: &'static str = "/v1/refunds";
    const PARAM: &'static str = "refund";

    fn id(&self) -> &str {
        &self.id
    }

    fn account(&self) -> &str {
        &self.account
    }

    fn created(&self) -> u64 {
        self.created
    }

    fn field(&self, name: &str) -> Option<&str> {
        match name {
            "charge" => Some(&self.charge),
            "payment_intent" => self.intent.as_deref(),
            _ => None,
        }
    }

    fn json(&self, _livemode: bool) -> Value {
        json!({
            "id": self.id,
            "object": "refund",
            "amount": self.amount,
            "balance_transaction": null,
            "charge": self.charge,
            "created": self.created,
            "currency": self.currency,
            "metadata": self.metadata,
            "payment_intent": self.intent,
            "reason": self.reason,
            "receipt_number": null,
            "status": "succeeded",
        })
    }
}

impl Object for Customer {
    const NAME: &'static str = "customer";
    const URL: &'static str = "/v1/customers";
    const PARAM: &'static str = "id";

    fn id(&self) -> &str {
        &self.id
    }

    fn account(&self) -> &str {
        &self.account
    }

    fn created(&self) -> u64 {
        self.created
    }

    fn field(&self, name: &str) -> Option<&str> {
        self.fields.get(name).and_then(Value::as_str)
    }

    fn json(&self, livemode: bool) -> Value {
        let mut all = Map::new();
        all.insert("id".into(), json!(self.id));
        all.insert("object".into(), json!("customer"));
        for name in ["balance", "description", "email", "name", "phone"] {
            all.insert(name.into(), if name == "balance" { json!(0) } else { Value::Null });
        }
        all.insert("metadata".into(), json!({}));
        for (name, value) in self.fields.iter().filter(|(name, _)| *name != "expand") {
            all.insert(name.clone(), value.clone());
        }
        all.insert("created".into(), json!(self.created));
        all.insert("livemode".into(), json!(livemode));
        Value::Object(all)
    }
}

/// Objects of one kind, in the order of their making.
#[derive(Debug)]
pub(crate) struct Shelf<T> {
    by_id: HashMap<String, T>,
    order: VecDeque<String>,
}

impl<T> Default for Shelf<T> {
    fn default() -> Self {
        Self { by_id: HashMap::new(), order: VecDeque::new() }
    }
}

impl<T: Object + Clone> Shelf<T> {
    /// Adds an object, or puts a changed one in its own place.
    pub(crate) fn put(&mut self, object: T) {
        let id = object.id().to_owned();
        if self.by_id.insert(id.clone(), object).is_none() {
            self.order.push_back(id);
        }
        if self.order.len() > OBJECTS_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.by_id.remove(&oldest);
        }
    }

    pub(crate) fn find(&self, id: &str) -> Option<&T> {
        self.by_id.get(id)
    }

    /// An object of this account, to be looked at or to be changed and put back.
    pub(crate) fn of(&self, account: &str, id: &str) -> Result<T, Failure> {
        let found = self.by_id.get(id).filter(|object| object.account() == account);
        found.cloned().ok_or_else(|| errors::no_such(T::NAME, id, 404, T::PARAM))
    }

    /// A page, the newest first, and whether there is more behind it.
    pub(crate) fn page(&self, account: &str, listing: &Listing) -> Result<(Vec<&T>, bool), Failure> {
        for (param, cursor) in
            [("starting_after", &listing.starting_after), ("ending_before", &listing.ending_before)]
        {
            if let Some(id) = cursor.as_ref().filter(|id| !self.by_id.contains_key(*id)) {
                return Err(errors::no_such(T::NAME, id, 400, param));
            }
        }
        let position = |id: &String| self.order.iter().rev().position(|other| other == id);
        let after = listing.starting_after.as_ref().and_then(position);
        let before = listing.ending_before.as_ref().and_then(position);
        let matching = self.order.iter().rev().enumerate().filter_map(|(index, id)| {
            let object = self.by_id.get(id)?;
            let wanted = after.is_none_or(|at| index > at)
                && before.is_none_or(|at| index < at)
                && object.account() == account
                && (listing.created_from..=listing.created_to).contains(&object.created())
                && listing.equal.iter().all(|(name, value)| object.field(name) == Some(value));
            wanted.then_some(object)
        });
        let wanted = listing.limit.saturating_add(1);
        let mut found: Vec<&T> = if before.is_none() {
            matching.take(wanted).collect()
        } else {
            // Before a cursor, the page is the one that ends at it.
            let all: Vec<&T> = matching.collect();
            let skip = all.len().saturating_sub(wanted);
            all.into_iter().skip(skip).collect()
        };
        let more = found.len() > listing.limit;
        if more && before.is_some() {
            found.remove(0);
        }
        found.truncate(listing.limit);
        Ok((found, more))
    }
}
