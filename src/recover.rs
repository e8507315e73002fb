//! Recovery: asks Stripe what became of calls in doubt, and whether open objects have come to an end. Only reads.
//!
//! One read at a time, with a pause between them, so that it never takes Stripe's rate limit from the flows. A doubt is
//! looked for soon after it came up and then ever more rarely; nothing is ever concluded from what is not found. Runs
//! from the start of the process until its end.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::account::AccountState;
use crate::call::{Attempt, Call, StoredAnswer};
use crate::forward::{Forwarder, FreeRequest};
use crate::fx::Book;
use crate::hold::{ExactRequest, Facts, Hold, HoldState, LiveCall};
use crate::id::HoldId;
use crate::ledger::rules::resolve::{EndDoubt, Known};
use crate::ledger::{Ending, Ledger, LedgerError};
use crate::telemetry::{EndLabels, Metrics};
use crate::upstream::{Answer, Sent};
use crate::vendor::stripe::find::{self, Lost, Plan, Proof};
use crate::vendor::stripe::secrets;

/// Between two reads, so that at most two a second are made.
const PAUSE_MS: u64 = 500;
/// How long one read may take.
const READ_TIMEOUT_MS: u64 = 20_000;
/// When Stripe turns a read away or does not answer, nothing is asked for so long.
const RESPITE_MS: u64 = 30_000;
/// How often the live holds are looked through for those that came since.
const ROUND_MS: u64 = 1_000;
/// Live holds that one look through the ledger takes at most.
const HOLDS_MAX: usize = 10_000;
/// Pages of one list that are looked through for one stamp.
const PAGES_MAX: usize = 10;
/// A doubt is looked for first so long after it came up.
const DOUBT_FIRST_MS: u64 = 3_000;
/// And at least so often.
const DOUBT_LAST_MS: u64 = 3_600_000;
/// An open object is asked for first so long after it was opened, and then ever more rarely.
const OPEN_FIRST_MS: u64 = 60_000;
/// But at least so often.
const OPEN_LAST_MS: u64 = 6 * 3_600_000;
/// Doubts of which one warning is written.
const DOUBTS_WARN: usize = 10;
/// The age of a doubt at which one is.
const DOUBT_AGE_WARN_MS: u64 = 3_600_000;
/// Between two such warnings.
const WARN_EVERY_MS: u64 = 600_000;

/// What recovery works with.
#[derive(Debug)]
pub struct Recovery {
    /// The ledger.
    pub ledger: Ledger,
    /// The way to Stripe.
    pub forwarder: Arc<Forwarder>,
    /// Whose account.
    pub account: Arc<AccountState>,
    /// What other currencies count.
    pub fx: Arc<Book>,
    /// What is counted.
    pub metrics: Metrics,
}

/// When a hold is looked at next, and how often it was.
#[derive(Clone, Copy, Debug)]
struct Turn {
    at: Instant,
    times: u32,
}

/// What one look came to.
enum Look {
    /// The next one may follow.
    Done,
    /// Stripe has to be left alone for a while.
    TurnedAway,
}

