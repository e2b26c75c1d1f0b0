//! The binaries the testbed runs: Debian packages, Go modules built into a cache folder that outlives `target/`, and what
//! [`crate::python`] installs.
//!
//! A stamp (digest of go.mod, go.sum, a program of ours and the build flags) beside the binaries tells whether they are what this
//! commit asks for. `WEIR_TESTBED_BIN` names a folder of ready binaries that are used as they are. Starting them is
//! [`crate::testbed`]'s.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::command::{find_in_path, run};
use crate::packages;
use crate::progress::Progress;
use crate::python;

mod tools;
pub use tools::{
    audit_decoder, build_tools, grafana_dashboard, helm, msk_signer, note_verifier, policies,
    prometheus_operator_kinds, promtool, streams_capture, tools_plan,
};

/// Names a folder of ready binaries to use instead of building.
pub const BINARIES_VARIABLE: &str = "WEIR_TESTBED_BIN";

/// Version of Kubernetes in `tests/testbed/kubernetes/go.mod`; the binaries report it.
pub const KUBERNETES_VERSION: &str = "v1.36.3";

/// The Go that the modules' `go.mod` names.
const GO_MINOR: u32 = 26;

/// The first Go that understands such a line, and fetches the version it names if it is older itself.
const GO_FETCHING_MINOR: u32 = 21;

/// One Go module under `tests/testbed` and what is built from it.
#[derive(Debug)]
pub struct GoModule {
    /// Folder below `tests/testbed`.
    pub folder: &'static str,
    /// Build tags.
    pub(crate) tags: &'static str,
    /// Linker flags.
    pub(crate) linker_flags: &'static str,
    /// Files of other modules that belong to the package that is built: module and path in it.
    pub(crate) copied: &'static [(&'static str, &'static str)],
    /// Binary and package.
    pub binaries: &'static [(&'static str, &'static str)],
    /// About how long a build takes on two cores, for the plan.
    pub minutes: f32,
}

