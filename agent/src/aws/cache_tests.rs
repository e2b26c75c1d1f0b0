//! The cache on a clock and an STS of the tests' own: what is asked when, and what is given to whom.

use std::{sync::atomic::Ordering, time::Duration};

use futures::future::join_all;

use super::{
    Bearer,
    error::StsError,
    identifier::{RoleArn, SessionName},
    request::{AssumeRole, EksCluster, Role, RoleRequest},
    stand_in::{World, denied},
};

fn request(session: &str, cluster: &str) -> RoleRequest {
    let role = AssumeRole {
        role_arn: RoleArn::parse("arn:aws:iam::123456789012:role/deploy").unwrap(),
        session_name: SessionName::fit(session),
        source_identity: None,
        tags: Vec::new(),
        external_id: None,
        duration: Duration::from_hours(1),
        policy: None,
        policy_arns: Vec::new(),
        chain: Vec::new(),
    };
    RoleRequest::new(Role::Assume(role), EksCluster::new(cluster, "eu-central-1").unwrap()).unwrap()
}

fn throttled(seconds: u64) -> StsError {
    StsError::Throttled { retry_after: Duration::from_secs(seconds) }
}

/// Lets tasks run until `condition` holds.
async fn until(condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), wait).await.expect("the condition comes about");
}

