//! Reading a request in exactly one way: framing, credential, headers, body, path.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::body::Body;
use hyper::header::{
    AUTHORIZATION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue,
    TRANSFER_ENCODING,
};
use hyper::http::request::Parts;

use crate::forward::{IDEMPOTENCY_KEY, STRIPE_ACCOUNT, STRIPE_VERSION};
use crate::proxy::context;
use crate::refusal::{Code, Refusal};
use crate::server::drain_body;
use crate::vendor::stripe::catalogue::{self, BadPath};
use crate::vendor::stripe::form::{Ambiguous, Params};
use crate::vendor::stripe::request::{self, IDEMPOTENCY_KEY_BYTES_MAX, Reading};
use crate::vendor::stripe::rules;

/// How long a request's body may take to arrive.
const BODY_TIMEOUT_MS: u64 = 30_000;
/// What is read and thrown away of a body that is refused, so that the refusal is not lost.
const DRAIN_BYTES_MAX: u64 = 16 << 20;
/// For how long.
const DRAIN_MS: u64 = 2_000;
/// All headers of one request together, in bytes.
const HEADER_BYTES_MAX: usize = 16 * 1024;
/// Headers of one request.
const HEADERS_MAX: usize = 64;

const STRIPE_CONTEXT: HeaderName = HeaderName::from_static("stripe-context");
const METHOD_OVERRIDES: [HeaderName; 3] = [
    HeaderName::from_static("x-http-method-override"),
    HeaderName::from_static("x-http-method"),
    HeaderName::from_static("x-method-override"),
];

/// Checks how the request is framed, before anybody is asked who sent it.
///
/// # Errors
/// `method_not_allowed`, `headers_too_large` or `request_ambiguous`.
pub fn framing(head: &Parts) -> Result<(), Refusal> {
    if !["GET", "POST", "DELETE"].contains(&head.method.as_str()) {
        return Err(Refusal::new(Code::MethodNotAllowed, "Only GET, POST and DELETE are served."));
    }
    let bytes: usize = head.headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    if bytes > HEADER_BYTES_MAX || head.headers.len() > HEADERS_MAX {
        return Err(Refusal::new(
            Code::HeadersTooLarge,
            format!("A request may have {HEADERS_MAX} headers of {HEADER_BYTES_MAX} bytes together."),
        ));
    }
    for name in [AUTHORIZATION, CONTENT_LENGTH, TRANSFER_ENCODING, hyper::header::HOST] {
        once(&head.headers, &name)?;
    }
    let coding = head.headers.get(TRANSFER_ENCODING);
    if coding.is_some_and(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"chunked")) {
        return Err(ambiguous("Transfer-Encoding", "may only be 'chunked'"));
    }
    if coding.is_some() && head.headers.contains_key(CONTENT_LENGTH) {
        return Err(ambiguous("Content-Length", "must not be given with Transfer-Encoding"));
    }
    Ok(())
}

/// The credential of a request: a bearer token or the user name of Basic.
///
/// # Errors
/// `vault_key_invalid` when there is none.
pub fn credential(headers: &HeaderMap) -> Result<String, Refusal> {
    let missing = || {
        Refusal::new(
            Code::VaultKeyInvalid,
            "No vault key was sent. Send it as the SDK's API key: 'Authorization: Bearer vk_…'.",
        )
    };
    let value = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()).ok_or_else(missing)?;
    let (scheme, rest) = value.split_once(' ').ok_or_else(missing)?;
    if scheme.eq_ignore_ascii_case("bearer") {
        return Ok(rest.trim().to_owned());
    }
    let decoded = STANDARD.decode(rest.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    match decoded.filter(|_| scheme.eq_ignore_ascii_case("basic")) {
        Some(pair) => Ok(pair.split(':').next().unwrap_or_default().to_owned()),
        None => Err(missing()),
    }
}

