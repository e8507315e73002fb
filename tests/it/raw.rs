//! Requests written byte for byte over a plain socket, so that no client mends them on the way.

use std::collections::BTreeMap;

use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::PATIENCE;

pub(crate) const FORM: &str = "application/x-www-form-urlencoded";

/// One request, still open to change.
#[derive(Clone, Debug)]
pub(crate) struct Raw {
    line: String,
    headers: Vec<(String, Vec<u8>)>,
    body: Vec<u8>,
    /// Whether `Content-Length` is written for it.
    length: bool,
}

/// An answer, read to the end of the connection.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) text: String,
    pub(crate) body: Value,
}

impl Raw {
    /// `GET /path`, and nothing but `Host` and `Connection: close`.
    pub(crate) fn new(line: &str) -> Self {
        Self { line: line.to_owned(), headers: Vec::new(), body: Vec::new(), length: true }
            .add("Host", "localhost")
            .add("Connection", "close")
    }

    /// A form under a bearer and an idempotency key, as an SDK sends it.
    pub(crate) fn post(path: &str, bearer: &str, idempotency_key: &str, form: &str) -> Self {
        Self::new(&format!("POST {path}"))
            .bearer(bearer)
            .add("Idempotency-Key", idempotency_key)
            .add("Content-Type", FORM)
            .body(form)
    }

    pub(crate) fn line(mut self, line: &str) -> Self {
        line.clone_into(&mut self.line);
        self
    }

    pub(crate) fn bearer(self, key: &str) -> Self {
        self.add("Authorization", &format!("Bearer {key}"))
    }

    /// One more header, whether or not there is one of this name.
    pub(crate) fn add(self, name: &str, value: &str) -> Self {
        self.add_bytes(name, value.as_bytes())
    }

    pub(crate) fn add_bytes(mut self, name: &str, value: &[u8]) -> Self {
        self.headers.push((name.to_owned(), value.to_vec()));
        self
    }

    pub(crate) fn without(mut self, name: &str) -> Self {
        self.headers.retain(|(found, _)| !found.eq_ignore_ascii_case(name));
        self
    }

    pub(crate) fn set(self, name: &str, value: &str) -> Self {
        self.without(name).add(name, value)
    }

    pub(crate) fn body(mut self, body: impl AsRef<[u8]>) -> Self {
        body.as_ref().clone_into(&mut self.body);
        self
    }

    /// The body in chunks and without a length, as Go sends it.
    pub(crate) fn chunked(mut self) -> Self {
        let mut chunks = Vec::new();
        for chunk in self.body.chunks(1 << 14) {
            chunks.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
            chunks.extend_from_slice(chunk);
            chunks.extend_from_slice(b"\r\n");
        }
        chunks.extend_from_slice(b"0\r\n\r\n");
        self.body = chunks;
        self.length = false;
        self
    }

    /// The body as it is, framed by what the headers say.
    pub(crate) fn unframed(mut self) -> Self {
        self.length = false;
        self
    }

    /// With another request behind it, in the same write.
    pub(crate) fn followed_by(mut self, other: &Self) -> Self {
        let hidden = other.bytes();
        self.body.extend(hidden);
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = format!("{} HTTP/1.1\r\n", self.line).into_bytes();
        for (name, value) in &self.headers {
            bytes.extend_from_slice(name.as_bytes());
            bytes.extend_from_slice(b": ");
            bytes.extend_from_slice(value);
            bytes.extend_from_slice(b"\r\n");
        }
        if self.length && (!self.body.is_empty() || self.line.starts_with("POST")) {
            bytes.extend_from_slice(format!("Content-Length: {}\r\n", self.body.len()).as_bytes());
        }
        bytes.extend_from_slice(b"\r\n");
        bytes.extend_from_slice(&self.body);
        bytes
    }

    /// Its line and the beginning of its body, for messages.
    pub(crate) fn shown(&self) -> String {
        let body: String = String::from_utf8_lossy(&self.body).chars().take(300).collect();
        format!("{} {body}", self.line)
    }

    /// Every value that the request carries, outside of its path and its credential. The fields of an `expand` are names.
    pub(crate) fn values(&self) -> Vec<String> {
        let plumbing = ["host", "connection", "authorization", "content-type", "transfer-encoding"];
        let headers = self
            .headers
            .iter()
            .filter(|(name, _)| !plumbing.contains(&name.to_ascii_lowercase().as_str()))
            .map(|(_, value)| String::from_utf8_lossy(value).into_owned());
        let body = String::from_utf8_lossy(&self.body).into_owned();
        let query = self.line.split_once('?').map(|(_, query)| query.to_owned()).unwrap_or_default();
        let pairs = [body, query];
        let params = pairs.iter().flat_map(|text| text.split(['&', ';'])).filter_map(|pair| {
            pair.split_once('=')
                .filter(|(name, _)| !name.starts_with("expand"))
                .map(|(_, value)| value.trim().to_owned())
        });
        headers.chain(params).collect()
    }

    /// Writes all of it, then reads until the other side closes.
    pub(crate) async fn send(&self, address: &str) -> Answer {
        let exchange = async {
            let mut stream = TcpStream::connect(address).await.unwrap();
            // A server may have answered and closed before it took everything; what it said must still be there.
            let _ = stream.write_all(&self.bytes()).await;
            let mut answer = Vec::new();
            let read = stream.read_to_end(&mut answer).await;
            (answer, read)
        };
        let (answer, read) = timeout(PATIENCE, exchange).await.expect("an answer should come");
        let text = String::from_utf8_lossy(&answer).into_owned();
        let Some((head, body)) = text.split_once("\r\n\r\n") else {
            panic!("{:?} was answered with {text:?} ({read:?})", self.line);
        };
        let mut lines = head.lines();
        let status = lines.next().and_then(|line| line.split(' ').nth(1)).and_then(|code| code.parse().ok());
        let headers = lines
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect();
        Answer {
            status: status.unwrap(),
            headers,
            text: body.to_owned(),
            body: serde_json::from_str(body).unwrap_or_default(),
        }
    }
}

impl Answer {
    pub(crate) fn code(&self) -> &str {
        self.body["error"]["code"].as_str().unwrap_or_default()
    }

    pub(crate) fn param(&self) -> Option<&str> {
        self.body["error"]["param"].as_str()
    }
}
