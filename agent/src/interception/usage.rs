//! What the kernel's part costs: time per run of a program, memory per map. Reads only.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::Path,
    time::Duration,
};

use aya::{
    Pod,
    maps::{HashMap, Map, MapData, PerCpuHashMap},
    programs::{ProgramError, loaded_programs},
    sys::{Stats, enable_stats},
};
use serde::Serialize;
use weir_common::kernel::{
    ApiEndpoint, CgroupEntry, FlowKey, FlowRecord, Named, NestedKey, PodCounters, PodName, Suspect,
    Suspicion, maps, programs,
};

use super::{
    attach,
    loader::{Kernel, KernelError},
};

/// Most entries that are counted; no map has room for more.
const ENTRIES_MAX: usize = 1 << 20;
/// Most programs of the node that are named.
const PROGRAMS_MAX: usize = 2000;

/// How often a program ran while the kernel counted, and how long that took together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProgramUsage {
    /// The program.
    pub name: &'static str,
    /// Runs.
    pub runs: u64,
    /// Their time, with that of reading the clock for it.
    pub time: Duration,
}

/// Makes the kernel count the runs of all programs, as `kernel.bpf_stats_enabled` does, until the descriptor is
/// closed.
///
/// # Errors
/// Not privileged, or the kernel is older than 5.8.
pub fn count_runs() -> io::Result<OwnedFd> {
    enable_stats(Stats::RunTime).map_err(|error| error.io_error)
}

impl Kernel {
    /// What each program has cost while the kernel counted.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn program_usage(&self) -> Result<Vec<ProgramUsage>, KernelError> {
        let attached = attach::lock(&self.attached);
        let usage = |name| {
            let info =
                attached.ebpf.program(name).ok_or(ProgramError::NotLoaded).and_then(|program| program.info());
            let info = info.map_err(|source| KernelError::Program { program: name, source })?;
            Ok(ProgramUsage { name, runs: info.run_count(), time: info.run_time() })
        };
        programs::ALL.into_iter().map(usage).collect()
    }
}

/// Bytes of kernel memory that each pinned map takes now; without those of which the kernel does not say it.
///
/// # Errors
/// A pinned map cannot be opened.
pub(super) fn map_bytes(folder: &Path) -> Result<BTreeMap<&'static str, u64>, KernelError> {
    let mut bytes = BTreeMap::new();
    for opened in opened(folder) {
        let (name, _, info) = opened?;
        bytes.extend(memlock(&info).map(|bytes| (name, bytes)));
    }
    Ok(bytes)
}

/// A pinned map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MapUsage {
    /// Kernel memory, bytes, if the kernel says it.
    pub bytes: Option<u64>,
    /// Room for entries.
    pub entries_max: Option<u64>,
    /// Entries; none for what is no hash.
    pub entries: Option<usize>,
}

/// How full the pinned maps are.
///
/// # Errors
/// A pinned map cannot be opened.
pub fn map_usage(pins: &Path) -> Result<BTreeMap<&'static str, MapUsage>, KernelError> {
    let mut usage = BTreeMap::new();
    for opened in opened(&pins.join("maps")) {
        let (name, map, info) = opened?;
        let (bytes, entries_max) = (memlock(&info), number(&info, "max_entries:"));
        usage.insert(name, MapUsage { bytes, entries_max, entries: entries(name, map) });
    }
    Ok(usage)
}

/// The pinned maps by their names, each with what the kernel says of its descriptor.
fn opened(folder: &Path) -> impl Iterator<Item = Result<(&'static str, MapData, String), KernelError>> {
    let there = maps::ALL.into_iter().map(|name| (name, folder.join(name))).filter(|(_, path)| path.exists());
    there.map(|(name, path)| {
        let map = MapData::from_pin(path).map_err(|source| KernelError::Map { map: name, source })?;
        let descriptor = map.fd().as_fd().as_raw_fd();
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{descriptor}")).unwrap_or_default();
        Ok((name, map, info))
    })
}

/// How many entries a hash has; others change it meanwhile.
fn entries(name: &str, map: MapData) -> Option<usize> {
    fn hash<K: Pod, V: Pod>(map: Map) -> Option<usize> {
        let map: HashMap<MapData, K, V> = map.try_into().ok()?;
        Some(map.keys().take(ENTRIES_MAX).count())
    }
    let map = Map::from_map_data(map).ok()?;
    match name {
        maps::API_SET => hash::<ApiEndpoint, u32>(map),
        maps::CGROUPS => hash::<u64, CgroupEntry>(map),
        maps::NESTED => hash::<NestedKey, u32>(map),
        maps::NAMES => hash::<u64, Named>(map),
        maps::SUSPECTED => hash::<Suspect, Suspicion>(map),
        maps::SUSPICIONS => hash::<u64, u32>(map),
        maps::FLOWS => hash::<FlowKey, FlowRecord>(map),
        maps::INTERFACES => hash::<u32, u64>(map),
        maps::QUARANTINE | maps::REPORTED => hash::<u64, u64>(map),
        maps::PODS => hash::<u64, PodName>(map),
        maps::POD_COUNTERS => {
            let map: PerCpuHashMap<MapData, u64, PodCounters> = map.try_into().ok()?;
            Some(map.keys().take(ENTRIES_MAX).count())
        }
        _ => None,
    }
}

/// A program that is loaded on this node, Weir's or another's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LoadedProgram {
    /// Its number.
    pub id: u32,
    /// Its name, which the kernel cuts after 15 bytes.
    pub name: String,
    /// Its kind, a number of `enum bpf_prog_type`, linux/bpf.h.
    pub kind: u32,
}

/// All of them, as far as the kernel names them.
pub fn loaded() -> Vec<LoadedProgram> {
    let known = loaded_programs().take(PROGRAMS_MAX).filter_map(Result::ok);
    let program = |info: aya::programs::ProgramInfo| LoadedProgram {
        id: info.id(),
        name: info.name_as_str().unwrap_or_default().to_owned(),
        kind: info.program_type() as u32,
    };
    known.map(program).collect()
}

/// The memory that `/proc/<pid>/fdinfo/<fd>` of a map names (`bpf_map_show_fdinfo`, kernel/bpf/syscall.c).
fn memlock(fdinfo: &str) -> Option<u64> {
    number(fdinfo, "memlock:")
}

fn number(fdinfo: &str, name: &str) -> Option<u64> {
    fdinfo.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::memlock;

    #[test]
    fn the_memory_of_a_map_is_read_from_its_descriptor() {
        assert_eq!(memlock("pos:\t0\nmap_type:\t1\nmemlock:\t4096\nmap_id:\t7\n"), Some(4096));
        assert_eq!(memlock("pos:\t0\nmap_type:\t1\n"), None);
        assert_eq!(memlock("memlock:\tmuch\n"), None);
    }
}
