//! A node that loses its power and boots again, with a disk that keeps `/var/lib`: what its first boot's agent has stored, the
//! guard of the second boot puts in force by the command of the systemd unit, before anything else runs.
//!
//! The agent and the guard are the built binary. The API server is an address of the machine at which a program listens, so
//! that a connection to it comes about where nobody forbids it; that is seen first, in both boots. What leaves the pod is seen
//! at the host's end of its interface.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use weir_tests::{
    certificates::{Authority, write_anonymous_kubeconfig},
    command::run,
};

use super::{
    image::{Image, boot},
    security_modules, security_way,
};

/// Modules for the disk and the pod's interface, in the order of their dependencies.
const MODULES: [&str; 9] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
    "veth",
    "sch_ingress",
    "cls_bpf",
];
const TOOLS: [&str; 4] = ["bash", "busybox", "ip", "nsenter"];
/// What a finding of the node's comes behind; the firmware's control characters may stand before it.
const FOUND: &str = "found: ";
/// Where the unit is, and where its command has the binary.
const UNIT: &str = "deploy/systemd/weir-guard.service";
const BINARY: &str = "/usr/local/bin/weir-agent";

/// The programs that such a node runs.
pub(super) struct Programs {
    agent: PathBuf,
    /// It tries ways, and watches.
    escape: PathBuf,
    /// The unit's command.
    guard: String,
}

/// What the two boots must find, in this order.
const EXPECTED: [(&str, &[&str]); 2] = [
    (
        "weir.boot=1",
        &[
            "nothing in force: pod tcp connected",
            "nothing in force: the far side saw it",
            "agent: pod tcp refused",
            "agent: host tcp connected",
        ],
    ),
    (
        "weir.boot=2",
        &[
            "pins: none",
            "nothing in force: pod tcp connected",
            "nothing in force: pod frame sent",
            "nothing in force: the far side saw it",
            "guard: in force: pods are kept from ",
            "guard: the security hooks are in force as they must",
            "guard: pod tcp refused",
            "guard: pod mapped refused",
            "guard: pod io-uring refused",
            "guard: pod fastopen refused",
            "guard: pod udp-sendto refused",
            "guard: pod raw failed EPERM",
            "guard: pod raw-fragment failed EPERM",
            // In the security hook: its interface has no guard yet.
            "guard: pod frame failed EPERM",
            "guard: pod frame-fragments failed EPERM",
            "guard: pod in the host's network tcp refused",
            "guard: host tcp connected",
            "guard: service tcp connected",
            "guard: the far side saw nothing",
        ],
    ),
];

impl Programs {
    pub(super) fn build(root: &Path) -> Result<Self> {
        run(Command::new("cargo").args(["build", "--locked", "-p", "weir-agent"]).current_dir(root))?;
        let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
        let target = root.join("target/escape");
        // As the integration tests build it.
        let mut build = Command::new("cargo");
        build.args([
            "build",
            "--quiet",
            "--locked",
            "-p",
            "weir-escape",
            "--target",
            &triple,
            "--target-dir",
        ]);
        build.arg(&target).env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols");
        run(build.current_dir(root))?;
        let unit = root.join(UNIT);
        let text = fs::read_to_string(&unit).with_context(|| format!("cannot read {}", unit.display()))?;
        let guard = text.lines().find_map(|line| line.strip_prefix("ExecStart=")).map(str::to_owned);
        Ok(Self {
            agent: root.join("target/debug/weir-agent"),
            escape: target.join(triple).join("debug/weir-escape"),
            guard: guard.with_context(|| format!("{} has no command", unit.display()))?,
        })
    }
}

/// Boots twice; fails with what the console printed unless everything is found as it must be.
pub(super) fn check(kernel: &Path, scratch: &Path, programs: &Programs, bpf_lsm: bool) -> Result<()> {
    let image = Image::new(scratch)?;
    image.tools(&TOOLS)?;
    image.program(&programs.escape, "bin/weir-escape")?;
    image.program(&programs.agent, BINARY.trim_start_matches('/'))?;
    image.modules(kernel, &MODULES)?;
    let etc = image.root.join("etc/weir");
    Authority::create(&etc, "reboot")?;
    write_anonymous_kubeconfig(&etc.join("kubeconfig"), "https://192.0.2.1:443", Path::new("/etc/weir"))?;
    fs::write(etc.join("agent.yaml"), CONFIGURATION)?;
    let image = image.pack(&MODULES, &script(&programs.guard, security_way(bpf_lsm)))?;
    let disk = scratch.join("disk");
    fs::File::create(&disk)?.set_len(32 << 20)?;
    run(Command::new("mke2fs").args(["-q", "-t", "ext4"]).arg(&disk))?;
    for (words, expected) in EXPECTED {
        let output = boot(kernel, &image, Some(&disk), &format!("{} {words}", security_modules(bpf_lsm)))?;
        let found: Vec<&str> =
            output.lines().filter_map(|line| Some(line.trim_end().split_once(FOUND)?.1)).collect();
        // How many addresses the guard knows depends on those of the machine.
        let as_expected = found.len() == expected.len()
            && found.iter().zip(expected).all(|(found, expected)| found.starts_with(expected));
        if !as_expected {
            bail!("the node does not find what it must after {words}; what it printed:\n{output}");
        }
    }
    Ok(())
}

