//! The command line: arguments to calls of the API, and answers to text.
#![expect(clippy::doc_markdown, reason = "doc comments of arguments are the text of --help")]

pub mod client;
pub mod doctor;
pub mod output;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use serde_json::{Map, Value, json};

use crate::audit::Verifier;
use crate::cli::client::Client;
use crate::cli::output::{complain, fields, line, table};
use crate::config::{CLIENT_VARIABLES, ClientConfig, ClientFlags, Config, LogFormat, VARIABLES, Variable};
use crate::serve::{self, Stopped};

/// Exit code for bad usage or configuration.
const EXIT_USAGE: u8 = 64;
/// Records that `audit query` shows unless asked otherwise.
const RECORDS_DEFAULT: usize = 100;
/// How often `audit tail` looks.
const TAIL_PAUSE_MS: u64 = 1_000;
/// How long `health` waits.
const HEALTH_TIMEOUT_MS: u64 = 2_000;

/// A sidecar that keeps a Kestra billing flow from charging a customer twice, too much, or at all without leave.
#[derive(Debug, Parser)]
#[command(name = "keybrake", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the sidecar: TLS proxy in front of Stripe, admin API, audit API
    Serve,
    /// Vault keys: what a task may call, how much it may spend, for how long
    Keys {
        #[command(subcommand)]
        command: Keys,
        #[command(flatten)]
        target: Target,
    },
    /// Issuer keys: what a task may mint, within bounds that the script does not choose
    Issuers {
        #[command(subcommand)]
        command: Issuers,
        #[command(flatten)]
        target: Target,
    },
    /// Open and unknown outcomes
    Holds {
        #[command(subcommand)]
        command: Holds,
        #[command(flatten)]
        target: Target,
    },
    /// Remembered calls
    Calls {
        #[command(subcommand)]
        command: Calls,
        #[command(flatten)]
        target: Target,
    },
    /// The audit log
    Audit {
        #[command(subcommand)]
        command: Audit,
        #[command(flatten)]
        target: Target,
    },
    /// Check configuration, certificate, disk, ledger and Stripe, and say what to mend
    Doctor(Json),
    /// Exit 0 when the sidecar is ready: for container health checks and exec probes
    Health(Json),
}

/// Which sidecar, and how its answers are shown.
#[derive(Args, Debug)]
struct Target {
    /// Address of the sidecar [env: KEYBRAKE_URL] [default: `https://localhost:8443`]
    #[arg(long, global = true)]
    url: Option<String>,
    /// CA certificate to trust, PEM [env: KEYBRAKE_CA]
    #[arg(long, global = true)]
    ca: Option<PathBuf>,
    #[command(flatten)]
    json: Json,
}

