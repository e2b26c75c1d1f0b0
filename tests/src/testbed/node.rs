//! The node: bridge, containerd, kubelet and kube-proxy, with every path of theirs in the testbed's folder.
//!
//! Where a component insists on a fixed path outside it, [`FIXED_PATHS`] names it, so that `down` can remove it.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::command::{command, find_in_path, output, run};
use crate::testbed::Start;
use crate::testbed::control_plane::{API_CLUSTER_IP, free_ports};
use crate::testbed::state::BPF_FOLDER;
use crate::wait::wait_until;

/// Name of the one node.
pub const NODE_NAME: &str = "testnode";

/// The bridge of the pods' network.
pub const BRIDGE: &str = "weirtb0";

/// The host's address on the bridge: the node's own address, and where the API server listens. It must not be a
/// loopback address, which Kubernetes refuses for nodes and for endpoints.
pub const BRIDGE_ADDRESS: &str = "10.244.0.1";

/// Addresses of pods.
pub const POD_RANGE: &str = "10.244.0.0/24";

/// The last one that the CNI gives away; those behind it are for what tests put on the bridge themselves.
const LAST_POD_ADDRESS: &str = "10.244.0.199";

/// Name of the CNI network.
pub(super) const NETWORK: &str = "weir-testbed";

/// Namespace of containerd that the kubelet uses.
pub const CONTAINERD_NAMESPACE: &str = "k8s.io";

/// Paths that components use whatever they are told. Those that did not exist before go at the end.
pub(super) const FIXED_PATHS: &[&str] = &[
    "/run/containerd",
    "/var/lib/cni",
    "/var/lib/kubelet",
    "/var/log/containers",
    "/var/log/pods",
    "/var/run/kubernetes",
];

/// Kernel settings that kubelet, kube-proxy and the CNI bridge change, below /proc/sys.
pub(super) const SETTINGS: &[&str] = &[
    "kernel/keys/root_maxbytes",
    "kernel/keys/root_maxkeys",
    "kernel/panic",
    "kernel/panic_on_oops",
    "net/ipv4/conf/all/route_localnet",
    "net/ipv4/ip_forward",
    "net/netfilter/nf_conntrack_max",
    "net/netfilter/nf_conntrack_tcp_be_liberal",
    "net/netfilter/nf_conntrack_tcp_timeout_close_wait",
    "net/netfilter/nf_conntrack_tcp_timeout_established",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
];

/// A pod's first container runs about 10 s after the start on two idle cores; builds may run beside it.
const READY_DEADLINE: Duration = Duration::from_secs(120);

/// Makes the bridge now, since the API server listens on its address.
pub(super) fn create_bridge() -> Result<()> {
    run(&mut command("ip", &["link", "add", BRIDGE, "type", "bridge"]))?;
    run(&mut command("ip", &["address", "add", &format!("{BRIDGE_ADDRESS}/24"), "dev", BRIDGE]))?;
    run(&mut command("ip", &["link", "set", BRIDGE, "up"])).map(|_| ())
}

/// Mounts the bpf file system, which the agent pins its programs in.
pub(super) fn mount_bpf() -> Result<()> {
    run(&mut command("mount", &["-t", "bpf", "bpf", BPF_FOLDER])).map(|_| ())
}

