//! The API set on disk, so that it is in the kernel again before a cluster can be asked: after a reboot the maps are empty.
//!
//! ```json
//! {"version":1,"clusters":[{"name":"production","addresses":["10.96.0.1:443"]}],"kubelets":["192.0.2.1:10250"]}
//! ```
//!
//! Clusters stand in the order of their indices and bear their names, since an index may be another cluster's after the
//! configuration has changed. The file is written whole and renamed into its place, and never with less than it takes:
//! a set without any API server, as an agent has that has reached none, replaces nothing.

use std::{
    collections::{BTreeSet, HashMap},
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read as _, Write as _},
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use weir_common::kernel::{API_ENDPOINTS_MAX, KUBELET};

use super::loader::{Kernel, KernelError};

/// The file in the state directory.
const NAME: &str = "api-set.json";
/// Version of the format.
const VERSION: u32 = 1;
/// Longest file that is read, in bytes; a full API set of the longest addresses fits.
const BYTES_MAX: u64 = 4 * 1024 * 1024;
const _: () = assert!(API_ENDPOINTS_MAX as u64 * ADDRESS_BYTES_MAX < BYTES_MAX);
/// The longest address, in quotes and with its comma: `"[ffff:…:ffff]:65535",`.
const ADDRESS_BYTES_MAX: u64 = 50;
/// How long changes are collected: addresses come in handfuls, and each file is synced.
const SETTLE: Duration = Duration::from_millis(100);
/// How long to wait after the file could not be written.
const RETRY: Duration = Duration::from_secs(10);

/// Why the stored API set cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoredSetError {
    /// The file cannot be read.
    #[error("cannot read the API set that was stored in {}; may root read it?", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is not what an agent writes.
    #[error(
        "{} is damaged: {problem}; remove it, and the agent writes it anew once it has reached the API server",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The file or its folder cannot be written.
    #[error("cannot write {}; is there room, and may root write there?", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel's set cannot be read.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The thread panicked.
    #[error("the thread that writes the API set panicked")]
    Task(#[from] tokio::task::JoinError),
}

/// The API set as it is stored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StoredSet {
    version: u32,
    /// The clusters, in the order of their indices.
    pub clusters: Vec<StoredCluster>,
    /// Where kubelets listen.
    pub kubelets: BTreeSet<SocketAddr>,
}

/// One cluster's part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StoredCluster {
    /// Its name in the configuration.
    pub name: String,
    /// Its API servers.
    pub addresses: BTreeSet<SocketAddr>,
}

impl StoredSet {
    /// Names the clusters of a kernel's API set; an index that has no name is left out.
    fn of(endpoints: &HashMap<SocketAddr, u32>, names: &[String]) -> Self {
        let of_value = |value: u32| {
            endpoints.iter().filter(move |(_, found)| **found == value).map(|(address, _)| *address).collect()
        };
        let clusters = (0..).zip(names);
        let clusters =
            clusters.map(|(index, name)| StoredCluster { name: name.clone(), addresses: of_value(index) });
        Self { version: VERSION, clusters: clusters.collect(), kubelets: of_value(KUBELET) }
    }

    /// Whether no API server is in it.
    fn is_empty(&self) -> bool {
        self.clusters.iter().all(|cluster| cluster.addresses.is_empty())
    }

    /// Reads the set of a state directory; none if there is none yet.
    ///
    /// # Errors
    /// The file is there and cannot be read, or is damaged; the error names it.
    pub fn read(directory: &Path) -> Result<Option<Self>, StoredSetError> {
        let path = directory.join(NAME);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file,
        };
        let mut bytes = Vec::new();
        let read = file.and_then(|file| file.take(BYTES_MAX + 1).read_to_end(&mut bytes));
        read.map_err(|source| StoredSetError::Read { path: path.clone(), source })?;
        Self::parse(&bytes).map(Some).map_err(|problem| StoredSetError::Damaged { path, problem })
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() as u64 > BYTES_MAX {
            return Err(format!("it has more than {BYTES_MAX} bytes"));
        }
        let value: serde_json::Value = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        match value.get("version").and_then(serde_json::Value::as_u64) {
            Some(version) if version != u64::from(VERSION) => {
                Err(format!("its version is {version}, and this agent reads {VERSION}"))
            }
            _ => serde_json::from_value(value).map_err(|error| error.to_string()),
        }
    }

    /// Writes the set into a state directory, which is made if absent; whole or not at all, whatever happens to the machine.
    ///
    /// # Errors
    /// The directory or file cannot be written; the error names it.
    pub fn write(&self, directory: &Path) -> Result<(), StoredSetError> {
        let path = directory.join(NAME);
        let written = self.write_to(directory, &path);
        written.map_err(|source| StoredSetError::Write { path, source })
    }

    fn write_to(&self, directory: &Path, path: &Path) -> io::Result<()> {
        let bytes = serde_json::to_vec(self)?;
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        // During a handover two agents write. Whoever comes second fails and tries again: the other may be stopped.
        let folder = Flock::lock(File::open(directory)?, FlockArg::LockExclusiveNonblock);
        let folder = folder.map_err(|(_, errno)| io::Error::from(errno))?;
        let part = path.with_extension("json.part");
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&part)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&part, path)?;
        folder.sync_all()
    }
}

