//! `weir-guard.service` on a node that has only containers: this program with what it is linked with, and the unit that runs it before
//! the kubelet. Written by an init step of the chart, below the node's own root.

use std::{
    collections::BTreeSet,
    fs::{self, File, Permissions},
    io,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use sha2::{Digest as _, Sha256};

/// Of the unit, as an administrator would install it.
const SHIPPED: &str = include_str!("../../deploy/systemd/weir-guard.service");
/// What is replaced in it.
const START: &str = "ExecStart=/usr/local/bin/weir-agent guard";
/// Where programs are on a node; each version has a folder, so that a crash leaves none that is half of another.
const PROGRAMS: &str = "opt/weir";
const UNITS: &str = "etc/systemd/system";
const NAME: &str = "weir-guard.service";
const NEW: &str = ".weir-guard.service.new";
/// What `systemctl enable` makes.
const REQUIRED_BY: &str = "kubelet.service.requires";
/// Characters of a folder's name.
const DIGEST_CHARS: usize = 16;

/// Why it is not installed, or not removed.
#[derive(Debug, thiserror::Error)]
pub enum GuardUnitError {
    /// A file or folder.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// What was copied does not start, so it would keep the kubelet from starting, too.
    #[error("the copy in {} does not start: {said}; is it on a file system that is mounted noexec?", folder.display())]
    Broken {
        /// The copy.
        folder: PathBuf,
        /// What it said.
        said: String,
    },
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> GuardUnitError + 'a {
    move |source| GuardUnitError::File { action, path: path.to_owned(), source }
}

/// Installs and enables it on the node whose root folder this is; a former version goes.
///
/// # Errors
/// Something cannot be read or written, or does not start there.
pub fn install(root: &Path) -> Result<(), GuardUnitError> {
    let files = mapped().map_err(failed("read", Path::new("/proc/self/maps")))?;
    let digest = digest(&files)?;
    let programs = root.join(PROGRAMS);
    let folder = programs.join(&digest);
    if !folder.exists() {
        let new = programs.join(format!("new-{digest}"));
        if new.exists() {
            fs::remove_dir_all(&new).map_err(failed("remove", &new))?;
        }
        fs::create_dir_all(&new).map_err(failed("make", &new))?;
        for file in &files {
            copy(file, &new.join(name(file)))?;
        }
        starts(&new, &files)?;
        synced(&new)?;
        fs::rename(&new, &folder).map_err(failed("make", &folder))?;
        synced(&programs)?;
    }
    let units = root.join(UNITS);
    let (start, arguments) = command(&Path::new("/").join(PROGRAMS).join(&digest), &files);
    let command: Vec<_> = [start].into_iter().chain(arguments).collect();
    let text = SHIPPED.replace(START, &format!("ExecStart={} guard", command.join(" ")));
    let unit = units.join(NAME);
    if fs::read_to_string(&unit).is_ok_and(|there| there == text) && link(root).is_symlink() {
        return tidied(&programs, &digest);
    }
    let new = units.join(NEW);
    fs::write(&new, &text).map_err(failed("write", &new))?;
    File::open(&new).and_then(|file| file.sync_all()).map_err(failed("write", &new))?;
    fs::rename(&new, &unit).map_err(failed("write", &unit))?;
    enabled(root)?;
    synced(&units)?;
    tidied(&programs, &digest)
}

/// Removes all of it, if it is there.
///
/// # Errors
/// Something cannot be removed.
pub fn remove(root: &Path) -> Result<(), GuardUnitError> {
    let (link, unit) = (link(root), root.join(UNITS).join(NAME));
    let own = format!("ExecStart=/{PROGRAMS}/");
    // One of the node's image is somebody else's to remove.
    if fs::read_to_string(&unit).is_ok_and(|text| text.contains(&own)) {
        // The link first: a unit that is required and not there keeps the kubelet from starting.
        for path in [&link, &unit] {
            gone(path, fs::remove_file(path))?;
        }
        if let Some(folder) = link.parent() {
            // Other units may be in it.
            let _ = fs::remove_dir(folder);
        }
    }
    let new = root.join(UNITS).join(NEW);
    gone(&new, fs::remove_file(&new))?;
    let programs = root.join(PROGRAMS);
    gone(&programs, fs::remove_dir_all(&programs))
}

fn gone(path: &Path, removed: io::Result<()>) -> Result<(), GuardUnitError> {
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

fn link(root: &Path) -> PathBuf {
    root.join(UNITS).join(REQUIRED_BY).join(NAME)
}

fn enabled(root: &Path) -> Result<(), GuardUnitError> {
    let link = link(root);
    if link.is_symlink() {
        return Ok(());
    }
    let folder = root.join(UNITS).join(REQUIRED_BY);
    fs::create_dir_all(&folder).map_err(failed("make", &folder))?;
    symlink(Path::new("/").join(UNITS).join(NAME), &link).map_err(failed("make", &link))?;
    synced(&folder)
}

/// Other versions go: nothing names them any more.
fn tidied(programs: &Path, digest: &str) -> Result<(), GuardUnitError> {
    for entry in fs::read_dir(programs).map_err(failed("read", programs))? {
        let path = entry.map_err(failed("read", programs))?.path();
        if !path.ends_with(digest) {
            fs::remove_dir_all(&path).map_err(failed("remove", &path))?;
        }
    }
    Ok(())
}

/// The files whose code this process runs: itself, its libraries and their loader.
fn mapped() -> io::Result<BTreeSet<PathBuf>> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let code =
        maps.lines().filter(|line| line.split_whitespace().nth(1).is_some_and(|mode| mode.contains('x')));
    Ok(code.filter_map(|line| Some(PathBuf::from(&line[line.find('/')?..]))).collect())
}

fn name(file: &Path) -> String {
    file.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn digest(files: &BTreeSet<PathBuf>) -> Result<String, GuardUnitError> {
    let mut all = Sha256::new();
    for file in files {
        let mut one = Sha256::new();
        File::open(file).and_then(|mut file| io::copy(&mut file, &mut one)).map_err(failed("read", file))?;
        all.update(name(file));
        all.update(one.finalize());
    }
    Ok(hex::encode(all.finalize())[..DIGEST_CHARS].to_owned())
}

fn copy(from: &Path, to: &Path) -> Result<(), GuardUnitError> {
    fs::copy(from, to)
        .and_then(|_| fs::set_permissions(to, Permissions::from_mode(0o755)))
        .and_then(|()| File::open(to)?.sync_all())
        .map_err(failed("write", to))
}

fn synced(folder: &Path) -> Result<(), GuardUnitError> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed("write", folder))
}

