//! The settings of `collect`, and those of a sidecar towards a collector.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use serde::Deserialize;

use super::check::{Check, RawTls, or_default, unreadable};
use super::database::{Names, RawDatabase};
use super::given::{Given, Reader};
use super::{ConfigErrors, LogFormat, Variable, secret, setting};
use crate::collect::{NodeToken, TOKEN_CHARS_MIN, parse_tokens};
use crate::postgres;
use crate::secret::Secret;
use crate::ship::{Format, Target};
use crate::tls::TlsSource;
use crate::upstream::Base;

const TOKENS_BYTES_MAX: u64 = 1 << 20;

/// The settings of `collect`, in the order of the documentation. It reads those of TLS, of the log and `DRAIN_MS` too.
pub const COLLECT_VARIABLES: &[Variable] = &[
    setting("KEYBRAKE_COLLECT_LISTEN", "127.0.0.1:8444", "address(es) of the collector, comma separated"),
    setting(
        "KEYBRAKE_COLLECT_OPS_LISTEN",
        "127.0.0.1:9465",
        "address(es) of its metrics and probes (plain HTTP)",
    ),
    setting(
        "KEYBRAKE_COLLECT_DATA_DIR",
        "./keybrake-collector",
        "directory of its records and of tls/, created 0700",
    ),
    secret(
        "KEYBRAKE_COLLECT_DATABASE_URL",
        "postgres://…: records go to this database, which several collectors may share; unset: to COLLECT_DATA_DIR",
    ),
    secret("KEYBRAKE_COLLECT_DATABASE_PASSWORD", "its password, where the URL has none"),
    setting(
        "KEYBRAKE_COLLECT_DATABASE_CA_FILE",
        "",
        "PEM file of one more trust anchor towards the database",
    ),
    setting("KEYBRAKE_COLLECT_DATABASE_SCHEMA", "keybrake_collect", "schema in it, made when there is none"),
    setting("KEYBRAKE_COLLECT_TOKENS_FILE", "", "required: who may send, one `node token` a line"),
    secret(
        "KEYBRAKE_COLLECT_QUERY_KEY",
        "who may ask: bearer of /audit, 32 characters or more; unset: the nodes only",
    ),
    setting("KEYBRAKE_COLLECT_DAYS", "400", "days for which records are kept, 1 to 3650"),
];

const DATABASE: Names = Names {
    url: "KEYBRAKE_COLLECT_DATABASE_URL",
    password: "KEYBRAKE_COLLECT_DATABASE_PASSWORD",
    ca_file: "KEYBRAKE_COLLECT_DATABASE_CA_FILE",
    schema: "KEYBRAKE_COLLECT_DATABASE_SCHEMA",
};

/// Settings of others that `collect` reads.
pub(super) const SHARED: &[&str] = &[
    "KEYBRAKE_TLS",
    "KEYBRAKE_TLS_CERT_FILE",
    "KEYBRAKE_TLS_KEY_FILE",
    "KEYBRAKE_TLS_NAMES",
    "KEYBRAKE_CA_OUT",
    "KEYBRAKE_DRAIN_MS",
    "KEYBRAKE_LOG",
    "KEYBRAKE_LOG_FORMAT",
];

/// All settings of `collect`, checked.
#[derive(Clone, Debug)]
pub struct CollectConfig {
    /// Addresses of the collector, at least one.
    pub listen: Vec<SocketAddr>,
    /// Addresses of metrics and probes, at least one.
    pub ops_listen: Vec<SocketAddr>,
    /// Directory of the records, unless a database has them, and of `tls/`; may not exist yet.
    pub data_dir: PathBuf,
    /// Where the records go instead.
    pub database: Option<postgres::Target>,
    /// Certificates; `None` = plain HTTP, on loopback only.
    pub tls: Option<TlsSource>,
    /// Who may send, at least one.
    pub tokens: Vec<NodeToken>,
    /// Who may ask, besides those.
    pub query_key: Option<Secret>,
    /// Days for which records are kept, 1 to 3650.
    pub days: u16,
    /// Time for requests in flight after SIGTERM.
    pub drain: Duration,
    /// A `tracing` filter that parses.
    pub log: String,
    /// How log lines look.
    pub log_format: LogFormat,
}

