//! Attaching the programs to cgroups, and keeping them attached: pins, replacement in place, removal.
//!
//! What someone else detaches is noticed by asking the kernel, not by looking at pins, and attached again.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    mem::ManuallyDrop,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use aya::{
    Ebpf,
    pin::PinError,
    programs::{
        CgroupAttachMode, CgroupSkbAttachType, Program, ProgramError,
        links::{FdLink, LinkError},
        tc::SchedClassifierLink,
    },
};
use weir_common::kernel::programs;

use super::{
    bpf::{attach_kind, attached_programs, link_update, open_pin},
    interface::{self, HostEnd, links_for_interfaces, remove_filters},
    layouts,
    pinned::{is_attached_by, pinned_links},
    security,
};

/// Why programs cannot be attached, kept or removed.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The cgroup's folder cannot be opened.
    #[error("cannot open the cgroup {}; is it a cgroup v2 folder?", path.display())]
    Cgroup {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel refuses to attach.
    #[error("cannot attach {program} to {}; is it a cgroup v2 folder, and this root?", cgroup.display())]
    Program {
        /// The program.
        program: &'static str,
        /// The cgroup.
        cgroup: PathBuf,
        /// Why.
        #[source]
        source: ProgramError,
    },
    /// The kernel refuses to guard an interface.
    #[error("cannot guard the interface {name}; is it still there, and this root (CAP_NET_ADMIN)?")]
    Interface {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: ProgramError,
    },
    /// The link cannot be taken or opened.
    #[error("link of {program}")]
    Link {
        /// The program.
        program: &'static str,
        /// Why.
        #[source]
        source: LinkError,
    },
    /// The program of a pinned link cannot be replaced.
    #[error("cannot replace the program of the pinned link {}", path.display())]
    Update {
        /// The pin.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The link cannot be pinned.
    #[error("cannot pin {}; is a bpf file system mounted there?", path.display())]
    Pin {
        /// The pin.
        path: PathBuf,
        /// Why.
        #[source]
        source: PinError,
    },
    /// The pins are gone: nothing would outlive this process.
    #[error("{} was removed while the agent runs, and with it the interception; was weir-agent uninstall run, or the bpf file system unmounted?", path.display())]
    Gone {
        /// Their folder.
        path: PathBuf,
    },
    /// A pin cannot be read or removed.
    #[error("cannot read or remove the pin {}", path.display())]
    Remove {
        /// The pin or folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The loaded programs and where they are attached.
#[derive(Debug)]
pub(super) struct Attached {
    pub(super) ebpf: Ebpf,
    /// Folder of pins; none: links go with the process.
    pub(super) pins: Option<PathBuf>,
    /// Links that are not pinned; dropped, they detach.
    pub(super) links: Vec<FdLink>,
    /// What `security` adds.
    pub(super) security: security::Hooks,
    /// Guards of interfaces on kernels that have no links for them; dropped, they detach.
    pub(super) own_filters: Vec<SchedClassifierLink>,
    /// The same where they stay.
    pub(super) filters: Vec<ManuallyDrop<SchedClassifierLink>>,
    /// The cgroups that this process has attached to, by id.
    cgroups: BTreeMap<u64, Target>,
    /// Names of the guarded interfaces, and the cgroups of the pods that they are guarded for, by index.
    pub(super) interfaces: BTreeMap<u32, (String, u64)>,
}

/// A cgroup and what belongs there.
#[derive(Clone, Debug)]
struct Target {
    folder: PathBuf,
    programs: Programs,
}

/// Names of programs, in the order in which they are attached.
type Programs = &'static [&'static str];

/// What a look at the kernel has shown.
#[derive(Debug, Default)]
pub struct Inspection {
    /// Programs that someone had detached and that are attached again, in words.
    pub repaired: Vec<String>,
    /// Programs of others beside ours, by id, in words.
    pub foreign: BTreeSet<(u32, String)>,
}

/// A panic while attaching leaves links that are whole each.
pub(super) fn lock(attached: &Mutex<Attached>) -> MutexGuard<'_, Attached> {
    attached.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Attached {
    pub(super) fn new(ebpf: Ebpf, pins: Option<PathBuf>, security: security::Hooks) -> Self {
        Self {
            ebpf,
            pins,
            links: Vec::new(),
            security,
            own_filters: Vec::new(),
            filters: Vec::new(),
            cgroups: BTreeMap::new(),
            interfaces: BTreeMap::new(),
        }
    }

    /// Attaches these programs to the cgroup in their order, or replaces the pinned ones.
    pub(super) fn attach(&mut self, cgroup: &Path, programs: Programs) -> Result<(), AttachError> {
        self.attach_if(cgroup, programs, |_, _, _| true)
    }

    /// The same with those alone that are not attached there by a pinned link, whoever made it.
    pub(super) fn attach_missing(&mut self, cgroup: &Path, programs: Programs) -> Result<(), AttachError> {
        self.attach_if(cgroup, programs, |pin, folder, program| {
            !pin.is_some_and(|pin| is_attached_by(pin, folder, attach_kind(program)))
        })
    }

    fn attach_if(
        &mut self,
        cgroup: &Path,
        programs: Programs,
        is_wanted: impl Fn(Option<&Path>, &File, &str) -> bool,
    ) -> Result<(), AttachError> {
        let at = |source| AttachError::Cgroup { path: cgroup.to_owned(), source };
        let folder = File::open(cgroup).map_err(at)?;
        let id = folder.metadata().map_err(at)?.ino();
        for program in programs {
            let pin = self.pin(&format!("{id}-{program}"))?;
            if is_wanted(pin.as_deref(), &folder, program) && !self.replaced(pin.as_deref(), program)? {
                let link = self.link(program, &folder, cgroup)?;
                self.keep(link, pin)?;
            }
        }
        self.cgroups.insert(id, Target { folder: cgroup.to_owned(), programs });
        Ok(())
    }

    /// Where the link with this name is pinned; none if links go with the process.
    pub(super) fn pin(&self, name: &str) -> Result<Option<PathBuf>, AttachError> {
        let Some(pins) = &self.pins else { return Ok(None) };
        let links = pins.join("links");
        match fs::create_dir_all(&links) {
            Ok(()) => Ok(Some(links.join(name))),
            Err(source) => Err(AttachError::Remove { path: links, source }),
        }
    }

    pub(super) fn keep(&mut self, link: FdLink, pin: Option<PathBuf>) -> Result<(), AttachError> {
        let Some(path) = pin else {
            self.links.push(link);
            return Ok(());
        };
        // The pin keeps it from here on.
        link.pin(&path).map_err(|source| AttachError::Pin { path, source })?;
        Ok(())
    }

    /// Puts this process's program into a link that is pinned already. A pin whose cgroup is gone is removed.
    pub(super) fn replaced(&self, pin: Option<&Path>, program: &'static str) -> Result<bool, AttachError> {
        let Some(pin) = pin.filter(|pin| pin.exists()) else { return Ok(false) };
        let update = |source| AttachError::Update { path: pin.to_owned(), source };
        let fd = self
            .ebpf
            .program(program)
            .and_then(|program| program.fd().ok())
            .ok_or_else(|| update(io::Error::other("the program is not loaded")))?;
        let link = open_pin(pin).map_err(update)?;
        match link_update(&link, fd.as_fd()) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {
                fs::remove_file(pin)
                    .map_err(|source| AttachError::Remove { path: pin.to_owned(), source })?;
                Ok(false)
            }
            Err(error) => Err(update(error)),
        }
    }

    fn link(&mut self, program: &'static str, folder: &File, cgroup: &Path) -> Result<FdLink, AttachError> {
        let failed = |source| AttachError::Program { program, cgroup: cgroup.to_owned(), source };
        let link_failed = |source| AttachError::Link { program, source };
        // On bpf links any other mode is EINVAL; links are always of the multi kind.
        let mode = CgroupAttachMode::Single;
        let comes_in = program == programs::INGRESS;
        let way = if comes_in { CgroupSkbAttachType::Ingress } else { CgroupSkbAttachType::Egress };
        match self.ebpf.program_mut(program) {
            Some(Program::CgroupSockAddr(program)) => {
                let id = program.attach(folder, mode).map_err(failed)?;
                program.take_link(id).map_err(failed)?.try_into().map_err(link_failed)
            }
            Some(Program::CgroupSock(program)) => {
                let id = program.attach(folder, mode).map_err(failed)?;
                program.take_link(id).map_err(failed)?.try_into().map_err(link_failed)
            }
            Some(Program::CgroupSkb(program)) => {
                let id = program.attach(folder, way, mode).map_err(failed)?;
                program.take_link(id).map_err(failed)?.try_into().map_err(link_failed)
            }
            Some(Program::SockOps(program)) => {
                let id = program.attach(folder, mode).map_err(failed)?;
                program.take_link(id).map_err(failed)?.try_into().map_err(link_failed)
            }
            _ => Err(link_failed(LinkError::InvalidLink)),
        }
    }

    /// Asks the kernel whether everything is attached, and attaches what is not. That the maps are no longer pinned is an
    /// error: then `uninstall` was run, and this process must not go on as if it were in force.
    pub(super) fn inspect(&mut self) -> Result<Inspection, AttachError> {
        if let Some(pins) = &self.pins
            && !pins.join("maps").exists()
        {
            return Err(AttachError::Gone { path: pins.join("maps") });
        }
        let mut found = Inspection::default();
        for (id, target) in self.cgroups.clone() {
            // A cgroup that is gone takes its links along.
            let Ok(folder) = File::open(&target.folder) else { continue };
            if !folder.metadata().is_ok_and(|metadata| metadata.ino() == id) {
                continue;
            }
            for program in target.programs {
                self.inspect_program(program, id, (&folder, &target.folder), &mut found)?;
            }
        }
        for (index, (name, cgroup)) in self.interfaces.clone() {
            self.inspect_interface((&HostEnd { index, name }, cgroup), &mut found)?;
        }
        Ok(found)
    }

    fn inspect_program(
        &mut self,
        program: &'static str,
        id: u64,
        (folder, path): (&File, &Path),
        found: &mut Inspection,
    ) -> Result<(), AttachError> {
        let at = |source| AttachError::Cgroup { path: path.to_owned(), source };
        let Some((own, kind)) = self.id_and_kind(program) else { return Ok(()) };
        let attached = attached_programs(folder, kind).map_err(at)?;
        let pin = self.pin(&format!("{id}-{program}"))?;
        if attached.contains(&own) && pin.as_ref().is_none_or(|pin| pin.exists()) {
            let others = attached.iter().filter(|other| **other != own);
            let kind = program.trim_start_matches("weir_");
            let beside = |other: &u32| (*other, format!("{other} of {kind} at {}", path.display()));
            found.foreign.extend(others.map(beside));
            return Ok(());
        }
        // A link that is still there but runs another program (of a successor that failed, say) is put right in place.
        if !self.replaced(pin.as_deref(), program)? {
            self.remove_pin(pin.as_deref())?;
            let link = self.link(program, folder, path)?;
            self.keep(link, pin)?;
        }
        found.repaired.push(format!("{program} at {}", path.display()));
        Ok(())
    }

    /// The id of a loaded program, and its number of `enum bpf_attach_type` (0 where it has none).
    pub(super) fn id_and_kind(&self, name: &str) -> Option<(u32, u32)> {
        let program = self.ebpf.program(name)?;
        Some((program.info().ok()?.id(), attach_kind(name)))
    }

    pub(super) fn remove_pin(&self, pin: Option<&Path>) -> Result<(), AttachError> {
        match pin.map(fs::remove_file) {
            Some(Err(source)) if source.kind() != io::ErrorKind::NotFound => {
                Err(AttachError::Remove { path: pin.unwrap_or(Path::new("")).to_owned(), source })
            }
            _ => Ok(()),
        }
    }

    /// The folders of pins of older layouts.
    pub(super) fn older_layouts(&self) -> Result<Vec<PathBuf>, AttachError> {
        self.pins.as_deref().map_or(Ok(Vec::new()), layouts::older)
    }

    /// Removes pinned links of cgroups that this process has not attached to.
    pub(super) fn prune(&self) -> Result<(), AttachError> {
        let Some(pins) = &self.pins else { return Ok(()) };
        for name in pinned_links(pins)? {
            if name.starts_with(interface::PIN) || name.starts_with(security::PIN) {
                continue;
            }
            let id = name.split('-').next().and_then(|id| id.parse::<u64>().ok());
            if id.is_none_or(|id| !self.cgroups.contains_key(&id)) {
                let path = pins.join("links").join(&name);
                fs::remove_file(&path).map_err(|source| AttachError::Remove { path, source })?;
            }
        }
        Ok(())
    }
}

/// Removes every pin in a folder of pins: the programs detach (the kernel does that a moment later), the maps go. Returns how many there were.
///
/// # Errors
/// A pin cannot be removed.
pub fn uninstall(pins: &Path) -> Result<usize, AttachError> {
    if !links_for_interfaces() {
        remove_filters(pins);
    }
    remove_pins(pins)
}

/// The same without the guards that no pin keeps.
pub(super) fn remove_pins(pins: &Path) -> Result<usize, AttachError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| AttachError::Remove { path, source }
    };
    let mut removed = 0;
    // Links first, so that no program runs on maps that are half gone.
    for folder in [pins.join("links"), pins.join("maps")] {
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries.map_err(failed(&folder))?,
        };
        for entry in entries {
            let path = entry.map_err(failed(&folder))?.path();
            fs::remove_file(&path).map_err(failed(&path))?;
            removed += 1;
        }
        fs::remove_dir(&folder).map_err(failed(&folder))?;
    }
    for folder in [Some(pins), pins.parent()].into_iter().flatten() {
        match fs::remove_dir(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // Another version's pins are beside ours.
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
            result => result.map_err(failed(folder))?,
        }
    }
    Ok(removed)
}
