//! Trust tier T1 of the chart on the node, a part of the chart's test: the agent's CA is one that no pod holds, and pods that are
//! made from then on are given a bundle wherever they mount the cluster's. Clients in Go, Python and Node verify with it, unchanged;
//! in a pod that was there before they refuse the agent.

use std::{collections::BTreeSet, fs, path::Path, thread};

use serde_json::{Value, json};
use weir_common::event::Kind;
use weir_tests::{Clients, Pod, PodSpec, agent, command, wait_until};

use super::{
    DEADLINE,
    chart::{JOURNAL, NAMESPACE, Release, runbook},
    guides::with_kubectl,
    shown,
};

/// Each with what it says of a server whose CA it does not hold.
const CLIENTS: [(&str, &str); 3] = [
    ("go", "x509: certificate signed by unknown authority"),
    ("python", "CERTIFICATE_VERIFY_FAILED"),
    ("node", "unable to verify the first certificate"),
];

/// The release is installed; `before` is a pod of `it-chart`, with the clients' folders.
pub(super) fn is_given_where_pods_would_not_trust_the_agent(
    release: &Release<'_>,
    clients: &Clients,
    before: &Pod<'_>,
) {
    let bundle = is_asked_for(release);
    volumes_name_it(release);
    is_all_that_pods_verify_with(release, clients, before, &bundle);
    let examined = release.in_agent(&["weir-agent", "doctor", "--config", "/etc/weir/config/agent.yaml"]);
    let (code, said, _) = shown(&examined);
    assert!(code == Some(0) && said.contains("tier T1: mounted CA"), "{said}");
    ones_that_are_none_are_named(release);
}

/// Certificates that are none, of Weir's CA and of the brokers': Helm fails, and what the agent said is in the status of its pod, in which no
/// command can be run; the former agent goes on. The next step finds the release like that.
fn ones_that_are_none_are_named(release: &Release<'_>) {
    let text = fs::read_to_string(release.scratch.join("values.json")).unwrap();
    let values: Value = serde_json::from_str(&text).unwrap();
    let key = values["config"]["clusters"][0]["trust"]["mountedCa"]["key"].as_str().unwrap().to_owned();
    let of_weir = format!("config.clusters[0].trust.mountedCa.certificate={key}");
    let of_brokers = format!(
        "config.kafka={}",
        json!({"brokers": ["kafka.example:9093"], "topic": "weir",
            "properties": {"security.protocol": "SSL", "ssl.ca.location": key}})
    );
    for (option, wrong, said) in [
        (
            "--set-string",
            of_weir,
            format!("{key} is not a PEM file with the certificate of the CA that signs"),
        ),
        (
            "--set-json",
            of_brokers,
            format!("kafka.properties.ssl.ca.location: {key} cannot be used (ssl.ca.location failed"),
        ),
    ] {
        let mut upgrade = release.to_apply("upgrade", &["startupTaint=true"]);
        let (code, out, error) =
            shown(&command::output(upgrade.args([option, &wrong, "--timeout=3s"])).unwrap());
        assert!(code == Some(1) && error.contains("deadline"), "{code:?} {out}{error}");
        let statuses = || {
            let pods = release.pods();
            pods.iter().map(|pod| pod["status"]["containerStatuses"].to_string()).collect::<Vec<_>>()
        };
        let named = wait_until("the pod's status to say why", DEADLINE, || {
            let says = |told: &String| told.contains(&said) && told.contains("\"exitCode\":1");
            Ok(statuses().into_iter().find(says))
        });
        assert!(named.is_ok(), "{said}: {:?}\n{}", statuses(), release.told());
        assert!(statuses().iter().any(|told| told.contains("\"ready\":true")), "{:?}", statuses());
    }
}

