//! A money call: one leader, a durable hold, one send, and what its answer proves.

use std::sync::Arc;
use std::time::Duration;

use hyper::header::{CONTENT_TYPE, HeaderName};
use tokio::time::{Instant, timeout_at};

use crate::audit::{Decision, Entry, Event, RecordedOutcome};
use crate::call::{self, Estate, Outcome, Reading as Meaning, StoredAnswer};
use crate::id::{CallId, HoldId};
use crate::intent::{Claim, Intent};
use crate::key::Key;
use crate::ledger::rules::limits::one_call_fits;
use crate::ledger::rules::resolve::Resolve;
use crate::ledger::rules::{Admit, Executed};
use crate::ledger::{Admitted, Held, Sending, entry};
use crate::proxy::course::Course;
use crate::proxy::flights::{Landing, Leader, Role, SharedAnswer, landed};
use crate::proxy::reply::{
    ORIGINAL_REQUEST, OUTCOME, REPLAYED, REPLAYED_FROM, REQUEST_ID, Reply, SHOULD_RETRY, request_id_of,
};
use crate::proxy::{No, Proxy, own_key_refused};
use crate::random;
use crate::refusal::{Code, Refusal};
use crate::server::unless_panic;
use crate::telemetry::{EndLabels, OutcomeLabels, Stage};
use crate::time::UnixMs;
use crate::upstream::{self, Sent, UnknownReason};
use crate::vendor::stripe::answer::{self, Answer, Expected};
use crate::vendor::stripe::find;
use crate::vendor::stripe::object::{self, Look, Purpose};
use crate::vendor::stripe::pricing::Price;
use crate::vendor::stripe::request::{self, Reading, Surroundings};
use crate::vendor::stripe::secrets;

/// How often the object of one call is read, when others change it in between.
const LOOKS_MAX: u32 = 3;
/// The first pause before it is asked again what became of a call that another process is sending; each is twice as long.
const ELSEWHERE_FIRST: Duration = Duration::from_millis(20);
/// The longest.
const ELSEWHERE_MAX: Duration = Duration::from_millis(250);

/// How a leader's work ended.
struct Led {
    reply: Reply,
    /// Whether those who waited get the same answer.
    shared: bool,
    call_id: CallId,
}

/// A money call on its way.
struct Work {
    intent: Intent,
    priced: Option<&'static Price>,
    /// The read that its price may wait for.
    look: Option<(Look, Purpose)>,
}

impl Proxy {
    /// Answers a money call.
    pub(super) async fn spend(
        &self,
        course: &mut Course,
        key: &Key,
        reading: &Reading<'_>,
        priced: Option<&'static Price>,
        estate: &Estate,
    ) -> Result<Reply, No> {
        let now = self.ledger.now();
        let exchange = self.exchange();
        let around = Surroundings {
            exchange: &exchange,
            estate,
            salt: self.ledger.salt(),
            stamp: self.config.stamp,
            lone_call: CallId::new(now, random::of_id()),
        };
        let intent = request::intent(reading, priced, key, around)?;
        if let Claim::Create { money, rate, .. } = &intent.claim
            && let Some(usd) = rate.usd(money.minor)
        {
            one_call_fits(key, usd)?;
        }
        loop {
            match self.flights.enter(intent.identity, intent.fingerprint) {
                Role::Leader(leader) => {
                    let look = priced.and_then(|price| object::look(reading, price));
                    return self.lead(course, key, Work { intent, priced, look }, leader).await;
                }
                Role::Waiter(flight) => {
                    let end = timeout_at(course.deadline, landed(flight));
                    match course.during(Stage::SameCall, end).await {
                        // What its object has to keep, only the ledger can tell.
                        Ok(Some(Landing::Shared(_))) if !intent.open_constraints.is_empty() => {}
                        Ok(Some(Landing::Shared(answer))) => {
                            return self.join(course, key, &intent, &answer).await;
                        }
                        Ok(Some(Landing::OwnRefusal) | None) => {}
                        Err(_) => return Err(still_in_flight().into()),
                    }
                }
                Role::Other(flight) => {
                    let end = timeout_at(course.deadline, landed(flight));
                    if course.during(Stage::SameCall, end).await.is_err() {
                        return Err(still_in_flight().into());
                    }
                }
            }
        }
    }

