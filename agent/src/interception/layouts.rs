//! Pins of other layouts beside ours: what an agent from before an upgrade has left in force.
//!
//! What its maps know is taken over first, so that our programs judge as its do. Its go on to redirect and to guard, by maps that
//! nobody writes any more but for one entry, the agent's own: there is no gap, and what they redirect is served, but pods that come
//! meanwhile are denied. When an agent has everything in force in their place, they go: first what redirects, a moment later the
//! rest, which publishes the flows of what was redirected last.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use aya::{
    Pod,
    maps::{Array, HashMap, Map, MapData, MapError},
};
use tokio::time::Instant;
use weir_common::kernel::{
    CgroupEntry, Class, FlowKey, FlowRecord, NestedKey, PodName, Suspect, Suspicion, maps, programs,
};

use super::{
    attach::{AttachError, uninstall},
    guard::own_cgroup,
    loader::{Kernel, KernelError, check_sizes},
    maps::{filled, lock},
    pinned::{pinned_links, pinned_map},
    run::InterceptionError,
    sieve::changed,
};
use crate::doctor;

/// Removes every pin, of all layouts; returns how many there were. `pins` is the folder of ours.
///
/// # Errors
/// A pin cannot be read or removed.
pub fn uninstall_all(pins: &Path) -> Result<usize, AttachError> {
    let others = others(pins)?.into_iter().map(|(_, folder)| folder);
    others.chain([pins.to_owned()]).try_fold(0, |removed, folder| Ok(removed + uninstall(&folder)?))
}

/// Lets this process's own cgroup reach API servers past whatever is in force, of any layout.
///
/// # Errors
/// Pins or cgroups cannot be read, or the kernel refuses.
pub fn admit_own(pins: &Path) -> Result<(), InterceptionError> {
    let Some(own) = own_cgroup()? else { return Ok(()) };
    let others = others(pins).map_err(KernelError::from)?.into_iter().map(|(_, folder)| folder);
    Ok(others.chain([pins.to_owned()]).try_for_each(|folder| admit(&folder, own))?)
}

/// How long what redirects is gone before the rest goes: a connect takes microseconds from the one to the other.
const REDIRECTED: Duration = Duration::from_secs(1);
/// How long what was redirected last may wait at a listener.
const ACCEPTED: Duration = Duration::from_secs(60);

/// What an agent of an older layout left, which is in the way once every pod has its verdict.
#[derive(Debug, Default)]
pub(super) struct OlderLayouts {
    gone: bool,
    /// Since when it redirects nothing any more.
    passed_by: Option<Instant>,
    /// Why not, as it was said last.
    said: Option<String>,
}

impl OlderLayouts {
    /// Removes it, if it is still there, by steps, one each time this is called; after a failure it is tried again.
    pub(super) fn remove(&mut self, kernel: &Kernel) {
        let step = match self.passed_by {
            None => kernel.end_older_redirects().map(|()| self.passed_by = Some(Instant::now())),
            Some(since) if !self.gone && since.elapsed() >= REDIRECTED => {
                kernel.remove_older_layouts().map(|pins| {
                    self.gone = true;
                    if pins > 0 {
                        tracing::info!(
                            event = "older-layout-removed",
                            pins,
                            "removed the pins of an older layout"
                        );
                    }
                })
            }
            Some(since) => {
                if self.gone && since.elapsed() >= ACCEPTED {
                    lock(&kernel.older_flows).take();
                }
                Ok(())
            }
        };
        match step {
            Ok(()) => {}
            Err(error) => {
                let message = doctor::chain(&error);
                if self.said.as_ref() != Some(&message) {
                    tracing::error!(
                        event = "older-pins-stay",
                        error = message,
                        "pins of an older layout stay, and deny pods the API server; tried again each second"
                    );
                    self.said = Some(message);
                }
            }
        }
    }
}

