//! Entries of a key's list of operations.
#![no_main]

mod properties;
mod readings;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    properties::a_grant(input);
});
