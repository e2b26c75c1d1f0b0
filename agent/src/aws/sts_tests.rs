//! The SDK against an HTTP server of the tests' own in STS's place: what goes over the wire, how answers are read, and that
//! nothing of it gets into a log.

use std::{
    collections::HashMap,
    convert::Infallible,
    io::Write,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use futures::future::join_all;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tracing_subscriber::{Layer as _, filter::filter_fn, layer::SubscriberExt as _};
use zeroize::Zeroizing;

use super::{
    cache::{AssumesRoles, Cache},
    identifier::{RoleArn, SessionName, SourceIdentity, Tag},
    request::{AssumeRole, EksCluster, Role, RoleRequest, WebIdentity, WebIdentityToken},
    sts::Sts,
};

const REGION: &str = "eu-central-1";
const SECRET: &str = "Zm9yLXRoZS1yb2xl";
const TOKEN: &str = "eyJhbGciOiJSUzI1NiJ9.of.caller";

/// Status, body.
type Answer = (u16, String);

/// A server in STS's place, with the forms it was sent.
#[derive(Clone, Default)]
struct StandIn {
    calls: Arc<Mutex<Vec<HashMap<String, String>>>>,
    /// Given instead of credentials, first to last; the last one stays.
    answers: Arc<Mutex<Vec<Answer>>>,
}

impl StandIn {
    async fn start(answers: Vec<Answer>) -> (Self, Sts) {
        let stand_in = Self { calls: Arc::default(), answers: Arc::new(Mutex::new(answers)) };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let serving = stand_in.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let serving = serving.clone();
                let service = service_fn(move |request| serving.clone().answer(request));
                tokio::spawn(async move {
                    let connection = hyper::server::conn::http1::Builder::new();
                    let _ = connection.serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        (stand_in, Sts::at(url))
    }

    async fn answer(self, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
        let signed = request.headers().get("authorization").cloned();
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let mut form: HashMap<String, String> = form_of(&body);
        if let Some(signed) = signed {
            form.insert("authorization".to_owned(), signed.to_str().unwrap().to_owned());
        }
        let (status, body) = {
            let mut answers = self.answers.lock().unwrap();
            match answers.len() {
                0 => (200, credentials(&form)),
                1 => answers[0].clone(),
                _ => answers.remove(0),
            }
        };
        self.calls.lock().unwrap().push(form);
        Ok(Response::builder().status(status).body(Full::from(body)).unwrap())
    }

    fn calls(&self) -> Vec<HashMap<String, String>> {
        self.calls.lock().unwrap().clone()
    }
}

/// The pairs of a form.
fn form_of(body: &[u8]) -> HashMap<String, String> {
    let text = String::from_utf8(body.to_vec()).unwrap();
    let decoded = |text: &str| {
        let (mut bytes, mut rest) = (Vec::new(), text.bytes());
        while let Some(byte) = rest.next() {
            bytes.push(match byte {
                b'+' => b' ',
                b'%' => {
                    let digits = [rest.next().unwrap(), rest.next().unwrap()];
                    u8::from_str_radix(std::str::from_utf8(&digits).unwrap(), 16).unwrap()
                }
                byte => byte,
            });
        }
        String::from_utf8(bytes).unwrap()
    };
    let pairs = text.split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(key, value)| (decoded(key), decoded(value))).collect()
}

fn credentials(form: &HashMap<String, String>) -> String {
    let (action, session) = (&form["Action"], &form["RoleSessionName"]);
    let role = form["RoleArn"].rsplit('/').next().unwrap().to_owned();
    format!(
        "<{action}Response xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><{action}Result>\
         <Credentials><AccessKeyId>ASIA-{role}</AccessKeyId><SecretAccessKey>{SECRET}</SecretAccessKey>\
         <SessionToken>session-{SECRET}</SessionToken><Expiration>2099-01-01T00:00:00Z</Expiration></Credentials>\
         <AssumedRoleUser><AssumedRoleId>AROA:{session}</AssumedRoleId>\
         <Arn>arn:aws:sts::123456789012:assumed-role/{role}/{session}</Arn></AssumedRoleUser>\
         </{action}Result></{action}Response>"
    )
}

fn refusal(status: u16, code: &str, message: &str) -> Answer {
    let body = format!(
        "<ErrorResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><Error><Type>Sender</Type><Code>{code}</Code>\
         <Message>{message}</Message></Error><RequestId>1</RequestId></ErrorResponse>"
    );
    (status, body)
}

fn arn(name: &str) -> RoleArn {
    RoleArn::parse(&format!("arn:aws:iam::123456789012:role/{name}")).unwrap()
}

fn assumed() -> AssumeRole {
    AssumeRole {
        role_arn: arn("deploy"),
        session_name: SessionName::fit("alice@example.com"),
        source_identity: Some(SourceIdentity::fit("alice@example.com")),
        tags: vec![Tag::new("pod-uid", "0198").unwrap(), Tag::new("namespace", "ci").unwrap()],
        external_id: Some("weir-1".to_owned()),
        duration: Duration::from_hours(1),
        policy: Some("{\"Version\":\"2012-10-17\"}".to_owned()),
        policy_arns: vec!["arn:aws:iam::aws:policy/ReadOnlyAccess".to_owned()],
        chain: Vec::new(),
    }
}

fn with_token() -> Role {
    Role::WebIdentity(WebIdentity {
        role_arn: arn("deploy"),
        session_name: SessionName::fit("alice"),
        token: WebIdentityToken::Presented(Arc::new(Zeroizing::new(TOKEN.to_owned()))),
        duration: Duration::from_hours(1),
        policy: None,
        policy_arns: Vec::new(),
    })
}

#[tokio::test]
async fn everything_that_was_asked_for_is_said_to_sts() {
    let (stand_in, sts) = StandIn::start(Vec::new()).await;
    let given = sts.assume(REGION, &Role::Assume(assumed())).await.unwrap();
    let calls = stand_in.calls();
    assert_eq!(calls.len(), 1);
    for (key, value) in [
        ("Action", "AssumeRole"),
        ("RoleArn", "arn:aws:iam::123456789012:role/deploy"),
        ("RoleSessionName", "alice@example.com"),
        ("SourceIdentity", "alice@example.com"),
        ("Tags.member.1.Key", "pod-uid"),
        ("Tags.member.1.Value", "0198"),
        ("Tags.member.2.Key", "namespace"),
        ("Tags.member.2.Value", "ci"),
        ("ExternalId", "weir-1"),
        ("DurationSeconds", "3600"),
        ("Policy", "{\"Version\":\"2012-10-17\"}"),
        ("PolicyArns.member.1.arn", "arn:aws:iam::aws:policy/ReadOnlyAccess"),
    ] {
        assert_eq!(calls[0].get(key).map(String::as_str), Some(value), "{key}");
    }
    assert_eq!(given.access_key_id, "ASIA-deploy");
    assert_eq!(given.assumed_role_arn, "arn:aws:sts::123456789012:assumed-role/deploy/alice@example.com");
    assert_eq!(given.expires, SystemTime::UNIX_EPOCH + Duration::from_secs(4_070_908_800));
    assert!(!format!("{given:?}").contains(SECRET));
}

#[tokio::test]
async fn a_chain_goes_from_role_to_role() {
    let (stand_in, sts) = StandIn::start(Vec::new()).await;
    let request = AssumeRole { chain: vec![arn("hub"), arn("spoke")], ..assumed() };
    sts.assume(REGION, &Role::Assume(request)).await.unwrap();
    let calls = stand_in.calls();
    let roles: Vec<&str> = calls.iter().map(|call| call["RoleArn"].rsplit('/').next().unwrap()).collect();
    assert_eq!(roles, ["hub", "spoke", "deploy"]);
    // Each is signed with what the one before gave; the source identity stays, the tags are the last one's.
    for (call, key) in calls.iter().zip(["AKIATEST", "ASIA-hub", "ASIA-spoke"]) {
        assert!(call["authorization"].contains(&format!("Credential={key}/")), "{call:?}");
        assert_eq!(call["SourceIdentity"], "alice@example.com");
        assert_eq!(call.contains_key("Tags.member.1.Key"), call["RoleArn"].ends_with("deploy"));
        assert_eq!(call.contains_key("ExternalId"), call["RoleArn"].ends_with("deploy"));
    }
}

#[tokio::test]
async fn a_web_identity_needs_no_credentials_of_the_agent() {
    let (stand_in, sts) = StandIn::start(Vec::new()).await;
    let given = sts.assume(REGION, &with_token()).await.unwrap();
    let calls = stand_in.calls();
    assert_eq!(calls[0]["Action"], "AssumeRoleWithWebIdentity");
    assert_eq!(calls[0]["WebIdentityToken"], TOKEN);
    assert!(!calls[0].contains_key("authorization") && !calls[0].contains_key("SourceIdentity"));
    assert_eq!(given.access_key_id, "ASIA-deploy");
}

#[tokio::test]
async fn a_denial_is_not_tried_again() {
    let message = "User: arn:aws:sts::1:assumed-role/weir/i-1 is not authorized to perform: sts:TagSession on resource: x";
    let (stand_in, sts) = StandIn::start(vec![refusal(403, "AccessDenied", message)]).await;
    let error = sts.assume(REGION, &Role::Assume(assumed())).await.unwrap_err();
    assert_eq!((error.kind(), stand_in.calls().len()), ("denied", 1));
    assert!(error.to_string().contains(message));
}

#[tokio::test]
async fn an_error_of_sts_itself_is_tried_again() {
    let answers = vec![refusal(503, "ServiceUnavailable", ""), (200, credentials(&form()))];
    let (stand_in, sts) = StandIn::start(answers).await;
    sts.assume(REGION, &Role::Assume(assumed())).await.unwrap();
    assert_eq!(stand_in.calls().len(), 2);
}

fn form() -> HashMap<String, String> {
    let pairs = [
        ("Action", "AssumeRole"),
        ("RoleSessionName", "a"),
        ("RoleArn", "x/deploy"),
        ("DurationSeconds", "900"),
    ];
    pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).into()
}

#[tokio::test]
async fn throttling_is_tried_a_few_times_and_then_said() {
    let (stand_in, sts) = StandIn::start(vec![refusal(400, "Throttling", "Rate exceeded")]).await;
    let error = sts.assume(REGION, &Role::Assume(assumed())).await.unwrap_err();
    assert_eq!((error.kind(), stand_in.calls().len()), ("throttled", 3));
    assert!(error.retry_after().is_some());
}

#[tokio::test]
async fn an_expired_token_and_a_wrong_clock_are_named() {
    let (_stand_in, sts) =
        StandIn::start(vec![refusal(400, "ExpiredTokenException", "Token expired: 1 is before 2")]).await;
    assert_eq!(sts.assume(REGION, &with_token()).await.unwrap_err().kind(), "web_identity_expired");
    let message = "Signature expired: 20260101T000000Z is now earlier than 20260101T000500Z (20260101T002000Z - 15 min.)";
    let (_stand_in, sts) = StandIn::start(vec![refusal(403, "SignatureDoesNotMatch", message)]).await;
    assert_eq!(sts.assume(REGION, &Role::Assume(assumed())).await.unwrap_err().kind(), "clock_skew");
}

#[tokio::test]
async fn nothing_is_sent_where_others_on_the_way_could_read_it() {
    for url in ["http://192.0.2.1:9", "http://sts.example.com"] {
        for role in [Role::Assume(assumed()), with_token()] {
            let error = Sts::at(url.to_owned()).assume(REGION, &role).await.unwrap_err();
            assert_eq!(error.kind(), "plain_endpoint");
            assert!(error.to_string().contains("is not https") && error.retry_after().is_none(), "{error}");
        }
    }
}

#[tokio::test]
async fn nobody_there_is_unreachable() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let error = Sts::at(url).assume(REGION, &Role::Assume(assumed())).await.unwrap_err();
    assert_eq!(error.kind(), "unreachable");
    // Addresses are for the log.
    assert!(error.detail().is_some() && !error.to_string().contains("127.0.0.1"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_first_requests_are_one_call_over_the_wire() {
    let (stand_in, sts) = StandIn::start(Vec::new()).await;
    let cache = Cache::new(sts, Box::new(SystemTime::now));
    let cluster = EksCluster::new("prod", REGION).unwrap();
    let request = RoleRequest::new(Role::Assume(assumed()), cluster).unwrap();
    let asks = (0..1000).map(|_| {
        let (cache, request) = (cache.clone(), request.clone());
        tokio::spawn(async move { cache.bearer(&request).await.unwrap().header() })
    });
    let headers = join_all(asks).await;
    let first = headers[0].as_ref().unwrap();
    assert!(headers.iter().all(|header| header.as_ref().unwrap() == first));
    assert_eq!(stand_in.calls().len(), 1);
}

#[tokio::test]
async fn every_partition_has_its_host() {
    let sts = Sts::new();
    for (region, host) in [
        ("eu-central-1", "sts.eu-central-1.amazonaws.com"),
        ("us-east-1", "sts.us-east-1.amazonaws.com"),
        ("cn-north-1", "sts.cn-north-1.amazonaws.com.cn"),
        ("us-gov-east-1", "sts.us-gov-east-1.amazonaws.com"),
    ] {
        assert_eq!(sts.host(region).await.unwrap(), host);
    }
}

/// What is logged at TRACE while `role` is assumed, with or without [`super::may_log`].
fn logged(role: &Role, with_filter: bool) -> String {
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);
    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let log = Log::default();
    let writer = log.clone();
    let layer = tracing_subscriber::fmt::layer().with_writer(move || writer.clone());
    let layer = layer.with_filter(filter_fn(move |metadata| !with_filter || super::may_log(metadata)));
    tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (_stand_in, sts) = StandIn::start(Vec::new()).await;
            sts.assume(REGION, role).await.unwrap();
        });
        tracing::info!(target: "weir_agent::aws", "the log works");
    });
    let bytes = log.0.lock().unwrap().clone();
    String::from_utf8(bytes).unwrap()
}

#[test]
fn no_level_of_the_log_shows_a_token() {
    let log = logged(&with_token(), true);
    assert!(log.contains("the log works") && !log.contains(TOKEN) && !log.contains(SECRET), "{log}");
    let log = logged(&Role::Assume(assumed()), true);
    assert!(!log.contains(SECRET) && !log.contains("own-secret"), "{log}");
    // The SDK has environment variables that put bodies into its log; what it says below INFO is kept out as a whole.
    assert!(!log.contains("aws_smithy_runtime") && !log.contains("aws_sigv4"), "{log}");
    let log = logged(&Role::Assume(assumed()), false);
    assert!(log.contains("aws_smithy_runtime") && log.contains("aws_sigv4"), "{log}");
}
