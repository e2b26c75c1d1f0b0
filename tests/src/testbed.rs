//! A one-node Kubernetes cluster of real components on this machine: up, down, status, and kubectl to drive it.
//!
//! Everything lies in one folder; what has to be outside it (bridge, firewall chains, cgroups, kernel settings) is
//! recorded there before it is made and is gone after `down`. One testbed per machine. What runs in the cluster is
//! not this module's: see [`crate::pods`].

mod control_plane;
mod images;
mod node;
mod outage;
mod state;
mod teardown;

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};

use crate::command::{run, tail};
use crate::components::{Components, base_folder};
use crate::process::RecordedProcess;
use crate::progress::Progress;
use crate::wait::wait_until;

pub use control_plane::{API_CLUSTER_IP, AUTHENTICATOR_PORT, ENDPOINT_NAME, free_ports};
pub use images::{AGENT_IMAGE, PAUSE_IMAGE};
pub use node::{BRIDGE, BRIDGE_ADDRESS, CONTAINERD_NAMESPACE, NODE_NAME, POD_RANGE};
pub use outage::{ChangedFlags, Outage};
pub use state::{Layout, State, boot_id, cgroup_mounts};

/// Longest path of the folder: containerd's socket in it must stay below the 108 bytes of a socket address.
const FOLDER_BYTES_MAX: usize = 60;

/// Lines of each log that the error of a failed `up` shows.
const FAILURE_LINES: usize = 10;

/// In the environment of every process of a testbed, with its folder as value: finds what was started just before
/// a crash and not yet recorded, and containerd's shims, which inherit it.
const MARK: &str = "WEIR_TESTBED_FOLDER";

/// Where a kernel with BTF shows its types.
const TYPE_INFORMATION: &str = "/sys/kernel/btf/vmlinux";

/// Another `up` or `down` is over by then.
const LOCK_DEADLINE: Duration = Duration::from_secs(300);

/// A running testbed.
#[derive(Debug)]
pub struct Testbed {
    layout: Layout,
    components: Components,
    state: State,
    /// Whether this value started it; else it was up before.
    is_started_here: bool,
    down_on_drop: bool,
}

/// A testbed that is being started.
struct Start<'a> {
    layout: &'a Layout,
    components: &'a Components,
    state: State,
}

impl Testbed {
    /// `$XDG_STATE_HOME/weir-testbed`, else `~/.local/state/weir-testbed`.
    ///
    /// # Errors
    /// When neither XDG_STATE_HOME nor HOME is set.
    pub fn default_folder() -> Result<PathBuf> {
        base_folder("XDG_STATE_HOME", ".local/state").map(|folder| folder.join("weir-testbed"))
    }

    /// Refuses a machine on which [`Testbed::up`] cannot work, without changing it. For callers that build for half an
    /// hour first.
    ///
    /// # Errors
    /// What is missing or in the way, with the mend.
    pub fn check_machine(folder: &Path) -> Result<()> {
        require_root()?;
        if !Path::new(TYPE_INFORMATION).is_file() {
            bail!(
                "the kernel has no type information ({TYPE_INFORMATION}), which the kernel programs need; boot \
                 one of Debian's or any other built with CONFIG_DEBUG_INFO_BTF=y"
            );
        }
        if !state::is_cgroup2_mounted()? {
            bail!(
                "cgroup v2 is not mounted; boot with systemd, or: \
                 mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified"
            );
        }
        if Self::status(folder)?.is_none() {
            node::refuse_foreign_node(&cgroup_mounts()?)?;
        }
        Ok(())
    }

    /// Starts a testbed in `folder`, or attaches to the one that runs there. Builds what is missing.
    ///
    /// # Errors
    /// When it does not come up: what had been started is stopped and removed again, and the error has the last
    /// lines of the logs.
    pub fn up(folder: &Path, progress: Progress) -> Result<Self> {
        require_root()?;
        let components = Components::build(progress)?;
        let layout = layout(folder)?;
        let _lock = lock()?;
        if let Some(state) = layout.read_state()? {
            if state.ready
                && state.boot_id == boot_id()?
                && state.processes.iter().all(RecordedProcess::is_running)
            {
                progress.say(&format!("the testbed in {} is up already", layout.root.display()));
                return Ok(Self { layout, components, state, is_started_here: false, down_on_drop: false });
            }
            progress.step("remove what an earlier testbed left", || teardown::remove(&layout, &state))?;
        }
        node::refuse_foreign_node(&cgroup_mounts()?)?;
        let mut start = Start { layout: &layout, components: &components, state: new_state()? };
        match start.run(progress) {
            Ok(()) => {
                let state = start.state;
                Ok(Self { layout, components, state, is_started_here: true, down_on_drop: false })
            }
            Err(error) => {
                let state = start.state;
                let logs = last_lines_of_logs(&state);
                crate::wait::clear_interrupt();
                let removed = progress.step("remove what was started", || teardown::remove(&layout, &state));
                let left = removed.err().map(|left| format!("and it is not wholly removed: {left:#}\n"));
                bail!("the testbed did not come up: {error:#}\n{}{logs}", left.unwrap_or_default());
            }
        }
    }

