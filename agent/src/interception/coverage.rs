//! Coverage: what the kernel counted of each pod against what its listener handed to the proxy, for the record.
//! Values in, values out; when to ask is not known here.

use std::collections::HashMap;

use weir_common::event::{Coverage, Pod, PodCoverage};

use super::counters::Counters;

/// Most pods in one event, which must stay below the size of a record.
const PODS_MAX: usize = 1000;

/// What is counted of one pod: totals, of which the kernel's are older than this process.
#[derive(Clone, Debug)]
pub(super) struct Counted {
    /// The pod.
    pub(super) pod: Pod,
    /// How its connections are treated.
    pub(super) class: &'static str,
    /// The kernel's totals.
    pub(super) kernel: Counters,
    /// Connections that its listener handed to the proxy since this process knows the pod.
    pub(super) proxied: u64,
}

/// The totals that the last event was made from.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    last: HashMap<u64, (Counters, u64)>,
}

impl Ledger {
    /// Begins to count for a cgroup: what the kernel has counted before is a former process's matter.
    pub(super) fn begin(&mut self, cgroup: u64, kernel: Counters) {
        self.last.entry(cgroup).or_insert((kernel, 0));
    }

    /// What happened since the last time; pods of which nothing did are left out, those that are gone are forgotten.
    pub(super) fn take(&mut self, interval_ms: u64, now: HashMap<u64, Counted>) -> Coverage {
        let mut last = std::mem::take(&mut self.last);
        let mut coverage = Coverage { interval_ms, ..Coverage::default() };
        for (cgroup, counted) in now {
            let (kernel, proxied) = last.remove(&cgroup).unwrap_or_default();
            let pod = difference(&counted, &kernel, proxied);
            self.last.insert(cgroup, (counted.kernel, counted.proxied));
            if pod.seen + pod.redirected + pod.proxied + pod.denied + pod.dropped > 0 {
                coverage.pods.push(pod);
            }
        }
        coverage.pods.sort_by(|one, other| one.uid.cmp(&other.uid));
        coverage.pods_left_out =
            u64::try_from(coverage.pods.len().saturating_sub(PODS_MAX)).unwrap_or(u64::MAX);
        coverage.pods.truncate(PODS_MAX);
        coverage
    }
}

fn difference(now: &Counted, then: &Counters, proxied: u64) -> PodCoverage {
    let since = |value: fn(&Counters) -> u64| value(&now.kernel).saturating_sub(value(then));
    PodCoverage {
        namespace: now.pod.namespace.clone(),
        name: now.pod.name.clone(),
        uid: now.pod.uid.clone(),
        class: now.class.to_owned(),
        seen: since(|counters| counters.seen),
        redirected: since(|counters| counters.redirected),
        proxied: now.proxied.saturating_sub(proxied),
        passed: since(|counters| counters.passed + counters.would_redirect),
        denied: since(|counters| {
            counters.denied_unknown
                + counters.denied_no_listener
                + counters.denied_kubelet
                + counters.denied_quarantined
                + counters.protocol_refused
        }),
        dropped: since(|counters| counters.guard_dropped + counters.interface_dropped),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use weir_common::event::Pod;

    use super::{Counted, Counters, Ledger};

    fn counted(seen: u64, redirected: u64, proxied: u64) -> Counted {
        let kernel = Counters { seen, redirected, denied_kubelet: seen - redirected, ..Counters::default() };
        Counted { pod: Pod { uid: "a".to_owned(), ..Pod::default() }, class: "enrolled", kernel, proxied }
    }

    fn taken(ledger: &mut Ledger, now: Option<Counted>) -> Option<[u64; 4]> {
        let now: HashMap<_, _> = now.into_iter().map(|counted| (1, counted)).collect();
        let coverage = ledger.take(1000, now);
        coverage.pods.first().map(|pod| [pod.seen, pod.redirected, pod.proxied, pod.denied])
    }

    #[test]
    fn each_event_has_what_happened_since_the_last_one() {
        let mut ledger = Ledger::default();
        ledger.begin(1, counted(10, 9, 0).kernel);
        assert_eq!(taken(&mut ledger, Some(counted(13, 11, 2))), Some([3, 2, 2, 1]));
        assert_eq!(taken(&mut ledger, Some(counted(13, 11, 2))), None, "nothing happened");
        assert_eq!(taken(&mut ledger, Some(counted(14, 12, 3))), Some([1, 1, 1, 0]));
    }

    #[test]
    fn a_pod_that_is_gone_is_forgotten() {
        let mut ledger = Ledger::default();
        assert_eq!(taken(&mut ledger, Some(counted(1, 1, 1))), Some([1, 1, 1, 0]));
        assert_eq!(taken(&mut ledger, None), None);
        assert!(ledger.last.is_empty());
    }
}
