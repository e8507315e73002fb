//! Payment intents: what a confirm, a capture, a cancel and a later settlement do to them.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::bank::{self, Bank, Card, Context, Kind, Movement};
use super::errors::Failure;
use super::objects::{Charge, ChargeStatus, Decline, Intent, IntentStatus, Object};
use super::orders::{Capture, Confirmation, Sale, Update};

const CONFIRMABLE: [IntentStatus; 3] =
    [IntentStatus::RequiresPaymentMethod, IntentStatus::RequiresConfirmation, IntentStatus::RequiresAction];
const CANCELABLE: [IntentStatus; 5] = [
    IntentStatus::RequiresPaymentMethod,
    IntentStatus::RequiresCapture,
    IntentStatus::RequiresConfirmation,
    IntentStatus::RequiresAction,
    IntentStatus::Processing,
];

/// Where the control endpoint moves an intent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Settlement {
    Succeeded,
    Failed,
    Canceled,
}

impl Bank {
    pub(super) fn create(&mut self, context: &Context<'_>, sale: Sale) -> String {
        let id = self.id("pi");
        let secret = URL_SAFE_NO_PAD.encode(Sha256::digest(id.as_bytes()));
        self.intents.put(Intent {
            client_secret: format!("{id}_secret_{secret}"),
            id: id.clone(),
            account: context.account.to_owned(),
            created: context.now,
            amount: sale.amount,
            amount_capturable: 0,
            amount_received: 0,
            capture: sale.capture,
            currency: sale.currency,
            customer: sale.customer,
            description: sale.description,
            metadata: sale.metadata,
            status: waiting(sale.method.as_ref()),
            method: sale.method,
            latest_charge: None,
            last_error: Value::Null,
            canceled_at: None,
            cancel_reason: None,
            key: context.key.map(str::to_owned),
        });
        id
    }

    pub(super) fn update(&mut self, context: &Context<'_>, id: &str, update: Update) -> Result<(), Failure> {
        let mut intent = self.intents.of(context.account, id)?;
        if !CONFIRMABLE.contains(&intent.status) {
            return Err(self.unexpected(
                &intent,
                "This PaymentIntent could not be updated",
                "updated",
                &CONFIRMABLE,
            ));
        }
        intent.amount = update.amount.unwrap_or(intent.amount);
        intent.currency = update.currency.unwrap_or(intent.currency);
        intent.customer = update.customer.or(intent.customer);
        intent.description = update.description.or(intent.description);
        merge(&mut intent.metadata, update.metadata);
        if update.method.is_some() {
            intent.method = update.method;
            intent.status = waiting(intent.method.as_ref());
        }
        self.intents.put(intent);
        Ok(())
    }

    pub(super) fn confirm(
        &mut self,
        context: &Context<'_>,
        id: &str,
        how: Confirmation,
    ) -> Result<(), Failure> {
        let mut intent = self.intents.of(context.account, id)?;
        if intent.status == IntentStatus::Succeeded {
            let message = "You cannot confirm this PaymentIntent because it has already succeeded after being \
                           previously confirmed.";
            return Err(self.state_failure(&intent, message));
        }
        if !CONFIRMABLE.contains(&intent.status) {
            return Err(self.unexpected(
                &intent,
                "You cannot confirm this PaymentIntent",
                "confirmed",
                &CONFIRMABLE,
            ));
        }
        if how.amount.is_some_and(|amount| amount != intent.amount) {
            let message = "The amount_to_confirm is not the amount of this PaymentIntent.";
            return Err(Failure::invalid(message).param("amount_to_confirm"));
        }
        intent.method = how.method.or(intent.method);
        if intent.method.is_none() {
            let message = "You cannot confirm this PaymentIntent because it's missing a payment method. You can \
                           either update the PaymentIntent with a payment method and then confirm it again, or \
                           confirm it again directly with a payment method or ConfirmationToken.";
            return Err(self.state_failure(&intent, message));
        }
        intent.capture = how.capture.unwrap_or(intent.capture);
        intent.key = context.key.map(str::to_owned);
        match bank::card(context, intent.method.as_deref())? {
            Card::NeedsAction if !how.refuse_action => {
                intent.status = IntentStatus::RequiresAction;
                self.intents.put(intent);
                Ok(())
            }
            Card::NeedsAction => Err(self.refuse(context, intent, bank::AUTHENTICATION)),
            Card::Declined(decline) => Err(self.refuse(context, intent, decline)),
            Card::Slow => {
                let mut charge = self.attempt(context, &intent);
                charge.status = ChargeStatus::Pending;
                charge.captured = intent.capture == Capture::Now;
                intent.latest_charge = Some(charge.id.clone());
                intent.status = IntentStatus::Processing;
                self.charges.put(charge);
                self.intents.put(intent);
                Ok(())
            }
            Card::Good => {
                let charge = self.attempt(context, &intent);
                self.approve(context, intent, charge);
                Ok(())
            }
        }
    }

