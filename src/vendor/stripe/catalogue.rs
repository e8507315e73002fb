//! Every operation of the Stripe API, and which one a path means.

use std::collections::HashMap;
use std::sync::LazyLock;

use crate::vendor::stripe::pricing::{Answers, Price};

/// How an operation moves money.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// A read.
    Read,
    /// Money, with the amount in the request (a).
    AmountInRequest,
    /// Money, with the amount of an object (b).
    AmountOfObject,
    /// Money, and the amount is known only afterwards (c).
    AmountAfterwards,
    /// Money out (d).
    MoneyOut,
    /// No money by itself (e).
    NoMoney,
}

/// One operation.
#[derive(Debug)]
pub struct Operation {
    /// `METHOD /v1/path/{slot}`.
    pub template: &'static str,
    /// The HTTP method.
    pub method: &'static str,
    /// How it moves money.
    pub class: Class,
    /// What else it could do, for operations that move no money.
    pub danger: Option<&'static str>,
    /// Whether a 2xx takes back what was promised.
    pub releases: bool,
    /// Whether it exists in test mode only.
    pub test_only: bool,
    /// What a call costs at most, where that is known here.
    pub price: Option<Price>,
    /// What a 2xx of an operation that moves no money tells of an object that may be held.
    pub ends: Option<Answers>,
    segments: Vec<Segment>,
}

#[derive(Debug, PartialEq, Eq)]
enum Segment {
    Literal(&'static str),
    Slot(&'static str),
}

/// What operations of class e could do besides, as rows write it.
pub const DANGERS: &[&str] = &[
    "payee",
    "instrument",
    "catalogue",
    "credential",
    "waive",
    "webhook",
    "metered_fee",
    "records",
    "issuing",
    "customer",
    "terminal",
    "portal_config",
    "dispute_evidence",
    "card_data_out",
    "fraud_review",
    "portal_url",
    "retarget",
];

/// A path that is not one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadPath {
    /// Readable in more than one way.
    Ambiguous,
    /// Not canonical, such as one with a slash at its end.
    NotFound,
}

static CATALOGUE: LazyLock<Vec<Operation>> =
    LazyLock::new(|| include_str!("catalogue.txt").lines().filter_map(read_row).collect());

/// Operations by their method, the second word of their path and its length; of one shape, those with more literals first.
type Shapes<'a> = HashMap<(&'a str, &'a str, usize), Vec<&'static Operation>>;

static BY_SHAPE: LazyLock<Shapes<'static>> = LazyLock::new(|| {
    let mut shapes: Shapes<'static> = HashMap::new();
    for operation in CATALOGUE.iter() {
        // No path of Stripe's has a slot there; one that had would be found by nobody, which a test would tell.
        if let Some(Segment::Literal(word)) = operation.segments.get(1) {
            shapes.entry((operation.method, word, operation.segments.len())).or_default().push(operation);
        }
    }
    for operations in shapes.values_mut() {
        operations.sort_by_key(|operation| std::cmp::Reverse(operation.literals()));
    }
    shapes
});

/// All operations.
pub fn all() -> &'static [Operation] {
    &CATALOGUE
}

/// Splits a path into its segments: `/v1/charges/ch_1` is `v1`, `charges`, `ch_1`.
///
/// # Errors
/// [`BadPath`]: there is one spelling of each path, without escapes, dots, empty segments or a slash at its end.
pub fn segments(path: &str) -> Result<Vec<&str>, BadPath> {
    let Some(inner) = path.strip_prefix('/') else { return Err(BadPath::Ambiguous) };
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'/');
    if !inner.bytes().all(plain) || path.contains("//") {
        return Err(BadPath::Ambiguous);
    }
    if inner.ends_with('/') || inner.is_empty() {
        return Err(BadPath::NotFound);
    }
    Ok(inner.split('/').collect())
}

/// The operation that a method and path mean, and the ids in the path's slots. A literal wins over a slot:
/// `/v1/charges/search` is never a retrieve.
pub fn find<'p>(method: &str, path: &[&'p str]) -> Option<(&'static Operation, Vec<&'p str>)> {
    let shapes: &Shapes<'_> = &BY_SHAPE;
    let operation = shapes
        .get(&(method, *path.get(1)?, path.len()))?
        .iter()
        .find(|operation| operation.segments.iter().zip(path).all(|(segment, text)| segment.takes(text)))?;
    let ids = operation
        .segments
        .iter()
        .zip(path)
        .filter_map(|(segment, text)| matches!(segment, Segment::Slot(_)).then_some(*text))
        .collect();
    Some((operation, ids))
}

/// The operation that an entry of `allowed_endpoints` names, and whether it is written with a `*`.
pub fn named(entry: &str) -> Option<(&'static Operation, bool)> {
    let (method, path) = entry.split_once(' ')?;
    let words: Vec<&str> = path.strip_prefix('/')?.split('/').collect();
    let wildcard = words.contains(&"*");
    let is_slot =
        |word: &str| word == "*" || (word.starts_with('{') && word.ends_with('}') && word.len() > 2);
    let operation = CATALOGUE.iter().find(|operation| {
        operation.method == method
            && operation.segments.len() == words.len()
            && operation.segments.iter().zip(&words).all(|(segment, word)| match segment {
                Segment::Literal(literal) => literal == word,
                Segment::Slot(_) => is_slot(word),
            })
    })?;
    Some((operation, wildcard))
}

