//! Requests that go on in an AWS role whose credentials the cluster takes no longer.

use std::sync::Arc;

use http::{HeaderValue, Request};
use weir_common::event::{Event, Kind, Outcome};

use super::{
    rig::Rig,
    tests::{bytes, closed, send, status},
};
use crate::{
    auth::policy_tests::in_a_role,
    aws::stand_in::{World, denied},
};

const PODS: &str = "/api/v1/namespaces/a/pods";

async fn rig(world: &World) -> Rig {
    let rig = Rig::new(&["h2"]).await;
    rig.policy.store(Arc::new(in_a_role(world.aws())));
    rig
}

/// `Authorization` and body of the requests that the API server got.
fn seen(rig: &Rig) -> Vec<(HeaderValue, Vec<u8>)> {
    rig.seen().into_iter().map(|seen| (seen.headers["authorization"].clone(), seen.body.to_vec())).collect()
}

/// Has the API server take the token of its last request no longer.
fn refuse_last(rig: &Rig) -> HeaderValue {
    let (last, _) = seen(rig).pop().expect("a request");
    rig.upstream.refused.lock().expect("not poisoned").push(last.clone());
    last
}

fn assumed(events: &[Event]) -> Vec<String> {
    let key = |event: &Event| match &event.kind {
        Kind::RoleAssumed(assumed) => Some(assumed.access_key_id.clone()),
        _ => None,
    };
    events.iter().filter_map(key).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_sent_once_more_with_other_credentials_and_never_in_a_loop() {
    let world = World::new(9);
    let rig = rig(&world).await;
    assert_eq!(send(&rig, Request::get(PODS), "").await.status(), 200);
    let first = refuse_last(&rig);
    assert_eq!(send(&rig, Request::get(PODS), "").await.status(), 401, "they are new");
    assert_eq!((world.calls(), rig.seen().len()), (1, 2));

    world.after(1);
    let created = send(&rig, Request::post(PODS), "{\"a\":1}").await;
    assert_eq!((created.status().as_u16(), &bytes(created).await[..]), (200, &b"{\"a\":1}"[..]));
    let all = seen(&rig);
    let [.., refused, taken] = &all[..] else { panic!("it was sent twice") };
    assert!(refused.0 == first && taken.0 != first);
    assert_eq!([&refused.1, &taken.1], [b"{\"a\":1}", b"{\"a\":1}"]);
    assert_eq!((world.calls(), rig.seen().len()), (2, 4));

    // The others are refused as well: each request is answered 401, and STS is not asked for each.
    refuse_last(&rig);
    for _ in 0..3 {
        assert_eq!(send(&rig, Request::get(PODS), "").await.status(), 401);
    }
    assert_eq!((world.calls(), rig.seen().len()), (2, 7));
    let events = rig.events().await;
    assert_eq!(assumed(&events), ["ASIA1", "ASIA2"]);
    let statuses: Vec<_> =
        closed(&events).into_iter().map(|(status, _)| status.unwrap_or_default()).collect();
    assert_eq!(statuses, [200, 401, 200, 401, 401, 401], "one record for each of the client's requests");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_aws_says_of_a_renewal_is_the_answer() {
    let world = World::new(9);
    let rig = rig(&world).await;
    assert_eq!(send(&rig, Request::get(PODS), "").await.status(), 200);
    refuse_last(&rig);
    world.after(1);
    world.fail(denied());
    let (code, reason, message) = status(send(&rig, Request::get(PODS), "").await).await;
    assert_eq!((code, reason.as_str()), (403, "Forbidden"));
    assert!(message.contains("AWS refuses role arn:aws:iam::123456789012:role/deploy"), "{message}");
    let events = rig.events().await;
    assert_eq!(closed(&events).pop().map(|(_, outcome)| outcome), Some(Outcome::Refused));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_pod_answers_by_way_of_the_api_server_is_no_reason() {
    let world = World::new(9);
    let rig = rig(&world).await;
    assert_eq!(send(&rig, Request::get(PODS), "").await.status(), 200);
    refuse_last(&rig);
    world.after(1);
    let answer = send(&rig, Request::post("/api/v1/namespaces/a/pods/p/proxy/login"), "").await;
    assert_eq!(answer.status(), 401);
    assert_eq!((world.calls(), rig.seen().len()), (1, 2));
}
