//! Approves the agents' requests for serving certificates, so that no agent can: whoever takes a node gets certificates of the
//! API server's names alone, and each for a day.
//!
//! Every request of the signer is looked at, and one is answered that an agent has made or that bears an agent's name; all others
//! (kubelets' own) are left to whoever answers those. What is not approved is denied with the reason, which is logged too. The
//! verdict itself is `request`'s.

use std::{convert::Infallible, pin::pin, time::Duration};

use futures::StreamExt as _;
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use kube::{
    Api, Client, ResourceExt as _,
    api::{Patch, PatchParams},
    runtime::watcher,
};
use serde_json::json;
use tokio::time::Instant;

use super::{
    ServingNames,
    approvals::Approvals,
    cluster_signer::{CONFLICT, NAME_PREFIX},
    request::{self, Asked, Denial},
};

/// What the API server puts into a user's attributes when its token is bound to a pod (k8s.io/apiserver
/// `pkg/authentication/serviceaccount`, `NodeNameKey`).
const NODE_NAME_EXTRA: &str = "authentication.kubernetes.io/node-name";
/// `reason` of the conditions that are written here.
const REASON: &str = "WeirApprover";
/// How long nothing may be heard of the requests before all are read anew: a connection may have died without a word.
const SILENCE_MAX: Duration = Duration::from_mins(2);
/// How long the API server may take over one request.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// How many requests are read at a time.
const PAGE: u32 = 8;
/// First pause after a failure.
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// Longest pause after a failure. An agent waits for half a minute.
const RETRY_LONGEST: Duration = Duration::from_secs(8);
/// HTTP: it is gone.
const NOT_FOUND: u16 = 404;

/// Why the approver cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ApproverError {
    /// Requests cannot be read.
    #[error(
        "cannot read certificatesigningrequests; may the approver's service account list and watch them, and is the API \
         server up?"
    )]
    Read(#[source] Box<watcher::Error>),
}

/// Answers the requests of `agent` (a user name) to `signer`; `names` gives all names of the API server as they are at that time. Whatever
/// fails later is tried again, for ever; `approvals` counts.
///
/// # Errors
/// Requests cannot be read at the start.
pub async fn run(
    client: Client,
    (agent, signer): (&str, &str),
    names: impl AsyncFn() -> Result<ServingNames, String>,
    approvals: &Approvals,
) -> Result<Infallible, ApproverError> {
    let requests: Api<CertificateSigningRequest> = Api::all(client);
    let of_signer = watcher::Config::default().fields(&format!("spec.signerName={signer}"));
    // Anybody who may make one makes it as large as etcd takes it.
    let of_signer = of_signer.page_size(PAGE);
    let (mut began, mut pause) = (false, RETRY_FIRST);
    loop {
        let mut events = pin!(watcher(requests.clone(), of_signer.clone()));
        let (mut failed_at, mut all_read) = (None, false);
        // One that cannot be answered keeps nobody waiting: the others' turn comes first, and then all are read anew. Silence is
        // no failure.
        while let Ok(Some(event)) = tokio::time::timeout_at(until(failed_at, pause), events.next()).await {
            match event {
                Ok(watcher::Event::InitApply(request) | watcher::Event::Apply(request)) => {
                    let answered = answer(&requests, &request, (agent, signer), &names, approvals);
                    let timed = tokio::time::timeout(ANSWER_MAX, answered).await;
                    let slow = || Err(format!("no answer within {} s", ANSWER_MAX.as_secs()));
                    if let Err(error) = timed.unwrap_or_else(|_| slow()) {
                        wait(&error, pause);
                        approvals.unanswered();
                        failed_at.get_or_insert_with(Instant::now);
                    }
                }
                Ok(watcher::Event::InitDone) => {
                    if !began {
                        tracing::info!(
                            event = "approver-answers",
                            agent,
                            signer,
                            "answers requests for serving certificates"
                        );
                    }
                    (began, all_read) = (true, true);
                    approvals.reads();
                    if failed_at.is_none() {
                        pause = RETRY_FIRST;
                    }
                }
                Ok(_) => {}
                Err(error) if !began => return Err(ApproverError::Read(Box::new(error))),
                Err(error) => {
                    wait(&error.to_string(), pause);
                    approvals.unread();
                    failed_at = Some(Instant::now());
                    tokio::time::sleep(pause).await;
                    break;
                }
            }
        }
        if !all_read && failed_at.is_none() {
            wait(&format!("not all are read within {} s", SILENCE_MAX.as_secs()), Duration::ZERO);
            approvals.unread();
        }
        if failed_at.is_some() {
            pause = (pause * 2).min(RETRY_LONGEST);
        }
    }
}

/// When all requests are read anew, if nothing is heard of them until then or one could not be answered.
fn until(failed_at: Option<Instant>, pause: Duration) -> Instant {
    failed_at.map_or_else(|| Instant::now() + SILENCE_MAX, |at| at + pause)
}

