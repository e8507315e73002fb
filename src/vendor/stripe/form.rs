//! Stripe's bracketed form encoding, read in exactly one way or refused.
//!
//! Parsers disagree about what `amount=5&amount=9`, `a=1&a[b]=2` or `%zz` mean, and Stripe's is one of them. So whatever
//! two of them could read differently is refused, and what goes to Stripe is written anew from what was read here.
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions)]

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt::Write as _;

/// Parameters that one request may have.
const PARAMS_MAX: usize = 1_000;
/// Brackets that one name may have.
const DEPTH_MAX: usize = 8;
/// Bytes that one name may have.
const NAME_BYTES_MAX: usize = 512;
/// The highest index of a list.
const INDEX_MAX: u32 = 9_999;

/// Why a form cannot be read in exactly one way.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct Ambiguous {
    /// The parameter at fault, where it has a readable name.
    pub param: Option<String>,
    /// What is wrong.
    pub why: &'static str,
}

/// One step from a parameter's base name inwards.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Index(u32),
    Key(String),
}

/// The parameters of one request, in canonical order, each with its one spelling.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Params(Vec<(String, String)>);

impl Params {
    /// Reads a form or a query string.
    ///
    /// # Errors
    /// [`Ambiguous`] for anything that two parsers could read differently.
    pub fn parse(text: &[u8]) -> Result<Self, Ambiguous> {
        let mut tree: BTreeMap<Vec<Step>, String> = BTreeMap::new();
        let mut appended: BTreeMap<Vec<Step>, u32> = BTreeMap::new();
        if text.is_empty() {
            return Ok(Self::default());
        }
        for (count, pair) in text.split(|byte| *byte == b'&').enumerate() {
            if count >= PARAMS_MAX {
                return Err(ambiguous(None, "there are too many parameters"));
            }
            let (path, value) = read_pair(pair, &mut appended)?;
            match tree.entry(path) {
                Entry::Vacant(place) => place.insert(value),
                Entry::Occupied(place) => {
                    return Err(ambiguous(Some(spell(place.key())), "the parameter is given more than once"));
                }
            };
        }
        refuse_clashes(&tree, &appended)?;
        Ok(Self(tree.into_iter().map(|(path, value)| (spell(&path), value)).collect()))
    }

    /// Names and values, in canonical order.
    pub fn pairs(&self) -> &[(String, String)] {
        &self.0
    }