/// A CA of one's own, and the values that have pods trust it, as the runbook says, by its own words; gives the bundle.
fn is_asked_for(release: &Release<'_>) -> String {
    let [make, values, upgrade] = blocks_of_the_runbook();
    let folder = release.scratch.join("own-ca");
    fs::create_dir(&folder).unwrap();
    command::run(with_kubectl(release.testbed, &make).current_dir(&folder)).unwrap();
    let left: BTreeSet<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(
        left,
        BTreeSet::from(["bundle.crt".into(), "tls.crt".into()]),
        "the key is in the Secret alone"
    );
    let bundle = fs::read_to_string(folder.join("bundle.crt")).unwrap();
    let mut given: Value = serde_yaml_ng::from_str(&values).unwrap();
    assert_eq!(given["trustBundle"]["namespaces"], json!(["ci"]));
    given["trustBundle"]["namespaces"] = json!(["it-chart"]);
    let path = release.scratch.join("values.json");
    let mut values: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    values["config"]["clusters"] = given["config"]["clusters"].take();
    values["trustBundle"] = given["trustBundle"].take();
    values["secrets"].as_array_mut().unwrap().append(given["secrets"].as_array_mut().unwrap());
    fs::write(&path, values.to_string()).unwrap();
    let mut upgrade = release.of_the_runbook(upgrade.trim());
    upgrade.args(["--set", "startupTaint=true"]).current_dir(&folder);
    release.must(upgrade);
    // For those that come after it.
    values["trustBundle"]["certificates"] = json!(bundle);
    fs::write(&path, values.to_string()).unwrap();
    bundle
}

/// How the CA and the bundle are made, the values, and the upgrade.
fn blocks_of_the_runbook() -> [String; 3] {
    let text = runbook();
    let section = text.split("\n### ").find(|section| section.contains("(tier T1)\n")).unwrap();
    let blocks = section.split("\n\n").filter(|block| block.starts_with("    "));
    let blocks: Vec<_> = blocks.map(|block| block.replace("\n    ", "\n").trim_start().to_owned()).collect();
    blocks.try_into().unwrap_or_else(|blocks| panic!("{blocks:?}"))
}

/// However a pod mounts the cluster's CA, once the policy is in force.
fn volumes_name_it(release: &Release<'_>) {
    let mounts = |namespace: &str| {
        let everything = json!([
            {"name": "plain", "configMap": {"name": "kube-root-ca.crt"}},
            {"name": "other", "configMap": {"name": "other"}},
            {"name": "own", "projected": {"sources": [
                {"secret": {"name": "s"}},
                {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "a", "mode": 256}]}},
            ]}},
        ]);
        let (code, made, error) = release.try_pod(namespace, &|spec| spec["volumes"] = everything.clone());
        assert_eq!(code, Some(0), "{error}");
        let pod: Value = serde_json::from_str(&made).unwrap();
        pod["spec"]["volumes"].clone()
    };
    let count = |volumes: &Value, name: &str| volumes.to_string().matches(name).count();
    let volumes = wait_until("the policy to be in force", DEADLINE, || {
        let volumes = mounts("it-chart");
        Ok((count(&volumes, "weir-root-ca.crt") > 0).then_some(volumes))
    })
    .unwrap();
    assert_eq!(
        (count(&volumes, "weir-root-ca.crt"), count(&volumes, "kube-root-ca.crt")),
        (3, 0),
        "{volumes}"
    );
    let sources = json!([{"secret": {"name": "s"}}, {"configMap": {"name": "weir-root-ca.crt",
        "items": [{"key": "ca.crt", "path": "a", "mode": 256}]}}]);
    assert_eq!(
        (&volumes[1]["configMap"]["name"], &volumes[2]["projected"]["sources"]),
        (&json!("other"), &sources)
    );
    assert_eq!(count(&mounts(NAMESPACE), "kube-root-ca.crt"), 3, "elsewhere it is nobody's business");
}

