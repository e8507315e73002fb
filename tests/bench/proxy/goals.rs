//! What the sidecar is meant to cost at most, as ratios within one run on two cores, both commits of a charge durable
//! before its answer.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::report::{Figure, Report, text};

const OWN: &str = "keybrake";

struct Row {
    what: &'static str,
    /// Whether less is better.
    at_most: bool,
    must: f64,
    goal: f64,
    /// `None` where it was not measured in this run.
    measured: Option<f64>,
}

impl Row {
    fn keeps(&self, bound: f64) -> Option<bool> {
        self.measured.map(|measured| if self.at_most { measured <= bound } else { measured >= bound })
    }
}

fn goals(report: &Report) -> Vec<Row> {
    let at_most = |what, must, goal, measured| Row { what, at_most: true, must, goal, measured };
    let at_least = |what, must, goal, measured| Row { what, at_most: false, must, goal, measured };
    let to_nginx = |case, figure| report.ratio(case, OWN, figure);
    let added =
        |figure| report.compared("charge, 200/s", (OWN, "direct"), figure, |own, direct| own - direct);
    let to_peer = report.compared("charge, 16 kept", (OWN, "fastapi"), Figure::Rps, |own, peer| own / peer);
    vec![
        at_most("GET, 1 kept: p50, × nginx", 1.2, 1.0, to_nginx("get, 1 kept", Figure::P50)),
        at_most("GET, 1 kept: CPU, × nginx", 1.6, 1.2, report.cpu_ratio("get, 1 kept", OWN)),
        at_most("charge, 1 kept: p50, × nginx", 6.0, 4.0, to_nginx("charge, 1 kept", Figure::P50)),
        at_least("charge, 16 kept: rps, × nginx", 0.3, 0.4, to_nginx("charge, 16 kept", Figure::Rps)),
        at_least("charge, 64 kept: rps, × nginx", 0.5, 0.6, to_nginx("charge, 64 kept", Figure::Rps)),
        at_most("charge, 200/s: added to direct p50, ms", 1.2, 0.7, added(Figure::P50)),
        at_most("charge, 200/s: added to direct p99, ms", 3.0, 2.0, added(Figure::P99)),
        at_most("charge, 1 fresh: p50, × nginx", 1.6, 1.2, to_nginx("charge, 1 fresh", Figure::P50)),
        at_least("charge, 16 fresh: rps, × nginx", 0.8, 1.0, to_nginx("charge, 16 fresh", Figure::Rps)),
        at_least("charge, 16 kept: rps, × fastapi", 20.0, 30.0, to_peer),
        at_most("idle memory, MB", 16.0, 12.0, report.idle_megabytes(OWN)),
    ]
}

fn verdict(keeps: Option<bool>) -> &'static str {
    match keeps {
        Some(true) => "reached",
        Some(false) => "not reached",
        None => "not measured",
    }
}

pub(crate) fn table(report: &Report) -> String {
    let mut out = format!("{:<42}{:>9}{:>8}{:>14}{:>8}{:>14}\n", "", "measured", "must", "", "goal", "");
    for row in goals(report) {
        let sign = if row.at_most { '≤' } else { '≥' };
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "{:<42}{:>9}{:>8}{:>14}{:>8}{:>14}",
            row.what,
            text(row.measured, 2),
            format!("{sign} {}", row.must),
            verdict(row.keeps(row.must)),
            format!("{sign} {}", row.goal),
            verdict(row.keeps(row.goal)),
        );
    }
    out
}

pub(crate) fn json(report: &Report) -> Value {
    let told = goals(report).into_iter().map(|row| {
        json!({
            "what": row.what,
            "measured": row.measured,
            "at_most": row.at_most,
            "must": row.must,
            "goal": row.goal,
            "keeps_must": row.keeps(row.must),
            "keeps_goal": row.keeps(row.goal),
        })
    });
    told.collect()
}
