//! Each fault of the stand-in against each kind of call, through the real program: what the caller is told, what the
//! ledger holds, what recovery makes of it, and what the same call comes to then.
//!
//! Nothing here says what should come out of a cell: what came out is written as the table "What each fault comes to" of
//! the README, and another table than that one fails. What must hold of every cell is asserted apart: Stripe executes it
//! once at most, and what it moved is counted from the moment that it moved. `UPDATE_EXPECT=1` rewrites the table.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio::time::{Duration, Instant, sleep};

use crate::families::{elsewhere_by, invoice};
use crate::standin::Standin;
use crate::standin::bank::{Executed, Kind};
use crate::standin::faults::{Fault, On};
use crate::standin::stage::Play;
use crate::support::{PATIENCE, Reply, STRIPE_KEY, Sidecar, client, world_with};

/// What a request to Stripe may take where the fault is that it takes longer.
const DEADLINE_MS: &str = "1500";
/// Longer than that, and over before recovery looks, three seconds after the deadline.
const LATE_MS: u64 = 2_500;
/// Longer than any test.
const NEVER_MS: u64 = 600_000;

/// A kind of call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Charge,
    Intent,
    Confirm,
    Capture,
    Invoice,
    Subscription,
    Refund,
    Customer,
    Read,
}

impl Class {
    const ALL: [Self; 9] = [
        Self::Charge,
        Self::Intent,
        Self::Confirm,
        Self::Capture,
        Self::Invoice,
        Self::Subscription,
        Self::Refund,
        Self::Customer,
        Self::Read,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Charge => "charge",
            Self::Intent => "intent",
            Self::Confirm => "confirm",
            Self::Capture => "capture",
            Self::Invoice => "invoice",
            Self::Subscription => "subscription",
            Self::Refund => "refund",
            Self::Customer => "customer",
            Self::Read => "read",
        }
    }

    fn endpoint(self) -> &'static str {
        match self {
            Self::Charge => "POST /v1/charges",
            Self::Intent => "POST /v1/payment_intents",
            Self::Confirm => "POST /v1/payment_intents/{id}/confirm",
            Self::Capture => "POST /v1/payment_intents/{id}/capture",
            Self::Invoice => "POST /v1/invoices/{id}/pay",
            Self::Subscription => "POST /v1/subscriptions",
            Self::Refund => "POST /v1/refunds",
            Self::Customer => "POST /v1/customers",
            Self::Read => "GET /v1/charges/{id}",
        }
    }

    /// What its money is known by at Stripe; what is there before has another.
    fn customer(self) -> String {
        format!("cus_{}", self.name())
    }

    fn moves_money(self) -> bool {
        !matches!(self, Self::Customer | Self::Read)
    }

    /// Whether a card is asked.
    fn can_be_declined(self) -> bool {
        self.moves_money() && !matches!(self, Self::Capture | Self::Refund)
    }
}

fn answer(status: u16, message: &str) -> Fault {
    let body = json!({"error": {"type": "invalid_request_error", "message": message}});
    Fault::Answer { status, body, headers: BTreeMap::new() }
}

/// Every fault, after none at all.
fn faults() -> Vec<Option<Fault>> {
    let faults = [
        Fault::DropBefore,
        Fault::Reset,
        Fault::DropAfter,
        Fault::ResetAfter,
        Fault::HalfBody,
        Fault::Garbage,
        Fault::SlowAfterMs(NEVER_MS),
        Fault::HoldAfter,
        Fault::SlowMs(LATE_MS),
        Fault::Hold,
        Fault::Status500After,
        Fault::Status500Before,
        Fault::Status424,
        Fault::Conflict409,
        Fault::RateLimited,
        Fault::LockTimeout,
        answer(400, "Received unknown parameter"),
        answer(401, "Invalid API Key provided"),
        Fault::Decline,
    ];
    [None].into_iter().chain(faults.into_iter().map(Some)).collect()
}

