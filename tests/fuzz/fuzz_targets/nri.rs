//! libFuzzer on [`weir_properties::agent::nri`]; the property is there, nothing else is here.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| weir_properties::agent::nri(bytes));
