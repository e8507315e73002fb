//! Secrets and the keys that this program makes.
//!
//! Owns: the one type that holds a secret ([`Secret`]), the text form of vault and issuer keys ([`KeySecret`]), what
//! is stored of them ([`KeyDigest`]), and how a Stripe key is told by its prefix.
//!
//! Invariants: neither [`Secret`] nor [`KeySecret`] can be displayed or serialised, and their `Debug` shows nothing of
//! them; a [`KeySecret`] exists only with a valid checksum.
//!
//! Never: draws random bytes, reads a file, the environment or a clock. Randomness is an argument.

use std::fmt;

use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

/// A string that must not reach a log, an answer or a page.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    /// Takes the string over.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The string itself, for the one place that needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether `candidate` is this secret. The time taken tells neither where the two differ nor how long the secret
    /// is.
    pub fn matches(&self, candidate: &str) -> bool {
        // Slices of unequal length compare at once, digests never do.
        let own = Sha256::digest(self.0.as_bytes());
        let other = Sha256::digest(candidate.as_bytes());
        own.as_slice().ct_eq(other.as_slice()).into()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// Stripe's two worlds: play money and real money.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mode {
    /// Test mode and sandboxes.
    Test,
    /// Real money.
    Live,
}

impl Mode {
    /// `test` or `live`, as in key prefixes.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Test => "test",
            Self::Live => "live",
        }
    }
}

/// Which of our two kinds of key a text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KeyKind {
    /// `vk_…`: lets a flow make calls.
    Vault,
    /// `ik_…`: mints vault keys within bounds.
    Issuer,
}

impl KeyKind {
    /// `vault` or `issuer`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Vault => "vault",
            Self::Issuer => "issuer",
        }
    }

    const fn prefix(self, mode: Mode) -> &'static str {
        match (self, mode) {
            (Self::Vault, Mode::Test) => "vk_test_",
            (Self::Vault, Mode::Live) => "vk_live_",
            (Self::Issuer, Mode::Test) => "ik_test_",
            (Self::Issuer, Mode::Live) => "ik_live_",
        }
    }
}

const BASE62: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// 62^43 is just above 2^256.
const BODY_DIGITS: usize = 43;

/// 62^6 is above 2^32.
const CHECKSUM_DIGITS: usize = 6;

/// Length of every prefix, `vk_test_` for instance.
const PREFIX_CHARS: usize = 8;

/// Length of every vault and issuer key, in characters.
pub const KEY_CHARS: usize = PREFIX_CHARS + BODY_DIGITS + CHECKSUM_DIGITS;

/// A vault key or an issuer key, in the clear: prefix, 43 base62 digits of 256 random bits, 6 base62 digits of a
/// checksum. Shown once, then only its [`KeyDigest`] is kept.
#[derive(Clone)]
pub struct KeySecret {
    kind: KeyKind,
    mode: Mode,
    text: Secret,
}

impl KeySecret {
    /// Makes a key of 32 random bytes. The same bytes give the same key.
    pub fn new(kind: KeyKind, mode: Mode, random: [u8; 32]) -> Self {
        let mut text = String::with_capacity(KEY_CHARS);
        text.push_str(kind.prefix(mode));
        push_base62(&mut text, &random, BODY_DIGITS);
        let checksum = checksum_of(&text);
        push_base62(&mut text, &checksum, CHECKSUM_DIGITS);
        Self { kind, mode, text: Secret::new(text) }
    }

    /// Reads a key back; `None` when prefix, length, alphabet or checksum are wrong. Says nothing about whether the
    /// key was ever issued. Its time depends on the text, which is safe: the checksum is no secret.
    pub fn parse(text: &str) -> Option<Self> {
        if text.len() != KEY_CHARS || !text.is_ascii() {
            return None;
        }
        let (kind, mode) = kind_and_mode(text)?;
        let (signed, checksum) = text.split_at(PREFIX_CHARS + BODY_DIGITS);
        let (_, body) = signed.split_at(PREFIX_CHARS);
        // The 62 digits are exactly these.
        if !body.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return None;
        }
        let mut expected = String::with_capacity(CHECKSUM_DIGITS);
        push_base62(&mut expected, &checksum_of(signed), CHECKSUM_DIGITS);
        if expected != checksum {
            return None;
        }
        Some(Self { kind, mode, text: Secret::new(text) })
    }

    /// Vault or issuer.
    pub const fn kind(&self) -> KeyKind {
        self.kind
    }

    /// The mode that the prefix names.
    pub const fn mode(&self) -> Mode {
        self.mode
    }

    /// What is stored and looked up in place of the key.
    pub fn digest(&self) -> KeyDigest {
        KeyDigest(Sha256::digest(self.expose().as_bytes()).into())
    }

    /// The text itself, for the one answer that shows it.
    pub fn expose(&self) -> &str {
        self.text.expose()
    }
}

