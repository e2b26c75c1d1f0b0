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
    maps::MapData,
    programs::{
        Lsm, ProgramError,
        links::{FdLink, LinkType, PinnedLink},
        loaded_programs,
    },
};
use weir_common::kernel::{maps, programs};

use super::attach::{AttachError, Attached, Inspection};
use crate::doctor;

/// The security modules that decide on this kernel, in a line.
const MODULES: &str = "/sys/kernel/security/lsm";
/// `BPF_PROG_TYPE_LSM` of `enum bpf_prog_type`, linux/bpf.h.
const PROGRAM_TYPE_LSM: u32 = 29;
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

    /// The same, but pinned ones of whoever came before stay, if they are the same programs and decide by the same maps.
    pub(super) fn attach_missing_security(&mut self) -> Result<Security, AttachError> {
        let Some(pins) = self.pins.clone() else { return self.attach_security() };
        let others: Vec<_> =
            programs::LSM.into_iter().filter(|(name, hook)| !self.is_same(&pins, name, hook)).collect();
        if others.is_empty() {
            return Ok(Security::InForce);
        }
        let replaced: Vec<_> =
            others.into_iter().map(|(name, _)| pin_path(&pins, name)).filter(|pin| pin.exists()).collect();
        let security = self.attach_security()?;
        if security == Security::InForce {
            for pin in replaced {
                tracing::warn!(
                    event = "pin-replaced",
                    pin = %pin.display(),
                    "what was pinned here was none of this agent's programs"
                );
            }
        }
        Ok(security)
    }

    /// Whether what is pinned as this program has the same instructions as this agent's, is of its kind, and reads the pinned map of
    /// cgroups. A name anybody can give.
    fn is_same(&mut self, pins: &Path, name: &'static str, hook: &str) -> bool {
        let Some(pinned) = pinned_program(pins, name) else { return false };
        let Ok(own) = loaded(&mut self.ebpf, name, hook).and_then(|program| Ok(program.info()?)) else {
            return false;
        };
        let cgroups = MapData::from_pin(pins.join("maps").join(maps::CGROUPS)).and_then(|map| map.info());
        let Ok(cgroups) = cgroups.map(|info| info.id()) else { return false };
        let program = loaded_programs().filter_map(Result::ok).find(|program| program.id() == pinned);
        program.is_some_and(|program| {
            let reads = program.map_ids().ok().flatten().unwrap_or_default();
            program.tag() == own.tag()
                && program.program_type() as u32 == PROGRAM_TYPE_LSM
                && reads.contains(&cgroups)
        })
    }

    /// Attaches them again if someone has removed a pin of theirs, or put something else there.
    pub(super) fn inspect_security(&mut self, found: &mut Inspection) -> Result<(), AttachError> {
        let Some(pins) = self.pins.clone().filter(|_| self.security) else { return Ok(()) };
        // Whoever takes over pins its own when this process looks no more.
        let is_own = |name: &str| {
            let own = self.ebpf.program(name).and_then(|program| program.info().ok());
            own.is_some_and(|own| pinned_program(&pins, name) == Some(own.id()))
        };
        let missing = programs::LSM.into_iter().filter(|(name, _)| !is_own(name));
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

/// The id of the program that a pinned link has attached; none if the link is of another kind.
fn pinned_program(pins: &Path, name: &str) -> Option<u32> {
    let link = FdLink::from(PinnedLink::from_pin(pin_path(pins, name)).ok()?).info().ok()?;
    matches!(link.link_type(), Ok(LinkType::Tracing)).then(|| link.program_id())
}

fn load(ebpf: &mut Ebpf, name: &'static str, hook: &str) -> Result<FdLink, SecurityError> {
    let program = loaded(ebpf, name, hook)?;
    let id = program.attach()?;
    Ok(program.take_link(id)?.into())
}

fn loaded<'a>(ebpf: &'a mut Ebpf, name: &'static str, hook: &str) -> Result<&'a mut Lsm, SecurityError> {
    let program = ebpf.program_mut(name).ok_or(SecurityError::Stale(name))?;
    let program: &mut Lsm = program.try_into()?;
    if program.fd().is_err() {
        program.load(hook, &Btf::from_sys_fs()?)?;
    }
    Ok(program)
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
