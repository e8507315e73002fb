//! The checks of single settings.
//!
//! Owns: what each text must look like, and the words of each error.
//!
//! Invariants: each check gives a usable value, or records an error and gives a stand-in; no words repeat a secret.
//!
//! Never: stops at the first error, or reads the environment.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;

use super::{CLIENT_VARIABLES, COLLECT_VARIABLES, ConfigError, ConfigErrors, PREFIX, VARIABLES};
use crate::fx::Table;
use crate::secret::{Mode, Secret, looks_like_stripe_key, stripe_key_mode};
use crate::tls::{TlsName, TlsSource};
use crate::upstream::Base;

/// Under `DATA_DIR`.
const TLS_DIR: &str = "tls";
const ADMIN_KEY_CHARS_MIN: usize = 32;
/// The one in use and, while rotating, the one to come.
const ADMIN_KEYS_MAX: usize = 2;
const SECRET_FILE_BYTES_MAX: u64 = 64 << 10;
const FX_FILE_BYTES_MAX: u64 = 64 << 10;
const NODE_CHARS_MAX: usize = 128;
/// Longest part of a value that a message repeats.
const QUOTED_CHARS_MAX: usize = 60;

/// Settings of TLS as text.
pub(super) struct RawTls {
    pub(super) mode: Option<String>,
    pub(super) cert_file: Option<String>,
    pub(super) key_file: Option<String>,
    pub(super) names: Option<String>,
    pub(super) ca_out: Option<String>,
}

pub(super) fn or_default(name: &str, given: Option<String>) -> String {
    let mut rows = VARIABLES.iter().chain(CLIENT_VARIABLES).chain(COLLECT_VARIABLES);
    given.unwrap_or_else(|| rows.find(|row| row.name == name).map_or("", |row| row.default).to_owned())
}

/// Part of a value for a message, unless it looks like a secret in the wrong place.
fn quoted(value: &str) -> String {
    let private = ["sk_", "rk_", "vk_", "ik_", "@"].iter().any(|mark| value.contains(mark));
    if private {
        return "this value".to_owned();
    }
    let short: String = value.chars().take(QUOTED_CHARS_MAX).collect();
    let dots = if short.len() < value.len() { "…" } else { "" };
    format!("`{}{dots}`", short.escape_debug())
}

/// Collects errors. Each check gives a usable value or a stand-in for one; a stand-in never leaves, because its error
/// does.
pub(super) struct Check {
    pub(super) errors: Vec<ConfigError>,
}

impl Check {
    pub(super) fn refuse(&mut self, name: &str, message: impl Into<String>) {
        self.errors.push(ConfigError { name: name.to_owned(), message: message.into() });
    }

    pub(super) fn done<T>(self, config: T) -> Result<T, ConfigErrors> {
        if self.errors.is_empty() { Ok(config) } else { Err(ConfigErrors(self.errors)) }
    }

    pub(super) fn fill<R: Default + for<'de> Deserialize<'de>>(
        &mut self,
        values: BTreeMap<String, String>,
    ) -> R {
        // All fields are optional texts and no name comes twice: it cannot fail.
        envy::prefixed(PREFIX).from_iter(values).unwrap_or_else(|_| {
            self.refuse("KEYBRAKE_*", "cannot be read");
            R::default()
        })
    }

    pub(super) fn addresses(&mut self, name: &str, given: Option<String>) -> Vec<SocketAddr> {
        let text = or_default(name, given);
        let mut addresses = Vec::new();
        for part in text.split(',').map(str::trim) {
            match part.parse::<SocketAddr>() {
                Ok(address) if address.port() != 0 && addresses.contains(&address) => {
                    self.refuse(name, format!("{address} is there twice"));
                }
                Ok(address) => addresses.push(address),
                Err(_) => self.refuse(
                    name,
                    format!(
                        "{} is no address with a port, such as 127.0.0.1:8443 or [::1]:8443",
                        quoted(part)
                    ),
                ),
            }
        }
        addresses
    }

    pub(super) fn distinct(&mut self, listen: &[SocketAddr], ops_listen: &[SocketAddr]) {
        for address in ops_listen {
            if address.port() != 0 && listen.contains(address) {
                self.refuse("KEYBRAKE_OPS_LISTEN", format!("{address} is in KEYBRAKE_LISTEN too"));
            }
        }
    }

