//! etcd, API server, controller-manager and scheduler: their certificates, flags and readiness.
//!
//! They run as ordinary processes of the host, listening on loopback and on the bridge's address only.

use std::fs;
use std::net::TcpListener;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

use crate::certificates::{
    Authority, Subject, create_key_pair, write_anonymous_kubeconfig, write_kubeconfig,
};
use crate::components::repository;
use crate::testbed::Start;
use crate::testbed::node::{BRIDGE_ADDRESS, NODE_NAME};
use crate::wait::wait_until;

/// ClusterIPs; the first is the API server's.
pub(super) const SERVICE_RANGE: &str = "10.96.0.0/16";

/// ClusterIP of `default/kubernetes`: what in-cluster configuration dials, on port 443.
pub const API_CLUSTER_IP: &str = "10.96.0.1";

/// A further name in the API server's certificate, as that of a managed control plane: nobody resolves it but who wants
/// to test that.
pub const ENDPOINT_NAME: &str = "endpoint.weir.example";

/// Where the API server asks about tokens that it does not know, as on EKS: the port that aws-iam-authenticator has by
/// default. Nobody listens there but while an [`crate::AwsRig`] runs; a refused connection is a refused token, at once.
pub const AUTHENTICATOR_PORT: u16 = 21362;

/// The API server answers `ok` to /readyz about 9 s after its start on two idle cores; builds may run beside it.
const READY_DEADLINE: Duration = Duration::from_secs(120);

/// Users with a client certificate: file, user name, group.
const USERS: &[(&str, &str, Option<&str>)] = &[
    ("admin", "admin", Some("system:masters")),
    ("agent", "weir-agent", None),
    ("controller-manager", "system:kube-controller-manager", None),
    ("scheduler", "system:kube-scheduler", None),
    ("kube-proxy", "system:kube-proxy", None),
    ("apiserver-kubelet-client", "kube-apiserver-kubelet-client", Some("system:masters")),
];

/// Makes certificates and kubeconfigs for an API server at `server` (`ADDRESS:PORT`).
pub(super) fn write_credentials(start: &Start<'_>, server: &str) -> Result<()> {
    let pki = start.layout.path("pki");
    let authority = Authority::create(&pki, "weir-testbed-ca")?;
    create_key_pair(&pki, "service-account")?;
    let sign = |file: &str, common_name: &str, organization: Option<&str>, names: &[&str]| {
        authority.sign(&Subject { file, common_name, organization, names })
    };
    let names = [
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
        "localhost",
        ENDPOINT_NAME,
        "127.0.0.1",
        BRIDGE_ADDRESS,
        API_CLUSTER_IP,
    ];
    sign("apiserver", "kube-apiserver", None, &names)?;
    sign(
        "kubelet-serving",
        &format!("system:node:{NODE_NAME}"),
        Some("system:nodes"),
        &[NODE_NAME, BRIDGE_ADDRESS],
    )?;
    sign("authenticator", "aws-iam-authenticator", None, &["127.0.0.1"])?;
    sign("kubelet", &format!("system:node:{NODE_NAME}"), Some("system:nodes"), &[])?;
    for (file, user, group) in USERS {
        sign(file, user, *group, &[])?;
    }
    let url = format!("https://{server}");
    for file in ["admin", "agent", "controller-manager", "scheduler", "kube-proxy", "kubelet"] {
        write_kubeconfig(&start.layout.kubeconfig(file), &url, &pki, file)?;
    }
    let webhook = format!("https://127.0.0.1:{AUTHENTICATOR_PORT}/authenticate");
    write_anonymous_kubeconfig(&start.layout.kubeconfig("authenticator"), &webhook, &pki)?;
    write_anonymous_kubeconfig(&start.layout.kubeconfig("anonymous"), &url, &pki)
}

/// Starts etcd and the API server; they find each other by retrying.
pub(super) fn start_api_server(start: &mut Start<'_>, server: &str) -> Result<()> {
    let [client_port, peer_port] = free_ports("127.0.0.1")?;
    let client_url = format!("http://127.0.0.1:{client_port}");
    let peer_url = format!("http://127.0.0.1:{peer_port}");
    let mut etcd = Command::new(start.components.binary("etcd"));
    etcd.arg("--name=testbed").arg("--unsafe-no-fsync").arg("--log-level=warn");
    etcd.arg(format!("--data-dir={}", start.layout.path("etcd").display()));
    etcd.arg(format!("--listen-client-urls={client_url}"))
        .arg(format!("--advertise-client-urls={client_url}"));
    etcd.arg(format!("--listen-peer-urls={peer_url}"))
        .arg(format!("--initial-advertise-peer-urls={peer_url}"));
    etcd.arg(format!("--initial-cluster=testbed={peer_url}"));
    start.spawn("etcd", &mut etcd)?;

    let (address, port) = server.split_once(':').context("the API server's address has no port")?;
    let policy = repository().join("tests/testbed/audit-policy.yaml");
    let pki = |name: &str| start.layout.path("pki").join(name).display().to_string();
    let flags = [
        format!("--etcd-servers={client_url}"),
        format!("--bind-address={address}"),
        format!("--advertise-address={address}"),
        format!("--secure-port={port}"),
        format!("--service-cluster-ip-range={SERVICE_RANGE}"),
        format!("--cert-dir={}", pki("")),
        format!("--client-ca-file={}", pki("ca.crt")),
        format!("--tls-cert-file={}", pki("apiserver.crt")),
        format!("--tls-private-key-file={}", pki("apiserver.key")),
        format!("--kubelet-certificate-authority={}", pki("ca.crt")),
        format!("--kubelet-client-certificate={}", pki("apiserver-kubelet-client.crt")),
        format!("--kubelet-client-key={}", pki("apiserver-kubelet-client.key")),
        "--kubelet-preferred-address-types=InternalIP".to_owned(),
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local".to_owned(),
        format!("--service-account-key-file={}", pki("service-account.pub")),
        format!("--service-account-signing-key-file={}", pki("service-account.key")),
        format!(
            "--authentication-token-webhook-config-file={}",
            start.layout.kubeconfig("authenticator").display()
        ),
        // Two minutes by default: as long as the API server would believe a token whose credentials have been taken back.
        "--authentication-token-webhook-cache-ttl=5s".to_owned(),
        "--authorization-mode=Node,RBAC".to_owned(),
        "--enable-admission-plugins=NodeRestriction".to_owned(),
        "--allow-privileged=true".to_owned(),
        "--profiling=false".to_owned(),
        format!("--audit-policy-file={}", policy.display()),
        format!("--audit-log-path={}", start.layout.audit_log().display()),
        // One file, never rotated: the tests read it whole.
        "--audit-log-maxsize=4096".to_owned(),
    ];
    let mut command = Command::new(start.components.binary("kube-apiserver"));
    start.spawn("kube-apiserver", command.args(flags))
}

