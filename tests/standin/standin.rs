//! A stand-in for Stripe: an HTTP server on loopback that follows Stripe's published behaviour where money can go
//! wrong, keeps a ledger of what really moved, and breaks in scripted ways. Test doubles that are publicly available
//! either keep no state or charge twice under one idempotency key, so they cannot show that a call was made once.
//!
//! What follows which published behaviour:
//!
//! - **Idempotency** (`keys`): "Idempotent requests" of the API reference and "Advanced error handling" of the docs.
//!   Keys of at most 255 characters count for POST, per account and across all its API keys. Once execution begins,
//!   status and body are the key's result, a 402 and a 500 included; failed validation, conflicts, 401 and 429 are
//!   not. The key is pruned 24 hours after its first use. Other parameters, another endpoint and a request still in
//!   flight have the messages that Stripe's users quote in public issues. `Stripe-Version` is not compared, because
//!   nothing published says that it is.
//! - **Headers** (`engine`): `Idempotency-Key`, `Original-Request`, `Request-Id`, `Stripe-Should-Retry: false` and
//!   `Stripe-Version` on answers under a key; `Idempotent-Replayed: true` and a new `Request-Id` on replays.
//! - **Errors** (`errors`): the `api_errors` schema of Stripe's published API document. Codes, and messages of the
//!   idempotency layer, of keys, of addresses, of amounts and of unexpected states are those that Stripe documents or
//!   that its users quote in public; rarer sentences are ours. Go by codes.
//! - **Parameters** (`form`, `orders`): Rack's reading of forms, one bucket for query and body, the body wins;
//!   anything but a form is a 400. Names that an operation does not know are 400 `parameter_unknown`, from the request
//!   types of Stripe's Python library.
//! - **Objects** (`objects`, `bank`, `intents`): fields and states of charges, payment intents and refunds as in the
//!   same document. Payment methods are the published test values (`tok_visa`, `pm_card_visa`,
//!   `pm_card_visa_chargeDeclined`, `pm_card_authenticationRequired`, …); **ours alone** is
//!   `pm_usBankAccount_processing`, which stays in `processing` until a test settles it.
//! - **Our choice where nothing is published**, so that no test should depend on it: an answer with an unknown id or
//!   a refused refund comes from the execution and is stored; so is a 424; a key that is bound to other parameters is
//!   refused before the parameters are validated; the 409 has the type `idempotency_error`; a pending charge has
//!   `captured: true` and `amount_captured: 0`; an intent that is captured in parts is not refunded meanwhile.
//! - **Not played**: search, webhooks, other endpoints (404 as for an address that Stripe does not know, unless a test
//!   plays one: `stage`), `expand` other than of an intent's latest charge, whether a customer exists, rate limits that
//!   nobody scripted.
//!
//! Layers, lower ones first: `form`, `errors`; `orders` (validation), `objects`; `bank`, `intents`, `stage` (execution);
//! `keys`, `faults`; `engine` (one request); `control`, `wire` (HTTP). The same module runs inside tests and as the example
//! program `stripe-standin`.

pub(crate) mod bank;
mod control;
pub(crate) mod engine;
mod errors;
pub(crate) mod faults;
mod form;
pub(crate) mod intents;
mod keys;
mod objects;
mod orders;
pub(crate) mod stage;
mod wire;

#[cfg(test)]
mod tests;

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;

use tokio::runtime::Builder;
use tokio::sync::oneshot;

use engine::Engine;
#[cfg(test)]
use {bank::Executed, engine::Seen, faults::Scripted, intents::Settlement, stage::Play};

#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// A loopback address; port 0 takes a free one.
    pub(crate) listen: SocketAddr,
    pub(crate) account: String,
    /// All of these are accepted, as during a rotation.
    pub(crate) secret_keys: Vec<String>,
    /// What objects and the balance say about themselves.
    pub(crate) livemode: bool,
    /// The keys may not read the account: 403.
    pub(crate) restricted: bool,
    /// Accounts that `Stripe-Account` may name besides our own.
    pub(crate) connected: Vec<String>,
    /// Waiting before each execution.
    pub(crate) latency_ms: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            account: "acct_standin0000001".into(),
            secret_keys: vec!["sk_test_standin0000000000000001".into()],
            livemode: false,
            restricted: false,
            connected: Vec::new(),
            latency_ms: 0,
        }
    }
}

/// A running stand-in; dropped, it stops and closes every connection.
#[derive(Debug)]
pub(crate) struct Standin {
    addr: SocketAddr,
    #[cfg(test)]
    engine: Arc<Engine>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Standin {
    /// Listens and serves on a thread of its own, so that it answers whatever the caller's runtime does.
    pub(crate) fn try_start(options: Options) -> io::Result<Self> {
        if !options.listen.ip().is_loopback() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the stand-in serves loopback only"));
        }
        let listener = TcpListener::bind(options.listen)?;
        listener.set_nonblocking(true)?;
        let addr = listener.local_addr()?;
        let engine = Arc::new(Engine::new(options));
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = Arc::clone(&engine);
        let thread = std::thread::Builder::new().name("stripe-standin".into()).spawn(move || {
            runtime.block_on(async move {
                let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
                tokio::select! {
                    () = wire::serve(listener, serving) => {}
                    _ = stopped => {}
                }
            });
        })?;
        Ok(Self {
            addr,
            #[cfg(test)]
            engine,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }
}

impl Drop for Standin {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

/// The control endpoints as methods.
#[cfg(test)]
impl Standin {
    pub(crate) fn start(options: Options) -> Self {
        Self::try_start(options).expect("the stand-in should be able to listen")
    }

    /// `http://127.0.0.1:PORT`, without a slash at the end.
    pub(crate) fn base_url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Scripts a fault: `fault(Fault::DropAfter)`, `fault(Fault::Hold.on(On::Customer("cus_9".into())))`.
    pub(crate) fn fault(&self, fault: impl Into<Scripted>) {
        self.engine.fault(fault.into());
    }

    /// Plays an operation that this module does not know.
    pub(crate) fn play(&self, play: Play) {
        self.engine.play(play);
    }

    /// Takes back every fault that has met no request yet.
    pub(crate) fn clear_faults(&self) {
        self.engine.clear_faults();
    }

    /// Every movement of money, in order.
    pub(crate) fn executed(&self) -> Vec<Executed> {
        self.engine.executed(0)
    }

    /// Every request to the API, in order, those that faults swallowed too.
    pub(crate) fn requests(&self) -> Vec<Seen> {
        self.engine.requests(0)
    }

    /// Lets go of all requests that `Hold` and `HoldAfter` hold at this moment.
    pub(crate) fn release(&self) {
        self.engine.release();
    }

    /// Waits until at least so many requests are held.
    pub(crate) async fn until_held(&self, count: usize) {
        while self.engine.held.load(std::sync::atomic::Ordering::SeqCst) < count {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    }

    pub(crate) fn advance(&self, seconds: u64) {
        self.engine.advance(seconds);
    }

    pub(crate) fn reset(&self) {
        self.engine.reset();
    }

    /// Moves an intent as a payer or a bank would.
    pub(crate) fn settle(&self, id: &str, to: Settlement) -> Result<(), String> {
        self.engine.settle(id, to)
    }

    pub(crate) fn set_secret_keys(&self, keys: Vec<String>) {
        self.engine.set_secret_keys(keys);
    }
}
