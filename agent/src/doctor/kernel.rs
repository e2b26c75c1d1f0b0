//! What the kernel and this process's rights allow: version, type information, cgroup v2, capabilities, bpffs.
//!
//! Parsing is apart from reading, so that other machines' `/proc` can be tested.

use std::{fs, path::Path};

use nix::unistd::{AccessFlags, access};

use super::{Check, FOUND_CHARS_MAX, Need};
use crate::{
    interception::cgroup::find_mount,
    interception::foreign,
    interception::loader::{Kernel, Pinning, pin_folder},
    interception::security::Security,
};

/// Oldest kernel on which the kernel programs are tested.
const KERNEL_OLDEST: (u32, u32) = (6, 1);
/// Type information of the running kernel.
const BTF: &str = "/sys/kernel/btf/vmlinux";
/// To the kernel a process that has it has what it split off later, too: from CAP_PERFMON on.
const SYS_ADMIN: u32 = 21;
const PERFMON: u32 = 38;
/// Capabilities (capability.h), what each is for, and what lacks it.
const CAPABILITIES: [(&str, u32, &str); 8] = [
    ("CAP_DAC_OVERRIDE", 1, "make the canary's cgroup at the root of the tree"),
    ("CAP_NET_ADMIN", 12, "guard interfaces, and end connections from before enrolment"),
    ("CAP_NET_RAW", 13, "see the answers of name servers"),
    ("CAP_SYS_PTRACE", 19, "read which process connected"),
    ("CAP_SYS_ADMIN", SYS_ADMIN, "enter network and mount namespaces"),
    ("CAP_SYS_NICE", 23, "see answers of name servers before pods do"),
    ("CAP_PERFMON", PERFMON, "load programs that read kernel memory"),
    ("CAP_BPF", 39, "load programs"),
];

/// All of them; `pinned` tells whether programs must outlive the process (`run`).
pub fn checks(pinned: bool) -> Vec<Check> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let mountinfo = read("/proc/self/mountinfo");
    vec![
        version(&read("/proc/sys/kernel/osrelease")),
        type_information(Path::new(BTF)),
        cgroup(&mountinfo),
        cgroup_writable(find_mount(&mountinfo).map(|mount| mount.path).as_deref()),
        capabilities(&read("/proc/self/status")),
        bpffs(&mountinfo, if pinned { Need::Must } else { Need::Should }),
    ]
    .into_iter()
    .chain(programs())
    .chain([others(&foreign::on_node(&pin_folder()))])
    .collect()
}

fn version(release: &str) -> Check {
    let release = release.trim();
    let mut numbers = release.split(['.', '-', '+']).map(str::parse::<u32>);
    let version = match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor),
        _ => (0, 0),
    };
    let (name, (major, minor)) = ("kernel version", KERNEL_OLDEST);
    if version >= KERNEL_OLDEST {
        return Check::good(name, Need::Must, release);
    }
    let mend = format!(
        "boot Linux {major}.{minor} or later: older ones lack what the programs need of refusals (5.18), network \
         namespace cookies and socket storage in every hook"
    );
    Check::bad(name, Need::Must, format!("{release} is older than {major}.{minor}"), mend)
}

fn type_information(path: &Path) -> Check {
    let name = "kernel type information";
    if path.is_file() {
        return Check::good(name, Need::Must, path.display().to_string());
    }
    let mend = "boot a kernel built with CONFIG_DEBUG_INFO_BTF=y (all current distributions' are)";
    Check::bad(name, Need::Must, format!("no {}", path.display()), mend)
}

fn cgroup(mountinfo: &str) -> Check {
    let name = "cgroup v2";
    match find_mount(mountinfo) {
        Some(mount) => {
            let mode = if mount.hybrid { "hybrid: v1 controllers beside it" } else { "unified" };
            Check::good(name, Need::Must, format!("{} ({mode})", mount.path.display()))
        }
        None => {
            let mend = "boot with systemd.unified_cgroup_hierarchy=1, or mount -t cgroup2 none /sys/fs/cgroup/unified";
            Check::bad(name, Need::Must, "not mounted", mend)
        }
    }
}

