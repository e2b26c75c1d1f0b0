//! Journals for tests, written with the encoder that agents use.
//!
//! Times are made up and fixed, so that expectations can be literal. Nothing here is compiled into the binary.

use std::{fs, path::Path};

use tempfile::TempDir;
use uuid::Uuid;
use weir_common::{
    attributes::Attributes,
    checkpoint::{Checkpoint, NoteSigner},
    encryption::key_of_digest,
    envelope::Envelope,
    event::{
        Bytes, Caller, Channel, Container, Content, Event, Kind, Outcome, Pod, Process, RequestClosed,
        RequestOpened, SCHEMA_VERSION,
    },
    frame::{self, FrameType},
    merkle::Tree,
    segment::SegmentHeader,
};

pub(crate) const NODE: &str = "node-1";
pub(crate) const SESSION: &str = "0198aaaa-0000-7000-8000-000000000001";
/// 2026-01-31T12:00:00Z.
pub(crate) const START_US: i64 = 1_769_860_800_000_000;

/// Writes one epoch.
pub(crate) struct Writer {
    pub(crate) epoch: Uuid,
    pub(crate) sequence: u64,
    pub(crate) tree: Tree,
    commit: u64,
    index: u64,
    segment: Vec<u8>,
    signers: Vec<NoteSigner>,
    time_us: i64,
}

/// A signer whose key is made of one byte.
pub(crate) fn signer(seed: u8) -> NoteSigner {
    NoteSigner::from_seed("weir/node-1", &[seed; 32]).unwrap()
}

impl Writer {
    pub(crate) fn new(epoch: u128, seed: u8) -> Self {
        let mut writer = Self {
            epoch: Uuid::from_u128(epoch),
            sequence: 0,
            tree: Tree::new(),
            commit: 0,
            index: 0,
            segment: Vec::new(),
            signers: vec![signer(seed)],
            time_us: START_US,
        };
        writer.begin_segment();
        writer
    }

    fn begin_segment(&mut self) {
        let header = SegmentHeader {
            index: self.index,
            first_sequence: self.sequence,
            first_commit: self.commit,
            created_unix_us: START_US + self.epoch.as_u128() as i64,
            epoch: self.epoch,
            node: NODE.into(),
        };
        self.segment = header.encode().unwrap().to_vec();
    }

    /// Signs with these keys from now on.
    pub(crate) fn signed_by(&mut self, seeds: &[u8]) -> &mut Self {
        self.signers = seeds.iter().map(|seed| signer(*seed)).collect();
        self
    }

    /// Ends a group commit.
    pub(crate) fn commit(&mut self) -> &mut Self {
        self.commit += 1;
        self
    }

    /// Lets time pass.
    pub(crate) fn after_ms(&mut self, ms: i64) -> &mut Self {
        self.time_us += ms * 1000;
        self
    }

    pub(crate) fn event(&mut self, session: &str, invocation: &str, request: &str, kind: Kind) -> &mut Self {
        let given = |id: &str| (!id.is_empty()).then(|| id.to_owned());
        let event = Event {
            schema: SCHEMA_VERSION,
            sequence: self.sequence,
            time_unix_us: self.time_us,
            cluster: "prod".into(),
            tenant: None,
            node: NODE.into(),
            epoch: self.epoch.to_string(),
            session: session.into(),
            invocation: given(invocation),
            request: given(request),
            kind,
        };
        let value = serde_json::to_vec(&event).unwrap();
        let envelope = Envelope {
            key: session.into(),
            id: format!("{}/{}", self.epoch, self.sequence),
            event_type: format!("weir.v1.{}", event.kind.name()),
            source: format!("/weir/{NODE}/{}", self.epoch),
            time_unix_us: self.time_us,
            flags: 0,
            key_id: key_of(&event.kind),
        };
        self.frame(FrameType::Event, &envelope, &value)
    }

    /// A frame as it is, also a wrong one.
    pub(crate) fn frame(&mut self, frame_type: FrameType, envelope: &Envelope, value: &[u8]) -> &mut Self {
        let leaf = frame::encode(&mut self.segment, frame_type, self.sequence, self.commit, envelope, value);
        if frame_type == FrameType::Event {
            self.tree.push(leaf.unwrap());
            self.sequence += 1;
        }
        self
    }

