//! How long a pod's containers may be held back.
//!
//! The runtime asks for one container after another and waits for each answer, so what one pod waits for all that start beside
//! it wait for. A pod's time therefore runs from its sandbox on, once for all its containers: where nothing can be learnt
//! of pods, those that start at a time are late together and not one after another.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

/// What a runtime allows a plugin that has said nothing of it (containerd/nri `DefaultPluginRequestTimeout`).
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
/// The longest that is made use of.
const WAIT_MAX: Duration = Duration::from_secs(5);
/// Most pods whose time is remembered; beyond it the oldest are forgotten.
const PODS_MAX: usize = 1024;
/// Longest UID that is remembered; no pod of a kubelet has a longer one.
const UID_LENGTH_MAX: usize = 64;

/// See the module.
#[derive(Debug)]
pub(super) struct Patience {
    wait: Duration,
    /// Until when a pod's containers are held back, by its UID.
    pods: HashMap<String, Instant>,
}

impl Default for Patience {
    fn default() -> Self {
        Self::of_runtime(0)
    }
}

impl Patience {
    /// As much as a runtime allows that waits so long for answers, less a quarter: past it the plugin is thrown out.
    pub(super) fn of_runtime(request_timeout_ms: i64) -> Self {
        let timeout = u64::try_from(request_timeout_ms).ok().filter(|timeout| *timeout > 0);
        let timeout = timeout.map_or(REQUEST_TIMEOUT, Duration::from_millis);
        Self { wait: (timeout * 3 / 4).min(WAIT_MAX), pods: HashMap::new() }
    }

    /// The pod has a new sandbox.
    pub(super) fn begins(&mut self, pod: &str, now: Instant) {
        if self.pods.len() >= PODS_MAX
            && let Some(oldest) =
                self.pods.iter().min_by_key(|(_, until)| **until).map(|(pod, _)| pod.clone())
        {
            self.pods.remove(&oldest);
        }
        if pod.len() <= UID_LENGTH_MAX {
            self.pods.insert(pod.to_owned(), now + self.wait);
        }
    }

    /// Until when a container of the pod is held back.
    pub(super) fn until(&mut self, pod: &str, now: Instant) -> Instant {
        if !self.pods.contains_key(pod) {
            self.begins(pod, now);
        }
        self.pods.get(pod).copied().unwrap_or(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_quarters_of_what_the_runtime_allows_are_used_within_bounds() {
        for (allowed, expected) in [(0, 1500), (-1, 1500), (2000, 1500), (400, 300), (60_000, 5000)] {
            assert_eq!(Patience::of_runtime(allowed).wait, Duration::from_millis(expected), "{allowed}");
        }
        assert_eq!(Patience::of_runtime(i64::MAX).wait, WAIT_MAX);
    }

    #[test]
    fn all_containers_of_a_sandbox_share_its_time() {
        let (mut patience, begin) = (Patience::default(), Instant::now());
        let after = |ms| begin + Duration::from_millis(ms);
        patience.begins("one", begin);
        assert_eq!(patience.until("one", after(400)), after(1500));
        assert_eq!(patience.until("one", after(9000)), after(1500), "it is over");
        patience.begins("one", after(10_000));
        assert_eq!(patience.until("one", after(10_001)), after(11_500), "of a new sandbox");
        // One whose sandbox was made while nobody was asked.
        assert_eq!(patience.until("two", after(20_000)), after(21_500));
        assert_eq!(patience.until("two", after(20_900)), after(21_500));
    }

    #[test]
    fn however_many_pods_come_few_are_remembered() {
        let (mut patience, begin) = (Patience::default(), Instant::now());
        for number in 0..2 * PODS_MAX {
            patience.begins(
                &number.to_string(),
                begin + Duration::from_millis(u64::try_from(number).expect("fits")),
            );
        }
        assert_eq!(patience.until(&"0".repeat(UID_LENGTH_MAX + 1), begin), begin, "is not remembered");
        assert_eq!(patience.pods.len(), PODS_MAX - 1);
        assert!(
            patience.pods.contains_key(&(2 * PODS_MAX - 1).to_string()) && !patience.pods.contains_key("0")
        );
    }
}
