//! What a request would do, as far as the request alone tells: the one shape in which the ledger learns of it.
//!
//! Vendors build intents; the rules of the ledger read them. Nothing here knows how a vendor spells anything.

use std::sync::Arc;

use crate::call::{Estate, KeyBasis, ParamDigest};
use crate::hold::{ExactRequest, Facts, Lane};
use crate::id::{Fingerprint, HoldId, Identity};
use crate::key::Constraint;
use crate::money::{Currency, MicroUsd, Money, Rate, Rates};
use crate::time::UnixMs;

/// A money call, ready to be judged and reserved.
#[derive(Clone, Debug)]
pub struct Intent {
    /// The operation's template.
    pub operation: String,
    /// What it claims.
    pub claim: Claim,
    /// What makes another request the same call.
    pub identity: Identity,
    /// Where the upstream key comes from.
    pub basis: KeyBasis,
    /// What a same call must be equal in.
    pub fingerprint: Fingerprint,
    /// The same by parameter.
    pub params: Vec<ParamDigest>,
    /// What will be sent, before key and stamp are put on it.
    pub request: ExactRequest,
    /// The parameter that carries the stamp, where the operation takes one and it is wanted.
    pub stamp_param: Option<String>,
    /// What its records say.
    pub facts: Facts,
    /// Whose account and mode.
    pub estate: Estate,
    /// Constraints of the key on parameters that the request leaves to its object.
    pub open_constraints: Vec<Constraint>,
    /// What other currencies count.
    pub rates: Arc<Rates>,
    /// What the vendor's record says of the object, once it was read for this call.
    pub seen: Option<Seen>,
    /// Whether the object can still be paid after a decline, by the vendor itself or in a browser.
    pub payable_after_decline: bool,
    /// How the object's hold was when it was read; `None` where there was none.
    pub read_against: Option<HoldMark>,
    /// The parameter that pins the amount of a call that leaves it to its object, where the vendor takes one.
    pub pin: Option<String>,
}

/// A hold as it was at one moment: when it has changed since, what was read beside it is old.
pub type HoldMark = (HoldId, UnixMs);

/// What the vendor's own record says of an object, read before a call on it is priced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The most that the call can move; `None` where that was not asked, or the record does not tell.
    pub ceiling: Option<Money>,
    /// Its currency.
    pub currency: Option<Currency>,
    /// What had moved for the object before, in the same minor units.
    pub moved: u64,
    /// Who pays.
    pub customer: Option<String>,
}

/// The highest cost of a call, or where to find it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claim {
    /// A new object with its amount in the request.
    Create {
        /// Which way the money goes.
        lane: Lane,
        /// The amount.
        money: Money,
        /// What its minor unit counts.
        rate: Rate,
    },
    /// Part or all of what moved for an object goes back, in that object's currency.
    Return {
        /// The object.
        of: String,
        /// Minor units; `None` is all that is left, which has to be read first.
        minor: Option<u64>,
    },
    /// Something done to an object, on that object's hold. An object without a live hold has to be read first.
    Use {
        /// The object.
        object: String,
        /// What is done.
        verb: Verb,
        /// The amount that the request names: for an increment the new total.
        minor: Option<u64>,
        /// The currency that the request names, which must be the object's.
        currency: Option<Currency>,
        /// Whether the call can move no more than it names, whatever the object stands for.
        no_more: bool,
        /// Whether the object's amount can change without a call on it, so that it is read each time.
        always_read: bool,
    },
    /// Money may move, nobody can say how much, and the key says how much it may be for one call.
    Ceiling {
        /// The object that it is about, where it names one.
        object: Option<String>,
        /// What the key says, which is held.
        usd: MicroUsd,
        /// Whether all that moves is told by the object itself, so that its one hold is raised.
        on_its_hold: bool,
        /// Whether the object is read first, because what it stands for already counts too.
        always_read: bool,
    },
    /// Money may move, and nobody can say how much: only under an uncapped key that names the operation exactly.
    Unpriced {
        /// The object that it is about, where it names one.
        object: Option<String>,
    },
}

/// What is done to an object that has a hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// The customer's money is asked for now.
    Confirm,
    /// Authorised money is taken.
    Capture,
    /// The authorisation is raised to a new total.
    Increment,
    /// The object gets a new amount, and nothing moves yet.
    Reprice,
}

impl Seen {
    /// What the object itself says of a parameter that the call leaves out.
    pub fn own_field(&self, param: &str) -> Option<String> {
        match param {
            "amount" | "amount_to_capture" | "amount_to_confirm" => {
                self.ceiling.map(|money| money.minor.to_string())
            }
            "currency" => self.currency.map(|currency| currency.as_str().to_owned()),
            "customer" => self.customer.clone(),
            _ => None,
        }
    }
}
