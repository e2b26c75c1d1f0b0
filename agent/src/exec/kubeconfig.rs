//! The kubeconfig files in effect, merged: what they say of API servers, users and contexts.
//!
//! Follows client-go (`tools/clientcmd`): `$KUBECONFIG` may list several files, the first file that names an
//! entry wins. One file, and its copy, are `kubeconfig_file`'s. Reading is done by the caller's thread, with its
//! rights; no key, token or certificate of a user has a `Debug`.

use std::{
    collections::BTreeSet,
    fmt,
    path::{Path, PathBuf},
};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};

use super::kubeconfig_file::{File, KUBECONFIG_BYTES_MAX, text};

/// Most files in `$KUBECONFIG`.
const FILES_MAX: usize = 32;

/// Why the kubeconfig cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KubeconfigError {
    /// None of the files exists.
    #[error("no kubeconfig at {paths}; set KUBECONFIG or give --kubeconfig FILE")]
    Missing {
        /// Where it was looked for.
        paths: String,
    },
    /// More files than anybody has.
    #[error(
        "KUBECONFIG lists more than {FILES_MAX} files; give the one that is needed with --kubeconfig FILE"
    )]
    TooManyFiles,
    /// A file cannot be read.
    #[error("cannot read {} ({what})", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What it is.
        what: String,
        /// Why.
        source: std::io::Error,
    },
    /// Not a regular file: it cannot be replaced by its copy.
    #[error("{} is not a regular file; write the kubeconfig to one and give it with --kubeconfig FILE", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// Too large.
    #[error("{} has {bytes} bytes; a kubeconfig may have at most {KUBECONFIG_BYTES_MAX}", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// Not YAML, or not a kubeconfig.
    #[error("{} is not a kubeconfig: {reason}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What is wrong, without its content.
        reason: String,
    },
    /// An entry cannot be used.
    #[error("{entry} in {}: {problem}", path.display())]
    Entry {
        /// The file.
        path: PathBuf,
        /// For example `cluster "production"`.
        entry: String,
        /// What is wrong and how to mend it.
        problem: String,
    },
    /// The copy cannot be written.
    #[error("cannot write the copy of {}", path.display())]
    Emit {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// There is no cluster in it.
    #[error("the kubeconfig {paths} names no cluster; add one with kubectl config set-cluster")]
    NoCluster {
        /// The files.
        paths: String,
    },
}

/// An API server's URL, taken apart.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Server {
    /// Whether it is spoken to with TLS.
    pub tls: bool,
    /// Host name or address, without brackets, lower case.
    pub host: String,
    /// Port.
    pub port: u16,
}

/// By what a client judges the API server.
#[derive(Clone, PartialEq, Eq)]
pub enum Verification {
    /// These PEM certificates.
    Bundle(Vec<u8>),
    /// The machine's certificates.
    SystemRoots,
    /// Nothing (`insecure-skip-tls-verify`).
    Nothing,
}

/// A cluster entry.
#[derive(Clone)]
pub struct ClusterEntry {
    /// Its name.
    pub name: String,
    /// Where its API server is.
    pub server: Server,
    /// How it is verified.
    pub verification: Verification,
    /// `tls-server-name`.
    pub tls_server_name: Option<String>,
    /// `proxy-url`.
    pub proxy_url: Option<String>,
}

/// A client certificate and its key, PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct ClientIdentity {
    pub(super) certificate: Vec<u8>,
    pub(super) key: Vec<u8>,
}

impl ClientIdentity {
    /// As rustls wants them.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn parse(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), String> {
        let chain = CertificateDer::pem_slice_iter(&self.certificate)
            .collect::<Result<Vec<_>, _>>()
            .ok()
            .filter(|chain| !chain.is_empty())
            .ok_or("its client certificate is not PEM")?;
        let key = PrivateKeyDer::from_pem_slice(&self.key)
            .map_err(|_error| "its client key is not a PEM private key (encrypted keys cannot be used)")?;
        Ok((chain, key))
    }
}

