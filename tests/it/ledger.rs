//! The ledger: what every store must do, what random histories and crashes must leave of it.

mod backend;
mod crash;
mod format;
mod line;
mod notes;
mod postgres;
pub(crate) mod reads;
mod redb;
mod sim;
mod states;
mod suite;
mod table;
mod world;
