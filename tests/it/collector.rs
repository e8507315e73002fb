//! The central collector and the sidecars that ship to it, each a process of its own.

mod postgres;
mod redb;
mod store;
mod suite;
mod way;

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{Duration, Instant, sleep};

use crate::postgres::{Schema, Server};
use crate::standin::{Options, Standin};
use crate::support::{PATIENCE, Reply, Sidecar, client, environment, free_port, run};

const QUERY_KEY: &str = "query-key-of-the-tests-0123456789abcdef";

fn token(node: &str) -> String {
    format!("token-of-{node}-0123456789abcdef0123456789abcdef")
}

/// Where a collector keeps its records.
#[derive(Clone, Copy)]
pub(crate) enum Kept {
    /// In a file of its own.
    File,
    /// In a schema of its own in this database.
    Database(&'static Server),
}

impl Kept {
    fn password(self) -> Option<&'static str> {
        let Self::Database(server) = self else { return None };
        server.url().split_once('@')?.0.rsplit_once(':').map(|(_, password)| password)
    }
}

/// A collector for some nodes, and what it has.
pub(crate) struct Collector {
    process: Sidecar,
    dir: tempfile::TempDir,
    schema: Option<Arc<Schema<'static>>>,
}

impl Collector {
    /// Without TLS.
    pub(crate) async fn start(kept: Kept, nodes: &[&str]) -> Self {
        Self::start_with("off", nodes, schema_of(kept), &[]).await
    }

    /// With an authority of its own.
    async fn start_with_tls(nodes: &[&str]) -> Self {
        let mut collector = Self::start_with("auto", nodes, None, &[]).await;
        let ca = collector.ca();
        collector.process.trusts(&ca);
        collector
    }

    /// Another one on the same records.
    async fn another(&self, nodes: &[&str]) -> Self {
        Self::start_with("off", nodes, self.schema.clone(), &[]).await
    }

    /// The certificate of its authority.
    fn ca(&self) -> PathBuf {
        self.process.data.join("tls/ca.pem")
    }

    async fn start_with(
        tls: &str,
        nodes: &[&str],
        schema: Option<Arc<Schema<'static>>>,
        more: &[(&str, String)],
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tokens: Vec<String> = nodes.iter().map(|node| format!("{node} {}", token(node))).collect();
        std::fs::write(dir.path().join("tokens"), tokens.join("\n")).unwrap();
        let (listen, ops) = (format!("127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
        let data = dir.path().join("data").display().to_string();
        let mut env = vec![
            ("LISTEN", listen.clone()),
            ("OPS_LISTEN", ops.clone()),
            ("DATA_DIR", data.clone()),
            ("COLLECT_LISTEN", listen),
            ("COLLECT_OPS_LISTEN", ops),
            ("COLLECT_DATA_DIR", data),
            ("COLLECT_TOKENS_FILE", dir.path().join("tokens").display().to_string()),
            ("COLLECT_QUERY_KEY", QUERY_KEY.to_owned()),
            ("TLS", tls.to_owned()),
            ("LOG", "debug".to_owned()),
        ];
        if let Some(schema) = &schema {
            env.push(("COLLECT_DATABASE_URL", schema.url().to_owned()));
            env.push(("COLLECT_DATABASE_SCHEMA", schema.name().to_owned()));
        }
        env.extend_from_slice(more);
        let env = env.into_iter().map(|(name, value)| (format!("KEYBRAKE_{name}"), value)).collect();
        let mut process = Sidecar::spawn_collector(env);
        process.ready().await;
        Self { process, dir, schema }
    }

    /// Loses its records, while it does not run.
    async fn lose(&self) {
        match &self.schema {
            Some(schema) => drop(schema.sql(&format!("DROP SCHEMA {} CASCADE", schema.name())).await),
            None => std::fs::remove_dir_all(self.dir.path().join("data")).unwrap(),
        }
    }

    async fn get(&self, path: &str) -> Reply {
        self.process.json("GET", path, QUERY_KEY, None).await
    }

    async fn records(&self, query: &str) -> Vec<Value> {
        let reply = self.get(&format!("/audit?order=asc&limit=1000&{query}")).await;
        assert_eq!(reply.status, 200, "{}", reply.text);
        reply.body["data"].as_array().unwrap().clone()
    }

    /// What it says of a node.
    pub(crate) async fn node(&self, node: &str) -> Value {
        let reply = self.get("/audit/nodes").await;
        assert_eq!(reply.status, 200, "{}", reply.text);
        let all = reply.body["data"].as_array().unwrap();
        all.iter().find(|one| one["node"] == node).cloned().unwrap_or_default()
    }

    pub(crate) async fn is_whole(&self) -> bool {
        let verdict = self.get("/audit/verify").await;
        assert_eq!(verdict.status, 200, "{}", verdict.text);
        verdict.body["whole"] == true
    }

    /// A sidecar that ships to it.
    async fn sidecar(&self, node: &str, standin: &Standin, data: &Path) -> Sidecar {
        let mut sidecar = Sidecar::spawn(self.env_of(node, standin, data));
        sidecar.ready().await;
        sidecar
    }

    pub(crate) fn env_of(&self, node: &str, standin: &Standin, data: &Path) -> BTreeMap<String, String> {
        let mut env = environment(standin.addr(), data);
        env.insert("KEYBRAKE_NODE".to_owned(), node.to_owned());
        env.insert("KEYBRAKE_COLLECTOR_URL".to_owned(), self.process.base.clone());
        env.insert("KEYBRAKE_COLLECTOR_TOKEN".to_owned(), token(node));
        env
    }

    /// Waits until it holds everything that a sidecar has written.
    pub(crate) async fn has_all_of(&self, sidecar: &Sidecar, node: &str) {
        let since = Instant::now();
        loop {
            let own = sidecar.admin("GET", "/audit/verify", None).await.body;
            let held = self.node(node).await["chains"][0].clone();
            if held["head"] == own["head"] {
                return;
            }
            assert!(since.elapsed() < PATIENCE, "{held} is not {own}:\n{}", sidecar.log());
            sleep(Duration::from_millis(50)).await;
        }
    }
}

fn schema_of(kept: Kept) -> Option<Arc<Schema<'static>>> {
    match kept {
        Kept::File => None,
        Kept::Database(server) => Some(Arc::new(server.schema("collector"))),
    }
}

/// Reads one request, answers it with 200 and closes.
async fn take_one(mut stream: tokio::net::TcpStream) -> (String, Vec<u8>) {
    let mut text = Vec::new();
    loop {
        let end = text.windows(4).position(|four| four == b"\r\n\r\n").map(|at| at + 4);
        if let Some(end) = end {
            let head = String::from_utf8(text[..end].to_vec()).unwrap();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
            if text.len() >= end + length.unwrap_or(0_usize) {
                stream
                    .write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
                    .await
                    .unwrap();
                return (head, text.split_off(end));
            }
        }
        assert_ne!(stream.read_buf(&mut text).await.unwrap(), 0, "cut off");
    }
}

/// Something that says 200 to everything has not taken anything.
#[tokio::test]
async fn a_stranger_at_the_collectors_address_acknowledges_nothing() {
    let (standin, dir) = (Standin::start(Options::default()), tempfile::tempdir().unwrap());
    let stranger = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut env = environment(standin.addr(), dir.path());
    let url = format!("http://{}", stranger.local_addr().unwrap());
    env.insert("KEYBRAKE_COLLECTOR_URL".to_owned(), url);
    env.insert("KEYBRAKE_COLLECTOR_TOKEN".to_owned(), token("a"));
    let (taken, mut asked) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let (stream, _) = stranger.accept().await.unwrap();
            let _ = taken.send(take_one(stream).await);
        }
    });
    let mut sidecar = Sidecar::spawn(env);
    sidecar.ready().await;
    for _ in 0..2 {
        let (head, body) = tokio::time::timeout(PATIENCE, asked.recv()).await.unwrap().unwrap();
        assert!(
            head.starts_with("GET /collect/v1/chains/") && body.is_empty(),
            "no record goes there: {head}"
        );
    }
    let metrics =
        client().get(format!("{}/metrics", sidecar.ops)).send().await.unwrap().text().await.unwrap();
    assert!(
        !metrics.contains("keybrake_audit_backlog 0") && metrics.contains("keybrake_audit_shipped_total 0")
    );
    assert!(sidecar.log().contains("no collector of this program"), "{}", sidecar.log());
}