/// Keeps the file of a state directory in step with the kernel's API set until cancelled. `names` are the clusters' in
/// the order of their indices, `stored` what the file has.
pub(super) async fn follow(
    kernel: Arc<Kernel>,
    names: Vec<String>,
    directory: PathBuf,
    mut stored: Option<StoredSet>,
    cancellation: CancellationToken,
) {
    loop {
        let written = write_changed(&kernel, &names, &directory, stored.as_ref()).await;
        let failed = written.is_err();
        match written {
            Ok(written) => stored = written.or(stored),
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::error!(
                    event = "api-set-not-stored",
                    error,
                    "the API set is not stored: after a reboot the guard would know the last stored one"
                );
            }
        }
        tokio::select! {
            () = cancellation.cancelled() => return,
            () = kernel.api_set_changed() => {}
            () = tokio::time::sleep(RETRY), if failed => {}
        }
        tokio::time::sleep(SETTLE).await;
    }
}

/// Returns what was written, if there was a change.
async fn write_changed(
    kernel: &Kernel,
    names: &[String],
    directory: &Path,
    stored: Option<&StoredSet>,
) -> Result<Option<StoredSet>, StoredSetError> {
    let current = StoredSet::of(&kernel.api_endpoints()?, names);
    if current.is_empty() || stored == Some(&current) {
        return Ok(None);
    }
    let directory = directory.to_owned();
    tokio::task::spawn_blocking(move || current.write(&directory).map(|()| Some(current))).await?
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, path::Path};

    use expect_test::{Expect, expect};
    use weir_common::kernel::KUBELET;

    use super::{BYTES_MAX, Flock, FlockArg, NAME, StoredSet};

    fn set(names: &[&str], endpoints: &[(&str, u32)]) -> StoredSet {
        let endpoints = endpoints.iter().map(|(address, value)| (address.parse().expect("valid"), *value));
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        StoredSet::of(&endpoints.collect::<HashMap<_, _>>(), &names)
    }

    #[test]
    fn what_is_written_is_read_and_is_named_by_cluster() {
        let state = tempfile::tempdir().expect("a folder");
        let directory = state.path().join("deep/state");
        assert_eq!(StoredSet::read(&directory).expect("none is no error"), None);
        let first = set(
            &["b", "a"],
            &[("192.0.2.1:443", 1), ("[2001:db8::1]:6443", 0), ("192.0.2.1:10250", KUBELET)],
        );
        first.write(&directory).expect("is written");
        assert_eq!(StoredSet::read(&directory).expect("is read"), Some(first.clone()));
        let text = std::fs::read_to_string(directory.join(NAME)).expect("a file");
        expect![[r#"{"version":1,"clusters":[{"name":"b","addresses":["[2001:db8::1]:6443"]},{"name":"a","addresses":["192.0.2.1:443"]}],"kubelets":["192.0.2.1:10250"]}"#]]
            .assert_eq(&text);
        let second = set(&["a"], &[("192.0.2.2:443", 0), ("192.0.2.9:443", 5)]);
        second.write(&directory).expect("is replaced");
        assert_eq!(StoredSet::read(&directory).expect("is read"), Some(second));
        let left = std::fs::read_dir(&directory).expect("a folder").count();
        assert_eq!(left, 1, "nothing but the file is left");
    }

    #[test]
    fn a_set_without_an_api_server_is_empty() {
        assert!(set(&["a"], &[("192.0.2.1:10250", KUBELET), ("192.0.2.9:443", 5)]).is_empty());
        assert!(!set(&["a"], &[("192.0.2.1:443", 0)]).is_empty());
    }

    #[track_caller]
    fn damaged(bytes: &[u8], expected: Expect) {
        let state = tempfile::tempdir().expect("a folder");
        std::fs::write(state.path().join(NAME), bytes).expect("a file");
        let error = StoredSet::read(state.path()).expect_err("is damaged").to_string();
        expected.assert_eq(&error.replace(&*state.path().to_string_lossy(), "STATE"));
    }

    #[test]
    fn a_damaged_file_is_named_with_its_damage_and_the_mend() {
        damaged(
            b"",
            expect![
                "STATE/api-set.json is damaged: EOF while parsing a value at line 1 column 0; remove it, and the agent writes it anew once it has reached the API server"
            ],
        );
        damaged(
            br#"{"version":2,"sets":[]}"#,
            expect![
                "STATE/api-set.json is damaged: its version is 2, and this agent reads 1; remove it, and the agent writes it anew once it has reached the API server"
            ],
        );
        damaged(
            br#"{"version":1,"clusters":[{"name":"a","addresses":["x:1"]}],"kubelets":[]}"#,
            expect![
                "STATE/api-set.json is damaged: invalid socket address syntax; remove it, and the agent writes it anew once it has reached the API server"
            ],
        );
        let long = vec![b' '; usize::try_from(BYTES_MAX).expect("fits") + 1];
        damaged(
            &long,
            expect![
                "STATE/api-set.json is damaged: it has more than 4194304 bytes; remove it, and the agent writes it anew once it has reached the API server"
            ],
        );
    }

    #[test]
    fn while_another_agent_writes_nothing_is_changed_and_nobody_waits() {
        let state = tempfile::tempdir().expect("a folder");
        let (first, second) = (set(&["a"], &[("192.0.2.1:443", 0)]), set(&["a"], &[("192.0.2.2:443", 0)]));
        first.write(state.path()).expect("is written");
        let folder = std::fs::File::open(state.path()).expect("a folder");
        let other = Flock::lock(folder, FlockArg::LockExclusiveNonblock).expect("is free");
        second.write(state.path()).expect_err("is refused");
        assert_eq!(StoredSet::read(state.path()).expect("is whole"), Some(first));
        drop(other);
        second.write(state.path()).expect("is written");
        assert_eq!(StoredSet::read(state.path()).expect("is whole"), Some(second));
    }

    #[test]
    fn what_cannot_be_written_is_named() {
        let error = set(&["a"], &[]).write(Path::new("/proc/weir")).expect_err("no folder can be made there");
        assert_eq!(
            error.to_string(),
            "cannot write /proc/weir/api-set.json; is there room, and may root write there?"
        );
    }
}
