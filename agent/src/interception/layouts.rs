//! Pins of other layouts beside ours: what an agent from before an upgrade has left in force.
//!
//! Its programs go on to judge by maps that nobody writes any more, so they deny: no gap, but no way for pods either. They go
//! when an agent has everything in force in their place.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::attach::{AttachError, remove_pins, uninstall};

/// Removes every pin, of all layouts; returns how many there were. `pins` is the folder of ours.
///
/// # Errors
/// A pin cannot be read or removed.
pub fn uninstall_all(pins: &Path) -> Result<usize, AttachError> {
    let others = others(pins)?.into_iter().map(|(_, folder)| folder);
    others.chain([pins.to_owned()]).try_fold(0, |removed, folder| Ok(removed + uninstall(&folder)?))
}

/// Removes the pins of older layouts; returns how many there were. A newer one's stay: whoever goes back to an older agent
/// decides about them. Where interfaces have no links, their guards go by name, and ours have replaced them already.
pub(super) fn remove_older(pins: &Path) -> Result<usize, AttachError> {
    let Some(own) = version(pins) else { return Ok(0) };
    let older = others(pins)?.into_iter().filter(|(other, _)| *other < own);
    older.into_iter().try_fold(0, |removed, (_, folder)| Ok(removed + remove_pins(&folder)?))
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
