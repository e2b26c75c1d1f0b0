//! Network namespaces that an enrolled pod has made inside itself, as docker-in-docker does for its containers.
//!
//! The kernel denies their connections to API servers and says so; the one who was denied is found by that notice, and from
//! then on there is a listener in its namespace as well. What a connection is judged by stays the cgroup: a namespace of
//! another pod, or the host's, gets none. Where the listeners are is in the kernel's map `NESTED`, which outlives the agent as
//! the listeners of pods do: until the next one is there, connections are sent to a port where nobody listens.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    os::unix::fs::MetadataExt as _,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use weir_common::kernel::{NestedKey, Notice};

use super::{
    accept,
    beside::Beside,
    caller::Tenant,
    handover::Passed,
    listener::{Listener, Namespace},
    namespace::{self, NamespaceId},
    pod_network::{EnrolError, blocking, name},
};

/// Most listeners in namespaces of one pod's own; connections in more of them stay denied.
const OF_ONE_POD_MAX: usize = 16;
/// Most denied connections that wait to be looked at; further ones are passed over: clients try again.
pub(super) const WANTED_MAX: usize = 64;
/// How often it is looked whether a process is left in each namespace: a listener would keep it for ever.
const CHECK: Duration = Duration::from_secs(30);

/// A connection that was denied because its namespace has no listener.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    key: NestedKey,
    tgid: u32,
}

impl Wanted {
    /// Of the kernel's notice.
    pub(super) fn of(notice: &Notice) -> Self {
        let flow = &notice.flow;
        Self { key: NestedKey { cgroup: flow.pod_cgroup, netns: flow.netns }, tgid: flow.tgid }
    }
}

/// A listener in such a namespace.
#[derive(Debug)]
struct Listening {
    namespace: NamespaceId,
    listener: Arc<Listener>,
    tenant: watch::Sender<Arc<Tenant>>,
    end: CancellationToken,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.end.cancel();
    }
}

/// All of them. Shared with whoever hands over.
#[derive(Debug, Default)]
pub(super) struct Nested(Mutex<HashMap<NestedKey, Listening>>);

impl Nested {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<NestedKey, Listening>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The listeners, for a successor.
    pub(super) fn share(&self) -> Vec<Passed> {
        let all = self.lock();
        let passed = all.iter().filter_map(|(key, listening)| {
            let sockets = listening.listener.share().ok()?;
            Some(Passed { cgroup: key.cgroup, namespace: listening.namespace, nested: true, sockets })
        });
        passed.collect()
    }

    /// Serves those that were passed, and listens where it is wanted, until cancelled.
    pub(super) async fn follow(
        self: Arc<Self>,
        mut part: Beside,
        passed: Vec<Passed>,
        mut wanted: mpsc::Receiver<Wanted>,
    ) {
        let mut serving = JoinSet::new();
        let mut pending = self.adopt(&part, passed);
        let mut check = tokio::time::interval(CHECK);
        loop {
            while serving.try_join_next().is_some() {}
            let tenants = part.tenants.borrow_and_update().clone();
            pending.retain(|(key, namespace, listener)| {
                let Some(tenant) = tenants.get(&key.cgroup) else { return true };
                self.serve(&part, (*key, *namespace), (listener.clone(), tenant), &mut serving);
                false
            });
            tokio::select! {
                () = part.cancellation.cancelled() => break,
                Ok(()) = part.tenants.changed() => self.update(&part),
                _ = check.tick() => self.end_abandoned(&part).await,
                Some(wanted) = wanted.recv() => self.listen(&part, wanted, &mut serving).await,
            }
        }
        self.lock().clear();
        while serving.join_next().await.is_some() {}
    }

    /// Takes over the former agent's listeners; entries of any others lead nowhere and are removed.
    fn adopt(&self, part: &Beside, passed: Vec<Passed>) -> Vec<(NestedKey, NamespaceId, Arc<Listener>)> {
        let mut adopted = Vec::with_capacity(passed.len());
        for passed in passed {
            match Listener::of_sockets(passed.sockets) {
                Ok(listener) => {
                    let key = NestedKey { cgroup: passed.cgroup, netns: listener.netns() };
                    adopted.push((key, passed.namespace, Arc::new(listener)));
                }
                Err(error) => {
                    tracing::warn!(event = "nested-listener-not-taken-over", %error, "cannot take over a listener in a pod's own network namespace")
                }
            }
        }
        let keys: HashSet<_> = adopted.iter().map(|(key, ..)| *key).collect();
        if let Err(error) = part.sink.kernel.keep_nested(|key| keys.contains(key)) {
            let error = &error as &dyn std::error::Error;
            tracing::error!(
                event = "nested-unserved",
                error,
                "pods' own network namespaces are sent to where nobody listens; they are denied"
            );
        }
        adopted
    }

