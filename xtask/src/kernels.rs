//! `cargo xtask test --kernels`: the kernel tests of the agent on Debian's older kernels, under qemu.
//!
//! The tests run as they are built here, in an initramfs of what they need; nothing of the machine is touched. The kernels
//! are Debian's cloud images, downloaded once. Emulation, since a machine of CI seldom has KVM: slow, and true.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use weir_tests::{
    command::{find_in_path, run as run_command},
    components::cache_folder,
    packages,
};

/// Kernel series, and the package names of it by how they begin.
const SERIES: [(&str, &str); 2] = [("6.1", "linux-image-6.1.0-"), ("6.12", "linux-image-6.12.")];
/// How the package names of cloud images end.
const CLOUD: &str = "-cloud-amd64";
/// Programs that the tests start.
const PROGRAMS: [&str; 4] = ["bash", "ip", "nsenter", "unshare"];
/// Modules that a node's kernel loads by itself, in the order of their dependencies.
const MODULES: [&str; 7] = ["inet_diag", "tcp_diag", "udp_diag", "veth", "macvlan", "sch_ingress", "cls_bpf"];
/// What must be there: a program, and the Debian package that has it.
const NEEDED: [(&str, &str); 4] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("cpio", "cpio"),
    ("busybox", "busybox-static"),
    ("dpkg-deb", "dpkg"),
];
/// A run takes one to three minutes on two cores; what takes longer hangs.
const DEADLINE_SECONDS: &str = "600";
/// What the first process prints at the end, before the tests' exit code.
const RESULT: &str = "weir kernel tests ended with ";

/// Runs the kernel tests on each series.
///
/// # Errors
/// A kernel cannot be had, or a test fails on it; its output is printed.
pub(crate) fn run(root: &Path) -> Result<()> {
    if std::env::consts::ARCH != "x86_64" {
        bail!("the kernels are x86_64 ones; run this on such a machine");
    }
    let missing: Vec<_> = NEEDED
        .iter()
        .filter(|(program, _)| find_in_path(program).is_none())
        .map(|(_, package)| *package)
        .collect();
    if !missing.is_empty() {
        packages::install(&missing)?;
    }
    let tests = build(root)?;
    let folder = cache_folder()?.join("kernels");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    for (series, prefix) in SERIES {
        let kernel = kernel(&folder, series, prefix)?;
        let scratch = tempfile::tempdir_in(&folder).context("cannot make a scratch folder")?;
        let image = initramfs(scratch.path(), &tests, &kernel)?;
        let output = boot(&kernel, &image)?;
        let passed = output.lines().any(|line| line.trim_end() == format!("{RESULT}0"));
        let summary = output.lines().find(|line| line.starts_with("test result: ")).unwrap_or("no result");
        println!("kernel {}: {summary}", kernel.file_name().unwrap_or_default().to_string_lossy());
        if !passed {
            bail!("the kernel tests do not pass on {series}; what it printed:\n{output}");
        }
    }
    Ok(())
}

/// The test program of the kernel tests.
fn build(root: &Path) -> Result<PathBuf> {
    let text = run_command(
        Command::new("cargo")
            .args([
                "test",
                "--locked",
                "-p",
                "weir-agent",
                "--test",
                "kernel",
                "--no-run",
                "--message-format=json",
            ])
            .current_dir(root),
    )?;
    let executable = text.lines().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let is_it = message["target"]["name"] == "kernel" && message["target"]["kind"][0] == "test";
        message["executable"].as_str().filter(|_| is_it).map(PathBuf::from)
    });
    executable.context("cargo names no program of the kernel tests")
}

/// The unpacked newest kernel of a series, downloaded if it is not there.
fn kernel(folder: &Path, series: &str, prefix: &str) -> Result<PathBuf> {
    let kept = fs::read_dir(folder)?.flatten().map(|entry| entry.path()).find(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with(prefix) && path.join("boot").is_dir()
    });
    if let Some(kept) = kept {
        return Ok(kept);
    }
    let listed = run_command(Command::new("apt-cache").args([
        "search",
        "--names-only",
        &format!("^{prefix}.*{CLOUD}$"),
    ]))?;
    let newest = listed
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| name.ends_with(CLOUD))
        .max_by_key(|name| numbers(name))
        .with_context(|| {
            format!("apt knows no package {prefix}…{CLOUD}; Debian 12 with its security suite has it")
        })?;
    println!("downloading {newest} for kernel {series} (about 30 MB)");
    let scratch = tempfile::tempdir_in(folder).context("cannot make a scratch folder")?;
    let download = ["-o", "APT::Sandbox::User=root", "download", newest];
    run_command(Command::new("apt-get").args(download).current_dir(scratch.path()))?;
    let package = fs::read_dir(scratch.path())?.flatten().map(|entry| entry.path()).next();
    let package = package.context("apt-get downloaded nothing")?;
    // Under another name first: an interrupted unpacking must not leave half a kernel to be taken for one.
    let part = scratch.path().join("unpacked");
    run_command(Command::new("dpkg-deb").arg("-x").arg(&package).arg(&part))?;
    let kernel = folder.join(newest);
    fs::rename(&part, &kernel).with_context(|| format!("cannot put {} in its place", kernel.display()))?;
    Ok(kernel)
}

