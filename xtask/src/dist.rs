//! `cargo xtask dist`: what is given away, in `target/dist`: an OCI image without a Docker daemon, for one architecture or several, for
//! each a tarball of the binaries and a list of what is in them (SPDX), the chart as a package, and checksums of all.
//!
//! The same binaries give the same bytes: [`weir_tests::image`] writes archives without times, users and order of its own. The same
//! commit should, built in the same folder by the same toolchain and distribution; two builds from nothing were not compared. What was
//! built for another architecture is run in emulation ([`smoke`]).

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use weir_tests::{
    command::{command, run as output_of},
    components,
    image::{self, Image, Platform},
    progress::Progress,
};

use crate::{
    build_ebpf,
    cross::{Architecture, Cross},
    sbom::{self, Package},
};

mod smoke;

/// What is given away, the one that a container runs first.
const BINARIES: [&str; 2] = ["weir-agent", "weir"];
/// Of what is given away.
const VERSION: &str = env!("CARGO_PKG_VERSION");

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// What the binaries are built for; several, with commas between them, give one image that fits nodes of each [default: this machine's].
    #[arg(long, value_name = "ARCHITECTURE", value_delimiter = ',')]
    arch: Vec<Architecture>,
    /// Profile that the binaries are built with.
    #[arg(long, default_value = "release", value_name = "NAME")]
    profile: String,
    /// Name of the image; the version is its tag. In full: what `ctr images import` takes from the archive is looked for by a kubelet under the
    /// full name alone, also where the chart has it short.
    #[arg(long, default_value = "docker.io/library/weir-agent", value_name = "NAME")]
    image: String,
    /// Pack twice, and install on the testbed what was made: the chart's package with the image's archive. Needs root, and an image for this
    /// machine.
    #[arg(long)]
    test: bool,
}

impl Arguments {
    /// What is asked for, each once and in the same order however it was said.
    fn architectures(&self) -> Result<BTreeSet<Architecture>> {
        let own = Architecture::own()?;
        let mut asked: BTreeSet<_> = self.arch.iter().copied().collect();
        if asked.is_empty() {
            asked.insert(own);
        }
        ensure!(
            !self.test || asked.contains(&own),
            "--test installs an image for this machine; put {} into --arch, too",
            own.name()
        );
        Ok(asked)
    }
}

/// What was built for one architecture.
struct Build {
    architecture: Architecture,
    platform: Platform,
    /// Where the libraries are from.
    packages: Vec<Package>,
    /// None for this machine's own.
    cross: Option<Cross>,
}

/// Builds everything, and says what lies where.
///
/// # Errors
/// Something cannot be built or written, or does not run.
pub(crate) fn run(root: &Path, arguments: &Arguments) -> Result<()> {
    let architectures = arguments.architectures()?;
    let mut builds = Vec::new();
    for architecture in &architectures {
        builds.push(Build::make(root, *architecture, &arguments.profile)?);
    }
    let dist = root.join("target/dist");
    if dist.exists() {
        fs::remove_dir_all(&dist).with_context(|| format!("cannot empty {}", dist.display()))?;
    }
    fs::create_dir_all(&dist).with_context(|| format!("cannot make {}", dist.display()))?;
    for build in &builds {
        let files = (root.join("LICENSE"), root.join("deploy/systemd/weir-guard.service"));
        tarball(&files, &build.platform.binaries, &file_name(build.architecture), &dist)?;
    }
    let platforms: Vec<_> = builds.iter().map(|build| build.platform.clone()).collect();
    let name = format!("{}:{VERSION}", arguments.image);
    let license = root.join("LICENSE");
    let revision = revision(root);
    let image = Image {
        name: &name,
        version: VERSION,
        revision: revision.as_deref(),
        platforms: &platforms,
        license: &license,
        compressed: true,
    };
    let archive = dist.join(match architectures.iter().collect::<Vec<_>>()[..] {
        [one] => format!("{}.oci.tar", file_name(*one)),
        _ => format!("weir-{VERSION}-linux.oci.tar"),
    });
    let digest = image.write(&archive)?;
    for build in &builds {
        build.list(root, (&archive, &digest), revision.as_deref())?;
    }
    chart(root, &dist)?;
    let sums = checksums(&dist)?;
    fs::write(dist.join("SHA256SUMS"), &sums).context("cannot write checksums")?;
    println!("{}:\n{sums}image {name} has the digest {digest}", dist.display());
    for cross in builds.iter().filter_map(|build| build.cross.as_ref()) {
        smoke::run(root, cross, &archive)?;
    }
    if arguments.test {
        is_packed_alike(&image, &archive)?;
        test(root, &dist)?;
    }
    Ok(())
}

/// Of what is for one architecture, without an ending.
fn file_name(architecture: Architecture) -> String {
    format!("weir-{VERSION}-linux-{}", architecture.name())
}

