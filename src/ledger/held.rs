//! What is let through, and the proof of it.

use crate::call::{KeyBasis, Outcome, RESEND_WITHIN_MS, StoredAnswer};
use crate::hold::ExactRequest;
use crate::id::{CallId, HoldId};
use crate::intent::HoldMark;
use crate::ledger::LedgerError;
use crate::ledger::command::{Command, Reply};
use crate::ledger::rules::resolve::Resolve;
use crate::ledger::rules::{self, Executed};
use crate::money::Money;
use crate::refusal::Refusal;
use crate::time::UnixMs;

/// What an admitted call must be sent with: the proof that its money is durably held.
///
/// Not clonable. When it is dropped without [`Ledger::resolve`](super::Ledger::resolve), nothing is released: the hold stays as it is until
/// [`Ledger::doubt`](super::Ledger::doubt), and is a doubt after the next start.
#[must_use = "the hold stays held until it is resolved"]
#[derive(Debug)]
pub struct Held {
    hold_id: HoldId,
    call_id: CallId,
    request: ExactRequest,
    money: Option<Money>,
    basis: KeyBasis,
    sends: u32,
    resend_until: Option<UnixMs>,
}

impl Held {
    /// Exactly what is to be sent.
    pub fn request(&self) -> &ExactRequest {
        &self.request
    }

    /// The call.
    pub fn call_id(&self) -> CallId {
        self.call_id
    }

    /// What to doubt, should this be lost.
    pub fn sending(&self) -> Sending {
        Sending { hold_id: self.hold_id, call_id: self.call_id, sends: self.sends }
    }

    /// What is held; `None` for a call whose price is not known.
    pub fn money(&self) -> Option<Money> {
        self.money
    }

    /// Where its upstream key comes from.
    pub fn basis(&self) -> &KeyBasis {
        &self.basis
    }

    /// Whether bytes of this attempt can have left before.
    pub fn first_send(&self) -> bool {
        self.sends <= 1
    }

    /// Whether the same request may be sent again at `now`, should its outcome stay unknown.
    pub fn may_be_resent(&self, now: UnixMs) -> bool {
        self.resend_until.is_some_and(|until| now < until)
    }

    pub(super) fn of(effects: &rules::Effects, basis: KeyBasis) -> Result<Self, LedgerError> {
        let missing = || LedgerError::Contradiction("an admitted call has no hold");
        let (_, hold) = effects.hold.as_ref().ok_or_else(missing)?;
        let live = hold.live.as_ref().ok_or_else(missing)?;
        let call = effects.calls.first().ok_or_else(missing)?;
        let attempt = call.last_attempt().ok_or_else(missing)?;
        Ok(Self {
            hold_id: hold.id,
            call_id: hold.call_id,
            request: live.request.clone(),
            money: hold.money(),
            basis,
            sends: attempt.sends,
            resend_until: attempt
                .upstream_key
                .as_ref()
                .map(|_| attempt.first_send.plus_millis(RESEND_WITHIN_MS)),
        })
    }
}

/// Which hold is being sent: enough to doubt it, not to send or to settle it.
#[derive(Clone, Copy, Debug)]
pub struct Sending {
    pub(super) hold_id: HoldId,
    pub(super) call_id: CallId,
    /// The how many-th sending of its attempt it is.
    pub(super) sends: u32,
}

impl Sending {
    /// What ends it: nobody had it to send it. Bytes of a sending before it may have left.
    pub(super) fn not_sent(self) -> Resolve {
        Resolve {
            outcome: if self.sends <= 1 { Outcome::NotSent } else { Outcome::Unknown },
            objects: Vec::new(),
            answer: None,
            seen_request_id: String::new(),
            stripe_request_id: None,
            upstream_status: None,
            duration_ms: 0,
        }
    }

    pub(super) fn was_not_sent(self) -> Command {
        let (reply, _) = Reply::channel();
        Command::Resolve { sending: self, resolve: Box::new(self.not_sent()), reply }
    }
}

/// What the ledger says to a money call.
#[derive(Debug)]
pub enum Admitted {
    /// Held: send it.
    Held(Held),
    /// Done before: give this answer.
    Replay {
        /// The call.
        call_id: CallId,
        /// Its answer.
        answer: StoredAnswer,
    },
    /// The object's own record has to be read first: nothing is written, ask again with it, and with how its hold was.
    Look(Option<HoldMark>),
    /// Another process is sending it: nothing is written, ask again.
    Elsewhere,
    /// It was executed, and its answer was never seen: tell its object.
    Tell(Box<Executed>),
    /// No.
    Refused(Refusal),
}
