//! `keys` and `issuers`: who may spend.
#![expect(clippy::doc_markdown, reason = "doc comments of arguments are the text of --help")]

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use crate::cli::{Target, Usage, client, filters, show_list, show_object};

#[derive(Debug, Subcommand)]
pub(super) enum Keys {
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
pub(super) struct Issue {
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
    /// Dollars for one call; also what an operation holds whose price nobody can know, such as a subscription
    #[arg(long)]
    max_usd_per_request: Option<String>,
    /// Dollars of money out (refunds, payouts, transfers), counted apart
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
    /// JSON object of constraints: parameter to a list of values, or to min and max
    #[arg(long)]
    constraints: Option<String>,
    /// A connected account (acct_…) that Stripe-Account may name; may be repeated
    #[arg(long = "account")]
    accounts: Vec<String>,
    /// NAME=VALUE, copied into every audit record; may be repeated
    #[arg(long = "metadata")]
    metadata: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub(super) enum Issuers {
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
pub(super) struct CreateIssuer {
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
    /// Dollars of money out (refunds, payouts, transfers) for all its keys together in a UTC day
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

/// Runs a command on vault keys.
pub(super) async fn keys(command: Keys, target: &Target) -> Result<ExitCode> {
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
    if !issue.accounts.is_empty() {
        set("accounts", json!(issue.accounts));
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

/// Runs a command on issuer keys.
pub(super) async fn issuers(command: Issuers, target: &Target) -> Result<ExitCode> {
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
