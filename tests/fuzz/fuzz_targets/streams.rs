//! libFuzzer on [`weir_properties::streams::streams`]; the property is there, nothing else is here.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| weir_properties::streams::streams(bytes));