/// Whether cgroups can be made: that of the canary, without which the agent is never ready, and that of `exec`.
fn cgroup_writable(mount: Option<&Path>) -> Check {
    let name = "cgroup v2, writable";
    let Some(mount) = mount else {
        return Check::bad(name, Need::Must, "not mounted", "mount it; see cgroup v2");
    };
    match access(mount, AccessFlags::W_OK | AccessFlags::X_OK) {
        Ok(()) => Check::good(name, Need::Must, mount.display().to_string()),
        Err(error) => {
            let mend = format!(
                "run as root with {0} mounted read-write (mount -o remount,rw {0}; in Kubernetes privileged, or a hostPath \
                 of /sys/fs/cgroup that is not read-only): the agent makes a cgroup there for the connection that must be \
                 refused, and is not ready without it",
                mount.display()
            );
            Check::bad(name, Need::Must, format!("{}: {}", mount.display(), error.desc()), mend)
        }
    }
}

fn capabilities(status: &str) -> Check {
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0);
    let has = |bit: u32| effective >> bit & 1 == 1;
    let holds = |bit: u32| has(bit) || (bit >= PERFMON && has(SYS_ADMIN));
    let missing: Vec<_> = CAPABILITIES.iter().filter(|(_, bit, _)| !holds(*bit)).collect();
    let name = "capabilities";
    if missing.is_empty() {
        let all: Vec<_> = CAPABILITIES.iter().map(|(name, _, _)| *name).collect();
        return Check::good(name, Need::Must, all.join(", "));
    }
    let lacking: Vec<_> = missing.iter().map(|(name, _, purpose)| format!("{name} ({purpose})")).collect();
    let mend =
        "run as root (sudo), in Kubernetes with securityContext.privileged or these capabilities added";
    Check::bad(name, Need::Must, format!("lacks {}", lacking.join(", ")), mend)
}

fn bpffs(mountinfo: &str, need: Need) -> Check {
    let mounted = mountinfo.lines().filter_map(|line| line.split_once(" - ")).find_map(|(before, after)| {
        let point = before.split(' ').nth(4)?;
        after.starts_with("bpf ").then_some(point)
    });
    let name = "bpf file system";
    match mounted {
        Some(point) => Check::good(name, need, point),
        None => {
            let mend = "mount -t bpf bpf /sys/fs/bpf (weir-agent run keeps its programs there; exec does not need it)";
            Check::bad(name, need, "not mounted", mend)
        }
    }
}

/// Loads the programs, attaches them nowhere, and lets them go.
/// Whether the kernel takes Weir's programs, and those for its security hooks: known only when it has them, for a moment and with
/// empty maps, by which they refuse nothing.
fn programs() -> Vec<Check> {
    let name = "kernel programs";
    match Kernel::load(Pinning::Unpinned) {
        Ok(kernel) => {
            let security = kernel.attach_security();
            let security = security.unwrap_or_else(|error| Security::Absent(super::chain(&error)));
            vec![Check::good(name, Need::Must, "accepted by the verifier"), security_hooks(&security)]
        }
        Err(error) => vec![Check::failed(name, Need::Must, &error)],
    }
}

/// Programs of others where those of Weir are, or before them.
fn others(found: &[String]) -> Check {
    let name = "programs of others";
    if found.is_empty() {
        return Check::good(name, Need::Should, "none decides beside Weir where connections of pods go");
    }
    let shown: String = found.join(", ").chars().take(FOUND_CHARS_MAX).collect();
    let mend = "see whose they are (bpftool prog show id ID; a service mesh or a CNI has some at the root): one that runs before Weir's \
                may refuse or rewrite what a pod dials, one that runs after them what Weir made of it. Packets to an API server are \
                dropped all the same, but the pod is then cut off; at the cgroup of a pod only a privileged hand can attach one";
    Check::bad(name, Need::Should, shown, mend)
}

