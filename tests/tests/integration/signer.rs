//! Trust tier T0 where the cluster's signer fails: nobody approves, somebody denies, nothing is signed, or something that pods would refuse.
//! What `doctor` says of each, and an agent that starts meanwhile: it keeps its pods refused, says why and what to do, and serves as soon as
//! it is mended. The signers are names that nobody in the cluster answers for; whoever approves and signs is this test.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use weir_tests::{
    AgentProcess, Pod, Testbed,
    agent::{self, TrustSource},
    certificates::{Authority, sign_request},
    wait_until,
};

use super::{
    DEADLINE, Scene,
    guard::{asks, is_refused},
    monitoring::Monitored,
    shown,
};

/// What the names of all signers begin with, here and nowhere else.
const SIGNERS_PREFIX: &str = "weir.test/";
/// Whom the agent asks.
const AGENTS: &str = "weir.test/agents";
/// Of the names that are asked for those that are the same in each cluster: a signer may leave in no addresses.
const CLUSTER_NAMES: [&str; 4] =
    ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"];
/// Whom each `doctor` asks, what is made of its request, what it says, and the mend.
const SIGNERS: [(&str, Made, &str, &str); 6] = [
    (
        "weir.test/unanswered",
        Made::Nothing,
        "nobody approved the certificate signing request weir-serving-",
        "does the approver run (the Deployment weir-approver), and what does its log say?",
    ),
    (
        "weir.test/unsigned",
        Made::Approved,
        "the signer weir.test/unsigned issued nothing for weir-serving-",
        "does this cluster offer that signer",
    ),
    (
        "weir.test/denied",
        Made::Denied,
        "ended as Denied: not here",
        "correct that, and the agent asks anew by itself (the approver, the Deployment weir-approver, has what it denied in its log)",
    ),
    (
        "weir.test/foreign",
        Made::Signed(Ca::Foreign, None),
        "clients that dial kubernetes and trust ",
        "is that CA the one in the pods' kube-root-ca.crt, and did it (or an intermediate of it) sign?",
    ),
    (
        "weir.test/others",
        Made::Signed(Ca::Cluster, Some(&["others.example"])),
        "the certificate that was issued is not for kubernetes",
        "is it the right one (trust.clusterSigner.signerName)?",
    ),
    (
        "weir.test/names",
        Made::Signed(Ca::Cluster, Some(&CLUSTER_NAMES)),
        "the certificate that was issued is not for 10.96.0.1",
        "does it know the API server by that name",
    ),
];

/// What becomes of a request.
#[derive(Clone, Copy)]
enum Made {
    Nothing,
    Approved,
    Denied,
    /// By this CA, for other names than those that are asked for.
    Signed(Ca, Option<&'static [&'static str]>),
}

#[derive(Clone, Copy)]
enum Ca {
    /// That of which pods know.
    Cluster,
    Foreign,
}

/// Whoever answers requests.
struct Signer<'a> {
    testbed: &'a Testbed,
    scratch: &'a Path,
    foreign: PathBuf,
}

impl<'a> Signer<'a> {
    fn new(scene: &'a Scene) -> Self {
        let scratch = scene.scratch.path();
        let foreign = scratch.join("foreign");
        if !foreign.exists() {
            fs::create_dir(&foreign).unwrap();
            Authority::create(&foreign, "foreign").unwrap();
        }
        Self { testbed: &scene.testbed, scratch, foreign }
    }

    /// Waits for the request that somebody makes of `name` next, and answers it. Who made it takes back one that was answered, and one
    /// that nobody has answered in time: then it is the next one that is meant.
    #[track_caller]
    fn answer(&self, name: &str, made: Made) {
        wait_until(&format!("a request to {name} that can be answered"), DEADLINE, || {
            let list = self.testbed.kubectl(&["get", "csr", "-o", "json"])?;
            let list: Value = serde_json::from_str(&list)?;
            let is_open = |request: &&Value| {
                request["spec"]["signerName"] == name && request["status"]["conditions"].is_null()
            };
            match list["items"].as_array().unwrap().iter().find(is_open) {
                Some(request) => self.give(request.clone(), made),
                None => Ok(None),
            }
        })
        .unwrap();
    }

