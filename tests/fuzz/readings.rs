//! A form as others read it, written from their published rules and from nothing of this project's: what is forwarded
//! must mean the same to all of them.

use std::collections::BTreeMap;

/// Rack's second release takes a name apart by a pattern that skips brackets, and a semicolon separates there as well. The
/// third goes by the places of brackets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rack {
    Two,
    Three,
}

/// Why Rack answers 400.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unreadable(pub(crate) &'static str);

/// Rack's parameters: texts, lists and hashes.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Node {
    Text(String),
    List(Vec<Self>),
    Hash(BTreeMap<String, Self>),
}

/// The old recommendation of HTML: a semicolon separates as well, blanks around a name are no part of it, and of equal
/// names the first counts.
pub(crate) fn first_wins(form: &[u8]) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for pair in form.split(|byte| matches!(byte, b'&' | b';')).filter(|pair| !pair.is_empty()) {
        let (name, value) = sides(pair);
        found.entry(lenient(name).trim().to_owned()).or_insert_with(|| lenient(value));
    }
    found
}

/// The URL standard: names are plain text, brackets mean nothing, and of equal names the last counts.
pub(crate) fn last_wins(form: &[u8]) -> BTreeMap<String, String> {
    let pairs = form.split(|byte| *byte == b'&').filter(|pair| !pair.is_empty());
    pairs.map(sides).map(|(name, value)| (lenient(name), lenient(value))).collect()
}

/// `Rack::QueryParser#parse_nested_query`, with every leaf under its indexed name: `a[]=x` is `a[0]`.
pub(crate) fn nested(form: &[u8], rack: Rack) -> Result<BTreeMap<String, String>, Unreadable> {
    let mut all = BTreeMap::new();
    let separates = |byte: &u8| *byte == b'&' || (*byte == b';' && rack == Rack::Two);
    for (at, pair) in form.split(separates).enumerate() {
        // The separator takes the spaces behind it along.
        let blanks = pair.iter().take_while(|byte| at > 0 && **byte == b' ').count();
        let pair = pair.get(blanks..).unwrap_or_default();
        if !pair.is_empty() {
            let (name, value) = sides(pair);
            put(&mut all, &strict(name)?, strict(value)?, rack, 0)?;
        }
    }
    let mut leaves = BTreeMap::new();
    for (name, node) in &all {
        gather(name.clone(), node, &mut leaves);
    }
    Ok(leaves)
}

fn sides(pair: &[u8]) -> (&[u8], &[u8]) {
    match pair.iter().position(|byte| *byte == b'=') {
        Some(at) => (&pair[..at], &pair[at + 1..]),
        None => (pair, b""),
    }
}

/// Percent-decoding in which a bad escape stands for itself.
fn lenient(text: &[u8]) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.iter().copied();
    while let Some(byte) = rest.next() {
        match byte {
            b'+' => bytes.push(b' '),
            b'%' => match two_digits(&mut rest.clone()) {
                Some(decoded) => {
                    bytes.push(decoded);
                    rest.by_ref().take(2).for_each(drop);
                }
                None => bytes.push(byte),
            },
            _ => bytes.push(byte),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Percent-decoding in which a bad escape is an error.
fn strict(text: &[u8]) -> Result<String, Unreadable> {
    let mut bytes = Vec::new();
    let mut rest = text.iter().copied();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => two_digits(&mut rest).ok_or(Unreadable("invalid %-encoding"))?,
            _ => byte,
        });
    }
    String::from_utf8(bytes).map_err(|_| Unreadable("not UTF-8"))
}

fn two_digits(rest: &mut impl Iterator<Item = u8>) -> Option<u8> {
    let mut digit = || rest.next().and_then(|byte| char::from(byte).to_digit(16));
    let (high, low) = (digit()?, digit()?);
    u8::try_from(high * 16 + low).ok()
}

/// The first key of a name, and what is behind it.
fn take_key(name: &str, rack: Rack, depth: usize) -> (String, &str) {
    if rack == Rack::Two {
        let inner = name.trim_start_matches(['[', ']']);
        let (key, after) = inner.split_at(inner.find(['[', ']']).unwrap_or(inner.len()));
        return (key.to_owned(), after.trim_start_matches(']'));
    }
    if depth == 0 {
        // A bracket at the start is part of the key.
        let behind_first = name.chars().next().map_or(0, char::len_utf8);
        let start = name[behind_first..].find('[').map_or(name.len(), |at| at + behind_first);
        return (name[..start].to_owned(), &name[start..]);
    }
    if let Some(after) = name.strip_prefix("[]") {
        return ("[]".to_owned(), after);
    }
    match name.strip_prefix('[').and_then(|inner| inner.split_once(']')) {
        Some((key, after)) => (key.to_owned(), after),
        None => (name.to_owned(), ""),
    }
}

fn put(
    hash: &mut BTreeMap<String, Node>,
    name: &str,
    value: String,
    rack: Rack,
    depth: usize,
) -> Result<(), Unreadable> {
    if depth >= 32 {
        return Err(Unreadable("nested too deeply"));
    }
    let (key, after) = take_key(name, rack, depth);
    if key == "[]" && depth > 0 {
        // Rack reads a list in a list; nothing here has to.
        return Err(Unreadable("a list in a list"));
    }
    if key.is_empty() {
        return Ok(());
    }
    if after.is_empty() {
        hash.insert(key, Node::Text(value));
    } else if after == "[" {
        hash.insert(name.to_owned(), Node::Text(value));
    } else if let Some(inner) = after.strip_prefix("[]") {
        let Node::List(items) = hash.entry(key).or_insert(Node::List(Vec::new())) else {
            return Err(Unreadable("expected a list"));
        };
        if inner.is_empty() {
            items.push(Node::Text(value));
            return Ok(());
        }
        // `[][key]` is a key of the last hash, unless that has it already.
        let plain = |key: &&str| !key.is_empty() && !key.contains(['[', ']']);
        let child = inner.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).filter(plain);
        let child = child.unwrap_or(inner);
        match items.last_mut() {
            Some(Node::Hash(last)) if !has(last, child) => put(last, child, value, rack, depth + 1)?,
            _ => {
                let mut new = BTreeMap::new();
                put(&mut new, child, value, rack, depth + 1)?;
                items.push(Node::Hash(new));
            }
        }
    } else {
        let Node::Hash(inner) = hash.entry(key).or_insert(Node::Hash(BTreeMap::new())) else {
            return Err(Unreadable("expected a hash"));
        };
        put(inner, after, value, rack, depth + 1)?;
    }
    Ok(())
}

fn has(hash: &BTreeMap<String, Node>, name: &str) -> bool {
    if name.contains("[]") {
        return false;
    }
    let mut at = Some(hash);
    for part in name.split(['[', ']']).filter(|part| !part.is_empty()) {
        match at.and_then(|hash| hash.get(part)) {
            Some(Node::Hash(inner)) => at = Some(inner),
            Some(Node::Text(_) | Node::List(_)) => at = None,
            None => return false,
        }
    }
    true
}

fn gather(name: String, node: &Node, leaves: &mut BTreeMap<String, String>) {
    match node {
        Node::Text(text) => {
            leaves.insert(name, text.clone());
        }
        Node::List(items) => {
            for (index, item) in items.iter().enumerate() {
                gather(format!("{name}[{index}]"), item, leaves);
            }
        }
        Node::Hash(inner) => {
            for (key, item) in inner {
                gather(format!("{name}[{key}]"), item, leaves);
            }
        }
    }
}
