//! What a key's grant means for an operation, and which parameters no grant opens.

use crate::key::{Constraint, Key};
use crate::refusal::{Code, Refusal};
use crate::vendor::stripe::STAMP_PARAM;
use crate::vendor::stripe::catalogue::{Class, Operation};
use crate::vendor::stripe::form::{self, Params};

/// An operation whose cost is known before it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priced {
    /// `POST /v1/charges`.
    ChargeCreate,
    /// `POST /v1/charges/{charge}/capture`.
    ChargeCapture,
    /// `POST /v1/payment_intents`.
    IntentCreate,
    /// `POST /v1/payment_intents/{intent}/confirm`.
    IntentConfirm,
    /// `POST /v1/payment_intents/{intent}/capture`.
    IntentCapture,
    /// `POST /v1/payment_intents/{intent}/increment_authorization`.
    IntentIncrement,
    /// `POST /v1/refunds`.
    RefundCreate,
}

/// What a call would do to money.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    Free,
    /// It ends a payment intent.
    Cancel,
    /// Money moves, and it is known how much at most.
    Priced(Priced),
    /// Money may move, and nobody knows how much.
    Unpriced,
}

impl Effect {
    /// The effect of a money call.
    pub const fn of(priced: Option<Priced>) -> Self {
        match priced {
            Some(priced) => Self::Priced(priced),
            None => Self::Unpriced,
        }
    }
}

/// The pricing of an operation, where it has one.
pub fn priced(template: &str) -> Option<Priced> {
    Some(match template {
        "POST /v1/charges" => Priced::ChargeCreate,
        "POST /v1/charges/{charge}/capture" => Priced::ChargeCapture,
        "POST /v1/payment_intents" => Priced::IntentCreate,
        "POST /v1/payment_intents/{intent}/confirm" => Priced::IntentConfirm,
        "POST /v1/payment_intents/{intent}/capture" => Priced::IntentCapture,
        "POST /v1/payment_intents/{intent}/increment_authorization" => Priced::IntentIncrement,
        "POST /v1/refunds" => Priced::RefundCreate,
        _ => return None,
    })
}

/// What the operation would do under a key with these limits, or why no call of it could ever be admitted.
///
/// The same function decides when a key is minted and when it is used.
///
/// # Errors
/// `amount_unknown` or `endpoint_not_allowed`.
pub fn effect(operation: &Operation, uncapped: bool, wildcard: bool) -> Result<Effect, Refusal> {
    if let Some(priced) = priced(operation.template) {
        return Ok(Effect::Priced(priced));
    }
    if operation.class == Class::Read {
        return Ok(Effect::Free);
    }
    if operation.template == "POST /v1/payment_intents/{intent}/cancel" {
        return Ok(Effect::Cancel);
    }
    let name = operation.template;
    if name.contains(" /v2/") {
        return Err(Refusal::new(
            Code::EndpointNotAllowed,
            format!("{name}: writes under /v2 are not supported."),
        ));
    }
    let moves_money = match operation.class {
        Class::AmountInRequest | Class::AmountOfObject | Class::AmountAfterwards | Class::MoneyOut => true,
        Class::Read | Class::NoMoney => false,
    };
    match (moves_money, uncapped && !wildcard) {
        (true, true) => Ok(Effect::Unpriced),
        (false, true) => Ok(Effect::Free),
        (true, false) => Err(Refusal::new(
            Code::AmountUnknown,
            format!(
                "{name} moves money and its amount cannot be known before it is sent: only an uncapped key that \
                     names it exactly may call it."
            ),
        )),
        (false, false) => Err(Refusal::new(
            Code::EndpointNotAllowed,
            format!("{name} is not priced: only an uncapped key that names it exactly may call it."),
        )),
    }
}

