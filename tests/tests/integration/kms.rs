//! Content that is encrypted with a key of AWS KMS: the agent on the node, an implementation of KMS by others, and the built `weir`.

use std::{path::Path, process::Command};

use serde_json::{Value, json};
use weir_common::event::Kind;
use weir_tests::{
    AgentProcess, KeyService, PodSpec,
    agent::{self, TrustSource},
    command,
    progress::Progress,
    wait_until,
};

use super::{DEADLINE, Scene, client::Requests, kafka::epochs, shown, verify};

const CANARY: &str = "canary-of-kms-4711";

/// `weir` where KMS is `service`, unless `other` says otherwise, and what it prints in both streams.
fn weir(service: &KeyService, other: &[(&str, &str)], arguments: &[&str]) -> (Option<i32>, String) {
    let mut weir = Command::new(agent::built_binary("weir").unwrap());
    weir.envs(service.environment()).envs(other.iter().copied()).args(arguments);
    let (code, out, err) = shown(&command::output(&mut weir).unwrap());
    (code, format!("{out}{err}"))
}

/// The agent with the key of `service`.
fn encrypting(scene: &Scene, service: &KeyService) -> AgentProcess {
    let mut configuration =
        agent::configuration(&scene.testbed, &scene.journal(), TrustSource::ClusterSigner);
    configuration["recording"] = json!({"encryption": {"kms": {"key": service.key()}}});
    let path = scene.scratch.path().join("agent.yaml");
    agent::write_configuration(&configuration, &path).unwrap();
    let environment = service.environment();
    let environment: Vec<_> = environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let log = scene.scratch.path().join("agent.log");
    let mut agent = AgentProcess::spawn_with(&path, &log, &environment).unwrap();
    agent.wait_until_ready().unwrap();
    agent
}

#[track_caller]
fn check_refused(requests: &mut Requests) {
    let refused = requests.create("while-kms-is-away", 10);
    assert_eq!(refused.status, 503, "{}", refused.head);
    let status: Value = serde_json::from_slice(&refused.body).unwrap();
    let said = status["message"].as_str().unwrap();
    assert!(said.contains("so it is not forwarded: ") && said.contains("key service (AWS KMS)"), "{said}");
}

/// No file of the journal has the text.
#[track_caller]
fn check_unreadable(journal: &Path) {
    for file in std::fs::read_dir(&epochs(journal)[0]).unwrap() {
        let path = file.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        assert!(!bytes.windows(CANARY.len()).any(|part| part == CANARY.as_bytes()), "{}", path.display());
    }
}

#[test]
fn content_is_for_whoever_may_use_the_key_of_kms_and_without_kms_nothing_new_is_forwarded() {
    let Some(mut scene) = Scene::new() else { return };
    let mut service = KeyService::start(Progress::Shown).unwrap();
    scene.namespace("it-kms", true);
    let [first, second] =
        ["first", "second"].map(|name| scene.testbed.run_pod(&PodSpec::idle("it-kms", name)).unwrap());
    let mut agent = encrypting(&scene, &service);
    // As text: kubectl's own are in protobuf.
    let one =
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "one"}, "data": {"a": CANARY}});
    let create = format!("echo '{one}' | kubectl create --raw /api/v1/namespaces/it-kms/configmaps -f -");
    first.shell(&create).unwrap();

    // Away: who has a key goes on, and who needs none; nothing is forwarded whose content nobody could be given a key for.
    service.stop().unwrap();
    let mut others = Requests::new(&scene.testbed, &second);
    check_refused(&mut others);
    assert_eq!(others.read().status, 200);
    assert_eq!(Requests::new(&scene.testbed, &first).create("two", 10).status, 201);
    assert!(scene.testbed.kubectl(&["get", "configmap", "-n", "it-kms", "while-kms-is-away"]).is_err());
    // Back.
    service.restart().unwrap();
    wait_until("the key service to be found again", DEADLINE, || {
        Ok((others.create("three", 10).status == 201).then_some(()))
    })
    .unwrap();
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());

    let (key, journal) = (service.key(), scene.journal());
    let from = journal.to_str().unwrap();
    let events = |arguments: &[&str]| weir(&service, &[], &[&["events", "--from", from], arguments].concat());
    let sound = || {
        let verified = verify(&journal);
        assert!(verified.status.success(), "{:?}", shown(&verified));
    };
    check_unreadable(&journal);
    let (code, read) = events(&["--kms", &key]);
    assert!(code == Some(0) && read.contains(CANARY), "{read}");
    let (_, plain) = events(&[]);
    assert!(plain.contains("\"encrypted\":{\"key\":1,") && !plain.contains(CANARY), "{plain}");
    sound();

    // Neither a disabled key reads, nor one that is asked for where others could listen.
    service.enable(false).unwrap();
    let (_, said) = events(&["--kms", &key]);
    assert!(said.contains("is it disabled") && !said.contains(CANARY), "{said}");
    service.enable(true).unwrap();
    for variable in ["AWS_ENDPOINT_URL_KMS", "AWS_ENDPOINT_URL"] {
        let arguments = ["events", "--from", from, "--kms", &key];
        let (_, said) = weir(&service, &[(variable, "http://192.0.2.1:9")], &arguments);
        assert!(said.contains("http://192.0.2.1 is not https") && !said.contains(CANARY), "{said}");
    }

    // Erased: all that the first session said, and only that.
    std::fs::remove_file(epochs(&journal)[0].join("00000000000000000001.key")).unwrap();
    let (_, said) = events(&["--kms", &key]);
    assert!(said.contains("it was erased") && !said.contains(CANARY), "{said}");
    assert!(said.contains("\\\"three\\\""), "others are read as before: {said}");
    sound();
    let opened = |name: &str| {
        scene
            .events()
            .iter()
            .any(|event| matches!(&event.kind, Kind::RequestOpened(opened) if opened.attributes.verb == name))
    };
    assert!(opened("create") && opened("get"), "who did what is read without any key");
}
