//! The catalogue against what Stripe publishes, row by row, and what each operation means for each kind of key.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use keybrake::hold::Lane;
use keybrake::key::Caps;
use keybrake::money::MicroUsd;
use keybrake::vendor::stripe::catalogue::{self, Class, Operation};
use keybrake::vendor::stripe::pricing::{Price, Terms};
use keybrake::vendor::stripe::rules::{self, Effect};
use serde::Deserialize;

/// One row of the published classification.
#[derive(Deserialize)]
struct Row {
    path: String,
    method: String,
    class: String,
    in_spec: bool,
    #[serde(default)]
    danger: Option<String>,
    #[serde(default)]
    releases: bool,
    #[serde(default)]
    test_mode_only: bool,
    #[serde(default)]
    response: String,
    #[serde(default)]
    spec_amount_params: Vec<String>,
    #[serde(default)]
    spec_currency_params: Vec<String>,
}

fn published() -> BTreeMap<String, Row> {
    #[derive(Deserialize)]
    struct File {
        endpoints: Vec<Row>,
    }
    let file: File = serde_json::from_str(include_str!("../data/stripe/money_endpoints.json")).unwrap();
    file.endpoints.into_iter().map(|row| (format!("{} {}", row.method, row.path), row)).collect()
}

fn writes() -> impl Iterator<Item = &'static Operation> {
    catalogue::all().iter().filter(|operation| operation.method != "GET")
}

const fn letter(class: Class) -> &'static str {
    match class {
        Class::Read => "r",
        Class::AmountInRequest => "a",
        Class::AmountOfObject => "b",
        Class::AmountAfterwards => "c",
        Class::MoneyOut => "d",
        Class::NoMoney => "e",
    }
}

#[test]
fn every_write_is_classified_as_published() {
    let mut rows = published();
    assert_eq!(rows.len(), 390);
    for operation in writes() {
        let row =
            rows.remove(operation.template).unwrap_or_else(|| panic!("{} is made up", operation.template));
        let own = (letter(operation.class), operation.danger, operation.releases, operation.test_only);
        let told = (row.class.as_str(), row.danger.as_deref(), row.releases, row.test_mode_only);
        assert_eq!(own, told, "{}", operation.template);
    }
    assert_eq!(rows.keys().next(), None, "an operation that is published is missing");
    for operation in catalogue::all().iter().filter(|operation| operation.method == "GET") {
        assert_eq!(operation.class, Class::Read, "{}", operation.template);
        assert!(operation.price.is_none() && operation.ends.is_none(), "{}", operation.template);
    }
}

/// `a.b[].c` as it is written on the wire, with every index the first.
fn on_the_wire(param: &str) -> String {
    let mut steps = param.split('.');
    let base = steps.next().unwrap().replace("[]", "[0]");
    steps.fold(base, |name, step| match step.strip_suffix("[]") {
        Some(step) => format!("{name}[{step}][0]"),
        None => format!("{name}[{step}]"),
    })
}

#[test]
fn a_price_reads_parameters_and_answers_that_stripe_has() {
    let rows = published();
    for operation in writes() {
        let row = &rows[operation.template];
        let Some(price) = &operation.price else { continue };
        assert!(operation.moves_money(), "{}", operation.template);
        assert_eq!(price.lane == Lane::Out, operation.class == Class::MoneyOut, "{}", operation.template);
        let is_known = |known: &[String], param: &str| known.iter().any(|known| on_the_wire(known) == param);
        if row.in_spec {
            for amount in price.amount.iter().chain(&price.pin) {
                assert!(is_known(&row.spec_amount_params, amount), "{} {amount}", operation.template);
            }
            if let Some(currency) = price.currency {
                assert!(is_known(&row.spec_currency_params, currency), "{} {currency}", operation.template);
            }
            let mut answers = row.response.split('|').map(|name| name.trim().trim_start_matches("deleted_"));
            let own = price.answers.object();
            assert!(answers.any(|name| name == own), "{}: {own} is not {}", operation.template, row.response);
        }
        // What is left to the object has to be read from somewhere.
        let is_read = match &price.terms {
            Terms::Named | Terms::Ceiling { .. } => true,
            Terms::Use(_) => price.reads.len() == 1,
            Terms::Return(params) => price.reads.len() == params.len().max(1),
        };
        assert!(is_read, "{}", operation.template);
        assert!(price.terms != Terms::Named || price.amount.is_some(), "{}", operation.template);
    }
    for operation in writes().filter(|operation| operation.ends.is_some()) {
        let own = operation.ends.unwrap().object();
        let response = rows[operation.template].response.trim_start_matches("deleted_").to_owned();
        assert_eq!(response, own, "{}", operation.template);
    }
}

