//! A collector under the load of a fleet: `KEYBRAKE_BENCH_NODES` (100) nodes send a batch of 20 records each second, for
//! `KEYBRAKE_BENCH_SECONDS` (20), from this machine's own cores; with `KEYBRAKE_BENCH_POSTGRES_URL` one that keeps its
//! records there, in a schema that is left behind. Told are the latency of a batch and what a question costs meanwhile.
#![expect(clippy::disallowed_methods, reason = "a benchmark asks the machine's clock")]
#![expect(clippy::unwrap_used, reason = "a benchmark that cannot measure stops")]
#![expect(clippy::print_stdout, reason = "what it measures is told on standard output")]

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use keybrake::audit::{Decision, Entry, Event, FIRST_PREV_HASH, Place, RecordedOutcome, seal};
use keybrake::id::CallId;
use keybrake::time::UnixMs;
use serde_json::Value;

const RECORDS: u64 = 20;
const QUERY_KEY: &str = "query-key-of-the-bench-0123456789abcdef";
const START_MS: u64 = 1_784_000_000_000;

fn knob(name: &str, usual: u64) -> u64 {
    std::env::var(name).map_or(usual, |text| text.parse().unwrap())
}

fn token(node: u64) -> String {
    format!("token-of-node-{node:04}-0123456789abcdef0123456789abcdef")
}

struct Node {
    number: u64,
    seq: u64,
    head: [u8; 32],
}

impl Node {
    /// The next records of this node's chain, as lines.
    fn batch(&mut self) -> Vec<u8> {
        let (chain, name) = (format!("ledger_{:032x}", self.number), format!("node-{:04}", self.number));
        let mut lines = Vec::new();
        for _ in 0..RECORDS {
            self.seq += 1;
            let call = self.seq.div_ceil(2);
            let is_first = self.seq % 2 == 1;
            let entry = Entry {
                at: UnixMs::from_millis(START_MS + self.seq * 50).to_string(),
                event: if is_first { Event::Admitted } else { Event::Settled },
                call_id: Some(
                    CallId::new(UnixMs::from_millis(call), [u8::try_from(self.number % 251).unwrap(); 10])
                        .to_string(),
                ),
                label: Some(format!("kestra-billing-{}", call % 500)),
                endpoint: Some("/v1/charges".to_owned()),
                decision: Some(Decision::Forwarded),
                outcome: Some(if is_first { RecordedOutcome::Held } else { RecordedOutcome::Spent }),
                amount: Some(2_999),
                currency: Some("usd".to_owned()),
                idempotency_key: Some(format!("order-{}-{call}", self.number)),
                customer: Some(format!("cus_{}_{}", self.number, call % 200)),
                object_id: (!is_first).then(|| format!("ch_{:012x}{call:012x}", self.number)),
                ..Entry::default()
            };
            let place = Place {
                seq: self.seq,
                ledger_id: &chain,
                node: &name,
                chain_id: &chain,
                prev_hash: self.head,
            };
            let sealed = seal(&place, &entry);
            self.head = sealed.hash;
            lines.extend(sealed.to_line());
            lines.push(b'\n');
        }
        lines
    }
}

fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    sorted
        .get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1)))
        .copied()
        .unwrap_or_default()
}

/// What one question takes, once a second.
async fn questions(http: &reqwest::Client, base: &str, began: Instant, seconds: u64) -> Vec<Duration> {
    let mut questions = Vec::new();
    for second in 1..seconds {
        tokio::time::sleep_until((began + Duration::from_secs(second)).into()).await;
        let asked = Instant::now();
        let url = format!("{base}/audit?customer=cus_7_3&outcome=spent");
        let answer = http.get(url).bearer_auth(QUERY_KEY).send().await.unwrap();
        let body: Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap();
        assert!(body["data"].is_array(), "{body}");
        questions.push(asked.elapsed());
    }
    questions
}

#[tokio::main]
async fn main() {
    let (nodes, seconds) = (knob("KEYBRAKE_BENCH_NODES", 100), knob("KEYBRAKE_BENCH_SECONDS", 20));
    let dir = tempfile::tempdir().unwrap();
    let tokens: Vec<String> = (0..nodes).map(|node| format!("node-{node:04} {}", token(node))).collect();
    std::fs::write(dir.path().join("tokens"), tokens.join("\n")).unwrap();
    let port = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (listen, ops) = (port().to_string(), port().to_string());
    let mut collector = Command::new(env!("CARGO_BIN_EXE_keybrake"));
    collector
        .arg("collect")
        .env_clear()
        .env("KEYBRAKE_COLLECT_LISTEN", &listen)
        .env("KEYBRAKE_COLLECT_OPS_LISTEN", &ops)
        .env("KEYBRAKE_COLLECT_DATA_DIR", dir.path().join("data"))
        .env("KEYBRAKE_COLLECT_TOKENS_FILE", dir.path().join("tokens"))
        .env("KEYBRAKE_COLLECT_QUERY_KEY", QUERY_KEY)
        .env("KEYBRAKE_TLS", "off")
        .env("KEYBRAKE_LOG", "warn")
        .stdout(Stdio::null());
    if let Ok(url) = std::env::var("KEYBRAKE_BENCH_POSTGRES_URL") {
        collector.env("KEYBRAKE_COLLECT_DATABASE_URL", url);
        collector.env("KEYBRAKE_COLLECT_DATABASE_SCHEMA", format!("bench_{}", std::process::id()));
    }
    let mut collector = collector.spawn().unwrap();
    let _ = rustls::crypto::ring::default_provider().install_default();
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let base = format!("http://{listen}");
    while http.get(format!("http://{ops}/readyz")).send().await.is_err() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let began = Instant::now();
    let mut tasks = Vec::new();
    for number in 0..nodes {
        let (http, url) = (http.clone(), format!("{base}/collect/v1/batches"));
        tasks.push(tokio::spawn(async move {
            let mut node = Node { number, seq: 0, head: FIRST_PREV_HASH };
            let mut took = Vec::new();
            // Spread over the second, as a fleet is.
            let offset = Duration::from_millis(number * 1_000 / nodes);
            for second in 0..seconds {
                tokio::time::sleep_until((began + offset + Duration::from_secs(second)).into()).await;
                let body = node.batch();
                let sent = Instant::now();
                let answer = http.post(&url).bearer_auth(token(number)).body(body).send().await.unwrap();
                assert_eq!(answer.status(), 200, "{}", answer.text().await.unwrap());
                took.push(sent.elapsed());
            }
            took
        }));
    }
    let mut questions = questions(&http, &base, began, seconds).await;
    let mut took = Vec::new();
    for task in tasks {
        took.extend(task.await.unwrap());
    }
    let lasted = began.elapsed();
    took.sort();
    questions.sort();
    let records = nodes * seconds * RECORDS;
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", collector.id())).unwrap_or_default();
    let ticks: u64 = stat.split(' ').skip(13).take(2).filter_map(|ticks| ticks.parse::<u64>().ok()).sum();
    println!("{records} records of {nodes} nodes in {:.1} s", lasted.as_secs_f64());
    println!(
        "batch    p50 {:?}  p99 {:?}  max {:?}",
        percentile(&took, 50),
        percentile(&took, 99),
        percentile(&took, 100)
    );
    println!("question p50 {:?}  max {:?}", percentile(&questions, 50), percentile(&questions, 100));
    println!("collector CPU {} ms of {} ms", ticks * 10, lasted.as_millis());
    collector.kill().unwrap();
    collector.wait().unwrap();
}
