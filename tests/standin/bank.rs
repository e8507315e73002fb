//! What happens at Stripe once the execution of a request begins, and the ledger of what really moved: the oracle.

use std::collections::VecDeque;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::errors::{self, Failure};
use super::form::Params;
use super::objects::{Charge, ChargeStatus, Customer, Decline, Intent, IntentStatus, Object, Refund, Shelf};
use super::orders::{Capture, Listing, NewRefund, Order, Sale, Which};
use super::stage::Stage;

/// Beyond this many the oldest movements are forgotten.
const EXECUTED_MAX: usize = 1_000_000;

/// What kind of money moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    /// Money in, at once: a captured charge, or an intent that succeeded.
    Charge,
    /// Money in, of an earlier authorization.
    Capture,
    /// Money out.
    Refund,
    /// A hold on the payer's card; of an increment only what it adds.
    Authorization,
}

/// One real movement of money. Replays and declines leave none.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Executed {
    /// From 1, without gaps.
    pub(crate) seq: u64,
    pub(crate) kind: Kind,
    /// The intent where there is one, else the charge; of a refund the refund.
    pub(crate) object_id: String,
    /// Minor units.
    pub(crate) amount: u64,
    pub(crate) currency: String,
    pub(crate) customer: Option<String>,
    pub(crate) idempotency_key: Option<String>,
    pub(crate) metadata: Map<String, Value>,
    /// `POST /v1/charges`, with `{id}` for an id; `settle` for the control endpoint.
    pub(crate) operation: String,
    pub(crate) account: String,
    /// Unix seconds of the stand-in's clock.
    pub(crate) at: u64,
}

/// Who asks, and when.
pub(crate) struct Context<'a> {
    pub(crate) account: &'a str,
    pub(crate) key: Option<&'a str>,
    pub(crate) operation: &'a str,
    /// Unix seconds.
    pub(crate) now: u64,
    /// A script wants the card declined.
    pub(crate) declined: bool,
}

/// How a payment method behaves.
pub(super) enum Card {
    Good,
    Declined(Decline),
    NeedsAction,
    Slow,
}

pub(super) const GENERIC: Decline =
    Decline { code: "card_declined", reason: "generic_decline", message: "Your card was declined." };
const NO_FUNDS: Decline = Decline {
    code: "card_declined",
    reason: "insufficient_funds",
    message: "Your card has insufficient funds.",
};
pub(super) const AUTHENTICATION: Decline = Decline {
    code: "authentication_required",
    reason: "authentication_required",
    message: "Your card was declined. This transaction requires authentication.",
};

/// The published test values; other ids of payment methods, cards, sources and tokens stand for cards that work.
pub(super) fn card(context: &Context<'_>, method: Option<&str>) -> Result<Card, Failure> {
    if context.declined {
        return Ok(Card::Declined(GENERIC));
    }
    Ok(match method {
        Some(
            "tok_chargeDeclined"
            | "tok_visa_chargeDeclined"
            | "pm_card_chargeDeclined"
            | "pm_card_visa_chargeDeclined",
        ) => Card::Declined(GENERIC),
        Some(
            "tok_chargeDeclinedInsufficientFunds"
            | "tok_visa_chargeDeclinedInsufficientFunds"
            | "pm_card_chargeDeclinedInsufficientFunds"
            | "pm_card_visa_chargeDeclinedInsufficientFunds",
        ) => Card::Declined(NO_FUNDS),
        Some("pm_card_authenticationRequired") => Card::NeedsAction,
        Some("pm_usBankAccount_processing") => Card::Slow,
        // A customer's own card.
        None => Card::Good,
        Some(id) => {
            if !["tok_", "pm_", "card_", "src_"].iter().any(|prefix| id.starts_with(prefix)) {
                return Err(errors::no_such("PaymentMethod", id, 400, "payment_method"));
            }
            Card::Good
        }
    })
}

#[derive(Debug)]
pub(crate) struct Bank {
    pub(super) livemode: bool,
    salt: String,
    next: u64,
    pub(super) charges: Shelf<Charge>,
    pub(super) intents: Shelf<Intent>,
    refunds: Shelf<Refund>,
    customers: Shelf<Customer>,
    executed: VecDeque<Executed>,
    moves: u64,
    pub(super) stage: Stage,
}