fn security_hooks(security: &Security) -> Check {
    let name = "security hooks";
    let reason = match security {
        Security::InForce(way) => return Check::good(name, Need::Should, format!("decided by {way}")),
        Security::Absent(reason) => reason,
    };
    let found: String = reason.chars().take(FOUND_CHARS_MAX).collect();
    let mend = "boot a kernel without lockdown that lets programs change what its security functions return (CONFIG_SECURITY_NETWORK, type \
                information, ftrace with direct calls: 6.1 on x86_64, 6.4 on arm64), or with bpf in lsm=…, so that pods that are \
                enrolled or not known yet make no packet sockets, and enrolled ones do not call bpf(2); without it a privileged pod can \
                detach the programs (the agent attaches them again within a second, and says so), and one with NET_RAW can send frames if \
                it is on the host's network or starts while no agent runs: keep NET_RAW, privileged, hostPath and hostNetwork out of \
                enrolled namespaces, give their service accounts no rights of their own, and have containerd 2.2 start no container of \
                theirs without the agent (SECURITY.md)";
    Check::bad(name, Need::Should, found, mend)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interception::security::Way;

    #[test]
    fn kernels_older_than_the_oldest_tested_are_refused() {
        for (release, ok) in [
            ("6.18.44-custom\n", true),
            ("6.1.0-41-cloud-amd64", true),
            ("10.0", true),
            ("5.15.0-1044-aws", false),
            ("6.0.9", false),
            ("", false),
            ("garbage", false),
        ] {
            assert_eq!(version(release).ok, ok, "{release}");
        }
    }

    #[test]
    fn a_tree_in_which_no_cgroup_can_be_made_is_named_with_the_mend() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(cgroup_writable(Some(folder.path())).ok);
        let absent = cgroup_writable(Some(&folder.path().join("absent")));
        assert!(!absent.ok && absent.mend.is_some_and(|mend| mend.contains("remount,rw")));
        assert!(!cgroup_writable(None).ok);
    }

    #[test]
    fn missing_capabilities_are_named_with_their_purpose() {
        assert!(capabilities("CapEff:\t000001ffffffffff\n").ok);
        let check = capabilities("CapEff:\t000001ffffdfffff\n");
        assert_eq!(check.found, "lacks CAP_SYS_ADMIN (enter network and mount namespaces)");
        assert!(!capabilities("").ok);
        let check = capabilities("CapEff:\t000001ffff7fffff\n");
        assert_eq!(check.found, "lacks CAP_SYS_NICE (see answers of name servers before pods do)");
        // Those of the chart.
        assert!(capabilities("CapEff:\t0000000000a83002\n").ok);
        let check = capabilities("CapEff:\t0000000000883002\n");
        assert!(check.found.contains("CAP_SYS_ADMIN") && check.found.contains("CAP_BPF (load programs)"));
    }

    #[test]
    fn a_bpf_file_system_is_found_among_mounts() {
        let mountinfo = "30 24 0:26 / /sys/fs/bpf rw shared:10 - bpf bpf rw,mode=700\n";
        assert_eq!(bpffs(mountinfo, Need::Must).found, "/sys/fs/bpf");
        assert!(!bpffs("24 1 8:1 / / rw - ext4 /dev/sda1 rw\n", Need::Must).ok);
    }

    #[test]
    fn what_the_kernel_takes_counts_and_not_its_list_of_modules() {
        for way in Way::ALL {
            let check = security_hooks(&Security::InForce(way));
            assert_eq!((check.ok, check.found), (true, format!("decided by {way}")));
        }
        let check = security_hooks(&Security::Absent("refused".to_owned()));
        assert!(!check.ok && check.found == "refused" && check.mend.is_some());
    }
}
