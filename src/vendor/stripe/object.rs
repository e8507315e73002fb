//! Objects that are read before a call on them is priced, and what each one's own record says.

use crate::intent::{Seen, Verb};
use crate::money::{AMOUNT_DIGITS_MAX, Currency, Money};
use crate::vendor::stripe::json::{self, Value};
use crate::vendor::stripe::pricing::{Answers, Price, Terms};
use crate::vendor::stripe::request::Reading;

/// A kind of object that can be read first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A charge.
    Charge,
    /// A payment intent.
    Intent,
    /// An invoice.
    Invoice,
    /// An item that a later invoice bills.
    InvoiceItem,
    /// A subscription.
    Subscription,
    /// A transfer.
    Transfer,
    /// A payout.
    Payout,
}

/// A read of the sidecar's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Look {
    /// What is read.
    pub source: Source,
    /// Where it is.
    pub path: String,
    /// With which parameters.
    pub params: Vec<(String, String)>,
}

/// What the read is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Something is done to it.
    Use(Verb),
    /// Money of it goes back.
    Return,
    /// Only its fields are asked for.
    Fields,
}

impl Source {
    /// As rows write it.
    pub(super) fn read(word: &str) -> Option<Self> {
        Some(match word {
            "charge" => Self::Charge,
            "payment_intent" => Self::Intent,
            "invoice" => Self::Invoice,
            "invoiceitem" => Self::InvoiceItem,
            "subscription" => Self::Subscription,
            "transfer" => Self::Transfer,
            "payout" => Self::Payout,
            _ => return None,
        })
    }

    const fn object(self) -> &'static str {
        match self {
            Self::Charge => "charge",
            Self::Intent => "payment_intent",
            Self::Invoice => "invoice",
            Self::InvoiceItem => "invoiceitem",
            Self::Subscription => "subscription",
            Self::Transfer => "transfer",
            Self::Payout => "payout",
        }
    }

    /// The read of one such object.
    pub fn look(self, id: &str) -> Look {
        let list = match self {
            Self::Charge => "charges",
            Self::Intent => "payment_intents",
            Self::Invoice => "invoices",
            Self::InvoiceItem => "invoiceitems",
            Self::Subscription => "subscriptions",
            Self::Transfer => "transfers",
            Self::Payout => "payouts",
        };
        // What was refunded of an intent, its charge tells.
        let params = match self {
            Self::Intent => vec![("expand[0]".to_owned(), "latest_charge".to_owned())],
            Self::Charge
            | Self::Invoice
            | Self::InvoiceItem
            | Self::Subscription
            | Self::Transfer
            | Self::Payout => Vec::new(),
        };
        Look { source: self, path: format!("/v1/{list}/{id}"), params }
    }
}

/// The read that a call's price waits for, and what it is for; `None` where no read can tell it.
pub fn look(reading: &Reading<'_>, price: &Price) -> Option<(Look, Purpose)> {
    let in_path = || Some((reading.ids.first()?.as_str(), *price.reads.first()?));
    let (id, source, purpose) = match &price.terms {
        Terms::Named => return None,
        Terms::Use(verb) => {
            let (id, source) = in_path()?;
            (id, source, Purpose::Use(*verb))
        }
        // What an invoice stands for already is part of what it may come to.
        Terms::Ceiling { .. } => {
            let (id, source) = in_path()?;
            let purpose = if price.always_read { Purpose::Use(Verb::Reprice) } else { Purpose::Fields };
            (id, source, purpose)
        }
        Terms::Return(params) if params.is_empty() => {
            let (id, source) = in_path()?;
            (id, source, Purpose::Return)
        }
        Terms::Return(params) => {
            let (param, id) = reading.params.first_of(params)?;
            let at = params.iter().position(|known| *known == param)?;
            (id, *price.reads.get(at)?, Purpose::Return)
        }
    };
    is_id(id).then(|| (source.look(id), purpose))
}

/// The read of an object of which only its fields are asked: one that a call would end, or leave as it is.
pub fn look_of_fields(reading: &Reading<'_>) -> Option<Look> {
    let id = reading.ids.first().filter(|id| is_id(id))?;
    if let Some(price) = &reading.operation.price {
        return price.reads.first().map(|source| source.look(id));
    }
    let source = match reading.operation.ends? {
        Answers::Intent => Source::Intent,
        Answers::Invoice => Source::Invoice,
        Answers::InvoiceItem => Source::InvoiceItem,
        Answers::Payout => Source::Payout,
        // What else can be ended names no customer, or is not read here.
        Answers::Charge
        | Answers::ChargeRefund
        | Answers::Refund
        | Answers::LineItem
        | Answers::NewSubscription
        | Answers::Subscription
        | Answers::SubscriptionItem
        | Answers::SubscriptionSchedule
        | Answers::Transfer
        | Answers::TransferReversal
        | Answers::BalanceTransaction
        | Answers::CheckoutSession => return None,
    };
    Some(source.look(id))
}

/// Whether a text can only be an id: it becomes part of a path.
pub(super) fn is_id(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'))
}