/// Waits until the API server says that it is ready.
pub(super) fn wait_for_api_server(start: &Start<'_>) -> Result<()> {
    wait_until("the API server to be ready", READY_DEADLINE, || {
        start.check_running()?;
        let output = crate::command::output(start.kubectl().args(["get", "--raw", "/readyz"]))?;
        Ok(output.status.success().then_some(()))
    })
}

/// Starts controller-manager and scheduler.
pub(super) fn start_controllers(start: &mut Start<'_>) -> Result<()> {
    let [manager_port, scheduler_port] = free_ports("127.0.0.1")?;
    let pki = |name: &str| start.layout.path("pki").join(name).display().to_string();
    let kubeconfig = |user: &str| start.layout.kubeconfig(user).display().to_string();
    let mut manager = Command::new(start.components.binary("kube-controller-manager"));
    manager.args([
        format!("--kubeconfig={}", kubeconfig("controller-manager")),
        "--bind-address=127.0.0.1".to_owned(),
        format!("--secure-port={manager_port}"),
        format!("--cert-dir={}", pki("controller-manager")),
        format!("--root-ca-file={}", pki("ca.crt")),
        format!("--service-account-private-key-file={}", pki("service-account.key")),
        // These make the signers of certificatesigningrequests work.
        format!("--cluster-signing-cert-file={}", pki("ca.crt")),
        format!("--cluster-signing-key-file={}", pki("ca.key")),
        format!("--service-cluster-ip-range={SERVICE_RANGE}"),
        format!("--flex-volume-plugin-dir={}", start.layout.path("kubelet/plugins").display()),
        "--use-service-account-credentials=true".to_owned(),
        "--leader-elect=false".to_owned(),
        "--profiling=false".to_owned(),
    ]);
    let mut scheduler = Command::new(start.components.binary("kube-scheduler"));
    scheduler.args([
        format!("--kubeconfig={}", kubeconfig("scheduler")),
        format!("--authentication-kubeconfig={}", kubeconfig("scheduler")),
        format!("--authorization-kubeconfig={}", kubeconfig("scheduler")),
        "--bind-address=127.0.0.1".to_owned(),
        format!("--secure-port={scheduler_port}"),
        format!("--cert-dir={}", pki("scheduler")),
        "--leader-elect=false".to_owned(),
    ]);
    start.spawn("kube-controller-manager", &mut manager)?;
    start.spawn("kube-scheduler", &mut scheduler)
}

/// Waits for what pods of a new namespace need, and gives the agent's user its rights.
pub(super) fn prepare_cluster(start: &Start<'_>) -> Result<()> {
    let manifest = repository().join("tests/testbed/manifests/agent-rbac.yaml");
    crate::command::run(start.kubectl().args(["apply", "-f"]).arg(&manifest))?;
    for (kind, name) in [("serviceaccount", "default"), ("configmap", "kube-root-ca.crt")] {
        wait_until(&format!("{kind} default/{name}"), READY_DEADLINE, || {
            start.check_running()?;
            let output = crate::command::output(start.kubectl().args(["get", kind, name, "-n", "default"]))?;
            Ok(output.status.success().then_some(()))
        })?;
    }
    Ok(())
}

/// Below the ports that the kernel gives to connections (`net.ipv4.ip_local_port_range`): who is started again finds his port free.
const PORTS: std::ops::Range<u16> = 10_000..30_000;

/// Ports of `address` that nobody listens on, and that no connection will have.
///
/// # Errors
/// When too few are free.
pub fn free_ports<const N: usize>(address: &str) -> Result<[u16; N]> {
    // All are held until all are chosen, so that none comes twice.
    let mut listeners = Vec::with_capacity(N);
    let mut ports = [0; N];
    let count = u32::from(PORTS.end - PORTS.start);
    let mut tried = 0;
    // The clock's finest digits: two runs at once begin at different places.
    let begin = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.subsec_nanos());
    for port in &mut ports {
        *port = loop {
            if tried == count {
                bail!("nobody can listen on {address} at any port from {} to {}", PORTS.start, PORTS.end);
            }
            let offset = u16::try_from(begin.wrapping_add(tried) % count).unwrap_or_default();
            tried += 1;
            if let Ok(listener) = TcpListener::bind((address, PORTS.start + offset)) {
                listeners.push(listener);
                break PORTS.start + offset;
            }
        };
    }
    Ok(ports)
}

/// Makes the folders that the processes here write to.
pub(super) fn make_folders(start: &Start<'_>) -> Result<()> {
    for folder in ["pki", "kubeconfig", "logs", "etcd", "audit"] {
        let path = start.layout.path(folder);
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
    }
    Ok(())
}
