//! The agents before and after this one: what is taken and given, and which process may follow.
//!
//! The socket's folder is entered by root alone. A pod that has the host's `/run` and root is root there too, so it is asked
//! as well where the process runs: outside all pods, or in a pod of the agent's own service account.

use std::{collections::HashMap, path::PathBuf, sync::Arc};

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{
    canary::Health,
    cgroup,
    cluster_watch::{KnownPod, KnownPods},
    enrolment::Enrolment,
    handover::{self, HandoverError, Taken},
    nested::Nested,
    observed::Observed,
    pod::{self, PodUid},
};
use crate::recording::Recorder;

/// The agents before and after this one.
pub(super) struct Succession {
    /// What was taken from the one before, until all of it is served.
    pub(super) taken: Option<Taken>,
    pub(super) path: Option<PathBuf>,
    /// What successors ask, once this agent is ready for one.
    pub(super) requests: Option<mpsc::Receiver<handover::Request>>,
    pub(super) frozen: watch::Sender<bool>,
    pub(super) observed: Arc<Observed>,
    pub(super) part: CancellationToken,
    pub(super) recorder: Recorder,
    pub(super) pods: watch::Receiver<KnownPods>,
    pub(super) nested: Arc<Nested>,
}

impl Succession {
    /// This agent serves all there is: the former one may go, the next one may come.
    pub(super) async fn ready(&mut self) -> Result<(), HandoverError> {
        if let Some(taken) = self.taken.take() {
            taken.complete().await?;
            self.observed.taken();
            tracing::info!(event = "handover-done", "took over from the agent that ran before");
        }
        if let Some(path) = &self.path {
            let server = handover::Server::bind(path)?;
            let (sender, requests) = mpsc::channel(1);
            let gate = Gate {
                successors: Successors::new(self.pods.clone()),
                recorder: self.recorder.clone(),
                observed: self.observed.clone(),
            };
            tokio::spawn(server.serve(sender, gate, self.part.clone()));
            self.requests = Some(requests);
        }
        Ok(())
    }

    /// The next request of a successor; waits for ever while none can come.
    pub(super) async fn request(&mut self) -> handover::Request {
        match &mut self.requests {
            Some(requests) => match requests.recv().await {
                Some(request) => request,
                None => std::future::pending().await,
            },
            None => std::future::pending().await,
        }
    }

    /// Shares the listeners and changes nothing until the successor is complete; returns whether it is.
    pub(super) async fn hand_over(&self, enrolment: &Enrolment, request: handover::Request) -> bool {
        self.frozen.send_replace(true);
        let mut completed = false;
        let mut listeners = enrolment.share();
        listeners.extend(self.nested.share());
        if request.passed.send(listeners).is_ok() {
            completed = tokio::select! {
                () = self.part.cancelled() => false,
                completed = request.completed => completed.is_ok(),
            };
        }
        if completed {
            self.observed.given();
        } else {
            self.observed.broken_off();
            self.frozen.send_replace(false);
            tracing::warn!(
                event = "handover-not-done",
                "the successor did not take over; this agent goes on"
            );
        }
        completed
    }
}

/// The pod that this process runs in; none where it runs on the host itself.
pub fn own_pod() -> Option<PodUid> {
    pod_of(std::process::id())
}

/// The pod that a process runs in.
pub fn pod_of(pid: u32) -> Option<PodUid> {
    cgroup::of_process(pid).and_then(|path| pod::parse(&path)).map(|found| found.pod)
}

/// Who may follow, and where it is said who tried.
#[derive(Debug)]
pub(super) struct Gate {
    pub(super) successors: Successors,
    pub(super) recorder: Recorder,
    pub(super) observed: Arc<Observed>,
}

impl Gate {
    /// Whether the kernel does what it was told, and what must be recorded is. That pods are served is so since there is a
    /// gate at all.
    pub(super) fn is_ready(&self) -> bool {
        self.observed.canary() == Health::Passed && self.recorder.measured().failure.is_none()
    }

    /// Why this process may not follow, or might not `before`; it is said and recorded.
    pub(super) fn refusal(&self, pid: i32, before: Option<String>) -> Option<String> {
        let reason = before.or_else(|| self.successors.refusal(u32::try_from(pid).unwrap_or(0)))?;
        tracing::error!(
            event = "handover-refused",
            pid,
            reason,
            "a process that may not be the next agent asked for the listeners"
        );
        let message = format!("process {pid} asked to take over from this agent and was refused: {reason}");
        self.recorder.finding(None, None, "successorRefused", &message);
        Some(reason)
    }
}

