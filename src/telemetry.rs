//! What is counted and measured.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// Upper bounds of the time buckets, in seconds: our own work takes tens to hundreds of microseconds, a commit up to some
/// milliseconds, Stripe longer than both.
const SECONDS: [f64; 18] = [
    0.000_05, 0.000_1, 0.000_2, 0.000_3, 0.000_5, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5,
    1.0, 5.0, 20.0, 80.0,
];

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

/// What a request waits for. What is left of its time is `rest`: our own work, and reads of the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The rest of the request, from the caller.
    Read,
    /// The ledger's decision on a money call: held, replayed or refused, durably.
    Reserve,
    /// Stripe.
    Upstream,
    /// What an answer of Stripe's does to holds, durably.
    Settle,
    /// A durable record of something else: a refusal, a joined call, a write that moves no money.
    Record,
    /// Handing over the record of a GET, which waits only when too many wait already.
    Note,
    /// An equal call, or another one under the same key, that is being made.
    SameCall,
}

impl Stage {
    const ALL: [Self; 7] =
        [Self::Read, Self::Reserve, Self::Upstream, Self::Settle, Self::Record, Self::Note, Self::SameCall];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Reserve => "reserve",
            Self::Upstream => "upstream",
            Self::Settle => "settle",
            Self::Record => "record",
            Self::Note => "note",
            Self::SameCall => "same_call",
        }
    }
}

/// How long one request was in each stage that it was in.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stages([Option<Duration>; Stage::ALL.len()]);

impl Stages {
    /// Adds to a stage.
    pub fn add(&mut self, stage: Stage, took: Duration) {
        self.0[stage as usize] = Some(self.of(stage).unwrap_or_default() + took);
    }

    /// How long it was in a stage; `None` where it was not.
    pub fn of(&self, stage: Stage) -> Option<Duration> {
        self.0[stage as usize]
    }

    /// How long it waited for the ledger.
    pub fn ledger(&self) -> Duration {
        let stages = [Stage::Reserve, Stage::Settle, Stage::Record, Stage::Note];
        stages.into_iter().filter_map(|stage| self.of(stage)).sum()
    }
}

/// A stage by its name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct StageLabels {
    /// One of [`Stage`], or `rest`.
    pub stage: &'static str,
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
    /// Of that, waiting for Stripe, each time that something was sent.
    pub upstream_seconds: Histogram,
    /// Of the whole, each stage that a request was in, so that the sums of all stages are the sum of the whole.
    pub stage_seconds: Family<StageLabels, Histogram, fn() -> Histogram>,
}

impl Default for Metrics {
    fn default() -> Self {
        let histogram: fn() -> Histogram = || Histogram::new(SECONDS);
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
            stage_seconds: Family::new_with_constructor(histogram),
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
        let stage = self.stage_seconds.clone();
        registry.register("keybrake_stage_seconds", "Parts of a request, which add up to it", stage);
    }

    /// Counts the time of one request.
    pub fn answered(&self, whole: Duration, stages: &Stages) {
        self.request_seconds.observe(whole.as_secs_f64());
        let observe = |stage: &'static str, took: Duration| {
            self.stage_seconds.get_or_create(&StageLabels { stage }).observe(took.as_secs_f64());
        };
        for stage in Stage::ALL {
            if let Some(took) = stages.of(stage) {
                observe(stage.as_str(), took);
            }
        }
        observe("rest", whole.saturating_sub(stages.0.iter().flatten().sum()));
    }

    /// Counts one decision.
    pub fn decided(&self, decision: &'static str, code: &'static str) {
        self.calls.get_or_create(&DecisionLabels { decision, code }).inc();
    }
}
