//! The agent's memory while much passes: what a stream, a list or a copy has in it must not stay. And all of it is on record, byte for
//! byte.
//!
//! With `WEIR_TEST_LONG=1` an exec writes 1 GiB and 64 MiB go through one each way, and a list has 200 MiB.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
    time::Duration,
};

use hmac::{Hmac, Mac as _};
use sha2::{Digest as _, Sha256};
use weir_common::event::{Channel, Event, Kind, RequestClosed};
use weir_tests::{AgentProcess, Pod, PodSpec, agent, agent::TrustSource, wait_until};

use super::{Scene, peak_resident_kib, random_text};

const NAMESPACE: &str = "it-large";
/// Where its objects are.
const OBJECTS_PATH: &str = "/api/v1/namespaces/it-large/configmaps";
/// Most that memory may grow once there is what is kept for the next request: pools, arenas, the writer's buffers.
const GROWN_KIB_MAX: u64 = 8 * 1024;
/// Bytes that an exec writes: first, then while memory is watched. What comes from the server goes on before it is on disk.
const FIRST_BYTES: u64 = 1 << 20;
const BYTES: u64 = 32 << 20;
const BYTES_LONG: u64 = 1 << 30;
/// Bytes through an exec each way, where each piece waits for the disk.
const BOTH_WAYS_BYTES_LONG: u64 = 64 << 20;
/// Objects of a list, of 1,000,000 bytes each, and how often it is read.
const OBJECTS: usize = 25;
const OBJECTS_LONG: usize = 210;
const LISTS: usize = 4;

fn is_long() -> bool {
    std::env::var_os("WEIR_TEST_LONG").is_some()
}

/// Runs `work` and says by how much the memory of the agent was larger meanwhile than at its peak before.
fn grown_kib(agent: &AgentProcess, what: &str, work: impl FnOnce()) -> u64 {
    fs::write(format!("/proc/{}/clear_refs", agent.pid()), "5").unwrap();
    let before = peak_resident_kib(agent.pid());
    work();
    let grown = peak_resident_kib(agent.pid()).saturating_sub(before);
    eprintln!("{what}: peak resident memory {before} KiB + {grown} KiB");
    grown
}

/// Has a program write so many bytes; what they are, as the client got them: SHA-256.
fn written(pod: &Pod<'_>, bytes: u64) -> String {
    let script = format!("kubectl exec -n {NAMESPACE} caller -- head -c {bytes} /dev/urandom | sha256sum");
    pod.shell(&script).unwrap()[..64].to_owned()
}

/// Sends so many bytes into a program that sends them back.
fn both_ways(pod: &Pod<'_>, bytes: u64) -> String {
    let script = format!(
        "head -c {bytes} /dev/urandom >/tmp/both; \
         kubectl exec -i -n {NAMESPACE} caller -- cat </tmp/both | sha256sum; sha256sum </tmp/both"
    );
    let said = pod.shell(&script).unwrap();
    let digests: Vec<_> = said.lines().map(|line| line[..64].to_owned()).collect();
    assert_eq!(digests[0], digests[1]);
    digests[0].clone()
}

/// What is on record of one channel of one request.
#[derive(Default)]
struct Lane {
    bytes: u64,
    digest: Sha256,
}

/// The record of one request.
#[derive(Default)]
struct Recorded {
    uri: String,
    lanes: BTreeMap<Channel, Lane>,
    closed: Option<RequestClosed>,
}

impl Recorded {
    /// Length and SHA-256 of a channel.
    fn lane(&self, channel: Channel) -> (u64, String) {
        let lane = &self.lanes[&channel];
        (lane.bytes, hex::encode(lane.digest.clone().finalize()))
    }

    /// Everything that the journal has of requests, read event by event: it may be more than memory has.
    fn all(scene: &Scene) -> Vec<Self> {
        let mut events = Command::new(agent::built_binary("weir").unwrap());
        events.args(["events", "--format", "json", "--from"]).arg(scene.journal());
        let mut events = events.stdout(Stdio::piped()).spawn().unwrap();
        let mut requests = BTreeMap::<String, Self>::new();
        for line in BufReader::new(events.stdout.take().unwrap()).lines() {
            let event: Event = serde_json::from_str(&line.unwrap()).unwrap();
            let Some(id) = event.request else { continue };
            requests.entry(id).or_default().add(event.kind);
        }
        assert!(events.wait().unwrap().success());
        requests.into_values().collect()
    }

