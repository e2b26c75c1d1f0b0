//! libFuzzer on [`weir_properties::journal::wrapped_key`]; the property is there, nothing else is here.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| weir_properties::journal::wrapped_key(bytes));
