//! What other currencies count in dollars: a table that an operator gives, with a date and a margin.
//!
//! No rate is ever asked for on the way of a request. A table that is too old counts nothing: its currencies are refused,
//! as they are without a table.
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions)]

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use serde::Deserialize;

use crate::money::{Currency, MicroUsd, Rate, Rates};
use crate::time::{DAY_MS, UnixMs};

/// How old a table may be unless it says so itself, in days.
const MAX_AGE_DAYS: u64 = 7;
/// The oldest that a table may allow itself to become, in days.
const MAX_AGE_DAYS_MAX: u64 = 366;
/// What is put on every rate unless the table says so itself, in percent.
const MARGIN_PERCENT: u64 = 10;
/// The highest margin, in percent.
const MARGIN_PERCENT_MAX: u64 = 100;
/// Decimals that a rate may have.
const RATE_DECIMALS: usize = 6;
/// No currency's whole unit is worth more, in micro-dollars: a rate above it was not given for the minor unit.
const UNIT_MICRO_USD_MAX: u64 = 5_000_000;

/// A table of rates.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    good_until: UnixMs,
    as_of: String,
    /// With the margin on them.
    rates: Vec<(Currency, Rate)>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    as_of: String,
    max_age_days: Option<u64>,
    margin_percent: Option<u64>,
    micro_usd_per_minor_unit: BTreeMap<String, Number>,
}

/// A number is read digit by digit, never as a float.
#[derive(Deserialize)]
#[serde(untagged)]
enum Number {
    Whole(u64),
    Decimal(String),
}

impl Table {
    /// Reads a table.
    ///
    /// # Errors
    /// Says what is wrong, for an operator.
    pub fn parse(text: &str) -> Result<Self, String> {
        let written: Written = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let made = UnixMs::parse(&format!("{}T00:00:00Z", written.as_of))
            .ok_or("as_of must be a date such as 2026-11-23")?;
        let days = written.max_age_days.unwrap_or(MAX_AGE_DAYS);
        if !(1..=MAX_AGE_DAYS_MAX).contains(&days) {
            return Err(format!("max_age_days must be from 1 to {MAX_AGE_DAYS_MAX}"));
        }
        let margin = written.margin_percent.unwrap_or(MARGIN_PERCENT);
        if margin > MARGIN_PERCENT_MAX {
            return Err(format!("margin_percent must be from 0 to {MARGIN_PERCENT_MAX}"));
        }
        let mut rates = Vec::new();
        for (code, number) in &written.micro_usd_per_minor_unit {
            let rate = rate(code, number, margin).map_err(|why| format!("{code}: {why}"))?;
            if rates.iter().any(|(known, _)| *known == rate.0) {
                return Err(format!("{code}: is given more than once"));
            }
            rates.push(rate);
        }
        // The day itself counts: a table of today with an age of one day is good until tomorrow ends.
        let good_until = made.plus_millis(days.saturating_add(1).saturating_mul(DAY_MS));
        Ok(Self { good_until, as_of: written.as_of, rates })
    }

    /// The rates that hold at `now`: none besides the dollar's when the table is stale.
    pub fn at(&self, now: UnixMs) -> Rates {
        if self.is_stale(now) { Rates::default() } else { Rates::new(self.rates.clone()) }
    }

    /// Whether it is there, and too old.
    pub fn is_stale(&self, now: UnixMs) -> bool {
        !self.rates.is_empty() && now >= self.good_until
    }

    /// The date that it is of.
    pub fn as_of(&self) -> &str {
        &self.as_of
    }

    /// What one whole unit of each currency counts, in micro-dollars, for an operator to compare with the newspaper.
    pub fn units(&self) -> impl Iterator<Item = (&str, u64)> {
        self.rates.iter().map(|(currency, rate)| (currency.as_str(), unit_micro_usd(*currency, *rate)))
    }
}

/// The table that holds now, shared by all who count.
#[derive(Debug)]
pub struct Book(RwLock<Arc<Table>>);

impl Book {
    /// With a first table.
    pub fn new(table: Table) -> Self {
        Self(RwLock::new(Arc::new(table)))
    }

    /// Puts newer rates in the place of the old ones. What is held already keeps its own.
    pub fn set(&self, table: Table) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(table);
    }

    /// The table.
    pub fn table(&self) -> Arc<Table> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