    pub(super) fn capture_intent(
        &mut self,
        context: &Context<'_>,
        id: &str,
        amount: Option<u64>,
        last: bool,
        metadata: Map<String, Value>,
    ) -> Result<(), Failure> {
        let mut intent = self.intents.of(context.account, id)?;
        if intent.status == IntentStatus::Succeeded {
            let message = "This PaymentIntent could not be captured because it has already been captured.";
            return Err(self.state_failure(&intent, message));
        }
        if intent.status != IntentStatus::RequiresCapture {
            let (message, allowed) =
                ("This PaymentIntent could not be captured", [IntentStatus::RequiresCapture]);
            return Err(self.unexpected(&intent, message, "captured", &allowed));
        }
        let amount = amount.unwrap_or(intent.amount_capturable);
        if amount > intent.amount_capturable {
            let message = "The amount_to_capture is greater than the amount that can be captured.";
            return Err(Failure::invalid(message).code("amount_too_large").param("amount_to_capture"));
        }
        merge(&mut intent.metadata, metadata);
        self.take(context, intent, amount, last);
        Ok(())
    }

    pub(super) fn cancel(
        &mut self,
        context: &Context<'_>,
        id: &str,
        reason: Option<String>,
    ) -> Result<(), Failure> {
        let mut intent = self.intents.of(context.account, id)?;
        if !CANCELABLE.contains(&intent.status) {
            return Err(self.unexpected(
                &intent,
                "You cannot cancel this PaymentIntent",
                "canceled",
                &CANCELABLE,
            ));
        }
        if let Some(mut charge) = self.latest_charge(&intent) {
            match charge.status {
                // The hold goes back to the payer.
                ChargeStatus::Succeeded => charge.amount_refunded = charge.amount - charge.amount_captured,
                ChargeStatus::Pending | ChargeStatus::Failed => charge.status = ChargeStatus::Failed,
            }
            self.charges.put(charge);
        }
        intent.status = IntentStatus::Canceled;
        intent.amount_capturable = 0;
        intent.canceled_at = Some(context.now);
        intent.cancel_reason = reason;
        self.intents.put(intent);
        Ok(())
    }

    pub(super) fn increment(
        &mut self,
        context: &Context<'_>,
        id: &str,
        amount: u64,
        description: Option<String>,
        metadata: Map<String, Value>,
    ) -> Result<(), Failure> {
        let mut intent = self.intents.of(context.account, id)?;
        if intent.status != IntentStatus::RequiresCapture {
            let allowed = [IntentStatus::RequiresCapture];
            return Err(self.unexpected(
                &intent,
                "You cannot increment this PaymentIntent",
                "incremented",
                &allowed,
            ));
        }
        // The amount is the new total, not what is added.
        let Some(added) = amount.checked_sub(intent.amount).filter(|added| *added > 0) else {
            let message = "The amount must be greater than the currently authorized amount.";
            return Err(Failure::invalid(message).param("amount"));
        };
        if context.declined {
            let id = intent.latest_charge.clone().unwrap_or_default();
            return Err(bank::GENERIC.failure(&id).with("payment_intent", intent.json(self.livemode)));
        }
        intent.amount = amount;
        intent.amount_capturable += added;
        intent.description = description.or(intent.description);
        merge(&mut intent.metadata, metadata);
        if let Some(mut charge) = self.latest_charge(&intent) {
            charge.amount = amount;
            self.charges.put(charge);
        }
        self.moved(context, of_intent(Kind::Authorization, added, &intent));
        self.intents.put(intent);
        Ok(())
    }

    /// What happens outside of any request: a payer acts, a bank answers, an intent lapses.
    pub(crate) fn settle(&mut self, id: &str, to: Settlement, now: u64) -> Result<(), String> {
        let Some(intent) = self.intents.find(id).cloned() else { return Err(format!("no intent {id}")) };
        if !CANCELABLE.contains(&intent.status) {
            return Err(format!("intent {id} is {}, which is final", intent.status.name()));
        }
        let (account, key) = (intent.account.clone(), intent.key.clone());
        let context =
            Context { account: &account, key: key.as_deref(), operation: "settle", now, declined: false };
        match (to, self.latest_charge(&intent)) {
            (Settlement::Succeeded, _) if intent.status == IntentStatus::RequiresCapture => {
                let amount = intent.amount_capturable;
                self.take(&context, intent, amount, true);
            }
            (Settlement::Succeeded, Some(charge)) if charge.status == ChargeStatus::Pending => {
                self.approve(&context, intent, charge);
            }
            (Settlement::Succeeded, _) => {
                let charge = self.attempt(&context, &intent);
                self.approve(&context, intent, charge);
            }
            (Settlement::Failed, _) => {
                self.refuse(&context, intent, bank::GENERIC);
            }
            (Settlement::Canceled, _) => {
                let reason = Some("automatic".to_owned());
                self.cancel(&context, id, reason).map_err(|_| format!("intent {id} cannot be canceled"))?;
            }
        }
        Ok(())
    }

