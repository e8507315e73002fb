//! Requests that must not work: each has its status and its code, reaches nobody and changes nothing.
//!
//! The tables are the contract's section on refusals, row by row. Every code that a request can provoke must be in one of
//! them: [`every_code_was_provoked`] names the few that cannot be.

use std::collections::BTreeSet;

use keybrake::refusal::Code;
use keybrake::secret::{KeyKind, KeySecret, Mode};
use serde_json::{Value, json};

use crate::raw::{Answer, FORM, Raw};
use crate::standin::Standin;
use crate::standin::faults::Fault;
use crate::support::{ADMIN_KEY, STRIPE_KEY, Sidecar, world, world_with};

const CARD: &str = "4242424242424242";
const GOOD: &str = "amount=1234&currency=usd&customer=cus_echo&source=tok_echo";

/// The keys under which the rows are sent.
struct Keys {
    /// Charges, intents, refunds and some reads, under caps.
    capped: String,
    capped_id: String,
    client: String,
    content: String,
    uncapped: String,
}

async fn keys(sidecar: &Sidecar) -> Keys {
    let endpoints = json!([
        "POST /v1/charges",
        "POST /v1/charges/{charge}/capture",
        "POST /v1/payment_intents",
        "POST /v1/payment_intents/{intent}/confirm",
        "POST /v1/payment_intents/{intent}/cancel",
        "POST /v1/payment_intents/{intent}/increment_authorization",
        "POST /v1/refunds",
        "GET /v1/charges/*",
        "GET /v1/charges",
    ]);
    let limits = json!({
        "allowed_endpoints": endpoints, "daily_usd_out_cap": 20, "max_usd_per_request": 30,
        "total_usd_cap": "45.00",
    });
    let (capped, capped_id) = sidecar.mint("50", limits).await;
    let (client, _) = sidecar.mint("50", json!({"idempotency": "client"})).await;
    let (content, _) =
        sidecar.mint("50", json!({"idempotency": "content", "idempotency_scope": "billing:2026-07"})).await;
    let free = json!(["POST /v1/customers", "DELETE /v1/customers/{customer}", "POST /v1/charges"]);
    let (uncapped, _) =
        sidecar.mint("1", json!({"daily_usd_cap": null, "uncapped": true, "allowed_endpoints": free})).await;
    Keys { capped, capped_id, client, content, uncapped }
}

pub(crate) struct Row {
    pub(crate) what: &'static str,
    pub(crate) raw: Raw,
    pub(crate) status: u16,
    pub(crate) code: &'static str,
    /// What `param` must be; not looked at when empty.
    pub(crate) param: &'static str,
}

pub(crate) fn row(what: &'static str, raw: Raw, status: u16, code: &'static str, param: &'static str) -> Row {
    Row { what, raw, status, code, param }
}

pub(crate) fn address(sidecar: &Sidecar) -> &str {
    sidecar.base.strip_prefix("http://").unwrap()
}

/// What no bad request may change.
pub(crate) async fn state(standin: &Standin, sidecar: &Sidecar, key_id: &str) -> (usize, Value, Value) {
    let key = sidecar.admin("GET", &format!("/admin/vault_keys/{key_id}"), None).await;
    let keys = sidecar.admin("GET", "/admin/vault_keys?limit=1000", None).await;
    // The sidecar may look at an object; it may not change anything.
    let writes = standin.requests().iter().filter(|seen| seen.method != "GET").count();
    (writes, key.body["spend"].clone(), keys.body["data"].clone())
}

