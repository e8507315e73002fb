//! Three others read the bytes that were forwarded: one for whom the first of equal names counts, one for whom the last
//! does, and Rack. Whatever was accepted means the same to all of them, and to the sidecar that counted it.
//!
//! `KEYBRAKE_TEST_FORMS` sets how many forms are made by chance; `KEYBRAKE_TEST_SEED` repeats one.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use keybrake::vendor::stripe::STAMP_PARAM;
use keybrake::vendor::stripe::form::{self, Params};
use serde_json::json;

use crate::bad_input::address;
use crate::dice::{Dice, Told, seeds};
use crate::properties::has_one_reading;
use crate::raw::Raw;
use crate::readings::{Rack, first_wins, last_wins, nested};
use crate::standin::Standin;
use crate::standin::engine::Seen;
use crate::support::{Sidecar, world};

/// Forms that are made when nobody says otherwise.
const FORMS: u64 = 1_500;
/// Of those, the ones that are sent through a sidecar.
const FORMS_SENT: usize = 60;

const NAMES: &[&str] = &[
    "amount",
    "currency",
    "customer",
    "source",
    "description",
    "capture",
    "metadata[a]",
    "metadata[a][b]",
    "metadata[007]",
    "metadata",
    "amount[]",
    "amount[0]",
    "amount[x]",
    "expand[]",
    "expand[0]",
    "items[0][price]",
    "items[][price]",
    "items[][quantity]",
    "shipping[address][line1]",
    " amount",
    "amount ",
    "Amount",
    "amount\0",
    "amount[",
    "amount]",
    "[amount]",
];
const VALUES: &[&str] = &[
    "5",
    "1234",
    "9999999",
    "-5",
    "+5",
    "05",
    "5.0",
    "1e3",
    "٥",
    "",
    " 5",
    "5 ",
    "usd",
    "USD",
    "eur",
    "cus_9",
    "cus_9&amount=9",
    "tok_visa",
    "a=b",
    "a;b",
    "a+b",
    "100%",
    "%35",
    "ü",
    "line\nfeed",
    "nul\0",
];

/// Text in one of its many encodings.
fn encoded(dice: &mut Dice, text: &str, brackets_are_plain: bool, out: &mut Vec<u8>) {
    for byte in text.bytes() {
        let bracket = brackets_are_plain && matches!(byte, b'[' | b']');
        let plain = byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) || bracket || !byte.is_ascii();
        let escaped = if dice.percent(50) { format!("%{byte:02X}") } else { format!("%{byte:02x}") };
        match byte {
            b' ' if dice.percent(50) => out.push(b'+'),
            _ if plain && dice.percent(80) => out.push(byte),
            _ => out.extend_from_slice(escaped.as_bytes()),
        }
    }
}

/// A form as an attacker might write it: names twice, types that clash, odd encodings and separators.
fn hostile(dice: &mut Dice) -> Vec<u8> {
    let mut form = Vec::new();
    for _ in 0..=dice.below(5) {
        add_pair(dice, &mut form);
    }
    form
}

/// A charge with something hostile in it.
fn hostile_charge(dice: &mut Dice) -> Vec<u8> {
    let mut pairs =
        vec![("amount", "1234"), ("currency", "usd"), ("customer", "cus_9"), ("source", "tok_visa")];
    dice.shuffle(&mut pairs);
    let mut form = Vec::new();
    for (name, value) in pairs {
        let separator: &[u8] = if form.is_empty() { b"" } else { b"&" };
        form.extend_from_slice(separator);
        encoded(dice, name, true, &mut form);
        form.push(b'=');
        encoded(dice, value, false, &mut form);
    }
    for _ in 0..dice.below(3) {
        add_pair(dice, &mut form);
    }
    form
}

fn add_pair(dice: &mut Dice, form: &mut Vec<u8>) {
    const SEPARATORS: &[&str] = &["&&", ";", "& ", "&=&", "\n"];
    const MARKS: &[&str] = &["", "==", "%3D"];
    let separator = if dice.percent(95) { "&" } else { *dice.pick(SEPARATORS) };
    if !form.is_empty() {
        form.extend_from_slice(separator.as_bytes());
    }
    let (name, value) = (*dice.pick(NAMES), *dice.pick(VALUES));
    encoded(dice, name, true, form);
    let mark = if dice.percent(97) { "=" } else { *dice.pick(MARKS) };
    form.extend_from_slice(mark.as_bytes());
    if dice.percent(90) {
        encoded(dice, value, false, form);
    } else {
        form.extend_from_slice(value.as_bytes());
    }
}

