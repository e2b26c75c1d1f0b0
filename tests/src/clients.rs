//! Clients of the Kubernetes API that nobody here wrote, for pods of the testbed: those of Python and JavaScript, client-go,
//! Helm, and kubectl from the years of SPDY.
//!
//! They are no image: they lie in the cache, and a pod has them from there, read-only, at the same paths
//! ([`Clients::folders`]), beside the libraries of this machine that Python and Node need. An image of half a gigabyte would
//! be made and imported for each testbed. What they do in a pod is in `tests/testbed/clients`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::command::run;
use crate::components::{self, GoModule, alone, cache_folder, repository};
use crate::maven::{Installed, Project};
use crate::packages;
use crate::pods::Folder;
use crate::progress::Progress;
use crate::python::PythonEnvironment;

/// Python's client, and Node with npm, both from PyPI.
pub const PYTHON: PythonEnvironment =
    PythonEnvironment { name: "clients", what: "clients of Kubernetes for the tests" };

/// What uses client-go as controllers do.
pub(crate) static CLIENT_GO: GoModule = GoModule {
    folder: "clients",
    tags: "",
    linker_flags: "-s -w",
    copied: &[],
    binaries: &[("client-go", ".")],
    minutes: 1.0,
};

/// Where a pod has the programs of `tests/testbed/clients`.
pub const SOURCES: &str = "/clients/sources";

/// Where a pod has what is built from Go modules.
const BINARIES: &str = "/clients/bin";

/// The Debian package of the old kubectl; its version is 1.20.
const OLD_KUBECTL: &str = "kubernetes-client";

/// The Java client.
const FABRIC8: Project = Project { folder: "fabric8", name: "the Java client of Kubernetes", tools: &[] };

/// The compiler among its jars: a Java runtime has none.
const COMPILER: &str = "org.eclipse.jdt.internal.compiler.batch.Main";

/// What is there to run in a pod that has [`Self::folders`].
#[derive(Clone, Debug)]
pub struct Clients {
    folders: Vec<Folder>,
    /// Path of Python, which has the client.
    pub python: String,
    /// Path of Node.
    pub node: String,
    /// Path of the folder that has the JavaScript client and what it needs.
    pub node_packages: String,
    /// Path of kubectl 1.20.
    pub old_kubectl: String,
}

impl Clients {
    /// Installs and builds what is missing.
    ///
    /// # Errors
    /// When something cannot be fetched or built, or has another hash than its lock says.
    pub fn install(progress: Progress) -> Result<Self> {
        let _alone = alone("client-programs")?;
        if !PYTHON.is_installed()? {
            PYTHON.install(progress)?;
        }
        let python = PYTHON.python()?;
        let environment = python.ancestors().nth(2).context("an environment has no folder")?.to_owned();
        let node_packages = node_packages("clients", "the JavaScript client", progress)?;
        let old_kubectl = old_kubectl(progress)?;
        CLIENT_GO.tool(progress)?;
        components::helm(progress)?;
        let mut folders = vec![
            Folder::new(repository().join("tests/testbed/clients"), SOURCES),
            Folder::new(cache_folder()?.join("testbed/bin"), BINARIES),
        ];
        folders.extend([&environment, &node_packages, &old_kubectl].map(|folder| Folder::same(folder)));
        // The libraries of Debian, of which the image has none; /lib is a link on most machines.
        for path in ["/usr", "/lib", "/lib64"] {
            let target = fs::canonicalize(path).with_context(|| format!("cannot resolve {path}"))?;
            folders.push(Folder::new(target, path));
        }
        let base = run(Command::new(&python).args(["-c", "import sys; print(sys.base_prefix, end='')"]))?;
        if !Path::new(&base).starts_with("/usr") {
            folders.push(Folder::same(Path::new(&base)));
        }
        let shown = |path: PathBuf| path.display().to_string();
        Ok(Self {
            folders,
            python: shown(python),
            node: shown(environment.join("bin/node")),
            node_packages: shown(node_packages.join("node_modules")),
            old_kubectl: shown(old_kubectl.join("usr/bin/kubectl")),
        })
    }

