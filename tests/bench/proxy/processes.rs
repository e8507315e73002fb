//! Who is measured: real processes on loopback, ended by their process ids.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use tokio_rustls::TlsConnector;

use crate::certificates::Files;
use crate::load::Target;

const PATIENCE: Duration = Duration::from_mins(1);
const LOOK_EVERY: Duration = Duration::from_millis(10);
const ADMIN_KEY: &str = "admin-key-of-the-bench-0123456789abcdef";
const STRIPE_KEY: &str = "sk_test_bench000000000000000001";
/// A vault key takes 10,000 requests a second at most, and a read is faster than that.
const VAULT_KEYS: usize = 16;
/// What the kernel counts a process's time in, per second.
const TICKS_PER_SECOND: u64 = 100;

/// A child that ends with this value: asked first, so that nginx takes its workers along.
pub(crate) struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// What it prints goes to a file in `dir`.
    pub(crate) fn start(command: &mut Command, dir: &Path, name: &str) -> Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let file = fs::File::create(&log)?;
        let child = command.stdout(file.try_clone()?).stderr(file).spawn();
        Ok(Self { child: child.with_context(|| format!("starting {name}"))?, log })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until somebody answers there.
    pub(crate) fn listens(&mut self, addr: SocketAddr) -> Result<()> {
        let since = Instant::now();
        while TcpStream::connect(addr).is_err() {
            self.still_runs()?;
            ensure!(since.elapsed() < PATIENCE, "nobody listens on {addr}:\n{}", self.told());
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }

    /// Waits until `/readyz` there says so.
    fn ready(&mut self, ops: SocketAddr) -> Result<()> {
        let since = Instant::now();
        while !is_ready(ops) {
            self.still_runs()?;
            ensure!(since.elapsed() < PATIENCE, "it is not ready:\n{}", self.told());
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }

    pub(crate) fn still_runs(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("ended with {status}:\n{}", self.told());
        }
        Ok(())
    }

    fn told(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Asks it to stop, and waits for that.
    pub(crate) fn stop(&mut self, signal: &str) -> Result<()> {
        if self.child.try_wait()?.is_some() {
            return Ok(());
        }
        let sent = Command::new("kill").arg(format!("-{signal}")).arg(self.pid().to_string()).status()?;
        ensure!(sent.success(), "no signal could be sent");
        let since = Instant::now();
        while self.child.try_wait()?.is_none() {
            ensure!(since.elapsed() < PATIENCE, "it does not end:\n{}", self.told());
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.stop("TERM").is_err() {
            // It may have ended meanwhile.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A target with its process.
pub(crate) struct Measured {
    pub(crate) name: &'static str,
    pub(crate) target: Target,
    pub(crate) process: Option<Process>,
}

impl Measured {
    /// The process and all that it has started.
    pub(crate) fn pids(&self) -> Vec<u32> {
        let mut found: Vec<u32> = self.process.iter().map(Process::pid).collect();
        let mut at = 0;
        while let Some(pid) = found.get(at) {
            found.extend(children(*pid));
            at += 1;
        }
        found
    }

    /// The time on a processor since it was started, of all threads.
    pub(crate) fn cpu(&self) -> Duration {
        let ticks: u64 = self.pids().into_iter().map(ticks).sum();
        Duration::from_millis(ticks * 1_000 / TICKS_PER_SECOND)
    }

    /// Resident memory.
    pub(crate) fn bytes(&self) -> u64 {
        self.pids().into_iter().map(resident).sum()
    }
}

fn is_ready(ops: SocketAddr) -> bool {
    let ask = || {
        let mut stream = TcpStream::connect(ops)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET /readyz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok::<_, std::io::Error>(answer)
    };
    ask().is_ok_and(|answer| answer.starts_with("HTTP/1.1 200 "))
}

fn children(pid: u32) -> Vec<u32> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect()
}

/// User and system time: the fourteenth and fifteenth field, counted behind the name, which may hold anything.
fn ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit_once(')').map(|(_, rest)| rest).unwrap_or_default();
    fields.split_whitespace().skip(11).take(2).filter_map(|ticks| ticks.parse::<u64>().ok()).sum()
}

fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or_default() * 1_024
}

/// An address of this machine that nobody listens on.
pub(crate) fn free_addr() -> Result<SocketAddr> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

/// The first of these programs that is there: on the PATH, or where Debian puts what only root runs.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    folders.extend(["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from));
    folders.into_iter().map(|folder| folder.join(name)).find(|path| path.is_file())
}

/// What all of them share.
pub(crate) struct Place<'a> {
    pub(crate) dir: &'a Path,
    pub(crate) files: &'a Files,
    pub(crate) tls: TlsConnector,
    /// The stub's plain address.
    pub(crate) upstream: SocketAddr,
}

