//! What must hold for every input, whoever made it: fuzzing looks for one that breaks it, `cargo test` replays what was
//! found. Each function takes the bytes of one input and answers whether the program accepts them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{HeaderName, HeaderValue};
use hyper::http::request::Parts;
use hyper::{HeaderMap, Method, Request, Uri};
use keybrake::proxy::read;
use keybrake::refusal::Refusal;
use keybrake::vendor::stripe::catalogue;
use keybrake::vendor::stripe::form::{self, Params};
use keybrake::vendor::stripe::request::Reading;
use keybrake::vendor::stripe::{VERSION_MAX, VERSION_MIN};
use tokio::runtime::{Builder, Runtime};

use crate::readings::{Rack, first_wins, last_wins, nested};

const BODY_BYTES_MAX: usize = 1 << 20;
/// The body's reader keeps a time limit.
static RUNTIME: LazyLock<Runtime> =
    LazyLock::new(|| Builder::new_current_thread().enable_time().build().expect("a runtime"));
/// Parameters that nobody may send, whatever they say.
const NEVER_READ: &[&str] =
    &["key", "api_key", "access_token", "client_secret", "_method", "_stripe_account", "_stripe_version"];

// --- Forms

/// A form or a query string.
pub(crate) fn a_form(input: &[u8]) -> bool {
    let params = match Params::parse(input) {
        Ok(params) => params,
        Err(error) => {
            assert!(!is_plain_form(input), "a form without any trap was refused: {error}");
            return false;
        }
    };
    let given = if input.is_empty() { 0 } else { input.split(|byte| *byte == b'&').count() };
    assert_eq!(params.pairs().len(), given, "a parameter was lost or made up");
    let forwarded = has_one_reading(params.pairs());
    let again = Params::parse(forwarded.as_bytes()).expect("what is forwarded can be read");
    assert_eq!(again, params, "what is forwarded means something else");
    assert_eq!(form::serialise(again.pairs()), forwarded, "what is forwarded has two spellings");
    for rack in [Rack::Two, Rack::Three] {
        let meant = nested(input, rack).expect("what is accepted, Rack accepts");
        assert_eq!(leaves(params.pairs()), meant, "the caller's own bytes mean something else");
    }
    true
}

/// Forwards parameters, and looks that everybody reads in those bytes what was read here.
pub(crate) fn has_one_reading(pairs: &[(String, String)]) -> String {
    let forwarded = form::serialise(pairs);
    let unreserved = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~[]%&=".contains(&byte);
    assert!(forwarded.bytes().all(unreserved), "not escaped: {forwarded}");
    let (expected, bytes) = (leaves(pairs), forwarded.as_bytes());
    assert_eq!(expected.len(), pairs.len(), "a name is there twice: {forwarded}");
    assert_eq!(first_wins(bytes), expected, "where the first counts: {forwarded}");
    assert_eq!(last_wins(bytes), expected, "where the last counts: {forwarded}");
    for rack in [Rack::Two, Rack::Three] {
        assert_eq!(nested(bytes, rack), Ok(expected.clone()), "at Rack {rack:?}: {forwarded}");
    }
    forwarded
}

fn leaves(pairs: &[(String, String)]) -> BTreeMap<String, String> {
    pairs.iter().cloned().collect()
}

/// Letters, digits and underscores only, and no name twice: there is no reason to refuse it.
fn is_plain_form(input: &[u8]) -> bool {
    let plain = |text: &[u8]| text.iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'_');
    let mut names = BTreeSet::new();
    let pairs: Vec<_> = input.split(|byte| *byte == b'&').collect();
    pairs.len() <= 1_000
        && pairs.iter().all(|pair| {
            let Some(at) = pair.iter().position(|byte| *byte == b'=') else { return false };
            let (name, value) = (&pair[..at], &pair[at + 1..]);
            let new = names.insert(name);
            new && (1..=512).contains(&name.len()) && plain(name) && plain(value)
        })
}

// --- Paths

/// An operation, read from its template by other code than the program's.
struct Shape {
    template: &'static str,
    method: &'static str,
    words: Vec<&'static str>,
}

