//! What the testbed changed on this machine: written to `state.json` *before* each change, so that `down` can undo
//! it after a crash at any point.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::process::RecordedProcess;

/// Everything `down` must undo, apart from the folder itself.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct State {
    /// Boot of the machine: after another boot no process, mount or rule of ours is left.
    pub boot_id: String,
    /// Address and port of the API server, once chosen.
    pub api_server: String,
    /// Processes, in the order of their start.
    pub processes: Vec<RecordedProcess>,
    /// Kernel settings and their values before.
    pub settings: Vec<(PathBuf, String)>,
    /// Paths outside the folder that did not exist before.
    pub new_paths: Vec<PathBuf>,
    /// Whether the bpf file system was mounted by us.
    #[serde(default)]
    pub bpf_mount: bool,
    /// Whether the node was started: bridge, firewall chains, kubepods cgroups and mounts may exist.
    pub node: bool,
    /// Whether `up` went through.
    pub ready: bool,
}

/// Where things are in the testbed's folder.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The folder.
    pub root: PathBuf,
}

impl Layout {
    /// `name` below the folder.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Log of the process `name`.
    #[must_use]
    pub fn log(&self, name: &str) -> PathBuf {
        self.root.join("logs").join(format!("{name}.log"))
    }

    /// Kubeconfig of `user`: `admin`, `agent` or a component's name.
    #[must_use]
    pub fn kubeconfig(&self, user: &str) -> PathBuf {
        self.root.join("kubeconfig").join(format!("{user}.kubeconfig"))
    }

    /// Where containerd listens for NRI plugins.
    #[must_use]
    pub fn nri_socket(&self) -> PathBuf {
        self.path("containerd").join("state/nri.sock")
    }

    /// Socket of containerd.
    #[must_use]
    pub fn containerd_socket(&self) -> PathBuf {
        self.root.join("containerd/state/containerd.sock")
    }

    /// The API server's own audit log.
    #[must_use]
    pub fn audit_log(&self) -> PathBuf {
        self.root.join("audit/audit.log")
    }

    fn state_file(&self) -> PathBuf {
        self.root.join("state.json")
    }

    /// The recorded state, if a testbed was started in this folder.
    ///
    /// # Errors
    /// When the file is there but cannot be read.
    pub fn read_state(&self) -> Result<Option<State>> {
        let path = self.state_file();
        if !path.exists() {
            return Ok(None);
        }
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text).map(Some).with_context(|| format!("{} is damaged", path.display()))
    }

    /// Writes the state, whole or not at all.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn write_state(&self, state: &State) -> Result<()> {
        let path = self.state_file();
        let part = path.with_extension("part");
        fs::write(&part, serde_json::to_vec_pretty(state).context("cannot write the state as JSON")?)
            .and_then(|()| fs::rename(&part, &path))
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Id of this boot of the machine.
///
/// # Errors
/// When /proc is not mounted.
pub fn boot_id() -> Result<String> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .context("cannot read the boot id from /proc")?;
    Ok(text.trim().to_owned())
}

/// Where programs pin what shall outlive them; systemd mounts it at boot, a machine without systemd lacks it.
pub(super) const BPF_FOLDER: &str = "/sys/fs/bpf";

/// Whether a bpf file system is mounted at [`BPF_FOLDER`].
pub(super) fn is_bpf_mounted() -> Result<bool> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
    Ok(mounts.lines().any(|line| line.split(' ').nth(1) == Some(BPF_FOLDER)))
}

/// Where file systems of type `cgroup` and `cgroup2` are mounted.
///
/// # Errors
/// When /proc is not mounted.
pub fn cgroup_mounts() -> Result<Vec<PathBuf>> {
    mounts_of(&["cgroup", "cgroup2"])
}

/// Whether cgroup v2 is mounted, alone or beside v1.
pub(super) fn is_cgroup2_mounted() -> Result<bool> {
    Ok(!mounts_of(&["cgroup2"])?.is_empty())
}

fn mounts_of(types: &[&str]) -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    Ok(fields
        .filter(|fields| fields.len() > 2 && types.contains(&fields[2]))
        .map(|fields| Path::new(fields[1]).to_owned())
        .collect())
}