    /// None: meanwhile it was taken back, or answered by somebody else.
    fn give(&self, mut request: Value, made: Made) -> anyhow::Result<Option<()>> {
        let kind = match made {
            Made::Nothing => None,
            Made::Denied => Some("Denied"),
            Made::Approved | Made::Signed(..) => Some("Approved"),
        };
        if let Some(kind) = kind {
            let said = json!([{"type": kind, "status": "True", "reason": "Test", "message": "not here"}]);
            request["status"]["conditions"] = said;
            let Some(answered) = self.put(&request, "approval")? else { return Ok(None) };
            request = answered;
        }
        if let Made::Signed(ca, other_names) = made {
            let folder = match ca {
                Ca::Cluster => self.testbed.layout().path("pki"),
                Ca::Foreign => self.foreign.clone(),
            };
            let asked = STANDARD.decode(request["spec"]["request"].as_str().unwrap()).unwrap();
            let asked = String::from_utf8(asked).unwrap();
            let pem = sign_request(&folder, &asked, other_names).unwrap();
            request["status"]["certificate"] = json!(STANDARD.encode(pem));
            if self.put(&request, "status")?.is_none() {
                return Ok(None);
            }
        }
        Ok(Some(()))
    }

    fn put(&self, request: &Value, part: &str) -> anyhow::Result<Option<Value>> {
        let file = self.scratch.join("answer.json");
        fs::write(&file, request.to_string()).unwrap();
        let name = request["metadata"]["name"].as_str().unwrap();
        let path = format!("/apis/certificates.k8s.io/v1/certificatesigningrequests/{name}/{part}");
        let put = ["replace", "--raw", &path, "-f", file.to_str().unwrap()];
        match self.testbed.kubectl(&put) {
            Ok(put) => Ok(Some(serde_json::from_str(&put)?)),
            Err(error) => {
                let said = format!("{error:#}");
                let is_late = ["(NotFound)", "(Conflict)"].iter().any(|reason| said.contains(reason));
                if is_late { Ok(None) } else { Err(error) }
            }
        }
    }
}

/// Names of the requests that this test's signers have.
fn requests(testbed: &Testbed) -> Vec<String> {
    let each = "jsonpath={range .items[*]}{.spec.signerName} {.metadata.name}{\"\\n\"}{end}";
    let all = testbed.kubectl(&["get", "csr", "-o", each]).unwrap();
    let own = all.lines().filter_map(|line| line.strip_prefix(SIGNERS_PREFIX)?.split_once(' '));
    own.map(|(_, name)| name.to_owned()).collect()
}

/// A `doctor` that runs. It ends with this value.
struct Doctor(Option<Child>);

impl Doctor {
    #[track_caller]
    fn ended(mut self) -> Output {
        self.0.take().unwrap().wait_with_output().unwrap()
    }
}

impl Drop for Doctor {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// An agent and `doctor`s that wait for signers, some of them half a minute.
pub(super) struct Unsigned {
    agent: AgentProcess,
    monitored: Monitored,
    doctors: Vec<Doctor>,
}

fn configured(scene: &Scene, signer: &str, metrics: SocketAddr) -> PathBuf {
    let mut configuration =
        agent::configuration(&scene.testbed, &scene.journal(), TrustSource::ClusterSigner);
    configuration["clusters"][0]["trust"]["clusterSigner"]["signerName"] = json!(signer);
    configuration["metrics"] = json!({"address": metrics.to_string()});
    let path = scene.scratch.path().join(format!("{}.yaml", signer.replace('/', "-")));
    agent::write_configuration(&configuration, &path).unwrap();
    path
}

impl Unsigned {
    /// Starts them, and answers what can be answered at once.
    #[track_caller]
    pub(super) fn begin(scene: &Scene) -> Self {
        // A run that was cut short may have left some.
        for name in requests(&scene.testbed) {
            scene.testbed.kubectl(&["delete", "csr", "--ignore-not-found", &name]).unwrap();
        }
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
        let log = scene.scratch.path().join("agent.log");
        let agent = AgentProcess::spawn(&configured(scene, AGENTS, free), &log).unwrap();
        let monitored = Monitored::at(free);
        let doctors = SIGNERS.map(|(name, ..)| {
            let mut doctor = Command::new(agent::built_binary("weir-agent").unwrap());
            doctor.args(["doctor", "--json", "--config"]).arg(configured(scene, name, free));
            Doctor(Some(doctor.stdout(Stdio::piped()).spawn().unwrap()))
        });
        let begun = Self { agent, monitored, doctors: doctors.into() };
        // Before anything has failed, too.
        begun.says("has asked for a certificate, of the cluster signer weir.test/agents");
        let signer = Signer::new(scene);
        for (name, made, ..) in SIGNERS {
            signer.answer(name, made);
        }
        begun
    }