static SHAPES: LazyLock<Vec<Shape>> = LazyLock::new(|| {
    let shape = |operation: &'static catalogue::Operation| {
        let (method, path) = operation.template.split_once(' ').expect("a method and a path");
        let words = path.strip_prefix('/').expect("a path").split('/').collect();
        Shape { template: operation.template, method, words }
    };
    catalogue::all().iter().map(shape).collect()
});

fn is_slot(word: &str) -> bool {
    word.starts_with('{')
}

impl Shape {
    fn takes(&self, method: &str, segments: &[&str]) -> bool {
        self.method == method
            && self.words.len() == segments.len()
            && self.words.iter().zip(segments).all(|(word, segment)| is_slot(word) || word == segment)
    }

    fn literals(&self) -> usize {
        self.words.iter().filter(|word| !is_slot(word)).count()
    }
}

/// `METHOD /path`.
pub(crate) fn a_path(input: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(input) else { return false };
    let (method, path) = text.split_once(' ').unwrap_or(("GET", text));
    let Ok(segments) = catalogue::segments(path) else {
        let words = path.strip_prefix('/').unwrap_or_default().split('/');
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        let odd = words.into_iter().any(|word| word.is_empty() || !word.bytes().all(plain));
        assert!(odd, "a path without any trap was refused: {path}");
        return false;
    };
    has_one_spelling(path, &segments);
    let found = catalogue::find(method, &segments);
    is_the_operation(method, &segments, found.as_ref().map(|(found, ids)| (found.template, ids.as_slice())));
    found.is_some()
}

/// Nothing in the path is written in another way, or read in another way by who forwards it.
fn has_one_spelling(path: &str, segments: &[&str]) {
    assert_eq!(format!("/{}", segments.join("/")), path, "segments that are not those of the path");
    for segment in segments {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
        assert!(
            !segment.is_empty() && segment.bytes().all(plain),
            "{segment:?} could be read in another way"
        );
    }
    let uri: Uri = path.parse().expect("what is accepted is a path");
    assert_eq!((uri.path(), uri.query()), (path, None));
}

/// The operation is the only one with most literals among those whose literals are all in the path.
fn is_the_operation(method: &str, segments: &[&str], found: Option<(&str, &[&str])>) {
    let taking: Vec<&Shape> = SHAPES.iter().filter(|shape| shape.takes(method, segments)).collect();
    let most = taking.iter().map(|shape| shape.literals()).max();
    let best: Vec<&&Shape> = taking.iter().filter(|shape| Some(shape.literals()) == most).collect();
    assert!(best.len() <= 1, "{segments:?} is two operations");
    let expected = best.first().map(|shape| {
        let ids: Vec<&str> = shape
            .words
            .iter()
            .zip(segments)
            .filter_map(|(word, segment)| is_slot(word).then_some(*segment))
            .collect();
        (shape.template, ids)
    });
    assert_eq!(found, expected.as_ref().map(|(template, ids)| (*template, ids.as_slice())));
}

/// An entry of `allowed_endpoints`.
pub(crate) fn a_grant(input: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(input) else { return false };
    let opened: Vec<&Shape> = SHAPES.iter().filter(|shape| shape.is_named_by(text)).collect();
    let Some((operation, wildcard)) = catalogue::named(text) else {
        assert!(opened.is_empty(), "{text:?} names {} and was refused", opened[0].template);
        return false;
    };
    let templates: Vec<&str> = opened.iter().map(|shape| shape.template).collect();
    assert_eq!(templates, [operation.template], "what {text:?} names");
    assert_eq!(wildcard, text.split('/').any(|word| word == "*"), "{text:?}");
    let whole = catalogue::named(operation.template).expect("a template names its operation");
    assert_eq!((whole.0.template, whole.1), (operation.template, false));
    // A request that the entry was written for finds the operation, and no other.
    let segments: Vec<&str> =
        opened[0].words.iter().map(|word| if is_slot(word) { "id_0" } else { *word }).collect();
    let (found, _) = catalogue::find(operation.method, &segments).expect("an operation");
    assert_eq!(found.template, operation.template, "{segments:?} is what {text:?} was written for");
    true
}

