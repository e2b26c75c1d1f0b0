//! Masks of Kubernetes' protobuf: bodies that its own codecs wrote (`cargo xtask conversations`), read again by prost, and what
//! nobody well-behaved sends.

use std::{collections::HashMap, fmt::Write as _};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use expect_test::expect;
use proptest::prelude::*;
use prost::Message as _;
use serde::Deserialize;
use weir_common::{
    attributes::Attributes,
    event::{Channel, Kind},
};

use super::{
    body::Sensitivity,
    content::{self, Held, Kept, Streamed},
    mask::{MASK_PREFIX, Masker},
};

const CANARY: &str = "canary-hunter2";
const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";

#[derive(Clone, PartialEq, prost::Message)]
struct Unknown {
    #[prost(message, tag = "1")]
    type_meta: Option<TypeMeta>,
    #[prost(bytes = "vec", tag = "2")]
    raw: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct TypeMeta {
    #[prost(string, tag = "1")]
    api_version: String,
    #[prost(string, tag = "2")]
    kind: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RawExtension {
    #[prost(bytes = "vec", tag = "1")]
    raw: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ObjectMeta {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(map = "string, string", tag = "12")]
    annotations: HashMap<String, String>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Secret {
    #[prost(message, tag = "1")]
    metadata: Option<ObjectMeta>,
    #[prost(map = "string, bytes", tag = "2")]
    data: HashMap<String, Vec<u8>>,
    #[prost(string, tag = "3")]
    type_of: String,
    #[prost(map = "string, string", tag = "4")]
    string_data: HashMap<String, String>,
    /// What a later version of Kubernetes might add.
    #[prost(string, tag = "6")]
    later: String,
}

fn masker() -> Masker {
    Masker::for_cluster(&[1; 32], "c")
}

fn envelope(kind: &str, object: &impl prost::Message) -> Vec<u8> {
    let type_meta = Some(TypeMeta { api_version: "v1".into(), kind: kind.into() });
    [super::protobuf::MAGIC, &Unknown { type_meta, raw: object.encode_to_vec() }.encode_to_vec()].concat()
}

fn decoded<T: prost::Message + Default>(body: &[u8]) -> T {
    let unknown = Unknown::decode(body.strip_prefix(super::protobuf::MAGIC).unwrap()).unwrap();
    T::decode(&unknown.raw[..]).unwrap()
}

fn held(sensitivity: Sensitivity, body: &[u8], whole: bool) -> Kept {
    let held = Held {
        chunks: vec![Bytes::copy_from_slice(body)],
        wire_bytes: body.len() as u64,
        cut: (!whole).then(|| ("longer".to_owned(), None)),
        content_type: Some(PROTOBUF.to_owned()),
        bytes_max: usize::MAX / 8,
        ..Held::default()
    };
    content::reduce(&masker(), sensitivity, &held)
}

fn has(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

/// A body that Kubernetes' codecs wrote.
#[derive(Deserialize)]
struct Written {
    name: String,
    path: String,
    #[serde(default)]
    watch: bool,
    body: String,
}

fn written() -> Vec<Written> {
    serde_json::from_str(include_str!("protobuf_bodies.json")).unwrap()
}

impl Written {
    fn bytes(&self) -> Vec<u8> {
        STANDARD.decode(&self.body).unwrap()
    }

    /// What is recorded of it: content, masks, and everything else in words.
    fn recorded(&self, bytes: &[u8]) -> (Vec<u8>, u64, String) {
        let sensitivity = Sensitivity::of(&Attributes::parse("GET", &self.path, None));
        let (mut content, kinds, summary) = if self.watch {
            let kind = Some(format!("{PROTOBUF};stream=watch"));
            let mut stream = Streamed::new(&masker(), sensitivity, kind, None, true);
            let mut kinds = stream.push(&masker(), bytes);
            let (mut rest, summary) = stream.finish(&masker(), 0);
            kinds.append(&mut rest);
            (Vec::new(), kinds, summary)
        } else {
            let Kept { content, summary, names, .. } = held(sensitivity, bytes, true);
            (content, names.kinds(Channel::ResponseBody), summary)
        };
        let mut words = String::new();
        for kind in kinds {
            match kind {
                Kind::Content(piece) => content.extend(piece.bytes.to_vec().unwrap()),
                Kind::ObjectsNamed(named) => {
                    for object in named.objects {
                        let event = object.event.map(|event| format!("{event} ")).unwrap_or_default();
                        let (version, kind) = (object.api_version, object.kind);
                        let (namespace, name) = (object.namespace, object.name);
                        write!(
                            words,
                            " [{event}{version} {kind} {namespace}/{name} {}]",
                            object.resource_version
                        )
                        .unwrap();
                    }
                }
                Kind::Gap { reason, .. } => write!(words, " gap: {reason}").unwrap(),
                other => panic!("{other:?}"),
            }
        }
        if let Some(truncated) = summary.truncated {
            write!(words, " {truncated}").unwrap();
        }
        (content, summary.masked, words)
    }
}

#[test]
fn what_kubernetes_writes_is_named_and_masked() {
    let mut all = String::new();
    for written in written() {
        let bytes = written.bytes();
        let (content, masks, words) = written.recorded(&bytes);
        assert!(!has(&content, CANARY), "{}", written.name);
        assert_eq!(has(&content, MASK_PREFIX), masks > 0 && !content.is_empty(), "{}", written.name);
        // What is no secret stays.
        assert!(content.is_empty() || has(&bytes, "shown") == has(&content, "shown"), "{}", written.name);
        writeln!(all, "{}: {masks} masked{words}", written.name).unwrap();
    }
    expect![[r#"
        a Secret: 4 masked [v1 Secret ns/s 7]
        a Secret elsewhere: 4 masked [v1 Secret ns/s 7]
        a SecretList: 8 masked [v1 Secret ns/s 7] [v1 Secret ns/t 7]
        metadata of Secrets: 1 masked [meta.k8s.io/v1 PartialObjectMetadata ns/s 7]
        a Status: 0 masked
        a List: 4 masked [v1 ConfigMap ns/m ] [v1 Secret ns/s 7]
        a TokenRequest: 2 masked [authentication.k8s.io/v1 TokenRequest ns/a 7]
        a TokenReview: 1 masked
        a Pod: 1 masked [v1 Pod ns/p 7]
        a DeploymentList: 1 masked [apps/v1 Deployment ns/d ] [apps/v1 Deployment ns/e 7]
        a ConfigMap: 0 masked [v1 ConfigMap ns/m ]
        a ControllerRevision: 1 masked [apps/v1 ControllerRevision /r ]
        a watch of Secrets: 9 masked [ADDED v1 Secret ns/s 7] [ADDED meta.k8s.io/v1 PartialObjectMetadata ns/s 7] [ADDED v1 Secret ns/t 7]
        a watch of Pods: 1 masked [ADDED v1 Pod ns/p 7]
    "#]].assert_eq(&all);
}

#[test]
fn a_masked_secret_is_the_secret_but_for_its_values() {
    let body = written().into_iter().find(|body| body.name == "a Secret").unwrap().bytes();
    let (before, after) =
        (decoded::<Secret>(&body), decoded::<Secret>(&held(Sensitivity::None, &body, true).content));
    let mask = masker().mask(CANARY.as_bytes());
    assert_eq!(after.data["a"], mask.as_bytes());
    // As in JSON: the mask of what `data` holds is that of `stringData`.
    assert_eq!(after.string_data["b"], mask);
    let (mut expected, mut found) = (before.metadata.unwrap(), after.metadata.unwrap());
    let copy = found.annotations.insert(super::body::LAST_APPLIED.into(), String::new()).unwrap();
    expected.annotations.insert(super::body::LAST_APPLIED.into(), String::new());
    assert_eq!((&found, after.type_of.as_str()), (&expected, "Opaque"));
    assert!(copy.contains(&mask), "{copy}");
}

#[test]
fn fields_of_a_secret_that_nobody_knows_are_left_out() {
    let secret = Secret { type_of: "Opaque".into(), later: CANARY.into(), ..Secret::default() };
    let kept = held(Sensitivity::None, &envelope("Secret", &secret), true);
    assert_eq!(kept.summary.masked, 1);
    assert_eq!(decoded::<Secret>(&kept.content), Secret { later: String::new(), ..secret });
}

#[test]
fn what_could_be_read_in_two_ways_or_is_not_known_is_withheld() {
    let secret = Secret { later: CANARY.into(), ..Secret::default() };
    let body = envelope("Secret", &secret);
    let thing = envelope("Thing", &secret);
    let within = Secret { later: String::from_utf8(body.clone()).unwrap(), ..Secret::default() };
    let json = Secret { later: r#"{"kind":"Secret"}"#.into(), ..Secret::default() };
    // With JSON in it.
    let group = [&[0xa3, 0x06, 0x0a, 0x11][..], br#"{"kind":"Secret"}"#, &[0xa4, 0x06]].concat();
    let in_object = |raw: &[u8]| {
        let type_meta = Some(TypeMeta { api_version: "v1".into(), kind: "Thing".into() });
        [super::protobuf::MAGIC, &Unknown { type_meta, raw: raw.to_vec() }.encode_to_vec()].concat()
    };
    for (sensitivity, body) in [
        // The kind is given twice; the object is; a group that holds one, does not end, has not begun; an envelope that ends too early; none.
        (Sensitivity::None, [&thing[..], &body[4..]].concat()),
        (Sensitivity::None, [&thing[..], b"\x12\x00"].concat()),
        (Sensitivity::None, in_object(&group)),
        (Sensitivity::None, in_object(b"\xa3\x06\xa3\x06\xa4\x06")),
        (Sensitivity::None, in_object(b"\xa4\x06")),
        (Sensitivity::None, body[..body.len() - 1].to_vec()),
        (Sensitivity::None, secret.encode_to_vec()),
        (Sensitivity::None, envelope("Thing", &within)),
        (Sensitivity::None, envelope("Thing", &json)),
        (Sensitivity::Secrets, thing),
        (Sensitivity::Tokens, envelope("Thing", &secret)),
    ] {
        let kept = held(sensitivity, &body, true);
        assert!(kept.content.is_empty() && kept.summary.truncated.is_some(), "{body:?}");
        assert!(kept.unread.is_some());
    }
}

#[test]
fn what_kubernetes_skips_and_text_that_only_speaks_of_a_secret_hide_nothing_of_an_object() {
    // Words in a message of a message, as arguments of a container are.
    let words = Status { message: "cat <<E\nkind: Secret\nE".into(), code: 1, ..Status::default() };
    let thing = envelope("Thing", &Unknown { type_meta: None, raw: words.encode_to_vec() });
    assert_eq!(held(Sensitivity::None, &thing, true).content, thing);
    // In a Secret, and behind it in its envelope, what is skipped is left out.
    let secret = Secret { type_of: "Opaque".into(), ..Secret::default() };
    let group = [&[0xa3, 0x06, 0x0a, 0x0e][..], CANARY.as_bytes(), &[0xa4, 0x06]].concat();
    let raw = [&secret.encode_to_vec()[..], &group].concat();
    let type_meta = Some(TypeMeta { api_version: "v1".into(), kind: "Secret".into() });
    let unknown = Unknown { type_meta, raw }.encode_to_vec();
    let kept = held(Sensitivity::None, &[super::protobuf::MAGIC, &unknown, &group].concat(), true);
    assert!(!has(&kept.content, CANARY));
    assert_eq!((decoded::<Secret>(&kept.content), kept.summary.masked, kept.unread), (secret, 2, None));
}

#[test]
fn a_body_that_is_cut_is_recorded_only_where_its_kind_is_harmless() {
    let secret = Secret { later: "x".repeat(100), ..Secret::default() };
    let cut = |kind: &str| {
        let body = envelope(kind, &secret);
        body[..body.len() - 9].to_vec()
    };
    assert_eq!(held(Sensitivity::None, &cut("PodList"), false).content, cut("PodList"));
    for (sensitivity, body) in [
        (Sensitivity::None, cut("SecretList")),
        (Sensitivity::Secrets, cut("SecretList")),
        (Sensitivity::Secrets, cut("PodList")),
        (Sensitivity::None, b"k8s\0\x0a".to_vec()),
    ] {
        assert!(held(sensitivity, &body, false).content.is_empty(), "{body:?}");
    }
}

#[test]
fn objects_in_objects_end_somewhere() {
    let (mut body, mut depth) = (envelope("Secret", &Secret::default()), 0);
    for _ in 0..100 {
        let item = RawExtension { raw: body };
        body = envelope("List", &Unknown { type_meta: None, raw: item.encode_to_vec() });
        depth += 1;
        if held(Sensitivity::None, &body, true).content.is_empty() {
            break;
        }
    }
    assert_eq!(depth, 8, "a Secret in eight Lists is one object too many");
}

#[test]
fn a_watch_of_which_a_part_was_lost_is_not_guessed_at() {
    let watch = written().into_iter().find(|body| body.name == "a watch of Pods").unwrap().bytes();
    let kind = Some(format!("{PROTOBUF};stream=watch"));
    let mut stream = Streamed::new(&masker(), Sensitivity::None, kind, None, true);
    stream.push(&masker(), &watch[..10]);
    assert!(matches!(stream.lost(5)[..], [Kind::Gap { bytes: Some(15), .. }]));
    assert!(stream.push(&masker(), &watch[15..]).is_empty());
    assert!(stream.finish(&masker(), 0).1.truncated.unwrap().contains("a part of it was lost"));
}

proptest! {
    #[test]
    fn no_bytes_panic_and_a_stream_is_recorded_alike_however_it_is_cut(
        which in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), byte: u8, length in 0_usize..9,
        cut in any::<prop::sample::Index>(),
    ) {
        let all = written();
        let written = which.get(&all);
        let mut bytes = written.bytes();
        let at = at.index(bytes.len());
        let end = (at + length).min(bytes.len());
        bytes.splice(at..end, [byte]);
        written.recorded(&bytes);
        let stream = |pieces: &[&[u8]]| {
            let kind = Some(PROTOBUF.to_owned());
            let mut stream = Streamed::new(&masker(), Sensitivity::None, kind, None, true);
            let mut kinds: Vec<_> = pieces.iter().flat_map(|piece| stream.push(&masker(), piece)).collect();
            let (mut rest, summary) = stream.finish(&masker(), 0);
            kinds.append(&mut rest);
            let content = kinds.iter().filter_map(|kind| match kind {
                Kind::Content(content) => content.bytes.to_vec().ok(),
                _ => None,
            });
            (content.collect::<Vec<_>>().concat(), summary)
        };
        let cut = cut.index(bytes.len());
        prop_assert_eq!(stream(&[&bytes]), stream(&[&bytes[..cut], &bytes[cut..]]));
    }

    #[test]
    fn a_secret_never_survives_whatever_stands_around_it(
        name in "[a-z]{0,200}", key in "[a-z\\.]{1,9}", later: bool, annotation in "[ -~]{0,40}", secrets: bool,
    ) {
        let copy = serde_json::json!({"kind": "Secret", "stringData": {"a": CANARY}}).to_string();
        let annotations = [("a".to_owned(), annotation), (super::body::LAST_APPLIED.to_owned(), copy)].into();
        let secret = Secret {
            metadata: Some(ObjectMeta { name, annotations }),
            data: [(key.clone(), CANARY.into())].into(),
            type_of: "t".into(),
            string_data: [(key, CANARY.into())].into(),
            later: if later { CANARY.into() } else { String::new() },
        };
        let sensitivity = if secrets { Sensitivity::Secrets } else { Sensitivity::None };
        let kept = held(sensitivity, &envelope("Secret", &secret), true);
        prop_assert!(!has(&kept.content, CANARY));
        let after = decoded::<Secret>(&kept.content);
        prop_assert_eq!(after.metadata.unwrap().name, secret.metadata.unwrap().name);
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct Status {
    #[prost(string, tag = "2")]
    status: String,
    #[prost(string, tag = "3")]
    message: String,
    #[prost(message, tag = "5")]
    details: Option<StatusDetails>,
    #[prost(int32, tag = "6")]
    code: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct StatusDetails {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, repeated, tag = "4")]
    causes: Vec<StatusCause>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct StatusCause {
    #[prost(string, tag = "2")]
    message: String,
    #[prost(string, tag = "3")]
    field: String,
}

#[test]
fn words_of_a_status_that_may_quote_have_a_mask() {
    let status = |message: &str, field: &str| Status {
        status: "Failure".into(),
        message: message.into(),
        details: Some(StatusDetails {
            name: "db".into(),
            causes: vec![StatusCause { message: message.into(), field: field.into() }],
        }),
        code: 422,
    };
    let quoting = format!("Invalid value: \"{CANARY}\"");
    let body = envelope("Status", &status(&quoting, "users[name=\"canary-hunter2\"]"));
    let kept = held(Sensitivity::Secrets, &body, true);
    assert_eq!(kept.summary.masked, 3);
    let mask = |text: &str| masker().mask(text.as_bytes());
    let expected = status(&mask(&quoting), &mask("users[name=\"canary-hunter2\"]"));
    assert_eq!(decoded::<Status>(&kept.content), expected);
    // Elsewhere, and what quotes nothing.
    assert_eq!(held(Sensitivity::None, &body, true).content, body);
    let plain = envelope("Status", &status("secrets \"db\" not found", "data[tls.key]"));
    assert_eq!(held(Sensitivity::Secrets, &plain, true).content, plain);
    // A pod template, also where it is cut.
    let template = envelope("Status", &status(&format!("Env:[]core.EnvVar{{Value:{CANARY}}}"), "spec"));
    assert!(!has(&held(Sensitivity::None, &template, true).content, CANARY));
    let cut = held(Sensitivity::None, &template[..template.len() - 4], false);
    assert!(!has(&cut.content, CANARY));
}
