//! libFuzzer on [`weir_properties::masks::masked_stream`]; the property is there, nothing else is here.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| weir_properties::masks::masked_stream(bytes));
