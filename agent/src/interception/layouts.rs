//! Pins of other layouts beside ours: what an agent from before an upgrade has left in force.
//!
//! Its programs go on to judge by maps that nobody writes any more but for one entry, the agent's own, so they deny: no gap,
//! but no way for pods either. They go when an agent has everything in force in their place.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use aya::maps::{Array, HashMap, Map, MapError};
use weir_common::kernel::{CgroupEntry, Class, maps};

use super::{
    attach::{AttachError, uninstall},
    loader::{Kernel, KernelError, check_sizes},
    pinned::pinned_map,
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

/// What an agent of an older layout left, which is in the way once every pod has its verdict.
#[derive(Debug, Default)]
pub(super) struct OlderLayouts {
    gone: bool,
    /// Why not, as it was said last.
    said: Option<String>,
}

impl OlderLayouts {
    /// Removes it, if it is still there; after a failure it is tried again.
    pub(super) fn remove(&mut self, kernel: &Kernel) {
        if self.gone {
            return;
        }
        match kernel.remove_older_layouts() {
            Ok(pins) => {
                self.gone = true;
                if pins > 0 {
                    tracing::info!(pins, "removed the pins of an older layout");
                }
            }
            Err(error) => {
                let message = doctor::chain(&error);
                if self.said.as_ref() != Some(&message) {
                    tracing::error!(
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
