//! Money held for one object at Stripe, from before its first byte leaves until its outcome is known.
//!
//! A hold is not a call: create, confirm and capture are three calls on one hold, and a retry is the same call. A hold
//! ends only by a definite answer, by Stripe's own record or by an operator; time ends none.
//!
//! Field numbers are stored: add at the end, as an `Option` or with a default, and never use one again.

use minicbor::{Decode, Encode};

use crate::id::{BootId, BudgetId, CallId, HoldId, IssuerId, KeyId};
use crate::money::{Currency, MicroUsd, Money, Rate};
use crate::time::{Day, UnixMs};

/// Where a hold stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum HoldState {
    /// Bytes may be out; the process that knows is this one.
    #[n(0)]
    Sending {
        /// The run of the process that sends. Another run's holds are doubts.
        #[n(0)]
        boot: BootId,
    },
    /// Stripe said: not final (authorised, processing, waiting for the customer).
    #[n(1)]
    Open,
    /// Nobody here knows whether Stripe executed it. Counted until somebody does.
    #[n(2)]
    Doubt,
    /// Executed and booked. Final.
    #[n(3)]
    Spent,
    /// Proven not executed. Final.
    #[n(4)]
    Void,
}

impl HoldState {
    /// The name in lists and filters.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Sending { .. } => "sending",
            Self::Open => "open",
            Self::Doubt => "doubt",
            Self::Spent => "spent",
            Self::Void => "void",
        }
    }

    /// Whether it still counts as held.
    pub const fn is_live(&self) -> bool {
        match self {
            Self::Sending { .. } | Self::Open | Self::Doubt => true,
            Self::Spent | Self::Void => false,
        }
    }
}

/// Which way money goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
#[cbor(index_only)]
pub enum Lane {
    /// A customer pays.
    #[n(0)]
    In,
    /// A refund or payout: never gives budget back.
    #[n(1)]
    Out,
}

/// Who is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub enum Subject {
    /// One vault key.
    #[n(0)]
    Key(#[n(0)] KeyId),
    /// All keys of one issuer.
    #[n(1)]
    Issuer(#[n(0)] IssuerId),
    /// All keys of one budget.
    #[n(2)]
    Budget(#[n(0)] BudgetId),
}

/// Money held for one object.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Hold {
    /// Its name.
    #[n(0)]
    pub id: HoldId,
    /// The key that pays for it, from creation to its end.
    #[n(1)]
    pub key_id: KeyId,
    /// The call that made it or uses it now.
    #[n(2)]
    pub call_id: CallId,
    /// Where it stands.
    #[n(3)]
    pub state: HoldState,
    /// Which way the money goes.
    #[n(4)]
    pub lane: Lane,
    /// The UTC day on which it was admitted, and on which it stays counted.
    #[n(5)]
    pub day: Day,
    /// Whose counters carry it.
    #[n(6)]
    pub subjects: Vec<Subject>,
    /// The currency; `None` for a call whose price is not known (an uncapped key's).
    #[n(7)]
    pub currency: Option<Currency>,
    /// What is held, in minor units; once spent, what was executed.
    #[n(8)]
    pub minor: u64,
    /// The same against the caps.
    #[n(9)]
    pub usd: MicroUsd,
    /// What was open before the call in flight, to go back to when that call is proven not executed.
    #[n(10)]
    pub base: Option<Base>,
    /// Its object at Stripe, once known.
    #[n(11)]
    pub object_id: Option<String>,
    /// When it was admitted.
    #[n(12)]
    pub admitted_at: UnixMs,
    /// Since when it is in this state.
    #[n(13)]
    pub since: UnixMs,
    /// What is needed while a call is in flight or in doubt; dropped with it, because it is personal data.
    #[n(14)]
    pub live: Option<LiveCall>,
    /// All calls that used it, the last ones of many.
    #[n(15)]
    pub calls: Vec<CallId>,
    /// Other objects at Stripe that stand for the same money (the charge of a payment intent).
    #[n(16)]
    pub aliases: Vec<String>,
    /// The connected account that its object belongs to; empty for the own account.
    #[n(17)]
    #[cbor(default)]
    pub account: String,
    /// The customer who pays, where the call that made the object named one.
    #[n(18)]
    #[cbor(default)]
    pub customer: Option<String>,
    /// Whether the vendor's own record says that its object is over, so that no later answer can open it again.
    #[n(19)]
    #[cbor(default)]
    pub object_over: bool,
    /// What a minor unit counts, from admission to its end; `None` for dollars.
    #[n(20)]
    pub rate: Option<Rate>,
    /// What had moved for its object before it was held, in minor units: not this hold's money.
    #[n(21)]
    #[cbor(default)]
    pub moved_before: u64,
    /// What was looked for at the vendor to end its doubt.
    #[n(22)]
    pub search: Option<Search>,
    /// Whether what is held is only what the key allows for one call.
    #[n(23)]
    #[cbor(default)]
    pub is_ceiling: bool,
}

/// What was looked for at the vendor, and what came of it: for the operator who has to decide.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Search {
    /// How often.
    #[n(0)]
    pub times: u32,
    /// When first.
    #[n(1)]
    pub first_at: UnixMs,
    /// When last.
    #[n(2)]
    pub last_at: UnixMs,
    /// The read.
    #[n(3)]
    pub read: String,
    /// What the last one came to.
    #[n(4)]
    pub came_to: String,
}

