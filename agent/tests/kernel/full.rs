//! Maps that are full, a ring buffer that nobody reads, cgroups that are gone under what was attached to them: nothing of
//! it opens a way, and what it takes of memory is bounded.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    process::{Child, Command, Stdio},
};

use aya::maps::{HashMap, Map, MapData};
use weir_agent::interception::{
    listener::Listener, listener::Namespace, loader::Pinning, pinned::pinned_state,
};
use weir_common::kernel::{
    API_ENDPOINTS_MAX, ApiEndpoint, CGROUPS_MAX, CgroupEntry, Class, FLOWS_MAX, FlowKey, FlowRecord, maps,
    programs,
};

use crate::{
    pins::OwnBpffs,
    world::{API4, DEADLINE, Dial, OwnCgroup, OwnNetns, dial, load},
};

const REFUSED: nix::Error = nix::Error::ECONNREFUSED;
/// What who passes sees, in a namespace without a route.
const PASSED: nix::Error = nix::Error::ENETUNREACH;
/// What the maps may take with as many addresses and pods as they have room for, on a machine with few CPUs, bytes.
const FULL_BYTES_MAX: u64 = 40 * 1024 * 1024;

fn entry(class: Class) -> CgroupEntry {
    CgroupEntry { listener_netns: 0, class: class as u32, listener_port: 0 }
}

#[test]
fn full_maps_deny_what_has_no_room_in_them_and_keep_the_rest_in_force() {
    if load(Pinning::Unpinned).is_none() {
        return;
    }
    let bpffs = OwnBpffs::mount().unwrap();
    let pins = bpffs.0.path().join("weir/v3");
    let kernel = load(Pinning::Pinned(pins.clone())).unwrap();
    let (root, netns) = (OwnCgroup::new("full"), OwnNetns::new());
    let (known, late) = (root.below("known"), root.below("late"));
    let dialled = |cgroup: &OwnCgroup, to| dial(&cgroup.0, Some(&netns), Dial::Tcp(to)).map(|_| ());
    kernel.set_api_endpoint(API4, 0).unwrap();
    kernel.attach(&root.0).unwrap();
    kernel.classify(known.id(), entry(Class::Unselected)).unwrap();

    // Of both families, as many as there is room for beside the first.
    let address = |number: u32| match number % 2 {
        0 => SocketAddr::from((Ipv4Addr::from(0x0b00_0000 + number), 443)),
        _ => SocketAddr::from((
            Ipv6Addr::from(0x2001_0db8_0000_0000_0000_0000_0000_0000 + u128::from(number)),
            443,
        )),
    };
    let (last, refused) = (1..=API_ENDPOINTS_MAX)
        .find_map(|number| Some((number, kernel.set_api_endpoint(address(number), 0).err()?)))
        .unwrap();
    // Each address takes two entries. The kernel counts on each CPU for itself, and is a little early.
    assert!(last > API_ENDPOINTS_MAX / 200 * 99, "it is full with {last}: {refused:?}");
    let more = address(last);
    assert!(kernel.set_api_endpoint(more, 0).is_err(), "it is full");
    for known in [API4, address(1), address(last - 1)] {
        kernel.set_api_endpoint(known, 0).unwrap();
        assert_eq!(dialled(&late, known), Err(REFUSED), "{known}");
    }
    kernel.remove_api_endpoint(address(1)).unwrap();
    kernel.set_api_endpoint(more, 0).unwrap();
    assert_eq!(dialled(&late, more), Err(REFUSED), "there is room again");

    let there = u32::try_from(kernel.cgroups().unwrap().len()).unwrap();
    let classify = |number: u32| kernel.classify(u64::MAX - u64::from(number), entry(Class::Enrolled));
    let (pods, refused) =
        (there..=CGROUPS_MAX).find_map(|number| Some((number, classify(number).err()?))).unwrap();
    assert!(pods > CGROUPS_MAX / 100 * 99, "it is full with {pods}: {refused:?}");
    assert!(kernel.classify(late.id(), entry(Class::Unselected)).is_err(), "it is full");
    assert_eq!(dialled(&late, API4), Err(REFUSED), "without a verdict");
    assert_eq!(dialled(&known, API4), Err(PASSED), "a known pod keeps its verdict");
    kernel.classify(known.id(), entry(Class::Enrolled)).unwrap();
    assert_eq!(dialled(&known, API4), Err(REFUSED), "and may be given another");
    kernel.forget_cgroup(u64::MAX - u64::from(there)).unwrap();
    kernel.classify(late.id(), entry(Class::Unselected)).unwrap();
    assert_eq!(dialled(&late, API4), Err(PASSED), "there is room again");

    let bytes: u64 = pinned_state(&pins).unwrap().unwrap().map_bytes.values().sum();
    let cpus = std::thread::available_parallelism().unwrap();
    println!("maps with {last} addresses and {pods} pods: {bytes} bytes, {cpus} CPUs");
    assert!(bytes < FULL_BYTES_MAX, "{bytes}");
}