/// Parameters in which a credential or another method could hide.
const CREDENTIAL_PARAMS: &[&str] = &[
    "key",
    "api_key",
    "access_token",
    // What a browser shows in place of a key. A request is kept while its outcome is open, and this must not be.
    "client_secret",
    "_method",
    "_stripe_account",
    "_stripe_version",
    "stripe_account",
];
/// Parameters that send money elsewhere.
const REDIRECTING_PARAMS: &[&str] = &[
    "transfer_data",
    "destination",
    "on_behalf_of",
    "application_fee",
    "application_fee_amount",
    "application_fee_percent",
    "reverse_transfer",
    "refund_application_fee",
    "origin",
];
/// Words of a name that carry card or bank account numbers.
const NUMBER_WORDS: &[&str] = &[
    "number",
    "cvc",
    "account_number",
    "routing_number",
    "iban",
    "sort_code",
    "bsb_number",
    "transit_number",
    "institution_number",
    "dynamic_last4",
];
/// Words of a name whose value `if_available` would let more be taken than was authorised.
const OVERTAKING_WORDS: &[&str] =
    &["request_overcapture", "request_multicapture", "request_incremental_authorization"];

/// Refuses parameters that hide a credential, send money elsewhere, carry card data or take the stamp's place.
///
/// # Errors
/// `request_ambiguous`, `parameter_not_allowed` or `parameter_invalid`, naming the parameter and never its value.
pub fn refuse_parameters(params: &Params, key: &Key) -> Result<(), Refusal> {
    let uncapped = key.is_uncapped();
    for (name, value) in params.pairs() {
        let base = form::base(name);
        let not_allowed =
            |why: &str| Err(Refusal::of_param(Code::ParameterNotAllowed, name, format!("'{name}' {why}.")));
        if REDIRECTING_PARAMS.contains(&base) && key.constraint_on(name).is_none() {
            return not_allowed(
                "sends money elsewhere, and the key does not say where it may go (constraints)",
            );
        }
        if form::words(name).any(|word| NUMBER_WORDS.contains(&word)) && base != "metadata" {
            return not_allowed(
                "would carry a card or bank account number through this proxy; use a payment method",
            );
        }
        if form::words(name).any(|word| OVERTAKING_WORDS.contains(&word)) && value != "never" && !uncapped {
            return not_allowed("would let more be taken than is held; only `never` is allowed under a cap");
        }
        if name == STAMP_PARAM {
            return Err(Refusal::of_param(
                Code::ParameterInvalid,
                name,
                format!("'{name}' is set by keybrake itself."),
            ));
        }
    }
    Ok(())
}

/// Refuses parameters in which a credential or another method could hide. Part of reading, before any grant.
///
/// # Errors
/// `request_ambiguous`.
pub fn refuse_credentials(params: &Params) -> Result<(), Refusal> {
    let hidden = params.pairs().iter().find(|(name, _)| CREDENTIAL_PARAMS.contains(&form::base(name)));
    match hidden {
        None => Ok(()),
        Some((name, _)) => Err(Refusal::of_param(
            Code::RequestAmbiguous,
            name,
            format!("'{name}' in the parameters could be taken for a credential or a method."),
        )),
    }
}

/// Refuses a call that breaks a constraint of its key, and names the constraints that it leaves to its object.
///
/// A read is bound only by what it says itself; what it may reach is decided by its grant.
///
/// # Errors
/// `parameter_not_allowed`, also for a constrained parameter that is absent.
pub fn keep_constraints(
    params: &Params,
    key: &Key,
    effect: Effect,
    is_read: bool,
) -> Result<Vec<Constraint>, Refusal> {
    let mut open = Vec::new();
    for constraint in &key.constraints {
        let refuse = |why: &str| {
            Err(Refusal::of_param(
                Code::ParameterNotAllowed,
                constraint.param.as_str(),
                format!("'{}' {why}.", constraint.param),
            ))
        };
        match (params.get(&constraint.param), effect) {
            (Some(value), Effect::Priced(priced)) if constraint.rule.admits(value) => {
                // What a later call says of the payer does not make the object his.
                if priced.has_object() && ["customer", "currency"].contains(&constraint.param.as_str()) {
                    open.push(constraint.clone());
                }
            }
            (Some(value), Effect::Cancel) if constraint.rule.admits(value) => open.push(constraint.clone()),
            (Some(value), Effect::Free | Effect::Unpriced) if constraint.rule.admits(value) => {}
            (Some(_), _) => return refuse("is outside of what this key allows"),
            (None, Effect::Priced(priced)) if priced.has_object() && object_tells(&constraint.param) => {
                let other = AMOUNTS.contains(&constraint.param.as_str())
                    && AMOUNTS
                        .iter()
                        .filter_map(|name| params.get(name))
                        .any(|value| !constraint.rule.admits(value));
                if other {
                    return refuse("is constrained by this key, and this call names another amount");
                }
                open.push(constraint.clone());
            }
            (None, Effect::Cancel) if object_tells(&constraint.param) => open.push(constraint.clone()),
            (None, Effect::Free) if is_read => {}
            (None, Effect::Free | Effect::Cancel | Effect::Priced(_) | Effect::Unpriced) => {
                return refuse("is constrained by this key, so it must be given");
            }
        }
    }
    Ok(open)
}

