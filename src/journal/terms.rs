//! What of a record can be asked for without reading it: its terms, each a number made of a field and its value.
//!
//! Two terms may have one number: whatever the index finds is read and compared. A number is the beginning of a SHA-256,
//! so that nobody can choose metadata that lengthens the list of somebody else's label.

use sha2::{Digest as _, Sha256};

use crate::journal::AuditFilter;
use crate::journal::fields::Fields;

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
/// The longest beginning of a label that has a list for its length alone.
const BEGINNING_BYTES_MAX: usize = 32;

/// Stands for one list of the index.
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
        Self(u64::from_be_bytes(digest.first_chunk().copied().unwrap_or_default()))
    }

    /// The list of a value, whichever of the [`SHARED`] fields has it: the same request id in two fields is one posting.
    fn shared(value: &str) -> Self {
        let list = Self::of(&["shared", value]).0 % SHARED_LISTS;
        Self::of(&["shared list", &list.to_string()])
    }
}

/// The terms under which a record is found.
pub(super) fn of_record(record: &Fields<'_>) -> Vec<Term> {
    let text = |field: &str| record.text(field);
    let mut terms = vec![Term::EVERY];
    terms.extend(EQUAL.iter().filter_map(|field| Some(Term::of(&["equal", field, text(field)?]))));
    terms.extend(text("label").into_iter().flat_map(prefixes).map(|prefix| Term::of(&["prefix", prefix])));
    terms.extend(SHARED.iter().filter_map(|field| Some(Term::shared(text(field)?))));
    for field in WITHIN {
        let entries = record.texts(field);
        terms.extend(entries.map(|(name, value)| Term::of(&["within", field, name, value])));
    }
    terms
}

/// The terms that every record has that a filter finds; what else it asks for is compared.
pub(super) fn of_filter(filter: &AuditFilter) -> Vec<Term> {
    let equal = filter.equal.iter().filter(|(field, _)| EQUAL.contains(field));
    let mut terms: Vec<Term> = equal.map(|(field, value)| Term::of(&["equal", field, value])).collect();
    let shared = filter.equal.iter().filter(|(field, _)| SHARED.contains(field));
    terms.extend(shared.map(|(_, value)| Term::shared(value)));
    let within = filter.within.iter().filter(|(field, _, _)| WITHIN.contains(field));
    terms.extend(within.map(|(field, name, value)| Term::of(&["within", field, name, value])));
    let longest = filter.label_prefix.as_deref().and_then(|prefix| prefixes(prefix).last());
    terms.extend(longest.map(|prefix| Term::of(&["prefix", prefix])));
    if terms.is_empty() {
        terms.push(Term::EVERY);
    }
    terms.sort_unstable();
    terms.dedup();
    terms
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
        let terms = of_record(&serde_json::from_str(&written).unwrap());
        let has = |filter: &AuditFilter| of_filter(filter).iter().all(|term| terms.contains(term));
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
    }
}
