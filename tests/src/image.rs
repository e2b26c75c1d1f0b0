//! The product's image: an OCI image layout in one tar, made of built binaries and what they are linked with, without a
//! Docker daemon. No shell, no package manager; the same bytes from the same files.
//!
//! `cargo xtask dist` writes it from release builds, the chart's test from those of the tests. Images of the testbed are
//! [`crate::testbed`]'s.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::command::{command, run};

/// This machine's architecture, as OCI calls it.
const ARCHITECTURE: &str = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
/// The type of a list of manifests.
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// The user of an image whose pod names none: of no rights, and of none of the files.
const NOBODY: u32 = 65532;
/// Certificates of Debian's `ca-certificates`; those that this machine trusts beyond them stay here.
const AUTHORITIES: &str = "/usr/share/ca-certificates/mozilla";

/// What becomes an image.
#[derive(Debug)]
pub struct Image<'a> {
    /// Name with tag.
    pub name: &'a str,
    /// Version of the product.
    pub version: &'a str,
    /// The commit that it was built from, if that is known.
    pub revision: Option<&'a str>,
    /// One for each architecture.
    pub platforms: &'a [Platform],
    /// The licence's text.
    pub license: &'a Path,
    /// Whether the layers are compressed, for a registry.
    pub compressed: bool,
}

/// What an image has for one architecture.
#[derive(Clone, Debug)]
pub struct Platform {
    /// As OCI calls it: `amd64`, `arm64`.
    pub architecture: &'static str,
    /// Binaries; the first one is what a container runs.
    pub binaries: Vec<PathBuf>,
    /// What they are linked with, each below `root`.
    pub libraries: Vec<PathBuf>,
    /// The folder that the libraries lie in as an image has them below `/`.
    pub root: PathBuf,
}

impl Platform {
    /// Of binaries of this machine, with this machine's libraries.
    ///
    /// # Errors
    /// When a library is not found.
    pub fn own(binaries: Vec<PathBuf>) -> Result<Self> {
        let libraries = libraries_of(&binaries, |binary| command("ldd", &[binary]))?;
        Ok(Self { architecture: ARCHITECTURE, binaries, libraries, root: PathBuf::from("/") })
    }
}

