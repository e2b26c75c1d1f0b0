//! What can be seen of a node from outside the product: what the kernel has attached, by bpftool and tc; mounts, cgroups, files,
//! packet filters, routes, and what listens in a pod's network. Compared before an installation and after its removal.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use sha2::{Digest as _, Sha256};
use weir_tests::{Pod, command, wait_until};

use super::super::{DEADLINE, escape};

/// Where a node's parts keep files.
const FOLDERS: [&str; 7] =
    ["/etc", "/opt", "/run", "/sys/fs/bpf", "/usr/local/bin", "/usr/local/sbin", "/var/lib"];
/// Files that runtime, kubelet and package manager make and remove while nothing is installed or removed.
const OTHERS: [&str; 8] = [
    "/run/containerd",
    "/run/kubernetes",
    "/run/netns",
    "/var/lib/apt",
    "/var/lib/cni",
    "/var/lib/dpkg",
    "/var/lib/kubelet",
    "/var/lib/systemd",
];
/// Its files' content is compared as well.
const CONFIGURATION: &str = "/etc";

/// By what it is, one line for each thing.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct NodeState(BTreeMap<&'static str, BTreeSet<String>>);

impl NodeState {
    /// `pod` is one that is there all the time.
    pub(super) fn now(pod: &Pod<'_>) -> Self {
        let cgroups = cgroup_mount();
        let (_, pid) = escape::place(pod);
        Self(BTreeMap::from([
            ("links", told("links", &["bpftool", "-j", "link", "list"], &["id", "pids"])),
            (
                "programs",
                told(
                    "programs",
                    &["bpftool", "-j", "prog", "list"],
                    &["id", "loaded_at", "map_ids", "pids", "btf_id"],
                ),
            ),
            ("maps", told("maps", &["bpftool", "-j", "map", "list"], &["id", "pids", "btf_id"])),
            (
                "programs of cgroups",
                told("cgroups", &["bpftool", "-j", "cgroup", "tree", cgroups.to_str().unwrap()], &["id"]),
            ),
            ("cgroups", folders(&cgroups)),
            ("interfaces", lines(&["ip", "-o", "link"], |line| Some(line.replace("NO-CARRIER,", "")))),
            ("queueing disciplines", lines(&["tc", "qdisc"], |line| Some(line.to_owned()))),
            ("filters", filters()),
            ("routes", lines(&["ip", "-o", "route", "show", "table", "all"], |line| Some(line.to_owned()))),
            ("routing rules", lines(&["ip", "rule"], |line| Some(line.to_owned()))),
            ("iptables", lines(&["iptables-save"], rule)),
            ("ip6tables", lines(&["ip6tables-save"], rule)),
            ("mounts", mounts()),
            ("files", FOLDERS.iter().flat_map(|folder| files(Path::new(folder))).collect()),
            (
                "listeners in a pod",
                lines(
                    &["nsenter", "-t", &pid, "-n", "cat", "/proc/self/net/tcp", "/proc/self/net/tcp6"],
                    listener,
                ),
            ),
            ("processes", processes()),
        ]))
    }

    /// What is in one of them alone: `+` what `self` has and `former` had not.
    pub(super) fn since(&self, former: &Self) -> BTreeMap<&'static str, Vec<String>> {
        let differences = self.0.iter().map(|(what, now)| {
            let before = &former.0[what];
            let new = now.difference(before).map(|line| format!("+ {line}"));
            (*what, new.chain(before.difference(now).map(|line| format!("- {line}"))).collect::<Vec<_>>())
        });
        differences.filter(|(_, lines)| !lines.is_empty()).collect()
    }
}

/// Waits until nothing has changed since then but what `stays` says.
#[track_caller]
pub(super) fn is_as_it_was(pod: &Pod<'_>, before: &NodeState, stays: &dyn Fn(&str, &str) -> bool) {
    let mut left = BTreeMap::new();
    let same = wait_until("the node to be as it was", DEADLINE, || {
        left = NodeState::now(pod).since(before);
        for (what, lines) in &mut left {
            lines.retain(|line| !stays(what, line));
        }
        left.retain(|_, lines| !lines.is_empty());
        Ok(left.is_empty().then_some(()))
    });
    assert!(same.is_ok(), "the node is not as it was: {left:#?}");
}

