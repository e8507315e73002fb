//! What was measured, as a table and as JSON, and against the goals.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde_json::{Value, json};

use crate::bounds::{self, median, megabytes, text};
use crate::goals::goals;
use crate::processes::Measured;

/// Whom everybody is compared with.
const BASE: &str = "nginx";

/// One pass.
pub(crate) struct Sample {
    /// Ascending.
    pub(crate) latencies: Vec<Duration>,
    pub(crate) elapsed: Duration,
    /// What the target's processes worked; `None` for one that is not told apart.
    pub(crate) cpu: Option<Duration>,
}

/// A figure of one pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Figure {
    P50,
    P99,
    P999,
    Rps,
}

impl Figure {
    const ALL: [(Self, &str); 4] =
        [(Self::P50, "p50_ms"), (Self::P99, "p99_ms"), (Self::P999, "p99_9_ms"), (Self::Rps, "rps")];
}

impl Sample {
    /// `None` where there are too few calls for such a percentile: at least one has to lie beyond it.
    fn figure(&self, figure: Figure) -> Option<f64> {
        match figure {
            Figure::P50 => self.percentile(500),
            Figure::P99 => self.percentile(990),
            Figure::P999 => self.percentile(999),
            Figure::Rps => Some(count(self.latencies.len()) / self.elapsed.as_secs_f64()),
        }
    }

    fn percentile(&self, per_mille: usize) -> Option<f64> {
        let calls = self.latencies.len();
        if calls * (1_000 - per_mille) < 1_000 {
            return None;
        }
        let at = (calls * per_mille).div_ceil(1_000).saturating_sub(1);
        self.latencies.get(at).map(|latency| latency.as_secs_f64() * 1_000.0)
    }
}

/// All of it.
pub(crate) struct Report {
    lasting: Duration,
    rounds: usize,
    /// Names of cases and targets in the order in which they came.
    cases: Vec<&'static str>,
    targets: Vec<&'static str>,
    /// By case and target, one of each round.
    samples: BTreeMap<(&'static str, &'static str), Vec<Sample>>,
    idle_bytes: BTreeMap<&'static str, u64>,
    end_bytes: BTreeMap<&'static str, u64>,
    syncs: Vec<(usize, f64)>,
    instructions: Value,
    missing: Vec<String>,
}

impl Report {
    pub(crate) fn new(lasting: Duration, rounds: usize) -> Self {
        Self {
            lasting,
            rounds,
            cases: Vec::new(),
            targets: Vec::new(),
            samples: BTreeMap::new(),
            idle_bytes: BTreeMap::new(),
            end_bytes: BTreeMap::new(),
            syncs: Vec::new(),
            instructions: Value::Null,
            missing: Vec::new(),
        }
    }

    pub(crate) fn missing(&mut self, what: &str) {
        self.missing.push(what.to_owned());
    }

    pub(crate) fn idle(&mut self, measured: &Measured) {
        self.targets.push(measured.name);
        if measured.process.is_some() {
            self.idle_bytes.insert(measured.name, measured.bytes());
        }
    }

    pub(crate) fn at_end(&mut self, measured: &Measured) {
        if measured.process.is_some() {
            self.end_bytes.insert(measured.name, measured.bytes());
        }
    }

    pub(crate) fn add(&mut self, case: &'static str, target: &'static str, sample: Sample) {
        if !self.cases.contains(&case) {
            self.cases.push(case);
        }
        self.samples.entry((case, target)).or_default().push(sample);
    }

    pub(crate) fn syncs(&mut self, syncs: Vec<(usize, f64)>) {
        self.syncs = syncs;
    }

    pub(crate) fn instructions(&mut self, instructions: Value) {
        self.instructions = instructions;
    }

    fn of(&self, case: &'static str, target: &'static str) -> &[Sample] {
        self.samples.get(&(case, target)).map(Vec::as_slice).unwrap_or_default()
    }

    /// The median over the rounds.
    pub(crate) fn figure(&self, case: &'static str, target: &'static str, figure: Figure) -> Option<f64> {
        median(self.of(case, target).iter().filter_map(|sample| sample.figure(figure)).collect())
    }

    /// The median of what a figure is to that of another target in the same round.
    pub(crate) fn compared(
        &self,
        case: &'static str,
        (target, other): (&'static str, &'static str),
        figure: Figure,
        compare: impl Fn(f64, f64) -> f64,
    ) -> Option<f64> {
        let pairs = self.of(case, target).iter().zip(self.of(case, other));
        median(
            pairs
                .filter_map(|(sample, other)| Some(compare(sample.figure(figure)?, other.figure(figure)?)))
                .collect(),
        )
    }

    pub(crate) fn ratio(&self, case: &'static str, target: &'static str, figure: Figure) -> Option<f64> {
        self.compared(case, (target, BASE), figure, |own, base| own / base)
    }

