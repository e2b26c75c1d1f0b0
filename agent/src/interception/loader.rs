//! The kernel programs and maps: loading them and checking their layouts.
//!
//! What is attached where is in `attach`, what the maps say in `maps`, flows are in `flow`. Which pods and addresses
//! there are is not known here.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::Mutex,
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, PerCpuHashMap, RingBuf},
    programs::{Program, ProgramError},
};
use weir_common::{
    kernel::{
        ApiEndpoint, CgroupEntry, FlowKey, FlowRecord, LAYOUT_VERSION, Named, NestedKey, PodCounters,
        PodName, Settings, Suspect, Suspicion, TICK_NS, TICK_NS_MAX, maps, programs,
    },
    sieve::PodSlot,
};

use super::{
    attach::{self, AttachError, Inspection},
    debug_log, layouts,
    maps::{absent_is_fine, lock},
    security::{self, Security, Way},
    sieve::Sieve,
    verifier_log,
};

/// The mount point of the BPF file system.
pub const BPFFS: &str = "/sys/fs/bpf";

/// The kernel programs of this binary; none if it was built without.
#[cfg(weir_ebpf_object)]
pub static OBJECT: Option<&[u8]> =
    Some(aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/weir-ebpf.o")));
/// The kernel programs of this binary; none if it was built without.
#[cfg(not(weir_ebpf_object))]
pub static OBJECT: Option<&[u8]> = None;

/// Why the kernel part does not work.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The agent was built before the kernel programs were.
    #[error(
        "this binary was built without the kernel programs; run cargo xtask build-ebpf first, then build it again"
    )]
    NotBuilt,
    /// The kernel programs that this binary holds are not those of its source.
    #[error(
        "the kernel programs of this binary have no {name}: they are older than it; run cargo xtask build-ebpf, then build it again"
    )]
    Stale {
        /// The map or program.
        name: &'static str,
    },
    /// The object cannot be loaded.
    #[error(
        "cannot load the kernel programs; is this root (CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON), and the kernel 5.18 or later?"
    )]
    Load(#[source] EbpfError),
    /// A program is not accepted.
    #[error("the kernel refuses the program {program}{log}")]
    Refused {
        /// Its name.
        program: &'static str,
        /// The end of what the verifier says, in brackets.
        log: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A program cannot be used.
    #[error("kernel program {program}")]
    Program {
        /// Its name.
        program: &'static str,
        /// Why.
        #[source]
        source: ProgramError,
    },
    /// A map cannot be used.
    #[error("kernel map {map}")]
    Map {
        /// Its name.
        map: &'static str,
        /// Why.
        #[source]
        source: MapError,
    },
    /// Two pods have one interface.
    #[error(
        "the interface {name} is guarded as another pod's (cgroup {owner}); is one of the pods privileged, with a process in the other's network namespace?"
    )]
    InterfaceOfAnother {
        /// Its name on the host.
        name: String,
        /// The other pod's cgroup.
        owner: u64,
    },
    /// A pinned map has another layout.
    #[error(
        "{name} is not what this agent expects ({problem}); pins of another version are removed by weir-agent uninstall"
    )]
    Layout {
        /// The map or program.
        name: &'static str,
        /// What differs.
        problem: String,
    },
    /// The folder of pins cannot be used.
    #[error("pins in {}; is a bpf file system mounted there (mount -t bpf bpf {BPFFS})?", path.display())]
    Pins {
        /// The folder or file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Attaching failed.
    #[error(transparent)]
    Attach(#[from] AttachError),
}

/// Whether programs and maps outlive the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pinning {
    /// They go with the process: `exec`.
    Unpinned,
    /// They stay, and the next process takes them over: `run`. The folder lies on a bpf file system.
    Pinned(PathBuf),
}

impl Pinning {
    /// The folder that `run` uses; its name bears the layout version, so that an agent with other layouts does
    /// not take over maps it would misread.
    pub fn standard() -> Self {
        Self::Pinned(pin_folder())
    }
}

/// The folder of pins that `run` uses.
pub fn pin_folder() -> PathBuf {
    Path::new(BPFFS).join("weir").join(format!("v{}", layout_version()))
}