    /// The checkpoint over what is written so far, signed.
    pub(crate) fn note(&self) -> String {
        let origin = format!("weir/{NODE}/{}", self.epoch);
        Checkpoint::of(&origin, &self.tree, self.time_us).sign(&self.signers)
    }

    pub(crate) fn checkpoint(&mut self) -> &mut Self {
        let note = self.note();
        let envelope = Envelope::of_checkpoint(NODE, &self.epoch.to_string(), self.sequence, self.time_us);
        self.frame(FrameType::Checkpoint, &envelope, note.as_bytes())
    }

    pub(crate) fn length(&self) -> usize {
        self.segment.len()
    }

    /// Writes the segment as it is, with `unused` zeros behind it.
    pub(crate) fn save(&self, journal: &Path, unused: usize) {
        let folder = journal.join(self.epoch.to_string());
        fs::create_dir_all(&folder).unwrap();
        let mut bytes = self.segment.clone();
        bytes.resize(bytes.len() + unused, 0);
        fs::write(folder.join(SegmentHeader::file_name(self.index)), bytes).unwrap();
        fs::write(folder.join("checkpoint"), self.note()).unwrap();
        let verifiers = self.signers.iter().map(|signer| format!("{}\n", signer.verifier()));
        fs::write(folder.join("node.pub"), verifiers.collect::<String>()).unwrap();
    }

    /// Writes the segment and goes on with the next.
    pub(crate) fn rotate(&mut self, journal: &Path) -> &mut Self {
        self.save(journal, 64);
        self.index += 1;
        self.begin_segment();
        self
    }

    pub(crate) fn session(&mut self, id: &str, user: &str) -> &mut Self {
        let pod = Pod {
            namespace: "ci".into(),
            name: "agent-1".into(),
            uid: "uid-1".into(),
            service_account: "agent".into(),
            ..Pod::default()
        };
        let caller = Caller {
            pod: Some(pod),
            dialled: "10.96.0.1:443".into(),
            claimed_user: Some(user.into()),
            ..Caller::default()
        };
        self.event(id, "", "", Kind::SessionStarted { caller: Box::new(caller) })
    }

    pub(crate) fn invocation(&mut self, session: &str, id: &str, argv: &[&str]) -> &mut Self {
        let process = Process {
            pid: 4242,
            start_boottime_ns: 1,
            uid: 1000,
            executable: "/usr/bin/kubectl".into(),
            argv: argv.iter().map(|argument| (*argument).to_owned()).collect(),
        };
        let container = Some(Container { id: "0123456789abcdef".into(), name: "runner".into() });
        self.event(session, id, "", Kind::InvocationStarted { process, container })
    }

    pub(crate) fn content(
        &mut self,
        ids: [&str; 3],
        channel: Channel,
        offset: u64,
        bytes: &[u8],
    ) -> &mut Self {
        let content = Content { channel, connection: None, offset, bytes: Bytes::from_slice(bytes) };
        self.event(ids[0], ids[1], ids[2], Kind::Content(content))
    }

    pub(crate) fn open(&mut self, ids: [&str; 3], opened: RequestOpened) -> &mut Self {
        self.event(ids[0], ids[1], ids[2], Kind::RequestOpened(Box::new(opened)))
    }

    pub(crate) fn respond(&mut self, ids: [&str; 3], status: u16) -> &mut Self {
        self.event(ids[0], ids[1], ids[2], Kind::ResponseStarted { status, headers: Vec::new() })
    }

    pub(crate) fn close(&mut self, ids: [&str; 3], status: u16, duration_us: u64) -> &mut Self {
        let closed = RequestClosed {
            status: Some(status),
            outcome: Outcome::Complete,
            reason: None,
            response_bytes: 10,
            client_bytes: 0,
            duration_us,
            exit_code: None,
            body: None,
        };
        self.event(ids[0], ids[1], ids[2], Kind::RequestClosed(Box::new(closed)))
    }

    pub(crate) fn started(&mut self) -> &mut Self {
        self.event("", "", "", Kind::AgentStarted { version: "0.1.0".into(), predecessor: None })
    }

