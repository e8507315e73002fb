//! Whose Stripe account this is: asked of Stripe at start, bound in the ledger, and the reason why the sidecar is not
//! ready until it is known.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;

use crate::call::Estate;
use crate::forward::{Forwarder, FreeRequest};
use crate::ledger::{Ledger, LedgerError};
use crate::secret::Mode;
use crate::upstream::Sent;
use crate::vendor::stripe::answer::{self, Answer};

/// How long one question to Stripe may take.
const ASK_TIMEOUT_MS: u64 = 10_000;
/// How often a refused key is tried again.
const KEY_LOOK_MS: u64 = 15_000;
/// Waits between two questions: doubled from the first to the last.
const ASK_AGAIN_MS: (u64, u64) = (1_000, 60_000);

/// What is known of the account, for everybody to look at.
#[derive(Debug)]
pub struct AccountState {
    mode: Mode,
    estate: RwLock<Option<Estate>>,
    why_not: RwLock<String>,
    key_refused: AtomicBool,
    draining: AtomicBool,
}

/// Why the account could not be settled on.
#[derive(Debug)]
pub enum Unsettled {
    /// Not known yet: ask again.
    Later(String),
    /// The ledger belongs to another account or mode: nothing may be served.
    Elsewhere(LedgerError),
}

impl AccountState {
    /// Nothing is known yet.
    pub fn new(mode: Mode) -> Self {
        Self {
            mode,
            estate: RwLock::new(None),
            why_not: RwLock::new("the Stripe account has not been asked for yet".to_owned()),
            key_refused: AtomicBool::new(false),
            draining: AtomicBool::new(false),
        }
    }

    /// The account, once it is known.
    pub fn estate(&self) -> Option<Estate> {
        self.estate.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The mode of the Stripe key.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Why no proxied call is let through; `None` when they are.
    pub fn not_serving(&self) -> Option<String> {
        if self.estate().is_some() {
            return None;
        }
        Some(self.why_not.read().unwrap_or_else(PoisonError::into_inner).clone())
    }

    /// Stripe turned the sidecar's own key away, or took it again.
    pub fn set_key_refused(&self, refused: bool) {
        self.key_refused.store(refused, Ordering::Relaxed);
    }

    /// Whether Stripe last turned the sidecar's own key away.
    pub fn key_refused(&self) -> bool {
        self.key_refused.load(Ordering::Relaxed)
    }

    /// The process is stopping.
    pub fn set_draining(&self) {
        self.draining.store(true, Ordering::SeqCst);
    }

    /// Whether the process is stopping.
    pub fn draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    fn know(&self, account: String) {
        *self.estate.write().unwrap_or_else(PoisonError::into_inner) =
            Some(Estate { account, mode: self.mode });
    }

    fn wait(&self, why: &str) {
        why.clone_into(&mut self.why_not.write().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Serves from what the ledger knows, when it is bound and the key is the one with which that was last verified.
///
/// # Errors
/// [`LedgerError`] when the ledger cannot be read.
pub async fn recall(state: &AccountState, ledger: &Ledger, forwarder: &Forwarder) -> Result<(), LedgerError> {
    let binding = ledger.read(|reader| reader.binding()).await?;
    let verified = binding.verified_key.is_some_and(|digest| *digest == forwarder.key_digest());
    if let (Some(account), true) = (binding.account, verified) {
        state.know(account);
    }
    Ok(())
}

/// Asks Stripe once, and binds the ledger to what it says.
///
/// `configured` is `STRIPE_ACCOUNT`, for a key that may not read its account.
///
/// # Errors
/// [`Unsettled`].
pub async fn settle(
    state: &AccountState,
    ledger: &Ledger,
    forwarder: &Forwarder,
    configured: Option<&str>,
) -> Result<(), Unsettled> {
    let account = match (ask(state, forwarder).await, configured) {
        (Ok(Some(told)), Some(configured)) if told != configured => {
            return Err(Unsettled::Elsewhere(LedgerError::BoundElsewhere {
                bound: format!("account {configured} (STRIPE_ACCOUNT)"),
                offered: format!("account {told}"),
            }));
        }
        (Ok(Some(told)), _) => told,
        (Ok(None), Some(configured)) => configured.to_owned(),
        (Ok(None), None) => {
            let why =
                "the Stripe key may not read its own account: set STRIPE_ACCOUNT to its acct_… id".to_owned();
            state.wait(&why);
            return Err(Unsettled::Later(why));
        }
        (Err(why), _) => {
            state.wait(&why);
            return Err(Unsettled::Later(why));
        }
    };
    match ledger.bind(account.clone(), forwarder.key_digest()).await {
        Ok(_) => {
            state.know(account);
            Ok(())
        }
        Err(error @ LedgerError::BoundElsewhere { .. }) => Err(Unsettled::Elsewhere(error)),
        Err(error) => {
            let why = error.to_string();
            state.wait(&why);
            Err(Unsettled::Later(why))
        }
    }
}

/// Asks again while Stripe turns the key away, so that a mended key makes the sidecar ready without any traffic.
pub async fn watch_key(state: &AccountState, forwarder: &Forwarder) {
    loop {
        tokio::time::sleep(Duration::from_millis(KEY_LOOK_MS)).await;
        if state.key_refused()
            && let Err(why) = ask(state, forwarder).await
        {
            tracing::warn!(%why, "Stripe still refuses this sidecar's key");
        }
    }
}

/// Asks until the account is settled. Returns only when it belongs elsewhere.
pub async fn settle_patiently(
    state: &AccountState,
    ledger: &Ledger,
    forwarder: &Forwarder,
    configured: Option<&str>,
) -> Option<LedgerError> {
    let (mut wait_ms, longest_ms) = ASK_AGAIN_MS;
    loop {
        match settle(state, ledger, forwarder, configured).await {
            Ok(()) => return None,
            Err(Unsettled::Elsewhere(error)) => return Some(error),
            Err(Unsettled::Later(why)) => {
                tracing::warn!(%why, wait_ms, "the Stripe account is not verified yet");
            }
        }
        tokio::time::sleep(Duration::from_millis(wait_ms)).await;
        wait_ms = (wait_ms * 2).min(longest_ms);
    }
}

/// The account that Stripe names; `None` when the key may not read it.
async fn ask(state: &AccountState, forwarder: &Forwarder) -> Result<Option<String>, String> {
    let deadline = Instant::now() + Duration::from_millis(ASK_TIMEOUT_MS);
    let sent = forwarder.send_free(&FreeRequest::own_read("/v1/account"), deadline).await;
    let answer = match sent {
        Sent::Answered(answer) => answer,
        Sent::NotSent { reason } => return Err(format!("Stripe cannot be reached ({})", reason.as_str())),
        Sent::Unknown { reason } => return Err(format!("Stripe did not answer ({})", reason.as_str())),
    };
    let told = Answer { status: answer.status, body: &answer.body };
    match answer.status {
        200 => {
            let body: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
            let id = body.get("id").and_then(Value::as_str).filter(|id| id.starts_with("acct_"));
            state.set_key_refused(false);
            id.map(|id| Some(id.to_owned())).ok_or_else(|| "Stripe's account has no readable id".to_owned())
        }
        // The key itself was taken; it only may not read its account.
        403 => {
            state.set_key_refused(false);
            Ok(None)
        }
        _ if answer::refuses_own_key(told) => {
            state.set_key_refused(true);
            Err("Stripe refuses this sidecar's key".to_owned())
        }
        status => Err(format!("Stripe answered {status} when asked for its account")),
    }
}
