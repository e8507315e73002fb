//! Keybrake.
pub mod audit;
pub mod call;
pub mod config;
pub mod hold;
pub mod id;
pub mod intent;
pub mod key;
pub mod ledger;
pub mod money;
pub mod refusal;
pub mod secret;
pub mod server;
pub mod time;
pub mod tls;
pub mod upstream;
pub mod vendor;