/// What the four readers read; Rack twice, because its releases differ.
fn readings(form: &[u8]) -> BTreeSet<Option<BTreeMap<String, String>>> {
    BTreeSet::from([
        Some(first_wins(form)),
        Some(last_wins(form)),
        nested(form, Rack::Two).ok(),
        nested(form, Rack::Three).ok(),
    ])
}

#[test]
fn an_accepted_form_means_the_same_to_everybody() {
    let (mut accepted, mut refused) = (0, 0);
    for seed in seeds("KEYBRAKE_TEST_FORMS", FORMS) {
        let mut told = Told::of_seed(seed);
        let mut dice = Dice::new(seed);
        let form = if dice.percent(50) { hostile(&mut dice) } else { hostile_charge(&mut dice) };
        told.input("form", &form);
        if let Ok(params) = Params::parse(&form) {
            accepted += 1;
            has_one_reading(params.pairs());
        } else {
            refused += 1;
        }
    }
    let both = accepted > 100 && refused > 100;
    assert!(both || accepted + refused < 1_000, "{accepted} forms were accepted, {refused} were refused");
}

/// The readers do differ, so that a form that gets through unread would be seen.
#[test]
fn what_is_refused_would_mean_different_things() {
    for form in [
        "amount=5&amount=9",
        "amount=5&amo%75nt=9",
        "a[b]=1&a%5Bb%5D=2",
        "amount=5;amount=9",
        "amount=5&+amount=9",
        "amount=5& amount=9",
        "amount=1&amount[x]=9",
        "amount=1&amount[]=9",
        "expand[0]=a&expand[]=b",
        "items[][price]=1&items[][quantity]=2",
        "amount[x=5",
        "a[b]c=1",
        "[a]=1",
        "amount=%zz",
        "customer=%ff",
    ] {
        assert!(Params::parse(form.as_bytes()).is_err(), "{form} is accepted");
        assert!(readings(form.as_bytes()).len() > 1, "{form} means the same to everybody");
    }
}

// --- Encodings

/// Parameters before they are written: texts and lists of texts.
fn meant(dice: &mut Dice) -> BTreeMap<String, Vec<String>> {
    let word = |dice: &mut Dice| {
        let letters: Vec<char> = "abcXYZ019_-. &=;+%#äß€😀\"'<>".chars().collect();
        (0..=dice.below(5)).map(|_| *dice.pick(&letters)).collect::<String>()
    };
    let mut all = BTreeMap::new();
    for n in 0..=dice.below(6) {
        let name = match dice.below(4) {
            0 => format!("p{n}"),
            1 => format!("p{n}[inner]"),
            2 => format!("p{n}[inner][0][x]"),
            // A name in metadata is its owner's. One of digits is an index as well, whatever it was meant for.
            _ => format!("metadata[m{n}{}]", word(dice)),
        };
        let count = if dice.percent(70) { 0 } else { 1 + dice.below(12) };
        all.insert(name, (0..=count).map(|_| word(dice)).collect());
    }
    all
}

/// One of the ways to write them. A list of one is written as a list, a text as a text.
fn written(dice: &mut Dice, all: &BTreeMap<String, Vec<String>>) -> Vec<u8> {
    let mut pairs: Vec<(String, &String)> = Vec::new();
    let mut appended: BTreeMap<String, std::slice::Iter<'_, String>> = BTreeMap::new();
    for (name, values) in all {
        let indexed = dice.percent(50);
        for (index, value) in values.iter().enumerate() {
            pairs.push(match (values.len(), indexed) {
                (1, _) => (name.clone(), value),
                (_, true) => (format!("{name}[{index}]"), value),
                (_, false) => (format!("{name}[]"), value),
            });
        }
        appended.insert(format!("{name}[]"), values.iter());
    }
    dice.shuffle(&mut pairs);
    let mut form = Vec::new();
    for (name, value) in pairs {
        // The order of a list is its meaning, so its values come in it wherever its names are.
        let value = appended.get_mut(&name).and_then(Iterator::next).unwrap_or(value);
        let separator: &[u8] = if form.is_empty() { b"" } else { b"&" };
        form.extend_from_slice(separator);
        encoded(dice, &name, true, &mut form);
        form.push(b'=');
        encoded(dice, value, false, &mut form);
    }
    form
}

