//! The guides' steps, taken from `docs/guides` as they stand there: run where they can be, listed in `docs/guides/steps.md` with the
//! reason where they cannot. A part of the chart's test, whose release is there.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::{Command, Output},
};

use serde_json::{Value, json};
use weir_tests::{PodSpec, Testbed, agent, command, components, wait_until};

use super::{DEADLINE, shown};

const GUIDES: [&str; 3] = ["arc", "eks", "gitlab-runner"];
/// A block is indented below the step that it belongs to.
const INDENT: &str = "       ";
/// Of an issuer of nobody's, and never expires: refused by whoever could read the rule.
const TOKEN: &str =
    "eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJodHRwczovLzEyNy4wLjAuMToxIiwic3ViIjoiYSIsImF1ZCI6IndlaXIifQ.AAAA";

/// What commands in a guide's sentences begin with.
const PROGRAMS: [&str; 5] = ["aws", "helm", "kubectl", "weir", "weir-agent"];

/// What the steps are run with.
pub(super) struct Node<'a> {
    pub(super) testbed: &'a Testbed,
    pub(super) scratch: &'a Path,
    pub(super) helm: &'a dyn Fn(&[&str]) -> Command,
    pub(super) in_agent: &'a dyn Fn(&[&str]) -> Output,
}

/// Guide and first line, to text.
type Blocks = BTreeMap<(String, String), String>;

fn blocks(guide: &str, text: &str) -> Vec<((String, String), String)> {
    let mut found: Vec<Vec<&str>> = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        match line.strip_prefix(INDENT) {
            Some(line) if inside => found.last_mut().unwrap().push(line),
            Some(line) => found.push(vec![line]),
            None if line.is_empty() && inside => continue,
            None => {}
        }
        inside = line.starts_with(INDENT);
    }
    let named = |lines: Vec<&str>| ((guide.to_owned(), lines[0].to_owned()), lines.join("\n") + "\n");
    found.into_iter().map(named).collect()
}

/// What a guide has in its sentences to be typed: guide and command, once each.
fn commands(guide: &str, text: &str) -> Vec<(String, String)> {
    let sentences: Vec<_> = text.lines().filter(|line| !line.starts_with(INDENT)).map(str::trim).collect();
    let sentences = sentences.join(" ");
    let typed = sentences.split('`').skip(1).step_by(2);
    let typed = typed.filter(|code| {
        let (program, arguments) = code.split_once(' ').unwrap_or_default();
        // Two words are a mention.
        arguments.contains(' ') && PROGRAMS.contains(&program)
    });
    let typed: BTreeSet<_> = typed.map(str::to_owned).collect();
    typed.into_iter().map(|command| (guide.to_owned(), command)).collect()
}

/// A command in a guide's sentences, by how it begins, as words.
#[track_caller]
fn typed(guide: &str, begins: &str) -> Vec<String> {
    let text = fs::read_to_string(components::repository().join(format!("docs/guides/{guide}.md"))).unwrap();
    let found = commands(guide, &text).into_iter().find(|(_, command)| command.starts_with(begins));
    let (_, command) = found.unwrap_or_else(|| panic!("{guide} has no {begins:?}"));
    command.split(' ').map(str::to_owned).collect()
}

/// Every block of the guides, and every command in their sentences; each is a row of `steps.md`, which has no others.
fn listed_blocks() -> Blocks {
    let folder = components::repository().join("docs/guides");
    let read = |name: &str| fs::read_to_string(folder.join(format!("{name}.md"))).unwrap();
    let all: Vec<_> = GUIDES.iter().flat_map(|guide| blocks(guide, &read(guide))).collect();
    let mut there: Vec<_> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
        .filter(|name| name != "steps")
        .collect();
    there.sort();
    assert_eq!(there, GUIDES, "a guide that nobody looks at");
    let table = read("steps");
    let rows = table.lines().filter(|line| line.starts_with("| ["));
    let mut listed: Vec<_> = rows
        .map(|row| {
            let cells: Vec<_> = row.split(" | ").map(|cell| cell.trim_matches(['|', ' '])).collect();
            let guide = cells[0].trim_start_matches('[').split(']').next().unwrap();
            let reasons = cells[2..].iter().filter(|cell| !cell.is_empty()).count();
            assert!(reasons > 0, "neither run nor a reason: {row}");
            (guide.to_owned(), cells[1].trim_matches('`').to_owned())
        })
        .collect();
    listed.sort();
    let mut found: Vec<_> = all.iter().map(|(name, _)| name.clone()).collect();
    found.extend(GUIDES.iter().flat_map(|guide| commands(guide, &read(guide))));
    found.sort();
    assert_eq!(found, listed, "blocks and commands of the guides, and rows of docs/guides/steps.md");
    let count = all.len();
    let blocks: Blocks = all.into_iter().collect();
    assert_eq!(blocks.len(), count, "two blocks of a guide begin alike");
    blocks
}

