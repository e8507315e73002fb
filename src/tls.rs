//! Certificates: our own for callers, and trust towards others.
//!
//! Owns: the private certificate authority in `DATA_DIR/tls` (`ca.pem`, `ca.key`), the leaf certificate that it signs,
//! the TLS settings of the listeners, and the TLS settings of every outgoing connection.
//!
//! Invariants:
//! - The authority is made once. A missing or foreign half of it is an error and never a silent new authority, which
//!   every client would have to be told to trust.
//! - The leaf's key lives in memory only; each start makes a new one.
//! - Certificates pass strict verifiers (`openssl verify -x509_strict`, Python 3.13): distinct names, authority and
//!   subject key identifiers, critical basic constraints and key usage.
//! - The crypto provider is always named; the process default is neither read nor set.
//! - No early data: a request in it could be replayed by anyone on the wire.
//!
//! Never: reads a clock (the time is an argument), accepts an unverified peer, logs a key.
//!
//! Two processes that make the authority in one directory at once are not provided for: the ledger's lock on
//! `DATA_DIR` excludes them.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyIdMethod, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier as _;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, DnsName, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, RootCertStore, ServerConfig, SupportedProtocolVersion};
use sha2::{Digest as _, Sha256};

/// Validity of the authority's certificate.
pub const CA_LIFE_DAYS: u32 = 3650;
/// Validity of a leaf; [`ServerTls::renew`] replaces it at half of this.
pub const LEAF_LIFE_DAYS: u32 = 90;
/// Certificates start this much earlier, for clients whose clocks are behind.
const BACKDATE_DAYS: u32 = 1;

const CA_CERT_FILE: &str = "ca.pem";
const CA_KEY_FILE: &str = "ca.key";

const VERSIONS: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13, &rustls::version::TLS12];

/// A subject alternative name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TlsName {
    /// A DNS name in lower case, perhaps with a leading `*.`.
    Dns(String),
    /// An IP address.
    Ip(IpAddr),
}

impl TlsName {
    /// Reads a DNS name, a wildcard name or an IP address without brackets; `None` when it is none of these.
    pub fn parse(text: &str) -> Option<Self> {
        if let Ok(ip) = text.parse() {
            return Some(Self::Ip(ip));
        }
        let name = text.to_ascii_lowercase();
        let plain = name.strip_prefix("*.").unwrap_or(&name);
        // A trailing dot is never part of a name that clients compare.
        if plain.ends_with('.') || DnsName::try_from(plain).is_err() {
            return None;
        }
        Some(Self::Dns(name))
    }
}

impl fmt::Display for TlsName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dns(name) => f.write_str(name),
            Self::Ip(ip) => write!(f, "{ip}"),
        }
    }
}

/// Where the listeners' certificate comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TlsSource {
    /// Our own authority signs it.
    Auto {
        /// Holds `ca.pem` and `ca.key`; created 0700.
        dir: PathBuf,
        /// The leaf's names; at least one.
        names: Vec<TlsName>,
        /// The authority's certificate is also written here, mode 0644.
        ca_out: Option<PathBuf>,
    },
    /// The operator brings it.
    Files {
        /// PEM: the leaf first, then intermediates.
        cert: PathBuf,
        /// PEM: its private key.
        key: PathBuf,
    },
}

/// What went wrong with certificates.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file or directory could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file has no usable PEM.
    #[error("{path}: {source}")]
    Pem {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: pem::Error,
    },
    /// A file has no certificate in it.
    #[error("{0}: no certificate in it")]
    NoCertificate(PathBuf),
    /// One half of the authority is gone.
    #[error(
        "{missing} is missing while {present} exists: restore it, or delete {present} for a new authority, which \
         every client must then be told to trust"
    )]
    HalfAuthority {
        /// The half that is gone.
        missing: PathBuf,
        /// The half that is left.
        present: PathBuf,
    },
    /// `ca.pem` is not the certificate of `ca.key`, or no longer valid.
    #[error("{path} does not vouch for certificates made with its key: {source}")]
    ForeignAuthority {
        /// The authority's certificate.
        path: PathBuf,
        /// What verification said.
        source: rustls::Error,
    },
    /// A certificate could not be made.
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
    /// Certificate and key are unusable or do not belong together.
    #[error("{path}: {source}")]
    Unusable {
        /// The certificate or trust anchor.
        path: PathBuf,
        /// Why.
        source: rustls::Error,
    },
    /// The TLS library refused its settings.
    #[error("TLS: {0}")]
    Library(#[from] rustls::Error),
    /// The time is outside what a certificate can say.
    #[error("the system clock is out of range")]
    Clock,
}