    /// Leads the call and tells those who wait for it.
    async fn lead(&self, course: &mut Course, key: &Key, work: Work, leader: Leader) -> Result<Reply, No> {
        let led = self.execute(course, key, work).await;
        match &led {
            Ok(led) if led.shared => {
                let mut reply = led.reply.clone();
                reply.hide_client_secrets();
                let shared = SharedAnswer { reply, call_id: led.call_id, at: self.ledger.now() };
                leader.land(Landing::Shared(Arc::new(shared)));
            }
            Ok(_) | Err(_) => leader.land(Landing::OwnRefusal),
        }
        led.map(|led| led.reply)
    }

    /// Gives a leader's answer to one who waited for it.
    async fn join(
        &self,
        course: &mut Course,
        key: &Key,
        intent: &Intent,
        answer: &SharedAnswer,
    ) -> Result<Reply, No> {
        let mut reply = answer.reply.clone();
        // A leader that replayed has named the execution already.
        if (200..300).contains(&reply.status) && reply.header(&REPLAYED_FROM).is_none() {
            let original = reply.header(&ORIGINAL_REQUEST).or(reply.header(&REQUEST_ID));
            let original = original.unwrap_or_default().to_owned();
            reply.mark_replayed(&original, answer.at);
        }
        reply.set(REQUEST_ID, &course.request_id);
        let entry = Entry {
            call_id: Some(answer.call_id.to_string()),
            decision: Some(Decision::Replayed),
            outcome: Some(RecordedOutcome::None),
            duration_ms: Some(course.elapsed_ms()),
            ..entry::of_request(self.ledger.now(), Event::Joined, key, &intent.facts)
        };
        course.during(Stage::Record, self.ledger.record(entry)).await?;
        self.metrics.decided("joined", "");
        Ok(reply)
    }

    /// Reserves, sends and settles; or replays; or refuses.
    async fn execute(&self, course: &mut Course, key: &Key, mut work: Work) -> Result<Led, No> {
        let held = match self.admit(course, key, &mut work).await? {
            Admitted::Refused(refusal) => return Err(No::Recorded(refusal)),
            Admitted::Look(_) => return Err(unreadable_object().into()),
            Admitted::Elsewhere => return Err(busy_object().into()),
            Admitted::Tell(executed) => return self.tell(course, key, &work.intent, *executed).await,
            Admitted::Replay { call_id, answer } => {
                self.metrics.decided("replayed", "");
                let age_ms = self.ledger.now().millis_since(answer.at);
                self.metrics.replay_age_seconds.observe(Duration::from_millis(age_ms).as_secs_f64());
                let reply = Reply::of_stored(&answer, &course.request_id);
                return Ok(Led { reply, shared: true, call_id });
            }
            Admitted::Held(held) => held,
        };
        self.metrics.decided("forwarded", "");
        let (call_id, sending) = (held.call_id(), held.sending());
        let (first_send, may_retry) = (held.first_send(), held.may_be_resent(self.ledger.now()));
        let reply = if let Some(reply) = unless_panic(Box::pin(self.make(course, key, &work, held))).await {
            reply
        } else {
            if self.doubt_panicked(course, sending).await && first_send {
                self.metrics.doubts_opened.inc();
            }
            self.doubtful(course, &Told::nothing(Meaning::Silence, false), None, may_retry, call_id)
        };
        Ok(Led { reply, shared: true, call_id })
    }

    /// Sends what is held, once, and settles it.
    async fn make(&self, course: &mut Course, key: &Key, work: &Work, held: Held) -> Reply {
        let sent =
            self.timed(course, self.forwarder.send_held(&held, self.ledger.now(), course.deadline)).await;
        self.settle(course, key, work, held, sent).await
    }

    /// A call that panicked is a doubt at once: left as it is, it would be in flight until the next start, and neither its
    /// next try nor recovery nor an operator could end it. Whether it was not settled before.
    async fn doubt_panicked(&self, course: &mut Course, sending: Sending) -> bool {
        let doubted = self.ledger.doubt(sending, course.request_id.clone());
        let doubted = course.during(Stage::Settle, doubted).await;
        match &doubted {
            Ok(()) => {
                tracing::error!(?sending, "a money call panicked; its money stays counted");
                self.metrics.outcomes.get_or_create(&OutcomeLabels { outcome: "doubt" }).inc();
            }
            Err(error) => tracing::error!(%error, ?sending, "a money call panicked, settled or not"),
        }
        doubted.is_ok()
    }