/// Sends each row and looks that it is refused as it should be, and without a trace.
async fn refuse_all(standin: &Standin, sidecar: &Sidecar, key_id: &str, rows: Vec<Row>) {
    let mut before = state(standin, sidecar, key_id).await;
    let mut wrong = Vec::new();
    for Row { what, raw, status, code, param } in rows {
        let answer = raw.send(address(sidecar)).await;
        let named = param.is_empty() || answer.param() == Some(param);
        if (answer.status, answer.code()) != (status, code) || !named {
            wrong.push(format!("{what}: {status} {code} {param:?} was {} {}", answer.status, answer.text));
            before = state(standin, sidecar, key_id).await;
            continue;
        }
        is_stripe_shaped(what, &answer);
        for value in raw.values().iter().filter(|value| value.len() > 2) {
            let echoed = [&answer.body["error"]["message"], &answer.body["error"]["param"]]
                .iter()
                .any(|told| told.as_str().is_some_and(|told| told.contains(value.as_str())));
            if echoed {
                wrong.push(format!("{what} echoes {value:?}: {}", answer.text));
            }
        }
        assert_eq!(state(standin, sidecar, key_id).await, before, "{what} left a trace");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

pub(crate) fn is_stripe_shaped(what: &str, answer: &Answer) {
    let header = |name: &str| answer.headers.get(name).map(String::as_str).unwrap_or_default();
    assert!(header("request-id").starts_with("req_"), "{what}: {:?}", answer.headers);
    assert!(["true", "false"].contains(&header("stripe-should-retry")), "{what}: {:?}", answer.headers);
    assert_eq!(header("content-type"), "application/json", "{what}");
    let error = &answer.body["error"];
    let known = ["api_error", "idempotency_error", "invalid_request_error"];
    assert!(error["type"].as_str().is_some_and(|kind| known.contains(&kind)), "{what}: {}", answer.text);
    assert!(error["message"].as_str().is_some_and(|message| message.len() > 10), "{what}: {}", answer.text);
    let page = format!("/keybrake/errors#{}", answer.code());
    assert!(error["doc_url"].as_str().is_some_and(|url| url.ends_with(&page)), "{what}: {}", answer.text);
}

/// Forms that two parsers could read differently.
fn ambiguous_forms(key: &str) -> Vec<Row> {
    let of = |what, form: &str, param| {
        row(what, Raw::post("/v1/charges", key, "row", form), 400, "request_ambiguous", param)
    };
    vec![
        of("amount twice", "amount=1234&amount=9876&currency=usd", "amount"),
        of("amount twice, once escaped", "amount=1234&amo%75nt=9876&currency=usd", "amount"),
        of("metadata twice, once escaped", "metadata[a]=one&metadata%5Ba%5D=two", "metadata[a]"),
        of("a list written in two ways", "expand[1]=customer&expand[]=invoice", "expand"),
        of("a list written in two ways, the same place", "expand[0]=customer&expand[]=invoice", "expand[0]"),
        of("an index with a zero in front", "expand[00]=customer", ""),
        of("a value and an object", "amount=1234&amount[x]=9876", "amount"),
        of("a list of objects without indexes", "items[][price]=price_1&items[][quantity]=999", ""),
        of("a semicolon", "amount=1234;currency=usd", ""),
        of("a bad escape", "amount=12%zz34", ""),
        of("an empty pair", "amount=1234&&currency=usd", ""),
        of("a name without a value", "amount", ""),
        of("two equals signs", "amount==1234", ""),
        of("brackets that do not match", "amount[=1234", ""),
        of("a NUL in a value", "amount=1234%00&currency=usd", ""),
        of("a NUL in a name", "amount%00=1234", ""),
        of("bytes that are not UTF-8", "customer=%ff%fe", ""),
        of("a name with a space", " amount=1234", ""),
        of("nested too deeply", "a[b][c][d][e][f][g][h][i][j]=123", ""),
        of("a method in the form", "_method=DELETE&amount=1234", "_method"),
        of("a Stripe key in the form", "key=sk_test_0000&amount=1234", "key"),
        of("an API key in the form", "api_key=sk_test_0000&amount=1234", "api_key"),
        of("an object's secret in the form", "client_secret=pi_1_secret_2&amount=1234", "client_secret"),
        of("an account in the form", "_stripe_account=acct_echo&amount=1234", "_stripe_account"),
        of("a version in the form", "_stripe_version=2020-08-27&amount=1234", "_stripe_version"),
    ]
}

/// Heads that two servers could read differently.
fn ambiguous_heads(key: &str) -> Vec<Row> {
    let good = || Raw::post("/v1/charges", key, "row", GOOD);
    let of = |what, raw, param| row(what, raw, 400, "request_ambiguous", param);
    let at = |what, path: &str| of(what, good().line(&format!("POST {path}")), "path");
    vec![
        at("an escaped letter", "/v1/%63harges"),
        at("an escaped slash", "/v1/charges%2Fch_1%2Fcapture"),
        at("dot segments", "/v1/../v1/charges"),
        at("a dot segment", "/v1/./charges"),
        at("dot segments at the end", "/v1/charges/.."),
        at("an escaped dot segment", "/v1/%2e%2e/charges"),
        at("a double slash", "/v1//charges"),
        at("a double slash behind the mount", "/stripe/v1//charges"),
        at("a path parameter", "/v1/charges;x=123"),
        at("a NUL", "/v1/charges%00"),
        at("a letter beyond ASCII", "/v1/charg%C3%A9s"),
        of("a query on a POST", good().line("POST /v1/charges?amount=9876"), "query"),
        of("a query on a POST without a body", good().line("POST /v1/charges?amount=9876").body(""), "query"),
        of("a body in a GET", good().line("GET /v1/charges/ch_1"), "body"),
        of("query and body in a DELETE", good().line("DELETE /v1/customers/cus_1?a=123"), "query"),
        of("two credentials", good().bearer(key), "authorization"),
        of("two content types", good().add("Content-Type", FORM), "content-type"),
        of(
            "two versions",
            good().add("Stripe-Version", "2024-06-20").add("Stripe-Version", "2020-08-27"),
            "",
        ),
        of("two accounts", good().add("Stripe-Account", "acct_1a2").add("Stripe-Account", "acct_1b2"), ""),
        of("two hosts", good().add("Host", "evil.example"), "host"),
        of("a method in a header", good().add("X-HTTP-Method-Override", "DELETE"), "x-http-method-override"),
        of("a method in another header", good().add("X-Method-Override", "DELETE"), "x-method-override"),
        of("a method in a third header", good().add("X-HTTP-Method", "DELETE"), "x-http-method"),
        of("a compressed transfer", good().chunked().add("Transfer-Encoding", "gzip, chunked"), ""),
        of("chunked twice", good().chunked().add("Transfer-Encoding", "chunked, chunked"), ""),
        of(
            "transfer encodings in two headers",
            good().chunked().add("Transfer-Encoding", "gzip").add("Transfer-Encoding", "chunked"),
            "",
        ),
    ]
}

/// Amounts and currencies that nobody should guess about.
fn bad_amounts(key: &str) -> Vec<Row> {
    let of = |what, form: &str, param| {
        row(what, Raw::post("/v1/charges", key, "row", form), 400, "parameter_invalid", param)
    };
    let amount =
        |what, amount: &str| of(what, &format!("amount={amount}&currency=usd&source=tok_1"), "amount");
    let currency =
        |what, currency: &str| of(what, &format!("amount=1234&source=tok_1{currency}"), "currency");
    let other = |what, currency: &str| Row {
        status: 403,
        code: "currency_not_allowed",
        ..of(what, &format!("amount=1234&source=tok_1&currency={currency}"), "currency")
    };
    vec![
        amount("a negative amount", "-5"),
        amount("a sign", "%2B5"),
        amount("a plus that becomes a space", "+5"),
        amount("a fraction", "5.0"),
        amount("an exponent", "1e3"),
        amount("a zero in front", "05"),
        amount("another script's digit", "%D9%A5"),
        amount("the same, not escaped", "٥"),
        amount("an empty amount", ""),
        amount("thirteen digits", "1000000000000"),
        amount("twenty digits", "18446744073709551617"),
        amount("hexadecimal", "0x10"),
        amount("an underscore", "5_000"),
        amount("a space behind", "5%20"),
        amount("a line feed behind", "5%0A"),
        of("no amount", "currency=usd&source=tok_1", "amount"),
        of("an amount in a list", "amount[]=1234&currency=usd", "amount"),
        of("an amount in an object", "amount[x]=1234&currency=usd", "amount"),
        currency("no currency", ""),
        currency("an empty currency", "&currency="),
        currency("two letters", "&currency=us"),
        currency("four letters", "&currency=usdd"),
        currency("no letters", "&currency=u%24d"),
        other("another currency", "eur"),
        other("another currency in upper case", "EUR"),
        other("a currency without minor units", "jpy"),
        of("our own stamp", &format!("{GOOD}&metadata[keybrake_call]=forged"), "metadata[keybrake_call]"),
    ]
}

/// Headers of the idempotency layer and of the API version.
fn bad_headers(keys: &Keys) -> Vec<Row> {
    let (key, client, content) = (keys.capped.as_str(), keys.client.as_str(), keys.content.as_str());
    let good = || Raw::post("/v1/charges", key, "row", GOOD);
    let of = |what, raw, param| row(what, raw, 400, "parameter_invalid", param);
    let idempotency = |what, raw: Raw| of(what, raw, "Idempotency-Key");
    let version = |what, version: &str| of(what, good().add("Stripe-Version", version), "Stripe-Version");
    let needed = |what, raw: Raw| row(what, raw, 400, "idempotency_key_required", "Idempotency-Key");
    let made_up = |what, sent: &str| needed(what, good().set("Idempotency-Key", sent));
    let reserved = |key: &str| Raw::post("/v1/charges", key, "kb1_AAAAAAAAAAAA", GOOD);
    vec![
        idempotency("a key of 256 characters", good().set("Idempotency-Key", &"k".repeat(256))),
        idempotency("two keys", good().add("Idempotency-Key", "other")),
        idempotency("the same key twice", good().add("Idempotency-Key", "row")),
        idempotency(
            "a key beyond ASCII",
            good().without("Idempotency-Key").add_bytes("Idempotency-Key", "schlüssel".as_bytes()),
        ),
        idempotency(
            "a key with a byte that is no UTF-8",
            good().without("Idempotency-Key").add_bytes("Idempotency-Key", b"key\xff"),
        ),
        idempotency("a key with a tab", good().set("Idempotency-Key", "a\tb")),
        idempotency("a key of ours", reserved(key)),
        idempotency("a key of ours, any client key", reserved(client)),
        idempotency(
            "a key of ours on a call that moves no money",
            Raw::post("/v1/customers", &keys.uncapped, "kb1_AAAAAAAAAAAA", "name=Jane"),
        ),
        idempotency(
            "a key of ours on a cancel",
            Raw::post("/v1/payment_intents/pi_1/cancel", key, "kb1_AAAAAAAAAAAA", ""),
        ),
        needed("no key", good().without("Idempotency-Key")),
        needed("an empty key", good().set("Idempotency-Key", "")),
        needed("a key of spaces", good().set("Idempotency-Key", "   ")),
        made_up("a UUID", "0b9f3f0e-8f4b-4b0e-9c2a-2f6f8f1f3a11"),
        made_up("a UUID in upper case", "0B9F3F0E-8F4B-4B0E-9C2A-2F6F8F1F3A11"),
        made_up("Node's key", "stripe-node-retry-0b9f3f0e-8f4b-4b0e-9c2a-2f6f8f1f3a11"),
        made_up("Go's key", "1763945123456789012_aB3-_z"),
        version("a version that is too old", "2020-08-26"),
        version("a version that is too new", "2099-01-01"),
        version("a preview", "2026-09-30.preview"),
        version("a preview with a feature", "2026-09-30.preview; feature_beta=v1"),
        version("a version with a parameter", "2024-06-20;feature=v1"),
        version("a version that is none", "latest"),
        version("an empty version", ""),
        of(
            "content mode without what tells calls apart",
            Raw::post("/v1/charges", content, "row", "amount=1234&currency=usd&customer="),
            "customer",
        ),
        of(
            "a refund of two things",
            Raw::post("/v1/refunds", key, "row", "charge=ch_1&payment_intent=pi_1&amount=1234"),
            "charge",
        ),
        of("a refund of nothing", Raw::post("/v1/refunds", key, "row", "amount=1234"), "charge"),
    ]
}

/// What a key does not grant.
fn not_granted(key: &str) -> Vec<Row> {
    let post = |path: &str, form: &str| Raw::post(path, key, "row", form);
    let of = |what, raw, code| row(what, raw, 403, code, "");
    let endpoint = |what, raw| of(what, raw, "endpoint_not_allowed");
    let account = |what, raw| of(what, raw, "account_not_allowed");
    // It was looked for at Stripe, by a read.
    let unknown = |what, raw| row(what, raw, 404, "not_found", "");
    let json = |path: &str| post(path, "{\"amount\": 1234}").set("Content-Type", "application/json");
    vec![
        endpoint("an operation outside of the grant", post("/v1/payouts", "amount=1234&currency=usd")),
        endpoint("an operation that nobody knows", post("/v1/nothing", "")),
        endpoint("upper case", post("/v1/CHARGES", GOOD)),
        endpoint("the alias of a refund", post("/v1/charges/ch_1/refund", "amount=123")),
        endpoint("another alias of a refund", post("/v1/charges/ch_1/refunds", "amount=123")),
        endpoint("the update of an intent", post("/v1/payment_intents/pi_1", "amount=9999")),
        endpoint(
            "a search beside a granted list",
            Raw::new("GET /v1/charges/search?query=an-echo").bearer(key),
        ),
        endpoint("a delete", Raw::new("DELETE /v1/customers/cus_1").bearer(key)),
        endpoint("a write under /v2", json("/v2/core/event_destinations")),
        endpoint("a write under /v2 that moves money", json("/v2/money_management/outbound_payments")),
        endpoint("a write under /v2 that nobody knows", json("/v2/nothing")),
        account("a connected account", post("/v1/charges", GOOD).add("Stripe-Account", "acct_echo")),
        account("a context", post("/v1/charges", GOOD).add("Stripe-Context", "acct_echo")),
        account("an empty account", post("/v1/charges", GOOD).add("Stripe-Account", "")),
        account(
            "a connected account on a read",
            Raw::new("GET /v1/charges").bearer(key).add("Stripe-Account", "acct_echo"),
        ),
        of("a refund of what is no id", post("/v1/refunds", "charge=ch_1%2F..%2Fx"), "amount_unknown"),
        unknown("a refund without an amount", post("/v1/refunds", "charge=ch_1")),
        unknown("a refund of what is not known", post("/v1/refunds", "charge=ch_1&amount=123")),
        unknown("a confirm of what is not known", post("/v1/payment_intents/pi_1/confirm", "")),
        unknown("a capture of what is not known", post("/v1/charges/ch_1/capture", "")),
        unknown(
            "an increment of what is not known",
            post("/v1/payment_intents/pi_1/increment_authorization", "amount=1234"),
        ),
    ]
}

/// Parameters that send money elsewhere, carry cards, or reach other objects.
fn parameters_not_allowed(key: &str) -> Vec<Row> {
    let of = |what, path: &str, more: &str, param| {
        let form = format!("amount=1234&currency=usd&customer=cus_echo&{more}");
        row(what, Raw::post(path, key, "row", &form), 403, "parameter_not_allowed", param)
    };
    let charge = |more: &str, param| of(param, "/v1/charges", more, param);
    let intent = |more: &str, param| of(param, "/v1/payment_intents", more, param);
    let read = |path: &str| Raw::new(&format!("GET {path}")).bearer(key);
    vec![
        charge("destination[account]=acct_echo", "destination[account]"),
        charge("destination=acct_echo", "destination"),
        charge("transfer_data[destination]=acct_echo", "transfer_data[destination]"),
        charge("on_behalf_of=acct_echo", "on_behalf_of"),
        charge("application_fee=123", "application_fee"),
        charge("application_fee_amount=123", "application_fee_amount"),
        charge(&format!("card[number]={CARD}"), "card[number]"),
        charge(&format!("source[number]={CARD}"), "source[number]"),
        charge("source[account_number]=000123456789", "source[account_number]"),
        intent("transfer_data[amount]=100", "transfer_data[amount]"),
        intent(&format!("payment_method_data[card][number]={CARD}"), "payment_method_data[card][number]"),
        intent("payment_method_data[card][cvc]=987", "payment_method_data[card][cvc]"),
        intent("payment_method_data[sepa_debit][iban]=DE89370400440532013000", ""),
        intent("payment_method_data[us_bank_account][account_number]=000123456789", ""),
        intent("payment_method_options[card][request_overcapture]=if_available", ""),
        intent("payment_method_options[card][request_multicapture]=if_available", ""),
        intent("amount_details[surcharge][amount]=100", "amount_details[surcharge][amount]"),
        of("the marks of an object", "/v1/payment_intents/pi_1/confirm", "metadata=", "metadata"),
        charge("expand[]=customer", "expand[0]"),
        charge("expand[0]=balance_transaction", "expand[0]"),
        charge("expand[]=data.customer.default_source", "expand[0]"),
        charge("expand=customer", "expand"),
        row(
            "an expand in a list",
            read("/v1/charges?expand[]=data.invoice"),
            403,
            "parameter_not_allowed",
            "",
        ),
        row(
            "an expand in a read",
            read("/v1/charges/ch_1?expand%5B0%5D=customer"),
            403,
            "parameter_not_allowed",
            "expand[0]",
        ),
    ]
}

/// Methods, routes, bodies and headers beyond the limits.
fn beyond_the_limits(key: &str) -> Vec<Row> {
    let good = || Raw::post("/v1/charges", key, "row", GOOD);
    let method = |what, method: &str| {
        row(what, good().line(&format!("{method} /v1/charges")), 405, "method_not_allowed", "")
    };
    let nowhere = |what, line: &str| row(what, Raw::new(line).bearer(key), 404, "not_found", "");
    let large = format!("{GOOD}&description={}", "x".repeat(4 << 20));
    let chunked = || good().body(&large).chunked().add("Transfer-Encoding", "chunked");
    let too_large = |what, raw| row(what, raw, 413, "body_too_large", "");
    let kind = |what, kind: &str, body: &str| {
        row(what, good().set("Content-Type", kind).body(body), 415, "encoding_not_allowed", "Content-Type")
    };
    let coding = |what, coding: &str| {
        let raw = good().add("Content-Encoding", coding);
        row(what, raw, 415, "encoding_not_allowed", "Content-Encoding")
    };
    let multipart = "--b\r\nContent-Disposition: form-data; name=\"amount\"\r\n\r\n1234\r\n--b--\r\n";
    let flood = (0..70).fold(good(), |raw, at| raw.add(&format!("X-{at}"), "y"));
    vec![
        method("PUT", "PUT"),
        method("PATCH", "PATCH"),
        method("OPTIONS", "OPTIONS"),
        method("TRACE", "TRACE"),
        method("a method that nobody knows", "CHARGE"),
        method("a method in lower case", "post"),
        nowhere("the root", "GET /"),
        nowhere("a mount without a version", "POST /stripe"),
        nowhere("a version alone", "GET /v1"),
        nowhere("another version", "GET /v3/charges"),
        nowhere("a mount in upper case", "GET /V1/charges"),
        nowhere("a double slash at the mount", "GET /stripe//v1/charges"),
        nowhere("a double slash before everything", "GET //v1/charges"),
        nowhere("two mounts", "GET /stripe/stripe/v1/charges"),
        row("a slash at the end", good().line("POST /v1/charges/"), 404, "not_found", ""),
        too_large("a body with a length", good().body(&large)),
        too_large("a body in chunks", chunked()),
        kind("JSON", "application/json", "{\"amount\": 1234}"),
        kind("multipart", "multipart/form-data; boundary=b", multipart),
        kind("plain text", "text/plain", GOOD),
        kind("an empty content type", "", GOOD),
        kind("a content type that begins like the right one", &format!("{FORM}x"), GOOD),
        row("no content type", good().without("Content-Type"), 415, "encoding_not_allowed", "Content-Type"),
        coding("gzip", "gzip"),
        coding("identity and gzip", "identity, gzip"),
        row("too many headers", flood, 431, "headers_too_large", ""),
        row(
            "a header that is too long",
            good().add("X-Long", &"y".repeat(17 << 10)),
            431,
            "headers_too_large",
            "",
        ),
    ]
}

/// Credentials that open nothing.
fn bad_credentials(key: &str) -> Vec<Row> {
    use base64::Engine as _;
    let good = |name: &str, value: &str| {
        Raw::post("/v1/charges", "", "row", GOOD).without("Authorization").add(name, value)
    };
    let of = |what, value: &str| row(what, good("Authorization", value), 401, "vault_key_invalid", "");
    let basic = |text: &str| format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(text));
    let made = |kind| KeySecret::new(kind, Mode::Test, [7; 32]).expose().to_owned();
    let mut flipped = key.to_owned();
    let last = if flipped.pop() == Some('0') { '1' } else { '0' };
    flipped.push(last);
    vec![
        row("no credential", good("X-Nothing", "abc"), 401, "vault_key_invalid", ""),
        of("an empty credential", ""),
        of("a scheme alone", "Bearer"),
        of("a key without a scheme", key),
        of("another scheme", &format!("Digest {key}")),
        of("garbage", "Bearer garbage"),
        of("a Stripe key", &format!("Bearer {STRIPE_KEY}")),
        of("a Stripe key as user name", &basic(&format!("{STRIPE_KEY}:"))),
        of("a live Stripe key", "Bearer sk_live_0000000000000000"),
        of("a restricted Stripe key", "Bearer rk_live_0000000000000000"),
        of("the admin key", &format!("Bearer {ADMIN_KEY}")),
        of("an issuer key", &format!("Bearer {}", made(KeyKind::Issuer))),
        of("a vault key that was never minted", &format!("Bearer {}", made(KeyKind::Vault))),
        of("a wrong checksum", &format!("Bearer {flipped}")),
        of("a key with something behind", &format!("Bearer {key}x")),
        of("a key cut short", &format!("Bearer {}", &key[..key.len() - 1])),
        of("two keys in one header", &format!("Bearer {key}, Bearer {key}")),
        of("a Basic key that is not encoded", &format!("Basic {key}")),
        of("a key as Basic password", &basic(&format!(":{key}"))),
        of("an empty Basic user", &basic(":")),
        row(
            "a key in the query",
            Raw::new(&format!("GET /v1/charges?key={key}")),
            401,
            "vault_key_invalid",
            "",
        ),
        row("a key in another header", good("X-Api-Key", key), 401, "vault_key_invalid", ""),
    ]
}

#[tokio::test]
async fn what_a_proxied_request_must_not_be() {
    let (standin, sidecar) = world_with(&[("MAX_BODY_BYTES", "2048")]).await;
    let keys = keys(&sidecar).await;
    let mut rows = ambiguous_forms(&keys.capped);
    rows.extend(ambiguous_heads(&keys.capped));
    rows.extend(bad_amounts(&keys.capped));
    rows.extend(bad_headers(&keys));
    rows.extend(not_granted(&keys.capped));
    rows.extend(parameters_not_allowed(&keys.capped));
    rows.extend(beyond_the_limits(&keys.capped));
    rows.extend(bad_credentials(&keys.capped));
    refuse_all(&standin, &sidecar, &keys.capped_id, rows).await;

    // The answer to HEAD has no body by definition, and what cannot be parsed has none either.
    let good = || Raw::post("/v1/charges", &keys.capped, "row", GOOD);
    let before = state(&standin, &sidecar, &keys.capped_id).await;
    let head = good().line("HEAD /v1/charges").body("").send(address(&sidecar)).await;
    assert_eq!(head.status, 405);
    assert!(head.headers["request-id"].starts_with("req_"), "{:?}", head.headers);
    let many = (0..110).fold(good(), |raw, at| raw.add(&format!("X-{at}"), "y"));
    assert_eq!(many.send(address(&sidecar)).await.status, 431);
    assert_eq!(good().add("X-Long", &"y".repeat(70 << 10)).send(address(&sidecar)).await.status, 431);
    for (what, raw) in [
        ("a line without a version", good().line("POST")),
        ("a space in the path", good().line("POST /v1/char ges")),
        ("a header name with a space", good().add("X Y", "z")),
        ("lengths that differ", good().add("Content-Length", "5")),
        ("a negative length", good().unframed().add("Content-Length", "-1")),
        ("a coding that is not chunked", good().unframed().add("Transfer-Encoding", "gzip")),
    ] {
        assert_eq!(raw.send(address(&sidecar)).await.status, 400, "{what}");
    }
    assert_eq!(state(&standin, &sidecar, &keys.capped_id).await, before);
}

/// The server reads a request with both framings by its chunks and closes: what is hidden behind it is not executed.
#[tokio::test]
async fn a_request_cannot_hide_behind_another() {
    let (standin, sidecar) = world().await;
    let (key, _) = sidecar.mint("50", json!({})).await;
    let good = |name: &str| Raw::post("/v1/charges", &key, name, GOOD).set("Connection", "keep-alive");
    let hidden = good("hidden");
    for (name, first, second) in [
        ("a", "Transfer-Encoding: chunked", "Content-Length: 5"),
        ("b", "Content-Length: 5", "Transfer-Encoding: chunked"),
    ] {
        let (first, second) = (first.split_once(": ").unwrap(), second.split_once(": ").unwrap());
        let outer = good(name).chunked().add(first.0, first.1).add(second.0, second.1).followed_by(&hidden);
        let answer = outer.send(address(&sidecar)).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        assert!(!answer.text.contains("HTTP/1.1"), "one answer: {}", answer.text);
        let made: Vec<_> = standin.executed().into_iter().map(|one| one.idempotency_key.unwrap()).collect();
        assert!(!made.contains(&"hidden".to_owned()), "{made:?}");
    }
    // What lies behind the length is no part of the request, and none of its own.
    let short = good("c").set("Connection", "close").unframed();
    let answer = short.add("Content-Length", &(GOOD.len() - 4).to_string()).send(address(&sidecar)).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    assert_eq!(standin.executed().len(), 3);
}

/// What looks odd and is fine: refusing it would break an SDK.
#[tokio::test]
async fn what_a_proxied_request_may_be() {
    use base64::Engine as _;
    let (standin, sidecar) = world().await;
    let endpoints = json!(["POST /v1/charges", "GET /v1/charges", "DELETE /v1/customers/{customer}"]);
    let more = json!({"daily_usd_cap": null, "uncapped": true, "allowed_endpoints": endpoints});
    let (key, _) = sidecar.mint("1", more).await;
    let good = |name: &str| Raw::post("/v1/charges", &key, name, GOOD);
    let basic = |text: String| format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(text));
    let host = address(&sidecar);
    for (what, raw) in [
        ("Go's chunks without a length", good("a").chunked().add("Transfer-Encoding", "chunked")),
        ("chunks in upper case", good("b").chunked().add("transfer-encoding", "Chunked")),
        ("Basic with the key as user", good("c").set("Authorization", &basic(format!("{key}:")))),
        ("Basic with a password", good("d").set("Authorization", &basic(format!("{key}:secret")))),
        ("a scheme in lower case", good("e").set("Authorization", &format!("bearer {key}"))),
        ("a charset", good("f").set("Content-Type", &format!("{FORM}; charset=utf-8"))),
        ("identity", good("g").add("Content-Encoding", "identity")),
        ("trailers", good("h").add("TE", "trailers")),
        ("the other mount", good("i").line("POST /stripe/v1/charges")),
        ("an absolute target", good("j").line(&format!("POST http://{host}/v1/charges"))),
        ("a bare question mark", good("k").line("POST /v1/charges?")),
        ("headers of SDKs", good("l").add("X-Stripe-Client-Telemetry", "{}").add("User-Agent", "Stripe/v1")),
        ("a key of 255 characters", good(&"m".repeat(255))),
        ("escaped brackets", good("n").body(format!("{GOOD}&metadata%5Bperiod%5D=2026-07"))),
        ("a version", good("o").add("Stripe-Version", "2024-06-20")),
    ] {
        let before = standin.executed().len();
        let answer = raw.send(host).await;
        assert_eq!(answer.status, 200, "{what}: {}", answer.text);
        assert_eq!(standin.executed().len(), before + 1, "{what}");
        let seen = standin.requests().pop().unwrap();
        assert_eq!((seen.path.as_str(), seen.query.as_str()), ("/v1/charges", ""), "{what}");
        assert_eq!(seen.header("authorization"), Some(format!("Bearer {STRIPE_KEY}").as_str()), "{what}");
        assert!(seen.header("content-length").is_some() && seen.header("transfer-encoding").is_none());
        for name in ["x-stripe-client-telemetry", "te", "content-encoding", "stripe-account"] {
            assert_eq!(seen.header(name), None, "{what}");
        }
    }
    // Upper and lower case are one currency: compared and forwarded in lower case.
    let upper = good("case").body(GOOD.replace("usd", "USD")).send(host).await;
    assert_eq!(upper.status, 200, "{}", upper.text);
    assert!(standin.requests().pop().unwrap().body.contains("currency=usd"));
    let lower = good("case").send(host).await;
    assert_eq!(lower.headers.get("idempotent-replayed").map(String::as_str), Some("true"), "{}", lower.text);
    // Ruby's bare question mark, and a form in the body of a DELETE.
    for line in ["DELETE /v1/customers/cus_1?", "DELETE /v1/customers/cus_1"] {
        Raw::new(line).bearer(&key).add("Content-Type", FORM).send(host).await;
        assert_eq!(standin.requests().pop().unwrap().method, "DELETE", "{line}");
    }
}