/// The values of the guide for EKS, before a release is there: Helm renders the chart with them, and the API server takes what
/// comes of it.
pub(super) fn values_are_taken(node: &Node<'_>) {
    let mut blocks = listed_blocks();
    let values = take(&mut blocks, "eks", "nodeSelector:");
    // Named as one that is enrolled; a dry run asks for it.
    node.testbed.create_namespace("ci", &[]).unwrap();
    let file = node.scratch.join("guide.yaml");
    fs::write(&file, values).unwrap();
    let bundle = node.testbed.layout().path("pki/ca.crt");
    let certificates = format!("trustBundle.certificates={}", bundle.display());
    let install = typed("eks", "helm install ");
    let words = install[2..].iter().map(|word| match word.as_str() {
        "deploy/helm/weir" => components::repository().join(word).display().to_string(),
        "values.yaml" => file.display().to_string(),
        "trustBundle.certificates=bundle.crt" => certificates.clone(),
        word => word.to_owned(),
    });
    let words: Vec<_> = words.collect();
    let mut helm = (node.helm)(&["template", "--kube-version", "1.36.0"]);
    helm.args(["--api-versions", "admissionregistration.k8s.io/v1/MutatingAdmissionPolicy"]).args(words);
    is_taken(node, &command::run(&mut helm).unwrap());
    node.testbed.delete_namespace("ci").unwrap();
    let served = node.testbed.kubectl(&typed("eks", "kubectl api-resources ")[1..]).unwrap();
    let line = served.lines().find(|line| line.starts_with("mutatingadmissionpolicies "));
    assert!(line.is_some_and(|line| line.contains("admissionregistration.k8s.io/v1 ")), "{served}");
}

/// A block of a guide, by how it begins.
#[track_caller]
pub(super) fn block(guide: &str, begins: &str) -> String {
    take(&mut listed_blocks(), guide, begins)
}

/// What the guide for GitLab has as `config.intentAnnotations`.
#[track_caller]
pub(super) fn intent_annotations() -> Value {
    let text = fs::read_to_string(components::repository().join("docs/guides/gitlab-runner.md")).unwrap();
    let named = text.split("`config.intentAnnotations: ").nth(1).and_then(|rest| rest.split('`').next());
    yaml(named.unwrap())
}

fn take(blocks: &mut Blocks, guide: &str, begins: &str) -> String {
    let found = blocks.keys().find(|(of, line)| of == guide && line.starts_with(begins)).cloned();
    let found = found.unwrap_or_else(|| panic!("{guide} has no block that begins with {begins:?}"));
    blocks.remove(&found).unwrap()
}

/// Runs what can be run while the release is there, with `admission.enabled`.
pub(super) fn are_run(node: &Node<'_>) {
    let mut left = listed_blocks();
    let mut take = |guide: &str, begins: &str| take(&mut left, guide, begins);
    for (guide, namespace) in [("arc", "arc-runners"), ("gitlab-runner", "gitlab-jobs")] {
        runs_as_it_is(node, &take(guide, "kubectl create namespace"));
        is_recorded(node, guide, namespace);
        if guide == "arc" {
            is_a_pod_that_is_taken(node, namespace, &take(guide, "githubConfigUrl"));
            is_a_rule_that_is_taken(node, &take(guide, "- name: the-runners-own-calls"));
        }
        node.testbed.delete_namespace(namespace).unwrap();
    }
    take("eks", "nodeSelector:");
    is_a_configuration_of_a_runner(&yaml(&take("gitlab-runner", "runners:")));
    yaml(&take("eks", "# eksctl"));
    assert!(left.is_empty(), "nobody looks at {:?}", left.keys());
}

/// TOML, with the keys that the executor's documentation has (`docs/executors/kubernetes`); the runner itself reads any.
fn is_a_configuration_of_a_runner(values: &Value) {
    let read = "import json, sys, tomllib; print(json.dumps(tomllib.loads(sys.argv[1])))";
    let mut python = Command::new("python3");
    python.args(["-c", read, values["runners"]["config"].as_str().unwrap()]);
    let read: Value = serde_json::from_str(&command::run(&mut python).unwrap()).unwrap();
    let kubernetes = read["runners"][0]["kubernetes"].as_object().unwrap();
    let keys: Vec<_> = kubernetes.keys().map(String::as_str).collect();
    let known = [
        "namespace",
        "node_selector",
        "node_tolerations",
        "pod_annotations",
        "privileged",
        "service_account",
    ];
    assert_eq!(keys, known);
}