/// TLS of the listeners. Its certificate can be exchanged while connections are open.
#[derive(Debug)]
pub struct ServerTls {
    config: Arc<ServerConfig>,
    current: Arc<Current>,
    supply: Supply,
    /// When the leaf in use was made or read.
    leaf_since: Mutex<SystemTime>,
}

impl ServerTls {
    /// Makes or reads all that the listeners need. With [`TlsSource::Auto`] the authority is created if there is none,
    /// and `ca_out` is written.
    ///
    /// # Errors
    ///
    /// When files cannot be read, written or used; the message names the file.
    pub fn new(source: TlsSource, now: SystemTime) -> Result<Self, TlsError> {
        let supply = match source {
            TlsSource::Auto { dir, names, ca_out } => {
                Supply::Own { authority: Box::new(Authority::open(&dir, now)?), names, ca_out }
            }
            TlsSource::Files { cert, key } => Supply::Files { cert, key },
        };
        let current = Arc::new(Current(RwLock::new(Arc::new(supply.certify(now)?))));
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(VERSIONS)?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(&current) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        config.ticketer = rustls::crypto::ring::Ticketer::new()?;
        config.max_early_data_size = 0;
        Ok(Self { config: Arc::new(config), current, supply, leaf_since: Mutex::new(now) })
    }

    /// The settings to accept connections with; stays valid over [`ServerTls::reload`].
    pub fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.config)
    }

    /// The authority's certificate, for those who shall trust it; `None` with [`TlsSource::Files`].
    pub fn ca_pem(&self) -> Option<&str> {
        match &self.supply {
            Supply::Own { authority, .. } => Some(&authority.cert_pem),
            Supply::Files { .. } => None,
        }
    }

    /// Reads the files again, or makes a new leaf. Connections that are open stay; new ones get the new certificate.
    /// Names are those given to [`ServerTls::new`]. `ca_out` is written again when it no longer holds the certificate.
    ///
    /// # Errors
    ///
    /// As [`ServerTls::new`]; the certificate in use then stays.
    pub fn reload(&self, now: SystemTime) -> Result<(), TlsError> {
        let certified = Arc::new(self.supply.certify(now)?);
        *self.current.0.write().unwrap_or_else(PoisonError::into_inner) = certified;
        *self.leaf_since.lock().unwrap_or_else(PoisonError::into_inner) = now;
        Ok(())
    }

    /// Makes a new leaf when the one in use is older than half of its life, or from the future because the clock was
    /// set back. Says whether it did; with [`TlsSource::Files`] never. Cheap: call it every hour or so.
    ///
    /// # Errors
    ///
    /// As [`ServerTls::reload`].
    pub fn renew(&self, now: SystemTime) -> Result<bool, TlsError> {
        let since = *self.leaf_since.lock().unwrap_or_else(PoisonError::into_inner);
        let due = match now.duration_since(since) {
            Ok(age) => age >= days(LEAF_LIFE_DAYS) / 2,
            Err(ahead) => ahead.duration() >= days(BACKDATE_DAYS) / 2,
        };
        match &self.supply {
            Supply::Own { .. } if due => self.reload(now).map(|()| true),
            Supply::Own { .. } | Supply::Files { .. } => Ok(false),
        }
    }
}

