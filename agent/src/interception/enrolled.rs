//! One pod that is known: its verdict, and the listener of an enrolled one, from its network namespace to the kernel's map.
//! Which pods there are, and what becomes of what is accepted, is the matter of `enrolment`.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::AtomicU64},
};

use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;
use weir_common::{
    event,
    kernel::{CgroupEntry, Class},
};

use super::{
    accept::Sink,
    caller::Tenant,
    cgroup_tree::PodFolder,
    cluster_watch::KnownPod,
    handover::Passed,
    interface,
    listener::{Listener, Namespace},
    namespace::{self, NamespaceId},
    netlink::LinkWatch,
    pod::PodUid,
    pod_network::{EnrolError, PodInterfaces, blocking, end_direct_connections, name},
};

/// A pod whose cgroup is there and whose verdict is known.
pub(super) struct Enrolled {
    pub(super) class: Class,
    pub(super) host_network: bool,
    pub(super) tenant: watch::Sender<Arc<Tenant>>,
    pub(super) listening: Option<Listening>,
    /// Connections that reached the proxy.
    pub(super) proxied: Arc<AtomicU64>,
    /// Its interfaces.
    pub(super) interfaces: PodInterfaces,
}

pub(super) struct Listening {
    pub(super) namespace: NamespaceId,
    /// When the namespace was last found to be the pod's, and the links of the pod's folder then.
    pub(super) found: (Instant, u64),
    /// Tells when the pod is given an interface; none in the host's network namespace.
    links: Option<LinkWatch>,
    /// Whether it was, and that is not seen to yet.
    links_changed: bool,
    /// Kept to be shared with a successor.
    pub(super) listener: Arc<Listener>,
    pub(super) end: CancellationToken,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.end.cancel();
    }
}

/// One enrolled pod whose listener is seen to, beside those of others: most of it is waiting for threads that enter its
/// network namespace.
pub(super) struct Step {
    pub(super) folder: PodFolder,
    pub(super) pod: Enrolled,
    pub(super) adopted: Option<Passed>,
    /// Ends its listener.
    pub(super) end: CancellationToken,
}

/// What came of it.
pub(super) enum Outcome {
    /// The pod waits for its network namespace.
    Waits,
    /// It has the listener that it had.
    Same,
    /// It has a new one.
    Listens,
}

impl Step {
    /// Takes it; gives the pod back, and a listener that was passed if it is not in use yet.
    pub(super) async fn take(mut self, sink: Sink, host: NamespaceId) -> (Self, Result<Outcome, EnrolError>) {
        let outcome = self.listen(&sink, host).await;
        (self, outcome)
    }

    async fn listen(&mut self, sink: &Sink, host: NamespaceId) -> Result<Outcome, EnrolError> {
        let (folder, pod) = (&self.folder, &mut self.pod);
        let looked = (Instant::now(), folder.links);
        let path = folder.path.clone();
        let namespace = if pod.host_network {
            (Namespace::Own, host)
        } else {
            match blocking(move || namespace::of_pod(&path, host)).await? {
                Some(found) => (Namespace::Of(found.file), found.id),
                // Between two sandboxes of a pod, the old one's listener is as good as none.
                None => return Ok(Outcome::Waits),
            }
        };
        if let Some(listening) = &mut pod.listening
            && listening.namespace == namespace.1
        {
            listening.found = looked;
            listening.links_changed |= listening.links.as_ref().is_some_and(LinkWatch::changed)
                || !pod.interfaces.are_guarded(&sink.kernel, folder.cgroup);
            if listening.links_changed
                && let Namespace::Of(file) = namespace.0
            {
                let found = read(move || interface::of_pod(&file)).await;
                found
                    .and_then(|found| pod.interfaces.guard(sink, folder.cgroup, &pod.tenant, found))
                    .map_err(|error| EnrolError::NewInterface(Box::new(error)))?;
                listening.links_changed = false;
            }
            return Ok(Outcome::Same);
        }
        let (file, links) = match &namespace.0 {
            Namespace::Own => (None, None),
            Namespace::Of(file) => {
                let of_pod = file.try_clone().map_err(EnrolError::Interfaces)?;
                let (links, found) = read(move || interface::watch_pod(&of_pod)).await?;
                pod.interfaces.guard(sink, folder.cgroup, &pod.tenant, found)?;
                (Some(file.try_clone().map_err(EnrolError::Interfaces)?), Some(links))
            }
        };
        let adopted = self.adopted.take().filter(|passed| passed.namespace == namespace.1);
        let listener = Arc::new(match adopted {
            Some(passed) => Listener::of_sockets(passed.sockets)?,
            None => blocking(move || Listener::in_netns(namespace.0)).await??,
        });
        sink.kernel.classify(folder.cgroup, entry(Class::Enrolled, Some(&listener)))?;
        let current = pod.tenant.borrow().clone();
        end_direct_connections(sink, &current, file, "it was enrolled").await?;
        tracing::info!(event = "pod-enrolled", pod = %name(&pod.tenant.borrow()), port = listener.port(), "pod is enrolled");
        // Ends the listener of a former sandbox, if there was one.
        let end = self.end.clone();
        pod.listening = Some(Listening {
            namespace: namespace.1,
            found: looked,
            links,
            links_changed: false,
            listener,
            end,
        });
        Ok(Outcome::Listens)
    }
}

/// Reads a pod's interfaces beside what runs.
async fn read<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, EnrolError> {
    blocking(work).await?.map_err(EnrolError::Interfaces)
}

pub(super) fn entry(class: Class, listener: Option<&Listener>) -> CgroupEntry {
    CgroupEntry {
        listener_netns: listener.map_or(0, Listener::netns),
        class: class as u32,
        listener_port: listener.map_or(0, |listener| u32::from(listener.port())),
    }
}

/// The pod of a folder, if it can have its verdict now: one that is selected has nobody to go to before somebody `serves`.
pub(super) fn due<'a>(
    known: &'a HashMap<PodUid, Arc<KnownPod>>,
    folder: &PodFolder,
    serves: bool,
) -> Option<&'a Arc<KnownPod>> {
    known.get(&folder.uid).filter(|pod| serves || pod.mode.is_none())
}

/// Whom connections from a pod are attributed to.
pub(super) fn tenant(folder: &PodFolder, known: &KnownPod) -> Tenant {
    Tenant {
        cgroup: folder.cgroup,
        folder: folder.path.clone(),
        pod: Some(event::Pod {
            namespace: known.namespace.clone(),
            name: known.name.clone(),
            uid: known.uid.as_str().to_owned(),
            service_account: known.service_account.clone(),
            ip: known.ip.map(|ip| ip.to_string()),
            intent: known.intent.clone(),
        }),
        containers: known.containers.clone(),
        labels: known.labels.clone(),
    }
}
