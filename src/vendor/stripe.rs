//! All that is known of Stripe: what a request would do, what an answer says, how a refusal looks.
//!
//! Pure functions over text and rows; nothing here sends, waits or stores.

pub mod answer;
pub mod catalogue;
pub mod find;
pub mod form;
mod json;
pub mod lines;
pub mod object;
pub mod pricing;
pub mod refusal;
pub mod request;
pub mod rules;
pub mod secrets;

/// The earliest `Stripe-Version` that the catalogue stands for.
pub const VERSION_MIN: &str = "2020-08-27";
/// The latest one.
pub const VERSION_MAX: &str = "2026-10-28";
/// The version that the sidecar's own reads ask for: they are read here, whatever version the caller speaks.
pub const READ_VERSION: &str = "2026-10-28.endive";
/// The parameter that carries a call's stamp.
pub const STAMP_PARAM: &str = "metadata[keybrake_call]";
/// Metadata entries that an object may have at Stripe.
pub const METADATA_KEYS_MAX: usize = 50;
