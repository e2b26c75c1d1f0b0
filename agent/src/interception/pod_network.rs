//! What enrolment does about one pod's network beside listening: guards at its interfaces, and an end to what it had
//! connected before.

use std::{collections::BTreeSet, fs::File, sync::Arc};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    accept::Sink,
    caller::Tenant,
    cgroup_tree::PodFolder,
    enrolment::Tenants,
    interface::{self, HostEnd, Interfaces},
    listener::ListenerError,
    loader::{Kernel, KernelError},
    namespace::{self, NamespaceId},
    sockets,
};

/// Most names of interfaces of one pod that are reported, while an agent runs.
const UNGUARDED_MAX: usize = 16;

/// What is known of a pod's interfaces.
#[derive(Clone, Debug, Default)]
pub(super) struct PodInterfaces {
    /// The host's ends, which are guarded. They stay so until the pod is gone: which namespace is the pod's is read from
    /// processes that the pod makes.
    pub(super) guarded: Vec<HostEnd>,
    /// Names of those without one that were reported.
    reported: BTreeSet<String>,
}

impl PodInterfaces {
    /// Guards those that are there now, and reports those that have no end on the host, each name once.
    pub(super) fn guard(
        &mut self,
        sink: &Sink,
        cgroup: u64,
        tenant: &watch::Sender<Arc<Tenant>>,
        found: Interfaces,
    ) -> Result<(), EnrolError> {
        // One that cannot be guarded leaves no other without.
        let mut guarded = Ok(());
        for end in found.guardable {
            // Once is enough, and where the kernel has no links for interfaces twice would leave a gap.
            let is_known = self.guarded.contains(&end);
            if is_known && sink.kernel.guards_interface(end.index, cgroup) {
                continue;
            }
            match sink.kernel.guard_interface(&end, cgroup) {
                Ok(()) if is_known => {}
                Ok(()) => self.guarded.push(end),
                Err(error) => guarded = guarded.and(Err(error)),
            }
        }
        let tenant = tenant.borrow().clone();
        for interface in found.unguarded {
            // A pod that may make interfaces could otherwise fill the journal with their names.
            if self.reported.len() == UNGUARDED_MAX || !self.reported.insert(interface.clone()) {
                continue;
            }
            let message = format!(
                "interface {interface} of the pod has no end on the host that can be guarded: a process with NET_RAW could reach an API server through it; drop that capability, or use a bridge, ptp or VPC CNI network"
            );
            tracing::warn!(event = "interface-unguarded", pod = %name(&tenant), interface, "interface cannot be guarded");
            sink.recorder.finding(None, Some(&tenant.unproven(None)), "unguardedInterface", &message);
        }
        Ok(guarded?)
    }

    /// Whether all that were guarded are still guarded as this pod's.
    pub(super) fn are_guarded(&self, kernel: &Kernel, cgroup: u64) -> bool {
        self.guarded.iter().all(|end| kernel.guards_interface(end.index, cgroup))
    }
}

/// Guards the interfaces of a pod that has no verdict yet: its sockets are denied, and so must be what passes them. None
/// if it has none yet.
pub(super) async fn guard_stranger(
    sink: &Sink,
    folder: &PodFolder,
    host: NamespaceId,
) -> Option<Vec<HostEnd>> {
    let (kernel, of_pod) = (sink.kernel.clone(), folder.clone());
    let guarded = blocking(move || guard_unknown(&kernel, &of_pod, host, |_| true)).await;
    match guarded.map_err(EnrolError::from).and_then(|guarded| guarded) {
        Ok(ends) => (!ends.is_empty()).then_some(ends),
        Err(error) => {
            report_unguarded(folder, &error);
            None
        }
    }
}

/// The same without an agent, and what guards an interface already stays.
pub(super) fn guard_strangers(kernel: &Kernel, pods: &[PodFolder], host: NamespaceId) {
    for folder in pods {
        let is_unguarded = |end: &HostEnd| !kernel.guards_interface(end.index, folder.cgroup);
        if let Err(error) = guard_unknown(kernel, folder, host, is_unguarded) {
            report_unguarded(folder, &error);
        }
    }
}

/// Guards those of a pod's interfaces that are wanted, and returns them.
fn guard_unknown(
    kernel: &Kernel,
    folder: &PodFolder,
    host: NamespaceId,
    is_wanted: impl Fn(&HostEnd) -> bool,
) -> Result<Vec<HostEnd>, EnrolError> {
    let Some(namespace) = namespace::of_pod(&folder.path, host) else { return Ok(Vec::new()) };
    let mut ends = interface::of_pod(&namespace.file).map_err(EnrolError::Interfaces)?.guardable;
    ends.retain(is_wanted);
    let guarded: Vec<_> = ends.iter().map(|end| kernel.guard_interface(end, folder.cgroup)).collect();
    guarded.into_iter().collect::<Result<(), _>>()?;
    Ok(ends)
}