#[tokio::test]
async fn a_full_flow_map_forgets_old_flows_and_serves_the_newest() {
    if load(Pinning::Unpinned).is_none() {
        return;
    }
    let bpffs = OwnBpffs::mount().unwrap();
    let pins = bpffs.0.path().join("weir/v3");
    let kernel = load(Pinning::Pinned(pins.clone())).unwrap();
    let (cgroup, netns) = (OwnCgroup::new("flows"), OwnNetns::new());
    kernel.set_api_endpoint(API4, 0).unwrap();
    kernel.attach(&cgroup.0).unwrap();
    let listener = Listener::in_netns(Namespace::of_process(netns.pid()).unwrap()).unwrap();
    let enrolled = CgroupEntry {
        listener_netns: listener.netns(),
        class: Class::Enrolled as u32,
        listener_port: u32::from(listener.port()),
    };
    kernel.classify(cgroup.id(), enrolled).unwrap();
    let dialled = || dial(&cgroup.0, Some(&netns), Dial::Tcp(API4)).map(|_| ());
    let accepted = async || {
        let (stream, from) = listener.accept().await.unwrap();
        kernel.take_flow(listener.netns(), from, stream.local_addr().unwrap())
    };
    dialled().unwrap();
    // Twice as many as it has room for: connections that nobody has accepted, as a flood would leave them.
    let map = Map::LruHashMap(MapData::from_pin(pins.join("maps").join(maps::FLOWS)).unwrap());
    let mut flows = HashMap::<_, FlowKey, FlowRecord>::try_from(map).unwrap();
    let key = |number| FlowKey {
        netns: listener.netns() + 1,
        client: [0; 16],
        listener: [0; 16],
        client_port: number,
        listener_port: 1,
    };
    for number in 0..2 * FLOWS_MAX {
        let none = ApiEndpoint { address: [0; 16], port: 0 };
        let record = FlowRecord {
            original: none,
            cluster: 0,
            cgroup: 1,
            pod_cgroup: 1,
            netns: key(number).netns,
            connected_boottime_ns: 1,
            tgid: 1,
            uid: 0,
        };
        flows.insert(key(number), record, 0).unwrap();
    }
    let old = (0..FLOWS_MAX).filter(|number| flows.get(&key(*number), 0).is_ok()).count();
    assert!(old < FLOWS_MAX as usize / 100, "each CPU keeps a few for a while: {old}");
    // Forgotten, the agent closes it; not, it is what it was.
    if let Some(flow) = accepted().await {
        assert_eq!((flow.original, flow.record.cgroup), (API4, cgroup.id()));
    }
    for _ in 0..100 {
        dialled().unwrap();
        let flow = accepted().await.expect("the newest has its place");
        assert_eq!((flow.original, flow.record.cgroup), (API4, cgroup.id()));
    }
}

/// A process that connects again and again.
struct Restless(Child);

impl Drop for Restless {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn what_nobody_reads_any_more_is_denied_all_the_same() {
    let Some(kernel) = load(Pinning::Unpinned) else { return };
    let (cgroup, netns) = (OwnCgroup::new("unread"), OwnNetns::new());
    kernel.set_api_endpoint(API4, 0).unwrap();
    kernel.attach(&cgroup.0).unwrap();
    let connecting = format!("while true; do : < /dev/tcp/{}/{}; done", API4.ip(), API4.port());
    let mut nsenter = Command::new("nsenter");
    nsenter.args(["-t", &netns.pid().to_string(), "-n", "bash", "-c", &connecting]);
    let restless = Restless(nsenter.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    cgroup.take(restless.0.id());
    let lost = async {
        while kernel.counters().unwrap().notices_lost == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(DEADLINE, lost).await.unwrap();
    drop(restless);
    let dialled = || dial(&cgroup.0, Some(&netns), Dial::Tcp(API4)).map(|_| ());
    assert_eq!(dialled(), Err(REFUSED));
    // Nor is who is redirected kept from it.
    let listener = Listener::in_netns(Namespace::of_process(netns.pid()).unwrap()).unwrap();
    let enrolled = CgroupEntry {
        listener_netns: listener.netns(),
        class: Class::Enrolled as u32,
        listener_port: u32::from(listener.port()),
    };
    kernel.classify(cgroup.id(), enrolled).unwrap();
    assert_eq!(dialled(), Ok(()));
}

#[test]
fn links_to_a_cgroup_that_is_gone_are_made_anew_at_the_one_that_took_its_place() {
    if load(Pinning::Unpinned).is_none() {
        return;
    }
    let bpffs = OwnBpffs::mount().unwrap();
    let pins = bpffs.0.path().join("weir/v3");
    let netns = OwnNetns::new();
    let former = load(Pinning::Pinned(pins.clone())).unwrap();
    former.set_api_endpoint(API4, 0).unwrap();
    let gone = OwnCgroup::new("gone");
    let id = gone.id();
    former.attach(&gone.0).unwrap();
    drop((former, gone));
    // As if the new one had the number of the old.
    let cgroup = OwnCgroup::new("gone");
    for program in programs::GUARD_AND_HOOKS {
        let link = |id: u64| pins.join(format!("links/{id}-{program}"));
        std::fs::rename(link(id), link(cgroup.id())).unwrap();
    }
    let agent = load(Pinning::Pinned(pins.clone())).unwrap();
    let dialled = || dial(&cgroup.0, Some(&netns), Dial::Tcp(API4)).map(|_| ());
    assert_eq!(dialled(), Err(PASSED), "the pins look whole, and enforce nothing");
    agent.attach(&cgroup.0).unwrap();
    assert_eq!(dialled(), Err(REFUSED));
    assert!(agent.inspect().unwrap().repaired.is_empty());
    assert_eq!(pinned_state(&pins).unwrap().unwrap().links.len(), programs::GUARD_AND_HOOKS.len());
}
