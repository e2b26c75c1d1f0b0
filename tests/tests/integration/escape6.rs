//! The ways around Weir over IPv6, to an API server with an IPv6 address on another machine: the real one behind a relay
//! that notes who comes, while a packet socket watches its port of the bridge.

use std::net::{IpAddr, SocketAddr};

use nix::sys::signal::Signal;
use weir_tests::{
    AgentProcess, PodSpec,
    agent::{self, TrustSource},
};

use super::{
    Scene,
    escape::{
        Expected::{self, Dropped, Proxied, Says},
        GUARDED, PROGRAM, REFUSED, Watch, endpoint, program,
    },
    far_side::{self, FarSide},
};

/// Given to the pod.
const POD6: &str = "fd00:10:244::7";

/// From an ordinary container.
const WAYS6: [(&str, Expected); 12] = [
    ("tcp", Proxied),
    ("bound", Proxied),
    ("nonblocking", Proxied),
    ("fastopen", Proxied),
    ("fastopen-connect", Proxied),
    ("io-uring", Proxied),
    ("mptcp", Says("failed EPROTONOSUPPORT")),
    ("udp", REFUSED),
    ("udp-sendto", REFUSED),
    ("raw", GUARDED),
    ("raw-protocol", GUARDED),
    ("frame", Dropped),
];

#[test]
fn no_way_over_ipv6_leads_around_weir() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-escape6", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-escape6", "caller")).unwrap();
    let program = program();
    pod.install(&program, PROGRAM).unwrap();
    let far_side = FarSide::new(endpoint(&scene), scene.scratch.path());
    far_side::give_v6_address(&pod, POD6);
    let watch = Watch::start(&program, far_side::INTERFACE, far_side::V6_NETWORK);
    let (api, own) = (far_side::V6.parse::<IpAddr>().unwrap(), POD6.parse::<IpAddr>().unwrap());
    let say = |way: &str, to: &str| {
        let out = pod.exec(&[PROGRAM, way, to]).unwrap();
        assert!(out.status.success(), "{way}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap().trim().to_owned()
    };
    let target = SocketAddr::new(api, 443).to_string();
    let try_way = |way: &str| {
        let said = say(way, &target);
        let seen = watch.until_marker(api, |marker| {
            say("udp-sendto", marker);
        });
        let direct: Vec<_> =
            seen.into_iter().filter(|packet| packet.starts_with(POD6) && packet.ends_with(" 443")).collect();
        (said, direct)
    };

    // Without an agent the far side sees them: neither the watch nor the relay is blind.
    for way in ["tcp", "udp-sendto", "raw", "raw-protocol", "frame"] {
        let (said, direct) = try_way(way);
        assert!(!direct.is_empty(), "{way} ({said}) was not seen");
    }
    assert_eq!(far_side.came_from(own), [api]);

    let mut configuration =
        agent::configuration(&scene.testbed, &scene.journal(), TrustSource::ClusterSigner);
    configuration["clusters"][0]["addresses"] = serde_json::json!([target]);
    let path = scene.scratch.path().join("agent.yaml");
    agent::write_configuration(&configuration, &path).unwrap();
    let mut agent = AgentProcess::start(&path, &scene.scratch.path().join("agent.log")).unwrap();
    let mut failed = Vec::new();
    for (way, expected) in &WAYS6 {
        let (said, direct) = try_way(way);
        println!("{way} over IPv6: {said}");
        if !expected.is(&said) || !direct.is_empty() {
            failed.push(format!("{way}: {said}; the far side saw {direct:?}"));
        }
    }
    assert!(failed.is_empty(), "{failed:#?}\n{}", agent.last_lines());

    // The listener at ::1 is neither shared nor taken, and dialled directly it closes.
    let status = agent.status().unwrap();
    let uid = pod.uid.as_str();
    let state = status["pods"].as_array().unwrap().iter().find(|state| state["uid"] == uid).unwrap();
    let port = &state["listenerPort"];
    for address in [format!("[::1]:{port}"), format!("[::]:{port}")] {
        assert_eq!(say("steal", &address), "failed EADDRINUSE", "{address}");
    }
    assert_eq!(say("tcp", &format!("[::1]:{port}")), "connected");
    scene.event("the direct dial", |event| {
        matches!(&event.kind, weir_common::event::Kind::ConnectionRefused { reason, .. }
            if reason.contains("past the kernel's redirect"))
    });

    agent.signal(Signal::SIGKILL).unwrap();
    agent.wait_for_end().unwrap();
    for (way, expected) in
        [("tcp", "refused"), ("udp-sendto", "refused"), ("raw", "failed EPERM"), ("frame", "sent")]
    {
        let (said, direct) = try_way(way);
        assert_eq!((said.as_str(), direct.len()), (expected, 0), "{way} after the agent died: {direct:?}");
    }
    assert!(far_side.came_from(own).is_empty());
}
