//! # Keybrake: a brake on the key that moves money
//!
//! A small proxy that runs beside each Kestra worker, between billing scripts and Stripe. It issues short-lived *vault
//! keys* (which operations, how many dollars, for how long), takes Stripe SDK calls made with them, reserves the spend
//! durably, removes duplicates, swaps in the real key, forwards once, settles, and writes an audit record. A billing flow
//! must never charge a customer twice, too much, or at all without leave, whatever Kestra, the network or the script does.
//!
//! # One request, file by file
//!
//! `POST /stripe/v1/charges`, `amount=2999`, from a task that holds a vault key:
//!
//! 1. [`server`] accepted the connection and hyper read the head; [`serve`] finds that the path belongs to the proxy.
//! 2. [`proxy`] gives the request an id and runs the rest as a task of its own: a caller that hangs up does not stop it.
//!    `proxy/course.rs` counts what it waits for on its way.
//! 3. `proxy/read.rs` checks the framing and takes the credential; its digest finds the [`key`] on a snapshot of the
//!    [`ledger`], or in its database. Then the body is read, bounded, and the whole request is read in exactly one way
//!    (`vendor/stripe/form.rs`, `catalogue.rs`) or refused.
//! 4. `proxy::permit` asks what key and request alone decide: scope, account, idempotency key, parameters
//!    (`vendor/stripe/rules.rs`). `vendor/stripe/request.rs` makes an [`intent`] by the operation's row (`catalogue.txt`,
//!    `pricing.rs`): what it would cost at most, or where that is told, and what makes another request the same [`call`].
//! 5. `proxy/flights.rs` lets one of equal calls go on; the others wait for its answer.
//! 6. [`ledger::Ledger::admit`]: the writer thread loads rows, asks `ledger/rules.rs`, writes call, [`hold`], counters and
//!    [`audit`] record in one transaction, and answers after the commit: held, replayed or refused. Where the rows are is
//!    one of two: files of this sidecar (`ledger/redb.rs`), or a PostgreSQL that a fleet of them has together
//!    (`ledger/postgres.rs`), where what may be written is locked first. Where only the object's own record tells the
//!    price, it says so; `proxy/look.rs` reads the record (`vendor/stripe/object.rs`), and the ledger is asked again.
//! 7. [`forward`] sends exactly what is held, once ([`upstream`]), with the real key. It takes a [`ledger::Held`], which
//!    only step 6 can make.
//! 8. `vendor/stripe/answer.rs` reads the answer, [`call::conclude`] says what it proves, [`ledger::Ledger::resolve`]
//!    settles, voids or doubts the hold, durably.
//! 9. `proxy/reply.rs` writes the answer: Stripe's own, or a refusal of the same shape ([`refusal`]).
//!
//! After a crash, holds whose bytes may have left are *doubts*; those of a silent sidecar of a fleet, the others make so.
//! They count, and only a definite answer, Stripe's own record or an operator ends them. [`ship`] sends the log on to a
//! [`collect`]or, which nothing waits for.
//!
//! # Rooms, in reading order; dependencies run one way, downwards
//!
//! | layer | rooms | what they know |
//! |---|---|---|
//! | 0 words | [`money`] [`id`] [`time`] [`secret`] [`refusal`] | nothing of each other's business |
//! | 1 decisions | [`fx`] [`key`] [`issuer`] [`hold`] [`call`] [`intent`] [`audit`] [`vendor`] | pure: no clock, socket, database, randomness |
//! | 2 ledger | [`journal`] [`ledger`] [`postgres`] [`telemetry`] | the log and its queries, of no ledger in particular; `rules` are pure; two stores load the same rows and ask them: `ledger/redb` writes first to a log, then to a tree, `ledger/postgres` in two round trips; `writer` makes batches for both; [`postgres`]: sessions and schemas of a PostgreSQL, of no table in particular |
//! | 3 edges | [`random`] [`upstream`] [`tls`] [`server`] [`forward`] [`account`] [`clock`] [`disk`] | the outside world |
//! | 4 services | [`proxy`] [`admin`] [`ops`] [`recover`] [`ship`] [`collect`] | one request each; doubts; the log on its way to the collector, and the collector |
//! | 5 settings | [`config`] | the environment, read once and checked whole |
//! | 6 program | [`serve`] [`cli`] | how it is put together, started and asked |
//!
//! # Invariants, also the absences
//!
//! - Reserve before the first byte leaves; an outcome that is not known stays counted; nothing is compensated without a
//!   definite answer; what cannot be decided is refused.
//! - Money is integers: minor units and micro-dollars, checked.
//! - Hold, counters, call and record change in one transaction, of either store. Nobody is answered before it is durable;
//!   only the record of a GET follows its answer, within 100 ms, and a power cut loses a bounded number of those
//!   ([`ledger::notes`]).
//! - A commit of which nobody knows whether it holds lets nothing be sent: a file is latched, and in a database it is
//!   looked up before anything more is written.
//! - Of the processes that have a ledger together, one that was taken for gone writes nothing before it is registered
//!   anew.
//! - Nothing below us re-sends a money request: [`upstream`] sends again only what it got back unsent.
//! - Nothing in [`ledger`] or below it knows Stripe; [`upstream`] knows neither.
//! - No path from a vault key, Stripe key or admin key to a log line, a record or an answer: they live in
//!   [`secret::Secret`] and [`secret::KeySecret`], which cannot be printed.
//! - Every queue, body, page, retry and wait is bounded by a constant beside its user.

pub mod money;
pub mod id;
pub mod time;
pub mod secret;
pub mod refusal;

pub mod fx;
pub mod key;
pub mod issuer;
pub mod hold;
pub mod call;
pub mod intent;
pub mod audit;
pub mod vendor;

pub mod journal;
pub mod postgres;
pub mod ledger;

pub mod random;
pub mod disk;
pub mod upstream;
pub mod tls;
pub mod server;
pub mod forward;
pub mod account;
pub mod clock;
pub mod telemetry;

pub mod proxy;
pub mod admin;
pub mod ops;
pub mod recover;
pub mod collect;
pub mod ship;

pub mod config;

pub mod serve;
pub mod cli;