impl Image<'_> {
    /// Writes the tar, and gives the digest of the image: of an index, which has a manifest for each architecture.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn write(&self, to: &Path) -> Result<String> {
        let scratch = tempfile::tempdir().context("cannot make a scratch folder")?;
        let layout = scratch.path().join("layout");
        let blobs = Blobs(layout.join("blobs/sha256"));
        fs::create_dir_all(&blobs.0).context("cannot make a folder of an image")?;
        let mut manifests = Vec::new();
        for platform in self.platforms {
            manifests.push(self.manifest(platform, &scratch.path().join(platform.architecture), &blobs)?);
        }
        let index =
            |manifests: &[Value]| json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests});
        let mut image = blobs.add(INDEX, index(&manifests).to_string().as_bytes())?;
        let digest = image["digest"].as_str().unwrap_or_default().to_owned();
        let tag = self.name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
        // The first is containerd's, the second everybody's.
        image["annotations"] =
            json!({"io.containerd.image.name": self.name, "org.opencontainers.image.ref.name": tag});
        fs::write(layout.join("index.json"), index(&[image]).to_string())
            .and_then(|()| fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#))
            .context("cannot write an image")?;
        tar(&layout, to)?;
        Ok(digest)
    }

    /// Writes what a platform has, and gives its entry in the index.
    fn manifest(&self, platform: &Platform, scratch: &Path, blobs: &Blobs) -> Result<Value> {
        let root = scratch.join("root");
        self.fill(platform, &root)?;
        let layer = scratch.join("layer.tar");
        tar(&root, &layer)?;
        let content = digest(&fs::read(&layer).context("cannot read a layer")?);
        let (media_type, layer) = if self.compressed {
            run(Command::new("gzip").arg("-n9").arg(&layer))?;
            ("application/vnd.oci.image.layer.v1.tar+gzip", layer.with_extension("tar.gz"))
        } else {
            ("application/vnd.oci.image.layer.v1.tar", layer)
        };
        let layer = blobs.add(media_type, &fs::read(&layer).context("cannot read a layer")?)?;
        let config = self.config(platform, &content)?.to_string();
        let config = blobs.add("application/vnd.oci.image.config.v1+json", config.as_bytes())?;
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest =
            json!({"schemaVersion": 2, "mediaType": media_type, "config": config, "layers": [layer]});
        let mut manifest = blobs.add(media_type, manifest.to_string().as_bytes())?;
        manifest["platform"] = json!({"architecture": platform.architecture, "os": "linux"});
        Ok(manifest)
    }

    /// Puts the files of the image below `root`.
    fn fill(&self, platform: &Platform, root: &Path) -> Result<()> {
        for folder in
            ["usr/bin", "etc/ssl/certs", "usr/share/doc/weir", "proc", "sys", "dev", "run", "var/lib"]
        {
            fs::create_dir_all(root.join(folder)).context("cannot make a folder of an image")?;
        }
        for binary in &platform.binaries {
            let name = binary.file_name().context("a binary has no name")?;
            copy(binary, &root.join("usr/bin").join(name), 0o755)?;
        }
        for library in &platform.libraries {
            let below = library.strip_prefix(&platform.root).context("a library lies elsewhere")?;
            copy(library, &root.join(below), 0o755)?;
        }
        copy(self.license, &root.join("usr/share/doc/weir/LICENSE"), 0o644)?;
        let passwd = format!(
            "root:x:0:0:root:/:/sbin/nologin\nweir:x:{NOBODY}:{NOBODY}::/:/sbin/nologin\nnobody:x:65534:65534::/:/sbin/nologin\n"
        );
        for (name, text) in [
            ("etc/passwd", passwd),
            ("etc/group", format!("root:x:0:\nweir:x:{NOBODY}:\nnogroup:x:65534:\n")),
            ("etc/nsswitch.conf", "hosts: files dns\n".to_owned()),
            ("etc/ssl/certs/ca-certificates.crt", authorities()?),
        ] {
            let path = root.join(name);
            fs::write(&path, text)
                .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o644)))
                .with_context(|| format!("cannot write {name} of an image"))?;
        }
        Ok(())
    }

    fn config(&self, platform: &Platform, content: &str) -> Result<Value> {
        let entry = platform.binaries.first().and_then(|binary| binary.file_name()).context("no binary")?;
        let mut labels = json!({
            "org.opencontainers.image.title": "weir-agent",
            "org.opencontainers.image.version": self.version,
            "org.opencontainers.image.licenses": "Apache-2.0",
        });
        if let Some(revision) = self.revision {
            labels["org.opencontainers.image.revision"] = json!(revision);
        }
        Ok(json!({
            "architecture": platform.architecture,
            "os": "linux",
            "created": "1970-01-01T00:00:00Z",
            "config": {
                "Entrypoint": [format!("/usr/bin/{}", entry.to_string_lossy())],
                "Env": ["PATH=/usr/bin"],
                "Labels": labels,
                // Whoever needs root says so: the agent's pods do, the approver and a reader do not.
                "User": format!("{NOBODY}:{NOBODY}"),
            },
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{content}")]},
        }))
    }
}

/// Writes an image of binaries of this machine for tests on it, not compressed.
///
/// # Errors
/// When a file cannot be read or written, or a library is not found.
pub fn write_own(name: &str, binaries: Vec<PathBuf>, license: &Path, to: &Path) -> Result<()> {
    let platforms = [Platform::own(binaries)?];
    let image =
        Image { name, version: "test", revision: None, platforms: &platforms, license, compressed: false };
    image.write(to).map(drop)
}

/// Unpacks what the image in an archive has for an architecture into `to`, with every part held to its digest; gives its configuration.
///
/// # Errors
/// There is nothing for it, or a part is not what its digest says.
pub fn unpack(archive: &Path, architecture: &str, to: &Path) -> Result<Value> {
    let scratch = tempfile::tempdir().context("cannot make a scratch folder")?;
    let layout = scratch.path();
    run(Command::new("tar").arg("-xf").arg(archive).arg("-C").arg(layout))?;
    let blobs = Blobs(layout.join("blobs/sha256"));
    let top = fs::read(layout.join("index.json")).context("the archive has no index.json")?;
    let top: Value = serde_json::from_slice(&top).context("index.json is no JSON")?;
    let index = blobs.json(&top["manifests"][0])?;
    let of = |manifest: &&Value| manifest["platform"]["architecture"] == architecture;
    let manifest = index["manifests"].as_array().and_then(|manifests| manifests.iter().find(of));
    let manifest =
        blobs.json(manifest.with_context(|| format!("the image has nothing for {architecture}"))?)?;
    let configuration = blobs.json(&manifest["config"])?;
    let layer = &manifest["layers"][0];
    blobs.read(layer)?;
    fs::create_dir_all(to).with_context(|| format!("cannot make {}", to.display()))?;
    // tar sees by itself whether it is compressed.
    run(Command::new("tar").arg("-xf").arg(blobs.path(layer)).arg("-C").arg(to))?;
    Ok(configuration)
}

/// The parts of an image, each a file that is named by its digest.
struct Blobs(PathBuf);

