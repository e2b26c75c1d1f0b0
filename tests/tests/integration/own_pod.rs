//! Pods as the kernel knows them, without a kubelet and a runtime: cgroups, a network namespace on the testbed's bridge, and
//! processes that are cloned into them. In the order in which those two make them, only quicker.

use std::{
    fs,
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use weir_tests::{
    command,
    nri::AskedFor,
    testbed::{BRIDGE, BRIDGE_ADDRESS},
    wait_until,
};

use super::DEADLINE;

/// What the names of their interfaces begin with, at the host's end.
const INTERFACE: &str = "weirown";

/// The root of such pods, which is none of the testbed's kubelet.
pub(super) struct Root(PathBuf);

impl Root {
    /// What a run that was killed has left goes first; its processes went with it.
    pub(super) fn new(name: &str) -> Self {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let v2 = mounts.lines().find(|line| line.contains(" - cgroup2 ")).unwrap();
        let root = Self(Path::new(v2.split(' ').nth(4).unwrap()).join(format!("{name}-kubepods.slice")));
        assert!(root.remove(), "{} is in use", root.0.display());
        fs::create_dir(&root.0).unwrap();
        root
    }

    fn remove(&self) -> bool {
        remove_cgroup(&self.0);
        !self.0.exists()
    }

    /// What is left of pods on this machine.
    pub(super) fn leftovers(self) -> Vec<PathBuf> {
        let path = self.0.clone();
        drop(self);
        let interfaces = fs::read_dir("/sys/class/net").unwrap().map(|entry| entry.unwrap().path());
        let is_ours = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with(INTERFACE);
        interfaces.filter(is_ours).chain(path.exists().then_some(path.clone())).collect()
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        // A cgroup goes once the kernel has let its processes go.
        let _ = wait_until("the pods' cgroups to be empty", DEADLINE, || Ok(self.remove().then_some(())));
    }
}

fn remove_cgroup(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_cgroup(&entry.path());
        }
    }
    let _ = fs::remove_dir(folder);
}

/// One pod. Ends with this value.
pub(super) struct OwnPod {
    pub(super) uid: String,
    pub(super) address: String,
    folder: PathBuf,
    interface: String,
    sandbox: Child,
}

impl OwnPod {
    /// A pod with its sandbox. No two that live at a time have the same `number`, nor the same `address` on the bridge.
    pub(super) fn start(root: &Root, uid: &str, number: usize, address: &str) -> Self {
        let folder = root.0.join(format!("kubepods-besteffort-pod{}.slice", uid.replace('-', "_")));
        fs::create_dir(&folder).unwrap();
        // Says when the namespace is there, is told when it has its interface, and says when that is up.
        let script = format!(
            "ip link set lo up && echo up && read go && ip address add {address}/24 dev eth0 && ip link set eth0 up \
             && ip route add default via {BRIDGE_ADDRESS} && echo up && exec cat"
        );
        let sandbox = Command::new("unshare")
            .args(["--net", "sh", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (uid, address) = (uid.to_owned(), address.to_owned());
        let mut pod = Self { uid, address, folder, interface: format!("{INTERFACE}{number}"), sandbox };
        pod.wait_until_up();
        let pid = pod.sandbox.id().to_string();
        let pair = ["type", "veth", "peer", "name", "eth0", "netns", &pid];
        command::run(
            Command::new("ip").args(["link", "add", &pod.interface, "master", BRIDGE, "up"]).args(pair),
        )
        .unwrap();
        pod.sandbox.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
        pod.wait_until_up();
        // The network is there before the sandbox's process is.
        fs::write(pod.container('0').join("cgroup.procs"), &pid).unwrap();
        pod
    }

    fn wait_until_up(&mut self) {
        let mut said = [0; 3];
        self.sandbox.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
        assert_eq!(&said, b"up\n");
    }

    /// A container's cgroup, which is made.
    pub(super) fn container(&self, digit: char) -> PathBuf {
        let id: String = std::iter::repeat_n(digit, 64).collect();
        let folder = self.folder.join(format!("cri-containerd-{id}.scope"));
        fs::create_dir(&folder).unwrap();
        folder
    }

    /// The pod as a container runtime names it.
    pub(super) fn named<'a>(&'a self, namespace: &'a str, name: &'a str) -> AskedFor<'a> {
        let cgroup = self.folder.to_str().unwrap();
        AskedFor { uid: &self.uid, namespace, name, pid: self.sandbox.id(), cgroup }
    }

    /// A process that is cloned into a container; what it is told to try is its first instruction.
    pub(super) fn process(&self, program: &Path, container: &Path) -> Command {
        let mut command = Command::new(program);
        let (netns, cgroup) = (self.sandbox.id().to_string(), container.to_str().unwrap());
        command.args(["--netns", &netns, "--born", "--cgroup", cgroup]);
        command
    }
}

impl Drop for OwnPod {
    fn drop(&mut self) {
        let _ = self.sandbox.kill();
        let _ = self.sandbox.wait();
        // The kernel takes its time with an abandoned namespace and what is in it.
        let _ = command::output(Command::new("ip").args(["link", "delete", &self.interface]));
        let _ = wait_until("the pod's cgroup to be empty", DEADLINE, || {
            remove_cgroup(&self.folder);
            Ok((!self.folder.exists()).then_some(()))
        });
    }
}