/// Everything that is built from Go modules.
pub const GO_MODULES: &[GoModule] = &[
    GoModule {
        folder: "etcd",
        tags: "",
        linker_flags: "-s -w",
        copied: &[],
        binaries: &[("etcd", "go.etcd.io/etcd/server/v3")],
        minutes: 1.5,
    },
    GoModule {
        folder: "containerd",
        tags: "no_btrfs,no_zfs,no_devmapper",
        linker_flags: "-s -w",
        copied: &[],
        binaries: &[
            ("containerd", "github.com/containerd/containerd/v2/cmd/containerd"),
            ("containerd-shim-runc-v2", "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2"),
            ("ctr", "github.com/containerd/containerd/v2/cmd/ctr"),
        ],
        minutes: 1.0,
    },
    crate::identity_provider::MODULE,
    GoModule {
        folder: "nri",
        tags: "nri_no_wasm",
        linker_flags: "-s -w",
        copied: &[],
        binaries: &[(crate::nri::BINARY, ".")],
        minutes: 0.5,
    },
    GoModule {
        folder: "aws-iam-authenticator",
        tags: "",
        linker_flags: "-s -w",
        copied: &[],
        binaries: &[("aws-iam-authenticator", "sigs.k8s.io/aws-iam-authenticator/cmd/aws-iam-authenticator")],
        minutes: 2.0,
    },
    GoModule {
        folder: "kubernetes",
        tags: "",
        linker_flags: "-s -w -X k8s.io/component-base/version.gitVersion=v1.36.3 \
                       -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=36",
        copied: &[],
        binaries: &[
            ("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
            ("kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager"),
            ("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
            ("kubelet", "k8s.io/kubernetes/cmd/kubelet"),
            ("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"),
            ("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
        ],
        minutes: 9.0,
    },
];

/// A Debian package and the file or command that shows it is there (or an equal of another distribution).
const PACKAGES: &[(&str, &[&str])] = &[
    ("runc", &["runc"]),
    ("containernetworking-plugins", &["/usr/lib/cni/bridge", "/opt/cni/bin/bridge"]),
    ("conntrack", &["conntrack"]),
    ("dnsmasq-base", &["dnsmasq"]),
    ("iptables", &["iptables-save"]),
    ("iproute2", &["ip"]),
    // What the kernel has attached, by somebody else's program.
    ("bpftool", &["bpftool"]),
    // The runbook makes a CA with it.
    ("openssl", &["openssl"]),
    ("mount", &["mount"]),
    ("tar", &["tar"]),
    // Its busybox is the only one of Debian that needs no C library, so that it can be the whole of an image.
    ("busybox-static", &["/usr/share/doc/busybox-static"]),
];

/// The binaries, found or built.
#[derive(Clone, Debug)]
pub struct Components {
    folder: PathBuf,
}

impl Components {
    /// What is there, without building.
    ///
    /// # Errors
    /// When something is missing; the error names it and the command that mends it.
    pub fn find() -> Result<Self> {
        let packages = missing_packages();
        if !packages.is_empty() {
            bail!("missing Debian packages: {}; run `cargo xtask testbed build`", packages.join(" "));
        }
        let folder = binary_folder()?;
        for module in GO_MODULES {
            if !module.is_built(&folder)? {
                bail!(
                    "{} is not built in {}; run `cargo xtask testbed build`",
                    module.folder,
                    folder.display()
                );
            }
        }
        for environment in python::ENVIRONMENTS {
            if !environment.is_installed()? {
                bail!("{} is not installed; run `cargo xtask testbed build`", environment.what);
            }
        }
        Ok(Self { folder })
    }

    /// Installs and builds what is missing.
    ///
    /// # Errors
    /// When a package cannot be installed or a module not built.
    pub fn build(progress: Progress) -> Result<Self> {
        install_packages(progress)?;
        for environment in python::ENVIRONMENTS {
            if !environment.is_installed()? {
                environment.install(progress)?;
            }
        }
        let folder = binary_folder()?;
        for module in GO_MODULES {
            if !module.is_built(&folder)? {
                module.build(&folder, progress)?;
            }
        }
        Ok(Self { folder })
    }

    /// Path of the binary `name`.
    #[must_use]
    pub fn binary(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Folder of the binaries.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Folder of CNI plugins.
    #[must_use]
    pub fn cni_folder(&self) -> &'static str {
        if Path::new("/usr/lib/cni/bridge").is_file() { "/usr/lib/cni" } else { "/opt/cni/bin" }
    }
}

/// What [`Components::build`] would do, one line each; empty when everything is there.
///
/// # Errors
/// When the state of the cache cannot be read, or something is to be built and there is no Go for it.
pub fn plan() -> Result<Vec<String>> {
    let mut lines = Vec::new();
    let packages = missing_packages();
    if !packages.is_empty() {
        lines.push(format!("install Debian packages: {} (about 1 min)", packages.join(" ")));
    }
    for environment in python::ENVIRONMENTS {
        if !environment.is_installed()? {
            lines.push(format!("install with Python: {} (about 1 min)", environment.what));
        }
    }
    let folder = binary_folder()?;
    for module in GO_MODULES {
        if !module.is_built(&folder)? {
            go()?;
            let names: Vec<&str> = module.binaries.iter().map(|(name, _)| *name).collect();
            lines.push(format!("build with Go: {} (about {} min)", names.join(", "), module.minutes));
        }
    }
    Ok(lines)
}

/// Folder for what is built once and kept: `$XDG_CACHE_HOME/weir`, else `~/.cache/weir`.
///
/// # Errors
/// When neither XDG_CACHE_HOME nor HOME is set.
pub fn cache_folder() -> Result<PathBuf> {
    base_folder("XDG_CACHE_HOME", ".cache").map(|folder| folder.join("weir"))
}

/// Waits until no other process builds or installs `what`, and keeps others from it while the file that it gives is open.
pub(crate) fn alone(what: &str) -> Result<File> {
    let folder = cache_folder()?.join("locks");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let path = folder.join(what);
    let file = File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
    file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}

/// `variable`, else `fallback` below HOME.
pub(crate) fn base_folder(variable: &str, fallback: &str) -> Result<PathBuf> {
    let named = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    named(variable)
        .or_else(|| named("HOME").map(|home| home.join(fallback)))
        .with_context(|| format!("neither {variable} nor HOME is set; set one of them"))
}

/// Root of the repository.
#[must_use]
pub fn repository() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests).to_owned()
}

fn binary_folder() -> Result<PathBuf> {
    match std::env::var_os(BINARIES_VARIABLE) {
        Some(folder) => Ok(PathBuf::from(folder)),
        None => Ok(cache_folder()?.join("testbed/bin")),
    }
}

impl GoModule {
    /// The one binary of a module that is no part of the testbed.
    pub(crate) fn tool(&self, progress: Progress) -> Result<PathBuf> {
        let folder = cache_folder()?.join("testbed/bin");
        if !self.is_built(&folder)? {
            let _alone = alone(self.folder)?;
            // Whoever was waited for may have built it.
            if !self.is_built(&folder)? {
                self.build(&folder, progress)?;
            }
        }
        Ok(folder.join(self.binaries[0].0))
    }

    fn source(&self) -> PathBuf {
        repository().join("tests/testbed").join(self.folder)
    }

    /// What the binaries must come from: changes with the modules' versions, with the flags and with a program of ours.
    fn stamp(&self) -> Result<String> {
        let mut content = format!("{}\n{}\n", self.tags, self.linker_flags).into_bytes();
        let own = self.source().join("main.go").is_file().then_some("main.go");
        for file in ["go.mod", "go.sum"].into_iter().chain(own) {
            let path = self.source().join(file);
            content.extend(fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?);
        }
        Ok(hex::encode(Sha256::digest(&content)))
    }

    fn stamp_file(&self, folder: &Path) -> PathBuf {
        folder.join(format!(".{}.stamp", self.folder))
    }

    fn is_built(&self, folder: &Path) -> Result<bool> {
        let present = self.binaries.iter().all(|(name, _)| folder.join(name).is_file());
        if std::env::var_os(BINARIES_VARIABLE).is_some() {
            if !present {
                let names: Vec<&str> = self.binaries.iter().map(|(name, _)| *name).collect();
                bail!("{BINARIES_VARIABLE} is {}, which lacks one of {}", folder.display(), names.join(", "));
            }
            return Ok(true);
        }
        let stamp = fs::read_to_string(self.stamp_file(folder)).unwrap_or_default();
        Ok(present && stamp == self.stamp()?)
    }

    fn build(&self, folder: &Path, progress: Progress) -> Result<()> {
        let go = go()?;
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let together = self.put_together(&go)?;
        let source = together.as_ref().map_or_else(|| self.source(), |folder| folder.path().to_owned());
        for (name, package) in self.binaries {
            progress.step(&format!("build {name}{}", place(name)), || {
                // Under another name first: an interrupted build must not leave half a binary to be taken for one.
                let part = folder.join(format!(".{name}.part"));
                let mut command = Command::new(&go);
                command.args(["build", "-mod=readonly", "-trimpath"]).args(["-tags", self.tags]);
                command.args(["-ldflags", self.linker_flags]).arg("-o").arg(&part).arg(package);
                run(command.env("CGO_ENABLED", "0").current_dir(&source))?;
                fs::rename(&part, folder.join(name))
                    .with_context(|| format!("cannot put {name} in its place"))
            })?;
        }
        fs::write(self.stamp_file(folder), self.stamp()?).context("cannot write the stamp of a build")
    }
}

impl GoModule {
    /// A folder with the module's files and those that are copied; none where none are.
    fn put_together(&self, go: &Path) -> Result<Option<tempfile::TempDir>> {
        if self.copied.is_empty() {
            return Ok(None);
        }
        let folder = tempfile::tempdir().context("cannot make a folder to build in")?;
        let copy = |file: &Path| {
            let to = folder.path().join(file.file_name().unwrap_or_default());
            fs::copy(file, to).with_context(|| format!("cannot copy {}", file.display()))
        };
        let source = self.source();
        for entry in fs::read_dir(&source).with_context(|| format!("cannot read {}", source.display()))? {
            copy(&entry.context("cannot read a folder")?.path())?;
        }
        for (module, file) in self.copied {
            copy(&downloaded(go, &source, module)?.join(file))?;
        }
        Ok(Some(folder))
    }
}

/// The folder of a module that `source` requires.
fn downloaded(go: &Path, source: &Path, module: &str) -> Result<PathBuf> {
    run(Command::new(go).args(["mod", "download", module]).current_dir(source))?;
    let list = ["list", "-m", "-f", "{{.Dir}}", module];
    let folder = run(Command::new(go).args(list).current_dir(source))?;
    Ok(PathBuf::from(folder.trim()))
}

/// How far the builds are with `binary`, for example ` (3 of 10)`; nothing for one that is built alone.
fn place(binary: &str) -> String {
    let names: Vec<&str> =
        GO_MODULES.iter().flat_map(|module| module.binaries).map(|(name, _)| *name).collect();
    let number = names.iter().position(|name| *name == binary);
    number.map_or_else(String::new, |index| format!(" ({} of {})", index + 1, names.len()))
}

/// The Go that builds: an error here costs a second, in the middle of the builds it costs half an hour.
fn go() -> Result<PathBuf> {
    let mend =
        format!("install Go 1.{GO_MINOR} or newer (https://go.dev/dl) and put its bin folder into PATH");
    let go =
        find_in_path("go").or_else(|| Some(PathBuf::from("/usr/local/go/bin/go")).filter(|go| go.is_file()));
    let Some(go) = go else { bail!("go is not in PATH, nor in /usr/local/go; {mend}") };
    let version = run(Command::new(&go).arg("version"))?;
    if go_minor(&version).is_some_and(|minor| minor < GO_FETCHING_MINOR) {
        bail!("{} is too old ({}); {mend}", go.display(), version.trim());
    }
    Ok(go)
}

/// 26 of `go version go1.26.8 linux/amd64`; a development version has none.
fn go_minor(version: &str) -> Option<u32> {
    let number = version.strip_prefix("go version go1.")?;
    number.split(|character: char| !character.is_ascii_digit()).next()?.parse().ok()
}

fn missing_packages() -> Vec<&'static str> {
    let is_there = |mark: &&str| {
        if mark.starts_with('/') { Path::new(mark).exists() } else { find_in_path(mark).is_some() }
    };
    PACKAGES.iter().filter(|(_, marks)| !marks.iter().any(is_there)).map(|(package, _)| *package).collect()
}

