//! One request on its way: its id, its deadline, and where its time goes.

use std::time::Duration;

use tokio::time::Instant;

use crate::telemetry::{Metrics, Stage, Stages};

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
        let entry = |name: &str, took: Duration| format!("{name};dur={:.3}", took.as_secs_f64() * 1_000.0);
        let upstream = self.stages.of(Stage::Upstream).unwrap_or_default();
        let mut entries = vec![
            entry("keybrake", whole.saturating_sub(upstream)),
            entry("ledger", self.stages.ledger()),
            entry("upstream", upstream),
        ];
        entries.extend(self.stages.of(Stage::SameCall).map(|waited| entry("same_call", waited)));
        entries.join(", ")
    }
}