fn same(one: &Bearer, other: &Bearer) -> bool {
    one.header() == other.header()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_first_requests_ask_once() {
    let (world, request) = (World::new(0), request("alice", "prod"));
    let cache = world.cache();
    let asks = (0..1000).map(|_| {
        let (cache, request) = (cache.clone(), request.clone());
        tokio::spawn(async move { cache.bearer(&request).await.unwrap() })
    });
    let asks: Vec<_> = asks.collect();
    until(|| cache.counters().read(0).waited == 1000).await;
    world.0.permits.add_permits(1000);
    let bearers: Vec<Bearer> = join_all(asks).await.into_iter().map(Result::unwrap).collect();
    assert!(bearers.iter().all(|bearer| same(bearer, &bearers[0])));
    assert_eq!(world.calls(), 1);
    assert!(same(&cache.bearer(&request).await.unwrap(), &bearers[0]));
    assert_eq!((world.calls(), cache.counters().read(0).hits), (1, 1));
}

#[tokio::test]
async fn sessions_and_clusters_do_not_share() {
    let world = World::new(9);
    let cache = world.cache();
    let alice = cache.bearer(&request("alice", "prod")).await.unwrap();
    let bob = cache.bearer(&request("bob", "prod")).await.unwrap();
    let elsewhere = cache.bearer(&request("alice", "test")).await.unwrap();
    assert_eq!(world.calls(), 3);
    let ids = [&alice, &bob, &elsewhere].map(|bearer| bearer.access_key_id().to_owned());
    assert_eq!(ids, ["ASIA1", "ASIA2", "ASIA3"]);
    assert!(alice.assumed_role_arn().ends_with("deploy/alice"));
}

#[tokio::test]
async fn a_token_in_use_is_renewed_beside_the_requests() {
    let (world, request) = (World::new(9), request("alice", "prod"));
    let cache = world.cache();
    let first = cache.bearer(&request).await.unwrap();
    world.after(10);
    assert!(same(&cache.bearer(&request).await.unwrap(), &first));
    assert_eq!(cache.counters().read(0).signed, 1);
    // Near its end the old one is given at once, and a new one made.
    world.after(2);
    assert!(same(&cache.bearer(&request).await.unwrap(), &first));
    until(|| cache.counters().read(0).signed == 2).await;
    let second = cache.bearer(&request).await.unwrap();
    assert!(!same(&second, &first) && second.end() > first.end());
    // With credentials that hold for an hour, STS is not asked for that.
    assert_eq!((world.calls(), cache.counters().read(0).waited), (1, 1));
}

#[tokio::test]
async fn a_token_is_not_used_to_its_end() {
    let (world, request) = (World::new(9), request("alice", "prod"));
    let cache = world.cache();
    let first = cache.bearer(&request).await.unwrap();
    assert_eq!(first.end(), world.now() + Duration::from_mins(14));
    world.after(14);
    let second = cache.bearer(&request).await.unwrap();
    assert!(!same(&second, &first));
    assert_eq!((world.calls(), cache.counters().read(0).waited), (1, 2));
}

#[tokio::test]
async fn a_token_does_not_outlive_the_credentials_that_signed_it() {
    let (world, request) = (World::new(9), request("alice", "prod"));
    *world.0.life.lock().unwrap() = Duration::from_mins(15);
    let cache = world.cache();
    let first = cache.bearer(&request).await.unwrap();
    world.after(12);
    // Its credentials have 3 minutes left: the new token gets new ones.
    assert!(same(&cache.bearer(&request).await.unwrap(), &first));
    until(|| world.calls() == 2).await;
    until(|| cache.counters().read(0).signed == 2).await;
    assert_eq!(cache.bearer(&request).await.unwrap().access_key_id(), "ASIA2");
}

#[tokio::test]
async fn a_failure_is_the_answer_for_a_while() {
    let (world, request) = (World::new(9), request("alice", "prod"));
    let cache = world.cache();
    world.fail(throttled(7));
    for _ in 0..100 {
        let error = cache.bearer(&request).await.unwrap_err();
        assert_eq!(error.retry_after(), Some(Duration::from_secs(7)));
    }
    assert_eq!((world.calls(), cache.counters().read(0).refused), (1, 99));
    world.fail(None);
    world.0.now_s.fetch_add(7, Ordering::Relaxed);
    cache.bearer(&request).await.unwrap();
    assert_eq!(world.calls(), 2);
    assert_eq!(cache.counters().read(0).failed["throttled"], 1);
}

#[tokio::test]
async fn what_a_wrong_clock_brought_about_ends_with_it() {
    let (world, request) = (World::new(9), request("alice", "prod"));
    let cache = world.cache();
    cache.bearer(&request).await.unwrap();
    // A day ahead: the token has ended, and STS refuses what is signed so.
    world.after(24 * 60);
    world.fail(StsError::ClockSkew { message: "signature expired".into() });
    assert_eq!(cache.bearer(&request).await.unwrap_err().kind(), "clock_skew");
    world.set_back(1);
    world.fail(None);
    let right = cache.bearer(&request).await.unwrap();
    // An STS that looks less closely: what is signed for tomorrow is of no use today.
    world.after(24 * 60 + 1);
    let ahead = cache.bearer(&request).await.unwrap();
    world.set_back(1);
    let again = cache.bearer(&request).await.unwrap();
    assert!(!same(&again, &ahead) && again.end() <= right.end() + Duration::from_mins(2));
}

#[tokio::test]
async fn while_sts_cannot_be_asked_credentials_serve_to_their_end() {
    let (world, request) = (World::new(9), request("alice", "prod"));
    let cache = world.cache();
    cache.bearer(&request).await.unwrap();
    world.fail(throttled(1));
    // 50 minutes on, 10 are left: a stopgap, which ends a minute before they do.
    world.after(50);
    let stopgap = cache.bearer(&request).await.unwrap();
    assert_eq!((stopgap.access_key_id(), stopgap.end()), ("ASIA1", world.now() + Duration::from_mins(9)));
    assert_eq!(world.calls(), 2);
    world.after(9);
    assert_eq!(cache.bearer(&request).await.unwrap_err().kind(), "throttled");
}

#[tokio::test]
async fn a_role_that_was_taken_away_is_not_stretched() {
    let (world, request) = (World::new(9), request("alice", "prod"));
    let cache = world.cache();
    cache.bearer(&request).await.unwrap();
    world.fail(denied());
    world.after(50);
    assert_eq!(cache.bearer(&request).await.unwrap_err().kind(), "denied");
}

#[tokio::test]
async fn a_flight_goes_on_when_who_asked_gives_up() {
    let (world, request) = (World::new(0), request("alice", "prod"));
    let cache = world.cache();
    let asking = tokio::spawn({
        let (cache, request) = (cache.clone(), request.clone());
        async move { cache.bearer(&request).await.map(|_| ()) }
    });
    until(|| world.calls() == 1).await;
    asking.abort();
    assert!(asking.await.unwrap_err().is_cancelled());
    world.0.permits.add_permits(1);
    cache.bearer(&request).await.unwrap();
    assert_eq!(world.calls(), 1);
}

#[tokio::test]
async fn a_panic_on_the_way_is_an_error_and_not_the_end() {
    let (world, request) = (World::new(9), request("alice", "prod"));
    let cache = world.cache();
    *world.0.panics.lock().unwrap() = true;
    assert_eq!(cache.bearer(&request).await.unwrap_err().kind(), "abandoned");
    *world.0.panics.lock().unwrap() = false;
    cache.bearer(&request).await.unwrap();
}

#[tokio::test]
async fn a_clock_ahead_of_the_credentials_is_named() {
    let (world, request) = (World::new(9), request("alice", "prod"));
    *world.0.life.lock().unwrap() = Duration::ZERO;
    assert_eq!(world.cache().bearer(&request).await.unwrap_err().kind(), "clock_skew");
}

#[tokio::test]
async fn what_a_cluster_refuses_is_forgotten_unless_it_is_new() {
    let (world, request) = (World::new(9), request("alice", "prod"));
    let cache = world.cache();
    let refused = cache.bearer(&request).await.unwrap();
    assert!(!cache.forget(&request, &refused), "it is new");
    assert!(same(&cache.bearer(&request).await.unwrap(), &refused));
    assert_eq!(world.calls(), 1);
    world.after(1);
    // Many requests are refused with it; who comes later finds that it is gone, or another one.
    assert!(cache.forget(&request, &refused));
    assert!(cache.forget(&request, &refused));
    assert_eq!(cache.bearer(&request).await.unwrap().access_key_id(), "ASIA2");
    assert!(cache.forget(&request, &refused));
    let other = cache.bearer(&request).await.unwrap();
    assert_eq!(other.access_key_id(), "ASIA2");
    assert!(!cache.forget(&request, &other), "the cluster takes none, and STS is not asked for each request");
    assert_eq!((world.calls(), cache.counters().read(0).forgotten), (2, 1));
}

#[tokio::test]
async fn the_cache_stays_bounded_and_keeps_what_is_used() {
    let world = World::new(10_000);
    let cache = world.cache();
    let used = request("used", "prod");
    cache.bearer(&used).await.unwrap();
    for number in 0..5000 {
        cache.bearer(&request(&format!("session-{number}"), "prod")).await.unwrap();
        cache.bearer(&used).await.unwrap();
    }
    assert_eq!(cache.len(), 4096);
    assert_eq!((world.calls(), cache.counters().read(0).evicted), (5001, 5001 - 4096));
}

#[tokio::test]
async fn what_has_ended_is_dropped() {
    let world = World::new(100);
    let cache = world.cache();
    for number in 0..50 {
        cache.bearer(&request(&format!("session-{number}"), "prod")).await.unwrap();
    }
    world.after(61);
    cache.bearer(&request("another", "prod")).await.unwrap();
    assert_eq!(cache.len(), 1);
}
