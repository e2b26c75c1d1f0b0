//! Asking the API server for one pod by name: one that the container runtime starts before the watch has it, and one that
//! somebody wants explained.

use std::{collections::BTreeMap, time::Duration};

use futures::{
    Stream, StreamExt as _,
    stream::{self, FuturesUnordered},
};
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::{Api, Client, ResourceExt as _};
use tokio::sync::mpsc;
use weir_common::event;

use super::{cluster_watch::static_hash, pod::PodUid};
use crate::proxy::Labels;

/// Pods that are asked for at a time.
const AT_ONCE: usize = 8;
/// Pods that wait to be asked for; beyond it one is left to the watch.
pub const NAMED_MAX: usize = 256;
/// How long an answer may take. Nobody waits for a container's start longer than that.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// How long after a question it is asked again, beside the first: a connection that was open may have died without a word, and a
/// container waits a second and a half. Each question that has no answer yet keeps its connection from the next one.
const AGAIN: Duration = Duration::from_millis(250);
/// How often it is asked at most.
const TRIES: usize = 4;
/// Longest name of a pod or namespace (DNS subdomain, k8s.io/apimachinery `pkg/util/validation`).
const NAME_MAX: usize = 253;

/// A pod that somebody else than the API server names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedPod {
    namespace: String,
    name: String,
    uid: PodUid,
}

impl NamedPod {
    /// None for names that no pod can have: they become a part of a request's path.
    pub fn new(namespace: &str, name: &str, uid: &PodUid) -> Option<Self> {
        let fits = |name: &str| {
            let allowed =
                |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte);
            (1..=NAME_MAX).contains(&name.len())
                && name.bytes().all(allowed)
                && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        };
        let named = || Self { namespace: namespace.to_owned(), name: name.to_owned(), uid: uid.clone() };
        (fits(namespace) && fits(name)).then(named)
    }
}

/// The pods that are named, each with its namespace; those that the API server does not have under that UID are left out.
pub(super) fn follow(
    client: Client,
    named: mpsc::Receiver<NamedPod>,
) -> impl Stream<Item = (Pod, Namespace)> {
    let named = stream::unfold(named, |mut named| async move { Some((named.recv().await?, named)) });
    let found = named.map(move |named| ask(client.clone(), named));
    found.buffer_unordered(AT_ONCE).filter_map(std::future::ready)
}

async fn ask(client: Client, named: NamedPod) -> Option<(Pod, Namespace)> {
    let NamedPod { namespace, name, uid } = &named;
    let problem =
        match tokio::time::timeout(ANSWER_MAX, soonest(|| get(client.clone(), namespace, name))).await {
            Ok(Ok(found)) if is(&found.0, uid) => return Some(found),
            // One that bore the name before, or bears it since.
            Ok(Ok(_)) => "it is another pod of that name".to_owned(),
            Ok(Err(error)) => error.to_string(),
            Err(elapsed) => elapsed.to_string(),
        };
    tracing::warn!(event = "pod-not-looked-up", %namespace, name, problem, "the API server does not give a pod that starts; the watch must do");
    None
}

/// Whether the pod's cgroup bears this UID.
fn is(pod: &Pod, uid: &PodUid) -> bool {
    pod.metadata.uid.as_deref() == Some(uid.as_str()) || static_hash(pod).as_ref() == Some(uid)
}

/// The first answer to a question that is asked again while there is none.
async fn soonest<T>(ask: impl Fn() -> T) -> T::Output
where
    T: Future,
{
    let (mut asked, mut again) = (FuturesUnordered::new(), tokio::time::interval(AGAIN));
    loop {
        tokio::select! {
            biased;
            Some(answer) = asked.next() => return answer,
            _ = again.tick(), if asked.len() < TRIES => asked.push(ask()),
        }
    }
}

async fn get(client: Client, namespace: &str, name: &str) -> kube::Result<(Pod, Namespace)> {
    let (pods, namespaces) =
        (Api::<Pod>::namespaced(client.clone(), namespace), Api::<Namespace>::all(client));
    tokio::try_join!(pods.get(name), namespaces.get(namespace))
}

/// Why a pod that was named cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum PodLookupError {
    /// Not `NAMESPACE/NAME`.
    #[error("{text:?} is no pod; say NAMESPACE/NAME")]
    Name {
        /// What was given.
        text: String,
    },
    /// The API server does not give it.
    #[error("cannot read {what}: {message}")]
    Read {
        /// Pod or namespace.
        what: String,
        /// What the API server says.
        message: String,
    },
}

/// A pod that is named `NAMESPACE/NAME`, on whatever node, as the agent would know it.
///
/// # Errors
/// It is not named so, or the API server does not give it.
pub async fn describe(client: Client, named: &str) -> Result<(event::Pod, Labels), PodLookupError> {
    let malformed = || PodLookupError::Name { text: named.to_owned() };
    let (namespace, name) = named.split_once('/').ok_or_else(malformed)?;
    let failed =
        |what: String| move |error: kube::Error| PodLookupError::Read { what, message: error.to_string() };
    let pods = Api::<Pod>::namespaced(client.clone(), namespace);
    let pod = pods.get(name).await.map_err(failed(format!("pod {named}")))?;
    let namespaces = Api::<Namespace>::all(client);
    let labels = namespaces.get(namespace).await.map_err(failed(format!("namespace {namespace}")))?;
    let spec = pod.spec.as_ref();
    let described = event::Pod {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        uid: pod.metadata.uid.clone().unwrap_or_default(),
        service_account: spec.and_then(|spec| spec.service_account_name.clone()).unwrap_or_default(),
        ip: pod.status.as_ref().and_then(|status| status.pod_ip.clone()),
        intent: BTreeMap::new(),
    };
    Ok((described, Labels { pod: pod.labels().clone(), namespace: labels.labels().clone() }))
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, future::pending};

    use tokio::time::Instant;

    use super::{AGAIN, TRIES, soonest};

    #[tokio::test]
    async fn a_question_whose_connection_has_died_is_asked_again_beside_it() {
        let asked = Cell::new(0);
        // The first `dead` ones never have an answer.
        let ask = |dead: usize| {
            let number = asked.replace(asked.get() + 1);
            async move { if number < dead { pending().await } else { number } }
        };
        assert_eq!((soonest(|| ask(0)).await, asked.replace(0)), (0, 1));
        let begin = Instant::now();
        assert_eq!((soonest(|| ask(2)).await, asked.replace(0)), (2, 3));
        assert!(begin.elapsed() >= AGAIN * 2, "each has its time");
        let never = tokio::time::timeout(AGAIN * 8, soonest(|| ask(usize::MAX))).await;
        assert!(never.is_err() && asked.get() == TRIES, "asked {} times", asked.get());
    }
}
