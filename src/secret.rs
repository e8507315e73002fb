//! placeholder
/// Mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode { /// T
 Test, /// L
 Live }
impl Mode { /// s
 pub const fn as_str(self) -> &'static str { match self { Self::Test => "test", Self::Live => "live" } } }
/// Digest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct KeyDigest(/// b
 pub [u8; 32]);
