//! What an operator should know: the kernel's denials, and pods whose environment would send API traffic through a
//! proxy. Reports only; nothing is decided here.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use weir_common::{
    answer::KeptAnswer,
    event::Caller,
    kernel::{KUBELET, Notice, NoticeKind},
};

use super::{
    accept::Refusals,
    caller::Tenant,
    enrolment::Tenants,
    flow::{Flow, Notices},
    loader::Kernel,
    namespace,
    nested::Wanted,
    observed::Observed,
    process::{Proc, ProxyVariable},
    run::InterceptionError,
};
use crate::{
    exec::{kubeconfig::Server, proxy_environment},
    recording::Recorder,
};

/// Most pods whose notices are counted apart.
const REPORTED_PODS_MAX: usize = 4096;
/// How often the environments of enrolled pods' processes are looked at. A process's environment changes with the
/// program it becomes, so each is looked at again every time.
const ENVIRONMENTS_CHECK: Duration = Duration::from_secs(2);
/// Most processes of one pod that are looked at each time.
const PROCESSES_MAX: usize = 128;
/// Longest time that one look may take.
const ENVIRONMENTS_TIMEOUT: Duration = Duration::from_secs(10);
/// Name under which clients in a pod may know the API server, beside its addresses.
const IN_CLUSTER_NAME: &str = "kubernetes.default.svc";

/// Records the kernel's notices until cancelled.
pub(super) async fn notices(
    mut notices: Notices,
    tenants: Tenants,
    recorder: Recorder,
    observed: Arc<Observed>,
    mut frozen: watch::Receiver<bool>,
    wanted: mpsc::Sender<Wanted>,
    cancellation: CancellationToken,
) -> Result<&'static str, InterceptionError> {
    // Bounded for each pod apart: the noise of one must not hide what another does.
    let mut refusals: HashMap<u64, Refusals> = HashMap::new();
    loop {
        if *frozen.borrow_and_update() {
            // Two readers would take notices from each other.
            tokio::select! {
                () = cancellation.cancelled() => break,
                Ok(()) = frozen.changed() => {}
            }
            continue;
        }
        let notice = tokio::select! {
            () = cancellation.cancelled() => break,
            Ok(()) = frozen.changed() => continue,
            notice = notices.next() => notice
                .map_err(|source| InterceptionError::Io { action: "read the kernel's notices", source })?,
        };
        let Some(kind) = NoticeKind::from_number(notice.kind) else { continue };
        // What it is refused is what it was sent for.
        if observed.is_canary(notice.flow.pod_cgroup) {
            continue;
        }
        observed.reported(kind);
        if kind == NoticeKind::DeniedNoListener {
            // More than fit come again: clients do.
            let _ = wanted.try_send(Wanted::of(&notice));
        }
        let now = Instant::now();
        if refusals.len() >= REPORTED_PODS_MAX {
            for (_, pod) in refusals.drain() {
                pod.end(&recorder);
            }
        }
        let pod = refusals.entry(notice.flow.pod_cgroup).or_insert_with(|| Refusals::new(now));
        let (admitted, left_out) = pod.admit(now);
        if let Some(left_out) = left_out {
            Refusals::left_out(left_out, &recorder);
        }
        if admitted {
            let caller = caller(&notice, &tenants).await;
            let cluster = notice.flow.cluster;
            let cluster = if cluster == KUBELET { None } else { usize::try_from(cluster).ok() };
            record(kind, &notice, cluster, &caller, &recorder);
        }
    }
    refusals.values().for_each(|pod| pod.end(&recorder));
    Ok("reading the kernel's notices")
}

fn record(
    kind: NoticeKind,
    notice: &Notice,
    cluster: Option<usize>,
    caller: &Arc<Caller>,
    recorder: &Recorder,
) {
    let reason = match kind {
        NoticeKind::DeniedUnknown => "denied by the kernel: the cgroup is of no pod that is known yet",
        NoticeKind::DeniedNoListener => {
            "denied by the kernel: enrolled, with no listener in this network namespace"
        }
        NoticeKind::DeniedKubelet => {
            "denied by the kernel: an enrolled pod has no business with a kubelet, which takes exec for every pod of its node"
        }
        NoticeKind::DeniedQuarantined => "denied by the kernel: the pod is in quarantine",
        NoticeKind::GuardDropped => {
            "dropped by the guard: a packet to an API server or kubelet that was not connected through Weir"
        }
        NoticeKind::InterfaceDropped => {
            "dropped at the pod's interface: a packet to an API server or kubelet past the pod's sockets, or a wrapped one"
        }
        NoticeKind::BindRefused => {
            "refused by the kernel: a socket would have taken the port of the listener in a pod's network"
        }
        NoticeKind::ProtocolRefused => {
            // A socket has no destination yet, and so no cluster.
            let reason = format!("refused by the kernel: protocol {} cannot be redirected", notice.protocol);
            recorder.connection_refused(None, Some(caller), &reason);
            return;
        }
        NoticeKind::PacketSocketRefused => {
            "refused by the kernel: no packet sockets for a pod that is enrolled, or not known yet"
        }
        NoticeKind::AnswerRefused => {
            recorder.connection_refused(None, Some(caller), &answer_refused(notice));
            return;
        }
        NoticeKind::QuestionRefused => {
            "denied by the kernel: a socket has no room for the note that it asks a name server; is net.core.optmem_max too small?"
        }
        NoticeKind::BpfRefused => "refused by the kernel: an enrolled pod does not call bpf(2)",
        NoticeKind::WouldRedirect => {
            let message = "an observed pod connected to an API server; set its mode to enforce to record it";
            recorder.finding(cluster, Some(caller), "wouldRedirect", message);
            return;
        }
    };
    recorder.connection_refused(cluster, Some(caller), reason);
}