/// The API server's address is configured, and its port answers nothing that the agent could use.
const CONFIGURATION: &str = "apiVersion: weir.dev/v1alpha1
kind: AgentConfiguration
node: reboot
journal: {directory: /tmp/journal}
clusters:
- {name: own, kubeconfig: /etc/weir/kubeconfig, addresses: ['192.0.2.1:443'], trust: {clusterSigner: {}}}
enrolment:
- {namespaceSelector: {}, podSelector: {}, mode: enforce}
";

/// What the node does in each boot.
fn script(guard: &str, way: &str) -> String {
    format!(
        "busybox mount -t ext4 /dev/vda /var/lib
ip address add 192.0.2.1/32 dev lo
busybox httpd -p 192.0.2.1:443 -h /tmp
service=/sys/fs/cgroup/system.slice/some.service
pod=/sys/fs/cgroup/kubepods/besteffort/pod0b5e2f6a-3c1d-4e5f-8a9b-0c1d2e3f4a5b
busybox mkdir -p $pod $service
ip netns add pod
ip link add host0 type veth peer name eth0 netns pod
ip address add 10.9.0.1/24 dev host0
ip link set host0 up
ip -n pod address add 10.9.0.2/24 dev eth0
ip -n pod link set eth0 up
ip -n pod link set lo up
ip -n pod route add default via 10.9.0.1
weir-escape watch host0 10.9.0.0 > /tmp/seen &
in_pod() {{ nsenter --net=/run/netns/pod weir-escape --cgroup $pod $1 ${{2:-192.0.2.1:443}}; }}
try() {{ echo \"{FOUND}$1: pod $2 $(in_pod $2)\"; }}
# What was sent before the marker is seen before it.
saw() {{
  until busybox grep -q \" 10.9.0.1 17 $1\" /tmp/seen; do in_pod udp-sendto 10.9.0.1:$1 > /tmp/marker; busybox usleep 20000; done
  if busybox grep -q ' 192.0.2.1 ' /tmp/seen; then echo it; else echo nothing; fi
}}
case $(cat /proc/cmdline) in
*weir.boot=1*)
  try 'nothing in force' tcp
  echo \"{FOUND}nothing in force: the far side saw $(saw 20001)\"
  {BINARY} run --config /etc/weir/agent.yaml > /tmp/agent.log 2>&1 &
  until busybox grep -q '\"192.0.2.1:443\"' /var/lib/weir/api-set.json 2> /tmp/grep; do
    kill -0 $! || {{ cat /tmp/agent.log; break; }}
    busybox usleep 50000
  done
  try agent tcp
  echo \"{FOUND}agent: host tcp $(weir-escape tcp 192.0.2.1:443)\"
  ;;
*weir.boot=2*)
  echo \"{FOUND}pins: $([ -e /sys/fs/bpf/weir ] && echo some || echo none)\"
  for way in tcp frame; do try 'nothing in force' $way; done
  echo \"{FOUND}nothing in force: the far side saw $(saw 20001)\"
  echo \"{FOUND}guard: $({guard} 2>&1)\"
  {BINARY} status > /tmp/status 2>&1
  if busybox grep -q 'security hooks  in force ({way})' /tmp/status; then hooks='in force as they must'; else hooks=$(cat /tmp/status); fi
  echo \"{FOUND}guard: the security hooks are $hooks\"
  before=$(busybox grep -c ' 192.0.2.1 ' /tmp/seen)
  for way in tcp mapped io-uring fastopen udp-sendto raw raw-fragment frame frame-fragments; do try guard $way; done
  echo \"{FOUND}guard: pod in the host's network tcp $(weir-escape --cgroup $pod tcp 192.0.2.1:443)\"
  echo \"{FOUND}guard: host tcp $(weir-escape tcp 192.0.2.1:443)\"
  echo \"{FOUND}guard: service tcp $(weir-escape --cgroup $service tcp 192.0.2.1:443)\"
  saw 20002 > /tmp/saw
  after=$(busybox grep -c ' 192.0.2.1 ' /tmp/seen)
  echo \"{FOUND}guard: the far side saw $([ $before = $after ] && echo nothing || echo $((after - before)) packets)\"
  ;;
esac
# Once all of this is printed, as when the power goes: nothing is written to the disk that was not before.
busybox stty -F /dev/ttyS0 -echo
echo b > /proc/sysrq-trigger
"
    )
}