/// The version of this agent's layouts.
pub(super) fn layout_version() -> u32 {
    // A test of an upgrade needs an agent of another one. What is released heeds nothing of the kind.
    #[cfg(debug_assertions)]
    if let Some(version) = std::env::var("WEIR_TEST_LAYOUT").ok().and_then(|version| version.parse().ok()) {
        return version;
    }
    LAYOUT_VERSION
}

/// The programs and maps in the kernel. Dropped, it detaches what is not pinned.
pub struct Kernel {
    pub(super) api_set: Mutex<HashMap<MapData, ApiEndpoint, u32>>,
    pub(super) api_set_changed: tokio::sync::Notify,
    pub(super) cgroups: Mutex<HashMap<MapData, u64, CgroupEntry>>,
    pub(super) nested: Mutex<HashMap<MapData, NestedKey, u32>>,
    pub(super) sieve: Sieve,
    pub(super) names: Mutex<HashMap<MapData, u64, Named>>,
    pub(super) suspected: Mutex<HashMap<MapData, Suspect, Suspicion>>,
    pub(super) suspicions: Mutex<HashMap<MapData, u64, u32>>,
    pub(super) flows: Mutex<HashMap<MapData, FlowKey, FlowRecord>>,
    /// Of an older layout, whose programs still redirect or did a moment ago.
    pub(super) older_flows: Mutex<Option<HashMap<MapData, FlowKey, FlowRecord>>>,
    pub(super) counters: PerCpuArray<MapData, u64>,
    pub(super) pod_counters: Mutex<PerCpuHashMap<MapData, u64, PodCounters>>,
    pub(super) pod_slots: Mutex<PerCpuArray<MapData, PodSlot>>,
    pub(super) interfaces: Mutex<HashMap<MapData, u32, u64>>,
    pub(super) quarantine: Mutex<HashMap<MapData, u64, u64>>,
    pub(super) pods: Mutex<HashMap<MapData, u64, PodName>>,
    pub(super) settings: Mutex<Array<MapData, Settings>>,
    notices: Mutex<Option<RingBuf<MapData>>>,
    pub(super) attached: Mutex<attach::Attached>,
    debug_log: Mutex<Option<debug_log::Copying>>,
}

impl fmt::Debug for Kernel {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Kernel").finish_non_exhaustive()
    }
}

impl Kernel {
    /// Loads programs and maps; maps that are pinned already are taken over, with what they hold. Nothing is
    /// attached yet.
    ///
    /// # Errors
    /// Not built, not privileged, refused by the verifier (with its log), or pins with another layout.
    pub fn load(pinning: Pinning) -> Result<Self, KernelError> {
        Self::load_object(OBJECT.ok_or(KernelError::NotBuilt)?, pinning)
    }

