//! What is counted and measured.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// Upper bounds of the time buckets, in seconds.
const SECONDS: [f64; 12] = [0.000_5, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 20.0, 80.0];

/// A decision and, for refusals, its code.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DecisionLabels {
    /// `forwarded`, `replayed`, `joined` or `refused`.
    pub decision: &'static str,
    /// The refusal's code, or empty.
    pub code: &'static str,
}

/// What became of a money call.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct OutcomeLabels {
    /// `spent`, `pending`, `declined`, `refused`, `not_sent` or `doubt`.
    pub outcome: &'static str,
}

/// How a doubt ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct EndLabels {
    /// `answer` (of the same call, sent again), `record` (Stripe's own) or `operator`.
    pub by: &'static str,
}

/// Upper bounds of the ages of replays, in seconds: a minute, an hour, a day, Stripe's memory, a week, a month.
const AGES: [f64; 6] = [60.0, 3_600.0, 82_800.0, 86_400.0, 604_800.0, 2_592_000.0];

/// What is counted.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// Proxied calls by decision and code.
    pub calls: Family<DecisionLabels, Counter>,
    /// Money calls by outcome.
    pub outcomes: Family<OutcomeLabels, Counter>,
    /// Doubts that came up.
    pub doubts_opened: Counter,
    /// Doubts that ended.
    pub doubts_settled: Family<EndLabels, Counter>,
    /// How old the answers were that were given again.
    pub replay_age_seconds: Histogram,
    /// Audit records that a collector acknowledged, those sent twice included.
    pub audit_shipped: Counter,
    /// Requests with a key that nobody knows.
    pub unknown_keys: Counter,
    /// From acceptance to answer.
    pub request_seconds: Histogram,
    /// Of that, waiting for Stripe.
    pub upstream_seconds: Histogram,
}

impl Default for Metrics {
    fn default() -> Self {
        let histogram = || Histogram::new(SECONDS);
        Self {
            calls: Family::default(),
            outcomes: Family::default(),
            doubts_opened: Counter::default(),
            doubts_settled: Family::default(),
            replay_age_seconds: Histogram::new(AGES),
            audit_shipped: Counter::default(),
            unknown_keys: Counter::default(),
            request_seconds: histogram(),
            upstream_seconds: histogram(),
        }
    }
}

impl Metrics {
    /// Names everything in a registry.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("keybrake_calls", "Proxied calls by decision and code", self.calls.clone());
        registry.register("keybrake_outcomes", "Money calls by what became of them", self.outcomes.clone());
        registry.register(
            "keybrake_doubts_opened",
            "Money calls that came to be in doubt",
            self.doubts_opened.clone(),
        );
        let settled = self.doubts_settled.clone();
        registry.register("keybrake_doubts_settled", "Doubts that ended, by what ended them", settled);
        let age = self.replay_age_seconds.clone();
        registry.register("keybrake_replay_age_seconds", "Age of answers that were given again", age);
        let shipped = self.audit_shipped.clone();
        registry.register("keybrake_audit_shipped", "Audit records that the collector took", shipped);
        let unknown = self.unknown_keys.clone();
        registry.register("keybrake_unknown_keys", "Requests with a key that is not known here", unknown);
        let request = self.request_seconds.clone();
        registry.register("keybrake_request_seconds", "From acceptance to answer", request);
        let upstream = self.upstream_seconds.clone();
        registry.register("keybrake_upstream_seconds", "Waiting for Stripe", upstream);
    }

    /// Counts one decision.
    pub fn decided(&self, decision: &'static str, code: &'static str) {
        self.calls.get_or_create(&DecisionLabels { decision, code }).inc();
    }
}
