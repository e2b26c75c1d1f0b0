//! A replay of a whole journal, as printed, and the way to find what to replay.

use std::time::Duration;

use expect_test::{Expect, expect};

use super::{Detail, Order, Printer, ReplayError, Subject, find, perform, play, tell, write_cast};
use crate::{
    fixture::{SESSION, one_session},
    source::Journal,
    terminal::Style,
};

#[track_caller]
fn check(subject: Subject, expected: Expect) {
    let (directory, _) = one_session();
    let journal = Journal::open(directory.path()).unwrap();
    let mut out = Vec::new();
    play(&journal, &subject, None, &mut out, Style::PLAIN).unwrap();
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
fn with_a_speed_everything_comes_in_its_order_and_time() {
    let (directory, _) = one_session();
    let journal = Journal::open(directory.path()).unwrap();
    let found = find(&journal, &Subject::Session(SESSION.into())).unwrap();
    let story = tell(&journal, &found).unwrap();
    let (mut out, mut archive, mut waited) = (Vec::new(), journal.archive(), Vec::new());
    let mut printer = Printer::new(&mut out, Style::PLAIN, &story, &mut archive, Detail::Readable, "weir");
    let mut wait = |length: Duration| waited.push(length.as_micros());
    let steps = story.steps(Order::Chronological);
    assert!(steps.is_sorted_by_key(|(time, _)| *time));
    perform(&mut printer, &steps, Some(2.0), &mut wait).unwrap();
    assert_eq!(waited, [6000, 50_000, 2500, 500, 250_000, 10_000, 250_000]);
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
    let text = write_cast(&journal, &Subject::Session(SESSION.into()), &path).unwrap();
    assert!(text.starts_with("wrote 21 bytes in 1 piece of raw upgrade bytes (not decoded)"), "{text}");
    expect![[r#"
        {"height":24,"timestamp":1769860800,"title":"weir session 0198aaaa-0000-7000-8000-000000000001: raw upgrade bytes, server to client, not decoded","version":2,"width":80}
        [0.0,"m","raw: request req-exec"]
        [0.0,"o","\\x82\u000f\u0001hello \u001b]0;owned\u0007\n\\xff"]
    "#]]
    .assert_eq(&std::fs::read_to_string(&path).unwrap());
    let none = write_cast(&journal, &Subject::Request("req-list".into()), &directory.path().join("none"));
    assert!(matches!(none, Err(ReplayError::NothingToCast)));
    assert!(!directory.path().join("none").exists());
}