/// Lines that differ alone: two that are alike are numbered.
fn numbered(lines: impl Iterator<Item = String>) -> BTreeSet<String> {
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    lines
        .map(|line| {
            let count = seen.entry(line.clone()).or_default();
            *count += 1;
            format!("{line} ({count})")
        })
        .collect()
}

#[track_caller]
fn said(arguments: &[&str]) -> String {
    command::run(Command::new(arguments[0]).args(&arguments[1..])).unwrap()
}

fn lines(arguments: &[&str], change: impl Fn(&str) -> Option<String>) -> BTreeSet<String> {
    numbered(said(arguments).lines().filter_map(change))
}

/// What bpftool lists, without what every load numbers anew.
fn told(what: &str, arguments: &[&str], numbers: &[&str]) -> BTreeSet<String> {
    let text = said(arguments);
    let text = if text.trim().is_empty() { "[]" } else { &text };
    let list: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{what}: {error}: {text}"));
    let mut list = list.as_array().unwrap().clone();
    for object in &mut list {
        without(object, numbers);
    }
    numbered(list.iter().map(Value::to_string))
}

fn without(value: &mut Value, keys: &[&str]) {
    match value {
        Value::Object(object) => {
            object.retain(|key, _| !keys.contains(&key.as_str()));
            object.values_mut().for_each(|value| without(value, keys));
        }
        Value::Array(list) => list.iter_mut().for_each(|value| without(value, keys)),
        _ => {}
    }
}

/// The one of version 2.
fn cgroup_mount() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let line = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"));
    PathBuf::from(line.unwrap().split(' ').nth(1).unwrap())
}

fn folders(below: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut left = vec![below.to_owned()];
    while let Some(folder) = left.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                found.insert(entry.path().display().to_string());
                left.push(entry.path());
            }
        }
    }
    found
}

fn filters() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/sys/class/net").unwrap() {
        let name = entry.unwrap().file_name().to_string_lossy().into_owned();
        for way in ["ingress", "egress"] {
            let out =
                command::output(Command::new("tc").args(["filter", "show", "dev", &name, way])).unwrap();
            let text = String::from_utf8_lossy(&out.stdout).into_owned();
            found.extend(text.lines().map(|line| format!("{name} {way}: {line}")));
        }
    }
    found
}

/// A rule of a packet filter, without its counters and the times at which it is said.
fn rule(line: &str) -> Option<String> {
    (!line.starts_with('#')).then(|| line.split(" [").next().unwrap_or_default().to_owned())
}

fn mounts() -> BTreeSet<String> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let shown = |line: &str| {
        let (mount, source) = line.split_once(" - ")?;
        let words: Vec<_> = mount.split(' ').collect();
        Some(format!("{} {} {source}", words.get(4)?, words.get(5)?))
    };
    numbered(text.lines().filter_map(shown))
}

fn files(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut left = vec![folder.to_owned()];
    while let Some(path) = left.pop() {
        let Ok(about) = fs::symlink_metadata(&path) else { continue };
        if OTHERS.iter().any(|other| path.starts_with(other)) {
            continue;
        }
        let content = if about.is_file() && path.starts_with(CONFIGURATION) {
            hex::encode(Sha256::digest(fs::read(&path).unwrap_or_default()))
        } else {
            String::new()
        };
        found.push(format!(
            "{} {:o} {}:{} {content}",
            path.display(),
            about.mode(),
            about.uid(),
            about.gid()
        ));
        if about.is_dir() {
            left.extend(fs::read_dir(&path).into_iter().flatten().flatten().map(|entry| entry.path()));
        }
    }
    found
}

/// The address, where somebody listens.
fn listener(line: &str) -> Option<String> {
    let words: Vec<_> = line.split_whitespace().collect();
    (words.get(3) == Some(&"0A")).then(|| words[1].to_owned())
}

/// Of the product.
fn processes() -> BTreeSet<String> {
    let name = |entry: fs::DirEntry| fs::read_to_string(entry.path().join("comm")).ok();
    let names = fs::read_dir("/proc").unwrap().flatten().filter_map(name);
    numbered(names.map(|name| name.trim().to_owned()).filter(|name| name == "weir-agent" || name == "weir"))
}
