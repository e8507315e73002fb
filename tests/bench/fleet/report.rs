//! What was measured, as a table and as JSON, and against the goal.

use std::fmt;

use serde_json::{Value, json};

use crate::bounds::{self, Row, median, text};
use crate::load::{Case, Figures, System};

struct Measured {
    round: usize,
    system: System,
    case: Case,
    figures: Figures,
}

pub(crate) struct Report {
    rounds: usize,
    seconds: f64,
    server: String,
    all: Vec<Measured>,
}

fn name(system: System) -> String {
    match system {
        System::RowLock => "row lock".to_owned(),
        System::Sidecars(1) => "1 sidecar".to_owned(),
        System::Sidecars(count) => format!("{count} sidecars"),
    }
}

fn keys(case: Case) -> &'static str {
    if case.hot { "one hot key" } else { "a key each" }
}

impl Report {
    pub(crate) fn new(rounds: usize, seconds: f64, server: String) -> Self {
        Self { rounds, seconds, server, all: Vec::new() }
    }

    pub(crate) fn add(&mut self, round: usize, system: System, case: Case, figures: Figures) {
        self.all.push(Measured { round, system, case, figures });
    }

    fn of(&self, system: System, case: Case) -> impl Iterator<Item = &Measured> {
        self.all.iter().filter(move |one| one.system == system && one.case == case)
    }

    fn median(&self, system: System, case: Case, of: impl Fn(&Figures) -> f64) -> Option<f64> {
        median(self.of(system, case).map(|one| of(&one.figures)).collect())
    }

    /// The median of what its pairs per second are to those of the row lock in the same round.
    fn ratio(&self, system: System, case: Case) -> Option<f64> {
        let to_row = |own: &Measured| {
            let row = self.of(System::RowLock, case).find(|row| row.round == own.round)?;
            Some(own.figures.per_second / row.figures.per_second)
        };
        median(self.of(system, case).filter_map(to_row).collect())
    }

    /// What was measured, in the order of the table.
    fn lines(&self) -> Vec<(Case, System)> {
        let mut lines: Vec<(Case, System)> = Vec::new();
        for one in &self.all {
            if !lines.contains(&(one.case, one.system)) {
                lines.push((one.case, one.system));
            }
        }
        lines.sort_by_key(|(case, system)| {
            let sidecars = if let System::Sidecars(count) = system { *count } else { 0 };
            (case.hot, case.callers, sidecars)
        });
        lines
    }

    fn goals(&self) -> Vec<Row> {
        let is_asked =
            |(case, system): &(Case, System)| case.hot && case.callers > 1 && *system != System::RowLock;
        let row = |(case, system): (Case, System)| {
            let what = format!("hot key, {} callers, {}: × row lock", case.callers, name(system));
            Row::at_least(what, 1.0, 2.0, self.ratio(system, case))
        };
        self.lines().into_iter().filter(is_asked).map(row).collect()
    }

    /// Everything, with each round's own figures.
    pub(crate) fn json(&self) -> Value {
        let cases = self.lines().into_iter().map(|(case, system)| {
            let rounds = self.of(system, case).map(|one| {
                let Figures { per_second, p50_ms, p99_ms, cpu_ms, connections } = &one.figures;
                json!({
                    "round": one.round,
                    "per_second": per_second,
                    "p50_ms": p50_ms,
                    "p99_ms": p99_ms,
                    "cpu_ms_per_1000": cpu_ms,
                    "connections": connections,
                })
            });
            json!({
                "keys": keys(case),
                "callers": case.callers,
                "system": name(system),
                "rounds": rounds.collect::<Vec<_>>(),
                "per_second_ratio": self.ratio(system, case),
            })
        });
        json!({
            "rounds": self.rounds,
            "seconds": self.seconds,
            "server": self.server,
            "cases": cases.collect::<Vec<_>>(),
            "goals": bounds::json(&self.goals()),
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rounds, seconds, server, .. } = self;
        writeln!(
            f,
            "reserve and settle in a fleet's ledger: medians of {rounds} rounds of {seconds} s each"
        )?;
        writeln!(f, "{server}; a sidecar is a handle of its own in this process\n")?;
        let (rate, ratio, connections) = ("pairs/s", "× row lock", "connections");
        writeln!(
            f,
            "{:<13}{:>8}  {:<13}{rate:>9}{ratio:>12}{:>9}{:>9}{:>13}{connections:>13}",
            "keys", "callers", "", "p50 ms", "p99 ms", "CPU ms/1000"
        )?;
        for (case, system) in self.lines() {
            let own = |of: fn(&Figures) -> f64, digits| text(self.median(system, case, of), digits);
            let connections = self.of(system, case).map(|one| one.figures.connections).max().unwrap_or(0);
            write!(f, "{:<13}{:>8}  {:<13}", keys(case), case.callers, name(system))?;
            write!(f, "{:>9}{:>12}", own(|of| of.per_second, 1), text(self.ratio(system, case), 2))?;
            write!(f, "{:>9}{:>9}", own(|of| of.p50_ms, 2), own(|of| of.p99_ms, 2))?;
            writeln!(f, "{:>13}{connections:>13}", own(|of| of.cpu_ms, 0))?;
        }
        write!(f, "\n{}", bounds::table(&self.goals()))
    }
}
