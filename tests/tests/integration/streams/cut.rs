//! Streams that are cut between the API server and the kubelet, which the API server ends in good order.

use std::process::Command;

use weir_common::event::{Channel, Event, Kind, Outcome};
use weir_tests::{Pod, command, wait_until};

use super::{
    super::{DEADLINE, Scene},
    lanes, opened, replayed,
};

/// How the command begins that runs until its stream is cut.
const BEGUN: &str = "begun-over-";

/// Kills the kubelet's connections, both ends of each: so a node's network goes, or a kubelet that is killed.
fn cut(scene: &Scene) {
    let port = "jsonpath={.items[0].status.daemonEndpoints.kubeletEndpoint.Port}";
    let port = scene.testbed.kubectl(&["get", "nodes", "-o", port]).unwrap();
    let filter = format!("sport = :{}", port.trim());
    command::run(Command::new("ss").args(["-K", "-Htn", "state", "established", &filter])).unwrap();
}

pub(super) fn what_is_cut_behind_the_api_server_is_not_complete(scene: &Scene, pod: &Pod<'_>) {
    let spoken = [("true", "websocket"), ("false", "SPDY/3.1")];
    for (websocket, _) in spoken {
        let exec =
            format!("kubectl exec -n it-streams caller -- sh -c 'echo {BEGUN}{websocket}; sleep 1000'");
        pod.shell(&format!("KUBECTL_REMOTE_COMMAND_WEBSOCKETS={websocket} {exec} >/dev/null 2>&1 &"))
            .unwrap();
    }
    let request = |events: &[Event], websocket: &str| {
        let found = opened(events, &format!("{BEGUN}{websocket}")).next()?.request.clone();
        found.filter(|request| lanes(events, request).contains_key(&(Channel::Stdout, None)))
    };
    let requests = wait_until("both streams to have begun", DEADLINE, || {
        let events = scene.events();
        Ok(spoken.map(|(websocket, _)| request(&events, websocket)).into_iter().collect::<Option<Vec<_>>>())
    })
    .unwrap();
    cut(scene);
    for (request, (_, spoken)) in requests.iter().zip(spoken) {
        let ended = scene.event("the end of a stream that was cut", |event| {
            event.request.as_ref() == Some(request) && matches!(event.kind, Kind::RequestClosed(_))
        });
        let Kind::RequestClosed(closed) = ended.kind else { unreachable!() };
        let status = lanes(&scene.events(), request).remove(&(Channel::Status, None)).unwrap_or_default();
        let status = String::from_utf8_lossy(&status).into_owned();
        assert_eq!(
            (closed.outcome, closed.exit_code),
            (Outcome::UpstreamFailed, None),
            "{spoken}: {:?} {status:?}",
            closed.reason
        );
        let transcript = replayed(scene, &["--request", request, "--transcript"]);
        assert!(transcript.contains("# no exit code: the API server failed"), "{spoken}: {transcript}");
    }
}
