//! An agent that knows no other address of its API server than the Service's, as a pod does, on a node that boots: kube-proxy
//! has not come yet, and may be waiting for the agent.

use std::{fs, net::TcpStream, path::Path, process::Command, time::Duration};

use serde_json::json;
use weir_tests::{
    AgentProcess, PodSpec,
    agent::{self, TrustSource},
    command,
    testbed::API_CLUSTER_IP,
    wait_until,
};

use super::{DEADLINE, Scene, escape::Attack, guard::before_reboot, shown};

/// Where a pod has its service account.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// A service account in the place where a pod has one; gone with this value.
struct Account;

impl Account {
    fn mount(scene: &Scene, namespace: &str) -> Self {
        assert!(!Path::new(ACCOUNT).exists(), "this machine is a pod");
        fs::create_dir_all(ACCOUNT).unwrap();
        let account = Self;
        let token = scene.testbed.kubectl(&["create", "token", "default", "-n", namespace]).unwrap();
        let ca = fs::read_to_string(scene.testbed.layout().path("pki/ca.crt")).unwrap();
        for (name, content) in [("token", token.trim()), ("ca.crt", ca.as_str()), ("namespace", namespace)] {
            fs::write(Path::new(ACCOUNT).join(name), content).unwrap();
        }
        account
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all("/var/run/secrets/kubernetes.io");
        let _ = fs::remove_dir("/var/run/secrets");
    }
}

/// The Service's address leads nowhere from the host, as without kube-proxy; until this value goes.
struct NoService;

impl NoService {
    fn begin() -> Self {
        command::run(Command::new("ip").args(["route", "add", "unreachable", API_CLUSTER_IP])).unwrap();
        let none = Self;
        let to = format!("{API_CLUSTER_IP}:443").parse().unwrap();
        TcpStream::connect_timeout(&to, Duration::from_secs(2)).unwrap_err();
        none
    }
}

impl Drop for NoService {
    fn drop(&mut self) {
        let _ = command::output(Command::new("ip").args(["route", "delete", "unreachable", API_CLUSTER_IP]));
    }
}

#[test]
fn an_agent_that_knows_the_service_alone_starts_on_a_cold_node_without_kube_proxy() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-incluster", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-incluster", "caller")).unwrap();
    let ask = || shown(&pod.exec(&["kubectl", "get", "namespace", "default", "-o", "name"]).unwrap());
    let attack = Attack::new(&scene, &pod);
    before_reboot(&scene, &attack);
    let account = Account::mount(&scene, "it-incluster");
    let mut configuration =
        agent::configuration(&scene.testbed, &scene.journal(), TrustSource::ClusterSigner);
    configuration["clusters"][0].as_object_mut().unwrap().remove("kubeconfig");
    configuration["clusters"][0]["inCluster"] = json!(true);
    let path = scene.scratch.path().join("agent.yaml");
    agent::write_configuration(&configuration, &path).unwrap();
    let environment = [("KUBERNETES_SERVICE_HOST", API_CLUSTER_IP), ("KUBERNETES_SERVICE_PORT", "443")];
    let start = |config: &Path, log: &str| {
        AgentProcess::spawn_with(config, &scene.scratch.path().join(log), &environment).unwrap()
    };

    // What a former agent has stored is where the API server is found.
    let no_service = NoService::begin();
    let mut agent = start(&path, "stored.log");
    agent.wait_until_ready().unwrap();
    assert!(agent.log().unwrap().contains("Service does not answer"), "{}", agent.last_lines());
    attack.direct();
    assert_eq!(ask(), (Some(0), "namespace/default\n".to_owned(), String::new()), "{}", agent.last_lines());
    assert!(attack.direct().is_empty());
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    drop(agent);

    // Where nothing is stored it waits, says so, and nobody goes past it; then kube-proxy has come.
    configuration["stateDirectory"] = json!(scene.scratch.path().join("empty"));
    agent::write_configuration(&configuration, &path).unwrap();
    let mut agent = start(&path, "nothing-stored.log");
    wait_until("the agent to say that it waits", DEADLINE, || {
        Ok(agent.log()?.contains("API server not reached").then_some(()))
    })
    .unwrap();
    drop(no_service);
    agent.wait_until_ready().unwrap();
    assert_eq!(ask().0, Some(0), "{}", agent.last_lines());
    drop(account);
}