    fn add(&mut self, kind: Kind) {
        match kind {
            Kind::RequestOpened(opened) => self.uri = opened.uri,
            Kind::Content(content) => {
                let (bytes, lane) =
                    (content.bytes.to_vec().unwrap(), self.lanes.entry(content.channel).or_default());
                assert_eq!(
                    lane.bytes, content.offset,
                    "nothing of {:?} of {} is missing",
                    content.channel, self.uri
                );
                lane.bytes += bytes.len() as u64;
                lane.digest.update(&bytes);
            }
            Kind::Gap { reason, .. } => panic!("a gap in {}: {reason}", self.uri),
            Kind::RequestClosed(closed) => self.closed = Some(*closed),
            _ => {}
        }
    }
}

/// The requests on record, once all that must be there are, and have ended. As [`Scene::ended`], but without all events in memory.
#[track_caller]
fn recorded(scene: &Scene, streams: usize) -> Vec<Recorded> {
    wait_until("all requests, and their ends", Duration::from_mins(5), || {
        let requests = Recorded::all(scene);
        let of = |is_it: &dyn Fn(&str) -> bool| requests.iter().filter(|request| is_it(&request.uri)).count();
        let is_all = of(&|uri| uri.contains("/exec?")) >= streams
            && of(&|uri| uri == OBJECTS_PATH) >= LISTS
            && of(&|uri| uri.strip_prefix(OBJECTS_PATH) == Some(CUT)) >= 1
            && WHOLE.iter().all(|(name, _)| of(&|uri| uri == format!("{OBJECTS_PATH}/{name}")) >= 1);
        let have_ended = requests.iter().all(|request| request.closed.is_some());
        Ok((is_all && have_ended).then_some(requests))
    })
    .unwrap()
}

/// What the pod's kubectl reads is what is on record of the answer: whole, compressed on its way or not, or up to the limit.
#[track_caller]
fn reads_are_on_record(scene: &Scene, pod: &Pod<'_>, requests: &[Recorded]) {
    let of = |uri: &str| {
        let found: Vec<_> = requests.iter().filter(|request| request.uri == uri).collect();
        let [request] = found[..] else { panic!("{} requests for {uri}", found.len()) };
        (request.lane(Channel::ResponseBody), request.closed.as_ref().unwrap().body.clone().unwrap())
    };
    for (name, decoded) in WHOLE {
        let uri = format!("{OBJECTS_PATH}/{name}");
        let got = pod.shell(&format!("sha256sum </tmp/{name}")).unwrap()[..64].to_owned();
        let ((bytes, digest), body) = of(&uri);
        assert_eq!((&digest, bytes), (&got, body.recorded_bytes), "{name}");
        assert_eq!(body.digest, Some(format!("sha256:{got}")), "{name}");
        assert_eq!((body.truncated, body.decoded.as_deref()), (None, decoded), "{name}");
    }
    let ((bytes, digest), body) = of(&format!("{OBJECTS_PATH}{CUT}"));
    let got = pod.shell(&format!("wc -c </tmp/cut; head -c {bytes} /tmp/cut | sha256sum")).unwrap();
    let words: Vec<_> = got.split_whitespace().collect();
    assert_eq!((words[0], words[1]), (&*body.wire_bytes.to_string(), &*digest), "as far as it is recorded");
    assert!(body.truncated.is_some() && bytes < body.wire_bytes && bytes > 1_000_000, "{body:?}");
    let key = fs::read(scene.journal().join("mask.key")).unwrap();
    let keyed = |key: &[u8], content: &[&[u8]]| {
        let mut digest = <Hmac<Sha256> as hmac::Mac>::new_from_slice(key).unwrap();
        content.iter().for_each(|part| digest.update(part));
        digest.finalize().into_bytes()
    };
    let all = pod.exec(&["cat", "/tmp/cut"]).unwrap().stdout;
    let expected = keyed(&keyed(&key, &[b"weir mask key v1\0", b"testbed"]), &[&all]);
    assert_eq!(body.digest, Some(format!("hmac-sha256:{}", hex::encode(expected))), "of the whole");
}

/// Objects that are read whole, and how their answers are encoded on their way.
const WHOLE: [(&str, Option<&str>); 3] =
    [("small", None), ("middle", Some("gzip")), ("large-0", Some("gzip"))];
/// Arguments of a kubectl that asks for no compression: with one of its own, it looks nowhere else for the rest.
const UNCOMPRESSED: &str = "--disable-compression --server https://$KUBERNETES_SERVICE_HOST \
    --certificate-authority /var/run/secrets/kubernetes.io/serviceaccount/ca.crt \
    --token $(cat /var/run/secrets/kubernetes.io/serviceaccount/token)";