    /// The same with the programs and maps of this object.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_object(object: &[u8], pinning: Pinning) -> Result<Self, KernelError> {
        let mut loader = EbpfLoader::new();
        let tick_ns = tick_ns();
        loader.override_global(TICK_NS, &tick_ns, true);
        let pins = match &pinning {
            Pinning::Unpinned => None,
            Pinning::Pinned(folder) => {
                let maps = prepare_pins(folder)?;
                for name in maps::ALL {
                    loader.map_pin_path(name, maps.join(name));
                }
                Some(folder.clone())
            }
        };
        let mut ebpf = loader.load(object).map_err(KernelError::Load)?;
        for program in programs::ALL {
            load_program(&mut ebpf, program)?;
        }
        let security = security::Hooks::new(&ebpf);
        let security = security.map_err(|source| KernelError::Map { map: "(any)", source })?;
        let log = debug_log::take(&mut ebpf);
        let kernel = Self {
            api_set: Mutex::new(map(&mut ebpf, maps::API_SET)?),
            api_set_changed: tokio::sync::Notify::new(),
            cgroups: Mutex::new(map(&mut ebpf, maps::CGROUPS)?),
            nested: Mutex::new(map(&mut ebpf, maps::NESTED)?),
            sieve: Sieve {
                marks: Mutex::new(map(&mut ebpf, maps::SIEVE)?),
                doubts: Mutex::new(map(&mut ebpf, maps::DOUBTS)?),
                generation: Mutex::new(map(&mut ebpf, maps::GENERATION)?),
            },
            names: Mutex::new(map(&mut ebpf, maps::NAMES)?),
            suspected: Mutex::new(map(&mut ebpf, maps::SUSPECTED)?),
            suspicions: Mutex::new(map(&mut ebpf, maps::SUSPICIONS)?),
            flows: Mutex::new(map(&mut ebpf, maps::FLOWS)?),
            older_flows: Mutex::new(None),
            counters: map(&mut ebpf, maps::COUNTERS)?,
            pod_counters: Mutex::new(map(&mut ebpf, maps::POD_COUNTERS)?),
            pod_slots: Mutex::new(map(&mut ebpf, maps::POD_SLOTS)?),
            interfaces: Mutex::new(map(&mut ebpf, maps::INTERFACES)?),
            quarantine: Mutex::new(map(&mut ebpf, maps::QUARANTINE)?),
            pods: Mutex::new(map(&mut ebpf, maps::PODS)?),
            settings: Mutex::new(map(&mut ebpf, maps::SETTINGS)?),
            notices: Mutex::new(Some(map(&mut ebpf, maps::NOTICES)?)),
            attached: Mutex::new(attach::Attached::new(ebpf, pins, security)),
            debug_log: Mutex::new(log),
        };
        kernel.mark_api_set()?;
        Ok(kernel)
    }

    /// Attaches guard and hooks to a cgroup v2 folder. Where they are pinned and attached already, the running
    /// programs are replaced in place: at no moment there are none.
    ///
    /// # Errors
    /// The folder is no cgroup v2, or the kernel refuses.
    pub fn attach(&self, cgroup: &Path) -> Result<(), KernelError> {
        Ok(attach::lock(&self.attached).attach(cgroup, programs::GUARD_AND_HOOKS)?)
    }

    /// The same, but programs that are pinned and attached already stay, whoever has loaded them.
    ///
    /// # Errors
    /// As [`Self::attach`].
    pub fn attach_missing(&self, cgroup: &Path) -> Result<(), KernelError> {
        Ok(attach::lock(&self.attached).attach_missing(cgroup, programs::GUARD_AND_HOOKS)?)
    }

    /// As [`Self::attach`], without the guard: for a cgroup below one that has it.
    ///
    /// # Errors
    /// As [`Self::attach`].
    pub fn attach_hooks(&self, cgroup: &Path) -> Result<(), KernelError> {
        Ok(attach::lock(&self.attached).attach(cgroup, programs::HOOKS)?)
    }

    /// Has a root of pods listen to name servers before an agent attaches the rest there; what is there already stays.
    ///
    /// # Errors
    /// As [`Self::attach`].
    pub(super) fn attach_listening(&self, cgroup: &Path) -> Result<(), KernelError> {
        Ok(attach::lock(&self.attached).attach_missing(cgroup, programs::LISTENING)?)
    }

    /// Attaches what decides in the kernel's security hooks, for all cgroups at once; says why not where the kernel takes none.
    ///
    /// # Errors
    /// A pin cannot be made or replaced.
    pub fn attach_security(&self) -> Result<Security, KernelError> {
        Ok(attach::lock(&self.attached).attach_security()?)
    }

    /// The same in one way, which need not be the best that the kernel takes.
    ///
    /// # Errors
    /// As [`Self::attach_security`].
    pub fn attach_security_by(&self, way: Way) -> Result<Security, KernelError> {
        Ok(attach::lock(&self.attached).attach_security_by(way)?)
    }

    /// The same, but what is pinned already stays, whoever has loaded it.
    ///
    /// # Errors
    /// As [`Self::attach_security`].
    pub(super) fn attach_missing_security(&self) -> Result<Security, KernelError> {
        Ok(attach::lock(&self.attached).attach_missing_security()?)
    }

    /// Asks the kernel whether everything is attached as this process has attached it, and attaches what someone has
    /// detached. Returns what that was, and the programs of others beside ours.
    ///
    /// # Errors
    /// Everything is unpinned (`uninstall` was run), or the kernel refuses.
    pub fn inspect(&self) -> Result<Inspection, KernelError> {
        let mut attached = attach::lock(&self.attached);
        let mut found = attached.inspect()?;
        attached.inspect_security(&mut found)?;
        Ok(found)
    }

    /// Removes pinned links of cgroups that this process has not attached to: cgroups that are gone.
    ///
    /// # Errors
    /// The folder of pins cannot be read or changed.
    pub fn prune_links(&self) -> Result<(), KernelError> {
        Ok(attach::lock(&self.attached).prune()?)
    }

    /// Lets the agent's cgroup pass the programs that an older layout has left in force, if there are any. Returns how many
    /// layouts that are.
    ///
    /// # Errors
    /// Their pins cannot be read, or the kernel refuses.
    pub fn admit_in_older_layouts(&self, own_cgroup: u64) -> Result<usize, KernelError> {
        let older = attach::lock(&self.attached).older_layouts()?;
        older.iter().try_for_each(|folder| layouts::admit(folder, own_cgroup))?;
        Ok(older.len())
    }

    /// Takes over what the newest of the older layouts knows, and the flows of what its programs redirect. Returns whether there is one.
    ///
    /// # Errors
    /// Its pins cannot be read, or the kernel refuses.
    pub fn adopt_older_layout(&self) -> Result<bool, KernelError> {
        let older = attach::lock(&self.attached).older_layouts()?;
        let Some(newest) = layouts::newest(older) else { return Ok(false) };
        layouts::adopt(self, &newest).map(|()| true)
    }

    /// Has older layouts redirect nothing any more; all else of them stays, what publishes the flows of what they have just
    /// redirected above all.
    pub(super) fn end_older_redirects(&self) -> Result<(), KernelError> {
        let older = attach::lock(&self.attached).older_layouts()?;
        Ok(older.iter().try_for_each(|folder| layouts::remove_redirects(folder))?)
    }

    /// Removes the pins of older layouts: to be called when all that they kept is kept by ours. Interfaces that they alone guard
    /// are guarded first; if that fails, all of it stays. Returns how many pins there were.
    ///
    /// # Errors
    /// A pin cannot be read or removed, or an interface not be guarded: to be tried again.
    pub fn remove_older_layouts(&self) -> Result<usize, KernelError> {
        let older = attach::lock(&self.attached).older_layouts()?;
        for folder in &older {
            self.guard_interfaces_of(folder)?;
        }
        older.iter().try_fold(0, |removed, folder| Ok(removed + attach::remove_pins(folder)?))
    }

    /// Takes the ring buffer of notices; once.
    pub(super) fn take_notices(&self) -> Option<RingBuf<MapData>> {
        lock(&self.notices).take()
    }

    /// Takes what copies the programs' own log into the agent's; once, and only of a debugging build.
    pub(super) fn take_debug_log(&self) -> Option<debug_log::Copying> {
        lock(&self.debug_log).take()
    }

    /// Forgets the flows of a former process: its listeners are dead, and what they left must not vouch for a connection
    /// to a new one. Not to be called where listeners were handed over.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn forget_flows(&self) -> Result<(), KernelError> {
        lock(&self.older_flows).take();
        let mut flows = lock(&self.flows);
        let stale = flows.keys().collect::<Result<Vec<_>, _>>();
        let stale = stale.map_err(|source| KernelError::Map { map: maps::FLOWS, source })?;
        stale.iter().try_for_each(|key| absent_is_fine(flows.remove(key), maps::FLOWS))
    }
}