    /// Answers with the object of a call that was executed and whose answer was never seen here.
    async fn tell(
        &self,
        course: &mut Course,
        key: &Key,
        intent: &Intent,
        executed: Executed,
    ) -> Result<Led, No> {
        let Executed { call_id, operation, object_id, at, refusal } = executed;
        let path = find::object_path(&operation, &object_id);
        let answer = match path {
            Some(path) => self.read_object(course, &intent.request, path).await,
            None => None,
        };
        let Some(answer) = answer else { return Err(refusal.into()) };
        let mut reply = Reply::of_answer(&answer, &course.request_id);
        let original = request_id_of(&answer).unwrap_or_default();
        reply.mark_replayed(&original, at);
        reply.set(REQUEST_ID, &course.request_id);
        reply.hide_client_secrets();
        let entry = Entry {
            call_id: Some(call_id.to_string()),
            decision: Some(Decision::Replayed),
            outcome: Some(RecordedOutcome::None),
            object_id: Some(object_id),
            duration_ms: Some(course.elapsed_ms()),
            ..entry::of_request(self.ledger.now(), Event::Replayed, key, &intent.facts)
        };
        course.during(Stage::Record, self.ledger.record(entry)).await?;
        self.metrics.decided("replayed", "");
        Ok(Led { reply, shared: true, call_id })
    }

    /// Asks the ledger, and once more with what the object's record says when only that tells the price.
    async fn admit(&self, course: &mut Course, key: &Key, work: &mut Work) -> Result<Admitted, No> {
        let (mut looks, mut pause) = (0, ELSEWHERE_FIRST);
        loop {
            let now = self.ledger.now();
            let may_go = self.buckets.take(key, Instant::now());
            let admit = Admit {
                may_go,
                intent: work.intent.clone(),
                call_id: CallId::new(now, random::of_id()),
                hold_id: HoldId::new(now, random::of_id()),
                boot: self.ledger.boot(),
                may_wait: Instant::now() + pause < course.deadline,
                duration_ms: course.elapsed_ms(),
            };
            let admitted = course.during(Stage::Reserve, self.ledger.admit(key.id, admit)).await?;
            if may_go && !matches!(admitted, Admitted::Held(_)) {
                self.buckets.give_back(key);
            }
            if let Admitted::Elsewhere = admitted {
                course.during(Stage::SameCall, tokio::time::sleep(pause)).await;
                pause = pause.saturating_mul(2).min(ELSEWHERE_MAX);
                continue;
            }
            let (Admitted::Look(mark), Some((look, purpose))) = (&admitted, &work.look) else {
                return Ok(admitted);
            };
            if looks == LOOKS_MAX {
                return Err(busy_object().into());
            }
            looks += 1;
            work.intent.read_against = *mark;
            let seen = self.look(course, &work.intent.request, look, *purpose).await?;
            work.intent.seen = Some(seen);
        }
    }

