//! Methods with paths, up to the operation that they mean.
#![no_main]

mod properties;
mod readings;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    properties::a_path(input);
});