/// From whom the answer was, and why the pod does not have it.
fn answer_refused(notice: &Notice) -> String {
    let (protocol, why) = KeptAnswer::from_notice(notice.protocol);
    let why = match why {
        Some(KeptAnswer::TooLong) => "it is longer than a name server's",
        Some(KeptAnswer::TooMany) => "more were sent to the pod than are read for one",
        Some(KeptAnswer::Unreadable) => "it is about a configured host name and cannot be read",
        Some(KeptAnswer::NotAskedFor) => {
            "it is about a configured host name, and its socket has asked nobody"
        }
        Some(KeptAnswer::NoRoom) => "it tells more new addresses of a configured host name than are noted",
        None => "of a kind that this agent does not know",
    };
    let protocol = if protocol == libc::IPPROTO_UDP.unsigned_abs() { "UDP" } else { "TCP" };
    format!(
        "kept from the pod: an answer of the name server {} over {protocol}: {why}",
        Flow::of(notice.flow).original
    )
}

async fn caller(notice: &Notice, tenants: &Tenants) -> Arc<Caller> {
    let known = tenants.borrow().get(&notice.flow.pod_cgroup).cloned();
    let tenant =
        known.unwrap_or_else(|| Arc::new(Tenant { cgroup: notice.flow.cgroup, ..Tenant::default() }));
    tenant.caller(&Flow::of(notice.flow)).await
}

/// Looks for proxies in the environments of enrolled pods' processes until cancelled.
pub(super) async fn proxy_environments(
    tenants: Tenants,
    kernel: Arc<Kernel>,
    recorder: Recorder,
    cancellation: CancellationToken,
) -> Result<&'static str, InterceptionError> {
    let mut reported: HashSet<(u64, &'static str, String)> = HashSet::new();
    loop {
        tokio::select! {
            () = cancellation.cancelled() => return Ok("looking at environments"),
            () = tokio::time::sleep(ENVIRONMENTS_CHECK) => {}
        }
        let current = tenants.borrow().clone();
        reported.retain(|(cgroup, _, _)| current.contains_key(cgroup));
        let servers = kernel.api_endpoints()?;
        let enrolled = kernel.enrolled()?;
        let search = tokio::task::spawn_blocking(move || search(&current, &enrolled, &servers));
        let Ok(Ok(found)) = tokio::time::timeout(ENVIRONMENTS_TIMEOUT, search).await else {
            tracing::warn!(
                event = "environments-read-slowly",
                "looking at environments takes too long; is a process's memory on a slow file system?"
            );
            continue;
        };
        for (tenant, variable) in found {
            if reported.insert((tenant.cgroup, variable.name, variable.host.clone())) {
                let message = format!(
                    "{} sends requests for the API server to {}, past Weir; unset it or add the API server to NO_PROXY",
                    variable.name, variable.host
                );
                recorder.finding(None, Some(&tenant.unproven(None)), "proxyEnvironment", &message);
            }
        }
    }
}

/// The proxies that processes of enrolled pods have in their environments and that do not exempt every address and
/// name of the API server.
fn search(
    tenants: &HashMap<u64, Arc<Tenant>>,
    enrolled: &HashSet<u64>,
    servers: &HashMap<SocketAddr, u32>,
) -> Vec<(Arc<Tenant>, ProxyVariable)> {
    let proc = Proc::default();
    let mut found: Vec<(Arc<Tenant>, ProxyVariable)> = Vec::new();
    for tenant in tenants.values().filter(|tenant| enrolled.contains(&tenant.cgroup)) {
        for (pid, _) in namespace::processes(&tenant.folder).into_iter().take(PROCESSES_MAX) {
            let Some(variable) = proc.proxy_variable(pid) else { continue };
            let known =
                found.iter().any(|(other, known)| other.cgroup == tenant.cgroup && *known == variable);
            if !known && carries(&variable, servers) {
                found.push((tenant.clone(), variable));
            }
        }
    }
    found
}

fn carries(variable: &ProxyVariable, servers: &HashMap<SocketAddr, u32>) -> bool {
    let environment = |name: &str| match name {
        "NO_PROXY" => Some(variable.exempt.clone()),
        name if name == variable.name => Some(variable.host.clone()),
        _ => None,
    };
    let named = Server { tls: true, host: IN_CLUSTER_NAME.to_owned(), port: 443 };
    let addresses = servers.keys().map(|address| Server {
        tls: true,
        host: address.ip().to_string(),
        port: address.port(),
    });
    addresses.chain([named]).any(|server| proxy_environment::carried(&server, environment).is_some())
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::{ProxyVariable, carries};

    #[test]
    fn a_proxy_that_exempts_every_api_server_carries_nothing() {
        let servers = HashMap::from([(([10, 96, 0, 1], 443).into(), 0)]);
        for (name, exempt, expected) in [
            ("HTTPS_PROXY", "", true),
            ("HTTPS_PROXY", "10.96.0.0/12", true),
            ("HTTPS_PROXY", "10.96.0.0/12,.svc", false),
            ("ALL_PROXY", "", true),
            ("HTTP_PROXY", "", false),
        ] {
            let variable = ProxyVariable { name, host: "proxy:3128".to_owned(), exempt: exempt.to_owned() };
            assert_eq!(carries(&variable, &servers), expected, "{name} with NO_PROXY={exempt}");
        }
    }
}
