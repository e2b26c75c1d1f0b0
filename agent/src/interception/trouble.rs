//! What keeps pods from being enrolled, said once: it is tried again each second, and a pod can bring it about by itself (it
//! takes every port of its network namespace, say).

use std::collections::{HashMap, HashSet};

use super::{
    caller::Tenant,
    pod_network::{EnrolError, name},
};
use crate::{doctor, recording::Recorder};

/// Most different troubles of one pod that are said before it is enrolled.
const MESSAGES_MAX: usize = 16;

/// What was said of the pods that are not enrolled yet, by cgroup.
#[derive(Debug, Default)]
pub(super) struct Troubles(HashMap<u64, Vec<String>>);

impl Troubles {
    /// A pod cannot be enrolled: logged and recorded, if that is new.
    pub(super) fn met(&mut self, tenant: &Tenant, error: &EnrolError, recorder: &Recorder) {
        let message = doctor::chain(error);
        if !self.is_new(tenant.cgroup, &message) {
            return;
        }
        let caller = tenant.unproven(None);
        if let EnrolError::NewInterface(_) = error {
            tracing::error!(event = "pod-interface-trouble", pod = %name(tenant), error = message, "the pod stays enrolled; its interface is tried again");
            return recorder.finding(None, Some(&caller), "unguardedInterface", &message);
        }
        tracing::error!(event = "pod-not-enrolled", pod = %name(tenant), error = message, "cannot enrol; the pod stays denied, and is tried again");
        let message = format!("cannot enrol the pod, which stays denied and is tried again: {message}");
        recorder.finding(None, Some(&caller), "cannotEnrol", &message);
    }

    /// It is enrolled, or need not be: the same trouble later is a new one.
    pub(super) fn over(&mut self, cgroup: u64) {
        self.0.remove(&cgroup);
    }

    /// Forgets all but these cgroups.
    pub(super) fn keep(&mut self, there: &HashSet<u64>) {
        self.0.retain(|cgroup, _| there.contains(cgroup));
    }

    fn is_new(&mut self, cgroup: u64, message: &str) -> bool {
        let said = self.0.entry(cgroup).or_default();
        let new = said.len() < MESSAGES_MAX && !said.iter().any(|said| said == message);
        if new {
            said.push(message.to_owned());
        }
        new
    }
}

#[cfg(test)]
mod tests {
    use super::{MESSAGES_MAX, Troubles};

    #[test]
    fn a_trouble_is_new_once_until_it_is_over() {
        let mut troubles = Troubles::default();
        assert!(troubles.is_new(1, "no port"));
        assert!(!troubles.is_new(1, "no port"));
        assert!(troubles.is_new(1, "no interface"));
        assert!(!troubles.is_new(1, "no port"), "it comes and goes");
        assert!(troubles.is_new(2, "no port"), "of another pod");
        troubles.over(1);
        assert!(troubles.is_new(1, "no port"));
        assert!(!troubles.is_new(2, "no port"));
        troubles.keep(&[1].into());
        assert!(troubles.is_new(2, "no port"), "of another pod's cgroup");
    }

    #[test]
    fn a_pods_troubles_are_bounded() {
        let mut troubles = Troubles::default();
        let new = (0..100).filter(|number| troubles.is_new(1, &number.to_string())).count();
        assert_eq!(new, MESSAGES_MAX);
    }
}
