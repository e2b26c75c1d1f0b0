//! Containers are held back until their pod has everything that their first instruction needs.
//!
//! What the container runtime says of a pod makes the agent look, at its cgroup and for its object; whether it is enrolled is for
//! `enrolment` alone to say, in `settled`. A pod that has no verdict in time starts, and the kernel denies it.

use std::{fs, os::unix::fs::MetadataExt as _, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

use super::{
    cluster_watch::KnownPods,
    namespace::NamespaceId,
    observed::Observed,
    pod::{PodUid, is_below_kubepods},
    pod_lookup::NamedPod,
    settled::Settled,
    waits::Release,
};
use crate::nri::{Asked, Sandbox};

/// See the module.
pub(super) struct HeldBack {
    pub(super) settled: Arc<Settled>,
    pub(super) known: watch::Receiver<KnownPods>,
    /// Pods that the API server is to be asked for.
    pub(super) named: mpsc::Sender<NamedPod>,
    pub(super) observed: Arc<Observed>,
    /// While a successor takes over it is the one to wait for, which is asked as well.
    pub(super) frozen: watch::Receiver<bool>,
}

impl Asked for HeldBack {
    fn asks(&self, asks: Result<(), String>) {
        self.observed.waits.asks(asks);
    }

    fn sandbox_runs(&self, sandbox: &Sandbox) {
        if let Some(pod) = of_kubelet(sandbox) {
            self.look(&pod, namespace(sandbox), sandbox);
        }
    }

    fn container_starts(
        &self,
        sandbox: &Sandbox,
        until: Instant,
    ) -> Option<impl Future<Output = ()> + Send + use<'_>> {
        let asked = Instant::now();
        let Some(pod) = of_kubelet(sandbox).filter(|_| !*self.frozen.borrow()) else {
            self.observed.waits.released(Release::NotOurs, Duration::ZERO);
            return None;
        };
        let namespace = namespace(sandbox);
        if self.look(&pod, namespace, sandbox) {
            self.observed.waits.released(Release::Settled, asked.elapsed());
            return None;
        }
        Some(self.wait(pod, namespace, asked, until))
    }
}

impl HeldBack {
    /// Has a pod looked at, and asked for if nobody knows it; returns whether it has everything.
    fn look(&self, pod: &PodUid, namespace: Option<NamespaceId>, sandbox: &Sandbox) -> bool {
        let settled = self.settled.ask(pod, namespace);
        // Before the first list there is nothing to ask for: that has it.
        let unknown = self.known.borrow().as_ref().is_some_and(|known| !known.contains_key(pod));
        if !settled
            && unknown
            && let Some(named) = NamedPod::new(&sandbox.namespace, &sandbox.name, pod)
            && self.named.try_send(named).is_ok()
        {
            self.observed.waits.looked_up();
        }
        settled
    }

    /// Waits until a pod has everything, or until it is time to let it go.
    async fn wait(&self, pod: PodUid, namespace: Option<NamespaceId>, asked: Instant, until: Instant) {
        let mut frozen = self.frozen.clone();
        let released = tokio::select! {
            biased;
            () = self.settled.wait(&pod, namespace) => Release::Settled,
            _ = frozen.wait_for(|frozen| *frozen) => Release::NotOurs,
            () = tokio::time::sleep_until(until) => Release::TimedOut,
        };
        let waited = asked.elapsed();
        self.observed.waits.released(released, waited);
        if released == Release::TimedOut {
            tracing::warn!(
                event = "container-starts-early",
                uid = pod.as_str(),
                waited_ms = waited.as_millis(),
                "a container starts before its pod has its verdict; it is denied the API until then"
            );
        }
    }
}

/// The pod of a kubelet; none for sandboxes that others make (`crictl`, say), which have no object to wait for.
fn of_kubelet(sandbox: &Sandbox) -> Option<PodUid> {
    let parent = sandbox.linux.as_ref().map_or("", |linux| linux.cgroup_parent.as_str());
    let of_kubelet = parent.is_empty() || is_below_kubepods(parent);
    PodUid::new(&sandbox.uid).filter(|_| of_kubelet)
}

/// The network namespace of a sandbox, by its process.
fn namespace(sandbox: &Sandbox) -> Option<NamespaceId> {
    let pid = Some(sandbox.pid).filter(|pid| *pid != 0)?;
    let metadata = fs::metadata(format!("/proc/{pid}/ns/net")).ok()?;
    Some((metadata.dev(), metadata.ino()))
}