#[derive(Args, Clone, Copy, Debug)]
struct Json {
    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Keys {
    /// Mint a vault key; its secret is shown once
    Issue(Box<Issue>),
    /// List keys, newest first
    List {
        /// Only keys with this label
        #[arg(long)]
        label: Option<String>,
        /// Only keys that are active, expired, revoked or closed
        #[arg(long)]
        status: Option<String>,
    },
    /// Show one key with what it has spent
    Show {
        /// vk_id_…
        id: String,
    },
    /// Revoke a key: its very next request is refused
    Revoke {
        /// vk_id_…
        id: String,
    },
}

#[derive(Args, Debug)]
struct Issue {
    /// What people call it, such as kestra-billing-cus_9
    #[arg(long)]
    label: String,
    /// An operation it may call, such as "POST /v1/charges"; may be repeated
    #[arg(long = "allow", required = true)]
    allow: Vec<String>,
    /// Dollars per UTC day, or for the whole life of a key of 24 hours or less, such as 32.99
    #[arg(long)]
    daily_usd_cap: Option<String>,
    /// Dollars for its whole life
    #[arg(long)]
    total_usd_cap: Option<String>,
    /// Dollars for one call
    #[arg(long)]
    max_usd_per_request: Option<String>,
    /// Dollars of refunds, counted apart
    #[arg(long)]
    daily_usd_out_cap: Option<String>,
    /// Money calls that are spent, held or in doubt
    #[arg(long)]
    max_calls: Option<u64>,
    /// No dollar cap, on purpose
    #[arg(long)]
    uncapped: bool,
    /// Seconds until it expires, at most 2678400 (31 days)
    #[arg(long)]
    expires_in: u64,
    /// What counts as the same call: required, client or content
    #[arg(long)]
    idempotency: Option<String>,
    /// With content: what the calls are about, such as billing:2026-07
    #[arg(long)]
    idempotency_scope: Option<String>,
    /// With content: a parameter that tells calls apart; may be repeated
    #[arg(long = "idempotency-field")]
    idempotency_fields: Vec<String>,
    /// Days that answers are remembered
    #[arg(long)]
    remember_days: Option<u32>,
    /// Let answers keep client_secret
    #[arg(long)]
    client_secrets: bool,
    /// Share the counters of all keys of this budget
    #[arg(long)]
    budget: Option<String>,
    /// Let the first cap refusal stop the whole budget
    #[arg(long)]
    stop_budget_on_refusal: bool,
    /// JSON object of constraints, such as {"customer": ["cus_9"], "amount": {"max": 2999}}
    #[arg(long)]
    constraints: Option<String>,
    /// NAME=VALUE, copied into every audit record; may be repeated
    #[arg(long = "metadata")]
    metadata: Vec<String>,
}

#[derive(Debug, Subcommand)]
enum Issuers {
    /// Make an issuer key; its secret is shown once
    Create(Box<CreateIssuer>),
    /// List issuer keys, newest first
    List,
    /// Show one issuer key with what its keys have spent
    Show {
        /// ik_id_…
        id: String,
    },
    /// Revoke an issuer key, and with it every vault key that it minted
    Revoke {
        /// ik_id_…
        id: String,
    },
}

#[derive(Args, Debug)]
struct CreateIssuer {
    /// What people call it
    #[arg(long)]
    name: String,
    /// What the labels of its keys must start with
    #[arg(long)]
    label_prefix: String,
    /// An operation its keys may have; may be repeated
    #[arg(long = "allow", required = true)]
    allow: Vec<String>,
    /// The highest cap of one key, in dollars
    #[arg(long)]
    max_cap_usd: Option<String>,
    /// Dollars that all its keys may spend together in a UTC day
    #[arg(long)]
    daily_usd_cap: Option<String>,
    /// Dollars that all its keys may ever spend together
    #[arg(long)]
    total_usd_cap: Option<String>,
    /// Dollars that all its keys may refund together in a UTC day
    #[arg(long)]
    daily_usd_out_cap: Option<String>,
    /// Dollars for one call
    #[arg(long)]
    max_usd_per_request: Option<String>,
    /// The longest life of a key, in seconds
    #[arg(long)]
    max_expires_in: Option<u64>,
    /// Seconds until the issuer key itself expires
    #[arg(long)]
    expires_in: u64,
    /// The mode that its keys must have
    #[arg(long)]
    idempotency: Option<String>,
    /// JSON object of constraints that its keys have at least
    #[arg(long)]
    constraints: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Holds {
    /// List live holds, newest first
    List {
        /// Only holds that are sending, open or doubt
        #[arg(long)]
        state: Option<String>,
    },
    /// Show one hold with what is needed to look it up at Stripe
    Show {
        /// hold_…
        id: String,
    },
}

#[derive(Debug, Subcommand)]
enum Calls {
    /// List calls, newest first
    List {
        /// Only calls with this idempotency key
        #[arg(long)]
        idempotency_key: Option<String>,
        /// Only calls for this customer
        #[arg(long)]
        customer: Option<String>,
        /// Only calls on this object
        #[arg(long)]
        object_id: Option<String>,
        /// Only calls in this state
        #[arg(long)]
        state: Option<String>,
    },
    /// Show one call with its attempts
    Show {
        /// call_…
        id: String,
    },
}

#[derive(Debug, Subcommand)]
enum Audit {
    /// Show records, newest first: one row for each call, and every refusal and replay
    Query {
        /// A filter of GET /audit, such as customer=cus_9, outcome=spent or metadata[flow]=billing; may be repeated
        filters: Vec<String>,
        /// Every event instead of one row for each call
        #[arg(long)]
        all_events: bool,
        /// Records at most
        #[arg(long, default_value_t = RECORDS_DEFAULT)]
        limit: usize,
    },
    /// Print new records as they come, one JSON object a line
    Tail,
    /// Check the hash chain of a sidecar, or of a file of exported records: exit 0 whole, 1 broken
    Verify {
        /// A file with one record a line, oldest first, as `audit tail` prints them
        #[arg(long)]
        file: Option<PathBuf>,
    },
}

/// Runs the program with the process's arguments.
pub fn main() -> ExitCode {
    let matches = Cli::command().after_help(variables_help()).try_get_matches();
    let cli = match matches.and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are answers; anything else is bad usage. A reader that has gone is no error.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(EXIT_USAGE) } else { ExitCode::SUCCESS };
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(&format!("keybrake: {error}"));
            return ExitCode::FAILURE;
        }
    };
    runtime.block_on(run(cli.command))
}

