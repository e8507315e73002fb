//! Chance that can be repeated: seeds, what comes of them, and how a failing one is told.

use std::fmt::Write as _;
use std::io::Write as _;

/// `splitmix64`: small, and the same on every machine.
#[derive(Clone, Debug)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`, which is not zero.
    pub(crate) fn number(&mut self, end: u64) -> u64 {
        self.roll() % end
    }

    /// The same for a place in a list.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.number(u64::try_from(end).unwrap())).unwrap()
    }

    /// True in so many of a hundred cases.
    pub(crate) fn percent(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    pub(crate) fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }

    /// The same for a list that may be empty.
    pub(crate) fn any<'a, T>(&mut self, all: &'a [T]) -> Option<&'a T> {
        (!all.is_empty()).then(|| self.pick(all))
    }

    pub(crate) fn shuffle<T>(&mut self, all: &mut [T]) {
        for last in (1..all.len()).rev() {
            all.swap(last, self.below(last + 1));
        }
    }
}

/// The seeds of a test: the one that `KEYBRAKE_TEST_SEED` repeats, or as many as the variable `count` says.
pub(crate) fn seeds(count: &str, usual: u64) -> Vec<u64> {
    let given = |name: &str| std::env::vars_os().find(|(found, _)| found == name);
    let number = |name| {
        given(name).map(|(_, value)| value.to_str().and_then(|text| text.parse().ok()).expect("a number"))
    };
    if let Some(seed) = number("KEYBRAKE_TEST_SEED") {
        return vec![seed];
    }
    let count = number(count).unwrap_or(usual);
    // Few are always the same; many are always others.
    let first = if count == usual { 1 } else { u64::from(std::process::id()) << 32 };
    (first..first + count).collect()
}

/// What a failing test says of itself.
pub(crate) struct Told(String);

impl Told {
    pub(crate) fn of_seed(seed: u64) -> Self {
        Self(format!("repeat with KEYBRAKE_TEST_SEED={seed}"))
    }

    pub(crate) fn of_file(name: &str) -> Self {
        Self(format!("in {name}"))
    }

    /// Adds what came of it.
    pub(crate) fn input(&mut self, what: &str, bytes: &[u8]) {
        let _ = write!(self.0, "\n{what}: {}", bytes.escape_ascii());
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = std::io::stderr().write_all(format!("\n{}\n", self.0).as_bytes());
        }
    }
}
