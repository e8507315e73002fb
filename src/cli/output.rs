//! What commands print: the one place that writes to the terminal.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Stdout, Write};
use std::path::Path;

use serde_json::Value;

/// Prints a line to standard output. A reader that has gone is no error.
pub fn line(text: &str) {
    let _ = writeln!(io::stdout(), "{text}");
}

/// Prints a line to standard error.
pub fn complain(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Where an export goes.
#[derive(Debug)]
pub enum Sink {
    /// Standard output.
    Terminal(BufWriter<Stdout>),
    /// A file.
    File(BufWriter<File>),
}

/// Opens a file for its owner alone, because records hold personal data; or standard output.
///
/// # Errors
/// When the file cannot be made.
pub fn sink(path: Option<&Path>) -> io::Result<Sink> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let Some(path) = path else { return Ok(Sink::Terminal(BufWriter::new(io::stdout()))) };
    let file = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(path)?;
    Ok(Sink::File(BufWriter::new(file)))
}

impl Sink {
    /// Returns when everything is where it belongs.
    ///
    /// # Errors
    /// When it is not.
    pub fn finish(mut self) -> io::Result<()> {
        self.flush()?;
        match self {
            Self::Terminal(_) => Ok(()),
            Self::File(file) => file.get_ref().sync_all(),
        }
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Terminal(out) => out.write(bytes),
            Self::File(out) => out.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Terminal(out) => out.flush(),
            Self::File(out) => out.flush(),
        }
    }
}

/// A list of objects as a table of some of their fields.
pub fn table(rows: &[Value], columns: &[(&str, &str)]) -> String {
    let cell = |row: &Value, pointer: &str| match row.pointer(pointer) {
        None | Some(Value::Null) => "-".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(value) => value.to_string(),
    };
    let mut lines: Vec<Vec<String>> = vec![columns.iter().map(|(title, _)| (*title).to_owned()).collect()];
    lines.extend(rows.iter().map(|row| columns.iter().map(|(_, pointer)| cell(row, pointer)).collect()));
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let shown: Vec<String> = lines
        .iter()
        .map(|line| {
            let cells: Vec<String> =
                line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            cells.join("  ").trim_end().to_owned()
        })
        .collect();
    shown.join("\n")
}

/// One object, a field a line.
pub fn fields(object: &Value) -> String {
    let Some(map) = object.as_object() else { return object.to_string() };
    let width = map.keys().map(String::len).max().unwrap_or(0);
    let shown: Vec<String> = map
        .iter()
        .map(|(name, value)| {
            let value = match value {
                Value::String(text) => text.clone(),
                Value::Null => "-".to_owned(),
                Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => value.to_string(),
            };
            format!("{name:<width$}  {value}")
        })
        .collect();
    shown.join("\n")
}
