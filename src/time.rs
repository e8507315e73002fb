//! Instants and UTC days, and the one clock that the program asks.
//!
//! Rules never ask: they are told. The clock may be set by hand, so that a history can be run without waiting.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use minicbor::{Decode, Encode};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Milliseconds of one second.
pub const SECOND_MS: u64 = 1_000;
/// Milliseconds of one hour.
pub const HOUR_MS: u64 = 3_600 * SECOND_MS;
/// Milliseconds of one UTC day.
pub const DAY_MS: u64 = 24 * HOUR_MS;

/// An instant: milliseconds since 1970-01-01T00:00:00Z.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
#[cbor(transparent)]
pub struct UnixMs(#[n(0)] u64);

impl UnixMs {
    /// From milliseconds since the epoch.
    pub const fn from_millis(millis: u64) -> Self {
        Self(millis)
    }

    /// Milliseconds since the epoch.
    pub const fn millis(self) -> u64 {
        self.0
    }

    /// This instant and `millis` more; the end of time where that does not fit.
    #[must_use]
    pub const fn plus_millis(self, millis: u64) -> Self {
        Self(self.0.saturating_add(millis))
    }

    /// Milliseconds from `earlier` to here, zero when it is not earlier.
    pub const fn millis_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// The UTC day of this instant.
    pub fn day(self) -> Day {
        Day(u32::try_from(self.0 / DAY_MS).unwrap_or(u32::MAX))
    }

    /// Reads RFC 3339; `None` when it is not, or lies before 1970.
    pub fn parse(text: &str) -> Option<Self> {
        let at = OffsetDateTime::parse(text, &Rfc3339).ok()?;
        u64::try_from(at.unix_timestamp_nanos() / 1_000_000).ok().map(Self)
    }
}

impl fmt::Display for UnixMs {
    /// RFC 3339 in UTC with milliseconds.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The last instant that the calendar library can name is shown for all that lie after it.
        let millis = i128::from(self.0).min(253_402_300_799_999);
        let at = OffsetDateTime::from_unix_timestamp_nanos(millis * 1_000_000).map_err(|_| fmt::Error)?;
        let (date, time) = (at.date(), at.time());
        let mut text = *b"0000-00-00T00:00:00.000Z";
        put_digits(&mut text[0..4], date.year().unsigned_abs());
        put_digits(&mut text[5..7], u8::from(date.month()).into());
        put_digits(&mut text[8..10], date.day().into());
        put_digits(&mut text[11..13], time.hour().into());
        put_digits(&mut text[14..16], time.minute().into());
        put_digits(&mut text[17..19], time.second().into());
        put_digits(&mut text[20..23], time.millisecond().into());
        f.write_str(std::str::from_utf8(&text).map_err(|_| fmt::Error)?)
    }
}

/// Writes as many of the last digits as fit: every record has two instants, and the formatter's way takes ten times as
/// long.
fn put_digits(place: &mut [u8], number: u32) {
    let mut rest = number;
    for byte in place.iter_mut().rev() {
        *byte = b"0123456789"[(rest % 10) as usize];
        rest /= 10;
    }
}

/// A UTC day: days since 1970-01-01.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
#[cbor(transparent)]
pub struct Day(#[n(0)] u32);

impl Day {
    /// Stands for all days together in the counters.
    pub const TOTAL: Self = Self(0);

    /// From days since 1970-01-01.
    pub const fn from_number(number: u32) -> Self {
        Self(number)
    }

    /// Days since 1970-01-01.
    pub const fn number(self) -> u32 {
        self.0
    }

    /// The first instant of the next day.
    pub fn end(self) -> UnixMs {
        UnixMs((u64::from(self.0) + 1).saturating_mul(DAY_MS))
    }
}

/// Where the time comes from.
#[derive(Clone, Debug)]
pub enum Clock {
    /// The machine's clock.
    System,
    /// A clock that a test sets: milliseconds since the epoch.
    Manual(Arc<AtomicU64>),
}

impl Clock {
    /// A clock that stands still until it is set.
    pub fn manual(at: UnixMs) -> (Self, Arc<AtomicU64>) {
        let hand = Arc::new(AtomicU64::new(at.millis()));
        (Self::Manual(Arc::clone(&hand)), hand)
    }

    /// What the clock shows.
    #[expect(clippy::disallowed_methods, reason = "the one place that asks the machine's clock")]
    pub fn now(&self) -> UnixMs {
        match self {
            Self::System => {
                let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
                UnixMs(since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX)))
            }
            Self::Manual(hand) => UnixMs(hand.load(Ordering::SeqCst)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instants_are_written_and_read_as_rfc_3339() {
        let at = UnixMs::from_millis(1_784_000_000_123);
        assert_eq!(at.to_string(), "2026-07-14T03:33:20.123Z");
        assert_eq!(UnixMs::parse("2026-07-14T03:33:20.123Z"), Some(at));
        assert_eq!(UnixMs::parse("2026-07-14T05:33:20.123+02:00"), Some(at));
        assert_eq!(UnixMs::parse("yesterday"), None);
        assert_eq!(UnixMs::parse("1950-01-01T00:00:00Z"), None);
        assert_eq!(UnixMs::from_millis(u64::MAX).to_string(), "9999-12-31T23:59:59.999Z");
    }

    #[test]
    fn a_day_ends_where_the_next_begins() {
        let at = UnixMs::from_millis(5 * DAY_MS + 1);
        assert_eq!(at.day(), Day::from_number(5));
        assert_eq!(at.day().end(), UnixMs::from_millis(6 * DAY_MS));
        assert_eq!(at.day().end().day(), Day::from_number(6));
    }
}
