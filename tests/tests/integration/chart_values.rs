//! What comes of the chart's values before any agent runs: `helm install` refuses what cannot work, and the admission policy for
//! enrolled namespaces, at its strictest, is asked on the real API server. The agents are `chart`'s.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};
use weir_tests::{PodSpec, command, components, progress::Progress, wait_until};

use super::{DEADLINE, Scene, shown};

const NAMESPACE: &str = "it-values";
/// In which the policies' release is: they spare it, although it is enrolled.
const RELEASE: &str = "it-values-release";

struct Chart<'a> {
    scene: &'a Scene,
    helm: PathBuf,
}

impl Chart<'_> {
    fn file(&self, name: &str, content: &Value) -> PathBuf {
        let path = self.scene.scratch.path().join(name);
        fs::write(&path, content.to_string()).unwrap();
        path
    }

    /// What Helm says of these values.
    fn helm(&self, arguments: &[&str], values: &Value) -> (Option<i32>, String, String) {
        let mut command = Command::new(&self.helm);
        // Of two, the last one counts.
        command.args(["--namespace", NAMESPACE]).args(arguments);
        command.arg(components::repository().join("deploy/helm/weir"));
        command.arg("--values").arg(self.file("values.json", values));
        command.env("KUBECONFIG", self.scene.testbed.layout().kubeconfig("admin"));
        for variable in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
            command.env(variable, self.scene.scratch.path().join("helm"));
        }
        shown(&command::output(&mut command).unwrap())
    }

    /// The admission policy that comes of these values, where the API server serves these APIs.
    fn policy(&self, name: &str, values: &Value, served: &[&str]) -> PathBuf {
        let mut words =
            vec!["template", "weir", "--kube-version", "1.36.0", "--show-only", "templates/admission.yaml"];
        words.extend(["--namespace", RELEASE]);
        served.iter().for_each(|api| words.extend(["--api-versions", api]));
        let (code, rendered, error) = self.helm(&words, values);
        assert_eq!(code, Some(0), "{error}");
        let path = self.scene.scratch.path().join(name);
        fs::write(&path, rendered).unwrap();
        path
    }

    #[track_caller]
    fn install_is_refused(&self, values: &Value, said: &str) {
        let (code, out, error) = self.helm(&["install", "weir"], values);
        assert!(code == Some(1) && error.contains(said), "{said}: {code:?} {out}{error}");
    }

    /// Puts a policy in force until what is returned is dropped: also where a test fails, the next one has none of it.
    fn policy_in_force(&self, name: &str, values: &Value, served: &[&str]) -> Policy<'_> {
        let file = self.policy(name, values, served);
        let policy = Policy { chart: self, file };
        let (code, _, error) = self.kubectl(&["apply"], &policy.file);
        assert_eq!(code, Some(0), "{error}");
        policy
    }

    fn kubectl(&self, arguments: &[&str], file: &Path) -> (Option<i32>, String, String) {
        let mut command = self.scene.testbed.kubectl_command();
        shown(&command::output(command.args(arguments).arg("-f").arg(file)).unwrap())
    }
}

struct Policy<'a> {
    chart: &'a Chart<'a>,
    file: PathBuf,
}

impl Drop for Policy<'_> {
    fn drop(&mut self) {
        self.chart.kubectl(&["delete", "--ignore-not-found"], &self.file);
    }
}

#[test]
fn helm_refuses_values_that_cannot_work_and_the_strict_policy_pods_that_could_go_around() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace(NAMESPACE, true);
    scene.namespace(RELEASE, true);
    let chart = Chart { scene: &scene, helm: components::helm(Progress::Shown).unwrap() };
    refuses_what_cannot_work(&chart);
    let strict = json!({"admission": {"enabled": true, "requireDropNetRaw": true}});
    let policy = chart.policy_in_force("raw.yaml", &strict, &[]);
    lets_no_container_keep_net_raw(&chart);
    drop(policy);
    lets_no_container_start_without_the_agent(&chart);
}

