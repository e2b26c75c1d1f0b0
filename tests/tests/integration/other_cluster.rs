//! A second cluster with a CA of its own, as nodes have whose pods work on other clusters: the real API server once more, with its own
//! etcd. Which certificate a pod is shown, and where its requests go, is decided by the address that it dialled.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use serde_json::json;
use weir_common::event::{Event, Kind};
use weir_tests::{
    AgentProcess, Pod, PodSpec, Testbed,
    agent::{self, TrustSource},
    certificates::{Authority, Subject, create_key_pair, write_kubeconfig},
    command,
    components::Components,
    process::RecordedProcess,
    testbed::{API_CLUSTER_IP, free_ports},
    wait_until,
};

use super::{DEADLINE, Scene, escape::BRIDGE_ADDRESS, shown};

/// A name that its certificate has.
const NAME: &str = "other.weir.example";
/// Whom it takes for an administrator.
const TOKEN: &str = "of-the-other-cluster-alone";
const GRACE: Duration = Duration::from_secs(5);

/// The other cluster: as much of one as answers requests.
struct OtherCluster {
    processes: Vec<RecordedProcess>,
    address: String,
    kubeconfig: PathBuf,
    pki: PathBuf,
}

impl OtherCluster {
    fn start(testbed: &Testbed, folder: &Path) -> Self {
        let pki = folder.join("pki");
        std::fs::create_dir_all(&pki).unwrap();
        let authority = Authority::create(&pki, "weir-other-ca").unwrap();
        create_key_pair(&pki, "service-account").unwrap();
        let sign = |file, common_name, organization, names: &[&str]| {
            authority.sign(&Subject { file, common_name, organization, names }).unwrap();
        };
        sign("apiserver", "kube-apiserver", None, &["kubernetes", NAME, BRIDGE_ADDRESS]);
        sign("admin", "admin", Some("system:masters"), &[]);
        std::fs::write(pki.join("tokens"), format!("{TOKEN},pod,1,system:masters\n")).unwrap();
        let [client, peer] = free_ports("127.0.0.1").unwrap();
        let [port] = free_ports(BRIDGE_ADDRESS).unwrap();
        let (client, peer) = (format!("http://127.0.0.1:{client}"), format!("http://127.0.0.1:{peer}"));
        let address = format!("{BRIDGE_ADDRESS}:{port}");
        let kubeconfig = folder.join("kubeconfig");
        write_kubeconfig(&kubeconfig, &format!("https://{address}"), &pki, "admin").unwrap();
        let mut other = Self { processes: Vec::new(), address, kubeconfig, pki: pki.clone() };
        let file = |name: &str| pki.join(name).display().to_string();
        let mut run = |name: &str, flags: Vec<String>| {
            let mut command = Command::new(testbed.components().binary(name));
            let log = folder.join(format!("{name}.log"));
            other.processes.push(RecordedProcess::spawn(name, command.args(flags), &log).unwrap());
        };
        run(
            "etcd",
            vec![
                "--name=other".to_owned(),
                "--unsafe-no-fsync".to_owned(),
                "--log-level=warn".to_owned(),
                format!("--data-dir={}", folder.join("etcd").display()),
                format!("--listen-client-urls={client}"),
                format!("--advertise-client-urls={client}"),
                format!("--listen-peer-urls={peer}"),
                format!("--initial-advertise-peer-urls={peer}"),
                format!("--initial-cluster=other={peer}"),
            ],
        );
        run(
            "kube-apiserver",
            vec![
                format!("--etcd-servers={client}"),
                format!("--bind-address={BRIDGE_ADDRESS}"),
                format!("--advertise-address={BRIDGE_ADDRESS}"),
                format!("--secure-port={port}"),
                "--service-cluster-ip-range=10.97.0.0/16".to_owned(),
                format!("--cert-dir={}", file("")),
                format!("--client-ca-file={}", file("ca.crt")),
                format!("--tls-cert-file={}", file("apiserver.crt")),
                format!("--tls-private-key-file={}", file("apiserver.key")),
                format!("--token-auth-file={}", file("tokens")),
                "--service-account-issuer=https://other.weir.example".to_owned(),
                format!("--service-account-key-file={}", file("service-account.pub")),
                format!("--service-account-signing-key-file={}", file("service-account.key")),
                "--authorization-mode=RBAC".to_owned(),
                "--profiling=false".to_owned(),
            ],
        );
        wait_until("the other API server to be ready", 4 * DEADLINE, || {
            let ready = command::output(&mut other.kubectl(&["get", "--raw", "/readyz"]))?;
            let endpoint = command::output(&mut other.kubectl(&[
                "get",
                "endpointslices",
                "-n",
                "default",
                "kubernetes",
            ]))?;
            Ok((ready.status.success() && endpoint.status.success()).then_some(()))
        })
        .unwrap();
        other
    }

