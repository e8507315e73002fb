//! The settings of a PostgreSQL, under whichever names.

use std::path::PathBuf;

use super::check::{Check, or_default};
use crate::postgres::{Target, TargetError, is_schema};
use crate::secret::Secret;
use crate::tls;

/// What the settings of one database are called.
pub(super) struct Names {
    pub(super) url: &'static str,
    pub(super) password: &'static str,
    pub(super) ca_file: &'static str,
    pub(super) schema: &'static str,
}

/// Settings of a database as text.
pub(super) struct RawDatabase {
    pub(super) url: Option<String>,
    pub(super) url_file: Option<String>,
    pub(super) password: Option<String>,
    pub(super) password_file: Option<String>,
    pub(super) ca_file: Option<String>,
    pub(super) schema: Option<String>,
}

impl Check {
    /// A database, where one is named.
    pub(super) fn database(&mut self, names: &Names, raw: RawDatabase) -> Option<Target> {
        let (is_by_file, is_given) = (raw.url_file.is_some(), raw.url.is_some() || raw.url_file.is_some());
        let password_name = named(names.password, raw.password_file.is_some());
        if !is_given {
            for (name, is_set) in [
                (password_name.as_str(), raw.password.is_some() || raw.password_file.is_some()),
                (names.ca_file, raw.ca_file.is_some()),
            ] {
                if is_set {
                    self.refuse(name, format!("has a meaning only with {}", names.url));
                }
            }
            if let Some(Err(error)) = raw.schema.as_deref().map(is_schema) {
                self.refuse(names.schema, error.to_string());
            }
            return None;
        }
        let url = self.secret(names.url, raw.url, raw.url_file);
        let password = self.secret(names.password, raw.password, raw.password_file).map(Secret::new);
        let ca_file = raw.ca_file.map(PathBuf::from);
        let trust = match tls::client_config(ca_file.as_deref()) {
            Ok(trust) => Some(trust),
            Err(error) => {
                self.refuse(names.ca_file, error.to_string());
                None
            }
        };
        let schema = or_default(names.schema, raw.schema);
        match Target::parse(&url?, password.as_ref(), &schema, trust?) {
            Ok(target) => Some(target),
            Err(error) => {
                let name = match error {
                    TargetError::TwoPasswords => password_name,
                    TargetError::Schema => names.schema.to_owned(),
                    TargetError::Malformed
                    | TargetError::NoHost
                    | TargetError::NoUser
                    | TargetError::MixedHosts
                    | TargetError::UnknownParameter
                    | TargetError::TrustInUrl
                    | TargetError::SslMode
                    | TargetError::TlsOnSocket => named(names.url, is_by_file),
                };
                self.refuse(&name, error.to_string());
                None
            }
        }
    }
}

/// As the operator wrote it.
fn named(name: &str, is_by_file: bool) -> String {
    if is_by_file { format!("{name}_FILE") } else { name.to_owned() }
}