/// Starts containerd and waits until it answers.
pub(super) fn start_containerd(start: &mut Start<'_>) -> Result<()> {
    let folder = start.layout.path("containerd");
    for name in ["root", "state", "runc", "nri", "opt", "cni", "conf.d"] {
        fs::create_dir_all(folder.join(name)).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    write_network(&folder.join("cni"), &start.layout.path("cni"))?;
    let config = folder.join("config.toml");
    let runc = find_in_path("runc").context("runc is not in PATH; run `cargo xtask testbed build`")?;
    fs::write(&config, containerd_config(&folder, &runc, start.components.cni_folder()))
        .with_context(|| format!("cannot write {}", config.display()))?;
    // containerd looks for its shim in PATH.
    let path = format!(
        "{}:/usr/sbin:/usr/bin:/sbin:/bin:{}",
        start.components.folder().display(),
        std::env::var("PATH").unwrap_or_default()
    );
    let mut containerd = Command::new(start.components.binary("containerd"));
    containerd.arg("--config").arg(&config).env("PATH", path);
    start.spawn("containerd", &mut containerd)?;
    wait_until("containerd to answer", READY_DEADLINE, || {
        start.check_running()?;
        Ok(output(start.ctr().arg("version"))?.status.success().then_some(()))
    })
}

/// Starts kubelet and kube-proxy.
pub(super) fn start_kubelet(start: &mut Start<'_>) -> Result<()> {
    let [kubelet_port] = free_ports(BRIDGE_ADDRESS)?;
    let root = start.layout.path("kubelet");
    let static_pods = start.layout.path("static-pods");
    fs::create_dir_all(&static_pods).with_context(|| format!("cannot make {}", static_pods.display()))?;
    for name in ["", "plugins", "pod-logs"] {
        fs::create_dir_all(root.join(name)).with_context(|| format!("cannot make {}", root.display()))?;
    }
    // Pods must not inherit the host's name servers: there is no DNS in the testbed, and the network is closed.
    let resolver = root.join("resolv.conf");
    fs::write(&resolver, "").with_context(|| format!("cannot write {}", resolver.display()))?;
    let pki = |name: &str| start.layout.path("pki").join(name);
    let config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": BRIDGE_ADDRESS,
        "port": kubelet_port,
        "readOnlyPort": 0,
        "healthzPort": 0,
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": pki("ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": pki("kubelet-serving.crt"),
        "tlsPrivateKeyFile": pki("kubelet-serving.key"),
        "containerRuntimeEndpoint": format!("unix://{}", start.layout.containerd_socket().display()),
        "cgroupDriver": "cgroupfs",
        "failCgroupV1": false,
        "failSwapOn": false,
        // -999, the default, needs CAP_SYS_RESOURCE.
        "oomScoreAdj": 0,
        "resolvConf": resolver,
        "podLogsDir": root.join("pod-logs"),
        "volumePluginDir": root.join("plugins"),
        "makeIPTablesUtilChains": false,
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {
            "memory.available": "0%", "nodefs.available": "0%", "nodefs.inodesFree": "0%",
            "imagefs.available": "0%", "imagefs.inodesFree": "0%",
        },
        "staticPodPath": static_pods,
        "fileCheckFrequency": "1s",
        "syncFrequency": "5s",
        "nodeStatusUpdateFrequency": "2s",
        "maxPods": 64,
    });
    let file = root.join("config.yaml");
    write_yaml(&file, &config)?;
    let mut kubelet = Command::new(start.components.binary("kubelet"));
    kubelet.arg("--config").arg(&file).arg("--root-dir").arg(&root);
    kubelet.arg("--cert-dir").arg(pki("kubelet-certificates"));
    kubelet.arg("--kubeconfig").arg(start.layout.kubeconfig("kubelet"));
    kubelet.arg(format!("--hostname-override={NODE_NAME}")).arg(format!("--node-ip={BRIDGE_ADDRESS}"));
    start.spawn("kubelet", &mut kubelet)
}

/// Starts kube-proxy, which makes the API server's ClusterIP lead to its address.
pub(super) fn start_kube_proxy(start: &mut Start<'_>) -> Result<()> {
    let [health_port, metrics_port] = free_ports("127.0.0.1")?;
    let config = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": start.layout.kubeconfig("kube-proxy")},
        "mode": "iptables",
        "hostnameOverride": NODE_NAME,
        "clusterCIDR": POD_RANGE,
        "nodePortAddresses": [POD_RANGE],
        "iptables": {"localhostNodePorts": false},
        "healthzBindAddress": format!("127.0.0.1:{health_port}"),
        "metricsBindAddress": format!("127.0.0.1:{metrics_port}"),
        "oomScoreAdj": 0,
        // 0 leaves the kernel's own values.
        "conntrack": {
            "maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s",
        },
    });
    let file = start.layout.path("kube-proxy.yaml");
    write_yaml(&file, &config)?;
    let mut proxy = Command::new(start.components.binary("kube-proxy"));
    start.spawn("kube-proxy", proxy.arg("--config").arg(&file))
}

