//! What a kernel under qemu starts with: an initramfs of the programs it is given, and the machine that it boots on.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result};
use weir_tests::command::{find_in_path, run};

/// The tests take about ten minutes on a processor that is emulated; what takes far longer hangs: beside other tests on a slow machine
/// they may take three times as long.
const DEADLINE_SECONDS: &str = "3600";

/// The folder that becomes the root of the file system.
pub(super) struct Image {
    scratch: PathBuf,
    pub(super) root: PathBuf,
}

impl Image {
    pub(super) fn new(scratch: &Path) -> Result<Self> {
        let (scratch, root) = (scratch.to_owned(), scratch.join("root"));
        for folder in ["bin", "dev", "etc/weir", "modules", "proc", "run", "sys", "tmp", "var/lib"] {
            fs::create_dir_all(root.join(folder))?;
        }
        Ok(Self { scratch, root })
    }

    /// Adds programs of this machine, by their names.
    pub(super) fn tools(&self, names: &[&str]) -> Result<()> {
        for name in names {
            let program = find_in_path(name).with_context(|| format!("{name} is not in PATH"))?;
            self.program(&program, &format!("bin/{name}"))?;
        }
        Ok(())
    }

    /// Adds a program without what is for debuggers, and the libraries it needs.
    pub(super) fn program(&self, from: &Path, to: &str) -> Result<()> {
        let to = self.root.join(to);
        fs::create_dir_all(to.parent().context("a program has no folder")?)?;
        run(Command::new("strip").args(["--strip-debug", "-o"]).arg(&to).arg(from))?;
        // Fails for a static one, which needs nothing.
        let needs = Command::new("ldd").arg(from).output().context("cannot start ldd")?;
        for word in
            String::from_utf8_lossy(&needs.stdout).split_whitespace().filter(|word| word.starts_with('/'))
        {
            let to = self.root.join(word.trim_start_matches('/'));
            fs::create_dir_all(to.parent().context("a library has no folder")?)?;
            fs::copy(word, &to).with_context(|| format!("cannot copy {word}"))?;
        }
        Ok(())
    }

    /// Adds those of a kernel's modules that are not built in.
    pub(super) fn modules(&self, kernel: &Path, names: &[&str]) -> Result<()> {
        for module in names {
            let found = run(Command::new("find").arg(kernel).args(["-name", &format!("{module}.ko*")]))?;
            let Some(file) = found.lines().next().map(Path::new) else { continue };
            let to = self.root.join("modules").join(file.file_name().context("a module has no name")?);
            fs::copy(file, &to).with_context(|| format!("cannot copy {}", file.display()))?;
            if to.extension().is_some_and(|extension| extension == "xz") {
                run(Command::new("xz").arg("-d").arg(&to))?;
            }
        }
        Ok(())
    }

    /// Packs everything, with what the first process does once file systems are mounted and `modules` loaded.
    pub(super) fn pack(&self, modules: &[&str], does: &str) -> Result<PathBuf> {
        let modules = modules.join(" ");
        let init = format!(
            "#!/bin/bash
export PATH=/bin HOME=/
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
busybox mount -t tmpfs tmp /tmp
busybox mount -t tmpfs run /run
busybox mount -t cgroup2 none /sys/fs/cgroup
busybox mount -t bpf bpf /sys/fs/bpf
busybox mount -t securityfs securityfs /sys/kernel/security
busybox ln -s bash /bin/sh
for program in cat; do busybox ln -s busybox /bin/$program; done
for module in {modules}; do [ ! -e /modules/$module.ko ] || busybox insmod /modules/$module.ko; done
ip link set lo up
{does}"
        );
        fs::write(self.root.join("init"), init)?;
        run(Command::new("chmod").arg("755").arg(self.root.join("init")))?;
        let image = self.scratch.join("initramfs");
        let pack = format!(
            "cd '{}' && find . | cpio -o -H newc --quiet > '{}'",
            self.root.display(),
            image.display()
        );
        run(Command::new("sh").args(["-c", &pack]))?;
        Ok(image)
    }
}

/// Boots with these words on the kernel's command line, and returns what the console printed.
pub(super) fn boot(kernel: &Path, image: &Path, disk: Option<&Path>, words: &str) -> Result<String> {
    let boot = kernel.join("boot");
    let file = fs::read_dir(&boot)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-")));
    let file = file.with_context(|| format!("{} has no kernel", boot.display()))?;
    let mut command = Command::new("timeout");
    // One thread for both processors: with one each, the emulator now and then runs half of a patch that the kernel makes to its own code.
    command.args([DEADLINE_SECONDS, "qemu-system-x86_64", "-accel", "tcg,thread=single", "-cpu", "max"]);
    command.args(["-smp", "2", "-m", "1024", "-nographic", "-no-reboot", "-nic", "none", "-kernel"]);
    command.arg(&file).arg("-initrd").arg(image);
    command.args(["-append", &format!("console=ttyS0 panic=-1 quiet {words}")]);
    if let Some(disk) = disk {
        command.args(["-drive", &format!("file={},format=raw,if=virtio", disk.display())]);
    }
    let output = command.stdin(Stdio::null()).output().context("cannot start qemu")?;
    Ok(String::from_utf8_lossy(&output.stdout).replace('\r', ""))
}
