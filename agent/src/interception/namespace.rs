//! The network namespace of a pod, found through its processes.
//!
//! A pod's processes appear in its cgroup before they have entered its namespace (runc joins the cgroup first), and
//! later ones may make namespaces of their own. So: the oldest process that is not in the host's namespace, and
//! the file of its namespace is opened before it is checked that the process is still there.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    thread,
};

use super::{cgroup, process::Proc};

/// Most processes of a pod that are looked at.
const PROCESSES_MAX: usize = 4096;
/// Most cgroups of a pod that are looked at.
const FOLDERS_MAX: usize = 256;
/// Deepest cgroup below a pod's that is looked at: sandbox and containers, and one that a container made.
const DEPTH_MAX: usize = 2;

/// What tells network namespaces apart: device and inode of their file. An inode is used again only when the
/// namespace is gone, which a listener in it prevents.
pub(super) type NamespaceId = (u64, u64);

/// A pod's network namespace.
#[derive(Debug)]
pub(super) struct PodNamespace {
    /// Its opened file.
    pub(super) file: File,
    /// Its id.
    pub(super) id: NamespaceId,
}

/// The id of this process's network namespace: the host's, if it runs as it should.
///
/// # Errors
/// `/proc` cannot be read.
pub(super) fn own() -> io::Result<NamespaceId> {
    let metadata = fs::metadata("/proc/self/ns/net")?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Does some work in a network namespace, on a thread of its own that ends there: nothing of the agent stays behind or
/// changes its namespace.
///
/// # Errors
/// The namespace cannot be entered, or no thread started; that the work panicked is an error as well.
pub(super) fn within<T: Send>(namespace: &File, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        thread::Builder::new()
            .name("weir-netns".to_owned())
            .spawn_scoped(scope, || {
                nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
                Ok(work())
            })?
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread in the network namespace panicked")))
    })
}

/// The processes below a pod's folder, each with the folder it is in.
pub(super) fn processes(pod: &Path) -> Vec<(u32, PathBuf)> {
    let mut found = Vec::new();
    let mut pending = vec![(pod.to_owned(), 0)];
    let mut left = FOLDERS_MAX;
    while let Some((folder, depth)) = pending.pop() {
        if left == 0 || found.len() >= PROCESSES_MAX {
            break;
        }
        left -= 1;
        for pid in cgroup::processes(&folder).unwrap_or_default() {
            found.push((pid, folder.clone()));
        }
        if depth < DEPTH_MAX {
            let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
            let folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            pending.extend(folders.map(|entry| (entry.path(), depth + 1)));
        }
    }
    found.truncate(PROCESSES_MAX);
    found
}

/// The network namespace of a pod; none while it has no process in a namespace other than the host's.
pub(super) fn of_pod(pod: &Path, host: NamespaceId) -> Option<PodNamespace> {
    let proc = Proc::default();
    let mut processes: Vec<_> = processes(pod)
        .into_iter()
        .filter_map(|(pid, folder)| Some((proc.start_boottime_ns(pid)?, pid, folder)))
        .collect();
    processes.sort_unstable();
    processes.into_iter().find_map(|(started, pid, folder)| {
        let file = File::open(format!("/proc/{pid}/ns/net")).ok()?;
        let metadata = file.metadata().ok()?;
        let id = (metadata.dev(), metadata.ino());
        let still_there = proc.start_boottime_ns(pid) == Some(started)
            && cgroup::processes(&folder).is_ok_and(|now| now.contains(&pid));
        (id != host && still_there).then_some(PodNamespace { file, id })
    })
}
