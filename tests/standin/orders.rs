//! Requests as operations: the table of endpoints with the parameters that each one knows, and the validation that
//! comes before the execution and before the idempotency key is bound.

use serde_json::{Map, Value};

use super::errors::{self, Failure};
use super::form::Params;

/// The largest amount that Stripe takes in most currencies: eight digits.
const AMOUNT_MAX: u64 = 99_999_999;
/// The smallest charge in US dollars.
const USD_AMOUNT_MIN: u64 = 50;
const METADATA_KEYS_MAX: usize = 50;
const PAGE_MAX: u64 = 100;
const PAGE_DEFAULT: u64 = 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    Account,
    Balance,
    ChargeCreate,
    ChargeList,
    ChargeGet,
    ChargeCapture,
    IntentCreate,
    IntentList,
    IntentGet,
    IntentUpdate,
    IntentConfirm,
    IntentCapture,
    IntentCancel,
    IntentIncrement,
    RefundCreate,
    RefundList,
    RefundGet,
    CustomerCreate,
    CustomerList,
    CustomerGet,
    /// A test plays it.
    Performed,
    /// The record of a play, or the list of it.
    Recalled,
}

/// The operation of a request line and the id in its path, empty where there is none.
pub(crate) fn route<'a>(method: &str, path: &'a str) -> Option<(Route, &'a str)> {
    let parts: Vec<&'a str> = path.strip_prefix("/v1/")?.split('/').collect();
    let found = match (method, parts.as_slice()) {
        ("GET", ["account"]) => (Route::Account, ""),
        ("GET", ["balance"]) => (Route::Balance, ""),
        ("POST", ["charges"]) => (Route::ChargeCreate, ""),
        ("GET", ["charges"]) => (Route::ChargeList, ""),
        ("GET", ["charges", id]) => (Route::ChargeGet, *id),
        ("POST", ["charges", id, "capture"]) => (Route::ChargeCapture, *id),
        ("POST", ["payment_intents"]) => (Route::IntentCreate, ""),
        ("GET", ["payment_intents"]) => (Route::IntentList, ""),
        ("GET", ["payment_intents", id]) => (Route::IntentGet, *id),
        ("POST", ["payment_intents", id]) => (Route::IntentUpdate, *id),
        ("POST", ["payment_intents", id, "confirm"]) => (Route::IntentConfirm, *id),
        ("POST", ["payment_intents", id, "capture"]) => (Route::IntentCapture, *id),
        ("POST", ["payment_intents", id, "cancel"]) => (Route::IntentCancel, *id),
        ("POST", ["payment_intents", id, "increment_authorization"]) => (Route::IntentIncrement, *id),
        ("POST", ["refunds"]) => (Route::RefundCreate, ""),
        ("GET", ["refunds"]) => (Route::RefundList, ""),
        ("GET", ["refunds", id]) => (Route::RefundGet, *id),
        ("POST", ["customers"]) => (Route::CustomerCreate, ""),
        ("GET", ["customers"]) => (Route::CustomerList, ""),
        ("GET", ["customers", id]) => (Route::CustomerGet, *id),
        _ => return None,
    };
    let plain = |id: &str| id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    let listing_or_create = parts.len() == 1;
    (listing_or_create || !found.1.is_empty() && found.1 != "search" && plain(found.1)).then_some(found)
}

