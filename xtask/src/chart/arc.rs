//! Whether the runner of the chart's test (`arc-runner.yaml`) is what Actions Runner Controller's own chart makes: by hand, with a checkout of
//! that project, which no registry that tests fetch from has.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize as _;
use serde_json::{Value, json};

use super::Helm;

/// The runner of the chart's test.
const RUNNER: &str = "tests/tests/integration/chart/arc-runner.yaml";
/// Of the checkout.
const CHART: &str = "charts/gha-runner-scale-set";
/// What its controller adds to the runner's container (`controllers/actions.github.com/resourcebuilder.go`, `newEphemeralRunnerPod`).
const BY_CONTROLLER: [&str; 3] = [
    "ACTIONS_RUNNER_INPUT_JITCONFIG",
    "GITHUB_ACTIONS_RUNNER_EXTRA_USER_AGENT",
    "ACTIONS_RUNNER_RETURN_VERSION_DEPRECATED_EXIT_CODE",
];

impl Helm {
    /// Compares it with what the chart of this checkout renders, both ways.
    pub(super) fn has_the_runner_of(&self, checkout: &Path) -> Result<()> {
        let values = tempfile::NamedTempFile::new().context("cannot make a scratch file")?;
        let claim = json!({
            "accessModes": ["ReadWriteOnce"], "storageClassName": "standard", "resources": {"requests": {"storage": "1Gi"}},
        });
        let given = json!({
            "githubConfigUrl": "https://github.com/organisation",
            "githubConfigSecret": "github-app",
            "controllerServiceAccount": {"name": "arc-controller", "namespace": "arc-systems"},
            "containerMode": {"type": "kubernetes", "kubernetesModeWorkVolumeClaim": claim},
        });
        fs::write(values.path(), given.to_string()).context("cannot write values")?;
        let (chart, values) = (checkout.join(CHART), values.path().to_string_lossy());
        let fixed = ["template", "runners", &chart.to_string_lossy(), "-n", "it-arc", "--values", &values];
        let theirs = objects(&self.run(&fixed)?)?;
        let ours =
            fs::read_to_string(self.root.join(RUNNER)).with_context(|| format!("cannot read {RUNNER}"))?;
        let differing = differing(&theirs, &objects(&ours)?)?;
        ensure!(differing.is_empty(), "{RUNNER} is not what {CHART} renders:\n{}", differing.join("\n"));
        Ok(())
    }
}

fn objects(text: &str) -> Result<Vec<Value>> {
    let objects = serde_yaml_ng::Deserializer::from_str(text).map(Value::deserialize);
    objects.collect::<Result<_, _>>().context("no YAML")
}

fn of<'a>(objects: &'a [Value], kind: &str, suffix: &str) -> Result<&'a Value> {
    let is_it = |object: &&Value| {
        object["kind"] == kind
            && object["metadata"]["name"].as_str().is_some_and(|name| name.ends_with(suffix))
    };
    objects.iter().find(is_it).with_context(|| format!("there is no {kind} …{suffix}"))
}

/// Where they differ, but for the image, what the controller adds, and labels, annotations and finalizers of ARC's own objects.
fn differing(theirs: &[Value], ours: &[Value]) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for kind in ["ServiceAccount", "Role", "RoleBinding"] {
        let mut object = of(theirs, kind, "-kube-mode")?.clone();
        let metadata = object["metadata"].as_object_mut().context("no metadata")?;
        metadata.retain(|key, _| ["name", "namespace"].contains(&key.as_str()));
        compare(&object, of(ours, kind, "-kube-mode")?, kind, &mut all);
    }
    let template = &of(theirs, "AutoscalingRunnerSet", "")?["spec"]["template"];
    let pod = of(ours, "Pod", "")?;
    let metadata = json!({"name": "runners-abcde", "namespace": "it-arc", "labels": {"actions-ephemeral-runner": "True"}});
    compare(&metadata, &pod["metadata"], "Pod.metadata", &mut all);
    compare(&Value::Null, &template["metadata"], "its template's metadata", &mut all);
    let mut spec = pod["spec"].clone();
    let container = &mut spec["containers"][0];
    container["image"] = template["spec"]["containers"][0]["image"].clone();
    let variables = container["env"].as_array_mut().context("no env")?;
    let added = variables.split_off(variables.len().saturating_sub(BY_CONTROLLER.len()));
    let added: Vec<_> = added.iter().map(|variable| &variable["name"]).collect();
    ensure!(added == BY_CONTROLLER, "not what the controller adds: {added:?}");
    compare(&template["spec"], &spec, "Pod.spec", &mut all);
    Ok(all)
}

