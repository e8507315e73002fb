//! The environment, read once and checked in whole.
//!
//! Owns: the names, defaults and meanings of all variables ([`VARIABLES`], [`CLIENT_VARIABLES`]), and their way from
//! the environment into [`Config`] and [`ClientConfig`].
//!
//! Invariants:
//! - Every bad setting is reported, not only the first one; no message holds the value of a secret.
//! - A name that nothing reads is refused, so that a misspelt limit is not silently absent. Settings that are not
//!   built yet are refused too.
//! - Defaults are those of the tables and of no other place.
//!
//! Never: keeps anything between two calls. [`Config::from_env`] may be called again at any time; files of secrets are
//! then read anew. No other module reads the environment.

mod check;
mod collect;
mod database;
mod given;

use std::ffi::OsString;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

pub use self::collect::{COLLECT_VARIABLES, CollectConfig, CollectorConfig, read_tokens};

use self::check::{Check, RawTls, or_default};
use self::collect::RawCollector;
use self::database::{Names, RawDatabase};
use self::given::{Given, Reader};
use crate::fx::Table;
use crate::postgres;
use crate::secret::{Mode, Secret};
use crate::tls::TlsSource;
use crate::upstream::Base;

const PREFIX: &str = "KEYBRAKE_";

/// One row of the table of settings.
#[derive(Clone, Copy, Debug)]
pub struct Variable {
    /// The whole name, prefix included.
    pub name: &'static str,
    /// What an unset variable stands for; empty when it has no fixed default.
    pub default: &'static str,
    /// One line for `--help`.
    pub meaning: &'static str,
    /// Whether it is never shown, and may be given as `<name>_FILE` instead.
    pub secret: bool,
}

const fn setting(name: &'static str, default: &'static str, meaning: &'static str) -> Variable {
    Variable { name, default, meaning, secret: false }
}

const fn secret(name: &'static str, meaning: &'static str) -> Variable {
    Variable { name, default: "", meaning, secret: true }
}

/// The settings of `serve`, in the order of the documentation.
pub const VARIABLES: &[Variable] = &[
    setting("KEYBRAKE_LISTEN", "127.0.0.1:8443", "address(es) of the proxy, comma separated"),
    setting("KEYBRAKE_OPS_LISTEN", "127.0.0.1:9464", "address(es) of metrics and probes (plain HTTP)"),
    setting("KEYBRAKE_DATA_DIR", "./keybrake-data", "directory of the ledger and of tls/, created 0700"),
    secret(
        "KEYBRAKE_LEDGER_URL",
        "postgres://…: one ledger for a fleet of workers; unset: a file in DATA_DIR",
    ),
    secret("KEYBRAKE_LEDGER_PASSWORD", "its password, where the URL has none"),
    setting("KEYBRAKE_LEDGER_CA_FILE", "", "PEM file of one more trust anchor towards the database"),
    setting("KEYBRAKE_LEDGER_SCHEMA", "keybrake", "schema in it, made when there is none"),
    secret("KEYBRAKE_ADMIN_KEY", "required: bearer of /admin and /audit, 32 characters or more; or two"),
    secret("KEYBRAKE_STRIPE_SECRET_KEY", "required: rk_… (recommended) or sk_…; sk_org_… is refused"),
    setting(
        "KEYBRAKE_STRIPE_ACCOUNT",
        "",
        "acct_…, for an rk_… that may not read it; unset: asked of Stripe",
    ),
    setting(
        "KEYBRAKE_STRIPE_API_BASE",
        "https://api.stripe.com",
        "where Stripe is; http:// only to loopback",
    ),
    setting("KEYBRAKE_STRIPE_CA_FILE", "", "PEM file of one more trust anchor towards Stripe"),
    setting("KEYBRAKE_TLS", "auto", "auto = own CA, made once in DATA_DIR/tls; files; off (loopback only)"),
    setting("KEYBRAKE_TLS_CERT_FILE", "", "PEM certificate chain, with TLS=files"),
    setting("KEYBRAKE_TLS_KEY_FILE", "", "PEM private key, with TLS=files"),
    setting("KEYBRAKE_TLS_NAMES", "localhost,127.0.0.1,::1", "names of the certificate, with TLS=auto"),
    setting("KEYBRAKE_CA_OUT", "", "the CA certificate goes to this file too, mode 0644, with TLS=auto"),
    setting("KEYBRAKE_NODE", "", "label of this sidecar in audit records and metrics; unset: host name"),
    setting("KEYBRAKE_COLLECTOR_URL", "", "where audit records are shipped to; unset: they stay here"),
    secret("KEYBRAKE_COLLECTOR_TOKEN", "bearer of the collector: this node's line in its file"),
    setting("KEYBRAKE_COLLECTOR_CA_FILE", "", "PEM file of one more trust anchor towards the collector"),
    setting(
        "KEYBRAKE_COLLECTOR_FORMAT",
        "keybrake",
        "keybrake = a collector of this program; ndjson = any log store",
    ),
    setting("KEYBRAKE_FX_FILE", "", "JSON file with the USD rates of other currencies; unset: USD only"),
    setting("KEYBRAKE_REMEMBER_DAYS", "40", "default of a key's remember_days, 2 to 400"),
    setting("KEYBRAKE_AUDIT_DAYS", "400", "days for which audit records are kept, 1 to 3650"),
    setting("KEYBRAKE_STAMP", "on", "on or off: put metadata[keybrake_call] on money objects"),
    setting("KEYBRAKE_UPSTREAM_TIMEOUT_MS", "75000", "deadline of a call, waiting included, 1000 to 600000"),
    setting("KEYBRAKE_DRAIN_MS", "9000", "time for calls in flight after SIGTERM, 0 to 600000"),
    setting("KEYBRAKE_MAX_BODY_BYTES", "1048576", "longest request body, 1024 to 16777216"),
    setting("KEYBRAKE_LOG", "info", "tracing filter for this program"),
    setting("KEYBRAKE_LOG_FORMAT", "json", "json or pretty"),
];

