//! Watches the machine's clock against the one that only runs forward: a jump forward opens windows and ends keys that
//! should live, so the sidecar is not ready until an operator has looked at it.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::time::{Clock, UnixMs};

/// A jump that is told.
const JUMP_MS: u64 = 60_000;

/// The watch.
#[derive(Debug)]
pub struct ClockWatch {
    clock: Clock,
    since: Mutex<(UnixMs, Instant)>,
}

impl ClockWatch {
    /// Starts to watch.
    pub fn new(clock: Clock) -> Self {
        let since = Mutex::new((clock.now(), Instant::now()));
        Self { clock, since }
    }

    /// How far the clock has jumped forward, when that is too far to be passed over.
    pub fn jumped(&self) -> Option<Duration> {
        let (wall, mono) = *self.since.lock().unwrap_or_else(PoisonError::into_inner);
        let passed = u64::try_from(mono.elapsed().as_millis()).unwrap_or(u64::MAX);
        let ahead = self.clock.now().millis_since(wall.plus_millis(passed));
        (ahead >= JUMP_MS).then(|| Duration::from_millis(ahead))
    }

    /// An operator takes the clock as it is.
    pub fn accept(&self) {
        *self.since.lock().unwrap_or_else(PoisonError::into_inner) = (self.clock.now(), Instant::now());
    }
}
