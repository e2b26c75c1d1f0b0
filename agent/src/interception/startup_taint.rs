//! The taint by which a new node says that it has no agent yet, `weir.dev/agent-not-ready`: whoever makes nodes puts it on them,
//! pods that are to be intercepted do not tolerate it, and the node's agent takes it off once it is ready.

use std::{convert::Infallible, future, sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::{Node, Taint};
use kube::{
    Api, Client, ResourceExt as _,
    api::{ListParams, Patch, PatchParams},
};
use serde_json::json;

use super::{canary::Health, observed::Observed};

/// Its key; value and effect may be any.
const KEY: &str = "weir.dev/agent-not-ready";
/// How often it is looked whether the node's pods are known, once the canary has passed.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// When it is tried again, after the API server has refused or somebody has changed the node meanwhile.
const RETRY_INTERVAL: Duration = Duration::from_secs(10);

/// Waits until the agent is ready, takes the taint off `node` if it is there, and rests.
pub async fn remove_when_ready(client: Client, node: String, observed: Arc<Observed>) -> Infallible {
    // Whoever sends is `observed` itself, and lives.
    let _ = observed.watch_canary().wait_for(|health| *health == Health::Passed).await;
    while !observed.is_settled() {
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    let nodes = Api::all(client);
    let mut said = None;
    loop {
        match remove(&nodes, &node).await {
            Ok(true) => tracing::info!(event = "startup-taint-taken-off", node, "took the taint {KEY} off"),
            Ok(false) => {}
            Err(error) => {
                let message = error.to_string();
                if said.as_ref() != Some(&message) {
                    tracing::warn!(
                        event = "startup-taint-stays",
                        error = message,
                        node,
                        "cannot take the taint {KEY} off, so pods that do not tolerate it are not scheduled here; may the agent \
                         patch nodes?"
                    );
                    said = Some(message);
                }
                tokio::time::sleep(RETRY_INTERVAL).await;
                continue;
            }
        }
        return future::pending().await;
    }
}

async fn remove(nodes: &Api<Node>, name: &str) -> Result<bool, kube::Error> {
    // By a list, which the agent may ask for in any case: where there is no taint, it needs no right to change nodes.
    let own = ListParams::default().fields(&format!("metadata.name={name}"));
    let Some(node) = nodes.list(&own).await?.items.into_iter().next() else { return Ok(false) };
    let version = node.resource_version();
    let Some(taints) = without(node.spec.and_then(|spec| spec.taints)) else { return Ok(false) };
    // Of the node as it was read: other taints come and go at the same time.
    let change = json!({"metadata": {"resourceVersion": version}, "spec": {"taints": taints}});
    nodes.patch(name, &PatchParams::default(), &Patch::Merge(change)).await?;
    Ok(true)
}

/// The others; none if ours is not among them.
fn without(taints: Option<Vec<Taint>>) -> Option<Vec<Taint>> {
    let taints = taints?;
    let count = taints.len();
    let left: Vec<_> = taints.into_iter().filter(|taint| taint.key != KEY).collect();
    (left.len() < count).then_some(left)
}

#[cfg(test)]
mod tests {
    use super::{KEY, Taint, without};

    #[test]
    fn only_the_agents_own_taint_goes() {
        let taint = |key: &str, effect: &str| Taint {
            key: key.to_owned(),
            effect: effect.to_owned(),
            ..Taint::default()
        };
        let (ours, other) = (taint(KEY, "NoSchedule"), taint("runners", "NoSchedule"));
        assert_eq!(without(None), None);
        assert_eq!(without(Some(vec![other.clone()])), None);
        let both = vec![ours, other.clone(), taint(KEY, "NoExecute")];
        assert_eq!(without(Some(both)), Some(vec![other]));
    }
}
