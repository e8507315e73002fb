//! The way to Stripe: puts the real key on a request and sends it once.
//!
//! There are two doors. A money call needs the ledger's [`Held`], and what is sent is exactly what is held. Anything else
//! needs a [`FreeRequest`], which cannot be made for a money call.

use std::sync::{Arc, PoisonError, RwLock};

use bytes::Bytes;
use hyper::Method;
use hyper::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, USER_AGENT,
};
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

use crate::hold::ExactRequest;
use crate::ledger::Held;
use crate::secret::Secret;
use crate::time::UnixMs;
use crate::upstream::{NotSentReason, Outbound, Sent, Upstream};
use crate::vendor::stripe::object::Look;
use crate::vendor::stripe::rules::Effect;
use crate::vendor::stripe::{READ_VERSION, form};

/// Header of the key that Stripe compares.
pub const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Header of the API version.
pub const STRIPE_VERSION: HeaderName = HeaderName::from_static("stripe-version");
/// Header of the connected account.
pub const STRIPE_ACCOUNT: HeaderName = HeaderName::from_static("stripe-account");

/// Room for all headers that a request to Stripe can have, `Host` too.
const HEADERS_ROOM: usize = 8;

/// Sends to Stripe under the real key.
#[derive(Debug)]
pub struct Forwarder {
    upstream: Arc<Upstream>,
    key: RwLock<OwnKey>,
}

/// The real key, and how a request carries it.
#[derive(Debug)]
struct OwnKey {
    secret: Secret,
    /// `None` for a text that no header can carry: nothing is sent then.
    bearer: Option<HeaderValue>,
}

impl OwnKey {
    fn new(secret: Secret) -> Self {
        let bearer = HeaderValue::from_str(&format!("Bearer {}", secret.expose())).ok().map(|mut value| {
            value.set_sensitive(true);
            value
        });
        Self { secret, bearer }
    }
}

/// A request that moves no money.
#[derive(Debug)]
pub struct FreeRequest(ExactRequest);

impl FreeRequest {
    /// A read of the sidecar's own.
    pub fn own_read(path: &str) -> Self {
        Self(ExactRequest {
            method: "GET".to_owned(),
            path: path.to_owned(),
            params: Vec::new(),
            version: None,
            account: None,
            idempotency_key: None,
        })
    }

    /// The read of an object that a request is about, of the same account.
    pub fn look(look: &Look, request: &ExactRequest) -> Self {
        Self::read(look.path.clone(), look.params.clone(), request.account.clone())
    }

    /// Any other read of the sidecar's own.
    pub fn read(path: String, params: Vec<(String, String)>, account: Option<String>) -> Self {
        Self(ExactRequest {
            method: "GET".to_owned(),
            path,
            params,
            version: Some(READ_VERSION.to_owned()),
            account,
            idempotency_key: None,
        })
    }

    /// A caller's request; `None` when it could move money in.
    pub fn new(effect: Effect, request: ExactRequest) -> Option<Self> {
        match effect {
            Effect::Free | Effect::Ends(_) => Some(Self(request)),
            Effect::Priced(_) | Effect::Unpriced => None,
        }
    }
}

impl Forwarder {
    /// A forwarder that opens Stripe with `key`.
    pub fn new(upstream: Upstream, key: Secret) -> Self {
        Self { upstream: Arc::new(upstream), key: RwLock::new(OwnKey::new(key)) }
    }

    /// Another forwarder to the same place, to try a key before it is used.
    #[must_use]
    pub fn trying(&self, key: Secret) -> Self {
        Self { upstream: Arc::clone(&self.upstream), key: RwLock::new(OwnKey::new(key)) }
    }

    /// Puts a rotated key in the place of the old one. Whose it is must have been asked before.
    pub fn set_key(&self, key: Secret) {
        *self.key.write().unwrap_or_else(PoisonError::into_inner) = OwnKey::new(key);
    }

    /// The digest by which the ledger knows the key.
    pub fn key_digest(&self) -> [u8; 32] {
        Sha256::digest(self.key.read().unwrap_or_else(PoisonError::into_inner).secret.expose()).into()
    }

    /// Sends a money call, exactly as it is held.
    ///
    /// A re-send that comes too late (a machine that slept in between) is not sent: Stripe may have forgotten the key.
    pub async fn send_held(&self, held: &Held, now: UnixMs, deadline: Instant) -> Sent {
        if !held.first_send() && !held.may_be_resent(now) {
            return Sent::NotSent { reason: NotSentReason::DeadlinePassed };
        }
        self.send(held.request(), deadline).await
    }

    /// Sends anything else.
    pub async fn send_free(&self, request: &FreeRequest, deadline: Instant) -> Sent {
        self.send(&request.0, deadline).await
    }

    async fn send(&self, request: &ExactRequest, deadline: Instant) -> Sent {
        match self.outbound(request) {
            Some(outbound) => self.upstream.send(outbound, deadline).await,
            None => Sent::NotSent { reason: NotSentReason::Malformed },
        }
    }

    fn outbound(&self, request: &ExactRequest) -> Option<Outbound> {
        let form = form::serialise(&request.params);
        let method = Method::from_bytes(request.method.as_bytes()).ok()?;
        let mut headers = HeaderMap::with_capacity(HEADERS_ROOM);
        headers.insert(AUTHORIZATION, self.bearer()?);
        headers.insert(USER_AGENT, HeaderValue::from_static(concat!("keybrake/", env!("CARGO_PKG_VERSION"))));
        // Answers are read here, so they must come plain.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let optional = [
            (IDEMPOTENCY_KEY, &request.idempotency_key),
            (STRIPE_VERSION, &request.version),
            (STRIPE_ACCOUNT, &request.account),
        ];
        for (name, value) in optional {
            if let Some(value) = value {
                headers.insert(name, HeaderValue::from_str(value).ok()?);
            }
        }
        if method == Method::POST {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
            let body = Bytes::from(form);
            return Some(Outbound { method, path_and_query: request.path.clone(), headers, body });
        }
        let query = if form.is_empty() { String::new() } else { format!("?{form}") };
        let path_and_query = format!("{}{query}", request.path);
        Some(Outbound { method, path_and_query, headers, body: Bytes::new() })
    }

    fn bearer(&self) -> Option<HeaderValue> {
        self.key.read().unwrap_or_else(PoisonError::into_inner).bearer.clone()
    }
}
