//! Where a privileged process can put itself: into a pod's network and cgroup, below, beside and outside of them, before or
//! after its socket is made.

use weir_tests::{Pod, PodSpec, agent::TrustSource};

use super::{
    Scene,
    escape::{
        Attack,
        Expected::{self, Dropped, Proxied},
        Folder, GUARDED, REFUSED, place,
    },
    watch::PROGRAM,
    witness::Server,
};

/// Where a privileged process puts itself, from outside of all pods.
#[derive(Clone, Copy, Debug)]
pub(super) enum Put {
    Network,
    /// Another pod's.
    OtherNetwork,
    Cgroup,
    /// A cgroup below the pod's.
    Below,
    /// One beside all pods, as docker makes them.
    Sibling,
    /// Into the cgroup only with the socket, made or handed over.
    Late,
    /// With the socket out of the cgroup, to the one beside all pods.
    Left,
    /// The same, to the root of all cgroups.
    LeftToRoot,
}

use Put::{Below, Cgroup, Late, Left, LeftToRoot, Network, OtherNetwork, Sibling};

/// What no hook at a socket meets.
const TUN: &str = "forwarded";

/// The socket may be of the host's cgroup, made before the move or handed over: the calling task counts.
pub(super) const PLACES: [(&str, &[Put], &str, Expected); 19] = [
    ("made-before-the-move", &[Network, Cgroup, Late], "tcp", Proxied),
    ("accepted-and-used-again", &[Network, Cgroup, Late], "unspec-accepted", Proxied),
    ("handed-over", &[Network, Cgroup, Late], "passed", Proxied),
    ("handed-over-from-the-host", &[Cgroup, Late], "passed", REFUSED),
    ("child-cgroup", &[Network, Below], "tcp", Proxied),
    ("marked", &[Network, Cgroup], "mark", Proxied),
    ("sibling-cgroup", &[Network, Sibling], "tcp", REFUSED),
    ("sibling-cgroup-again", &[Network, Sibling], "unspec-accepted", REFUSED),
    ("sibling-cgroup-raw", &[Network, Sibling], "raw", GUARDED),
    ("no-cgroup", &[Network], "tcp", REFUSED),
    ("no-cgroup-again", &[Network], "unspec-accepted", REFUSED),
    ("no-cgroup-raw", &[Network], "raw", GUARDED),
    ("left", &[Network, Cgroup, Left], "tcp", REFUSED),
    ("left-to-the-root", &[Network, Cgroup, LeftToRoot], "tcp", REFUSED),
    ("left-again", &[Network, Cgroup, Left], "unspec-accepted", REFUSED),
    ("left-raw", &[Network, Cgroup, LeftToRoot], "raw", GUARDED),
    ("another-network", &[OtherNetwork, Cgroup], "tcp", REFUSED),
    ("another-network-raw", &[OtherNetwork, Cgroup], "raw", GUARDED),
    // Through an interface of its own: no socket sends it.
    (TUN, &[Network, Cgroup], "tun", Dropped),
];

/// The places of a pod.
pub(super) struct Places {
    own: String,
    root: String,
    network: String,
    other_network: String,
    below: Folder,
    sibling: Folder,
}

impl Places {
    pub(super) fn new(pod: &Pod<'_>, other: &Pod<'_>) -> Self {
        let [(own, network), (_, other_network)] = [pod, other].map(place);
        let root = own.ancestors().find(|folder| !folder.join("cgroup.events").exists()).unwrap();
        let sibling = Folder::new(root.join(format!("docker-weir-{}.scope", pod.namespace)));
        let below = Folder::new(own.join("child"));
        let [own, root] = [&own, root].map(|path| path.to_str().unwrap().to_owned());
        Self { own, root, network, other_network, below, sibling }
    }

    /// In the words of the program.
    pub(super) fn words(&self, puts: &[Put]) -> Vec<&str> {
        let words = puts.iter().map(|put| match put {
            Network => vec!["--netns", &self.network],
            OtherNetwork => vec!["--netns", &self.other_network],
            Cgroup => vec!["--cgroup", &self.own],
            Below => vec!["--cgroup", self.below.path()],
            Sibling => vec!["--cgroup", self.sibling.path()],
            Late => vec!["--late"],
            Left => vec!["--leave", self.sibling.path()],
            LeftToRoot => vec!["--leave", &self.root],
        });
        words.flatten().collect()
    }
}

#[test]
fn no_place_that_a_privileged_process_puts_itself_into_leads_around_weir() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-places", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-places", "caller")).unwrap();
    let other = scene.testbed.run_pod(&PodSpec::idle("it-places", "other")).unwrap();
    let attack = Attack::new(&scene, &pod);
    let places = Places::new(&pod, &other);
    // Without an agent the far side sees it.
    let (_, puts, way, _) = PLACES.iter().find(|(name, ..)| *name == TUN).unwrap();
    let (said, direct) = attack.try_from(&places.words(puts), way);
    assert!(said == "sent" && !direct.is_empty(), "{way} ({said}) was not seen");
    let agent = scene.agent(TrustSource::ClusterSigner);
    for (name, puts, way, expected) in &PLACES {
        let (said, direct) = attack.try_from(&places.words(puts), way);
        assert!(expected.is(&said), "{name}: {said}: {}", agent.last_lines());
        assert!(direct.is_empty(), "{name}: the far side saw {direct:?}");
    }
    assert_eq!(attack.witness.check(Server::Weir, Some(&agent)), 5);
    assert_eq!(attack.witness.direct(), 0, "requests that the API server had from the pod itself");
    // The listener's port is neither shared nor taken, and dialled directly it closes.
    let status = agent.status().unwrap();
    let uid = pod.uid.as_str();
    let state = status["pods"].as_array().unwrap().iter().find(|state| state["uid"] == uid).unwrap();
    let listener = format!("127.0.0.1:{}", state["listenerPort"]);
    let say = |way: &str| {
        let out = pod.exec(&[PROGRAM, way, &listener]).unwrap();
        String::from_utf8(out.stdout).unwrap().trim().to_owned()
    };
    assert_eq!(say("steal"), "failed EADDRINUSE");
    assert_eq!(say("ask"), "closed");
    scene.event("the direct dial", |event| {
        matches!(&event.kind, weir_common::event::Kind::ConnectionRefused { reason, .. }
            if reason.contains("past the kernel's redirect"))
    });
}