fn install_packages(progress: Progress) -> Result<()> {
    let missing = missing_packages();
    if missing.is_empty() {
        return Ok(());
    }
    progress.step(&format!("install {}", missing.join(" ")), || packages::install(&missing))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_that_kubernetes_reports_is_the_version_that_is_built() {
        let module = GO_MODULES.iter().find(|module| module.folder == "kubernetes").unwrap();
        let go_mod = fs::read_to_string(module.source().join("go.mod")).unwrap();
        assert!(go_mod.contains(&format!("k8s.io/kubernetes {KUBERNETES_VERSION}\n")));
        assert!(module.linker_flags.contains(KUBERNETES_VERSION));
    }

    #[test]
    fn the_go_that_is_asked_for_is_the_one_of_every_module() {
        for module in GO_MODULES.iter().chain(tools::TOOLS) {
            let go_mod = fs::read_to_string(module.source().join("go.mod")).unwrap();
            assert!(go_mod.contains(&format!("\ngo 1.{GO_MINOR}.")), "{}", module.folder);
        }
    }

    #[test]
    fn versions_of_go_are_read() {
        for (text, minor) in [
            ("go version go1.26.8 linux/amd64\n", Some(26)),
            ("go version go1.19 linux/amd64", Some(19)),
            ("go version go1.27rc1 linux/arm64", Some(27)),
            ("go version devel go1.27-1234 linux/amd64", None),
        ] {
            assert_eq!(go_minor(text), minor, "{text}");
        }
    }
}
