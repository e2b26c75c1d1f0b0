//! Roles of AWS and their tokens on the real API server, with aws-iam-authenticator as its webhook and moto as STS behind the
//! real host name.
//!
//! Who asks is `weir_agent::aws` in a process of its own, this binary run again: there STS's host name leads to the rig.

use std::{
    fs,
    path::PathBuf,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::future::join_all;
use serde_json::{Value, json};
use weir_agent::aws::{
    AssumeRole, Aws, EksCluster, Role, RoleArn, RoleRequest, SessionName, SourceIdentity, Tag,
};
use weir_tests::{
    AwsRig,
    aws::{self, Fault, RoleMapping},
    command, wait_until,
};

use super::{DEADLINE, Scene, shown};

/// In the environment of who asks: what it is to ask for.
const ORDER: &str = "WEIR_TEST_EKS_ORDER";
/// The session that a test's requests are of.
const SESSION: &str = "0198f1f0-5b8e-7c3a-9d55-1d2f6a7b8c9d";
/// How long kubectl may take that is refused at once.
const AT_ONCE: Duration = Duration::from_secs(2);
/// Whoever asks a server that says nothing is told so within 12 s; on a busy machine, and with the start of a process, later.
const SILENCE_MAX: Duration = Duration::from_secs(120);

const MAPPINGS: &[RoleMapping] = &[
    RoleMapping { role: "deploy", username: "deploy:{{SessionName}}", groups: &["it-eks-deployers"] },
    RoleMapping { role: "idle", username: "idle:{{SessionName}}", groups: &[] },
];

fn request(order: &Value) -> RoleRequest {
    let role = AssumeRole {
        role_arn: RoleArn::parse(&aws::role_arn(order["role"].as_str().unwrap())).unwrap(),
        session_name: SessionName::fit(SESSION),
        source_identity: Some(SourceIdentity::fit("alice@example.com")),
        tags: vec![Tag::new("weir-session", SESSION).unwrap(), Tag::new("namespace", "it-eks").unwrap()],
        external_id: None,
        duration: Duration::from_hours(1),
        policy: None,
        policy_arns: Vec::new(),
        chain: Vec::new(),
    };
    let cluster = EksCluster::new(order["cluster"].as_str().unwrap(), aws::REGION).unwrap();
    RoleRequest::new(Role::Assume(role), cluster).unwrap()
}

/// Runs in the rig's view: asks as often as it is told, all at once, and says what came of it.
fn ask(order: &str) {
    let order: Value = serde_json::from_str(order).unwrap();
    let (aws, request) = (Arc::new(Aws::new()), request(&order));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let outcomes = runtime.block_on(async {
        let asks = (0..order["times"].as_u64().unwrap()).map(|_| {
            let (aws, request) = (aws.clone(), request.clone());
            tokio::spawn(async move { aws.bearer(&request).await })
        });
        join_all(asks).await
    });
    let answers: Vec<Value> = outcomes
        .into_iter()
        .map(|outcome| match outcome.unwrap() {
            Ok(bearer) => json!({
                "token": bearer.header().to_str().unwrap().strip_prefix("Bearer ").unwrap(),
                "accessKeyId": bearer.access_key_id(),
                "assumedRole": bearer.assumed_role_arn(),
            }),
            Err(error) => json!({"error": error.kind(), "text": error.to_string()}),
        })
        .collect();
    assert!(answers.iter().all(|answer| answer == &answers[0]), "not all have the same answer");
    fs::write(order["answer"].as_str().unwrap(), answers[0].to_string()).unwrap();
}

/// Has [`ask`] run in the rig's view; gives the answer that all had.
#[track_caller]
fn asked(rig: &AwsRig, role: &str, cluster: &str, times: u32) -> Value {
    let answer = tempfile::NamedTempFile::new().unwrap();
    let order = json!({"role": role, "cluster": cluster, "times": times, "answer": answer.path()});
    let mut again = rig.in_view(&std::env::current_exe().unwrap());
    again.args(["--exact", "eks::a_role_is_a_user_of_the_cluster", "--test-threads=1"]);
    command::run(again.env(ORDER, order.to_string())).unwrap();
    serde_json::from_str(&fs::read_to_string(answer.path()).unwrap()).unwrap()
}

/// kubectl with nothing but a token.
fn kubectl(scene: &Scene, token: &str, arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut kubectl = Command::new(scene.testbed.components().binary("kubectl"));
    kubectl
        .arg("--kubeconfig")
        .arg(scene.testbed.layout().kubeconfig("anonymous"))
        .arg(format!("--token={token}"));
    kubectl.env("KUBECACHEDIR", scene.scratch.path().join("kubectl-cache")).env_remove("KUBECONFIG");
    shown(&command::output(kubectl.args(arguments)).unwrap())
}

/// The user of the finished request with this URI in the API server's audit log.
fn user_of(scene: &Scene, since: jiff::Timestamp, uri: &str) -> Value {
    let log: PathBuf = scene.testbed.layout().audit_log();
    wait_until("the request to be in the API server's audit log", DEADLINE, || {
        let text = fs::read_to_string(&log).unwrap();
        let entries = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        // A testbed that stays up has those of former runs.
        let is_since = |at: &str| at.parse::<jiff::Timestamp>().is_ok_and(|at| at >= since);
        let mut found = entries
            .filter(|entry| entry["requestURI"].as_str().is_some_and(|at| at.starts_with(uri)))
            .filter(|entry| entry["requestReceivedTimestamp"].as_str().is_some_and(is_since));
        Ok(found.find(|entry| entry["stage"] == "ResponseComplete").map(|entry| entry["user"].clone()))
    })
    .unwrap()
}

#[test]
fn a_role_is_a_user_of_the_cluster() {
    if let Ok(order) = std::env::var(ORDER) {
        return ask(&order);
    }
    let Some(mut scene) = Scene::new() else { return };
    let began = jiff::Timestamp::now();
    scene.namespace("it-eks", false);
    let binding = "{apiVersion: rbac.authorization.k8s.io/v1, kind: RoleBinding, metadata: {name: deployers, namespace: it-eks},
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: edit},
subjects: [{kind: Group, name: it-eks-deployers, apiGroup: rbac.authorization.k8s.io}]}";
    scene.testbed.apply(binding).unwrap();
    let rig = AwsRig::start(&scene.testbed, MAPPINGS).unwrap();

    // A thousand at once, one call.
    let answer = asked(&rig, "deploy", aws::CLUSTER, 1000);
    let token = answer["token"].as_str().expect("a token");
    let calls = rig.calls();
    assert_eq!(calls.len(), 1, "{calls:?}");
    let parameter = |name: &str| calls[0].parameters.get(name).map(String::as_str);
    assert_eq!(calls[0].action, "AssumeRole");
    assert_eq!(calls[0].access_key_id, "AKIAWEIRAGENT");
    assert_eq!(parameter("RoleSessionName"), Some(SESSION));
    assert_eq!(parameter("SourceIdentity"), Some("alice@example.com"));
    assert_eq!(parameter("Tags.member.1.Value"), Some(SESSION));

    // RBAC of the mapped group decides.
    let (code, out, err) = kubectl(&scene, token, &["create", "configmap", "one", "-n", "it-eks"]);
    assert_eq!(code, Some(0), "{out}{err}\n{}", rig.authenticator_log());
    let (code, _, err) = kubectl(&scene, token, &["get", "configmaps", "-n", "kube-system"]);
    assert!(code == Some(1) && err.contains(&format!("User \"deploy:{SESSION}\" cannot list")), "{err}");

    // The cluster's own audit log leads back to the session, and to the key that CloudTrail knows.
    let user = user_of(&scene, began, "/api/v1/namespaces/it-eks/configmaps?fieldManager=kubectl-create");
    let extra = |name: &str| user["extra"][name][0].as_str().unwrap_or_default().to_owned();
    assert_eq!(user["username"], format!("deploy:{SESSION}"));
    assert_eq!(extra("sessionName"), SESSION);
    assert_eq!(extra("accessKeyId"), answer["accessKeyId"].as_str().unwrap());
    assert_eq!(extra("arn"), answer["assumedRole"].as_str().unwrap());
    assert_eq!(extra("canonicalArn"), aws::role_arn("deploy"));

    // A role without rights has none.
    let answer = asked(&rig, "idle", aws::CLUSTER, 1);
    let (code, _, err) = kubectl(&scene, answer["token"].as_str().unwrap(), &["get", "pods", "-n", "it-eks"]);
    assert!(code == Some(1) && err.contains("Forbidden"), "{err}");
}

