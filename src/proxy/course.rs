//! One request on its way: its id, its deadline, and where its time goes.

use std::time::Duration;

use tokio::time::Instant;

use crate::telemetry::{Metrics, Stage, Stages};

/// As long as the header gets, in bytes, but for calls of more than a day.
const TIMING_CHARS: usize = 112;

/// One request on its way.
#[derive(Debug)]
pub struct Course {
    pub(super) request_id: String,
    pub(super) deadline: Instant,
    accepted: Instant,
    stages: Stages,
}

impl Course {
    /// Accepts a request.
    pub(super) fn begin(request_id: String, timeout: Duration) -> Self {
        let accepted = Instant::now();
        Self { request_id, deadline: accepted + timeout, accepted, stages: Stages::default() }
    }

    /// Since its acceptance.
    pub(super) fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.accepted.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Counts time as a stage's. No stage is within another one: each moment counts once.
    pub(super) fn spent(&mut self, stage: Stage, took: Duration) {
        self.stages.add(stage, took);
    }

    /// Waits for something, and counts that as a stage's.
    pub(super) async fn during<T>(&mut self, stage: Stage, work: impl Future<Output = T>) -> T {
        let before = Instant::now();
        let done = work.await;
        self.spent(stage, before.elapsed());
        done
    }

    /// Counts it as answered, and says where its time went, as `Server-Timing` says it. `ledger` is a part of `keybrake`,
    /// and so is `same_call`, which only those have who waited for an equal call: it is mostly that one's wait for Stripe.
    pub(super) fn end(&self, metrics: &Metrics) -> String {
        let whole = self.accepted.elapsed();
        metrics.answered(whole, &self.stages);
        let upstream = self.stages.of(Stage::Upstream).unwrap_or_default();
        let mut timing = String::with_capacity(TIMING_CHARS);
        put_entry(&mut timing, "keybrake", whole.saturating_sub(upstream));
        put_entry(&mut timing, ", ledger", self.stages.ledger());
        put_entry(&mut timing, ", upstream", upstream);
        if let Some(waited) = self.stages.of(Stage::SameCall) {
            put_entry(&mut timing, ", same_call", waited);
        }
        timing
    }
}

/// Adds an entry in milliseconds with three decimals, rounded to the nearest microsecond. Floats would take most of the
/// time of a header that every answer has.
fn put_entry(timing: &mut String, name: &str, took: Duration) {
    let micros = (took.as_nanos() + 500) / 1_000;
    let (millis, micros) = (micros / 1_000, micros % 1_000);
    let mut decimals = [b'0'; 3];
    let mut rest = micros;
    for place in decimals.iter_mut().rev() {
        *place = b"0123456789"[(rest % 10) as usize];
        rest /= 10;
    }
    timing.push_str(name);
    timing.push_str(";dur=");
    timing.push_str(&millis.to_string());
    timing.push('.');
    timing.extend(decimals.map(char::from));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_rounded_to_the_nearest_microsecond() {
        let told = |nanos| {
            let mut timing = String::new();
            put_entry(&mut timing, "ledger", Duration::from_nanos(nanos));
            timing
        };
        for (nanos, says) in [
            (0, "ledger;dur=0.000"),
            (499, "ledger;dur=0.000"),
            (500, "ledger;dur=0.001"),
            (1_499, "ledger;dur=0.001"),
            (999_499, "ledger;dur=0.999"),
            (999_500, "ledger;dur=1.000"),
            (1_050_000, "ledger;dur=1.050"),
            (86_400_000_000_000, "ledger;dur=86400000.000"),
        ] {
            assert_eq!(told(nanos), says, "{nanos} ns");
        }
    }
}