impl Priced {
    /// Whether the call is about an object that the ledger knows.
    const fn has_object(self) -> bool {
        match self {
            Self::ChargeCreate | Self::IntentCreate => false,
            Self::ChargeCapture
            | Self::IntentConfirm
            | Self::IntentCapture
            | Self::IntentIncrement
            | Self::RefundCreate => true,
        }
    }
}

/// Names under which operations take the amount of their object.
const AMOUNTS: &[&str] = &["amount", "amount_to_capture", "amount_to_confirm"];

/// Whether an object itself says what a parameter would.
fn object_tells(param: &str) -> bool {
    ["amount", "amount_to_capture", "amount_to_confirm", "currency", "customer"].contains(&param)
}

/// What an expandable field holds: the operation that reads it.
const EXPANDABLE: &[(&str, &str)] = &[
    ("application_fee", "GET /v1/application_fees/{id}"),
    ("balance_transaction", "GET /v1/balance_transactions/{id}"),
    ("charge", "GET /v1/charges/{charge}"),
    ("charges", "GET /v1/charges"),
    ("customer", "GET /v1/customers/{customer}"),
    ("default_payment_method", "GET /v1/payment_methods/{payment_method}"),
    ("dispute", "GET /v1/disputes/{dispute}"),
    ("invoice", "GET /v1/invoices/{invoice}"),
    ("latest_charge", "GET /v1/charges/{charge}"),
    ("latest_invoice", "GET /v1/invoices/{invoice}"),
    ("payment_intent", "GET /v1/payment_intents/{intent}"),
    ("payment_method", "GET /v1/payment_methods/{payment_method}"),
    ("price", "GET /v1/prices/{price}"),
    ("product", "GET /v1/products/{id}"),
    ("refund", "GET /v1/refunds/{refund}"),
    ("refunds", "GET /v1/refunds"),
    ("review", "GET /v1/reviews/{review}"),
    ("setup_intent", "GET /v1/setup_intents/{intent}"),
    ("subscription", "GET /v1/subscriptions/{subscription_exposed_id}"),
];