impl fmt::Debug for KeySecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeySecret({}…)", self.kind.prefix(self.mode))
    }
}

fn kind_and_mode(text: &str) -> Option<(KeyKind, Mode)> {
    for kind in [KeyKind::Vault, KeyKind::Issuer] {
        for mode in [Mode::Test, Mode::Live] {
            if text.starts_with(kind.prefix(mode)) {
                return Some((kind, mode));
            }
        }
    }
    None
}

fn checksum_of(signed: &str) -> [u8; 4] {
    let digest: [u8; 32] = Sha256::digest(signed.as_bytes()).into();
    let [a, b, c, d, ..] = digest;
    [a, b, c, d]
}

/// Appends `number`, big-endian, as exactly `digits` base62 digits; higher ones would be lost, so `digits` must
/// suffice.
fn push_base62(text: &mut String, number: &[u8], digits: usize) {
    let mut number = number.to_vec();
    let mut reversed = Vec::with_capacity(digits);
    for _ in 0..digits {
        let mut rest = 0_usize;
        for byte in &mut number {
            let value = (rest << 8) | usize::from(*byte);
            // The quotient fits one byte because `rest` is below 62.
            let [.., quotient] = (value / BASE62.len()).to_be_bytes();
            *byte = quotient;
            rest = value % BASE62.len();
        }
        reversed.push(BASE62[rest]);
    }
    text.extend(reversed.into_iter().rev().map(char::from));
}

/// SHA-256 of a whole key text: all that is stored of it. No salt and no stretching, since the key itself is 256
/// random bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyDigest(pub [u8; 32]);

impl fmt::Debug for KeyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Enough to tell two apart in a test's message.
        let [first, second, third, ..] = self.0;
        write!(f, "KeyDigest({first:02x}{second:02x}{third:02x}…)")
    }
}

/// Whether a text starts like one of Stripe's own API keys (`sk_`, `rk_`, `pk_`), which has no business in a flow.
pub fn looks_like_stripe_key(text: &str) -> bool {
    ["sk_", "rk_", "pk_"].iter().any(|prefix| text.starts_with(prefix))
}