    fn attempt(&mut self, context: &Context<'_>, intent: &Intent) -> Charge {
        let sale = Sale {
            amount: intent.amount,
            currency: intent.currency.clone(),
            customer: intent.customer.clone(),
            description: intent.description.clone(),
            metadata: intent.metadata.clone(),
            method: intent.method.clone(),
            capture: intent.capture,
        };
        self.draft(context, sale, Some(intent.id.clone()))
    }

    fn latest_charge(&self, intent: &Intent) -> Option<Charge> {
        intent.latest_charge.as_ref().and_then(|id| self.charges.find(id)).cloned()
    }

    /// The card says yes: the money is taken, or held for a capture.
    fn approve(&mut self, context: &Context<'_>, mut intent: Intent, mut charge: Charge) {
        charge.status = ChargeStatus::Succeeded;
        intent.latest_charge = Some(charge.id.clone());
        intent.last_error = Value::Null;
        let kind = match intent.capture {
            Capture::Now => {
                charge.captured = true;
                charge.amount_captured = charge.amount;
                intent.amount_received = charge.amount;
                intent.status = IntentStatus::Succeeded;
                Kind::Charge
            }
            Capture::Later => {
                charge.captured = false;
                intent.amount_capturable = charge.amount;
                intent.status = IntentStatus::RequiresCapture;
                Kind::Authorization
            }
        };
        self.moved(context, of_intent(kind, charge.amount, &intent));
        self.charges.put(charge);
        self.intents.put(intent);
    }

    /// Takes held money. After the last capture the rest of the hold goes back to the payer.
    fn take(&mut self, context: &Context<'_>, mut intent: Intent, amount: u64, last: bool) {
        intent.amount_received += amount;
        intent.amount_capturable -= amount;
        if last || intent.amount_capturable == 0 {
            intent.amount_capturable = 0;
            intent.status = IntentStatus::Succeeded;
        }
        if let Some(mut charge) = self.latest_charge(&intent) {
            charge.captured = true;
            charge.amount_captured = intent.amount_received;
            charge.amount_refunded = charge.amount - intent.amount_received - intent.amount_capturable;
            self.charges.put(charge);
        }
        self.moved(context, of_intent(Kind::Capture, amount, &intent));
        self.intents.put(intent);
    }

    /// The card says no: a failed charge, and an intent that wants another payment method.
    fn refuse(&mut self, context: &Context<'_>, mut intent: Intent, decline: Decline) -> Failure {
        let earlier = self.latest_charge(&intent).filter(|charge| charge.status != ChargeStatus::Failed);
        let charge = earlier.unwrap_or_else(|| self.attempt(context, &intent));
        intent.latest_charge = Some(charge.id.clone());
        let method = json!({"id": intent.method.take(), "object": "payment_method", "type": "card"});
        let failure = self.decline(charge, decline).with("payment_method", method);
        intent.last_error = failure.fields();
        intent.amount_capturable = 0;
        intent.status = IntentStatus::RequiresPaymentMethod;
        let failure = failure.with("payment_intent", intent.json(self.livemode));
        self.intents.put(intent);
        failure
    }

    fn unexpected(&self, intent: &Intent, start: &str, verb: &str, allowed: &[IntentStatus]) -> Failure {
        let allowed: Vec<&str> = allowed.iter().map(|status| status.name()).collect();
        let message = format!(
            "{start} because it has a status of {}. Only a PaymentIntent with one of the following statuses may be \
             {verb}: {}.",
            intent.status.name(),
            allowed.join(", ")
        );
        self.state_failure(intent, &message)
    }

    fn state_failure(&self, intent: &Intent, message: &str) -> Failure {
        Failure::invalid(message)
            .code("payment_intent_unexpected_state")
            .with("payment_intent", intent.json(self.livemode))
    }
}

fn waiting(method: Option<&String>) -> IntentStatus {
    if method.is_some() { IntentStatus::RequiresConfirmation } else { IntentStatus::RequiresPaymentMethod }
}

/// An empty value removes a key, as everywhere in the metadata of Stripe.
fn merge(metadata: &mut Map<String, Value>, update: Map<String, Value>) {
    for (name, value) in update {
        if value == "" {
            metadata.shift_remove(&name);
        } else {
            metadata.insert(name, value);
        }
    }
}

fn of_intent(kind: Kind, amount: u64, intent: &Intent) -> Movement {
    Movement {
        kind,
        object_id: intent.id.clone(),
        amount,
        currency: intent.currency.clone(),
        customer: intent.customer.clone(),
        metadata: intent.metadata.clone(),
    }
}
