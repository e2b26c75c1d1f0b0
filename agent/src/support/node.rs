//! What a bundle says of the node: its kernel, mounts and cgroups, the files of the journal by name and size, and the last lines of
//! the agent's log where they can be had. Reads only, and never what a record holds.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use nix::sys::statvfs::statvfs;

use crate::interception::{pod::PodUid, succession};

/// Files of the kernel that are short, and say nothing of anybody.
const KERNEL_FILES: [&str; 13] = [
    "/proc/version",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/pressure/cpu",
    "/proc/pressure/memory",
    "/proc/pressure/io",
    "/proc/sys/kernel/unprivileged_bpf_disabled",
    "/proc/sys/net/core/bpf_jit_enable",
    "/proc/sys/net/core/bpf_jit_limit",
    "/proc/sys/user/max_inotify_instances",
    "/proc/sys/user/max_inotify_watches",
    "/sys/kernel/security/lsm",
    "/sys/kernel/security/lockdown",
];
/// File systems whose mounts are told.
const FILE_SYSTEMS: [&str; 4] = ["cgroup", "cgroup2", "bpf", "securityfs"];
/// What is told of a process, of `/proc/PID/status`.
const OF_PROCESS: [&str; 7] =
    ["VmRSS:", "Threads:", "CapEff:", "CapBnd:", "NoNewPrivs:", "Seccomp:", "FDSize:"];
/// Most bytes of a small file.
const SMALL_BYTES_MAX: u64 = 8 * 1024;
/// Most files of a journal that are named, and how deep they lie.
const FILES_MAX: usize = 5000;
const DEPTH_MAX: usize = 2;
/// Where a kubelet keeps the logs of containers.
const POD_LOGS: &str = "/var/log/pods";
/// Most bytes of one log, and most logs.
const LOG_BYTES_MAX: u64 = 256 * 1024;
const LOGS_MAX: usize = 8;

fn small(path: &str) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(SMALL_BYTES_MAX).read_to_string(&mut text)?;
    Ok(text)
}

/// The kernel, mounts and cgroups, and the process of the agent if there is one.
pub(super) fn facts(agent: Option<u32>) -> String {
    let mut text = String::new();
    for path in KERNEL_FILES {
        let content = small(path).unwrap_or_else(|error| format!("[{error}]"));
        let _ = writeln!(text, "{path}: {}", content.trim_end().replace('\n', "\n    "));
    }
    let release = small("/etc/os-release").unwrap_or_default();
    let name = release.lines().find(|line| line.starts_with("PRETTY_NAME="));
    let _ = writeln!(text, "/etc/os-release (of this container, if it is one): {}", name.unwrap_or("[none]"));
    let has_types = Path::new("/sys/kernel/btf/vmlinux").is_file();
    let _ = writeln!(text, "kernel type information: {}", if has_types { "there" } else { "absent" });
    let memory = small("/proc/meminfo").unwrap_or_default();
    for line in memory.lines().take(3) {
        let _ = writeln!(text, "{line}");
    }
    text.push_str("\nmounts (where, options, type):\n");
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    text.extend(mounts.lines().filter_map(mount));
    for (who, pid) in [("this process", Some(std::process::id())), ("the agent", agent)] {
        if let Some(pid) = pid {
            let _ = write!(text, "\n{who}, {pid}:\n{}", process(pid));
        }
    }
    text
}

/// A line of mountinfo (proc(5)) without what the file system itself was given: that could hold a password.
fn mount(line: &str) -> Option<String> {
    let (before, after) = line.split_once(" - ")?;
    let mut fields = before.split(' ').skip(4);
    let (point, options, kind) = (fields.next()?, fields.next()?, after.split(' ').next()?);
    FILE_SYSTEMS.contains(&kind).then(|| format!("{point} {options} {kind}\n"))
}

fn process(pid: u32) -> String {
    let mut text = small(&format!("/proc/{pid}/cgroup")).unwrap_or_else(|error| format!("[{error}]\n"));
    let status = small(&format!("/proc/{pid}/status")).unwrap_or_default();
    for line in status.lines().filter(|line| OF_PROCESS.iter().any(|name| line.starts_with(name))) {
        let _ = writeln!(text, "{line}");
    }
    let limits = small(&format!("/proc/{pid}/limits")).unwrap_or_default();
    text.extend(
        limits.lines().find(|line| line.starts_with("Max open files")).map(|line| format!("{line}\n")),
    );
    text
}

/// Names, sizes and times of what lies in a folder of records, the room on its disk, and nothing of what is in the files.
pub(super) fn listing(folder: &Path) -> io::Result<String> {
    let disk = statvfs(folder)?;
    let mebibytes = |blocks: u64| blocks.saturating_mul(disk.fragment_size()) >> 20;
    let mut text = format!(
        "{}: {} MiB of {} MiB free, {} inodes free\n\nbytes, seconds since 1970 of the last change, name:\n",
        folder.display(),
        mebibytes(disk.blocks_available()),
        mebibytes(disk.blocks()),
        disk.files_available()
    );
    let (mut files, mut bytes) = (0, 0);
    list(folder, Path::new(""), &mut |name, metadata| {
        files += 1;
        bytes += metadata.len();
        let changed = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        if files <= FILES_MAX {
            let seconds = changed.map_or(0, |since| since.as_secs());
            let _ = writeln!(text, "{} {seconds} {}", metadata.len(), name.display());
        }
    })?;
    let _ = writeln!(
        text,
        "\n{files} files, {bytes} bytes{}",
        if files > FILES_MAX { "; not all are named" } else { "" }
    );
    Ok(text)
}

