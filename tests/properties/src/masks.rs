//! Properties of what is recorded of bodies, headers, URIs and arguments: a secret is never among it.
//!
//! The secret is planted: the input decides what stands around it, never whether it counts as one.

use std::sync::OnceLock;

use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use serde_json::{Value, json};
use weir_agent::recording::probe::{self, Claim, Sifting};
use weir_common::{
    attributes::Attributes,
    event::{BodySummary, CONTENT_BYTES_MAX, Kind},
};

/// The secret, and how it looks in base64.
const SECRET: &str = "canary-4f1c0c9a7f0e4d7b";
const SECRET_BASE64: &str = "Y2FuYXJ5LTRmMWMwYzlhN2YwZTRkN2I=";
/// Most bytes of header names and values, of which names alone may make the record longer.
const HEADERS_BYTES_MAX: usize = 64 * 1024;
/// Most bytes of a URI and of the mark that it was cut.
const URI_BYTES_MAX: usize = 64 * 1024 + 64;
/// What Kubernetes' protobuf begins with, and its type.
const MAGIC: &[u8] = b"k8s\0";
const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

const CONTENT_TYPES: [Option<&str>; 8] = [
    None,
    Some("application/json"),
    Some("application/yaml"),
    Some("application/apply-patch+yaml; charset=utf-8"),
    Some("application/json-patch+json"),
    Some("application/vnd.kubernetes.protobuf"),
    Some("text/plain"),
    Some("application/json;stream=watch"),
];
const ENCODINGS: [Option<&str>; 4] = [None, Some("gzip"), Some("identity"), Some("br")];

/// Requests whose bodies are nothing special, Secrets, and tokens.
const REQUESTS: [&str; 3] = [
    "/apis/example.com/v1/namespaces/a/things/b",
    "/api/v1/namespaces/a/secrets/b",
    "/api/v1/namespaces/a/serviceaccounts/b/token",
];

fn attributes(choice: u8) -> &'static Attributes {
    static ALL: OnceLock<[Attributes; 3]> = OnceLock::new();
    let all = ALL.get_or_init(|| REQUESTS.map(|path| Attributes::parse("POST", path, None)));
    &all[usize::from(choice) % all.len()]
}

/// The input's first four bytes choose the request, what its headers claim, the limit and the cuts.
fn claim(bytes: &[u8]) -> Option<(Claim<'static>, [u8; 2], &[u8])> {
    let ([choice, kind, limit, cut], body) = bytes.split_first_chunk::<4>()?;
    let claim = Claim {
        attributes: attributes(*choice),
        content_type: CONTENT_TYPES[usize::from(*kind) % CONTENT_TYPES.len()],
        content_encoding: ENCODINGS[usize::from(*kind) / CONTENT_TYPES.len() % ENCODINGS.len()],
    };
    Some((claim, [*limit, *cut], body))
}

fn limit(choice: u8) -> usize {
    usize::from(choice % 16) << (choice / 16)
}

/// Any body at all: what is recorded keeps its limit, the summary counts it, and what is called whole and unmasked
/// is the body itself. A stream is recorded alike however it was cut.
pub fn body(bytes: &[u8]) {
    let Some((claim, [limit_choice, cut], body)) = claim(bytes) else { return };
    let bytes_max = limit(limit_choice);
    let (content, summary) = probe::held(claim, body, bytes_max, cut % 2 == 1);
    assert!(content.len() <= bytes_max, "{} bytes, more than {bytes_max}", content.len());
    count(&content, &summary);
    assert_eq!(summary.wire_bytes, body.len() as u64);
    if summary.masked == 0 && summary.truncated.is_none() && summary.decoded.is_none() && !content.is_empty()
    {
        let same = content == body || reads_the_same(&content, body);
        assert!(same, "neither masked nor truncated, and not what was sent");
    }
    for watch in [false, true] {
        let whole = shown(probe::streamed(claim, watch, &[body]));
        let at = usize::from(cut).min(body.len());
        let pieces = [&body[..at], &body[at..]];
        // Errors of a decoder count the bytes of the piece that they were found in.
        if claim.content_encoding != Some("gzip") {
            assert_eq!(shown(probe::streamed(claim, watch, &pieces)), whole);
        }
    }
}