/// A body, whole and within its limits of size and time.
///
/// # Errors
/// `body_too_large`, `request_timeout` or `encoding_not_allowed`.
pub async fn body<B>(headers: &HeaderMap, mut body: B, bytes_max: usize) -> Result<Bytes, Refusal>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let refusal = match whole(headers, &mut body, bytes_max).await {
        Ok(bytes) => return Ok(bytes),
        Err(refusal) => refusal,
    };
    // A refusal that is sent while the caller still writes can be lost when the connection closes.
    if refusal.code != Code::RequestTimeout {
        drain(body).await;
    }
    Err(refusal)
}

/// Reads a body that is refused and throws it away, within limits.
pub async fn drain<B: Body<Data = Bytes>>(body: B) {
    drain_body(body, DRAIN_BYTES_MAX, Duration::from_millis(DRAIN_MS)).await;
}

async fn whole<B>(headers: &HeaderMap, body: &mut B, bytes_max: usize) -> Result<Bytes, Refusal>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    if headers
        .get(CONTENT_ENCODING)
        .is_some_and(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"identity"))
    {
        return Err(Refusal::of_param(
            Code::EncodingNotAllowed,
            "Content-Encoding",
            "A request body must come uncompressed.",
        ));
    }
    if body.is_end_stream() {
        return Ok(Bytes::new());
    }
    let timeout = Duration::from_millis(BODY_TIMEOUT_MS);
    match tokio::time::timeout(timeout, Limited::new(body, bytes_max).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            Err(Refusal::new(Code::BodyTooLarge, format!("A request body may have {bytes_max} bytes.")))
        }
        Ok(Err(_)) => Err(Refusal::new(Code::RequestTimeout, "The request's body was cut off.")),
        Err(_) => Err(Refusal::new(
            Code::RequestTimeout,
            format!("The request's body did not arrive within {} s.", timeout.as_secs()),
        )),
    }
}

/// Reads the whole request: nothing of it is used that is not in the result.
///
/// `path` is the path behind the mount.
///
/// # Errors
/// `request_ambiguous`, `parameter_invalid`, `encoding_not_allowed`, `not_found`, or `endpoint_not_allowed` for an
/// operation that nobody knows.
pub fn request<'a>(
    head: &Parts,
    path: &str,
    body: &Bytes,
    request_id: &'a str,
) -> Result<Reading<'a>, Refusal> {
    let headers = &head.headers;
    for name in [&CONTENT_TYPE, &CONTENT_ENCODING, &STRIPE_VERSION, &STRIPE_ACCOUNT, &STRIPE_CONTEXT] {
        once(headers, name)?;
    }
    if let Some(name) = METHOD_OVERRIDES.iter().find(|name| headers.contains_key(*name)) {
        return Err(ambiguous(name.as_str(), "asks for another method"));
    }
    let caller_key = caller_key(headers)?;
    let version = header(headers, &STRIPE_VERSION)?;
    if let Some(version) = &version {
        request::check_version(version)?;
    }
    let segments = catalogue::segments(path).map_err(|bad| match bad {
        BadPath::Ambiguous => ambiguous("path", "must be written without escapes, dots or empty segments"),
        BadPath::NotFound => Refusal::new(
            Code::NotFound,
            "Unrecognized request URL. If you are trying to list objects, remove the trailing slash.",
        ),
    })?;
    if segments.first() == Some(&"v2") && head.method.as_str() != "GET" {
        // Refused before its body, which is JSON there.
        return Err(Refusal::new(Code::EndpointNotAllowed, "Writes under /v2 are not supported."));
    }
    let params = params(head, body)?.with_lower_case("currency");
    rules::refuse_credentials(&params)?;
    let method = head.method.as_str();
    let (operation, ids) = catalogue::find(method, &segments).ok_or_else(|| {
        Refusal::new(Code::EndpointNotAllowed, "This is no operation of the Stripe API that is known here.")
    })?;
    Ok(Reading {
        operation,
        ids: ids.into_iter().map(str::to_owned).collect(),
        path: path.to_owned(),
        params,
        caller_key,
        version,
        account: header(headers, &STRIPE_ACCOUNT)?,
        request_id,
        context: context::read(headers)?,
    })
}

