//! Keybrake.
pub mod money;
pub mod id;
pub mod time;
pub mod secret;
pub mod refusal;
pub mod key;
pub mod hold;
pub mod call;
pub mod intent;
pub mod audit;
pub mod ledger;
