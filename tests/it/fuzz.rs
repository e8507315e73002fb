//! What fuzzing found, replayed without it: every committed input, and inputs made of them by chance.
//!
//! `KEYBRAKE_TEST_MUTATIONS` sets how many are made for each target; `KEYBRAKE_TEST_SEED` repeats one. `make fuzz` looks
//! for new ones.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use keybrake::vendor::stripe::catalogue;

use crate::dice::{Dice, Told, seeds};
use crate::properties;

/// Mutations of each target that are tried when nobody says otherwise.
const MUTATIONS: u64 = 500;
/// Larger inputs are no use in a repository.
const INPUT_BYTES_MAX: usize = 4_000;
/// Changes that are made to one input, at most.
const CHANGES_MAX: usize = 4;

/// A property, and the folder of its inputs.
struct Target {
    name: &'static str,
    accepts: fn(&[u8]) -> bool,
}

const TARGETS: &[Target] = &[
    Target { name: "form", accepts: properties::a_form },
    Target { name: "path", accepts: properties::a_path },
    Target { name: "head", accepts: properties::a_request },
    Target { name: "grant", accepts: properties::a_grant },
];

/// Name and bytes of each committed input, in the order of their names.
fn corpus(target: &Target) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/fuzz").join(target.name);
    let mut found: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())
        })
        .collect();
    found.sort();
    found
}

/// The words of the dictionary, which is libFuzzer's: a word in quotes on each line, with `\xNN` for a byte.
fn traps() -> Vec<Vec<u8>> {
    let read = |line: &str| {
        let inner = line.strip_prefix('"')?.strip_suffix('"')?;
        let (mut word, mut rest) = (Vec::new(), inner);
        while let Some(first) = rest.chars().next() {
            let (byte, taken) = match rest.strip_prefix('\\') {
                Some(escape) if escape.starts_with('x') => {
                    (u8::from_str_radix(&escape[1..3], 16).unwrap(), 4)
                }
                Some(escape) => (escape.bytes().next().unwrap(), 2),
                None => (u8::try_from(first).expect("ASCII"), 1),
            };
            word.push(byte);
            rest = &rest[taken..];
        }
        Some(word)
    };
    include_str!("../fuzz/traps.dict").lines().filter_map(read).collect()
}

/// Cuts, copies, flips and inserts.
fn mutated(dice: &mut Dice, corpus: &[(String, Vec<u8>)], traps: &[Vec<u8>]) -> Vec<u8> {
    let mut input = dice.pick(corpus).1.clone();
    for _ in 0..=dice.below(CHANGES_MAX) {
        let at = dice.below(input.len() + 1);
        let end = at + dice.below(input.len() + 1 - at);
        match dice.below(7) {
            0 if at < input.len() => input[at] ^= 1 << dice.below(8),
            1 if at < input.len() => input[at] = u8::try_from(dice.below(256)).unwrap(),
            2 => drop(input.drain(at..end)),
            3 => {
                let copy = input[at..end].to_vec();
                let to = dice.below(input.len() + 1);
                input.splice(to..to, copy);
            }
            4 => {
                let other = &dice.pick(corpus).1;
                let from = dice.below(other.len() + 1);
                input.splice(at.., other[from..].iter().copied());
            }
            _ => drop(input.splice(at..at, dice.pick(traps).iter().copied())),
        }
        input.truncate(INPUT_BYTES_MAX);
    }
    input
}

#[test]
fn every_input_that_was_kept() {
    for target in TARGETS {
        let corpus = corpus(target);
        assert!(corpus.len() >= 30, "hardly any input for {}", target.name);
        for (name, input) in corpus {
            let _told = Told::of_file(&name);
            assert!(input.len() <= INPUT_BYTES_MAX, "{name} is too large");
            let accepted = (target.accepts)(&input);
            // Those written by hand say what should become of them.
            assert!(accepted || !name.starts_with("good-"), "{name} is refused");
            assert!(!accepted || !name.starts_with("bad-"), "{name} is accepted");
        }
    }
}

#[test]
fn inputs_made_of_them() {
    let traps = traps();
    for target in TARGETS {
        let corpus = corpus(target);
        let mut accepted = 0;
        let seeds = seeds("KEYBRAKE_TEST_MUTATIONS", MUTATIONS);
        for seed in &seeds {
            let mut told = Told::of_seed(*seed);
            let input = mutated(&mut Dice::new(*seed), &corpus, &traps);
            told.input(target.name, &input);
            accepted += usize::from((target.accepts)(&input));
        }
        assert!(
            accepted > 0 || seeds.len() < 100,
            "nothing of {} gets far enough to be looked at",
            target.name
        );
    }
}

/// No request could be taken for two operations: of two that take the same path, one has more literals.
#[test]
fn a_literal_decides_between_two_operations() {
    let words = |template: &'static str| template.split(['/', ' ']).collect::<Vec<_>>();
    let all: Vec<_> = catalogue::all().iter().map(|operation| words(operation.template)).collect();
    let is_slot = |word: &str| word.starts_with('{');
    let literals = |words: &[&str]| words.iter().filter(|word| !is_slot(word)).count();
    for (at, one) in all.iter().enumerate() {
        for other in &all[at + 1..] {
            let both = one.len() == other.len()
                && one.iter().zip(other).all(|(a, b)| a == b || is_slot(a) || is_slot(b));
            assert!(!both || literals(one) != literals(other), "{} and {}", one.join("/"), other.join("/"));
        }
    }
}

/// Fuzzing is done rarely, so nobody would see that its lock file is no longer the program's.
#[test]
fn what_is_fuzzed_is_built_as_the_program_is() {
    let packages = |lock: &'static str| -> BTreeMap<(&str, &str), &str> {
        let field = |block: &'static str, name: &str| {
            let line = block.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(" = "));
            line.unwrap_or_default().trim_matches('"')
        };
        let read = |block| ((field(block, "name"), field(block, "version")), block);
        lock.split("[[package]]").skip(1).map(read).collect()
    };
    let program = packages(include_str!("../../Cargo.lock"));
    let fuzzed = packages(include_str!("../fuzz/Cargo.lock"));
    // What libFuzzer's crate needs beside the program.
    let own = ["arbitrary", "jobserver", "keybrake-fuzz", "libfuzzer-sys"];
    let others: Vec<_> = fuzzed
        .keys()
        .filter(|(name, version)| !own.contains(name) && !program.contains_key(&(*name, *version)))
        .collect();
    let told = "cargo update --workspace --manifest-path tests/fuzz/Cargo.toml";
    assert_eq!(others, [&("", ""); 0], "copy Cargo.lock to tests/fuzz, then run {told}");
    let keybrake = ("keybrake", env!("CARGO_PKG_VERSION"));
    let missing: Vec<_> = dependencies(include_str!("../../Cargo.toml"))
        .filter(|name| !fuzzed[&keybrake].contains(&format!("\"{name}")))
        .collect();
    assert_eq!(missing, [""; 0], "copy Cargo.lock to tests/fuzz, then run {told}");
}

/// The names of what the program depends on.
fn dependencies(manifest: &str) -> impl Iterator<Item = &str> {
    let section = manifest.split("\n[dependencies]\n").nth(1).unwrap().split("\n[").next().unwrap();
    section
        .lines()
        .filter_map(|line| line.split_once(" = "))
        .map(|(name, _)| name)
        .filter(|name| !name.starts_with('#'))
}
