//! The source keeps its own rules: one-way layers, pure modules, no vendor below the ledger, nothing left undone.

use std::fs;
use std::path::{Path, PathBuf};

/// Modules from the bottom up. One may use its own layer and those below it.
const LAYERS: &[(usize, &[&str])] = &[
    (0, &["money", "id", "time", "secret", "refusal"]),
    (1, &["fx", "key", "issuer", "hold", "call", "intent", "audit", "vendor"]),
    (2, &["journal", "postgres", "ledger", "telemetry"]),
    (3, &["upstream", "tls", "server", "random", "clock", "disk", "forward", "account"]),
    (4, &["proxy", "admin", "audit_api", "ops", "recover", "ship", "collect"]),
    (5, &["config"]),
    (6, &["serve", "cli", "main", "lib"]),
];
/// The layer of services, which know of each other only what is listed here.
const SERVICES: usize = 4;
const SERVICES_KNOWN: &[(&str, &str)] =
    &[("admin", "proxy"), ("admin", "ship"), ("ops", "ship"), ("collect", "admin")];

/// Modules of one layer that must not know each other: who, and whom not.
const STRANGERS: &[(&str, &str)] = &[("journal", "ledger"), ("postgres", "ledger"), ("postgres", "journal")];

/// Modules that decide and never act: files, and folders with everything in them.
const PURE: &[&str] = &[
    "money",
    "id",
    "refusal",
    "fx",
    "key",
    "hold",
    "call",
    "intent",
    "issuer",
    "audit",
    "vendor",
    "ledger/rules",
    "ledger/counter",
    "ledger/entry",
    "collect/chain",
];
const IMPURE: &[&str] = &[
    "tokio",
    "hyper",
    "reqwest",
    "redb",
    "std::fs",
    "std::net",
    "std::time",
    "SystemTime",
    "Instant",
    "getrandom",
    "rand",
];

/// Whatever the ledger stands on, and the ledger.
const VENDORLESS: &[&str] = &[
    "money", "id", "time", "secret", "refusal", "fx", "key", "issuer", "hold", "call", "intent", "audit",
    "journal", "postgres", "ledger",
];
/// Names that are part of the API, whoever the vendor is, and what the one type for secrets tells of a key.
const VENDOR_NAMES_KNOWN: &[&str] =
    &["stripe_request_id", "stripe_metadata", "stripe_key_mode", "looks_like_stripe_key"];

/// Where tables are defined.
const CATALOGUES: &[&str] = &["ledger/row", "journal", "collect/redb"];

/// The longest a file may be without its tests.
const FILE_LINES_MAX: usize = 700;

/// One file of the source.
struct Source {
    /// Below `src`, without `.rs`.
    name: String,
    text: String,
    /// Without comments, string literals and tests.
    code: String,
}

impl Source {
    fn is_in(&self, modules: &[&str]) -> bool {
        let inside = |module: &&str| {
            self.name.strip_prefix(*module).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        modules.iter().any(inside)
    }

    fn module(&self) -> &str {
        self.name.split('/').next().unwrap()
    }
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut folders, mut found) = (vec![root.clone()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                let name = path.strip_prefix(&root).unwrap().with_extension("");
                let name = name.to_str().unwrap().replace('\\', "/");
                let code = code_of(without_tests(&text));
                found.push(Source { name, text, code });
            }
        }
    }
    assert!(found.len() > 10, "no source in {}", root.display());
    found
}

fn without_tests(text: &str) -> &str {
    text.find("#[cfg(test)]\nmod tests").map_or(text, |at| &text[..at])
}

/// The code alone: every comment and string literal is a blank.
fn code_of(text: &str) -> String {
    let (mut code, mut rest) = (String::new(), text);
    while let Some(first) = rest.chars().next() {
        let skipped = match first {
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            '/' if rest.starts_with("/*") => rest.find("*/").map_or(rest.len(), |end| end + 2),
            'r' if rest.starts_with("r#\"") => rest.find("\"#").map_or(rest.len(), |end| end + 2),
            '"' => string_len(rest),
            '\'' if rest.starts_with("'\\") || rest.chars().nth(2) == Some('\'') => {
                let end = rest[2..].find('\'').map_or(rest.len(), |end| end + 3);
                if rest.starts_with("'\\'") { end + 1 } else { end }
            }
            _ => 0,
        };
        if skipped == 0 {
            code.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            code.push(' ');
            rest = &rest[skipped..];
        }
    }
    code
}

fn string_len(rest: &str) -> usize {
    let mut escaped = false;
    for (at, found) in rest.char_indices().skip(1) {
        match found {
            '"' if !escaped => return at + 1,
            '\\' => escaped = !escaped,
            _ => escaped = false,
        }
    }
    rest.len()
}

fn is_word(letter: char) -> bool {
    letter.is_alphanumeric() || letter == '_'
}

fn names(code: &str, word: &str) -> bool {
    code.match_indices(word)
        .any(|(at, _)| !code[..at].ends_with(is_word) && !code[at + word.len()..].starts_with(is_word))
}