impl Bank {
    /// The salt keeps the ids of two stand-ins apart, so that a ledger that outlives one is not confused by the next.
    pub(crate) fn new(livemode: bool, salt: String) -> Self {
        Self {
            livemode,
            salt,
            next: 0,
            charges: Shelf::default(),
            intents: Shelf::default(),
            refunds: Shelf::default(),
            customers: Shelf::default(),
            executed: VecDeque::new(),
            moves: 0,
            stage: Stage::default(),
        }
    }

    /// Movements after number `since`.
    pub(crate) fn executed(&self, since: u64) -> Vec<Executed> {
        self.executed.iter().filter(|entry| entry.seq > since).cloned().collect()
    }

    pub(crate) fn moves(&self) -> u64 {
        self.moves
    }

    /// Forgets all objects and movements. Ids go on: none is given twice.
    pub(crate) fn clear(&mut self) {
        let next = self.next;
        *self = Self::new(self.livemode, std::mem::take(&mut self.salt));
        self.next = next;
    }

    pub(crate) fn id(&mut self, prefix: &str) -> String {
        self.next += 1;
        format!("{prefix}_{}{:012}", self.salt, self.next)
    }

    pub(crate) fn execute(
        &mut self,
        context: &Context<'_>,
        id: &str,
        order: Order,
        params: &Params,
    ) -> Result<Value, Failure> {
        match order {
            Order::Charge(sale) => self.charge(context, sale),
            Order::CaptureCharge { amount } => self.capture_charge(context, id, amount),
            Order::Intent { sale, confirm } => {
                let id = self.create(context, sale);
                match confirm {
                    None => Ok(self.intent(&id, params)),
                    Some(how) => self.confirm(context, &id, how).map(|()| self.intent(&id, params)),
                }
            }
            Order::UpdateIntent(update) => self.update(context, id, update).map(|()| self.intent(id, params)),
            Order::ConfirmIntent(how) => self.confirm(context, id, how).map(|()| self.intent(id, params)),
            Order::CaptureIntent { amount, last, metadata } => {
                self.capture_intent(context, id, amount, last, metadata).map(|()| self.intent(id, params))
            }
            Order::CancelIntent { reason } => {
                self.cancel(context, id, reason).map(|()| self.intent(id, params))
            }
            Order::Increment { amount, description, metadata } => {
                self.increment(context, id, amount, description, metadata).map(|()| self.intent(id, params))
            }
            Order::Refund(refund) => self.refund(context, refund),
            Order::Customer(fields) => {
                let id = self.id("cus");
                let (account, created) = (context.account.to_owned(), context.now);
                let customer = Customer { id, account, created, fields };
                let answer = customer.json(self.livemode);
                self.customers.put(customer);
                Ok(answer)
            }
            Order::Account => Ok(account(context.account)),
            Order::Balance => Ok(self.balance()),
            Order::Retrieve(which) => self.retrieve(context.account, which, id, params),
            Order::List(which, listing) => self.list(context.account, which, &listing, params),
            Order::Perform => self.perform(context, id, params),
            Order::Recall => self.recall(id),
        }
    }

    // === Reads ===

    fn retrieve(&self, account: &str, which: Which, id: &str, params: &Params) -> Result<Value, Failure> {
        match which {
            Which::Charge => Ok(self.charges.of(account, id)?.json(self.livemode)),
            Which::Intent => self.intents.of(account, id).map(|_| self.intent(id, params)),
            Which::Refund => Ok(self.refunds.of(account, id)?.json(self.livemode)),
            Which::Customer => Ok(self.customers.of(account, id)?.json(self.livemode)),
        }
    }

    fn balance(&self) -> Value {
        json!({
            "object": "balance",
            "available": [{"amount": 0, "currency": "usd", "source_types": {"card": 0}}],
            "livemode": self.livemode,
            "pending": [{"amount": 0, "currency": "usd", "source_types": {"card": 0}}],
        })
    }

    fn list(
        &self,
        account: &str,
        which: Which,
        listing: &Listing,
        params: &Params,
    ) -> Result<Value, Failure> {
        let embed = params.expands("data.latest_charge");
        match which {
            Which::Intent => page(&self.intents, account, listing, |intent| self.embed(intent, embed)),
            Which::Charge => page(&self.charges, account, listing, |one| one.json(self.livemode)),
            Which::Refund => page(&self.refunds, account, listing, |one| one.json(self.livemode)),
            Which::Customer => page(&self.customers, account, listing, |one| one.json(self.livemode)),
        }
    }

