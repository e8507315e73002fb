//! Amounts: minor units with their currency, and micro-dollars for caps. Integers only, checked arithmetic only.
//!
//! Never here: floats, an order between two currencies, a silent wrap.
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::float_arithmetic)]

use std::fmt;

use minicbor::{Decode, Encode};

/// The most digits that an amount in minor units may have (Stripe's own limit for the currencies with the most).
pub const AMOUNT_DIGITS_MAX: usize = 12;

/// One dollar in micro-dollars.
const MICRO_PER_USD: u64 = 1_000_000;
/// One cent in micro-dollars.
const MICRO_PER_CENT: u64 = 10_000;
/// The finest part of a micro-dollar that a rate tells.
const PICO_PER_MICRO: u64 = 1_000_000;

/// A currency as Stripe writes it: three lower-case letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(transparent)]
pub struct Currency(#[cbor(with = "minicbor::bytes")] [u8; 3]);

impl Currency {
    /// The only currency that needs no rate.
    pub const USD: Self = Self(*b"usd");

    /// Reads an ISO code in either case; `None` when it is not three ASCII letters.
    pub fn parse(text: &str) -> Option<Self> {
        let code: [u8; 3] = text.as_bytes().try_into().ok()?;
        code.iter().all(u8::is_ascii_alphabetic).then(|| Self(code.map(|letter| letter.to_ascii_lowercase())))
    }

    /// The code in lower case.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or("???")
    }

    /// How many decimals its minor unit stands for, as Stripe lists them: 100 minor units of USD are one dollar.
    ///
    /// UGX is in the list without decimals and, for older integrations, sent with two: without decimals it counts for
    /// more. ISK has none, and is sent with two.
    pub fn decimals(&self) -> u32 {
        match &self.0 {
            b"bif" | b"clp" | b"djf" | b"gnf" | b"jpy" | b"kmf" | b"krw" | b"mga" | b"pyg" | b"rwf"
            | b"ugx" | b"vnd" | b"vuv" | b"xaf" | b"xof" | b"xpf" => 0,
            b"bhd" | b"jod" | b"kwd" | b"omr" | b"tnd" => 3,
            _ => 2,
        }
    }

    /// What an amount must be a multiple of: Stripe takes no finer one.
    pub fn step(&self, is_payout: bool) -> u64 {
        match &self.0 {
            b"bhd" | b"jod" | b"kwd" | b"omr" | b"tnd" => 10,
            b"isk" => 100,
            b"huf" | b"twd" if is_payout => 100,
            _ => 1,
        }
    }
}

/// An amount in the minor units of a currency (cents for USD).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Money {
    /// Minor units.
    #[n(0)]
    pub minor: u64,
    /// Whose minor units.
    #[n(1)]
    pub currency: Currency,
}

/// What one minor unit of a currency counts against a cap, in millionths of a micro-dollar.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(transparent)]
pub struct Rate(#[n(0)] u64);

impl Rate {
    /// A cent is a cent.
    pub const USD: Self = Self(MICRO_PER_CENT * PICO_PER_MICRO);

    /// From millionths of a micro-dollar.
    pub const fn from_pico(pico: u64) -> Self {
        Self(pico)
    }

    /// Millionths of a micro-dollar.
    pub const fn pico(self) -> u64 {
        self.0
    }

    /// How many minor units count at least as much as this, rounded up.
    pub fn minor(self, usd: MicroUsd) -> Option<u64> {
        let pico = u128::from(usd.0).checked_mul(u128::from(PICO_PER_MICRO))?;
        u64::try_from(pico.div_ceil(u128::from(self.0.max(1)))).ok()
    }

    /// What an amount in minor units counts, rounded up. `None` when it is too large to count.
    pub fn usd(self, minor: u64) -> Option<MicroUsd> {
        let pico = u128::from(minor).checked_mul(u128::from(self.0))?;
        u64::try_from(pico.div_ceil(u128::from(PICO_PER_MICRO))).ok().map(MicroUsd)
    }
}

impl fmt::Display for Rate {
    /// Decimal micro-dollars.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = self.0.checked_div(PICO_PER_MICRO).unwrap_or(0);
        let fraction = format!("{:06}", self.0.checked_rem(PICO_PER_MICRO).unwrap_or(0));
        match fraction.trim_end_matches('0') {
            "" => write!(f, "{whole}"),
            fraction => write!(f, "{whole}.{fraction}"),
        }
    }
}

