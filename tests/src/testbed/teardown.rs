//! Taking a testbed down: everything that [`State`] says we made, and nothing else.
//!
//! Each part is tried whatever became of the others; what is left at the end is named. Running it on a testbed that
//! is half there, or twice, is fine.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::command::{command, output, run};
use crate::components::Components;
use crate::testbed::node::{BRIDGE, NETWORK};
use crate::testbed::state::{BPF_FOLDER, Layout, State, boot_id, cgroup_mounts, is_bpf_mounted};
use crate::wait::wait_until;

/// For a component to end by itself after SIGTERM.
const GRACE: Duration = Duration::from_secs(5);

/// For killed processes to leave their cgroups.
const CGROUP_DEADLINE: Duration = Duration::from_secs(20);

/// Ends the kubelet before all else: it would start the containers again.
const FIRST: &[&str] = &["kubelet", "kube-proxy", "kube-scheduler", "kube-controller-manager"];

/// Ends and removes all of it.
pub(super) fn remove(layout: &Layout, state: &State) -> Result<()> {
    let mut left = Vec::new();
    let mut attempt = |what: &str, result: Result<()>| {
        if let Err(error) = result {
            left.push(format!("{what}: {error:#}"));
        }
    };
    if state.boot_id == boot_id()? {
        attempt("processes", stop(state, |name| FIRST.contains(&name)));
        // Only a wish: what ctr does not end is killed below, whether or not containerd still answers.
        let _ = end_containers(layout);
        attempt("processes", stop(state, |_| true));
        attempt("containers", kill_rest(&layout.root));
        attempt("mounts", unmount(&layout.root));
        attempt("bpf file system", unmount_bpf(state));
        attempt("cgroups", remove_cgroups());
        attempt("bridge", remove_bridge());
        for family in ["iptables", "ip6tables"] {
            attempt("firewall", remove_chains(family));
        }
        attempt("kernel settings", restore_settings(state));
    }
    attempt("paths", remove_paths(state));
    if !left.is_empty() {
        bail!("left behind in spite of all:\n  {}\nrun `cargo xtask testbed down` again", left.join("\n  "));
    }
    fs::remove_dir_all(&layout.root).with_context(|| format!("cannot remove {}", layout.root.display()))
}

fn stop(state: &State, chosen: impl Fn(&str) -> bool) -> Result<()> {
    let processes = || state.processes.iter().rev().filter(|process| chosen(&process.name));
    // All are told before the first is waited for.
    processes().for_each(|process| process.signal(Signal::SIGTERM));
    for process in processes() {
        process.stop(GRACE)?;
    }
    Ok(())
}

/// Lets containerd end the containers, so that shims remove their sockets and runc its state.
fn end_containers(layout: &Layout) -> Result<()> {
    let components = Components::find()?;
    let ctr = || super::ctr(&components, layout);
    let tasks = run(ctr().args(["tasks", "list", "--quiet"]))?;
    for task in tasks.split_whitespace() {
        run(ctr().args(["tasks", "delete", "--force", task]))?;
    }
    Ok(())
}

/// Kills what is left: containers by cgroup; shims, and what a crash kept from being recorded, by our mark.
fn kill_rest(root: &Path) -> Result<()> {
    wait_until("containers to end", CGROUP_DEADLINE, || {
        let mut processes = marked(root)?;
        for mount in cgroup_mounts()? {
            collect_processes(&mount.join("kubepods"), &mut processes);
        }
        for pid in &processes {
            // It may have ended since it was found.
            let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        Ok(processes.is_empty().then_some(()))
    })
}

/// Processes that have [`super::MARK`] with this folder in their environment.
fn marked(root: &Path) -> Result<BTreeSet<i32>> {
    let mark = [super::MARK.as_bytes(), b"=", root.as_os_str().as_bytes()].concat();
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc").context("cannot list /proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        let is_ours = environment.split(|byte| *byte == 0).any(|variable| variable == mark);
        if is_ours && !matches!(crate::process::stat(pid), None | Some(('Z', _))) {
            found.insert(pid);
        }
    }
    Ok(found)
}

fn collect_processes(cgroup: &Path, found: &mut BTreeSet<i32>) {
    let processes = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    // 0 stands for a process of another pid namespace, which cannot be killed from here.
    found.extend(processes.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 0));
    for child in folders(cgroup) {
        collect_processes(&child, found);
    }
}

fn folders(parent: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

fn unmount(root: &Path) -> Result<()> {
    for mount in mounts_below(root)?.iter().rev() {
        umount2(mount, MntFlags::MNT_DETACH)
            .with_context(|| format!("cannot unmount {}", mount.display()))?;
    }
    Ok(())
}

/// What is still pinned there goes with it: without this mount nothing could have been pinned.
fn unmount_bpf(state: &State) -> Result<()> {
    if state.bpf_mount && is_bpf_mounted()? {
        umount2(BPF_FOLDER, MntFlags::MNT_DETACH).with_context(|| format!("cannot unmount {BPF_FOLDER}"))?;
    }
    Ok(())
}

/// Mount points below `root` in the order they were made.
fn mounts_below(root: &Path) -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(|point| unescape(point).into());
    Ok(points.filter(|point: &PathBuf| point.starts_with(root)).collect())
}

