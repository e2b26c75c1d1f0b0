//! What the kernel's part costs: time per run of a program, memory per map. Reads only.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::Path,
    time::Duration,
};

use aya::{
    maps::MapData,
    programs::ProgramError,
    sys::{Stats, enable_stats},
};
use weir_common::kernel::{maps, programs};

use super::{
    attach,
    loader::{Kernel, KernelError},
};

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
    for name in maps::ALL {
        let path = folder.join(name);
        if !path.exists() {
            continue;
        }
        let map = MapData::from_pin(path).map_err(|source| KernelError::Map { map: name, source })?;
        let descriptor = map.fd().as_fd().as_raw_fd();
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{descriptor}")).unwrap_or_default();
        bytes.extend(memlock(&info).map(|bytes| (name, bytes)));
    }
    Ok(bytes)
}

/// The memory that `/proc/<pid>/fdinfo/<fd>` of a map names (`bpf_map_show_fdinfo`, kernel/bpf/syscall.c).
fn memlock(fdinfo: &str) -> Option<u64> {
    fdinfo.lines().find_map(|line| line.strip_prefix("memlock:")?.trim().parse().ok())
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
