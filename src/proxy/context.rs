//! What a request says of where it comes from: `Keybrake-Context-Execution`, `-Flow`, `-Task` and whatever else.
//!
//! It is for the records alone. It never reaches the vendor and is no part of what makes a call the same, because an
//! execution, a task run and an attempt are new on each retry; and it is a claim of the script's, so what the key's own
//! metadata says under the same name holds.

use hyper::header::{HeaderMap, HeaderValue};

use crate::refusal::{Code, Refusal};
use crate::vendor::stripe::request::{holds_key, showable};

/// How these headers begin, as they are compared.
const PREFIX: &str = "keybrake-context-";
/// The same as people write it.
const PREFIX_SHOWN: &str = "Keybrake-Context-";
/// Such headers of one request.
const PAIRS_MAX: usize = 10;
/// The longest name behind the prefix, in bytes.
const NAME_BYTES_MAX: usize = 40;
/// The longest value, in bytes.
const VALUE_BYTES_MAX: usize = 200;

/// Reads them as pairs for the records: the name in lower case, with `_` for `-`.
///
/// # Errors
/// `parameter_invalid`, naming the header.
pub fn read(headers: &HeaderMap) -> Result<Vec<(String, String)>, Refusal> {
    let mut pairs: Vec<(String, String)> = Vec::new();
    for name in headers.keys() {
        let Some(short) = name.as_str().strip_prefix(PREFIX) else { continue };
        let mut values = headers.get_all(name).iter();
        let (Some(value), None) = (values.next(), values.next()) else {
            return Err(invalid(short, "is given more than once"));
        };
        pairs.push(pair(short, value)?);
        if pairs.len() > PAIRS_MAX {
            return Err(invalid(
                short,
                &format!("is one too many: a request may have {PAIRS_MAX} such headers"),
            ));
        }
    }
    // As a list with an order of its own, whatever the order of the headers.
    pairs.sort_unstable();
    Ok(pairs)
}

fn pair(short: &str, value: &HeaderValue) -> Result<(String, String), Refusal> {
    let plain = short.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    if !(1..=NAME_BYTES_MAX).contains(&short.len()) || !plain {
        return Err(invalid(
            short,
            &format!("must have a name of 1 to {NAME_BYTES_MAX} letters, digits and '-'"),
        ));
    }
    let name = short.to_ascii_lowercase().replace('-', "_");
    if showable(&name) != name {
        return Err(invalid("", "must not have a key or a card number for a name"));
    }
    let text = std::str::from_utf8(value.as_bytes()).unwrap_or_default();
    let printable = text.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    if !(1..=VALUE_BYTES_MAX).contains(&text.len()) || !printable {
        return Err(invalid(
            short,
            &format!("must have a value of 1 to {VALUE_BYTES_MAX} printable ASCII characters"),
        ));
    }
    if holds_key(text) {
        return Err(invalid(short, "holds a key: it would be kept in the audit log"));
    }
    // What only looks like a card number may be a time in milliseconds: refusing it would stop every tenth run.
    Ok((name, showable(text)))
}

/// Names the header, as far as its name is short and plain.
fn invalid(short: &str, why: &str) -> Refusal {
    let shown: String = short
        .split('-')
        .map(|word| {
            let mut letters = word.chars();
            letters
                .next()
                .map_or(String::new(), |first| first.to_ascii_uppercase().to_string() + letters.as_str())
        })
        .collect::<Vec<_>>()
        .join("-");
    let fits = shown.len() <= NAME_BYTES_MAX && shown.is_ascii() && showable(&shown) == shown;
    let header = format!("{PREFIX_SHOWN}{}", if fits { &shown } else { "…" });
    Refusal::of_param(Code::ParameterInvalid, header.clone(), format!("{header} {why}."))
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderName;

    use super::*;

    fn read_of(given: &[(&str, &str)]) -> Result<Vec<(String, String)>, (Code, String)> {
        let mut headers = HeaderMap::new();
        for (name, value) in given {
            let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
            headers.append(name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        read(&headers).map_err(|refusal| (refusal.code, refusal.param.unwrap_or_default()))
    }

    #[test]
    fn names_are_written_as_in_metadata() {
        let pairs = read_of(&[
            ("Keybrake-Context-Original-Execution", "4Xy"),
            ("KEYBRAKE-CONTEXT-FLOW", "billing, monthly"),
            ("keybrake-contextual", "no"),
            ("authorization", "Bearer vk_test_1"),
        ]);
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(pairs.unwrap(), [pair("flow", "billing, monthly"), pair("original_execution", "4Xy")]);
        assert_eq!(read_of(&[("keybrake-context-a", &"x".repeat(200))]).unwrap()[0].1.len(), 200);
        assert_eq!(read_of(&[(&format!("keybrake-context-{}", "n".repeat(40)), "x")]).unwrap().len(), 1);
    }

    #[test]
    fn what_a_record_should_not_hold_is_refused_by_name() {
        let long_name = format!("keybrake-context-{}", "n".repeat(41));
        for (given, named) in [
            (vec![("keybrake-context-task", "a"), ("keybrake-context-task", "a")], "Keybrake-Context-Task"),
            (vec![("keybrake-context-task", "")], "Keybrake-Context-Task"),
            (vec![("keybrake-context-task", "ü")], "Keybrake-Context-Task"),
            (vec![("keybrake-context-task", "a\tb")], "Keybrake-Context-Task"),
            (vec![("keybrake-context-the-task", "by sk_live_abc")], "Keybrake-Context-The-Task"),
            (vec![("keybrake-context-task", "vk_test_abc")], "Keybrake-Context-Task"),
            (vec![("keybrake-context-", "a")], "Keybrake-Context-"),
            (vec![("keybrake-context-a_b", "a")], "Keybrake-Context-A_b"),
            (vec![("keybrake-context-4242424242424242", "a")], "Keybrake-Context-"),
            (vec![("keybrake-context-sk-live-abc", "a")], "Keybrake-Context-"),
            (vec![(long_name.as_str(), "a")], "Keybrake-Context-…"),
        ] {
            assert_eq!(read_of(&given), Err((Code::ParameterInvalid, named.to_owned())), "{given:?}");
        }
        let long = "x".repeat(201);
        assert!(read_of(&[("keybrake-context-task", &long)]).is_err());
        let many: Vec<String> = (0..11).map(|n| format!("keybrake-context-n{n}")).collect();
        let many: Vec<(&str, &str)> = many.iter().map(|name| (name.as_str(), "x")).collect();
        assert_eq!(read_of(&many[..10]).unwrap().len(), 10);
        assert!(read_of(&many).is_err());
    }

    #[test]
    fn digits_that_could_be_a_card_number_are_masked() {
        let pairs = read_of(&[("keybrake-context-note", "4242 4242 4242 4242")]).unwrap();
        assert_eq!(pairs[0].1, "[card number removed]");
    }
}
