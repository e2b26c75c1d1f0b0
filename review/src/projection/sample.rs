//! Events of every kind, for goldens and properties: a session of one pod in which most happens that can.

use std::collections::BTreeMap;

use weir_common::{
    attributes::{Attributes, Execution},
    envelope::Envelope,
    event::{
        ActsAs, BodySummary, Bytes, Caller, Change, Channel, Connection, ConnectionForwarded, Container,
        Content, Coverage, Event, FileCopied, Header, Identity, IdentityMethod, Kind, NamedObject,
        ObjectsNamed, Outcome, Pod, PodCoverage, Process, RequestClosed, RequestOpened, RoleAssumed,
        SCHEMA_VERSION, UserInfo,
    },
};

use crate::{
    fixture::{NODE, SESSION, START_US, request},
    source::{Place, Record},
};

pub(super) const EPOCH: &str = "0198aaaa-0000-7000-8000-0000000000aa";
const INVOCATION: &str = "0198aaaa-0000-7000-8000-0000000000bb";

/// What a mask left of a value.
pub(super) const MASK: &str = "weir:masked:le16:0123456789abcdef";

/// An event of a session, a millisecond after the one before.
pub(super) fn event(sequence: u64, kind: Kind) -> Event {
    Event {
        schema: SCHEMA_VERSION,
        sequence,
        time_unix_us: START_US + i64::try_from(sequence).unwrap() * 1000,
        cluster: "prod".into(),
        tenant: None,
        node: NODE.into(),
        epoch: EPOCH.into(),
        session: SESSION.into(),
        invocation: Some(INVOCATION.into()),
        request: None,
        kind,
    }
}

pub(super) fn caller() -> Box<Caller> {
    let pod = Pod {
        namespace: "ci".into(),
        name: "agent-1".into(),
        uid: "0b6d0000-0000-4000-8000-000000000001".into(),
        service_account: "agent".into(),
        ip: Some("10.244.0.7".into()),
        intent: BTreeMap::from([("weir.dev/task".into(), "fix the \"build\"".into())]),
    };
    Box::new(Caller {
        pod: Some(pod),
        container: Some(container()),
        process: Some(process(&["sh", "-c", "kubectl get pods"])),
        cgroup: 4711,
        netns: 4_026_532_000,
        dialled: "10.96.0.1:443".into(),
        claimed_user: Some("system:serviceaccount:ci:agent".into()),
        user: None,
    })
}

fn container() -> Container {
    Container { id: "0123456789abcdef".into(), name: "runner".into() }
}

fn process(argv: &[&str]) -> Process {
    Process {
        pid: 4242,
        start_boottime_ns: 1_000_000_007,
        uid: 1000,
        executable: "/usr/bin/kubectl".into(),
        argv: argv.iter().map(|argument| (*argument).to_owned()).collect(),
    }
}

fn user(name: &str) -> UserInfo {
    UserInfo {
        username: name.into(),
        uid: "u-1".into(),
        groups: vec!["runners".into(), "system:authenticated".into()],
        extra: BTreeMap::from([("example.dev/job".into(), vec!["build-7".into()])]),
    }
}

fn header(name: &str, value: &str) -> Header {
    Header { name: name.into(), value: value.into() }
}

/// A request as kubectl sends it, with a credential that is masked.
pub(super) fn opened(method: &str, verb: &str, uri: &str) -> RequestOpened {
    let headers = vec![
        header("user-agent", "kubectl/v1.36.3 (linux/amd64) kubernetes/abcdef"),
        header("authorization", MASK),
        header("content-type", "application/json"),
    ];
    RequestOpened { headers, ..request(method, verb, uri, "web") }
}

pub(super) fn summary(bytes: usize, masked: u64) -> BodySummary {
    BodySummary {
        wire_bytes: bytes as u64,
        recorded_bytes: bytes as u64,
        digest: Some("sha256:00ff".into()),
        masked,
        ..BodySummary::default()
    }
}

pub(super) fn closed(status: Option<u16>, outcome: Outcome) -> RequestClosed {
    RequestClosed {
        status,
        outcome,
        reason: None,
        response_bytes: 321,
        client_bytes: 0,
        duration_us: 12_345,
        exit_code: None,
        body: None,
    }
}