fn compare(theirs: &Value, ours: &Value, at: &str, differing: &mut Vec<String>) {
    match (theirs, ours) {
        (Value::Object(theirs), Value::Object(ours)) => {
            let keys = theirs.keys().chain(ours.keys().filter(|key| !theirs.contains_key(*key)));
            for key in keys {
                let value = |object: &serde_json::Map<_, _>| object.get(key).cloned().unwrap_or_default();
                compare(&value(theirs), &value(ours), &format!("{at}.{key}"), differing);
            }
        }
        (Value::Array(theirs), Value::Array(ours)) if theirs.len() == ours.len() => {
            for (number, (one, other)) in theirs.iter().zip(ours).enumerate() {
                compare(one, other, &format!("{at}[{number}]"), differing);
            }
        }
        _ if theirs != ours => differing.push(format!("{at}: {ours}, and theirs {theirs}")),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{compare, differing, objects};

    /// What ARC's chart would have rendered, by our own copy.
    fn theirs(ours: &[Value]) -> Vec<Value> {
        let mut theirs = ours.to_vec();
        let pod = theirs.pop().unwrap();
        let mut spec = pod["spec"].clone();
        spec["containers"][0]["image"] = json!("ghcr.io/actions/actions-runner:latest");
        spec["containers"][0]["env"].as_array_mut().unwrap().truncate(3);
        theirs[0]["metadata"]["labels"] = json!({"helm.sh/chart": "gha-rs-0.14.2"});
        let metadata = json!({"name": "runners"});
        let template = json!({"template": {"spec": spec}});
        theirs.push(json!({"kind": "AutoscalingRunnerSet", "metadata": metadata, "spec": template}));
        theirs
    }

    #[test]
    fn each_change_of_the_runner_is_a_difference() {
        let text = include_str!("../../../tests/tests/integration/chart/arc-runner.yaml");
        let ours = objects(text).unwrap();
        let theirs = theirs(&ours);
        assert_eq!(differing(&theirs, &ours).unwrap(), Vec::<String>::new());
        let pod = ours.len() - 1;
        let changed = |change: &dyn Fn(&mut [Value])| {
            let mut ours = ours.clone();
            change(&mut ours);
            differing(&theirs, &ours).map_err(|error| error.to_string())
        };
        let one = |said: &str| Ok(vec![said.to_owned()]);
        assert_eq!(
            changed(&|ours| ours[pod]["spec"]["hostUsers"] = json!(false)),
            one("Pod.spec.hostUsers: false, and theirs null")
        );
        assert_eq!(
            changed(&|ours| ours[pod]["metadata"]["annotations"] = json!({"a": "b"})),
            one(r#"Pod.metadata.annotations: {"a":"b"}, and theirs null"#)
        );
        assert_eq!(
            changed(&|ours| drop(ours[pod]["spec"].as_object_mut().unwrap().remove("restartPolicy"))),
            one(r#"Pod.spec.restartPolicy: null, and theirs "Never""#)
        );
        assert_eq!(
            changed(&|ours| ours[1]["rules"][0]["verbs"][3] = json!("patch")),
            one(r#"Role.rules[0].verbs[3]: "patch", and theirs "delete""#)
        );
        let another = changed(&|ours| {
            let variables = ours[pod]["spec"]["containers"][0]["env"].as_array_mut().unwrap();
            variables.push(json!({"name": "A", "value": "b"}));
        });
        assert!(another.unwrap_err().contains("not what the controller adds"));
        let another = changed(&|ours| {
            let variables = ours[pod]["spec"]["containers"][0]["env"].as_array_mut().unwrap();
            variables.insert(0, json!({"name": "A", "value": "b"}));
        });
        assert_eq!(another.unwrap().len(), 1);
    }

    #[test]
    fn what_is_not_there_is_as_what_is_null() {
        let mut all = Vec::new();
        compare(&json!({"a": null}), &json!({}), "", &mut all);
        assert_eq!(all, Vec::<String>::new());
    }
}
