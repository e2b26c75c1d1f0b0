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

use crate::command::run;

/// Certificates of Debian's `ca-certificates`; those that this machine trusts beyond them stay here.
const AUTHORITIES: &str = "/usr/share/ca-certificates/mozilla";

/// What becomes an image.
#[derive(Debug)]
pub struct Image<'a> {
    /// Name with tag.
    pub name: &'a str,
    /// Version of the product.
    pub version: &'a str,
    /// Binaries; the first one is what a container runs.
    pub binaries: &'a [PathBuf],
    /// The licence's text.
    pub license: &'a Path,
    /// Whether the layer is compressed, for a registry.
    pub compressed: bool,
}

impl Image<'_> {
    /// Writes the tar, and gives the digest of the image's manifest.
    ///
    /// # Errors
    /// When a file cannot be read or written, or a library is not found.
    pub fn write(&self, to: &Path) -> Result<String> {
        let scratch = tempfile::tempdir().context("cannot make a scratch folder")?;
        let root = scratch.path().join("root");
        self.fill(&root)?;
        let layout = scratch.path().join("layout");
        let blobs = layout.join("blobs/sha256");
        fs::create_dir_all(&blobs).context("cannot make a folder of an image")?;
        let layer = scratch.path().join("layer.tar");
        tar(&root, &layer)?;
        let content = digest(&fs::read(&layer).context("cannot read a layer")?);
        let (media_type, layer) = if self.compressed {
            run(Command::new("gzip").arg("-n9").arg(&layer))?;
            ("application/vnd.oci.image.layer.v1.tar+gzip", layer.with_extension("tar.gz"))
        } else {
            ("application/vnd.oci.image.layer.v1.tar", layer)
        };
        let blob = |media_type: &str, bytes: &[u8]| -> Result<Value> {
            let digest = digest(bytes);
            fs::write(blobs.join(&digest), bytes).context("cannot write a part of an image")?;
            Ok(json!({"mediaType": media_type, "digest": format!("sha256:{digest}"), "size": bytes.len()}))
        };
        let layer = blob(media_type, &fs::read(&layer).context("cannot read a layer")?)?;
        let config = self.config(&content)?.to_string();
        let config = blob("application/vnd.oci.image.config.v1+json", config.as_bytes())?;
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest =
            json!({"schemaVersion": 2, "mediaType": media_type, "config": config, "layers": [layer]});
        let mut manifest = blob(media_type, manifest.to_string().as_bytes())?;
        let digest = manifest["digest"].as_str().unwrap_or_default().to_owned();
        let tag = self.name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
        // The first is containerd's, the second everybody's.
        manifest["annotations"] =
            json!({"io.containerd.image.name": self.name, "org.opencontainers.image.ref.name": tag});
        let index = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [manifest]});
        fs::write(layout.join("index.json"), index.to_string())
            .and_then(|()| fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#))
            .context("cannot write an image")?;
        tar(&layout, to)?;
        Ok(digest)
    }

    /// Puts the files of the image below `root`.
    fn fill(&self, root: &Path) -> Result<()> {
        for folder in
            ["usr/bin", "etc/ssl/certs", "usr/share/doc/weir", "proc", "sys", "dev", "run", "var/lib"]
        {
            fs::create_dir_all(root.join(folder)).context("cannot make a folder of an image")?;
        }
        for binary in self.binaries {
            let name = binary.file_name().context("a binary has no name")?;
            copy(binary, &root.join("usr/bin").join(name), 0o755)?;
        }
        for library in libraries_of(self.binaries)? {
            let below = library.strip_prefix("/").context("a library's path is not absolute")?;
            copy(&library, &root.join(below), 0o755)?;
        }
        copy(self.license, &root.join("usr/share/doc/weir/LICENSE"), 0o644)?;
        let passwd = "root:x:0:0:root:/:/sbin/nologin\nnobody:x:65534:65534::/:/sbin/nologin\n";
        for (name, text) in [
            ("etc/passwd", passwd.to_owned()),
            ("etc/group", "root:x:0:\nnogroup:x:65534:\n".to_owned()),
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

    fn config(&self, content: &str) -> Result<Value> {
        let entry = self.binaries.first().and_then(|binary| binary.file_name()).context("no binary")?;
        Ok(json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "os": "linux",
            "created": "1970-01-01T00:00:00Z",
            "config": {
                "Entrypoint": [format!("/usr/bin/{}", entry.to_string_lossy())],
                "Env": ["PATH=/usr/bin"],
                "Labels": {
                    "org.opencontainers.image.title": "weir-agent",
                    "org.opencontainers.image.version": self.version,
                    "org.opencontainers.image.licenses": "Apache-2.0",
                },
            },
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{content}")]},
        }))
    }
}

/// The libraries that an image of these binaries has, sorted.
///
/// # Errors
/// When one is not found.
pub fn libraries_of(binaries: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut found = BTreeSet::new();
    for binary in binaries {
        found.extend(libraries(binary)?);
    }
    Ok(found.into_iter().collect())
}

/// The libraries that a binary is linked with, and the loader, as `ldd` resolves them.
fn libraries(binary: &Path) -> Result<Vec<PathBuf>> {
    let listed = run(Command::new("ldd").arg(binary))?;
    let mut found = Vec::new();
    for line in listed.lines() {
        ensure!(!line.contains("not found"), "a library of {} is missing: {}", binary.display(), line.trim());
        let path = line.split_whitespace().find(|word| word.starts_with('/'));
        found.extend(path.map(PathBuf::from));
    }
    Ok(found)
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
    let mut command = Command::new("tar");
    command.args(["--format=gnu", "--sort=name", "--mtime=@0", "--numeric-owner", "--owner=0", "--group=0"]);
    // Folders have the modes of whoever made them otherwise.
    command.args(["--mode=u+rwX,go+rX,go-w", "-C"]);
    run(command.arg(folder).arg("-cf").arg(to).arg(".")).map(|_| ())
}

fn digest(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}