/// What certificates are made of.
#[derive(Debug)]
enum Supply {
    Own { authority: Box<Authority>, names: Vec<TlsName>, ca_out: Option<PathBuf> },
    Files { cert: PathBuf, key: PathBuf },
}

impl Supply {
    /// A certificate to serve with. The authority's own is published first: a leaf that nobody can check is of no use.
    fn certify(&self, now: SystemTime) -> Result<CertifiedKey, TlsError> {
        match self {
            Self::Own { authority, names, ca_out } => {
                if let Some(path) = ca_out {
                    publish(path, &authority.cert_pem)?;
                }
                authority.leaf(names, now)
            }
            Self::Files { cert, key } => {
                let chain = read_certs(cert)?;
                let private = PrivateKeyDer::from_pem_slice(&read(key)?)
                    .map_err(|source| TlsError::Pem { path: key.clone(), source })?;
                CertifiedKey::from_der(chain, private, &provider())
                    .map_err(|source| TlsError::Unusable { path: cert.clone(), source })
            }
        }
    }
}

/// TLS towards others: the public web roots and, when given, the certificates of one more file. HTTP/1.1 only.
///
/// # Errors
///
/// When the file cannot be read or holds no usable certificate.
pub fn client_config(extra_ca: Option<&Path>) -> Result<ClientConfig, TlsError> {
    let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    if let Some(path) = extra_ca {
        for cert in read_certs(path)? {
            roots.add(cert).map_err(|source| TlsError::Unusable { path: path.to_owned(), source })?;
        }
    }
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(VERSIONS)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config.enable_early_data = false;
    Ok(config)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn days(count: u32) -> Duration {
    Duration::from_secs(u64::from(count) * 24 * 60 * 60)
}

/// The certificate that new connections get.
#[derive(Debug)]
struct Current(RwLock<Arc<CertifiedKey>>);

impl ResolvesServerCert for Current {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner)))
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::File { path: path.to_owned(), source })
}

fn read_certs(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let text = read(path)?;
    let certs = CertificateDer::pem_slice_iter(&text)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|source| TlsError::Pem { path: path.to_owned(), source })?;
    if certs.is_empty() { Err(TlsError::NoCertificate(path.to_owned())) } else { Ok(certs) }
}

/// The private certificate authority of one data directory.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    cert_path: PathBuf,
    cert_pem: String,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("cert_path", &self.cert_path).finish_non_exhaustive()
    }
}

impl Authority {
    /// Reads the authority, or makes it where there is none.
    fn open(dir: &Path, now: SystemTime) -> Result<Self, TlsError> {
        let cert_path = dir.join(CA_CERT_FILE);
        let key_path = dir.join(CA_KEY_FILE);
        let file_error = |path: &Path| {
            let path = path.to_owned();
            move |source| TlsError::File { path, source }
        };
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(file_error(dir))?;
        let has_cert = cert_path.try_exists().map_err(file_error(&cert_path))?;
        let has_key = key_path.try_exists().map_err(file_error(&key_path))?;
        if has_cert && !has_key {
            return Err(TlsError::HalfAuthority { missing: key_path, present: cert_path });
        }
        // The key is written first: a key alone is what a crash between the two leaves, and nobody trusts it yet.
        let key = if has_key {
            let text = String::from_utf8(read(&key_path)?)
                .map_err(|_| file_error(&key_path)(io::ErrorKind::InvalidData.into()))?;
            KeyPair::from_pem(&text)?
        } else {
            let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
            write_atomically(&key_path, key.serialize_pem().as_bytes(), 0o600)?;
            key
        };
        let params = authority_params(&key, now)?;
        if !has_cert {
            let cert = params.self_signed(&key)?;
            write_atomically(&cert_path, cert.pem().as_bytes(), 0o600)?;
        }
        let cert_pem = String::from_utf8(read(&cert_path)?)
            .map_err(|_| file_error(&cert_path)(io::ErrorKind::InvalidData.into()))?;
        Ok(Self { issuer: Issuer::new(params, key), cert_path, cert_pem })
    }

