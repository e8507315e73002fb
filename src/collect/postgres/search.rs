//! Pages of records, found step by step: in a stretch of the log that grows as long as that is quick, so that no question
//! reads much more than it answers, whatever plan the database makes of it. A page that has taken long ends, and says from
//! where to go on.

use serde_json::{Map, Value};
use tokio::time::{Duration, Instant};
use tokio_postgres::Transaction;
use tokio_postgres::types::Type;

use super::{bounded, sealed_of};
use crate::journal::{self, AuditFilter, Page};
use crate::postgres::DatabaseError;
use crate::time::UnixMs;

/// Places that a page looks through in its first step.
const WINDOW: i64 = 2_000;
/// By how much a step grows that was quick.
const GROWTH: i64 = 8;
/// A step that took longer does not grow.
const QUICK_MS: u64 = 50;
/// A page that has taken so long ends, and says from where to go on.
const PAGE_MS: u64 = 2_000;

/// One page.
pub(super) struct Search<'a> {
    filter: &'a AuditFilter,
    statement: String,
    words: Vec<String>,
    since: i64,
    until: i64,
    limit: usize,
    items: Vec<Map<String, Value>>,
    /// Everything up to here was looked at.
    done: i64,
}

impl<'a> Search<'a> {
    pub(super) fn of(filter: &'a AuditFilter, limit: usize) -> Self {
        let words = journal::words_of(filter);
        let at =
            |at: Option<UnixMs>| at.map_or(i64::MAX, |at| i64::try_from(at.millis()).unwrap_or(i64::MAX));
        // What does not narrow a question is left out of it: it would mislead whoever plans how to answer.
        let mut also = String::new();
        if !words.is_empty() {
            also += " AND words @> $3";
        }
        if filter.since.is_some() || filter.until.is_some() {
            also += " AND at_ms >= $4 AND at_ms < $5";
        }
        if !filter.all_events {
            also += " AND coalesce((SELECT last.place FROM calls last WHERE last.call = found.call), place) = place";
        }
        let order = if filter.ascending { "ASC" } else { "DESC" };
        let statement = format!(
            "SELECT place, hash, record FROM records found
             WHERE place BETWEEN $1 AND $2{also}
             ORDER BY place {order} LIMIT $6"
        );
        Self {
            filter,
            statement,
            words,
            since: filter.since.map_or(0, |since| at(Some(since))),
            until: at(filter.until),
            limit,
            items: Vec::new(),
            done: 0,
        }
    }

    pub(super) async fn run(
        mut self,
        txn: &Transaction<'_>,
        after: Option<u64>,
    ) -> Result<Page<Map<String, Value>, u64>, DatabaseError> {
        let ends =
            txn.query_typed_one("SELECT coalesce(min(place), 1), coalesce(max(place), 0) FROM records", &[]);
        let ends = bounded(ends).await?;
        let (mut low, mut high): (i64, i64) = (ends.try_get(0)?, ends.try_get(1)?);
        let after = after.map(|after| i64::try_from(after).unwrap_or(i64::MAX));
        match after {
            Some(after) if self.filter.ascending => low = low.max(after.saturating_add(1)),
            Some(after) => high = high.min(after.saturating_sub(1)),
            None => {}
        }
        let (began, mut width) = (Instant::now(), WINDOW);
        while low <= high {
            let (from, to) = if self.filter.ascending {
                (low, high.min(low.saturating_add(width - 1)))
            } else {
                (low.max(high.saturating_sub(width - 1)), high)
            };
            let step = Instant::now();
            let Some(went) = self.step(txn, from, to).await? else { return Ok(self.page(true)) };
            if self.filter.ascending {
                low = went.saturating_add(1);
            } else {
                high = went.saturating_sub(1);
            }
            if step.elapsed() < Duration::from_millis(QUICK_MS) {
                width = width.saturating_mul(GROWTH);
            }
            if low <= high && began.elapsed() > Duration::from_millis(PAGE_MS) {
                return Ok(self.page(true));
            }
        }
        Ok(self.page(false))
    }

    /// Looks from one place to another, and says how far it got; `None` when the page is full and there is more.
    async fn step(
        &mut self,
        txn: &Transaction<'_>,
        from: i64,
        to: i64,
    ) -> Result<Option<i64>, DatabaseError> {
        // One more than there is room for tells whether there is a next page.
        let wanted = self.limit.saturating_sub(self.items.len()).saturating_add(1);
        let limit = i64::try_from(wanted).unwrap_or(i64::MAX);
        let rows = bounded(txn.query_typed(
            &self.statement,
            &[
                (&from, Type::INT8),
                (&to, Type::INT8),
                (&self.words, Type::TEXT_ARRAY),
                (&self.since, Type::INT8),
                (&self.until, Type::INT8),
                (&limit, Type::INT8),
            ],
        ))
        .await?;
        for row in &rows {
            if self.items.len() >= self.limit {
                return Ok(None);
            }
            self.done = row.try_get(0)?;
            let record = sealed_of(row, 1)?.to_json();
            if self.filter.matches(&record) {
                self.items.push(record);
            }
        }
        if rows.len() < wanted {
            self.done = if self.filter.ascending { to } else { from };
        }
        Ok(Some(self.done))
    }

    fn page(self, has_more: bool) -> Page<Map<String, Value>, u64> {
        Page { items: self.items, next: has_more.then_some(self.done.unsigned_abs()) }
    }
}
