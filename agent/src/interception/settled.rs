//! Which pods have everything that their first instruction needs: a verdict, and an enrolled one its listener.
//!
//! `enrolment` alone writes it; whoever holds a container back waits for it here. A pod is named as its cgroup names it.

use std::{
    collections::{HashMap, HashSet},
    sync::{Mutex, PoisonError},
};

use tokio::sync::{Notify, watch};

use super::{namespace::NamespaceId, pod::PodUid};

/// What a pod has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// A verdict that needs no listener.
    WithoutListener,
    /// A listener, in this network namespace.
    Listens(NamespaceId),
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Settled {
    pods: watch::Sender<HashMap<PodUid, Verdict>>,
    /// Pods to be looked at, however lately they were. Each pass of `enrolment` takes them all.
    wanted: Mutex<HashSet<PodUid>>,
    asked: Notify,
}

impl Settled {
    /// The pod has this from now on; none: nothing that can be relied on.
    pub(super) fn set(&self, pod: &PodUid, verdict: Option<Verdict>) {
        self.pods.send_if_modified(|pods| match verdict {
            Some(verdict) => pods.insert(pod.clone(), verdict) != Some(verdict),
            // Nobody waits for less.
            None => {
                pods.remove(pod);
                false
            }
        });
    }

    /// The pods that somebody wants to be looked at.
    pub(super) fn take_wanted(&self) -> HashSet<PodUid> {
        std::mem::take(&mut *self.wanted.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Returns when somebody wants the pods to be looked at now.
    pub(super) async fn asked(&self) {
        self.asked.notified().await;
    }

    /// Wants a pod to be looked at now, of which this is the network namespace if it can be told; returns whether it has
    /// everything already.
    pub(super) fn ask(&self, pod: &PodUid, namespace: Option<NamespaceId>) -> bool {
        let verdict = self.pods.borrow().get(pod).copied();
        let settled = verdict.is_some_and(|verdict| verdict.serves(namespace));
        if !settled {
            self.wanted.lock().unwrap_or_else(PoisonError::into_inner).insert(pod.clone());
            self.asked.notify_one();
        }
        settled
    }

    /// Waits until the pod has everything, for as long as it takes.
    pub(super) async fn wait(&self, pod: &PodUid, namespace: Option<NamespaceId>) {
        let serves =
            |pods: &HashMap<_, Verdict>| pods.get(pod).is_some_and(|verdict| verdict.serves(namespace));
        let mut pods = self.pods.subscribe();
        if pods.wait_for(serves).await.is_err() {
            // The sender is here.
            std::future::pending().await
        }
    }
}

impl Verdict {
    fn serves(self, namespace: Option<NamespaceId>) -> bool {
        match self {
            Self::WithoutListener => true,
            Self::Listens(own) => namespace.is_none_or(|namespace| namespace == own),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::{Settled, Verdict};
    use crate::interception::pod::PodUid;

    fn pod() -> PodUid {
        PodUid::new("0b5e2f6a-3c1d-4e5f-8a9b-0c1d2e3f4a5b").expect("a UID")
    }

    #[test]
    fn a_pod_waits_for_the_listener_of_its_own_sandbox() {
        let (settled, pod) = (Settled::default(), pod());
        settled.set(&pod, Some(Verdict::Listens((4, 1))));
        assert!(settled.ask(&pod, Some((4, 1))) && settled.ask(&pod, None));
        assert!(settled.asked().now_or_never().is_none(), "nothing to look at");
        assert!(settled.take_wanted().is_empty());
        // A new sandbox: the old one's listener is as good as none, and the pod is looked at again.
        assert!(!settled.ask(&pod, Some((4, 2))));
        assert!(settled.asked().now_or_never().is_some());
        assert!(settled.take_wanted().contains(&pod) && settled.take_wanted().is_empty());
        let mut wait = Box::pin(settled.wait(&pod, Some((4, 2))));
        assert!(wait.as_mut().now_or_never().is_none());
        settled.set(&pod, Some(Verdict::Listens((4, 1))));
        assert!(wait.as_mut().now_or_never().is_none());
        settled.set(&pod, Some(Verdict::Listens((4, 2))));
        assert!(wait.now_or_never().is_some());
    }

    #[test]
    fn a_verdict_without_a_listener_is_good_for_every_sandbox() {
        let (settled, pod) = (Settled::default(), pod());
        assert!(!settled.ask(&pod, None), "is not known");
        settled.set(&pod, Some(Verdict::WithoutListener));
        assert!(settled.ask(&pod, Some((4, 9))));
        settled.set(&pod, None);
        assert!(!settled.ask(&pod, Some((4, 9))));
    }
}
