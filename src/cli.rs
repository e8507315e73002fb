//! The command line: arguments to calls of the API, and answers to text.
#![expect(clippy::doc_markdown, reason = "doc comments of arguments are the text of --help")]

pub mod client;
pub mod doctor;
mod explain;
mod grants;
mod ledger;
mod log;
mod operator;
pub mod output;
mod verify;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use serde_json::{Value, json};

use crate::cli::client::Client;
use crate::cli::grants::{Issuers, Keys, issuers, keys};
use crate::cli::ledger::{Ledger, ledger};
use crate::cli::log::{Audit, audit};
use crate::cli::operator::Resolve;
use crate::cli::output::{complain, fields, line, table};
use crate::config::{
    CLIENT_VARIABLES, COLLECT_VARIABLES, ClientConfig, ClientFlags, CollectConfig, Config, LogFormat,
    VARIABLES, Variable,
};
use crate::serve::{self, Stopped};

/// Exit code for bad usage or configuration.
const EXIT_USAGE: u8 = 64;
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
    /// Run the central collector, to which sidecars ship their audit records
    Collect,
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
    /// A ledger that no sidecar has open: from a file into PostgreSQL
    Ledger {
        #[command(subcommand)]
        command: Ledger,
        #[command(flatten)]
        json: Json,
    },
    /// Check configuration, certificate, disk, ledger, collector and Stripe, and say what to mend
    Doctor(Doctor),
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

#[derive(Args, Debug)]
struct Doctor {
    /// Go on with a ledger that was restored from an old copy, although its collector holds later records: what these say
    /// of charges, caps and keys is not known here any more. It is recorded with the reason, in a new chain
    #[arg(long, requires = "reason")]
    accept_ledger_loss: bool,
    /// Why, for the audit log
    #[arg(long, requires = "accept_ledger_loss")]
    reason: Option<String>,
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Subcommand)]
enum Holds {
    /// List live holds, newest first
    List {
        /// Only holds that are sending, open or doubt
        #[arg(long)]
        state: Option<String>,
    },
    /// Show one hold with what is needed to look it up at Stripe, and what was looked for already
    Show {
        /// hold_…
        id: String,
    },
    /// Say what became of a call in doubt, one or all that a filter leaves; it is recorded with the reason
    Resolve(Box<Resolve>),
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
    /// Take back a call that is over, so that the same call can be made again; it is recorded with the reason
    Forget {
        /// call_…
        id: String,
        /// Why, for the audit log
        #[arg(long)]
        reason: String,
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
    // The ledger has two threads of its own, and each task that changes threads costs more than most of what it does.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = match runtime.worker_threads(cores.div_ceil(2)).enable_all().build() {
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
                format!("  {:<34} {}{or_file}{default}", variable.name, variable.meaning)
            })
            .collect();
        rows.join("\n")
    };
    format!(
        "Environment of `serve`, `doctor` and `ledger`:\n{}\n\nEnvironment of `collect`, which reads KEYBRAKE_TLS…, \
         KEYBRAKE_CA_OUT, KEYBRAKE_DRAIN_MS and KEYBRAKE_LOG… too:\n{}\n\nEnvironment of the other commands:\n{}\n\n\
         Exit codes: 0 done, 1 failed, 64 bad usage or configuration.",
        show(VARIABLES),
        show(COLLECT_VARIABLES),
        show(CLIENT_VARIABLES)
    )
}

async fn run(command: Command) -> ExitCode {
    let result = match command {
        Command::Serve => return Box::pin(run_serve()).await,
        Command::Collect => return Box::pin(run_collect()).await,
        Command::Doctor(Doctor { reason: Some(reason), target, .. }) => accept_loss(&reason, &target).await,
        Command::Doctor(Doctor { target, .. }) => return doctor::run(target.json.json).await,
        Command::Health(json) => return health(json).await,
        Command::Keys { command, target } => keys(command, &target).await,
        Command::Issuers { command, target } => issuers(command, &target).await,
        Command::Holds { command, target } => holds(command, &target).await,
        Command::Calls { command, target } => calls(command, &target).await,
        Command::Audit { command, target } => audit(command, &target).await,
        Command::Ledger { command, json } => ledger(command, json).await,
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
    start_log(&config.log, config.log_format);
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
    ended(Box::pin(serve::run(config, shutdown, reload, hangup)).await)
}

async fn run_collect() -> ExitCode {
    let config = match CollectConfig::from_env() {
        Ok(config) => config,
        Err(errors) => {
            complain(&format!("keybrake: the configuration has errors\n{errors}"));
            return ExitCode::from(EXIT_USAGE);
        }
    };
    start_log(&config.log, config.log_format);
    let (hung_up, hangup) = tokio::sync::mpsc::channel(1);
    let shutdown = match signals(hung_up) {
        Ok(shutdown) => shutdown,
        Err(error) => {
            complain(&format!("keybrake: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let reload = || match CollectConfig::from_env() {
        Ok(config) => Some(config),
        Err(errors) => {
            tracing::error!(%errors, "the configuration has errors; the old one stays");
            None
        }
    };
    ended(Box::pin(serve::collector::run(config, shutdown, reload, hangup)).await)
}

fn ended(result: Result<(), Stopped>) -> ExitCode {
    match result {
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

fn start_log(wanted: &str, format: LogFormat) {
    let filter = tracing_subscriber::EnvFilter::new(log_filter(wanted));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // A second subscriber cannot be set; the first one stays.
    let _ = match format {
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

async fn accept_loss(reason: &str, target: &Target) -> Result<ExitCode> {
    let body = json!({ "reason": reason });
    show_object(&client(target)?.post("/admin/ledger/accept_loss", &body).await?, target.json);
    Ok(ExitCode::SUCCESS)
}

fn client(target: &Target) -> Result<Client> {
    let flags = ClientFlags { url: target.url.clone(), ca: target.ca.clone() };
    let config = ClientConfig::from_env(flags).map_err(|errors| Usage(errors.to_string()))?;
    Client::new(&config)
}

fn filters(pairs: &[(&str, Option<String>)]) -> Vec<(String, String)> {
    pairs.iter().filter_map(|(name, value)| Some(((*name).to_owned(), value.clone()?))).collect()
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
        Holds::Resolve(resolve) => return operator::resolve(&client, *resolve, target.json).await,
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
        Calls::Forget { id, reason } => {
            let path = format!("/admin/calls/{id}/forget");
            show_object(&client.post(&path, &json!({ "reason": reason })).await?, target.json);
        }
    }
    Ok(ExitCode::SUCCESS)
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