/// A user entry.
#[derive(Clone)]
pub struct UserEntry {
    /// Its name.
    pub name: String,
    /// Its client certificate, if it authenticates by one.
    pub identity: Option<ClientIdentity>,
}

/// A context entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextEntry {
    /// Its name.
    pub name: String,
    /// Name of its cluster.
    pub cluster: String,
    /// Name of its user.
    pub user: String,
}

/// The files in effect, merged.
#[derive(Clone)]
pub struct Kubeconfig {
    files: Vec<File>,
    /// `current-context`; empty if there is none.
    pub current_context: String,
    /// All clusters; that of the current context first.
    pub clusters: Vec<ClusterEntry>,
    /// All users.
    pub users: Vec<UserEntry>,
    /// All contexts.
    pub contexts: Vec<ContextEntry>,
}

impl fmt::Debug for Kubeconfig {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let paths: Vec<_> = self.files.iter().map(File::path).collect();
        formatter.debug_struct("Kubeconfig").field("files", &paths).finish_non_exhaustive()
    }
}

/// A file and what the command is to see in its place.
#[derive(Clone, PartialEq, Eq)]
pub struct Overlay {
    /// The file, symbolic links resolved.
    pub path: PathBuf,
    /// The copy.
    pub content: String,
}

/// The paths at which client-go would look: `flag`, else the list in `$KUBECONFIG`, else `~/.kube/config`.
pub fn paths(flag: Option<&Path>, environment: Option<&str>, home: &Path) -> Vec<PathBuf> {
    if let Some(flag) = flag {
        return vec![flag.to_owned()];
    }
    let listed: Vec<_> = environment
        .unwrap_or_default()
        .split(':')
        .filter(|path| !path.is_empty())
        .map(PathBuf::from)
        .collect();
    if listed.is_empty() { vec![home.join(".kube/config")] } else { listed }
}

impl Kubeconfig {
    /// Reads and merges the files; those that do not exist are left out, as client-go does.
    ///
    /// # Errors
    /// None exists, or one cannot be read or understood; errors never quote the content.
    pub fn load(paths: &[PathBuf]) -> Result<Self, KubeconfigError> {
        if paths.len() > FILES_MAX {
            return Err(KubeconfigError::TooManyFiles);
        }
        let mut files: Vec<File> = Vec::new();
        for path in paths {
            if let Some(file) = File::read(path)?
                && !files.iter().any(|known| known.path() == file.path())
            {
                files.push(file);
            }
        }
        let shown = || paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
        if files.is_empty() {
            return Err(KubeconfigError::Missing { paths: shown() });
        }
        let mut merged = Self {
            current_context: String::new(),
            clusters: Vec::new(),
            users: Vec::new(),
            contexts: Vec::new(),
            files: Vec::new(),
        };
        for file in &files {
            merged.merge(file)?;
        }
        if merged.clusters.is_empty() {
            return Err(KubeconfigError::NoCluster { paths: shown() });
        }
        let current = merged.current().map(|context| context.cluster.clone());
        merged.clusters.sort_by_key(|cluster| Some(&cluster.name) != current.as_ref());
        merged.files = files;
        Ok(merged)
    }

    /// The current context, if there is one.
    pub fn current(&self) -> Option<&ContextEntry> {
        self.contexts.iter().find(|context| context.name == self.current_context)
    }

    /// Names of the clusters at `server`.
    pub fn clusters_at<'a>(&'a self, server: &'a Server) -> impl Iterator<Item = &'a ClusterEntry> {
        self.clusters.iter().filter(move |cluster| cluster.server == *server)
    }

    /// The users that some context uses with one of `clusters`.
    pub fn users_of(&self, clusters: &[&str]) -> Vec<&UserEntry> {
        let names: BTreeSet<_> = self
            .contexts
            .iter()
            .filter(|context| clusters.contains(&context.cluster.as_str()))
            .map(|context| context.user.as_str())
            .collect();
        self.users.iter().filter(|user| names.contains(user.name.as_str())).collect()
    }

    /// The copies, whose clusters trust `ca_pem` beside what they trust already.
    ///
    /// # Errors
    /// A copy cannot be written.
    pub fn overlays(&self, ca_pem: &str) -> Result<Vec<Overlay>, KubeconfigError> {
        self.files.iter().map(|file| file.with_ca(ca_pem)).collect()
    }

