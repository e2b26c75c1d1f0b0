//! The metrics of publishing: what Kafka has taken, what waits, what left the journal.

use std::time::Duration;

use super::families::{Family, Gathered, Kind, Sample, Value, counter, gauge, labelled};
use crate::publishing::{DELIVERY_BOUNDS_MS, Published};

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
static RESENT: Family = counter(
    "weir_kafka_messages_resent",
    &[],
    "Messages that were on their way when a client of Kafka was given up; they are sent again. What a client sends again by itself it does not tell: that shows as delivery that takes longer.",
);
static DELIVERY: Family = Family {
    name: "weir_kafka_delivery_duration",
    unit: Some("seconds"),
    kind: Kind::Histogram,
    labels: &[],
    help: "From when an event was recorded until Kafka acknowledged it.",
};
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
    "Segments of the journal that were published and removed, after the replay window or for want of room.",
);
static DAMAGES: Family = counter(
    "weir_journal_damages",
    &[],
    "Places in the journal that could not be read; a gap record says which, and the segment is kept.",
);

static REMOVED_EARLY: Family = counter(
    "weir_journal_segments_removed_early",
    &[],
    "Of those, the ones that went before the replay window had passed, since the journal had no room.",
);
static UNREADABLE: Family = gauge(
    "weir_journal_epochs_unreadable",
    &[],
    "Epochs in the journal that cannot be opened, so that nothing of them is published.",
);

static UNACCOUNTED: Family = gauge(
    "weir_journal_unaccounted_epochs",
    &[],
    "Epochs whose file `removed` cannot be read: nothing more of them leaves the journal.",
);

/// All of them.
#[cfg(test)]
pub(super) static ALL: [&Family; 13] = [
    &MESSAGES,
    &BYTES,
    &ERRORS,
    &RESENT,
    &DELIVERY,
    &BACKLOG,
    &AGE,
    &CONNECTED,
    &REMOVED,
    &REMOVED_EARLY,
    &DAMAGES,
    &UNREADABLE,
    &UNACCOUNTED,
];

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
        (&RESENT, each(&|published| published.resent)),
        (&DELIVERY, published.map(delivery).into_iter().collect()),
        (&BACKLOG, each(&|published| published.backlog_bytes)),
        (&AGE, each(&|published| published.backlog_seconds)),
        (&CONNECTED, each(&|published| u64::from(published.connected))),
        (&REMOVED, each(&|published| published.segments_removed)),
        (&REMOVED_EARLY, each(&|published| published.segments_removed_early)),
        (&DAMAGES, each(&|published| published.damages)),
        (&UNREADABLE, each(&|published| published.epochs_unreadable)),
        (&UNACCOUNTED, each(&|published| published.unaccounted)),
    ] as [(&'static Family, Vec<Sample>); 13]);
}

fn delivery(published: &Published) -> Sample {
    #[expect(clippy::cast_precision_loss, reason = "a sum of times, for a graph")]
    let sum = published.delivery_us as f64 / 1e6;
    let bounds =
        DELIVERY_BOUNDS_MS.into_iter().map(|ms| Duration::from_millis(ms).as_secs_f64()).chain([f64::MAX]);
    let classes = bounds.zip(published.deliveries).collect();
    Sample {
        labels: Vec::new(),
        value: Value::Classes { sum, count: published.deliveries.iter().sum(), classes },
    }
}