/// What an object's record says. `None` when it cannot be read, or is not what was asked for.
pub fn seen(look: &Look, purpose: Purpose, body: &[u8]) -> Option<Seen> {
    let body = json::read(body)?;
    let asked = look.path.rsplit('/').next();
    if text(&body, "object") != Some(look.source.object()) || text(&body, "id") != asked {
        return None;
    }
    let currency = text(&body, "currency").and_then(Currency::parse);
    let figures = match purpose {
        Purpose::Fields => None,
        Purpose::Use(_) | Purpose::Return => Some(figures(look.source, purpose, &body)?),
    };
    let (minor, moved) = figures.unwrap_or_default();
    Some(Seen {
        ceiling: figures.and(currency).map(|currency| Money { minor, currency }),
        currency,
        moved,
        customer: reference(&body, "customer"),
    })
}

/// The most that can still move, and what had moved before.
fn figures(source: Source, purpose: Purpose, body: &Value<'_>) -> Option<(u64, u64)> {
    let of = |name| amount(body, name);
    Some(match (source, purpose) {
        // What is captured is at most what was authorised.
        (Source::Charge, Purpose::Use(_)) | (Source::Payout, _) => (of("amount")?, 0),
        (Source::Charge, _) => (left(captured(body)?, of("amount_refunded")?), of("amount_refunded")?),
        // A second capture takes what the first one left.
        // Where a figure is missing, the higher one stands in for it.
        (Source::Intent, Purpose::Use(Verb::Capture)) => {
            (amount_or(body, "amount_capturable", "amount")?, of("amount_received").unwrap_or(0))
        }
        (Source::Intent, Purpose::Use(_)) => (of("amount")?, of("amount_received").unwrap_or(0)),
        (Source::Intent, _) => {
            let refunded = match body.get("latest_charge") {
                Some(charge @ Value::Object(_)) => amount(charge, "amount_refunded")?,
                // Not expanded, though asked for: nobody says how much went back already.
                Some(_) | None => 0,
            };
            (left(amount_or(body, "amount_received", "amount")?, refunded), refunded)
        }
        (Source::Invoice, _) => {
            // A draft's remaining amount is what it is due; what was paid out of band is no money of ours.
            let due = if is_draft(body) { of("amount_due")? } else { 0 };
            (amount_or(body, "amount_remaining", "amount_due")?.max(due), of("amount_paid").unwrap_or(0))
        }
        // A negative one takes from what is owed.
        (Source::InvoiceItem, _) => (of("amount").unwrap_or(0), 0),
        (Source::Transfer, _) => (left(of("amount")?, of("amount_reversed")?), of("amount_reversed")?),
        (Source::Subscription, _) => return None,
    })
}

fn captured(charge: &Value<'_>) -> Option<u64> {
    let whole = amount(charge, "amount")?;
    // Stripe's own fixtures show 0 in `amount_captured` of a captured charge.
    Some(amount(charge, "amount_captured").filter(|captured| *captured > 0).unwrap_or(whole))
}

const fn left(whole: u64, gone: u64) -> u64 {
    whole.saturating_sub(gone)
}

fn is_draft(invoice: &Value<'_>) -> bool {
    text(invoice, "status") == Some("draft")
}

/// Objects whose money an answer's object now carries: the items that an invoice bills.
pub fn billed_items(answers: Answers, body: &[u8]) -> Vec<String> {
    if answers != Answers::Invoice {
        return Vec::new();
    }
    let Some(body) = json::read(body) else { return Vec::new() };
    // An item can leave a draft, and is billed by the next invoice then.
    if is_draft(&body) {
        return Vec::new();
    }
    let lines = body.get("lines").and_then(|lines| lines.get("data")).and_then(Value::as_array);
    lines.into_iter().flatten().filter_map(item_of).collect()
}

/// The item of a line: newer versions name it under `parent`.
fn item_of(line: &Value<'_>) -> Option<String> {
    let parent = line.get("parent").and_then(|parent| parent.get("invoice_item_details"));
    parent.and_then(|details| reference(details, "invoice_item")).or_else(|| reference(line, "invoice_item"))
}

/// The id in a field that may hold an id or the expanded object.
pub(super) fn reference(object: &Value<'_>, field: &str) -> Option<String> {
    let value = object.get(field)?;
    value.as_str().or_else(|| text(value, "id")).map(str::to_owned)
}

pub(super) fn text<'a>(object: &'a Value<'_>, field: &str) -> Option<&'a str> {
    object.get(field).and_then(Value::as_str)
}

/// The same, or a higher one in its place where it is not there at all.
pub(super) fn amount_or(object: &Value<'_>, field: &str, stand_in: &str) -> Option<u64> {
    match object.get(field) {
        None | Some(Value::Null) => amount(object, stand_in),
        Some(_) => amount(object, field),
    }
}

/// An amount of at most twelve digits. A negative one is none.
pub(super) fn amount(object: &Value<'_>, field: &str) -> Option<u64> {
    let ceiling = 10_u64.pow(u32::try_from(AMOUNT_DIGITS_MAX).unwrap_or(0));
    object.get(field).and_then(Value::as_u64).filter(|minor| *minor < ceiling)
}