const LEDGER: Names = Names {
    url: "KEYBRAKE_LEDGER_URL",
    password: "KEYBRAKE_LEDGER_PASSWORD",
    ca_file: "KEYBRAKE_LEDGER_CA_FILE",
    schema: "KEYBRAKE_LEDGER_SCHEMA",
};

/// The settings of client commands, which `serve` ignores. They read `KEYBRAKE_ADMIN_KEY` too.
pub const CLIENT_VARIABLES: &[Variable] = &[
    setting("KEYBRAKE_URL", "https://localhost:8443", "the sidecar that client commands talk to"),
    setting("KEYBRAKE_CA", "", "PEM file of the CA that vouches for it"),
    secret("KEYBRAKE_ISSUER_KEY", "ik_…, in place of the admin key"),
    secret(
        "KEYBRAKE_COLLECT_QUERY_KEY",
        "the collector's, in place of the admin key, when --url is a collector",
    ),
];

/// One setting that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The variable, as the operator wrote it.
    pub name: String,
    /// What is wrong and what would be right; without the value of a secret.
    pub message: String,
}

/// All settings that cannot be used; at least one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct ConfigErrors(pub Vec<ConfigError>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, error) in self.0.iter().enumerate() {
            let line = if n == 0 { "" } else { "\n" };
            write!(f, "{line}{}: {}", error.name, error.message)?;
        }
        Ok(())
    }
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Pretty,
}

/// All settings of `serve`, checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// Addresses of the proxy, at least one.
    pub listen: Vec<SocketAddr>,
    /// Addresses of metrics and probes, at least one.
    pub ops_listen: Vec<SocketAddr>,
    /// Directory of the ledger; may not exist yet.
    pub data_dir: PathBuf,
    /// The database that has the ledger, which others may use too; unset: a file in `data_dir`.
    pub ledger: Option<postgres::Target>,
    /// One key or two, each of 32 characters or more.
    pub admin_keys: Vec<Secret>,
    /// The real key.
    pub stripe_secret_key: Secret,
    /// The mode that the real key names.
    pub stripe_mode: Mode,
    /// `acct_…`, when the operator names it.
    pub stripe_account: Option<String>,
    /// Where Stripe is.
    pub stripe_api_base: Base,
    /// One more trust anchor towards Stripe; readable when this was checked.
    pub stripe_ca_file: Option<PathBuf>,
    /// Certificates of the proxy; `None` = plain HTTP, on loopback only.
    pub tls: Option<TlsSource>,
    /// Where audit records are shipped to.
    pub collector: Option<CollectorConfig>,
    /// What other currencies count.
    pub fx: Table,
    /// Where that is read from; `None` = USD only.
    pub fx_file: Option<PathBuf>,
    /// Label of this sidecar: 1 to 128 printable ASCII characters.
    pub node: String,
    /// Default of a key's `remember_days`, 2 to 400.
    pub remember_days: u16,
    /// Days for which audit records are kept, 1 to 3650.
    pub audit_days: u16,
    /// Whether money objects are stamped.
    pub stamp: bool,
    /// One deadline from acceptance to answer.
    pub upstream_timeout: Duration,
    /// Time for calls in flight after SIGTERM.
    pub drain: Duration,
    /// Longest request body, in bytes.
    pub body_bytes_max: usize,
    /// A `tracing` filter that parses.
    pub log: String,
    /// How log lines look.
    pub log_format: LogFormat,
}

impl Config {
    /// Reads the environment of this process.
    ///
    /// # Errors
    ///
    /// All settings that cannot be used, in one go.
    pub fn from_env() -> Result<Self, ConfigErrors> {
        Self::from_pairs(std::env::vars_os())
    }