impl Route {
    /// How the oracle names it.
    pub(crate) fn operation(self) -> &'static str {
        match self {
            Self::Account => "GET /v1/account",
            Self::Balance => "GET /v1/balance",
            Self::ChargeCreate => "POST /v1/charges",
            Self::ChargeList => "GET /v1/charges",
            Self::ChargeGet => "GET /v1/charges/{id}",
            Self::ChargeCapture => "POST /v1/charges/{id}/capture",
            Self::IntentCreate => "POST /v1/payment_intents",
            Self::IntentList => "GET /v1/payment_intents",
            Self::IntentGet => "GET /v1/payment_intents/{id}",
            Self::IntentUpdate => "POST /v1/payment_intents/{id}",
            Self::IntentConfirm => "POST /v1/payment_intents/{id}/confirm",
            Self::IntentCapture => "POST /v1/payment_intents/{id}/capture",
            Self::IntentCancel => "POST /v1/payment_intents/{id}/cancel",
            Self::IntentIncrement => "POST /v1/payment_intents/{id}/increment_authorization",
            Self::RefundCreate => "POST /v1/refunds",
            Self::RefundList => "GET /v1/refunds",
            Self::RefundGet => "GET /v1/refunds/{id}",
            Self::CustomerCreate => "POST /v1/customers",
            Self::CustomerList => "GET /v1/customers",
            Self::CustomerGet => "GET /v1/customers/{id}",
            Self::Performed => "POST of a play",
            Self::Recalled => "GET of a play",
        }
    }

    /// Top-level parameters, separated by spaces; None where anything is taken. From the request types of Stripe's
    /// Python library for `2026-10-28.endive`; what is not listed is a 400, as at Stripe. Note where there is no
    /// `metadata`: capture of a charge, confirm and cancel of an intent.
    fn parameters(self) -> Option<&'static str> {
        Some(match self {
            Self::Account | Self::Balance | Self::ChargeGet | Self::RefundGet | Self::CustomerGet => "expand",
            Self::IntentGet => "client_secret expand",
            Self::ChargeCreate => {
                "amount application_fee application_fee_amount capture currency customer description destination \
                 expand metadata on_behalf_of radar_options receipt_email shipping source statement_descriptor \
                 statement_descriptor_suffix transfer_data transfer_group"
            }
            Self::ChargeList => {
                "created customer ending_before expand limit payment_intent starting_after transfer_group"
            }
            Self::ChargeCapture => {
                "amount application_fee application_fee_amount expand receipt_email statement_descriptor \
                 statement_descriptor_suffix transfer_data transfer_group"
            }
            Self::IntentCreate => {
                "allowed_payment_method_types amount amount_details application_fee_amount \
                 automatic_payment_methods capture_method confirm confirmation_method confirmation_token currency \
                 customer customer_account description error_on_requires_action excluded_payment_method_types \
                 expand hooks mandate mandate_data metadata off_session on_behalf_of payment_details payment_method \
                 payment_method_configuration payment_method_data payment_method_options payment_method_types \
                 radar_options receipt_email return_url setup_future_usage shipping statement_descriptor \
                 statement_descriptor_suffix transfer_data transfer_group use_stripe_sdk"
            }
            Self::IntentUpdate => {
                "allowed_payment_method_types amount amount_details application_fee_amount capture_method currency \
                 customer customer_account description excluded_payment_method_types expand hooks metadata \
                 payment_details payment_method payment_method_configuration payment_method_data \
                 payment_method_options payment_method_types receipt_email setup_future_usage shipping \
                 statement_descriptor statement_descriptor_suffix transfer_data transfer_group"
            }
            Self::IntentConfirm => {
                "allowed_payment_method_types amount_details amount_to_confirm capture_method confirmation_token \
                 error_on_requires_action excluded_payment_method_types expand hooks mandate mandate_data \
                 off_session payment_details payment_method payment_method_data payment_method_options \
                 payment_method_types radar_options receipt_email return_url setup_future_usage shipping \
                 use_stripe_sdk"
            }
            Self::IntentCapture => {
                "amount_details amount_to_capture application_fee_amount expand final_capture hooks metadata \
                 payment_details statement_descriptor statement_descriptor_suffix transfer_data"
            }
            Self::IntentCancel => "cancellation_reason expand",
            Self::IntentIncrement => {
                "amount amount_details application_fee_amount description expand hooks metadata payment_details \
                 statement_descriptor transfer_data"
            }
            Self::IntentList => "created customer customer_account ending_before expand limit starting_after",
            Self::RefundCreate => {
                "amount charge currency customer expand instructions_email metadata origin payment_intent reason \
                 refund_application_fee reverse_transfer"
            }
            Self::RefundList => "charge created ending_before expand limit payment_intent starting_after",
            Self::CustomerList => "created email ending_before expand limit starting_after",
            Self::CustomerCreate | Self::Performed | Self::Recalled => return None,
        })
    }
}

