//! What rules mask, in every representation of a body and in streams.

use std::sync::Arc;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use expect_test::{Expect, expect};
use http::{HeaderMap, Method, StatusCode};
use proptest::prelude::*;
use prost::Message as _;
use tempfile::TempDir;
use weir_common::{
    attributes::Attributes,
    event::{Channel, Kind, Outcome},
};

use super::{
    CommitRules, FieldMask, MaskRules, Masks, Recorder, RecorderOptions,
    body::Sensitivity,
    content::{self, Held, Kept, Streamed},
    fixture::{self, attributes, open, options, read},
    mask::Masker,
    tests::{content, no_canary},
};

const CANARY: &str = "canary-hunter2";
const JSON: &str = "application/json";
const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";

fn rules() -> MaskRules {
    let field = |kinds: &[&str], paths: &[&str]| FieldMask {
        kinds: kinds.iter().map(|kind| (*kind).to_owned()).collect(),
        paths: paths.iter().map(|path| (*path).to_owned()).collect(),
    };
    let fields = vec![field(&["ConfigMap"], &["data.*"]), field(&["Database"], &["spec.users[*].password"])];
    MaskRules { fields, patterns: vec!["canary-[a-z0-9-]+".into()], ..MaskRules::default() }
}

fn masker(rules: MaskRules, path: &str) -> Masker {
    let masks = Arc::new(Masks::new(rules).unwrap());
    Masker::for_cluster(&[1; 32], "c").by(&masks).of(&Attributes::parse("GET", path, None))
}

fn held(masker: &Masker, content_type: &str, body: &[u8], whole: bool) -> Kept {
    let held = Held {
        chunks: vec![Bytes::copy_from_slice(body)],
        wire_bytes: body.len() as u64,
        cut: (!whole).then(|| ("longer".to_owned(), None)),
        content_type: Some(content_type.to_owned()),
        bytes_max: usize::MAX / 8,
        ..Held::default()
    };
    content::reduce(masker, Sensitivity::None, &held)
}

fn shown(masker: &Masker, content_type: &str, body: &str) -> String {
    let Kept { content, summary, .. } = held(masker, content_type, body.as_bytes(), true);
    let text = String::from_utf8_lossy(&content).into_owned();
    assert!(!text.contains(CANARY), "{text}");
    match summary.truncated {
        Some(reason) => reason,
        None => format!("{} masked {text}", summary.masked),
    }
}

/// With rules for fields and variables, none for text: what is masked is so by its place.
#[track_caller]
fn check(path: &str, content_type: &str, body: &str, expected: Expect) {
    let masker = masker(MaskRules { patterns: Vec::new(), ..rules() }, path);
    expected.assert_eq(&shown(&masker, content_type, &body.replace("CANARY", CANARY)));
}

const PODS: &str = "/api/v1/namespaces/a/pods/p";
const MAPS: &str = "/api/v1/namespaces/a/configmaps/m";

