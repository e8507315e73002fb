//! The texts of a record, as the index needs them: borrowed from its bytes, and of everything else only that it is there.

use std::borrow::Cow;
use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{
    Deserialize, Deserializer, IgnoredAny, IntoDeserializer as _, MapAccess, SeqAccess, Visitor,
};

use crate::audit::Event;
use crate::id::CallId;
use crate::journal::JournalError;

/// The top-level fields of a record that are texts, or have texts.
pub(super) struct Fields<'a>(Vec<(Cow<'a, str>, Field<'a>)>);

enum Field<'a> {
    Text(Cow<'a, str>),
    Texts(Vec<(Cow<'a, str>, Cow<'a, str>)>),
}

impl<'a> Fields<'a> {
    pub(super) fn read(record: &'a [u8]) -> Result<Self, JournalError> {
        serde_json::from_slice(record).map_err(|_| JournalError::Corrupt("record"))
    }

    /// The call whose outcome the record tells; `None` for any other record.
    pub(super) fn call(&self) -> Result<Option<CallId>, JournalError> {
        let event: StrDeserializer<'_, serde::de::value::Error> =
            self.text("event").unwrap_or_default().into_deserializer();
        let event = Event::deserialize(event).map_err(|_| JournalError::Corrupt("record"))?;
        Ok(self.text("call_id").filter(|_| event.is_of_a_call()).and_then(CallId::parse))
    }

    /// A field that is a text. Of two of one name the last one counts, as for whoever reads the record.
    pub(super) fn text(&self, name: &str) -> Option<&str> {
        match &self.0.iter().rev().find(|(field, _)| field == name)?.1 {
            Field::Text(text) => Some(text),
            Field::Texts(_) => None,
        }
    }

    /// The entries of a field that are texts.
    pub(super) fn texts(&self, name: &str) -> impl Iterator<Item = (&str, &str)> {
        let found = self.0.iter().rev().find(|(field, _)| field == name);
        let entries = found.and_then(|(_, field)| match field {
            Field::Texts(entries) => Some(entries),
            Field::Text(_) => None,
        });
        entries.into_iter().flatten().map(|(name, value)| (&**name, &**value))
    }
}

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OfRecord;
        impl<'de> Visitor<'de> for OfRecord {
            type Value = Fields<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a record")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = Vec::with_capacity(32);
                while let Some(Text(name)) = map.next_key()? {
                    if let Any(Some(field)) = map.next_value()? {
                        fields.push((name, field));
                    }
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(OfRecord)
    }
}

/// A text, borrowed where it has no escapes.
struct Text<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Text<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OfText;
        impl<'de> Visitor<'de> for OfText {
            type Value = Text<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_str(OfText)
    }
}

/// Any value; what is neither a text nor an object is nothing.
struct Any<'a>(Option<Field<'a>>);

impl<'de> Deserialize<'de> for Any<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OfAny;
        impl<'de> Visitor<'de> for OfAny {
            type Value = Any<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Any(Some(Field::Text(Cow::Borrowed(text)))))
            }

            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Any(Some(Field::Text(Cow::Owned(text.to_owned())))))
            }

            fn visit_unit<E>(self) -> Result<Self::Value, E> {
                Ok(Any(None))
            }

            fn visit_bool<E>(self, _: bool) -> Result<Self::Value, E> {
                Ok(Any(None))
            }

            fn visit_u64<E>(self, _: u64) -> Result<Self::Value, E> {
                Ok(Any(None))
            }

            fn visit_i64<E>(self, _: i64) -> Result<Self::Value, E> {
                Ok(Any(None))
            }

            fn visit_f64<E>(self, _: f64) -> Result<Self::Value, E> {
                Ok(Any(None))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Any(None))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(Text(name)) = map.next_key()? {
                    if let Any(Some(Field::Text(text))) = map.next_value()? {
                        entries.push((name, text));
                    }
                }
                Ok(Any(Some(Field::Texts(entries))))
            }
        }
        deserializer.deserialize_any(OfAny)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_told_and_nothing_else_is_in_the_way() {
        let record = r#"{"seq": 7, "low": -1, "at": "1", "e\"": "a\u0062", "none": null, "half": 0.5, "is": true,
            "list": ["x", {"y": 1}], "metadata": {"flow": "b", "n": 3, "deep": {"flow": "c"}, "l": []}, "at": "2"}"#;
        let fields: Fields<'_> = serde_json::from_str(record).unwrap();
        let text = |name| fields.text(name);
        assert_eq!((text("at"), text("e\""), text("metadata")), (Some("2"), Some("ab"), None));
        for name in ["seq", "low", "none", "half", "is", "list", "other"] {
            assert_eq!((text(name), fields.texts(name).next()), (None, None), "{name}");
        }
        assert_eq!(fields.texts("metadata").collect::<Vec<_>>(), [("flow", "b")]);
        assert_eq!(fields.texts("at").next(), None);
        for no_record in ["[]", "7", "{", "{\"a\": }"] {
            assert!(serde_json::from_str::<Fields<'_>>(no_record).is_err(), "{no_record}");
        }
    }
}