/// The numbers in a name, for comparing versions.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

/// Packs the tests and what they need; returns the image.
fn initramfs(scratch: &Path, tests: &Path, kernel: &Path) -> Result<PathBuf> {
    let root = scratch.join("root");
    for folder in ["bin", "dev", "modules", "proc", "sys", "tmp"] {
        fs::create_dir_all(root.join(folder))?;
    }
    let copy = |from: &Path, to: &str| {
        fs::copy(from, root.join(to)).with_context(|| format!("cannot copy {}", from.display()))
    };
    copy(tests, "bin/kernel-tests")?;
    let mut programs = vec![tests.to_owned()];
    for name in PROGRAMS.into_iter().chain(["busybox"]) {
        let program = find_in_path(name).with_context(|| format!("{name} is not in PATH"))?;
        copy(&program, &format!("bin/{name}"))?;
        programs.push(program);
    }
    for program in programs {
        // Fails for a static one, which needs nothing.
        let needs = Command::new("ldd").arg(&program).output().context("cannot start ldd")?;
        for word in
            String::from_utf8_lossy(&needs.stdout).split_whitespace().filter(|word| word.starts_with('/'))
        {
            let to = root.join(word.trim_start_matches('/'));
            fs::create_dir_all(to.parent().context("a library has no folder")?)?;
            fs::copy(word, &to).with_context(|| format!("cannot copy {word}"))?;
        }
    }
    for module in MODULES {
        let found = run_command(Command::new("find").arg(kernel).args(["-name", &format!("{module}.ko*")]))?;
        // One that is built in has no file.
        let Some(file) = found.lines().next() else { continue };
        copy(
            Path::new(file),
            &format!("modules/{}", Path::new(file).file_name().unwrap_or_default().to_string_lossy()),
        )?;
    }
    let compressed = run_command(Command::new("find").arg(root.join("modules")).args(["-name", "*.xz"]))?;
    for file in compressed.lines() {
        run_command(Command::new("xz").args(["-d", file]))?;
    }
    fs::write(root.join("init"), init())?;
    run_command(Command::new("chmod").arg("755").arg(root.join("init")))?;
    let image = scratch.join("initramfs");
    let pack = format!("cd '{}' && find . | cpio -o -H newc --quiet > '{}'", root.display(), image.display());
    run_command(Command::new("sh").args(["-c", &pack]))?;
    Ok(image)
}

/// The first process: mounts, modules, the tests one after the other.
fn init() -> String {
    let modules = MODULES.join(" ");
    format!(
        "#!/bin/bash
export PATH=/bin HOME=/ CI=true RUST_BACKTRACE=0 WEIR_TEST_BPF_LSM=1
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
busybox mount -t tmpfs tmp /tmp
busybox mount -t cgroup2 none /sys/fs/cgroup
busybox mount -t bpf bpf /sys/fs/bpf
busybox mount -t securityfs securityfs /sys/kernel/security
busybox ln -s bash /bin/sh
for program in cat; do busybox ln -s busybox /bin/$program; done
for module in {modules}; do [ ! -e /modules/$module.ko ] || busybox insmod /modules/$module.ko; done
ip link set lo up
cd /tmp
# What is about many pods, not about the kernel, takes minutes in emulation.
kernel-tests --test-threads=1 --skip scale::
echo \"{RESULT}$?\"
busybox poweroff -f
"
    )
}

/// Boots and returns what the console printed.
fn boot(kernel: &Path, image: &Path) -> Result<String> {
    let boot = kernel.join("boot");
    let file = fs::read_dir(&boot)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-")));
    let file = file.with_context(|| format!("{} has no kernel", boot.display()))?;
    let output = Command::new("timeout")
        .args([
            DEADLINE_SECONDS,
            "qemu-system-x86_64",
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max",
            "-smp",
            "2",
        ])
        .args(["-m", "1024", "-nographic", "-no-reboot", "-nic", "none", "-kernel"])
        .arg(&file)
        .arg("-initrd")
        .arg(image)
        .args(["-append", "console=ttyS0 panic=-1 quiet lsm=lockdown,landlock,bpf"])
        .stdin(Stdio::null())
        .output()
        .context("cannot start qemu")?;
    Ok(String::from_utf8_lossy(&output.stdout).replace('\r', ""))
}

#[cfg(test)]
mod tests {
    use super::numbers;

    #[test]
    fn the_newest_package_is_the_one_with_the_highest_numbers() {
        let names = ["linux-image-6.1.0-9-cloud-amd64", "linux-image-6.1.0-56-cloud-amd64"];
        assert_eq!(names.into_iter().max_by_key(|name| numbers(name)), Some(names[1]));
    }
}