/// When money that was held is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Capture {
    Now,
    Later,
}

#[derive(Debug)]
pub(crate) struct Sale {
    pub(crate) amount: u64,
    pub(crate) currency: String,
    pub(crate) customer: Option<String>,
    pub(crate) description: Option<String>,
    pub(crate) metadata: Map<String, Value>,
    pub(crate) method: Option<String>,
    pub(crate) capture: Capture,
}

/// How an intent is confirmed.
#[derive(Debug)]
pub(crate) struct Confirmation {
    pub(crate) method: Option<String>,
    /// Without the payer at hand, or told so: what needs an action is then a decline.
    pub(crate) refuse_action: bool,
    pub(crate) amount: Option<u64>,
    pub(crate) capture: Option<Capture>,
}

#[derive(Debug)]
pub(crate) struct Update {
    pub(crate) amount: Option<u64>,
    pub(crate) currency: Option<String>,
    pub(crate) customer: Option<String>,
    pub(crate) description: Option<String>,
    pub(crate) metadata: Map<String, Value>,
    pub(crate) method: Option<String>,
}

#[derive(Debug)]
pub(crate) struct NewRefund {
    pub(crate) charge: Option<String>,
    pub(crate) intent: Option<String>,
    pub(crate) amount: Option<u64>,
    pub(crate) reason: Option<String>,
    pub(crate) metadata: Map<String, Value>,
}

#[derive(Debug)]
pub(crate) struct Listing {
    pub(crate) limit: usize,
    /// Fields of the object that must have this value.
    pub(crate) equal: Vec<(&'static str, String)>,
    pub(crate) created_from: u64,
    pub(crate) created_to: u64,
    pub(crate) starting_after: Option<String>,
    pub(crate) ending_before: Option<String>,
}

/// A valid request. What it does may still fail, and then the failure is a result that is stored.
#[derive(Debug)]
pub(crate) enum Order {
    Charge(Sale),
    CaptureCharge { amount: Option<u64> },
    Intent { sale: Sale, confirm: Option<Confirmation> },
    UpdateIntent(Update),
    ConfirmIntent(Confirmation),
    CaptureIntent { amount: Option<u64>, last: bool, metadata: Map<String, Value> },
    CancelIntent { reason: Option<String> },
    Increment { amount: u64, description: Option<String>, metadata: Map<String, Value> },
    Refund(NewRefund),
    Customer(Map<String, Value>),
    Account,
    Balance,
    Retrieve(Which),
    List(Which, Listing),
    Perform,
    Recall,
}

/// The kinds of objects that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    Charge,
    Intent,
    Refund,
    Customer,
}

/// Validates the parameters of an operation.
pub(crate) fn order(route: Route, params: &Params) -> Result<Order, Failure> {
    if let Some(known) = route.parameters()
        && let Some(unknown) = params.names().find(|name| !known.split(' ').any(|one| one == *name))
    {
        return Err(errors::unknown_parameter(unknown));
    }
    Ok(match route {
        Route::Account => Order::Account,
        Route::Balance => Order::Balance,
        Route::ChargeGet => Order::Retrieve(Which::Charge),
        Route::IntentGet => Order::Retrieve(Which::Intent),
        Route::RefundGet => Order::Retrieve(Which::Refund),
        Route::CustomerGet => Order::Retrieve(Which::Customer),
        Route::ChargeList => Order::List(Which::Charge, listing(params)?),
        Route::IntentList => Order::List(Which::Intent, listing(params)?),
        Route::RefundList => Order::List(Which::Refund, listing(params)?),
        Route::CustomerList => Order::List(Which::Customer, listing(params)?),
        Route::ChargeCreate => Order::Charge(charge(params)?),
        Route::ChargeCapture => Order::CaptureCharge { amount: amount(params, "amount")? },
        Route::IntentCreate => {
            let capture = capture_method(params)?.unwrap_or(Capture::Now);
            let sale = sale(params, method(params)?, capture)?;
            Order::Intent { sale, confirm: flag(params, "confirm", false)?.then_some(confirmation(params)?) }
        }
        Route::IntentUpdate => Order::UpdateIntent(Update {
            amount: amount(params, "amount")?,
            currency: text(params, "currency")?.map(|code| code.to_ascii_lowercase()),
            customer: text(params, "customer")?,
            description: text(params, "description")?,
            metadata: metadata(params)?,
            method: method(params)?,
        }),
        Route::IntentConfirm => Order::ConfirmIntent(confirmation(params)?),
        Route::IntentCapture => Order::CaptureIntent {
            amount: amount(params, "amount_to_capture")?,
            last: flag(params, "final_capture", true)?,
            metadata: metadata(params)?,
        },
        Route::IntentCancel => Order::CancelIntent { reason: text(params, "cancellation_reason")? },
        Route::IntentIncrement => Order::Increment {
            amount: amount(params, "amount")?.ok_or_else(|| errors::missing("amount"))?,
            description: text(params, "description")?,
            metadata: metadata(params)?,
        },
        Route::RefundCreate => Order::Refund(refund(params)?),
        Route::CustomerCreate => Order::Customer(params.clone().into_map()),
        Route::Performed => Order::Perform,
        Route::Recalled => Order::Recall,
    })
}