    fn kubectl(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(Components::find().unwrap().binary("kubectl"));
        command.arg("--kubeconfig").arg(&self.kubeconfig).args(arguments);
        command
    }
}

impl Drop for OtherCluster {
    fn drop(&mut self) {
        for process in self.processes.iter().rev() {
            let _ = process.stop(GRACE);
        }
    }
}

/// What tells the clusters apart.
const WHO: [&str; 6] =
    ["get", "namespace", "default", "-o", "jsonpath={.metadata.uid}", "--request-timeout=20s"];

/// Asks a server from the pod who it is, trusting this CA, and by another name than its address if one is given.
fn ask(
    pod: &Pod<'_>,
    server: &str,
    ca: &str,
    name: Option<&str>,
    token: &str,
) -> (Option<i32>, String, String) {
    let name = name.map(|name| format!("--tls-server-name={name}")).unwrap_or_default();
    let who = WHO.join(" ");
    let script = format!(
        "kubectl --server=https://{server} --certificate-authority={ca} {name} --token=\"{token}\" {who}"
    );
    shown(&pod.exec(&["sh", "-c", &script]).unwrap())
}

#[test]
fn two_clusters_with_different_cas_are_told_apart_by_the_address_that_a_pod_dials() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-cas", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-cas", "caller")).unwrap();
    let other = OtherCluster::start(&scene.testbed, &scene.scratch.path().join("other"));
    let account = "/var/run/secrets/kubernetes.io/serviceaccount";
    let (own_ca, own_token) = (format!("{account}/ca.crt"), format!("$(cat {account}/token)"));
    let (own_ca, own_token) = (own_ca.as_str(), own_token.as_str());
    let other_ca = "/tmp/other-ca.crt";
    pod.install(&other.pki.join("ca.crt"), other_ca).unwrap();
    let own_uid = scene.testbed.kubectl(&WHO).unwrap();
    let other_uid = command::run(&mut other.kubectl(&WHO)).unwrap();
    assert_ne!(own_uid, other_uid);

    let mut configuration = agent::configuration(&scene.testbed, &scene.journal(), TrustSource::MountedCa);
    configuration["clusters"].as_array_mut().unwrap().push(json!({
        "name": "other",
        "kubeconfig": other.kubeconfig,
        "addresses": [other.address],
        "hostNames": [NAME],
        "trust": {"mountedCa": {"certificate": other.pki.join("ca.crt"), "key": other.pki.join("ca.key")}},
    }));
    let path = scene.scratch.path().join("agent.yaml");
    agent::write_configuration(&configuration, &path).unwrap();
    let mut agent = AgentProcess::start(&path, &scene.scratch.path().join("agent.log")).unwrap();
    let own = format!("{API_CLUSTER_IP}:443");
    // Each by its own certificate, and the answer is that server's.
    for (server, ca, name, token, uid) in [
        (&own, own_ca, None, own_token, &own_uid),
        (&own, own_ca, Some("kubernetes.default.svc"), own_token, &own_uid),
        (&other.address, other_ca, None, TOKEN, &other_uid),
        (&other.address, other_ca, Some(NAME), TOKEN, &other_uid),
    ] {
        let said = ask(&pod, server, ca, name, token);
        assert_eq!(
            said,
            (Some(0), uid.clone(), String::new()),
            "{server} as {name:?}: {}",
            agent.last_lines()
        );
    }
    let opened = |events: &[Event], cluster: &str| {
        let of_pod = events.iter().filter(|event| event.cluster == cluster);
        of_pod.filter(|event| matches!(event.kind, Kind::RequestOpened(_))).count()
    };
    let before = scene.events();
    assert!(opened(&before, "testbed") >= 2 && opened(&before, "other") >= 2);
    // A name of the other cluster does not lead there, nor is its certificate shown at this one's address.
    for (server, ca, name, token) in [
        (&own, other_ca, None, TOKEN),
        (&own, other_ca, Some(NAME), TOKEN),
        (&own, own_ca, Some(NAME), own_token),
        (&other.address, own_ca, None, own_token),
        (&other.address, own_ca, Some("kubernetes.default.svc"), own_token),
    ] {
        let (code, out, err) = ask(&pod, server, ca, name, token);
        assert_eq!((code, out.as_str()), (Some(1), ""), "{server} as {name:?}: {err}");
        let refused = err.contains("certificate") || err.contains("unrecognized name");
        assert!(refused, "{server} as {name:?}: {err}");
    }
    // One cluster's token is nobody's in the other.
    for (server, ca, token) in [(&own, own_ca, TOKEN), (&other.address, other_ca, own_token)] {
        let (code, _, err) = ask(&pod, server, ca, None, token);
        assert!(
            code == Some(1) && err.contains("Unauthorized") || err.contains("logged in"),
            "{server}: {err}"
        );
    }
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
}
