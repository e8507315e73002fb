//! What was measured, as tables and as JSON, and against the goals.

use std::fmt;

use serde_json::{Value, json};

use crate::bounds::{self, Row, median, megabytes, text};
use crate::restart::Restarts;
use crate::sandbox::Beside;

/// What a reserve and its settle cost in one round.
#[derive(Clone, Copy)]
pub(crate) struct Figures {
    /// With one caller.
    pub(crate) p50_us: f64,
    /// With many, as the next two.
    pub(crate) per_second: f64,
    pub(crate) cpu_us: f64,
}

/// One grown ledger.
pub(crate) struct Case {
    name: String,
    /// Of each round: the fresh ledger's, and its own.
    rounds: Vec<(Figures, Figures)>,
}

impl Case {
    pub(crate) fn new(name: &str) -> Self {
        Self { name: name.to_owned(), rounds: Vec::new() }
    }

    pub(crate) fn add(&mut self, fresh: Figures, grown: Figures) {
        self.rounds.push((fresh, grown));
    }

    fn own(&self, of: impl Fn(&Figures) -> f64) -> Option<f64> {
        median(self.rounds.iter().map(|(_, grown)| of(grown)).collect())
    }

    /// The median of what a figure is to that of the fresh ledger in the same round.
    fn ratio(&self, of: impl Fn(&Figures) -> f64) -> Option<f64> {
        median(self.rounds.iter().map(|(fresh, grown)| of(grown) / of(fresh)).collect())
    }

    fn json(&self) -> Value {
        let told = |figures: &Figures| json!({ "p50_us": figures.p50_us, "per_second": figures.per_second, "cpu_us": figures.cpu_us });
        json!({
            "case": self.name,
            "rounds": self.rounds.iter().map(|(fresh, grown)| json!({ "fresh": told(fresh), "grown": told(grown) })).collect::<Vec<_>>(),
            "p50_ratio": self.ratio(|figures| figures.p50_us),
            "per_second_ratio": self.ratio(|figures| figures.per_second),
            "cpu_ratio": self.ratio(|figures| figures.cpu_us),
        })
    }
}

/// What the files took.
pub(crate) struct Size {
    /// With those that were measured before.
    pub(crate) calls: u64,
    pub(crate) bytes: u64,
    pub(crate) records: u64,
}

/// Calls beside a kind of upkeep.
pub(crate) struct Pruning {
    name: &'static str,
    /// Calls or records; `None` where there are none, or they were not counted.
    gone: Option<u64>,
    beside: Beside,
}

impl Pruning {
    pub(crate) fn of(name: &'static str, gone: Option<u64>, beside: Beside) -> Self {
        Self { name, gone, beside }
    }

    fn worst_ms(&self) -> f64 {
        self.beside.pass.worst_us() / 1e3
    }
}

/// All of it.
pub(crate) struct Report {
    rounds: usize,
    cases: Vec<Case>,
    sizes: Vec<Size>,
    restarts: Vec<Restarts>,
    prunings: Vec<Pruning>,
}

impl Report {
    pub(crate) fn new(rounds: usize) -> Self {
        Self { rounds, cases: Vec::new(), sizes: Vec::new(), restarts: Vec::new(), prunings: Vec::new() }
    }

    pub(crate) fn case(&mut self, case: Case) {
        self.cases.push(case);
    }

    pub(crate) fn size(&mut self, size: Size) {
        self.sizes.push(size);
    }

    pub(crate) fn restarts(&mut self, restarts: Restarts) {
        self.restarts.push(restarts);
    }

    pub(crate) fn pruning(&mut self, pruning: Pruning) {
        self.prunings.push(pruning);
    }

    fn goals(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        // The first is the noise: a ledger of 1,000 calls against another.
        for case in self.cases.iter().skip(1) {
            let cost = |what: &str| format!("{}: {what}, × 1,000 calls", case.name);
            rows.push(Row::at_most(cost("CPU"), 1.3, 1.1, case.ratio(|figures| figures.cpu_us)));
            rows.push(Row::at_least(cost("pairs/s"), 0.75, 0.9, case.ratio(|figures| figures.per_second)));
        }
        if let Some(restarts) = self.restarts.last() {
            let killed = median(restarts.killed_ms.clone()).map(|millis| millis / 1e3);
            rows.push(Row::at_most("ready after a SIGKILL, s", 10.0, 1.0, killed));
            let loaded = megabytes(restarts.loaded_bytes);
            rows.push(Row::at_most("resident under load, MB", 160.0, 128.0, Some(loaded)));
        }
        let worst = self.prunings.iter().skip(1).map(Pruning::worst_ms).reduce(f64::max);
        rows.push(Row::at_most("the worst call while pruning, ms", 500.0, 100.0, worst));
        rows
    }

