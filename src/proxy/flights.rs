//! One at a time: of equal calls that come together, one goes on and the others wait for its answer.
//!
//! This is before the ledger and only saves work; what keeps a call single is the ledger.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

use crate::id::{CallId, Fingerprint, Identity};
use crate::proxy::reply::Reply;
use crate::time::UnixMs;

/// The calls in flight.
#[derive(Clone, Debug, Default)]
pub struct Flights(Arc<Mutex<HashMap<Identity, Flight>>>);

#[derive(Debug)]
struct Flight {
    fingerprint: Fingerprint,
    landed: watch::Receiver<Option<Landing>>,
}

/// How a flight ended, for those who waited.
#[derive(Clone, Debug)]
pub enum Landing {
    /// The answer is theirs too.
    Shared(Arc<SharedAnswer>),
    /// The leader was refused for reasons of its own: they must ask themselves.
    OwnRefusal,
}

/// The leader's answer, without a `client_secret`.
#[derive(Clone, Debug)]
pub struct SharedAnswer {
    /// The answer.
    pub reply: Reply,
    /// The call.
    pub call_id: CallId,
    /// When it came.
    pub at: UnixMs,
}

/// What a caller becomes.
#[derive(Debug)]
pub enum Role {
    /// It goes on.
    Leader(Leader),
    /// An equal call is in flight: wait for it.
    Waiter(watch::Receiver<Option<Landing>>),
    /// A call of the same identity with other parameters is in flight: wait for its end, then ask.
    Other(watch::Receiver<Option<Landing>>),
}

/// The one that goes on. When it is dropped without an answer, those who wait ask themselves.
#[derive(Debug)]
pub struct Leader {
    flights: Flights,
    identity: Identity,
    landing: watch::Sender<Option<Landing>>,
}

impl Flights {
    /// Takes the lead for an identity, or joins whoever has it.
    pub fn enter(&self, identity: Identity, fingerprint: Fingerprint) -> Role {
        let mut flights = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match flights.entry(identity) {
            Entry::Occupied(flight) if flight.get().fingerprint == fingerprint => {
                Role::Waiter(flight.get().landed.clone())
            }
            Entry::Occupied(flight) => Role::Other(flight.get().landed.clone()),
            Entry::Vacant(place) => {
                let (landing, landed) = watch::channel(None);
                place.insert(Flight { fingerprint, landed });
                Role::Leader(Leader { flights: self.clone(), identity, landing })
            }
        }
    }
}

impl Leader {
    /// Ends the flight and tells those who wait.
    pub fn land(self, landing: Landing) {
        self.landing.send_replace(Some(landing));
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        self.flights.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.identity);
    }
}

/// Waits for the end of a flight; `None` when its leader ended without an answer.
pub async fn landed(mut flight: watch::Receiver<Option<Landing>>) -> Option<Landing> {
    match flight.wait_for(Option::is_some).await {
        Ok(landing) => landing.clone(),
        Err(_) => None,
    }
}