pub(super) fn content(channel: Channel, bytes: &[u8]) -> Kind {
    Kind::Content(Content { channel, connection: None, offset: 0, bytes: Bytes::from_slice(bytes) })
}

/// The record of an event, as an agent writes it.
pub(super) fn record(event: &Event) -> Record {
    let value = serde_json::to_vec(event).unwrap();
    Record {
        place: Place { segment: 0, offset: 0 },
        envelope: Envelope {
            key: event.session.clone(),
            id: format!("{}/{}", event.epoch, event.sequence),
            event_type: format!("weir.v1.{}", event.kind.name()),
            source: format!("/weir/{}/{}", event.node, event.epoch),
            time_unix_us: event.time_unix_us,
            ..Envelope::default()
        },
        frame_bytes: value.len() as u64,
        value,
    }
}

/// A story that grows event by event.
#[derive(Default)]
struct Told(Vec<Event>);

impl Told {
    fn agent(&mut self, kind: Kind) {
        let sequence = self.0.len() as u64;
        let nobody = Event { session: String::new(), invocation: None, ..event(sequence, kind) };
        self.0.push(nobody);
    }

    fn session(&mut self, kind: Kind) {
        self.0.push(event(self.0.len() as u64, kind));
    }

    fn request(&mut self, request: &str, kinds: impl IntoIterator<Item = Kind>) {
        for kind in kinds {
            let request = Some(format!("0198aaaa-0000-7000-8000-0000000000{request}"));
            self.0.push(Event { request, ..event(self.0.len() as u64, kind) });
        }
    }
}

/// The events, every kind at least once.
pub(super) fn events() -> Vec<Event> {
    let mut told = Told::default();
    told.agent(Kind::AgentStarted { version: "0.1.0".into(), predecessor: None });
    told.session(Kind::SessionStarted { caller: caller() });
    let argv = ["kubectl", "create", "secret", "", "--token=weir:masked:le8:00ff00ff00ff00ff"];
    told.session(Kind::InvocationStarted { process: process(&argv), container: Some(container()) });
    creates_a_secret(&mut told);
    reads(&mut told);
    executes(&mut told);
    is_refused(&mut told);
    asks_in_a_role(&mut told);
    is_cut_behind_the_api_server(&mut told);
    told.agent(Kind::ConnectionRefused { reason: "plain HTTP".into(), caller: Some(caller()) });
    told.agent(Kind::Gap { reason: "the journal was full".into(), events: Some(3), bytes: None });
    told.agent(Kind::Finding {
        name: "proxyEnvironment".into(),
        message: "HTTPS_PROXY is set; unset it".into(),
        caller: Some(caller()),
    });
    let pods = vec![PodCoverage {
        namespace: "ci".into(),
        name: "agent-1".into(),
        uid: "0b6d0000-0000-4000-8000-000000000001".into(),
        class: "enrolled".into(),
        seen: 9,
        redirected: 9,
        proxied: 9,
        ..PodCoverage::default()
    }];
    told.agent(Kind::Coverage(Box::new(Coverage { interval_ms: 60_000, pods, pods_left_out: 0 })));
    told.agent(Kind::AgentStopped { reason: "SIGTERM".into() });
    told.0
}

/// As somebody whom Weir has verified and goes on as.
fn creates_a_secret(told: &mut Told) {
    let sent = format!(
        r#"{{"kind":"Secret","apiVersion":"v1","metadata":{{"name":"db","creationTimestamp":null}},"data":{{"password":"{MASK}"}}}}"#
    );
    let answer = sent.replace("\"creationTimestamp\":null", "\"namespace\":\"web\",\"uid\":\"u-2\"");
    let identity = Identity {
        method: IdentityMethod::Token,
        issuer: Some("https://issuer.example".into()),
        user: user("ci:agent"),
        rule: Some("runners".into()),
        acts_as: Some(ActsAs::Impersonate { user: user("impersonated") }),
    };
    let mut create = RequestOpened {
        identity: Some(Box::new(identity)),
        body: Some(summary(sent.len(), 1)),
        ..opened("POST", "create", "/api/v1/namespaces/web/secrets?fieldManager=kubectl")
    };
    create.attributes.resource = "secrets".into();
    let (first, second) = sent.split_at(20);
    let rest = Content {
        channel: Channel::RequestBody,
        connection: None,
        offset: 20,
        bytes: Bytes::from_slice(second.as_bytes()),
    };
    let end = RequestClosed { body: Some(summary(answer.len(), 1)), ..closed(Some(201), Outcome::Complete) };
    told.request(
        "01",
        [
            Kind::RequestOpened(Box::new(create)),
            content(Channel::RequestBody, first.as_bytes()),
            Kind::Content(rest),
            Kind::ResponseStarted { status: 201, headers: vec![header("audit-id", "x")] },
            content(Channel::ResponseBody, answer.as_bytes()),
            Kind::RequestClosed(Box::new(end)),
        ],
    );
}