fn variables_help() -> String {
    let show = |variables: &[Variable]| {
        let rows: Vec<String> = variables
            .iter()
            .map(|variable| {
                let or_file = if variable.secret { " (or …_FILE)" } else { "" };
                let default = if variable.default.is_empty() {
                    String::new()
                } else {
                    format!(" [{}]", variable.default)
                };
                format!("  {:<32} {}{or_file}{default}", variable.name, variable.meaning)
            })
            .collect();
        rows.join("\n")
    };
    format!(
        "Environment of `serve` and `doctor`:\n{}\n\nEnvironment of the other commands:\n{}\n\n\
         Exit codes: 0 done, 1 failed, 64 bad usage or configuration.",
        show(VARIABLES),
        show(CLIENT_VARIABLES)
    )
}

async fn run(command: Command) -> ExitCode {
    let result = match command {
        Command::Serve => return Box::pin(run_serve()).await,
        Command::Doctor(json) => return doctor::run(json.json).await,
        Command::Health(json) => return health(json).await,
        Command::Keys { command, target } => keys(command, &target).await,
        Command::Issuers { command, target } => issuers(command, &target).await,
        Command::Holds { command, target } => holds(command, &target).await,
        Command::Calls { command, target } => calls(command, &target).await,
        Command::Audit { command, target } => audit(command, &target).await,
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            complain(&format!("keybrake: {error:#}"));
            let usage = error.downcast_ref::<Usage>().is_some();
            if usage { ExitCode::from(EXIT_USAGE) } else { ExitCode::FAILURE }
        }
    }
}

/// The arguments or the environment are wrong.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(String);

