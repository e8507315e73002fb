//! Answers on their way back: Stripe's own, remembered ones, and refusals.

use std::borrow::Cow;

use bytes::Bytes;
use hyper::Response;
use hyper::header::{self, CACHE_CONTROL, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};

use crate::call::StoredAnswer;
use crate::refusal::Refusal;
use crate::server::{ReplyBody, whole};
use crate::time::UnixMs;
use crate::upstream;
use crate::vendor::stripe::{refusal, secrets};

/// Header of the id that a caller can quote.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("request-id");
/// Header that tells SDKs whether to send the same request again.
pub const SHOULD_RETRY: HeaderName = HeaderName::from_static("stripe-should-retry");
/// Header of an answer that was given before.
pub const REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");
/// Header of the request that was executed.
pub const ORIGINAL_REQUEST: HeaderName = HeaderName::from_static("original-request");
/// Header of the time at which a remembered answer came.
pub const REPLAYED_FROM: HeaderName = HeaderName::from_static("keybrake-replayed-from");
/// Header that says where the time of a request went.
pub const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");
/// Header of an answer after which nobody knows whether money moved.
pub const OUTCOME: HeaderName = HeaderName::from_static("keybrake-outcome");

/// An answer, before it is written.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The status.
    pub status: u16,
    /// The headers, without framing.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
}

/// Headers of Stripe's that concern only its own connection to us, or the host that it answers for.
static NOT_PASSED_ON: [HeaderName; 11] = [
    header::ALT_SVC,
    header::CONNECTION,
    header::CONTENT_LENGTH,
    HeaderName::from_static("keep-alive"),
    header::PROXY_AUTHENTICATE,
    header::SET_COOKIE,
    header::STRICT_TRANSPORT_SECURITY,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

impl Reply {
    /// Stripe's answer as it is, with an id of ours where it has none.
    pub fn of_answer(answer: &upstream::Answer, request_id: &str) -> Self {
        let mut headers = answer.headers.clone();
        for name in &NOT_PASSED_ON {
            headers.remove(name);
        }
        let mut reply = Self { status: answer.status, headers, body: answer.body.clone() };
        if reply.header(&REQUEST_ID).is_none() {
            reply.set(REQUEST_ID, request_id);
        }
        reply
    }

    /// A remembered answer, given again.
    pub fn of_stored(answer: &StoredAnswer, request_id: &str) -> Self {
        let mut reply =
            Self { status: answer.status, headers: HeaderMap::new(), body: Bytes::from(answer.body.clone()) };
        reply.set(CONTENT_TYPE, &answer.content_type);
        reply.set(REQUEST_ID, request_id);
        reply.mark_replayed(&answer.request_id, answer.at);
        reply
    }

    /// A refusal, shaped as Stripe shapes its errors.
    pub fn of_refusal(refusal: &Refusal, request_id: &str, now: UnixMs) -> Self {
        let body = Bytes::from(refusal::body(refusal));
        let mut reply = Self { status: refusal.status, headers: HeaderMap::new(), body };
        reply.set(CONTENT_TYPE, "application/json");
        reply.set(CACHE_CONTROL, "no-store");
        reply.set(REQUEST_ID, request_id);
        reply.set(SHOULD_RETRY, if refusal.retry { "true" } else { "false" });
        if let Some(seconds) = refusal::retry_after_s(refusal, now) {
            reply.set(RETRY_AFTER, &seconds.to_string());
        }
        reply
    }

    /// Marks the reply as one that was not executed for this request.
    pub fn mark_replayed(&mut self, original_request: &str, from: UnixMs) {
        self.set(REPLAYED, "true");
        self.set(ORIGINAL_REQUEST, original_request);
        self.set(REPLAYED_FROM, &from.to_string());
    }

    /// Takes the client secrets out of the body.
    pub fn hide_client_secrets(&mut self) {
        if let Cow::Owned(body) = secrets::without_client_secrets(&self.body) {
            self.body = Bytes::from(body);
        }
    }

    /// Sets a header; a value that no header can have is left out.
    pub fn set(&mut self, name: HeaderName, value: &str) {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.insert(name, value);
        }
    }

    /// A header's value.
    pub fn header(&self, name: &HeaderName) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// The response to write.
    pub fn into_response(self) -> Response<ReplyBody> {
        let mut response = Response::new(whole(self.body));
        // Stripe's statuses and ours are all valid.
        *response.status_mut() =
            hyper::StatusCode::from_u16(self.status).unwrap_or(hyper::StatusCode::BAD_GATEWAY);
        *response.headers_mut() = self.headers;
        response
    }
}

/// The id that Stripe gave its answer.
pub fn request_id_of(answer: &upstream::Answer) -> Option<String> {
    answer.headers.get(REQUEST_ID).and_then(|value| value.to_str().ok()).map(str::to_owned)
}
