//! What a key's grant means for an operation, and which parameters no grant opens.

use crate::intent::Verb;
use crate::key::{Caps, Constraint, Key};
use crate::refusal::{Code, Refusal};
use crate::vendor::stripe::STAMP_PARAM;
use crate::vendor::stripe::catalogue::{Class, Operation};
use crate::vendor::stripe::form::{self, Params};
use crate::vendor::stripe::pricing::{Answers, Price, Terms};
use crate::vendor::stripe::request::Reading;

/// What a call would do to money.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    Free,
    /// It may end an object whose money is held.
    Ends(Answers),
    /// Money moves, and it is known how much at most.
    Priced(&'static Price),
    /// Money may move, and nobody knows how much.
    Unpriced,
}

impl Effect {
    /// The effect of a money call.
    pub const fn of(priced: Option<&'static Price>) -> Self {
        match priced {
            Some(price) => Self::Priced(price),
            None => Self::Unpriced,
        }
    }

    /// The same for one call of the operation: some move money only with certain parameters.
    #[must_use]
    pub fn of_call(self, params: &Params) -> Self {
        match self {
            Self::Priced(Price { harmless: Some(harmless), .. }) if params.names_only(harmless) => Self::Free,
            Self::Priced(_) | Self::Free | Self::Ends(_) | Self::Unpriced => self,
        }
    }
}

/// What the operation would do under a key with these limits, or why no call of it could ever be admitted.
///
/// The same function decides when a key is minted and when it is used.
///
/// # Errors
/// `amount_unknown` or `endpoint_not_allowed`.
pub fn effect(operation: &'static Operation, caps: &Caps, wildcard: bool) -> Result<Effect, Refusal> {
    let name = operation.template;
    if operation.class == Class::Read {
        return Ok(Effect::Free);
    }
    if name.contains(" /v2/") {
        return Err(Refusal::new(
            Code::EndpointNotAllowed,
            format!("{name}: writes under /v2 are not supported."),
        ));
    }
    if operation.moves_money() {
        return effect_on_money(operation, caps, wildcard);
    }
    if wildcard && let Some(danger) = operation.danger {
        return Err(Refusal::new(
            Code::EndpointNotAllowed,
            format!("{name} is dangerous ({danger}): a key must name it exactly, with {{id}} instead of *."),
        ));
    }
    Ok(operation.ends.map_or(Effect::Free, Effect::Ends))
}

fn effect_on_money(operation: &'static Operation, caps: &Caps, wildcard: bool) -> Result<Effect, Refusal> {
    let name = operation.template;
    let has_ceiling = caps.per_request.is_some();
    let how = match &operation.price {
        Some(Price { terms: Terms::Ceiling { .. }, harmless: None, .. }) if !has_ceiling => {
            "only a key with max_usd_per_request may call it, which is then held for each call"
        }
        Some(price) => return Ok(Effect::Priced(price)),
        None => "only an uncapped key, without any other dollar cap, that names it exactly may call it",
    };
    if caps.is_uncapped() && !wildcard {
        return Ok(Effect::Unpriced);
    }
    Err(Refusal::new(
        Code::AmountUnknown,
        format!("{name} moves money and its amount cannot be known before it is sent: {how}."),
    ))
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
    "issuer",
    "payout_method",
    "financial_account",
];
/// Parameters that give away what a customer owes.
const WAIVING_PARAMS: &[&str] = &["paid_out_of_band", "payment_record", "forgive", "balance"];
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
/// Words of a name that let the amount grow beyond what is named: by Stripe, by the customer in a browser, or by a number
/// that is not read here.
const RAISING_WORDS: &[&str] = &[
    "surcharge",
    "adjustable_quantity",
    "optional_items",
    "custom_unit_amount",
    "adaptive_pricing",
    "after_expiration",
    "quantity_decimal",
];
/// Parameters by which an operation without an amount makes Stripe collect what is due.
const COLLECTING_PARAMS: &[(&str, &[&str])] =
    &[("POST /v1/customers/{customer}", &["source", "card", "bank_account"])];