fn list(folder: &Path, below: &Path, each: &mut impl FnMut(&Path, &fs::Metadata)) -> io::Result<()> {
    let mut entries = fs::read_dir(folder.join(below))?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        // Gone between two system calls: segments are removed.
        let Ok(metadata) = entry.metadata() else { continue };
        let name = below.join(entry.file_name());
        if metadata.is_dir() && name.components().count() < DEPTH_MAX {
            list(folder, &name, each)?;
        } else {
            each(&name, &metadata);
        }
    }
    Ok(())
}

/// The last lines of the agent's containers, if it runs in a pod and this process sees the node's files; else how to get them.
pub(super) fn logs(agent: Option<u32>) -> String {
    let of_pod = agent.and_then(succession::pod_of);
    let found = of_pod.as_ref().map(|pod| logs_of(Path::new(POD_LOGS), pod)).unwrap_or_default();
    if !found.is_empty() {
        return found;
    }
    let journal = agent.map_or_else(String::new, |pid| format!("    journalctl _PID={pid}\n"));
    format!(
        "The log is not to be had from here. In Kubernetes:\n    kubectl -n NAMESPACE logs POD -c agent --tail=2000\n    \
         kubectl -n NAMESPACE logs POD -c agent --previous --tail=2000\nOn a node whose systemd runs the agent:\n{journal}    \
         journalctl -u weir-guard.service\n"
    )
}

fn logs_of(folder: &Path, pod: &PodUid) -> String {
    let suffix = format!("_{}", pod.as_str());
    let entries = |folder: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    };
    let of_pod = entries(folder).into_iter().filter(|path| path.to_string_lossy().ends_with(&suffix));
    let mut logs: Vec<_> = of_pod
        .flat_map(|pod| entries(&pod))
        .flat_map(|container| entries(&container))
        .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
        .filter_map(|path| {
            Some((fs::metadata(&path).ok()?.modified().unwrap_or(SystemTime::UNIX_EPOCH), path))
        })
        .collect();
    logs.sort_by(|one, other| other.cmp(one));
    let mut text = String::new();
    for (_, path) in logs.into_iter().take(LOGS_MAX) {
        let lines = last_lines(&path).unwrap_or_else(|error| format!("[{error}]\n"));
        let _ = writeln!(text, "==> {}\n{lines}", path.display());
    }
    text
}

/// Whole lines of the end of a file.
fn last_lines(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    let from = length.saturating_sub(LOG_BYTES_MAX);
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(LOG_BYTES_MAX).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let whole = if from == 0 { &*text } else { text.split_once('\n').map_or("", |(_, whole)| whole) };
    Ok(whole.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_has_names_and_sizes_and_nothing_of_what_is_in_the_files() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::create_dir_all(folder.path().join("epoch/deep/deeper")).expect("is made");
        fs::write(folder.path().join("mask.key"), "CANARY").expect("is written");
        fs::write(folder.path().join("epoch/1.seg"), "CANARY-CANARY").expect("is written");
        fs::write(folder.path().join("epoch/deep/deeper/x"), "").expect("is written");
        let text = listing(folder.path()).expect("is read");
        assert!(text.contains("MiB free") && text.contains("\n6 ") && text.contains(" mask.key\n"), "{text}");
        assert!(
            text.contains("\n13 ") && text.contains(" epoch/1.seg\n") && text.contains("3 files, "),
            "{text}"
        );
        assert!(!text.contains("CANARY") && !text.contains("deeper"), "{text}");
    }

    #[test]
    fn a_mount_is_told_without_what_its_file_system_was_given() {
        let line = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,password=CANARY";
        assert_eq!(mount(line).as_deref(), Some("/sys/fs/cgroup rw,nosuid cgroup2\n"));
        assert_eq!(mount("30 23 0:26 / /mnt rw - cifs //host/share rw,password=CANARY"), None);
        assert_eq!(mount("nonsense"), None);
    }

    #[test]
    fn the_logs_of_the_agents_pod_are_cut_at_a_line() {
        let folder = tempfile::tempdir().expect("a folder");
        let pod = PodUid::new("0b5e2f6a-3c1d-4e5f-8a9b-0c1d2e3f4a5b").expect("a UID");
        for (name, of_pod) in [("weir-system_weir-agent-x", pod.as_str()), ("ci_job", "other")] {
            let container = folder.path().join(format!("{name}_{of_pod}/agent"));
            fs::create_dir_all(&container).expect("is made");
            fs::write(container.join("0.log"), format!("{name} first\n{}", "x line\n".repeat(50_000)))
                .expect("is written");
        }
        let text = logs_of(folder.path(), &pod);
        assert!(text.starts_with("==> ") && text.contains("weir-agent-x") && !text.contains("ci_job"));
        let lines: Vec<_> = text.lines().skip(1).filter(|line| !line.is_empty()).collect();
        assert!(lines.len() > 30_000 && lines.iter().all(|line| *line == "x line"));
        assert!(logs(None).contains("kubectl -n NAMESPACE logs POD -c agent"));
    }
}