/// The commit, if this is a checkout; `-modified` where files differ from it.
fn revision(root: &Path) -> Option<String> {
    let ask = |arguments: &[&str]| output_of(command("git", arguments).current_dir(root)).ok();
    let commit = ask(&["rev-parse", "HEAD"])?;
    let changed = ask(&["status", "--porcelain", "--untracked-files=no"])?;
    Some(format!("{}{}", commit.trim(), if changed.is_empty() { "" } else { "-modified" }))
}

/// The chart as Helm packs it, but for the times that Helm puts in.
fn chart(root: &Path, dist: &Path) -> Result<()> {
    let scratch = tempfile::tempdir().context("cannot make a scratch folder")?;
    let [packed, content] = ["packed", "content"].map(|name| scratch.path().join(name));
    fs::create_dir(&content).context("cannot make a folder")?;
    let mut helm = Command::new(components::helm(Progress::Shown)?);
    output_of(helm.args(["package", "--destination"]).arg(&packed).arg(root.join("deploy/helm/weir")))?;
    let name = format!("weir-{VERSION}");
    output_of(
        Command::new("tar").arg("-xf").arg(packed.join(format!("{name}.tgz"))).arg("-C").arg(&content),
    )?;
    // Helm takes the first folder of a path for the chart's, and would take a dot for it.
    let archive = dist.join(format!("{name}.tar"));
    image::tar_of(&content, "weir", &archive)?;
    output_of(command("gzip", &["-n9", "--suffix", ".tgz"]).arg(&archive))?;
    fs::rename(dist.join(format!("{name}.tar.tgz")), dist.join(format!("{name}.tgz")))
        .context("cannot name the chart's package")
}

/// Packs the same files again.
fn is_packed_alike(image: &Image<'_>, archive: &Path) -> Result<()> {
    let again = tempfile::NamedTempFile::new().context("cannot make a scratch file")?;
    image.write(again.path())?;
    output_of(Command::new("cmp").arg(archive).arg(again.path()))
        .context("the same files were packed twice, and the archives differ")?;
    println!("packed twice: the same bytes");
    Ok(())
}

impl Build {
    fn make(root: &Path, architecture: Architecture, profile: &str) -> Result<Self> {
        let programs = build_ebpf::run(root, build_ebpf::Options::of(architecture))?;
        let folder = root.join("target/dist-build").join(architecture.name());
        let cross = if architecture == Architecture::own()? {
            None
        } else {
            Some(Cross::prepare(architecture, &folder)?)
        };
        let mut cargo = Command::new("cargo");
        cargo.args(["build", "--locked", "--profile", profile]).current_dir(root);
        if let Some(cross) = &cross {
            cross.builds(&mut cargo)?;
            cargo.env("WEIR_EBPF_OBJECT", programs);
        }
        let strip = if cross.is_some() { architecture.tool("strip") } else { "strip".to_owned() };
        let binaries = build(cargo, &strip, &folder.join("stripped"))?;
        let (platform, mut packages) = match &cross {
            None => {
                let platform = Platform::own(binaries)?;
                let packages = sbom::packages_of(&platform.libraries)?;
                (platform, packages)
            }
            Some(cross) => {
                let libraries = cross.libraries_of(&cross.root, &binaries)?;
                let (architecture, root) = (architecture.debian(), cross.root.clone());
                (Platform { architecture, binaries, libraries, root }, cross.packages.clone())
            }
        };
        packages.extend(sbom::installed("ca-certificates"));
        Ok(Self { architecture, platform, packages, cross })
    }