fn yaml(text: &str) -> Value {
    serde_yaml_ng::from_str(text).unwrap_or_else(|error| panic!("{error}:\n{text}"))
}

fn runs_as_it_is(node: &Node<'_>, block: &str) {
    command::run(&mut with_kubectl(node.testbed, block)).unwrap();
}

/// In a shell, with kubectl in PATH, as an administrator has it.
pub(super) fn with_kubectl(testbed: &Testbed, script: &str) -> Command {
    let kubectl = testbed.kubectl_command();
    let folder = Path::new(kubectl.get_program()).parent().unwrap();
    let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap());
    let mut shell = Command::new("sh");
    shell.args(["-euc", script]).env("PATH", path);
    shell.env("KUBECONFIG", testbed.layout().kubeconfig("admin"));
    shell
}

/// What a job does in step 6, and that its session is there.
fn is_recorded(node: &Node<'_>, guide: &str, namespace: &str) {
    let intent = intent_annotations();
    // GitLab's runner gives it to the pod that it makes, and ARC's gives none.
    let annotation = (intent[0].as_str().unwrap(), "https://gitlab.example.com/group/project/-/jobs/42");
    let annotations: &[_] = if guide == "gitlab-runner" { &[annotation] } else { &[] };
    let spec = PodSpec { annotations, ..PodSpec::idle(namespace, "job") };
    let pod = node.testbed.run_pod(&spec).unwrap();
    let words = typed(guide, "kubectl get pods");
    let asked = shown(&pod.exec(&words.iter().map(String::as_str).collect::<Vec<_>>()).unwrap());
    // Without RBAC the API server refuses it, in its own words: which came through the agent.
    assert!(asked.0 == Some(0) || asked.2.contains("pods is forbidden"), "{asked:?}");
    let mut words = typed(guide, "weir sessions --from ");
    words.extend(["--namespace", namespace, "--json"].map(str::to_owned));
    let sessions: Vec<_> = words.iter().map(String::as_str).collect();
    let session = wait_until("the job's session", DEADLINE, || {
        let (code, said, error) = shown(&(node.in_agent)(&sessions));
        assert_eq!(code, Some(0), "{error}");
        Ok(said.lines().find(|line| line.contains("\"job\"")).map(yaml))
    })
    .unwrap();
    for (key, url) in annotations {
        assert_eq!(session["caller"]["pod"]["intent"], json!({*key: url}), "{session}");
        let id = session["session"].as_str().unwrap();
        let (_, said, error) =
            shown(&(node.in_agent)(&["weir", "replay", id, words[2].as_str(), words[3].as_str()]));
        assert!(said.contains(&format!("{key}={url}")), "{said}{error}");
    }
}

/// The pod that a scale set makes of its template.
fn is_a_pod_that_is_taken(node: &Node<'_>, namespace: &str, values: &str) {
    let template = yaml(values)["template"].clone();
    let metadata = json!({"name": "runner", "namespace": namespace});
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]});
    is_taken(node, &pod.to_string());
}

fn is_taken(node: &Node<'_>, objects: &str) {
    let file = node.scratch.join("step.yaml");
    fs::write(&file, objects).unwrap();
    let apply = ["apply", "--dry-run=server", "--validate=strict", "-f", file.to_str().unwrap()];
    node.testbed.kubectl(&apply).unwrap();
}

/// By the agent's own code, which compiles the expression.
fn is_a_rule_that_is_taken(node: &Node<'_>, rule: &str) {
    let layout = node.testbed.layout();
    let configuration = json!({
        "apiVersion": "weir.dev/v1alpha1",
        "kind": "AgentConfiguration",
        "clusters": [{
            "name": "local",
            "kubeconfig": layout.kubeconfig("admin"),
            "trust": {"clusterSigner": {}},
            "authentication": {"jwt": [{
                "issuer": {"url": "https://127.0.0.1:1", "audiences": ["weir"]},
                "claimMappings": {"username": {"claim": "sub", "prefix": "x:"}},
            }]},
            "roles": yaml(rule),
        }],
        "enrolment": [{"namespaceSelector": {}, "podSelector": {}}],
    });
    let (file, token) = (node.scratch.join("rule.yaml"), node.scratch.join("token"));
    fs::write(&file, configuration.to_string()).unwrap();
    fs::write(&token, TOKEN).unwrap();
    let mut explain = Command::new(agent::built_binary("weir-agent").unwrap());
    explain.arg("explain").arg("--config").arg(&file).arg("--token").arg(&token);
    let (code, said, error) = shown(&command::output(&mut explain).unwrap());
    assert!(code == Some(1) && said.contains("never expire"), "{said}{error}");
}