impl Shape {
    fn is_named_by(&self, entry: &str) -> bool {
        let Some(path) = entry.strip_prefix(self.method).and_then(|rest| rest.strip_prefix(" /")) else {
            return false;
        };
        let stands_for = |(word, written): (&&str, &str)| {
            let braced = written.len() > 2 && written.starts_with('{') && written.ends_with('}');
            if is_slot(word) { written == "*" || braced } else { *word == written }
        };
        path.split('/').count() == self.words.len() && self.words.iter().zip(path.split('/')).all(stands_for)
    }
}

// --- Requests

/// A request: a line with method and target, lines with headers, an empty line, a body.
pub(crate) fn a_request(input: &[u8]) -> bool {
    let Some((head, body)) = request_of(input) else { return false };
    let Ok((credential, reading)) = read(&head, &body) else { return false };
    let headers = Headers(&head.headers);
    headers.frame_one_body();
    assert_eq!(credential.as_bytes(), headers.credential(), "the credential is another one");
    headers.say(&reading);
    reads_one_set(&head, &body, &reading);
    let segments: Vec<&str> = reading.path.split('/').skip(1).collect();
    assert_eq!(reading.path, head.uri.path());
    has_one_spelling(&reading.path, &segments);
    let ids: Vec<&str> = reading.ids.iter().map(String::as_str).collect();
    is_the_operation(head.method.as_str(), &segments, Some((reading.operation.template, &ids)));
    true
}

/// The steps of the proxy before anything is asked of the ledger.
fn read<'a>(head: &Parts, body: &Bytes) -> Result<(String, Reading<'a>), Refusal> {
    read::framing(head)?;
    let credential = read::credential(&head.headers)?;
    let whole = read::body(&head.headers, Full::new(body.clone()), BODY_BYTES_MAX);
    let body = RUNTIME.block_on(whole)?;
    Ok((credential, read::request(head, head.uri.path(), &body, "req_1")?))
}

/// `None` for what the server would not hand on.
fn request_of(input: &[u8]) -> Option<(Parts, Bytes)> {
    let (line, mut rest) = cut(input, b'\n');
    let (method, target) = cut(line, b' ');
    let mut request = Request::new(());
    *request.method_mut() = Method::from_bytes(method).ok()?;
    *request.uri_mut() = Uri::try_from(target).ok()?;
    loop {
        let (line, behind) = cut(rest, b'\n');
        rest = behind;
        if line.is_empty() {
            break;
        }
        let (name, value) = cut(line, b':');
        let name = HeaderName::from_bytes(name).ok()?;
        let value = HeaderValue::from_bytes(value.trim_ascii()).ok()?;
        request.headers_mut().append(name, value);
    }
    Some((request.into_parts().0, Bytes::copy_from_slice(rest)))
}

/// What is before the first `mark`, and what is behind it.
fn cut(text: &[u8], mark: u8) -> (&[u8], &[u8]) {
    match text.iter().position(|byte| *byte == mark) {
        Some(at) => (&text[..at], &text[at + 1..]),
        None => (text, b""),
    }
}

/// The headers of an accepted request.
struct Headers<'a>(&'a HeaderMap);

