//! More than one cluster, and more than one machine: to whom an address belongs, and whose kubelet it is.

use serde_json::json;
use weir_common::event::Kind;
use weir_tests::{
    AgentProcess, PodSpec,
    agent::{self, TrustSource},
    wait_until,
};

use super::{
    DEADLINE, Scene,
    escape::{self, Attack, Target},
    far_side::{self, FarSide, SECOND},
    shown,
    watch::{PROGRAM, UDP, Watch, program, to_any},
    witness::Server,
};

#[test]
fn an_address_that_two_clusters_publish_is_the_firsts_and_that_is_recorded() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-two", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-two", "caller")).unwrap();
    let attack = Attack::new(&scene, &pod);
    let mut configuration =
        agent::configuration(&scene.testbed, &scene.journal(), TrustSource::ClusterSigner);
    // The same cluster by two names: both publish all of its addresses.
    let mut second = configuration["clusters"][0].clone();
    second["name"] = json!("second");
    configuration["clusters"].as_array_mut().unwrap().push(second);
    let path = scene.scratch.path().join("agent.yaml");
    agent::write_configuration(&configuration, &path).unwrap();
    let mut agent = AgentProcess::start(&path, &scene.scratch.path().join("agent.log")).unwrap();
    for target in [Target::Service, Target::Endpoint] {
        let address = attack.address(target);
        let said = format!("{address} is also published by cluster 0 ");
        scene.event("the address of two clusters in the record", |event| {
            event.cluster == "second"
                && matches!(&event.kind, Kind::Finding { name, message, .. }
                    if name == "addressOfTwoClusters" && message.starts_with(&said))
        });
        attack.direct();
        assert_eq!(attack.ask_by("tcp", target), ("connected".to_owned(), Vec::new()), "{target:?}");
    }
    assert_eq!(attack.witness.check(Server::Weir, Some(&agent)), 2);
    let ask = pod.exec(&["kubectl", "get", "namespace", "default", "-o", "name"]).unwrap();
    assert_eq!(shown(&ask).0, Some(0), "{}", agent.last_lines());
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    let events = scene.events();
    let opened = events.iter().filter(|event| matches!(event.kind, Kind::RequestOpened(_)));
    let clusters: std::collections::BTreeSet<_> = opened.map(|event| event.cluster.as_str()).collect();
    assert_eq!(clusters, ["testbed"].into(), "what goes to the address is the first cluster's");
}

/// A Node object of a machine without a kubelet of the testbed; gone with this value.
struct OtherNode<'a>(&'a Scene);

const OTHER: &str = "weir-other";
const KUBELET: u16 = 10_250;

impl<'a> OtherNode<'a> {
    fn make(scene: &'a Scene, address: &str) -> Self {
        let node = Self(scene);
        let object = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": OTHER}, "spec": {"unschedulable": true}});
        scene.testbed.apply(&object.to_string()).unwrap();
        let status = json!({"status": {
            "addresses": [{"type": "InternalIP", "address": address}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": KUBELET}},
        }});
        let patch =
            ["patch", "node", OTHER, "--subresource=status", "--type=merge", "-p", &status.to_string()];
        scene.testbed.kubectl(&patch).unwrap();
        node
    }
}

impl Drop for OtherNode<'_> {
    fn drop(&mut self) {
        let _ = self.0.testbed.kubectl(&["delete", "node", OTHER, "--ignore-not-found", "--wait=false"]);
    }
}

#[test]
fn an_enrolled_pod_reaches_the_kubelet_of_no_other_node() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-kubelets", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-kubelets", "caller")).unwrap();
    let program = program();
    pod.install(&program, PROGRAM).unwrap();
    let _far_side = FarSide::new(escape::endpoint(&scene), scene.scratch.path());
    let watch = Watch::start(&program, far_side::INTERFACE, "10.244.0.0");
    let kubelet = format!("{SECOND}:{KUBELET}");
    let try_way = |way: &str| {
        let out = pod.exec(&[PROGRAM, way, &kubelet]).unwrap();
        let seen = watch.until_marker(SECOND.parse().unwrap(), UDP, |marker| {
            pod.exec(&[PROGRAM, "udp-sendto", marker]).unwrap();
        });
        (String::from_utf8(out.stdout).unwrap().trim().to_owned(), to_any(seen, &[&kubelet]))
    };
    // Nobody listens there; that a packet comes to that machine is enough.
    for way in ["tcp", "raw"] {
        let (said, direct) = try_way(way);
        assert!(!direct.is_empty(), "{way} ({said}) was not seen");
    }
    let _node = OtherNode::make(&scene, SECOND);
    let agent = scene.agent(TrustSource::ClusterSigner);
    wait_until("the agent to know the other node's kubelet", DEADLINE, || {
        let status = agent.status()?;
        Ok(status.to_string().contains(&format!("\"{kubelet}\"")).then_some(()))
    })
    .unwrap();
    for (way, expected) in [
        ("tcp", "refused"),
        ("mapped", "refused"),
        ("io-uring", "refused"),
        ("udp-sendto", "refused"),
        ("raw", "failed EPERM"),
        ("raw-fragment", "failed EPERM"),
    ] {
        assert_eq!(try_way(way), (expected.to_owned(), Vec::new()), "{way}");
    }
    scene.event("the refused connection", |event| {
        matches!(&event.kind, Kind::ConnectionRefused { reason, .. } if reason.contains("no business with a kubelet"))
    });
}