impl Hold {
    /// What is held; `None` for a call whose price is not known.
    pub fn money(&self) -> Option<Money> {
        self.currency.map(|currency| Money { minor: self.minor, currency })
    }

    /// What an amount in its minor units counts against the caps; `None` when it is too large to count.
    pub fn to_usd(&self, minor: u64) -> Option<MicroUsd> {
        self.rate.unwrap_or(Rate::USD).usd(minor)
    }

    /// What the object itself says of a parameter that a later call on it leaves out.
    pub fn own_field(&self, param: &str) -> Option<String> {
        match param {
            "amount" | "amount_to_capture" | "amount_to_confirm" => Some(self.minor.to_string()),
            "currency" => self.currency.map(|currency| currency.as_str().to_owned()),
            "customer" => self.customer.clone(),
            _ => None,
        }
    }
}

/// A hold as it was before the call in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Base {
    /// Minor units held.
    #[n(0)]
    pub minor: u64,
    /// The same against the caps.
    #[n(1)]
    pub usd: MicroUsd,
}

/// The call in flight or in doubt.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct LiveCall {
    /// Exactly what was sent, so that it can be sent again equal.
    #[n(0)]
    pub request: ExactRequest,
    /// What its audit records say.
    #[n(1)]
    pub facts: Facts,
    /// Whether a decline voids the hold (create, confirm) or leaves it open (capture, increment, and whatever the vendor
    /// tries again by itself).
    #[n(2)]
    pub decline_voids: bool,
    /// The key under which the call was made; not always the one that pays.
    #[n(3)]
    pub key_id: KeyId,
}

/// A request as it goes to Stripe, all but the key that opens it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct ExactRequest {
    /// The HTTP method.
    #[n(0)]
    pub method: String,
    /// The path, without a mount.
    #[n(1)]
    pub path: String,
    /// The canonical parameters.
    #[n(2)]
    pub params: Vec<(String, String)>,
    /// `Stripe-Version`, where the caller sent one.
    #[n(3)]
    pub version: Option<String>,
    /// `Stripe-Account`, where the caller sent one.
    #[n(4)]
    pub account: Option<String>,
    /// The key that Stripe sees; `None` only where the caller sent none in `client` mode.
    #[n(5)]
    pub idempotency_key: Option<String>,
}

/// What the records of a call say about it, whatever happens to it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Facts {
    /// The request id of the request that was admitted.
    #[n(0)]
    pub request_id: String,
    /// The HTTP method.
    #[n(1)]
    pub method: String,
    /// The concrete path.
    #[n(2)]
    pub endpoint: String,
    /// The key that Stripe sees.
    #[n(3)]
    pub idempotency_key: Option<String>,
    /// The `customer` parameter.
    #[n(4)]
    pub customer: Option<String>,
    /// The object named in the path or the parameters.
    #[n(5)]
    pub object_id: Option<String>,
    /// The caller's `metadata` parameters.
    #[n(6)]
    pub stripe_metadata: Vec<(String, String)>,
    /// What the request said of where it comes from; recorded beside the key's own metadata.
    #[n(7)]
    #[cbor(default)]
    pub context: Vec<(String, String)>,
}