    /// Reads any environment. Files that it names are read too.
    ///
    /// # Errors
    ///
    /// As [`Config::from_env`].
    pub fn from_pairs(pairs: impl IntoIterator<Item = (OsString, OsString)>) -> Result<Self, ConfigErrors> {
        let (given, errors) = Given::sort(pairs, Reader::Serve);
        let host_name = given.host_name;
        let mut check = Check { errors };
        let raw: Raw = check.fill(given.values);
        let listen = check.addresses("KEYBRAKE_LISTEN", raw.listen);
        let ops_listen = check.addresses("KEYBRAKE_OPS_LISTEN", raw.ops_listen);
        check.distinct(&listen, &ops_listen);
        let data_dir = PathBuf::from(or_default("KEYBRAKE_DATA_DIR", raw.data_dir));
        let tls = check.tls(
            RawTls {
                mode: raw.tls,
                cert_file: raw.tls_cert_file,
                key_file: raw.tls_key_file,
                names: raw.tls_names,
                ca_out: raw.ca_out,
            },
            &data_dir,
            &listen,
        );
        let (stripe_secret_key, stripe_mode) =
            check.stripe_key(raw.stripe_secret_key, raw.stripe_secret_key_file);
        let fx_file = raw.fx_file.map(PathBuf::from);
        let config = Self {
            tls,
            stripe_secret_key,
            stripe_mode,
            admin_keys: check.admin_keys(raw.admin_key, raw.admin_key_file),
            stripe_account: check.stripe_account(raw.stripe_account),
            stripe_api_base: check.base("KEYBRAKE_STRIPE_API_BASE", raw.stripe_api_base),
            stripe_ca_file: check.readable("KEYBRAKE_STRIPE_CA_FILE", raw.stripe_ca_file),
            fx: check.fx(fx_file.as_deref()),
            fx_file,
            node: check.node(raw.node, host_name),
            remember_days: check.number("KEYBRAKE_REMEMBER_DAYS", raw.remember_days, 2, 400),
            audit_days: check.number("KEYBRAKE_AUDIT_DAYS", raw.audit_days, 1, 3650),
            stamp: check.choice("KEYBRAKE_STAMP", raw.stamp, &[("on", true), ("off", false)]),
            upstream_timeout: check.millis("KEYBRAKE_UPSTREAM_TIMEOUT_MS", raw.upstream_timeout_ms, 1000),
            drain: check.millis("KEYBRAKE_DRAIN_MS", raw.drain_ms, 0),
            body_bytes_max: check.number("KEYBRAKE_MAX_BODY_BYTES", raw.max_body_bytes, 1024, 16 << 20),
            log: check.log_filter(raw.log),
            log_format: check.log_format(raw.log_format),
            collector: check.collector(RawCollector {
                url: raw.collector_url,
                token: raw.collector_token,
                token_file: raw.collector_token_file,
                ca_file: raw.collector_ca_file,
                format: raw.collector_format,
            }),
            ledger: check.database(
                &LEDGER,
                RawDatabase {
                    url: raw.ledger_url,
                    url_file: raw.ledger_url_file,
                    password: raw.ledger_password,
                    password_file: raw.ledger_password_file,
                    ca_file: raw.ledger_ca_file,
                    schema: raw.ledger_schema,
                },
            ),
            listen,
            ops_listen,
            data_dir,
        };
        check.done(config)
    }
}

/// The key that a client command shows.
#[derive(Clone, Debug)]
pub enum ClientKey {
    /// May do everything.
    Admin(Secret),
    /// May mint, list and revoke its own keys and read its audit.
    Issuer(Secret),
    /// May ask a collector.
    Query(Secret),
}

impl ClientKey {
    /// The secret itself, whichever it is.
    pub const fn secret(&self) -> &Secret {
        match self {
            Self::Admin(secret) | Self::Issuer(secret) | Self::Query(secret) => secret,
        }
    }
}

/// What the command line says about the sidecar to talk to; it goes before the environment.
#[derive(Clone, Debug, Default)]
pub struct ClientFlags {
    /// `--url`.
    pub url: Option<String>,
    /// `--ca`.
    pub ca: Option<PathBuf>,
}

/// Settings of client commands, checked.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// The sidecar: scheme, host and port.
    pub url: Base,
    /// One more trust anchor towards it; readable when this was checked.
    pub ca: Option<PathBuf>,
    /// `None` where neither key is set; some commands need none.
    pub key: Option<ClientKey>,
}

impl ClientConfig {
    /// Reads the environment of this process.
    ///
    /// # Errors
    ///
    /// All settings that cannot be used, in one go. Settings of `serve` and `collect` are not looked at, names that no
    /// command knows are refused.
    pub fn from_env(flags: ClientFlags) -> Result<Self, ConfigErrors> {
        Self::from_pairs(flags, std::env::vars_os())
    }

