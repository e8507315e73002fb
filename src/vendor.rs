//! Vendors: what is behind the proxy. Each is a folder of pure functions; there is one.

pub mod stripe;

/// Whose API a key opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// Stripe.
    Stripe,
}

impl Vendor {
    /// The name in a key's `vendor`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stripe => "stripe",
        }
    }

    /// Reads a key's `vendor`.
    pub fn parse(text: &str) -> Option<Self> {
        (text == Self::Stripe.as_str()).then_some(Self::Stripe)
    }
}