#[derive(Default, Deserialize)]
struct Raw {
    collect_listen: Option<String>,
    collect_ops_listen: Option<String>,
    collect_data_dir: Option<String>,
    collect_database_url: Option<String>,
    collect_database_url_file: Option<String>,
    collect_database_password: Option<String>,
    collect_database_password_file: Option<String>,
    collect_database_ca_file: Option<String>,
    collect_database_schema: Option<String>,
    collect_tokens_file: Option<String>,
    collect_query_key: Option<String>,
    collect_query_key_file: Option<String>,
    collect_days: Option<String>,
    tls: Option<String>,
    tls_cert_file: Option<String>,
    tls_key_file: Option<String>,
    tls_names: Option<String>,
    ca_out: Option<String>,
    drain_ms: Option<String>,
    log: Option<String>,
    log_format: Option<String>,
}

impl CollectConfig {
    /// Reads the environment of this process.
    ///
    /// # Errors
    ///
    /// All settings that cannot be used, in one go. Those of `serve` and of client commands are not looked at, names that
    /// no command knows are refused.
    pub fn from_env() -> Result<Self, ConfigErrors> {
        Self::from_pairs(std::env::vars_os())
    }

    /// Reads any environment. Files that it names are read too.
    ///
    /// # Errors
    ///
    /// As [`CollectConfig::from_env`].
    pub fn from_pairs(pairs: impl IntoIterator<Item = (OsString, OsString)>) -> Result<Self, ConfigErrors> {
        let (given, errors) = Given::sort(pairs, Reader::Collect);
        let mut check = Check { errors };
        let raw: Raw = check.fill(given.values);
        let listen = check.addresses("KEYBRAKE_COLLECT_LISTEN", raw.collect_listen);
        let ops_listen = check.addresses("KEYBRAKE_COLLECT_OPS_LISTEN", raw.collect_ops_listen);
        check.distinct(&listen, &ops_listen);
        let data_dir = PathBuf::from(or_default("KEYBRAKE_COLLECT_DATA_DIR", raw.collect_data_dir));
        let tls = RawTls {
            mode: raw.tls,
            cert_file: raw.tls_cert_file,
            key_file: raw.tls_key_file,
            names: raw.tls_names,
            ca_out: raw.ca_out,
        };
        let query_key =
            check.secret("KEYBRAKE_COLLECT_QUERY_KEY", raw.collect_query_key, raw.collect_query_key_file);
        if query_key.as_ref().is_some_and(|key| key.chars().count() < TOKEN_CHARS_MIN) {
            check.refuse("KEYBRAKE_COLLECT_QUERY_KEY", "needs 32 characters or more");
        }
        let database = RawDatabase {
            url: raw.collect_database_url,
            url_file: raw.collect_database_url_file,
            password: raw.collect_database_password,
            password_file: raw.collect_database_password_file,
            ca_file: raw.collect_database_ca_file,
            schema: raw.collect_database_schema,
        };
        let config = Self {
            tls: check.tls(tls, &data_dir, &listen),
            database: check.database(&DATABASE, database),
            tokens: check.tokens(raw.collect_tokens_file),
            query_key: query_key.map(Secret::new),
            days: check.number("KEYBRAKE_COLLECT_DAYS", raw.collect_days, 1, 3650),
            drain: check.millis("KEYBRAKE_DRAIN_MS", raw.drain_ms, 0),
            log: check.log_filter(raw.log),
            log_format: check.log_format(raw.log_format),
            listen,
            ops_listen,
            data_dir,
        };
        check.done(config)
    }
}

/// What a sidecar is told of its collector, as text.
pub(super) struct RawCollector {
    pub(super) url: Option<String>,
    pub(super) token: Option<String>,
    pub(super) token_file: Option<String>,
    pub(super) ca_file: Option<String>,
    pub(super) format: Option<String>,
}

/// Where a sidecar ships its records, checked.
#[derive(Clone, Debug)]
pub struct CollectorConfig {
    /// Where and how.
    pub target: Target,
    /// One more trust anchor towards it; readable when this was checked.
    pub ca_file: Option<PathBuf>,
}

impl Check {
    pub(super) fn log_format(&mut self, given: Option<String>) -> LogFormat {
        let formats = [("json", LogFormat::Json), ("pretty", LogFormat::Pretty)];
        self.choice("KEYBRAKE_LOG_FORMAT", given, &formats)
    }

    fn tokens(&mut self, given: Option<String>) -> Vec<NodeToken> {
        let name = "KEYBRAKE_COLLECT_TOKENS_FILE";
        let Some(path) = given else {
            self.refuse(name, "is required: one `node token` a line");
            return Vec::new();
        };
        match read_tokens(Path::new(&path)) {
            Ok(tokens) => tokens,
            Err(why) => {
                self.refuse(name, why);
                Vec::new()
            }
        }
    }

