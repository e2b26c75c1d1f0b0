//! `cargo xtask chart`: the Helm chart without a cluster: lint, what it renders to, that every Kubernetes version it is for has a
//! schema for that, which mistakes it refuses, and that alerts and dashboard in it are those of this commit.
//!
//! What an API server says of it, and that it works on a node, is the integration tests' (`chart`).

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use anyhow::{Context as _, Result, bail, ensure};
use weir_tests::{components, progress::Progress, python};

mod arc;
mod hook;
mod policies;

const CHART: &str = "deploy/helm/weir";
/// What it renders to, each beside the values that make it.
const GOLDEN: &str = "deploy/helm/golden";
/// A suffix of the golden files of values.
const VALUES: &str = ".values.yaml";
/// What it is rendered for; nothing in it depends on that.
const KUBERNETES: &str = "1.33.0";

/// The Kubernetes versions that the chart is for, each with the MutatingAdmissionPolicy that its API server can serve (v1beta1 only
/// where an operator has switched it on).
const VERSIONS: [(&str, Option<&str>); 4] =
    [("1.33", None), ("1.34", Some("v1beta1")), ("1.35", Some("v1beta1")), ("1.36", Some("v1"))];
/// What the golden values cannot have where there is none.
const WITHOUT_MUTATING: [&str; 4] = [
    "--set",
    "trustBundle.enabled=false",
    "--set-json",
    r#"config.clusters=[{"name": "a", "inCluster": true, "addresses": ["192.0.2.1:443"], "trust": {"clusterSigner": {}}}]"#,
];

/// What an API server serves from 1.36 on.
const MUTATING: &str = "admissionregistration.k8s.io/v1/MutatingAdmissionPolicy";

