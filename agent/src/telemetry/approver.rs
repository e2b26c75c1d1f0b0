//! The metrics of the approver: a process of its own, which has these and none of an agent's.

use super::{
    exposition,
    families::{Family, Gathered, counter, gauge, labelled},
    server::Monitored,
};
use crate::trust::approvals::Approvals;

static BUILD: Family = gauge("weir_approver_build_info", &["version"], "1, with the approver's version.");
static READY: Family =
    gauge("weir_approver_ready", &[], "1 if the approver can read requests for certificates; else 0.");
static APPROVED: Family =
    counter("weir_approver_approved", &[], "Requests for serving certificates that were approved.");
static DENIED: Family = counter(
    "weir_approver_denied",
    &["reason"],
    "Requests that were denied, by why; the log and the request's condition say it in words.",
);
static FAILURES: Family = counter(
    "weir_approver_failures",
    &["step"],
    "What failed and is tried again: to read the requests (read), or to answer one (answer).",
);

/// All of them.
#[cfg(test)]
pub(super) static ALL: [&Family; 5] = [&BUILD, &READY, &APPROVED, &DENIED, &FAILURES];

impl Monitored for Approvals {
    fn unready(&self) -> Vec<String> {
        let reason = "requests for certificates cannot be read; agents serve with what they have meanwhile";
        if self.is_reading() { Vec::new() } else { vec![reason.to_owned()] }
    }

    fn notes(&self) -> Option<String> {
        None
    }

    fn metrics(&self) -> String {
        let gathered: Gathered = vec![
            (&BUILD, vec![labelled([env!("CARGO_PKG_VERSION")], 1)]),
            (&READY, vec![labelled([], u64::from(self.is_reading()))]),
            (&APPROVED, vec![labelled([], self.approved())]),
            (&DENIED, self.denied().map(|(reason, count)| labelled([reason], count)).collect()),
            (&FAILURES, self.failed().map(|(step, count)| labelled([step], count)).into()),
        ];
        exposition::render(gathered)
    }
}
