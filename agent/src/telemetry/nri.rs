//! The metrics of what containers wait for before they start.

use super::families::{Family, Gathered, Kind, Sample, Value, counter, gauge, labelled};
use crate::interception::waits::{WAIT_BOUNDS, WaitNumbers};

static CONNECTED: Family = gauge(
    "weir_nri_connected",
    &[],
    "1 if the container runtime asks (by NRI) before it starts a container; at 0 pods may start before they are enrolled, and are denied until then.",
);
static STARTS: Family = counter(
    "weir_nri_container_starts",
    &["result"],
    "Containers that the runtime asked about: started with their pod's verdict in force, without it since it did not come in time, or none of this agent's to wait for.",
);
static WAITS: Family = Family {
    name: "weir_nri_wait_duration",
    unit: Some("seconds"),
    kind: Kind::Histogram,
    labels: &[],
    help: "How long they were held back.",
};
static LOOKED_UP: Family = counter(
    "weir_nri_pods_looked_up",
    &[],
    "Pods that the API server was asked for by name, since they started before the watch had them.",
);

/// All of them.
#[cfg(test)]
pub(super) static ALL: [&Family; 4] = [&CONNECTED, &STARTS, &WAITS, &LOOKED_UP];

/// Writes them.
pub(super) fn gather(numbers: &WaitNumbers, out: &mut Gathered) {
    let bounds = WAIT_BOUNDS.iter().map(|bound| bound.as_secs_f64()).chain([f64::MAX]);
    let waits = Value::Classes {
        sum: numbers.waited.as_secs_f64(),
        count: numbers.waits.iter().sum(),
        classes: bounds.zip(numbers.waits).collect(),
    };
    out.extend([
        (&CONNECTED, vec![labelled([], u64::from(numbers.connected))]),
        (
            &STARTS,
            vec![
                labelled(["settled"], numbers.settled),
                labelled(["timed_out"], numbers.timed_out),
                labelled(["not_ours"], numbers.not_ours),
            ],
        ),
        (&WAITS, vec![Sample { labels: Vec::new(), value: waits }]),
        (&LOOKED_UP, vec![labelled([], numbers.looked_up)]),
    ] as [(&'static Family, Vec<Sample>); 4]);
}