fn charge(key: &str, name: &str, amount: u32) -> Raw {
    Raw::post("/v1/charges", key, name, &GOOD.replace("1234", &amount.to_string()))
}

/// Keys that are over: revoked, closed by a charge that came out larger than it was held, and expired.
async fn dead_keys(standin: &Standin, sidecar: &Sidecar) -> [String; 3] {
    let (revoked, revoked_id) = sidecar.mint("50", json!({})).await;
    sidecar.admin("DELETE", &format!("/admin/vault_keys/{revoked_id}"), None).await;
    let (closed, _) = sidecar.mint("50", json!({})).await;
    let larger = json!({
        "object": "charge", "id": "ch_larger", "currency": "usd", "amount": 5000, "status": "succeeded",
        "captured": true, "amount_captured": 5000,
    });
    standin.fault(Fault::Answer { status: 200, body: larger, headers: [].into() });
    assert_eq!(charge(&closed, "larger", 1000).send(address(sidecar)).await.status, 200);
    let (expired, expired_id) = sidecar.mint("50", json!({"expires_in_seconds": 1})).await;
    loop {
        let shown = sidecar.admin("GET", &format!("/admin/vault_keys/{expired_id}"), None).await;
        if shown.body["status"] == "expired" {
            return [revoked, closed, expired];
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

/// Calls that were made before, made again as something else.
fn other_calls(capped: &str, content: &str) -> Vec<Row> {
    let of = |what, raw, param| row(what, raw, 400, "idempotency_error", param);
    let described = format!("{}&description=an-echo", GOOD.replace("1234", "3000"));
    vec![
        of("another amount", charge(capped, "spent", 2999), "amount"),
        of("another parameter", charge(capped, "spent", 3000).body(described), "description"),
        of("another endpoint", charge(capped, "spent", 3000).line("POST /v1/payment_intents"), ""),
        of("the same content with another amount", charge(content, "else", 1001), "amount"),
    ]
}

#[tokio::test]
async fn what_a_key_must_not_open() {
    let (standin, sidecar) = world().await;
    let Keys { capped, capped_id, content, .. } = keys(&sidecar).await;
    let [revoked, closed, expired] = dead_keys(&standin, &sidecar).await;
    let (once, _) = sidecar.mint("50", json!({"max_calls": 1})).await;
    assert_eq!(charge(&once, "first", 1000).send(address(&sidecar)).await.status, 200);
    assert_eq!(charge(&content, "", 1000).send(address(&sidecar)).await.status, 200);
    assert_eq!(charge(&capped, "spent", 3000).send(address(&sidecar)).await.status, 200);
    let made = standin.executed().pop().unwrap().object_id;
    let refund = Raw::post("/v1/refunds", &capped, "refund", &format!("charge={made}&amount=2001"));
    let cap = "spend_cap_exceeded";
    let mut rows = vec![
        row("a revoked key", charge(&revoked, "row", 1000), 401, "vault_key_revoked", ""),
        row("an expired key", charge(&expired, "row", 1000), 401, "vault_key_expired", ""),
        row("a closed key", charge(&closed, "row", 1000), 403, "vault_key_closed", ""),
        row("one call too many", charge(&once, "row", 1000), 429, "call_limit_exceeded", ""),
        row("one call too large", charge(&capped, "row", 3001), 429, cap, ""),
        row("over the total", charge(&capped, "row", 1501), 429, cap, ""),
        row("a refund over its own cap", refund, 429, cap, ""),
    ];
    rows.extend(other_calls(&capped, &content));
    refuse_all(&standin, &sidecar, &capped_id, rows).await;
    let over = charge(&capped, "row", 1501).send(address(&sidecar)).await;
    let error = &over.body["error"];
    let figures = ["cap", "limit", "spent", "held", "requested"].map(|name| error[name].as_str().unwrap());
    assert_eq!(figures, ["total", "45.00", "30.00", "0.00", "15.01"], "{}", over.text);
    assert!(error["message"].as_str().unwrap().starts_with("Spend cap exceeded"), "{}", over.text);
    assert_eq!(over.headers["stripe-should-retry"], "false");

    let on = json!({"on": true, "reason": "a test"});
    assert_eq!(sidecar.admin("POST", "/admin/kill_switch", Some(&on)).await.status, 200);
    let stopped = |what, raw| row(what, raw, 403, "kill_switch", "");
    let rows = vec![
        stopped("a new call", charge(&capped, "row", 1000)),
        stopped("a replay", charge(&capped, "spent", 3000)),
        stopped("a read", Raw::new("GET /v1/charges").bearer(&capped)),
        stopped("what could not be read", charge(&capped, "row", 1000).body("amount")),
    ];
    refuse_all(&standin, &sidecar, &capped_id, rows).await;
}

/// Refusals that need something to go wrong elsewhere.
#[tokio::test]
async fn what_needs_a_partner() {
    let (standin, mut sidecar) = world_with(&[("UPSTREAM_TIMEOUT_MS", "1000")]).await;
    let endpoints = json!(["POST /v1/charges", "POST /v1/charges/{charge}/capture"]);
    let (key, id) = sidecar.mint("50", json!({"allowed_endpoints": endpoints})).await;
    let good = |name: &str| Raw::post("/v1/charges", &key, name, GOOD);
    let host = address(&sidecar).to_owned();
    let told = |answer: Answer| {
        is_stripe_shaped("a refusal", &answer);
        let retry = answer.headers["stripe-should-retry"] == "true";
        (answer.status, answer.code().to_owned(), retry, answer.headers.get("keybrake-outcome").cloned())
    };
    let doubt = Some("doubt".to_owned());

    // Two captures of one authorization: the second must not wait behind the first under another key.
    let authorize = format!("{GOOD}&capture=false");
    let made = Raw::post("/v1/charges", &key, "authorize", &authorize).send(&host).await;
    let path = format!("/v1/charges/{}/capture", made.body["id"].as_str().unwrap());
    let capture = |name: &str| Raw::post(&path, &key, name, "");
    standin.fault(Fault::Hold);
    let (held, waiting) = (capture("held"), capture("other"));
    let (first, second) = tokio::join!(held.send(&host), async {
        standin.until_held(1).await;
        waiting.send(&host).await
    });
    assert_eq!(told(first), (504, "outcome_unknown".into(), true, doubt.clone()));
    assert_eq!(told(second), (409, "idempotency_key_in_use".into(), true, None));
    assert_eq!(sidecar.spend(&id).await, ("0.00".into(), "12.34".into(), "12.34".into()));
    standin.release();

    standin.fault(Fault::DropAfter);
    assert_eq!(told(good("dropped").send(&host).await), (502, "outcome_unknown".into(), true, doubt));
    assert_eq!(good("dropped").send(&host).await.status, 200);

    standin.set_secret_keys(vec!["sk_test_another".to_owned()]);
    assert_eq!(
        told(good("turned away").send(&host).await),
        (502, "upstream_key_refused".into(), false, None)
    );
    assert_ne!(sidecar.spend(&id).await.1, "24.68", "a call that Stripe turned away is not held");
    drop(standin);
    assert_eq!(told(good("nobody").send(&host).await), (502, "upstream_unreachable".into(), true, None));
    assert_eq!(sidecar.spend(&id).await, ("12.34".into(), "12.34".into(), "12.34".into()));
    assert!(sidecar.terminate().success());
}

/// Codes that no row of this file provokes, and why.
const ELSEWHERE: &[(&str, &str)] = &[
    ("already_executed", "an answer is kept for two days at least"),
    ("budget_stopped", "a budget that is full"),
    ("conflict", "an operator"),
    ("rate_limited", "a key in a hurry: limits.rs"),
    ("overloaded", "needs a crowd: limits.rs"),
    ("ledger_unavailable", "the disk has to fail"),
    ("not_ready", "the account has to be unknown: tests of the process"),
    ("outcome_unknown", "needs a partner"),
    ("idempotency_key_in_use", "needs a partner"),
    ("upstream_key_refused", "needs a partner"),
    ("upstream_unreachable", "needs a partner"),
    ("request_timeout", "takes half a minute"),
    ("admin_key_required", "the admin API"),
    ("call_limit_exceeded", "a key that is full"),
    ("idempotency_error", "a call that was made"),
    ("kill_switch", "an operator"),
    ("spend_cap_exceeded", "a key that is full"),
    ("vault_key_closed", "a key that is closed"),
    ("vault_key_expired", "a key that is over"),
    ("vault_key_revoked", "a key that is over"),
];

#[test]
fn every_code_was_provoked() {
    let key = KeySecret::new(KeyKind::Vault, Mode::Test, [1; 32]).expose().to_owned();
    let keys = Keys {
        capped: key.clone(),
        capped_id: key.clone(),
        client: key.clone(),
        content: key.clone(),
        uncapped: key.clone(),
    };
    let rows = [
        ambiguous_forms(&key),
        ambiguous_heads(&key),
        bad_amounts(&key),
        bad_headers(&keys),
        not_granted(&key),
        parameters_not_allowed(&key),
        beyond_the_limits(&key),
        bad_credentials(&key),
    ];
    let mut known: BTreeSet<&str> = rows.iter().flatten().map(|row| row.code).collect();
    known.extend(ELSEWHERE.iter().map(|(code, _)| *code));
    let all: BTreeSet<&str> = Code::ALL.iter().map(|code| code.as_str()).collect();
    assert_eq!(known, all);
}