/// A list that is cut, a path that is no resource, a watch at whose end the client goes away.
fn reads(told: &mut Told) {
    let cut = BodySummary { truncated: Some("longer than 1 MiB".into()), ..summary(2, 0) };
    let list = RequestClosed { body: Some(cut), ..closed(Some(200), Outcome::Complete) };
    told.request(
        "02",
        [
            Kind::RequestOpened(Box::new(opened("GET", "list", "/api/v1/namespaces/web/pods?limit=500"))),
            Kind::ResponseStarted { status: 200, headers: Vec::new() },
            content(Channel::ResponseBody, b"{\""),
            Kind::Gap { reason: "the client reads too slowly".into(), events: None, bytes: Some(7) },
            Kind::RequestClosed(Box::new(list)),
        ],
    );
    let version = RequestOpened {
        attributes: Attributes { verb: "get".into(), ..Attributes::default() },
        ..opened("GET", "get", "/version")
    };
    let failed =
        RequestClosed { reason: Some("connection reset".into()), ..closed(None, Outcome::UpstreamFailed) };
    told.request("03", [Kind::RequestOpened(Box::new(version)), Kind::RequestClosed(Box::new(failed))]);
    told.request(
        "04",
        [
            Kind::RequestOpened(Box::new(opened("GET", "watch", "/api/v1/namespaces/web/pods?watch=true"))),
            Kind::ResponseStarted { status: 200, headers: Vec::new() },
            content(Channel::ResponseBody, b"{\"type\":\"ADDED\"}\n"),
            Kind::RequestClosed(Box::new(closed(Some(200), Outcome::ClientAborted))),
        ],
    );
}

/// An exec that copies a file and ends with a code, and a port-forward.
fn executes(told: &mut Told) {
    let command = ["sh", "-c", "echo \"a b\"; exit 7"].map(str::to_owned).to_vec();
    let mut exec = RequestOpened {
        execution: Some(Box::new(Execution {
            container: Some("app".into()),
            command,
            stdin: true,
            tty: false,
        })),
        upgrade: Some("websocket".into()),
        identity: Some(Box::new(Identity { acts_as: Some(ActsAs::PassThrough), ..Identity::default() })),
        ..opened("GET", "get", "/api/v1/namespaces/web/pods/a/exec?command=sh&container=app&stdin=true")
    };
    (exec.attributes.name, exec.attributes.subresource) = ("a".into(), "exec".into());
    exec.headers.push(header("impersonate-user", "jane"));
    exec.headers.push(header("impersonate-group", "admins"));
    let mut forward = RequestOpened {
        upgrade: Some("SPDY/3.1".into()),
        ..opened("POST", "create", "/api/v1/namespaces/web/pods/a/portforward")
    };
    (forward.attributes.name, forward.attributes.subresource) = ("a".into(), "portforward".into());
    let file = FileCopied {
        channel: Channel::Stdin,
        path: "tmp/a b".into(),
        bytes: 5,
        digest: Some("sha256:00ff".into()),
        link_target: None,
        passed_bytes: None,
    };
    let end = RequestClosed { exit_code: Some(7), client_bytes: 99, ..closed(Some(101), Outcome::Complete) };
    told.request(
        "05",
        [
            Kind::RequestOpened(Box::new(exec)),
            Kind::ResponseStarted { status: 101, headers: Vec::new() },
            content(Channel::Stdin, b"typed"),
            Kind::FileCopied(Box::new(file)),
            content(Channel::Stdout, b"\xff\x00"),
            Kind::ChannelChanged { channel: Channel::Stdin, connection: None, change: Change::Ended },
            Kind::RequestClosed(Box::new(end)),
        ],
    );
    let forwarded = ConnectionForwarded {
        connection: Connection { port: 5432, id: 1 },
        bytes_in: 10,
        bytes_out: 20,
        protocol: Some("tls".into()),
        server_name: Some("db.example".into()),
    };
    told.request(
        "06",
        [
            Kind::RequestOpened(Box::new(forward)),
            Kind::ResponseStarted { status: 101, headers: Vec::new() },
            Kind::ConnectionForwarded(Box::new(forwarded)),
            Kind::RequestClosed(Box::new(closed(Some(101), Outcome::Drained))),
        ],
    );
}

