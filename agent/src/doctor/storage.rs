//! Whether the journal's folder can be written, and how much room there is.

use std::path::Path;

use nix::{
    sys::statvfs::statvfs,
    unistd::{AccessFlags, access},
};

use super::{Check, Need};

/// Below this much room, recording ends within minutes of traffic.
const FREE_BYTES_MIN: u64 = 256 * 1024 * 1024;

/// Looks at `folder`, or at what of its path exists; `wanted` is what the journal may grow to.
pub fn check(folder: &Path, wanted: u64) -> Check {
    let name = "journal";
    let existing = folder.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"));
    let shown = folder.display();
    if !existing.is_dir() {
        let mend = format!("remove {} or name another folder", existing.display());
        return Check::bad(name, Need::Must, format!("{} is not a folder", existing.display()), mend);
    }
    if let Err(error) = access(existing, AccessFlags::W_OK | AccessFlags::X_OK) {
        let mend = "name a folder that this user may write; in Kubernetes a hostPath that is not read-only";
        return Check::bad(
            name,
            Need::Must,
            format!("{} cannot be written: {}", existing.display(), error.desc()),
            mend,
        );
    }
    let free = match statvfs(existing) {
        Ok(statistics) => statistics.blocks_available().saturating_mul(statistics.fragment_size()),
        Err(error) => {
            let found = format!("free space of {} is unknown: {}", existing.display(), error.desc());
            return Check::bad(name, Need::Must, found, "is the file system mounted and healthy?");
        }
    };
    let mebibytes = |bytes: u64| bytes / (1024 * 1024);
    let found = format!("{shown}, {} MiB free", mebibytes(free));
    if free < wanted.min(FREE_BYTES_MIN) {
        let mend = "free some space or name a folder on another disk: requests are refused when it is full";
        return Check::bad(name, Need::Must, found, mend);
    }
    if free < wanted {
        let mend = format!(
            "the journal may grow to {} MiB; free some space or lower journal.bytesMax",
            mebibytes(wanted)
        );
        return Check::bad(name, Need::Should, found, mend);
    }
    Check::good(name, Need::Must, found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_does_not_exist_yet_is_judged_by_its_parent() {
        let folder = tempfile::tempdir().expect("temporary folder");
        assert!(check(&folder.path().join("a/b"), 1).ok);
        let file = folder.path().join("file");
        std::fs::write(&file, "").expect("write");
        assert!(check(&file.join("journal"), 1).found.ends_with("file is not a folder"));
        let greedy = check(folder.path(), u64::MAX);
        assert!(!greedy.ok && greedy.mend.is_some());
        assert!(!check(Path::new("/proc/journal"), 1).ok);
    }
}
