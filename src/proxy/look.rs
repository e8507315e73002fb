//! Reads of the sidecar's own: an object whose record tells what a call on it can cost, or what one has cost.

use std::time::Duration;

use tokio::time::Instant;

use crate::call::Record;
use crate::forward::FreeRequest;
use crate::hold::{ExactRequest, Facts};
use crate::intent::Seen;
use crate::proxy::course::Course;
use crate::proxy::{No, Proxy, own_key_refused};
use crate::refusal::{Code, Refusal};
use crate::telemetry::Stage;
use crate::upstream::{self, Sent};
use crate::vendor::stripe::answer::{self, Answer};
use crate::vendor::stripe::object::{self, Look, Purpose};
use crate::vendor::stripe::pricing::Answers;

/// How long one read may take, within the request's own deadline.
const LOOK_TIMEOUT_MS: u64 = 20_000;
/// How long an answer that is already there may wait for a read that only tells more of it.
const FOLLOW_TIMEOUT_MS: u64 = 5_000;
/// Items of one invoice that are told to be billed by it.
const ITEMS_MAX: usize = 100;

impl Proxy {
    /// What the record of a call's object says, read from the same account.
    pub(super) async fn look(
        &self,
        course: &mut Course,
        request: &ExactRequest,
        look: &Look,
        purpose: Purpose,
    ) -> Result<Seen, No> {
        let answer = match self.read(course, request, look, LOOK_TIMEOUT_MS).await {
            Sent::Answered(answer) => answer,
            Sent::NotSent { .. } | Sent::Unknown { .. } => return Err(not_read("did not answer").into()),
        };
        let told = Answer { status: answer.status, body: &answer.body };
        if answer::refuses_own_key(told) {
            self.account.set_key_refused(true);
            return Err(own_key_refused().into());
        }
        match answer.status {
            200 => object::seen(look, purpose, &answer.body).ok_or_else(|| {
                Refusal::new(
                    Code::AmountUnknown,
                    "The object's record at Stripe does not say what this call can cost. Nothing was sent.",
                )
                .into()
            }),
            404 => Err(Refusal::new(
                Code::NotFound,
                "Stripe knows no such object: the read that tells what this call can cost was answered 404. Nothing was \
                 sent.",
            )
            .into()),
            400..=428 => Err(Refusal::new(
                Code::AmountUnknown,
                "The object could not be read at Stripe, so what this call can cost is not known. Nothing was sent.",
            )
            .into()),
            _ => Err(not_read("is busy").into()),
        }
    }

    /// What an answer leaves to another object to tell; `None` where that could not be read, and all stays held.
    pub(super) async fn follow(
        &self,
        course: &mut Course,
        request: &ExactRequest,
        answer: &upstream::Answer,
        answers: Answers,
    ) -> Option<upstream::Answer> {
        let look = answer::follow(Answer { status: answer.status, body: &answer.body }, answers)?;
        match self.read(course, request, &look, FOLLOW_TIMEOUT_MS).await {
            Sent::Answered(answer) if answer.status == 200 => Some(answer),
            Sent::Answered(_) | Sent::NotSent { .. } | Sent::Unknown { .. } => None,
        }
    }

    /// An object as Stripe tells it now; `None` where it cannot be read.
    pub(super) async fn read_object(
        &self,
        course: &mut Course,
        request: &ExactRequest,
        path: String,
    ) -> Option<upstream::Answer> {
        let deadline = course.deadline.min(Instant::now() + Duration::from_millis(LOOK_TIMEOUT_MS));
        let read = FreeRequest::read(path, Vec::new(), request.account.clone());
        match self.timed(course, self.forwarder.send_free(&read, deadline)).await {
            Sent::Answered(answer) if answer.status == 200 => Some(answer),
            Sent::Answered(_) | Sent::NotSent { .. } | Sent::Unknown { .. } => None,
        }
    }

    /// Ends the holds of items that an invoice bills, once the invoice's own hold counts them.
    pub(super) async fn note_billed(
        &self,
        course: &mut Course,
        request: &ExactRequest,
        facts: &Facts,
        answers: Answers,
        body: &[u8],
    ) {
        let account = request.account.as_deref().unwrap_or_default();
        for item in object::billed_items(answers, body).into_iter().take(ITEMS_MAX) {
            let is_held = self.ledger.read(|reader| reader.hold_of_object(account, &item)).await;
            if !is_held.is_ok_and(|hold| hold.is_some_and(|hold| hold.state.is_live())) {
                continue;
            }
            let facts = Facts { object_id: Some(item.clone()), ..facts.clone() };
            let billed = Record::Moved { minor: 0 };
            let ended = self.ledger.observe(account.to_owned(), item, facts, billed);
            if let Err(error) = course.during(Stage::Settle, ended).await {
                tracing::error!(%error, "an invoice item that was billed could not be released; it stays held");
            }
        }
    }

    async fn read(&self, course: &mut Course, request: &ExactRequest, look: &Look, timeout_ms: u64) -> Sent {
        let deadline = course.deadline.min(Instant::now() + Duration::from_millis(timeout_ms));
        let request = FreeRequest::look(look, request);
        self.timed(course, self.forwarder.send_free(&request, deadline)).await
    }
}

fn not_read(why: &str) -> Refusal {
    Refusal::new(
        Code::UpstreamUnreachable,
        format!("Stripe {why}, so what this call can cost could not be read. Nothing was sent. Try again."),
    )
}
