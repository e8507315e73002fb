//! The price of an operation, as its row in `catalogue.txt` tells it: where the amount is, what is read first, how the
//! answer is read.

use crate::hold::Lane;
use crate::intent::Verb;
use crate::vendor::stripe::object::Source;

/// What is known of an operation that can move money and is priced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Price {
    /// How the most that a call can move is found.
    pub terms: Terms,
    /// Which way money goes.
    pub lane: Lane,
    /// What a 2xx answers with.
    pub answers: Answers,
    /// The parameter with the amount.
    pub amount: Option<&'static str>,
    /// The parameter with the currency.
    pub currency: Option<&'static str>,
    /// The parameter that carries the amount that was read, when the caller names none.
    pub pin: Option<&'static str>,
    /// What is read first: for a `return` of several parameters one for each.
    pub reads: Vec<Source>,
    /// Whether it is read each time: its amount changes without a call on it.
    pub always_read: bool,
    /// Parameters of which the first that is given is the payer or object of a call.
    pub payer: Vec<&'static str>,
    /// A call with none but these moves and re-prices nothing; `None`: every call may.
    pub harmless: Option<Vec<&'static str>>,
    /// Whether it makes an object that can carry the stamp.
    pub stamp: bool,
}

/// How the most that a call can move is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Terms {
    /// The request says so.
    Named,
    /// The object in the path says so.
    Use(Verb),
    /// Money goes back, of the object in one of these parameters, or in the path where there are none.
    Return(Vec<&'static str>),
    /// Nobody can say; the key's `max_usd_per_request` is held.
    Ceiling {
        /// On the hold of the object in the path, when it has a live one.
        on_hold: bool,
    },
}

/// What a 2xx answers with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answers {
    /// A charge that was made or captured.
    Charge,
    /// A charge that was refunded.
    ChargeRefund,
    /// A payment intent.
    Intent,
    /// A refund.
    Refund,
    /// An invoice.
    Invoice,
    /// A line of an invoice.
    LineItem,
    /// An item that a later invoice bills.
    InvoiceItem,
    /// A subscription that was just made, whose latest invoice is its first.
    NewSubscription,
    /// A subscription that was changed.
    Subscription,
    /// An item of a subscription, also one that was deleted.
    SubscriptionItem,
    /// The schedule of a subscription.
    SubscriptionSchedule,
    /// A transfer to a connected account.
    Transfer,
    /// A transfer that was taken back.
    TransferReversal,
    /// A payout to a bank account.
    Payout,
    /// A change of what a customer owes.
    BalanceTransaction,
    /// A checkout session.
    CheckoutSession,
}

impl Price {
    /// Reads the part of a row that prices it; `None` for a row without a price.
    pub(super) fn read(words: &[&'static str], is_money_out: bool) -> Option<Self> {
        let has = |word: &str| words.contains(&word);
        let value = |name: &str| words.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        let list = |name: &str| -> Vec<&'static str> {
            value(name).map(|text| text.split('|').collect()).unwrap_or_default()
        };
        let terms = if has("named") {
            Terms::Named
        } else if has("ceiling") {
            Terms::Ceiling { on_hold: has("on_hold") }
        } else if let Some(verb) = value("use") {
            Terms::Use(verb_of(verb)?)
        } else if let Some(of) = value("return") {
            Terms::Return(if of == "path" { Vec::new() } else { of.split('|').collect() })
        } else {
            return None;
        };
        Some(Self {
            terms,
            lane: if is_money_out { Lane::Out } else { Lane::In },
            answers: Answers::read(value("answers")?)?,
            amount: value("amount"),
            currency: value("currency"),
            pin: value("pin"),
            reads: list("reads").into_iter().filter_map(Source::read).collect(),
            always_read: has("always"),
            payer: list("payer"),
            harmless: value("harmless").map(|text| text.split('|').collect()),
            stamp: has("stamp"),
        })
    }
}

fn verb_of(word: &str) -> Option<Verb> {
    Some(match word {
        "confirm" => Verb::Confirm,
        "capture" => Verb::Capture,
        "increment" => Verb::Increment,
        "reprice" => Verb::Reprice,
        _ => return None,
    })
}

impl Answers {
    /// All of them, as rows write them.
    pub const ALL: [(&'static str, Self); 16] = [
        ("charge", Self::Charge),
        ("charge_refund", Self::ChargeRefund),
        ("payment_intent", Self::Intent),
        ("refund", Self::Refund),
        ("invoice", Self::Invoice),
        ("line_item", Self::LineItem),
        ("invoiceitem", Self::InvoiceItem),
        ("new_subscription", Self::NewSubscription),
        ("subscription", Self::Subscription),
        ("subscription_item", Self::SubscriptionItem),
        ("subscription_schedule", Self::SubscriptionSchedule),
        ("transfer", Self::Transfer),
        ("transfer_reversal", Self::TransferReversal),
        ("payout", Self::Payout),
        ("customer_balance_transaction", Self::BalanceTransaction),
        ("checkout.session", Self::CheckoutSession),
    ];

    pub(super) fn read(word: &str) -> Option<Self> {
        Self::ALL.iter().find(|(name, _)| *name == word).map(|(_, answers)| *answers)
    }

    /// What `object` says in the answer. A line of an invoice and a deleted object are told apart by their fields.
    pub const fn object(self) -> &'static str {
        match self {
            Self::Charge | Self::ChargeRefund => "charge",
            Self::Intent => "payment_intent",
            Self::Refund => "refund",
            Self::Invoice => "invoice",
            Self::LineItem => "line_item",
            Self::InvoiceItem => "invoiceitem",
            Self::NewSubscription | Self::Subscription => "subscription",
            Self::SubscriptionItem => "subscription_item",
            Self::SubscriptionSchedule => "subscription_schedule",
            Self::Transfer => "transfer",
            Self::TransferReversal => "transfer_reversal",
            Self::Payout => "payout",
            Self::BalanceTransaction => "customer_balance_transaction",
            Self::CheckoutSession => "checkout.session",
        }
    }
}
