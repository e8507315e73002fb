//! The one source of randomness: the operating system's.

/// Random bytes.
///
/// # Panics
/// When the operating system has none to give: nothing secret may be made then.
pub fn bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    #[expect(clippy::expect_used, reason = "without randomness no key may be made and no id is unique")]
    getrandom::fill(&mut bytes).expect("the operating system has no randomness");
    bytes
}