fn wait(error: &str, pause: Duration) {
    tracing::error!(
        event = "approver-waits",
        error,
        retry_in_s = pause.as_secs(),
        "requests for serving certificates wait; agents serve with what they have meanwhile"
    );
}

/// Approves or denies one request, if it is one for here to answer and nobody has.
async fn answer(
    requests: &Api<CertificateSigningRequest>,
    request: &CertificateSigningRequest,
    (agent, signer): (&str, &str),
    names: &impl AsyncFn() -> Result<ServingNames, String>,
    approvals: &Approvals,
) -> Result<(), String> {
    if !is_for_here(request, agent, signer) {
        return Ok(());
    }
    let name = request.name_any();
    let node = node(request).unwrap_or_default();
    let user = request.spec.username.as_deref().unwrap_or_default();
    // For others the API server need not be asked: they are denied whatever its names are.
    let names = if user == agent { names().await? } else { ServingNames::default() };
    let verdict = judge(request, agent, &names);
    let (kind, message) = match &verdict {
        Ok(()) => {
            ("Approved", format!("the agent of node {node}, for names of the API server, for a day at most"))
        }
        Err(denial) => ("Denied", denial.to_string()),
    };
    // Of the request as it was judged: one that was deleted and made anew under its name is another one.
    let change = json!({
        "metadata": {"uid": request.uid(), "resourceVersion": request.resource_version()},
        "status": {"conditions": [{"type": kind, "status": "True", "reason": REASON, "message": message}]},
    });
    match requests.patch_approval(&name, &PatchParams::default(), &Patch::Merge(&change)).await {
        Ok(_) => {}
        // Whatever became of it comes as an event of its own.
        Err(kube::Error::Api(status)) if matches!(status.code, CONFLICT | NOT_FOUND) => return Ok(()),
        Err(error) => return Err(format!("cannot answer {name}: {error}")),
    }
    approvals.answered(&verdict);
    match verdict {
        Ok(()) => tracing::info!(event = "certificate-approved", name, node, "approved"),
        Err(_) => tracing::warn!(event = "certificate-denied", name, node, user, reason = message, "denied"),
    }
    Ok(())
}

fn is_for_here(request: &CertificateSigningRequest, agent: &str, signer: &str) -> bool {
    let conditions = request.status.as_ref().and_then(|status| status.conditions.as_ref());
    let is_open = conditions.is_none_or(Vec::is_empty);
    let is_ours =
        request.spec.username.as_deref() == Some(agent) || request.name_any().starts_with(NAME_PREFIX);
    // The selector says so too; it is not for a server's mistake to have others' signers answered.
    is_open && is_ours && request.spec.signer_name == signer
}

/// The node of the pod that the maker's token is bound to; who has several has none.
fn node(request: &CertificateSigningRequest) -> Option<&str> {
    match request.spec.extra.as_ref()?.get(NODE_NAME_EXTRA)?.as_slice() {
        [node] => Some(node),
        _ => None,
    }
}

