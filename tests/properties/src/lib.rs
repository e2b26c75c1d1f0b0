//! What must hold for whatever bytes Weir's parsers are given.
//!
//! Each property lives once, as a function of bytes that panics where it does not hold. The fuzz targets in
//! `tests/fuzz` call them, and so does `cargo test` on the committed corpus and mutations of it. Nothing here may
//! do input or output, or depend on the clock.

pub mod agent;
pub mod auth;
pub mod journal;
pub mod kernel;
pub mod masks;
pub mod record;
pub mod streams;

/// A property and the folder of its corpus.
pub type Target = (&'static str, fn(&[u8]));

/// All targets; each has a corpus folder and a fuzz target of its name.
pub const TARGETS: [Target; 28] = [
    ("answer", agent::answer),
    ("attributes", record::attributes),
    ("body", masks::body),
    ("certificates", agent::certificates),
    ("cgroup_path", agent::cgroup_path),
    ("checkpoint", journal::checkpoint),
    ("configuration", agent::configuration),
    ("credentials", masks::credentials),
    ("envelope", journal::envelope),
    ("event", record::event),
    ("expression", auth::expression),
    ("frame", journal::frame),
    ("key_set", auth::key_set),
    ("kubeconfig", agent::kubeconfig),
    ("masked_stream", masks::masked_stream),
    ("message", journal::message),
    ("nri", agent::nri),
    ("packet", kernel::packet),
    ("removed", journal::removed),
    ("wrapped_key", journal::wrapped_key),
    ("request_head", agent::request_head),
    ("sealed_frame", journal::sealed_frame),
    ("sealed_segment", journal::sealed_segment),
    ("secret_body", masks::secret_body),
    ("secret_protobuf", masks::secret_protobuf),
    ("segment", journal::segment),
    ("streams", streams::streams),
    ("token", auth::token),
];
