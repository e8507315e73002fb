//! Forms and query strings.
#![no_main]

mod properties;
mod readings;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    properties::a_form(input);
});
