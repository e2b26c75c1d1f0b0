//! The bundle for an engineer (`weir-agent support`): everything that helps, and no secret that lies on the node.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};
use weir_common::event::Kind;
use weir_tests::{AgentProcess, Pod, agent, command};

use super::{Scene, shown};

/// How every secret begins that is put where secrets are, and what is put where none may be.
const CANARY: &str = "CANARY-";

/// Files of a bundle.
struct Bundle(BTreeMap<String, String>);

impl Bundle {
    /// As an engineer gets it: from a file, unpacked.
    fn of(scratch: &Path, name: &str, config: &Path) -> Self {
        let (archive, folder) = (scratch.join(format!("{name}.tar.gz")), scratch.join(name));
        let mut support = Command::new(agent::built_binary("weir-agent").unwrap());
        support.args(["support", "--config"]).arg(config).arg("--output").arg(&archive);
        support.env("AWS_SECRET_ACCESS_KEY", format!("{CANARY}environment"));
        let (code, _, said) = shown(&command::output(&mut support).unwrap());
        assert_eq!(code, Some(0), "{said}");
        fs::create_dir(&folder).unwrap();
        command::run(Command::new("tar").arg("-xzf").arg(&archive).arg("-C").arg(&folder)).unwrap();
        let inner = fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
        let files = fs::read_dir(inner).unwrap().map(|entry| entry.unwrap().path());
        let read = |path: PathBuf| {
            (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read_to_string(path).unwrap())
        };
        Self(files.map(read).collect())
    }

    fn json(&self, name: &str) -> Value {
        serde_json::from_str(&self.0[name]).unwrap()
    }

    #[track_caller]
    fn holds_none_of(&self, secrets: &[String]) {
        for (name, text) in &self.0 {
            for secret in secrets {
                assert!(!text.contains(secret.as_str()), "{name} holds {secret:?}: {text}");
            }
        }
    }
}

/// Of an agent that serves metrics, and of a pod that it records.
pub(super) fn a_bundle_helps_and_holds_no_secret(scene: &Scene, agent: &AgentProcess, pod: &Pod<'_>) {
    let (scratch, recorded) = (scene.scratch.path(), format!("{CANARY}recorded"));
    let literal = format!("--from-literal=a={recorded}");
    let out = pod.exec(&["kubectl", "create", "configmap", "support", &literal]).unwrap();
    assert!(out.status.success(), "{}", agent.last_lines());
    let holds = |bytes: &[u8]| bytes.windows(recorded.len()).any(|part| part == recorded.as_bytes());
    scene.event("the object in the journal", |event| match &event.kind {
        Kind::Content(content) => content.bytes.to_vec().is_ok_and(|bytes| holds(&bytes)),
        _ => false,
    });

    let token = pod.shell("cat /var/run/secrets/kubernetes.io/serviceaccount/token").unwrap();
    let keys = scene.testbed.layout().path("pki");
    let mut secrets = vec![CANARY.to_owned(), token.trim().to_owned()];
    for name in ["ca.key", "agent.key"] {
        let key = fs::read_to_string(keys.join(name)).unwrap();
        secrets
            .extend(key.lines().filter(|line| line.len() > 40 && !line.contains("KEY")).map(str::to_owned));
    }
    assert!(token.len() > 100 && secrets.len() > 3);

    // As the agent has it, with what may stand in it and is nobody's business.
    let mut configuration: Value =
        serde_yaml_ng::from_str(&fs::read_to_string(agent.config()).unwrap()).unwrap();
    configuration["clusters"][0]["roles"] = json!([{"name": "r", "when": "true", "takes": ["token"], "assumeRole": {
        "roleArn": "arn:aws:iam::111122223333:role/a", "externalId": format!("{CANARY}external"),
        "eksCluster": {"name": "a", "region": "eu-west-1"},
    }}]);
    let path = scratch.join("support.yaml");
    let text = serde_yaml_ng::to_string(&configuration).unwrap();
    fs::write(&path, format!("# {CANARY}comment\n{text}")).unwrap();
    let bundle = Bundle::of(scratch, "valid", &path);
    bundle.holds_none_of(&secrets);
    let status = bundle.json("status.json");
    assert_eq!((&status["agent"]["pid"], &status["agent"]["ready"]), (&agent.pid().into(), &true.into()));
    let kernel = bundle.json("kernel.json");
    let cgroups = &kernel["maps"]["CGROUPS"];
    assert!(
        cgroups["entries"].as_u64() >= Some(2) && cgroups["entriesMax"].as_u64() > Some(100),
        "{cgroups}"
    );
    assert!(kernel["programs"].as_array().is_some_and(|programs| programs.len() > 10), "{kernel}");
    for (name, expected) in [
        ("README.txt", "configuration.yaml"),
        ("configuration.yaml", "weir.dev/v1alpha1"),
        ("node.txt", "cgroup2"),
        ("metrics.txt", "weir_ready 1"),
        ("ready.txt", "ready"),
        ("journal.txt", "mask.key"),
        ("log.txt", "kubectl -n NAMESPACE logs"),
        ("doctor.txt", "cluster testbed"),
    ] {
        assert!(bundle.0[name].contains(expected), "{name}: {}", bundle.0[name]);
    }

    // What keeps an agent from starting is when it is needed most.
    configuration["kafka"] = json!({"brokers": [format!("user:{CANARY}broker@kafka:9092")], "topic": "a",
        "properties": {"sasl.password": format!("{CANARY}password")}, format!("{CANARY}key"): 1});
    agent::write_configuration(&configuration, &path).unwrap();
    let bundle = Bundle::of(scratch, "invalid", &path);
    bundle.holds_none_of(&secrets);
    assert!(bundle.0["doctor.txt"].contains("unknown field"), "{}", bundle.0["doctor.txt"]);
    fs::write(&path, format!("kafka: [{CANARY}no-yaml")).unwrap();
    let bundle = Bundle::of(scratch, "no-yaml", &path);
    bundle.holds_none_of(&secrets);
    assert!(bundle.0["README.txt"].contains("is no YAML") && bundle.0.contains_key("status.json"));
}
