//! A replay of a whole journal, as printed, and the way to find what to replay.

use std::{path::Path, time::Duration};

use expect_test::{Expect, expect};
use tempfile::TempDir;
use weir_common::attributes::Execution;
use weir_common::event::{
    ActsAs, BodySummary, Bytes, Change, Channel, Connection, ConnectionForwarded, Content, FileCopied,
    Identity, Kind, Outcome, RequestClosed, UserInfo,
};

use super::{
    Detail, Order, Pace, Printer, ReplayError, Subject, find, perform, play, tell, write_cast, write_json,
    write_transcript,
};
use crate::{
    fixture::{SESSION, Writer, one_session, request},
    source::Journal,
    terminal::Style,
};

#[track_caller]
fn check(subject: Subject, expected: Expect) {
    check_journal(one_session().0.path(), subject, expected);
}

#[track_caller]
fn check_journal(directory: &Path, subject: Subject, expected: Expect) {
    let journal = Journal::open(directory).unwrap();
    let mut out = Vec::new();
    play(&journal, &subject, None, None, &mut out, Style::PLAIN).unwrap();
    let text = String::from_utf8(out).unwrap().replace(&journal.name(), "DIR");
    assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "{text}");
    expected.assert_eq(&text);
}

#[test]
fn a_session_is_replayed_process_by_process() {
    check(
        Subject::Session("0198".into()),
        expect![[r#"
        session   0198aaaa-0000-7000-8000-000000000001
        cluster   prod
        node      node-1
        pod       ci/agent-1 (uid uid-1)
        account   ci/agent
        user      system:serviceaccount:ci:agent (as the credential claims; not verified by weir)
        dialled   10.96.0.1:443
        started   2026-01-31T12:00:00.000Z, on record for 1.14 s
        holds     2 processes, 4 requests

        process 1 kubectl get pods -w 'a b'
            +0.000s pid 4242, uid 1000, /usr/bin/kubectl, container runner (0123456789ab)
                    the arguments are a claim: a process can rewrite them
            +0.000s [1.1] list pods in web  GET /api/v1/namespaces/web/pods (HTTP/2)
            +0.012s [1.1] 200 in 12.3 ms, 10 bytes
                     │ {
                     │   "kind": "PodList",
                     │   "items": [
                     │     "\u001b[2J"
                     │   ]
                     │ }
            +0.112s [1.2] watch pods in web  GET /api/v1/namespaces/web/pods?watch=1 (HTTP/2)
            +0.117s [1.2] 200 stream begins
            +0.118s [1.2] watch: ADDED Pod web/a
                     │ {
                     │   "type": "ADDED",
                     │   "object": {
                     │     "kind": "Pod",
                     │     "metadata": {
                     │       "namespace": "web",
                     │       "name": "a"
                     │     }
                     │   }
                     │ }
            +1.138s [1.2] 200 stream ends after 1.03 s, 10 bytes from the server

        process 2 kubectl exec a -- sh
            +0.618s pid 4242, uid 1000, /usr/bin/kubectl, container runner (0123456789ab)
                    the arguments are a claim: a process can rewrite them
            +0.618s [2.1] create pods/exec a in web  POST /api/v1/namespaces/web/pods/a/exec?command=sh (HTTP/2, upgrade to websocket)
            +0.618s [2.1] 101 stream begins
            +0.638s [2.1] client → server, 11 bytes (raw, not decoded)
                     │ abcde
            +0.638s [2.1] server → client, 21 bytes (raw, not decoded)
                     │ hello 
                     │ ]0;owned
            +1.138s [2.1] 101 stream ends after 520.0 ms, 10 bytes from the server
            +1.138s [2.2] create pods in web  POST /api/v1/namespaces/web/pods (HTTP/2)
                     │ {
                     │   "kind": "Pod",
                     │   "metadata": {
                     │     "name": "b"
                     │   }
                     │ }
            +1.138s [2.2] no end on record: still running, or the agent ended without a word
    "#]],
    );
}

#[test]
fn what_a_patch_made_of_an_object_that_was_read_before_is_shown() {
    let directory = tempfile::tempdir().unwrap();
    let mut writer = Writer::new(1, 7);
    writer.started().session(SESSION, "u").invocation(SESSION, "i", &["kubectl", "debug", "a"]);
    let body = |containers: &str| {
        format!(
            "{{\"kind\":\"Pod\",\"metadata\":{{\"uid\":\"7\",\"name\":\"a\"}},\"spec\":{{{containers}}}}}"
        )
        .into_bytes()
    };
    let (get, patch) = ([SESSION, "i", "get"], [SESSION, "i", "patch"]);
    writer.open(get, request("GET", "get", "/api/v1/namespaces/web/pods/a", "web")).respond(get, 200);
    writer.content(get, Channel::ResponseBody, 0, &body("")).close(get, 200, 1000).after_ms(5);
    let uri = "/api/v1/namespaces/web/pods/a/ephemeralcontainers";
    writer.open(patch, request("PATCH", "patch", uri, "web")).respond(patch, 200);
    let added = body(r#""ephemeralContainers":[{"name":"debugger","image":"tools"}]"#);
    writer.content(patch, Channel::ResponseBody, 0, &added).close(patch, 200, 1000);
    writer.commit().checkpoint().save(directory.path(), 64);
    let journal = Journal::open(directory.path()).unwrap();
    for pace in [None, Some(Pace { speed: 1e6, idle_limit: None })] {
        let mut out = Vec::new();
        play(&journal, &Subject::Session(SESSION.into()), pace, None, &mut out, Style::PLAIN).unwrap();
        let text = String::from_utf8(out).unwrap();
        let change = "changes, against the object as [1.1] saw it:\n             \u{2502} + spec.ephemeralContainers: \
                      [{\"image\":\"tools\",\"name\":\"debugger\"}]\n";
        assert!(text.contains(change), "{text}");
    }
}

#[test]
fn one_request_is_printed_in_full() {
    check(
        Subject::Request("req-exec".into()),
        expect![[r#"
        session   0198aaaa-0000-7000-8000-000000000001
        cluster   prod
        node      node-1
        pod       ci/agent-1 (uid uid-1)
        account   ci/agent
        user      system:serviceaccount:ci:agent (as the credential claims; not verified by weir)
        dialled   10.96.0.1:443
        started   2026-01-31T12:00:00.000Z, on record for 1.14 s
        holds     2 processes, 4 requests

        process 2 kubectl exec a -- sh
            +0.618s pid 4242, uid 1000, /usr/bin/kubectl, container runner (0123456789ab)
                    the arguments are a claim: a process can rewrite them
            +0.618s [2.1] create pods/exec a in web  POST /api/v1/namespaces/web/pods/a/exec?command=sh (HTTP/2, upgrade to websocket)
                     │ Audit-ID req-exec, arrived 2026-01-31T12:00:00.618Z
            +0.618s [2.1] 101 stream begins
            +0.638s [2.1] client → server, 11 bytes (raw, not decoded)
                     │ \x82\x85\x01\x02\x03\x04abcde
            +0.638s [2.1] server → client, 21 bytes (raw, not decoded)
                     │ \x82\x0f\x01hello \x1b]0;owned\x07\n
                     │ \xff
            +1.138s [2.1] 101 stream ends after 520.0 ms, 10 bytes from the server
    "#]],
    );
}

#[test]
fn with_a_speed_everything_comes_in_its_order_and_time_but_no_pause_longer_than_wanted() {
    let (directory, _) = one_session();
    let journal = Journal::open(directory.path()).unwrap();
    let found = find(&journal, &Subject::Session(SESSION.into())).unwrap();
    let story = tell(&journal, &found).unwrap();
    let steps = story.steps(Order::Chronological);
    assert!(steps.is_sorted_by_key(|(time, _)| *time));
    let waited = |idle_limit| {
        let (mut out, mut archive, mut waited) = (Vec::new(), journal.archive(), Vec::new());
        let mut printer =
            Printer::new(&mut out, Style::PLAIN, &story, &mut archive, Detail::Readable, "weir");
        let mut wait = |length: Duration| waited.push(length.as_micros());
        perform(&mut printer, &steps, Some(Pace { speed: 2.0, idle_limit }), &mut wait).unwrap();
        waited
    };
    assert_eq!(waited(None), [6000, 50_000, 2500, 500, 250_000, 10_000, 250_000]);
    let limit = Some(Duration::from_millis(50));
    assert_eq!(waited(limit), [6000, 50_000, 2500, 500, 50_000, 10_000, 50_000]);
}

#[test]
fn ids_may_be_cut_short_but_must_be_unique() {
    let (directory, _) = one_session();
    let journal = Journal::open(directory.path()).unwrap();
    let session = find(&journal, &Subject::Session("0198a".into())).unwrap();
    assert_eq!((session.session.as_str(), session.request), (SESSION, None));
    let error = |subject| find(&journal, &subject).unwrap_err().to_string().replace(&journal.name(), "DIR");
    expect!["no session in DIR has the id ffff; `weir sessions --from DIR` lists the sessions"]
        .assert_eq(&error(Subject::Session("ffff".into())));
    expect!["request id req- is not unique; give more of it: req-create, req-exec, req-list, req-watch"]
        .assert_eq(&error(Subject::Request("req-".into())));
    assert!(matches!(find(&journal, &Subject::Session(String::new())), Err(ReplayError::Unknown { .. })));
}

#[test]
fn a_cast_holds_what_servers_sent_over_upgraded_connections() {
    let (directory, _) = one_session();
    let journal = Journal::open(directory.path()).unwrap();
    let path = directory.path().join("out.cast");
    let text = write_cast(&journal, &Subject::Session(SESSION.into()), &path, None, None).unwrap();
    assert!(text.starts_with("wrote 21 bytes in 1 piece to "), "{text}");
    expect![[r#"
        {"height":24,"timestamp":1769860800,"title":"weir session 0198aaaa-0000-7000-8000-000000000001","version":2,"width":80}
        [0.0,"m","raw, not decoded: request req-exec"]
        [0.0,"o","\\x82\u000f\u0001hello \u001b]0;owned\u0007\n\\xff"]
    "#]]
    .assert_eq(&std::fs::read_to_string(&path).unwrap());
    let list = Subject::Request("req-list".into());
    let none = write_cast(&journal, &list, &directory.path().join("none"), None, None);
    assert!(matches!(none, Err(ReplayError::NothingSaid)));
    assert!(matches!(write_transcript(&journal, &list, &mut Vec::new()), Err(ReplayError::NothingSaid)));
    assert!(!directory.path().join("none").exists());
}

/// An exec, a port-forward and a copy.
fn streams() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let mut writer = Writer::new(1, 7);
    write_exec(&mut writer);
    write_forward(&mut writer);
    let file = FileCopied {
        channel: Channel::Stdin,
        path: "tmp/a\u{1b}b".to_owned(),
        bytes: 12,
        digest: Some("sha256:00".to_owned()),
        link_target: None,
        passed_bytes: None,
    };
    let link = FileCopied { link_target: Some("/etc".to_owned()), digest: None, ..file.clone() };
    for file in [file, link] {
        writer.event(SESSION, "i1", "copy", Kind::FileCopied(Box::new(file)));
    }
    writer.save(directory.path(), 0);
    directory
}

fn content(channel: Channel, connection: Option<Connection>, text: &[u8]) -> Kind {
    Kind::Content(Content { channel, connection, offset: 0, bytes: Bytes::from_slice(text) })
}

fn write_exec(writer: &mut Writer) {
    let mut opened = request("POST", "create", "/api/v1/namespaces/web/pods/a/exec?command=sh", "web");
    let command = ["sh", "-c", "cat; exit 3\u{1b}"].map(str::to_owned).to_vec();
    let container = Some("main".to_owned());
    opened.execution = Some(Box::new(Execution { container, command, stdin: true, tty: true }));
    let Kind::RequestClosed(mut end) = closed(Some(101), Outcome::Complete, "", None) else { panic!() };
    end.exit_code = Some(3);
    for kind in [
        Kind::RequestOpened(Box::new(opened)),
        content(Channel::Resize, None, b"{\"Width\":120,\"Height\":40}\n"),
        content(Channel::Stdin, None, b"cat\n"),
        Kind::ChannelChanged { channel: Channel::Stdin, connection: None, change: Change::Ended },
        content(Channel::Stdout, None, b"one\n\x1b[2Jtwo\xc3\n\\ $ "),
        content(Channel::Stderr, None, b"warning\n"),
        Kind::Gap { reason: "what follows is recorded raw".to_owned(), events: None, bytes: Some(0) },
        content(Channel::Status, None, br#"{"status":"Failure","reason":"NonZeroExitCode"}"#),
        Kind::RequestClosed(end),
    ] {
        writer.event(SESSION, "i1", "exec", kind);
    }
}

fn write_forward(writer: &mut Writer) {
    let connection = Connection { port: 8080, id: 5 };
    let forwarded = ConnectionForwarded {
        connection,
        bytes_in: 16,
        bytes_out: 17,
        protocol: Some("tls".to_owned()),
        server_name: Some("db\u{1b}.example".to_owned()),
    };
    let connection = Some(connection);
    for kind in [
        Kind::ChannelChanged { channel: Channel::PortIn, connection, change: Change::Opened },
        content(Channel::PortIn, connection, b"GET / HTTP/1.1\r\n"),
        content(Channel::PortOut, connection, b"HTTP/1.1 200 OK\r\n"),
        Kind::ConnectionForwarded(Box::new(forwarded)),
    ] {
        writer.event(SESSION, "i1", "forward", kind);
    }
}

#[test]
fn streams_are_replayed_by_channel_and_connection() {
    let directory = streams();
    check_journal(
        directory.path(),
        Subject::Session(SESSION.into()),
        expect![[r#"
        session   0198aaaa-0000-7000-8000-000000000001
        cluster   prod
        node      node-1
        caller    not on record: this journal does not hold the session's start
        started   2026-01-31T12:00:00.000Z, on record for 0 µs
        holds     1 process, 3 requests

        process 1 not on record
            +0.000s [1.1] create pods in web  POST /api/v1/namespaces/web/pods/a/exec?command=sh (HTTP/2)
                     │ runs sh -c 'cat; exit 3\x1b', in container main, with input and a terminal
            +0.000s [1.1] terminal size, 26 bytes
                     │ {
                     │   "Width": 120,
                     │   "Height": 40
                     │ }
            +0.000s [1.1] stdin, 4 bytes
                     │ cat
            +0.000s [1.1] stdout, 17 bytes (not all of it text)
                     │ one
                     │ \x1b[2Jtwo\xc3
                     │ \\ $ 
            +0.000s [1.1] stderr, 8 bytes
                     │ warning
            +0.000s [1.1] status, 47 bytes
                     │ {
                     │   "status": "Failure",
                     │   "reason": "NonZeroExitCode"
                     │ }
            +0.000s [1.1] stdin ends
            +0.000s [1.1] what follows is recorded raw
            +0.000s [1.1] 101 stream ends after 1.5 ms, 7 bytes from the server, exit code 3
            +0.000s [1.2] request forward: its beginning is not on record
            +0.000s [1.2] to port 8080 (connection 5), 16 bytes
                     │ GET / HTTP/1.1
            +0.000s [1.2] from port 8080 (connection 5), 17 bytes
                     │ HTTP/1.1 200 OK
            +0.000s [1.2] to port 8080 (connection 5) is opened
            +0.000s [1.2] connection 5 to port 8080 is over: 16 bytes in, 17 bytes out, tls to db\x1b.example
            +0.000s [1.2] no end on record: still running, or the agent ended without a word
            +0.000s [1.3] request copy: its beginning is not on record
            +0.000s [1.3] file into the container: tmp/a\x1bb, 12 bytes, sha256:00
            +0.000s [1.3] link into the container: tmp/a\x1bb → /etc
            +0.000s [1.3] no end on record: still running, or the agent ended without a word
    "#]],
    );
}

#[test]
fn streams_are_written_as_a_cast_and_as_a_transcript() {
    let directory = streams();
    let journal = Journal::open(directory.path()).unwrap();
    let path = directory.path().join("out.cast");
    write_cast(&journal, &Subject::Session(SESSION.into()), &path, None, None).unwrap();
    expect![[r#"
        {"height":24,"timestamp":1769860800,"title":"weir session 0198aaaa-0000-7000-8000-000000000001","version":2,"width":80}
        [0.0,"m","request exec"]
        [0.0,"r","120x40"]
        [0.0,"i","cat\n"]
        [0.0,"o","one\n\u001b[2Jtwo\\xc3\n\\ $ "]
        [0.0,"o","warning\n"]
    "#]]
    .assert_eq(&std::fs::read_to_string(&path).unwrap());
    let mut out = Vec::new();
    write_transcript(&journal, &Subject::Session(SESSION.into()), &mut out).unwrap();
    expect![[r#"
        # request exec: create pods in web, runs sh -c 'cat; exit 3\x1b', in container main, with input and a terminal
        stdin: cat
        stdout: one
        stdout: \x1b[2Jtwo\xc3
        stderr: warning
        stdout: \\ $  (no line end)
        # exit code 3
    "#]]
    .assert_eq(&String::from_utf8(out).unwrap());
}

#[test]
fn as_json_every_event_stands_as_it_was_recorded() {
    let (directory, _) = one_session();
    let journal = Journal::open(directory.path()).unwrap();
    for (subject, expected) in
        [(Subject::Session(SESSION.into()), None), (Subject::Request("req-exec".into()), Some("req-exec"))]
    {
        let mut out = Vec::new();
        write_json(&journal, &subject, None, &mut out, false).unwrap();
        let recorded = journal.records().map(Result::unwrap).filter(|record| record.session() == SESSION);
        let wanted = recorded.filter(|record| {
            expected.is_none() || journal.event(record).unwrap().request.as_deref() == expected
        });
        let mut lines = out.split_inclusive(|byte| *byte == b'\n');
        let mut last = 0.0;
        for record in wanted {
            let line: serde_json::Value = serde_json::from_slice(lines.next().unwrap()).unwrap();
            let event: serde_json::Value = serde_json::from_slice(&record.value).unwrap();
            assert_eq!(line["event"], event);
            assert!(line["at"].as_f64().unwrap() >= last);
            last = line["at"].as_f64().unwrap();
        }
        assert_eq!(lines.next(), None);
        assert!(last > 0.0);
    }
}

fn closed(status: Option<u16>, outcome: Outcome, reason: &str, body: Option<BodySummary>) -> Kind {
    Kind::RequestClosed(Box::new(RequestClosed {
        status,
        outcome,
        reason: (!reason.is_empty()).then(|| reason.to_owned()),
        response_bytes: 7,
        client_bytes: 0,
        duration_us: 1500,
        exit_code: None,
        body,
    }))
}

/// A body with a hole, a mask and a cut.
fn write_cut_body(writer: &mut Writer, ids: [&str; 3]) {
    writer.open(ids, request("GET", "get", "/api/v1/secrets/s", "web")).respond(ids, 200);
    writer.content(ids, Channel::ResponseBody, 0, b"one\ntwo");
    writer.content(ids, Channel::ResponseBody, 17, b"\nthree");
    let gap = Kind::Gap { reason: "disk".into(), events: Some(1), bytes: None };
    writer.event(ids[0], ids[1], ids[2], gap);
    let body = BodySummary {
        wire_bytes: 5000,
        recorded_bytes: 23,
        decoded: Some("gzip".into()),
        masked: 2,
        truncated: Some("longer than 23 bytes".into()),
        ..BodySummary::default()
    };
    writer.event(ids[0], ids[1], ids[2], closed(Some(200), Outcome::ClientAborted, "reset", Some(body)));
}

#[test]
fn what_went_wrong_or_is_missing_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let mut writer = Writer::new(1, 7);
    let ids = |request| [SESSION, "i1", request];
    writer.started().invocation(SESSION, "i1", &[]);

    writer.open(ids("r1"), request("DELETE", "delete", "/api/v1/namespaces/web/pods/a", "web"));
    let refused = Kind::RequestRefused { status: 503, reason: "the journal is full\u{1b}".into() };
    writer.event(SESSION, "i1", "r1", refused);
    writer.event(SESSION, "i1", "r1", closed(Some(503), Outcome::Refused, "", None));

    writer.open(ids("r2"), request("GET", "watch", "/api/v1/pods?watch=true", "")).respond(ids("r2"), 403);
    writer.content(ids("r2"), Channel::ResponseBody, 0, b"{\"kind\":\"Status\"}");
    writer.event(SESSION, "i1", "r2", closed(Some(403), Outcome::Complete, "", None));

    write_cut_body(&mut writer, ids("r3"));
    writer.event(SESSION, "i1", "r4", closed(None, Outcome::UpstreamFailed, "connection refused", None));

    let mut log = request("GET", "get", "/api/v1/namespaces/web/pods/a/log?follow=true", "web");
    log.attributes.subresource = "log".into();
    let user = UserInfo { username: "ci:\u{1b}[2Jdeployer".into(), ..UserInfo::default() };
    let acts_as = Some(ActsAs::Impersonate { user });
    log.identity = Some(Box::new(Identity { rule: Some("runners".into()), acts_as, ..Identity::default() }));
    writer.open(ids("r5"), log).respond(ids("r5"), 200);
    writer.content(ids("r5"), Channel::ResponseBody, 0, b"line 1\n\x1b[2Jline").after_ms(1000);
    writer.content(ids("r5"), Channel::ResponseBody, 15, b" 2\n");
    let finding = Kind::Finding { name: "proxy".into(), message: "unset it".into(), caller: None };
    writer.event(SESSION, "", "", finding).save(directory.path(), 0);
    check_journal(
        directory.path(),
        Subject::Session(SESSION.into()),
        expect![[r#"
        session   0198aaaa-0000-7000-8000-000000000001
        cluster   prod
        node      node-1
        caller    not on record: this journal does not hold the session's start
        started   2026-01-31T12:00:00.000Z, on record for 1.00 s
        holds     1 process, 5 requests

        process 1 (arguments not on record)
            +0.000s pid 4242, uid 1000, /usr/bin/kubectl, container runner (0123456789ab)
                    the arguments are a claim: a process can rewrite them
            +0.000s [1.1] delete pods in web  DELETE /api/v1/namespaces/web/pods/a (HTTP/2)
            +0.000s [1.1] 503 refused by weir: the journal is full\x1b
            +0.000s [1.2] watch pods  GET /api/v1/pods?watch=true (HTTP/2)
            +0.000s [1.2] 403 in 1.5 ms, 7 bytes
                     │ {
                     │   "kind": "Status"
                     │ }
            +0.000s [1.3] get pods in web  GET /api/v1/secrets/s (HTTP/2)
            +0.000s [1.3] gap in the record: 1 event missing: disk
            +0.000s [1.3] 200 in 1.5 ms, 7 bytes — the client went away: reset
                     │ one
                     │ two
                     │ three
                     │ 10 bytes are missing from the record
                     │ 2 values masked, gzip removed (5,000 bytes on the wire)
                     │ cut: 23 of 5,000 bytes on record: longer than 23 bytes
            +0.000s [1.4] request r4: its beginning is not on record
            +0.000s [1.4] no status in 1.5 ms, 7 bytes — the API server failed or closed in the middle: connection refused
            +0.000s [1.5] get pods/log in web  GET /api/v1/namespaces/web/pods/a/log?follow=true (HTTP/2)
                     │ as ci:\x1b[2Jdeployer by rule runners
            +0.000s [1.5] 200 stream begins
            +0.000s [1.5] output, 15 bytes
                     │ line 1
                     │ \x1b[2Jline
            +1.000s [1.5] output, 3 bytes
                     │  2
            +1.000s [1.5] no end on record: still running, or the agent ended without a word
            +1.000s finding proxy: unset it
    "#]],
    );
}
