//! The metrics of traces: what became of them.

use super::families::{Family, Gathered, Sample, counter, labelled};
use crate::proxy::Proxy;

static SPANS: Family = counter(
    "weir_trace_spans",
    &["result"],
    "Spans of traces: taken by the collector (exported), or lost since the queue was full (queue_full), the collector could not be reached or refused them for too long (failed), or took only others (rejected). None where no traces are configured.",
);

/// All of them.
#[cfg(test)]
pub(super) static ALL: [&Family; 1] = [&SPANS];

/// Reads them; no series where no traces are made.
pub(super) fn gather(proxy: Option<&Proxy>, out: &mut Gathered) {
    let measured = proxy.and_then(Proxy::traced);
    let samples = measured.into_iter().flat_map(|measured| {
        [
            ("exported", measured.exported),
            ("queue_full", measured.queue_full),
            ("failed", measured.failed),
            ("rejected", measured.rejected),
        ]
        .map(|(result, count)| labelled([result], count))
    });
    out.extend([(&SPANS, samples.collect())] as [(&'static Family, Vec<Sample>); 1]);
}
