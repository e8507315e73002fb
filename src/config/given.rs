//! Which variables of an environment are ours to read, to ignore and to refuse.
//!
//! Owns: the fate of every name that starts with `KEYBRAKE_`.
//!
//! Invariants: a name is read, ignored or refused, never dropped by accident; an empty value is as good as none.
//!
//! Never: looks at what a value means.

use std::collections::BTreeMap;
use std::ffi::OsString;

use super::collect::{COLLECT_VARIABLES, SHARED};
use super::{CLIENT_VARIABLES, ConfigError, PREFIX, VARIABLES, Variable};

/// On whose behalf the environment is read.
#[derive(Clone, Copy)]
pub(super) enum Reader {
    Serve,
    Client,
    Collect,
}

enum Fate {
    Read,
    Ignore,
    Refuse,
}

impl Reader {
    fn fate(self, name: &str) -> Fate {
        let serves = names_one_of(VARIABLES, name);
        let client = names_one_of(CLIENT_VARIABLES, name);
        let shared = matches!(name, "KEYBRAKE_ADMIN_KEY" | "KEYBRAKE_ADMIN_KEY_FILE");
        let collects = names_one_of(COLLECT_VARIABLES, name);
        let client = client && (matches!(self, Self::Client) || !collects);
        match self {
            Self::Serve if serves => Fate::Read,
            Self::Serve if client || is_from_kubernetes(name) => Fate::Ignore,
            Self::Client if client || shared => Fate::Read,
            Self::Client if serves || collects || is_from_kubernetes(name) => Fate::Ignore,
            Self::Collect if collects || SHARED.contains(&name) => Fate::Read,
            Self::Collect if serves || client || is_from_kubernetes(name) => Fate::Ignore,
            Self::Serve | Self::Client | Self::Collect => Fate::Refuse,
        }
    }
}

fn names_one_of(variables: &[Variable], name: &str) -> bool {
    variables.iter().any(|variable| {
        variable.name == name || (variable.secret && name.strip_suffix("_FILE") == Some(variable.name))
    })
}

/// Kubernetes describes each Service of the namespace to each container; one called `keybrake` or `keybrake-…` then
/// looks like a setting.
fn is_from_kubernetes(name: &str) -> bool {
    let is_port = |tail: &str| {
        let Some((port, protocol)) = tail.split_once('_') else { return false };
        !port.is_empty()
            && port.bytes().all(|byte| byte.is_ascii_digit())
            && (protocol.starts_with("TCP") || protocol.starts_with("UDP"))
    };
    name.ends_with("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || name.ends_with("_PORT")
        || name.split("_PORT_").skip(1).any(is_port)
}

pub(super) struct Given {
    /// Whole name to value, neither empty nor refused.
    pub(super) values: BTreeMap<String, String>,
    pub(super) host_name: Option<String>,
}

impl Given {
    pub(super) fn sort(
        pairs: impl IntoIterator<Item = (OsString, OsString)>,
        reader: Reader,
    ) -> (Self, Vec<ConfigError>) {
        let mut given = Self { values: BTreeMap::new(), host_name: None };
        let mut errors = BTreeMap::new();
        for (name, value) in pairs {
            let name = name.to_string_lossy().into_owned();
            if name == "HOSTNAME" {
                given.host_name = value.to_str().map(str::to_owned);
            }
            if !name.starts_with(PREFIX) {
                continue;
            }
            match reader.fate(&name) {
                Fate::Ignore => {}
                Fate::Refuse => drop(errors.insert(name, "is no setting of this program (misspelt?)")),
                Fate::Read => match value.into_string() {
                    Ok(value) if value.is_empty() => {}
                    Ok(value) => drop(given.values.insert(name, value)),
                    Err(_) => drop(errors.insert(name, "is not valid UTF-8")),
                },
            }
        }
        let errors =
            errors.into_iter().map(|(name, message)| ConfigError { name, message: message.to_owned() });
        (given, errors.collect())
    }
}
