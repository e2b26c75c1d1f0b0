//! What agents leave on a node beside their pins: the socket by which they follow each other, cgroups.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{canary, cgroup, pod::KUBEPODS_ROOTS};

/// Something of it that stays.
#[derive(Debug, thiserror::Error)]
#[error("cannot remove {}", path.display())]
pub struct LeftoverError {
    path: PathBuf,
    source: io::Error,
}

/// Removes it; no agent may run. `handover` is the socket, whose folder goes as well if nothing else is in it.
///
/// # Errors
/// Something that is only Weir's cannot be removed.
pub fn remove(handover: &Path) -> Result<(), LeftoverError> {
    if let Ok(mount) = cgroup::mount_point() {
        canary::remove_left(&mount);
        for root in KUBEPODS_ROOTS {
            // Made by the guard for a kubelet that has taken another one: what is in use cannot be removed.
            let _ = fs::remove_dir(mount.join(root));
        }
    }
    match fs::remove_file(handover) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(handover)(error)),
        _ => {}
    }
    handover.parent().map_or(Ok(()), remove_empty)
}

/// Removes a folder, if it is there and nothing is in it.
///
/// # Errors
/// The file system fails; where it is only kept, as by somebody's files in it, it stays.
pub fn remove_empty(folder: &Path) -> Result<(), LeftoverError> {
    match fs::remove_dir(folder) {
        // A container's own mount, where it goes with the node's next boot; or somebody else's files are in it, or it is a link or
        // guarded by other means: an empty folder harms nobody, and all else is gone already.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound
                    | io::ErrorKind::ResourceBusy
                    | io::ErrorKind::ReadOnlyFilesystem
                    | io::ErrorKind::DirectoryNotEmpty
                    | io::ErrorKind::NotADirectory
                    | io::ErrorKind::PermissionDenied
            ) =>
        {
            Ok(())
        }
        result => result.map_err(failed(folder)),
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> LeftoverError {
    let path = path.to_owned();
    move |source| LeftoverError { path, source }
}

#[cfg(test)]
mod tests {
    use super::{remove, remove_empty};

    #[test]
    fn a_folder_that_somebody_uses_stays() {
        let root = tempfile::tempdir().expect("a folder");
        let folder = root.path().join("nri");
        remove_empty(&folder).expect("nothing there");
        std::fs::create_dir(&folder).expect("makes it");
        std::fs::write(folder.join("nri.sock"), "").expect("writes it");
        remove_empty(&folder).expect("leaves it");
        assert!(folder.join("nri.sock").exists());
        std::fs::remove_file(folder.join("nri.sock")).expect("removes it");
        remove_empty(&folder).expect("removes it");
        assert!(!folder.exists());
        std::os::unix::fs::symlink(root.path(), &folder).expect("makes a link");
        remove_empty(&folder).expect("leaves the link");
        assert!(folder.is_symlink());
    }

    #[test]
    fn the_folder_goes_with_the_socket_unless_it_has_files_of_others() {
        let root = tempfile::tempdir().expect("a folder");
        let folder = root.path().join("weir");
        let socket = folder.join("handover.sock");
        remove(&socket).expect("nothing there");
        std::fs::create_dir(&folder).expect("makes it");
        std::fs::write(&socket, "").expect("writes it");
        std::fs::write(folder.join("other"), "").expect("writes it");
        remove(&socket).expect("removes the socket");
        assert!(!socket.exists() && folder.join("other").exists());
        std::fs::remove_file(folder.join("other")).expect("removes it");
        remove(&socket).expect("removes the folder");
        assert!(!folder.exists());
    }
}