/// Masking serialises anew even where no mask was needed: the same document, other bytes.
fn reads_the_same(content: &[u8], body: &[u8]) -> bool {
    let json = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).ok();
    let yaml = |bytes: &[u8]| serde_yaml_ng::from_slice::<Value>(bytes).ok();
    if content.starts_with(MAGIC) {
        return body.starts_with(MAGIC);
    }
    // Kubernetes takes bytes that are no UTF-8, too.
    match json(body).or_else(|| json(String::from_utf8_lossy(body).as_bytes())) {
        Some(value) => json(content) == Some(value),
        None if only_go_takes(body) && json(content).is_some() => true,
        None => yaml(body).is_some_and(|value| yaml(content) == Some(value)),
    }
}

/// Whether there may be half a pair of surrogates in it, or a number with an exponent, which no `f64` may hold: the unit tests of what
/// reads them say what becomes of those.
fn only_go_takes(body: &[u8]) -> bool {
    let is_half =
        |four: &[u8]| matches!(four, [b'\\', b'u', b'd' | b'D', b'8'..=b'9' | b'a'..=b'f' | b'A'..=b'F']);
    let is_exponent = |two: &[u8]| matches!(two, [b'0'..=b'9', b'e' | b'E']);
    body.windows(4).any(is_half) || body.windows(2).any(is_exponent)
}

fn count(content: &[u8], summary: &BodySummary) {
    assert_eq!(summary.recorded_bytes, content.len() as u64, "the summary counts what is recorded");
    assert!(
        summary.masked == 0 || !summary.digest.as_deref().unwrap_or("").starts_with("sha256:"),
        "an unkeyed digest of what was masked"
    );
}

/// Content and gaps of a stream, in order, content as one.
fn shown((kinds, summary): (Vec<Kind>, BodySummary)) -> (Vec<u8>, Vec<String>, BodySummary) {
    let (mut content, mut gaps) = (Vec::new(), Vec::new());
    for kind in kinds {
        match kind {
            Kind::Content(piece) => {
                assert_eq!(piece.offset, content.len() as u64, "content leaves no hole");
                let piece = piece.bytes.to_vec().expect("our own base64 is valid");
                assert!(!piece.is_empty() && piece.len() <= CONTENT_BYTES_MAX);
                content.extend(piece);
            }
            Kind::Gap { reason, .. } => gaps.push(reason),
            Kind::ObjectsNamed(_) => {}
            other => panic!("a stream makes no {other:?}"),
        }
    }
    count(&content, &summary);
    (content, gaps, summary)
}

/// A `Secret` with anything around it, in any form in which it comes: its value is not recorded.
pub fn secret_body(bytes: &[u8]) {
    let Some((claim, [limit_choice, cut], rest)) = claim(bytes) else { return };
    let around: Value = serde_json::from_slice(rest)
        .or_else(|_| serde_yaml_ng::from_slice(rest))
        .unwrap_or_else(|_| String::from_utf8_lossy(rest).into_owned().into());
    if knows_it(&around.to_string()) {
        return;
    }
    let secret = secret(&around);
    let forms = [
        secret.clone(),
        json!({"kind": "List", "items": [around.clone(), secret.clone()]}),
        json!({"type": "ADDED", "object": secret.clone(), "other": around.clone()}),
        json!([around.clone(), secret.clone()]),
        json!({"kind": "Thing", "spec": {"templates": {"a": around.clone(), "b": secret.clone()}}}),
        json!({"kind": "Thing", "metadata": {"annotations": {LAST_APPLIED: secret.to_string(), "a": around}}}),
    ];
    let writings: [fn(&Value) -> String; 3] = [
        Value::to_string,
        |form| serde_json::to_string_pretty(form).expect("JSON can be written"),
        |form| serde_yaml_ng::to_string(form).expect("JSON can be written as YAML"),
    ];
    // What the request's choice leaves of the first byte chooses one of each: all of them would be slow to fuzz.
    let choice = usize::from(bytes[0]) / REQUESTS.len();
    let form = &forms[choice % forms.len()];
    let text = writings[choice / forms.len() % writings.len()](form);
    hides(claim, &text, limit_choice, cut);
}