    /// Milliseconds on a processor for 1,000 calls, over all rounds: the kernel counts in steps of 10 ms, which is too
    /// coarse for one.
    fn cpu(&self, case: &'static str, target: &'static str) -> Option<f64> {
        let (mut spent, mut calls) = (Duration::ZERO, 0);
        for sample in self.of(case, target) {
            spent += sample.cpu?;
            calls += sample.latencies.len();
        }
        (calls > 0).then(|| spent.as_secs_f64() * 1_000_000.0 / count(calls))
    }

    pub(crate) fn cpu_ratio(&self, case: &'static str, target: &'static str) -> Option<f64> {
        let base = self.cpu(case, BASE).filter(|base| *base > 0.0)?;
        Some(self.cpu(case, target)? / base)
    }

    pub(crate) fn idle_megabytes(&self, target: &'static str) -> Option<f64> {
        self.idle_bytes.get(target).map(|bytes| megabytes(*bytes))
    }

    /// Everything, with each round's own figures.
    pub(crate) fn json(&self) -> Value {
        let mut cases = Vec::new();
        for (&case, &target) in self.pairs() {
            let mut told = json!({ "case": case, "target": target });
            for (figure, name) in Figure::ALL {
                told[name] = json!(self.figure(case, target, figure));
                told["to_nginx"][name] = json!(self.ratio(case, target, figure));
            }
            told["cpu_ms_per_1000"] = json!(self.cpu(case, target));
            told["to_nginx"]["cpu_ms_per_1000"] = json!(self.cpu_ratio(case, target));
            let round = |sample: &Sample| {
                let figures =
                    Figure::ALL.map(|(figure, name)| (name.to_owned(), json!(sample.figure(figure))));
                let cpu_ms = sample.cpu.map(|cpu| cpu.as_secs_f64() * 1_000.0);
                let more = [
                    ("calls".to_owned(), json!(sample.latencies.len())),
                    ("cpu_ms".to_owned(), json!(cpu_ms)),
                ];
                Value::Object(figures.into_iter().chain(more).collect())
            };
            told["rounds"] = self.of(case, target).iter().map(round).collect();
            cases.push(told);
        }
        let syncs = self
            .syncs
            .iter()
            .map(|(connections, syncs)| json!({ "connections": connections, "per_charge": syncs }));
        json!({
            "seconds": self.lasting.as_secs_f64(),
            "rounds": self.rounds,
            "cores": cores(),
            "cases": cases,
            "idle_bytes": self.idle_bytes,
            "end_bytes": self.end_bytes,
            "syncs": syncs.collect::<Vec<_>>(),
            "instructions": self.instructions,
            "missing": self.missing,
            "goals": bounds::json(&goals(self)),
        })
    }

    fn pairs(&self) -> impl Iterator<Item = (&&'static str, &&'static str)> {
        self.cases.iter().flat_map(|case| self.targets.iter().map(move |target| (case, target)))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for missing in &self.missing {
            writeln!(f, "!! {missing}")?;
        }
        writeln!(f, "{} rounds of {:?} on {} cores\n", self.rounds, self.lasting, cores())?;
        writeln!(
            f,
            "{:<18}{:<10}{:>8}{:>8}{:>8}{:>9}{:>9} | × nginx {:>5}{:>7}{:>7}{:>7}{:>7}",
            "case",
            "target",
            "p50 ms",
            "p99",
            "p99.9",
            "rps",
            "CPU/1000",
            "p50",
            "p99",
            "p99.9",
            "rps",
            "CPU"
        )?;
        for (&case, &target) in self.pairs() {
            write!(f, "{case:<18}{target:<10}")?;
            for (figure, width, digits) in
                [(Figure::P50, 8, 2), (Figure::P99, 8, 2), (Figure::P999, 8, 2), (Figure::Rps, 9, 0)]
            {
                write!(f, "{:>width$}", text(self.figure(case, target, figure), digits))?;
            }
            write!(f, "{:>9} |        ", text(self.cpu(case, target), 0))?;
            for (figure, _) in Figure::ALL {
                write!(f, "{:>7}", text(self.ratio(case, target, figure), 2))?;
            }
            writeln!(f, "{:>7}", text(self.cpu_ratio(case, target), 2))?;
        }
        writeln!(f, "\n{:<18}{:>10}{:>12}", "memory, MB", "idle", "at the end")?;
        for (target, idle) in &self.idle_bytes {
            let end = self.end_bytes.get(target).map(|bytes| megabytes(*bytes));
            writeln!(f, "{target:<18}{:>10.1}{:>12}", megabytes(*idle), text(end, 1))?;
        }
        for (connections, syncs) in &self.syncs {
            writeln!(f, "syncs of the disk per charge, {connections} kept: {syncs:.2}")?;
        }
        for call in ["charge", "get"] {
            if let Some(counts) = self.instructions.get(call) {
                let of = |name: &str| counts[name].as_u64().unwrap_or_default();
                let (median, least, most) = (of("median"), of("least"), of("most"));
                writeln!(f, "instructions per {call}, one caller, no TLS: {median} ({least} to {most})")?;
            }
        }
        write!(f, "\n{}", bounds::table(&goals(self)))
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn count(calls: usize) -> f64 {
    f64::from(u32::try_from(calls).unwrap_or(u32::MAX))
}