/// What tells an agent from others.
#[derive(Debug)]
pub(super) struct Successors {
    /// The pod that this agent runs in; none where it runs on the host itself.
    own: Option<PodUid>,
    pods: watch::Receiver<KnownPods>,
}

impl Successors {
    /// Those of this process.
    pub(super) fn new(pods: watch::Receiver<KnownPods>) -> Self {
        Self { own: own_pod(), pods }
    }

    /// Why the process with this id, as the kernel named it (0: it is in a pid namespace that is not seen from here), may not
    /// follow.
    pub(super) fn refusal(&self, pid: u32) -> Option<String> {
        let Some(path) = (pid != 0).then(|| cgroup::of_process(pid)).flatten() else {
            return Some(format!(
                "the cgroup of the process that asks ({pid}) is not seen from here; does the running agent share the host's pid namespace?"
            ));
        };
        let peer = pod::parse(&path).map(|found| found.pod);
        judge(self.own.as_ref(), peer.as_ref(), self.pods.borrow().as_deref())
    }
}

fn judge(
    own: Option<&PodUid>,
    peer: Option<&PodUid>,
    known: Option<&HashMap<PodUid, Arc<KnownPod>>>,
) -> Option<String> {
    // A process outside all pods that is root on the node needs no handover to take its listeners.
    let peer = peer?;
    if own == Some(peer) {
        return None;
    }
    let find = |uid: &PodUid| known.and_then(|known| known.get(uid));
    let name = |pod: &KnownPod| format!("{}/{}", pod.namespace, pod.name);
    let Some(found) = find(peer) else {
        return Some(format!("it runs in the pod {}, which is not known here", peer.as_str()));
    };
    let Some(own) = own.and_then(find) else {
        return Some(format!(
            "it runs in the pod {}, and the running agent in none that is known",
            name(found)
        ));
    };
    let same = own.namespace == found.namespace && own.service_account == found.service_account;
    (!same || found.mode.is_some()).then(|| {
        format!(
            "it runs in the pod {} (service account {}), not in one of {}/{}, or in one that is itself selected",
            name(found),
            found.service_account,
            own.namespace,
            own.service_account
        )
    })
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, sync::Arc};

    use super::{KnownPod, PodUid, judge};
    use crate::config::Mode;

    fn uid(digit: char) -> PodUid {
        PodUid::new(&digit.to_string()).expect("a uid")
    }

    fn pod(
        digit: char,
        (namespace, service_account): (&str, &str),
        mode: Option<Mode>,
    ) -> (PodUid, Arc<KnownPod>) {
        let pod = KnownPod {
            uid: uid(digit),
            static_hash: None,
            namespace: namespace.to_owned(),
            name: format!("pod-{digit}"),
            service_account: service_account.to_owned(),
            ip: None,
            host_network: true,
            containers: Default::default(),
            intent: Default::default(),
            labels: Arc::default(),
            mode,
        };
        (uid(digit), Arc::new(pod))
    }

    #[test]
    fn only_the_host_and_pods_like_the_agents_own_may_follow() {
        let known: HashMap<_, _> = [
            pod('a', ("weir", "weir-agent"), None),
            pod('b', ("weir", "weir-agent"), None),
            pod('c', ("weir", "default"), None),
            pod('d', ("ci", "weir-agent"), None),
            pod('e', ("weir", "weir-agent"), Some(Mode::Enforce)),
        ]
        .into();
        let refused = |own: Option<char>, peer: Option<char>| {
            judge(own.map(uid).as_ref(), peer.map(uid).as_ref(), Some(&known)).is_some()
        };
        for own in [None, Some('a')] {
            assert!(!refused(own, None), "a process of the host");
        }
        assert!(!refused(Some('a'), Some('a')), "a restart in its own pod");
        assert!(!refused(Some('a'), Some('b')), "the next pod of the DaemonSet");
        for peer in ['c', 'd', 'e', 'f'] {
            assert!(refused(Some('a'), Some(peer)), "{peer}");
        }
        assert!(refused(None, Some('b')), "an agent on the host has no pods that are like it");
        assert!(refused(Some('f'), Some('b')), "the agent's own pod is not known yet");
        assert!(judge(Some(&uid('a')), Some(&uid('b')), None).is_some(), "nothing is known yet");
    }
}
