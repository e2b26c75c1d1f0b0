//! The programs that decide in the kernel's security hooks, beside the guards: pods that are enrolled, or not known yet, make no
//! packet sockets, and enrolled ones do not call bpf(2).
//!
//! They only add. Kernels let programs decide there in two ways ([`Way`]); a kernel without BPF LSM would load the first kind and
//! never call it, so the kernel is asked for its security modules.

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf,
    maps::{MapData, MapError},
    pin::PinError,
    programs::loaded_programs,
    sys::SyscallError,
};
use weir_common::kernel::{maps, programs};

pub use super::security_programs::Way;
use super::{
    attach::{AttachError, Attached, Inspection},
    bpf::{self, AtFunction, open_pin},
    loader::OBJECT,
    security_programs::SecurityPrograms,
};
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
    /// They are, in this way.
    InForce(Way),
    /// They are not, and why.
    Absent(String),
}

/// The programs, and what this process has put in force.
#[derive(Debug)]
pub(super) struct Hooks {
    programs: SecurityPrograms,
    /// How this process has attached them.
    way: Option<Way>,
    /// Links that are not pinned; closed, they detach.
    links: Vec<OwnedFd>,
}

impl Hooks {
    /// To be called while the object has all of its maps.
    pub(super) fn new(ebpf: &Ebpf) -> Result<Self, MapError> {
        Ok(Self { programs: SecurityPrograms::new(ebpf)?, way: None, links: Vec::new() })
    }

    /// Loads the programs; says why where the kernel takes none in this way.
    fn load(&mut self, way: Way) -> Result<(), String> {
        if way == Way::Lsm {
            let modules = fs::read_to_string(MODULES);
            let modules = modules.map_err(|error| format!("{MODULES} cannot be read ({error})"))?;
            if !asks_bpf(&modules) {
                return Err(format!("bpf is not among the security modules {}", modules.trim()));
            }
        }
        let Some(object) = OBJECT else { return Err(format!("{way}: built without the kernel programs")) };
        self.programs.load(object, way).map_err(|error| format!("{way}: {}", doctor::chain(&error)))
    }
}

/// Whether the kernel asks BPF programs, from the list of its security modules.
fn asks_bpf(modules: &str) -> bool {
    modules.trim().split(',').any(|module| module == "bpf")
}

impl Attached {
    /// Loads and attaches them in the first way that the kernel takes, unless this process has; pinned ones of a former process go when
    /// the new ones are there. That it takes no such programs is no error.
    pub(super) fn attach_security(&mut self) -> Result<Security, AttachError> {
        first(|way| self.attach_security_by(way))
    }

    /// The same in one way.
    pub(super) fn attach_security_by(&mut self, way: Way) -> Result<Security, AttachError> {
        if self.security.way == Some(way) && self.missing_security().is_empty() {
            return Ok(Security::InForce(way));
        }
        if let Err(reason) = self.security.load(way) {
            return Ok(Security::Absent(reason));
        }
        let links = match self.security.programs.attach() {
            Ok(links) => links,
            Err(error) => return Ok(Security::Absent(format!("{way}: {}", doctor::chain(&error)))),
        };
        match &self.pins {
            None => self.security.links = links.into_iter().map(|(_, link)| link).collect(),
            Some(pins) => links.iter().try_for_each(|(name, link)| pin(link, pins, name))?,
        }
        self.security.way = Some(way);
        Ok(Security::InForce(way))
    }

    /// The same, but pinned ones of whoever came before stay, if they are the same programs and decide by the same maps.
    pub(super) fn attach_missing_security(&mut self) -> Result<Security, AttachError> {
        let Some(pins) = self.pins.clone() else { return self.attach_security() };
        first(|way| {
            if self.security.way == Some(way) {
                return self.attach_security_by(way);
            }
            if let Err(reason) = self.security.load(way) {
                return Ok(Security::Absent(reason));
            }
            let names = programs::LSM.into_iter().map(|(name, _)| name);
            let others: Vec<_> = names.filter(|name| !self.is_same(&pins, name, way)).collect();
            if others.is_empty() {
                return Ok(Security::InForce(way));
            }
            let replaced: Vec<_> =
                others.into_iter().map(|name| pin_path(&pins, name)).filter(|pin| pin.exists()).collect();
            let security = self.attach_security_by(way)?;
            if security == Security::InForce(way) {
                for pin in replaced {
                    tracing::warn!(
                        event = "pin-replaced",
                        pin = %pin.display(),
                        "what was pinned here was none of this agent's programs"
                    );
                }
            }
            Ok(security)
        })
    }

