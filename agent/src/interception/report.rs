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
    pod_network,
    process::{Proc, ProxyVariable},
    reads::{READS, Reads},
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
/// Longest time that a look at one pod's may take.
const ENVIRONMENTS_TIMEOUT: Duration = Duration::from_secs(2);
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
    // Those whose environments could not be read the last time.
    let mut slow = HashSet::new();
    loop {
        tokio::select! {
            () = cancellation.cancelled() => return Ok("looking at environments"),
            () = tokio::time::sleep(ENVIRONMENTS_CHECK) => {}
        }
        let current = tenants.borrow().clone();
        reported.retain(|(cgroup, _, _)| current.contains_key(cgroup));
        slow.retain(|cgroup| current.contains_key(cgroup));
        let servers = Arc::new(kernel.api_endpoints()?);
        let enrolled = kernel.enrolled()?;
        for tenant in current.values().filter(|tenant| enrolled.contains(&tenant.cgroup)) {
            let found = tokio::select! {
                () = cancellation.cancelled() => return Ok("looking at environments"),
                found = proxies_of(&READS, Proc::default(), tenant, &servers, ENVIRONMENTS_TIMEOUT) => found,
            };
            let Some(found) = found else {
                if slow.insert(tenant.cgroup) {
                    let pod = pod_network::name(tenant);
                    tracing::warn!(event = "environments-read-slowly", %pod, "looking at environments takes too long; is a process's memory on a slow file system?");
                }
                continue;
            };
            slow.remove(&tenant.cgroup);
            for variable in found {
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
}

/// The proxies that processes of a pod have in their environments and that do not exempt every address and name of the API
/// server; none where they cannot be read in time.
async fn proxies_of(
    reads: &Reads,
    proc: Proc,
    tenant: &Tenant,
    servers: &Arc<HashMap<SocketAddr, u32>>,
    longest: Duration,
) -> Option<Vec<ProxyVariable>> {
    let (folder, servers) = (tenant.folder.clone(), Arc::clone(servers));
    let search = move || {
        let mut found: Vec<ProxyVariable> = Vec::new();
        for (pid, _) in namespace::processes(&folder).into_iter().take(PROCESSES_MAX) {
            let Some(variable) = proc.proxy_variable(pid) else { continue };
            if !found.contains(&variable) && carries(&variable, &servers) {
                found.push(variable);
            }
        }
        found
    };
    reads.of(tenant.cgroup, longest, search).await
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
    use std::{collections::HashMap, sync::Arc, time::Duration};

    use super::{
        super::reads::{OF_POD_MAX, Reads, hanging::Hanging},
        ProxyVariable, Tenant, carries, proxies_of,
    };

    #[test]
    fn an_environment_that_hangs_costs_few_threads_and_no_other_pods_report() {
        let hanging = Hanging::new();
        hanging.process(1, "environ", None);
        hanging.process(2, "environ", Some("HTTPS_PROXY=http://proxy.test:3128\0"));
        let folders = [tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder")];
        let tenants = [1, 2].map(|number: u32| {
            let folder = folders[number as usize - 1].path().to_owned();
            std::fs::write(folder.join("cgroup.procs"), format!("{number}\n")).expect("is written");
            Tenant { cgroup: number.into(), folder, ..Tenant::default() }
        });
        let servers = Arc::new(HashMap::from([(([10, 96, 0, 1], 443).into(), 0)]));
        let look = async {
            let reads = Reads::default();
            for _ in 0..OF_POD_MAX + 50 {
                // Each look but the first few ends at once: what hangs has all the pod's places.
                let found =
                    proxies_of(&reads, hanging.proc(), &tenants[0], &servers, Duration::from_millis(50));
                assert_eq!(found.await, None);
            }
            assert_eq!(reads.under_way(), OF_POD_MAX);
            let found = proxies_of(&reads, hanging.proc(), &tenants[1], &servers, Duration::from_secs(30));
            let found = found.await.expect("are read");
            assert_eq!(found.len(), 1, "{found:?}");
        };
        hanging.block_on(async { tokio::time::timeout(Duration::from_secs(60), look).await.expect("ends") });
    }

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
