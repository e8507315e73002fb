//! The PostgreSQL that is measured.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use keybrake::postgres::Target;
use keybrake::tls;

const USER: &str = "keybrake";
const PATIENCE: Duration = Duration::from_mins(1);
/// On a disk wherever the system is set up as usual, and short enough for the path of a socket.
const PLACE: &str = "/var/tmp";

/// Runs a server, and ends it and its directory with whoever holds the other end of its standard input.
const KEEPER: &str = r#"
dir=$1; shift
"$@" >>"$dir/log" 2>&1 </dev/null & server=$!
read -r word
kill -QUIT "$server"
wait "$server"
rm -rf "$dir"
"#;

pub(crate) struct Server {
    url: String,
    _own: Option<Own>,
}

/// One that this bench started.
struct Own {
    keeper: Child,
    word: Option<ChildStdin>,
}

impl Drop for Own {
    fn drop(&mut self) {
        drop(self.word.take());
        let _ = self.keeper.wait();
    }
}

impl Server {
    /// The one that was named, or one of this bench's own; `None` where there is none.
    pub(crate) fn find() -> Result<Option<Self>> {
        if let Some(url) = std::env::var_os("KEYBRAKE_BENCH_POSTGRES_URL").filter(|url| !url.is_empty()) {
            let url = url.into_string().ok().context("KEYBRAKE_BENCH_POSTGRES_URL is no text")?;
            return Ok(Some(Self { url, _own: None }));
        }
        binaries().map(|bin| Self::start(&bin)).transpose()
    }

    /// A schema of this run's own.
    pub(crate) fn target(&self) -> Result<Target> {
        let schema = format!("bench_fleet_{}", std::process::id());
        Ok(Target::parse(&self.url, None, &schema, tls::client_config(None)?)?)
    }

    fn start(bin: &Path) -> Result<Self> {
        let made = tempfile::Builder::new().prefix("keybrake-fleet-").tempdir_in(PLACE)?;
        let dir = made.path().to_owned();
        let user = other_user()?;
        if let Some((uid, gid)) = user {
            chown(&dir, Some(uid), Some(gid))?;
        }
        let command = |program: &Path| {
            let mut command = Command::new(program);
            command.current_dir(&dir).stdin(Stdio::null()).process_group(0);
            if let Some((uid, gid)) = user {
                command.uid(uid).gid(gid);
            }
            command
        };
        let mut initdb = command(&bin.join("initdb"));
        // Only its own user reaches the socket, whose directory is closed to others.
        initdb.args(["--pgdata", "data", "--username", USER, "--auth", "trust"]);
        let initialised = initdb.args(["--locale", "C", "--encoding", "UTF8"]).output()?;
        ensure!(initialised.status.success(), "initdb: {}", String::from_utf8_lossy(&initialised.stderr));
        let place = dir.display().to_string();
        let mut keeper = command(Path::new("sh"));
        keeper.args(["-c", KEEPER, "keeper", &place]).arg(bin.join("postgres")).args(["-D", "data"]);
        for setting in [
            &format!("unix_socket_directories={place}"),
            "listen_addresses=",
            "max_connections=200",
            "fsync=on",
            "synchronous_commit=on",
        ] {
            keeper.arg("-c").arg(setting);
        }
        let mut keeper = keeper.stdin(Stdio::piped()).spawn()?;
        let own = Own { word: keeper.stdin.take(), keeper };
        // The keeper removes it.
        let dir = made.keep();
        let since = Instant::now();
        // Its eighth line says how it is.
        while !fs::read_to_string(dir.join("data/postmaster.pid"))
            .is_ok_and(|lines| lines.lines().nth(7).is_some_and(|state| state.trim() == "ready"))
        {
            let log = || fs::read_to_string(dir.join("log")).unwrap_or_default();
            ensure!(since.elapsed() < PATIENCE, "PostgreSQL does not start:\n{}", log());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Self { url: format!("postgres://{USER}@/postgres?host={place}"), _own: Some(own) })
    }
}

/// Where `postgres` and `initdb` stand side by side, the newest first where the system keeps several.
fn binaries() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let version = |folder: &PathBuf| -> u32 {
        folder.file_name().and_then(|name| name.to_str()?.split('.').next()?.parse().ok()).unwrap_or(0)
    };
    let mut versions: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    versions.sort_by_key(|folder| std::cmp::Reverse(version(folder)));
    folders.extend(versions.into_iter().map(|folder| folder.join("bin")));
    folders.into_iter().find(|folder| ["postgres", "initdb"].iter().all(|name| folder.join(name).is_file()))
}

/// PostgreSQL does not run as root.
fn other_user() -> Result<Option<(u32, u32)>> {
    if fs::metadata("/proc/self")?.uid() != 0 {
        return Ok(None);
    }
    let users = fs::read_to_string("/etc/passwd")?;
    let ids = |name: &str| {
        let mut fields = users.lines().find(|line| line.split(':').next() == Some(name))?.split(':').skip(2);
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    };
    let found = ids("postgres").or_else(|| ids("nobody"));
    Ok(Some(found.context("root, and no other user to run PostgreSQL as")?))
}
