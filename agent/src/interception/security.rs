//! The programs that a kernel with BPF LSM takes beside the guards: pods that are enrolled, or not known yet, make no packet
//! sockets, and enrolled ones do not call bpf(2).
//!
//! They only add. A kernel without BPF LSM would load them and never call them, so it is asked first.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use aya::{
    Btf, BtfError, Ebpf,
    programs::{Lsm, ProgramError, links::FdLink},
};
use weir_common::kernel::programs;

use super::attach::{AttachError, Attached, Inspection};
use crate::doctor;

/// The security modules that decide on this kernel, in a line.
const MODULES: &str = "/sys/kernel/security/lsm";
/// How the pins of these programs begin.
pub(super) const PIN: &str = "lsm-";

/// What they do, in words.
pub(super) const PACKET_SOCKETS_DENIED: &str =
    "pods that are enrolled or not known yet make no packet sockets, and enrolled ones do not call bpf(2)";

/// Whether they are in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Security {
    /// They are.
    InForce,
    /// They are not, and why.
    Absent(String),
}

/// Why they are not in force although the kernel has BPF LSM.
#[derive(Debug, thiserror::Error)]
enum SecurityError {
    #[error("the object has no program {0}")]
    Stale(&'static str),
    #[error("cannot read the kernel's type information")]
    Btf(#[from] BtfError),
    #[error("the kernel refuses it (is it locked down?)")]
    Program(#[from] ProgramError),
}

/// Whether the kernel asks BPF programs, from the list of its security modules.
fn asks_bpf(modules: &str) -> bool {
    modules.trim().split(',').any(|module| module == "bpf")
}

impl Attached {
    /// Loads and attaches them; pinned ones of a former process go when the new ones are there. That the kernel takes no such
    /// programs is no error.
    pub(super) fn attach_security(&mut self) -> Result<Security, AttachError> {
        let modules = match fs::read_to_string(MODULES) {
            Ok(modules) => modules,
            Err(error) => return Ok(Security::Absent(format!("{MODULES} cannot be read ({error})"))),
        };
        if !asks_bpf(&modules) {
            return Ok(Security::Absent(format!("bpf is not among the security modules {}", modules.trim())));
        }
        for (name, hook) in programs::LSM {
            let link = match load(&mut self.ebpf, name, hook) {
                Ok(link) => link,
                Err(error) => return Ok(Security::Absent(format!("{name}: {}", doctor::chain(&error)))),
            };
            match &self.pins {
                None => self.links.push(link),
                Some(pins) => pin(link, pins, name)?,
            }
        }
        self.security = true;
        Ok(Security::InForce)
    }

    /// The same, but pinned ones of whoever came before stay: they decide by the same maps.
    pub(super) fn attach_missing_security(&mut self) -> Result<Security, AttachError> {
        let is_there = |pins: &PathBuf| programs::LSM.iter().all(|(name, _)| pin_path(pins, name).exists());
        if self.pins.as_ref().is_some_and(is_there) {
            return Ok(Security::InForce);
        }
        self.attach_security()
    }

    /// Attaches them again if someone has removed a pin of theirs.
    pub(super) fn inspect_security(&mut self, found: &mut Inspection) -> Result<(), AttachError> {
        let Some(pins) = self.pins.clone().filter(|_| self.security) else { return Ok(()) };
        let missing = programs::LSM.iter().filter(|(name, _)| !pin_path(&pins, name).exists());
        let missing: Vec<_> =
            missing.map(|(name, _)| format!("{name} at the kernel's security hook")).collect();
        if !missing.is_empty() {
            self.attach_security()?;
            found.repaired.extend(missing);
        }
        Ok(())
    }
}

fn pin_path(pins: &Path, name: &str) -> PathBuf {
    pins.join("links").join(format!("{PIN}{name}"))
}

fn load(ebpf: &mut Ebpf, name: &'static str, hook: &str) -> Result<FdLink, SecurityError> {
    let program = ebpf.program_mut(name).ok_or(SecurityError::Stale(name))?;
    let program: &mut Lsm = program.try_into()?;
    if program.fd().is_err() {
        program.load(hook, &Btf::from_sys_fs()?)?;
    }
    let id = program.attach()?;
    Ok(program.take_link(id)?.into())
}

/// Pins a link in the place of a former one. The program of such a link cannot be replaced, so for a moment both decide.
fn pin(link: FdLink, pins: &Path, name: &str) -> Result<(), AttachError> {
    // A bpf file system takes no name with a dot.
    let (path, next) = (pin_path(pins, name), pin_path(pins, &format!("next-{name}")));
    match fs::remove_file(&next) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            return Err(AttachError::Remove { path: next, source });
        }
        _ => {}
    }
    // `attach` makes the folder for the first link of a cgroup, which may not have come yet.
    let folder = pins.join("links");
    fs::create_dir_all(&folder).map_err(|source| AttachError::Remove { path: folder, source })?;
    link.pin(&next).map_err(|source| AttachError::Pin { path: next.clone(), source })?;
    fs::rename(&next, &path).map_err(|source| AttachError::Remove { path, source })
}

#[cfg(test)]
mod tests {
    use super::asks_bpf;

    #[test]
    fn the_list_of_modules_tells_whether_bpf_decides() {
        assert!(asks_bpf("lockdown,capability,landlock,bpf\n"));
        assert!(!asks_bpf("lockdown,capability,bpfx\n"));
        assert!(!asks_bpf(""));
    }
}
