//! A TCP proxy between a sidecar and its database, which cuts, delays, and loses what the test says. It reads the wire far
//! enough to know a COMMIT.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::time::sleep;

use crate::support::free_port;

/// What becomes of a COMMIT.
#[derive(Clone, Copy, Debug)]
pub(crate) enum AtCommit {
    /// It is passed on and holds; its answer is lost, and the connection with it.
    LoseAnswer,
    /// It is lost, and the connection with it.
    LoseCommit,
    /// It is lost, and the server still has the connection: the transaction stays open until the server ends it.
    LeaveOpen,
}

#[derive(Default)]
struct State {
    /// Nobody is let in.
    down: AtomicBool,
    connections: AtomicU64,
    /// Connections of lower numbers hang: what comes is kept back, and nobody is told.
    hangs_below: AtomicU64,
    delay_ms: AtomicU64,
    /// What becomes of the next ones that commit, and whether nobody is let in afterwards.
    commits: Mutex<VecDeque<(AtCommit, bool)>>,
    cut: Notify,
    lost: AtomicU64,
    /// Whether the server spoke last, and how often a client has spoken after that.
    is_answered: AtomicBool,
    turns: AtomicU64,
}

pub(crate) struct Proxy {
    addr: SocketAddr,
    state: Arc<State>,
}

impl Proxy {
    /// Before the server of this URL.
    pub(crate) async fn before(url: &str) -> Self {
        let server: SocketAddr =
            url.rsplit_once('@').unwrap().1.split('/').next().unwrap().parse().expect("an address");
        let listener = TcpListener::bind(("127.0.0.1", free_port())).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let state = Arc::new(State::default());
        let known = Arc::clone(&state);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if known.down.load(Ordering::SeqCst) {
                    continue;
                }
                let state = Arc::clone(&known);
                let number = state.connections.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(async move {
                    let cut = state.cut.notified();
                    tokio::select! {
                        passed = pass(client, server, &state, number) => drop(passed),
                        () = cut => {}
                    }
                });
            }
        });
        Self { addr, state }
    }

    /// The server's URL by this way.
    pub(crate) fn url(&self, of_server: &str) -> String {
        let (credentials, rest) = of_server.rsplit_once('@').unwrap();
        format!("{credentials}@{}/{}", self.addr, rest.split_once('/').unwrap().1)
    }

    pub(crate) fn cut(&self) {
        self.state.cut.notify_waiters();
    }

    /// Cuts everything and lets nobody in, or lets them in again.
    pub(crate) fn set_down(&self, down: bool) {
        self.state.down.store(down, Ordering::SeqCst);
        if down {
            self.cut();
        }
    }

    /// Keeps everything back and tells nobody.
    pub(crate) fn hang(&self) {
        self.state.hangs_below.store(u64::MAX, Ordering::SeqCst);
    }

    /// Lets new connections through. Those that hang do so for ever.
    pub(crate) fn let_new_ones_through(&self) {
        self.state.hangs_below.store(self.state.connections.load(Ordering::SeqCst), Ordering::SeqCst);
    }

    pub(crate) fn delay(&self, delay: Duration) {
        self.state.delay_ms.store(u64::try_from(delay.as_millis()).unwrap(), Ordering::SeqCst);
    }

    /// What becomes of the next COMMIT.
    pub(crate) fn at_commit(&self, what: AtCommit) {
        self.state.commits.lock().unwrap().push_back((what, false));
    }

    /// The same, and nobody is let in afterwards.
    pub(crate) fn at_commit_then_down(&self, what: AtCommit) {
        self.state.commits.lock().unwrap().push_back((what, true));
    }

    /// How many COMMITs or their answers were lost.
    pub(crate) fn lost(&self) -> u64 {
        self.state.lost.load(Ordering::SeqCst)
    }

    /// How many round trips there were, of all connections.
    pub(crate) fn turns(&self) -> u64 {
        self.state.turns.load(Ordering::SeqCst)
    }

    pub(crate) async fn has_lost(&self, count: u64) {
        while self.lost() < count {
            sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) fn forget_commits(&self) {
        self.state.commits.lock().unwrap().clear();
    }
}

