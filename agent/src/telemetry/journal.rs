//! The metrics of what recording depends on, and of what weakens it.

use std::{path::Path, time::Duration};

use nix::sys::statvfs::statvfs;

use super::{
    Telemetry,
    families::{Family, Gathered, Kind, Sample, Value, counter, gauge, labelled},
};
use crate::recording::BEHIND_BOUNDS;

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

static BEHIND: Family = Family {
    name: "weir_journal_behind",
    unit: Some("seconds"),
    kind: Kind::Histogram,
    labels: &[],
    help: "How long the oldest event that no request waits for had waited when it was on disk, once a group: at most 50 ms and a sync, if the disk keeps up.",
};

static FREE: Family = Family {
    name: "weir_journal_filesystem_free",
    unit: Some("bytes"),
    kind: Kind::Gauge,
    labels: &[],
    help: "Bytes that are free on the journal's file system, without what it keeps for root: when there are none, requests are refused whatever journal.bytesMax is.",
};
static RESERVE: Family = Family {
    name: "weir_journal_reserve",
    unit: Some("bytes"),
    kind: Kind::Gauge,
    labels: &[],
    help: "Bytes that are allocated already, on a full disk, too, for the words that recording stopped and why: 65536, less when such words took of them, 0 while no segment is open.",
};
static GAPS: Family = counter(
    "weir_journal_gaps",
    &["kind"],
    "Gap records that are on disk: recording that stopped (stopped), events that could not be written (not_written) or not be read again (damaged), bodies left out since the journal, Kafka or a key was behind (bodies_left_out), what a rule leaves out or masks (by_rule), what cannot be masked (withheld), what came too fast, too long or broken (cut), streams that are recorded raw (not_decoded), floods (summed_up), a defect of the recorder (defect), others (other).",
);

/// All of them.
#[cfg(test)]
pub(super) static ALL: [&Family; 8] = [&USED, &LIMIT, &FREE, &RESERVE, &GAPS, &RELAXED, &EMERGENCY, &BEHIND];

/// A histogram; what is longer than all bounds is in the last class.
pub(super) fn durations(bounds: &[Duration], counts: &[u64], sum: Duration) -> Vec<Sample> {
    let bounds = bounds.iter().map(Duration::as_secs_f64).chain([f64::MAX]);
    let classes = bounds.zip(counts.iter().copied()).collect();
    let value = Value::Classes { sum: sum.as_secs_f64(), count: counts.iter().sum(), classes };
    vec![Sample { labels: Vec::new(), value }]
}

/// None, where the file system does not say.
fn free(folder: &Path) -> Option<Sample> {
    let told = statvfs(folder).ok()?;
    Some(labelled([], told.blocks_available().saturating_mul(told.fragment_size())))
}

/// Reads them.
pub(super) fn gather(telemetry: &Telemetry, out: &mut Gathered) {
    let measured = telemetry.recorder.measured();
    let (used, limit) = measured.used;
    let relaxed =
        [("emergency", measured.emergency.is_some()), ("async_mutations", measured.async_mutations)];
    out.extend([
        (&USED, vec![labelled([], used)]),
        (&LIMIT, vec![labelled([], limit)]),
        (&FREE, free(telemetry.recorder.folder()).into_iter().collect()),
        (&RESERVE, vec![labelled([], measured.reserve)]),
        (&GAPS, measured.gaps.into_iter().map(|(kind, count)| labelled([kind], count)).collect()),
        (&RELAXED, relaxed.map(|(what, is_so)| labelled([what], u64::from(is_so))).into()),
        (&EMERGENCY, vec![labelled([], measured.emergency_requests)]),
        (&BEHIND, durations(&BEHIND_BOUNDS, &measured.behind, measured.behind_time)),
    ] as [(&'static Family, Vec<Sample>); 8]);
}
