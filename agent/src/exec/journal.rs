//! The journal's folder on behalf of the invoking user: made with the user's rights, its files given to the user.
//!
//! The recorder writes as root. Without this, `sudo weir-agent exec` would leave records that its caller cannot
//! replay. They are evidence against accidents and for the caller, not against the caller: on the caller's own
//! machine nothing is.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::{
        fd::AsRawFd as _,
        unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, fchown, lchown},
    },
    path::{Path, PathBuf},
};

use super::invoker::{Invoker, InvokerError};

/// Deepest folder below the journal's that is given to the user.
const DEPTH_MAX: usize = 4;

/// Why there is no journal.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The user's rights cannot be taken.
    #[error(transparent)]
    Rights(#[from] InvokerError),
    /// The folder cannot be made.
    #[error("cannot make the journal's folder {}; name one that you may write with --journal DIR", path.display())]
    Make {
        /// The folder.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Makes `folder` and what is missing above it, with the user's rights, for the user alone.
///
/// # Errors
/// The user may not.
pub fn prepare(folder: &Path, invoker: &Invoker) -> Result<(), JournalError> {
    invoker
        .with_rights(|| DirBuilder::new().recursive(true).mode(0o700).create(folder))?
        .map_err(|source| JournalError::Make { path: folder.into(), source })
}

/// Gives what root has written below `folder` to the user. Follows no symbolic link: the user may have put one there.
///
/// # Errors
/// A folder cannot be read or an owner not be changed.
pub fn hand_over(folder: &Path, invoker: &Invoker) -> io::Result<()> {
    if invoker.uid.is_root() {
        return Ok(());
    }
    let opened = open_folder(folder)?;
    hand_over_entries(&opened, invoker, DEPTH_MAX)
}

fn open_folder(path: &Path) -> io::Result<File> {
    File::options().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(path)
}

/// Works through the descriptor, so that a folder swapped for a link meanwhile leads nowhere.
fn hand_over_entries(folder: &File, invoker: &Invoker, depth: usize) -> io::Result<()> {
    let (uid, gid) = (Some(invoker.uid.as_raw()), Some(invoker.gid.as_raw()));
    let pinned = PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd()));
    for entry in fs::read_dir(&pinned)? {
        let path = pinned.join(entry?.file_name());
        let metadata = fs::symlink_metadata(&path)?;
        if metadata.uid() != 0 {
            continue;
        }
        if metadata.is_dir() && depth > 0 {
            let below = open_folder(&path)?;
            hand_over_entries(&below, invoker, depth - 1)?;
            fchown(&below, uid, gid)?;
        } else if metadata.is_file() {
            lchown(&path, uid, gid)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_root_wrote_becomes_the_users_and_links_lead_nowhere() {
        if !nix::unistd::Uid::effective().is_root() {
            assert!(std::env::var_os("CI").is_none(), "CI must run this as root");
            eprintln!("skipped: needs root");
            return;
        }
        let invoker = Invoker::find(|name| (name == "SUDO_UID").then(|| "65534".to_owned())).expect("nobody");
        let folder = tempfile::tempdir_in("/tmp").expect("temporary folder");
        let outside = folder.path().join("outside");
        fs::write(&outside, "").expect("write");
        let home = folder.path().join("home");
        fs::create_dir(&home).expect("folder");
        for path in [folder.path(), &home] {
            fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("mode");
        }
        let journal = home.join("state/weir");
        let refused = prepare(&journal, &invoker).expect_err("the folder above is root's");
        assert!(refused.to_string().contains("--journal DIR"), "{refused}");
        lchown(&home, Some(65534), Some(65534)).expect("chown");
        prepare(&journal, &invoker).expect("the user may");
        fs::create_dir(journal.join("epoch")).expect("folder");
        fs::write(journal.join("epoch/segment"), "").expect("write");
        std::os::unix::fs::symlink(&outside, journal.join("epoch/link")).expect("link");
        hand_over(&journal, &invoker).expect("handed over");
        let owner = |path: &Path| fs::metadata(path).expect("there").uid();
        assert_eq!(owner(&journal), 65534);
        assert_eq!(owner(&journal.join("epoch")), 65534);
        assert_eq!(owner(&journal.join("epoch/segment")), 65534);
        assert_eq!(owner(&outside), 0);
    }
}
