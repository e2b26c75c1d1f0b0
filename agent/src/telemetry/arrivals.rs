//! The metrics of what arrives at pods' listeners, and of what the kernel keeps from pods and reports.

use super::families::{Family, Gathered, counter, labelled};
use crate::interception::observed::Numbers;

static ACCEPTED: Family = counter(
    "weir_connections_accepted",
    &["result"],
    "Connections that arrived at listeners of pods: proxied, closed for want of a flow record, or closed since the record is of another pod (disagreed).",
);
static NAME_SERVERS: Family = counter(
    "weir_name_server_refusals",
    &["what"],
    "Answers of name servers that were kept from pods, and questions that did not get there, as the kernel reports them: once a second and pod at most.",
);

/// All of them.
#[cfg(test)]
pub(super) static ALL: [&Family; 2] = [&ACCEPTED, &NAME_SERVERS];

/// Writes them.
pub(super) fn gather(observed: &Numbers, out: &mut Gathered) {
    out.push((
        &ACCEPTED,
        vec![
            labelled(["proxied"], observed.proxied),
            labelled(["closed"], observed.closed),
            labelled(["disagreed"], observed.disagreed),
        ],
    ));
    out.push((
        &NAME_SERVERS,
        vec![
            labelled(["answer"], observed.answers_refused),
            labelled(["question"], observed.questions_refused),
        ],
    ));
}