/// How long a tick of the kernel's timer is: the resolution of its coarse clock. Where that cannot be read, the longest there is,
/// with which a connection that left late is dated too early, and its process not named.
fn tick_ns() -> u64 {
    let resolution = nix::time::clock_getres(nix::time::ClockId::CLOCK_MONOTONIC_COARSE);
    let tick = resolution.ok().and_then(|tick| u64::try_from(tick.tv_nsec()).ok());
    tick.filter(|tick| (1..=TICK_NS_MAX).contains(tick)).unwrap_or(TICK_NS_MAX)
}

/// Makes the folders of pins and refuses maps of another layout: taken over, they would be misread.
fn prepare_pins(folder: &Path) -> Result<PathBuf, KernelError> {
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| KernelError::Pins { path, source }
    };
    let maps = folder.join("maps");
    fs::create_dir_all(&maps).map_err(at(&maps))?;
    let system = nix::sys::statfs::statfs(&maps).map_err(|errno| at(&maps)(errno.into()))?;
    if system.filesystem_type() != nix::sys::statfs::BPF_FS_MAGIC {
        return Err(at(&maps)(io::Error::other("this is no bpf file system")));
    }
    for (name, key, value) in [
        (maps::API_SET, size_of::<ApiEndpoint>(), size_of::<u32>()),
        (maps::CGROUPS, size_of::<u64>(), size_of::<CgroupEntry>()),
        (maps::NESTED, size_of::<NestedKey>(), size_of::<u32>()),
        (maps::SIEVE, size_of::<u32>(), size_of::<u64>()),
        (maps::GENERATION, size_of::<u32>(), size_of::<u64>()),
        (maps::NAMES, size_of::<u64>(), size_of::<Named>()),
        (maps::SUSPECTED, size_of::<Suspect>(), size_of::<Suspicion>()),
        (maps::SUSPICIONS, size_of::<u64>(), size_of::<u32>()),
        (maps::DOUBTS, size_of::<u32>(), size_of::<u64>()),
        (maps::FLOWS, size_of::<FlowKey>(), size_of::<FlowRecord>()),
        (maps::COUNTERS, size_of::<u32>(), size_of::<u64>()),
        (maps::SETTINGS, size_of::<u32>(), size_of::<Settings>()),
        (maps::POD_COUNTERS, size_of::<u64>(), size_of::<PodCounters>()),
        (maps::POD_SLOTS, size_of::<u32>(), size_of::<PodSlot>()),
        (maps::INTERFACES, size_of::<u32>(), size_of::<u64>()),
        (maps::QUARANTINE, size_of::<u64>(), size_of::<u64>()),
        (maps::PODS, size_of::<u64>(), size_of::<PodName>()),
    ] {
        if maps.join(name).exists() {
            check_sizes(&maps, name, (key, value))?;
        }
    }
    Ok(maps)
}