    /// Writes the list of what is in the tarball and in the image, beside both.
    fn list(&self, root: &Path, (archive, digest): (&Path, &str), revision: Option<&str>) -> Result<()> {
        let name = file_name(self.architecture);
        let tarball = archive.with_file_name(format!("{name}.tar.gz"));
        let file = |path: &Path| -> Result<(String, String)> {
            let summed = output_of(Command::new("sha256sum").arg(path))?;
            let sha256 = summed.split(' ').next().unwrap_or_default().to_owned();
            let name = path.file_name().context("a file has no name")?;
            Ok((name.to_string_lossy().into_owned(), sha256))
        };
        let (image, tarball) = (file(archive)?, file(&tarball)?);
        let described = sbom::Described {
            name: &name,
            version: VERSION,
            revision,
            image: (&image.0, &image.1, digest),
            tarball: (&tarball.0, &tarball.1),
        };
        let list = sbom::document(root, &described, &self.architecture.target(), &self.packages)?;
        fs::write(archive.with_file_name(format!("{name}.spdx.json")), format!("{list:#}\n"))
            .context("cannot write the list of packages")
    }
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
fn build(mut cargo: Command, strip: &str, stripped: &Path) -> Result<Vec<PathBuf>> {
    cargo.args(["--message-format", "json-render-diagnostics"]);
    cargo.args(BINARIES.iter().flat_map(|name| ["-p", name]));
    let built = cargo.stderr(Stdio::inherit()).output().context("cannot start cargo")?;
    ensure!(built.status.success(), "cargo build ended with {}", built.status);
    let messages = String::from_utf8(built.stdout)?;
    let executables: Vec<PathBuf> = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter_map(|message| message["executable"].as_str().map(PathBuf::from))
        .collect();
    fs::create_dir_all(stripped).with_context(|| format!("cannot make {}", stripped.display()))?;
    BINARIES
        .iter()
        .map(|name| {
            let found = executables.iter().find(|path| path.file_name().is_some_and(|file| file == *name));
            let (from, to) =
                (found.with_context(|| format!("cargo has not built {name}"))?, stripped.join(name));
            output_of(command(strip, &["-o"]).arg(&to).arg(from))?;
            Ok(to)
        })
        .collect()
}

/// The binaries for a node without Kubernetes' help, with the unit that comes before the kubelet.
fn tarball(
    (license, unit): &(PathBuf, PathBuf),
    binaries: &[PathBuf],
    name: &str,
    dist: &Path,
) -> Result<()> {
    let scratch = tempfile::tempdir().context("cannot make a scratch folder")?;
    let folder = scratch.path().join("content").join(name);
    for (from, to) in binaries
        .iter()
        .map(|path| (path.clone(), "bin"))
        .chain([(license.clone(), ""), (unit.clone(), "systemd")])
    {
        let to = folder.join(to);
        fs::create_dir_all(&to).context("cannot make a folder")?;
        let file = from.file_name().context("a file has no name")?;
        fs::copy(&from, to.join(file)).with_context(|| format!("cannot copy {}", from.display()))?;
    }
    // By that name kubectl finds it as a plugin: `kubectl weir …`.
    std::os::unix::fs::symlink("weir", folder.join("bin/kubectl-weir")).context("cannot make a link")?;
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// Programs that say who they are, as what is given away, and what came of them in a folder.
    fn packed(folder: &Path) -> PathBuf {
        let (dist, binaries) = (folder.join("dist"), BINARIES.map(|name| folder.join(name)));
        fs::create_dir(&dist).unwrap();
        for (path, name) in binaries.iter().zip(BINARIES) {
            fs::write(path, format!("#!/bin/sh\necho {name} as $(basename $0): $*\n")).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let files = ["LICENSE", "weir-guard.service"].map(|name| folder.join(name));
        files.iter().for_each(|path| fs::write(path, path.to_string_lossy().as_bytes()).unwrap());
        let [license, unit] = files;
        tarball(&(license, unit), &binaries, "weir-0-linux-any", &dist).unwrap();
        dist
    }

    #[test]
    fn a_tarball_has_the_programs_the_unit_and_the_plugin_of_kubectl_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let archive = packed(folder.path()).join("weir-0-linux-any.tar.gz");
        let unpacked = folder.path().join("unpacked");
        fs::create_dir(&unpacked).unwrap();
        output_of(Command::new("tar").arg("-xzf").arg(&archive).arg("-C").arg(&unpacked)).unwrap();
        let found = output_of(
            Command::new("find").args([".", "!", "-type", "d", "-printf", "%P %M\n"]).current_dir(&unpacked),
        );
        let found = found.unwrap();
        let mut found: Vec<_> = found.lines().collect();
        found.sort_unstable();
        assert_eq!(
            found,
            [
                "weir-0-linux-any/LICENSE -rw-r--r--",
                "weir-0-linux-any/bin/kubectl-weir lrwxrwxrwx",
                "weir-0-linux-any/bin/weir -rwxr-xr-x",
                "weir-0-linux-any/bin/weir-agent -rwxr-xr-x",
                "weir-0-linux-any/systemd/weir-guard.service -rw-r--r--",
            ]
        );
        // The link is the program beside it, wherever it was unpacked.
        let plugin = unpacked.join("weir-0-linux-any/bin/kubectl-weir");
        let said = output_of(Command::new(plugin).arg("sessions")).unwrap();
        assert_eq!(said, "weir as kubectl-weir: sessions\n");
        let listed = output_of(Command::new("tar").args(["--numeric-owner", "-tvzf"]).arg(&archive)).unwrap();
        assert!(listed.lines().all(|line| line.contains(" 0/0 ")), "somebody's files: {listed}");
    }

    #[test]
    fn checksums_are_of_every_file_and_find_one_that_was_changed() {
        let folder = tempfile::tempdir().unwrap();
        let dist = packed(folder.path());
        fs::write(dist.join("a"), "a").unwrap();
        let sums = checksums(&dist).unwrap();
        let names: Vec<_> = sums.lines().map(|line| line.split_once("  ").unwrap().1).collect();
        assert_eq!(names, ["a", "weir-0-linux-any.tar.gz"]);
        fs::write(dist.join("SHA256SUMS"), sums).unwrap();
        let checked = || {
            let mut check = Command::new("sha256sum");
            check.args(["--quiet", "-c", "SHA256SUMS"]).current_dir(&dist).output().unwrap().status.success()
        };
        assert!(checked());
        fs::write(dist.join("a"), "b").unwrap();
        assert!(!checked());
    }
}