    /// Attaches to the testbed that runs in `folder`.
    ///
    /// # Errors
    /// When there is none, or a part of it has ended.
    pub fn attach(folder: &Path) -> Result<Self> {
        require_root()?;
        let layout = layout(folder)?;
        let Some(state) = layout.read_state()?.filter(|state| state.ready) else {
            bail!("no testbed is up in {}; run `cargo xtask testbed up`", layout.root.display());
        };
        if let Some(ended) = state.processes.iter().find(|process| !process.is_running()) {
            bail!(
                "{} of the testbed has ended; run `cargo xtask testbed down`, then up\n{}",
                ended.name,
                tail(&ended.log, FAILURE_LINES)
            );
        }
        let components = Components::find()?;
        Ok(Self { layout, components, state, is_started_here: false, down_on_drop: false })
    }

    /// Stops and removes the testbed of `folder`, however much of it is there.
    ///
    /// # Errors
    /// When something is left; the error names it.
    pub fn down(folder: &Path, progress: Progress) -> Result<()> {
        require_root()?;
        let layout = layout(folder)?;
        let _lock = lock()?;
        let Some(state) = layout.read_state()? else {
            progress.say(&format!("no testbed in {}", layout.root.display()));
            return Ok(());
        };
        progress.step("stop and remove the testbed", || teardown::remove(&layout, &state))
    }

    /// The processes of the testbed in `folder`, and whether each runs; none if there is no testbed.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn status(folder: &Path) -> Result<Option<State>> {
        layout(folder)?.read_state()
    }

    /// Takes the testbed down when this value goes, if this value started it; one that was up before stays up.
    #[must_use]
    pub fn down_on_drop(mut self) -> Self {
        self.down_on_drop = self.is_started_here;
        self
    }

    /// Whether this value started the testbed.
    #[must_use]
    pub fn is_started_here(&self) -> bool {
        self.is_started_here
    }

    /// Runs the real kubectl as the cluster's administrator and gives its output.
    ///
    /// # Errors
    /// When kubectl fails; the error has what it wrote.
    pub fn kubectl<S: AsRef<std::ffi::OsStr>>(&self, arguments: &[S]) -> Result<String> {
        run(self.kubectl_command().args(arguments))
    }

    /// The real kubectl as the cluster's administrator, to add arguments to.
    #[must_use]
    pub fn kubectl_command(&self) -> Command {
        kubectl(&self.components, &self.layout)
    }

    /// Applies objects given as YAML.
    ///
    /// # Errors
    /// When kubectl refuses them.
    pub fn apply(&self, objects: &str) -> Result<()> {
        let mut file = tempfile::NamedTempFile::new().context("cannot make a scratch file")?;
        std::io::Write::write_all(&mut file, objects.as_bytes()).context("cannot write a scratch file")?;
        run(self.kubectl_command().args(["apply", "-f"]).arg(file.path())).map(|_| ())
    }

    /// containerd's ctr in the kubelet's namespace, to add arguments to.
    #[must_use]
    pub fn ctr_command(&self) -> Command {
        ctr(&self.components, &self.layout)
    }

    /// Where its files are.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Its binaries.
    #[must_use]
    pub fn components(&self) -> &Components {
        &self.components
    }

    /// Address of the API server itself, `IP:PORT`; pods dial [`API_CLUSTER_IP`] instead.
    #[must_use]
    pub fn api_server(&self) -> &str {
        &self.state.api_server
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        if self.down_on_drop {
            crate::wait::clear_interrupt();
            if let Err(error) = Self::down(&self.layout.root, Progress::Shown) {
                Progress::Shown.say(&format!("the testbed is not wholly down: {error:#}"));
            }
        }
    }
}

