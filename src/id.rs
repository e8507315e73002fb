//! Names of things: 128-bit ids that sort by the time they were made, and 256-bit digests.
//!
//! Ids are made from a time and random bytes that the caller brings, so that a history can be run again exactly.

use std::fmt;

use minicbor::{Decode, Encode};
use sha2::{Digest as _, Sha256};

use crate::time::UnixMs;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
        #[cbor(transparent)]
        pub struct $name(#[cbor(with = "minicbor::bytes")] [u8; 16]);

        impl $name {
            /// What the text form starts with.
            pub const PREFIX: &'static str = $prefix;

            /// A new id: 48 bits of time, 80 random bits.
            pub fn new(at: UnixMs, random: [u8; 10]) -> Self {
                let mut bytes = [0; 16];
                bytes[..6].copy_from_slice(&at.millis().to_be_bytes()[2..]);
                bytes[6..].copy_from_slice(&random);
                Self(bytes)
            }

            /// From the stored bytes.
            pub fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }

            /// The stored bytes, in order of time.
            pub fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }

            /// Reads the text form; `None` when it is not one.
            pub fn parse(text: &str) -> Option<Self> {
                let bytes = from_hex(text.strip_prefix($prefix)?)?;
                Some(Self(bytes.try_into().ok()?))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}{}", $prefix, hex(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

id!(
    /// A vault key (its row, not its secret).
    KeyId, "vk_id_"
);
id!(
    /// An issuer key.
    IssuerId, "ik_id_"
);
id!(
    /// One call: what the caller meant, over all its retries and attempts.
    CallId, "call_"
);
id!(
    /// Money held for one object.
    HoldId, "hold_"
);
id!(
    /// One request as its caller saw it, where Stripe gave no id of its own.
    RequestId, "req_kb_"
);
id!(
    /// A ledger file, for its whole life.
    LedgerId, "ledger_"
);
id!(
    /// One run of the process on a ledger.
    BootId, "boot_"
);

/// A budget: one name among the keys of one issuer, or of the admin key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
#[cbor(transparent)]
pub struct BudgetId(#[cbor(with = "minicbor::bytes")] [u8; 16]);

impl BudgetId {
    /// The budget of that name among the keys that `issuer` (or the admin key) minted.
    pub fn of(issuer: Option<IssuerId>, name: &str) -> Self {
        let owner = issuer.map_or_else(|| "admin".to_owned(), |issuer| issuer.to_string());
        let digest: [u8; 32] =
            Sha256::new().chain_update(owner).chain_update("/").chain_update(name).finalize().into();
        Self(digest.first_chunk().copied().unwrap_or_default())
    }

    /// The stored bytes.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

macro_rules! digest {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
        #[cbor(transparent)]
        pub struct $name(#[cbor(with = "minicbor::bytes")] pub [u8; 32]);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex(&self.0))
            }
        }
    };
}

digest!(
    /// What makes two requests the same call.
    Identity
);
digest!(
    /// What a same call must be equal in.
    Fingerprint
);

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    let digit = |nibble: u8| char::from(if nibble < 10 { b'0' + nibble } else { b'a' + nibble - 10 });
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        text.push(digit(byte >> 4));
        text.push(digit(byte & 15));
    }
    text
}

/// Reads lower-case hexadecimal; `None` for anything else.
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    if !text.len().is_multiple_of(2) {
        return None;
    }
    text.as_bytes().chunks_exact(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_is_read_as_it_is_written() {
        let all: Vec<u8> = (0..=255).collect();
        assert!(hex(&all).starts_with("000102030405060708090a0b0c0d0e0f10"));
        assert!(hex(&all).ends_with("f8f9fafbfcfdfeff"));
        assert_eq!(from_hex(&hex(&all)), Some(all));
    }

    #[test]
    fn ids_read_back_and_sort_by_time() {
        let early = CallId::new(UnixMs::from_millis(1_000), [255; 10]);
        let late = CallId::new(UnixMs::from_millis(1_001), [0; 10]);
        assert!(early < late);
        assert_eq!(CallId::parse(&early.to_string()), Some(early));
        assert_eq!(CallId::parse(&HoldId::from_bytes([1; 16]).to_string()), None);
        assert_eq!(CallId::parse("call_0102"), None);
        assert_eq!(CallId::parse("call_ZZ02030405060708090a0b0c0d0e0f10"), None);
    }
}
