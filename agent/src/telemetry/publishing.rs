//! The metrics of publishing: what Kafka has taken, what waits, what left the journal.

use super::families::{Family, Gathered, Kind, Sample, counter, gauge, labelled};
use crate::publishing::Published;

static MESSAGES: Family = counter("weir_kafka_messages", &[], "Messages that Kafka has acknowledged.");
static BYTES: Family = Family {
    name: "weir_kafka",
    unit: Some("bytes"),
    kind: Kind::Counter,
    labels: &[],
    help: "Bytes of their keys, headers and values, before compression.",
};
static ERRORS: Family = counter(
    "weir_kafka_errors",
    &["kind"],
    "Messages or clients that failed, by why; everything that was not acknowledged is sent again.",
);
static BACKLOG: Family = Family {
    name: "weir_kafka_backlog",
    unit: Some("bytes"),
    kind: Kind::Gauge,
    labels: &[],
    help: "Bytes in the journal that Kafka has not acknowledged.",
};
static AGE: Family = Family {
    name: "weir_kafka_backlog",
    unit: Some("seconds"),
    kind: Kind::Gauge,
    labels: &[],
    help: "Age of the oldest event that Kafka has not acknowledged.",
};
static CONNECTED: Family = gauge(
    "weir_kafka_connected",
    &[],
    "1 if Kafka acknowledged what was sent last; 0 also before the first message.",
);
static REMOVED: Family = counter(
    "weir_journal_segments_removed",
    &[],
    "Segments of the journal that were published and, after the replay window, removed.",
);
static DAMAGES: Family = counter(
    "weir_journal_damages",
    &[],
    "Places in the journal that could not be read; a gap record says which, and the segment is kept.",
);

/// All of them.
#[cfg(test)]
pub(super) static ALL: [&Family; 8] =
    [&MESSAGES, &BYTES, &ERRORS, &BACKLOG, &AGE, &CONNECTED, &REMOVED, &DAMAGES];

/// Reads them; no series where nothing is published.
pub(super) fn gather(published: Option<Published>, out: &mut Gathered) {
    let published = published.as_ref();
    let each = |value: &dyn Fn(&Published) -> u64| -> Vec<Sample> {
        published.map(|published| labelled([], value(published))).into_iter().collect()
    };
    let errors = published.into_iter().flat_map(|published| &published.errors);
    out.extend([
        (&MESSAGES, each(&|published| published.messages)),
        (&BYTES, each(&|published| published.bytes)),
        (&ERRORS, errors.map(|(kind, count)| labelled([*kind], *count)).collect()),
        (&BACKLOG, each(&|published| published.backlog_bytes)),
        (&AGE, each(&|published| published.backlog_seconds)),
        (&CONNECTED, each(&|published| u64::from(published.connected))),
        (&REMOVED, each(&|published| published.segments_removed)),
        (&DAMAGES, each(&|published| published.damages)),
    ] as [(&'static Family, Vec<Sample>); 8]);
}