/// Refuses an `expand` that would reach an object whose read the key does not grant.
///
/// # Errors
/// `parameter_not_allowed`.
pub fn refuse_expand(params: &Params, key: &Key) -> Result<(), Refusal> {
    for (name, value) in params.pairs().iter().filter(|(name, _)| form::base(name) == "expand") {
        for field in value.split('.').filter(|field| *field != "data") {
            let read = EXPANDABLE.iter().find(|(known, _)| *known == field).map(|(_, read)| *read);
            let granted = read.is_some_and(|read| key.grant_for(read).is_some());
            if !granted {
                return Err(Refusal::of_param(
                    Code::ParameterNotAllowed,
                    name,
                    match read {
                        Some(read) => {
                            format!("'{name}' reaches objects whose read the key does not grant ({read}).")
                        }
                        None => format!("'{name}' reaches objects that are not known here."),
                    },
                ));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vendor::stripe::catalogue;

    fn key(uncapped: bool) -> Key {
        let zero = crate::time::UnixMs::default();
        Key {
            id: crate::id::KeyId::from_bytes([0; 16]),
            digest: [0; 32],
            label: String::new(),
            vendor: String::new(),
            grants: Vec::new(),
            caps: crate::key::Caps { uncapped, ..crate::key::Caps::default() },
            idempotency: crate::key::Idempotency::Client,
            remember_days: 40,
            client_secrets: false,
            metadata: Vec::new(),
            created_at: zero,
            expires_at: zero,
            revoked_at: None,
            closed_at: None,
            issuer: None,
            budget: None,
            constraints: Vec::new(),
            accounts: Vec::new(),
            stop_budget_on_refusal: false,
        }
    }

    fn operation(template: &str) -> &'static Operation {
        catalogue::all().iter().find(|operation| operation.template == template).unwrap()
    }

    #[test]
    fn every_expandable_field_is_read_by_a_known_operation() {
        for (field, read) in EXPANDABLE {
            assert!(catalogue::all().iter().any(|operation| operation.template == *read), "{field}");
        }
    }

    #[test]
    fn what_is_not_priced_is_refused_under_a_cap() {
        let codes = |template: &str| {
            let operation = operation(template);
            [(false, false), (true, false), (true, true)].map(|(uncapped, wildcard)| {
                effect(operation, uncapped, wildcard).map_err(|refusal| refusal.code)
            })
        };
        let amount = Err(Code::AmountUnknown);
        let endpoint = Err(Code::EndpointNotAllowed);
        assert_eq!(codes("POST /v1/subscriptions"), [amount, Ok(Effect::Unpriced), amount]);
        assert_eq!(codes("POST /v1/payouts"), [amount, Ok(Effect::Unpriced), amount]);
        assert_eq!(codes("POST /v1/customers"), [endpoint, Ok(Effect::Free), endpoint]);
        assert_eq!(codes("DELETE /v1/customers/{customer}"), [endpoint, Ok(Effect::Free), endpoint]);
        assert_eq!(codes("POST /v2/money_management/outbound_payments"), [endpoint, endpoint, endpoint]);
        assert_eq!(codes("GET /v1/charges"), [Ok(Effect::Free), Ok(Effect::Free), Ok(Effect::Free)]);
        assert_eq!(codes("POST /v1/payment_intents/{intent}/cancel"), [Ok(Effect::Cancel); 3]);
        assert_eq!(codes("POST /v1/charges"), [Ok(Effect::Priced(Priced::ChargeCreate)); 3]);
    }

    #[test]
    fn parameters_that_no_key_grants() {
        let check = |text: &str, uncapped| {
            let params = Params::parse(text.as_bytes()).unwrap();
            refuse_credentials(&params)
                .and_then(|()| refuse_parameters(&params, &key(uncapped)))
                .map_err(|refusal| (refusal.code, refusal.param.unwrap()))
        };
        for (text, code) in [
            ("transfer_data[destination]=acct_1", Code::ParameterNotAllowed),
            ("destination=acct_1", Code::ParameterNotAllowed),
            ("application_fee_amount=5", Code::ParameterNotAllowed),
            ("source[number]=4242424242424242", Code::ParameterNotAllowed),
            ("payment_method_data[card][number]=4242424242424242", Code::ParameterNotAllowed),
            ("payment_method_data[us_bank_account][account_number]=1", Code::ParameterNotAllowed),
            ("payment_method_options[card][request_overcapture]=if_available", Code::ParameterNotAllowed),
            ("_method=DELETE", Code::RequestAmbiguous),
            ("key=sk_live_1", Code::RequestAmbiguous),
            ("metadata[keybrake_call]=x", Code::ParameterInvalid),
        ] {
            let refused = check(text, false).unwrap_err();
            assert_eq!(refused.0, code, "{text}");
            assert!(text.starts_with(&refused.1), "{text} names {}", refused.1);
        }
        assert!(check("payment_method_options[card][request_overcapture]=never", false).is_ok());
        assert!(check("payment_method_options[card][request_overcapture]=if_available", true).is_ok());
        assert!(check("metadata[number]=7&amount=5&customer=cus_1&source=tok_visa", false).is_ok());
    }
}
