//! The encoding against made-up records: what is sealed reads back, is hashed as documented, and does not change unnoticed.

use std::fmt::Write as _;

use proptest::prelude::*;
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

use crate::audit::tests::chain;
use crate::audit::{Entry, Event, FIELDS, RecordedOutcome, Verifier};
use crate::id::hex;

/// Texts that an encoder could get wrong: quotes, control characters, letters of every width.
fn text() -> impl Strategy<Value = String> {
    let odd = prop::sample::select(vec![
        "\"",
        "\\",
        "\u{0}",
        "\u{8}",
        "\t",
        "\n",
        "\u{c}",
        "\r",
        "\u{1f}",
        "\u{7f}",
        "\u{2028}",
        "/",
        "\u{fffd}",
        "é",
        "猫",
        "🦀",
        "\u{e000}",
        "\u{10ffff}",
        " ",
        "",
    ]);
    prop_oneof![
        "\\PC{0,12}",
        prop::collection::vec(odd, 0..6).prop_map(|parts| parts.concat()),
        any::<String>(),
    ]
}

/// What a detail may hold, nested: integers alone, since a record has no other numbers.
fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        text().prop_map(Value::from),
        Just(Value::Null),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((text(), inner), 0..4).prop_map(|pairs| pairs.into_iter().collect()),
        ]
    })
}

fn object() -> impl Strategy<Value = Map<String, Value>> {
    prop::collection::vec((text(), value()), 0..4).prop_map(|pairs| pairs.into_iter().collect())
}

fn entry() -> impl Strategy<Value = Entry> {
    let maybe = || prop::option::of(text());
    let texts = (maybe(), maybe(), maybe(), maybe(), maybe());
    let numbers = (prop::option::of(any::<u64>()), prop::option::of(any::<u16>()));
    let maps = (prop::option::of(object()), prop::option::of(object()), prop::option::of(object()));
    let flags = prop::option::of(prop::collection::vec(text(), 0..3));
    (texts, numbers, maps, flags).prop_map(|(texts, numbers, maps, flags)| {
        let (label, customer, object_id, idempotency_key, actor) = texts;
        let (metadata, stripe_metadata, detail) = maps;
        Entry {
            at: "2026-07-14T03:33:20.123Z".to_owned(),
            event: Event::Refused,
            label,
            metadata,
            outcome: Some(RecordedOutcome::None),
            amount: numbers.0,
            idempotency_key,
            customer,
            object_id,
            stripe_metadata,
            upstream_status: numbers.1,
            flags,
            actor,
            detail,
            ..Entry::default()
        }
    })
}

/// A string as `json.dumps(…, ensure_ascii=False)` of Python writes it, by its documentation.
fn python_string(text: &str, out: &mut String) {
    out.push('"');
    for letter in text.chars() {
        match letter {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\0'..='\u{1f}' => {
                let _ = write!(out, "\\u{:04x}", u32::from(letter));
            }
            _ => out.push(letter),
        }
    }
    out.push('"');
}

fn python_json(value: &Value, out: &mut String) {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => out.push_str(&value.to_string()),
        Value::String(text) => python_string(text, out),
        Value::Array(items) => {
            for (at, item) in items.iter().enumerate() {
                out.push(if at == 0 { '[' } else { ',' });
                python_json(item, out);
            }
            out.push_str(if items.is_empty() { "[]" } else { "]" });
        }
        Value::Object(map) => {
            for (at, (name, item)) in map.iter().enumerate() {
                out.push(if at == 0 { '{' } else { ',' });
                python_string(name, out);
                out.push(':');
                python_json(item, out);
            }
            out.push_str(if map.is_empty() { "{}" } else { "}" });
        }
    }
}

/// The three documented lines, in Rust.
fn python_hash(record: &Map<String, Value>) -> String {
    let kept: Map<String, Value> = FIELDS
        .iter()
        .filter(|name| !record[**name].is_null())
        .map(|name| ((*name).to_owned(), record[*name].clone()))
        .collect();
    let mut bytes = String::new();
    python_json(&Value::Object(kept), &mut bytes);
    hex(&Sha256::digest(bytes.as_bytes()))
}

proptest! {
    #[test]
    fn a_record_reads_back_and_is_hashed_as_documented(entries in prop::collection::vec(entry(), 1..4)) {
        let mut verifier = Verifier::default();
        for sealed in chain(&entries) {
            // As a file has it: through text and back.
            let line = Value::Object(sealed.to_json()).to_string();
            let record: Map<String, Value> = serde_json::from_str(&line).unwrap();
            prop_assert_eq!(Value::Object(record.clone()).to_string(), line);
            prop_assert_eq!(&python_hash(&record), record["hash"].as_str().unwrap());
            prop_assert_eq!(verifier.follow_json(&record), Ok(()));
            prop_assert_eq!(verifier.head(), sealed.hash);
        }
    }

    #[test]
    fn any_field_that_is_changed_is_noticed(
        entry in entry(), at in 0..FIELDS.len(), other in prop_oneof![value(), Just(Value::Null)]
    ) {
        let record = chain(&[entry])[0].to_json();
        let mut changed = record.clone();
        changed[FIELDS[at]] = other;
        prop_assert_eq!(Verifier::default().follow_json(&changed).is_ok(), changed == record);
        let mut without = record;
        let was = without.remove(FIELDS[at]);
        let is_told = was.is_some_and(|was| !was.is_null());
        prop_assert_eq!(Verifier::default().follow_json(&without).is_err(), is_told);
    }
}
