//! What a request would do, as far as the request alone tells: the one shape in which the ledger learns of it.
//!
//! Vendors build intents; the rules of the ledger read them. Nothing here knows how a vendor spells anything.

use crate::call::{Estate, KeyBasis, ParamDigest};
use crate::hold::{ExactRequest, Facts, Lane};
use crate::id::{Fingerprint, Identity};
use crate::key::Constraint;
use crate::money::{MicroUsd, Money};

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
        /// The same against the caps.
        usd: MicroUsd,
    },
    /// A refund of an object that the ledger must know, in that object's currency.
    Refund {
        /// The object.
        of: String,
        /// Minor units.
        minor: u64,
    },
    /// Something done to an object that the ledger must know, on that object's hold.
    Use {
        /// The object.
        object: String,
        /// What is done.
        verb: Verb,
        /// The amount that the request names: for an increment the new total.
        minor: Option<u64>,
    },
    /// Money may move, and nobody can say how much: only under an uncapped key that names the operation exactly.
    Unpriced,
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
}