impl Segment {
    fn takes(&self, text: &str) -> bool {
        match self {
            Self::Literal(literal) => *literal == text,
            Self::Slot(_) => true,
        }
    }
}

impl Operation {
    fn literals(&self) -> usize {
        self.segments.iter().filter(|segment| matches!(segment, Segment::Literal(_))).count()
    }

    /// Whether it can move money by itself.
    pub const fn moves_money(&self) -> bool {
        match self.class {
            Class::AmountInRequest | Class::AmountOfObject | Class::AmountAfterwards | Class::MoneyOut => {
                true
            }
            Class::Read | Class::NoMoney => false,
        }
    }

    /// The names of the slots in its path, in order: `customer` of `/v1/customers/{customer}`.
    pub fn slots(&self) -> impl Iterator<Item = &'static str> + '_ {
        self.segments.iter().filter_map(|segment| match segment {
            Segment::Literal(_) => None,
            Segment::Slot(name) => Some(*name),
        })
    }
}

fn read_row(line: &'static str) -> Option<Operation> {
    if line.starts_with('#') {
        return None;
    }
    let mut words = line.split(' ');
    let (method, path, class) = (words.next()?, words.next()?, words.next()?);
    let class = match class {
        "r" => Class::Read,
        "a" => Class::AmountInRequest,
        "b" => Class::AmountOfObject,
        "c" => Class::AmountAfterwards,
        "d" => Class::MoneyOut,
        _ => Class::NoMoney,
    };
    let template = &line[..method.len() + 1 + path.len()];
    let segments = path
        .split('/')
        .skip(1)
        .map(|word| match word.strip_prefix('{').and_then(|word| word.strip_suffix('}')) {
            Some(name) => Segment::Slot(name),
            None => Segment::Literal(word),
        })
        .collect();
    let rest: Vec<&'static str> = words.collect();
    let answers = rest.iter().find_map(|word| word.strip_prefix("answers=")).and_then(Answers::read);
    Some(Operation {
        template,
        method,
        class,
        danger: rest.iter().find(|word| DANGERS.contains(word)).copied(),
        releases: rest.contains(&"releases"),
        test_only: rest.contains(&"test"),
        price: Price::read(&rest, class == Class::MoneyOut),
        ends: answers.filter(|_| class == Class::NoMoney),
        segments,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_api_is_here() {
        assert_eq!(all().len(), 703);
        let count = |method| all().iter().filter(|operation| operation.method == method).count();
        assert_eq!((count("GET"), count("POST"), count("DELETE")), (313, 356, 34));
        let of = |class| all().iter().filter(|operation| operation.class == class).count();
        assert_eq!(
            [Class::AmountInRequest, Class::AmountOfObject, Class::AmountAfterwards, Class::MoneyOut].map(of),
            [12, 12, 31, 25]
        );
        for operation in all() {
            assert_eq!(operation.template.split(' ').next(), Some(operation.method));
        }
    }

    #[test]
    fn every_operation_is_found_by_its_path() {
        for operation in all() {
            let (_, template) = operation.template.split_once(' ').unwrap();
            let words = template.split('/').skip(1);
            let path: Vec<&str> =
                words.map(|word| if word.starts_with('{') { "x_1" } else { word }).collect();
            let (found, ids) = find(operation.method, &path).unwrap();
            assert_eq!(found.template, operation.template);
            assert_eq!(ids.len(), operation.slots().count(), "{template}");
        }
    }

    #[test]
    fn a_path_means_one_operation() {
        let find = |method, path| {
            find(method, &segments(path).unwrap()).map(|(operation, ids)| (operation.template, ids.join(",")))
        };
        assert_eq!(find("POST", "/v1/charges"), Some(("POST /v1/charges", String::new())));
        assert_eq!(find("GET", "/v1/charges/ch_1"), Some(("GET /v1/charges/{charge}", "ch_1".into())));
        assert_eq!(find("GET", "/v1/charges/search"), Some(("GET /v1/charges/search", String::new())));
        assert_eq!(find("POST", "/v1/no_such_thing"), None);
        assert_eq!(find("PUT", "/v1/charges"), None);
        assert_eq!(find("POST", "/V1/charges"), None);
    }

    #[test]
    fn a_path_has_one_spelling() {
        for path in [
            "v1/charges",
            "/v1//charges",
            "//v1/charges",
            "/v1/../v1/charges",
            "/v1/%63harges",
            "/v1/charges;x",
            "/v1/a\\b",
            "/v1/ch.1",
        ] {
            assert_eq!(segments(path), Err(BadPath::Ambiguous), "{path}");
        }
        assert_eq!(segments("/v1/charges/"), Err(BadPath::NotFound));
        assert_eq!(segments("/"), Err(BadPath::NotFound));
    }

    #[test]
    fn grants_name_operations() {
        let named = |entry| named(entry).map(|(operation, wildcard)| (operation.template, wildcard));
        assert_eq!(named("GET /v1/charges/*"), Some(("GET /v1/charges/{charge}", true)));
        assert_eq!(named("GET /v1/charges/{id}"), Some(("GET /v1/charges/{charge}", false)));
        assert_eq!(named("POST /v1/charges"), Some(("POST /v1/charges", false)));
        for entry in
            ["POST /v1/*", "* /v1/charges", "POST /v1/charges/", "/v1/charges", "POST /v1/chargess", "*", ""]
        {
            assert_eq!(named(entry), None, "{entry}");
        }
    }
}
