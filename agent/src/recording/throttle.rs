//! How many refused connections of one pod are recorded one by one: none of them costs the pod much, and each would
//! cost the journal a frame. What comes faster is counted, and the count recorded. Sans-IO.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use weir_common::event::Caller;

use super::share::Owner;

/// Events of one pod that are recorded at once.
const BURST: f64 = 100.0;
/// Events of one pod that are recorded in a second, on and on.
const PER_SECOND: f64 = 2.0;
/// Pods that are told apart; what is beyond shares one allowance.
const OWNERS_MAX: usize = 1024;

/// What is left to each pod. An event without a pod counts as one of the cgroup that it came from.
#[derive(Debug, Default)]
pub(super) struct Throttle {
    owners: Mutex<HashMap<Owner, Allowance>>,
}

#[derive(Debug)]
struct Allowance {
    /// Events that may be recorded now.
    left: f64,
    since: Instant,
    suppressed: u64,
    name: String,
}

impl Allowance {
    fn refill(&mut self, now: Instant) {
        let seconds = now.saturating_duration_since(self.since).as_secs_f64();
        self.left = seconds.mul_add(PER_SECOND, self.left).min(BURST);
        self.since = now;
    }
}

impl Throttle {
    /// Whether one more event of this caller is recorded by itself.
    pub(super) fn admits(&self, caller: Option<&Caller>, now: Instant) -> bool {
        let name = match caller {
            Some(Caller { pod: Some(pod), .. }) => format!("pod {}/{}", pod.namespace, pod.name),
            Some(caller) => format!("cgroup {}", caller.cgroup),
            None => "callers that are not known".to_owned(),
        };
        let owner = caller.map_or(Owner::Others, Owner::of);
        let mut owners = self.owners.lock().unwrap_or_else(PoisonError::into_inner);
        let full = owners.len() >= OWNERS_MAX && !owners.contains_key(&owner);
        let (owner, name) =
            if full { (Owner::Others, "callers that are not told apart".to_owned()) } else { (owner, name) };
        let allowance =
            owners.entry(owner).or_insert(Allowance { left: BURST, since: now, suppressed: 0, name });
        allowance.refill(now);
        if allowance.left < 1.0 {
            allowance.suppressed += 1;
            return false;
        }
        allowance.left -= 1.0;
        true
    }

    /// Takes whose events were not recorded since the last time, and how many; forgets who has its whole allowance again.
    pub(super) fn take(&self, now: Instant) -> Vec<(String, u64)> {
        let mut taken = Vec::new();
        let mut owners = self.owners.lock().unwrap_or_else(PoisonError::into_inner);
        owners.retain(|_, allowance| {
            allowance.refill(now);
            let suppressed = std::mem::take(&mut allowance.suppressed);
            if suppressed > 0 {
                taken.push((allowance.name.clone(), suppressed));
            }
            allowance.left < BURST
        });
        taken.sort();
        taken
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use weir_common::event::Pod;

    use super::*;

    fn caller(uid: &str) -> Caller {
        let pod = Pod { uid: uid.into(), namespace: "ci".into(), name: uid.into(), ..Pod::default() };
        Caller { pod: Some(pod), ..Caller::default() }
    }

    #[test]
    fn what_comes_too_fast_is_counted_and_no_other_pod_pays_for_it() {
        let (throttle, start) = (Throttle::default(), Instant::now());
        let admitted = (0..150).filter(|_| throttle.admits(Some(&caller("a")), start)).count();
        assert_eq!(admitted, 100);
        assert!(throttle.admits(Some(&caller("b")), start));
        assert_eq!(throttle.take(start), [("pod ci/a".to_owned(), 50)]);
        assert_eq!(throttle.take(start), [], "a count is given once");
        let later = start + Duration::from_secs(1);
        assert!(throttle.admits(Some(&caller("a")), later) && throttle.admits(Some(&caller("a")), later));
        assert!(!throttle.admits(Some(&caller("a")), later));
    }

    #[test]
    fn the_table_is_bounded_and_forgets_who_is_quiet() {
        let (throttle, start) = (Throttle::default(), Instant::now());
        for number in 0..2 * OWNERS_MAX {
            throttle.admits(Some(&caller(&number.to_string())), start);
        }
        assert_eq!(
            throttle.owners.lock().expect("not poisoned").len(),
            OWNERS_MAX + 1,
            "those beyond share one"
        );
        let suppressed = throttle.take(start + Duration::from_secs(600));
        assert_eq!(suppressed, [("callers that are not told apart".to_owned(), (OWNERS_MAX - 100) as u64)]);
        assert!(throttle.owners.lock().expect("not poisoned").is_empty());
    }
}