    /// The Java client, too: the command that runs its program. Apart from the others, since it alone needs Maven's jars.
    ///
    /// # Errors
    /// When something cannot be fetched, has another hash than its lock says, or is not compiled.
    pub fn install_java(&mut self, progress: Progress) -> Result<Vec<String>> {
        let _alone = alone("client-programs")?;
        let installed = FABRIC8.install(progress)?;
        let classes = compile(&installed)?;
        let java = fs::canonicalize(installed.java())
            .with_context(|| format!("cannot resolve {}", installed.java().display()))?;
        let home = java.ancestors().nth(2).context("Java has no folder")?;
        // Debian has the settings elsewhere, and links to them.
        let settings = fs::canonicalize(home.join("conf/net.properties"))
            .with_context(|| format!("cannot resolve the settings of {}", home.display()))?;
        let settings = settings.parent().context("the settings of Java have no folder")?;
        self.folders.extend([installed.jars(), &classes].map(Folder::same));
        self.folders.extend(
            [home, settings].iter().filter(|path| !path.starts_with("/usr")).map(|path| Folder::same(path)),
        );
        let path = format!("{}/*:{}", installed.jars().display(), classes.display());
        // What differs from run to run: a warning of how busy the machine is, and the error that `Client.java` is told as well
        // and answers by doing a step again.
        let quiet = [
            "io.vertx.core.impl.BlockedThreadChecker",
            "io.fabric8.kubernetes.client.dsl.internal.ExecWebSocketListener",
        ]
        .map(|logger| format!("-Dorg.slf4j.simpleLogger.log.{logger}=off"));
        let options = ["-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"].map(str::to_owned);
        let program = ["-cp".to_owned(), path, "Client".to_owned()];
        Ok(std::iter::once(java.display().to_string()).chain(options).chain(quiet).chain(program).collect())
    }

    /// What a pod must have, for [`crate::PodSpec::folders`].
    #[must_use]
    pub fn folders(&self) -> &[Folder] {
        &self.folders
    }

    /// Path, in a pod, of what is built from a Go module: `client-go`, `helm`.
    #[must_use]
    pub fn binary(name: &str) -> String {
        format!("{BINARIES}/{name}")
    }

    /// Path, in a pod, of a program of ours.
    #[must_use]
    pub fn source(name: &str) -> String {
        format!("{SOURCES}/{name}")
    }
}

/// The folder of the classes of our program.
fn compile(installed: &Installed) -> Result<PathBuf> {
    let folder = cache_folder()?.join("testbed/fabric8/classes");
    let mut command = Command::new(installed.java());
    let jars = installed.jars().join("*");
    command.arg("-cp").arg(&jars).args([COMPILER, "-17", "-nowarn", "-cp"]);
    // The compiler knows no `*`.
    let mut path = Vec::new();
    for entry in fs::read_dir(installed.jars()).context("cannot read the folder of the jars")? {
        path.push(entry.context("cannot read the folder of the jars")?.path());
    }
    command.arg(std::env::join_paths(path).context("a jar's path has a colon")?);
    run(command.arg("-d").arg(&folder).arg(FABRIC8.source("Client.java")))?;
    Ok(folder)
}

/// What holds ECS documents against the fields that Elastic publishes, to add a file to: by the Node that the JavaScript client has.
///
/// # Errors
/// When something cannot be fetched, or has another hash than its lock says.
pub fn ecs_validator(progress: Progress) -> Result<Command> {
    if !PYTHON.is_installed()? {
        PYTHON.install(progress)?;
    }
    let packages = node_packages("ecs", "the published fields of ECS", progress)?;
    // It imports what lies beside it.
    let (name, source) = ("validate.mjs", repository().join("tests/testbed/ecs"));
    let program = packages.join(name);
    fs::copy(source.join(name), &program).with_context(|| format!("cannot make {}", program.display()))?;
    let mut command = Command::new(PYTHON.python()?.with_file_name("node"));
    command.arg(program);
    Ok(command)
}

/// The packages of a folder below `tests/testbed`, by the npm that Python's environment has.
fn node_packages(name: &str, what: &str, progress: Progress) -> Result<PathBuf> {
    let source = repository().join("tests/testbed").join(name);
    let folder = cache_folder()?.join("testbed/node").join(name);
    let mut digest = Sha256::new();
    for file in ["package.json", "package-lock.json"] {
        let path = source.join(file);
        digest.update(fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?);
    }
    let stamp = hex::encode(digest.finalize());
    if fs::read_to_string(folder.join(".stamp")).unwrap_or_default() == stamp {
        return Ok(folder);
    }
    progress.step(&format!("install {what} with npm"), || {
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        for file in ["package.json", "package-lock.json"] {
            fs::copy(source.join(file), folder.join(file))
                .with_context(|| format!("cannot copy {file} to {}", folder.display()))?;
        }
        // npm is a program of the environment's Python that starts its Node. Nobody's scripts are run.
        let mut npm = Command::new(PYTHON.python()?.with_file_name("npm"));
        npm.args(["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"]);
        run(npm.current_dir(&folder))?;
        // Written last: an interrupted installation must not be taken for one.
        fs::write(folder.join(".stamp"), &stamp).with_context(|| format!("cannot write the stamp of {what}"))
    })?;
    Ok(folder)
}

/// A folder with the old kubectl. The machine itself does not get it: it is unpacked, not installed.
fn old_kubectl(progress: Progress) -> Result<PathBuf> {
    let folder = cache_folder()?.join("testbed").join(OLD_KUBECTL);
    if folder.join("usr/bin/kubectl").is_file() {
        return Ok(folder);
    }
    progress.step("fetch kubectl 1.20", || packages::unpack(OLD_KUBECTL, &folder))?;
    Ok(folder)
}
