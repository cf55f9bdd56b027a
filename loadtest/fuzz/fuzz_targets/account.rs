#![no_main]

#[path = "../../tests/it/strangers/parsers.rs"]
mod parsers;

libfuzzer_sys::fuzz_target!(|input: &[u8]| parsers::account(input));
