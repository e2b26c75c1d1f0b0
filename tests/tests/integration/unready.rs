//! An agent whose kernel programs do not what they must, though all of them are attached: its canary tells, and whoever asks whether it is
//! ready hears so, until the canary is what it must be again.

use std::{
    fs,
    net::{SocketAddr, TcpListener},
    os::{
        fd::AsRawFd as _,
        unix::{fs::PermissionsExt as _, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::Command,
};

use weir_common::event::Kind;
use weir_tests::{AgentProcess, agent, command, wait_until};

use super::{
    DEADLINE, Scene,
    monitoring::{Monitored, Rewriting},
    shown,
    watch::program,
};

/// Somebody else's program at the cgroup from which an agent sends its next canary: what must be refused is connected. It goes with the
/// cgroup, which the agent removes when it has sent that one.
pub(super) struct Misled<'a> {
    agent: &'a AgentProcess,
    monitored: &'a Monitored,
    folder: PathBuf,
    _other: (Rewriting, TcpListener),
}

impl<'a> Misled<'a> {
    /// `root` is that of the tree of cgroups.
    pub(super) fn new(agent: &'a AgentProcess, monitored: &'a Monitored, root: &Path) -> Self {
        assert_eq!(answers(agent, monitored), (200, Some(0), true, 1.0), "{}", agent.last_lines());
        let folder = root.join(format!("weir-canary-{}", agent.pid()));
        fs::create_dir(&folder).unwrap();
        let elsewhere = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = elsewhere.local_addr().unwrap().to_string();
        let rewriting = Rewriting::begin(&folder, &dialled(agent).to_string(), &to);
        Self { agent, monitored, folder, _other: (rewriting, elsewhere) }
    }

    /// Waits until the canary has failed: everybody who asks hears it.
    pub(super) fn is_unready(&self) {
        let reasons = wait_until("the canary to fail", DEADLINE, || {
            let (status, reasons) = self.monitored.get("/readyz")?;
            Ok((status == 503).then_some(reasons))
        })
        .unwrap_or_else(|error| panic!("{error:#}: {}", self.agent.last_lines()));
        let said = "the canary failed, so what must be intercepted may not be: a connection that must be refused was established";
        assert!(reasons.starts_with(said) && reasons.lines().count() == 1, "{reasons}");
        assert_eq!(answers(self.agent, self.monitored), (503, Some(1), false, 0.0));
        assert_eq!(self.monitored.get("/healthz").unwrap().0, 200, "a restart would not help");
        assert!(!self.folder.exists(), "the next one is a canary like any other");
    }

    /// Waits until the next one has passed.
    pub(super) fn until_ready_again(self, scene: &Scene) {
        wait_until("the agent to be ready again", DEADLINE, || {
            Ok((self.monitored.get("/readyz")? == (200, "ready\n".to_owned())).then_some(()))
        })
        .unwrap_or_else(|error| panic!("{error:#}: {}", self.agent.last_lines()));
        assert_eq!(answers(self.agent, self.monitored), (200, Some(0), true, 1.0));
        for name in ["canaryFailed", "canaryRecovered"] {
            scene.event(
                name,
                |event| matches!(&event.kind, Kind::Finding { name: found, .. } if found == name),
            );
        }
    }
}

/// What `/readyz`, a probe of the kubelet, `status` and the metrics say.
fn answers(agent: &AgentProcess, monitored: &Monitored) -> (u16, Option<i32>, bool, f64) {
    let probe = Command::new(agent::built_binary("weir-agent").unwrap()).arg("ready").output().unwrap();
    let (code, _, said) = shown(&probe);
    assert!(code == Some(0) || said.contains("the agent says that it is not ready"), "{said}");
    let status = agent.status().unwrap();
    let metrics = monitored.metrics();
    assert_eq!(metrics["weir_ready"], metrics["weir_canary_passing"]);
    let ready = status["agent"]["ready"].as_bool().unwrap();
    (monitored.get("/readyz").unwrap().0, code, ready, metrics["weir_ready"])
}

/// Where canaries go: to the least of all API servers' addresses.
fn dialled(agent: &AgentProcess) -> SocketAddr {
    let status = agent.status().unwrap();
    let known = status["apiEndpoints"].as_array().unwrap().iter();
    known.map(|address| address.as_str().unwrap().parse().unwrap()).min().unwrap()
}

/// A process of another user, which has got at the socket by which agents follow each other, is told nothing there.
pub(super) fn nobody_is_told_nothing() {
    const NOBODY: u32 = 65534;
    let (folder, socket) = ("/run/weir", "/run/weir/handover.sock");
    // By its descriptor: nobody may not come to where it lies.
    let program = fs::File::open(program()).unwrap();
    let ask = |user: u32| {
        let mut ask = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
        command::run(ask.args(["ask-agent", socket]).uid(user).gid(user)).unwrap().trim().to_owned()
    };
    let mode = |path: &str| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let set = |path: &str, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    let before = [folder, socket].map(mode);
    assert_eq!((before[0], ask(NOBODY).as_str()), (0o700, "failed EACCES"));
    set(folder, 0o755);
    set(socket, 0o777);
    let said = [NOBODY, 0].map(ask);
    set(folder, before[0]);
    set(socket, before[1]);
    assert_eq!(said, ["closed", "answered"]);
}
