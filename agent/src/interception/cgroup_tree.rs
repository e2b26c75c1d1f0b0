//! The tree of pods' cgroups: reading it, and hearing of changes.
//!
//! The kubelet makes a pod's cgroup before the runtime puts the first process into it, so this is where a pod is
//! seen first. Names are judged by `pod`; what a pod means is decided in `enrolment`.

use std::{
    ffi::OsStr,
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, RawFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::{Interest, unix::AsyncFd};

use super::{
    cgroup,
    pod::{self, PodUid},
};

/// Deepest level, below the mount, on which the root of pods or a runtime's folder is looked for.
const ROOT_DEPTH_MAX: usize = 2;
/// Deepest level, below the root of pods, on which a pod's folder is looked for (QoS class, pod).
const POD_DEPTH_MAX: usize = 2;
/// Folders of other container runtimes, wherever they are; what runs there is no host process.
const RUNTIME_FOLDERS: [&str; 4] = ["docker", "machine.slice", "libpod_parent", "buildkit"];
/// Scopes that runtimes make for single containers outside kubepods: `<prefix><id>.scope`.
const RUNTIME_SCOPES: [&str; 5] = ["docker-", "libpod-", "crio-", "cri-containerd-", "nerdctl-"];

/// A pod's cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PodFolder {
    /// The pod, as its cgroup bears it.
    pub(super) uid: PodUid,
    /// The folder.
    pub(super) path: PathBuf,
    /// The cgroup's id.
    pub(super) cgroup: u64,
    /// Links of the folder: two, and one for each cgroup in it (kernfs). With a new sandbox it changes.
    pub(super) links: u64,
}

/// What the tree holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Tree {
    /// Roots of pods, with the cgroup's id.
    pub(super) roots: Vec<(PathBuf, u64)>,
    /// Ids of the cgroups of other runtimes.
    pub(super) runtimes: Vec<u64>,
    /// Pods.
    pub(super) pods: Vec<PodFolder>,
}

impl Tree {
    /// Reads the tree below a cgroup v2 mount. `watch` is called for each folder before it is listed, so that
    /// nothing made in between is missed. Folders that vanish meanwhile are left out.
    ///
    /// # Errors
    /// A folder cannot be listed (too many open files, say): what was not seen must not be taken for gone.
    pub(super) fn read(mount: &Path, mut watch: impl FnMut(&Path)) -> io::Result<Self> {
        let mut tree = Self::default();
        tree.look_for_roots(mount, 0, &mut watch)?;
        for (root, _) in tree.roots.clone() {
            tree.look_for_pods(&root, 0, &mut watch)?;
        }
        Ok(tree)
    }

    fn look_for_roots(
        &mut self,
        folder: &Path,
        depth: usize,
        watch: &mut impl FnMut(&Path),
    ) -> io::Result<()> {
        watch(folder);
        for path in folders(folder)? {
            let Some(name) = path.file_name().and_then(OsStr::to_str) else { continue };
            if pod::is_kubepods_root(name) || name.ends_with("-kubepods.slice") {
                self.roots.extend(cgroup::id(&path).map(|id| (path.clone(), id)));
            } else if is_runtime(name) {
                self.runtimes.extend(cgroup::id(&path));
            } else if depth + 1 < ROOT_DEPTH_MAX {
                self.look_for_roots(&path, depth + 1, watch)?;
            }
        }
        Ok(())
    }

    fn look_for_pods(
        &mut self,
        folder: &Path,
        depth: usize,
        watch: &mut impl FnMut(&Path),
    ) -> io::Result<()> {
        watch(folder);
        for path in folders(folder)? {
            match pod::parse(&path) {
                Some(found) => {
                    // To hear of its containers; before it is looked at, so that a later one is heard of.
                    watch(&path);
                    if let Ok(metadata) = fs::metadata(&path) {
                        let (cgroup, links) = (metadata.ino(), metadata.nlink());
                        self.pods.push(PodFolder { uid: found.pod, path, cgroup, links });
                    }
                }
                None if depth + 1 < POD_DEPTH_MAX => self.look_for_pods(&path, depth + 1, watch)?,
                None => {}
            }
        }
        Ok(())
    }
}

fn is_runtime(name: &str) -> bool {
    RUNTIME_FOLDERS.contains(&name)
        || name.ends_with(".scope") && RUNTIME_SCOPES.iter().any(|prefix| name.starts_with(prefix))
}

