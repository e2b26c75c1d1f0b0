//! The serving certificate, signed for a minute or so: an agent has it renewed before it ends, by the approver and the cluster's own
//! signer, and clients notice nothing. Its key is in memory alone.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead as _, BufReader, Lines, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use memchr::memmem;
use weir_tests::{Clients, Pod, wait_until};

use super::{
    super::DEADLINE,
    NAMESPACE,
    crash::agents_process,
    release::{Release, STATE},
};

/// What the cluster's signers sign for while the chart is tested. An agent asks anew after 60 to 75 % of it.
pub(super) const LIFE: Duration = Duration::from_secs(75);
/// Beyond the life of what a client has seen first.
const MARGIN: Duration = Duration::from_secs(15);

/// Opens a connection that stays, tells which certificate it was shown and for how many seconds that is valid; at each line it is given
/// it asks by that connection, and by a new one.
const CLIENT: &str = r#"
import hashlib, http.client, ssl, sys, time
mount = "/var/run/secrets/kubernetes.io/serviceaccount/"
token = open(mount + "token").read()
def connected():
    context = ssl.create_default_context(cafile=mount + "ca.crt")
    connection = http.client.HTTPSConnection("10.96.0.1", 443, context=context, timeout=60)
    connection.connect()
    der, left = connection.sock.getpeercert(True), ssl.cert_time_to_seconds(connection.sock.getpeercert()["notAfter"]) - time.time()
    print(hashlib.sha256(der).hexdigest(), int(left), flush=True)
    return connection
def asked(connection):
    connection.request("GET", "/version", headers={"Authorization": "Bearer " + token})
    answer = connection.getresponse()
    answer.read()
    print(answer.status, flush=True)
first = connected()
asked(first)
for line in sys.stdin:
    asked(first)
    asked(connected())
"#;

/// What would be in a file that holds a private key: the end of its armour, and the beginnings of PKCS #8 and SEC 1 for P-256.
const MARKS: [&[u8]; 3] = [
    b"-----END PRIVATE KEY-----",
    b"\x02\x01\x00\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x04",
    b"\x30\x77\x02\x01\x01\x04\x20",
];

/// A client in a pod, from before its server's certificate is renewed until after.
pub(super) struct Client {
    process: Child,
    to: ChildStdin,
    from: Lines<BufReader<ChildStdout>>,
    first: String,
    life: Duration,
    began: std::time::Instant,
}

impl Client {
    #[track_caller]
    pub(super) fn begin(release: &Release<'_>, pod: &Pod<'_>, clients: &Clients) -> Self {
        let mut command = release.testbed.kubectl_command();
        command.args(["exec", "-i", "-n", &pod.namespace, &pod.name, "--", &clients.python, "-c", CLIENT]);
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let to = process.stdin.take().unwrap();
        let mut from = BufReader::new(process.stdout.take().unwrap()).lines();
        let began = std::time::Instant::now();
        let (first, life) = shown(&mut from);
        assert!(life <= LIFE, "it is signed for longer than {LIFE:?}: {life:?}");
        assert_eq!(from.next().unwrap().unwrap(), "200");
        Self { process, to, from, first, life, began }
    }

    /// The certificate that it has been shown first has ended: its connection serves on, and a new one is shown another certificate.
    #[track_caller]
    pub(super) fn lives_past_the_first_certificate(mut self, release: &Release<'_>) {
        wait_until("the first certificate to end", self.life + MARGIN, || {
            Ok((self.began.elapsed() > self.life + Duration::from_secs(1)).then_some(()))
        })
        .unwrap();
        writeln!(self.to).unwrap();
        assert_eq!(self.from.next().unwrap().unwrap(), "200", "the connection from before");
        let (sha256, life) = shown(&mut self.from);
        assert_eq!(self.from.next().unwrap().unwrap(), "200", "a new connection");
        assert_ne!(sha256, self.first);
        assert!(life > Duration::ZERO && life <= LIFE, "{life:?}");
        drop(self.to);
        assert!(self.process.wait().unwrap().success());
        let log = ["logs", "-n", NAMESPACE, "daemonset/weir-agent", "-c", "agent"];
        let log = release.testbed.kubectl(&log).unwrap();
        let of = |event: &str, sha256: &str| {
            let event = format!("\"event\":\"{event}\"");
            log.lines().filter(|line| line.contains(&event) && line.contains(sha256)).count()
        };
        assert_eq!(of("certificate-renewed", &sha256), 1, "{log}");
        assert_eq!(of("certificate-not-renewed", ""), 0, "{log}");
        eprintln!("served {:?} after the start, past a certificate of {:?}", self.began.elapsed(), self.life);
    }
}

fn shown(from: &mut Lines<BufReader<ChildStdout>>) -> (String, Duration) {
    let line = from.next().unwrap().unwrap();
    let (sha256, left) = line.split_once(' ').unwrap_or_else(|| panic!("{line}"));
    assert!(!left.starts_with('-'), "the client was shown a certificate that has ended: {line}");
    (sha256.to_owned(), Duration::from_secs(left.parse().unwrap()))
}

/// Nothing that the agent has written on the node, or could in its container, holds a private key: neither this certificate's nor one
/// of those before.
pub(super) fn its_key_is_in_no_file(release: &Release<'_>) {
    let own = format!("/proc/{}/root", agents_process());
    let writable = [PathBuf::from(STATE), PathBuf::from("/run/weir"), Path::new(&own).join("dev")];
    let files: BTreeSet<_> = writable.iter().flat_map(|folder| files(folder)).collect();
    assert!(files.iter().any(|file| file.starts_with(STATE)), "{files:?}");
    for file in files {
        assert_eq!(keys_in(&fs::read(&file).unwrap()), 0, "{} holds a private key", file.display());
    }
    // It would be found.
    let pem = fs::read_to_string(release.testbed.layout().path("pki/ca.key")).unwrap();
    let text: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
    assert_eq!(
        (keys_in(pem.as_bytes()), keys_in(&STANDARD.decode(text).unwrap())),
        (1, 1),
        "the search is blind"
    );
}

/// Nor does a crash of the approver write its memory down, nor of the agent, by the same call. The kernel tells by the owner of what can be
/// read of a process: root, where it leaves no dump.
pub(super) fn the_approver_leaves_no_core_dump() {
    let mut dumpable = Command::new("setpriv");
    dumpable.args(["--reuid=65532", "--clear-groups", "sleep", "60"]);
    let mut dumpable = dumpable.spawn().unwrap();
    let owner = |pid: u32| fs::metadata(format!("/proc/{pid}/environ")).map(|about| about.uid());
    let seen = wait_until("the owner of another process", DEADLINE, || {
        Ok((owner(dumpable.id()).ok() == Some(65532)).then_some(()))
    });
    dumpable.kill().unwrap();
    dumpable.wait().unwrap();
    seen.unwrap();
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let approvers = processes.filter_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let status = fs::read_to_string(entry.path().join("status")).ok()?;
        (status.starts_with("Name:\tweir-agent\n") && status.contains("\nUid:\t65532\t")).then_some(pid)
    });
    let owners: Vec<_> = approvers.map(|pid| owner(pid).unwrap()).collect();
    assert_eq!(owners, [0]);
}

fn keys_in(bytes: &[u8]) -> usize {
    MARKS.iter().map(|mark| memmem::find_iter(bytes, mark).count()).sum()
}

/// The ordinary files below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut left = vec![folder.to_owned()];
    while let Some(folder) = left.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                left.push(entry.path());
            } else if kind.is_file() {
                found.push(entry.path());
            }
        }
    }
    found
}
