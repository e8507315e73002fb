//! A ledger's reads for tests, which wait for them where they stand.

use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;

use keybrake::audit::Sealed;
use keybrake::call::Call;
use keybrake::hold::{Hold, Lane, Subject};
use keybrake::id::{CallId, HoldId, KeyId};
use keybrake::key::Key;
use keybrake::ledger::counter::Counter;
use keybrake::ledger::query::{CallFilter, ChainState, KeyFilter, Page, Reader};
use keybrake::ledger::row::{BindingRow, KillSwitchRow};
use keybrake::ledger::{HoldView, Ledger, LedgerError};
use keybrake::time::{Day, UnixMs};

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Waits here. Whatever the store needs for its answer it has threads of its own for.
pub(crate) fn wait<T>(future: impl Future<Output = T>) -> T {
    // Inside a task nobody would wake what pauses only so that other tasks get their turn.
    let mut future = pin!(tokio::task::coop::unconstrained(future));
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(found) => return found,
            Poll::Pending => std::thread::park(),
        }
    }
}

/// The reads of a ledger.
pub(super) struct Reads<'l>(pub(super) &'l Ledger);

macro_rules! reads {
    ($($name:ident($($argument:ident: $kind:ty),*) -> $found:ty;)*) => {
        impl Reads<'_> {
            $(pub(super) fn $name(&self, $($argument: $kind),*) -> Result<$found, LedgerError> {
                wait(self.0.read(|reader: &Reader<'_>| reader.$name($($argument),*)))
            })*
        }
    };
}

reads! {
    binding() -> BindingRow;
    call_by_id(id: CallId) -> Option<Call>;
    calls(filter: &CallFilter, after: Option<CallId>, limit: usize) -> Page<Call, CallId>;
    counter(subject: Subject, day: Day, lane: Lane) -> Counter;
    hold(id: HoldId) -> Option<Hold>;
    hold_of_object(account: &str, object: &str) -> Option<Hold>;
    holds(state: Option<&str>, after: Option<HoldId>, limit: usize) -> Page<HoldView, HoldId>;
    key(id: KeyId) -> Option<Key>;
    key_by_digest(digest: &[u8; 32]) -> Option<Key>;
    keys(filter: &KeyFilter, after: Option<KeyId>, limit: usize, now: UnixMs) -> Page<Key, KeyId>;
    kill_switch() -> Option<KillSwitchRow>;
    records_after(place: u64, rows_max: usize, bytes_max: usize) -> Vec<(u64, Sealed)>;
    unsettled_holds(limit: usize) -> Vec<Hold>;
    verify_chain() -> ChainState;
}
