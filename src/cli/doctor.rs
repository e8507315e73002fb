//! `doctor` and `health`: is the sidecar able to do its work, and what has to be mended if not.

mod database;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::Instant;

use crate::cli::EXIT_USAGE;
use crate::cli::output::{complain, line};
use crate::config::Config;
use crate::disk;
use crate::forward::{Forwarder, FreeRequest};
use crate::ledger::LedgerError;
use crate::ledger::redb::inspect;
use crate::money::MicroUsd;
use crate::ship::{self, Format, Target};
use crate::time::Clock;
use crate::tls::{self, TlsSource};
use crate::upstream::{Sent, Upstream, UpstreamConfig};

/// How long Stripe may take to answer the doctor.
const STRIPE_TIMEOUT_MS: u64 = 10_000;
/// The largest answer of `/readyz` or `/metrics`.
const OPS_BYTES_MAX: u64 = 256 * 1024;
/// How long the sidecar beside may take to answer.
const OPS_TIMEOUT: Duration = Duration::from_secs(2);

/// One thing that was looked at.
struct Finding {
    name: &'static str,
    verdict: Verdict,
    told: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Good,
    Note,
    Bad,
}

impl Verdict {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Good => "ok",
            Self::Note => "note",
            Self::Bad => "BAD",
        }
    }
}