impl Start<'_> {
    fn run(&mut self, progress: Progress) -> Result<()> {
        let begin = Instant::now();
        control_plane::make_folders(self)?;
        self.layout.write_state(&self.state)?;
        if self.state.bpf_mount {
            node::mount_bpf()?;
        }
        progress.step("start etcd and kube-apiserver", || {
            node::create_bridge()?;
            let [port] = control_plane::free_ports(BRIDGE_ADDRESS)?;
            let server = format!("{BRIDGE_ADDRESS}:{port}");
            self.state.api_server.clone_from(&server);
            control_plane::write_credentials(self, &server)?;
            control_plane::start_api_server(self, &server)
        })?;
        // The API server needs some seconds for itself; the images go to containerd meanwhile.
        progress.step("start containerd, import images", || {
            node::start_containerd(self)?;
            images::import(self)
        })?;
        progress.step("wait for the API server", || control_plane::wait_for_api_server(self))?;
        progress.step("start controllers, kubelet and kube-proxy", || {
            control_plane::start_controllers(self)?;
            node::start_kubelet(self)?;
            node::start_kube_proxy(self)
        })?;
        progress.step("wait for the node", || {
            control_plane::prepare_cluster(self)?;
            node::wait_for_node(self)
        })?;
        self.state.ready = true;
        self.layout.write_state(&self.state)?;
        progress.say(&format!("the testbed is up ({:.1} s)", begin.elapsed().as_secs_f64()));
        Ok(())
    }

    fn spawn(&mut self, name: &str, command: &mut Command) -> Result<()> {
        command.env(MARK, &self.layout.root);
        let process = RecordedProcess::spawn(name, command, &self.layout.log(name))?;
        self.state.processes.push(process);
        self.layout.write_state(&self.state)
    }

    /// Fails as soon as a process has ended, instead of at a deadline.
    fn check_running(&self) -> Result<()> {
        match self.state.processes.iter().find(|process| !process.is_running()) {
            Some(ended) => bail!("{} has ended", ended.name),
            None => Ok(()),
        }
    }

    fn kubectl(&self) -> Command {
        kubectl(self.components, self.layout)
    }

    fn ctr(&self) -> Command {
        ctr(self.components, self.layout)
    }
}

fn kubectl(components: &Components, layout: &Layout) -> Command {
    let mut command = Command::new(components.binary("kubectl"));
    command.arg("--kubeconfig").arg(layout.kubeconfig("admin")).stdin(Stdio::null());
    // Its discovery cache must not outlive the cluster it is of.
    command.env("KUBECACHEDIR", layout.path("kubectl-cache")).env_remove("KUBECONFIG");
    command
}

fn ctr(components: &Components, layout: &Layout) -> Command {
    let mut command = Command::new(components.binary("ctr"));
    command.arg("--address").arg(layout.containerd_socket()).args(["--namespace", CONTAINERD_NAMESPACE]);
    command
}

fn new_state() -> Result<State> {
    let settings = node::SETTINGS
        .iter()
        .map(|name| Path::new("/proc/sys").join(name))
        .filter_map(|path| fs::read_to_string(&path).ok().map(|value| (path, value.trim().to_owned())))
        .collect();
    let new_paths = node::FIXED_PATHS.iter().map(PathBuf::from).filter(|path| !path.exists()).collect();
    let bpf_mount = !state::is_bpf_mounted()?;
    Ok(State { boot_id: boot_id()?, settings, new_paths, bpf_mount, node: true, ..State::default() })
}

fn layout(folder: &Path) -> Result<Layout> {
    let root = std::path::absolute(folder).with_context(|| format!("cannot resolve {}", folder.display()))?;
    if root.as_os_str().len() > FOLDER_BYTES_MAX {
        bail!(
            "{} is too long for the sockets in it; choose a folder of at most {FOLDER_BYTES_MAX} bytes",
            root.display()
        );
    }
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(root.parent().unwrap_or(&root))
        .with_context(|| format!("cannot make {}", root.display()))?;
    Ok(Layout { root })
}

/// One `up` or `down` at a time on this machine. The lock is on a folder that is always there, so that no file stays.
fn lock() -> Result<Flock<fs::File>> {
    let folder = fs::File::open("/run").context("cannot open /run")?;
    wait_until("another `testbed up` or `down` to end", LOCK_DEADLINE, || {
        let folder = folder.try_clone().context("cannot share the lock")?;
        Ok(Flock::lock(folder, FlockArg::LockExclusiveNonblock).ok())
    })
}

fn require_root() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "the testbed needs root for network namespaces, mounts and cgroups; run the command as root: \
             sudo -E env \"PATH=$PATH\" cargo xtask …"
        );
    }
    Ok(())
}

/// Logs of what has ended; of everything where nothing has.
fn last_lines_of_logs(state: &State) -> String {
    let ended: Vec<_> = state.processes.iter().filter(|process| !process.is_running()).collect();
    let shown = if ended.is_empty() { state.processes.iter().collect() } else { ended };
    let part =
        |process: &&RecordedProcess| format!("--- {}\n{}\n", process.name, tail(&process.log, FAILURE_LINES));
    shown.iter().map(part).collect()
}
