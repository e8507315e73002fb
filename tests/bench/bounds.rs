//! What the benchmarks share: settings, figures, and what these are meant to come to: a bound, and a goal beyond it.

use std::fmt::Write as _;

use serde_json::{Value, json};

pub(crate) struct Row {
    what: String,
    /// Whether less is better.
    at_most: bool,
    must: f64,
    goal: f64,
    /// `None` where it was not measured in this run.
    measured: Option<f64>,
}

impl Row {
    pub(crate) fn at_most(what: impl Into<String>, must: f64, goal: f64, measured: Option<f64>) -> Self {
        Self { what: what.into(), at_most: true, must, goal, measured }
    }

    pub(crate) fn at_least(what: impl Into<String>, must: f64, goal: f64, measured: Option<f64>) -> Self {
        Self { what: what.into(), at_most: false, must, goal, measured }
    }

    fn keeps(&self, bound: f64) -> Option<bool> {
        self.measured.map(|measured| if self.at_most { measured <= bound } else { measured >= bound })
    }
}

fn verdict(keeps: Option<bool>) -> &'static str {
    match keeps {
        Some(true) => "reached",
        Some(false) => "not reached",
        None => "not measured",
    }
}

pub(crate) fn table(rows: &[Row]) -> String {
    let mut out = format!("{:<50}{:>9}{:>8}{:>14}{:>8}{:>14}\n", "", "measured", "must", "", "goal", "");
    for row in rows {
        let sign = if row.at_most { '≤' } else { '≥' };
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "{:<50}{:>9}{:>8}{:>14}{:>8}{:>14}",
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

pub(crate) fn json(rows: &[Row]) -> Value {
    let told = rows.iter().map(|row| {
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

/// With decimal places as far as they mean something, or a dash where there is no figure.
pub(crate) fn text(figure: Option<f64>, digits: usize) -> String {
    figure.map_or_else(
        || "–".to_owned(),
        |figure| {
            let digits = if figure < 100.0 { digits } else { 0 };
            format!("{figure:.digits$}")
        },
    )
}

pub(crate) fn median(mut figures: Vec<f64>) -> Option<f64> {
    figures.sort_by(f64::total_cmp);
    let middle = figures.len() / 2;
    match figures.len() {
        0 => None,
        even if even.is_multiple_of(2) => Some(f64::midpoint(figures[middle - 1], figures[middle])),
        _ => Some(figures[middle]),
    }
}

pub(crate) fn megabytes(bytes: u64) -> f64 {
    f64::from(u32::try_from(bytes / 1_024).unwrap_or(u32::MAX)) / 1_024.0
}

/// A setting of a benchmark from the environment.
pub(crate) fn knob<T: std::str::FromStr>(name: &str, usual: T) -> anyhow::Result<T> {
    match std::env::var(name) {
        Err(std::env::VarError::NotPresent) => Ok(usual),
        Err(error) => anyhow::bail!("{name}: {error}"),
        Ok(text) => text.parse().ok().ok_or_else(|| anyhow::anyhow!("{name} is no number: {text}")),
    }
}

/// Keeps all figures in the file that a setting names, if it does.
pub(crate) fn keep(name: &str, figures: &Value) -> anyhow::Result<()> {
    let Some(path) = std::env::var_os(name) else { return Ok(()) };
    std::fs::write(&path, serde_json::to_string_pretty(figures)? + "\n")
        .map_err(|error| anyhow::anyhow!("writing {}: {error}", path.display()))
}
