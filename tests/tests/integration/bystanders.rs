//! Who is not enrolled: pods and processes of the host, which see no change whether an agent is there, is killed, or is gone.

use serde_json::json;
use weir_tests::{
    AgentProcess, PodSpec,
    agent::{self, TrustSource},
    testbed::ENDPOINT_NAME,
    wait_until,
};

use super::{
    DEADLINE, Scene,
    escape::{Attack, Target, endpoint},
    far_side::{self, FIRST, FarSide, V6},
    shown,
    watch::PROGRAM,
};

/// Given to the pod.
const POD6: &str = "fd00:10:244::9";

#[test]
fn what_is_not_enrolled_sees_no_change() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-bystander", false);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-bystander", "caller")).unwrap();
    let attack = Attack::new(&scene, &pod);
    // An address of the other family, and a name that the agent reads the answers about which pods get.
    let far_side = FarSide::new(endpoint(&scene), scene.scratch.path());
    far_side::give_v6_address(&pod, POD6);
    far_side::wait_for_record(&pod, FIRST);
    let over_v6 = format!("[{V6}]:443");
    let look = || {
        let ways = ["tcp", "mapped", "udp-sendto", "raw", "mptcp"];
        let seen = ways.map(|way| {
            let (said, direct) = attack.try_way(way, Target::Service);
            (way, said, direct.is_empty())
        });
        let kubelet = attack.try_way("tcp", Target::Kubelet).0;
        let host = attack.try_from(&[], "tcp").0;
        let answer = pod.exec(&["kubectl", "get", "namespace", "default", "-o", "name"]).unwrap();
        (seen, kubelet, host, shown(&answer))
    };
    let look_further = || {
        let said =
            ["tcp", "udp-sendto", "raw"].map(|way| shown(&pod.exec(&[PROGRAM, way, &over_v6]).unwrap()));
        let told = shown(&pod.exec(&["nslookup", ENDPOINT_NAME, FIRST]).unwrap());
        (said, told, far_side.came_from(POD6.parse().unwrap()))
    };
    let before = (look(), look_further());
    let (over_v4, ([tcp, ..], told, came)) = &before;
    assert!(over_v4.0.iter().all(|(_, _, none_seen)| !none_seen), "{before:?}");
    assert!(tcp.1 == "connected\n" && told.1.contains(FIRST) && came.len() == 1, "{before:?}");

    let mut configuration =
        agent::configuration(&scene.testbed, &scene.journal(), TrustSource::ClusterSigner);
    configuration["nameServers"] = json!([FIRST]);
    configuration["clusters"][0]["addresses"] = json!([over_v6, format!("{ENDPOINT_NAME}:443")]);
    let path = scene.scratch.path().join("agent.yaml");
    agent::write_configuration(&configuration, &path).unwrap();
    let mut agent = AgentProcess::start(&path, &scene.scratch.path().join("agent.log")).unwrap();
    wait_until("the name's address", DEADLINE, || {
        Ok(agent.status()?.to_string().contains(&format!("\"{FIRST}:443\"")).then_some(()))
    })
    .unwrap();
    assert_eq!((look(), look_further()), before, "while it runs");
    agent.crash().unwrap();
    assert_eq!((look(), look_further()), before, "after it was killed");
    agent.uninstall().unwrap();
    assert_eq!((look(), look_further()), before, "after everything is gone");
}