/// Each at once and with the reason; nothing is left of it.
fn refuses_what_cannot_work(chart: &Chart<'_>) {
    let kafka = |more: Value| {
        let mut kafka = json!({"brokers": ["kafka.example:9093"], "topic": "weir"});
        kafka.as_object_mut().unwrap().append(&mut more.as_object().unwrap().clone());
        json!({"config": {"kafka": kafka}})
    };
    chart
        .install_is_refused(&json!({"config": {"kafkaa": {}}}), "additional properties 'kafkaa' not allowed");
    chart.install_is_refused(
        &json!({"config": {"kafka": {"brokers": ["kafka.example:9093"]}}}),
        "missing property 'topic'",
    );
    chart.install_is_refused(
        &kafka(json!({"properties": {"sasl.password": "hunter2"}})),
        "at '/config/kafka/properties/sasl.password': value must be 'put it into a file and name that in kafka.propertyFiles'",
    );
    let file = json!({"propertyFiles": {"sasl.password": "/etc/weir/secrets/weir-kafka/password"}});
    chart.install_is_refused(&kafka(file.clone()), "weir-kafka is not among `secrets`");
    let mut mounted = kafka(file);
    mounted["secrets"] = json!(["weir-kafka"]);
    let absent = format!(
        "there is no Secret weir-kafka in the namespace {NAMESPACE}, and without it no agent's pod starts"
    );
    chart.install_is_refused(&mounted, &absent);
    let testbed = &chart.scene.testbed;
    assert_eq!(testbed.kubectl(&["get", "daemonsets,secrets", "-n", NAMESPACE, "-o", "name"]).unwrap(), "");
    testbed
        .kubectl(&["create", "secret", "generic", "weir-kafka", "-n", NAMESPACE, "--from-literal=password=p"])
        .unwrap();
    let (code, _, error) = chart.helm(&["install", "weir", "--dry-run=server"], &mounted);
    assert_eq!(code, Some(0), "with the Secret it is taken: {error}");
}

fn lets_no_container_keep_net_raw(chart: &Chart<'_>) {
    let pod = |namespace: &str, capabilities: &Value| {
        let mut pod = PodSpec::idle(namespace, "raw").manifest();
        pod["spec"]["containers"][0]["securityContext"] = json!({"capabilities": capabilities});
        chart.file("pod.json", &pod)
    };
    let tried = |file: &Path| chart.kubectl(&["create", "--dry-run=server"], file);
    wait_until("the policy to be in force", DEADLINE, || {
        Ok((tried(&pod(NAMESPACE, &json!({}))).0 == Some(1)).then_some(()))
    })
    .unwrap();
    let (code, _, error) = tried(&pod(RELEASE, &json!({})));
    assert_eq!(code, Some(0), "Weir's own pods need what others may not have: {error}");
    let keeps =
        [json!([]), json!(["CHOWN"]), json!(["CAP_NET_RAW"]), json!(["NET_CAP_RAW"]), json!(["CAP_ALL"])];
    for capabilities in keeps.map(|drop| json!({"drop": drop})) {
        let (code, _, error) = tried(&pod(NAMESPACE, &capabilities));
        let said = "let these containers drop it (securityContext.capabilities.drop: [NET_RAW], or [ALL]), or use a namespace that is not enrolled: main";
        assert!(code == Some(1) && error.contains(said), "{capabilities}: {error}");
        assert_eq!(tried(&pod("default", &capabilities)).0, Some(0), "elsewhere it is nobody's business");
    }
    let drops_all = json!({"drop": ["ALL"]});
    for capabilities in [&drops_all, &json!({"drop": ["NET_RAW"]}), &json!({"drop": ["net_raw"]})] {
        let (code, _, error) = tried(&pod(NAMESPACE, capabilities));
        assert_eq!(code, Some(0), "{capabilities}: {error}");
    }

    // What `kubectl debug` puts into a pod that is there.
    let (code, _, error) = chart.kubectl(&["create"], &pod(NAMESPACE, &drops_all));
    assert_eq!(code, Some(0), "{error}");
    let text = chart.scene.testbed.kubectl(&["get", "pod", "raw", "-n", NAMESPACE, "-o", "json"]).unwrap();
    let mut there: Value = serde_json::from_str(&text).unwrap();
    // Whatever the kubelet writes meanwhile is no conflict.
    there["metadata"].as_object_mut().unwrap().remove("resourceVersion");
    let mut debugged = |context: Value| {
        let image = there["spec"]["containers"][0]["image"].clone();
        there["spec"]["ephemeralContainers"] =
            json!([{"name": "debugger", "image": image, "securityContext": context}]);
        let file = chart.file("debugged.json", &there);
        let path = format!("/api/v1/namespaces/{NAMESPACE}/pods/raw/ephemeralcontainers?dryRun=All");
        chart.kubectl(&["replace", "--raw", &path], &file)
    };
    for (context, said) in [
        (json!({"privileged": true}), "drop securityContext.privileged"),
        (
            json!({"capabilities": {"drop": ["ALL"], "add": ["SYS_PTRACE"]}}),
            "with what these containers add: debugger;",
        ),
        (json!({}), "or use a namespace that is not enrolled: debugger"),
    ] {
        let (code, _, error) = debugged(context);
        assert!(code == Some(1) && error.contains(said), "{said}: {code:?} {error}");
    }
    let (code, _, error) = debugged(json!({"capabilities": drops_all}));
    assert_eq!(code, Some(0), "{error}");
}

/// What containerd is told by (`nri` shows what it makes of that).
const REQUIRED: &str = "required-plugins.noderesource.dev";

/// A pod with annotations.
struct Annotated<'a>(&'a Chart<'a>);