/// A `Secret` in Kubernetes' protobuf with any fields around its own, in any form in which it comes: its value is not recorded.
/// The input's bytes are those fields: a number, and what the field holds.
pub fn secret_protobuf(bytes: &[u8]) {
    let Some((claim, [limit_choice, cut], rest)) = claim(bytes) else { return };
    if knows_it(&String::from_utf8_lossy(rest)) {
        return;
    }
    let mut around: Vec<(u8, &[u8])> = rest
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split_first().map(|(number, content)| (*number, content)))
        .collect();
    let own = |number, content: &[u8]| message(&[(1, b"a"), (number, content)]);
    let copy = json!({"kind": "Secret", "data": {"a": SECRET_BASE64}}).to_string();
    let metadata = message(&[(12, &[field(2, copy.as_bytes()), field(1, LAST_APPLIED.as_bytes())].concat())]);
    let value = own(2, SECRET.as_bytes());
    around.extend([(1, &metadata[..]), (2, &value), (4, &value), (9, SECRET.as_bytes())]);
    let turn = usize::from(limit_choice) % around.len();
    around.rotate_left(turn);
    let item = message(&around);
    let secret = envelope("Secret", &item);
    let extension = |object: &[u8]| message(&[(1, object)]);
    let forms = [
        secret.clone(),
        envelope("SecretList", &message(&[(2, &item)])),
        envelope("List", &message(&[(2, &extension(&secret))])),
        envelope("Thing", &message(&[(3, &secret)])),
        envelope("ThingList", &message(&[(2, &message(&[(1, &metadata)]))])),
        envelope("PartialObjectMetadata", &message(&[(1, &metadata), (2, SECRET.as_bytes())])),
    ];
    let choice = usize::from(bytes[0]) / REQUESTS.len() % forms.len();
    let form = &forms[choice];
    // Elsewhere the cut may fall between a value and the kind that would tell what it is (docs/fuzzing.md).
    let is_told_late = choice >= 4 && claim.attributes.resource != "secrets";
    let claim = Claim { content_type: Some(PROTOBUF), content_encoding: None, ..claim };
    for (bytes_max, is_cut) in [(usize::MAX / 8, false), (limit(limit_choice), false), (usize::MAX / 8, true)]
    {
        if is_cut && is_told_late {
            continue;
        }
        let end = if is_cut { usize::from(cut) * form.len() / 256 } else { form.len() };
        let (content, _) = probe::held(claim, &form[..end], bytes_max, is_cut);
        is_hidden(&content, "protobuf");
    }
    let event = message(&[(1, b"ADDED"), (2, &extension(form))]);
    let length = u32::try_from(event.len()).expect("an input has no 4 GB").to_be_bytes();
    let frame = [&length[..], &event, &length[..2]].concat();
    let pieces = frame.split_at(usize::from(cut).min(frame.len()));
    let (content, ..) = shown(probe::streamed(claim, true, &[pieces.0, pieces.1]));
    is_hidden(&content, "a watch in protobuf");
}

/// A string, bytes or message of protobuf.
fn field(number: u8, content: &[u8]) -> Vec<u8> {
    let varint = |mut value: usize| {
        let mut out = Vec::new();
        while value >= 0x80 {
            out.push(value.to_le_bytes()[0] | 0x80);
            value >>= 7;
        }
        out.push(value.to_le_bytes()[0]);
        out
    };
    [varint(usize::from(number.max(1)) << 3 | 2), varint(content.len()), content.to_vec()].concat()
}

fn message(fields: &[(u8, &[u8])]) -> Vec<u8> {
    fields.iter().flat_map(|(number, content)| field(*number, content)).collect()
}