impl Place<'_> {
    /// A target behind TLS that takes any bearer.
    pub(crate) fn target(&self, addr: SocketAddr) -> Target {
        let bearers = Arc::new(vec![STRIPE_KEY.to_owned()]);
        Target { addr, tls: Some(self.tls.clone()), bearers }
    }

    /// nginx as it is set up for this: connections to the upstream are kept, and nothing is logged. `None` where there
    /// is none.
    pub(crate) fn nginx(&self) -> Result<Option<Measured>> {
        let Some(nginx) = program("nginx") else { return Ok(None) };
        let addr = free_addr()?;
        let (dir, upstream) = (self.dir.display(), self.upstream);
        let (cert, key) = (self.files.cert.display(), self.files.key.display());
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|name| format!("  {name}_temp_path {dir}/nginx-{name};\n"))
            .concat();
        let settings = format!(
            "daemon off;\nworker_processes auto;\npid {dir}/nginx.pid;\nerror_log stderr warn;\n\
             events {{ worker_connections 1024; }}\nhttp {{\n  access_log off;\n{temporary}  \
             keepalive_requests 1000000000;\n  upstream stub {{\n    server {upstream};\n    keepalive 64;\n    \
             keepalive_requests 1000000000;\n  }}\n  server {{\n    listen {addr} ssl;\n    \
             ssl_certificate {cert};\n    ssl_certificate_key {key};\n    ssl_protocols TLSv1.2 TLSv1.3;\n    \
             location / {{\n      proxy_pass http://stub;\n      proxy_http_version 1.1;\n      \
             proxy_set_header Connection \"\";\n    }}\n  }}\n}}\n"
        );
        let file = self.dir.join("nginx.conf");
        fs::write(&file, settings)?;
        let mut command = Command::new(nginx);
        command.arg("-p").arg(self.dir).args(["-e", "stderr", "-c"]).arg(&file).stdin(Stdio::null());
        let mut process = Process::start(&mut command, self.dir, "nginx")?;
        process.listens(addr)?;
        Ok(Some(Measured { name: "nginx", target: self.target(addr), process: Some(process) }))
    }

    /// The sidecar, with a ledger on the disk and its own settings but for where everything is.
    pub(crate) async fn sidecar(&self) -> Result<Measured> {
        let settings = [
            ("TLS", "files".into()),
            ("TLS_CERT_FILE", self.files.cert.clone()),
            ("TLS_KEY_FILE", self.files.key.clone()),
        ];
        let program = Command::new(env!("CARGO_BIN_EXE_keybrake"));
        let (process, addr) = self.serve(program, "keybrake", &settings)?;
        let connector = Some(self.tls.clone());
        let bearers = Arc::new(self.vault_keys(&format!("https://localhost:{}", addr.port())).await?);
        let target = Target { addr, tls: connector, bearers };
        Ok(Measured { name: "keybrake", target, process: Some(process) })
    }

    /// The sidecar's process, by a command that runs the program, and where it listens; returns when it is ready.
    pub(crate) fn serve(
        &self,
        mut command: Command,
        name: &str,
        settings: &[(&str, PathBuf)],
    ) -> Result<(Process, SocketAddr)> {
        let (addr, ops) = (free_addr()?, free_addr()?);
        command.arg("serve").env_clear().stdin(Stdio::null());
        for (name, value) in settings {
            command.env(format!("KEYBRAKE_{name}"), value);
        }
        command
            .env("KEYBRAKE_LISTEN", addr.to_string())
            .env("KEYBRAKE_OPS_LISTEN", ops.to_string())
            .env("KEYBRAKE_DATA_DIR", self.dir.join(name))
            .env("KEYBRAKE_ADMIN_KEY", ADMIN_KEY)
            .env("KEYBRAKE_STRIPE_SECRET_KEY", STRIPE_KEY)
            .env("KEYBRAKE_STRIPE_API_BASE", format!("http://{}", self.upstream))
            .env("KEYBRAKE_NODE", "node-of-the-bench");
        let mut process = Process::start(&mut command, self.dir, name)?;
        process.listens(addr)?;
        process.ready(ops)?;
        Ok((process, addr))
    }

    /// Mints the keys that the load is made with.
    pub(crate) async fn vault_keys(&self, base: &str) -> Result<Vec<String>> {
        let authority = reqwest::Certificate::from_pem(&fs::read(&self.files.ca)?)?;
        let http = reqwest::Client::builder().no_proxy().tls_certs_only([authority]).build()?;
        let mut keys = Vec::new();
        for number in 0..VAULT_KEYS {
            let policy = json!({
                "label": format!("bench-{number}"),
                "vendor": "stripe",
                "allowed_endpoints": ["POST /v1/charges", "GET /v1/charges/{id}"],
                "daily_usd_cap": "900000000.00",
                "expires_in_seconds": 86_400,
                "requests_per_second": 10_000,
                "idempotency": "required",
            });
            let request = http.post(format!("{base}/admin/vault_keys")).bearer_auth(ADMIN_KEY);
            let answer = request.json(&policy).send().await?;
            let (status, text) = (answer.status(), answer.text().await?);
            ensure!(status == 201, "no vault key: {status} {text}");
            let body: Value = serde_json::from_str(&text)?;
            keys.push(body["vault_key"].as_str().context("no vault key")?.to_owned());
        }
        Ok(keys)
    }

    /// The proxy that one would write in Python.
    pub(crate) fn peer(&self) -> Result<Measured> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bench/peers");
        let setup = Command::new("python3").arg(folder.join("setup.py")).stderr(Stdio::inherit()).output()?;
        ensure!(setup.status.success(), "the peer cannot be installed");
        let python = String::from_utf8(setup.stdout)?;
        let addr = free_addr()?;
        let mut command = Command::new(python.trim());
        command.args(["-m", "uvicorn", "--app-dir"]).arg(&folder).arg("fastapi_proxy:app");
        command.args(["--host", "127.0.0.1", "--port", &addr.port().to_string(), "--no-access-log"]);
        command.arg("--ssl-certfile").arg(&self.files.cert).arg("--ssl-keyfile").arg(&self.files.key);
        command.env("UPSTREAM", format!("http://{}", self.upstream));
        command.env("DATABASE", self.dir.join("peer.sqlite")).env("STRIPE_KEY", STRIPE_KEY);
        let mut process = Process::start(command.stdin(Stdio::null()), self.dir, "fastapi")?;
        process.listens(addr)?;
        Ok(Measured { name: "fastapi", target: self.target(addr), process: Some(process) })
    }
}
