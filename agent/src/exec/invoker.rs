//! The user on whose behalf `exec` runs: under sudo the one who called it, else whoever runs the process.
//!
//! Files that the user names (kubeconfig, keys, CA bundles) are read, and the journal's folder is made, with
//! that user's rights and not root's, so that a sudo rule for this one command opens no other file.

use std::{
    ffi::CString,
    io,
    path::{Path, PathBuf},
};

use nix::unistd::{Gid, Uid, User, getgrouplist, setfsgid, setfsuid};

/// Why it is not known who called.
#[derive(Debug, thiserror::Error)]
pub enum InvokerError {
    /// `SUDO_UID` is not a number.
    #[error(
        "SUDO_UID is {value:?}, not a user id; call weir-agent through sudo itself, or as root without it"
    )]
    SudoUid {
        /// Its value.
        value: String,
    },
    /// The user has no entry.
    #[error("there is no user with id {uid} on this machine; is SUDO_UID right?")]
    Unknown {
        /// The id.
        uid: Uid,
    },
    /// The user data base cannot be read.
    #[error("cannot look up the user with id {uid}")]
    Lookup {
        /// The id.
        uid: Uid,
        /// Why.
        source: nix::Error,
    },
    /// A thread cannot take the user's rights.
    #[error("cannot act with the rights of the user {name}")]
    Rights {
        /// The user.
        name: String,
        /// Why.
        source: io::Error,
    },
}

/// Who called.
#[derive(Clone, Debug)]
pub struct Invoker {
    /// User id.
    pub uid: Uid,
    /// Primary group.
    pub gid: Gid,
    /// All groups.
    pub groups: Vec<Gid>,
    /// Login name.
    pub name: String,
    /// Home folder: from `$HOME`, or from the user data base under sudo, which may have changed `$HOME`.
    pub home: PathBuf,
    /// Whether sudo stands between.
    pub under_sudo: bool,
}

impl Invoker {
    /// Finds out from `environment` (`SUDO_UID`, `HOME`).
    ///
    /// # Errors
    /// The user cannot be found.
    pub fn find(environment: impl Fn(&str) -> Option<String>) -> Result<Self, InvokerError> {
        let sudo = environment("SUDO_UID").filter(|_| Uid::effective().is_root());
        let uid = match &sudo {
            Some(value) => value
                .parse()
                .map(Uid::from_raw)
                .map_err(|_not_a_number| InvokerError::SudoUid { value: value.clone() })?,
            None => Uid::effective(),
        };
        let user = User::from_uid(uid)
            .map_err(|source| InvokerError::Lookup { uid, source })?
            .ok_or(InvokerError::Unknown { uid })?;
        let under_sudo = sudo.is_some();
        let groups = CString::new(user.name.clone())
            .map_err(|_nul| nix::Error::EINVAL)
            .and_then(|name| getgrouplist(&name, user.gid))
            .map_err(|source| InvokerError::Lookup { uid, source })?;
        let home = environment("HOME").filter(|home| !under_sudo && !home.is_empty());
        let home = home.map_or(user.dir, PathBuf::from);
        Ok(Self { uid, gid: user.gid, groups, name: user.name, home, under_sudo })
    }

    /// Where the journal is kept unless the caller says otherwise: `$XDG_STATE_HOME/weir/journal`, else
    /// `~/.local/state/weir/journal`, of this user.
    pub fn journal(&self, state_home: Option<&str>) -> PathBuf {
        let state = state_home.map(Path::new).filter(|path| path.is_absolute() && !self.under_sudo);
        let state = state.map_or_else(|| self.home.join(".local/state"), Path::to_path_buf);
        state.join("weir/journal")
    }

    /// Runs `work` on a thread that opens and makes files with this user's rights.
    ///
    /// # Errors
    /// The thread cannot take those rights.
    pub fn with_rights<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, InvokerError> {
        if self.uid.is_root() {
            return Ok(work());
        }
        let failed = |source| InvokerError::Rights { name: self.name.clone(), source };
        let outcome = std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    self.take_file_rights()?;
                    Ok(work())
                })
                .join()
        });
        match outcome {
            Ok(done) => done.map_err(failed),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// For the calling thread, for good.
    fn take_file_rights(&self) -> io::Result<()> {
        let groups: Vec<libc::gid_t> = self.groups.iter().map(|group| group.as_raw()).collect();
        // SAFETY: the pointer and length are those of a live array. The raw system call concerns the calling
        // thread alone, which ends with its work; libc's wrapper would change the groups of all threads.
        let refused = unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) } != 0;
        if refused {
            return Err(io::Error::last_os_error());
        }
        setfsgid(self.gid);
        setfsuid(self.uid);
        // These two tell failure only by what a second call returns: the id in force.
        if setfsgid(self.gid) != self.gid || setfsuid(self.uid) != self.uid {
            return Err(io::Error::from(io::ErrorKind::PermissionDenied));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOBODY: u32 = 65534;

    fn under_sudo(uid: &str) -> Result<Invoker, InvokerError> {
        let uid = uid.to_owned();
        Invoker::find(move |name| (name == "SUDO_UID").then(|| uid.clone()))
    }

    #[test]
    fn without_sudo_home_is_the_environments() {
        let invoker = Invoker::find(|name| (name == "HOME").then(|| "/home/ada".to_owned())).expect("found");
        assert_eq!(invoker.home, Path::new("/home/ada"));
        assert_eq!(invoker.journal(None), Path::new("/home/ada/.local/state/weir/journal"));
        assert_eq!(invoker.journal(Some("/state")), Path::new("/state/weir/journal"));
        assert_eq!(invoker.journal(Some("relative")), Path::new("/home/ada/.local/state/weir/journal"));
    }

    #[test]
    fn under_sudo_the_caller_is_found_and_files_are_opened_with_the_callers_rights() {
        if !Uid::effective().is_root() {
            assert!(std::env::var_os("CI").is_none(), "CI must run this as root");
            eprintln!("skipped: needs root");
            return;
        }
        let invoker = under_sudo(&NOBODY.to_string()).expect("found");
        assert_eq!((invoker.uid.as_raw(), invoker.under_sudo), (NOBODY, true));
        assert_ne!(invoker.home, Path::new("/root"));
        let opened = invoker.with_rights(|| std::fs::read("/etc/shadow")).expect("rights");
        assert_eq!(opened.expect_err("must be refused").kind(), io::ErrorKind::PermissionDenied);
        assert!(std::fs::read("/etc/shadow").is_ok(), "other threads keep their rights");
        assert!(under_sudo("ada").is_err());
        assert!(under_sudo("4000000000").is_err());
    }
}
