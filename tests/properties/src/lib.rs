//! What must hold for whatever bytes Weir's parsers are given.
//!
//! Each property lives once, as a function of bytes that panics where it does not hold. The fuzz targets in
//! `tests/fuzz` call them, and so does `cargo test` on the committed corpus and mutations of it. Nothing here may
//! do input or output, or depend on the clock.

pub mod journal;
pub mod kernel;
pub mod record;

/// A property and the folder of its corpus.
pub type Target = (&'static str, fn(&[u8]));

/// All targets; each has a corpus folder and a fuzz target of its name.
pub const TARGETS: [Target; 9] = [
    ("attributes", record::attributes),
    ("checkpoint", journal::checkpoint),
    ("envelope", journal::envelope),
    ("event", record::event),
    ("frame", journal::frame),
    ("packet", kernel::packet),
    ("sealed_frame", journal::sealed_frame),
    ("segment", journal::segment),
    ("sealed_segment", journal::sealed_segment),
];