    /// A secret that may be given as a file.
    pub(super) fn secret(
        &mut self,
        name: &str,
        given: Option<String>,
        file: Option<String>,
    ) -> Option<String> {
        let file_name = format!("{name}_FILE");
        match (given, file) {
            (Some(_), Some(_)) => {
                self.refuse(&file_name, format!("{name} is set too: set one of the two"));
                None
            }
            (Some(text), None) => Some(text),
            (None, Some(path)) => match read_secret(Path::new(&path)) {
                Ok(text) => Some(text),
                Err(message) => {
                    self.refuse(&file_name, format!("{}: {message}", quoted(&path)));
                    None
                }
            },
            (None, None) => None,
        }
    }

    /// As [`Check::secret`], and it must be there. An error about the value goes by the name that was set.
    pub(super) fn required_secret(
        &mut self,
        name: &str,
        given: Option<String>,
        file: Option<String>,
    ) -> Option<(String, String)> {
        let set = if file.is_some() { format!("{name}_FILE") } else { name.to_owned() };
        let missing = given.is_none() && file.is_none();
        let found = self.secret(name, given, file);
        if missing {
            self.refuse(name, format!("is required (or {name}_FILE)"));
        }
        found.map(|text| (set, text))
    }

    pub(super) fn admin_keys(&mut self, given: Option<String>, file: Option<String>) -> Vec<Secret> {
        let Some((name, text)) = self.required_secret("KEYBRAKE_ADMIN_KEY", given, file) else {
            return Vec::new();
        };
        let keys: Vec<&str> = text.split(',').map(str::trim).collect();
        if keys.len() > ADMIN_KEYS_MAX {
            self.refuse(&name, format!("holds {} keys; at most two, comma separated", keys.len()));
        }
        if keys.iter().any(|key| key.chars().count() < ADMIN_KEY_CHARS_MIN) {
            self.refuse(
                &name,
                "needs 32 characters or more in each key, for instance from `openssl rand -hex 32`",
            );
        } else if keys.iter().any(|key| !key.bytes().all(|byte| byte.is_ascii_graphic())) {
            self.refuse(&name, "may hold only printable ASCII characters without spaces");
        }
        if keys.iter().any(|key| looks_like_stripe_key(key)) {
            self.refuse(&name, "is a Stripe key: make one of its own");
        }
        keys.into_iter().map(Secret::new).collect()
    }