    /// Everything, with each round's own figures.
    pub(crate) fn json(&self) -> Value {
        let sizes = self
            .sizes
            .iter()
            .map(|size| json!({ "calls": size.calls, "file_bytes": size.bytes, "records": size.records }));
        let restarts = self.restarts.iter().map(|one| {
            json!({
                "calls": one.calls,
                "clean_ms": one.clean_ms,
                "killed_ms": one.killed_ms,
                "started_bytes": one.started_bytes,
                "loaded_bytes": one.loaded_bytes,
            })
        });
        let prunings = self.prunings.iter().map(|one| {
            let Beside { pass, steps, longest_step, done } = &one.beside;
            json!({
                "upkeep": one.name,
                "rows_gone": one.gone,
                "all_done": done,
                "steps": steps,
                "longest_step_ms": longest_step.as_secs_f64() * 1e3,
                "seconds": pass.elapsed.as_secs_f64(),
                "calls": pass.calls(),
                "p50_us": pass.percentile_us(50),
                "p99_us": pass.percentile_us(99),
                "worst_us": pass.worst_us(),
            })
        });
        json!({
            "rounds": self.rounds,
            "cases": self.cases.iter().map(Case::json).collect::<Vec<_>>(),
            "sizes": sizes.collect::<Vec<_>>(),
            "restarts": restarts.collect::<Vec<_>>(),
            "pruning": prunings.collect::<Vec<_>>(),
            "goals": bounds::json(&self.goals()),
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.costs(f)?;
        self.files(f)?;
        self.upkeep(f)?;
        write!(f, "\n{}", bounds::table(&self.goals()))
    }
}

impl Report {
    fn costs(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rounds = self.rounds;
        writeln!(
            f,
            "reserve and settle: medians of {rounds} rounds, in turns with a fresh ledger of 1,000 calls\n"
        )?;
        let (p50, rate, cpu) = ("p50 µs, 1", "pairs/s, 64", "CPU µs, 64");
        writeln!(f, "{:<22}{p50:>12}{rate:>13}{cpu:>12} | × fresh: p50 pairs/s    CPU", "ledger")?;
        for case in &self.cases {
            write!(f, "{:<22}", case.name)?;
            write!(f, "{:>12}", text(case.own(|of| of.p50_us), 1))?;
            write!(f, "{:>13}", text(case.own(|of| of.per_second), 1))?;
            write!(f, "{:>12} |", text(case.own(|of| of.cpu_us), 1))?;
            write!(f, "{:>13}", text(case.ratio(|of| of.p50_us), 2))?;
            write!(f, "{:>8}", text(case.ratio(|of| of.per_second), 2))?;
            writeln!(f, "{:>7}", text(case.ratio(|of| of.cpu_us), 2))?;
        }
        Ok(())
    }

    fn files(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n{:<22}{:>12}{:>13}{:>16}", "file", "MB", "records", "bytes per call")?;
        for size in &self.sizes {
            let (name, per_call) = (format!("{} calls", size.calls), size.bytes / size.calls);
            writeln!(f, "{name:<22}{:>12.1}{:>13}{per_call:>16}", megabytes(size.bytes), size.records)?;
        }
        let (clean, killed) = ("ready ms", "after SIGKILL");
        writeln!(f, "\n{:<22}{clean:>12}{killed:>15}{:>14}{:>12}", "sidecar", "resident MB", "under load")?;
        for one in &self.restarts {
            write!(f, "{:<22}", format!("{} calls", one.calls))?;
            write!(f, "{:>12}", text(median(one.clean_ms.clone()), 0))?;
            write!(f, "{:>15}", text(median(one.killed_ms.clone()), 0))?;
            writeln!(f, "{:>14.1}{:>12.1}", megabytes(one.started_bytes), megabytes(one.loaded_bytes))?;
        }
        Ok(())
    }

    fn upkeep(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (longest, p50) = ("longest ms", "p50 ms");
        writeln!(
            f,
            "\n{:<28}{:>10}{:>8}{longest:>12}{:>8}{p50:>9}{:>8}{:>8}",
            "calls beside upkeep", "gone", "steps", "calls", "p99", "worst"
        )?;
        for one in &self.prunings {
            let Beside { pass, steps, longest_step, .. } = &one.beside;
            let gone = one.gone.map_or_else(|| "–".to_owned(), |gone| gone.to_string());
            write!(f, "{:<28}{gone:>10}{steps:>8}{:>12.1}", one.name, longest_step.as_secs_f64() * 1e3)?;
            let (p50, p99) = (pass.percentile_us(50) / 1e3, pass.percentile_us(99) / 1e3);
            writeln!(f, "{:>8}{p50:>9.2}{p99:>8.2}{:>8.1}", pass.calls(), one.worst_ms())?;
        }
        Ok(())
    }
}