fn name(fault: Option<&Fault>) -> String {
    let Some(fault) = fault else { return "none".to_owned() };
    match fault {
        Fault::DropBefore => "closed, not executed",
        Fault::DropAfter => "closed, executed",
        Fault::Status500After => "500, executed",
        Fault::Status500Before => "500, not executed",
        Fault::Decline => "402, declined",
        Fault::RateLimited => "429, rate limit",
        Fault::LockTimeout => "429, object locked",
        Fault::SlowMs(_) => "executed late",
        Fault::SlowAfterMs(_) => "answered late",
        Fault::HalfBody => "half an answer",
        Fault::Garbage => "a 200 that is no JSON",
        Fault::Reset => "reset, not executed",
        Fault::ResetAfter => "reset, executed",
        Fault::Hold => "still under way",
        Fault::HoldAfter => "never answered",
        Fault::Conflict409 => "409, key in use",
        Fault::Status424 => "424, not executed",
        Fault::Answer { status, .. } => return format!("{status}, not executed"),
    }
    .to_owned()
}

/// Whether the deadline has to pass for it.
fn is_late(fault: Option<&Fault>) -> bool {
    matches!(fault, Some(Fault::SlowMs(_) | Fault::SlowAfterMs(_) | Fault::Hold | Fault::HoldAfter))
}

/// What a key counts, in cents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counted {
    spent: u64,
    held: u64,
    doubt: u64,
}

struct World {
    fault: String,
    standin: Standin,
    sidecar: Sidecar,
    /// Straight to the stand-in.
    http: reqwest::Client,
}

type Form = Vec<(String, String)>;

/// One call under a vault key of its own.
struct Cell {
    world: Arc<World>,
    class: Class,
    key: String,
    key_id: String,
    path: String,
    form: Form,
}

/// What came of it, as the table tells it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Told {
    seen: String,
    ledger: String,
    recovery: String,
    again: String,
    executed: String,
}

impl Cell {
    async fn new(world: Arc<World>, class: Class) -> Self {
        let mut policy = json!({"allowed_endpoints": [class.endpoint()], "daily_usd_out_cap": "50.00"});
        if class == Class::Subscription {
            policy["max_usd_per_request"] = json!("40.00");
        }
        let (key, key_id) = world.sidecar.mint("50.00", policy).await;
        let (path, form) = request(&world.http, &world.standin, class).await;
        Self { world, class, key, key_id, path, form }
    }

    fn standin(&self) -> &Standin {
        &self.world.standin
    }

    fn sidecar(&self) -> &Sidecar {
        &self.world.sidecar
    }

    fn script(&self, fault: Fault) {
        let on = match self.class {
            Class::Read => On::Path { method: "GET".to_owned(), prefix: self.path.clone() },
            Class::Charge
            | Class::Intent
            | Class::Confirm
            | Class::Capture
            | Class::Invoice
            | Class::Subscription
            | Class::Refund
            | Class::Customer => On::IdempotencyKey(self.class.name().to_owned()),
        };
        self.standin().fault(fault.on(on));
    }

    async fn send(&self) -> Reply {
        let (method, _) = self.class.endpoint().split_once(' ').unwrap();
        let form: Vec<_> = self.form.iter().map(|(name, value)| (&**name, &**value)).collect();
        let headers = [("idempotency-key", self.class.name())];
        let headers = if method == "POST" { &headers[..] } else { &[] };
        self.sidecar().call(method, &self.path, &self.key, headers, &form).await
    }

    /// How often it was sent, under whatever key.
    fn sends(&self) -> usize {
        let (method, _) = self.class.endpoint().split_once(' ').unwrap();
        let all = self.standin().requests();
        all.iter().filter(|seen| seen.method == method && seen.path == self.path).count()
    }

    /// What it has moved at Stripe, under whatever key: how often, and how many cents.
    fn moved(&self) -> (usize, u64) {
        let customer = self.class.customer();
        let is_own = |one: &&Executed| match one.kind {
            Kind::Authorization => false,
            Kind::Refund => self.class == Class::Refund,
            Kind::Charge | Kind::Capture => one.customer.as_deref() == Some(&customer),
        };
        let all = self.standin().executed();
        all.iter().filter(is_own).fold((0, 0), |(times, cents), one| (times + 1, cents + one.amount))
    }

    async fn counted(&self) -> Counted {
        let today = self.sidecar().key(&self.key_id).await["spend"]["today"].clone();
        let lane = if self.class == Class::Refund { &today["out"] } else { &today };
        let cents = |field: &str| lane[field].as_str().unwrap().replace('.', "").parse().unwrap();
        Counted { spent: cents("spent"), held: cents("held"), doubt: cents("doubt") }
    }

