//! Finding again what a call in doubt may have done: which read tells, and what its answer proves.
//!
//! An object that carries the call's stamp was made by it. An object that a call was about proves it only by a state that
//! nothing but that call, or its end, can have brought. Absence proves nothing.

use crate::call::{Outcome, Reading, Record};
use crate::hold::ExactRequest;
use crate::intent::Verb;
use crate::money::{Currency, Money, Rates};
use crate::time::UnixMs;
use crate::vendor::stripe::answer::{self, Answer, Expected};
use crate::vendor::stripe::catalogue::{self, Operation};
use crate::vendor::stripe::json::{self, Value};
use crate::vendor::stripe::object::{Look, Source, amount, is_id, reference, text};
use crate::vendor::stripe::pricing::{Answers, Price, Terms};

/// How far Stripe's clock may be from ours, in seconds.
const CLOCKS_APART_S: u64 = 3_600;
/// Objects of one page.
const PAGE: &str = "100";

/// A read that may tell what became of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// The object that the call was about.
    Object {
        /// Where it is.
        path: String,
        /// With which parameters.
        params: Vec<(String, String)>,
    },
    /// What was made around then, page by page, for the one that carries the stamp.
    List {
        /// Where it is.
        path: String,
        /// With which parameters.
        params: Vec<(String, String)>,
    },
}

/// A call in doubt, as far as a search needs to know it.
#[derive(Clone, Copy, Debug)]
pub struct Lost<'a> {
    /// What was sent.
    pub request: &'a ExactRequest,
    /// The mark of its object.
    pub stamp: Option<&'a str>,
    /// When bytes first may have left.
    pub first_send: UnixMs,
    /// When bytes last may have left.
    pub last_send: UnixMs,
}

impl<'a> Lost<'a> {
    fn expected(&self, answers: Answers, held: Money, is_ceiling: bool, rates: &'a Rates) -> Expected<'a> {
        let (params, asked_at) = (self.request.params.as_slice(), self.first_send);
        Expected { answers, held, is_ceiling, rates, params, asked_at }
    }
}

/// What a read proves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Proof {
    /// What became of the call, and the objects that it made or used.
    Of(Outcome, Vec<String>),
    /// Its object is over, and nothing of it moved.
    Over(Record),
    /// Nothing.
    None,
}

