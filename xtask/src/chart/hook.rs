//! How long the hook of `helm uninstall` may take, in what the chart renders.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{CHART, Helm};

/// What the Job takes beside its patience, in seconds: a question of its last look, and that for its DaemonSet to go, each 10 s at most
/// (`agent/src/interception/uninstallers.rs`); a pod that is scheduled, and an image that is pulled.
const BESIDE: u64 = 120;

impl Helm {
    /// The Job that no node takes ends by itself, and no other one does: its time is longer than all that it waits for, with agents that drain
    /// as long as they may.
    pub(super) fn gives_the_hook_its_time(&self) -> Result<()> {
        for drain in [0_u64, 30, 3600] {
            let set = format!("config.limits.drainSeconds={drain}");
            let rendered =
                self.template(CHART, &["--set", &set, "--show-only", "templates/uninstall.yaml"])?;
            let of = |kind: &str| -> Result<Value> {
                let objects = rendered.split("\n---\n");
                let mut objects = objects.filter(|object| object.contains(&format!("\nkind: {kind}\n")));
                let object = objects.next().with_context(|| format!("the hook has no {kind}"))?;
                Ok(serde_yaml_ng::from_str::<Value>(object)?["spec"].take())
            };
            let (job, set) = (of("Job")?, of("DaemonSet")?);
            let all = patience(&job["template"]["spec"]["containers"][0])?;
            let node = patience(&set["template"]["spec"]["initContainers"][0])?;
            let time = job["activeDeadlineSeconds"].as_u64().context("a Job that no node takes stays")?;
            ensure!(drain < node && node < all, "{drain} s of draining, {node} s on a node, {all} s for all");
            ensure!(all + BESIDE <= time, "the Job ends after {time} s; it waits for {all} s");
        }
        Ok(())
    }
}

/// What a container's `--patience` is.
fn patience(container: &Value) -> Result<u64> {
    let words: Vec<_> = container["command"].as_array().into_iter().flatten().map(Value::as_str).collect();
    let mut values = words.iter().skip_while(|word| **word != Some("--patience")).skip(1);
    let value = values.next().copied().flatten().context("no --patience")?;
    Ok(value.parse()?)
}