fn rate(code: &str, number: &Number, margin: u64) -> Result<(Currency, Rate), String> {
    let currency = Currency::parse(code).ok_or("is no three-letter ISO code")?;
    if currency == Currency::USD {
        return Err("needs no rate".to_owned());
    }
    let pico = match number {
        Number::Whole(micros) => micros.checked_mul(1_000_000),
        Number::Decimal(text) => pico_of(text),
    };
    let pico = pico.filter(|pico| *pico > 0).ok_or(
        "must be micro-dollars for one minor unit, such as 10850 or \"0.63\", with at most 6 decimals",
    )?;
    let with_margin = u128::from(pico).saturating_mul(u128::from(margin.saturating_add(100))).div_ceil(100);
    let rate = u64::try_from(with_margin).map(Rate::from_pico).map_err(|_| "is too large")?;
    if unit_micro_usd(currency, Rate::from_pico(pico)) > UNIT_MICRO_USD_MAX {
        return Err("makes one whole unit worth more than 5 USD: give it for the minor unit".to_owned());
    }
    Ok((currency, rate))
}

fn unit_micro_usd(currency: Currency, rate: Rate) -> u64 {
    let minors = 10_u64.saturating_pow(currency.decimals());
    rate.usd(minors).map_or(u64::MAX, MicroUsd::micros)
}

/// Decimal micro-dollars as millionths of one; `None` when it is not `digits[.digits]`.
fn pico_of(text: &str) -> Option<u64> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let plain = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    if !plain(whole) || !plain(fraction) || fraction.len() > RATE_DECIMALS {
        return None;
    }
    let whole: u64 = whole.parse().ok()?;
    let fraction: u64 = format!("{fraction:0<RATE_DECIMALS$}").parse().ok()?;
    whole.checked_mul(1_000_000)?.checked_add(fraction)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn day(text: &str) -> UnixMs {
        UnixMs::parse(&format!("{text}T12:00:00Z")).unwrap()
    }

    #[test]
    fn a_table_gives_rates_with_its_margin_until_it_is_stale() {
        let table = Table::parse(
            r#"{"as_of": "2026-11-20", "max_age_days": 3, "margin_percent": 10,
                "micro_usd_per_minor_unit": {"EUR": 10850, "jpy": "6700.5", "idr": "0.63"}}"#,
        )
        .unwrap();
        let usd = |code, minor| {
            table.at(day("2026-11-23")).of(Currency::parse(code).unwrap())?.usd(minor).map(MicroUsd::micros)
        };
        assert_eq!(usd("eur", 100), Some(1_193_500));
        assert_eq!(usd("jpy", 100), Some(737_055));
        assert_eq!(usd("idr", 100), Some(70));
        assert_eq!(usd("gbp", 100), None);
        assert_eq!(table.at(day("2026-11-24")), Rates::default());
        assert!(table.is_stale(day("2026-11-24")) && !table.is_stale(day("2026-11-23")));
        assert!(!Table::default().is_stale(day("2026-11-24")));
        assert_eq!(table.units().find(|(code, _)| *code == "jpy"), Some(("jpy", 7_371)));
    }

    #[test]
    fn a_bad_table_is_refused_whole() {
        let with = |rates: &str| format!(r#"{{"as_of": "2026-11-20", "micro_usd_per_minor_unit": {rates}}}"#);
        for (text, why) in [
            (with(r#"{"eur": 1085000}"#), "more than 5 USD"),
            (with(r#"{"jpy": 670000000}"#), "more than 5 USD"),
            (with(r#"{"eur": 0}"#), "micro-dollars"),
            (with(r#"{"eur": -1}"#), "did not match"),
            (with(r#"{"eur": 1.5}"#), "did not match"),
            (with(r#"{"eur": "1e3"}"#), "micro-dollars"),
            (with(r#"{"eur": "1.1234567"}"#), "micro-dollars"),
            (with(r#"{"usd": 10000}"#), "needs no rate"),
            (with(r#"{"euro": 10000}"#), "ISO code"),
            (with(r#"{"eur": 10000, "EUR": 1}"#), "more than once"),
            (r#"{"as_of": "yesterday", "micro_usd_per_minor_unit": {}}"#.to_owned(), "as_of"),
            (r#"{"as_of": "2026-11-20", "rates": {}}"#.to_owned(), "unknown field"),
            ("{}".to_owned(), "as_of"),
        ] {
            let error = Table::parse(&text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