    /// Makes durable what the answer proves, and only then answers.
    async fn settle(&self, course: &mut Course, key: &Key, work: &Work, held: Held, sent: Sent) -> Reply {
        let more = match (&sent, work.priced) {
            (Sent::Answered(answer), Some(price)) => {
                self.follow(course, &work.intent.request, answer, price.answers).await
            }
            (Sent::Answered(_) | Sent::NotSent { .. } | Sent::Unknown { .. }, _) => None,
        };
        let asked_at = UnixMs::from_millis(self.ledger.now().millis().saturating_sub(course.elapsed_ms()));
        let told = Told::of(&sent, &held, work, more.as_ref(), asked_at);
        let outcome = call::conclude(&told.meaning, held.first_send(), told.replayed, held.basis());
        self.note_own_key(&told.meaning);
        let name = outcome_name(outcome);
        self.metrics.outcomes.get_or_create(&OutcomeLabels { outcome: name }).inc();
        let may_retry = held.may_be_resent(self.ledger.now());
        let call_id = held.call_id();
        match (outcome, held.first_send()) {
            (Outcome::Unknown, true) => {
                self.metrics.doubts_opened.inc();
            }
            (Outcome::Unknown, false) | (_, true) => {}
            (_, false) => {
                self.metrics.doubts_settled.get_or_create(&EndLabels { by: "answer" }).inc();
            }
        }
        if outcome == Outcome::Unknown {
            tracing::warn!(%call_id, key_id = %key.id, "the outcome of a money call is unknown; it stays counted");
        }
        let resolve = Resolve {
            outcome,
            objects: told.objects.clone(),
            answer: told.answer.as_ref().map(|answer| stored(answer, &course.request_id, self.ledger.now())),
            seen_request_id: told
                .shown()
                .and_then(request_id_of)
                .unwrap_or_else(|| course.request_id.clone()),
            stripe_request_id: told.answer.as_ref().and_then(request_id_of),
            upstream_status: told.answer.as_ref().map(|answer| answer.status),
            duration_ms: course.elapsed_ms(),
        };
        let resolved = course.during(Stage::Settle, self.ledger.resolve(held, resolve)).await;
        if let Err(error) = &resolved {
            tracing::error!(%error, %call_id, "an outcome could not be written; the money stays counted");
        }
        let settled = resolved.is_ok() && outcome != Outcome::Unknown;
        if settled && let (Some(answer), Some(price), true) = (&told.answer, work.priced, is_counted(outcome))
        {
            let Intent { request, facts, .. } = &work.intent;
            self.note_billed(course, request, facts, price.answers, &answer.body).await;
        }
        let mut reply = match (told.shown(), settled) {
            (Some(answer), true) => Reply::of_answer(answer, &course.request_id),
            (None, true) if matches!(told.meaning, Meaning::OwnKeyRefused) => {
                self.refuse(&own_key_refused(), course)
            }
            (None, true) => self.refuse(&not_sent(), course),
            (shown, false) => self.doubtful(course, &told, shown, may_retry, call_id),
        };
        if !key.client_secrets {
            reply.hide_client_secrets();
        }
        reply
    }

    fn note_own_key(&self, meaning: &Meaning) {
        match meaning {
            Meaning::OwnKeyRefused => self.account.set_key_refused(true),
            Meaning::Moved { .. }
            | Meaning::Pending { .. }
            | Meaning::NotMoved
            | Meaning::Declined
            | Meaning::Invalid => self.account.set_key_refused(false),
            Meaning::KeyMismatch
            | Meaning::Throttled
            | Meaning::Unclear { .. }
            | Meaning::NotSent
            | Meaning::Silence => {}
        }
    }

    /// The answer after which nobody knows: Stripe's own readable error, else ours.
    fn doubtful(
        &self,
        course: &Course,
        told: &Told,
        shown: Option<&upstream::Answer>,
        may_retry: bool,
        call_id: CallId,
    ) -> Reply {
        let mut reply = if let Some(answer) = shown.filter(|answer| answer.status >= 400) {
            let mut reply = Reply::of_answer(answer, &course.request_id);
            if answer.status >= 500 {
                let retry = may_retry && !told.replayed;
                reply.set(SHOULD_RETRY, if retry { "true" } else { "false" });
            }
            reply
        } else {
            let message = format!(
                "Stripe may or may not have executed this call ({call_id}). Its money stays counted until that is \
                 known. {}",
                if may_retry {
                    "Sending the same request again is safe: it goes to Stripe under the same idempotency key."
                } else {
                    "It is not sent again; an operator has to look it up."
                }
            );
            self.refuse(&Refusal::outcome_unknown(may_retry, told.timed_out, message), course)
        };
        reply.set(OUTCOME, "doubt");
        reply
    }
}

/// What came back, as far as it matters.
struct Told {
    meaning: Meaning,
    objects: Vec<String>,
    replayed: bool,
    timed_out: bool,
    answer: Option<upstream::Answer>,
}