fn is_all_that_pods_verify_with(release: &Release<'_>, clients: &Clients, before: &Pod<'_>, bundle: &str) {
    let testbed = release.testbed;
    let object = |(name, _)| {
        json!({"apiVersion": "v1", "kind": "ConfigMap", "data": {"value": format!("visible-{name}")},
            "metadata": {"namespace": "it-chart", "name": format!("{name}-1"), "labels": {"client": name}}})
    };
    let list = json!({"apiVersion": "v1", "kind": "List", "items": CLIENTS.map(object)});
    testbed.apply(&list.to_string()).unwrap();
    for ((name, doubt), (code, said, error)) in CLIENTS.iter().zip(all_read(clients, before)) {
        assert!(code != Some(0) && said.is_empty(), "{name} was there before: {code:?} {said}");
        assert!(error.contains(doubt), "{name}: {error}");
    }
    let spec = PodSpec { folders: clients.folders(), ..PodSpec::idle("it-chart", "bundled") };
    let pod = testbed.run_pod(&spec).unwrap();
    let mounted = pod.shell("cat /var/run/secrets/kubernetes.io/serviceaccount/ca.crt").unwrap();
    assert_eq!(mounted.trim(), bundle.trim());
    for ((name, _), said) in CLIENTS.iter().zip(all_read(clients, &pod)) {
        let expected = format!("get: {{\"value\":\"visible-{name}\"}}\nlist: [\"{name}-1\"]\n");
        let spaced = expected.replace("\":\"", "\": \"");
        assert!(said.1 == expected || said.1 == spaced, "{name}: {said:?}\n{}", release.told());
        assert_eq!(said.0, Some(0), "{name}: {said:?}");
    }
    is_on_record(before, &pod);
}

/// What each client says that reads in the pod, all at a time.
fn all_read(clients: &Clients, pod: &Pod<'_>) -> [(Option<i32>, String, String); 3] {
    let packages = format!("NODE_PACKAGES={}", clients.node_packages);
    let [python, node] = ["client.py", "client.mjs"].map(Clients::source);
    let go = Clients::binary("client-go");
    let commands: [&[&str]; 3] =
        [&[&go], &[&clients.python, &python], &["env", &packages, &clients.node, &node]];
    thread::scope(|scope| {
        let read = |(name, _): (&str, _), command: &[&str]| {
            shown(&pod.exec(&[command, &["it-chart", name]].concat()).unwrap())
        };
        let running = [0, 1, 2].map(|at| scope.spawn(move || read(CLIENTS[at], commands[at])));
        running.map(|client| client.join().unwrap())
    })
}

/// Both requests of each client of `pod`; of the one before, which sent none, nothing.
fn is_on_record(before: &Pod<'_>, pod: &Pod<'_>) {
    let wanted: BTreeSet<_> = CLIENTS
        .iter()
        .flat_map(|(name, _)| {
            let all = "/api/v1/namespaces/it-chart/configmaps";
            [("get", format!("{all}/{name}-1")), ("list", format!("{all}?labelSelector=client%3D{name}"))]
        })
        .map(|(verb, uri)| (verb.to_owned(), uri))
        .collect();
    let requests = |of: &Pod<'_>| -> anyhow::Result<BTreeSet<(String, String)>> {
        let events = agent::read_events(Path::new(JOURNAL))?;
        let sessions: BTreeSet<_> = events
            .iter()
            .filter_map(|event| match &event.kind {
                Kind::SessionStarted { caller } => {
                    let pod = caller.pod.as_ref()?;
                    (pod.uid == of.uid).then(|| event.session.clone())
                }
                _ => None,
            })
            .collect();
        let of_pod = events.into_iter().filter(|event| sessions.contains(&event.session));
        let asked = of_pod.filter_map(|event| match event.kind {
            Kind::RequestOpened(opened) => Some((opened.attributes.verb, opened.uri)),
            _ => None,
        });
        Ok(asked.filter(|(_, uri)| uri.contains("/configmaps")).collect())
    };
    let whole = || Ok((requests(pod)? == wanted).then_some(()));
    let found = wait_until("the clients' requests in the node's journal", DEADLINE, whole);
    found.unwrap_or_else(|error| panic!("{error:#}: {:?}", requests(pod)));
    assert_eq!(requests(before).unwrap(), BTreeSet::new());
}