/// The rates that hold for one request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rates(Vec<(Currency, Rate)>);

impl Rates {
    /// Rates of other currencies than USD, which needs none.
    pub fn new(others: Vec<(Currency, Rate)>) -> Self {
        Self(others)
    }

    /// The rate of a currency; `None` when it cannot be counted.
    pub fn of(&self, currency: Currency) -> Option<Rate> {
        if currency == Currency::USD {
            return Some(Rate::USD);
        }
        self.0.iter().find(|(known, _)| *known == currency).map(|(_, rate)| *rate)
    }
}

/// Reads the one accepted spelling of an amount, `0|[1-9][0-9]{0,11}`: no sign, space, point, exponent, leading zero or
/// non-ASCII digit.
pub fn parse_amount(text: &str) -> Option<u64> {
    let digits = text.as_bytes();
    let plain =
        !digits.is_empty() && digits.len() <= AMOUNT_DIGITS_MAX && digits.iter().all(u8::is_ascii_digit);
    let leading_zero = digits.len() > 1 && digits.first() == Some(&b'0');
    if !plain || leading_zero {
        return None;
    }
    text.parse().ok()
}

/// Millionths of a dollar: what caps and counters are kept in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
#[cbor(transparent)]
pub struct MicroUsd(#[n(0)] u64);

/// Why a text is no dollar amount.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DollarError {
    /// Not `digits[.digits]`.
    #[error("must be a dollar amount such as 32.99: digits, and a point with at most 2 decimals")]
    Malformed,
    /// Finer than a cent.
    #[error("has more than 2 decimals: round it, for example with round(x, 2)")]
    TooFine,
    /// More than ten thousand million dollars.
    #[error("is too large: at most 10000000000.00")]
    TooLarge,
}

impl MicroUsd {
    /// Nothing.
    pub const ZERO: Self = Self(0);

    /// From millionths of a dollar.
    pub fn from_micros(micros: u64) -> Self {
        Self(micros)
    }

    /// Millionths of a dollar.
    pub fn micros(self) -> u64 {
        self.0
    }

    /// Reads decimal dollars with at most two decimals, never through binary floating point.
    ///
    /// # Errors
    /// [`DollarError`] tells which rule the text breaks.
    pub fn parse_dollars(text: &str) -> Result<Self, DollarError> {
        let (whole, fraction) = match text.split_once('.') {
            Some((whole, fraction)) if !fraction.is_empty() => (whole, fraction),
            Some(_) => return Err(DollarError::Malformed),
            None => (text, ""),
        };
        let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
        if whole.is_empty() || !digits(whole) || !digits(fraction) {
            return Err(DollarError::Malformed);
        }
        if fraction.len() > 2 {
            return Err(DollarError::TooFine);
        }
        let cents: u64 = match fraction.len() {
            0 => 0,
            1 => fraction.parse::<u64>().map_err(|_| DollarError::Malformed)?.saturating_mul(10),
            _ => fraction.parse().map_err(|_| DollarError::Malformed)?,
        };
        let whole: u64 = whole.parse().map_err(|_| DollarError::TooLarge)?;
        if whole > 10_000_000_000 {
            return Err(DollarError::TooLarge);
        }
        let micros = whole
            .checked_mul(MICRO_PER_USD)
            .and_then(|micros| micros.checked_add(cents.checked_mul(MICRO_PER_CENT)?))
            .ok_or(DollarError::TooLarge)?;
        Ok(Self(micros))
    }

    /// The sum, or `None` when it does not fit.
    pub fn checked_add(self, other: Self) -> Option<Self> {
        self.0.checked_add(other.0).map(Self)
    }

    /// The difference, or `None` below zero.
    pub fn checked_sub(self, other: Self) -> Option<Self> {
        self.0.checked_sub(other.0).map(Self)
    }

