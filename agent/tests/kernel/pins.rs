//! Pins: what outlives a process, what the next one takes over, and what uninstalling leaves.

use std::{net::SocketAddr, path::Path};

use weir_agent::interception::{attach, layouts, loader::Pinning, pinned::pinned_state};
use weir_common::kernel::{CgroupEntry, Class, FLOWS_MAX, FlowKey, FlowRecord, maps, programs};

use crate::world::{API4, Dial, OwnCgroup, OwnNetns, dial, eventually, is, load};

/// What the maps may take of the kernel's memory on a node with few pods, bytes.
const MAP_BYTES_MAX: u64 = 20 * 1024 * 1024;

/// A bpf file system of the test's own.
pub(crate) struct OwnBpffs(pub(crate) tempfile::TempDir);

impl OwnBpffs {
    pub(crate) fn mount() -> nix::Result<Self> {
        let folder = tempfile::tempdir().unwrap();
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("bpf"), folder.path(), Some("bpf"), flags, None::<&str>)?;
        Ok(Self(folder))
    }
}

impl Drop for OwnBpffs {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

#[tokio::test]
async fn pinned_programs_deny_while_no_agent_runs_and_go_with_uninstall() {
    if load(Pinning::Unpinned).is_none() {
        return;
    }
    let bpffs = OwnBpffs::mount().unwrap();
    let pins = bpffs.0.path().join("weir/v3");
    let cgroup = OwnCgroup::new("pins");
    let netns = OwnNetns::new();
    let dial = || dial(&cgroup.0, Some(&netns), Dial::Tcp(API4));
    assert!(pinned_state(&pins).unwrap().is_none());

    let first = load(Pinning::Pinned(pins.clone())).unwrap();
    first.set_api_endpoint(API4, 0).unwrap();
    first.attach(&cgroup.0).unwrap();
    assert_eq!(dial(), Err(nix::Error::ECONNREFUSED));
    drop(first);
    assert_eq!(dial(), Err(nix::Error::ECONNREFUSED), "no agent runs");

    let second = load(Pinning::Pinned(pins.clone())).unwrap();
    assert_eq!(second.api_endpoints().unwrap().len(), 1, "maps are taken over");
    assert_eq!(second.counters().unwrap().denied_unknown, 2);
    second.attach(&cgroup.0).unwrap();
    let entry = CgroupEntry { listener_netns: 0, class: Class::Unselected as u32, listener_port: 0 };
    second.classify(cgroup.id(), entry).unwrap();
    assert_eq!(dial(), Err(nix::Error::ENETUNREACH), "passes, and there is no route");
    let state = pinned_state(&pins).unwrap().unwrap();
    assert_eq!(state.links.len(), programs::GUARD_AND_HOOKS.len(), "replaced in place, not attached twice");
    assert_eq!(state.counters.seen, 3, "each connection meets one set of programs");
    // What docs/performance.md says of them; the flow map is allocated whole.
    let flows = u64::from(FLOWS_MAX) * (size_of::<FlowKey>() + size_of::<FlowRecord>()) as u64;
    assert!(state.map_bytes[maps::FLOWS] >= flows, "{:?}", state.map_bytes);
    assert!(state.map_bytes.values().sum::<u64>() < MAP_BYTES_MAX, "{:?}", state.map_bytes);
    drop(second);
    assert_eq!(dial(), Err(nix::Error::ENETUNREACH), "a known pod keeps its verdict");

    // Another agent that has not attached to this cgroup takes its links for those of a cgroup that is gone.
    let third = load(Pinning::Pinned(pins.clone())).unwrap();
    third.prune_links().unwrap();
    assert!(pinned_state(&pins).unwrap().unwrap().links.is_empty());
    third.attach(&cgroup.0).unwrap();
    third.forget_cgroup(cgroup.id()).unwrap();
    assert!(third.inspect().unwrap().repaired.is_empty());
    // A privileged hand takes two away; the programs detach a moment later, or not before they are replaced.
    for program in [programs::CONNECT4, programs::EGRESS] {
        std::fs::remove_file(pins.join(format!("links/{}-{program}", cgroup.id()))).unwrap();
    }
    let repaired = third.inspect().unwrap().repaired;
    let place = cgroup.0.display();
    assert_eq!(
        repaired,
        [format!("{} at {place}", programs::EGRESS), format!("{} at {place}", programs::CONNECT4)]
    );
    assert!(third.inspect().unwrap().repaired.is_empty());
    assert_eq!(dial(), Err(nix::Error::ECONNREFUSED));
    assert!(attach::uninstall(&pins).unwrap() > programs::GUARD_AND_HOOKS.len());
    let error = third.inspect().unwrap_err().to_string();
    assert!(error.contains("was removed while the agent runs"), "{error}");
    drop(third);
    // The kernel frees an unpinned link a little later.
    eventually("nothing is attached any more", dial, is(nix::Error::ENETUNREACH)).await;
    assert!(!bpffs.0.path().join("weir").exists(), "nothing is left");
}

#[test]
fn pins_outside_a_bpf_file_system_are_refused_with_the_mend() {
    let Some(_) = load(Pinning::Unpinned) else { return };
    let folder = tempfile::tempdir().unwrap();
    let error = weir_agent::interception::loader::Kernel::load(Pinning::Pinned(folder.path().join("v1")));
    let text = error.unwrap_err().to_string();
    assert!(text.contains("mount -t bpf"), "{text}");
}

#[tokio::test]
async fn an_agents_pins_take_the_place_of_an_older_layouts() {
    if load(Pinning::Unpinned).is_none() {
        return;
    }
    let bpffs = OwnBpffs::mount().unwrap();
    let [older, ours, newer] = ["weir/v2", "weir/v3", "weir/v4"].map(|name| bpffs.0.path().join(name));
    let (cgroup, netns) = (OwnCgroup::new("layouts"), OwnNetns::new());
    let dialled = || dial(&cgroup.0, Some(&netns), Dial::Tcp(API4));
    let former = load(Pinning::Pinned(older.clone())).unwrap();
    former.set_api_endpoint(API4, 0).unwrap();
    former.attach(&cgroup.0).unwrap();
    let entry = CgroupEntry { listener_netns: 0, class: Class::Unselected as u32, listener_port: 0 };
    drop((former, load(Pinning::Pinned(newer.clone())).unwrap()));
    let agent = load(Pinning::Pinned(ours.clone())).unwrap();
    agent.set_api_endpoint(API4, 0).unwrap();
    agent.attach(&cgroup.0).unwrap();
    agent.classify(cgroup.id(), entry).unwrap();
    assert_eq!(dialled(), Err(nix::Error::ECONNREFUSED), "what the former agent has left denies");
    assert!(agent.remove_older_layouts().unwrap() > 0);
    assert_eq!(agent.remove_older_layouts().unwrap(), 0);
    eventually("only ours are in force", dialled, is(nix::Error::ENETUNREACH)).await;
    assert_eq!((older.exists(), ours.exists(), newer.exists()), (false, true, true));
    agent.forget_cgroup(cgroup.id()).unwrap();
    assert_eq!(dialled(), Err(nix::Error::ECONNREFUSED), "ours are in force");
    layouts::uninstall_all(&ours).unwrap();
    assert!(!bpffs.0.path().join("weir").exists(), "nothing is left, of any layout");
}

#[test]
fn an_agent_in_a_pod_passes_what_an_older_layout_has_left_in_force() {
    if load(Pinning::Unpinned).is_none() {
        return;
    }
    let bpffs = OwnBpffs::mount().unwrap();
    let [oldest, older, ours] = ["weir/v1", "weir/v2", "weir/v3"].map(|name| bpffs.0.path().join(name));
    let root = OwnCgroup::new("admitted");
    let (pod, other) = (root.below("agent"), root.below("other"));
    let netns = OwnNetns::new();
    let dialled =
        |cgroup: &OwnCgroup| dial(&cgroup.0, Some(&netns), Dial::Tcp(API4)).map(|_| ()).unwrap_err();
    let entry = |class| CgroupEntry { listener_netns: 0, class: class as u32, listener_port: 0 };
    for folder in [&oldest, &older] {
        let former = load(Pinning::Pinned(folder.clone())).unwrap();
        former.set_api_endpoint(API4, 0).unwrap();
        former.classify(root.id(), entry(Class::Container)).unwrap();
        former.attach(&root.0).unwrap();
    }
    let agent = load(Pinning::Pinned(ours)).unwrap();
    agent.set_api_endpoint(API4, 0).unwrap();
    agent.attach(&root.0).unwrap();
    for cgroup in [&pod, &other] {
        agent.classify(cgroup.id(), entry(Class::Agent)).unwrap();
        assert_eq!(dialled(cgroup), nix::Error::ECONNREFUSED, "a stranger to the former agents' programs");
    }
    assert_eq!(agent.admit_in_older_layouts(pod.id()).unwrap(), 2);
    assert_eq!(dialled(&pod), nix::Error::ENETUNREACH, "passes, and there is no route");
    assert_eq!(dialled(&other), nix::Error::ECONNREFUSED, "nobody else does");
    // Version 2 kept nothing, and has no such map.
    std::fs::remove_file(older.join("maps").join(maps::GENERATION)).unwrap();
    assert_eq!(agent.admit_in_older_layouts(other.id()).unwrap(), 2);
    let known = load(Pinning::Pinned(older)).unwrap().cgroups().unwrap();
    assert_eq!(known.get(&other.id()), Some(&entry(Class::Agent)));
}

/// An agent with another layout, which knows nothing of the pod yet, takes the place of what guards its interface.
pub(crate) fn take_the_place(
    pins: &Path,
    next: &Path,
    (server, interface): (SocketAddr, &str),
    arrives: &dyn Fn() -> bool,
) {
    let agent = load(Pinning::Pinned(next.to_owned())).unwrap();
    agent.set_api_endpoint(server, 0).unwrap();
    let dropped_by_next = || pinned_state(next).unwrap().unwrap().counters.interface_dropped;
    let index = nix::net::if_::if_nametoindex(interface).unwrap();
    let in_the_way = next.join(format!("links/interface-{index}"));
    std::fs::create_dir_all(&in_the_way).unwrap();
    agent.remove_older_layouts().unwrap_err();
    assert!(!arrives(), "what cannot be guarded anew keeps its guard");
    assert_eq!((pins.exists(), dropped_by_next()), (true, 0));
    std::fs::remove_dir(&in_the_way).unwrap();
    assert!(agent.inspect().unwrap().repaired.is_empty(), "it is not taken for guarded");
    assert!(agent.remove_older_layouts().unwrap() > 0);
    assert!(!arrives(), "guarded before the former guard went");
    assert_eq!((pins.exists(), dropped_by_next()), (false, 1));
}