/// The mode of a secret or restricted Stripe key; `None` for every other text, organisation keys (`sk_org_…`)
/// included.
pub fn stripe_key_mode(text: &str) -> Option<Mode> {
    if text.starts_with("sk_test_") || text.starts_with("rk_test_") {
        Some(Mode::Test)
    } else if text.starts_with("sk_live_") || text.starts_with("rk_live_") {
        Some(Mode::Live)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_key_has_the_documented_shape() {
        let key = KeySecret::new(KeyKind::Vault, Mode::Test, [0; 32]);
        let text = key.expose();
        assert_eq!(text.len(), KEY_CHARS);
        assert!(text.starts_with("vk_test_"));
        assert_eq!(&text[PREFIX_CHARS..PREFIX_CHARS + BODY_DIGITS], "0".repeat(BODY_DIGITS));
        let top = KeySecret::new(KeyKind::Issuer, Mode::Live, [0xff; 32]);
        assert_eq!(top.expose().len(), KEY_CHARS);
        assert!(top.expose().starts_with("ik_live_"));
    }

    #[test]
    fn the_text_form_never_changes() {
        // Keys outlive releases: a change of alphabet or checksum would lock every flow out.
        let mut random = [0_u8; 32];
        random.iter_mut().zip(1_u8..).for_each(|(byte, n)| *byte = n);
        let key = KeySecret::new(KeyKind::Vault, Mode::Live, random);
        assert_eq!(key.expose(), "vk_live_0Eoh211G4c8wtVWM00my5rsNSFlKgaWqQ4mb8gdEqno1g4Aim");
    }

    #[test]
    fn base62_matches_hand_reckoning() {
        let mut text = String::new();
        push_base62(&mut text, &[0, 0, 0, 61], 6);
        push_base62(&mut text, &[0, 0, 0, 62], 6);
        push_base62(&mut text, &[0xff, 0xff, 0xff, 0xff], 6);
        assert_eq!(text, "00000z0000104gfFC3");
    }

    proptest! {
        #[test]
        fn every_key_reads_back(random in any::<[u8; 32]>(), issuer in any::<bool>(), live in any::<bool>()) {
            let kind = if issuer { KeyKind::Issuer } else { KeyKind::Vault };
            let mode = if live { Mode::Live } else { Mode::Test };
            let key = KeySecret::new(kind, mode, random);
            let back = KeySecret::parse(key.expose()).unwrap();
            prop_assert_eq!((back.kind(), back.mode()), (kind, mode));
            prop_assert_eq!(back.digest(), key.digest());
        }

        #[test]
        fn a_changed_character_is_noticed(random in any::<[u8; 32]>(), at in 0..KEY_CHARS, to in "[ -~]") {
            let key = KeySecret::new(KeyKind::Vault, Mode::Test, random);
            let mut text = key.expose().to_owned();
            text.replace_range(at..=at, &to);
            prop_assert_eq!(KeySecret::parse(&text).is_some(), text == key.expose());
        }

        #[test]
        fn any_text_is_read_without_a_panic(text in "\\PC{0,80}") {
            let _ = KeySecret::parse(&text);
        }
    }

    #[test]
    fn other_lengths_and_alphabets_are_no_keys() {
        let key = KeySecret::new(KeyKind::Vault, Mode::Test, [7; 32]);
        let text = key.expose();
        assert!(KeySecret::parse("").is_none());
        assert!(KeySecret::parse(&text[..KEY_CHARS - 1]).is_none());
        assert!(KeySecret::parse(&format!("{text}0")).is_none());
        assert!(KeySecret::parse(&format!(" {}", &text[..KEY_CHARS - 1])).is_none());
        // A checksum that fits does not excuse a body outside the alphabet.
        let mut odd = format!("vk_test_{}", "-".repeat(BODY_DIGITS));
        let checksum = checksum_of(&odd);
        push_base62(&mut odd, &checksum, CHECKSUM_DIGITS);
        assert!(KeySecret::parse(&odd).is_none());
    }

    #[test]
    fn the_digest_is_of_the_whole_text() {
        let key = KeySecret::new(KeyKind::Vault, Mode::Test, [7; 32]);
        let digest: [u8; 32] = Sha256::digest(key.expose().as_bytes()).into();
        assert_eq!(key.digest(), KeyDigest(digest));
    }

    #[test]
    fn nothing_of_a_secret_shows() {
        let key = KeySecret::new(KeyKind::Vault, Mode::Test, [7; 32]);
        assert_eq!(format!("{key:?}"), "KeySecret(vk_test_…)");
        assert_eq!(
            format!("{:?} {:#?}", Secret::new("hunter2"), Secret::new("hunter2")),
            "Secret(…) Secret(…)"
        );
    }

    #[test]
    fn a_secret_matches_itself_only() {
        let secret = Secret::new("correct horse");
        assert!(secret.matches("correct horse"));
        for other in ["", "correct", "correct horse ", "Correct horse"] {
            assert!(!secret.matches(other), "{other:?}");
        }
    }

    #[test]
    fn stripe_keys_are_told_by_their_prefix() {
        assert_eq!(stripe_key_mode("sk_test_x"), Some(Mode::Test));
        assert_eq!(stripe_key_mode("rk_test_x"), Some(Mode::Test));
        assert_eq!(stripe_key_mode("sk_live_x"), Some(Mode::Live));
        assert_eq!(stripe_key_mode("rk_live_x"), Some(Mode::Live));
        for other in ["sk_org_live_x", "pk_test_x", "vk_test_x", "", "SK_TEST_x", "sk_test"] {
            assert_eq!(stripe_key_mode(other), None, "{other}");
        }
        assert!(["sk_org_x", "rk_x", "pk_test_x"].into_iter().all(looks_like_stripe_key));
        assert!(!looks_like_stripe_key("vk_test_x"));
    }
}
