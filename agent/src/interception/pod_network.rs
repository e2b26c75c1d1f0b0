//! What enrolment does about one pod's network beside listening: guards at its interfaces, and an end to what it had
//! connected before.

use std::{fs::File, sync::Arc};

use tokio::sync::watch;

use super::{
    accept::Sink,
    caller::Tenant,
    cgroup_tree::PodFolder,
    interface::{self, HostEnd},
    listener::ListenerError,
    loader::KernelError,
    namespace::{self, NamespaceId},
    sockets,
};

/// Guards the host's ends of a pod's interfaces, and reports those that have none.
pub(super) async fn guard_interfaces(
    sink: &Sink,
    cgroup: u64,
    tenant: &watch::Sender<Arc<Tenant>>,
    namespace: &File,
) -> Result<Vec<HostEnd>, EnrolError> {
    let file = namespace.try_clone().map_err(EnrolError::Interfaces)?;
    let found = blocking(move || interface::of_pod(&file)).await?.map_err(EnrolError::Interfaces)?;
    for end in &found.guardable {
        sink.kernel.guard_interface(end, cgroup)?;
    }
    let tenant = tenant.borrow().clone();
    for interface in found.unguarded {
        let message = format!(
            "interface {interface} of the pod has no end on the host that can be guarded: a process with NET_RAW could reach an API server through it; drop that capability, or use a bridge, ptp or VPC CNI network"
        );
        tracing::warn!(pod = %name(&tenant), interface, "interface cannot be guarded");
        sink.recorder.finding(None, Some(&tenant.unproven(None)), "unguardedInterface", &message);
    }
    Ok(found.guardable)
}

/// Guards the interfaces of a pod that has no verdict yet: its sockets are denied, and so must be what passes them. None
/// if it has none yet.
pub(super) async fn guard_stranger(
    sink: &Sink,
    folder: &PodFolder,
    host: NamespaceId,
) -> Option<Vec<HostEnd>> {
    let path = folder.path.clone();
    let found = blocking(move || {
        let namespace = namespace::of_pod(&path, host)?;
        Some(interface::of_pod(&namespace.file))
    });
    let guarded = found.await.ok()??.map_err(EnrolError::Interfaces).and_then(|found| {
        found.guardable.iter().try_for_each(|end| sink.kernel.guard_interface(end, folder.cgroup))?;
        Ok(found.guardable)
    });
    match guarded {
        Ok(ends) => (!ends.is_empty()).then_some(ends),
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(
                pod = folder.uid.as_str(),
                error,
                "cannot guard the interface of a pod that is not known yet"
            );
            None
        }
    }
}

/// Ends the pod's connections to the API set from before it was enrolled. The guard stalls them already; ended, the
/// client connects anew and is redirected.
pub(super) async fn end_direct_connections(
    sink: &Sink,
    folder: &PodFolder,
    tenant: &watch::Sender<Arc<Tenant>>,
    namespace: Option<File>,
) -> Result<(), EnrolError> {
    let (kernel, path) = (sink.kernel.clone(), folder.path.clone());
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
            let tenant = tenant.borrow().clone();
            tracing::info!(pod = %name(&tenant), count, "ended connections from before the enrolment");
            let message =
                format!("ended {count} connections to API servers that the pod made before it was enrolled");
            sink.recorder.finding(None, Some(&tenant.unproven(None)), "directConnectionsEnded", &message);
        }
        // Stalled they are harmless; only their clients wait longer.
        Err(error) => {
            tracing::warn!(pod = %name(&tenant.borrow()), %error, "cannot end connections from before the enrolment; they are stalled (does the kernel have CONFIG_INET_DIAG_DESTROY?)");
        }
    }
    Ok(())
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