    /// A new key and its certificate. Clients have the authority's certificate already, so the leaf goes alone.
    fn leaf(&self, names: &[TlsName], now: SystemTime) -> Result<CertifiedKey, TlsError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let cert = leaf_params(names, now)?.signed_by(&key, &self.issuer)?.der().clone();
        self.vouch(&cert, names, now)?;
        let private = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        Ok(CertifiedKey::from_der(vec![cert], private, &provider())?)
    }

    /// Asks what every client will ask, so that an exchanged or damaged `ca.pem` is found at start and not by them.
    fn vouch(&self, leaf: &CertificateDer<'_>, names: &[TlsName], now: SystemTime) -> Result<(), TlsError> {
        let foreign = |source| TlsError::ForeignAuthority { path: self.cert_path.clone(), source };
        let mut roots = RootCertStore::empty();
        for cert in read_certs(&self.cert_path)? {
            roots.add(cert).map_err(foreign)?;
        }
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
            .build()
            .map_err(|error| foreign(rustls::Error::General(error.to_string())))?;
        let since_epoch = now.duration_since(SystemTime::UNIX_EPOCH).map_err(|_| TlsError::Clock)?;
        let at = UnixTime::since_unix_epoch(since_epoch);
        let Some(name) = names.first() else { return Ok(()) };
        let name = match name {
            TlsName::Dns(name) => ServerName::try_from(name.replace('*', "any")).ok(),
            TlsName::Ip(ip) => Some(ServerName::from(*ip)),
        };
        let Some(name) = name else { return Ok(()) };
        verifier.verify_server_cert(leaf, &[], &name, &[], at).map_err(foreign)?;
        Ok(())
    }
}

fn validity(now: SystemTime, life_days: u32) -> Result<[::time::OffsetDateTime; 2], TlsError> {
    let from = now.checked_sub(days(BACKDATE_DAYS)).ok_or(TlsError::Clock)?;
    let until = now.checked_add(days(life_days)).ok_or(TlsError::Clock)?;
    Ok([from.into(), until.into()])
}