    /// `pod` is enrolled, and its account has no rights.
    #[track_caller]
    pub(super) fn end_when_it_is_mended(mut self, scene: &Scene, pod: &Pod<'_>) {
        for (doctor, (signer, _, found, mend)) in self.doctors.drain(..).zip(SIGNERS) {
            let (code, report, _) = shown(&doctor.ended());
            let report: Value = serde_json::from_str(&report).unwrap();
            let mut checks = report["checks"].as_array().unwrap().iter();
            let check = checks.find(|check| check["name"] == "trust testbed").unwrap();
            let has = |field: &str, part: &str| check[field].as_str().is_some_and(|text| text.contains(part));
            assert!(code == Some(1) && has("found", found) && has("mend", mend), "{signer}: {check}");
        }
        self.keeps_its_pods_refused(pod, "nobody approved the certificate signing request weir-serving-");
        let signer = Signer::new(scene);
        signer.answer(AGENTS, Made::Signed(Ca::Foreign, None));
        self.keeps_its_pods_refused(pod, "clients that dial kubernetes and trust ");
        signer.answer(AGENTS, Made::Signed(Ca::Cluster, None));
        self.agent.wait_until_ready().unwrap();
        assert_eq!(self.monitored.get("/readyz").unwrap(), (200, "ready\n".to_owned()));
        let (_, answer) = asks(pod);
        assert!(answer.contains("Forbidden"), "it is the API server that answers: {answer}");
        assert!(self.agent.terminate().unwrap().success(), "{}", self.agent.last_lines());
        let left = requests(&scene.testbed);
        assert!(left.is_empty(), "requests that nobody waits for: {left:?}");
    }

    /// Whoever asks whether the agent is ready is told this.
    #[track_caller]
    fn says(&self, said: &str) -> String {
        let reasons = wait_until("the agent to say why", DEADLINE, || {
            // One that is not answered says nothing.
            let answer = self.monitored.get("/readyz").ok();
            Ok(answer.filter(|(status, reasons)| *status == 503 && reasons.contains(said)))
        });
        let (_, reasons) =
            reasons.unwrap_or_else(|error| panic!("{said}: {error:#}: {}", self.agent.last_lines()));
        reasons
    }

    /// The agent says in its log and to whoever asks whether it is ready what keeps it, and pods are refused.
    #[track_caller]
    fn keeps_its_pods_refused(&self, pod: &Pod<'_>, said: &str) {
        let reasons = self.says(said);
        let unserved = "a serving certificate yet; enrolled pods are refused: testbed: ";
        assert!(reasons.contains(unserved), "{reasons}");
        let log = self.agent.log().unwrap();
        assert!(
            log.lines().any(|line| line.contains("no certificate that pods") && line.contains(said)),
            "{log}"
        );
        // What the kubelet is told, and shows in the pod's events.
        let probe = Command::new(agent::built_binary("weir-agent").unwrap()).arg("ready").output().unwrap();
        let (code, _, error) = shown(&probe);
        let waits = "no agent has enrolled this node's pods yet; the agent's log says what it waits for";
        assert!(code == Some(1) && error.contains(waits), "{error}");
        is_refused(pod, said);
    }
}
