//! Keybrake.
fn main() {}