    /// The difference, or zero.
    #[must_use]
    pub fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl fmt::Display for MicroUsd {
    /// Decimal dollars: two decimals, more only where the value has them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = self.0.checked_div(MICRO_PER_USD).unwrap_or(0);
        let micros = self.0.checked_rem(MICRO_PER_USD).unwrap_or(0);
        let fraction = format!("{micros:06}");
        let (cents, finer) = fraction.split_at(2);
        write!(f, "{whole}.{cents}{}", finer.trim_end_matches('0'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dollars_are_read_to_the_cent_and_no_finer() {
        for (text, micros) in [
            ("32.99", 32_990_000),
            ("0", 0),
            ("5", 5_000_000),
            ("0.1", 100_000),
            ("00.10", 100_000),
            ("10000000000", 10_000_000_000_000_000),
        ] {
            assert_eq!(MicroUsd::parse_dollars(text), Ok(MicroUsd(micros)), "{text}");
        }
        for (text, error) in [
            ("32.989999999999995", DollarError::TooFine),
            ("1.234", DollarError::TooFine),
            ("10000000001", DollarError::TooLarge),
            ("99999999999999999999999", DollarError::TooLarge),
            ("", DollarError::Malformed),
            (".5", DollarError::Malformed),
            ("5.", DollarError::Malformed),
            ("-1", DollarError::Malformed),
            ("+1", DollarError::Malformed),
            ("1e2", DollarError::Malformed),
            ("1,50", DollarError::Malformed),
            (" 1", DollarError::Malformed),
            ("1.5.0", DollarError::Malformed),
            ("٥", DollarError::Malformed),
            ("NaN", DollarError::Malformed),
        ] {
            assert_eq!(MicroUsd::parse_dollars(text), Err(error), "{text}");
        }
    }

    #[test]
    fn amounts_have_one_spelling() {
        assert_eq!(parse_amount("0"), Some(0));
        assert_eq!(parse_amount("999999999999"), Some(999_999_999_999));
        for text in
            ["", "00", "01", "+5", "-5", " 5", "5 ", "5.0", "1e3", "5_000", "٥", "0x10", "1000000000000"]
        {
            assert_eq!(parse_amount(text), None, "{text}");
        }
    }

    #[test]
    fn dollars_are_shown_as_they_are() {
        for (micros, text) in [(0, "0.00"), (32_990_000, "32.99"), (10_000, "0.01"), (1_234_567, "1.234567")]
        {
            assert_eq!(MicroUsd(micros).to_string(), text);
        }
    }

    #[test]
    fn conversion_rounds_up() {
        assert_eq!(Rate::USD.usd(2_999), Some(MicroUsd(29_990_000)));
        assert_eq!(Rate::USD.usd(u64::MAX), None);
        // 0.63 micro-dollars a minor unit.
        let tiny = Rate::from_pico(630_000);
        for (minor, micros) in [(0, 0), (1, 1), (2, 2), (100, 63), (101, 64)] {
            assert_eq!(tiny.usd(minor), Some(MicroUsd(micros)), "{minor}");
        }
        assert_eq!(Rate::USD.minor(MicroUsd(50_000_001)), Some(5_001));
        assert_eq!(tiny.minor(MicroUsd(64)), Some(102));
        assert_eq!((tiny.to_string(), Rate::USD.to_string()), ("0.63".to_owned(), "10000".to_owned()));
    }

    #[test]
    fn only_dollars_have_a_rate_unless_one_is_given() {
        let eur = Currency::parse("EUR").unwrap();
        assert_eq!(Rates::default().of(Currency::USD), Some(Rate::USD));
        assert_eq!(Rates::default().of(eur), None);
        let rate = Rate::from_pico(11_000_000_000);
        assert_eq!(Rates::new(vec![(eur, rate)]).of(eur), Some(rate));
        // Nothing that is given changes what a dollar is.
        assert_eq!(Rates::new(vec![(Currency::USD, rate)]).of(Currency::USD), Some(Rate::USD));
        assert_eq!(Currency::parse("USD"), Some(Currency::USD));
        for text in ["us", "usdx", "u$d", ""] {
            assert_eq!(Currency::parse(text), None, "{text}");
        }
    }

    #[test]
    fn currencies_have_the_decimals_that_stripe_lists() {
        let of = |code: &str| {
            let currency = Currency::parse(code).unwrap();
            (currency.decimals(), currency.step(false), currency.step(true))
        };
        for code in "bif clp djf gnf jpy kmf krw mga pyg rwf ugx vnd vuv xaf xof xpf".split(' ') {
            assert_eq!(of(code), (0, 1, 1), "{code}");
        }
        for code in "bhd jod kwd omr tnd".split(' ') {
            assert_eq!(of(code), (3, 10, 10), "{code}");
        }
        assert_eq!(of("isk"), (2, 100, 100));
        for code in ["huf", "twd"] {
            assert_eq!(of(code), (2, 1, 100), "{code}");
        }
        for code in ["usd", "eur", "gbp", "inr"] {
            assert_eq!(of(code), (2, 1, 1), "{code}");
        }
    }
}