impl Told {
    fn of(sent: &Sent, held: &Held, work: &Work, more: Option<&upstream::Answer>, asked_at: UnixMs) -> Self {
        match sent {
            Sent::NotSent { .. } => Self::nothing(Meaning::NotSent, false),
            Sent::Unknown { reason } => Self::nothing(Meaning::Silence, *reason == UnknownReason::TimedOut),
            Sent::Answered(answer) => {
                let expected = work.priced.zip(held.money()).map(|(price, held)| Expected {
                    answers: price.answers,
                    held,
                    is_ceiling: matches!(work.intent.claim, Claim::Ceiling { .. }),
                    rates: &work.intent.rates,
                    params: &work.intent.request.params,
                    asked_at,
                });
                let told = Answer { status: answer.status, body: &answer.body };
                let (meaning, objects) = answer::read(told, expected, more.map(|more| more.body.as_ref()));
                let replayed = answer.headers.get(REPLAYED).is_some_and(|value| value == "true");
                Self { meaning, objects, replayed, timed_out: false, answer: Some(answer.clone()) }
            }
        }
    }

    /// The answer, where the caller gets to see it: not when it turns our own key away, and not when it cannot be read.
    fn shown(&self) -> Option<&upstream::Answer> {
        let answer = self.answer.as_ref()?;
        match &self.meaning {
            Meaning::OwnKeyRefused | Meaning::NotSent | Meaning::Silence => None,
            Meaning::Unclear { .. } => Some(answer).filter(|answer| is_error(answer)),
            Meaning::Moved { .. }
            | Meaning::Pending { .. }
            | Meaning::NotMoved
            | Meaning::Declined
            | Meaning::Invalid
            | Meaning::KeyMismatch
            | Meaning::Throttled => Some(answer),
        }
    }

    fn nothing(meaning: Meaning, timed_out: bool) -> Self {
        Self { meaning, objects: Vec::new(), replayed: false, timed_out, answer: None }
    }
}

fn stored(answer: &upstream::Answer, request_id: &str, at: UnixMs) -> StoredAnswer {
    let text = |name: &HeaderName| answer.headers.get(name).and_then(|value| value.to_str().ok());
    // After a re-send the execution is another request than the one that brought its answer.
    let executed = text(&ORIGINAL_REQUEST).map(str::to_owned).or_else(|| request_id_of(answer));
    StoredAnswer {
        status: answer.status,
        content_type: text(&CONTENT_TYPE).unwrap_or("application/json").to_owned(),
        request_id: executed.unwrap_or_else(|| request_id.to_owned()),
        body: secrets::without_client_secrets(&answer.body).into_owned(),
        at,
    }
}

/// Whether an SDK could read it as one of Stripe's errors.
fn is_error(answer: &upstream::Answer) -> bool {
    answer.status >= 400
        && serde_json::from_slice::<serde_json::Value>(&answer.body)
            .is_ok_and(|body| body.get("error").is_some_and(serde_json::Value::is_object))
}

const fn outcome_name(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Spent { .. } => "spent",
        Outcome::Pending { .. } => "pending",
        Outcome::Declined => "declined",
        Outcome::Refused | Outcome::TurnedAway => "refused",
        Outcome::NotSent => "not_sent",
        Outcome::Unknown => "doubt",
    }
}

/// Whether the money of the answer's object is counted now.
const fn is_counted(outcome: Outcome) -> bool {
    match outcome {
        Outcome::Spent { minor } => minor > 0,
        Outcome::Pending { .. } => true,
        Outcome::Declined | Outcome::Refused | Outcome::TurnedAway | Outcome::NotSent | Outcome::Unknown => {
            false
        }
    }
}

fn unreadable_object() -> Refusal {
    Refusal::new(
        Code::AmountUnknown,
        "The object of this call cannot be read first, so its amount is not known. Nothing was sent.",
    )
}

fn busy_object() -> Refusal {
    Refusal::new(
        Code::IdempotencyKeyInUse,
        "The object of this call is being changed by others; what it costs could not be read in peace. Try again.",
    )
}

fn still_in_flight() -> Refusal {
    Refusal::new(
        Code::IdempotencyKeyInUse,
        "The same call is still being made, and its answer did not come within this request's time. Try again.",
    )
}

fn not_sent() -> Refusal {
    Refusal::new(
        Code::UpstreamUnreachable,
        "Stripe could not be reached. Nothing was sent, and nothing is held.",
    )
}