    /// Reads any environment.
    ///
    /// # Errors
    ///
    /// As [`ClientConfig::from_env`].
    pub fn from_pairs(
        flags: ClientFlags,
        pairs: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Self, ConfigErrors> {
        let (given, errors) = Given::sort(pairs, Reader::Client);
        let mut check = Check { errors };
        let raw: RawClient = check.fill(given.values);
        let (ca_name, ca) = match flags.ca {
            Some(path) => ("--ca", Some(path)),
            None => ("KEYBRAKE_CA", raw.ca.map(PathBuf::from)),
        };
        if let Some(path) = &ca {
            check.can_open(ca_name, path);
        }
        let url = match flags.url {
            Some(text) => check.parse_base("--url", &text),
            None => check.base("KEYBRAKE_URL", raw.url),
        };
        let admin = check.secret("KEYBRAKE_ADMIN_KEY", raw.admin_key, raw.admin_key_file);
        let issuer = check.secret("KEYBRAKE_ISSUER_KEY", raw.issuer_key, raw.issuer_key_file);
        let query =
            check.secret("KEYBRAKE_COLLECT_QUERY_KEY", raw.collect_query_key, raw.collect_query_key_file);
        // While rotating there are two, and the first is as good as the second.
        let first = |text: String| Secret::new(text.split(',').next().unwrap_or_default().trim());
        let given = [
            ("KEYBRAKE_ADMIN_KEY", admin.map(first).map(ClientKey::Admin)),
            ("KEYBRAKE_ISSUER_KEY", issuer.map(Secret::new).map(ClientKey::Issuer)),
            ("KEYBRAKE_COLLECT_QUERY_KEY", query.map(Secret::new).map(ClientKey::Query)),
        ];
        let mut keys = given.into_iter().filter_map(|(name, key)| Some((name, key?)));
        let key = keys.next();
        for (name, _) in keys {
            let other = key.as_ref().map_or("", |(name, _)| name);
            check.refuse(name, format!("{other} is set too: unset one, so that it is clear who asks"));
        }
        let key = key.map(|(_, key)| key);
        check.done(Self { url, ca, key })
    }
}

/// Settings of `serve` as text. Each field is `KEYBRAKE_` and its name in upper case.
#[derive(Default, Deserialize)]
struct Raw {
    listen: Option<String>,
    ops_listen: Option<String>,
    data_dir: Option<String>,
    ledger_url: Option<String>,
    ledger_url_file: Option<String>,
    ledger_password: Option<String>,
    ledger_password_file: Option<String>,
    ledger_ca_file: Option<String>,
    ledger_schema: Option<String>,
    admin_key: Option<String>,
    admin_key_file: Option<String>,
    stripe_secret_key: Option<String>,
    stripe_secret_key_file: Option<String>,
    stripe_account: Option<String>,
    stripe_api_base: Option<String>,
    stripe_ca_file: Option<String>,
    tls: Option<String>,
    tls_cert_file: Option<String>,
    tls_key_file: Option<String>,
    tls_names: Option<String>,
    ca_out: Option<String>,
    node: Option<String>,
    collector_url: Option<String>,
    collector_token: Option<String>,
    collector_token_file: Option<String>,
    collector_ca_file: Option<String>,
    collector_format: Option<String>,
    fx_file: Option<String>,
    remember_days: Option<String>,
    audit_days: Option<String>,
    stamp: Option<String>,
    upstream_timeout_ms: Option<String>,
    drain_ms: Option<String>,
    max_body_bytes: Option<String>,
    log: Option<String>,
    log_format: Option<String>,
}

/// Settings of client commands as text.
#[derive(Default, Deserialize)]
struct RawClient {
    url: Option<String>,
    ca: Option<String>,
    admin_key: Option<String>,
    admin_key_file: Option<String>,
    issuer_key: Option<String>,
    issuer_key_file: Option<String>,
    collect_query_key: Option<String>,
    collect_query_key_file: Option<String>,
}

/// Where the sidecar beside this process answers probes: the first address of `OPS_LISTEN`. Needs no other setting, so
/// that a probe does not need the secrets.
///
/// # Errors
///
/// When it is no socket address.
pub fn ops_address() -> Result<SocketAddr, ConfigErrors> {
    let name = "KEYBRAKE_OPS_LISTEN";
    let given =
        std::env::vars_os().find(|(found, _)| found == name).and_then(|(_, value)| value.into_string().ok());
    let text = or_default(name, given.filter(|text| !text.trim().is_empty()));
    let first = text.split(',').next().unwrap_or_default().trim();
    let refused =
        || ConfigErrors(vec![ConfigError { name: name.into(), message: "is no socket address".into() }]);
    let mut address: SocketAddr = first.parse().map_err(|_| refused())?;
    if address.ip().is_unspecified() {
        address.set_ip(match address.ip() {
            std::net::IpAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            std::net::IpAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    Ok(address)
}

/// Reads the rates of other currencies again.
///
/// # Errors
/// Says what is wrong with the file, for an operator.
pub fn read_fx(path: &Path) -> Result<Table, String> {
    check::read_fx(path)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::os::unix::ffi::OsStringExt as _;

    use super::*;
    use crate::tls::TlsName;

    const ADMIN: &str = "0123456789abcdef0123456789abcdef";
    const STRIPE: &str = "rk_test_51ABCdef";

    type Pairs = Vec<(OsString, OsString)>;

    fn pairs(extra: &[(&str, &str)]) -> Pairs {
        let given: BTreeSet<&str> = extra.iter().map(|(name, _)| *name).collect();
        let required = [("KEYBRAKE_ADMIN_KEY", ADMIN), ("KEYBRAKE_STRIPE_SECRET_KEY", STRIPE)];
        let required = required
            .into_iter()
            .filter(|(name, _)| !given.contains(name) && !given.contains(format!("{name}_FILE").as_str()));
        required.chain(extra.iter().copied()).map(|(name, value)| (name.into(), value.into())).collect()
    }

    fn read(extra: &[(&str, &str)]) -> Config {
        Config::from_pairs(pairs(extra)).unwrap_or_else(|errors| panic!("{extra:?}: {errors}"))
    }

    fn refused(extra: &[(&str, &str)]) -> Vec<ConfigError> {
        Config::from_pairs(pairs(extra)).expect_err(&format!("{extra:?}")).0
    }

    fn names(errors: &[ConfigError]) -> Vec<&str> {
        errors.iter().map(|error| error.name.as_str()).collect()
    }

    #[test]
    fn defaults_are_those_of_the_contract() {
        let config = read(&[]);
        assert_eq!(config.listen, ["127.0.0.1:8443".parse().unwrap()]);
        assert_eq!(config.ops_listen, ["127.0.0.1:9464".parse().unwrap()]);
        assert_eq!(config.data_dir, Path::new("./keybrake-data"));
        assert_eq!(config.stripe_api_base.to_string(), "https://api.stripe.com");
        assert_eq!((config.stripe_account, config.stripe_ca_file), (None, None));
        let names = ["localhost", "127.0.0.1", "::1"].map(|name| TlsName::parse(name).unwrap()).to_vec();
        let dir = PathBuf::from("./keybrake-data/tls");
        assert_eq!(config.tls, Some(TlsSource::Auto { dir, names, ca_out: None }));
        assert_eq!((config.remember_days, config.audit_days, config.stamp), (40, 400, true));
        assert_eq!((config.upstream_timeout.as_millis(), config.drain.as_millis()), (75_000, 9_000));
        assert_eq!((config.body_bytes_max, config.log.as_str()), (1_048_576, "info"));
        assert_eq!((config.log_format, config.stripe_mode), (LogFormat::Json, Mode::Test));
        assert!(config.admin_keys[0].matches(ADMIN) && config.stripe_secret_key.matches(STRIPE));
        assert!(!config.node.is_empty());
    }

    #[test]
    fn table_and_reader_know_the_same_names() {
        // Every row is read: with a value that suits nothing it is refused by its own name.
        for row in VARIABLES {
            if ["KEYBRAKE_DATA_DIR", "KEYBRAKE_CA_OUT"].contains(&row.name) {
                assert!(Config::from_pairs(pairs(&[(row.name, "x")])).is_ok(), "{}", row.name);
                continue;
            }
            let errors = refused(&[(row.name, "\u{1}=")]);
            assert_eq!(names(&errors), [row.name], "{errors:?}");
            assert!(!errors[0].message.contains("no setting"), "{errors:?}");
            if row.secret {
                let file = format!("{}_FILE", row.name);
                assert_eq!(names(&refused(&[(&file, "/nowhere")])), [file.as_str()]);
            }
        }
        // And setting each default changes nothing.
        let defaults: Vec<_> = VARIABLES.iter().map(|row| (row.name, row.default)).collect();
        let defaults: Vec<_> = defaults.into_iter().filter(|(_, default)| !default.is_empty()).collect();
        assert_eq!(format!("{:?}", read(&defaults)), format!("{:?}", read(&[])));
        let unique: BTreeSet<_> = VARIABLES.iter().chain(CLIENT_VARIABLES).map(|row| row.name).collect();
        assert_eq!(unique.len(), VARIABLES.len() + CLIENT_VARIABLES.len());
    }

    #[test]
    fn all_errors_come_at_once() {
        let errors = refused(&[
            ("KEYBRAKE_ADMIN_KEY", ""),
            ("KEYBRAKE_STRIPE_SECRET_KEY", "pk_test_x"),
            ("KEYBRAKE_LISTEN", "here"),
            ("KEYBRAKE_REMEMBER_DAYS", "1"),
            ("KEYBRAKE_FX_FILE", "/nowhere"),
            ("KEYBRAKE_STMAP", "off"),
        ]);
        let expected = [
            "KEYBRAKE_STMAP",
            "KEYBRAKE_LISTEN",
            "KEYBRAKE_STRIPE_SECRET_KEY",
            "KEYBRAKE_ADMIN_KEY",
            "KEYBRAKE_FX_FILE",
            "KEYBRAKE_REMEMBER_DAYS",
        ];
        assert_eq!(names(&errors), expected);
        assert_eq!(ConfigErrors(errors).to_string().lines().count(), expected.len());
    }

    #[test]
    fn no_message_and_no_debug_shows_a_secret() {
        let marked = |text: &str| format!("{text}HUSH");
        let long = marked(&"ä".repeat(40));
        let cases: Vec<(&str, String)> = vec![
            ("KEYBRAKE_ADMIN_KEY", marked("short")),
            ("KEYBRAKE_ADMIN_KEY", long),
            ("KEYBRAKE_ADMIN_KEY", marked("a,b,c")),
            ("KEYBRAKE_STRIPE_SECRET_KEY", marked("sk_org_live_")),
            ("KEYBRAKE_STRIPE_SECRET_KEY", marked("sk_live_ ")),
            ("KEYBRAKE_STRIPE_SECRET_KEY", marked("")),
            ("KEYBRAKE_LEDGER_URL", marked("mysql://a:b@c/")),
            ("KEYBRAKE_COLLECTOR_TOKEN", marked("")),
            // In the wrong place.
            ("KEYBRAKE_LISTEN", marked("sk_live_")),
            ("KEYBRAKE_STRIPE_API_BASE", marked("https://user:pw@")),
            ("KEYBRAKE_STRIPE_ACCOUNT", marked("rk_live_")),
        ];
        for (name, value) in cases {
            let errors = refused(&[(name, &value)]);
            assert!(!format!("{errors:?}").contains("HUSH"), "{errors:?}");
        }
        let admin = marked(ADMIN);
        let token = marked("token-of-a-node-0123456789abcdef-0123");
        let config = read(&[
            ("KEYBRAKE_ADMIN_KEY", &admin),
            ("KEYBRAKE_STRIPE_SECRET_KEY", "rk_test_HUSH"),
            ("KEYBRAKE_COLLECTOR_URL", "https://collector:8444"),
            ("KEYBRAKE_COLLECTOR_TOKEN", &token),
        ]);
        assert!(config.collector.is_some());
        assert!(!format!("{config:?} {config:#?}").contains("HUSH"));
    }

    #[test]
    fn unknown_names_are_refused_and_those_of_kubernetes_ignored() {
        for name in [
            "KEYBRAKE_LISTN",
            "KEYBRAKE_",
            "KEYBRAKE_COLLECT_LISTEN",
            "KEYBRAKE_listen",
            "KEYBRAKE_LISTEN_FILE",
        ] {
            assert_eq!(names(&refused(&[(name, "x")])), [name]);
            assert_eq!(names(&refused(&[(name, "")])), [name], "empty, but nobody's");
        }
        for name in [
            "KEYBRAKE_SERVICE_HOST",
            "KEYBRAKE_SERVICE_PORT",
            "KEYBRAKE_SERVICE_PORT_HTTPS",
            "KEYBRAKE_PORT",
            "KEYBRAKE_PORT_8443_TCP",
            "KEYBRAKE_PORT_8443_TCP_ADDR",
            "KEYBRAKE_PORT_8443_UDP_PROTO",
            "KEYBRAKE_COLLECTOR_SERVICE_HOST",
            "KEYBRAKE_COLLECTOR_PORT_8444_TCP_PORT",
            "KEYBRAKE_URL",
            "KEYBRAKE_CA",
            "KEYBRAKE_ISSUER_KEY",
            "KEYBRAKE_ISSUER_KEY_FILE",
            "OTHER_LISTEN",
        ] {
            read(&[(name, "tcp://10.0.0.1:8443")]);
        }
        assert_eq!(names(&refused(&[("KEYBRAKE_PORT_HTTPS_TCP", "x")])), ["KEYBRAKE_PORT_HTTPS_TCP"]);
    }

    #[test]
    fn what_is_not_utf_8_is_an_error_that_names_the_variable() {
        let mut given = pairs(&[]);
        given.push(("KEYBRAKE_NODE".into(), OsString::from_vec(vec![b'a', 0xff])));
        given.push((OsString::from_vec(b"KEYBRAKE_N\xff".to_vec()), "x".into()));
        given.push((OsString::from_vec(vec![0xff]), OsString::from_vec(vec![0xff])));
        let errors = Config::from_pairs(given).unwrap_err().0;
        assert_eq!(names(&errors), ["KEYBRAKE_NODE", "KEYBRAKE_N\u{fffd}"]);
    }

    #[test]
    fn secrets_come_from_files_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin");
        let shown = path.to_str().unwrap();
        for text in [ADMIN.to_owned(), format!("{ADMIN}\n"), format!("{ADMIN}\r\n")] {
            fs::write(&path, text).unwrap();
            assert!(read(&[("KEYBRAKE_ADMIN_KEY_FILE", shown)]).admin_keys[0].matches(ADMIN));
        }
        let both = [("KEYBRAKE_ADMIN_KEY_FILE", shown), ("KEYBRAKE_ADMIN_KEY", ADMIN)];
        assert_eq!(names(&refused(&both)), ["KEYBRAKE_ADMIN_KEY_FILE"]);
        for bytes in [&b""[..], b"\n", b"\xff\xfe", b"short", &vec![b'x'; 70_000]] {
            fs::write(&path, bytes).unwrap();
            let errors = refused(&[("KEYBRAKE_ADMIN_KEY_FILE", shown)]);
            assert_eq!(names(&errors), ["KEYBRAKE_ADMIN_KEY_FILE"], "{errors:?}");
        }
        fs::remove_file(&path).unwrap();
        let errors = refused(&[("KEYBRAKE_ADMIN_KEY_FILE", shown)]);
        let uid = std::os::unix::fs::MetadataExt::uid(&fs::metadata("/proc/self").unwrap());
        assert!(errors[0].message.contains(&format!("uid {uid}:")), "{errors:?}");
        let errors = refused(&[("KEYBRAKE_ADMIN_KEY_FILE", dir.path().to_str().unwrap())]);
        assert_eq!(names(&errors), ["KEYBRAKE_ADMIN_KEY_FILE"]);
    }

    #[test]
    fn admin_keys_are_long_and_at_most_two() {
        let two = format!("{ADMIN}, {ADMIN}x");
        let keys = read(&[("KEYBRAKE_ADMIN_KEY", &two)]).admin_keys;
        assert!(keys.len() == 2 && keys[0].matches(ADMIN) && keys[1].matches(&format!("{ADMIN}x")));
        for bad in
            [ADMIN[1..].to_owned(), format!("{ADMIN},"), format!("{ADMIN} {ADMIN}"), format!("{two},{ADMIN}")]
        {
            assert_eq!(names(&refused(&[("KEYBRAKE_ADMIN_KEY", &bad)])), ["KEYBRAKE_ADMIN_KEY"], "{bad}");
        }
    }

    #[test]
    fn only_keys_of_one_account_are_taken() {
        for (key, mode) in [
            ("sk_test_1", Mode::Test),
            ("sk_live_1", Mode::Live),
            ("rk_test_1", Mode::Test),
            ("rk_live_1", Mode::Live),
        ] {
            assert_eq!(read(&[("KEYBRAKE_STRIPE_SECRET_KEY", key)]).stripe_mode, mode);
        }
        for key in
            ["sk_org_live_1", "pk_live_1", "vk_test_1", "sk_live_", "sk_live_a b", "sk_1", " sk_live_1"]
        {
            let errors = refused(&[("KEYBRAKE_STRIPE_SECRET_KEY", key)]);
            assert_eq!(names(&errors), ["KEYBRAKE_STRIPE_SECRET_KEY"]);
        }
        assert!(refused(&[("KEYBRAKE_STRIPE_SECRET_KEY", "sk_org_x")])[0].message.contains("organisation"));
    }

    #[test]
    fn tls_settings_fit_together() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pem");
        fs::write(&file, "").unwrap();
        let path = file.to_str().unwrap();
        let files =
            [("KEYBRAKE_TLS", "files"), ("KEYBRAKE_TLS_CERT_FILE", path), ("KEYBRAKE_TLS_KEY_FILE", path)];
        assert_eq!(read(&files).tls, Some(TlsSource::Files { cert: file.clone(), key: file.clone() }));
        assert_eq!(read(&[("KEYBRAKE_TLS", "off")]).tls, None);
        assert_eq!(read(&[("KEYBRAKE_TLS", "off"), ("KEYBRAKE_LISTEN", "[::1]:1,127.0.0.2:2")]).tls, None);
        for (extra, bad) in [
            (vec![("KEYBRAKE_TLS", "off"), ("KEYBRAKE_LISTEN", "0.0.0.0:8443")], vec!["KEYBRAKE_TLS"]),
            (vec![("KEYBRAKE_TLS", "on")], vec!["KEYBRAKE_TLS"]),
            (vec![("KEYBRAKE_TLS", "files")], vec!["KEYBRAKE_TLS_CERT_FILE", "KEYBRAKE_TLS_KEY_FILE"]),
            (vec![("KEYBRAKE_TLS_CERT_FILE", path)], vec!["KEYBRAKE_TLS_CERT_FILE"]),
            (vec![("KEYBRAKE_TLS", "off"), ("KEYBRAKE_CA_OUT", path)], vec!["KEYBRAKE_CA_OUT"]),
            (vec![("KEYBRAKE_TLS_NAMES", "a,b c")], vec!["KEYBRAKE_TLS_NAMES"]),
            (vec![("KEYBRAKE_TLS_NAMES", "a,")], vec!["KEYBRAKE_TLS_NAMES"]),
        ] {
            assert_eq!(names(&refused(&extra)), bad, "{extra:?}");
        }
    }

    #[test]
    fn bounds_hold() {
        for (name, low, high) in [
            ("KEYBRAKE_REMEMBER_DAYS", 2, 400),
            ("KEYBRAKE_AUDIT_DAYS", 1, 3650),
            ("KEYBRAKE_UPSTREAM_TIMEOUT_MS", 1000, 600_000),
            ("KEYBRAKE_DRAIN_MS", 0, 600_000),
            ("KEYBRAKE_MAX_BODY_BYTES", 1024, 16_777_216),
        ] {
            for good in [low, high] {
                read(&[(name, &good.to_string())]);
            }
            let bad = [
                (low - 1).to_string(),
                (high + 1).to_string(),
                "x".to_owned(),
                format!("+{high}"),
                "99999999999999999999999".to_owned(),
            ];
            for bad in bad {
                assert_eq!(names(&refused(&[(name, &bad)])), [name], "{bad}");
            }
        }
    }

    #[test]
    fn addresses_labels_and_filters_are_checked() {
        let config =
            read(&[("KEYBRAKE_LISTEN", "127.0.0.1:1, [::1]:1"), ("KEYBRAKE_OPS_LISTEN", "0.0.0.0:1")]);
        assert_eq!((config.listen.len(), config.ops_listen.len()), (2, 1));
        for log in ["info", "debug,keybrake::proxy=trace", "keybrake=debug", "warn,hyper=info", "off"] {
            assert_eq!(read(&[("KEYBRAKE_LOG", log)]).log, log);
        }
        assert_eq!(read(&[("KEYBRAKE_NODE", "eu-1 a")]).node, "eu-1 a");
        for (name, value) in [
            ("KEYBRAKE_LISTEN", "localhost:1"),
            ("KEYBRAKE_LISTEN", "127.0.0.1"),
            ("KEYBRAKE_LISTEN", "127.0.0.1:1,127.0.0.1:1"),
            ("KEYBRAKE_OPS_LISTEN", "127.0.0.1:8443"),
            ("KEYBRAKE_LOG", "verbose"),
            ("KEYBRAKE_LOG", "keybrake=loud"),
            ("KEYBRAKE_NODE", "ä"),
            ("KEYBRAKE_STRIPE_ACCOUNT", "acct_"),
            ("KEYBRAKE_STRIPE_ACCOUNT", "cus_1"),
            ("KEYBRAKE_STRIPE_CA_FILE", "/nowhere/ca.pem"),
            ("KEYBRAKE_STRIPE_API_BASE", "http://api.stripe.com"),
            ("KEYBRAKE_STAMP", "yes"),
            ("KEYBRAKE_LOG_FORMAT", "text"),
        ] {
            assert_eq!(names(&refused(&[(name, value)])), [name], "{value}");
        }
    }

    fn client(flags: ClientFlags, extra: &[(&str, &str)]) -> Result<ClientConfig, ConfigErrors> {
        ClientConfig::from_pairs(flags, extra.iter().map(|(name, value)| (name.into(), value.into())))
    }

    #[test]
    fn client_commands_read_their_own_settings() {
        let config = client(ClientFlags::default(), &[]).unwrap();
        assert_eq!((config.url.to_string().as_str(), config.ca.is_none()), ("https://localhost:8443", true));
        assert!(config.key.is_none());
        let two = format!("{ADMIN},{ADMIN}x");
        let extra = [
            ("KEYBRAKE_ADMIN_KEY", two.as_str()),
            ("KEYBRAKE_LISTEN", "?"),
            ("KEYBRAKE_COLLECT_LISTEN", "?"),
        ];
        let config = client(ClientFlags::default(), &extra).unwrap();
        assert!(matches!(config.key, Some(ClientKey::Admin(key)) if key.matches(ADMIN)));
        let config = client(ClientFlags::default(), &[("KEYBRAKE_ISSUER_KEY", "ik_test_1")]).unwrap();
        assert!(matches!(config.key, Some(ClientKey::Issuer(key)) if key.matches("ik_test_1")));
        let flags = ClientFlags { url: Some("http://127.0.0.1:1".to_owned()), ca: None };
        let config = client(flags, &[("KEYBRAKE_URL", "nonsense, but overruled")]).unwrap();
        assert_eq!(config.url.to_string(), "http://127.0.0.1:1");
    }

    #[test]
    fn client_commands_tell_all_errors_too() {
        let flags = ClientFlags { url: Some("http://far.example".to_owned()), ca: Some("/nowhere".into()) };
        let extra = [
            ("KEYBRAKE_ISSUER_KEY", "ik_test_HUSH"),
            ("KEYBRAKE_ADMIN_KEY", "HUSH"),
            ("KEYBRAKE_ISUER_KEY", "x"),
        ];
        let errors = client(flags, &extra).unwrap_err();
        assert_eq!(names(&errors.0), ["KEYBRAKE_ISUER_KEY", "--ca", "--url", "KEYBRAKE_ISSUER_KEY"]);
        assert!(!errors.to_string().contains("HUSH"));
    }
}