/// What can be looked for; `Err` says why nothing can.
///
/// # Errors
/// In words, for an operator.
pub fn plan(lost: &Lost<'_>) -> Result<Plan, &'static str> {
    let (operation, ids) = operation_of(lost.request).ok_or("the operation is not known here")?;
    let price =
        operation.price.as_ref().ok_or("the operation is not priced, so its answers cannot be read here")?;
    if let Terms::Use(_) = price.terms {
        let source = price.reads.first().ok_or("its object cannot be read here")?;
        let id = ids.first().filter(|id| is_id(id)).ok_or("its object's id cannot be part of a path")?;
        let look = source.look(id);
        return Ok(Plan::Object { path: look.path, params: look.params });
    }
    if lost.stamp.is_none() {
        return Err("what it may have made carries no stamp");
    }
    let path = lost.request.path.clone();
    let segments = catalogue::segments(&path).map_err(|_| "its path cannot be listed")?;
    if catalogue::find("GET", &segments).is_none() {
        return Err("what it makes cannot be listed");
    }
    let mut params = vec![("limit".to_owned(), PAGE.to_owned())];
    if let Some((_, filters, more)) = LISTS.iter().find(|(list, ..)| *list == path) {
        let from = (lost.first_send.millis() / 1_000).saturating_sub(CLOCKS_APART_S);
        let to = (lost.last_send.millis() / 1_000).saturating_add(CLOCKS_APART_S);
        params.push(("created[gte]".to_owned(), from.to_string()));
        params.push(("created[lte]".to_owned(), to.to_string()));
        params.extend(more.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        let given = lost.request.params.iter();
        params.extend(
            given.filter(|(name, value)| filters.contains(&name.as_str()) && !value.is_empty()).cloned(),
        );
    }
    params.sort();
    Ok(Plan::List { path, params })
}

/// Lists that take a time window: their filters, and what has to be said besides.
#[expect(clippy::type_complexity, reason = "a table is read best as one")]
const LISTS: &[(&str, &[&str], &[(&str, &str)])] = &[
    ("/v1/charges", &["customer"], &[]),
    ("/v1/checkout/sessions", &["customer", "subscription"], &[]),
    ("/v1/invoiceitems", &["customer"], &[]),
    ("/v1/invoices", &["customer", "subscription"], &[]),
    ("/v1/payment_intents", &["customer"], &[]),
    ("/v1/payouts", &["destination"], &[]),
    ("/v1/refunds", &["charge", "payment_intent"], &[]),
    ("/v1/subscription_schedules", &["customer"], &[]),
    ("/v1/subscriptions", &["customer"], &[("status", "all")]),
    ("/v1/transfers", &["destination"], &[]),
];

fn operation_of(request: &ExactRequest) -> Option<(&'static Operation, Vec<&str>)> {
    catalogue::find(&request.method, &catalogue::segments(&request.path).ok()?)
}

/// One page of a list: the object with this stamp, and the id after which the next page begins.
pub fn in_page(page: &[u8], stamp: &str) -> Option<(Option<serde_json::Value>, Option<String>)> {
    let page: serde_json::Value = serde_json::from_slice(page).ok()?;
    let items = page.get("data")?.as_array()?;
    let carries = |item: &&serde_json::Value| {
        let of_call = item.get("metadata").and_then(|metadata| metadata.get("keybrake_call"));
        of_call.and_then(serde_json::Value::as_str) == Some(stamp)
    };
    let found = items.iter().find(carries).cloned();
    let has_more = page.get("has_more").and_then(serde_json::Value::as_bool) == Some(true);
    let last = items.last().and_then(|item| item.get("id")?.as_str()).map(str::to_owned);
    Some((found, last.filter(|_| has_more)))
}

/// What has to be read besides an object that carries the call's stamp, to know how much moved.
pub fn besides(lost: &Lost<'_>, object: &[u8]) -> Option<Look> {
    let (operation, _) = operation_of(lost.request)?;
    answer::follow(Answer { status: 200, body: object }, operation.price.as_ref()?.answers)
}

/// What an object that carries the call's stamp proves; `more` is what [`besides`] asked for.
pub fn proof_of_stamped(
    lost: &Lost<'_>,
    held: Money,
    is_ceiling: bool,
    rates: &Rates,
    object: &[u8],
    more: Option<&[u8]>,
) -> Proof {
    let Some((operation, _)) = operation_of(lost.request) else { return Proof::None };
    let Some(Price { answers, .. }) = operation.price else { return Proof::None };
    let expected = lost.expected(answers, held, is_ceiling, rates);
    let (reading, objects) = answer::read(Answer { status: 200, body: object }, Some(expected), more);
    outcome_of(&reading).map_or(Proof::None, |outcome| Proof::Of(outcome, objects))
}

/// What the object that a call was about proves of the call.
pub fn proof_of_object(lost: &Lost<'_>, held: Money, object: &[u8]) -> Proof {
    let Some((operation, ids)) = operation_of(lost.request) else { return Proof::None };
    let Some(Price { answers, terms: Terms::Use(verb), .. }) = operation.price else { return Proof::None };
    let Some(body) = json::read(object) else { return Proof::None };
    if text(&body, "id") != ids.first().copied() || text(&body, "object") != Some(answers.object()) {
        return Proof::None;
    }
    if let Some(record) = record(answers, &body) {
        match record {
            Record::Ended => return Proof::Over(record),
            // It moved: whoever asked for it, this call's money is spent with it.
            Record::Moved { .. } => {}
        }
    }
    let named =
        lost.request.params.iter().find(|(name, _)| name == "amount").map(|(_, value)| value.as_str());
    let is_new_total = amount(&body, "amount").map(|minor| minor.to_string()).as_deref() == named;
    let status = text(&body, "status").unwrap_or_default();
    let finalizes = operation.template.ends_with("/finalize") || operation.template.ends_with("/send");
    let shows = match (answers, verb) {
        (Answers::Intent, Verb::Confirm) => {
            ["succeeded", "processing", "requires_capture", "requires_action"].contains(&status)
        }
        (Answers::Intent, Verb::Capture) => status == "succeeded",
        (Answers::Intent, Verb::Increment | Verb::Reprice) => status == "succeeded" || is_new_total,
        (Answers::Charge, _) => body.get("captured").and_then(Value::as_bool) == Some(true),
        (Answers::Invoice, _) => status == "paid" || (finalizes && status == "open"),
        (Answers::InvoiceItem, _) => is_new_total,
        _ => false,
    };
    if !shows {
        return Proof::None;
    }
    let none = Rates::default();
    let expected = lost.expected(answers, held, false, &none);
    let (reading, objects) = answer::read(Answer { status: 200, body: object }, Some(expected), None);
    outcome_of(&reading).map_or(Proof::None, |outcome| Proof::Of(outcome, objects))
}

fn outcome_of(reading: &Reading) -> Option<Outcome> {
    match reading {
        Reading::Moved { minor } => Some(Outcome::Spent { minor: *minor }),
        Reading::Pending { minor } => Some(Outcome::Pending { minor: *minor }),
        Reading::NotMoved => Some(Outcome::Declined),
        Reading::Declined
        | Reading::Invalid
        | Reading::KeyMismatch
        | Reading::OwnKeyRefused
        | Reading::Throttled
        | Reading::Unclear { .. }
        | Reading::NotSent
        | Reading::Silence => None,
    }
}

/// The read of an open object, by what its id says that it is; `None` for one whose record ends no hold.
pub fn read_of(object_id: &str) -> Option<(Answers, String)> {
    let (prefix, _) = object_id.split_once('_')?;
    let (answers, list) = match prefix {
        "ch" | "py" => (Answers::Charge, "charges"),
        "pi" => (Answers::Intent, "payment_intents"),
        "re" | "pyr" => (Answers::Refund, "refunds"),
        "in" => (Answers::Invoice, "invoices"),
        "ii" => (Answers::InvoiceItem, "invoiceitems"),
        "po" => (Answers::Payout, "payouts"),
        "cs" => (Answers::CheckoutSession, "checkout/sessions"),
        _ => return None,
    };
    is_id(object_id).then(|| (answers, format!("/v1/{list}/{object_id}")))
}

/// What an open object's record says in the end; `None` while it is not final, or not what was asked for.
/// It is told in the currency that is held.
pub fn final_record(
    object_id: &str,
    answers: Answers,
    held: Currency,
    rates: &Rates,
    body: &[u8],
) -> Option<Record> {
    let body = json::read(body)?;
    let is_it = text(&body, "id") == Some(object_id) && text(&body, "object") == Some(answers.object());
    match record(answers, &body).filter(|_| is_it)? {
        Record::Ended => Some(Record::Ended),
        Record::Moved { minor } => {
            let currency = text(&body, "currency").and_then(Currency::parse)?;
            let minor = answer::exchange(Money { minor, currency }, held, rates)?;
            Some(Record::Moved { minor })
        }
    }
}

/// The invoice that bills an item, by the item's record.
pub fn invoice_of(item_id: &str, item: &[u8]) -> Option<String> {
    let item = json::read(item)?;
    let is_it = text(&item, "id") == Some(item_id) && text(&item, "object") == Some("invoiceitem");
    reference(&item, "invoice").filter(|invoice| is_it && is_id(invoice))
}

/// What an item came to once its invoice was paid: nothing more where the invoice itself is counted.
pub fn billed_item(item: &[u8], invoice: &[u8], held: Currency, invoice_is_counted: bool) -> Option<Record> {
    let (item, invoice) = (json::read(item)?, json::read(invoice)?);
    let is_paid = text(&invoice, "object") == Some("invoice") && text(&invoice, "status") == Some("paid");
    if !is_paid || text(&item, "currency").and_then(Currency::parse) != Some(held) {
        return None;
    }
    let minor = if invoice_is_counted { 0 } else { amount(&item, "amount").unwrap_or(0) };
    Some(Record::Moved { minor })
}

fn record(answers: Answers, body: &Value<'_>) -> Option<Record> {
    let moved = |minor| Some(if minor == 0 { Record::Ended } else { Record::Moved { minor } });
    let flag = |name| body.get(name).and_then(Value::as_bool) == Some(true);
    let of = |name| amount(body, name);
    match (answers, text(body, "status").unwrap_or_default()) {
        (Answers::Intent, "succeeded" | "canceled") => moved(of("amount_received")?),
        // An authorisation that was let go is told as a refund of all of it.
        (Answers::Charge, "succeeded") if flag("refunded") && !flag("captured") => Some(Record::Ended),
        (Answers::Charge, "succeeded") if flag("captured") => {
            moved(of("amount_captured").filter(|captured| *captured > 0).or(of("amount"))?)
        }
        (Answers::Refund, "succeeded") | (Answers::Payout, "paid") => moved(of("amount")?),
        (Answers::Charge | Answers::Refund | Answers::Payout, "failed")
        | (Answers::Refund | Answers::Payout, "canceled") => Some(Record::Ended),
        (Answers::CheckoutSession, "expired") if !answer::is_recoverable(body) => Some(Record::Ended),
        (Answers::Invoice, "paid" | "void") => moved(of("amount_paid")?),
        (Answers::CheckoutSession, "complete")
            if text(body, "payment_status") == Some("paid") && text(body, "mode") == Some("payment") =>
        {
            moved(of("amount_total")?)
        }
        _ => None,
    }
}

/// Where one object is read, to tell it again to whoever made it.
pub fn object_path(operation: &str, object_id: &str) -> Option<String> {
    let (method, path) = operation.split_once(' ')?;
    let operation = catalogue::all().iter().find(|known| known.template == format!("{method} {path}"))?;
    let source = match operation.price.as_ref()?.answers {
        Answers::Charge => Source::Charge,
        Answers::Intent => Source::Intent,
        Answers::Invoice => Source::Invoice,
        Answers::InvoiceItem => Source::InvoiceItem,
        Answers::NewSubscription | Answers::Subscription => Source::Subscription,
        Answers::Transfer => Source::Transfer,
        Answers::Payout => Source::Payout,
        Answers::Refund => return is_id(object_id).then(|| format!("/v1/refunds/{object_id}")),
        Answers::CheckoutSession => {
            return is_id(object_id).then(|| format!("/v1/checkout/sessions/{object_id}"));
        }
        Answers::ChargeRefund
        | Answers::LineItem
        | Answers::SubscriptionItem
        | Answers::SubscriptionSchedule
        | Answers::TransferReversal
        | Answers::BalanceTransaction => return None,
    };
    is_id(object_id).then(|| source.look(object_id).path)
}
