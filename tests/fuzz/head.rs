//! Whole requests, up to what is judged of them.
#![no_main]

mod properties;
mod readings;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    properties::a_request(input);
});
