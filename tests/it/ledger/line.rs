//! The wire between a sidecar and its database, which breaks where it is told to.

use std::io::{self, BufReader, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Where the wire breaks, on a connection that writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    /// Right before a COMMIT reaches the server.
    BeforeCommit,
    /// When a COMMIT is done, before its answer is told.
    AfterCommit,
    /// So many messages from now.
    AtMessage(usize),
}

/// What is to come.
#[derive(Debug)]
struct Plan {
    server: String,
    /// With whether nobody gets through any more after it.
    cut: Mutex<Option<(Cut, bool)>>,
    is_down: AtomicBool,
    ends: AtomicBool,
}

/// What becomes of a message.
enum Fate {
    Passes,
    /// It passes, and nothing that is said to it.
    Unanswered,
    Cut,
}

impl Plan {
    fn fate(&self, is_commit: bool) -> Fate {
        let mut planned = self.cut.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((cut, then_down)) = *planned else { return Fate::Passes };
        let fate = match cut {
            Cut::BeforeCommit if is_commit => Fate::Cut,
            Cut::AfterCommit if is_commit => Fate::Unanswered,
            Cut::BeforeCommit | Cut::AfterCommit => return Fate::Passes,
            Cut::AtMessage(0) => Fate::Cut,
            Cut::AtMessage(left) => {
                *planned = Some((Cut::AtMessage(left - 1), then_down));
                return Fate::Passes;
            }
        };
        *planned = None;
        self.is_down.fetch_or(then_down, Ordering::SeqCst);
        fate
    }
}

/// A wire to a server.
#[derive(Debug)]
pub(super) struct Line {
    at: SocketAddr,
    plan: Arc<Plan>,
}

impl Line {
    /// One to the server of a URL; with the URL by which it is used.
    pub(super) fn to(url: &str) -> (Self, String) {
        let (credentials, rest) = url.rsplit_once('@').unwrap();
        let (server, database) = rest.split_once('/').unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let (cut, is_down, ends) = (Mutex::default(), AtomicBool::new(false), AtomicBool::new(false));
        let plan = Arc::new(Plan { server: server.to_owned(), cut, is_down, ends });
        let of_line = Arc::clone(&plan);
        std::thread::spawn(move || accept(&listener, &of_line));
        // What is encrypted could not be cut at a COMMIT.
        (Self { at, plan }, format!("{credentials}@{at}/{database}?sslmode=disable"))
    }

    /// Breaks once, and lets nobody through after it where `then_down`.
    pub(super) fn breaks(&self, cut: Cut, then_down: bool) {
        *self.plan.cut.lock().unwrap() = Some((cut, then_down));
    }

    /// Does not break any more, unless it did.
    pub(super) fn keeps(&self) {
        *self.plan.cut.lock().unwrap() = None;
    }

    /// Lets everybody through.
    pub(super) fn mend(&self) {
        self.keeps();
        self.plan.is_down.store(false, Ordering::SeqCst);
    }

    pub(super) fn is_down(&self) -> bool {
        self.plan.is_down.load(Ordering::SeqCst)
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.plan.ends.store(true, Ordering::SeqCst);
        drop(TcpStream::connect(self.at));
    }
}

fn accept(listener: &TcpListener, plan: &Arc<Plan>) {
    for client in listener.incoming() {
        if plan.ends.load(Ordering::SeqCst) {
            return;
        }
        let Ok(client) = client else { continue };
        if plan.is_down.load(Ordering::SeqCst) {
            continue;
        }
        let Ok(server) = TcpStream::connect(&plan.server) else { continue };
        let is_unanswered = Arc::new(AtomicBool::new(false));
        for stream in [&client, &server] {
            stream.set_nodelay(true).unwrap();
        }
        let (from, to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
        let (plan, told) = (Arc::clone(plan), Arc::clone(&is_unanswered));
        std::thread::spawn(move || {
            let _ = ask(&plan, &client, &server, &is_unanswered);
            if !is_unanswered.load(Ordering::SeqCst) {
                end(&client, &server);
            }
        });
        std::thread::spawn(move || {
            let _ = answer(&from, &to, &told);
            end(&to, &from);
        });
    }
}

fn end(one: &TcpStream, other: &TcpStream) {
    for stream in [one, other] {
        let _ = stream.shutdown(Shutdown::Both);
    }
}

/// Carries messages to the server, until one is cut.
fn ask(
    plan: &Plan,
    client: &TcpStream,
    mut server: &TcpStream,
    is_unanswered: &AtomicBool,
) -> io::Result<()> {
    let mut client = BufReader::new(client);
    let (mut is_first, mut writes) = (true, false);
    loop {
        // All but the first have a byte before their length, which says what they are.
        let mut message = vec![0; if is_first { 4 } else { 5 }];
        client.read_exact(&mut message)?;
        let rest = u32::from_be_bytes(*message.last_chunk().unwrap()) - 4;
        let head = message.len();
        message.resize(head + usize::try_from(rest).unwrap(), 0);
        client.read_exact(&mut message[head..])?;
        let is_query = |text: &[u8]| !is_first && message[0] == b'Q' && message[head..].starts_with(text);
        writes |= is_query(b"BEGIN") || is_query(b"START TRANSACTION");
        let fate = if writes { plan.fate(is_query(b"COMMIT")) } else { Fate::Passes };
        match fate {
            Fate::Passes => {}
            Fate::Unanswered => is_unanswered.store(true, Ordering::SeqCst),
            Fate::Cut => return Ok(()),
        }
        server.write_all(&message)?;
        is_first = false;
    }
}

/// Carries what the server says, until it is said that a transaction is over of which nobody is to know.
fn answer(mut server: &TcpStream, mut client: &TcpStream, is_unanswered: &AtomicBool) -> io::Result<()> {
    let (mut bytes, mut untold) = (vec![0; 16_384], Vec::new());
    loop {
        let length = server.read(&mut bytes)?;
        if length == 0 {
            return Ok(());
        }
        if !is_unanswered.load(Ordering::SeqCst) {
            client.write_all(&bytes[..length])?;
            continue;
        }
        untold.extend_from_slice(&bytes[..length]);
        if [b"COMMIT\0".as_slice(), b"ROLLBACK\0"]
            .iter()
            .any(|tag| untold.windows(tag.len()).any(|part| part == *tag))
        {
            return Ok(());
        }
    }
}
