//! Python programs of the testbed: each in a virtual environment of its own in the cache, from a lock file with hashes.
//!
//! A stamp (digest of the lock) in the environment tells whether it is what this commit asks for. Starting them is
//! [`crate::aws`]'s.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::command::{find_in_path, output, run};
use crate::components::{cache_folder, repository};
use crate::packages;
use crate::progress::Progress;

/// The oldest Python that the lock files are for.
const PYTHON_MINOR_MIN: u32 = 11;

/// A virtual environment and its lock file, `tests/testbed/NAME/requirements.txt`.
#[derive(Debug)]
pub struct PythonEnvironment {
    /// Folder below `tests/testbed`, and of the environment.
    pub name: &'static str,
    /// What it is, for the plan.
    pub what: &'static str,
}

/// AWS STS for the tests.
pub const MOTO: PythonEnvironment = PythonEnvironment { name: "moto", what: "moto (AWS STS for the tests)" };

/// What validates OCSF events against the published schema; no part of the testbed.
pub const OCSF: PythonEnvironment = PythonEnvironment { name: "ocsf", what: "the published schema of OCSF" };

/// What validates objects against the schemas of each Kubernetes version; no part of the testbed.
pub const KUBERNETES_SCHEMAS: PythonEnvironment =
    PythonEnvironment { name: "kubernetes-schemas", what: "the schemas of Kubernetes 1.25 to 1.37" };

/// Envoy and mitmproxy, which the bench of the proxy compares with; no part of the testbed.
pub const PROXIES: PythonEnvironment = PythonEnvironment { name: "proxies", what: "Envoy and mitmproxy" };

/// Everything of the testbed that is installed with Python.
pub const ENVIRONMENTS: &[PythonEnvironment] = &[MOTO];

impl PythonEnvironment {
    fn folder(&self) -> Result<PathBuf> {
        Ok(cache_folder()?.join("testbed/python").join(self.name))
    }

    /// Its Python, with which its modules are run.
    ///
    /// # Errors
    /// When there is no place for the cache.
    pub fn python(&self) -> Result<PathBuf> {
        Ok(self.folder()?.join("bin/python"))
    }

    fn lock_file(&self) -> PathBuf {
        repository().join("tests/testbed").join(self.name).join("requirements.txt")
    }

    fn stamp(&self) -> Result<String> {
        let path = self.lock_file();
        let lock = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(hex::encode(Sha256::digest(&lock)))
    }

    /// Whether it is what the lock file asks for.
    ///
    /// # Errors
    /// When the lock file cannot be read.
    pub fn is_installed(&self) -> Result<bool> {
        let stamp = fs::read_to_string(self.folder()?.join(".stamp")).unwrap_or_default();
        Ok(self.python()?.is_file() && stamp == self.stamp()?)
    }

    /// Its Python and a program of ours beside the lock file, installed if it is not there.
    ///
    /// # Errors
    /// As of [`Self::install`].
    pub fn program(&self, name: &str, progress: Progress) -> Result<Command> {
        let mut command = self.installed(progress)?;
        command.arg(self.lock_file().with_file_name(name));
        Ok(command)
    }

    /// Its Python and a module of it, installed if it is not there.
    ///
    /// # Errors
    /// As of [`Self::install`].
    pub fn module(&self, name: &str, progress: Progress) -> Result<Command> {
        let mut command = self.installed(progress)?;
        command.args(["-m", name]);
        Ok(command)
    }

    /// A command that a package of it brings, installed if it is not there.
    ///
    /// # Errors
    /// As of [`Self::install`].
    pub fn script(&self, name: &str, progress: Progress) -> Result<PathBuf> {
        self.installed(progress)?;
        Ok(self.folder()?.join("bin").join(name))
    }

    fn installed(&self, progress: Progress) -> Result<Command> {
        if !self.is_installed()? {
            self.install(progress)?;
        }
        Ok(Command::new(self.python()?))
    }

    /// Makes it anew.
    ///
    /// # Errors
    /// When there is no Python, or a package cannot be fetched or has another hash.
    pub fn install(&self, progress: Progress) -> Result<()> {
        let folder = self.folder()?;
        progress.step(&format!("install {}", self.what), || {
            let python = python()?;
            if folder.exists() {
                fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
            }
            run(Command::new(python).args(["-m", "venv"]).arg(&folder))?;
            let mut pip = Command::new(self.python()?);
            pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]);
            pip.args(["--no-deps", "--require-hashes", "--only-binary", ":all:", "-r"]).arg(self.lock_file());
            run(&mut pip)?;
            // Written last: an interrupted installation must not be taken for one.
            fs::write(folder.join(".stamp"), self.stamp()?)
                .context("cannot write the stamp of an environment")
        })
    }
}

/// A Python that can make virtual environments: the first in PATH, else Debian's with what it lacks.
fn python() -> Result<PathBuf> {
    let is_fit = |python: &Path| {
        let test =
            format!("import ensurepip, venv, sys; sys.exit(sys.version_info < (3, {PYTHON_MINOR_MIN}))");
        output(Command::new(python).args(["-c", &test])).is_ok_and(|output| output.status.success())
    };
    if let Some(python) = find_in_path("python3").filter(|python| is_fit(python)) {
        return Ok(python);
    }
    packages::install(&["python3-venv"])?;
    let python = PathBuf::from("/usr/bin/python3");
    if !is_fit(&python) {
        bail!("no Python 3.{PYTHON_MINOR_MIN} or newer with venv; install one and put it into PATH");
    }
    Ok(python)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_requirement_has_its_version_and_hashes() {
        for environment in
            ENVIRONMENTS.iter().chain([&OCSF, &KUBERNETES_SCHEMAS, &PROXIES, &crate::clients::PYTHON])
        {
            let lock = fs::read_to_string(environment.lock_file()).unwrap();
            let requirements: Vec<&str> = lock
                .lines()
                .filter(|line| line.starts_with(|char: char| char.is_ascii_lowercase()))
                .collect();
            assert!(!requirements.is_empty());
            for requirement in requirements {
                assert!(requirement.contains("==") && requirement.ends_with('\\'), "{requirement}");
            }
        }
    }
}
