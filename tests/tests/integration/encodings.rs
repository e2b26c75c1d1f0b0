//! What few servers serve and few clients speak: CBOR, watches over WebSocket, tables with columns of custom resources, and
//! WebSockets that are refused, after which clients go on over SPDY. The API server is started again with the feature gates.

use std::thread;

use serde_json::json;
use weir_common::event::{Event, Kind};
use weir_tests::{
    AgentProcess, Clients, Coverage, Pod, PodSpec,
    agent::{self, TrustSource},
    audit,
    progress::Progress,
    wait_until,
};

use super::{
    DEADLINE, Scene,
    clients::{contains, in_base64, run_target},
    shown, verify,
    watched::{Watched, told},
};

/// The pods that are enrolled, and those that are not.
const NAMESPACES: [(&str, bool); 2] = [("it-encodings", true), ("it-encodings-free", false)];
/// client-go and kubectl, with the ports of their containers of the target.
const CLIENTS: [(&str, u16); 2] = [("go", 7003), ("kubectl", 7004)];
const BYTES: &str = "262151";
const CBOR: &str = "application/cbor";
/// Its column shows what a rule masks.
const THINGS: &str = r#"{"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
    "metadata": {"name": "things.weir.example"},
    "spec": {"group": "weir.example", "scope": "Namespaced", "names": {"plural": "things", "singular": "thing", "kind": "Thing"},
        "versions": [{"name": "v1", "served": true, "storage": true,
            "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}},
            "additionalPrinterColumns": [{"name": "Password", "type": "string", "jsonPath": ".spec.password"}]}]}}"#;

/// An agent that masks a field of ConfigMaps and one of a custom resource.
fn agent(scene: &Scene) -> AgentProcess {
    let mut configuration =
        agent::configuration(&scene.testbed, &scene.journal(), TrustSource::ClusterSigner);
    configuration["recording"]["masks"]["fields"] = json!([
        {"kinds": ["ConfigMap"], "paths": ["data.hidden"]},
        {"kinds": ["Thing"], "paths": ["spec.password"]},
    ]);
    let path = scene.scratch.path().join("agent.yaml");
    agent::write_configuration(&configuration, &path).unwrap();
    AgentProcess::start(&path, &scene.scratch.path().join("agent.log")).unwrap()
}

/// In each namespace what the clients work on, and a pod that they work in.
fn run_pods<'a>(scene: &'a Scene, programs: &Clients) -> [Pod<'a>; 2] {
    NAMESPACES.map(|(namespace, _)| {
        run_target(&scene.testbed, namespace, &CLIENTS);
        let spec = PodSpec { folders: programs.folders(), ..PodSpec::idle(namespace, "caller") };
        scene.testbed.run_pod(&spec).unwrap()
    })
}

/// What a command says in each pod, as far as it does not name the namespace; `NAMESPACE` in it is the pod's.
fn said(pods: &[Pod<'_>; 2], command: &[&str]) -> [(Option<i32>, String, String); 2] {
    let say = |pod: &Pod<'_>| {
        let words = ["timeout", "300"].into_iter().chain(command.iter().copied());
        let words: Vec<_> =
            words.map(|word| if word == "NAMESPACE" { pod.namespace.as_str() } else { word }).collect();
        let (code, out, err) = shown(&pod.exec(&words).unwrap());
        let neutral = |text: String| text.replace(&pod.namespace, "NAMESPACE");
        (code, neutral(out), neutral(err))
    };
    thread::scope(|scope| {
        let running = pods.each_ref().map(|pod| scope.spawn(move || say(pod)));
        running.map(|running| running.join().unwrap())
    })
}

/// The same in both pods, and done: each of these texts is said.
#[track_caller]
fn is_the_same(agent: &AgentProcess, said: &[(Option<i32>, String, String); 2], texts: &[&str]) {
    let [with, without] = said;
    assert_eq!((with.0, with), (Some(0), without), "{}", agent.last_lines());
    for text in texts {
        assert!(with.1.contains(text), "{text:?} is not in {}", with.1);
    }
}

