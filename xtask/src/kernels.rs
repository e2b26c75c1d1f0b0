//! `cargo xtask test --kernels`: the kernel tests of the agent on Debian's older kernels, under qemu.
//!
//! The tests run as they are built here, in an initramfs of what they need; nothing of the machine is touched. The kernels
//! are Debian's cloud images, downloaded once. Emulation, since a machine of CI seldom has KVM: slow, and true. Behind them,
//! [`reboot`] has a node boot twice.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Instant,
};

use anyhow::{Context as _, Result, anyhow, bail};
use weir_tests::{
    command::{find_in_path, run as run_command},
    components::cache_folder,
    packages,
    wait::interrupt_on_signals,
};

mod image;
mod reboot;

use self::image::{Image, boot};

/// A kernel series, and what it boots with.
#[derive(Clone, Copy)]
struct Series {
    name: &'static str,
    /// How the package names of it begin.
    packages: &'static str,
    /// Whether BPF is among the security modules where the tests run, and on the node that boots twice: both ways to decide in the
    /// kernel's security hooks on each kernel, without more boots.
    bpf_lsm: [bool; 2],
}

const SERIES: [Series; 2] = [
    Series { name: "6.1", packages: "linux-image-6.1.0-", bpf_lsm: [true, false] },
    Series { name: "6.12", packages: "linux-image-6.12.", bpf_lsm: [false, true] },
];
/// How the package names of cloud images end.
const CLOUD: &str = "-cloud-amd64";
/// Programs that the tests start.
const PROGRAMS: [&str; 5] = ["bash", "busybox", "ip", "nsenter", "unshare"];
/// Modules that a node's kernel loads by itself, in the order of their dependencies.
const MODULES: [&str; 11] = [
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "veth",
    "macvlan",
    "sch_ingress",
    "cls_bpf",
    "libcrc32c",
    "udp_tunnel",
    "ip6_udp_tunnel",
    "sctp",
];
/// What must be there: a program, and the Debian package that has it.
const NEEDED: [(&str, &str); 6] = [
    ("strip", "binutils"),
    ("mke2fs", "e2fsprogs"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("cpio", "cpio"),
    ("busybox", "busybox-static"),
    ("dpkg-deb", "dpkg"),
];
/// So many of the slowest tests are named.
const SLOWEST: usize = 12;
/// What the first process prints at the end, before the tests' exit code.
const RESULT: &str = "weir kernel tests ended with ";

/// Runs the kernel tests whose names contain `only` on each series, side by side unless `in_turn`.
///
/// # Errors
/// A kernel cannot be had, or a test fails on it; its output is printed.
pub(crate) fn run(root: &Path, in_turn: bool, only: &str) -> Result<()> {
    // What is told to end removes its images first.
    interrupt_on_signals()?;
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
    let programs = Programs::build(root)?;
    let folder = cache_folder()?.join("kernels");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let kernels = SERIES.map(|series| kernel(&folder, series).map(|kernel| (series, kernel)));
    let check = |kernel: Result<(Series, PathBuf)>| {
        let (series, kernel) = kernel?;
        check(series, &kernel, &folder, (&programs, only))
    };
    if in_turn {
        return kernels.into_iter().try_for_each(check);
    }
    // A guest keeps one processor busy.
    thread::scope(|scope| {
        let running = kernels.map(|kernel| scope.spawn(move || check(kernel)));
        // All of them end before the first that failed is told.
        let ended = running.map(thread::ScopedJoinHandle::join);
        ended.into_iter().try_for_each(|ended| ended.map_err(|_| anyhow!("a check panicked; see above"))?)
    })
}

/// Runs the kernel tests on one kernel, and has a node with it boot twice.
fn check(series: Series, kernel: &Path, folder: &Path, (programs, only): (&Programs, &str)) -> Result<()> {
    let Series { name, bpf_lsm: [of_tests, of_node], .. } = series;
    let scratch = tempfile::tempdir_in(folder).context("cannot make a scratch folder")?;
    let image = Image::new(&scratch.path().join("tests"))?;
    image.tools(&PROGRAMS)?;
    image.program(&programs.tests, "bin/kernel-tests")?;
    image.modules(kernel, &MODULES)?;
    let started = Instant::now();
    let output =
        boot(kernel, &image.pack(&MODULES, &runs_tests(of_tests, only))?, None, security_modules(of_tests))?;
    let took = started.elapsed().as_secs();
    let passed = output.lines().any(|line| line.trim_end() == format!("{RESULT}0"));
    let summary = output.lines().find(|line| line.starts_with("test result: ")).unwrap_or("no result");
    println!("kernel {}: {summary} ({took} s)", kernel.file_name().unwrap_or_default().to_string_lossy());
    println!("the slowest of them: {}", slowest(&output));
    if !passed {
        bail!("the kernel tests do not pass on {name}; what it printed:\n{output}");
    }
    if tests_passed(summary).is_none_or(|passed| passed == 0) {
        bail!("no kernel test was run on {name}: none has {only:?} in its name, or none is meant for guests");
    }
    let started = Instant::now();
    reboot::check(kernel, &scratch.path().join("reboot"), &programs.node, of_node)?;
    println!("kernel {name}: a node that booted twice is guarded ({} s)", started.elapsed().as_secs());
    Ok(())
}

/// The tests that take the longest, by what the test program prints: `test NAME ... ok <SECONDSs>`, where the kernel may print between.
fn slowest(output: &str) -> String {
    let timed = output.lines().filter_map(|line| {
        let (name, rest) = line.strip_prefix("test ")?.split_once(' ')?;
        let (_, time) = rest.rsplit_once('<')?;
        Some((time.strip_suffix("s>")?.parse::<f64>().ok()?, name))
    });
    let mut timed: Vec<_> = timed.collect();
    timed.sort_by(|one, other| other.0.total_cmp(&one.0));
    timed.truncate(SLOWEST);
    timed.iter().map(|(seconds, name)| format!("{name} {seconds:.0} s")).collect::<Vec<_>>().join(", ")
}

/// How many tests passed, by the last line of a test program: `test result: ok. 12 passed; 0 failed; …`.
fn tests_passed(summary: &str) -> Option<u32> {
    let (before, _) = summary.split_once(" passed;")?;
    before.rsplit(' ').next()?.parse().ok()
}

/// What runs in the guests.
pub(crate) struct Programs {
    tests: PathBuf,
    node: reboot::Programs,
}

impl Programs {
    pub(crate) fn build(root: &Path) -> Result<Self> {
        Ok(Self { tests: tests(root)?, node: reboot::Programs::build(root)? })
    }
}

/// The test program of the kernel tests.
fn tests(root: &Path) -> Result<PathBuf> {
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
fn kernel(folder: &Path, series: Series) -> Result<PathBuf> {
    let Series { name: series, packages: prefix, .. } = series;
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

/// What stands on the kernel's command line.
fn security_modules(bpf_lsm: bool) -> &'static str {
    if bpf_lsm { "lsm=lockdown,landlock,bpf" } else { "lsm=lockdown,landlock" }
}

/// In which way programs must decide in the kernel's security hooks, in the agent's words.
fn security_way(bpf_lsm: bool) -> &'static str {
    if bpf_lsm { "BPF LSM" } else { "BPF_MODIFY_RETURN" }
}

/// The tests, one after the other, with the time of each.
fn runs_tests(bpf_lsm: bool, only: &str) -> String {
    let way = security_way(bpf_lsm);
    format!(
        "export CI=true RUST_BACKTRACE=0 RUSTC_BOOTSTRAP=1 WEIR_TEST_SECURITY='{way}' WEIR_TEST_SCTP=1
cd /tmp
# What is about many pods, not about the kernel, takes minutes in emulation.
kernel-tests -Z unstable-options --report-time --test-threads=1 --skip scale:: '{only}'
echo \"{RESULT}$?\"
busybox poweroff -f
"
    )
}

#[cfg(test)]
mod tests {
    use super::{numbers, tests_passed};

    #[test]
    fn a_run_of_no_test_is_told_from_one_that_passed() {
        let line = |passed: u32| {
            format!(
                "test result: ok. {passed} passed; 0 failed; 0 ignored; 0 measured; 103 filtered out; finished in 0.00s"
            )
        };
        assert_eq!((tests_passed(&line(0)), tests_passed(&line(12))), (Some(0), Some(12)));
        assert_eq!(tests_passed("no result"), None);
    }

    #[test]
    fn the_newest_package_is_the_one_with_the_highest_numbers() {
        let names = ["linux-image-6.1.0-9-cloud-amd64", "linux-image-6.1.0-56-cloud-amd64"];
        assert_eq!(names.into_iter().max_by_key(|name| numbers(name)), Some(names[1]));
    }
}