fn report_unguarded(folder: &PodFolder, error: &EnrolError) {
    let error = error as &dyn std::error::Error;
    tracing::warn!(
        event = "interface-unguarded",
        pod = folder.uid.as_str(),
        error,
        "cannot guard the interface of a pod that is not known yet"
    );
}

/// Ends the pod's direct connections to the API set, which it has from before (`since` says what). The guard stalls them
/// already; ended, the client connects anew and is redirected.
pub(super) async fn end_direct_connections(
    sink: &Sink,
    tenant: &Arc<Tenant>,
    namespace: Option<File>,
    since: &str,
) -> Result<(), EnrolError> {
    let (kernel, path) = (sink.kernel.clone(), tenant.folder.clone());
    let ended = blocking(move || {
        // In the host's network namespace are others' connections as well.
        let own = namespace.is_none().then(|| sockets::cgroups_of(&path));
        sockets::destroy(namespace.as_ref(), |connection| {
            let its_own = match &own {
                None => true,
                Some(own) => connection.cgroup.is_some_and(|cgroup| own.contains(&cgroup)),
            };
            its_own && kernel.is_api_endpoint(connection.peer)
        })
    })
    .await?;
    match ended {
        Ok(0) => {}
        Ok(count) => {
            tracing::info!(event = "direct-connections-ended", pod = %name(tenant), count, since, "ended direct connections to API servers");
            let message =
                format!("ended {count} connections to API servers that the pod made before {since}");
            sink.recorder.finding(None, Some(&tenant.unproven(None)), "directConnectionsEnded", &message);
        }
        // Stalled they are harmless; only their clients wait longer.
        Err(error) => {
            tracing::warn!(event = "direct-connections-stalled", pod = %name(tenant), %error, since, "cannot end direct connections to API servers; they are stalled (does the kernel have CONFIG_INET_DIAG_DESTROY?)");
        }
    }
    Ok(())
}

/// Does so for every enrolled pod whenever an address has come into the API set, until cancelled: one that was quicker
/// than the agent to learn a new address must not keep what it has opened.
pub(super) async fn end_direct_connections_of_all(
    sink: Sink,
    host: NamespaceId,
    tenants: Tenants,
    mut grown: watch::Receiver<()>,
    cancellation: CancellationToken,
) {
    loop {
        tokio::select! {
            () = cancellation.cancelled() => return,
            changed = grown.changed() => if changed.is_err() {
                return cancellation.cancelled().await;
            },
        }
        let all = tenants.borrow().clone();
        let enrolled = match sink.kernel.enrolled() {
            Ok(enrolled) => enrolled,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::error!(
                    event = "direct-connections-stalled",
                    error,
                    "cannot end direct connections to new API servers; they are stalled"
                );
                continue;
            }
        };
        for tenant in all.values().filter(|tenant| enrolled.contains(&tenant.cgroup)) {
            let path = tenant.folder.clone();
            let found = blocking(move || namespace::of_pod(&path, host)).await;
            let namespace = found.ok().flatten().map(|found| found.file);
            let since = "their address was known as an API server's";
            if let Err(error) = end_direct_connections(&sink, tenant, namespace, since).await {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(event = "direct-connections-stalled", pod = %name(tenant), error, "cannot end direct connections to new API servers; they are stalled");
            }
        }
    }
}

/// Why one pod cannot be enrolled now.
#[derive(Debug, thiserror::Error)]
pub(super) enum EnrolError {
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(transparent)]
    Listener(#[from] ListenerError),
    #[error("cannot read the pod's network interfaces")]
    Interfaces(#[source] std::io::Error),
    #[error(
        "an interface that the pod was given cannot be guarded; frames of a process with NET_RAW may go past Weir there"
    )]
    NewInterface(#[source] Box<Self>),
    #[error("a task panicked")]
    Task(#[from] tokio::task::JoinError),
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, tokio::task::JoinError> {
    tokio::task::spawn_blocking(work).await
}

/// `NAMESPACE/NAME`, for the log.
pub(super) fn name(tenant: &Tenant) -> String {
    tenant.pod.as_ref().map(|pod| format!("{}/{}", pod.namespace, pod.name)).unwrap_or_default()
}
