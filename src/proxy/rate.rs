//! How many requests a key may make in a second, so that one runaway key does not eat the account's own limit at Stripe.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use tokio::time::Instant;

use crate::id::KeyId;
use crate::key::Key;

/// Seconds of its rate that a key may use at once.
const BURST_S: f64 = 2.0;
/// Keys that are remembered; beyond that the ones that are at rest are forgotten.
const KEYS_MAX: usize = 10_000;

/// What each key has left.
#[derive(Debug, Default)]
pub struct Buckets(Mutex<HashMap<KeyId, Bucket>>);

#[derive(Clone, Copy, Debug)]
struct Bucket {
    left: f64,
    at: Instant,
    rate: f64,
}

impl Bucket {
    fn filled(self, now: Instant) -> Self {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        Self { left: (self.left + passed * self.rate).min(self.rate * BURST_S), at: now, ..self }
    }
}

impl Buckets {
    /// Takes one request's worth; false when nothing is left.
    pub fn take(&self, key: &Key, now: Instant) -> bool {
        let mut buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.len() >= KEYS_MAX {
            buckets.retain(|_, bucket| bucket.filled(now).left < bucket.rate * BURST_S);
        }
        let rate = f64::from(key.rate());
        let fresh = Bucket { left: rate * BURST_S, at: now, rate };
        let bucket = buckets.entry(key.id).or_insert(fresh);
        *bucket = bucket.filled(now);
        let has_one = bucket.left >= 1.0;
        if has_one {
            bucket.left -= 1.0;
        }
        has_one
    }

    /// Puts back what a replay or a refusal did not use.
    pub fn give_back(&self, key: &Key) {
        let mut buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bucket) = buckets.get_mut(&key.id) {
            bucket.left += 1.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::vendor::stripe::rules::tests::key;

    #[test]
    fn a_key_has_a_burst_and_then_its_rate() {
        let (buckets, now) = (Buckets::default(), Instant::now());
        let key = Key { requests_per_second: Some(5), ..key(false) };
        let taken = |at: Instant| (0..100).filter(|_| buckets.take(&key, at)).count();
        assert_eq!(taken(now), 10, "two seconds' worth at once");
        assert_eq!(taken(now + Duration::from_millis(100)), 0);
        assert_eq!(taken(now + Duration::from_secs(1)), 5);
        buckets.give_back(&key);
        assert_eq!(taken(now + Duration::from_secs(1)), 1, "what was not used");
        assert_eq!(taken(now + Duration::from_hours(1)), 10);
    }
}