/// The server's log and the record of the pod are one.
fn all_is_on_record(scene: &Scene, pod: &Pod<'_>) -> Coverage {
    let compare = || -> anyhow::Result<Coverage> {
        let audited = audit::finished_by_pod(&scene.testbed.layout().audit_log(), &pod.uid)?;
        Ok(Coverage::compare(&audited, &scene.events(), &pod.uid))
    };
    let compared = wait_until("the record and the audit log to agree", DEADLINE, || {
        let coverage = compare()?;
        Ok(coverage.is_complete().then_some(coverage))
    });
    compared.unwrap_or_else(|error| panic!("{error:#}\n{}", compare().unwrap()))
}

/// Nothing of what is secret is in any event, by whichever search; what is none is.
#[track_caller]
fn no_secret_is_on_record(events: &[Event], secrets: &[&str], visible: &str) {
    let texts = |event: &Event| {
        let mut texts = vec![serde_json::to_vec(event).unwrap()];
        if let Kind::Content(content) = &event.kind {
            texts.push(content.bytes.to_vec().unwrap());
        }
        texts
    };
    let all: Vec<_> = events.iter().flat_map(texts).collect();
    for secret in secrets {
        let mut hidden = vec![(*secret).to_owned()];
        hidden.extend(in_base64(secret));
        for text in &hidden {
            let found = all.iter().find(|event| contains(event, text.as_bytes()));
            assert!(found.is_none(), "{text} is in {}", String::from_utf8_lossy(found.unwrap()));
        }
    }
    assert!(all.iter().any(|event| contains(event, visible.as_bytes())), "{visible} is on record");
}

/// Each event that a watch told is on record: in CBOR over HTTP, and over WebSocket in JSON and CBOR, whose first event is the one there is.
#[track_caller]
fn watches_are_on_record(pod: &Pod<'_>, events: &[Event]) {
    for resource in ["configmaps", "secrets"] {
        let watches = Watched::find(events, resource, "client%3Dgo&");
        assert_eq!(watches.len(), 1, "client-go watches {resource}");
        watches[0].has_told(&told(pod, "go", resource));
    }
    for resource in ["configmaps", "secrets", "pods"] {
        let watches = Watched::find(events, resource, "metadata.name=watched&");
        assert_eq!(watches.len(), 6, "{resource}");
        // Protobuf over WebSocket is withheld: nothing tells its events apart.
        let told = told(pod, "watched", resource);
        watches[..4].iter().for_each(|watch| watch.has_told(&told));
    }
}

/// How many requests came in, and answers went out, in a media type that begins so.
fn in_media_type(events: &[Event], begins: &str) -> [usize; 2] {
    let is_it = |headers: &[weir_common::event::Header]| {
        headers.iter().any(|header| header.name == "content-type" && header.value.starts_with(begins))
    };
    let asked = events
        .iter()
        .filter(|event| matches!(&event.kind, Kind::RequestOpened(opened) if is_it(&opened.headers)));
    let answered = events
        .iter()
        .filter(|event| matches!(&event.kind, Kind::ResponseStarted { headers, .. } if is_it(headers)));
    [asked.count(), answered.count()]
}