    pub(super) fn collector(&mut self, raw: RawCollector) -> Option<CollectorConfig> {
        let formats = [("keybrake", Format::Keybrake), ("ndjson", Format::Ndjson)];
        let format = self.choice("KEYBRAKE_COLLECTOR_FORMAT", raw.format, &formats);
        let token_name = if raw.token_file.is_some() {
            "KEYBRAKE_COLLECTOR_TOKEN_FILE"
        } else {
            "KEYBRAKE_COLLECTOR_TOKEN"
        };
        let has_token = raw.token.is_some() || raw.token_file.is_some();
        let Some(url) = raw.url else {
            let only = "has a meaning only with KEYBRAKE_COLLECTOR_URL";
            if has_token {
                self.refuse(token_name, only);
            }
            if raw.ca_file.is_some() {
                self.refuse("KEYBRAKE_COLLECTOR_CA_FILE", only);
            }
            return None;
        };
        let ca_file = self.readable("KEYBRAKE_COLLECTOR_CA_FILE", raw.ca_file);
        let url = self.collector_url(&url, format)?;
        let token = self.secret("KEYBRAKE_COLLECTOR_TOKEN", raw.token, raw.token_file);
        let token = match token {
            Some(token) => token,
            None if has_token => return None,
            None => {
                self.refuse(token_name, "is required with KEYBRAKE_COLLECTOR_URL");
                return None;
            }
        };
        let is_short = format == Format::Keybrake && token.len() < TOKEN_CHARS_MIN;
        if is_short || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            self.refuse(
                token_name,
                "needs 32 printable ASCII characters or more, as in the collector's file",
            );
        }
        Some(CollectorConfig {
            target: Target { url, token: Arc::new(RwLock::new(Secret::new(token))), format },
            ca_file,
        })
    }

    /// An origin; for a log store with a path.
    fn collector_url(&mut self, text: &str, format: Format) -> Option<String> {
        let name = "KEYBRAKE_COLLECTOR_URL";
        let after = text.find("://").map_or(0, |at| at + 3);
        let (origin, path) = match text[after..].find('/') {
            Some(at) => text.split_at(after + at),
            None => (text, ""),
        };
        let path = path.trim_end_matches('/');
        let is_plain = path.bytes().all(|byte| byte.is_ascii_graphic() && !b"?#%\"<>\\^`{|}".contains(&byte));
        if !path.is_empty() && (format == Format::Keybrake || !is_plain) {
            self.refuse(
                name,
                "must be an origin such as https://collector:8444, and with ndjson may have a plain path",
            );
            return None;
        }
        match Base::parse(origin) {
            Ok(base) => Some(format!("{}{path}", base.to_string().trim_end_matches('/'))),
            Err(error) => {
                self.refuse(name, error.to_string());
                None
            }
        }
    }
}