fn judge(request: &CertificateSigningRequest, agent: &str, allowed: &ServingNames) -> Result<(), Denial> {
    let spec = &request.spec;
    let asked = Asked {
        user: spec.username.as_deref().unwrap_or_default(),
        node: node(request),
        pem: &spec.request.0,
        usages: spec.usages.as_deref().unwrap_or_default(),
        expiration_seconds: spec.expiration_seconds,
    };
    request::judge(&asked, agent, allowed)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use tokio::sync::mpsc;

    use super::*;
    use crate::trust::cluster_signer::SIGNER_NAME;

    const AGENT: &str = "system:serviceaccount:weir-system:weir-agent";

    fn request(change: impl FnOnce(&mut Value)) -> CertificateSigningRequest {
        let mut request = json!({
            "metadata": {"name": "weir-serving-1"},
            "spec": {"request": "", "signerName": SIGNER_NAME, "username": AGENT,
                "extra": {"authentication.kubernetes.io/node-name": ["node-a"]}},
        });
        change(&mut request);
        serde_json::from_value(request).expect("a request")
    }

    #[test]
    fn only_open_requests_that_say_they_are_an_agents_are_answered() {
        let answered = |change: fn(&mut Value)| is_for_here(&request(change), AGENT, SIGNER_NAME);
        assert!(answered(|_| {}));
        assert!(answered(|request| request["metadata"]["name"] = "csr-abc".into()), "by its maker");
        assert!(answered(|request| request["spec"]["username"] = "somebody".into()), "by its name");
        assert!(!answered(|request| {
            request["metadata"]["name"] = "csr-abc".into();
            request["spec"]["username"] = "system:node:node-a".into();
        }));
        assert!(!answered(
            |request| request["spec"]["signerName"] = "kubernetes.io/kube-apiserver-client".into()
        ));
        let of_eks =
            request(|request| request["spec"]["signerName"] = "beta.eks.amazonaws.com/app-serving".into());
        assert!(is_for_here(&of_eks, AGENT, "beta.eks.amazonaws.com/app-serving"));
        assert!(!is_for_here(&of_eks, AGENT, SIGNER_NAME));
        for kind in ["Approved", "Denied", "Failed"] {
            let conditions = json!({"conditions": [{"type": kind, "status": "True"}]});
            let answered = request(|request| request["status"] = conditions);
            assert!(!is_for_here(&answered, AGENT, SIGNER_NAME), "{kind}");
        }
    }

    /// An API server with two requests, which fails at one of them; tells whose answers it was sent.
    fn failing(answered: mpsc::UnboundedSender<String>) -> Client {
        let service = tower::service_fn(move |asked: http::Request<kube::client::Body>| {
            let path = asked.uri().path().to_owned();
            let of = |name: &str| {
                let mut request = request(|request| request["spec"]["username"] = "somebody".into());
                request.metadata.name = Some(name.to_owned());
                request
            };
            let (status, body) = match path.split('/').nth_back(1) {
                Some(name) if path.ends_with("/approval") => {
                    let _ = answered.send(name.to_owned());
                    let failed = name == "weir-serving-0";
                    let failure =
                        json!({"kind": "Status", "status": "Failure", "code": 500, "message": "too large"});
                    if failed { (500, failure) } else { (200, json!(of(name))) }
                }
                _ if asked.uri().query().is_some_and(|query| query.contains("watch=true")) => {
                    (200, Value::Null)
                }
                _ => {
                    let items = ["weir-serving-0", "weir-serving-1"].map(of);
                    (200, json!({"metadata": {"resourceVersion": "1"}, "items": items}))
                }
            };
            let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
            let response = http::Response::builder().status(status).body(kube::client::Body::from(body));
            async { Ok::<_, Infallible>(response.expect("a response")) }
        });
        Client::new(service, "default")
    }

    #[tokio::test]
    async fn one_that_cannot_be_answered_keeps_no_other_waiting() {
        let (sender, mut answered) = mpsc::unbounded_channel();
        let names = async || Ok(ServingNames::default());
        let approvals = Approvals::default();
        let approver = run(failing(sender), (AGENT, SIGNER_NAME), names, &approvals);
        let both = async {
            let both = [answered.recv().await, answered.recv().await];
            while !approvals.is_reading() {
                tokio::task::yield_now().await;
            }
            both
        };
        let both = tokio::select! {
            ended = approver => panic!("{ended:?}"),
            both = both => both,
        };
        assert_eq!(both, ["weir-serving-0", "weir-serving-1"].map(|name| Some(name.to_owned())));
        let denied: Vec<_> = approvals.denied().filter(|(_, count)| *count > 0).collect();
        assert_eq!((approvals.approved(), denied.as_slice()), (0, &[("not_the_agent", 1)][..]));
        assert_eq!(approvals.failed(), [("read", 0), ("answer", 1)]);
    }

    /// An API server that has no requests, and watches none.
    fn without_watches() -> Client {
        let service = tower::service_fn(move |asked: http::Request<kube::client::Body>| {
            let is_watch = asked.uri().query().is_some_and(|query| query.contains("watch=true"));
            let (status, body) = if is_watch {
                (500, json!({"kind": "Status", "status": "Failure", "code": 500, "message": "no watches"}))
            } else {
                (200, json!({"metadata": {"resourceVersion": "1"}, "items": []}))
            };
            let body = kube::client::Body::from(body.to_string().into_bytes());
            let response = http::Response::builder().status(status).body(body);
            async { Ok::<_, Infallible>(response.expect("a response")) }
        });
        Client::new(service, "default")
    }

    #[tokio::test]
    async fn one_that_cannot_read_requests_says_so_until_it_can() {
        let approvals = Approvals::default();
        let names = async || Ok(ServingNames::default());
        let failed = async {
            while approvals.failed() != [("read", 1), ("answer", 0)] {
                tokio::task::yield_now().await;
            }
            approvals.is_reading()
        };
        let is_reading = tokio::select! {
            ended = run(without_watches(), (AGENT, SIGNER_NAME), names, &approvals) => panic!("{ended:?}"),
            is_reading = failed => is_reading,
        };
        assert!(!is_reading);
    }

    #[test]
    fn who_is_of_several_nodes_is_of_none() {
        let of = |nodes: Value| {
            let request = request(|request| {
                request["spec"]["extra"] = json!({"authentication.kubernetes.io/node-name": nodes});
            });
            node(&request).map(str::to_owned)
        };
        assert_eq!(of(json!(["a"])), Some("a".to_owned()));
        assert_eq!((of(json!([])), of(json!(["a", "b"]))), (None, None));
        assert_eq!(node(&request(|request| request["spec"]["extra"] = Value::Null)), None);
    }
}