fn charge(params: &Params) -> Result<Sale, Failure> {
    let source = text(params, "source")?;
    let now = flag(params, "capture", true)?;
    let sale = sale(params, source, if now { Capture::Now } else { Capture::Later })?;
    if sale.method.is_none() && sale.customer.is_none() {
        return Err(Failure::invalid("Must provide source or customer.").code("parameter_missing"));
    }
    Ok(sale)
}

fn sale(params: &Params, method: Option<String>, capture: Capture) -> Result<Sale, Failure> {
    let amount = amount(params, "amount")?.ok_or_else(|| errors::missing("amount"))?;
    let currency = text(params, "currency")?.ok_or_else(|| errors::missing("currency"))?.to_ascii_lowercase();
    if currency.len() != 3 || !currency.bytes().all(|byte| byte.is_ascii_lowercase()) {
        return Err(Failure::invalid(format!("Invalid currency: {currency}.")).param("currency"));
    }
    if currency == "usd" && amount < USD_AMOUNT_MIN {
        let message = "Amount must be at least $0.50 usd";
        return Err(Failure::invalid(message).code("amount_too_small").param("amount"));
    }
    Ok(Sale {
        amount,
        currency,
        customer: text(params, "customer")?,
        description: text(params, "description")?,
        metadata: metadata(params)?,
        method,
        capture,
    })
}

fn confirmation(params: &Params) -> Result<Confirmation, Failure> {
    // `off_session` is a flag or one of two words that mean yes.
    let off_session = text(params, "off_session")?.is_some_and(|value| value != "false");
    Ok(Confirmation {
        method: method(params)?,
        refuse_action: off_session || flag(params, "error_on_requires_action", false)?,
        amount: amount(params, "amount_to_confirm")?,
        capture: capture_method(params)?,
    })
}

fn refund(params: &Params) -> Result<NewRefund, Failure> {
    let (charge, intent) = (text(params, "charge")?, text(params, "payment_intent")?);
    if charge.is_none() && intent.is_none() {
        let message =
            "One of the following params should be provided for this request: payment_intent or charge.";
        return Err(Failure::invalid(message).code("parameter_missing"));
    }
    let (amount, reason) = (amount(params, "amount")?, text(params, "reason")?);
    Ok(NewRefund { charge, intent, amount, reason, metadata: metadata(params)? })
}