/// An exec whose connection broke between API server and kubelet: nothing says how the process ended.
fn is_cut_behind_the_api_server(told: &mut Told) {
    let mut exec = RequestOpened {
        execution: Some(Box::new(Execution { command: vec!["deploy".into()], ..Execution::default() })),
        upgrade: Some("SPDY/3.1".into()),
        ..opened("POST", "create", "/api/v1/namespaces/web/pods/a/exec?command=deploy")
    };
    (exec.attributes.name, exec.attributes.subresource) = ("a".into(), "exec".into());
    let reason = "the API server ended the stream early: how the process ended was not said";
    let end = RequestClosed { reason: Some(reason.into()), ..closed(Some(101), Outcome::UpstreamFailed) };
    told.request(
        "10",
        [
            Kind::RequestOpened(Box::new(exec)),
            Kind::ResponseStarted { status: 101, headers: Vec::new() },
            content(Channel::Stdout, b"half"),
            Kind::RequestClosed(Box::new(end)),
        ],
    );
}

fn is_refused(told: &mut Told) {
    let mut delete = opened("DELETE", "delete", "/apis/apps/v1/namespaces/web/deployments/front");
    delete.attributes = Attributes {
        verb: "delete".into(),
        api_group: "apps".into(),
        api_version: "v1".into(),
        resource: "deployments".into(),
        namespace: "web".into(),
        name: "front".into(),
        ..Attributes::default()
    };
    let reason = "no rule is for this pod; add one to the configuration";
    told.request(
        "07",
        [
            Kind::RequestOpened(Box::new(delete)),
            Kind::RequestRefused { status: 403, reason: reason.into() },
            Kind::RequestClosed(Box::new(closed(Some(403), Outcome::Refused))),
        ],
    );
}

/// A patch that the API server refuses with words of its own; nothing says how another one ended.
fn asks_in_a_role(told: &mut Told) {
    let role = RoleAssumed {
        role_arn: "arn:aws:iam::123456789012:role/ci".into(),
        assumed_role_arn: "arn:aws:sts::123456789012:assumed-role/ci/weir-1".into(),
        access_key_id: "ASIAEXAMPLE".into(),
        expires_unix_us: START_US + 3_600_000_000,
    };
    told.session(Kind::RoleAssumed(Box::new(role)));
    let identity = Identity {
        method: IdentityMethod::Workload,
        user: user("system:serviceaccount:ci:agent"),
        acts_as: Some(ActsAs::Role {
            arn: "arn:aws:iam::123456789012:role/ci".into(),
            by: "assumeRole".into(),
        }),
        ..Identity::default()
    };
    let mut patch = RequestOpened {
        identity: Some(Box::new(identity)),
        body: Some(summary(8, 0)),
        ..opened("PATCH", "patch", "/api/v1/namespaces/web/pods/a")
    };
    patch.attributes.name = "a".into();
    let words = br#"{"kind":"Status","apiVersion":"v1","status":"Failure","message":"pods \"a\" is forbidden","reason":"Forbidden","code":403}"#;
    let end = RequestClosed { body: Some(summary(words.len(), 0)), ..closed(Some(403), Outcome::Complete) };
    told.request(
        "08",
        [
            Kind::RequestOpened(Box::new(patch.clone())),
            content(Channel::RequestBody, br#"{"a":{}}"#),
            Kind::ResponseStarted { status: 403, headers: Vec::new() },
            content(Channel::ResponseBody, words),
            Kind::RequestClosed(Box::new(end)),
        ],
    );
    let named = ObjectsNamed {
        channel: Channel::RequestBody,
        objects: vec![NamedObject { kind: "Pod".into(), name: "a".into(), ..NamedObject::default() }],
        left_out: 0,
    };
    told.request("09", [Kind::RequestOpened(Box::new(patch)), Kind::ObjectsNamed(Box::new(named))]);
}