    fn intent(&self, id: &str, params: &Params) -> Value {
        let embed = params.expands("latest_charge");
        self.intents.find(id).map_or(Value::Null, |intent| self.embed(intent, embed))
    }

    fn embed(&self, intent: &Intent, embed: bool) -> Value {
        let mut answer = intent.json(self.livemode);
        if embed && let Some(charge) = intent.latest_charge.as_ref().and_then(|id| self.charges.find(id)) {
            answer["latest_charge"] = charge.json(self.livemode);
        }
        answer
    }

    // === Charges ===

    fn charge(&mut self, context: &Context<'_>, sale: Sale) -> Result<Value, Failure> {
        let card = card(context, sale.method.as_deref())?;
        let now = sale.capture == Capture::Now;
        let mut charge = self.draft(context, sale, None);
        match card {
            // This endpoint cannot ask for an action; it declines.
            Card::NeedsAction => Err(self.decline(charge, AUTHENTICATION)),
            Card::Declined(decline) => Err(self.decline(charge, decline)),
            Card::Slow => {
                charge.status = ChargeStatus::Pending;
                charge.captured = now;
                let answer = charge.json(self.livemode);
                self.charges.put(charge);
                Ok(answer)
            }
            Card::Good => {
                charge.captured = now;
                charge.amount_captured = if now { charge.amount } else { 0 };
                let kind = if now { Kind::Charge } else { Kind::Authorization };
                self.moved(context, of_charge(kind, charge.amount, &charge));
                let answer = charge.json(self.livemode);
                self.charges.put(charge);
                Ok(answer)
            }
        }
    }

    /// A declined charge is recorded too: Stripe lists it as failed.
    pub(super) fn decline(&mut self, mut charge: Charge, decline: Decline) -> Failure {
        charge.status = ChargeStatus::Failed;
        charge.decline = Some(decline);
        charge.captured = false;
        let failure = decline.failure(&charge.id);
        self.charges.put(charge);
        failure
    }

    pub(super) fn draft(&mut self, context: &Context<'_>, sale: Sale, intent: Option<String>) -> Charge {
        Charge {
            id: self.id("ch"),
            account: context.account.to_owned(),
            created: context.now,
            amount: sale.amount,
            amount_captured: 0,
            amount_refunded: 0,
            captured: false,
            currency: sale.currency,
            customer: sale.customer,
            description: sale.description,
            metadata: sale.metadata,
            intent,
            method: sale.method,
            status: ChargeStatus::Succeeded,
            decline: None,
        }
    }

    fn capture_charge(
        &mut self,
        context: &Context<'_>,
        id: &str,
        amount: Option<u64>,
    ) -> Result<Value, Failure> {
        let mut charge = self.charges.of(context.account, id)?;
        if charge.captured {
            let message = format!("Charge {id} has already been captured.");
            return Err(Failure::invalid(message).code("charge_already_captured"));
        }
        if charge.intent.is_some() || charge.status != ChargeStatus::Succeeded || charge.amount_refunded > 0 {
            return Err(Failure::invalid(format!("Charge {id} cannot be captured.")));
        }
        let amount = amount.unwrap_or(charge.amount);
        if amount > charge.amount {
            let message = "You cannot capture a charge for an amount greater than it already has.";
            return Err(Failure::invalid(message).param("amount"));
        }
        charge.captured = true;
        charge.amount_captured = amount;
        // What is not captured goes back to the payer.
        charge.amount_refunded = charge.amount - amount;
        self.moved(context, of_charge(Kind::Capture, amount, &charge));
        let answer = charge.json(self.livemode);
        self.charges.put(charge);
        Ok(answer)
    }

    // === Refunds ===

