//! `cargo xtask dist`: what is given away, in `target/dist`: an OCI image without a Docker daemon, a tarball of the binaries, the
//! chart as a package, a list of what is in them (SPDX), and checksums of all. The same commit, built in the same folder by the same
//! toolchain and distribution, gives the same bytes, but for the chart's package, in which Helm puts the time:
//! [`weir_tests::image`] writes archives without times, users and order of its own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use weir_tests::{
    components,
    image::{self, Image},
    progress::Progress,
};

use crate::{build_ebpf, sbom};

/// What is given away, the one that a container runs first.
const BINARIES: [&str; 2] = ["weir-agent", "weir"];

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Profile that the binaries are built with.
    #[arg(long, default_value = "release", value_name = "NAME")]
    profile: String,
    /// Name of the image; the version is its tag. In full: what `ctr images import` takes from the archive is looked for by a kubelet under the
    /// full name alone, also where the chart has it short.
    #[arg(long, default_value = "docker.io/library/weir-agent", value_name = "NAME")]
    image: String,
    /// Install on the testbed what was made: the chart's package with the image's archive. Needs root.
    #[arg(long)]
    test: bool,
}

/// Builds everything, and says what lies where.
///
/// # Errors
/// Something cannot be built or written.
pub(crate) fn run(root: &Path, arguments: &Arguments) -> Result<()> {
    let version = env!("CARGO_PKG_VERSION");
    let name = format!("weir-{version}-linux-{}", std::env::consts::ARCH);
    build_ebpf::run(root, build_ebpf::Options::default())?;
    let binaries = build(root, &arguments.profile)?;
    let dist = root.join("target/dist");
    if dist.exists() {
        fs::remove_dir_all(&dist).with_context(|| format!("cannot empty {}", dist.display()))?;
    }
    fs::create_dir_all(&dist).with_context(|| format!("cannot make {}", dist.display()))?;
    let license = root.join("LICENSE");
    let image = Image {
        name: &format!("{}:{version}", arguments.image),
        version,
        binaries: &binaries,
        license: &license,
        compressed: true,
    };
    let digest = image.write(&dist.join(format!("{name}.oci.tar")))?;
    tarball(root, &binaries, &name, &dist)?;
    let helm = components::helm(Progress::Shown)?;
    let mut package = Command::new(helm);
    package.args(["package", "--destination"]).arg(&dist).arg(root.join("deploy/helm/weir"));
    let packaged = package.output().context("cannot start helm")?;
    ensure!(packaged.status.success(), "helm: {}", String::from_utf8_lossy(&packaged.stderr));
    let libraries = image::libraries_of(&binaries)?;
    let list = format!("{:#}\n", sbom::document(root, &name, &libraries)?);
    fs::write(dist.join(format!("{name}.spdx.json")), list).context("cannot write the list of packages")?;
    let sums = checksums(&dist)?;
    fs::write(dist.join("SHA256SUMS"), &sums).context("cannot write checksums")?;
    println!("{}:\n{sums}image {} has the digest {digest}", dist.display(), image.name);
    if arguments.test { test(root, &dist) } else { Ok(()) }
}

/// Runs the chart's test with it.
fn test(root: &Path, dist: &Path) -> Result<()> {
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--locked"]).args(BINARIES.iter().flat_map(|name| ["-p", name]));
    // What looks at the node from outside, and at what was recorded.
    let built = cargo.current_dir(root).status().context("cannot start cargo")?;
    ensure!(built.success(), "cargo build ended with {built}");
    let mut tests = Command::new("cargo");
    tests.args([
        "test",
        "--locked",
        "-p",
        "weir-tests",
        "--test",
        "integration",
        "--",
        "chart::",
        "--nocapture",
    ]);
    tests.env("WEIR_TEST_DIST", dist).env("CI", "true");
    let tested = tests.current_dir(root).status().context("cannot start cargo")?;
    ensure!(tested.success(), "cargo test ended with {tested}");
    Ok(())
}

/// Builds the binaries, and leaves out what only a debugger reads.
fn build(root: &Path, profile: &str) -> Result<Vec<PathBuf>> {
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--locked", "--profile", profile, "--message-format", "json-render-diagnostics"]);
    cargo.args(BINARIES.iter().flat_map(|name| ["-p", name])).current_dir(root);
    let built = cargo.stderr(std::process::Stdio::inherit()).output().context("cannot start cargo")?;
    ensure!(built.status.success(), "cargo build ended with {}", built.status);
    let messages = String::from_utf8(built.stdout)?;
    let executables: Vec<PathBuf> = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter_map(|message| message["executable"].as_str().map(PathBuf::from))
        .collect();
    let stripped = root.join("target/dist-stripped");
    fs::create_dir_all(&stripped).with_context(|| format!("cannot make {}", stripped.display()))?;
    BINARIES
        .iter()
        .map(|name| {
            let found = executables.iter().find(|path| path.file_name().is_some_and(|file| file == *name));
            let (from, to) =
                (found.with_context(|| format!("cargo has not built {name}"))?, stripped.join(name));
            let status =
                Command::new("strip").arg("-o").arg(&to).arg(from).status().context("cannot start strip")?;
            ensure!(status.success(), "strip ended with {status}");
            Ok(to)
        })
        .collect()
}

/// The binaries for a node without Kubernetes' help, with the unit that comes before the kubelet.
fn tarball(root: &Path, binaries: &[PathBuf], name: &str, dist: &Path) -> Result<()> {
    let scratch = tempfile::tempdir().context("cannot make a scratch folder")?;
    let folder = scratch.path().join("content").join(name);
    for (from, to) in binaries
        .iter()
        .map(|path| (path.clone(), "bin"))
        .chain([(root.join("LICENSE"), ""), (root.join("deploy/systemd/weir-guard.service"), "systemd")])
    {
        let to = folder.join(to);
        fs::create_dir_all(&to).context("cannot make a folder")?;
        let file = from.file_name().context("a file has no name")?;
        fs::copy(&from, to.join(file)).with_context(|| format!("cannot copy {}", from.display()))?;
    }
    let archive = dist.join(format!("{name}.tar"));
    image::tar(&scratch.path().join("content"), &archive)?;
    let status = Command::new("gzip").arg("-n9").arg(&archive).status().context("cannot start gzip")?;
    ensure!(status.success(), "gzip ended with {status}");
    Ok(())
}

/// One line a file, as sha256sum writes and checks them.
fn checksums(dist: &Path) -> Result<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dist).with_context(|| format!("cannot read {}", dist.display()))? {
        names.push(entry?.file_name());
    }
    names.sort();
    let output =
        Command::new("sha256sum").args(names).current_dir(dist).output().context("cannot start sha256sum")?;
    ensure!(output.status.success(), "sha256sum ended with {}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}