/// How it starts from that folder, whatever libraries the node has: by the loader that it came with.
fn command(folder: &Path, files: &BTreeSet<PathBuf>) -> (String, Vec<String>) {
    let of = |name: &str| folder.join(name).display().to_string();
    let own = std::env::current_exe().map(|file| name(&file)).unwrap_or_default();
    match files.iter().map(|file| name(file)).find(|name| name.starts_with("ld-")) {
        Some(loader) => {
            (of(&loader), vec!["--library-path".to_owned(), folder.display().to_string(), of(&own)])
        }
        None => (of(&own), Vec::new()),
    }
}

fn starts(folder: &Path, files: &BTreeSet<PathBuf>) -> Result<(), GuardUnitError> {
    let (start, arguments) = command(folder, files);
    let broken = |said: String| GuardUnitError::Broken { folder: folder.to_owned(), said };
    let output = Command::new(start).args(arguments).arg("--help").output();
    let output = output.map_err(|error| broken(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(broken(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names below a folder.
    fn below(root: &Path) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let mut left = vec![root.to_owned()];
        while let Some(folder) = left.pop() {
            for entry in fs::read_dir(folder).expect("is read").map(|entry| entry.expect("is read").path()) {
                found.insert(entry.strip_prefix(root).expect("below").display().to_string());
                if entry.is_dir() && !entry.is_symlink() {
                    left.push(entry);
                }
            }
        }
        found
    }

    #[test]
    fn a_node_without_folders_for_it_has_nothing_to_remove_and_gets_none() {
        let root = tempfile::tempdir().expect("a folder");
        remove(root.path()).expect("nothing is there");
        assert_eq!(below(root.path()), BTreeSet::new());
    }

    #[test]
    fn what_is_removed_leaves_the_node_as_it_was_and_the_units_of_others() {
        let root = tempfile::tempdir().expect("a folder");
        let units = root.path().join(UNITS);
        fs::create_dir_all(units.join(REQUIRED_BY)).expect("makes it");
        fs::create_dir(root.path().join("opt")).expect("makes it");
        fs::write(units.join(REQUIRED_BY).join("other.service"), "").expect("writes it");
        let before = below(root.path());
        remove(root.path()).expect("nothing is there");
        let old = root.path().join(PROGRAMS).join("of-a-former-version");
        fs::create_dir_all(&old).expect("makes it");
        for _ in 0..2 {
            install(root.path()).expect("installs it");
            assert!(!old.exists() && link(root.path()).is_symlink());
            assert!(units.join(NAME).is_file());
        }
        remove(root.path()).expect("removes it");
        assert_eq!(below(root.path()), before);
        fs::write(units.join(NAME), SHIPPED).expect("writes it");
        remove(root.path()).expect("has nothing to remove");
        assert!(units.join(NAME).exists(), "of the node's image");
    }

    #[test]
    fn the_unit_names_a_copy_that_starts_with_its_own_libraries() {
        let root = tempfile::tempdir().expect("a folder");
        fs::create_dir_all(root.path().join(UNITS)).expect("makes it");
        install(root.path()).expect("installs it");
        let unit = fs::read_to_string(root.path().join(UNITS).join(NAME)).expect("is there");
        let start = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).expect("is named");
        assert_eq!(unit, SHIPPED.replace(START, &format!("ExecStart={start}")), "and nothing else differs");
        assert_ne!(unit, SHIPPED);
        let words = start.strip_suffix(" guard").expect("guards").split(' ');
        let words: Vec<_> =
            words.map(|word| word.replace("/opt/", &format!("{}/opt/", root.path().display()))).collect();
        let mut command = Command::new(&words[0]);
        // What a test is, too, is a program that lists itself.
        let said = command.env_clear().args(&words[1..]).arg("--list").output().expect("starts");
        assert!(String::from_utf8_lossy(&said.stdout).contains("the_unit_names_a_copy"), "{said:?}");
    }
}