/// The folders in one; none if it is gone.
fn folders(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let gone = |error: &io::Error| matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV));
    let mut folders = Vec::new();
    let entries = match fs::read_dir(folder) {
        Err(error) if gone(&error) => return Ok(folders),
        entries => entries?,
    };
    for entry in entries {
        match entry.and_then(|entry| Ok((entry.file_type()?, entry.path()))) {
            Ok((kind, path)) if kind.is_dir() => folders.push(path),
            Ok(_) => {}
            Err(error) if gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(folders)
}

/// Hears of folders made and removed.
pub(super) struct TreeWatch {
    inotify: AsyncFd<Descriptor>,
}

struct Descriptor(Inotify);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl TreeWatch {
    /// Watches nothing yet. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// The kernel's limit of inotify instances (`fs.inotify.max_user_instances`) is reached.
    pub(super) fn new() -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        // SAFETY: the descriptor is owned by the value given, and stays open and the same as long as that lives.
        let inotify = unsafe { AsyncFd::register_with_interest(Descriptor(inotify), Interest::READABLE) };
        Ok(Self { inotify: inotify.map_err(io::Error::from)? })
    }

    /// Watches a folder; twice is as good as once. That it cannot be watched (gone, or
    /// `fs.inotify.max_user_watches` is reached) is made up for by the regular rescan.
    pub(super) fn watch(&self, folder: &Path) {
        let made_or_gone = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE | AddWatchFlags::IN_ONLYDIR;
        if let Err(errno) = self.inotify.get_ref().0.add_watch(folder, made_or_gone)
            && errno != nix::Error::ENOENT
        {
            tracing::debug!(folder = %folder.display(), %errno, "cannot watch; the regular rescan must do");
        }
    }

    /// Waits until something has changed, and takes all that has. Safe to drop while it waits.
    pub(super) async fn changed(&self) {
        let Ok(mut guard) = self.inotify.readable().await else { return std::future::pending().await };
        while self.inotify.get_ref().0.read_events().is_ok_and(|events| !events.is_empty()) {}
        guard.clear_ready();
    }
}

#[cfg(test)]
mod tests {
    use super::{Tree, TreeWatch, is_runtime};

    const UID: &str = "0b5e2f6a-3c1d-4e5f-8a9b-0c1d2e3f4a5b";
    const ID: &str = "4f1c0c9a7f0e4d7b8a6f5e4d3c2b1a09f8e7d6c5b4a392817060504030201000";

    #[test]
    fn pods_of_both_drivers_are_found_and_their_containers_are_not() {
        let escaped = UID.replace('-', "_");
        for (pod, root) in [
            (format!("kubepods/besteffort/pod{UID}"), "kubepods"),
            (format!("kubepods/pod{UID}"), "kubepods"),
            (
                format!("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{escaped}.slice"),
                "kubepods.slice",
            ),
            (
                format!("kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{escaped}.slice"),
                "kubelet.slice/kubelet-kubepods.slice",
            ),
        ] {
            let mount = tempfile::tempdir().expect("a folder");
            std::fs::create_dir_all(mount.path().join(&pod).join(ID)).expect("folders");
            std::fs::create_dir_all(mount.path().join("system.slice/docker-abc.scope")).expect("folders");
            let tree = Tree::read(mount.path(), |_| {}).expect("a tree");
            let pods: Vec<_> = tree.pods.iter().map(|pod| (pod.uid.as_str(), pod.path.clone())).collect();
            assert_eq!(pods, [(UID, mount.path().join(&pod))]);
            let roots: Vec<_> = tree.roots.into_iter().map(|(path, _)| path).collect();
            assert_eq!(roots, [mount.path().join(root)]);
            assert_eq!(tree.runtimes.len(), 1);
        }
    }

    #[test]
    fn other_runtimes_are_told_from_services() {
        for (name, expected) in [
            ("docker", true),
            ("docker-4f1c.scope", true),
            ("libpod-4f1c.scope", true),
            ("docker.service", false),
            ("session-1.scope", false),
            ("kubelet.service", false),
        ] {
            assert_eq!(is_runtime(name), expected, "{name}");
        }
    }

    #[test]
    fn a_folder_that_cannot_be_listed_is_no_empty_one() {
        let mount = tempfile::tempdir().expect("a folder");
        std::fs::write(mount.path().join("kubepods"), "").expect("a file");
        assert!(super::folders(&mount.path().join("gone")).expect("gone is empty").is_empty());
        assert!(super::folders(&mount.path().join("kubepods")).is_err());
    }

    #[tokio::test]
    async fn a_new_folder_is_heard_of() {
        let mount = tempfile::tempdir().expect("a folder");
        let watch = TreeWatch::new().expect("inotify");
        Tree::read(mount.path(), |folder| watch.watch(folder)).expect("a tree");
        std::fs::create_dir(mount.path().join("kubepods")).expect("a folder");
        watch.changed().await;
        let tree = Tree::read(mount.path(), |folder| watch.watch(folder)).expect("a tree");
        assert_eq!(tree.roots.len(), 1);
    }
}
