//! What of a record can be asked for without reading it: its terms, each a number made of a field and its value.
//!
//! Two terms may have one number: whatever the index finds is read and compared. A number is the beginning of a SHA-256,
//! so that nobody can choose metadata that lengthens the list of somebody else's label.

use sha2::{Digest as _, Sha256};

use crate::journal::AuditFilter;
use crate::journal::fields::Fields;
use crate::journal::postings::SEGMENT_BITS;

/// Fields that have a list for each of their values.
const EQUAL: &[&str] = &[
    "ledger_id",
    "node",
    "event",
    "call_id",
    "key_id",
    "label",
    "endpoint",
    "decision",
    "code",
    "outcome",
    "idempotency_key",
    "customer",
    "object_id",
    "chain_id",
];
/// Fields whose values are those of one record or two, and are asked for when something is looked into: a list for each
/// value would make the index more than half as large again. They share [`SHARED_LISTS`] lists, so that a question reads
/// one record in a hundred or so.
const SHARED: &[&str] = &["hold_id", "request_id", "stripe_request_id"];
/// The more there are, the less a question reads, and the more rows each step of the index writes.
const SHARED_LISTS: u64 = 256;
/// Fields that have a list for each of their entries.
const WITHIN: &[&str] = &["metadata", "stripe_metadata"];
/// What ends a part of a label: the labels of one issuer are likely to share everything up to one of these.
const SEPARATORS: &[char] = &['-', '_', '.', ':', '/', '@', ' '];
/// Parts of a label by which it is found.
const PARTS_MAX: usize = 8;
/// Characters of a word; what is longer is found by its beginning.
const WORD_CHARS_MAX: usize = 200;
/// The longest beginning of a label that has a list for its length alone.
const BEGINNING_BYTES_MAX: usize = 32;

/// Stands for one list of the index. Its number has 61 bits: those of its block follow in a row's key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Term(pub(super) u64);

impl Term {
    /// Every record.
    pub(super) const EVERY: Self = Self(0);
    /// Records of calls of which a later record is known.
    pub(super) const SUPERSEDED: Self = Self(1);

    fn of(parts: &[&str]) -> Self {
        let mut hash = Sha256::new();
        for part in parts {
            hash.update(part);
            hash.update([0]);
        }
        let digest: [u8; 32] = hash.finalize().into();
        Self(u64::from_be_bytes(digest.first_chunk().copied().unwrap_or_default()) >> SEGMENT_BITS)
    }
}

/// Something by which a record is found.
enum Mark<'a> {
    Equal(&'a str, &'a str),
    Shared(&'a str, &'a str),
    Prefix(&'a str),
    Within(&'a str, &'a str, &'a str),
}

impl Mark<'_> {
    fn term(&self) -> Term {
        match self {
            Self::Equal(field, value) => Term::of(&["equal", field, value]),
            // Whichever of the fields has it: the same request id in two fields is one posting.
            Self::Shared(_, value) => {
                let list = Term::of(&["shared", value]).0 % SHARED_LISTS;
                Term::of(&["shared list", &list.to_string()])
            }
            Self::Prefix(prefix) => Term::of(&["prefix", prefix]),
            Self::Within(field, name, value) => Term::of(&["within", field, name, value]),
        }
    }

    /// The same in words, for an index that takes them: two marks may share one, so what it finds is compared as well.
    fn word(&self) -> String {
        let whole = match self {
            Self::Equal(field, value) | Self::Shared(field, value) => format!("{field}={value}"),
            Self::Prefix(prefix) => format!("label^{prefix}"),
            Self::Within(field, name, value) => format!("{field}[{name}]={value}"),
        };
        whole.chars().take(WORD_CHARS_MAX).map(|one| if one.is_control() { ' ' } else { one }).collect()
    }
}

fn marks_of_record<'a>(record: &'a Fields<'_>) -> Vec<Mark<'a>> {
    let text = |field: &str| record.text(field);
    let mut marks: Vec<Mark<'a>> =
        EQUAL.iter().filter_map(|field| Some(Mark::Equal(field, text(field)?))).collect();
    marks.extend(text("label").into_iter().flat_map(prefixes).map(Mark::Prefix));
    marks.extend(SHARED.iter().filter_map(|field| Some(Mark::Shared(field, text(field)?))));
    for field in WITHIN {
        marks.extend(record.texts(field).map(|(name, value)| Mark::Within(field, name, value)));
    }
    marks
}

/// What every record has that a filter finds; what else it asks for is compared.
fn marks_of_filter(filter: &AuditFilter) -> Vec<Mark<'_>> {
    let equal = filter.equal.iter().filter(|(field, _)| EQUAL.contains(field));
    let mut marks: Vec<Mark<'_>> = equal.map(|(field, value)| Mark::Equal(field, value)).collect();
    let shared = filter.equal.iter().filter(|(field, _)| SHARED.contains(field));
    marks.extend(shared.map(|(field, value)| Mark::Shared(field, value)));
    let within = filter.within.iter().filter(|(field, _, _)| WITHIN.contains(field));
    marks.extend(within.map(|(field, name, value)| Mark::Within(field, name, value)));
    let longest = filter.label_prefix.as_deref().and_then(|prefix| prefixes(prefix).last());
    marks.extend(longest.map(Mark::Prefix));
    marks
}

/// The terms under which a record is found.
pub(super) fn of_record(record: &Fields<'_>) -> Vec<Term> {
    let marks = marks_of_record(record);
    [Term::EVERY].into_iter().chain(marks.iter().map(Mark::term)).collect()
}

