//! Control groups (v2): where they are mounted and what the kernel calls them. No pods here.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

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

/// The mount point of cgroup v2: `/sys/fs/cgroup` where it is the only one, `/sys/fs/cgroup/unified` or another
/// where it is beside v1.
///
/// # Errors
/// There is none.
pub fn mount_point() -> Result<PathBuf, CgroupError> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(CgroupError::Mounts)?;
    in_mountinfo(&mounts).ok_or(CgroupError::NotMounted)
}

/// The first cgroup2 mount of the whole hierarchy; a bind mount of a part of it is none that can be used.
fn in_mountinfo(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        // proc_pid_mountinfo(5): id, parent, device, root, mount point, …, "-", type, source, options.
        let (fields, rest) = line.split_once(" - ")?;
        let mut fields = fields.split(' ').skip(3);
        let (root, mount) = (fields.next()?, fields.next()?);
        (rest.split(' ').next() == Some("cgroup2") && root == "/").then(|| PathBuf::from(mount))
    })
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
    use std::path::PathBuf;

    use super::in_mountinfo;

    #[test]
    fn unified_and_hybrid_mounts_are_found() {
        let unified = "24 30 0:22 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate";
        assert_eq!(in_mountinfo(unified), Some(PathBuf::from("/sys/fs/cgroup")));
        let hybrid = "30 24 0:25 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755\n\
                      31 30 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                      32 30 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory";
        assert_eq!(in_mountinfo(hybrid), Some(PathBuf::from("/sys/fs/cgroup/unified")));
    }

    #[test]
    fn a_part_of_the_hierarchy_is_no_mount_point() {
        let part = "24 30 0:22 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw";
        assert_eq!(in_mountinfo(part), None);
    }
}