    fn refund(&mut self, context: &Context<'_>, new: NewRefund) -> Result<Value, Failure> {
        let charge = match (&new.charge, &new.intent) {
            (Some(charge), _) => charge.clone(),
            (None, Some(intent)) => {
                self.intents.of(context.account, intent)?.latest_charge.ok_or_else(|| {
                    let message =
                        format!("This PaymentIntent ({intent}) does not have a successful charge to refund.");
                    Failure::invalid(message)
                })?
            }
            (None, None) => return Err(errors::missing("charge")),
        };
        let mut charge = self.charges.of(context.account, &charge)?;
        let id = charge.id.clone();
        if charge.status != ChargeStatus::Succeeded || new.intent.is_some() && new.intent != charge.intent {
            return Err(Failure::invalid(format!("Charge {id} cannot be refunded.")));
        }
        if charge.captured && self.capturable(&charge) {
            return Err(Failure::invalid(
                "A charge that is still being captured in parts cannot be refunded.",
            ));
        }
        let rest = charge.amount - charge.amount_refunded;
        if rest == 0 {
            let message = format!("Charge {id} has already been refunded.");
            return Err(Failure::invalid(message).code("charge_already_refunded"));
        }
        let amount = new.amount.unwrap_or(rest);
        if amount > rest {
            let (asked, rest) = (dollars(amount), dollars(rest));
            let message =
                format!("Refund amount ({asked}) is greater than unrefunded amount on charge ({rest})");
            return Err(Failure::invalid(message).param("amount"));
        }
        if !charge.captured && amount < rest {
            return Err(Failure::invalid("You cannot partially refund an uncaptured charge.").param("amount"));
        }
        charge.amount_refunded += amount;
        let refund = Refund {
            id: self.id("re"),
            account: context.account.to_owned(),
            created: context.now,
            amount,
            currency: charge.currency.clone(),
            charge: id,
            intent: charge.intent.clone(),
            reason: new.reason,
            metadata: new.metadata,
        };
        // Letting go of a hold is no money out.
        if charge.captured {
            let movement = Movement {
                kind: Kind::Refund,
                object_id: refund.id.clone(),
                amount,
                currency: refund.currency.clone(),
                customer: charge.customer.clone(),
                metadata: refund.metadata.clone(),
            };
            self.moved(context, movement);
        }
        let answer = refund.json(self.livemode);
        self.charges.put(charge);
        self.refunds.put(refund);
        Ok(answer)
    }

    fn capturable(&self, charge: &Charge) -> bool {
        let intent = charge.intent.as_ref().and_then(|id| self.intents.find(id));
        intent.is_some_and(|intent| intent.status == IntentStatus::RequiresCapture)
    }

    /// Writes the oracle.
    pub(super) fn moved(&mut self, context: &Context<'_>, movement: Movement) {
        self.moves += 1;
        self.executed.push_back(Executed {
            seq: self.moves,
            kind: movement.kind,
            object_id: movement.object_id,
            amount: movement.amount,
            currency: movement.currency,
            customer: movement.customer,
            idempotency_key: context.key.map(str::to_owned),
            metadata: movement.metadata,
            operation: context.operation.to_owned(),
            account: context.account.to_owned(),
            at: context.now,
        });
        if self.executed.len() > EXECUTED_MAX {
            self.executed.pop_front();
        }
    }
}

pub(super) struct Movement {
    pub(super) kind: Kind,
    pub(super) object_id: String,
    pub(super) amount: u64,
    pub(super) currency: String,
    pub(super) customer: Option<String>,
    pub(super) metadata: Map<String, Value>,
}

fn of_charge(kind: Kind, amount: u64, charge: &Charge) -> Movement {
    Movement {
        kind,
        object_id: charge.id.clone(),
        amount,
        currency: charge.currency.clone(),
        customer: charge.customer.clone(),
        metadata: charge.metadata.clone(),
    }
}

fn page<T: Object + Clone>(
    shelf: &Shelf<T>,
    account: &str,
    listing: &Listing,
    json: impl Fn(&T) -> Value,
) -> Result<Value, Failure> {
    let (page, more) = shelf.page(account, listing)?;
    let data: Vec<Value> = page.into_iter().map(json).collect();
    Ok(json!({"object": "list", "data": data, "has_more": more, "url": T::URL}))
}

/// An account does not tell its mode.
fn account(id: &str) -> Value {
    json!({
        "id": id,
        "object": "account",
        "business_type": "company",
        "capabilities": {"card_payments": "active", "transfers": "active"},
        "charges_enabled": true,
        "country": "US",
        "default_currency": "usd",
        "details_submitted": true,
        "email": "standin@example.com",
        "metadata": {},
        "payouts_enabled": true,
        "type": "standard",
    })
}

fn dollars(amount: u64) -> String {
    format!("${}.{:02}", amount / 100, amount % 100)
}