#[test]
fn all_encodings_of_the_same_parameters_are_one() {
    for seed in seeds("KEYBRAKE_TEST_FORMS", FORMS) {
        let mut told = Told::of_seed(seed);
        let mut dice = Dice::new(seed);
        let all = meant(&mut dice);
        let mut leaves = BTreeMap::new();
        for (name, values) in &all {
            for (index, value) in values.iter().enumerate() {
                let place = if values.len() == 1 { String::new() } else { format!("[{index}]") };
                leaves.insert(format!("{name}{place}"), value.clone());
            }
        }
        let mut spellings = BTreeSet::new();
        for _ in 0..4 {
            let form = written(&mut dice, &all);
            told.input("form", &form);
            let params = Params::parse(&form).unwrap();
            assert_eq!(params.pairs().iter().cloned().collect::<BTreeMap<_, _>>(), leaves);
            spellings.insert(form::serialise(params.pairs()));
        }
        assert_eq!(spellings.len(), 1, "{spellings:#?}");
    }
}

// --- Through a sidecar

/// Bodies, each with the query behind its path.
fn bodies() -> Vec<(&'static str, String)> {
    let charge = "amount=1234&currency=usd&customer=cus_9&source=tok_visa";
    let with = |more: &str| ("", format!("{charge}&{more}"));
    vec![
        ("", charge.to_owned()),
        ("", "source=tok_visa&customer=cus_9&currency=usd&amount=1234".to_owned()),
        ("", "%61mount=%31234&currency=%75sd&customer=cus%5F9&source=tok%5fvisa".to_owned()),
        ("", charge.replace("usd", "USD")),
        ("", charge.replace("1234", "%2B1234")),
        ("", charge.replace("1234", "+1234")),
        ("", charge.replace("amount", "amount[]")),
        ("", charge.replace("amount", "amount[0]")),
        ("", charge.replace("amount", "Amount")),
        ("", charge.replace('&', ";")),
        ("", charge.replace('&', "& ")),
        ("", charge.replace('&', "&&")),
        with("description=a+b%20c%2Bd"),
        with("description=%26amount%3D9999"),
        with("description=a%0D%0Ab"),
        with("metadata[a]=1&metadata%5Bb%5D=2"),
        with("metadata[a+b]=1&metadata[a%26b%3D]=2"),
        with("metadata[amount]=9999&metadata[customer]=cus_8"),
        with("expand[]=balance_transaction"),
        with("shipping[name]=Jane&shipping[address][line1]=1+Road"),
        with("amount=9999"),
        with("amo%75nt=9999"),
        with("amount%5B%5D=9999"),
        with("amount[x]=9999"),
        with("amount[=9999"),
        with("amount%00=9999"),
        with("+amount=9999"),
        with("customer=cus_8"),
        with("currency=eur"),
        with("metadata[a]=1&metadata%5Ba%5D=2"),
        with("metadata=x&metadata[a]=1"),
        with("expand[]=a&expand[0]=b"),
        with("description=%zz"),
        with("description"),
        ("?amount=9999", charge.to_owned()),
        ("?customer=cus_8", charge.to_owned()),
        ("?amount=9999", "currency=usd&customer=cus_9&source=tok_visa".to_owned()),
        ("?amount=1234&currency=usd&customer=cus_9&source=tok_visa", String::new()),
    ]
}

/// What was forwarded means what was sent, to everybody: the same parameters and our stamp, nothing else.
fn means_what_was_sent(seen: &Seen, sent: &[u8]) -> BTreeMap<String, String> {
    assert_eq!((seen.method.as_str(), seen.path.as_str(), seen.query.as_str()), ("POST", "/v1/charges", ""));
    let read = readings(seen.body.as_bytes());
    assert_eq!(read.len(), 1, "{} means different things: {read:#?}", seen.body);
    let mut leaves = read.into_iter().next().flatten().expect("everybody reads it");
    let forwarded = leaves.clone();
    // A text in the place of the metadata leaves no room for the stamp.
    let stamped = leaves.remove(STAMP_PARAM).is_some();
    assert_eq!(stamped, !leaves.contains_key("metadata"), "{}", seen.body);
    let mut expected = nested(sent, Rack::Three).expect("what is accepted, Rack accepts");
    if let Some(currency) = expected.get_mut("currency") {
        currency.make_ascii_lowercase();
    }
    assert_eq!(leaves, expected);
    forwarded
}