/// Refuses parameters that hide a credential, send money elsewhere, carry card data or take the stamp's place.
///
/// # Errors
/// `request_ambiguous`, `parameter_not_allowed` or `parameter_invalid`, naming the parameter and never its value.
pub fn refuse_parameters(operation: &Operation, params: &Params, key: &Key) -> Result<(), Refusal> {
    let uncapped = key.is_uncapped();
    for (name, value) in params.pairs() {
        let not_allowed =
            |why: &str| Err(Refusal::of_param(Code::ParameterNotAllowed, name, format!("'{name}' {why}.")));
        // Metadata may be named as its owner likes, wherever it stands.
        let has = |words: &[&str]| {
            form::words(name).take_while(|word| *word != "metadata").any(|word| words.contains(&word))
        };
        let constrained = key.constraint_on(name).is_some();
        if has(REDIRECTING_PARAMS) && !constrained {
            return not_allowed(
                "sends money elsewhere, and the key does not say where it may go (constraints)",
            );
        }
        if WAIVING_PARAMS.contains(&form::base(name)) && !constrained {
            return not_allowed(
                "gives away what a customer owes, and the key does not allow it (constraints)",
            );
        }
        if has(NUMBER_WORDS) {
            return not_allowed(
                "would carry a card or bank account number through this proxy; use a payment method",
            );
        }
        if has(OVERTAKING_WORDS) && value != "never" && !uncapped {
            return not_allowed("would let more be taken than is held; only `never` is allowed under a cap");
        }
        if has(RAISING_WORDS) && !uncapped {
            return not_allowed("lets the amount rise beyond what is held");
        }
        let collects = COLLECTING_PARAMS.iter().find(|(template, _)| *template == operation.template);
        if collects.is_some_and(|(_, params)| params.contains(&form::base(name))) && !uncapped && !constrained
        {
            return not_allowed("makes Stripe collect what is due, which nobody counts here");
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

/// Refuses `metadata` without a name: on an object that exists it takes all metadata off, and its stamp with it; on a new
/// one nothing could be stamped beside it. By the stamp an object is found again.
///
/// # Errors
/// `parameter_not_allowed`.
pub fn refuse_bare_metadata(reading: &Reading<'_>) -> Result<(), Refusal> {
    let is_stamped = reading.operation.price.as_ref().is_some_and(|price| price.stamp);
    let has_stamp = is_stamped || !reading.ids.is_empty();
    if !has_stamp || reading.params.get("metadata").is_none() {
        return Ok(());
    }
    Err(Refusal::of_param(
        Code::ParameterNotAllowed,
        "metadata",
        "'metadata' without a name leaves no place for the mark by which the object is found again. Name what you set, \
         'metadata[name]=value', or what is to go, 'metadata[name]='.",
    ))
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
    reading: &Reading<'_>,
    key: &Key,
    effect: Effect,
) -> Result<Vec<Constraint>, Refusal> {
    let params = &reading.params;
    let is_read = reading.operation.class == Class::Read;
    let has_object = has_object(reading, effect);
    let changes_amount = changes_amount(effect);
    let mut open = Vec::new();
    for constraint in &key.constraints {
        let param = constraint.param.as_str();
        let refuse =
            |why: &str| Err(Refusal::of_param(Code::ParameterNotAllowed, param, format!("'{param}' {why}.")));
        let given: Vec<&str> = params.get(param).into_iter().chain(reading.slot(param)).collect();
        if !given.iter().all(|value| constraint.rule.admits(value)) {
            return refuse("is outside of what this key allows");
        }
        match given.is_empty() {
            // What a later call says of the payer does not make the object his.
            false if has_object && ["customer", "currency"].contains(&param) => open.push(constraint.clone()),
            false => {}
            true if has_object && object_tells(param) && !(changes_amount && AMOUNTS.contains(&param)) => {
                let other = AMOUNTS.contains(&param)
                    && AMOUNTS
                        .iter()
                        .filter_map(|name| params.get(name))
                        .any(|value| !constraint.rule.admits(value));
                if other {
                    return refuse("is constrained by this key, and this call names another amount");
                }
                open.push(constraint.clone());
            }
            true if is_read => {}
            true => return refuse("is constrained by this key, so it must be given"),
        }
    }
    Ok(open)
}

/// Whether a call is about an object that can be read, or that the ledger may know.
fn has_object(reading: &Reading<'_>, effect: Effect) -> bool {
    match effect {
        Effect::Ends(_) => true,
        Effect::Priced(price) => match price.terms {
            Terms::Named => false,
            Terms::Use(_) | Terms::Return(_) => true,
            Terms::Ceiling { .. } => !price.reads.is_empty(),
        },
        // A harmless call of an operation that is priced.
        Effect::Free => reading.operation.price.as_ref().is_some_and(|price| !price.reads.is_empty()),
        Effect::Unpriced => false,
    }
}

/// Whether the object's amount is another one after the call, so that the old one says nothing.
fn changes_amount(effect: Effect) -> bool {
    match effect {
        Effect::Priced(price) => match price.terms {
            Terms::Use(Verb::Increment | Verb::Reprice) | Terms::Ceiling { .. } => true,
            Terms::Use(Verb::Confirm | Verb::Capture) | Terms::Named | Terms::Return(_) => false,
        },
        Effect::Free | Effect::Ends(_) | Effect::Unpriced => false,
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
    ("default_source", "GET /v1/customers/{customer}/sources/{id}"),
    ("default_payment_method", "GET /v1/payment_methods/{payment_method}"),
    ("dispute", "GET /v1/disputes/{dispute}"),
    ("invoice", "GET /v1/invoices/{invoice}"),
    ("items", "GET /v1/subscription_items"),
    ("latest_charge", "GET /v1/charges/{charge}"),
    ("latest_invoice", "GET /v1/invoices/{invoice}"),
    ("line_items", "GET /v1/checkout/sessions/{session}/line_items"),
    ("lines", "GET /v1/invoices/{invoice}/lines"),
    ("payment_intent", "GET /v1/payment_intents/{intent}"),
    ("payment_method", "GET /v1/payment_methods/{payment_method}"),
    ("payments", "GET /v1/invoice_payments"),
    ("pending_setup_intent", "GET /v1/setup_intents/{intent}"),
    ("price", "GET /v1/prices/{price}"),
    ("product", "GET /v1/products/{id}"),
    ("refund", "GET /v1/refunds/{refund}"),
    ("refunds", "GET /v1/refunds"),
    ("review", "GET /v1/reviews/{review}"),
    ("schedule", "GET /v1/subscription_schedules/{schedule}"),
    ("setup_intent", "GET /v1/setup_intents/{intent}"),
    ("sources", "GET /v1/customers/{customer}/sources"),
    ("subscription", "GET /v1/subscriptions/{subscription_exposed_id}"),
    ("subscriptions", "GET /v1/subscriptions"),
    ("transfer", "GET /v1/transfers/{transfer}"),
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
pub(crate) mod tests {
    use super::*;
    use crate::vendor::stripe::catalogue;

    pub(crate) fn key(uncapped: bool) -> Key {
        let zero = crate::time::UnixMs::default();
        Key {
            id: crate::id::KeyId::from_bytes([0; 16]),
            digest: [0; 32],
            label: String::new(),
            vendor: String::new(),
            grants: Vec::new(),
            caps: Caps { uncapped, ..Caps::default() },
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
            retry_declined_after_s: None,
            requests_per_second: None,
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

    /// What an operation is under: a cap by exact name, a cap by `*`, a cap with a ceiling by `*`, no cap by exact name,
    /// no cap by `*`.
    fn effects(template: &str) -> [Result<&'static str, Code>; 5] {
        let operation = operation(template);
        let capped = Caps { daily: Some(crate::money::MicroUsd::from_micros(1)), ..Caps::default() };
        let ceiling = Caps { per_request: capped.daily, ..capped.clone() };
        let uncapped = Caps { uncapped: true, ..Caps::default() };
        [(&capped, false), (&capped, true), (&ceiling, true), (&uncapped, false), (&uncapped, true)].map(
            |(caps, wildcard)| match effect(operation, caps, wildcard) {
                Ok(Effect::Free) => Ok("free"),
                Ok(Effect::Ends(_)) => Ok("ends"),
                Ok(Effect::Priced(_)) => Ok("priced"),
                Ok(Effect::Unpriced) => Ok("unpriced"),
                Err(refusal) => Err(refusal.code),
            },
        )
    }

    #[test]
    fn a_class_says_what_a_key_needs() {
        let amount = Err(Code::AmountUnknown);
        let endpoint = Err(Code::EndpointNotAllowed);
        for (template, expected) in [
            // a, b and money out of the families of billing: priced by what they say or what is read.
            ("POST /v1/charges", [Ok("priced"); 5]),
            ("POST /v1/payment_intents/{intent}/confirm", [Ok("priced"); 5]),
            ("POST /v1/invoices/{invoice}/pay", [Ok("priced"); 5]),
            ("POST /v1/invoiceitems", [Ok("priced"); 5]),
            ("POST /v1/refunds", [Ok("priced"); 5]),
            ("POST /v1/charges/{charge}/refund", [Ok("priced"); 5]),
            ("POST /v1/payouts", [Ok("priced"); 5]),
            ("POST /v1/transfers", [Ok("priced"); 5]),
            // c: the key says how much one call may be.
            ("POST /v1/subscriptions", [amount, amount, Ok("priced"), Ok("unpriced"), amount]),
            ("POST /v1/checkout/sessions", [amount, amount, Ok("priced"), Ok("unpriced"), amount]),
            ("POST /v1/invoices", [amount, amount, Ok("priced"), Ok("unpriced"), amount]),
            // A plain cancel moves nothing; with `invoice_now` it is judged call by call.
            ("DELETE /v1/subscriptions/{subscription_exposed_id}", [Ok("priced"); 5]),
            // Other money operations are known and refused.
            ("POST /v1/climate/orders", [amount, amount, amount, Ok("unpriced"), amount]),
            ("POST /v1/topups", [amount, amount, amount, Ok("unpriced"), amount]),
            ("POST /v1/payment_links", [amount, amount, amount, Ok("unpriced"), amount]),
            ("POST /v1/disputes/{dispute}/close", [amount, amount, amount, Ok("unpriced"), amount]),
            // e: free, and a dangerous one only by its exact name.
            ("POST /v1/charges/{charge}", [Ok("free"); 5]),
            ("POST /v1/invoices/create_preview", [Ok("free"); 5]),
            ("POST /v1/customers", [Ok("free"), endpoint, endpoint, Ok("free"), endpoint]),
            (
                "POST /v1/payment_methods/{payment_method}/attach",
                [Ok("free"), endpoint, endpoint, Ok("free"), endpoint],
            ),
            ("POST /v1/webhook_endpoints", [Ok("free"), endpoint, endpoint, Ok("free"), endpoint]),
            ("POST /v1/payment_intents/{intent}/cancel", [Ok("ends"); 5]),
            ("POST /v1/checkout/sessions/{session}/expire", [Ok("ends"); 5]),
            ("POST /v1/invoices/{invoice}/void", [Ok("ends"), endpoint, endpoint, Ok("ends"), endpoint]),
            // Nothing is written under /v2.
            ("POST /v2/money_management/outbound_payments", [endpoint; 5]),
            ("POST /v2/core/accounts", [endpoint; 5]),
            ("GET /v1/charges", [Ok("free"); 5]),
            ("GET /v2/core/events", [Ok("free"); 5]),
        ] {
            assert_eq!(effects(template), expected, "{template}");
        }
    }

    #[test]
    fn some_calls_move_money_only_with_certain_parameters() {
        let of = |template: &str, text: &str| {
            let caps = Caps::default();
            let effect = effect(operation(template), &caps, false).unwrap();
            effect.of_call(&Params::parse(text.as_bytes()).unwrap()) == Effect::Free
        };
        let update = "POST /v1/payment_intents/{intent}";
        assert!(of(update, "metadata[a]=1&description=x"));
        assert!(!of(update, "description=x&payment_method=pm_1"), "an amount may depend on it");
        assert!(!of(update, "amount=5"));
        assert!(!of(update, "currency=eur"));
        let cancel = "DELETE /v1/subscriptions/{subscription_exposed_id}";
        assert!(of(cancel, ""));
        assert!(!of(cancel, "invoice_now=true"));
        let item = "POST /v1/invoiceitems/{invoiceitem}";
        assert!(of(item, "description=x"));
        assert!(!of(item, "discountable=false"));
        assert!(!of(item, "price_data[unit_amount]=5"));
        assert!(!of("POST /v1/charges", ""));
    }

    #[test]
    fn parameters_that_no_key_grants() {
        let check = |text: &str, uncapped| {
            let params = Params::parse(text.as_bytes()).unwrap();
            refuse_credentials(&params)
                .and_then(|()| refuse_parameters(operation("POST /v1/charges"), &params, &key(uncapped)))
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
            // Nested as well.
            ("payment_intent_data[transfer_data][destination]=acct_1", Code::ParameterNotAllowed),
            ("subscription_data[application_fee_percent]=5", Code::ParameterNotAllowed),
            ("phases[0][transfer_data][destination]=acct_1", Code::ParameterNotAllowed),
            ("invoice_settings[issuer][account]=acct_1", Code::ParameterNotAllowed),
            ("items[0][price_data][on_behalf_of]=acct_1", Code::ParameterNotAllowed),
            ("amount_details[surcharge][amount]=5", Code::ParameterNotAllowed),
            ("payout_method=fa_1", Code::ParameterNotAllowed),
            ("payment_record=pr_1", Code::ParameterNotAllowed),
            ("line_items[0][adjustable_quantity][enabled]=true", Code::ParameterNotAllowed),
            ("optional_items[0][price]=price_1", Code::ParameterNotAllowed),
            ("after_expiration[recovery][enabled]=true", Code::ParameterNotAllowed),
            ("quantity_decimal=10000", Code::ParameterNotAllowed),
            // What is owed is given away.
            ("paid_out_of_band=true", Code::ParameterNotAllowed),
            ("forgive=true", Code::ParameterNotAllowed),
            ("balance=-5000", Code::ParameterNotAllowed),
        ] {
            let refused = check(text, false).unwrap_err();
            assert_eq!(refused.0, code, "{text}");
            assert!(text.starts_with(&refused.1), "{text} names {}", refused.1);
        }
        assert!(check("payment_method_options[card][request_overcapture]=never", false).is_ok());
        assert!(check("payment_method_options[card][request_overcapture]=if_available", true).is_ok());
        assert!(check("metadata[number]=7&amount=5&customer=cus_1&source=tok_visa", false).is_ok());
        assert!(check("subscription_data[metadata][destination]=paris", false).is_ok());
    }
}