/// The kernel writes blanks in mount points as octal escapes.
fn unescape(point: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(point.to_owned(), |text, (escape, plain)| text.replace(escape, plain))
}

fn remove_cgroups() -> Result<()> {
    for mount in cgroup_mounts()? {
        let cgroup = mount.join("kubepods");
        wait_until(&format!("{} to be free", cgroup.display()), CGROUP_DEADLINE, || {
            remove_cgroup(&cgroup);
            Ok((!cgroup.exists()).then_some(()))
        })?;
    }
    Ok(())
}

fn remove_cgroup(cgroup: &Path) {
    for child in folders(cgroup) {
        remove_cgroup(&child);
    }
    // Busy while a killed process is still leaving: the caller looks again.
    let _ = fs::remove_dir(cgroup);
}

fn remove_bridge() -> Result<()> {
    if !Path::new("/sys/class/net").join(BRIDGE).exists() {
        return Ok(());
    }
    run(&mut command("ip", &["link", "delete", BRIDGE])).map(|_| ())
}

/// Removes chains called `KUBE-…` and the rules that lead to them; `up` made sure that there were none before.
fn remove_chains(family: &str) -> Result<()> {
    for table in ["nat", "filter", "mangle", "raw"] {
        let saved = output(&mut command(format!("{family}-save"), &["-t", table]))?;
        let saved = String::from_utf8_lossy(&saved.stdout).into_owned();
        let script = removal(table, &saved);
        if !script.is_empty() {
            restore(family, &script)?;
        }
    }
    Ok(())
}

/// What `iptables-restore --noflush` must read to remove our chains from a table as `iptables-save` shows it.
fn removal(table: &str, saved: &str) -> String {
    let chains: Vec<&str> = saved
        .lines()
        .filter_map(|line| line.strip_prefix(':')?.split(' ').next())
        .filter(|chain| chain.starts_with("KUBE-"))
        .collect();
    if chains.is_empty() {
        return String::new();
    }
    let mut script = format!("*{table}\n");
    for rule in saved.lines().filter_map(|line| line.strip_prefix("-A ")) {
        if !rule.starts_with("KUBE-") && rule.contains("-j KUBE-") {
            script += &format!("-D {rule}\n");
        }
    }
    // Emptied before any is removed: they refer to each other.
    script.extend(chains.iter().map(|chain| format!("-F {chain}\n")));
    script.extend(chains.iter().map(|chain| format!("-X {chain}\n")));
    script + "COMMIT\n"
}

fn restore(family: &str, script: &str) -> Result<()> {
    let program = format!("{family}-restore");
    let mut child = Command::new(&program)
        .args(["--noflush", "-w", "5"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    let mut input = child.stdin.take().context("no standard input of iptables-restore")?;
    std::io::Write::write_all(&mut input, script.as_bytes())
        .with_context(|| format!("cannot write to {program}"))?;
    drop(input);
    let output = child.wait_with_output().with_context(|| format!("cannot wait for {program}"))?;
    if !output.status.success() {
        bail!("{program} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn restore_settings(state: &State) -> Result<()> {
    for (path, value) in &state.settings {
        if fs::read_to_string(path).is_ok_and(|now| now.trim() != value) {
            fs::write(path, value).with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    Ok(())
}

fn remove_paths(state: &State) -> Result<()> {
    for path in &state.new_paths {
        // A mount below is somebody else's: everything of ours is unmounted by now.
        if path.exists() && mounts_below(path)?.is_empty() {
            fs::remove_dir_all(path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    // Where the folder existed before, our network's entries in it did not.
    for folder in ["/var/lib/cni/results", "/var/lib/cni/cache/results"] {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(NETWORK) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_kubernetes_chains_and_the_rules_to_them_are_removed() {
        let saved = "*nat\n:PREROUTING ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-A - [0:0]\n:OTHER - [0:0]\n\
                     -A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
                     -A PREROUTING -j OTHER\n-A KUBE-SERVICES -d 10.96.0.1/32 -j KUBE-SVC-A\nCOMMIT\n";
        assert_eq!(
            removal("nat", saved),
            "*nat\n-D PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
             -F KUBE-SERVICES\n-F KUBE-SVC-A\n-X KUBE-SERVICES\n-X KUBE-SVC-A\nCOMMIT\n"
        );
    }

    #[test]
    fn a_table_without_our_chains_is_left_alone() {
        assert_eq!(removal("nat", "*nat\n:DOCKER - [0:0]\n-A PREROUTING -j DOCKER\nCOMMIT\n"), "");
    }
}