fn envelope(kind: &str, object: &[u8]) -> Vec<u8> {
    let type_meta = message(&[(1, b"v1"), (2, kind.as_bytes())]);
    [MAGIC, &message(&[(1, &type_meta), (2, object)])].concat()
}

fn secret(around: &Value) -> Value {
    let mut secret = json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": around,
        "data": {"a": SECRET_BASE64, "b": [SECRET_BASE64]},
        "stringData": {"a": SECRET, "b": {"c": SECRET}},
    });
    if let (Some(secret), Some(around)) = (secret.as_object_mut(), around.as_object()) {
        for (name, value) in around {
            secret.entry(name).or_insert_with(|| value.clone());
        }
    }
    secret
}

fn hides(claim: Claim<'_>, text: &str, limit_choice: u8, cut: u8) {
    // Other types than these are not parsed, and what is not parsed is recorded where nothing sensitive is expected.
    let parsed = matches!(claim.content_type, Some(name) if name.contains("json") || name.contains("yaml"));
    let yaml = !text.starts_with(['{', '[']) && !claim.content_type.is_some_and(|name| name.contains("yaml"));
    if claim.attributes.resource == "secrets" || (parsed && !yaml) {
        let claim = Claim { content_encoding: None, ..claim };
        let (content, _) = probe::held(claim, text.as_bytes(), usize::MAX, false);
        is_hidden(&content, text);
        let (content, _) = probe::held(claim, text.as_bytes(), limit(limit_choice), false);
        is_hidden(&content, text);
        let at = usize::from(cut) * text.len() / 256;
        let end = (at..text.len()).find(|end| text.is_char_boundary(*end)).unwrap_or(text.len());
        // Elsewhere the cut may fall between a value and the kind that would tell what it is (docs/fuzzing.md).
        if claim.attributes.resource == "secrets" {
            let (content, _) = probe::held(claim, &text.as_bytes()[..end], usize::MAX, true);
            is_hidden(&content, text);
        }
        // A watch in YAML there is none.
        let json = claim.content_type.is_some_and(|name| name.contains("json"));
        if !text.contains('\n') && (json || claim.attributes.resource == "secrets") {
            let pieces = [&text.as_bytes()[..end], &text.as_bytes()[end..], b"\n"];
            let (content, ..) = shown(probe::streamed(claim, true, &pieces));
            is_hidden(&content, text);
        }
    }
}

/// Expressions that match the secret, each with another end.
const EXPRESSIONS: [&str; 5] = [
    "canary-[0-9a-f]{16}",
    "(?i:x|canary)-[0-9a-f]+",
    "c[a-z]{2,9}-[0-9a-f]{10,40}?",
    "canary[^ ]{4,}| [^\n]*canary",
    "(?s:a.{0,30}canary.{17})|canary-4f1c",
];

/// A stream with a secret in it, cut as the input says and at every byte: it is not recorded, and a cut leaves no more in clear. The first
/// byte chooses the expression, the second the length of pieces, the third where in the rest the secret stands.
pub fn masked_stream(bytes: &[u8]) {
    static ALL: OnceLock<Vec<Sifting>> = OnceLock::new();
    let all = ALL.get_or_init(|| EXPRESSIONS.iter().filter_map(|text| Sifting::new(text)).collect());
    assert_eq!(all.len(), EXPRESSIONS.len(), "all are expressions");
    let Some(([choice, length, place], rest)) = bytes.split_first_chunk::<3>() else { return };
    if knows_it(&String::from_utf8_lossy(rest)) || rest.windows(6).any(|window| window == b"masked") {
        return;
    }
    let (before, after) = rest.split_at(usize::from(*place).min(rest.len()));
    let text = [before, SECRET.as_bytes(), after].concat();
    let sifting = &all[usize::from(*choice) % all.len()];
    let whole = sifting.recorded(&[&text]);
    is_hidden(&whole, "a stream in one piece");
    for length in [usize::from(*length).max(1), 1] {
        let recorded = sifting.recorded(&text.chunks(length).collect::<Vec<_>>());
        is_hidden(&recorded, "a stream in pieces");
        assert!(clear_bytes(&recorded) <= clear_bytes(&whole), "a cut leaves more in clear");
    }
}

