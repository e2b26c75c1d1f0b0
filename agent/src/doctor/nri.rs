//! Whether the container runtime can be asked to wait: its NRI socket.

use std::{fs, os::unix::fs::FileTypeExt as _, path::Path};

use super::{Check, Need};

/// Looks for the socket, none where the configuration turns it off. It is not connected to: containerd takes one plugin at a
/// time, and waits for each to register.
pub fn check(socket: Option<&Path>) -> Check {
    let (name, need) = ("nri", Need::Should);
    let Some(socket) = socket else {
        let mend = "leave out `nri.enabled: false`, unless a plugin of yours cannot be beside others";
        return Check::bad(name, need, "turned off: a pod that calls at once may be refused at first", mend);
    };
    let found = match fs::metadata(socket) {
        Ok(found) if found.file_type().is_socket() => {
            return Check::good(name, need, format!("{}: containers wait for enrolment", socket.display()));
        }
        Ok(_) => "is no socket".to_owned(),
        Err(error) => error.to_string(),
    };
    let mend = "containerd 2 has it on: look for `disable = true` under [plugins.'io.containerd.nri.v1.nri'] in its configuration; for \
                containerd 1.7 set `disable = false` there, for CRI-O `enable_nri = true` under [crio.nri]; if it listens elsewhere, name \
                that in `nri.socket`, and where the agent runs in a pod mount the socket's folder. Without it a pod that calls at once \
                may be refused at first";
    Check::bad(name, need, format!("{}: {found}", socket.display()), mend)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::check;

    #[test]
    fn only_a_socket_is_taken_for_the_runtimes() {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("nri.sock");
        assert!(!check(Some(&socket)).ok, "is not there");
        std::fs::write(&socket, "").expect("writes");
        let file = check(Some(&socket));
        assert!(!file.ok && file.found.ends_with("is no socket"), "{file:?}");
        std::fs::remove_file(&socket).expect("removes");
        let _listener = UnixListener::bind(&socket).expect("listens");
        assert!(check(Some(&socket)).ok);
        assert!(check(None).mend.is_some_and(|mend| mend.contains("nri.enabled")));
    }
}