#[test]
fn what_few_servers_serve_is_recorded_masked_and_no_client_notices() {
    let Some(mut scene) = Scene::new() else { return };
    let programs = Clients::install(Progress::Shown).unwrap();
    for (namespace, enrolled) in NAMESPACES {
        scene.namespace(namespace, enrolled);
    }
    let _gates = scene.testbed.with_feature_gates("CBORServingAndStorage=true").unwrap();
    let pods = run_pods(&scene, &programs);
    scene.testbed.apply(THINGS).unwrap();
    let mut running = agent(&scene);

    let (go, kubectl) = (Clients::binary("client-go"), "/bin/kubectl");
    let content_type = format!("CONTENT_TYPE={CBOR}");
    let in_cbor = [
        "env",
        &content_type,
        "KUBE_FEATURE_ClientsAllowCBOR=true",
        "KUBE_FEATURE_ClientsPreferCBOR=true",
        &go,
    ];
    let own = ["NAMESPACE", "go", "7003", BYTES];
    let spoken = said(&pods, &[&in_cbor[..], &own[..]].concat());
    is_the_same(
        &running,
        &spoken,
        &["visible-go-4", "informer told", "bytes out: [true", "ping-go", "logs -f"],
    );
    let script = Clients::source("encodings.sh");
    let spoken = said(&pods, &["sh", &script, kubectl, "NAMESPACE", &programs.python]);
    let seen: Vec<_> =
        ["frame 1, ADDED watched, it has the text: True", "frame 2, bytes, it has the text: True"].into();
    is_the_same(
        &running,
        &spoken,
        &[&seen[..], &["canary-column-4711", "a token of 2 dots", "true system:serviceaccount"]].concat(),
    );
    assert_eq!(spoken[0].1.matches("it has the text: True").count(), 18, "each watch: {}", spoken[0].1);
    println!("{}", all_is_on_record(&scene, &pods[0]));
    let token = pods[0].shell("cat /tmp/encodings/token").unwrap();
    assert!(token.len() > 100);
    let events = scene.events();
    watches_are_on_record(&pods[0], &events);
    let secrets = [
        "canary-go-4711",
        "canary-secret-4711",
        "canary-map-4711",
        "canary-variable-4711",
        "canary-column-4711",
        &token,
    ];
    no_secret_is_on_record(&events, &secrets, "visible-watched");
    for (media_type, least) in
        [(CBOR, [8, 20]), ("application/apply-patch+cbor", [2, 0]), ("application/cbor-seq", [0, 2])]
    {
        let [asked, answered] = in_media_type(&events, media_type);
        println!("{media_type}: {asked} requests, {answered} answers");
        assert!(
            asked >= least[0] && answered >= least[1],
            "{media_type}: {asked} requests, {answered} answers"
        );
    }
    // Of the ConfigMaps: what is no secret is there as JSON, whatever it was sent in.
    no_secret_is_on_record(&events, &[], "\"value\":\"visible-go-4\"");
    // Before the server cannot read CBOR any more.
    scene.testbed.kubectl(&["delete", "things", "--all", "--all-namespaces"]).unwrap();
    scene.testbed.kubectl(&["delete", "crd", "things.weir.example"]).unwrap();
    assert!(running.terminate().unwrap().success(), "{}", running.last_lines());
    let verified = verify(&scene.journal());
    assert!(verified.status.success(), "{:?}", shown(&verified));
}

#[test]
fn a_client_whose_websockets_are_refused_goes_on_over_spdy_and_is_recorded() {
    let Some(mut scene) = Scene::new() else { return };
    let programs = Clients::install(Progress::Shown).unwrap();
    for (namespace, enrolled) in NAMESPACES {
        scene.namespace(namespace, enrolled);
    }
    // Otherwise the kubelet translates what the API server does not.
    let _kubelet_gates = scene.testbed.with_kubelet_gates("ExtendWebSocketsToKubelet=false").unwrap();
    let gates = "TranslateStreamCloseWebsocketRequests=false,PortForwardWebsockets=false";
    let _gates = scene.testbed.with_feature_gates(gates).unwrap();
    let pods = run_pods(&scene, &programs);
    let mut running = agent(&scene);
    let script = Clients::source("kubectl.sh");
    let command = ["sh", &script, "/bin/kubectl", "NAMESPACE", "kubectl", "7004", BYTES, &programs.python];
    let spoken = said(&pods, &command);
    is_the_same(
        &running,
        &spoken,
        &["True True exit 5", "exit 3", "exit 4", "same", "ping-kubectl", "debugged through", "got one"],
    );
    println!("{}", all_is_on_record(&scene, &pods[0]));
    assert!(running.terminate().unwrap().success(), "{}", running.last_lines());
    let events = scene.events();
    let upgraded = |to: &str| {
        let is_it = |event: &&Event| match &event.kind {
            Kind::RequestOpened(opened) => opened
                .headers
                .iter()
                .any(|header| header.name == "upgrade" && header.value.eq_ignore_ascii_case(to)),
            _ => false,
        };
        events.iter().filter(is_it).count()
    };
    let (refused, spdy) = (upgraded("websocket"), upgraded("SPDY/3.1"));
    println!("{refused} WebSockets asked for, {spdy} streams over SPDY");
    assert!(refused >= 8 && spdy >= 8, "{refused} WebSockets asked for, {spdy} streams over SPDY");
    let verified = verify(&scene.journal());
    assert!(verified.status.success(), "{:?}", shown(&verified));
}