/// Whether the request names an account in the newer way, which reaches further than one connected account.
pub fn names_context(headers: &HeaderMap) -> bool {
    headers.contains_key(STRIPE_CONTEXT)
}

fn params(head: &Parts, body: &Bytes) -> Result<Params, Refusal> {
    let query = head.uri.query().unwrap_or_default();
    let parse = |text: &[u8]| Params::parse(text).map_err(unreadable);
    match head.method.as_str() {
        "GET" if !body.is_empty() => Err(ambiguous("body", "must be empty in a GET")),
        "GET" => parse(query.as_bytes()),
        "POST" if !query.is_empty() => {
            Err(ambiguous("query", "must be empty in a POST: parameters go into the body"))
        }
        _ if !query.is_empty() && !body.is_empty() => {
            Err(ambiguous("query", "must be empty when parameters are in the body"))
        }
        _ if body.is_empty() => parse(query.as_bytes()),
        _ => {
            let form = b"application/x-www-form-urlencoded";
            let kind = head.headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes);
            let media = kind.and_then(|kind| kind.split(|byte| *byte == b';').next());
            if media.is_none_or(|media| !media.trim_ascii().eq_ignore_ascii_case(form)) {
                return Err(Refusal::of_param(
                    Code::EncodingNotAllowed,
                    "Content-Type",
                    "The body must be application/x-www-form-urlencoded, as every Stripe SDK sends it.",
                ));
            }
            parse(body)
        }
    }
}

fn caller_key(headers: &HeaderMap) -> Result<Option<String>, Refusal> {
    let bad = |why: &str| {
        Err(Refusal::of_param(Code::ParameterInvalid, "Idempotency-Key", format!("Idempotency-Key {why}.")))
    };
    let mut values = headers.get_all(IDEMPOTENCY_KEY).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return if headers.contains_key(IDEMPOTENCY_KEY) { bad("is given more than once") } else { Ok(None) };
    };
    let Some(text) =
        value.to_str().ok().filter(|text| text.bytes().all(|byte| (b' '..=b'~').contains(&byte)))
    else {
        return bad("must be printable ASCII");
    };
    match text.len() {
        0 => Ok(None),
        1..=IDEMPOTENCY_KEY_BYTES_MAX => Ok(Some(text.to_owned())),
        _ => bad("may have 255 characters"),
    }
}

fn header(headers: &HeaderMap, name: &HeaderName) -> Result<Option<String>, Refusal> {
    let Some(value) = headers.get(name) else { return Ok(None) };
    match value.to_str() {
        Ok(text) => Ok(Some(text.to_owned())),
        Err(_) => Err(ambiguous(name.as_str(), "must be printable ASCII")),
    }
}

fn once(headers: &HeaderMap, name: &HeaderName) -> Result<(), Refusal> {
    if headers.get_all(name).iter().nth(1).is_some() {
        return Err(ambiguous(name.as_str(), "is given more than once"));
    }
    Ok(())
}

fn ambiguous(param: &str, why: &str) -> Refusal {
    Refusal::of_param(Code::RequestAmbiguous, param, format!("'{param}' {why}."))
}

fn unreadable(error: Ambiguous) -> Refusal {
    // A name is shown only when it is short and plain: it came from outside.
    let param = error.param.filter(|name| name.len() <= 100 && name.is_ascii());
    let message = match &param {
        Some(param) => format!("'{param}': {}.", error.why),
        None => format!("The parameters cannot be read: {}.", error.why),
    };
    Refusal { param, ..Refusal::new(Code::RequestAmbiguous, message) }
}