    fn merge(&mut self, file: &File) -> Result<(), KubeconfigError> {
        if self.current_context.is_empty() {
            self.current_context = text(file.document().get("current-context")).unwrap_or_default();
        }
        for (name, cluster) in file.entries("clusters", "cluster") {
            if !self.clusters.iter().any(|known| known.name == name)
                && let Some(entry) = file.cluster(name, cluster)?
            {
                self.clusters.push(entry);
            }
        }
        for (name, user) in file.entries("users", "user") {
            if !self.users.iter().any(|known| known.name == name) {
                self.users.push(file.user(name, user)?);
            }
        }
        for (name, context) in file.entries("contexts", "context") {
            if !self.contexts.iter().any(|known| known.name == name) {
                self.contexts.push(ContextEntry {
                    name,
                    cluster: text(context.get("cluster")).unwrap_or_default(),
                    user: text(context.get("user")).unwrap_or_default(),
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(files: &[&str]) -> Result<Kubeconfig, KubeconfigError> {
        let folder = tempfile::tempdir().expect("temporary folder");
        let mut paths = vec![folder.path().join("absent")];
        for (index, content) in files.iter().enumerate() {
            let path = folder.path().join(index.to_string());
            std::fs::write(&path, content).expect("write");
            paths.push(path);
        }
        Kubeconfig::load(&paths)
    }

    #[test]
    fn the_first_file_that_names_an_entry_wins() {
        let kubeconfig = load(&[
            "clusters: [{name: a, cluster: {server: 'https://first'}}]",
            "current-context: c\nclusters: [{name: a, cluster: {server: 'https://second'}}, {name: b, cluster: \
             {server: 'https://b'}}]\ncontexts: [{name: c, context: {cluster: b, user: u}}]\nusers: [{name: u, \
             user: {token: t}}, {name: other, user: {token: t}}]",
        ])
        .expect("loads");
        let hosts: Vec<_> = kubeconfig.clusters.iter().map(|cluster| cluster.server.host.as_str()).collect();
        assert_eq!(hosts, ["b", "first"], "the current context's cluster comes first");
        let users: Vec<_> = kubeconfig.users_of(&["b"]).iter().map(|user| user.name.as_str()).collect();
        assert_eq!(users, ["u"]);
        assert_eq!(kubeconfig.overlays("").expect("copies").len(), 2);
        assert!(!format!("{kubeconfig:?}").contains("token"));
    }

    #[test]
    fn nothing_to_go_by_is_an_error_with_the_mend() {
        let error = Kubeconfig::load(&["/nonexistent/config".into()]).expect_err("missing").to_string();
        assert_eq!(error, "no kubeconfig at /nonexistent/config; set KUBECONFIG or give --kubeconfig FILE");
        let error = load(&[""]).expect_err("empty").to_string();
        assert!(error.contains("names no cluster"), "{error}");
        let error = Kubeconfig::load(&["/dev/null".into()]).expect_err("no file").to_string();
        assert!(error.contains("not a regular file"), "{error}");
    }

    #[test]
    fn a_missing_key_file_is_named() {
        let error = load(&[
            "clusters: [{name: a, cluster: {server: 'https://a'}}]\nusers: [{name: u, user: {client-certificate: \
             /nonexistent/u.crt, client-key: /nonexistent/u.key}}]",
        ])
        .expect_err("missing");
        assert!(error.to_string().contains("/nonexistent/u.crt"), "{error}");
    }

    #[test]
    fn paths_follow_flag_then_environment_then_home() {
        let home = Path::new("/home/ada");
        assert_eq!(paths(Some(Path::new("/f")), Some("/a:/b"), home), [PathBuf::from("/f")]);
        assert_eq!(paths(None, Some("/a::/b"), home), [PathBuf::from("/a"), PathBuf::from("/b")]);
        assert_eq!(paths(None, Some(""), home), [PathBuf::from("/home/ada/.kube/config")]);
    }
}