#[test]
fn variables_are_masked_by_their_names_wherever_they_stand() {
    let expected = expect![[
        r#"1 masked {"kind":"Pod","spec":{"containers":[{"env":[{"name":"db_password","value":"weir:masked:le16:903554d12c313c30"},{"name":"LEVEL","value":"info"}],"name":"c"}]}}"#
    ]];
    check(
        PODS,
        JSON,
        r#"{"kind":"Pod","spec":{"containers":[{"name":"c","env":[{"name":"db_password","value":"CANARY"},{"name":"LEVEL","value":"info"}]}]}}"#,
        expected,
    );
    check(
        PODS,
        "application/json-patch+json",
        r#"[{"op":"replace","path":"/spec/containers/0/env/0/value","value":"CANARY"},{"op":"add","path":"/spec/containers/0/env/-","value":{"name":"API_TOKEN","value":"CANARY"}}]"#,
        expect![[
            r#"2 masked [{"op":"replace","path":"/spec/containers/0/env/0/value","value":"weir:masked:le16:903554d12c313c30"},{"op":"add","path":"/spec/containers/0/env/-","value":{"name":"API_TOKEN","value":"weir:masked:le16:903554d12c313c30"}}]"#
        ]],
    );
    check(
        PODS,
        "application/apply-patch+yaml",
        "kind: Deployment\nspec:\n  template:\n    spec:\n      containers:\n      - name: c\n        env:\n        - {name: 'API_KEY', value: CANARY}\n",
        expect![[r#"
            1 masked kind: Deployment
            spec:
              template:
                spec:
                  containers:
                  - env:
                    - name: API_KEY
                      value: weir:masked:le16:903554d12c313c30
                    name: c
        "#]],
    );
    check(
        PODS,
        JSON,
        r#"{"kind":"Pod","metadata":{"annotations":{"kubectl.kubernetes.io/last-applied-configuration":"{\"kind\":\"Pod\",\"spec\":{\"containers\":[{\"env\":[{\"name\":\"A_SECRET\",\"value\":\"CANARY\"}]}]}}"}}}"#,
        expect![[
            r#"1 masked {"kind":"Pod","metadata":{"annotations":{"kubectl.kubernetes.io/last-applied-configuration":"{\"kind\":\"Pod\",\"spec\":{\"containers\":[{\"env\":[{\"name\":\"A_SECRET\",\"value\":\"weir:masked:le16:903554d12c313c30\"}]}]}}"}}}"#
        ]],
    );
    // Nothing to mask: as it is.
    let body = r#"{"kind":"Pod", "spec":{"containers":[{"env":[{"name":"LEVEL","value":"info"}],"volumeMounts":[{"name":"token"}]}]}}"#;
    let none = masker(MaskRules { environment: Vec::new(), ..MaskRules::default() }, PODS);
    assert_eq!(held(&none, JSON, body.replace("LEVEL", "A_KEY").as_bytes(), true).summary.masked, 0);
    check(
        PODS,
        JSON,
        &body.replace("token", "x"),
        expect![[
            r#"0 masked {"kind":"Pod", "spec":{"containers":[{"env":[{"name":"LEVEL","value":"info"}],"volumeMounts":[{"name":"x"}]}]}}"#
        ]],
    );
}

#[test]
fn what_only_calls_itself_a_table_keeps_its_rows() {
    let masker = masker(rules(), "/apis/example.com/v1/namespaces/n/things/x");
    for rows in [r#"{"a":"plain"}"#, r#""plain""#, "[]"] {
        let body = format!(r#"{{"kind":"Thing","spec":{{"kind":"Table","rows":{rows}}},"b":"{CANARY}"}}"#);
        let shown = shown(&masker, JSON, &body);
        assert!(shown.contains(&format!(r#""rows":{rows}"#)) && shown.contains("weir:masked:"), "{shown}");
    }
}

#[test]
fn fields_are_masked_in_every_form_of_an_object() {
    for (path, body, masks) in [
        (MAPS, r#"{"kind":"ConfigMap","data":{"a":"CANARY"}}"#, 1),
        (PODS, r#"{"kind":"ConfigMap","data":{"a":"CANARY"}}"#, 1),
        // Without a kind, or with another one, the request says it.
        (MAPS, r#"{"data":{"a":"CANARY"}}"#, 1),
        (MAPS, r#"{"kind":"configmap","data":{"a":"CANARY"}}"#, 1),
        (PODS, r#"{"kind":"ConfigMapList","items":[{"data":{"a":"CANARY"}},{"data":{"a":"CANARY"}}]}"#, 2),
        (PODS, r#"{"kind":"List","items":[{"kind":"ConfigMap","data":{"a":"CANARY"}}]}"#, 1),
        (MAPS, r#"{"type":"ADDED","object":{"kind":"ConfigMap","data":{"a":"CANARY"}}}"#, 1),
        (MAPS, r#"{"kind":"Table","rows":[{"object":{"data":{"a":"CANARY"}}}]}"#, 1),
        (
            MAPS,
            r#"[{"op":"add","path":"/data/a","value":"CANARY"},{"op":"replace","path":"","value":{"data":{"a":"CANARY"}}}]"#,
            2,
        ),
        (MAPS, r#"[{"op":"add","path":"/data","value":{"a":"CANARY","b":["CANARY"]}}]"#, 2),
        (
            MAPS,
            r#"{"metadata":{"annotations":{"kubectl.kubernetes.io/last-applied-configuration":"{\"data\":{\"a\":\"CANARY\"}}"}}}"#,
            1,
        ),
        (
            MAPS,
            r#"[{"op":"add","path":"/metadata/annotations/kubectl.kubernetes.io~1last-applied-configuration","value":"{\"data\":{\"a\":\"CANARY\"}}"}]"#,
            1,
        ),
        (MAPS, r#"{"data":"CANARY"}"#, 1),
        (
            "/apis/x.io/v1/databases/d",
            r#"{"spec":{"users":[{"name":"u","password":"CANARY"},{"password":{"of":"CANARY"}}]}}"#,
            2,
        ),
        (PODS, r#"{"kind":"\u0043onfigMap","data":{"a":"CANARY"}}"#, 1),
    ] {
        let masker = masker(MaskRules { patterns: Vec::new(), ..rules() }, path);
        let body = body.replace("CANARY", CANARY);
        assert!(shown(&masker, JSON, &body).starts_with(&format!("{masks} masked ")), "{body}");
        if !body.starts_with('[') {
            let value: serde_json::Value = serde_json::from_str(&body).unwrap();
            let yaml = serde_yaml_ng::to_string(&value).unwrap();
            assert!(
                shown(&masker, "application/yaml", &yaml).starts_with(&format!("{masks} masked ")),
                "{yaml}"
            );
            let mut stream = Streamed::new(&masker, Sensitivity::None, Some(JSON.into()), None, true);
            stream.push(&masker, format!("{body}\n").as_bytes());
            assert_eq!(stream.finish(&masker, 0).1.masked, masks, "{body}");
        }
    }
    check(
        MAPS,
        JSON,
        r#"{"kind":"ConfigMap","metadata":{"name":"m","managedFields":[{"fieldsV1":{"f:data":{"f:a":{}}}}]},"data":{"a":"CANARY"}}"#,
        expect![[
            r#"1 masked {"data":{"a":"weir:masked:le16:903554d12c313c30"},"kind":"ConfigMap","metadata":{"managedFields":[{"fieldsV1":{"f:data":{"f:a":{}}}}],"name":"m"}}"#
        ]],
    );
    // Entries of lists are named by values that stand in them.
    check(
        "/apis/x.io/v1/databases/d",
        JSON,
        r#"{"metadata":{"managedFields":[{"fieldsV1":{"f:spec":{"f:users":{"k:{\"name\":\"CANARY\"}":{".":{}}},"f:tokens":{"v:\"CANARY\"":{}}}}}]}}"#,
        expect![[
            r#"2 masked {"metadata":{"managedFields":[{"fieldsV1":{"f:spec":{"f:tokens":{"v:weir:masked:le16:c7d8f2a51a2016bd":{}},"f:users":{"k:weir:masked:le32:fd774ede1da3d7fc":{".":{}}}}}}]}}"#
        ]],
    );
    // Of another kind nothing is.
    check(
        PODS,
        JSON,
        r#"{"kind":"Thing", "data":{"a":"b"}}"#,
        expect![[r#"0 masked {"kind":"Thing", "data":{"a":"b"}}"#]],
    );
}

#[test]
fn what_a_rule_is_for_and_cannot_be_read_is_withheld() {
    check(
        MAPS,
        "application/cbor",
        "CANARY",
        expect!["withheld: may hold what a rule masks in an encoding that is not parsed"],
    );
    check(MAPS, JSON, "{CANARY", expect!["withheld: may hold what a rule masks and cannot be parsed"]);
    check(
        MAPS,
        "application/yaml",
        "a: b\n---\nc: CANARY",
        expect!["withheld: may hold what a rule masks and cannot be parsed"],
    );
    let with = |encoding: &str| {
        let masker = masker(rules(), PODS);
        let held = Held {
            chunks: vec![Bytes::from_static(b"x")],
            content_encoding: Some(encoding.to_owned()),
            bytes_max: 9,
            ..Held::default()
        };
        content::reduce_answer(&masker, Sensitivity::None, &held).content.len()
    };
    assert_eq!((with("br"), with("identity")), (0, 1));
}

#[test]
fn a_body_that_is_cut_is_masked_up_to_where_it_is_whole() {
    let masker = masker(rules(), PODS);
    let body = format!(
        r#"{{"kind":"PodList","items":[{{"spec":{{"containers":[{{"env":[{{"name":"A_KEY","value":"s"}},{{"name":"B_KEY","value":"{CANARY}"#
    );
    let Kept { content, summary, .. } = held(&masker, JSON, body.as_bytes(), false);
    let text = String::from_utf8(content).unwrap();
    assert!(!text.contains(CANARY) && text.contains("B_KEY") && summary.masked == 1, "{text}");
    assert!(summary.truncated.is_some());
    let text = held(&masker, "text/plain", format!("some {CANARY}").as_bytes(), false);
    assert!(text.content.is_empty(), "a match may go on behind the cut");
}

#[test]
fn expressions_find_what_is_escaped_numbers_and_names() {
    let mut rules = rules();
    rules.patterns.push("[0-9]{4}-?[0-9]{4}".into());
    let masker = masker(rules, PODS);
    let text =
        shown(&masker, JSON, r#"{"a":"x \u0063anary-hunter2 y","canary-name":[12345678,"1234-5678",1.5]}"#);
    let mask = |secret: &str| masker.mask(secret.as_bytes());
    let expected = format!(
        r#"4 masked {{"a":"x {} y","{}":["{}","{}",1.5]}}"#,
        mask("canary-hunter2"),
        mask("canary-name"),
        mask("12345678"),
        mask("1234-5678")
    );
    assert_eq!(text, expected);
    let yaml = shown(&masker, "application/yaml", "a: \"\\x63anary-hunter2\"\n");
    assert_eq!(yaml, format!("1 masked a: {}\n", mask(CANARY)));
    assert_eq!(shown(&masker, "text/plain", "a canary-hunter2."), format!("1 masked a {}.", mask(CANARY)));
}

#[test]
fn cbor_is_masked_and_named_as_json() {
    let secret = serde_json::json!({"kind": "Secret", "metadata": {"name": "s"}, "data": {"a": STANDARD.encode(CANARY)}});
    let pod = serde_json::json!({"kind": "Pod", "spec": {"containers": [{"env": [{"name": "A_KEY", "value": CANARY}]}]}});
    let masker = masker_of_all();
    let mask = masker.mask(CANARY.as_bytes());
    for (value, of) in [(secret, "application/cbor"), (pod, "application/apply-patch+cbor")] {
        let list = serde_json::json!({"kind": "List", "items": [value]});
        let body = super::cbor::tests::encoded(&list);
        let Kept { content, summary, .. } = held(&masker, of, &body, true);
        let text = String::from_utf8(content).unwrap();
        assert!(text.contains(&mask) && summary.masked == 1, "{text}");
        assert_eq!((summary.decoded.as_deref(), summary.truncated), (Some("cbor"), None));
        let cut = held(&masker, of, &body[..body.len() - 1], false);
        assert!(cut.content.is_empty(), "{:?}", cut.summary);
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct Fields {
    #[prost(bytes = "vec", repeated, tag = "1")]
    first: Vec<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "2")]
    second: Vec<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "3")]
    third: Vec<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "5")]
    fifth: Vec<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "6")]
    sixth: Vec<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "7")]
    seventh: Vec<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "20")]
    twentieth: Vec<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "34")]
    thirty_fourth: Vec<Vec<u8>>,
}

fn fields(make: impl FnOnce(&mut Fields)) -> Vec<u8> {
    let mut fields = Fields::default();
    make(&mut fields);
    fields.encode_to_vec()
}

fn envelope(kind: &str, object: Vec<u8>) -> Vec<u8> {
    let meta = fields(|meta| (meta.first, meta.second) = (vec![b"v1".into()], vec![kind.into()]));
    let envelope = fields(|of| (of.first, of.second) = (vec![meta], vec![object]));
    [&b"k8s\0"[..], &envelope].concat()
}

fn pair(name: &str, value: &str) -> Vec<u8> {
    fields(|pair| (pair.first, pair.second) = (vec![name.into()], vec![value.into()]))
}

#[test]
fn variables_and_fields_are_masked_in_protobuf() {
    let container = || fields(|of| of.seventh = vec![pair("A_TOKEN", CANARY), pair("LEVEL", "shown")]);
    let deeper = || fields(|of| of.first = vec![container()]);
    let pod = || {
        let spec = fields(|of| {
            (of.second, of.twentieth, of.thirty_fourth) =
                (vec![container()], vec![container()], vec![deeper()]);
        });
        fields(|of| of.second = vec![spec])
    };
    let second = |inner: Vec<u8>| fields(|of| of.second = vec![inner]);
    let workload = |spec: fn(Vec<u8>) -> Vec<u8>| second(spec(pod()));
    let third = |template| fields(|of| of.third = vec![template]);
    let masker = masker(MaskRules { patterns: Vec::new(), ..rules() }, PODS);
    for (kind, object, masks) in [
        ("Pod", pod(), 3),
        ("PodList", fields(|of| of.second = vec![pod(), pod()]), 6),
        ("PodTemplate", second(pod()), 3),
        ("Deployment", workload(third), 3),
        ("StatefulSetList", second(workload(third)), 3),
        ("DaemonSet", workload(|template| fields(|of| of.second = vec![template])), 3),
        ("Job", workload(|template| fields(|of| of.sixth = vec![template])), 3),
        ("CronJob", second(fields(|of| of.fifth = vec![second(fields(|of| of.sixth = vec![pod()]))])), 3),
        ("ConfigMap", second(pair("a", CANARY)), 1),
        ("ConfigMapList", second(second(pair("a", CANARY))), 1),
    ] {
        let body = envelope(kind, object);
        let Kept { content, summary, .. } = held(&masker, PROTOBUF, &body, true);
        assert_eq!((summary.masked, summary.truncated), (masks, None), "{kind}");
        let text = String::from_utf8_lossy(&content);
        assert!(!text.contains(CANARY) && text.contains("weir:masked:le16:903554d12c313c30"), "{kind}");
        assert_eq!(text.contains("shown"), masks != 1, "{kind}");
        assert!(
            held(&masker, PROTOBUF, &body[..body.len() - 1], false).content.is_empty(),
            "{kind} that is cut"
        );
    }
    for kind in ["Database", "DatabaseList"] {
        let kept = held(&masker, PROTOBUF, &envelope(kind, pod()), true);
        assert_eq!(
            kept.summary.truncated.as_deref(),
            Some("withheld: a rule masks fields of this kind, which are not known in protobuf")
        );
        assert!(kept.content.is_empty() && kept.summary.digest.unwrap().starts_with("hmac-"));
    }
    // An expression finds something that could be anything.
    let all = masker_of_all();
    let kept = held(&all, PROTOBUF, &envelope("Thing", second(CANARY.into())), true);
    assert!(kept.content.is_empty(), "{:?}", kept.summary);
    assert!(!held(&all, PROTOBUF, &envelope("Thing", second("x".into())), true).content.is_empty());
}

fn masker_of_all() -> Masker {
    masker(rules(), PODS)
}

#[test]
fn logs_are_masked_however_they_are_cut_and_what_follows_a_loss_is_left_out_up_to_its_line() {
    let masker = masker_of_all();
    let mut stream = Streamed::new(&masker, Sensitivity::None, Some("text/plain".into()), None, false);
    let mut kinds = stream.push(&masker, b"a can");
    kinds.append(&mut stream.push(&masker, b"ary-hunter2 b\ncanar"));
    kinds.append(&mut stream.lost(9));
    kinds.append(&mut stream.push(&masker, b"y-hunter2 lost\nc"));
    let (mut rest, summary) = stream.finish(&masker, 0);
    kinds.append(&mut rest);
    let text: Vec<_> = kinds
        .iter()
        .filter_map(|kind| match kind {
            Kind::Content(piece) => piece.bytes.to_vec().ok(),
            _ => None,
        })
        .collect();
    let whole = masker.mask(b"canary-hunter2");
    assert_eq!(
        String::from_utf8(text.concat()).unwrap(),
        format!("a weir:masked:le8:begun{whole} b\nweir:masked:le8:begunweir:masked:le8:begun")
    );
    assert_eq!(summary.masked, 4);
    assert!(summary.digest.unwrap().starts_with("hmac-"));
}

fn websocket(channel: u8, payload: &[u8], client: bool) -> Bytes {
    let length = u8::try_from(payload.len() + 1).unwrap();
    assert!(length < 126);
    let head = if client { vec![0x82, 0x80 | length, 0, 0, 0, 0] } else { vec![0x82, length] };
    [&head[..], &[channel], payload].concat().into()
}

#[tokio::test]
async fn an_exec_is_masked_in_both_directions_and_across_pieces() {
    let directory = TempDir::new().unwrap();
    let rules = CommitRules { masks: Arc::new(Masks::new(rules()).unwrap()), ..CommitRules::default() };
    let recorder = Recorder::start(RecorderOptions { rules, ..options(directory.path()) }).unwrap();
    let mut headers = HeaderMap::new();
    headers.insert("upgrade", "websocket".parse().unwrap());
    headers.insert("sec-websocket-protocol", "v4.channel.k8s.io".parse().unwrap());
    let exec = attributes("create", "pods", "exec");
    let record = open(&recorder, Method::POST, &exec, &headers, None).await.unwrap();
    record.response_started(StatusCode::SWITCHING_PROTOCOLS, &headers, true);
    for byte in format!("echo {}\n", fixture::CANARY).bytes() {
        record.client_stream_data(websocket(0, &[byte], true)).await.unwrap();
        record.server_stream_data(websocket(1, &[byte], false)).await.unwrap();
    }
    record.server_stream_data(websocket(2, b"done", false)).await.unwrap();
    // What is not decoded hides.
    record.server_stream_data(Bytes::from_static(b"\xff\xff\xff")).await.unwrap();
    record.close(Outcome::Complete, None);
    recorder.stop("test").await.unwrap();
    no_canary(directory.path());
    let events = read(recorder.folder());
    let mask = Masker::for_cluster(&std::fs::read(directory.path().join("mask.key")).unwrap(), "prod");
    for channel in [Channel::Stdin, Channel::Stdout] {
        let text = String::from_utf8(content(&events, channel)).unwrap();
        assert!(text.contains(&mask.mask(fixture::CANARY.as_bytes())), "{text}");
        assert!(text.ends_with('\n') && !text.contains("hunter"), "{text}");
    }
    assert_eq!(content(&events, Channel::Stderr), b"done");
    assert!(content(&events, Channel::ServerRaw).is_empty());
    assert!(events.iter().any(|event| {
        matches!(&event.kind, Kind::Gap { reason, .. } if reason.starts_with("masked by rule: "))
    }));
}

#[test]
fn arguments_and_uris_are_masked_by_expressions() {
    let masker = masker_of_all();
    assert!(!masker.arguments(&["sh".into(), "-c".into(), format!("echo {CANARY}")])[2].contains(CANARY));
    for uri in ["/api?command=echo&command=%63anary-hunter2", "/api/canary-hunter2", "/api?canary-hunter2=a"]
    {
        let masked = masker.request_uri(&uri.parse().unwrap());
        assert!(!masked.contains("anary-hunter2") && masked.contains("weir:masked:"), "{masked}");
    }
}

proptest! {
    #[test]
    fn what_rules_mask_never_survives_whatever_stands_around_it(
        before in "[ -~]{0,20}", after in "[ -~]{0,20}", name in "[a-z]{0,5}", yaml: bool, cut in any::<prop::sample::Index>(),
    ) {
        let masker = masker_of_all();
        let value = serde_json::json!({"kind": "Thing", "spec": {"text": format!("{before}{CANARY}{after}"),
            "list": [[CANARY]], &name: {"env": [{"value": "s3cr3t-value", "name": format!("{name}_TOKEN")}]}}});
        let (content_type, text) = if yaml {
            ("application/yaml", serde_yaml_ng::to_string(&value).unwrap())
        } else {
            (JSON, value.to_string())
        };
        let at = cut.index(text.len());
        for (body, whole) in [(text.as_bytes(), true), (&text.as_bytes()[..at], false)] {
            let kept = String::from_utf8_lossy(&held(&masker, content_type, body, whole).content).into_owned();
            for secret in [CANARY, "s3cr3t-value", &STANDARD.encode(CANARY)] {
                prop_assert!(!kept.contains(secret), "{}", kept);
            }
        }
    }
}