impl Blobs {
    fn path(&self, descriptor: &Value) -> PathBuf {
        self.0.join(descriptor["digest"].as_str().unwrap_or_default().trim_start_matches("sha256:"))
    }

    fn read(&self, descriptor: &Value) -> Result<Vec<u8>> {
        let path = self.path(descriptor);
        let bytes = fs::read(&path).with_context(|| format!("the archive has no {}", path.display()))?;
        let named = path.file_name().is_some_and(|name| name == digest(&bytes).as_str());
        ensure!(named && descriptor["size"] == bytes.len(), "a part is not what is said of it: {descriptor}");
        Ok(bytes)
    }

    fn json(&self, descriptor: &Value) -> Result<Value> {
        serde_json::from_slice(&self.read(descriptor)?).context("a part of the archive is no JSON")
    }

    fn add(&self, media_type: &str, bytes: &[u8]) -> Result<Value> {
        let digest = digest(bytes);
        fs::write(self.0.join(&digest), bytes).context("cannot write a part of an image")?;
        Ok(json!({"mediaType": media_type, "digest": format!("sha256:{digest}"), "size": bytes.len()}))
    }
}

/// The libraries that binaries are linked with, and the loader, sorted: as the command says that is given a binary and writes
/// what `ldd` does.
///
/// # Errors
/// When one is not found.
pub fn libraries_of(binaries: &[PathBuf], ask: impl Fn(&Path) -> Command) -> Result<Vec<PathBuf>> {
    let mut found = BTreeSet::new();
    for binary in binaries {
        let listed = run(&mut ask(binary))?;
        for line in listed.lines() {
            ensure!(
                !line.contains("not found"),
                "a library of {} is missing: {}",
                binary.display(),
                line.trim()
            );
            let path = line.split_whitespace().find(|word| word.starts_with('/'));
            found.extend(path.map(PathBuf::from));
        }
    }
    Ok(found.into_iter().collect())
}

fn authorities() -> Result<String> {
    let entries = fs::read_dir(AUTHORITIES)
        .with_context(|| format!("cannot read {AUTHORITIES}; is ca-certificates installed?"))?;
    let mut files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    files.sort();
    let mut text = String::new();
    for file in files {
        text.push_str(&fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?);
    }
    Ok(text)
}

fn copy(from: &Path, to: &Path, mode: u32) -> Result<()> {
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder).context("cannot make a folder of an image")?;
    }
    fs::copy(from, to)
        .and_then(|_| fs::set_permissions(to, fs::Permissions::from_mode(mode)))
        .with_context(|| format!("cannot copy {}", from.display()))
}

/// Packs a folder: the same bytes from the same files, whoever has made them when.
///
/// # Errors
/// When tar fails.
pub fn tar(folder: &Path, to: &Path) -> Result<()> {
    tar_of(folder, ".", to)
}

/// As [`tar`], of what is called `name` in the folder, under that name.
///
/// # Errors
/// When tar fails.
pub fn tar_of(folder: &Path, name: &str, to: &Path) -> Result<()> {
    let mut command = Command::new("tar");
    command.args(["--format=gnu", "--sort=name", "--mtime=@0", "--numeric-owner", "--owner=0", "--group=0"]);
    // Folders have the modes of whoever made them otherwise.
    command.args(["--mode=u+rwX,go+rX,go-w", "-C"]);
    run(command.arg(folder).arg("-cf").arg(to).arg(name)).map(|_| ())
}