#[test]
fn a_token_is_good_for_its_cluster_and_its_roles_only() {
    let Some(scene) = Scene::new() else { return };
    let rig = AwsRig::start(&scene.testbed, MAPPINGS).unwrap();
    for (role, cluster) in [("deploy", "another-cluster"), ("unmapped", aws::CLUSTER)] {
        let answer = asked(&rig, role, cluster, 1);
        let (code, out, err) = kubectl(&scene, answer["token"].as_str().unwrap(), &["auth", "whoami"]);
        assert!(code == Some(1) && err.contains("Unauthorized"), "{role} {cluster}: {out}{err}");
    }
    let log = rig.authenticator_log();
    assert!(log.contains("SignatureDoesNotMatch") && log.contains("ARN is not mapped"), "{log}");
}

#[test]
fn what_sts_refuses_is_told_and_not_asked_again_for_each_request() {
    let Some(scene) = Scene::new() else { return };
    let rig = AwsRig::start(&scene.testbed, MAPPINGS).unwrap();
    let message = "User: arn:aws:iam::123456789012:user/weir is not authorized to perform: sts:TagSession on resource: x";
    rig.fail(Some(Fault::Error { status: 403, code: "AccessDenied", message }));
    let answer = asked(&rig, "deploy", aws::CLUSTER, 1000);
    let text = answer["text"].as_str().unwrap();
    assert!(
        answer["error"] == "denied" && text.contains(message) && text.contains("trust policy"),
        "{answer}"
    );
    assert_eq!(rig.calls().len(), 1);

    rig.fail(Some(Fault::Error { status: 400, code: "Throttling", message: "Rate exceeded" }));
    let answer = asked(&rig, "deploy", aws::CLUSTER, 1000);
    assert_eq!(answer["error"], "throttled", "{answer}");
    assert_eq!(rig.calls().len(), 1 + 3, "one call with its tries");

    rig.fail(Some(Fault::Silence));
    let began = Instant::now();
    let answer = asked(&rig, "deploy", aws::CLUSTER, 1000);
    assert_eq!(answer["error"], "unreachable", "{answer}");
    assert!(began.elapsed() < SILENCE_MAX, "{:?}", began.elapsed());
}

#[test]
fn a_token_that_nobody_knows_is_refused_at_once_while_no_authenticator_runs() {
    // Where the API server tries its webhook again, each takes more than 3 s; where it does not, a busy machine may be as long about one.
    const TRIES: usize = 20;
    let Some(scene) = Scene::new() else { return };
    let mut fastest = Duration::MAX;
    for _ in 0..TRIES {
        let began = Instant::now();
        let (code, _, err) = kubectl(&scene, "k8s-aws-v1.bm9uZQ", &["auth", "whoami"]);
        assert!(code == Some(1) && err.contains("Unauthorized"), "{err}");
        fastest = fastest.min(began.elapsed());
        if fastest < AT_ONCE {
            break;
        }
    }
    assert!(fastest < AT_ONCE, "{fastest:?}");
}