    pub(crate) fn stopped(&mut self) -> &mut Self {
        self.event("", "", "", Kind::AgentStopped { reason: "SIGTERM".into() })
    }
}

/// Number of the key that protects something in an event.
fn key_of(kind: &Kind) -> u64 {
    let digest = match kind {
        Kind::Content(Content { bytes: Bytes::Encrypted { key, .. }, .. }) => return *key,
        Kind::RequestOpened(opened) => opened.body.as_ref().and_then(|body| body.digest.as_deref()),
        Kind::RequestClosed(closed) => closed.body.as_ref().and_then(|body| body.digest.as_deref()),
        Kind::FileCopied(file) => file.digest.as_deref(),
        _ => None,
    };
    digest.and_then(key_of_digest).unwrap_or(0)
}

/// A request on pods.
pub(crate) fn request(method: &str, verb: &str, uri: &str, namespace: &str) -> RequestOpened {
    RequestOpened {
        method: method.into(),
        uri: uri.into(),
        protocol: "HTTP/2".into(),
        headers: Vec::new(),
        attributes: Attributes {
            verb: verb.into(),
            api_version: "v1".into(),
            resource: "pods".into(),
            namespace: namespace.into(),
            ..Attributes::default()
        },
        execution: None,
        upgrade: None,
        identity: None,
        body: None,
    }
}

/// A journal with one session: a list, a watch beside it, an exec by another process, a create with no end.
pub(crate) fn one_session() -> (TempDir, Writer) {
    let directory = tempfile::tempdir().unwrap();
    let mut writer = Writer::new(1, 7);
    let (list, watch) = ([SESSION, "i1", "req-list"], [SESSION, "i1", "req-watch"]);
    let (exec, create) = ([SESSION, "i2", "req-exec"], [SESSION, "i2", "req-create"]);
    writer.started().commit().session(SESSION, "system:serviceaccount:ci:agent");
    writer.invocation(SESSION, "i1", &["kubectl", "get", "pods", "-w", "a b"]);
    writer.open(list, request("GET", "list", "/api/v1/namespaces/web/pods", "web")).after_ms(12);
    writer.respond(list, 200).content(list, Channel::ResponseBody, 0, br#"{"kind":"PodList","#);
    writer.content(list, Channel::ResponseBody, 18, b"\"items\":[\"\\u001b[2J\"]}").close(list, 200, 12_345);
    writer.commit().checkpoint().after_ms(100);
    writer.open(watch, request("GET", "watch", "/api/v1/namespaces/web/pods?watch=1", "web")).after_ms(5);
    writer.respond(watch, 200).rotate(directory.path());
    writer
        .content(watch, Channel::ResponseBody, 0, br#"{"type":"ADDED","object":{"kind":"Pod","#)
        .after_ms(1);
    writer.content(
        watch,
        Channel::ResponseBody,
        38,
        b"\"metadata\":{\"namespace\":\"web\",\"name\":\"a\"}}}\n",
    );
    writer.after_ms(500).invocation(SESSION, "i2", &["kubectl", "exec", "a", "--", "sh"]);
    let mut opened = request("POST", "create", "/api/v1/namespaces/web/pods/a/exec?command=sh", "web");
    opened.upgrade = Some("websocket".into());
    (opened.attributes.subresource, opened.attributes.name) = ("exec".into(), "a".into());
    writer.commit().open(exec, opened).commit().respond(exec, 101).after_ms(20);
    writer.content(exec, Channel::ClientRaw, 0, b"\x82\x85\x01\x02\x03\x04abcde");
    writer.content(exec, Channel::ServerRaw, 0, b"\x82\x0f\x01hello \x1b]0;owned\x07\n\xff").after_ms(500);
    writer.close(exec, 101, 520_000).close(watch, 200, 1_026_000).commit();
    writer.open(create, request("POST", "create", "/api/v1/namespaces/web/pods", "web"));
    writer.content(create, Channel::RequestBody, 0, b"{\"kind\":\"Pod\",\"metadata\":{\"name\":\"b\"}}");
    writer.commit().checkpoint().save(directory.path(), 512);
    (directory, writer)
}
