//! The command's own cgroup in the cgroup v2 tree, wherever that is mounted, and its end.
//!
//! The cgroup is made below this process's own, so that limits set on it (a CI job's, a login session's) hold
//! for the command too. Whoever is left in it when the command has ended is ended as well: nothing may go on
//! unrecorded. Programs attached to it are the interception's business.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::time::Instant;

use crate::interception::cgroup::{Mount, find_mount};

/// Start of the names of such cgroups; the process id follows.
const NAME_PREFIX: &str = "weir-exec-";
/// How long what is left of the command may take to end by itself after SIGTERM.
const LEFTOVERS_GRACE: Duration = Duration::from_secs(3);
/// How long the kernel may take to end it after SIGKILL.
const KILL_DEADLINE: Duration = Duration::from_secs(5);
/// How often the cgroup is asked whether it is empty.
const EMPTY_CHECK: Duration = Duration::from_millis(20);

/// How many this process has made: tells their names apart.
static CREATED: AtomicU32 = AtomicU32::new(0);

/// Why there is no cgroup for the command.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// Nothing of type cgroup2 is mounted.
    #[error("cgroup v2 is not mounted; mount it: mount -t cgroup2 none /sys/fs/cgroup/unified")]
    NotMounted,
    /// A file of the tree cannot be read or written.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Processes in it survive SIGKILL.
    #[error("processes in {} do not end; end them and remove the folder", path.display())]
    Busy {
        /// The cgroup.
        path: PathBuf,
    },
}

/// The folder of the v2 cgroup named in the text of `/proc/<pid>/cgroup`, below `mount`.
fn folder_of(proc_cgroup: &str, mount: &Mount) -> Option<PathBuf> {
    let path = proc_cgroup.lines().find_map(|line| line.strip_prefix("0::"))?;
    let below = Path::new(path).strip_prefix(&mount.root).ok()?;
    Some(mount.path.join(below))
}

/// A cgroup made by this process. Removed by [`CommandCgroup::end`], or as far as that goes when dropped.
#[derive(Debug)]
pub struct CommandCgroup {
    path: PathBuf,
    removed: bool,
}

impl CommandCgroup {
    /// Makes one for this process's command.
    ///
    /// # Errors
    /// There is no cgroup v2, or it cannot be written.
    pub fn create() -> Result<Self, CgroupError> {
        let read =
            |path: &str| fs::read_to_string(path).map_err(|source| io_error("read", Path::new(path), source));
        let mount = find_mount(&read("/proc/self/mountinfo")?).ok_or(CgroupError::NotMounted)?;
        let parent = folder_of(&read("/proc/self/cgroup")?, &mount).unwrap_or_else(|| mount.path.clone());
        remove_stale(&parent);
        let number = CREATED.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!("{NAME_PREFIX}{}-{number}", std::process::id()));
        fs::create_dir(&path).map_err(|source| io_error("make the cgroup", &path, source))?;
        Ok(Self { path, removed: false })
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its id, as `bpf_get_current_cgroup_id` has it: the folder's inode number.
    ///
    /// # Errors
    /// The folder is gone.
    pub fn id(&self) -> Result<u64, CgroupError> {
        let metadata = fs::metadata(&self.path).map_err(|source| io_error("read", &self.path, source))?;
        Ok(metadata.ino())
    }

    /// Its `cgroup.procs`, open for writing: who writes `0` to it is in.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn open_procs(&self) -> Result<fs::File, CgroupError> {
        let path = self.path.join("cgroup.procs");
        fs::File::options().write(true).open(&path).map_err(|source| io_error("open", &path, source))
    }

    /// Ends whoever is left (SIGTERM, then SIGKILL) and removes the cgroup and those made below it. Returns how
    /// many processes were left.
    ///
    /// # Errors
    /// Processes survive, or the folder cannot be removed.
    pub async fn end(mut self) -> Result<usize, CgroupError> {
        let left = self.members();
        for pid in &left {
            // Gone since: what was wanted.
            let _ = kill(*pid, Signal::SIGTERM);
        }
        if !self.wait_until_empty(LEFTOVERS_GRACE).await {
            let path = self.path.join("cgroup.kill");
            fs::write(&path, "1").map_err(|source| io_error("write", &path, source))?;
            if !self.wait_until_empty(KILL_DEADLINE).await {
                return Err(CgroupError::Busy { path: self.path.clone() });
            }
        }
        remove_tree(&self.path).map_err(|source| io_error("remove", &self.path, source))?;
        self.removed = true;
        Ok(left.len())
    }

    fn members(&self) -> Vec<Pid> {
        let mut members = Vec::new();
        let mut folders = vec![self.path.clone()];
        while let Some(folder) = folders.pop() {
            let procs = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
            members.extend(procs.lines().filter_map(|line| line.parse().ok()).map(Pid::from_raw));
            folders.extend(subfolders(&folder));
        }
        members
    }

    async fn wait_until_empty(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let events = self.path.join("cgroup.events");
        loop {
            // Covers cgroups below it too.
            if fs::read_to_string(&events).is_ok_and(|text| text.lines().any(|line| line == "populated 0")) {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            tokio::time::sleep(EMPTY_CHECK).await;
        }
    }
}

impl Drop for CommandCgroup {
    fn drop(&mut self) {
        if !self.removed {
            // An error path: nobody should be in it, and a folder that stays is named by the next look at it.
            let _ = fs::write(self.path.join("cgroup.kill"), "1");
            let _ = remove_tree(&self.path);
        }
    }
}

/// Removes what a killed `exec` has left beside the new cgroup: named for a process that is gone, and empty.
fn remove_stale(parent: &Path) {
    for folder in subfolders(parent) {
        let pid = folder.file_name().and_then(|name| {
            name.to_str()?.strip_prefix(NAME_PREFIX)?.split('-').next()?.parse::<u32>().ok()
        });
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            // With processes in it it stays: their agent is gone, and ending them is for whoever killed it.
            let _ = remove_tree(&folder);
        }
    }
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> CgroupError {
    CgroupError::Io { action, path: path.into(), source }
}

fn subfolders(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

/// Removes a cgroup and those below it; its files are the kernel's and go with it.
fn remove_tree(folder: &Path) -> io::Result<()> {
    for child in subfolders(folder) {
        remove_tree(&child)?;
    }
    fs::remove_dir(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_cgroup_is_found_below_the_mount() {
        let mount = Mount { path: "/sys/fs/cgroup".into(), root: "/".into(), hybrid: false };
        let own = "1:cpu:/x\n0::/user.slice/session-1.scope\n";
        assert_eq!(folder_of(own, &mount), Some("/sys/fs/cgroup/user.slice/session-1.scope".into()));
        let container = Mount { root: "/kubepods/x".into(), ..mount };
        assert_eq!(folder_of("0::/kubepods/x/y", &container), Some("/sys/fs/cgroup/y".into()));
        assert_eq!(folder_of("0::/elsewhere", &container), None);
    }
}