    /// What the ledger says, after the check that it counts what has moved.
    async fn ledger(&self) -> String {
        let (times, moved) = self.moved();
        let counted @ Counted { spent, held, doubt } = self.counted().await;
        let cell = format!("{}: {}", self.world.fault, self.class.name());
        assert!(times <= 1, "{cell} was executed {times} times");
        assert!(moved <= spent + held, "{cell} moved {moved} of which {counted:?} are known");
        let parts = [(spent, "spent"), (held - doubt, "open"), (doubt, "doubt")];
        let parts: Vec<_> = parts.iter().filter(|(cents, _)| *cents > 0).map(|(_, name)| *name).collect();
        if !parts.is_empty() {
            return parts.join(" + ");
        }
        let calls = self.sidecar().list(&format!("/admin/calls?idempotency_key={}", self.class.name())).await;
        if calls.is_empty() { "none" } else { "void" }.to_owned()
    }

    /// Waits until Stripe has executed what it executes late.
    async fn until_executed(&self) {
        let since = Instant::now();
        while self.executed().await == "0" {
            assert!(since.elapsed() < PATIENCE, "{}: {:?} is never executed", self.world.fault, self.class);
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// The same call, and how it ended.
    async fn again(&self) -> String {
        let sends = self.sends();
        let reply = self.send().await;
        let ledger = self.ledger().await;
        if self.sends() > sends {
            return format!("sent: {}, {ledger}", seen(&reply));
        }
        match reply.header("idempotent-replayed") {
            Some("true") => "replayed".to_owned(),
            _ => format!("refused: {}", seen(&reply)),
        }
    }

    /// How often Stripe has executed it.
    async fn executed(&self) -> String {
        match self.class {
            Class::Read => "–".to_owned(),
            Class::Customer => {
                let url = format!("{}/v1/customers", self.standin().base_url());
                let all = self.world.http.get(url).bearer_auth(STRIPE_KEY).send().await.unwrap();
                let all: Value = serde_json::from_str(&all.text().await.unwrap()).unwrap();
                let made = all["data"].as_array().unwrap().len();
                assert!(made <= 1, "{made} customers were made");
                made.to_string()
            }
            Class::Charge
            | Class::Intent
            | Class::Confirm
            | Class::Capture
            | Class::Invoice
            | Class::Subscription
            | Class::Refund => self.moved().0.to_string(),
        }
    }
}

/// The request of a class, after whatever has to be at Stripe before it.
async fn request(http: &reqwest::Client, standin: &Standin, class: Class) -> (String, Form) {
    let customer = class.customer();
    let sale = [("amount", "1500"), ("currency", "usd"), ("customer", &customer)];
    let card = [("payment_method", "pm_card_visa")];
    let source = [("source", "tok_visa")];
    let made = async |path: &str, form: &[(&str, &str)]| {
        elsewhere_by(http, standin, path, form).await["id"].as_str().unwrap().to_owned()
    };
    let charged = [("amount", "1500"), ("currency", "usd"), ("source", "tok_visa")];
    match class {
        Class::Charge => ("/v1/charges".to_owned(), form(&[&sale, &source])),
        Class::Intent => {
            let form = form(&[&sale, &card, &[("confirm", "true")]]);
            ("/v1/payment_intents".to_owned(), form)
        }
        Class::Confirm => {
            let id = made("/v1/payment_intents", &[&sale[..], &card].concat()).await;
            (format!("/v1/payment_intents/{id}/confirm"), Form::new())
        }
        Class::Capture => {
            let manual = [("confirm", "true"), ("capture_method", "manual")];
            let id = made("/v1/payment_intents", &[&sale[..], &card, &manual].concat()).await;
            (format!("/v1/payment_intents/{id}/capture"), Form::new())
        }
        Class::Invoice => {
            let due = invoice(&json!({"customer": customer}));
            let paid =
                json!({"customer": customer, "status": "paid", "amount_paid": 2000, "amount_remaining": 0});
            let (record, path) = ("/v1/invoices/in_1", "/v1/invoices/in_1/pay");
            play(standin, path, record, due, invoice(&paid), 2_000);
            (path.to_owned(), Form::new())
        }
        Class::Subscription => {
            let first = json!({"id": "in_2", "status": "paid", "amount_paid": 1900, "amount_remaining": 0,
                "billing_reason": "subscription_create"});
            let first = invoice(&first);
            play(standin, "/v1/invoices/in_2/pay", "/v1/invoices/in_2", first.clone(), first, 0);
            let made = json!({"id": "sub_1", "object": "subscription", "currency": "usd", "customer": customer,
                "status": "active", "latest_invoice": "in_2"});
            let path = "/v1/subscriptions";
            play(standin, path, "/v1/subscriptions/sub_1", Value::Null, made, 1_900);
            (path.to_owned(), form(&[&[("customer", &customer), ("items[0][price]", "price_1")]]))
        }
        Class::Refund => {
            let id = made("/v1/charges", &charged).await;
            ("/v1/refunds".to_owned(), form(&[&[("charge", &id), ("amount", "400")]]))
        }
        Class::Customer => ("/v1/customers".to_owned(), form(&[&[("email", "a@example.com")]])),
        Class::Read => (format!("/v1/charges/{}", made("/v1/charges", &charged).await), Form::new()),
    }
}

fn form(parts: &[&[(&str, &str)]]) -> Form {
    parts.concat().iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn play(standin: &Standin, path: &str, record: &str, before: Value, after: Value, amount: u64) {
    standin.play(Play { path: path.to_owned(), record: record.to_owned(), before, after, amount });
}

/// Status, code and, of an error, whether the SDK is told to try again.
fn seen(reply: &Reply) -> String {
    let mut told = reply.status.to_string();
    if !reply.code().is_empty() {
        write!(told, " `{}`", reply.code()).unwrap();
    }
    if let Some(retry) = reply.header("stripe-should-retry").filter(|_| reply.status >= 400) {
        let retry = if retry == "true" { "retry" } else { "no retry" };
        write!(told, ", {retry}").unwrap();
    }
    told
}

/// Runs all of them at once.
async fn side_by_side<T: Send + 'static>(
    all: impl IntoIterator<Item = impl Future<Output = T> + Send + 'static>,
) -> Vec<T> {
    let running: Vec<JoinHandle<T>> = all.into_iter().map(tokio::spawn).collect();
    let mut done = Vec::new();
    for one in running {
        done.push(one.await.unwrap());
    }
    done
}

/// One fault against every class. The classes go side by side, because they mostly wait; but each part of a cell comes
/// after the same part of all the others, because a release lets go of whatever is held.
async fn cells_of(fault: Option<Fault>, http: reqwest::Client) -> Vec<(Class, Told)> {
    let settings = [("UPSTREAM_TIMEOUT_MS", DEADLINE_MS)];
    let settings = if is_late(fault.as_ref()) { &settings[..] } else { &[] };
    let (standin, sidecar) = world_with(settings).await;
    let world = Arc::new(World { fault: name(fault.as_ref()), standin, sidecar, http });
    let is_decline = matches!(fault, Some(Fault::Decline));
    let classes = Class::ALL.into_iter().filter(|class| class.can_be_declined() || !is_decline);
    let mut cells = side_by_side(classes.map(|class| begin(Arc::clone(&world), class, fault.clone()))).await;
    let mut before = BTreeMap::new();
    if matches!(fault, Some(Fault::SlowMs(_))) {
        for (cell, _) in &cells {
            cell.until_executed().await;
        }
        before = searches(&world.sidecar).await;
    }
    recover(&world.sidecar, &mut cells, &before).await;
    let cells = side_by_side(cells.into_iter().map(|(cell, told)| repeat(cell, told))).await;
    world.standin.release();
    let is_held = matches!(fault, Some(Fault::Hold));
    side_by_side(cells.into_iter().map(|(cell, told)| end(cell, told, is_held))).await
}

async fn begin(world: Arc<World>, class: Class, fault: Option<Fault>) -> (Cell, Told) {
    let cell = Cell::new(world, class).await;
    if let Some(fault) = fault {
        cell.script(fault);
    }
    let seen = seen(&cell.send().await);
    let ledger = cell.ledger().await;
    (cell, Told { seen, ledger, ..Told::default() })
}

/// How often recovery has looked in vain for each key's doubt, as long as it is one.
async fn searches(sidecar: &Sidecar) -> BTreeMap<String, u64> {
    let doubts = sidecar.list("/admin/holds?state=doubt&limit=1000").await;
    let of = |hold: &Value| {
        (hold["key_id"].as_str().unwrap().to_owned(), hold["search"]["times"].as_u64().unwrap_or(0))
    };
    doubts.iter().map(of).collect()
}

/// Waits until recovery has ended each doubt, or has looked more often than `before` and found nothing.
async fn recover(sidecar: &Sidecar, cells: &mut [(Cell, Told)], before: &BTreeMap<String, u64>) {
    let since = Instant::now();
    let mut now = searches(sidecar).await;
    while now.iter().any(|(key, times)| *times <= before.get(key).copied().unwrap_or(0)) {
        assert!(since.elapsed() < PATIENCE, "nobody looks for all of {now:?}: {}", sidecar.log());
        sleep(Duration::from_millis(300)).await;
        now = searches(sidecar).await;
    }
    for (cell, told) in cells {
        told.recovery = match (&*told.ledger, now.contains_key(&cell.key_id)) {
            ("doubt", true) => format!("not found: stays {}", cell.ledger().await),
            ("doubt", false) => format!("found: {}", cell.ledger().await),
            _ => "–".to_owned(),
        };
    }
}

async fn repeat(cell: Cell, mut told: Told) -> (Cell, Told) {
    told.again = cell.again().await;
    (cell, told)
}

/// The same call once more, when nothing is under way any longer.
async fn end(cell: Cell, mut told: Told, is_held: bool) -> (Class, Told) {
    if is_held {
        cell.until_executed().await;
    }
    cell.send().await;
    cell.ledger().await;
    told.executed = cell.executed().await;
    (cell.class, told)
}

/// A row of the table: faults that come to the same for the same classes.
struct Row {
    faults: Vec<String>,
    classes: Vec<Class>,
    told: Told,
}

fn rows(cells: &[(String, Vec<(Class, Told)>)]) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for (fault, cells) in cells {
        let mut groups: Vec<(Vec<Class>, &Told)> = Vec::new();
        for (class, told) in cells {
            match groups.iter_mut().find(|(_, other)| *other == told) {
                Some((classes, _)) => classes.push(*class),
                None => groups.push((vec![*class], told)),
            }
        }
        for (classes, told) in groups {
            match rows.iter_mut().find(|row| row.classes == classes && row.told == *told) {
                Some(row) => row.faults.push(fault.clone()),
                None => rows.push(Row { faults: vec![fault.clone()], classes, told: told.clone() }),
            }
        }
    }
    rows
}

fn classes_told(classes: &[Class]) -> String {
    let money = Class::ALL.into_iter().filter(|class| class.moves_money());
    if money.eq(classes.iter().copied()) {
        return "money".to_owned();
    }
    classes.iter().map(|class| class.name()).collect::<Vec<_>>().join(", ")
}

fn table(cells: &[(String, Vec<(Class, Told)>)]) -> String {
    let mut table = String::from(
        "| what goes wrong | for | the SDK sees | the ledger | recovery | the same call again | executed |\n\
         |---|---|---|---|---|---|---|\n",
    );
    for Row { faults, classes, told } in rows(cells) {
        let Told { seen, ledger, recovery, again, executed } = told;
        let (faults, classes) = (faults.join("; "), classes_told(&classes));
        writeln!(table, "| {faults} | {classes} | {seen} | {ledger} | {recovery} | {again} | {executed} |")
            .unwrap();
    }
    table
}

const BEGINS: &str = "<!-- faults: made by tests/it/faults.rs -->\n";
const ENDS: &str = "<!-- end of faults -->";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_fault_comes_to_what_the_readme_says() {
    let http = client();
    let named = faults().into_iter().map(|fault| {
        let http = http.clone();
        async move { (name(fault.as_ref()), cells_of(fault, http).await) }
    });
    let made = table(&side_by_side(named).await);
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/README.md");
    let readme = std::fs::read_to_string(path).unwrap();
    let (before, rest) = readme.split_once(BEGINS).unwrap();
    let (told, after) = rest.split_once(ENDS).unwrap();
    if told == made {
        return;
    }
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        std::fs::write(path, format!("{before}{BEGINS}{made}{ENDS}{after}")).unwrap();
        return;
    }
    let lacks = |all: &str, row: &str| !all.lines().any(|other| other == row);
    let gone = told.lines().filter(|row| lacks(&made, row)).map(|row| format!("- {row}"));
    let come = made.lines().filter(|row| lacks(told, row)).map(|row| format!("+ {row}"));
    let rows: Vec<_> = gone.chain(come).collect();
    panic!("README.md tells of other ends; UPDATE_EXPECT=1 rewrites it:\n{}", rows.join("\n"));
}