impl Annotated<'_> {
    fn file(&self, namespace: &str, name: &str, annotations: &Value) -> PathBuf {
        let mut pod = PodSpec::idle(namespace, name).manifest();
        pod["metadata"]["annotations"] = annotations.clone();
        self.0.file("pod.json", &pod)
    }

    fn tried(&self, namespace: &str, annotations: &Value) -> (Option<i32>, String, String) {
        let file = self.file(namespace, "tried", annotations);
        self.0.kubectl(&["create", "--dry-run=server", "-o", "json"], &file)
    }

    /// Of a pod that is there.
    fn changed(&self, name: &str, annotation: &str) -> (Option<i32>, String, String) {
        let mut command = self.0.scene.testbed.kubectl_command();
        command.args(["annotate", "--overwrite", "-n", NAMESPACE, "pod", name, annotation]);
        shown(&command::output(&mut command).unwrap())
    }
}

fn lets_no_container_start_without_the_agent(chart: &Chart<'_>) {
    let pod = Annotated(chart);
    let of_container = format!("{REQUIRED}/container.main");
    let refused = [
        json!({}),
        json!({REQUIRED: "[other]"}),
        json!({REQUIRED: "[weird]"}),
        json!({REQUIRED: "[] # weir"}),
        json!({REQUIRED: "[other] # [weir]"}),
        json!({REQUIRED: "[weir]", &of_container: "[]"}),
        json!({&of_container: "[weir]"}),
    ];
    let passes = [
        json!({REQUIRED: "[weir]"}),
        json!({REQUIRED: "[ other, weir ]"}),
        json!({REQUIRED: "[weir]", &of_container: "[other,weir]"}),
    ];
    let values = json!({"admission": {"enabled": true, "requireAgent": true}});
    // An API server that changes no pods.
    let validating = chart.policy_in_force("agent.yaml", &values, &[]);
    let said = format!("give the pod the annotation {REQUIRED}: '[weir]'");
    wait_until("the policy to be in force, and the one before it no more", DEADLINE, || {
        Ok(pod.tried(NAMESPACE, &json!({})).2.contains(&said).then_some(()))
    })
    .unwrap();
    for annotations in &refused {
        let (code, _, error) = pod.tried(NAMESPACE, annotations);
        assert!(code == Some(1) && error.contains(&said), "{annotations}: {error}");
        assert_eq!(pod.tried("default", annotations).0, Some(0), "elsewhere it is nobody's business");
    }
    for annotations in &passes {
        let (code, _, error) = pod.tried(NAMESPACE, annotations);
        assert_eq!(code, Some(0), "{annotations}: {error}");
    }
    is_not_taken_back_later(chart, &pod, &of_container);

    // One that does.
    let served = ["admissionregistration.k8s.io/v1/MutatingAdmissionPolicy"];
    let all = chart.policy_in_force("changing.yaml", &values, &served);
    let said = |namespace: &str, annotations: &Value| -> Option<String> {
        let (code, made, _) = pod.tried(namespace, annotations);
        let made: Value = serde_json::from_str(&made).ok().filter(|_| code == Some(0))?;
        Some(made["metadata"]["annotations"][REQUIRED].as_str().unwrap_or_default().to_owned())
    };
    let changed = || Ok(said(NAMESPACE, &json!({"other": "value"})));
    assert_eq!(wait_until("pods to be made to say it", DEADLINE, changed).unwrap(), "[weir]");
    assert_eq!(
        said(NAMESPACE, &passes[1]).as_deref(),
        Some("[ other, weir ]"),
        "what a pod says itself stays"
    );
    assert_eq!(said(NAMESPACE, &refused[1]), None);
    assert_eq!(said("default", &json!({})).as_deref(), Some(""), "elsewhere it is nobody's business");
    drop((all, validating));
}

/// A pod from before the policy (`raw`) stays what it was.
fn is_not_taken_back_later(chart: &Chart<'_>, pod: &Annotated<'_>, of_container: &str) {
    let says = pod.file(NAMESPACE, "says", &json!({REQUIRED: "[weir]"}));
    assert_eq!(chart.kubectl(&["create"], &says).0, Some(0));
    for change in [format!("{REQUIRED}-"), format!("{REQUIRED}=[other]"), format!("{of_container}=[]")] {
        let (code, _, error) = pod.changed("says", &change);
        assert!(code == Some(1) && error.contains("no container of it starts without"), "{change}: {error}");
    }
    // With the status as well as with the rest.
    let without = json!({"metadata": {"annotations": {REQUIRED: null}}}).to_string();
    let mut status = chart.scene.testbed.kubectl_command();
    status.args([
        "patch",
        "pod",
        "says",
        "-n",
        NAMESPACE,
        "--subresource=status",
        "--type=merge",
        "-p",
        &without,
    ]);
    let (code, _, error) = shown(&command::output(&mut status).unwrap());
    assert!(code == Some(1) && error.contains("no container of it starts without"), "{error}");
    for name in ["says", "raw"] {
        let (code, _, error) = pod.changed(name, "other=value");
        assert_eq!(code, Some(0), "{name}: {error}");
    }
}