/// The folders of older layouts. A newer one's is not among them: whoever goes back to an older agent decides about it.
pub(super) fn older(pins: &Path) -> Result<Vec<PathBuf>, AttachError> {
    let Some(own) = version(pins) else { return Ok(Vec::new()) };
    let older = others(pins)?.into_iter().filter(|(other, _)| *other < own);
    Ok(older.map(|(_, folder)| folder).collect())
}

/// The newest of these.
pub(super) fn newest(layouts: Vec<PathBuf>) -> Option<PathBuf> {
    layouts.into_iter().max_by_key(|folder| version(folder))
}

/// Whether the connections that older layouts redirect can be served: an agent that runs with one of them would else be better
/// ended first.
///
/// # Errors
/// Their flows have another layout.
pub(super) fn can_follow(pins: &Path) -> Result<(), KernelError> {
    for folder in older(pins)? {
        map_of::<FlowKey, FlowRecord, HashMap<MapData, FlowKey, FlowRecord>>(&folder, maps::FLOWS)?;
    }
    Ok(())
}

/// Removes the pins of what redirects connections.
pub(super) fn remove_redirects(pins: &Path) -> Result<(), AttachError> {
    let redirects = [programs::CONNECT4, programs::CONNECT6];
    let names = pinned_links(pins)?.into_iter();
    for name in names.filter(|name| redirects.iter().any(|program| name.ends_with(program))) {
        let path = pins.join("links").join(name);
        fs::remove_file(&path).map_err(|source| AttachError::Remove { path, source })?;
    }
    Ok(())
}

/// Takes over what an older layout knows, before our programs are attached or by what they judge by already: cgroups with their
/// listeners, names, quarantine, listeners inside pods, and what pods were told. What is known already stays, and of a map with
/// other sizes nothing is taken: what it held is found anew, and denied until then.
pub(super) fn adopt(kernel: &Kernel, folder: &Path) -> Result<(), KernelError> {
    *lock(&kernel.older_flows) = unless_other(map_of::<FlowKey, FlowRecord, _>(folder, maps::FLOWS))?;
    copy::<u64, PodName>(folder, maps::PODS, &mut lock(&kernel.pods))?;
    copy::<u64, u64>(folder, maps::QUARANTINE, &mut lock(&kernel.quarantine))?;
    copy::<NestedKey, u32>(folder, maps::NESTED, &mut lock(&kernel.nested))?;
    // Full of what pods told themselves, they must not keep an agent from its start.
    unless_full(copy::<Suspect, Suspicion>(folder, maps::SUSPECTED, &mut lock(&kernel.suspected)))?;
    unless_full(copy::<u64, u32>(folder, maps::SUSPICIONS, &mut lock(&kernel.suspicions)))?;
    kernel.mark_api_set()?;
    let Some(cgroups) =
        unless_other(map_of::<u64, CgroupEntry, HashMap<MapData, u64, CgroupEntry>>(folder, maps::CGROUPS))?
    else {
        return Ok(());
    };
    let known = kernel.cgroups()?;
    for entry in cgroups.iter() {
        let (cgroup, entry) = entry.map_err(|source| KernelError::Map { map: maps::CGROUPS, source })?;
        if !known.contains_key(&cgroup) {
            kernel.classify(cgroup, entry)?;
        }
    }
    Ok(())
}

/// Copies what is not there yet.
fn copy<K: Pod, V: Pod>(
    folder: &Path,
    name: &'static str,
    to: &mut HashMap<MapData, K, V>,
) -> Result<(), KernelError> {
    let Some(from) = unless_other(map_of::<K, V, HashMap<MapData, K, V>>(folder, name))? else {
        return Ok(());
    };
    let failed = |source| KernelError::Map { map: name, source };
    for entry in from.iter() {
        let (key, value) = entry.map_err(failed)?;
        if to.get(&key, 0).is_err() {
            filled(|| to.insert(key, value, 0)).map_err(failed)?;
        }
    }
    Ok(())
}

