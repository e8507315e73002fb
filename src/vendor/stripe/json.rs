//! JSON of Stripe's as it is read here: borrowed from the body, and looked at once.
//!
//! A charge has some sixty fields, of which six are looked at. An object is a plain list, because building a map of it
//! takes longer than finding six names in one.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

/// Any JSON.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value<'a> {
    Null,
    Bool(bool),
    /// A whole number from 0 to 2^64-1.
    Whole(u64),
    /// A whole number from -2^63 to -1.
    Negative(i64),
    /// Any other number: no amount is one.
    Fraction,
    Text(Cow<'a, str>),
    List(Vec<Value<'a>>),
    Object(Vec<(Cow<'a, str>, Value<'a>)>),
}

/// Reads a whole body; `None` when it is not JSON, or nested too deep.
pub(super) fn read(body: &[u8]) -> Option<Value<'_>> {
    // Checked once for all, not for each string.
    serde_json::from_str(std::str::from_utf8(body).ok()?).ok()
}

impl<'a> Value<'a> {
    /// The value of a field; the last one where a name comes twice, as JSON's readers have it.
    pub(super) fn get(&self, field: &str) -> Option<&Value<'a>> {
        let Self::Object(fields) = self else { return None };
        fields.iter().rfind(|(name, _)| name == field).map(|(_, value)| value)
    }

    pub(super) fn as_str(&self) -> Option<&str> {
        if let Self::Text(text) = self { Some(text) } else { None }
    }

    pub(super) fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(value) = self { Some(*value) } else { None }
    }

    pub(super) fn as_u64(&self) -> Option<u64> {
        if let Self::Whole(number) = self { Some(*number) } else { None }
    }

    pub(super) fn as_array(&self) -> Option<&[Value<'a>]> {
        if let Self::List(items) = self { Some(items) } else { None }
    }

    pub(super) fn is_null(&self) -> bool {
        matches!(self, Self::Null)
    }

    pub(super) fn as_i64(&self) -> Option<i64> {
        if let Self::Negative(number) = self { Some(*number) } else { i64::try_from(self.as_u64()?).ok() }
    }
}

impl<'de> Deserialize<'de> for Value<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OfValue)
    }
}

struct OfValue;

impl<'de> Visitor<'de> for OfValue {
    type Value = Value<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Self::Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Self::Value, E> {
        Ok(Value::Whole(number))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Self::Value, E> {
        Ok(u64::try_from(number).map_or(Value::Negative(number), Value::Whole))
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self::Value, E> {
        Ok(Value::Fraction)
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(Value::Text(Cow::Borrowed(text)))
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Value::Text(Cow::Owned(text.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Self::Value, A::Error> {
        let mut object = Vec::new();
        while let Some((Name(name), value)) = fields.next_entry()? {
            object.push((name, value));
        }
        Ok(Value::Object(object))
    }
}

/// The name of a field, borrowed unless it is written with escapes.
struct Name<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Name<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(OfName)
    }
}

struct OfName;

impl<'de> Visitor<'de> for OfName {
    type Value = Name<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(Name(Cow::Borrowed(text)))
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Name(Cow::Owned(text.to_owned())))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value as Known;

    use super::*;

    /// The same in the way of the library's own value.
    fn is_as(value: &Value<'_>, known: &Known) -> bool {
        match known {
            Known::Null => value.is_null(),
            Known::Bool(known) => value.as_bool() == Some(*known),
            Known::Number(known) => value.as_u64() == known.as_u64() && value.as_i64() == known.as_i64(),
            Known::String(known) => value.as_str() == Some(known),
            Known::Array(known) => value.as_array().is_some_and(|items| {
                items.len() == known.len() && items.iter().zip(known).all(|(a, b)| is_as(a, b))
            }),
            Known::Object(known) => {
                matches!(value, Value::Object(_))
                    && known
                        .iter()
                        .all(|(name, known)| value.get(name).is_some_and(|value| is_as(value, known)))
            }
        }
    }

    #[test]
    fn what_is_read_is_what_is_written() {
        for text in [
            r#"{"id":"ch_1","amount":100,"paid":true,"refunds":null,"metadata":{"a":"b"},"list":[1,-2,3.5,"x"]}"#,
            r#"{"a":1,"a":2}"#,
            "{\"na\\u006de\":\"caf\\u00e9 \\ud83d\\ude00\\n\"}",
            "18446744073709551615",
            "18446744073709551616",
            "-9223372036854775808",
            "-9223372036854775809",
            "-0",
            "1e2",
            "[]",
            "{}",
            " null ",
        ] {
            let known: Known = serde_json::from_str(text).unwrap();
            assert!(is_as(&read(text.as_bytes()).unwrap(), &known), "{text}");
        }
        assert_eq!(read(r#"{"a":1,"a":2}"#.as_bytes()).unwrap().get("a"), Some(&Value::Whole(2)));
        for text in ["", "{", "{\"a\":1}x", "nul", "{\"a\":1,}", "\"\u{1}\"", &"[".repeat(10_000)] {
            assert_eq!(read(text.as_bytes()), None, "{text}");
        }
        assert_eq!(read(b"\"\xff\""), None);
    }

    proptest! {
        #[test]
        fn any_text_is_read_as_the_library_reads_it(text in r#"[\[\]{}:,"\\0-9aeflnrstu. -]{0,24}"#) {
            let known: Option<Known> = serde_json::from_str(&text).ok();
            match (read(text.as_bytes()), known) {
                (Some(value), Some(known)) => prop_assert!(is_as(&value, &known)),
                (None, None) => {}
                (value, known) => prop_assert!(false, "{value:?} {known:?}"),
            }
        }
    }
}