fn digest(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;

    const PATHS: [&str; 4] = ["bin/weir-agent", "bin/weir", "root/lib/libc.so.6", "root/lib/ld-linux.so.1"];

    /// All that an image of them has.
    const FILES: [&str; 9] = [
        "etc/group",
        "etc/nsswitch.conf",
        "etc/passwd",
        "etc/ssl/certs/ca-certificates.crt",
        "lib/ld-linux.so.1",
        "lib/libc.so.6",
        "usr/bin/weir",
        "usr/bin/weir-agent",
        "usr/share/doc/weir/LICENSE",
    ];

    /// What was built below `folder`, each file with its own name and architecture in it, by somebody with habits of their own.
    fn platform(folder: &Path, architecture: &'static str, mode: u32, written: SystemTime) -> Platform {
        let folder = folder.join(architecture);
        for path in PATHS {
            let file = folder.join(path);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(&file, format!("{architecture} {path}")).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
            fs::File::options().append(true).open(&file).unwrap().set_modified(written).unwrap();
        }
        let [agent, weir, library, loader] = PATHS.map(|path| folder.join(path));
        Platform {
            architecture,
            binaries: vec![agent, weir],
            libraries: vec![library, loader],
            root: folder.join("root"),
        }
    }

    fn write(mode: u32, written: SystemTime) -> (tempfile::TempDir, PathBuf, String) {
        let folder = tempfile::tempdir().unwrap();
        let license = folder.path().join("LICENSE");
        fs::write(&license, "as you like").unwrap();
        let platforms = ["amd64", "arm64"].map(|name| platform(folder.path(), name, mode, written));
        let name = "registry.test/weir-agent:1.2.3";
        let image = Image {
            name,
            version: "1.2.3",
            revision: Some("c0ffee"),
            platforms: &platforms,
            license: &license,
            compressed: true,
        };
        let archive = folder.path().join("image.tar");
        let digest = image.write(&archive).unwrap();
        (folder, archive, digest)
    }

    #[test]
    fn the_same_files_are_the_same_image_whoever_wrote_them_when() {
        let (_one, first, first_digest) = write(0o755, SystemTime::UNIX_EPOCH + Duration::from_secs(1));
        let (_other, second, second_digest) = write(0o700, SystemTime::now());
        assert_eq!(first_digest, second_digest);
        assert!(fs::read(first).unwrap() == fs::read(second).unwrap(), "the archives differ");
    }

    #[test]
    fn each_architecture_gets_its_own_files_and_says_so() {
        let (folder, archive, digest) = write(0o755, SystemTime::now());
        let top = run(Command::new("tar").arg("-xOf").arg(&archive).arg("./index.json")).unwrap();
        let top: Value = serde_json::from_str(&top).unwrap();
        let [image] = top["manifests"].as_array().unwrap().as_slice() else { panic!("{top}") };
        assert_eq!(image["digest"], digest.as_str());
        assert_eq!(image["annotations"]["io.containerd.image.name"], "registry.test/weir-agent:1.2.3");
        assert_eq!(image["annotations"]["org.opencontainers.image.ref.name"], "1.2.3");
        for architecture in ["amd64", "arm64"] {
            let root = folder.path().join("unpacked").join(architecture);
            let configuration = unpack(&archive, architecture, &root).unwrap();
            assert_eq!(configuration["architecture"], architecture);
            assert_eq!(configuration["os"], "linux");
            assert_eq!(configuration["config"]["Entrypoint"], json!(["/usr/bin/weir-agent"]));
            let labels = &configuration["config"]["Labels"];
            assert_eq!(labels["org.opencontainers.image.version"], "1.2.3");
            assert_eq!(labels["org.opencontainers.image.revision"], "c0ffee");
            assert_eq!(labels["org.opencontainers.image.licenses"], "Apache-2.0");
            assert_eq!(configuration["config"]["User"], "65532:65532");
            for (path, from) in [
                ("usr/bin/weir-agent", PATHS[0]),
                ("usr/bin/weir", PATHS[1]),
                ("lib/libc.so.6", PATHS[2]),
                ("lib/ld-linux.so.1", PATHS[3]),
            ] {
                let text = fs::read_to_string(root.join(path)).unwrap();
                assert_eq!(text, format!("{architecture} {from}"));
                let mode = fs::metadata(root.join(path)).unwrap().permissions().mode();
                assert_eq!(mode & 0o7777, 0o755, "{path}");
            }
            let listed = run(Command::new("find").arg(&root).args(["-not", "-type", "d", "-printf", "%P\n"]));
            let mut listed: Vec<_> = listed.unwrap().lines().map(str::to_owned).collect();
            listed.sort();
            // And so no shell, and nothing to install one with.
            assert_eq!(listed, FILES, "{architecture}");
        }
        let missing = unpack(&archive, "riscv64", &folder.path().join("none")).unwrap_err();
        assert!(missing.to_string().contains("nothing for riscv64"), "{missing:#}");
    }

    #[test]
    fn a_part_that_was_changed_is_refused() {
        let (folder, archive, _) = write(0o755, SystemTime::now());
        let layout = folder.path().join("layout");
        fs::create_dir(&layout).unwrap();
        run(Command::new("tar").arg("-xf").arg(&archive).arg("-C").arg(&layout)).unwrap();
        let mut changed = 0;
        for entry in fs::read_dir(layout.join("blobs/sha256")).unwrap() {
            let path = entry.unwrap().path();
            let mut bytes = fs::read(&path).unwrap();
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
            fs::write(&path, &bytes).unwrap();
            tar(&layout, &archive).unwrap();
            let refused =
                ["amd64", "arm64"].map(|name| unpack(&archive, name, &folder.path().join("to")).is_err());
            assert!(refused.contains(&true), "{}", path.display());
            bytes[last] ^= 1;
            fs::write(&path, &bytes).unwrap();
            changed += 1;
        }
        // An index, and for each architecture manifest, configuration and layer.
        assert_eq!(changed, 7);
    }
}