/// What does not fit any more into a map is left out, and that is said.
fn unless_full(copied: Result<(), KernelError>) -> Result<(), KernelError> {
    match copied {
        Err(KernelError::Map { map, source: MapError::SyscallError(error) })
            if error.io_error.raw_os_error() == Some(libc::E2BIG) =>
        {
            tracing::warn!(
                event = "older-layout-left-out",
                map,
                "a map is full: not all that an older layout knows is taken over"
            );
            Ok(())
        }
        copied => copied,
    }
}

/// None of a map with other sizes.
fn unless_other<M>(found: Result<Option<M>, KernelError>) -> Result<Option<M>, KernelError> {
    match found {
        Err(KernelError::Layout { .. }) => Ok(None),
        found => found,
    }
}

/// Tells an older layout's programs that this cgroup is the agent's: to them an agent that runs in a pod is a stranger, and it
/// could not reach the API server until their pins are gone. Cgroups have had the same layout since version 1.
pub(super) fn admit(folder: &Path, own: u64) -> Result<(), KernelError> {
    let Some(mut cgroups) = map_of::<u64, CgroupEntry, HashMap<_, _, _>>(folder, maps::CGROUPS)? else {
        return Ok(());
    };
    let mut admit = || {
        let entry = CgroupEntry { listener_netns: 0, class: Class::Agent as u32, listener_port: 0 };
        cgroups.insert(own, entry, 0).map_err(|source| KernelError::Map { map: maps::CGROUPS, source })
    };
    // Since version 3 the programs keep what they found.
    match map_of::<u32, u64, Array<_, _>>(folder, maps::GENERATION)? {
        Some(mut generation) => changed(&mut generation, admit),
        None => admit(),
    }
}

/// The interfaces that an older layout guards, and the cgroups of the pods behind them.
pub(super) fn interfaces(folder: &Path) -> Result<Vec<(u32, u64)>, KernelError> {
    let Some(map) = map_of::<u32, u64, HashMap<_, _, _>>(folder, maps::INTERFACES)? else {
        return Ok(Vec::new());
    };
    map.iter().collect::<Result<_, _>>().map_err(|source| KernelError::Map { map: maps::INTERFACES, source })
}

/// A pinned map of another layout, if it is there; refused if keys and values have other sizes than here.
fn map_of<K, V, M: TryFrom<Map, Error = MapError>>(
    folder: &Path,
    name: &'static str,
) -> Result<Option<M>, KernelError> {
    let folder = folder.join("maps");
    if !folder.join(name).exists() {
        return Ok(None);
    }
    check_sizes(&folder, name, (size_of::<K>(), size_of::<V>()))?;
    pinned_map(&folder, name).map(Some)
}

/// The folders of other layouts beside this one.
fn others(pins: &Path) -> Result<Vec<(u32, PathBuf)>, AttachError> {
    let Some(parent) = pins.parent() else { return Ok(Vec::new()) };
    let failed = |source| AttachError::Remove { path: parent.to_owned(), source };
    let entries = match fs::read_dir(parent) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let mut others = Vec::new();
    for entry in entries {
        let folder = entry.map_err(failed)?.path();
        others.extend(version(&folder).filter(|_| folder != pins).map(|version| (version, folder)));
    }
    Ok(others)
}

/// The layout that a folder of pins bears in its name, as `v3`.
fn version(folder: &Path) -> Option<u32> {
    folder.file_name()?.to_str()?.strip_prefix('v')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::{others, version};

    #[test]
    fn layouts_are_known_by_the_names_of_their_folders() {
        let root = tempfile::tempdir().expect("a folder");
        for name in ["v1", "v2", "v3", "v", "vx", "links"] {
            std::fs::create_dir(root.path().join(name)).expect("makes it");
        }
        let mut found = others(&root.path().join("v2")).expect("reads it");
        found.sort();
        assert_eq!(found, [(1, root.path().join("v1")), (3, root.path().join("v3"))]);
        assert_eq!(version(&root.path().join("v12")), Some(12));
        assert_eq!(others(&root.path().join("none/v2")).expect("nothing there"), []);
    }
}