/// Bytes beside masks.
fn clear_bytes(recorded: &[u8]) -> usize {
    let text: String = recorded.iter().map(|byte| char::from(*byte)).collect();
    let mut parts = text.split("weir:masked:");
    let first = parts.next().map_or(0, |part| part.chars().count());
    let behind = parts.map(|part| {
        let (class, rest) = part.split_once(':').expect("a mask has a class");
        assert!(class.starts_with("le"), "{class}");
        let mask = if rest.starts_with("begun") { 5 } else { 16 };
        rest.chars().count() - mask
    });
    first + behind.sum::<usize>()
}

/// Whether the input has the secret itself: libFuzzer learns it from the comparisons, and may put it anywhere.
fn knows_it(text: &str) -> bool {
    [SECRET, SECRET_BASE64].iter().any(|secret| text.contains(secret))
}

#[track_caller]
fn is_hidden(recorded: &[u8], sent: &str) {
    for secret in [SECRET, SECRET_BASE64] {
        let found = recorded.windows(secret.len()).any(|window| window == secret.as_bytes());
        assert!(!found, "a secret is recorded: {} of {sent}", String::from_utf8_lossy(recorded));
    }
}

/// The input's lines are a URI, headers, arguments, told apart by their form. A credential beside them is not
/// recorded, and the record stays within its limits.
pub fn credentials(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if knows_it(text) {
        return;
    }
    let mut headers = header_map(bytes);
    let others = headers.len();
    for name in ["authorization", "proxy-authorization", "cookie", "x-auth-request-id", "a-token"] {
        let value = if name == "authorization" { format!("Bearer {SECRET}") } else { SECRET.to_owned() };
        headers.append(HeaderName::from_static(name), HeaderValue::try_from(value).expect("is ASCII"));
    }
    let protocols = format!("v5.channel.k8s.io, Base64Url.bearer.authorization.k8s.io.{SECRET}");
    headers.append("sec-websocket-protocol", HeaderValue::try_from(protocols).expect("is ASCII"));
    let recorded = probe::headers(&headers);
    assert_eq!(recorded.len(), others + 6, "no header is left out");
    let names: usize = headers.iter().map(|(name, _)| name.as_str().len()).sum();
    let length: usize = recorded.iter().map(|header| header.name.len() + header.value.len()).sum();
    assert!(length <= HEADERS_BYTES_MAX + names + 24 * recorded.len(), "{length} bytes of headers");
    for header in &recorded {
        is_hidden(header.value.as_bytes(), text);
    }
    let line = text.lines().next().unwrap_or("");
    for parameter in ["token", "Access_Token", "%74oken", "X-Amz-Security-Token"] {
        // A second question mark would be part of a value.
        let separator = if line.contains('?') { '&' } else { '?' };
        let Ok(uri) = format!("{line}{separator}{parameter}={SECRET}").parse::<Uri>() else { continue };
        let recorded = probe::request_uri(&uri);
        assert!(recorded.len() <= URI_BYTES_MAX, "{} bytes of a URI", recorded.len());
        is_hidden(recorded.as_bytes(), &uri.to_string());
    }
    let mut arguments: Vec<String> = text.lines().map(str::to_owned).collect();
    arguments.push(format!("--token={SECRET}"));
    arguments.push(format!("--from-literal=a={SECRET}"));
    arguments.push(format!("DB_PASSWORD={SECRET}"));
    let recorded = probe::arguments(&arguments);
    assert_eq!(recorded.len(), arguments.len(), "no argument is left out");
    recorded.iter().for_each(|argument| is_hidden(argument.as_bytes(), text));
}

/// Lines `name: value` of the input as headers; what cannot be a header is passed over, as hyper refuses it before.
pub(crate) fn header_map(bytes: &[u8]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for line in bytes.split(|byte| *byte == b'\n').take(64) {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name), HeaderValue::from_bytes(value)) {
            headers.append(name, value);
        }
    }
    headers
}