fn listing(params: &Params) -> Result<Listing, Failure> {
    let limit = number(params, "limit")?.unwrap_or(PAGE_DEFAULT);
    if !(1..=PAGE_MAX).contains(&limit) {
        return Err(errors::not_an_integer("limit", &limit.to_string()));
    }
    let bound = |name: &str| -> Result<Option<u64>, Failure> {
        match params.value("created").and_then(|created| created.get(name)).and_then(Value::as_str) {
            None => Ok(None),
            Some(digits) => digits.parse().map(Some).map_err(|_| errors::not_an_integer("created", digits)),
        }
    };
    let at = match params.text("created") {
        None => None,
        Some(digits) => Some(digits.parse().map_err(|_| errors::not_an_integer("created", digits))?),
    };
    let from = bound("gte")?.or(bound("gt")?.map(|second: u64| second.saturating_add(1)));
    let to = bound("lte")?.or(bound("lt")?.map(|second: u64| second.saturating_sub(1)));
    let mut equal = Vec::new();
    for name in ["customer", "payment_intent", "charge", "email"] {
        if let Some(value) = text(params, name)? {
            equal.push((name, value));
        }
    }
    Ok(Listing {
        limit: usize::try_from(limit).unwrap_or(usize::MAX),
        equal,
        created_from: from.or(at).unwrap_or(0),
        created_to: to.or(at).unwrap_or(u64::MAX),
        starting_after: text(params, "starting_after")?,
        ending_before: text(params, "ending_before")?,
    })
}

fn text(params: &Params, name: &str) -> Result<Option<String>, Failure> {
    match params.value(name) {
        None => Ok(None),
        Some(Value::String(value)) => Ok((!value.is_empty()).then(|| value.clone())),
        Some(other) => {
            Err(Failure::invalid(format!("Invalid string: {other}; must be a string")).param(name))
        }
    }
}

fn number(params: &Params, name: &str) -> Result<Option<u64>, Failure> {
    let Some(value) = params.value(name) else { return Ok(None) };
    let Some(digits) = value.as_str() else {
        return Err(errors::not_an_integer(name, &value.to_string()));
    };
    if digits.is_empty() {
        return Err(errors::empty(name));
    }
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(errors::not_an_integer(name, digits));
    }
    digits.parse().map(Some).map_err(|_| errors::not_an_integer(name, digits))
}

fn amount(params: &Params, name: &str) -> Result<Option<u64>, Failure> {
    let given = number(params, name)?;
    match given {
        Some(0) => {
            Err(Failure::invalid("Invalid positive integer").code("parameter_invalid_integer").param(name))
        }
        Some(more) if more > AMOUNT_MAX => {
            let message = "Amount must be no more than $999,999.99";
            Err(Failure::invalid(message).code("amount_too_large").param(name))
        }
        other => Ok(other),
    }
}

fn flag(params: &Params, name: &str, default: bool) -> Result<bool, Failure> {
    match text(params, name)?.as_deref() {
        None => Ok(default),
        Some("true") => Ok(true),
        Some("false") => Ok(false),
        Some(other) => Err(Failure::invalid(format!("Invalid boolean: {other}")).param(name)),
    }
}

fn metadata(params: &Params) -> Result<Map<String, Value>, Failure> {
    let wrong = || Failure::invalid("Invalid metadata: it is a hash of strings.").param("metadata");
    match params.value("metadata") {
        None => Ok(Map::new()),
        // An empty string unsets everything.
        Some(Value::String(value)) if value.is_empty() => Ok(Map::new()),
        Some(Value::Object(map)) if map.len() <= METADATA_KEYS_MAX && map.values().all(Value::is_string) => {
            Ok(map.clone())
        }
        Some(_) => Err(wrong()),
    }
}

/// Details of a new payment method stand for a card that works.
fn method(params: &Params) -> Result<Option<String>, Failure> {
    let given = text(params, "payment_method")?;
    let inline = params.value("payment_method_data").or(params.value("confirmation_token"));
    Ok(given.or(inline.map(|_| "pm_card_visa".to_owned())))
}

fn capture_method(params: &Params) -> Result<Option<Capture>, Failure> {
    match text(params, "capture_method")?.as_deref() {
        None => Ok(None),
        Some("manual") => Ok(Some(Capture::Later)),
        Some("automatic" | "automatic_async") => Ok(Some(Capture::Now)),
        Some(other) => {
            Err(Failure::invalid(format!("Invalid capture_method: {other}")).param("capture_method"))
        }
    }
}