/// Waits until pods can run here and reach the API server's ClusterIP.
pub(super) fn wait_for_node(start: &Start<'_>) -> Result<()> {
    let path = r#"jsonpath={.status.conditions[?(@.type=="Ready")].status}/{.spec.taints[*].key}"#;
    wait_until("the node to be ready", READY_DEADLINE, || {
        start.check_running()?;
        let output = output(start.kubectl().args(["get", "node", NODE_NAME, "-o", path]))?;
        Ok((output.status.success() && output.stdout == b"True/").then_some(()))
    })?;
    wait_until("kube-proxy's rule for the API server", READY_DEADLINE, || {
        start.check_running()?;
        let output = output(&mut command("iptables", &["-w", "5", "-t", "nat", "-S", "KUBE-SERVICES"]))?;
        let rules = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(rules.contains(&format!("{API_CLUSTER_IP}/32")).then_some(()))
    })
}

/// What to do about a node that is here already.
const MEND: &str = "if it is a testbed of another folder or user, `cargo xtask testbed down --dir DIR` ends it; else use \
                    another machine";

/// Refuses a machine that already is a node: its firewall chains and cgroups could not be told from ours.
pub(super) fn refuse_foreign_node(cgroup_mounts: &[std::path::PathBuf]) -> Result<()> {
    // Asked before packages are installed, too; what has iptables chains can hardly lack the tool.
    if let Some(save) = find_in_path("iptables-save") {
        let rules = run(&mut command(save, &["-t", "nat"]))?;
        if rules.contains(":KUBE-") {
            bail!("this machine has firewall chains of a Kubernetes node (iptables -t nat -S); {MEND}");
        }
    }
    for mount in cgroup_mounts {
        let kubepods = mount.join("kubepods");
        if kubepods.exists() {
            bail!("{} exists: this machine runs pods already; {MEND}", kubepods.display());
        }
    }
    if Path::new("/sys/class/net").join(BRIDGE).exists() {
        bail!("the network interface {BRIDGE} exists; if nothing needs it: ip link delete {BRIDGE}");
    }
    Ok(())
}

fn write_yaml(file: &Path, content: &serde_json::Value) -> Result<()> {
    let text = serde_yaml_ng::to_string(content).context("cannot write a configuration as YAML")?;
    fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

fn write_network(folder: &Path, data: &Path) -> Result<()> {
    let network = json!({
        "cniVersion": "1.0.0",
        "name": NETWORK,
        "plugins": [{
            "type": "bridge",
            "bridge": BRIDGE,
            "isGateway": true,
            "ipMasq": false,
            "hairpinMode": true,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": POD_RANGE, "gateway": BRIDGE_ADDRESS, "rangeEnd": LAST_POD_ADDRESS}]],
                "routes": [{"dst": "0.0.0.0/0"}],
                "dataDir": data,
            },
        }],
    });
    let file = folder.join("10-testbed.conflist");
    fs::write(&file, network.to_string()).with_context(|| format!("cannot write {}", file.display()))
}

fn containerd_config(folder: &Path, runc: &Path, plugins: &str) -> String {
    let folder = folder.display();
    let runc = runc.display();
    format!(
        r#"version = 3
root = "{folder}/root"
state = "{folder}/state"
imports = []

[grpc]
address = "{folder}/state/containerd.sock"

[plugins."io.containerd.internal.v1.opt"]
path = "{folder}/opt"

[plugins."io.containerd.nri.v1.nri"]
socket_path = "{folder}/state/nri.sock"
plugin_path = "{folder}/nri"
plugin_config_path = "{folder}/nri"
# Refuses containers whose pods name a plugin that is not there; others are as before.
[plugins."io.containerd.nri.v1.nri".default_validator]
enable = true

[plugins."io.containerd.cri.v1.images"]
snapshotter = "overlayfs"
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{pause}"

[plugins."io.containerd.cri.v1.runtime"]
# Lowering a score below the parent's needs CAP_SYS_RESOURCE, which a sandboxed root may lack.
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["{plugins}"]
conf_dir = "{folder}/cni"
[plugins."io.containerd.cri.v1.runtime".containerd]
default_runtime_name = "runc"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
BinaryName = "{runc}"
Root = "{folder}/runc"
SystemdCgroup = false
"#,
        pause = crate::testbed::images::PAUSE_IMAGE,
    )
}
