//! libFuzzer on [`weir_properties::auth::token`]; the property is there, nothing else is here.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| weir_properties::auth::token(bytes));