    pub(super) fn stripe_key(&mut self, given: Option<String>, file: Option<String>) -> (Secret, Mode) {
        let stand_in = (Secret::new(""), Mode::Test);
        let Some((name, text)) = self.required_secret("KEYBRAKE_STRIPE_SECRET_KEY", given, file) else {
            return stand_in;
        };
        let Some(mode) = stripe_key_mode(&text) else {
            let message = if text.starts_with("sk_org_") {
                "is an organisation key (sk_org_…), which reaches every account of the organisation: use a \
                 restricted key (rk_…) of the one account"
            } else if text.starts_with("pk_") {
                "is a publishable key (pk_…): use a restricted key (rk_…) or a secret key (sk_…)"
            } else if text.starts_with("vk_") || text.starts_with("ik_") {
                "is a key of Keybrake's own: use a restricted key (rk_…) or a secret key (sk_…) of Stripe"
            } else {
                "must start with rk_test_, rk_live_, sk_test_ or sk_live_"
            };
            self.refuse(&name, message);
            return stand_in;
        };
        let body = text.splitn(3, '_').nth(2).unwrap_or_default();
        if body.is_empty() || !body.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
            self.refuse(&name, "has characters that no Stripe key has, or is cut short");
        }
        (Secret::new(text), mode)
    }

    pub(super) fn stripe_account(&mut self, given: Option<String>) -> Option<String> {
        let account = given?;
        let good = account
            .strip_prefix("acct_")
            .is_some_and(|id| !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_alphanumeric()));
        if !good {
            self.refuse(
                "KEYBRAKE_STRIPE_ACCOUNT",
                format!("{} is no account id, such as acct_1A2b3C", quoted(&account)),
            );
        }
        Some(account)
    }

    pub(super) fn base(&mut self, name: &str, given: Option<String>) -> Base {
        self.parse_base(name, &or_default(name, given))
    }

    pub(super) fn parse_base(&mut self, name: &str, text: &str) -> Base {
        Base::parse(text).unwrap_or_else(|error| {
            self.refuse(name, error.to_string());
            Base::loopback()
        })
    }

    pub(super) fn readable(&mut self, name: &str, given: Option<String>) -> Option<PathBuf> {
        let path = PathBuf::from(given?);
        self.can_open(name, &path);
        Some(path)
    }

    pub(super) fn can_open(&mut self, name: &str, path: &Path) {
        if let Err(error) = File::open(path) {
            let shown = quoted(&path.to_string_lossy());
            self.refuse(name, format!("{shown}: {}", unreadable(&error)));
        }
    }

    pub(super) fn tls(&mut self, raw: RawTls, data_dir: &Path, listen: &[SocketAddr]) -> Option<TlsSource> {
        let modes = [("auto", TlsMode::Auto), ("files", TlsMode::Files), ("off", TlsMode::Off)];
        let known = self.errors.len();
        let mode = self.choice("KEYBRAKE_TLS", raw.mode, &modes);
        if self.errors.len() > known {
            return None;
        }
        let names_given = raw.names.is_some();
        for (name, given, wanted, mode_name) in [
            ("KEYBRAKE_TLS_NAMES", names_given, TlsMode::Auto, "auto"),
            ("KEYBRAKE_CA_OUT", raw.ca_out.is_some(), TlsMode::Auto, "auto"),
            ("KEYBRAKE_TLS_CERT_FILE", raw.cert_file.is_some(), TlsMode::Files, "files"),
            ("KEYBRAKE_TLS_KEY_FILE", raw.key_file.is_some(), TlsMode::Files, "files"),
        ] {
            if given && wanted != mode {
                self.refuse(name, format!("has a meaning only with KEYBRAKE_TLS={mode_name}"));
            }
        }
        match mode {
            TlsMode::Auto => Some(TlsSource::Auto {
                dir: data_dir.join(TLS_DIR),
                names: self.tls_names(raw.names),
                ca_out: raw.ca_out.map(PathBuf::from),
            }),
            TlsMode::Files => {
                let mut file = |name, given: Option<String>| {
                    if given.is_none() {
                        self.refuse(name, "is required with KEYBRAKE_TLS=files");
                    }
                    self.readable(name, given).unwrap_or_default()
                };
                let cert = file("KEYBRAKE_TLS_CERT_FILE", raw.cert_file);
                let key = file("KEYBRAKE_TLS_KEY_FILE", raw.key_file);
                Some(TlsSource::Files { cert, key })
            }
            TlsMode::Off => {
                for address in listen.iter().filter(|address| !address.ip().is_loopback()) {
                    self.refuse(
                        "KEYBRAKE_TLS",
                        format!("off is allowed only on loopback, and KEYBRAKE_LISTEN has {address}"),
                    );
                }
                None
            }
        }
    }

    pub(super) fn tls_names(&mut self, given: Option<String>) -> Vec<TlsName> {
        let name = "KEYBRAKE_TLS_NAMES";
        let mut names = Vec::new();
        for part in or_default(name, given).split(',').map(str::trim) {
            match TlsName::parse(part) {
                Some(parsed) if names.contains(&parsed) => {}
                Some(parsed) => names.push(parsed),
                None => {
                    self.refuse(name, format!("{} is neither a host name nor an IP address", quoted(part)));
                }
            }
        }
        names
    }

    pub(super) fn node(&mut self, given: Option<String>, host_name: Option<String>) -> String {
        let is_label = |text: &str| {
            !text.is_empty()
                && text.len() <= NODE_CHARS_MAX
                && text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ')
        };
        if let Some(node) = given {
            if !is_label(&node) {
                self.refuse("KEYBRAKE_NODE", "must be at most 128 printable ASCII characters");
            }
            return node;
        }
        let kernel = fs::read_to_string("/proc/sys/kernel/hostname").ok();
        let mut candidates = [kernel, host_name].into_iter().flatten().map(|text| text.trim().to_owned());
        candidates.find(|text| is_label(text)).unwrap_or_else(|| "unknown".to_owned())
    }

    pub(super) fn number<N>(&mut self, name: &str, given: Option<String>, min: N, max: N) -> N
    where
        N: Copy + FromStr + PartialOrd + fmt::Display,
    {
        let text = or_default(name, given);
        // `parse` takes a leading plus.
        let digits = text.bytes().all(|byte| byte.is_ascii_digit());
        match text.parse::<N>() {
            Ok(number) if digits && number >= min && number <= max => number,
            Ok(_) | Err(_) => {
                self.refuse(name, format!("{} is no whole number from {min} to {max}", quoted(&text)));
                min
            }
        }
    }

    pub(super) fn millis(&mut self, name: &str, given: Option<String>, min: u64) -> Duration {
        Duration::from_millis(self.number(name, given, min, 600_000))
    }

    /// `choices` must not be empty; the first is the stand-in.
    pub(super) fn choice<T: Copy, const N: usize>(
        &mut self,
        name: &str,
        given: Option<String>,
        choices: &[(&str, T); N],
    ) -> T {
        const { assert!(N > 0) };
        let text = or_default(name, given);
        if let Some((_, value)) = choices.iter().find(|(word, _)| *word == text) {
            return *value;
        }
        let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
        self.refuse(name, format!("{} is none of: {}", quoted(&text), words.join(", ")));
        choices[0].1
    }

    /// The rates of other currencies; none without a file.
    pub(super) fn fx(&mut self, file: Option<&Path>) -> Table {
        let Some(file) = file else { return Table::default() };
        match read_fx(file) {
            Ok(table) => table,
            Err(why) => {
                self.refuse("KEYBRAKE_FX_FILE", format!("{}: {why}", file.display()));
                Table::default()
            }
        }
    }

    pub(super) fn log_filter(&mut self, given: Option<String>) -> String {
        let name = "KEYBRAKE_LOG";
        let text = or_default(name, given);
        let parses = tracing_subscriber::EnvFilter::builder().parse(&text).is_ok();
        // A lone word that is no level is taken for the name of a module: `verbose` would log nothing at all.
        let words = text.split(',').map(str::trim).filter(|word| !word.contains(['=', '[', ':']));
        let known = |word: &str| {
            word.starts_with("keybrake") || word.parse::<tracing_subscriber::filter::LevelFilter>().is_ok()
        };
        if !parses || !words.into_iter().all(known) {
            self.refuse(
                name,
                format!("{} is no filter, such as `info` or `info,keybrake::proxy=debug`", quoted(&text)),
            );
        }
        text
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum TlsMode {
    Auto,
    Files,
    Off,
}

/// Reads a table of rates.
pub(super) fn read_fx(path: &Path) -> Result<Table, String> {
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(FX_FILE_BYTES_MAX).read_to_string(&mut text))
        .map_err(|error| unreadable(&error))?;
    Table::parse(&text)
}

/// The error says what to mend and never what the file holds.
fn read_secret(path: &Path) -> Result<String, String> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(SECRET_FILE_BYTES_MAX + 1).read_to_end(&mut bytes))
        .map_err(|error| unreadable(&error))?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length > SECRET_FILE_BYTES_MAX) {
        return Err("is too large for a secret".to_owned());
    }
    let text = String::from_utf8(bytes).map_err(|_| "is not valid UTF-8".to_owned())?;
    let text = text.strip_suffix('\n').unwrap_or(&text);
    let text = text.strip_suffix('\r').unwrap_or(text);
    if text.is_empty() { Err("is empty".to_owned()) } else { Ok(text.to_owned()) }
}

/// Mounted secrets mostly fail by their owner, which only the id of this process explains.
pub(super) fn unreadable(error: &io::Error) -> String {
    format!("cannot be read by uid {}: {error}", uid())
}

fn uid() -> String {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("Uid:"))
        .and_then(|ids| ids.split_whitespace().nth(1));
    effective.unwrap_or("unknown").to_owned()
}