/// Refuses a pinned map with keys and values of other sizes than these.
pub(super) fn check_sizes(
    maps: &Path,
    name: &'static str,
    (key, value): (usize, usize),
) -> Result<(), KernelError> {
    let info = MapData::from_pin(maps.join(name))
        .and_then(|map| map.info())
        .map_err(|source| KernelError::Map { map: name, source })?;
    if (info.key_size() as usize, info.value_size() as usize) == (key, value) {
        return Ok(());
    }
    let problem = format!(
        "key and value have {} and {} bytes, not {key} and {value}",
        info.key_size(),
        info.value_size()
    );
    Err(KernelError::Layout { name, problem })
}

fn load_program(ebpf: &mut Ebpf, name: &'static str) -> Result<(), KernelError> {
    let failed = |source| match source {
        ProgramError::LoadError { io_error, verifier_log } => KernelError::Refused {
            program: name,
            log: verifier_log::told(&verifier_log.to_string(), verifier_log::TOLD_MAX),
            source: io_error,
        },
        source => KernelError::Program { program: name, source },
    };
    match ebpf.program_mut(name) {
        Some(Program::CgroupSockAddr(program)) => program.load().map_err(failed),
        Some(Program::CgroupSock(program)) => program.load().map_err(failed),
        Some(Program::SockOps(program)) => program.load().map_err(failed),
        Some(Program::CgroupSkb(program)) => program.load().map_err(failed),
        Some(Program::SchedClassifier(program)) => program.load().map_err(failed),
        _ => Err(KernelError::Stale { name }),
    }
}

fn map<M: TryFrom<Map, Error = MapError>>(ebpf: &mut Ebpf, name: &'static str) -> Result<M, KernelError> {
    let map = ebpf.take_map(name).ok_or_else(|| KernelError::Stale { name })?;
    M::try_from(map).map_err(|source| KernelError::Map { map: name, source })
}