/// Everything but the validity follows from the key, so that `ca.pem` need not be taken apart to sign with its key.
fn authority_params(key: &KeyPair, now: SystemTime) -> Result<CertificateParams, TlsError> {
    let digest: [u8; 32] = Sha256::digest(key.public_key_raw()).into();
    let mut params = CertificateParams::default();
    [params.not_before, params.not_after] = validity(now, CA_LIFE_DAYS)?;
    let [a, b, c, d, ..] = digest;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "Keybrake");
    // Authorities of several sidecars stand side by side in one trust store: each has a name of its own.
    params.distinguished_name.push(DnType::CommonName, format!("Keybrake CA {a:02x}{b:02x}{c:02x}{d:02x}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    // Written out: the leaf must name what `ca.pem` says, whatever the library's default becomes.
    params.key_identifier_method = KeyIdMethod::PreSpecified(digest[..20].to_vec());
    Ok(params)
}

fn leaf_params(names: &[TlsName], now: SystemTime) -> Result<CertificateParams, TlsError> {
    let mut params = CertificateParams::default();
    [params.not_before, params.not_after] = validity(now, LEAF_LIFE_DAYS)?;
    params.distinguished_name = DistinguishedName::new();
    // Strict verifiers take a leaf for self-signed when it bears its issuer's name.
    params.distinguished_name.push(DnType::CommonName, "Keybrake sidecar");
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    for name in names {
        params.subject_alt_names.push(match name {
            TlsName::Dns(name) => SanType::DnsName(Ia5String::try_from(name.as_str())?),
            TlsName::Ip(ip) => SanType::IpAddress(*ip),
        });
    }
    Ok(params)
}

/// Leaves a file alone that holds the text already: a file that is itself a mount point cannot be replaced.
fn publish(path: &Path, pem: &str) -> Result<(), TlsError> {
    let mode = 0o644;
    let same = fs::read(path).is_ok_and(|bytes| bytes == pem.as_bytes());
    let readable = fs::metadata(path).is_ok_and(|meta| meta.permissions().mode() & 0o777 == mode);
    if same && readable { Ok(()) } else { write_atomically(path, pem.as_bytes(), mode) }
}

/// Readers see the old file or the whole new one, after a crash too.
fn write_atomically(path: &Path, bytes: &[u8], mode: u32) -> Result<(), TlsError> {
    let write = || -> io::Result<()> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let dir = match path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            Some(_) | None => Path::new("."),
        };
        let mut temp_name = std::ffi::OsString::from(".");
        temp_name.push(name);
        temp_name.push(".new");
        let temp = dir.join(temp_name);
        // Left by a crash, perhaps with another mode.
        match fs::remove_file(&temp) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temp)?;
        // The umask may have taken bits away.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temp, path)?;
        File::open(dir)?.sync_all()
    };
    write().map_err(|source| TlsError::File { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// 2026-07-01T00:00:00Z.
    fn july() -> SystemTime {
        SystemTime::UNIX_EPOCH + days(20_635)
    }

    #[expect(clippy::disallowed_methods, reason = "openssl and rustls compare with the machine's clock")]
    fn today() -> SystemTime {
        SystemTime::now()
    }

    fn names(texts: &[&str]) -> Vec<TlsName> {
        texts.iter().map(|text| TlsName::parse(text).unwrap()).collect()
    }

    fn auto(dir: &Path) -> TlsSource {
        TlsSource::Auto {
            dir: dir.join("tls"),
            names: names(&["localhost", "127.0.0.1", "::1", "*.svc.example"]),
            ca_out: Some(dir.join("out.pem")),
        }
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    fn leaf_of(tls: &ServerTls) -> CertificateDer<'static> {
        tls.current.0.read().unwrap().cert[0].clone()
    }

    /// Runs a handshake in memory and gives the protocol that was agreed on.
    fn handshake(
        server: Arc<ServerConfig>,
        client: ClientConfig,
        name: &str,
    ) -> Result<Vec<u8>, rustls::Error> {
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let mut client = rustls::ClientConnection::new(Arc::new(client), name)?;
        let mut server = rustls::ServerConnection::new(server)?;
        while client.is_handshaking() || server.is_handshaking() {
            let mut wire = Vec::new();
            client.write_tls(&mut wire).unwrap();
            server.read_tls(&mut wire.as_slice()).unwrap();
            server.process_new_packets()?;
            let mut wire = Vec::new();
            server.write_tls(&mut wire).unwrap();
            client.read_tls(&mut wire.as_slice()).unwrap();
            client.process_new_packets()?;
        }
        Ok(client.alpn_protocol().unwrap_or_default().to_vec())
    }

    #[test]
    fn the_authority_is_made_once_and_kept_private() {
        let dir = tempfile::tempdir().unwrap();
        let first = ServerTls::new(auto(dir.path()), today()).unwrap();
        let tls = dir.path().join("tls");
        assert_eq!((mode(&tls), mode(&tls.join("ca.key")), mode(&tls.join("ca.pem"))), (0o700, 0o600, 0o600));
        assert_eq!(mode(&dir.path().join("out.pem")), 0o644);
        let second = ServerTls::new(auto(dir.path()), today()).unwrap();
        assert_eq!(first.ca_pem(), second.ca_pem());
        assert_eq!(fs::read_to_string(dir.path().join("out.pem")).unwrap(), second.ca_pem().unwrap());
        assert_ne!(leaf_of(&first), leaf_of(&second), "each start has a leaf of its own");
        let left: Vec<_> = fs::read_dir(&tls).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left.len(), 2, "{left:?}");
    }

    #[test]
    fn a_client_that_trusts_the_authority_connects() {
        let dir = tempfile::tempdir().unwrap();
        let tls = ServerTls::new(auto(dir.path()), today()).unwrap();
        let ca = dir.path().join("out.pem");
        for name in ["localhost", "127.0.0.1", "::1", "keybrake.svc.example"] {
            let agreed = handshake(tls.config(), client_config(Some(&ca)).unwrap(), name);
            assert_eq!(agreed.unwrap(), b"http/1.1", "{name}");
        }
        let mut h2 = client_config(Some(&ca)).unwrap();
        h2.alpn_protocols = vec![b"http/1.1".to_vec(), b"h2".to_vec()];
        assert_eq!(handshake(tls.config(), h2, "localhost").unwrap(), b"h2");
        assert!(handshake(tls.config(), client_config(Some(&ca)).unwrap(), "elsewhere.example").is_err());
        assert!(handshake(tls.config(), client_config(None).unwrap(), "localhost").is_err());
    }

    #[test]
    fn tls_1_2_still_works_and_nothing_older_is_offered() {
        let dir = tempfile::tempdir().unwrap();
        let tls = ServerTls::new(auto(dir.path()), today()).unwrap();
        let mut roots = RootCertStore::empty();
        read_certs(&dir.path().join("out.pem"))
            .unwrap()
            .into_iter()
            .for_each(|cert| roots.add(cert).unwrap());
        let client = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS12])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        handshake(tls.config(), client, "localhost").unwrap();
    }

    #[test]
    fn openssl_finds_nothing_to_fault() {
        if Command::new("openssl").arg("version").output().is_err() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        drop(ServerTls::new(auto(dir.path()), today()).unwrap());
        // Opened again: the leaf must name the key identifier of the certificate that is on disk.
        let tls = ServerTls::new(auto(dir.path()), today()).unwrap();
        let der = dir.path().join("leaf.der");
        fs::write(&der, leaf_of(&tls)).unwrap();
        let run = |args: &[&str]| {
            let out = Command::new("openssl").args(args).current_dir(dir.path()).output().unwrap();
            let text = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
            assert!(out.status.success(), "{args:?}: {text}");
            text
        };
        run(&["x509", "-inform", "DER", "-in", "leaf.der", "-out", "leaf.pem"]);
        for extra in [&["-verify_hostname", "localhost"], &["-verify_ip", "::1"], &["-purpose", "sslserver"]]
        {
            let mut args = vec!["verify", "-x509_strict", "-CAfile", "out.pem"];
            args.extend_from_slice(extra);
            args.push("leaf.pem");
            run(&args);
        }
        run(&["verify", "-x509_strict", "-CAfile", "out.pem", "out.pem"]);
        let ca = run(&["x509", "-in", "out.pem", "-noout", "-text"]);
        assert!(ca.contains("X509v3 Basic Constraints: critical"), "{ca}");
        assert!(ca.contains("X509v3 Key Usage: critical"), "{ca}");
        assert!(ca.contains("X509v3 Subject Key Identifier"), "{ca}");
        let leaf = run(&["x509", "-in", "leaf.pem", "-noout", "-text"]);
        assert!(leaf.contains("X509v3 Authority Key Identifier"), "{leaf}");
        assert!(leaf.contains("TLS Web Server Authentication"), "{leaf}");
    }

    #[test]
    fn half_an_authority_is_never_replaced_silently() {
        let dir = tempfile::tempdir().unwrap();
        let ca = ServerTls::new(auto(dir.path()), july()).unwrap().ca_pem().unwrap().to_owned();
        let tls = dir.path().join("tls");
        fs::remove_file(tls.join("ca.key")).unwrap();
        let error = ServerTls::new(auto(dir.path()), july()).unwrap_err();
        assert!(matches!(error, TlsError::HalfAuthority { .. }), "{error}");
        assert_eq!(fs::read_to_string(tls.join("ca.pem")).unwrap(), ca);
        // A foreign key in its place is found out too.
        let other = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        fs::write(tls.join("ca.key"), other.serialize_pem()).unwrap();
        let error = ServerTls::new(auto(dir.path()), july()).unwrap_err();
        assert!(matches!(error, TlsError::ForeignAuthority { .. }), "{error}");
    }

    #[test]
    fn a_crash_before_the_certificate_is_written_is_mended() {
        let dir = tempfile::tempdir().unwrap();
        drop(ServerTls::new(auto(dir.path()), july()).unwrap());
        let tls = dir.path().join("tls");
        let key = fs::read(tls.join("ca.key")).unwrap();
        fs::remove_file(tls.join("ca.pem")).unwrap();
        fs::write(tls.join(".ca.pem.new"), "half").unwrap();
        drop(ServerTls::new(auto(dir.path()), july()).unwrap());
        assert_eq!(fs::read(tls.join("ca.key")).unwrap(), key);
        assert!(!tls.join(".ca.pem.new").exists());
    }

    #[test]
    fn the_leaf_is_renewed_at_half_of_its_life() {
        let dir = tempfile::tempdir().unwrap();
        let tls = ServerTls::new(auto(dir.path()), july()).unwrap();
        let first = leaf_of(&tls);
        assert!(!tls.renew(july() + days(44)).unwrap());
        assert_eq!(leaf_of(&tls), first);
        assert!(tls.renew(july() + days(45)).unwrap());
        assert_ne!(leaf_of(&tls), first);
        assert!(!tls.renew(july() + days(46)).unwrap());
        assert!(tls.renew(july()).unwrap(), "set back, the leaf would not be valid yet");
    }

    #[test]
    fn files_are_read_again_and_a_bad_one_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
        let make = |name: &str| {
            let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
            fs::write(&cert, made.cert.pem()).unwrap();
            fs::write(&key, made.signing_key.serialize_pem()).unwrap();
            made.cert.der().clone()
        };
        let first = make("one.example");
        let source = TlsSource::Files { cert: cert.clone(), key: key.clone() };
        let tls = ServerTls::new(source.clone(), july()).unwrap();
        assert_eq!((leaf_of(&tls), tls.ca_pem()), (first, None));
        let second = make("two.example");
        tls.reload(july()).unwrap();
        assert_eq!(leaf_of(&tls), second);
        assert!(!tls.renew(july() + days(1000)).unwrap());
        let own_key = fs::read(&key).unwrap();
        make("three.example");
        fs::write(&key, own_key).unwrap();
        let error = tls.reload(july()).unwrap_err();
        assert!(matches!(error, TlsError::Unusable { .. }), "{error}");
        fs::write(&cert, "no certificate").unwrap();
        assert!(matches!(ServerTls::new(source, july()).unwrap_err(), TlsError::NoCertificate(_)));
        fs::remove_file(&cert).unwrap();
        assert!(tls.reload(july()).unwrap_err().to_string().contains("cert.pem"));
        assert_eq!(leaf_of(&tls), second);
    }

    #[test]
    fn a_file_without_certificates_is_no_trust_anchor() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        assert!(matches!(client_config(Some(&path)).unwrap_err(), TlsError::File { .. }));
        fs::write(&path, "").unwrap();
        assert!(matches!(client_config(Some(&path)).unwrap_err(), TlsError::NoCertificate(_)));
        fs::write(&path, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
        assert!(matches!(client_config(Some(&path)).unwrap_err(), TlsError::Unusable { .. }));
    }

    #[test]
    fn names_are_hosts_or_addresses() {
        for text in ["localhost", "a.b-c.example", "*.example.com", "10.0.0.1", "::1"] {
            assert_eq!(TlsName::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(TlsName::parse("LocalHost"), Some(TlsName::Dns("localhost".to_owned())));
        for text in ["", "*", "a b", "[::1]", "https://x", "x:1", "a..b", "-a", "x.", "a.*.b", "ä.example"] {
            assert_eq!(TlsName::parse(text), None, "{text}");
        }
    }

    #[test]
    fn no_key_is_shown() {
        let dir = tempfile::tempdir().unwrap();
        let tls = ServerTls::new(auto(dir.path()), july()).unwrap();
        assert!(!format!("{tls:?}").contains("BEGIN"));
    }
}