impl Headers<'_> {
    fn all(&self, name: &str) -> Vec<&[u8]> {
        self.0.get_all(name).iter().map(HeaderValue::as_bytes).collect()
    }

    /// Nobody between the caller and Stripe could see another end of the body, another body or another method.
    fn frame_one_body(&self) {
        let (length, coding) = (self.all("content-length"), self.all("transfer-encoding"));
        assert!(length.len() + coding.len() <= 1, "two framings");
        assert!(coding.iter().all(|coding| coding.eq_ignore_ascii_case(b"chunked")), "{coding:?}");
        let compressed = self.all("content-encoding");
        assert!(compressed.iter().all(|coding| coding.eq_ignore_ascii_case(b"identity")), "{compressed:?}");
        for name in ["host", "content-type", "content-encoding"] {
            assert!(self.all(name).len() <= 1, "two of {name}");
        }
        for name in ["x-http-method-override", "x-http-method", "x-method-override"] {
            assert!(self.all(name).is_empty(), "{name}");
        }
    }

    /// The only credential: what is behind `Bearer`, or the user of `Basic`.
    fn credential(&self) -> Vec<u8> {
        let [value] = self.all("authorization")[..] else { panic!("not one credential") };
        let (scheme, rest) = cut(value, b' ');
        if scheme.eq_ignore_ascii_case(b"bearer") {
            return rest.trim_ascii().to_vec();
        }
        assert!(scheme.eq_ignore_ascii_case(b"basic"), "another scheme");
        let pair = from_base64(rest.trim_ascii()).expect("base64");
        cut(&pair, b':').0.to_vec()
    }

    /// What is forwarded of the headers is the only value, byte for byte.
    fn say(&self, reading: &Reading<'_>) {
        let mut sent = self.all("idempotency-key");
        assert!(sent.len() <= 1, "two idempotency keys");
        // An empty one is none.
        sent.retain(|key| !key.is_empty());
        assert_eq!(sent.first().copied(), reading.caller_key.as_deref().map(str::as_bytes));
        for key in sent {
            assert!(key.len() <= 255 && key.iter().all(|byte| (b' '..=b'~').contains(byte)), "{key:?}");
        }
        for (name, read) in [("stripe-version", &reading.version), ("stripe-account", &reading.account)] {
            let sent = self.all(name);
            assert!(sent.len() <= 1, "two of {name}");
            assert_eq!(sent.first().copied(), read.as_deref().map(str::as_bytes), "{name}");
        }
        if let Some(version) = &reading.version {
            let (date, name) = version.split_at_checked(10).expect("a date");
            assert!((VERSION_MIN..=VERSION_MAX).contains(&date), "{version}");
            let released =
                name.is_empty() || name.starts_with('.') && name[1..].bytes().all(|b| b.is_ascii_lowercase());
            assert!(released && name != ".preview", "{version}");
        }
    }
}

/// Query and body are one set of parameters to Rack: whichever of them wins, it is what was read here.
fn reads_one_set(head: &Parts, body: &[u8], reading: &Reading<'_>) {
    let query = head.uri.query().unwrap_or_default().as_bytes();
    assert!(query.is_empty() || body.is_empty(), "parameters in two places");
    assert!(query.is_empty() || head.method != "POST", "a query on a POST");
    assert!(body.is_empty() || head.method != "GET", "a body in a GET");
    let kind = head.headers.get("content-type").map(HeaderValue::as_bytes);
    let media = kind.map(|kind| cut(kind, b';').0.trim_ascii().to_ascii_lowercase());
    let is_form = media.as_deref() == Some(b"application/x-www-form-urlencoded");
    assert!(body.is_empty() || is_form, "a body that is no form: {kind:?}");
    has_one_reading(reading.params.pairs());
    let mut meant = nested(&[query, body].concat(), Rack::Three).expect("what is accepted, Rack accepts");
    if let Some(currency) = meant.get_mut("currency") {
        currency.make_ascii_lowercase();
    }
    assert_eq!(leaves(reading.params.pairs()), meant, "the caller's own bytes mean something else");
    let odd = meant.keys().find(|name| NEVER_READ.contains(&form::base(name)));
    assert_eq!(odd, None, "a parameter that could be a credential or a method");
}

fn from_base64(text: &[u8]) -> Option<Vec<u8>> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits = text.strip_suffix(b"==").or_else(|| text.strip_suffix(b"=")).unwrap_or(text);
    let (mut bytes, mut bits, mut count) = (Vec::new(), 0_usize, 0);
    for digit in digits {
        bits = (bits << 6 | DIGITS.iter().position(|known| known == digit)?) & 0xFFFF;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push(u8::try_from(bits >> count & 0xFF).ok()?);
        }
    }
    text.len().is_multiple_of(4).then_some(bytes)
}
