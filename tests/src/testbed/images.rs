//! Container images, made here from the busybox and kubectl of this machine: no registry is involved.
//!
//! An image is a docker-archive tar of one layer; it is kept in the cache folder under the digest of its binaries.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::command::run;
use crate::components::cache_folder;
use crate::testbed::Start;

/// Holds the namespaces of a pod.
pub const PAUSE_IMAGE: &str = "weir.test/pause:1";

/// The real kubectl, and a shell with the usual commands (busybox); [`RUNNER`] is where runners of GitHub Actions have theirs.
pub const AGENT_IMAGE: &str = "weir.test/agent:1";

/// Changes when the recipe here does, so that a kept image is not taken for a new one.
const RECIPE: &str = "2";

/// What a runner in ARC's `kubernetes` mode asks of the API: what it may, a pod for its job, a secret, a command in that pod.
const RUNNER: &str = r#"#!/bin/sh
set -eux
test "$ACTIONS_RUNNER_INPUT_JITCONFIG" = jit
echo work > /home/runner/_work/job
test "$(kubectl auth can-i create pods)" = yes
kubectl get pods -o name
kubectl create secret generic "$ACTIONS_RUNNER_POD_NAME-job" --from-literal=a=b
kubectl run job --image=weir.test/agent:1 --restart=Never --command -- sleep 1000
until [ "$(kubectl get pod job -o jsonpath='{.status.phase}')" = Running ]; do sleep 1; done
kubectl exec job -- echo said by the job
kubectl delete pod job --wait=false --grace-period=1
"#;

const BUSYBOX: &str = "/bin/busybox";

/// Makes the images if they are not kept, and gives them to containerd.
pub(super) fn import(start: &Start<'_>) -> Result<()> {
    let busybox = Path::new(BUSYBOX);
    let kubectl = start.components.binary("kubectl");
    let pause = archive(PAUSE_IMAGE, &["/bin/busybox", "sleep", "2147483647"], &[busybox])?;
    let agent = archive(AGENT_IMAGE, &["/bin/sh"], &[busybox, &kubectl])?;
    for image in [pause, agent] {
        run(start.ctr().args(["images", "import", "--local"]).arg(&image))?;
    }
    Ok(())
}

/// The image's tar, made if it is not there.
fn archive(name: &str, entry_point: &[&str], binaries: &[&Path]) -> Result<PathBuf> {
    let mut digest = Sha256::new();
    digest.update(format!("{RECIPE} {name} {entry_point:?} {RUNNER}"));
    for binary in binaries {
        hash_file(binary, &mut digest)?;
    }
    let folder = cache_folder()?.join("testbed/images");
    let archive = folder.join(format!("{}.tar", hex::encode(digest.finalize())));
    if !archive.exists() {
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let scratch = tempfile::tempdir_in(&folder).context("cannot make a scratch folder")?;
        write_archive(scratch.path(), name, entry_point, binaries, &archive)?;
    }
    Ok(archive)
}

fn write_archive(scratch: &Path, name: &str, entry: &[&str], binaries: &[&Path], to: &Path) -> Result<()> {
    let root = scratch.join("root");
    for folder in ["bin", "etc", "proc", "sys", "dev", "tmp", "root"] {
        fs::create_dir_all(root.join(folder)).context("cannot make a folder of an image")?;
    }
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777))
        .context("cannot open /tmp to all")?;
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/tmp:/bin/sh\n")
        .and_then(|()| fs::write(root.join("etc/group"), "root:x:0:\nnogroup:x:65534:\n"))
        .context("cannot write the users of an image")?;
    let runner = root.join("home/runner");
    fs::create_dir_all(&runner)
        .and_then(|()| fs::write(runner.join("run.sh"), RUNNER))
        .and_then(|()| fs::set_permissions(runner.join("run.sh"), fs::Permissions::from_mode(0o755)))
        .context("cannot write a runner's script")?;
    for binary in binaries {
        let file = binary.file_name().context("a binary has no name")?;
        fs::copy(binary, root.join("bin").join(file))
            .with_context(|| format!("cannot copy {}", binary.display()))?;
    }
    for command in run(Command::new(BUSYBOX).arg("--list"))?.lines().filter(|command| *command != "busybox") {
        symlink("busybox", root.join("bin").join(command))
            .with_context(|| format!("cannot link {command}"))?;
    }
    let archive = scratch.join("archive");
    fs::create_dir_all(&archive).context("cannot make a folder of an image")?;
    let layer = archive.join("layer.tar");
    tar(&root, &layer)?;
    let mut digest = Sha256::new();
    hash_file(&layer, &mut digest)?;
    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": {"Entrypoint": entry, "Env": ["PATH=/bin"], "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", hex::encode(digest.finalize()))]},
        "history": [],
    });
    let manifest = json!([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]);
    fs::write(archive.join("config.json"), config.to_string())
        .and_then(|()| fs::write(archive.join("manifest.json"), manifest.to_string()))
        .context("cannot write the description of an image")?;
    let part = scratch.join("part.tar");
    tar(&archive, &part)?;
    fs::rename(&part, to).with_context(|| format!("cannot put {} in its place", to.display()))
}

fn tar(folder: &Path, to: &Path) -> Result<()> {
    let mut command = Command::new("tar");
    command.args(["--sort=name", "--mtime=@0", "--numeric-owner", "--owner=0", "--group=0", "-C"]);
    run(command.arg(folder).arg("-cf").arg(to).arg(".")).map(|_| ())
}

fn hash_file(path: &Path, digest: &mut Sha256) -> Result<()> {
    let mut file = fs::File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut buffer = vec![0; 1 << 16];
    loop {
        let count = file.read(&mut buffer).with_context(|| format!("cannot read {}", path.display()))?;
        if count == 0 {
            return Ok(());
        }
        digest.update(&buffer[..count]);
    }
}