/// What is read of two objects.
const CUT: &str = "?labelSelector=cut";

fn create(scene: &Scene, name: &str, bytes: usize) {
    let value = random_text(bytes);
    let labels = serde_json::json!(if matches!(name, "large-0" | "large-1") {
        [("cut", "")].into()
    } else {
        BTreeMap::new()
    });
    let object = serde_json::json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": labels}, "data": {"value": value},
    });
    let file = scene.scratch.path().join("large.json");
    fs::write(&file, object.to_string()).unwrap();
    scene.testbed.kubectl(&["create", "-f", file.to_str().unwrap()]).unwrap();
}

#[test]
fn memory_stays_flat_over_large_lists_and_long_streams_and_all_is_on_record() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace(NAMESPACE, true);
    let pod = scene.testbed.run_pod(&PodSpec::idle(NAMESPACE, "caller")).unwrap();
    // Random, since the API server compresses large answers.
    let objects = if is_long() { OBJECTS_LONG } else { OBJECTS };
    create(&scene, "small", 100);
    create(&scene, "middle", 300_000);
    (0..objects).for_each(|index| create(&scene, &format!("large-{index}"), 1_000_000));
    let mut configuration =
        agent::configuration(&scene.testbed, &scene.journal(), TrustSource::ClusterSigner);
    configuration["journal"]["bytesMax"] = serde_json::json!(8_u64 << 30);
    let path = scene.scratch.path().join("agent.yaml");
    agent::write_configuration(&configuration, &path).unwrap();
    let agent = AgentProcess::start(&path, &scene.scratch.path().join("agent.log")).unwrap();
    // What is kept for the next request is there then; what grows with a body is not.
    for (name, _) in WHOLE {
        pod.shell(&format!("kubectl get --raw {OBJECTS_PATH}/{name} >/tmp/{name}")).unwrap();
    }
    let mut digests = vec![(FIRST_BYTES, written(&pod, FIRST_BYTES))];
    let bytes = if is_long() { BYTES_LONG } else { BYTES };
    let of_stream = grown_kib(&agent, &format!("{bytes} bytes of an exec"), || {
        digests.push((bytes, written(&pod, bytes)))
    });
    let list = || {
        let bytes: usize =
            pod.shell(&format!("kubectl get --raw {OBJECTS_PATH} | wc -c")).unwrap().trim().parse().unwrap();
        assert!(bytes > objects * 1_000_000, "{bytes}");
    };
    let of_lists =
        grown_kib(&agent, &format!("{LISTS} lists of {objects} MB"), || (0..LISTS).for_each(|_| list()));
    pod.shell(&format!("kubectl {UNCOMPRESSED} get --raw '{OBJECTS_PATH}{CUT}' >/tmp/cut")).unwrap();
    if is_long() {
        let bytes = BOTH_WAYS_BYTES_LONG;
        let of_both = grown_kib(&agent, &format!("{bytes} bytes each way"), || {
            digests.push((bytes, both_ways(&pod, bytes)))
        });
        assert!(of_both < GROWN_KIB_MAX, "both ways: grew by {of_both} KiB");
    }
    let requests = recorded(&scene, digests.len());
    let streams: Vec<_> = requests.iter().filter(|request| request.uri.contains("/exec?")).collect();
    for (bytes, digest) in digests {
        let is_it = |stream: &&&Recorded| stream.lane(Channel::Stdout) == (bytes, digest.clone());
        assert_eq!(
            streams.iter().filter(is_it).count(),
            1,
            "{bytes} bytes of an exec are on record as they came"
        );
        let sent = |stream: &&&Recorded| {
            stream.lanes.contains_key(&Channel::Stdin)
                && stream.lane(Channel::Stdin) == (bytes, digest.clone())
        };
        assert!(
            bytes != BOTH_WAYS_BYTES_LONG || streams.iter().any(|stream| sent(&stream)),
            "and as they were sent"
        );
    }
    reads_are_on_record(&scene, &pod, &requests);
    let lists = requests.iter().filter(|request| request.uri == OBJECTS_PATH);
    let cut = lists.filter(|list| {
        list.closed.as_ref().unwrap().body.as_ref().is_some_and(|body| body.truncated.is_some())
    });
    assert_eq!(cut.count(), LISTS, "each list is on record, and that it is cut");
    assert!(of_lists < GROWN_KIB_MAX, "lists: grew by {of_lists} KiB");
    assert!(of_stream < GROWN_KIB_MAX, "a stream: grew by {of_stream} KiB");
}
