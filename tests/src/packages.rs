//! Installing Debian packages, also while another apt is at work.
//!
//! apt refuses to run beside another one. On a fresh machine that is the rule, not the exception: the toolchains of
//! the Go components and of the kernel programs are installed side by side (in `cargo xtask test` by two processes),
//! and the system's own daily update runs soon after boot. So whoever comes second waits, up to a bound.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::command::{find_in_path, run};
use crate::wait::wait_until;

/// Another apt has ended by then; an upgrade of a whole system can take this long.
const OTHER_APT_DEADLINE: Duration = Duration::from_secs(600);

/// What apt says about each of its locks (dpkg's, the package lists', the archives').
const LOCKED: &str = "Could not get lock";

/// What apt says of a package that no configured suite has.
const UNKNOWN: [&str; 2] = ["Unable to locate package", "has no installation candidate"];

/// Installs `packages`, after updating the lists: fresh images come without any.
///
/// # Errors
/// When this is no Debian, not root, or apt fails; the error has the mend or apt's last lines.
pub fn install(packages: &[&str]) -> Result<()> {
    let names = packages.join(" ");
    let Some(apt) = find_in_path("apt-get") else {
        bail!(
            "missing: {names} (Debian's names; there is no apt-get here); install what your system calls them"
        );
    };
    if !nix::unistd::geteuid().is_root() {
        bail!("missing Debian packages, and only root can install them: sudo apt-get install {names}");
    }
    install_with(&apt, packages)
}

/// Fetches a package and puts its files below `to`; the machine does not get it.
///
/// # Errors
/// When this is no Debian, or apt or dpkg fails; the error has their last lines.
pub fn unpack(package: &str, to: &Path) -> Result<()> {
    let Some(apt) = find_in_path("apt-get") else {
        bail!("there is no apt-get here, which fetches Debian's {package}");
    };
    let scratch = tempfile::tempdir().context("cannot make a scratch folder")?;
    run_alone(&apt, &["update", "-q"], scratch.path())?;
    run_alone(&apt, &["download", "-q", package], scratch.path())?;
    let mut files = fs::read_dir(scratch.path()).context("cannot read a scratch folder")?;
    let file = files.next().with_context(|| format!("apt has fetched no file of {package}"))?;
    run(Command::new("dpkg").arg("-x").arg(file.context("cannot read a scratch folder")?.path()).arg(to))
        .map(|_| ())
}

fn install_with(apt: &Path, packages: &[&str]) -> Result<()> {
    let here = Path::new("/");
    run_alone(apt, &["update", "-q"], here)?;
    let options = ["install", "-q", "-y", "--no-install-recommends"];
    match run_alone(apt, &[&options[..], packages].concat(), here) {
        Err(error) if UNKNOWN.iter().any(|text| format!("{error:#}").contains(text)) => Err(error).context(
            "a package is in no suite of this machine's apt sources; Debian 12 has rustc-web 1.96 and llvm-22 in \
             bookworm-security: is that suite enabled in /etc/apt/sources.list or sources.list.d?",
        ),
        outcome => outcome,
    }
}

/// Runs apt in a folder, again and again while another one holds a lock.
fn run_alone(apt: &Path, arguments: &[&str], folder: &Path) -> Result<()> {
    wait_until("another apt or dpkg to end", OTHER_APT_DEADLINE, || {
        let mut command = Command::new(apt);
        // apt itself waits for dpkg's lock alone; for the others it must be asked again.
        command.arg(format!("-oDPkg::Lock::Timeout={}", OTHER_APT_DEADLINE.as_secs())).args(arguments);
        command.current_dir(folder);
        // Its messages are read, so they must not be translated.
        match run(command.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C")) {
            Ok(_) => Ok(Some(())),
            Err(error) if format!("{error:#}").contains(LOCKED) => Ok(None),
            Err(error) => Err(error),
        }
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    use super::*;

    /// A program in apt-get's place that runs `script` and writes its arguments to `calls` beside it.
    fn apt(folder: &Path, script: &str) -> PathBuf {
        let path = folder.join("apt-get");
        let text = format!("#!/bin/sh\ncd {}\necho \"$@\" >> calls\n{script}\n", folder.display());
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn two_installations_at_once_both_succeed() {
        let folder = tempfile::tempdir().unwrap();
        // As apt: who finds the lock taken fails. It is held until the other has been refused once.
        let apt = apt(
            folder.path(),
            "if mkdir lock 2>/dev/null; then until [ -e refused ]; do :; done; rmdir lock
             else touch refused; echo 'E: Could not get lock /var/lib/apt/lists/lock.' >&2; exit 100; fi",
        );
        std::thread::scope(|scope| {
            let other = scope.spawn(|| install_with(&apt, &["one"]));
            install_with(&apt, &["two"]).unwrap();
            other.join().unwrap().unwrap();
        });
        let calls = fs::read_to_string(folder.path().join("calls")).unwrap();
        for package in ["one", "two"] {
            assert!(calls.contains(&format!("--no-install-recommends {package}\n")), "{calls}");
        }
    }

    #[test]
    fn a_package_of_a_suite_that_is_not_enabled_is_named_with_the_suite() {
        let folder = tempfile::tempdir().unwrap();
        let apt = apt(
            folder.path(),
            "case \"$*\" in *install*) echo 'E: Unable to locate package llvm-22-dev' >&2; exit 100;; esac",
        );
        let error = format!("{:#}", install_with(&apt, &["llvm-22-dev"]).unwrap_err());
        assert!(error.contains("bookworm-security") && error.contains("llvm-22-dev"), "{error}");
    }
}