impl State {
    /// What becomes of this COMMIT. Whoever forgets the next ones finds what this one does done.
    fn next_commit(&self) -> Option<AtCommit> {
        let mut commits = self.commits.lock().unwrap();
        let (what, then_down) = commits.pop_front()?;
        if then_down {
            self.down.store(true, Ordering::SeqCst);
        }
        Some(what)
    }
}

async fn pass(client: TcpStream, server: SocketAddr, state: &Arc<State>, number: u64) -> io::Result<()> {
    let server = TcpStream::connect(server).await?;
    for stream in [&client, &server] {
        stream.set_nodelay(true)?;
    }
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    // Whether answers are thrown away.
    let mute = Arc::new(AtomicBool::new(false));
    tokio::select! {
        passed = questions(from_client, to_server, state, &mute, number) => passed,
        passed = answers(from_server, to_client, state, &mute, number) => passed,
    }
}

async fn wait(state: &State, number: u64) {
    let delay = state.delay_ms.load(Ordering::SeqCst);
    if delay > 0 {
        sleep(Duration::from_millis(delay)).await;
    }
    while number < state.hangs_below.load(Ordering::SeqCst) {
        sleep(Duration::from_millis(10)).await;
    }
}

async fn answers(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    state: &State,
    mute: &AtomicBool,
    number: u64,
) -> io::Result<()> {
    let mut bytes = vec![0; 65_536];
    loop {
        let read = from.read(&mut bytes).await?;
        if read == 0 {
            return Ok(());
        }
        wait(state, number).await;
        state.is_answered.store(true, Ordering::SeqCst);
        if mute.load(Ordering::SeqCst) {
            // `CommandComplete` of the COMMIT: it holds.
            if bytes[..read].windows(7).any(|window| window == b"COMMIT\0") {
                state.lost.fetch_add(1, Ordering::SeqCst);
                return Ok(());
            }
            continue;
        }
        to.write_all(&bytes[..read]).await?;
    }
}

async fn questions(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    state: &Arc<State>,
    mute: &AtomicBool,
    number: u64,
) -> io::Result<()> {
    let (mut kept, mut bytes) = (Vec::new(), vec![0; 65_536]);
    let mut has_begun = false;
    loop {
        let read = from.read(&mut bytes).await?;
        if read == 0 {
            return Ok(());
        }
        kept.extend_from_slice(&bytes[..read]);
        if state.is_answered.swap(false, Ordering::SeqCst) {
            state.turns.fetch_add(1, Ordering::SeqCst);
        }
        wait(state, number).await;
        // Whole messages, up to a COMMIT.
        let mut at = 0;
        while let Some(message) = message(&kept[at..], has_begun) {
            if message == b"Q\0\0\0\x0bCOMMIT\0" {
                let next = state.next_commit();
                if let Some(what) = next {
                    to.write_all(&kept[..at]).await?;
                    return at_commit(what, to, state, mute).await;
                }
            }
            has_begun = true;
            at += message.len();
        }
        to.write_all(&kept[..at]).await?;
        kept.drain(..at);
    }
}

async fn at_commit(
    what: AtCommit,
    mut to: OwnedWriteHalf,
    state: &Arc<State>,
    mute: &AtomicBool,
) -> io::Result<()> {
    match what {
        AtCommit::LoseAnswer => {
            mute.store(true, Ordering::SeqCst);
            to.write_all(b"Q\0\0\0\x0bCOMMIT\0").await?;
            // Until the answer has come, or the server has gone.
            sleep(Duration::from_secs(20)).await;
        }
        AtCommit::LoseCommit => drop(state.lost.fetch_add(1, Ordering::SeqCst)),
        AtCommit::LeaveOpen => {
            state.lost.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(async move {
                sleep(Duration::from_mins(1)).await;
                drop(to);
            });
        }
    }
    Ok(())
}

/// The first whole message; the first of all has no letter.
fn message(bytes: &[u8], has_begun: bool) -> Option<&[u8]> {
    let letter = usize::from(has_begun);
    let len = bytes.get(letter..)?.first_chunk::<4>()?;
    bytes.get(..letter + usize::try_from(u32::from_be_bytes(*len)).unwrap())
}