/// The modules of the crate that a file names: `crate::a`, `crate::{a, b::{c, d}}`.
fn used(code: &str) -> Vec<String> {
    let word = |text: &str| text.trim_start().chars().take_while(|c| is_word(*c)).collect::<String>();
    let mut found = Vec::new();
    for (at, path) in code.match_indices("crate::") {
        let rest = &code[at + path.len()..];
        let Some(group) = rest.strip_prefix('{') else {
            found.push(word(rest));
            continue;
        };
        let (mut depth, mut item) = (0, 0);
        for (at, letter) in group.char_indices() {
            match letter {
                '{' => depth += 1,
                ',' if depth == 0 => {
                    found.push(word(&group[item..at]));
                    item = at + 1;
                }
                '}' if depth == 0 => {
                    found.push(word(&group[item..at]));
                    break;
                }
                '}' => depth -= 1,
                _ => {}
            }
        }
    }
    found.retain(|name| !name.is_empty());
    found
}

fn layer(module: &str) -> usize {
    let found = LAYERS.iter().find(|(_, modules)| modules.contains(&module));
    found.map_or_else(|| panic!("module '{module}' has no layer"), |(layer, _)| *layer)
}

fn assert_none(wrong: &[String]) {
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

#[test]
fn layers_go_one_way() {
    let mut wrong = Vec::new();
    for source in sources() {
        let user = source.module();
        for module in used(&source.code) {
            let (from, to) = (layer(user), layer(&module));
            let strangers = from == SERVICES
                && to == SERVICES
                && user != module
                && !SERVICES_KNOWN.contains(&(user, module.as_str()));
            if to > from || strangers || STRANGERS.contains(&(user, module.as_str())) {
                wrong.push(format!("{} (layer {from}) uses {module} (layer {to})", source.name));
            }
        }
    }
    assert_none(&wrong);
}

#[test]
fn pure_modules_only_decide() {
    let mut wrong = Vec::new();
    for source in sources().iter().filter(|source| source.is_in(PURE)) {
        for word in IMPURE.iter().filter(|word| names(&source.code, word)) {
            wrong.push(format!("{} names {word}", source.name));
        }
    }
    assert_none(&wrong);
}

#[test]
fn nothing_below_the_ledger_knows_a_vendor() {
    let mut wrong = Vec::new();
    for source in sources().iter().filter(|source| source.is_in(VENDORLESS)) {
        let words = source.code.split(|letter| !is_word(letter));
        let named = words.filter(|word| word.to_lowercase().contains("stripe"));
        for word in named.filter(|word| !VENDOR_NAMES_KNOWN.contains(word)) {
            wrong.push(format!("{} names {word}", source.name));
        }
    }
    assert_none(&wrong);
}

#[test]
fn files_are_of_a_size_to_be_read() {
    let mut wrong = Vec::new();
    for source in sources() {
        let lines = without_tests(&source.text).lines().count();
        if lines > FILE_LINES_MAX {
            wrong.push(format!("{} has {lines} lines without its tests", source.name));
        }
    }
    assert_none(&wrong);
}

#[test]
fn nothing_is_left_undone() {
    let mut wrong = Vec::new();
    for source in sources() {
        for word in ["TODO", "FIXME", "XXX", "todo!", "unimplemented!"] {
            if source.text.contains(word) {
                wrong.push(format!("{} says {word}", source.name));
            }
        }
    }
    assert_none(&wrong);
}

#[test]
fn every_table_is_in_a_catalogue() {
    let sources = sources();
    for catalogue in CATALOGUES {
        let rows = sources.iter().find(|source| source.name == *catalogue).unwrap();
        let doc: Vec<&str> = rows.text.lines().take_while(|line| line.starts_with("//!")).collect();
        let listed: Vec<&str> = doc
            .iter()
            .filter_map(|line| line.strip_prefix("//! | `")?.split_once("` |"))
            .map(|(name, _)| name)
            .collect();
        let defined: Vec<&str> = rows
            .text
            .split("TableDefinition::new(\"")
            .skip(1)
            .map(|rest| rest.split('"').next().unwrap())
            .collect();
        assert!(!defined.is_empty());
        assert_eq!(defined, listed, "the tables of {catalogue}.rs and the table of its doc, in order");
    }
    let elsewhere: Vec<&str> = sources
        .iter()
        .filter(|source| {
            !CATALOGUES.contains(&source.name.as_str()) && source.text.contains("TableDefinition::new(")
        })
        .map(|source| source.name.as_str())
        .collect();
    assert_eq!(elsewhere, [""; 0], "tables are defined in a catalogue");
}

#[test]
fn the_reader_of_sources_reads() {
    let code = code_of("a /* x */ \"s \\\" crate::cli\" 'c' '\\'' '\"' 'l r#\"raw \" x\"# // crate::cli\nb");
    assert_eq!(code.split_whitespace().collect::<Vec<_>>(), ["a", "'l", "b"]);
    assert_eq!(
        used("use crate::{call::{A, B}, hold, id::C};\ncrate::money::M"),
        ["call", "hold", "id", "money"]
    );
    assert!(names("use redb::X;", "redb") && !names("RedbStore redb_x", "redb"));
}