/// The terms that every record has that a filter finds.
pub(super) fn of_filter(filter: &AuditFilter) -> Vec<Term> {
    let mut terms: Vec<Term> = marks_of_filter(filter).iter().map(Mark::term).collect();
    if terms.is_empty() {
        terms.push(Term::EVERY);
    }
    terms.sort_unstable();
    terms.dedup();
    terms
}

/// The words under which a record is found: no control characters, and none long.
pub(super) fn words_of_record(record: &Fields<'_>) -> Vec<String> {
    marks_of_record(record).iter().map(Mark::word).collect()
}

/// The words that every record has that a filter finds; none where it finds everything.
pub(super) fn words_of_filter(filter: &AuditFilter) -> Vec<String> {
    marks_of_filter(filter).iter().map(Mark::word).collect()
}

/// The beginnings of a label that have lists, the longest last: those that end a part, and those of a length that is a
/// power of two, for prefixes without parts. Whether a beginning is one of them depends on it alone, so that the longest
/// of a prefix is one of every label with that prefix.
fn prefixes(label: &str) -> impl Iterator<Item = &str> {
    let mut parts = 0;
    label.char_indices().filter_map(move |(at, letter)| {
        let end = at + letter.len_utf8();
        let ends_a_part = SEPARATORS.contains(&letter);
        parts += usize::from(ends_a_part);
        let is_listed =
            ends_a_part && parts <= PARTS_MAX || end.is_power_of_two() && end <= BEGINNING_BYTES_MAX;
        is_listed.then(|| &label[..end])
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_label_is_found_by_its_parts_and_its_beginnings() {
        let all: Vec<&str> = prefixes("kestra-ü_cus.9").collect();
        assert_eq!(all, ["k", "ke", "kest", "kestra-", "kestra-ü_", "kestra-ü_cus."]);
        assert_eq!(prefixes("kestra-ü_cu").last(), Some("kestra-ü_"));
        assert_eq!(prefixes("kestr").last(), Some("kest"));
        assert_eq!(prefixes("").last(), None);
        assert!(prefixes(&"-".repeat(500)).count() <= PARTS_MAX + 6, "a label of separators has few lists");
    }

    #[test]
    fn a_record_has_every_term_of_a_filter_that_finds_it() {
        let record = json!({
            "seq": 7, "at": "2026-07-14T03:33:20.123Z", "event": "settled", "call_id": "call_1", "ledger_id": "ledger_1",
            "node": "n", "chain_id": "c", "key_id": "k", "label": "kestra-cus_9", "endpoint": "/v1/charges",
            "decision": "forwarded", "code": "c", "outcome": "spent", "idempotency_key": "i", "customer": "cus_9",
            "object_id": "ch_1", "hold_id": "hold_1", "request_id": "req_1", "stripe_request_id": "req_2",
            "metadata": {"flow": "billing", "count": 3}, "stripe_metadata": {"flow": "other"},
        });
        let written = record.to_string();
        let record_of = || serde_json::from_str(&written).unwrap();
        let (terms, words) = (of_record(&record_of()), words_of_record(&record_of()));
        let has = |filter: &AuditFilter| {
            let by_term = of_filter(filter).iter().all(|term| terms.contains(term));
            assert_eq!(
                words_of_filter(filter).iter().all(|word| words.contains(word)),
                by_term,
                "{filter:?}"
            );
            by_term
        };
        for field in EQUAL.iter().chain(SHARED) {
            let equal = |value: &str| AuditFilter {
                equal: vec![(*field, value.to_owned())],
                ..AuditFilter::default()
            };
            assert!(has(&equal(record[*field].as_str().unwrap())), "{field}");
            assert!(!has(&equal("another")), "{field}");
        }
        for (field, value, found) in
            [("metadata", "billing", true), ("stripe_metadata", "other", true), ("metadata", "other", false)]
        {
            let within = vec![(field, "flow".to_owned(), value.to_owned())];
            assert_eq!(has(&AuditFilter { within, ..AuditFilter::default() }), found, "{field}");
        }
        for (prefix, found) in [("kestra-", true), ("kestra-c", true), ("ke", true), ("billing-", false)] {
            let label_prefix = Some(prefix.to_owned());
            assert_eq!(has(&AuditFilter { label_prefix, ..AuditFilter::default() }), found, "{prefix}");
        }
        let not_indexed =
            AuditFilter { equal: vec![("method", "POST".to_owned())], ..AuditFilter::default() };
        assert_eq!(of_filter(&not_indexed), [Term::EVERY], "what has no list is compared");
        assert_eq!(words_of_filter(&not_indexed), [""; 0]);
    }

    #[test]
    fn a_word_is_short_and_plain_whatever_a_record_says() {
        let long = format!("a\u{0}\u{1f}\n{}", "ü".repeat(500));
        let record = json!({ "customer": long, "metadata": { "x\u{0}": long } }).to_string();
        let words = words_of_record(&serde_json::from_str(&record).unwrap());
        let equal = vec![("customer", long.clone())];
        let within = vec![("metadata", "x\u{0}".to_owned(), long)];
        let asked = words_of_filter(&AuditFilter { equal, within, ..AuditFilter::default() });
        assert_eq!(words, asked);
        for word in &words {
            assert!(word.chars().count() == WORD_CHARS_MAX && !word.contains(char::is_control), "{word}");
        }
    }
}
