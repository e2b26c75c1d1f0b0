//! What a connection that came about was: the certificate that the client saw, and what the API server's own audit log says
//! of the request that went over it. "Connected" alone says neither that it came to Weir nor that it did not.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    process::Command,
};

use sha2::{Digest as _, Sha256};
use weir_tests::{AgentProcess, Pod, Testbed, audit, wait_until};

use super::{
    DEADLINE, Scene,
    client::{RawClient, token},
};

/// Sends one request over each connection, and remembers what it saw.
pub(super) struct Witness<'a> {
    scene: &'a Scene,
    /// The pod's address, as the API server would see it.
    address: String,
    /// In the host's network others have that address as well, and only its token tells the pod: its UID is there.
    uid_on_host: Option<String>,
    token: String,
    /// Requests from that address before: it may have been another pod's.
    before: usize,
    /// By path: the digest of the certificate.
    seen: RefCell<BTreeMap<String, String>>,
}

/// Who answered.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Server {
    /// The API server itself.
    Api,
    /// The API server, through somebody who passes bytes on.
    Relay,
    /// Weir, which asked the API server.
    Weir,
}

impl<'a> Witness<'a> {
    pub(super) fn new(scene: &'a Scene, pod: &Pod<'_>) -> Self {
        let address = pod.shell("hostname -i").unwrap().trim().to_owned();
        Self::at(scene, pod, address, None)
    }

    /// The same for a pod in the host's network, which has this address.
    pub(super) fn on_host(scene: &'a Scene, pod: &Pod<'_>, address: &str) -> Self {
        Self::at(scene, pod, address.to_owned(), Some(pod.uid.clone()))
    }

    fn at(scene: &'a Scene, pod: &Pod<'_>, address: String, uid_on_host: Option<String>) -> Self {
        let (token, seen) = (token(pod), RefCell::default());
        let mut witness = Self { scene, address, uid_on_host, token, before: 0, seen };
        witness.before = witness.direct();
        witness
    }

    /// Sends a request over what this program connects; gives what the program says.
    pub(super) fn ask(&self, command: Command) -> String {
        let mut client = match RawClient::by(&self.scene.testbed, command) {
            Ok(client) => client,
            Err(said) => return said,
        };
        // Nothing else asks for this name, so that the audit log's entries for it are this request's.
        let path = format!("/api/v1/namespaces/default/configmaps/witness-{}", random_name());
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: kubernetes\r\nAuthorization: Bearer {}\r\nConnection: close\r\n\r\n",
            self.token
        );
        if let Err(error) = client.send(request.as_bytes()) {
            return format!("connected, and then {error}");
        }
        let Some(answer) = client.answer() else { return "connected, without an answer".to_owned() };
        if answer.status != 404 {
            return format!("connected, and answered {}", answer.head);
        }
        self.seen.borrow_mut().insert(path, digest(client.certificate()));
        "connected".to_owned()
    }

    /// Checks all that was seen since the last time, and that of nothing else the API server says that it came from the pod.
    /// Returns how many requests there were.
    #[track_caller]
    pub(super) fn check(&self, server: Server, agent: Option<&AgentProcess>) -> usize {
        let certificates = match agent {
            None => vec![api_server_certificate(&self.scene.testbed)],
            Some(agent) => certificates_of(agent),
        };
        let (seen, recorded) = (self.seen.take(), self.recorded());
        for (path, certificate) in &seen {
            let shown = certificates.contains(certificate);
            assert!(shown, "{path}: the certificate {certificate} is none of {certificates:?}");
            // Its entry comes when the request is over, a moment after the client has the answer.
            let of_it =
                |entry: &audit::AuditEntry| entry.request_uri == *path && entry.stage == "ResponseComplete";
            let log = self.scene.testbed.layout().audit_log();
            let found = wait_until("the audit log's entry", DEADLINE, || {
                let found: Vec<_> = audit::read(&log)?.into_iter().filter(of_it).collect();
                Ok((!found.is_empty()).then_some(found))
            })
            .unwrap();
            assert_eq!(found.len(), 1, "{path}: {found:?}");
            let sources = &found[0].source_ips;
            match server {
                // The node may have several addresses.
                Server::Api if self.uid_on_host.is_some() => {
                    assert_eq!(sources.len(), 1, "{path}: directly from the pod, {sources:?}");
                }
                Server::Api => assert_eq!(*sources, [self.address.as_str()], "{path}: directly from the pod"),
                Server::Relay => {
                    assert!(sources.len() == 1 && sources[0] != self.address, "{path}: {sources:?}");
                }
                // On behalf of the pod, from the same address, which is there once: the record has its id.
                Server::Weir if self.uid_on_host.is_some() => {
                    assert_eq!(*sources, [self.address.as_str()], "{path}: on behalf of the pod");
                    assert!(recorded.contains(&found[0].audit_id), "{path}: from the pod itself");
                }
                // On behalf of the pod, from another address.
                Server::Weir => {
                    assert_eq!(sources.len(), 2, "{path}: {sources:?}");
                    assert_eq!(sources[0], self.address, "{path}: on behalf of the pod");
                    assert_ne!(sources[1], self.address, "{path}: from the pod itself");
                }
            }
        }
        seen.len()
    }

    /// Entries of the audit log for requests that came from the pod itself, since this witness is there: from its own address, or
    /// with its token and not in the record.
    pub(super) fn direct(&self) -> usize {
        let entries = audit::read(&self.scene.testbed.layout().audit_log()).unwrap();
        let recorded = self.recorded();
        let direct = entries.iter().filter(|entry| match &self.uid_on_host {
            None => entry.source_ips.last() == Some(&self.address),
            Some(uid) => entry.pod_uid.as_ref() == Some(uid) && !recorded.contains(&entry.audit_id),
        });
        direct.count() - self.before
    }

    /// Ids of the requests in the record, by which the API server's log has them as well.
    fn recorded(&self) -> BTreeSet<String> {
        let is_asked_for = self.uid_on_host.is_some() && self.scene.journal().exists();
        let events = if is_asked_for { self.scene.events() } else { Vec::new() };
        events.into_iter().filter_map(|event| event.request).collect()
    }
}

/// Digests of the certificates that the agent says it has served.
pub(super) fn certificates_of(agent: &AgentProcess) -> Vec<String> {
    let log = agent.log().unwrap();
    let lines = log.lines().filter(|line| line.contains("serving certificate"));
    let words = lines.flat_map(|line| line.split(|character: char| !character.is_ascii_hexdigit()));
    words.filter(|word| word.len() == 64).map(str::to_owned).collect()
}

/// Digest of the API server's own certificate.
pub(super) fn api_server_certificate(testbed: &Testbed) -> String {
    use rustls::pki_types::{CertificateDer, pem::PemObject as _};
    let path = testbed.layout().path("pki/apiserver.crt");
    digest(&CertificateDer::from_pem_file(path).unwrap())
}

/// As the agent writes it of its own.
pub(super) fn digest(certificate: &[u8]) -> String {
    hex::encode(Sha256::digest(certificate))
}

/// A name that nobody else has.
fn random_name() -> String {
    let mut bytes = [0; 16];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom").unwrap(), &mut bytes).unwrap();
    hex::encode(bytes)
}