/// What billing flows use. Money operations elsewhere are known and refused.
const FAMILIES: &[&str] = &[
    "charges",
    "checkout",
    "customers",
    "invoiceitems",
    "invoices",
    "payment_intents",
    "payment_methods",
    "payouts",
    "prices",
    "products",
    "refunds",
    "setup_intents",
    "subscription_items",
    "subscription_schedules",
    "subscriptions",
    "transfers",
];

#[test]
fn the_families_of_billing_are_priced_and_nothing_else_is() {
    for operation in writes().filter(|operation| operation.moves_money()) {
        let path = operation.template.split_once(" /v1/").map_or("", |(_, path)| path);
        // A dispute is lost, not billed.
        let in_family = FAMILIES.contains(&path.split('/').next().unwrap()) && !path.contains("/dispute");
        assert_eq!(operation.price.is_some(), in_family, "{}", operation.template);
    }
    let priced = writes().filter(|operation| operation.price.is_some()).count();
    let ending = writes().filter(|operation| operation.ends.is_some()).count();
    assert_eq!((priced, ending), (46, 7));
}

/// Five kinds of keys: a cap and the exact name, a cap and `*`, a cap with a ceiling and `*`, no cap and the exact name, no
/// cap and `*`.
fn keys() -> [(Caps, bool); 5] {
    let one = Some(MicroUsd::from_micros(1));
    let capped = Caps { daily: one, daily_out: one, ..Caps::default() };
    let ceiling = Caps { per_request: one, ..capped.clone() };
    let uncapped = Caps { uncapped: true, ..Caps::default() };
    [(capped.clone(), false), (capped, true), (ceiling, true), (uncapped.clone(), false), (uncapped, true)]
}

fn told(effect: &Effect) -> String {
    match effect {
        Effect::Free => "free".to_owned(),
        Effect::Ends(answers) => format!("ends {}", answers.object()),
        Effect::Priced(Price { terms, lane, .. }) => {
            let terms = match terms {
                Terms::Named => "named",
                Terms::Use(_) => "of its object",
                Terms::Return(_) => "of what is left",
                Terms::Ceiling { .. } => "ceiling",
            };
            format!("{terms}{}", if *lane == Lane::Out { ", out" } else { "" })
        }
        Effect::Unpriced => "not counted".to_owned(),
    }
}

#[test]
fn every_operation_means_what_it_meant() {
    let mut all = String::from(
        "# operation: a cap | a cap, by * | a cap and a ceiling, by * | uncapped | uncapped, by *\n",
    );
    for operation in catalogue::all() {
        let verdicts = keys().map(|(caps, wildcard)| match rules::effect(operation, &caps, wildcard) {
            Ok(effect) => told(&effect),
            Err(refusal) => refusal.code.as_str().to_owned(),
        });
        let equal = verdicts.iter().all(|verdict| *verdict == verdicts[0]);
        let shown = if equal { verdicts[0].clone() } else { verdicts.join(" | ") };
        writeln!(all, "{}: {shown}", operation.template).unwrap();
    }
    expect_test::expect_file!["../data/stripe/effects.txt"].assert_eq(&all);
}