/// Reads a file of tokens.
///
/// # Errors
/// Says what is wrong with it, never what it holds.
pub fn read_tokens(path: &Path) -> Result<Vec<NodeToken>, String> {
    use std::io::Read as _;
    let mut text = String::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(TOKENS_BYTES_MAX).read_to_string(&mut text))
        .map_err(|error| unreadable(&error))?;
    parse_tokens(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "token-of-a-node-0123456789abcdef-0123";

    fn read(tokens: &str, extra: &[(&str, &str)]) -> Result<CollectConfig, ConfigErrors> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), tokens).unwrap();
        let own = [("KEYBRAKE_COLLECT_TOKENS_FILE", file.path().to_str().unwrap())];
        let pairs = own.into_iter().chain(extra.iter().copied());
        CollectConfig::from_pairs(pairs.map(|(name, value)| (name.into(), value.into())))
    }

    fn refused(tokens: &str, extra: &[(&str, &str)]) -> String {
        read(tokens, extra).unwrap_err().to_string()
    }

    #[test]
    fn defaults_and_tokens() {
        let config = read(&format!("# who\n\nnode a {TOKEN}\nnode-b\t{TOKEN}b\n"), &[]).unwrap();
        assert_eq!(config.listen, ["127.0.0.1:8444".parse().unwrap()]);
        assert_eq!(config.ops_listen, ["127.0.0.1:9465".parse().unwrap()]);
        let nodes: Vec<&str> = config.tokens.iter().map(|known| known.node.as_str()).collect();
        assert_eq!(nodes, ["node a", "node-b"]);
        assert!(config.tokens[0].token.matches(TOKEN) && config.query_key.is_none());
        assert_eq!((config.days, config.data_dir), (400, PathBuf::from("./keybrake-collector")));
        assert!(
            matches!(config.tls, Some(TlsSource::Auto { dir, .. }) if dir == Path::new("./keybrake-collector/tls"))
        );
    }

    #[test]
    fn bad_settings_are_told_without_a_secret() {
        for (tokens, extra, told) in [
            ("", vec![], "KEYBRAKE_COLLECT_TOKENS_FILE: names no node"),
            ("node", vec![], "line 1: is not `node token`"),
            ("node HUSH", vec![], "line 1: the token needs 32"),
            ("a ok", vec![("KEYBRAKE_COLLECT_QUERY_KEY", "HUSH")], "KEYBRAKE_COLLECT_QUERY_KEY: needs 32"),
            ("a ok", vec![("KEYBRAKE_COLLECT_DAYS", "0")], "KEYBRAKE_COLLECT_DAYS"),
            (
                "a ok",
                vec![("KEYBRAKE_COLLECT_DATABASE_URL", "mysql://u:HUSH@db/b")],
                "KEYBRAKE_COLLECT_DATABASE_URL: must be a URL such as postgres://",
            ),
            (
                "a ok",
                vec![
                    ("KEYBRAKE_COLLECT_DATABASE_URL", "postgres://u:HUSH@db/b"),
                    ("KEYBRAKE_COLLECT_DATABASE_PASSWORD", "HUSH"),
                ],
                "KEYBRAKE_COLLECT_DATABASE_PASSWORD: holds a password, and another",
            ),
            (
                "a ok",
                vec![
                    ("KEYBRAKE_COLLECT_DATABASE_URL", "postgres://u:HUSH@db/b"),
                    ("KEYBRAKE_COLLECT_DATABASE_SCHEMA", "Mine"),
                ],
                "KEYBRAKE_COLLECT_DATABASE_SCHEMA: the name of a schema",
            ),
            (
                "a ok",
                vec![
                    ("KEYBRAKE_COLLECT_DATABASE_URL", "postgres://u:HUSH@db/b"),
                    ("KEYBRAKE_COLLECT_DATABASE_CA_FILE", "/nowhere"),
                ],
                "KEYBRAKE_COLLECT_DATABASE_CA_FILE: /nowhere",
            ),
            (
                "a ok",
                vec![("KEYBRAKE_COLLECT_DATABASE_PASSWORD", "HUSH")],
                "KEYBRAKE_COLLECT_DATABASE_PASSWORD: has a meaning only with KEYBRAKE_COLLECT_DATABASE_URL",
            ),
            (
                "a ok",
                vec![("KEYBRAKE_COLLECT_DATABASE_URL_FILE", "/nowhere")],
                "KEYBRAKE_COLLECT_DATABASE_URL_FILE: `/nowhere`",
            ),
            ("a ok", vec![("KEYBRAKE_COLLECT_LISTN", "x")], "KEYBRAKE_COLLECT_LISTN: is no setting"),
            ("a ok", vec![("KEYBRAKE_TLS", "off"), ("KEYBRAKE_COLLECT_LISTEN", "0.0.0.0:1")], "KEYBRAKE_TLS"),
        ] {
            let errors = refused(&tokens.replace("ok", TOKEN), &extra);
            assert!(errors.contains(told) && !errors.contains("HUSH"), "{errors}");
        }
        let twice = refused(&format!("a {TOKEN}\nb {TOKEN}"), &[]);
        assert!(twice.contains("line 2: the token is another line's too"), "{twice}");
        // A mounted file mostly fails by its owner, so the message names the uid that may not read it.
        let gone = CollectConfig::from_pairs([("KEYBRAKE_COLLECT_TOKENS_FILE".into(), "/nowhere".into())]);
        let uid = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata("/proc/self").unwrap());
        let told = format!("KEYBRAKE_COLLECT_TOKENS_FILE: cannot be read by uid {uid}: ");
        assert!(gone.unwrap_err().to_string().contains(&told));
        let with = read(
            &format!("a {TOKEN}"),
            &[
                ("KEYBRAKE_COLLECT_DATABASE_URL", "postgres://u@db/b"),
                ("KEYBRAKE_COLLECT_DATABASE_PASSWORD", "HUSH"),
            ],
        );
        let (with, database) = (format!("{with:?}"), with.unwrap().database.unwrap());
        assert_eq!(database.place(), "db:5432/b, schema keybrake_collect");
        assert!(database.is_encrypted() && !with.contains("HUSH"), "{with}");
        // Secrets of a sidecar are no business of a collector's.
        read(&format!("a {TOKEN}"), &[("KEYBRAKE_ADMIN_KEY", "x"), ("KEYBRAKE_URL", "y")]).unwrap();
    }
}