    fn serve(
        &self,
        part: &Beside,
        (key, namespace): (NestedKey, NamespaceId),
        (listener, tenant): (Arc<Listener>, &Arc<Tenant>),
        serving: &mut JoinSet<()>,
    ) {
        let sink = &part.sink;
        let end = part.cancellation.child_token();
        let (sender, receiver) = watch::channel(tenant.clone());
        let proxied = sink.observed.counter_of(tenant.pod.as_ref().map_or("", |pod| &pod.uid));
        serving.spawn(accept::serve(listener.clone(), receiver, proxied, sink.clone(), end.clone()));
        self.lock().insert(key, Listening { namespace, listener, tenant: sender, end });
    }

    /// Listens where a connection was denied, if that namespace is the pod's own.
    async fn listen(&self, part: &Beside, wanted: Wanted, serving: &mut JoinSet<()>) {
        let key = wanted.key;
        let Some(tenant) = part.tenants.borrow().get(&key.cgroup).cloned() else { return };
        let (is_there, of_pod) = {
            let all = self.lock();
            (all.contains_key(&key), all.keys().filter(|other| other.cgroup == key.cgroup).count())
        };
        if is_there || *part.frozen.borrow() || of_pod >= OF_ONE_POD_MAX {
            return;
        }
        match self.try_listen(part, wanted, &tenant).await {
            Ok(None) => {}
            Ok(Some((namespace, listener))) => {
                let message = format!(
                    "listens in a network namespace that the pod has made in itself (process {}): it was denied there, and is served from now on",
                    wanted.tgid
                );
                tracing::info!(event = "nested-listens", pod = %name(&tenant), pid = wanted.tgid, port = listener.port(), "listens in a pod's own network namespace");
                part.sink.recorder.finding(None, Some(&tenant.unproven(None)), "nestedNetwork", &message);
                self.serve(part, (key, namespace), (Arc::new(listener), &tenant), serving);
            }
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(event = "nested-not-enrolled", pod = %name(&tenant), error, "cannot listen in a pod's own network namespace, which stays denied");
            }
        }
    }

    async fn try_listen(
        &self,
        part: &Beside,
        wanted: Wanted,
        tenant: &Tenant,
    ) -> Result<Option<(NamespaceId, Listener)>, EnrolError> {
        let kernel = &part.sink.kernel;
        if !kernel.is_enrolled(wanted.key.cgroup)? {
            return Ok(None);
        }
        let Ok(file) = File::open(format!("/proc/{}/ns/net", wanted.tgid)) else { return Ok(None) };
        let namespace = id(&file).map_err(EnrolError::Interfaces)?;
        let tenants = part.tenants.borrow().clone();
        let (own, host) = (tenant.cgroup, part.host);
        // The pod's own namespace has a listener, or gets one by enrolment; another pod's is no place for this one.
        let is_a_pods = blocking(move || {
            let of = |tenant: &Tenant| namespace::of_pod(&tenant.folder, host).map(|found| found.id);
            // All others only if need be: that takes reading the processes of every pod.
            namespace == host
                || tenants.get(&own).is_some_and(|tenant| of(tenant) == Some(namespace))
                || tenants.values().any(|tenant| tenant.cgroup != own && of(tenant) == Some(namespace))
        })
        .await?;
        if is_a_pods {
            return Ok(None);
        }
        let listener = blocking(move || Listener::in_netns(Namespace::Of(file))).await??;
        // The process may be another one by now: what the kernel named is the namespace.
        if listener.netns() != wanted.key.netns {
            return Ok(None);
        }
        kernel.nest(wanted.key, listener.port())?;
        Ok(Some((namespace, listener)))
    }

    /// Brings what is known of the pods up to date, and ends the listeners of those that are not there or not enrolled any more.
    fn update(&self, part: &Beside) {
        if *part.frozen.borrow() {
            return;
        }
        let tenants = part.tenants.borrow().clone();
        self.end(part, |key, listening| match tenants.get(&key.cgroup) {
            Some(tenant) if part.sink.kernel.is_enrolled(key.cgroup).unwrap_or(true) => {
                listening.tenant.send_replace(tenant.clone());
                false
            }
            _ => true,
        });
    }

    /// Ends those in whose namespace no process is left.
    async fn end_abandoned(&self, part: &Beside) {
        if *part.frozen.borrow() || self.lock().is_empty() {
            return;
        }
        let Ok(inhabited) = blocking(inhabited).await else { return };
        self.end(part, |_, listening| !inhabited.contains(&listening.namespace));
    }

    fn end(&self, part: &Beside, is_over: impl Fn(&NestedKey, &Listening) -> bool) {
        self.lock().retain(|key, listening| {
            let keep = !is_over(key, listening);
            if !keep && let Err(error) = part.sink.kernel.unnest(key) {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(
                    event = "nested-not-forgotten",
                    error,
                    "cannot forget a pod's own network namespace; it is denied"
                );
            }
            keep
        });
    }
}

fn id(file: &File) -> std::io::Result<NamespaceId> {
    let metadata = file.metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}

/// The network namespaces that processes are in.
fn inhabited() -> HashSet<NamespaceId> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let processes = processes
        .filter(|entry| entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()));
    processes
        .filter_map(|entry| fs::metadata(entry.path().join("ns/net")).ok())
        .map(|metadata| (metadata.dev(), metadata.ino()))
        .collect()
}