/// Sends one body, and looks what came of it. Answers whether it was forwarded.
async fn send(standin: &Standin, sidecar: &Sidecar, raw: &Raw, body: &[u8]) -> bool {
    let (asked, moved) = (standin.requests().len(), standin.executed().len());
    let answer = raw.send(address(sidecar)).await;
    let seen = standin.requests().split_off(asked);
    let Some(first) = seen.first() else {
        assert!((400..500).contains(&answer.status), "{}: {}", raw.shown(), answer.text);
        assert_eq!(standin.executed().len(), moved);
        return false;
    };
    assert_eq!(seen.len(), 1, "{}", raw.shown());
    let leaves = means_what_was_sent(first, body);
    for charge in &standin.executed()[moved..] {
        let says = |name: &str| leaves.get(name).cloned();
        assert_eq!(Some(charge.amount.to_string()), says("amount"), "{}", raw.shown());
        assert_eq!(Some(charge.currency.clone()), says("currency"), "{}", raw.shown());
        assert_eq!(charge.customer, says("customer"), "{}", raw.shown());
    }
    true
}

#[tokio::test]
async fn what_is_forwarded_means_what_was_counted() {
    let (standin, sidecar) = world().await;
    let (key, id) = sidecar.mint("1000000", json!({})).await;
    let mut forwarded = 0;
    for (n, (query, body)) in bodies().into_iter().enumerate() {
        let raw = Raw::post(&format!("/v1/charges{query}"), &key, &format!("written-{n}"), &body);
        forwarded += usize::from(send(&standin, &sidecar, &raw, body.as_bytes()).await);
    }
    assert_eq!(forwarded, 11, "of those that are written here");
    let (seeds, mut made) = (seeds("KEYBRAKE_TEST_FORMS", FORMS), 0);
    for seed in seeds.iter().copied().take(FORMS_SENT) {
        let mut told = Told::of_seed(seed);
        let body = hostile_charge(&mut Dice::new(seed));
        told.input("body", &body);
        let raw = Raw::post("/v1/charges", &key, &format!("made-{seed}"), "").body(&body);
        made += usize::from(send(&standin, &sidecar, &raw, &body).await);
    }
    assert!(made > 0 || seeds.len() < FORMS_SENT, "hardly anything is forwarded");
    let moved: u64 = standin.executed().iter().map(|charge| charge.amount).sum();
    let spent = format!("{}.{:02}", moved / 100, moved % 100);
    assert_eq!(sidecar.spend(&id).await, (spent, "0.00".to_owned(), "0.00".to_owned()));
}

/// The same call in another encoding is the same call: it is answered again and not made again.
#[tokio::test]
async fn another_encoding_is_no_other_call() {
    let (standin, sidecar) = world().await;
    let (key, _) = sidecar.mint("1000", json!({})).await;
    let all: BTreeMap<String, Vec<String>> = [
        ("amount", vec!["1234"]),
        ("currency", vec!["usd"]),
        ("customer", vec!["cus_9"]),
        ("source", vec!["tok_visa"]),
        ("description", vec!["a b & ü"]),
        ("metadata[period]", vec!["2026-07"]),
    ]
    .into_iter()
    .map(|(name, values)| (name.to_owned(), values.into_iter().map(str::to_owned).collect()))
    .collect();
    let mut dice = Dice::new(1);
    let mut forms = String::new();
    for n in 0..20 {
        let body = written(&mut dice, &all);
        let _ = writeln!(forms, "{}", body.escape_ascii());
        let answer = Raw::post("/v1/charges", &key, "once", "").body(&body).send(address(&sidecar)).await;
        assert_eq!(answer.status, 200, "{}\n{forms}", answer.text);
        assert_eq!(answer.headers.contains_key("idempotent-replayed"), n > 0, "{forms}");
    }
    assert_eq!(standin.executed().len(), 1, "{forms}");
}
