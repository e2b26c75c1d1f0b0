//! The metrics of what recording depends on, and of what weakens it.

use super::{
    Telemetry,
    families::{Family, Gathered, Kind, Sample, counter, gauge, labelled},
};

static USED: Family = Family {
    name: "weir_journal_used",
    unit: Some("bytes"),
    kind: Kind::Gauge,
    labels: &[],
    help: "Bytes of the journal's segments, preallocated space included, and of its wrapped keys.",
};
static LIMIT: Family = Family {
    name: "weir_journal_limit",
    unit: Some("bytes"),
    kind: Kind::Gauge,
    labels: &[],
    help: "The most that they may be, journal.bytesMax: beyond it requests are refused.",
};
static RELAXED: Family = gauge(
    "weir_recording_relaxed",
    &["what"],
    "1 while requests go on although their records may be lost: an emergency that is on, or rules that may make mutations async (async_mutations).",
);
static EMERGENCY: Family = counter(
    "weir_emergency_requests",
    &[],
    "Requests that went on without waiting for their records, by the emergency switch.",
);

/// All of them.
#[cfg(test)]
pub(super) static ALL: [&Family; 4] = [&USED, &LIMIT, &RELAXED, &EMERGENCY];

/// Reads them.
pub(super) fn gather(telemetry: &Telemetry, out: &mut Gathered) {
    let measured = telemetry.recorder.measured();
    let (used, limit) = measured.used;
    let relaxed =
        [("emergency", measured.emergency.is_some()), ("async_mutations", measured.async_mutations)];
    out.extend([
        (&USED, vec![labelled([], used)]),
        (&LIMIT, vec![labelled([], limit)]),
        (&RELAXED, relaxed.map(|(what, is_so)| labelled([what], u64::from(is_so))).into()),
        (&EMERGENCY, vec![labelled([], measured.emergency_requests)]),
    ] as [(&'static Family, Vec<Sample>); 4]);
}