    /// Whether what is pinned as this program has the same instructions as this agent's, is of its kind, decides at the same function
    /// of the kernel, and reads the pinned map of cgroups. A name anybody can give.
    fn is_same(&self, pins: &Path, name: &str, way: Way) -> bool {
        let (Some(pinned), Some((own, tag))) = (pinned(pins, name), self.security.programs.loaded(name))
        else {
            return false;
        };
        let cgroups = MapData::from_pin(pins.join("maps").join(maps::CGROUPS)).and_then(|map| map.info());
        let Ok(cgroups) = cgroups.map(|info| info.id()) else { return false };
        let program = loaded_programs().filter_map(Result::ok).find(|program| program.id() == pinned.program);
        program.is_some_and(|program| {
            let reads = program.map_ids().ok().flatten().unwrap_or_default();
            program.tag() == tag
                && program.program_type() as u32 == way.program_type()
                && AtFunction { program: own.program, ..pinned } == own
                && reads.contains(&cgroups)
        })
    }

    /// Those of this process whose pins someone has removed, or put something else there.
    fn missing_security(&self) -> Vec<&'static str> {
        let Some(pins) = &self.pins else { return Vec::new() };
        let is_missing = |name: &&str| {
            let own = self.security.programs.loaded(name).map(|(own, _)| own);
            own.is_none() || pinned(pins, name) != own
        };
        programs::LSM.into_iter().map(|(name, _)| name).filter(is_missing).collect()
    }

    /// Attaches them again if some are missing.
    pub(super) fn inspect_security(&mut self, found: &mut Inspection) -> Result<(), AttachError> {
        let Some(way) = self.security.way else { return Ok(()) };
        // Whoever takes over pins its own when this process looks no more.
        let missing = self.missing_security();
        if missing.is_empty() {
            return Ok(());
        }
        match self.attach_security_by(way)? {
            Security::InForce(_) => {
                let in_words = |name: &str| format!("{name} at the kernel's security hook");
                found.repaired.extend(missing.into_iter().map(in_words));
            }
            Security::Absent(reason) => {
                self.security.way = None;
                tracing::error!(
                    event = "security-hooks-lost",
                    reason,
                    "someone has detached them, and the kernel does not take them again; the guards stand alone"
                );
            }
        }
        Ok(())
    }
}

/// The first way that comes about; where none does, all reasons.
fn first(mut attach: impl FnMut(Way) -> Result<Security, AttachError>) -> Result<Security, AttachError> {
    let mut reasons = Vec::new();
    for way in Way::ALL {
        match attach(way)? {
            Security::Absent(reason) => reasons.push(reason),
            in_force @ Security::InForce(_) => return Ok(in_force),
        }
    }
    Ok(Security::Absent(reasons.join("; ")))
}

/// How what is pinned decides; none unless all of it is there, in one way.
pub(super) fn pinned_way(pins: &Path) -> Option<Way> {
    let mut ways = programs::LSM
        .into_iter()
        .map(|(name, _)| pinned(pins, name).and_then(|pinned| Way::of_attach_type(pinned.attach_type)));
    let way = ways.next()??;
    ways.all(|other| other == Some(way)).then_some(way)
}

fn pin_path(pins: &Path, name: &str) -> PathBuf {
    pins.join("links").join(format!("{PIN}{name}"))
}

/// What a pinned link attaches; none if the link is of another kind.
fn pinned(pins: &Path, name: &str) -> Option<AtFunction> {
    bpf::at_function(&open_pin(&pin_path(pins, name)).ok()?).ok()?
}

/// Pins a link in the place of a former one. The program of such a link cannot be replaced, so for a moment both decide.
fn pin(link: &OwnedFd, pins: &Path, name: &str) -> Result<(), AttachError> {
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
    let failed = |io_error| PinError::SyscallError(SyscallError { call: "BPF_OBJ_PIN", io_error });
    bpf::pin(link, &next).map_err(|error| AttachError::Pin { path: next.clone(), source: failed(error) })?;
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