impl Recovery {
    /// Runs until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.work() => {}
        }
    }

    async fn work(&self) {
        let mut turns: HashMap<HoldId, Turn> = HashMap::new();
        let mut warned: Option<Instant> = None;
        // Whatever is there at the start is looked at at once: nobody knows for how long nobody looked.
        for hold in self.live_holds().await {
            turns.insert(hold.id, Turn { at: Instant::now(), times: 0 });
        }
        loop {
            let holds = self.live_holds().await;
            self.warn(&holds, &mut warned);
            turns.retain(|id, _| holds.iter().any(|hold| hold.id == *id));
            for hold in &holds {
                let now = Instant::now();
                let turn = turns.entry(hold.id).or_insert(Turn { at: now + wait_of(hold, 0), times: 0 });
                if turn.at > now || !self.may_ask() {
                    continue;
                }
                let looked = self.look_at(hold).await;
                turn.times = turn.times.saturating_add(1);
                turn.at = Instant::now() + wait_of(hold, turn.times);
                let pause = match looked {
                    Ok(Look::Done) => PAUSE_MS,
                    Ok(Look::TurnedAway) => RESPITE_MS,
                    Err(error) => {
                        tracing::error!(%error, hold_id = %hold.id, "what was found could not be written");
                        RESPITE_MS
                    }
                };
                tokio::time::sleep(Duration::from_millis(pause)).await;
            }
            tokio::time::sleep(Duration::from_millis(ROUND_MS)).await;
        }
    }

    fn may_ask(&self) -> bool {
        self.account.estate().is_some()
            && !self.account.draining()
            && self.ledger.failure().is_none()
            && self.ledger.leads()
    }

    /// Doubts and open holds, the oldest first.
    async fn live_holds(&self) -> Vec<Hold> {
        let found = self.ledger.read(|reader| reader.unsettled_holds(HOLDS_MAX)).await;
        let mut holds = found.unwrap_or_else(|error| {
            tracing::error!(%error, "the holds cannot be read");
            Vec::new()
        });
        holds.sort_by_key(|hold| (hold.state != HoldState::Doubt, hold.since));
        holds
    }

    fn warn(&self, holds: &[Hold], warned: &mut Option<Instant>) {
        let doubts: Vec<&Hold> = holds.iter().filter(|hold| hold.state == HoldState::Doubt).collect();
        let oldest = doubts.iter().map(|hold| self.ledger.now().millis_since(hold.since)).max().unwrap_or(0);
        let is_due = warned.is_none_or(|at| at.elapsed() >= Duration::from_millis(WARN_EVERY_MS));
        if (doubts.len() >= DOUBTS_WARN || oldest >= DOUBT_AGE_WARN_MS) && is_due {
            *warned = Some(Instant::now());
            tracing::warn!(
                doubts = doubts.len(),
                oldest_seconds = oldest / 1_000,
                "money calls are in doubt and stay counted: see `keybrake holds list --state doubt`"
            );
        }
    }

    async fn look_at(&self, hold: &Hold) -> Result<Look, LedgerError> {
        match hold.state {
            HoldState::Doubt => self.look_for(hold).await,
            HoldState::Open => self.look_whether_over(hold).await,
            HoldState::Sending { .. } | HoldState::Spent | HoldState::Void => Ok(Look::Done),
        }
    }

    /// Looks for what a call in doubt has done.
    async fn look_for(&self, hold: &Hold) -> Result<Look, LedgerError> {
        let call = self.ledger.read(|reader| reader.call_by_id(hold.call_id)).await?;
        let Some((live, call)) = hold.live.as_ref().zip(call) else { return Ok(Look::Done) };
        let Some(attempt) = call.last_attempt() else { return Ok(Look::Done) };
        let lost = lost(live, attempt);
        match find::plan(&lost) {
            Err(why) => {
                self.ledger.note_search(hold.id, "nothing".to_owned(), why.to_owned()).await?;
                Ok(Look::Done)
            }
            Ok(Plan::Object { path, params }) => self.look_at_object(hold, &lost, path, params).await,
            Ok(Plan::List { path, params }) => self.look_through(hold, &call, &lost, path, params).await,
        }
    }

    async fn look_at_object(
        &self,
        hold: &Hold,
        lost: &Lost<'_>,
        path: String,
        params: Vec<(String, String)>,
    ) -> Result<Look, LedgerError> {
        let told = format!("GET {path}");
        let Some(answer) = self.read(lost.request, path, params).await else { return Ok(Look::TurnedAway) };
        let Some(money) = hold.money().filter(|_| answer.status == 200) else {
            self.ledger.note_search(hold.id, told, format!("answered {}", answer.status)).await?;
            return Ok(Look::Done);
        };
        match find::proof_of_object(lost, money, &answer.body) {
            Proof::Of(outcome, objects) => {
                self.end(hold, Known::Record(outcome), objects, &answer, "object").await?;
            }
            Proof::Over(record) => {
                let facts = hold.live.as_ref().map(|live| live.facts.clone()).unwrap_or_default();
                let object = hold.object_id.clone().unwrap_or_default();
                self.ledger.observe(hold.account.clone(), object, facts, record).await?;
                self.count("record");
            }
            Proof::None => {
                let came_to = "its object is as it can be without this call".to_owned();
                self.ledger.note_search(hold.id, told, came_to).await?;
            }
        }
        Ok(Look::Done)
    }

    /// Looks through a list for the object with the call's stamp.
    async fn look_through(
        &self,
        hold: &Hold,
        call: &Call,
        lost: &Lost<'_>,
        path: String,
        params: Vec<(String, String)>,
    ) -> Result<Look, LedgerError> {
        let filters: Vec<String> = params.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let told = format!("GET {path}?{}", filters.join("&"));
        let (mut after, mut pages) = (None, 0);
        let stamp = lost.stamp.unwrap_or_default();
        loop {
            let mut params = params.clone();
            params.extend(after.take().map(|id| ("starting_after".to_owned(), id)));
            let Some(answer) = self.read(lost.request, path.clone(), params).await else {
                return Ok(Look::TurnedAway);
            };
            pages += 1;
            let Some((found, next)) = find::in_page(&answer.body, stamp).filter(|_| answer.status == 200)
            else {
                self.ledger.note_search(hold.id, told, format!("answered {}", answer.status)).await?;
                return Ok(Look::Done);
            };
            if let Some(object) = found {
                return self.found(hold, lost, &object, &answer, &told).await;
            }
            after = next.filter(|_| pages < PAGES_MAX);
            if after.is_none() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(PAUSE_MS)).await;
        }
        let came_to = format!(
            "no object carries the stamp {stamp} in {pages} pages; that proves nothing (call {})",
            call.id
        );
        self.ledger.note_search(hold.id, told, came_to).await?;
        Ok(Look::Done)
    }

    async fn found(
        &self,
        hold: &Hold,
        lost: &Lost<'_>,
        object: &Value,
        answer: &Answer,
        told: &str,
    ) -> Result<Look, LedgerError> {
        let body = object.to_string().into_bytes();
        let is_ceiling = hold.is_ceiling;
        let rates = self.fx.table().at(self.ledger.now());
        let more = match find::besides(lost, &body) {
            None => None,
            Some(look) => {
                tokio::time::sleep(Duration::from_millis(PAUSE_MS)).await;
                match self.read(lost.request, look.path, look.params).await {
                    Some(more) => Some(more.body).filter(|_| more.status == 200),
                    None => return Ok(Look::TurnedAway),
                }
            }
        };
        let proof = hold
            .money()
            .map(|held| find::proof_of_stamped(lost, held, is_ceiling, &rates, &body, more.as_deref()));
        let Some(Proof::Of(outcome, objects)) = proof else {
            let came_to =
                "the object with the stamp was found, and says nothing that can be booked".to_owned();
            self.ledger.note_search(hold.id, told.to_owned(), came_to).await?;
            return Ok(Look::Done);
        };
        let answer = Answer { body: body.into(), ..answer.clone() };
        self.end(hold, Known::Record(outcome), objects, &answer, "stamp").await?;
        Ok(Look::Done)
    }

    /// Ends a doubt by what an object says, and keeps the object as the answer of its call.
    async fn end(
        &self,
        hold: &Hold,
        outcome: Known,
        objects: Vec<String>,
        answer: &Answer,
        by: &'static str,
    ) -> Result<(), LedgerError> {
        let mut evidence = Map::new();
        evidence.insert("found_by".to_owned(), Value::from(by));
        evidence.insert("object_id".to_owned(), objects.first().cloned().map_or(Value::Null, Value::from));
        let end = EndDoubt { outcome, objects, answer: Some(self.told(answer)), actor: None, evidence };
        match self.ledger.end_doubt(hold.id, end).await? {
            Ending::Ended => {
                tracing::info!(hold_id = %hold.id, call_id = %hold.call_id, by, "a doubt was settled by what Stripe tells");
                self.count("record");
            }
            Ending::NotInDoubt => {}
            Ending::OfAnother => {
                let came_to = "what was found belongs to another hold".to_owned();
                self.ledger.note_search(hold.id, by.to_owned(), came_to).await?;
            }
        }
        Ok(())
    }

    fn told(&self, answer: &Answer) -> StoredAnswer {
        let request_id = answer.headers.get("request-id").and_then(|value| value.to_str().ok());
        StoredAnswer {
            status: 200,
            content_type: "application/json".to_owned(),
            request_id: request_id.unwrap_or_default().to_owned(),
            body: secrets::without_client_secrets(&answer.body).into_owned(),
            at: self.ledger.now(),
        }
    }

    /// Looks whether an open object has come to its end.
    async fn look_whether_over(&self, hold: &Hold) -> Result<Look, LedgerError> {
        let mut names = hold.object_id.iter().chain(&hold.aliases);
        let Some((object, answers, path)) =
            names.find_map(|id| find::read_of(id).map(|(answers, path)| (id.clone(), answers, path)))
        else {
            return Ok(Look::Done);
        };
        let account = (!hold.account.is_empty()).then(|| hold.account.clone());
        let request = ExactRequest {
            method: "GET".to_owned(),
            path: path.clone(),
            params: Vec::new(),
            version: None,
            account,
            idempotency_key: None,
        };
        let Some(answer) = self.read(&request, path.clone(), Vec::new()).await else {
            return Ok(Look::TurnedAway);
        };
        let Some(currency) = hold.currency.filter(|_| answer.status == 200) else { return Ok(Look::Done) };
        let rates = self.fx.table().at(self.ledger.now());
        let record = match find::invoice_of(&object, &answer.body) {
            None => find::final_record(&object, answers, currency, &rates, &answer.body),
            Some(invoice) => {
                tokio::time::sleep(Duration::from_millis(PAUSE_MS)).await;
                let path = format!("/v1/invoices/{invoice}");
                let Some(paid) = self.read(&request, path, Vec::new()).await else {
                    return Ok(Look::TurnedAway);
                };
                // One that was void, or came to nothing as a draft, counts none of what was paid since.
                let of_invoice =
                    self.ledger.read(|reader| reader.hold_of_object(&hold.account, &invoice)).await?;
                let is_counted =
                    of_invoice.is_some_and(|hold| hold.state != HoldState::Void && hold.minor > 0);
                find::billed_item(&answer.body, &paid.body, currency, is_counted)
            }
        };
        if let Some(record) = record {
            let facts = Facts { method: "GET".to_owned(), endpoint: path, ..Facts::default() };
            self.ledger.observe(hold.account.clone(), object, facts, record).await?;
        }
        Ok(Look::Done)
    }

    /// One read; `None` when Stripe has to be left alone for a while.
    async fn read(
        &self,
        request: &ExactRequest,
        path: String,
        params: Vec<(String, String)>,
    ) -> Option<Answer> {
        let deadline = Instant::now() + Duration::from_millis(READ_TIMEOUT_MS);
        let read = FreeRequest::read(path, params, request.account.clone());
        match self.forwarder.send_free(&read, deadline).await {
            Sent::Answered(answer) if answer.status < 429 => Some(answer),
            Sent::Answered(_) | Sent::NotSent { .. } | Sent::Unknown { .. } => None,
        }
    }

    fn count(&self, by: &'static str) {
        self.metrics.doubts_settled.get_or_create(&EndLabels { by }).inc();
    }
}

fn lost<'a>(live: &'a LiveCall, attempt: &'a Attempt) -> Lost<'a> {
    Lost {
        request: &live.request,
        stamp: attempt.stamp.as_deref(),
        first_send: attempt.first_send,
        last_send: attempt.last_send,
    }
}

/// How long to wait before the next look: twice as long each time, within bounds.
fn wait_of(hold: &Hold, times: u32) -> Duration {
    let (first, last) = match hold.state {
        HoldState::Doubt => (DOUBT_FIRST_MS, DOUBT_LAST_MS),
        HoldState::Open | HoldState::Sending { .. } | HoldState::Spent | HoldState::Void => {
            (OPEN_FIRST_MS, OPEN_LAST_MS)
        }
    };
    Duration::from_millis(first.saturating_mul(1 << times.min(20)).min(last))
}