async fn run_serve() -> ExitCode {
    let config = match Config::from_env() {
        Ok(config) => config,
        Err(errors) => {
            complain(&format!("keybrake: the configuration has errors\n{errors}"));
            return ExitCode::from(EXIT_USAGE);
        }
    };
    start_log(&config);
    let (hung_up, hangup) = tokio::sync::mpsc::channel(1);
    let shutdown = match signals(hung_up) {
        Ok(shutdown) => shutdown,
        Err(error) => {
            complain(&format!("keybrake: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let reload = || match Config::from_env() {
        Ok(config) => Some(config),
        Err(errors) => {
            tracing::error!(%errors, "the configuration has errors; the old one stays");
            None
        }
    };
    match Box::pin(serve::run(config, shutdown, reload, hangup)).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(Stopped::Misconfigured(why)) => {
            complain(&format!("keybrake: {why}"));
            ExitCode::from(EXIT_USAGE)
        }
        Err(Stopped::Failed(error)) => {
            complain(&format!("keybrake: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// The signals that stop the process, and those that have it read its files again.
fn signals(hung_up: tokio::sync::mpsc::Sender<()>) -> std::io::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut hup = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        while hup.recv().await.is_some() {
            // One reload that waits is as good as many.
            let _ = hung_up.try_send(());
        }
    });
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    })
}

fn start_log(config: &Config) {
    let filter = tracing_subscriber::EnvFilter::new(log_filter(&config.log));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // A second subscriber cannot be set; the first one stays.
    let _ = match config.log_format {
        LogFormat::Json => builder.json().try_init(),
        LogFormat::Pretty => builder.try_init(),
    };
}

/// The filter is for this program: other crates stay at `warn`, because what they trace may hold secrets.
fn log_filter(wanted: &str) -> String {
    let own = wanted.split(',').map(str::trim).filter_map(|word| {
        let named = word.starts_with("keybrake");
        let level = !word.contains(['=', '[', ':']);
        let quiet = ["=warn", "=error", "=off"].iter().any(|level| word.ends_with(level));
        match (named, level) {
            (true, _) => Some(word.to_owned()),
            (false, true) => Some(format!("keybrake={word}")),
            (false, false) => quiet.then(|| word.to_owned()),
        }
    });
    std::iter::once("warn".to_owned()).chain(own).collect::<Vec<_>>().join(",")
}

fn client(target: &Target) -> Result<Client> {
    let flags = ClientFlags { url: target.url.clone(), ca: target.ca.clone() };
    let config = ClientConfig::from_env(flags).map_err(|errors| Usage(errors.to_string()))?;
    Client::new(&config)
}

fn filters(pairs: &[(&str, Option<String>)]) -> Vec<(String, String)> {
    pairs.iter().filter_map(|(name, value)| Some(((*name).to_owned(), value.clone()?))).collect()
}

async fn keys(command: Keys, target: &Target) -> Result<ExitCode> {
    let client = client(target)?;
    match command {
        Keys::Issue(issue) => {
            let key = client.post("/admin/vault_keys", &issue_body(*issue)?).await?;
            show_object(&key, target.json);
        }
        Keys::List { label, status } => {
            let query = filters(&[("label", label), ("status", status)]);
            let keys = client.list("/admin/vault_keys", &query, usize::MAX).await?;
            let columns = [
                ("ID", "/id"),
                ("LABEL", "/label"),
                ("STATUS", "/status"),
                ("DAILY $", "/daily_usd_cap"),
                ("EXPIRES", "/expires_at"),
            ];
            show_list(&keys, &columns, target.json);
        }
        Keys::Show { id } => {
            show_object(&client.get(&format!("/admin/vault_keys/{id}"), &[]).await?, target.json);
        }
        Keys::Revoke { id } => {
            show_object(&client.delete(&format!("/admin/vault_keys/{id}")).await?, target.json);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn issue_body(issue: Issue) -> Result<Value> {
    let mut body = Map::new();
    let mut set = |name: &str, value: Value| body.insert(name.to_owned(), value);
    set("label", Value::from(issue.label));
    set("vendor", Value::from("stripe"));
    set("allowed_endpoints", json!(issue.allow));
    set("daily_usd_cap", issue.daily_usd_cap.map_or(Value::Null, Value::from));
    set("expires_in_seconds", Value::from(issue.expires_in));
    let optional = [
        ("total_usd_cap", issue.total_usd_cap.map(Value::from)),
        ("max_usd_per_request", issue.max_usd_per_request.map(Value::from)),
        ("daily_usd_out_cap", issue.daily_usd_out_cap.map(Value::from)),
        ("max_calls", issue.max_calls.map(Value::from)),
        ("uncapped", issue.uncapped.then_some(Value::Bool(true))),
        ("idempotency", issue.idempotency.map(Value::from)),
        ("idempotency_scope", issue.idempotency_scope.map(Value::from)),
        ("remember_days", issue.remember_days.map(Value::from)),
        ("client_secrets", issue.client_secrets.then_some(Value::Bool(true))),
        ("budget", issue.budget.map(Value::from)),
        ("stop_budget_on_refusal", issue.stop_budget_on_refusal.then_some(Value::Bool(true))),
        ("constraints", json_argument("--constraints", issue.constraints.as_deref())?),
    ];
    for (name, value) in optional {
        if let Some(value) = value {
            set(name, value);
        }
    }
    if !issue.idempotency_fields.is_empty() {
        set("idempotency_fields", json!(issue.idempotency_fields));
    }
    if !issue.metadata.is_empty() {
        let pairs = issue.metadata.iter().map(|pair| {
            let (name, value) =
                pair.split_once('=').ok_or_else(|| Usage(format!("--metadata {pair}: write NAME=VALUE")))?;
            Ok((name.to_owned(), Value::from(value)))
        });
        set("metadata", Value::Object(pairs.collect::<Result<_, Usage>>()?));
    }
    Ok(Value::Object(body))
}

async fn issuers(command: Issuers, target: &Target) -> Result<ExitCode> {
    let client = client(target)?;
    match command {
        Issuers::Create(create) => {
            let issuer = client.post("/admin/issuers", &issuer_body(*create)?).await?;
            show_object(&issuer, target.json);
        }
        Issuers::List => {
            let issuers = client.list("/admin/issuers", &[], usize::MAX).await?;
            let columns = [
                ("ID", "/id"),
                ("NAME", "/name"),
                ("STATUS", "/status"),
                ("PREFIX", "/label_prefix"),
                ("DAILY $", "/daily_usd_cap"),
                ("EXPIRES", "/expires_at"),
            ];
            show_list(&issuers, &columns, target.json);
        }
        Issuers::Show { id } => {
            show_object(&client.get(&format!("/admin/issuers/{id}"), &[]).await?, target.json);
        }
        Issuers::Revoke { id } => {
            show_object(&client.delete(&format!("/admin/issuers/{id}")).await?, target.json);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn issuer_body(create: CreateIssuer) -> Result<Value> {
    let optional = [
        ("max_cap_usd", create.max_cap_usd.map(Value::from)),
        ("daily_usd_cap", create.daily_usd_cap.map(Value::from)),
        ("total_usd_cap", create.total_usd_cap.map(Value::from)),
        ("daily_usd_out_cap", create.daily_usd_out_cap.map(Value::from)),
        ("max_usd_per_request", create.max_usd_per_request.map(Value::from)),
        ("max_expires_in_seconds", create.max_expires_in.map(Value::from)),
        ("idempotency", create.idempotency.map(Value::from)),
        ("constraints", json_argument("--constraints", create.constraints.as_deref())?),
    ];
    let mut body = json!({
        "name": create.name,
        "label_prefix": create.label_prefix,
        "allowed_endpoints": create.allow,
        "expires_in_seconds": create.expires_in,
    });
    for (name, value) in optional {
        if let Some(value) = value {
            body[name] = value;
        }
    }
    Ok(body)
}

fn json_argument(name: &str, text: Option<&str>) -> Result<Option<Value>, Usage> {
    text.map(serde_json::from_str).transpose().map_err(|_| Usage(format!("{name} must be JSON")))
}

async fn holds(command: Holds, target: &Target) -> Result<ExitCode> {
    let client = client(target)?;
    match command {
        Holds::List { state } => {
            let holds = client.list("/admin/holds", &filters(&[("state", state)]), usize::MAX).await?;
            let columns = [
                ("ID", "/id"),
                ("STATE", "/state"),
                ("USD", "/usd"),
                ("CUSTOMER", "/customer"),
                ("OBJECT", "/object_id"),
                ("SINCE", "/since"),
                ("CALL", "/call_id"),
            ];
            show_list(&holds, &columns, target.json);
        }
        Holds::Show { id } => {
            show_object(&client.get(&format!("/admin/holds/{id}"), &[]).await?, target.json);
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn calls(command: Calls, target: &Target) -> Result<ExitCode> {
    let client = client(target)?;
    match command {
        Calls::List { idempotency_key, customer, object_id, state } => {
            let query = filters(&[
                ("idempotency_key", idempotency_key),
                ("customer", customer),
                ("object_id", object_id),
                ("state", state),
            ]);
            let calls = client.list("/admin/calls", &query, usize::MAX).await?;
            let columns = [
                ("ID", "/id"),
                ("STATE", "/state"),
                ("OPERATION", "/operation"),
                ("CUSTOMER", "/customer"),
                ("OBJECT", "/object_id"),
                ("CREATED", "/created_at"),
            ];
            show_list(&calls, &columns, target.json);
        }
        Calls::Show { id } => {
            show_object(&client.get(&format!("/admin/calls/{id}"), &[]).await?, target.json);
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn audit(command: Audit, target: &Target) -> Result<ExitCode> {
    match command {
        Audit::Query { filters, all_events, limit } => {
            let mut query = filters
                .iter()
                .map(|filter| {
                    let (name, value) =
                        filter.split_once('=').ok_or_else(|| Usage(format!("{filter}: write NAME=VALUE")))?;
                    Ok((name.to_owned(), value.to_owned()))
                })
                .collect::<Result<Vec<_>, Usage>>()?;
            if all_events {
                query.push(("events".to_owned(), "all".to_owned()));
            }
            let records = client(target)?.list("/audit", &query, limit).await?;
            let columns = [
                ("AT", "/at"),
                ("EVENT", "/event"),
                ("OUTCOME", "/outcome"),
                ("USD", "/usd"),
                ("CODE", "/code"),
                ("CUSTOMER", "/customer"),
                ("OBJECT", "/object_id"),
                ("LABEL", "/label"),
            ];
            show_list(&records, &columns, target.json);
            Ok(ExitCode::SUCCESS)
        }
        Audit::Tail => tail(&client(target)?).await,
        Audit::Verify { file: Some(file) } => verify_file(&file, target.json),
        Audit::Verify { file: None } => {
            let state = client(target)?.get("/audit/verify", &[]).await?;
            Ok(show_verdict(&state, target.json))
        }
    }
}

/// Prints records from the beginning and goes on as they come, until it is stopped.
async fn tail(client: &Client) -> Result<ExitCode> {
    let mut query = vec![("events".to_owned(), "all".to_owned()), ("order".to_owned(), "asc".to_owned())];
    query.push(("limit".to_owned(), "1000".to_owned()));
    let mut after: Option<u64> = None;
    loop {
        let mut asked = query.clone();
        asked.extend(after.map(|after| ("cursor".to_owned(), after.to_string())));
        let page = client.get("/audit", &asked).await?;
        for record in page["data"].as_array().into_iter().flatten() {
            line(&record.to_string());
            after = record["seq"].as_u64().or(after);
        }
        if !page["has_more"].as_bool().unwrap_or(false) {
            tokio::time::sleep(Duration::from_millis(TAIL_PAUSE_MS)).await;
        }
    }
}

fn verify_file(file: &PathBuf, json: Json) -> Result<ExitCode> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let mut verifier: Option<Verifier> = None;
    let mut records = 0_u64;
    let mut broken = None;
    for (at, text) in text.lines().enumerate().filter(|(_, text)| !text.trim().is_empty()) {
        let record: Map<String, Value> =
            serde_json::from_str(text).map_err(|_| anyhow!("line {} is no JSON object", at + 1))?;
        let verifier = match &mut verifier {
            Some(verifier) => verifier,
            None => verifier.insert(beginning(&record)?),
        };
        if let Err(found) = verifier.follow_json(&record) {
            broken = Some(found);
            break;
        }
        records += 1;
    }
    let head = verifier.map(|verifier| crate::id::hex(&verifier.head())).unwrap_or_default();
    let state = json!({
        "whole": broken.is_none(),
        "records": records,
        "head": head,
        "first_bad": broken.as_ref().map(crate::audit::Broken::seq),
        "why": broken.as_ref().map(ToString::to_string),
    });
    Ok(show_verdict(&state, json))
}

/// An export may begin in the middle of a chain; what lies before it cannot be checked, and is told by its `seq`.
fn beginning(record: &Map<String, Value>) -> Result<Verifier> {
    let seq = record.get("seq").and_then(Value::as_u64);
    let prev = record.get("prev_hash").and_then(Value::as_str).and_then(crate::id::from_hex);
    match (seq, prev.and_then(|prev| prev.try_into().ok())) {
        (Some(1), _) => Ok(Verifier::default()),
        (Some(seq), Some(prev)) => Ok(Verifier::from_record(seq, prev)),
        (Some(_) | None, _) => bail!("the first line is no audit record"),
    }
}

fn show_verdict(state: &Value, json: Json) -> ExitCode {
    let whole = state["whole"].as_bool().unwrap_or(false);
    if json.json {
        line(&state.to_string());
    } else if whole {
        line(&format!(
            "whole: {} records, head {}",
            state["records"],
            state["head"].as_str().unwrap_or_default()
        ));
    } else {
        line(&format!("BROKEN: {}", state["why"].as_str().unwrap_or_default()));
    }
    if whole { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn health(json: Json) -> ExitCode {
    let verdict = doctor::ready(Duration::from_millis(HEALTH_TIMEOUT_MS)).await;
    let (ready, reasons) = match verdict {
        Ok(reasons) => (reasons.is_empty(), reasons),
        Err(error) => (false, vec![format!("{error:#}")]),
    };
    if json.json {
        line(&json!({ "ready": ready, "reasons": reasons }).to_string());
    } else if ready {
        line("ready");
    } else {
        complain(&format!("not ready: {}", reasons.join("; ")));
    }
    if ready { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn show_object(object: &Value, json: Json) {
    line(&if json.json { object.to_string() } else { fields(object) });
}

fn show_list(rows: &[Value], columns: &[(&str, &str)], json: Json) {
    line(&if json.json { json!({ "data": rows }).to_string() } else { table(rows, columns) });
}
