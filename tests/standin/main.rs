//! The Stripe stand-in as a program, for tests and demos that run in another process.

#[path = "standin.rs"]
mod standin;

use std::io;
use std::net::SocketAddr;

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

use standin::{Options, Standin};

/// Plays Stripe on loopback until SIGTERM or SIGINT. Prints one line: {"listening":"127.0.0.1:PORT"}.
#[derive(Parser)]
#[command(name = "stripe-standin")]
struct Arguments {
    /// A loopback address; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// An accepted secret key; may be given several times.
    #[arg(long = "secret-key", value_name = "KEY")]
    secret_keys: Vec<String>,
    /// The account that the keys belong to.
    #[arg(long, default_value_t = Options::default().account)]
    account: String,
    /// An account that Stripe-Account may name; may be given several times.
    #[arg(long, value_name = "ACCOUNT")]
    connected: Vec<String>,
    /// Milliseconds of waiting before each execution.
    #[arg(long, default_value_t = 0)]
    latency_ms: u64,
    /// Objects say livemode: true.
    #[arg(long)]
    livemode: bool,
    /// The keys may not read the account.
    #[arg(long)]
    restricted: bool,
}

fn main() -> io::Result<()> {
    let arguments = Arguments::parse();
    let mut options = Options {
        listen: arguments.listen,
        account: arguments.account,
        livemode: arguments.livemode,
        restricted: arguments.restricted,
        connected: arguments.connected,
        latency_ms: arguments.latency_ms,
        ..Options::default()
    };
    if !arguments.secret_keys.is_empty() {
        options.secret_keys = arguments.secret_keys;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let standin = Standin::try_start(options)?;
        say(&format!(r#"{{"listening":"{}"}}"#, standin.addr()));
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        Ok(())
    })
}

#[expect(clippy::print_stdout, reason = "the one line that callers read the address from")]
fn say(line: &str) {
    println!("{line}");
}