/// Any log store takes the records as lines, packed, with a bearer; a 2xx takes them.
#[tokio::test]
async fn a_log_store_gets_lines_that_verify() {
    let (standin, dir) = (Standin::start(Options::default()), tempfile::tempdir().unwrap());
    let store = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = store.local_addr().unwrap();
    let (taken, mut batches) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let (stream, _) = store.accept().await.unwrap();
            let _ = taken.send(take_one(stream).await);
        }
    });
    let mut env = environment(standin.addr(), dir.path());
    for (name, value) in [
        ("COLLECTOR_URL", format!("http://{address}/in/keybrake")),
        ("COLLECTOR_TOKEN", "any".to_owned()),
        ("COLLECTOR_FORMAT", "ndjson".to_owned()),
    ] {
        env.insert(format!("KEYBRAKE_{name}"), value);
    }
    let mut sidecar = Sidecar::spawn(env);
    sidecar.ready().await;
    let (key, _) = sidecar.mint("50.00", json!({})).await;
    assert_eq!(sidecar.charge(&key, "one", 1000, "cus_1").await.status, 200);
    let own = sidecar.audit("events=all").await;
    let mut lines = String::new();
    while lines.lines().count() < own.len() {
        let (head, body) = tokio::time::timeout(PATIENCE, batches.recv()).await.unwrap().unwrap();
        assert!(head.starts_with("POST /in/keybrake HTTP/1.1\r\n"), "{head}");
        for told in
            ["authorization: bearer any", "content-encoding: gzip", "content-type: application/x-ndjson"]
        {
            assert!(head.to_lowercase().contains(told), "{head}");
        }
        flate2::read::GzDecoder::new(body.as_slice()).read_to_string(&mut lines).unwrap();
    }
    let export = dir.path().join("export.ndjson");
    std::fs::write(&export, &lines).unwrap();
    let (code, told, _) = run(&BTreeMap::new(), &["audit", "verify", "--file", export.to_str().unwrap()]);
    assert_eq!(code, 0, "{told}");
    assert!(told.contains(&format!("{} records", own.len())), "{told}");
    let refused = sidecar.admin("GET", "/audit?fleet=true", None).await;
    assert_eq!(refused.verdict(), (400, "parameter_invalid"), "{}", refused.text);
}