/// Looks at everything and says what to mend: exit 0 when nothing is bad.
pub async fn run(json: bool) -> ExitCode {
    let config = match Config::from_env() {
        Ok(config) => config,
        Err(errors) => {
            complain(&format!("keybrake: the configuration has errors\n{errors}"));
            return ExitCode::from(EXIT_USAGE);
        }
    };
    let mut findings = vec![finding("configuration", Verdict::Good, "every setting can be read")];
    findings.extend(certificate(&config));
    if let Some(target) = &config.ledger {
        findings.push(disk(&config.data_dir, Kept::Tls));
        findings.extend(database::findings(&config, target).await);
    } else {
        let kept = if config.collector.is_some() { Kept::Shipped } else { Kept::Alone };
        findings.push(disk(&config.data_dir, kept));
        findings.push(ledger(&config));
        findings.extend(size(&config));
    }
    findings.push(rates(&config));
    findings.push(stripe(&config).await);
    findings.push(collector(&config).await);
    findings.extend(running().await);
    let topology = match &config.ledger {
        Some(_) => {
            "keys, caps and memory are those of all sidecars on this schema; each has an audit log of its own"
        }
        None => {
            "keys, caps, memory and audit are this sidecar's own; workers that do not share it share only Stripe's 24 hours"
        }
    };
    findings.push(finding("topology", Verdict::Note, topology));
    let bad = findings.iter().any(|finding| finding.verdict == Verdict::Bad);
    if json {
        let rows: Vec<Value> = findings
            .iter()
            .map(|one| json!({ "check": one.name, "verdict": one.verdict.as_str(), "told": one.told }))
            .collect();
        line(&json!({ "ok": !bad, "findings": rows }).to_string());
    } else {
        for one in &findings {
            line(&format!("{:<5} {:<14} {}", one.verdict.as_str(), one.name, one.told));
        }
    }
    if bad { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn finding(name: &'static str, verdict: Verdict, told: impl Into<String>) -> Finding {
    Finding { name, verdict, told: told.into() }
}

fn certificate(config: &Config) -> Vec<Finding> {
    let told = match &config.tls {
        None => (Verdict::Note, "TLS is off: only this machine's own processes may connect".to_owned()),
        Some(TlsSource::Auto { dir, .. }) => {
            let ca = dir.join("ca.pem");
            if ca.exists() {
                (Verdict::Good, format!("the CA certificate for clients is {}", ca.display()))
            } else {
                (Verdict::Note, format!("the first start makes a CA in {}", dir.display()))
            }
        }
        Some(TlsSource::Files { cert, key }) => match [cert, key].into_iter().find(|file| !file.exists()) {
            None => (Verdict::Good, format!("{} and {} are there", cert.display(), key.display())),
            Some(missing) => (Verdict::Bad, format!("{} is missing", missing.display())),
        },
    };
    vec![finding("certificate", told.0, told.1)]
}

/// What a directory holds, by what its loss would mean.
#[derive(Clone, Copy)]
enum Kept {
    /// The ledger, and nobody else has any of it.
    Alone,
    /// The ledger, whose records a collector has.
    Shipped,
    /// Only what belongs to TLS.
    Tls,
}

/// The directory of the sidecar: there, writable, and on something that outlives a restart.
fn disk(data_dir: &Path, kept: Kept) -> Finding {
    if !data_dir.exists() {
        return finding("disk", Verdict::Note, format!("{} is made at the first start", data_dir.display()));
    }
    let probe = data_dir.join(".keybrake-doctor");
    let written = std::fs::write(&probe, b"probe").and_then(|()| std::fs::remove_file(&probe));
    if let Err(error) = written {
        return finding("disk", Verdict::Bad, format!("{} cannot be written: {error}", data_dir.display()));
    }
    let shown = data_dir.display();
    match disk::kind_of(data_dir) {
        Some(kind) if disk::is_fleeting(&kind) => {
            let (verdict, lost) = match kept {
                Kept::Alone => (Verdict::Bad, "the ledger is lost with the container; mount a volume"),
                // Its records outlive it, and the loss is seen. The memory of charges does not.
                Kept::Shipped => (Verdict::Note, "the ledger is lost with the container; mount a volume"),
                Kept::Tls => (Verdict::Note, "an own CA is lost with the container"),
            };
            finding("disk", verdict, format!("{shown} is on {kind}: {lost}"))
        }
        Some(kind) => finding("disk", Verdict::Good, format!("{shown} is writable, on {kind}")),
        None => finding("disk", Verdict::Good, format!("{shown} is writable")),
    }
}

/// The ledger file: whose it is, and whether this build can read it.
fn ledger(config: &Config) -> Finding {
    let path = config.data_dir.join("keybrake.redb");
    if !path.exists() {
        return finding("ledger", Verdict::Note, "is made at the first start");
    }
    match inspect(&path) {
        Err(LedgerError::Locked) => finding("ledger", Verdict::Good, "is in use by a running sidecar"),
        Err(error) => finding("ledger", Verdict::Bad, format!("{}: {error}", path.display())),
        Ok((_, binding)) if binding.mode != config.stripe_mode.as_str() => finding(
            "ledger",
            Verdict::Bad,
            format!("belongs to {} mode, the Stripe key to {}", binding.mode, config.stripe_mode.as_str()),
        ),
        Ok((format, binding)) => {
            let account = binding.account.as_deref().unwrap_or("no account yet");
            finding("ledger", Verdict::Good, format!("format {format}, {} mode, {account}", binding.mode))
        }
    }
}

/// What the ledger takes of the disk, and what keeps it from taking ever more.
fn size(config: &Config) -> Option<Finding> {
    let bytes = disk::ledger_bytes(&config.data_dir).ok().filter(|bytes| *bytes > 0)?;
    let until = if config.collector.is_some() { " and until the collector has it" } else { "" };
    let told = format!(
        "the ledger takes {}; a call is remembered for {} days unless its key says otherwise, a record is kept for {} \
         days{until}",
        megabytes(bytes),
        config.remember_days,
        config.audit_days,
    );
    Some(finding("size", Verdict::Note, told))
}

fn megabytes(bytes: u64) -> String {
    let tenths = bytes.div_ceil(1_048_576 / 10);
    format!("{}.{} MB", tenths / 10, tenths % 10)
}

/// What other currencies count, and for how much longer.
fn rates(config: &Config) -> Finding {
    let fx = &config.fx;
    let units: Vec<String> = fx
        .units()
        .map(|(currency, micro_usd)| format!("1 {currency} = {} USD", MicroUsd::from_micros(micro_usd)))
        .collect();
    match units.is_empty() {
        true => finding("currencies", Verdict::Note, "only USD is counted; calls in others are refused"),
        false if fx.is_stale(Clock::System.now()) => finding(
            "currencies",
            Verdict::Bad,
            format!(
                "the rates of {} are too old: calls in other currencies than USD are refused",
                fx.as_of()
            ),
        ),
        false => finding("currencies", Verdict::Good, format!("as of {}: {}", fx.as_of(), units.join(", "))),
    }
}

/// Whether the collector takes this node's token.
async fn collector(config: &Config) -> Finding {
    let Some(collector) = &config.collector else {
        return finding("collector", Verdict::Note, "none: audit records stay on this machine");
    };
    let Target { url, format, .. } = &collector.target;
    if *format == Format::Ndjson {
        return finding("collector", Verdict::Note, format!("{url}: a log store, which cannot be asked"));
    }
    let client = tls::client_config(collector.ca_file.as_deref());
    let client = client.map_err(anyhow::Error::from).and_then(|tls| Ok(ship::client(tls)?));
    let client = match client {
        Ok(client) => client,
        Err(error) => return finding("collector", Verdict::Bad, format!("COLLECTOR_CA_FILE: {error:#}")),
    };
    let asked = collector.target.signed(client.get(format!("{url}/collect/v1/chains/none")));
    match asked.send().await {
        Ok(answer) if answer.status().is_success() => {
            finding("collector", Verdict::Good, format!("{url} takes this node's token"))
        }
        Ok(answer) if answer.status() == 401 => {
            finding("collector", Verdict::Bad, format!("{url} does not know COLLECTOR_TOKEN"))
        }
        Ok(answer) => finding("collector", Verdict::Bad, format!("{url} answers {}", answer.status())),
        Err(error) => {
            let why = ship::why(error);
            finding("collector", Verdict::Bad, format!("{url} does not answer ({why}); records wait here"))
        }
    }
}

async fn stripe(config: &Config) -> Finding {
    let client = match tls::client_config(config.stripe_ca_file.as_deref()) {
        Ok(client) => client,
        Err(error) => return finding("stripe", Verdict::Bad, format!("STRIPE_CA_FILE: {error}")),
    };
    let upstream = Upstream::new(UpstreamConfig::new(config.stripe_api_base.clone(), Arc::new(client)));
    let forwarder = Forwarder::new(upstream, config.stripe_secret_key.clone());
    let deadline = Instant::now() + Duration::from_millis(STRIPE_TIMEOUT_MS);
    let sent = forwarder.send_free(&FreeRequest::own_read("/v1/account"), deadline).await;
    let (verdict, told) = match sent {
        Sent::NotSent { reason } => {
            (Verdict::Bad, format!("{} cannot be reached ({})", config.stripe_api_base, reason.as_str()))
        }
        Sent::Unknown { reason } => {
            (Verdict::Bad, format!("{} does not answer ({})", config.stripe_api_base, reason.as_str()))
        }
        Sent::Answered(answer) => match (answer.status, &config.stripe_account) {
            (200, configured) => {
                let body: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
                let account = body["id"].as_str().unwrap_or("?").to_owned();
                if configured.as_ref().is_some_and(|configured| *configured != account) {
                    (Verdict::Bad, format!("the key belongs to {account}, not to STRIPE_ACCOUNT"))
                } else {
                    (Verdict::Good, format!("{} mode, account {account}", config.stripe_mode.as_str()))
                }
            }
            (403, Some(account)) => {
                (Verdict::Good, format!("the key may not read its account; STRIPE_ACCOUNT says {account}"))
            }
            (403, None) => (
                Verdict::Bad,
                "the key may not read its account: set STRIPE_ACCOUNT to its acct_… id".to_owned(),
            ),
            (status, _) => (Verdict::Bad, format!("Stripe answers {status} to this key")),
        },
    };
    finding("stripe", verdict, told)
}

async fn running() -> Vec<Finding> {
    let Ok(told) = readyz(OPS_TIMEOUT).await else {
        return vec![finding("sidecar", Verdict::Note, "is not running here")];
    };
    let list = |name: &str| -> Vec<String> {
        let items = told[name].as_array().into_iter().flatten().filter_map(Value::as_str);
        items.map(str::to_owned).collect()
    };
    let (reasons, warnings) = (list("reasons"), list("warnings"));
    let mut findings = vec![if reasons.is_empty() {
        finding("sidecar", Verdict::Good, "is running and ready")
    } else {
        finding("sidecar", Verdict::Bad, format!("is not ready: {}", reasons.join("; ")))
    }];
    findings.extend(warnings.into_iter().map(|told| finding("sidecar", Verdict::Note, told)));
    let metrics = ask_ops("/metrics", OPS_TIMEOUT).await.unwrap_or_default();
    let figure = |name: &str| {
        let of_name = |line: &str| line.strip_prefix(name)?.strip_prefix(' ')?.parse::<u64>().ok();
        metrics.lines().find_map(of_name)
    };
    if let (Some(bytes), Some(records)) =
        (figure("process_resident_memory_bytes"), figure("keybrake_audit_records"))
    {
        let told = format!("the sidecar takes {} and keeps {records} audit records", megabytes(bytes));
        findings.push(finding("memory", Verdict::Note, told));
    }
    findings
}

/// Asks the sidecar beside this process: the reasons why it is not ready.
///
/// # Errors
/// When it does not answer.
pub async fn ready(within: Duration) -> Result<Vec<String>> {
    let body = readyz(within).await?;
    if body["ready"].as_bool() == Some(true) {
        return Ok(Vec::new());
    }
    let reasons = body["reasons"].as_array().into_iter().flatten().filter_map(Value::as_str);
    Ok(reasons.map(str::to_owned).collect())
}

async fn readyz(within: Duration) -> Result<Value> {
    Ok(serde_json::from_str(&ask_ops("/readyz", within).await?)?)
}

/// What the sidecar beside this process answers there.
async fn ask_ops(path: &str, within: Duration) -> Result<String> {
    let address = crate::config::ops_address()?;
    let ask = async {
        let mut stream = tokio::net::TcpStream::connect(address).await?;
        let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.take(OPS_BYTES_MAX).read_to_string(&mut answer).await?;
        Ok::<_, anyhow::Error>(answer)
    };
    let Ok(answer) = tokio::time::timeout(within, ask).await else { bail!("{address} does not answer") };
    let answer = answer?;
    Ok(answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default())
}
