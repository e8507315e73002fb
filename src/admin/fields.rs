//! A JSON object read field by field, strictly: every field is known, given once, and of its kind, or the refusal names
//! it.

use std::fmt;

use serde::de::{Deserialize, DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::money::MicroUsd;
use crate::refusal::{Code, Refusal};

/// Characters of a reason.
const REASON_CHARS_MAX: usize = 500;

/// The fields of one object that nobody has taken yet.
#[derive(Debug)]
pub struct Fields(Vec<(String, Box<RawValue>)>);

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Fields;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields: Vec<(String, Box<RawValue>)> = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, Box<RawValue>>()? {
                    fields.push((name, value));
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

impl Fields {
    /// Reads a body; an empty one is an empty object.
    ///
    /// # Errors
    /// `parameter_invalid`, or `request_ambiguous` for a field that is given twice.
    pub fn parse(body: &[u8]) -> Result<Self, Refusal> {
        if body.is_empty() {
            return Ok(Self(Vec::new()));
        }
        let fields: Self = serde_json::from_slice(body)
            .map_err(|_| Refusal::new(Code::ParameterInvalid, "The body must be a JSON object."))?;
        for (at, (name, _)) in fields.0.iter().enumerate() {
            if fields.0.iter().skip(at + 1).any(|(other, _)| other == name) {
                return Err(Refusal::of_param(
                    Code::RequestAmbiguous,
                    name,
                    format!("'{name}' is given more than once."),
                ));
            }
        }
        Ok(fields)
    }

    /// Takes a field; `null` is absent.
    ///
    /// # Errors
    /// `parameter_invalid` when it is not of its kind.
    pub fn take<T: DeserializeOwned>(&mut self, name: &str, kind: &str) -> Result<Option<T>, Refusal> {
        let Some(raw) = self.raw(name) else { return Ok(None) };
        serde_json::from_str(raw.get()).map(Some).map_err(|_| invalid(name, format!("must be {kind}")))
    }

    /// Takes a field that must be there.
    ///
    /// # Errors
    /// `parameter_invalid`.
    pub fn need<T: DeserializeOwned>(&mut self, name: &str, kind: &str) -> Result<T, Refusal> {
        self.take(name, kind)?.ok_or_else(|| invalid(name, format!("is missing: it must be {kind}")))
    }

    /// Takes decimal dollars, as a JSON number or string, digit by digit.
    ///
    /// # Errors
    /// `parameter_invalid`.
    pub fn dollars(&mut self, name: &str) -> Result<Option<MicroUsd>, Refusal> {
        let Some(raw) = self.raw(name) else { return Ok(None) };
        let text = match serde_json::from_str::<String>(raw.get()) {
            Ok(text) => text,
            Err(_) => raw.get().to_owned(),
        };
        MicroUsd::parse_dollars(&text).map(Some).map_err(|why| invalid(name, why.to_string()))
    }

    /// Takes the reason that every change by hand must have.
    ///
    /// # Errors
    /// `parameter_invalid`.
    pub fn reason(&mut self) -> Result<String, Refusal> {
        let reason: String = self.need("reason", "a sentence for the audit log")?;
        if reason.trim().is_empty() || reason.chars().count() > REASON_CHARS_MAX {
            return Err(invalid("reason", format!("must have 1 to {REASON_CHARS_MAX} characters")));
        }
        Ok(reason)
    }

    /// Takes a field that is an object, in the order of its names; an absent one is empty.
    ///
    /// # Errors
    /// `parameter_invalid`, or `request_ambiguous` when a name in it is given twice.
    pub fn object<T: DeserializeOwned>(
        &mut self,
        name: &str,
        kind: &str,
    ) -> Result<Vec<(String, T)>, Refusal> {
        let inner: Option<Self> = self.take(name, kind)?;
        let mut raw = inner.map(|inner| inner.0).unwrap_or_default();
        raw.sort_by(|(one, _), (other, _)| one.cmp(other));
        if raw.windows(2).any(|two| two[0].0 == two[1].0) {
            let message = format!("'{name}' gives a name more than once.");
            return Err(Refusal::of_param(Code::RequestAmbiguous, name, message));
        }
        let read = |(key, value): (String, Box<RawValue>)| {
            let value =
                serde_json::from_str(value.get()).map_err(|_| invalid(name, format!("must be {kind}")))?;
            Ok((key, value))
        };
        raw.into_iter().map(read).collect()
    }

    /// Whether a field is there, `null` included.
    pub fn names(&self, name: &str) -> bool {
        self.0.iter().any(|(found, _)| found == name)
    }

    /// Refuses what nobody took.
    ///
    /// # Errors
    /// `parameter_invalid`.
    pub fn finish(self) -> Result<(), Refusal> {
        match self.0.first() {
            None => Ok(()),
            Some((name, _)) => Err(invalid(name, "is not a known field".to_owned())),
        }
    }

    fn raw(&mut self, name: &str) -> Option<Box<RawValue>> {
        let at = self.0.iter().position(|(found, _)| found == name)?;
        let (_, raw) = self.0.remove(at);
        (raw.get() != "null").then_some(raw)
    }
}

/// The refusal of one field.
pub fn invalid(name: &str, why: impl Into<String>) -> Refusal {
    Refusal::of_param(Code::ParameterInvalid, name, format!("'{name}' {}.", why.into()))
}
