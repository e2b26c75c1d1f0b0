//! Control groups (v2): where they are mounted and what the kernel calls them. No pods here.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use nix::sched::{CloneFlags, setns};

/// Why a cgroup cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The mounts cannot be read.
    #[error("cannot read /proc/self/mountinfo; is /proc mounted?")]
    Mounts(#[source] io::Error),
    /// There is no cgroup v2.
    #[error("no cgroup v2 is mounted; mount one (mount -t cgroup2 none /sys/fs/cgroup/unified)")]
    NotMounted,
    /// A cgroup's folder cannot be read.
    #[error("cannot read the cgroup {}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Enters the node's cgroup namespace where this process is in another: a container that is not privileged has its own, in
/// which `/proc/PID/cgroup` and the mounts name everything from the container's place in the tree. With the node's processes
/// in sight (`hostPID`) it is the one of the kernel's threads, or on a node that is a container itself of its first process;
/// without them it is this process's own.
///
/// Call it before there are threads: it is for the calling one, and those that it starts.
///
/// # Errors
/// The namespaces cannot be read, or not be entered (`CAP_SYS_PTRACE`, `CAP_SYS_ADMIN`).
pub fn enter_nodes_namespace() -> io::Result<()> {
    let of_kernel = fs::read_to_string("/proc/2/comm").is_ok_and(|name| name == "kthreadd\n");
    let nodes = fs::File::open(if of_kernel { "/proc/2/ns/cgroup" } else { "/proc/1/ns/cgroup" })?;
    let (own, other) = (fs::metadata("/proc/thread-self/ns/cgroup")?, nodes.metadata()?);
    if (own.dev(), own.ino()) == (other.dev(), other.ino()) {
        return Ok(());
    }
    Ok(setns(nodes, CloneFlags::CLONE_NEWCGROUP)?)
}

/// The mount point of cgroup v2: `/sys/fs/cgroup` where it is the only one, `/sys/fs/cgroup/unified` or another
/// where it is beside v1.
///
/// # Errors
/// There is none, or only one of a part of the hierarchy, where nothing can be attached to its root.
pub fn mount_point() -> Result<PathBuf, CgroupError> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(CgroupError::Mounts)?;
    let whole = find_mount(&mounts).filter(|mount| mount.root == Path::new("/"));
    Ok(whole.ok_or(CgroupError::NotMounted)?.path)
}

/// Where the v2 tree is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Mount point.
    pub path: PathBuf,
    /// Which cgroup of the tree is mounted there; `/` but in containers.
    pub root: PathBuf,
    /// Whether v1 controllers are mounted beside it.
    pub hybrid: bool,
}

/// Finds the v2 tree in the text of `/proc/self/mountinfo` (proc(5)): the mount nearest to the tree's root.
pub fn find_mount(mountinfo: &str) -> Option<Mount> {
    let mut found: Option<Mount> = None;
    let mut v1 = false;
    for line in mountinfo.lines() {
        let Some((before, after)) = line.split_once(" - ") else { continue };
        let kind = after.split(' ').next().unwrap_or_default();
        v1 |= kind == "cgroup";
        let mut fields = before.split(' ').skip(3);
        let (Some(root), Some(point)) = (fields.next(), fields.next()) else { continue };
        let root = PathBuf::from(unescape(root));
        if kind == "cgroup2"
            && found.as_ref().is_none_or(|best| root.as_os_str().len() < best.root.as_os_str().len())
        {
            found = Some(Mount { path: unescape(point).into(), root, hybrid: false });
        }
    }
    found.map(|mount| Mount { hybrid: v1, ..mount })
}

/// Blanks, tabs, line breaks and backslashes stand in mountinfo as three octal digits.
fn unescape(field: &str) -> String {
    ["\\040", "\\011", "\\012", "\\134"]
        .iter()
        .zip([" ", "\t", "\n", "\\"])
        .fold(field.to_owned(), |text, (code, plain)| text.replace(code, plain))
}

/// The id of a cgroup, as the kernel programs see it: the inode of its folder (kernfs, 64-bit kernels).
///
/// # Errors
/// The folder cannot be read.
pub fn id(folder: &Path) -> Result<u64, CgroupError> {
    let metadata = fs::metadata(folder);
    Ok(metadata.map_err(|source| CgroupError::Folder { path: folder.to_owned(), source })?.ino())
}

/// The cgroup of a process, as a path below the mount point; none if it has ended or is in no v2 cgroup.
pub fn of_process(pid: u32) -> Option<PathBuf> {
    let lines = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = lines.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(PathBuf::from(path))
}

/// The processes directly in a cgroup.
///
/// # Errors
/// The folder cannot be read.
pub fn processes(folder: &Path) -> Result<Vec<u32>, CgroupError> {
    let path = folder.join("cgroup.procs");
    let text = fs::read_to_string(&path).map_err(|source| CgroupError::Folder { path, source })?;
    // 0 stands for a process of a pid namespace that we cannot see.
    Ok(text.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid != 0).collect())
}

#[cfg(test)]
mod tests {
    use nix::sched::{CloneFlags, unshare};

    use super::{Mount, enter_nodes_namespace, find_mount, of_process, unescape};

    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";
    const UNIFIED: &str = "\
24 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
26 24 0:23 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate
90 24 0:23 /kubepods/x /mnt/a\\040b rw - cgroup2 cgroup2 rw
";

    #[test]
    fn the_v2_tree_is_found_in_unified_and_hybrid_mode() {
        let mount = |path: &str, hybrid| Some(Mount { path: path.into(), root: "/".into(), hybrid });
        assert_eq!(find_mount(HYBRID), mount("/sys/fs/cgroup/unified", true));
        assert_eq!(find_mount(UNIFIED), mount("/sys/fs/cgroup", false));
        assert_eq!(find_mount("24 1 8:1 / / rw - ext4 /dev/sda1 rw\n"), None);
        assert_eq!(find_mount("garbage\n - \n"), None);
        assert_eq!(unescape("/mnt/a\\040b"), "/mnt/a b");
    }

    #[test]
    fn from_a_namespace_of_its_own_a_process_sees_the_whole_tree_again() {
        if !nix::unistd::geteuid().is_root() {
            assert!(std::env::var_os("CI").is_none(), "CI must run this as root");
            eprintln!("skipped: needs root");
            return;
        }
        // Namespaces are a thread's, and this one ends with the test.
        let own = std::thread::spawn(|| {
            let place = || std::fs::read_to_string("/proc/thread-self/cgroup").expect("is there");
            let before = place();
            unshare(CloneFlags::CLONE_NEWCGROUP).expect("a namespace of its own");
            let hidden = place();
            enter_nodes_namespace().expect("the node's");
            (before, hidden, place())
        });
        let (before, hidden, after) = own.join().expect("ends");
        assert_eq!(before, after);
        // In the root of the tree there is nothing to hide.
        let root = of_process(std::process::id()).is_some_and(|path| path.as_os_str().is_empty());
        assert!(root || before != hidden, "{hidden}");
    }

    #[test]
    fn of_parts_of_the_hierarchy_the_one_nearest_to_its_root_is_taken() {
        let parts = "24 30 0:22 /docker/abc/d /a rw - cgroup2 cgroup2 rw\n25 30 0:22 /docker /b rw - cgroup2 cgroup2 rw";
        let mount = find_mount(parts).expect("is found");
        assert_eq!((mount.path, mount.root), ("/b".into(), "/docker".into()));
    }
}