    /// The value of a parameter by its canonical name.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// The first of some parameters that is given and not empty: its name and value.
    pub fn first_of(&self, names: &[&'static str]) -> Option<(&'static str, &str)> {
        names.iter().find_map(|name| Some((*name, self.get(name).filter(|value| !value.is_empty())?)))
    }

    /// Whether no parameter but those with these base names is given.
    pub fn names_only(&self, bases: &[&'static str]) -> bool {
        self.0.iter().all(|(name, _)| bases.contains(&base(name)))
    }

    /// The same with one parameter's value in lower case, for values whose case means nothing.
    #[must_use]
    pub fn with_lower_case(mut self, name: &str) -> Self {
        for (_, value) in self.0.iter_mut().filter(|(found, _)| found == name) {
            value.make_ascii_lowercase();
        }
        self
    }
}

/// Writes parameters as a form: only unreserved characters and brackets stand for themselves.
pub fn serialise(pairs: &[(String, String)]) -> String {
    let mut text = String::new();
    for (name, value) in pairs {
        if !text.is_empty() {
            text.push('&');
        }
        escape(name, true, &mut text);
        text.push('=');
        escape(value, false, &mut text);
    }
    text
}

/// The name of a parameter without its brackets.
pub fn base(name: &str) -> &str {
    name.split('[').next().unwrap_or(name)
}

/// The words of a name: `a[b][0]` is `a`, `b`, `0`.
pub fn words(name: &str) -> impl Iterator<Item = &str> {
    name.split(['[', ']']).filter(|word| !word.is_empty())
}

fn ambiguous(param: Option<String>, why: &'static str) -> Ambiguous {
    Ambiguous { param, why }
}

fn read_pair(pair: &[u8], appended: &mut BTreeMap<Vec<Step>, u32>) -> Result<(Vec<Step>, String), Ambiguous> {
    let mut sides = pair.split(|byte| *byte == b'=');
    let (Some(name), Some(value), None) = (sides.next(), sides.next(), sides.next()) else {
        return Err(ambiguous(None, "a parameter is not written as name=value"));
    };
    let name = decode(name).ok_or_else(|| ambiguous(None, "a parameter's name is not properly encoded"))?;
    if name.len() > NAME_BYTES_MAX || name.chars().any(char::is_control) {
        return Err(ambiguous(None, "a parameter's name is too long or has control characters"));
    }
    let value =
        decode(value).ok_or_else(|| ambiguous(Some(name.clone()), "the value is not properly encoded"))?;
    let binary = |c: char| c.is_control() && !matches!(c, '\t' | '\n' | '\r');
    if value.chars().any(binary) {
        return Err(ambiguous(Some(name), "the value has control characters"));
    }
    Ok((read_name(&name, appended)?, value))
}

/// Percent-decoding that takes no liberties; `None` for a bad escape, a raw `;` or bytes that are not UTF-8.
fn decode(text: &[u8]) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.iter();
    while let Some(byte) = rest.next() {
        match byte {
            b'+' => bytes.push(b' '),
            b'%' => {
                let pair = [*rest.next()?, *rest.next()?];
                let digits = pair.iter().all(u8::is_ascii_hexdigit);
                let text = std::str::from_utf8(&pair).ok().filter(|_| digits)?;
                bytes.push(u8::from_str_radix(text, 16).ok()?);
            }
            // Some parsers end a parameter at a semicolon.
            b';' => return None,
            _ => bytes.push(*byte),
        }
    }
    String::from_utf8(bytes).ok()
}

fn read_name(name: &str, appended: &mut BTreeMap<Vec<Step>, u32>) -> Result<Vec<Step>, Ambiguous> {
    let bad = |why| Err(ambiguous(Some(name.to_owned()), why));
    let (base, mut rest) = name.split_at(name.find('[').unwrap_or(name.len()));
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    if base.is_empty() || !base.chars().all(plain) {
        return bad("the parameter's name has characters that no parameter has");
    }
    let mut path = vec![Step::Key(base.to_owned())];
    while !rest.is_empty() {
        let inner = rest.strip_prefix('[').and_then(|rest| rest.split_once(']'));
        let Some((word, after)) = inner.filter(|(word, _)| !word.contains('[')) else {
            return bad("the parameter's brackets do not match");
        };
        if path.len() > DEPTH_MAX {
            return bad("the parameter is nested too deeply");
        }
        if word.is_empty() {
            if !after.is_empty() {
                return bad("a list of objects must be written with indexes");
            }
            let next = appended.entry(path.clone()).or_default();
            let index = *next;
            *next = next.saturating_add(1);
            path.push(Step::Index(index));
            return Ok(path);
        }
        path.push(step(word, base).ok_or_else(|| {
            ambiguous(Some(name.to_owned()), "an index is written in a way that parsers disagree about")
        })?);
        rest = after;
    }
    Ok(path)
}

/// An index has one spelling. Metadata may be named as its owner likes.
fn step(word: &str, base: &str) -> Option<Step> {
    let digits = word.bytes().all(|byte| byte.is_ascii_digit());
    if !digits {
        return Some(Step::Key(word.to_owned()));
    }
    let index = word.parse().ok().filter(|index: &u32| *index <= INDEX_MAX && index.to_string() == word);
    match index {
        Some(index) => Some(Step::Index(index)),
        None if base == "metadata" => Some(Step::Key(word.to_owned())),
        None => None,
    }
}

/// Refuses a name that is a value and a container at once, and a list that is written in two ways.
fn refuse_clashes(
    tree: &BTreeMap<Vec<Step>, String>,
    appended: &BTreeMap<Vec<Step>, u32>,
) -> Result<(), Ambiguous> {
    for path in tree.keys() {
        for length in 1..path.len() {
            let parent = path.get(..length).unwrap_or_default();
            if tree.contains_key(parent) {
                return Err(ambiguous(Some(spell(parent)), "the parameter is both a value and an object"));
            }
        }
    }
    for (list, count) in appended {
        let indexed = tree.keys().filter(|path| path.len() > list.len() && path.starts_with(list)).count();
        if u32::try_from(indexed).ok() != Some(*count) {
            return Err(ambiguous(Some(spell(list)), "the list is written in two ways"));
        }
    }
    Ok(())
}

fn spell(path: &[Step]) -> String {
    path.iter().enumerate().fold(String::new(), |mut name, (depth, step)| {
        // Writing to a string cannot fail.
        let _ = match (depth, step) {
            (0, Step::Key(key)) => write!(name, "{key}"),
            (_, Step::Key(key)) => write!(name, "[{key}]"),
            (_, Step::Index(index)) => write!(name, "[{index}]"),
        };
        name
    })
}

fn escape(text: &str, is_name: bool, out: &mut String) {
    for byte in text.bytes() {
        let bracket = is_name && matches!(byte, b'[' | b']');
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~') || bracket {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn canonical(text: &str) -> Result<String, &'static str> {
        Params::parse(text.as_bytes()).map(|params| serialise(params.pairs())).map_err(|error| error.why)
    }

    #[test]
    fn one_reading_one_spelling() {
        for (text, expected) in [
            ("", ""),
            ("amount=5&currency=usd", "amount=5&currency=usd"),
            ("currency=usd&amount=5", "amount=5&currency=usd"),
            ("metadata%5Ba%5D=1", "metadata[a]=1"),
            ("metadata[b c]=x+y", "metadata[b%20c]=x%20y"),
            ("expand[]=a&expand[]=b", "expand[0]=a&expand[1]=b"),
            ("expand[1]=b&expand[0]=a", "expand[0]=a&expand[1]=b"),
            ("l[10]=b&l[9]=a", "l[9]=a&l[10]=b"),
            ("items[0][price]=p&items[0][quantity]=2", "items[0][price]=p&items[0][quantity]=2"),
            ("metadata[007]=x", "metadata[007]=x"),
            ("customer=", "customer="),
            ("description=%C3%BC", "description=%C3%BC"),
        ] {
            assert_eq!(canonical(text).as_deref(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn whatever_two_parsers_read_differently_is_refused() {
        for text in [
            "amount=5&amount=9",
            "amount=5&amo%75nt=9",
            "a[b]=1&a%5Bb%5D=2",
            "a[0]=1&a[]=2",
            "a[]=1&a[5]=2",
            "a[00]=1",
            "a[01]=1&a[1]=2",
            "a[99999]=1",
            "a=1&a[b]=2",
            "a[b]=1&a[b][c]=2",
            "items[][price]=1&items[][quantity]=2",
            "a",
            "a=1&",
            "&a=1",
            "a=1&&b=2",
            "a=b=c",
            "a=%zz",
            "a=%4",
            "a=%ff",
            "a=%00",
            "a%00=1",
            "a=1;b=2",
            "=1",
            "[a]=1",
            "a[=1",
            "a]=1",
            "a[b=1",
            "a[b]c=1",
            "a[b[c]]=1",
            "a[1][2][3][4][5][6][7][8][9]=1",
            "a b=1",
            "ä=1",
        ] {
            assert!(canonical(text).is_err(), "{text} was read as {:?}", canonical(text));
        }
    }

    proptest! {
        #[test]
        fn the_canonical_form_is_a_fixed_point(text in "[a-c\\[\\]=&%0-9+;x]{0,40}") {
            if let Ok(once) = canonical(&text) {
                prop_assert_eq!(canonical(&once), Ok(once));
            }
        }

        #[test]
        fn any_value_survives(value in "\\PC{0,20}", key in "[^\\[\\]\\p{C}]{1,10}") {
            let pairs = vec![(format!("metadata[{key}]"), value)];
            let read = Params::parse(serialise(&pairs).as_bytes()).unwrap();
            prop_assert_eq!(read.pairs(), pairs.as_slice());
        }
    }
}
