//! Host names of API servers: what they stand for changes while the agent runs, and pods are told so first.

use std::net::IpAddr;

use serde_json::json;
use weir_common::event::Kind;
use weir_tests::{
    AgentProcess, Coverage, Pod, PodSpec,
    agent::{self, TrustSource},
    audit,
    testbed::ENDPOINT_NAME,
    wait_until,
};

use super::{
    DEADLINE, Scene, escape,
    far_side::{FIRST, FarSide, SECOND, wait_for_record},
    shown, watch,
};

/// Where nothing listens.
const FORGED: &str = "10.244.0.249";

/// Whether the agent knows an address as an API server's.
fn is_known(agent: &AgentProcess, address: &str) -> anyhow::Result<bool> {
    let status = agent.status()?;
    let mut known = status["apiEndpoints"].as_array().into_iter().flatten();
    Ok(known.any(|known| *known == format!("{address}:443").as_str()))
}

/// kubectl as a pod uses it that was given an endpoint's name.
fn ask(pod: &Pod<'_>) -> (Option<i32>, String, String) {
    let folder = "/var/run/secrets/kubernetes.io/serviceaccount";
    let script = format!(
        "kubectl --server=https://{ENDPOINT_NAME}:443 --certificate-authority={folder}/ca.crt \
         --token=\"$(cat {folder}/token)\" --request-timeout=20s get namespace default -o name"
    );
    shown(&pod.exec(&["sh", "-c", &script]).unwrap())
}

#[test]
fn a_new_address_of_an_endpoint_is_no_way_out_for_the_pod_that_is_told_it_first() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-names", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-names", "caller")).unwrap();
    let own = pod.shell("hostname -i").unwrap().trim().parse::<IpAddr>().unwrap();
    let mut far_side = FarSide::new(escape::endpoint(&scene), scene.scratch.path());
    pod.shell(&format!("echo nameserver {FIRST} > /etc/resolv.conf")).unwrap();
    pod.install(&watch::program(), watch::PROGRAM).unwrap();
    wait_for_record(&pod, FIRST);

    // Without an agent the far side meets the pod: it is not blind, and the name leads to the API server.
    let first: IpAddr = FIRST.parse().unwrap();
    let expected = (Some(0), "namespace/default\n".to_owned(), String::new());
    assert_eq!(ask(&pod), expected);
    assert_eq!(far_side.came_from(own), [first]);
    let before = audit::finished_by_pod(&scene.testbed.layout().audit_log(), &pod.uid).unwrap().len();

    let mut configuration = agent::configuration(&scene.testbed, &scene.journal(), TrustSource::MountedCa);
    configuration["nameServers"] = json!([FIRST]);
    configuration["clusters"][0]["addresses"] = json!([format!("{ENDPOINT_NAME}:443")]);
    let path = scene.scratch.path().join("agent.yaml");
    agent::write_configuration(&configuration, &path).unwrap();
    let mut agent = AgentProcess::start(&path, &scene.scratch.path().join("agent.log")).unwrap();
    wait_until("the endpoint's address", DEADLINE, || Ok(is_known(&agent, FIRST)?.then_some(()))).unwrap();
    assert_eq!(ask(&pod), expected, "{}", agent.last_lines());
    assert!(far_side.came_from(own).is_empty());

    // The record lives for an hour: only what the pod is told can have the agent know of the new address.
    assert!(!is_known(&agent, SECOND).unwrap());
    far_side.record(SECOND);
    wait_for_record(&pod, SECOND);
    assert_eq!(ask(&pod), expected, "{}", agent.last_lines());
    wait_until("the proof", DEADLINE, || {
        let log = agent.log()?;
        let mut proven = log.lines().filter(|line| line.contains("is in the API set from now on"));
        Ok(proven.any(|line| line.contains(SECOND)).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", agent.last_lines()));
    assert!(is_known(&agent, SECOND).unwrap() && is_known(&agent, FIRST).unwrap());
    far_side.came_from(own);
    assert_eq!(ask(&pod), expected, "{}", agent.last_lines());
    for address in [FIRST, SECOND] {
        let said = pod.exec(&[watch::PROGRAM, "tcp", &format!("{address}:443")]).unwrap();
        assert_eq!(String::from_utf8_lossy(&said.stdout).trim(), "connected", "{address}");
    }
    assert!(far_side.came_from(own).is_empty());

    // A pod's forgery is found out, and makes nobody else's address an API server's.
    let marker = format!("{FIRST}:9");
    pod.exec(&[watch::PROGRAM, "forge", ENDPOINT_NAME, FORGED, &marker]).unwrap();
    wait_until("the forgery to be found out", DEADLINE, || {
        let found = agent.log()?.contains("an answer named an address that is none of this name's");
        Ok((found && !is_known(&agent, FORGED)?).then_some(()))
    })
    .unwrap();

    // Without the name server everything stays, and that is recorded once; a forgery has the agent ask it.
    far_side.end_name_server();
    pod.exec(&[watch::PROGRAM, "forge", ENDPOINT_NAME, "10.244.0.248", &marker]).unwrap();
    let unresolved = |event: &_| matches!(event, Kind::Finding { name, .. } if name == "hostNameUnresolved");
    scene.event("the name server's silence", |event| unresolved(&event.kind));
    assert!(is_known(&agent, SECOND).unwrap() && is_known(&agent, FIRST).unwrap());
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    let events = scene.events();
    assert_eq!(events.iter().filter(|event| unresolved(&event.kind)).count(), 1);

    // Every request of the pod that the API server saw has a record.
    let audited = audit::finished_by_pod(&scene.testbed.layout().audit_log(), &pod.uid).unwrap();
    let coverage = Coverage::compare(&audited[before..], &events, &pod.uid);
    assert!(coverage.is_complete(), "{coverage}");
}
