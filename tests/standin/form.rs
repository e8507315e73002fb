//! Parameters of v1, read as Rack reads them: `a[b]` nests, `a[]` appends, of two equal names the last wins, and query
//! and body are one bucket in which the body wins.

use serde_json::{Map, Value, json};

/// Deeper nesting is refused: Rack has such a limit too, and recursion needs one.
const DEPTH_MAX: usize = 16;

#[derive(Clone, Debug, Default)]
pub(crate) struct Params(Map<String, Value>);

impl Params {
    /// Reads query and body; the error is a sentence for the caller.
    pub(crate) fn read(query: &str, body: &str) -> Result<Self, String> {
        let mut all = parse(query)?;
        for (name, value) in parse(body)? {
            all.insert(name, value);
        }
        Ok(Self(all))
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    pub(crate) fn value(&self, name: &str) -> Option<&Value> {
        self.0.get(name)
    }

    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        self.value(name).and_then(Value::as_str)
    }

    /// Whether `expand[]` (or `expand[0]`) asks for `what`.
    pub(crate) fn expands(&self, what: &str) -> bool {
        match self.value("expand") {
            Some(Value::Array(items)) => items.iter().any(|item| item == what),
            Some(Value::Object(items)) => items.values().any(|item| item == what),
            _ => false,
        }
    }

    /// One text for all spellings of the same parameters: their order is no part of a request, that of an array is.
    pub(crate) fn canonical(&self) -> String {
        let mut text = String::new();
        for (name, value) in sorted(&self.0) {
            write_leaves(name, value, &mut text);
        }
        text
    }

    pub(crate) fn into_map(self) -> Map<String, Value> {
        self.0
    }
}

fn sorted(map: &Map<String, Value>) -> Vec<(&String, &Value)> {
    let mut pairs: Vec<_> = map.iter().collect();
    pairs.sort_by_key(|(name, _)| *name);
    pairs
}

fn write_leaves(path: &str, value: &Value, text: &mut String) {
    match value {
        Value::Object(map) => {
            for (name, inner) in sorted(map) {
                write_leaves(&format!("{path}[{name}]"), inner, text);
            }
        }
        Value::Array(items) => {
            for (index, inner) in items.iter().enumerate() {
                write_leaves(&format!("{path}[#{index}]"), inner, text);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            text.push_str(&json!([path, value]).to_string());
        }
    }
}

fn parse(text: &str) -> Result<Map<String, Value>, String> {
    let mut all = Value::Object(Map::new());
    for pair in text.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let (name, value) = (decode(name)?, decode(value)?);
        put(&mut all, &segments(&name)?, value).map_err(|wanted| {
            format!("Invalid request: parameter `{name}` clashes with another one (expected {wanted}).")
        })?;
    }
    Ok(if let Value::Object(map) = all { map } else { Map::new() })
}

/// `a[b][]` is `a`, `b` and the empty segment that appends. A name with unbalanced brackets is one plain name.
fn segments(name: &str) -> Result<Vec<&str>, String> {
    let Some((head, rest)) = name.split_once('[') else { return Ok(vec![name]) };
    let Some(inner) = rest.strip_suffix(']').filter(|_| !head.is_empty()) else { return Ok(vec![name]) };
    let mut found = vec![head];
    found.extend(inner.split("]["));
    if found.len() > DEPTH_MAX {
        return Err("Invalid request: parameters are nested too deeply.".into());
    }
    Ok(found)
}

/// Puts a value where its path leads; the error names the type that was expected there.
fn put(slot: &mut Value, path: &[&str], value: String) -> Result<(), &'static str> {
    let Some((first, rest)) = path.split_first() else {
        *slot = Value::String(value);
        return Ok(());
    };
    if first.is_empty() {
        if slot.is_null() {
            *slot = Value::Array(Vec::new());
        }
        let Value::Array(items) = slot else { return Err("an array") };
        let open = items.last().is_some_and(|last| last.is_object() && !rest.is_empty() && !has(last, rest));
        if !open {
            items.push(Value::Null);
        }
        return items.last_mut().map_or(Err("an array"), |last| put(last, rest, value));
    }
    if slot.is_null() {
        *slot = Value::Object(Map::new());
    }
    let Value::Object(map) = slot else { return Err("a hash") };
    put(map.entry(*first).or_insert(Value::Null), rest, value)
}

fn has(value: &Value, path: &[&str]) -> bool {
    path.split_first().is_none_or(|(first, rest)| value.get(*first).is_some_and(|inner| has(inner, rest)))
}

fn decode(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digits = [rest.next().unwrap_or(b'?'), rest.next().unwrap_or(b'?')];
                let digits = str::from_utf8(&digits).ok().filter(|two| !two.starts_with('+'));
                digits.and_then(|two| u8::from_str_radix(two, 16).ok()).ok_or("Invalid %-encoding")?
            }
            other => other,
        });
    }
    String::from_utf8(bytes).map_err(|_| "Invalid request: parameters are not UTF-8.".into())
}