/// Mistakes in values, and what is said of them.
const MISTAKES: [(&str, &str); 26] = [
    (r#"{"config": {"jurnal": {}}}"#, "at '/config': additional properties 'jurnal' not allowed"),
    (r#"{"config": {"kafka": {"brokers": ["kafka:9093"]}}}"#, "at '/config/kafka': missing property 'topic'"),
    (
        r#"{"config": {"kafka": {"brokers": ["kafka:9093"], "topic": "weir", "properties": {"sasl.password": "x"}}}}"#,
        "at '/config/kafka/properties/sasl.password': value must be 'put it into a file and name that in kafka.propertyFiles'",
    ),
    (
        r#"{"config": {"kafka": {"brokers": ["kafka:9093"], "topic": "weir", "properties": {"ssl.key.pem": "x"}}}}"#,
        "at '/config/kafka/properties/ssl.key.pem': value must be 'put it into a file and name that in",
    ),
    (r#"{"config": {"clusters": []}}"#, "at '/config/clusters': minItems"),
    (
        r#"{"config": {"enrolment": [{"namespaceSelector": {}, "podSelector": {}, "mode": "enforced"}]}}"#,
        "at '/config/enrolment/0/mode'",
    ),
    (r#"{"config": {"limits": {"drainSeconds": 86400}}}"#, "at '/config/limits/drainSeconds': maximum"),
    (
        r#"{"updateStrategy": "Recreate"}"#,
        "at '/updateStrategy': value must be one of 'RollingUpdate', 'OnDelete'",
    ),
    (r#"{"tolerations": {}}"#, "at '/tolerations': got object, want array"),
    (r#"{"nodeselector": {}}"#, "additional properties 'nodeselector' not allowed"),
    (r#"{"image": {"digest": "latest"}}"#, "at '/image/digest': 'latest' does not match pattern"),
    (r#"{"config": {"node": "worker-1"}}"#, "config.node: every node has its own"),
    (
        r#"{"config": {"journal": {"directory": "/data/journal"}}}"#,
        "config.journal.directory: /data/journal is not",
    ),
    (
        r#"{"config": {"stateDirectory": "/var/lib/weir/../x"}}"#,
        "config.stateDirectory: /var/lib/weir/../x is not",
    ),
    (
        r#"{"config": {"journal": {"directory": "/var/lib/weirdo/journal"}}}"#,
        "config.journal.directory: /var/lib/weirdo/journal is not",
    ),
    (
        r#"{"admission": {"enabled": true, "namespaceSelector": {"matchLabels": {"weir.dev/enrol": "true"}}}, "config": {"enrolment": [{"namespaceSelector": {"matchLabels": {"team": "ci"}}, "podSelector": {}}]}}"#,
        "admission.namespaceSelector asks for weir.dev/enrol=true, which config.enrolment[0] does not",
    ),
    (
        r#"{"admission": {"enabled": true, "namespaceSelector": {"matchLabels": {"team": ""}}}}"#,
        "admission.namespaceSelector asks for team=, which config.enrolment[0] does not",
    ),
    (
        r#"{"trustBundle": {"enabled": true, "namespaceSelector": {"matchExpressions": [{"key": "a", "operator": "Exists"}]}}}"#,
        r#"trustBundle.namespaceSelector asks for {"key":"a","operator":"Exists"}, which config.enrolment[0] does not"#,
    ),
    (
        r#"{"admission": {"enabled": true, "namespaceSelector": {"matchExpressions": [{"key": "kubernetes.io/metadata.name", "operator": "NotIn", "values": ["jobs"]}]}}}"#,
        r#"admission.namespaceSelector asks for {"key":"kubernetes.io/metadata.name""#,
    ),
    (
        r#"{"config": {"nri": {"socket": "/run/nri.sock"}}}"#,
        "config.nri.socket: the folder above that of /run/nri.sock",
    ),
    (
        r#"{"trustBundle": {"enabled": true}}"#,
        "trustBundle.enabled: no cluster of config.clusters has trust.mountedCa.clientBundle",
    ),
    (
        r#"{"trustBundle": {"enabled": true}, "config": {"clusters": [{"name": "a", "inCluster": true, "trust": {"mountedCa": {"certificate": "/a", "key": "/b", "clientBundle": "/etc/weir/trust-bundle/ca.crt"}}}]}}"#,
        "trustBundle.enabled: this API server serves no MutatingAdmissionPolicy",
    ),
    (
        r#"{"trustBundle": {"certificates": "-----BEGIN CERTIFICATE-----\n-----BEGIN PRIVATE KEY-----"}}"#,
        "at '/trustBundle/certificates': 'not' failed",
    ),
    (
        r#"{"config": {"clusters": [{"name": "a", "inCluster": true, "trust": {"mountedCa": {"certificate": "/etc/weir/secrets/ca/tls.crt", "key": "/etc/weir/secrets/ca/tls.key", "clientBundle": "/etc/weir/trust-bundle/ca.crt"}}}]}}"#,
        "a has its clientBundle below /etc/weir/trust-bundle",
    ),
    (
        r#"{"config": {"kafka": {"brokers": ["kafka:9093"], "topic": "weir", "propertyFiles": {"sasl.password": "/etc/weir/secrets/kafka/password"}}}}"#,
        "config names a file in /etc/weir/secrets/kafka, and kafka is not among `secrets`",
    ),
    (
        r#"{"monitoring": {"serviceMonitor": true}}"#,
        "monitoring.serviceMonitor: Prometheus reaches no loopback address",
    ),
];

/// Checks the chart; with `UPDATE_EXPECT` in the environment, writes what it renders to. With a checkout of Actions Runner Controller,
/// compares the runner of the chart's test with what that one's chart makes, and does nothing else.
///
/// # Errors
/// The first thing that is not as it should be.
pub(crate) fn run(root: &Path, arc: Option<&Path>) -> Result<()> {
    let helm = Helm { program: components::helm(Progress::Shown)?, root: root.to_owned() };
    if let Some(checkout) = arc {
        helm.has_the_runner_of(checkout)?;
        println!("the runner of the chart's test is that of ARC's chart");
        return Ok(());
    }
    helm.lint()?;
    helm.renders_as_written()?;
    let versions = helm.of_every_version()?;
    is_of_every_versions_schema(&versions)?;
    policies::are_of_every_version(&versions)?;
    helm.refuses_mistakes()?;
    helm.takes_what_covers()?;
    helm.gives_the_hook_its_time()?;
    helm.brings_what_this_commit_has()?;
    helm.has_a_dashboard_of_grafanas()?;
    helm.asks_prometheus_in_its_language()?;
    println!("the chart is as it should be");
    Ok(())
}

struct Helm {
    program: PathBuf,
    root: PathBuf,
}

/// Selectors that choose no fewer namespaces than are enrolled, however that is written; and what becomes of them.
const COVERS: [(&str, &str); 5] = [
    (
        r#"{"admission": {"enabled": true, "namespaceSelector": {"matchExpressions": [{"key": "weir.dev/enrol", "operator": "In", "values": ["true", "soon"]}]}}}"#,
        "      - key: weir.dev/enrol\n        operator: In",
    ),
    (
        r#"{"admission": {"enabled": true, "namespaceSelector": {"matchLabels": {"weir.dev/enrol": null, "team": "ci"}}}, "config": {"enrolment": [{"namespaceSelector": {"matchExpressions": [{"key": "team", "operator": "In", "values": ["ci"]}]}, "podSelector": {}}]}}"#,
        "    namespaceSelector:\n      matchLabels:\n        team: ci\n",
    ),
    (
        r#"{"admission": {"enabled": true, "namespaceSelector": {"matchLabels": {"weir.dev/enrol": true}}}}"#,
        "    namespaceSelector:\n      matchLabels:\n        weir.dev/enrol: \"true\"\n",
    ),
    (
        r#"{"admission": {"enabled": true, "namespaceSelector": {"matchExpressions": [{"key": "kubernetes.io/metadata.name", "operator": "NotIn", "values": ["kube-system"]}]}}, "config": {"enrolment": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "runner"}}}]}}"#,
        "        operator: NotIn\n        values:\n        - kube-system\n      matchLabels: {}\n",
    ),
    (
        r#"{"uninstall": true, "admission": {"enabled": true, "namespaceSelector": {"matchLabels": {"weir.dev/enrol": "true"}}}, "config": {"enrolment": [{"namespaceSelector": {"matchLabels": {"team": "ci"}}, "podSelector": {}}]}}"#,
        "command: [weir-agent, uninstall, --stay",
    ),
];

impl Helm {
    fn output(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new(&self.program);
        command.args(arguments).current_dir(&self.root);
        command.output().with_context(|| format!("cannot start {}", self.program.display()))
    }

    fn run(&self, arguments: &[&str]) -> Result<String> {
        let output = self.output(arguments)?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "helm {arguments:?} ended with {}:\n{errors}", output.status);
        Ok(String::from_utf8(output.stdout)?)
    }

    fn template(&self, chart: &str, values: &[&str]) -> Result<String> {
        let fixed = ["template", "weir", chart, "--namespace", "weir-system", "--kube-version", KUBERNETES];
        self.run(&[&fixed, values].concat())
    }

    fn lint(&self) -> Result<()> {
        self.run(&["lint", "--strict", "--kube-version", KUBERNETES, CHART]).map(drop)
    }

    /// Names of the golden values.
    fn golden(&self) -> Result<Vec<String>> {
        let folder = self.root.join(GOLDEN);
        let entries = fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
        let mut names = Vec::new();
        for entry in entries {
            let name = entry?.file_name().to_string_lossy().into_owned();
            names.extend(name.strip_suffix(VALUES).map(str::to_owned));
        }
        ensure!(!names.is_empty(), "there are no values in {GOLDEN}");
        Ok(names)
    }

    /// What the golden values render to for each version.
    fn of_every_version(&self) -> Result<Vec<Rendered>> {
        let names = self.golden()?;
        let all = VERSIONS.map(|(version, mutating)| -> Result<Rendered> {
            let kube = format!("{version}.0");
            let served = format!(
                "admissionregistration.k8s.io/{}/MutatingAdmissionPolicy",
                mutating.unwrap_or("v1alpha1")
            );
            let rest: &[&str] = if mutating.is_some() { &[] } else { &WITHOUT_MUTATING };
            let render = |name: &String| {
                let values = format!("{GOLDEN}/{name}{VALUES}");
                let fixed = ["template", "weir", CHART, "--kube-version", &kube, "--values", &values];
                let text = self.run(&[&fixed[..], &["--api-versions", &served], rest].concat())?;
                Ok((name.clone(), text))
            };
            Ok(Rendered { version, objects: names.iter().map(render).collect::<Result<_>>()? })
        });
        all.into_iter().collect()
    }

    fn renders_as_written(&self) -> Result<()> {
        let folder = self.root.join(GOLDEN);
        for name in self.golden()? {
            let values = format!("{GOLDEN}/{name}{VALUES}");
            let rendered = self.template(CHART, &["--values", &values, "--api-versions", MUTATING])?;
            let path = folder.join(format!("{name}.yaml"));
            if std::env::var_os("UPDATE_EXPECT").is_some() {
                fs::write(&path, &rendered).with_context(|| format!("cannot write {}", path.display()))?;
            }
            let written = fs::read_to_string(&path).unwrap_or_default();
            // `--reuse-values` from a release of an older chart brings none of the values that have come since.
            let older = ["--set", "guardUnit=null", "--set", "updateStrategy=null"];
            self.template(CHART, &[&["--values", &values, "--api-versions", MUTATING], &older[..]].concat())?;
            if let Some((number, (now, before))) = first_difference(&rendered, &written) {
                bail!(
                    "{GOLDEN}/{name}.yaml, line {number}: the chart renders {now:?} instead of {before:?}; if that is meant, \
                     `UPDATE_EXPECT=1 cargo xtask chart` writes it"
                );
            }
        }
        Ok(())
    }

    fn refuses_mistakes(&self) -> Result<()> {
        let scratch = tempfile::tempdir().context("cannot make a scratch folder")?;
        let file = scratch.path().join("values.json");
        for (values, said) in MISTAKES {
            fs::write(&file, values).context("cannot write values")?;
            let path = file.to_string_lossy();
            let output =
                self.output(&["template", "weir", CHART, "--kube-version", KUBERNETES, "--values", &path])?;
            let errors = String::from_utf8_lossy(&output.stderr);
            ensure!(!output.status.success(), "the chart takes {values}");
            ensure!(errors.contains(said), "of {values} Helm says {errors:?}, not {said:?}");
        }
        Ok(())
    }

    fn takes_what_covers(&self) -> Result<()> {
        let scratch = tempfile::tempdir().context("cannot make a scratch folder")?;
        let file = scratch.path().join("values.json");
        for (values, rendered) in COVERS {
            fs::write(&file, values).context("cannot write values")?;
            let all = self.template(CHART, &["--values", &file.to_string_lossy()])?;
            ensure!(all.contains(rendered), "of {values} there is no {rendered:?} in {all}");
        }
        Ok(())
    }

    /// As a package, too, which is made of what the links in the chart lead to.
    fn brings_what_this_commit_has(&self) -> Result<()> {
        let scratch = tempfile::tempdir().context("cannot make a scratch folder")?;
        self.run(&["package", CHART, "--destination", &scratch.path().to_string_lossy()])?;
        let package = fs::read_dir(scratch.path())?.next().context("helm has made no package")??.path();
        let both = ["--set", "monitoring.prometheusRule=true,monitoring.dashboard=true"];
        let rendered = self.template(&package.to_string_lossy(), &both)?;
        let read = |path: &str| {
            fs::read_to_string(self.root.join(path)).with_context(|| format!("cannot read {path}"))
        };
        for (file, indent) in [("weir-rules.yaml", 2), ("dashboard.json", 4)] {
            let indented = |line: &str| format!("{}{line}", " ".repeat(indent));
            let text = read(&format!("{CHART}/files/{file}"))?;
            let text: Vec<_> = text.lines().map(indented).collect();
            ensure!(rendered.contains(&text.join("\n")), "{file} is not in the rendered chart as it is");
        }
        let metrics = read("docs/metrics.md")?;
        let dashboard = read(&format!("{CHART}/files/dashboard.json"))?;
        let words = dashboard.split(|character: char| !character.is_ascii_alphanumeric() && character != '_');
        for word in words.filter(|word| word.starts_with("weir_")) {
            let family = ["_bucket", "_count", "_sum"].iter().find_map(|suffix| word.strip_suffix(suffix));
            let is_one = |name: &str| metrics.contains(&format!("| `{name}` |"));
            ensure!(
                is_one(word) || family.is_some_and(is_one),
                "the dashboard asks for {word}, which no agent has"
            );
        }
        Ok(())
    }

    /// By Grafana's own types of dashboards, which know no other keys.
    fn has_a_dashboard_of_grafanas(&self) -> Result<()> {
        let reader = components::grafana_dashboard(Progress::Shown)?;
        let read = |path: &Path| -> Result<(bool, String)> {
            let output = Command::new(&reader).arg(path).output().context("cannot read the dashboard")?;
            Ok((output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned()))
        };
        let path = self.root.join(CHART).join("files/dashboard.json");
        let (taken, errors) = read(&path)?;
        ensure!(taken, "{CHART}/files/dashboard.json is no dashboard of Grafana's: {errors}");
        let scratch = tempfile::NamedTempFile::new().context("cannot make a scratch file")?;
        let wrong = fs::read_to_string(&path)?.replacen("\"gridPos\"", "\"gridpos\"", 1);
        fs::write(scratch.path(), wrong).context("cannot write a dashboard")?;
        ensure!(!read(scratch.path())?.0, "a dashboard with an unknown key is taken for one of Grafana's");
        Ok(())
    }

    /// Each of the dashboard's queries is read by Prometheus' own parser, as the expression of a rule.
    fn asks_prometheus_in_its_language(&self) -> Result<()> {
        let text = fs::read_to_string(self.root.join(CHART).join("files/dashboard.json"))?;
        let dashboard: serde_json::Value = serde_json::from_str(&text)?;
        let panels = dashboard["panels"].as_array().into_iter().flatten();
        let targets = panels.flat_map(|panel| panel["targets"].as_array().into_iter().flatten());
        let queries: Option<Vec<_>> = targets.map(|target| target["expr"].as_str()).collect();
        let queries = queries.context("a target of the dashboard has no expr")?;
        ensure!(!queries.is_empty(), "the dashboard asks nothing");
        let promtool = components::promtool(Progress::Shown)?;
        let scratch = tempfile::tempdir().context("cannot make a scratch folder")?;
        let tests = scratch.path().join("tests.json");
        fs::write(&tests, r#"{"rule_files": ["rules.json"], "tests": [{"interval": "1m"}]}"#)?;
        let read = |queries: &[String]| -> Result<Output> {
            let rules = queries.iter().enumerate().map(|(at, query)| {
                serde_json::json!({"record": format!("dashboard:query{at}"), "expr": query.replace("$instance", ".*")})
            });
            let group =
                serde_json::json!({"groups": [{"name": "dashboard", "rules": rules.collect::<Vec<_>>()}]});
            fs::write(scratch.path().join("rules.json"), group.to_string())?;
            Command::new(&promtool).arg(&tests).output().context("cannot start promtool")
        };
        let mut queries: Vec<_> = queries.into_iter().map(str::to_owned).collect();
        let output = read(&queries)?;
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "Prometheus does not take the dashboard's queries: {said}");
        if let Some(last) = queries.last_mut() {
            last.push(')');
        }
        ensure!(!read(&queries)?.status.success(), "a query with one parenthesis too many is taken for one");
        Ok(())
    }
}

/// What the golden values render to for a version of Kubernetes.
struct Rendered {
    version: &'static str,
    /// By the values' name.
    objects: BTreeMap<String, String>,
}

/// Every object has a schema in each version, and no key that is unknown to it. The Prometheus operator's kinds have none.
fn is_of_every_versions_schema(versions: &[Rendered]) -> Result<()> {
    let scratch = tempfile::tempdir().context("cannot make a scratch folder")?;
    for Rendered { version, objects } in versions {
        let mut validate = python::KUBERNETES_SCHEMAS.module("kubernetes_validate", Progress::Shown)?;
        validate.args(["--strict", "--kubernetes-version", version]);
        let mut count = 0;
        for (name, rendered) in objects {
            let objects = rendered.split("\n---\n");
            let objects: Vec<_> =
                objects.filter(|object| !object.contains("apiVersion: monitoring.coreos.com/")).collect();
            count += objects.len();
            let file = scratch.path().join(format!("{name}-{version}.yaml"));
            fs::write(&file, objects.join("\n---\n")).context("cannot write objects")?;
            validate.arg(file);
        }
        let output = validate.output().context("cannot start Python")?;
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        // What has no schema is only warned of.
        let passed =
            said.lines().filter(|line| line.starts_with("INFO ") && line.contains(" passed ")).count();
        ensure!(
            output.status.success() && passed == count && said.lines().count() == count,
            "of {count} objects {passed} are of Kubernetes {version}'s schema:\n{said}"
        );
    }
    Ok(())
}

/// The first line in which two texts differ: its number, and both.
fn first_difference<'a>(one: &'a str, other: &'a str) -> Option<(usize, (&'a str, &'a str))> {
    let lines = |text: &'a str| text.lines().map(Some).chain(std::iter::repeat(None));
    let pairs = lines(one).zip(lines(other)).take_while(|pair| *pair != (None, None));
    let differing = (1..).zip(pairs).find(|(_, (one, other))| one != other);
    differing.map(|(number, (one, other))| (number, (one.unwrap_or_default(), other.unwrap_or_default())))
}

#[cfg(test)]
mod tests {
    use super::first_difference;

    #[test]
    fn the_first_line_that_differs_is_found_also_behind_the_end_of_one_text() {
        assert_eq!(first_difference("a\nb\n", "a\nb\n"), None);
        assert_eq!(first_difference("a\nb\n", "a\nc\n"), Some((2, ("b", "c"))));
        assert_eq!(first_difference("a\n", "a\nb\n"), Some((2, ("", "b"))));
    }
}
