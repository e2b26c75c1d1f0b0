//! Masks of whole bodies: which are sensitive, and what is recorded of them.
//!
//! A body of a sensitive resource is recorded only if it could be parsed and masked; else nothing but its length and
//! keyed digest. Any other body is recorded as it is, unless a `Secret` is mentioned in it: then it is treated like a
//! sensitive one as far as its secrets go. What is masked by rule ([`super::masks`]) is looked for in every body. Masked bodies are serialised anew (keys sorted), since what a parser
//! drops (comments, a key given twice) must not survive in clear. Sans-IO.

use serde_json::Value;
use weir_common::attributes::Attributes;

use super::{
    bounded, cut_json,
    lenient_json::{self, Repaired},
    mask::Masker,
    names::Names,
    protobuf, quoted,
    walk::{Around, Walk},
};

/// The annotation in which `kubectl apply` keeps a copy of the object.
pub(super) const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Bytes before the name of a kind in which `kind` must stand for it to be a mention.
const MENTION_WINDOW: usize = 24;

/// What a body may hold because of where it goes to or comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sensitivity {
    /// Nothing known.
    None,
    /// `Secret` objects in some form.
    Secrets,
    /// TokenRequest or TokenReview.
    Tokens,
}

impl Sensitivity {
    /// Of a request's and response's bodies.
    pub(super) fn of(attributes: &Attributes) -> Self {
        let resource = (attributes.api_group.as_str(), attributes.resource.as_str());
        match (resource, attributes.subresource.as_str()) {
            (("", "secrets"), _) => Self::Secrets,
            (("", "serviceaccounts"), "token") | (("authentication.k8s.io", "tokenreviews"), _) => {
                Self::Tokens
            }
            _ => Self::None,
        }
    }

    /// Of an object of this kind; that of its surroundings if the kind says nothing.
    pub(super) fn of_kind(self, kind: Option<&str>) -> Self {
        match kind {
            Some("Secret" | "SecretList") => Self::Secrets,
            Some("TokenRequest" | "TokenReview") => Self::Tokens,
            _ => self,
        }
    }
}

/// What is recorded of a body.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Recorded<'a> {
    /// All of it, as it is.
    Clear(&'a [u8]),
    /// All of it, with masks.
    Masked {
        /// The new content.
        content: Vec<u8>,
        /// Number of masks in it.
        masks: u64,
    },
    /// Nothing: it may hold secrets, and they cannot be told from the rest.
    Withheld {
        /// Why.
        reason: &'static str,
        cause: Cause,
    },
}

/// Why nothing is recorded of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// A rule masks what is in it, and cannot be followed in this encoding.
    Rule,
    /// It is broken, too much, or in a form that is not known here: who sends such a mutation chooses what is on record of it.
    Unread,
}

const fn unread<'a>(reason: &'static str) -> Recorded<'a> {
    Recorded::Withheld { reason, cause: Cause::Unread }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Json,
    Yaml,
    Protobuf,
    /// Other protobuf, CBOR: no parser here.
    Binary,
    Text,
    Unknown,
}

impl Format {
    fn of(content_type: Option<&str>) -> Self {
        let Some(content_type) = content_type else { return Self::Unknown };
        let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        match essence.as_str() {
            "application/json" => Self::Json,
            protobuf::CONTENT_TYPE => Self::Protobuf,
            essence if essence.ends_with("+json") => Self::Json,
            essence if essence.ends_with("yaml") => Self::Yaml,
            essence if essence.contains("protobuf") || essence.ends_with("cbor") => Self::Binary,
            essence if essence.starts_with("text/") => Self::Text,
            _ => Self::Unknown,
        }
    }
}

/// Whether a body of this type is Kubernetes' protobuf.
pub(super) fn is_protobuf(content_type: Option<&str>) -> bool {
    Format::of(content_type) == Format::Protobuf
}

/// Decides what is recorded of a body that is all there (`whole`) or cut. `names` becomes the objects in it.
pub(super) fn record<'a>(
    masker: &Masker,
    sensitivity: Sensitivity,
    content_type: Option<&str>,
    body: &'a [u8],
    whole: bool,
    names: &mut Names,
) -> Recorded<'a> {
    if body.is_empty() {
        return Recorded::Clear(body);
    }
    let format = match Format::of(content_type) {
        Format::Unknown if body.starts_with(protobuf::MAGIC) => Format::Protobuf,
        format => format,
    };
    if format == Format::Protobuf {
        return protobuf::record(masker, sensitivity, body, whole, names);
    }
    if matches!(format, Format::Json | Format::Yaml | Format::Unknown) {
        names.read(masker, body, format == Format::Yaml);
    }
    record_as(masker, sensitivity, format, body, whole)
}

/// What is recorded of JSON that is all there.
pub(super) fn record_json<'a>(masker: &Masker, sensitivity: Sensitivity, body: &'a [u8]) -> Recorded<'a> {
    record_as(masker, sensitivity, Format::Json, body, true)
}

fn record_as<'a>(
    masker: &Masker,
    sensitivity: Sensitivity,
    format: Format,
    body: &'a [u8],
    whole: bool,
) -> Recorded<'a> {
    let sensitive = sensitivity != Sensitivity::None;
    // Escapes of YAML are many.
    let mentioned = sensitive
        || mentions_secret(body)
        || format == Format::Yaml && body.contains(&b'\\')
        || masker.masks().has_environment() && quoted::has_status_on_variables(body);
    let is_yaml = matches!(format, Format::Yaml | Format::Unknown);
    match format {
        Format::Binary if mentioned => {
            return unread("may hold secrets in a binary encoding that is not parsed");
        }
        Format::Binary => return unparsed(masker, body),
        Format::Text if !sensitive => return text(masker, body, whole),
        _ if !mentioned && !masker.masks().may_be_in(body, masker.fields(), is_yaml) => {
            return Recorded::Clear(body);
        }
        _ if !whole && mentioned => {
            return unread("may hold secrets and is cut, so it cannot be parsed");
        }
        _ => {}
    }
    // JSON first: `apply` sends either under the YAML type, and JSON is the stricter of the two.
    let begun = if whole { None } else { cut_json::closed(body) };
    if let Some((value, masks)) = json(masker, begun.as_deref().unwrap_or(body)) {
        return masked(masker, sensitivity, value, masks, |value| serde_json::to_vec(value).ok());
    }
    if is_yaml
        && whole
        && let Some(value) = bounded::yaml(body)
        && matches!(value, Value::Object(_) | Value::Array(_))
    {
        return masked(masker, sensitivity, value, 0, |value| {
            serde_yaml_ng::to_string(value).ok().map(String::into_bytes)
        });
    }
    match format {
        Format::Unknown if !mentioned && masker.fields() == 0 => text(masker, body, whole),
        _ if mentioned => unread("may hold secrets and cannot be parsed"),
        _ => unread("may hold what a rule masks and cannot be parsed"),
    }
}

/// JSON, also such as only the API server reads, and how many masks are in it already.
fn json(masker: &Masker, text: &[u8]) -> Option<(Value, u64)> {
    if let Some(value) = bounded::json(text) {
        return Some((value, 0));
    }
    let Repaired { text, masks } = lenient_json::repaired(masker, text)?;
    Some((bounded::json(&text)?, masks))
}

/// Text, in which only expressions find something.
fn text<'a>(masker: &Masker, body: &'a [u8], whole: bool) -> Recorded<'a> {
    let Some(patterns) = masker.masks().patterns() else { return Recorded::Clear(body) };
    match patterns.mask(masker, body) {
        _ if !whole && patterns.may_be_in(body) => unread("may hold what a rule masks and is cut"),
        Some(masked) => Recorded::Masked { content: masked.content, masks: masked.masks },
        None => Recorded::Clear(body),
    }
}

/// What no parser here reads.
fn unparsed<'a>(masker: &Masker, body: &'a [u8]) -> Recorded<'a> {
    // As in YAML: names stand in it as they are.
    if masker.masks().may_be_in(body, masker.fields(), true) {
        return unread("may hold what a rule masks in an encoding that is not parsed");
    }
    Recorded::Clear(body)
}

fn masked<'a>(
    masker: &Masker,
    sensitivity: Sensitivity,
    mut value: Value,
    masks: u64,
    serialise: impl Fn(&Value) -> Option<Vec<u8>>,
) -> Recorded<'a> {
    let mut walk = Walk { masker, masks };
    let fields = masker.fields();
    walk.root(&mut value, Around { sensitivity, fields, own: fields });
    match serialise(&value) {
        Some(content) => Recorded::Masked { content, masks: walk.masks },
        None => unread("may hold secrets and cannot be serialised after masking"),
    }
}

/// What is recorded of the copy that `kubectl apply` keeps in an annotation, and the number of masks in it.
pub(super) fn last_applied(masker: &Masker, sensitivity: Sensitivity, text: &str) -> (String, u64) {
    let mut walk = Walk { masker, masks: 0 };
    let around = Around { sensitivity, fields: 0, own: masker.fields() };
    let text = walk.copy(text, around).unwrap_or_else(|| text.to_owned());
    (text, walk.masks)
}

/// Whether anything may be masked in bytes that nothing reads.
pub(super) fn may_hide(masker: &Masker, sensitivity: Sensitivity, content: &[u8]) -> bool {
    sensitivity != Sensitivity::None
        || masker.hides()
        || masker.masks().has_environment()
        || mentions_secret(content)
}

/// Whether a kind that holds secrets is named anywhere, in JSON, YAML, or JSON within a JSON string; or whether
/// letters are escaped, so that it could be; as can be what rules look for, if quotes, slashes or digits are.
pub(super) fn mentions_secret(body: &[u8]) -> bool {
    let kinds: [&[u8]; 3] = [b"Secret", b"TokenRe", b"\\u00"];
    memchr::memchr3_iter(b'S', b'T', b'\\', body).any(|at| {
        let rest = &body[at..];
        match rest[0] {
            b'S' | b'T' if kinds[..2].iter().any(|kind| rest.starts_with(kind)) => {
                let window = &body[at.saturating_sub(MENTION_WINDOW)..at];
                window.windows(4).any(|bytes| bytes == b"kind")
            }
            b'\\' if rest.starts_with(kinds[2]) => match (rest.get(4), rest.get(5)) {
                (Some(b'4'..=b'7'), _) => true,
                (Some(b'2'), Some(low)) => matches!(low, b'2' | b'd'..=b'f' | b'D'..=b'F'),
                (Some(b'3'), Some(low)) => low.is_ascii_digit(),
                _ => false,
            },
            _ => false,
        }
    })
}

#[cfg(test)]
mod tests {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    use expect_test::{Expect, expect};
    use proptest::prelude::*;
    use weir_common::attributes::Attributes;

    use super::{Cause, Recorded, Sensitivity, mentions_secret};
    use crate::recording::{cbor::tests::encoded, mask::Masker, names::Names};

    const CANARY: &str = "canary-hunter2";

    fn masker() -> Masker {
        Masker::for_cluster(&[1; 32], "c")
    }

    fn record<'a>(
        masker: &Masker,
        sensitivity: Sensitivity,
        content_type: Option<&str>,
        body: &'a [u8],
        whole: bool,
    ) -> Recorded<'a> {
        super::record(masker, sensitivity, content_type, body, whole, &mut Names::default())
    }

    /// `CANARY` and `BASE64` in `body` stand for the secret in clear and as base64.
    fn filled(body: &str) -> String {
        body.replace("BASE64", &STANDARD.encode(CANARY)).replace("CANARY", CANARY)
    }

    #[track_caller]
    fn check(sensitivity: Sensitivity, content_type: &str, body: &str, expected: Expect) {
        let body = filled(body);
        let recorded = record(&masker(), sensitivity, Some(content_type), body.as_bytes(), true);
        let shown = match recorded {
            Recorded::Clear(bytes) => format!("clear {}", String::from_utf8_lossy(bytes)),
            Recorded::Masked { content, masks } => {
                format!("{masks} masked {}", String::from_utf8_lossy(&content))
            }
            Recorded::Withheld { reason, .. } => format!("withheld: {reason}"),
        };
        assert!(!shown.contains(CANARY) && !shown.contains(&STANDARD.encode(CANARY)), "{shown}");
        expected.assert_eq(&shown);
    }

    const JSON: &str = "application/json";

    #[test]
    fn data_and_string_data_have_the_same_mask_and_names_stay() {
        check(
            Sensitivity::Secrets,
            JSON,
            r#"{"kind":"Secret","data":{"a":"BASE64","n":null},"stringData":{"b":"CANARY"},"type":"Opaque"}"#,
            expect![[
                r#"2 masked {"data":{"a":"weir:masked:le16:903554d12c313c30","n":null},"kind":"Secret","stringData":{"b":"weir:masked:le16:903554d12c313c30"},"type":"Opaque"}"#
            ]],
        );
    }

    #[test]
    fn private_keys_are_masked_wherever_they_stand_in_an_object() {
        for key in [
            "-----BEGIN PRIVATE KEY-----\\nCANARY",
            "-----BEGIN RSA PRIVATE KEY-----\\nCANARY",
            "LS0tLS1CRUdJTiBFQyBQUklWQVRFIEtFWS0tLS0tCANARY",
            "users: [{user: {client-key-data: LS0tLS1CRUdJTiBQUklWQVRFIEtFWS0tLS0tCANARY}}]",
        ] {
            let body = filled(&format!(r#"{{"kind":"ConfigMap","data":{{"a":"{key}","b":"c"}}}}"#));
            let masker = masker();
            let Recorded::Masked { content, masks: 1 } =
                record(&masker, Sensitivity::None, Some(JSON), body.as_bytes(), true)
            else {
                panic!("{body}")
            };
            let content = String::from_utf8(content).unwrap();
            assert!(!content.contains(CANARY) && content.contains(r#""b":"c""#), "{content}");
        }
        check(
            Sensitivity::None,
            JSON,
            r#"{"kind":"CertificateSigningRequest","spec":{"request":"LS0tLS1CRUdJTiBDRVJUSUZJQ0FURQ=="}}"#,
            expect![[
                r#"clear {"kind":"CertificateSigningRequest","spec":{"request":"LS0tLS1CRUdJTiBDRVJUSUZJQ0FURQ=="}}"#
            ]],
        );
    }

    #[test]
    fn lists_watch_events_and_tables_are_masked() {
        for body in [
            r#"{"kind":"SecretList","items":[{"data":{"a":"BASE64"}}]}"#,
            r#"{"type":"ADDED","object":{"kind":"Secret","data":{"a":"BASE64"}}}"#,
            r#"{"kind":"Table","rows":[{"cells":["s"],"object":{"kind":"PartialObjectMetadata","metadata":{"annotations":{"kubectl.kubernetes.io/last-applied-configuration":"{\"kind\":\"Secret\",\"stringData\":{\"a\":\"CANARY\"}}"}}}}]}"#,
            r#"{"kind":"List","items":[{"kind":"Secret","data":{"a":"BASE64"}}]}"#,
        ] {
            for sensitivity in [Sensitivity::Secrets, Sensitivity::None] {
                let body = filled(body);
                let Recorded::Masked { content, masks: 1 } =
                    record(&masker(), sensitivity, Some(JSON), body.as_bytes(), true)
                else {
                    panic!("{body}")
                };
                let content = String::from_utf8(content).unwrap();
                assert!(
                    !content.contains(CANARY) && !content.contains(&STANDARD.encode(CANARY)),
                    "{content}"
                );
            }
        }
    }

    #[test]
    fn a_list_of_a_secret_and_a_configmap_loses_only_the_secret() {
        check(
            Sensitivity::None,
            JSON,
            r#"{"kind":"List","items":[{"kind":"ConfigMap","data":{"a":"shown"}},{"kind":"Secret","data":{"a":"BASE64"}}]}"#,
            expect![[
                r#"1 masked {"items":[{"data":{"a":"shown"},"kind":"ConfigMap"},{"data":{"a":"weir:masked:le16:903554d12c313c30"},"kind":"Secret"}],"kind":"List"}"#
            ]],
        );
    }

    #[test]
    fn patches_are_masked_whatever_their_form() {
        check(
            Sensitivity::Secrets,
            "application/json-patch+json",
            r#"[{"op":"replace","path":"/data/a","value":"BASE64"},{"op":"add","path":"/metadata/labels/x","value":"shown"},{"op":"add","path":"","value":{"data":{"a":"CANARY"}}}]"#,
            expect![[
                r#"2 masked [{"op":"replace","path":"/data/a","value":"weir:masked:le32:67039313f6484eca"},{"op":"add","path":"/metadata/labels/x","value":"shown"},{"op":"add","path":"","value":{"data":{"a":"weir:masked:le16:903554d12c313c30"}}}]"#
            ]],
        );
        check(
            Sensitivity::Secrets,
            "application/merge-patch+json",
            r#"{"stringData":{"a":"CANARY"}}"#,
            expect![[r#"1 masked {"stringData":{"a":"weir:masked:le16:903554d12c313c30"}}"#]],
        );
    }

    #[test]
    fn a_list_of_objects_where_a_patch_would_stand_is_masked() {
        check(
            Sensitivity::Secrets,
            JSON,
            r#"[{"kind":"Secret","data":{"a":"BASE64"}},{"op":"add","path":"/metadata","stringData":{"a":"CANARY"}}]"#,
            expect![[
                r#"2 masked [{"data":{"a":"weir:masked:le16:903554d12c313c30"},"kind":"Secret"},{"op":"add","path":"/metadata","stringData":{"a":"weir:masked:le16:903554d12c313c30"}}]"#
            ]],
        );
    }

    #[test]
    fn yaml_is_masked_and_comments_do_not_survive() {
        check(
            Sensitivity::Secrets,
            "application/apply-patch+yaml",
            "# CANARY\nkind: Secret\nstringData:\n  a: CANARY\n  b: |\n    CANARY\n",
            expect![[r#"
                2 masked kind: Secret
                stringData:
                  a: weir:masked:le16:903554d12c313c30
                  b: weir:masked:le16:30196faa29208409
            "#]],
        );
        check(
            Sensitivity::Secrets,
            "application/yaml",
            "kind: Secret\n---\nkind: Secret\nstringData: {a: CANARY}\n",
            expect!["withheld: may hold secrets and cannot be parsed"],
        );
    }

    #[test]
    fn a_kind_that_is_written_with_escapes_does_not_hide_a_secret() {
        check(
            Sensitivity::None,
            "application/yaml",
            "kind: \"\\x53ecret\"\nstringData:\n  a: CANARY\n",
            expect![[r#"
                1 masked kind: Secret
                stringData:
                  a: weir:masked:le16:903554d12c313c30
            "#]],
        );
        check(
            Sensitivity::Secrets,
            "application/yaml",
            "x: &x {a: CANARY}\nkind: Secret\nstringData:\n  <<: *x\n",
            expect!["withheld: may hold secrets and cannot be parsed"],
        );
    }

    #[test]
    fn escaped_slashes_quotes_and_digits_are_parsed_and_what_go_escapes_is_not() {
        for (text, expected) in [
            (r"\u002fenv", true),
            (r"\u002Fenv", true),
            (r"\u0022name", true),
            (r"TOKEN\u0031", true),
            (r"\u0026\u003c\u003e\u003d", false),
        ] {
            assert_eq!(mentions_secret(text.as_bytes()), expected, "{text}");
        }
    }

    #[test]
    fn a_key_given_twice_does_not_hide_a_secret() {
        check(
            Sensitivity::Secrets,
            JSON,
            r#"{"data":{"a":"BASE64"},"data":null}"#,
            expect![[r#"0 masked {"data":null}"#]],
        );
    }

    #[test]
    fn tokens_are_masked() {
        check(
            Sensitivity::Tokens,
            JSON,
            r#"{"kind":"TokenRequest","status":{"token":"CANARY","expirationTimestamp":"t"}}"#,
            expect![[
                r#"1 masked {"kind":"TokenRequest","status":{"expirationTimestamp":"t","token":"weir:masked:le16:903554d12c313c30"}}"#
            ]],
        );
    }

    #[test]
    fn what_is_sensitive_and_cannot_be_parsed_is_withheld() {
        check(
            Sensitivity::Secrets,
            "application/cbor",
            "\u{a1}CANARY",
            expect!["withheld: may hold secrets in a binary encoding that is not parsed"],
        );
        check(
            Sensitivity::Secrets,
            JSON,
            r#"{"data":{"a":"BASE64"}"#,
            expect!["withheld: may hold secrets and cannot be parsed"],
        );
        check(
            Sensitivity::None,
            JSON,
            r#"{"kind": "Secret", "data":{"a":"BASE64"}"#,
            expect!["withheld: may hold secrets and cannot be parsed"],
        );
        let body = br#"{"kind":"Pod"}"#;
        let cut = record(&masker(), Sensitivity::Secrets, Some(JSON), body, false);
        assert!(matches!(cut, Recorded::Withheld { .. }));
    }

    #[test]
    fn everything_else_is_recorded_as_it_is() {
        for (content_type, body) in [
            (JSON, r#"{"kind":"ConfigMap", "data":{"a":"b"}}"#),
            (JSON, "not json"),
            ("application/cbor", "of a kind"),
            ("text/plain", "a log line: kind: Secret"),
            (JSON, r#"{"kind":"Pod","spec":{"imagePullSecrets":[{"name":"x"}],"volumes":[{"secret":{}}]}}"#),
        ] {
            let recorded = record(&masker(), Sensitivity::None, Some(content_type), body.as_bytes(), true);
            assert_eq!(recorded, Recorded::Clear(body.as_bytes()), "{body}");
        }
    }

    #[test]
    fn what_speaks_of_secrets_is_never_recorded_in_clear_whatever_its_type_says() {
        let secret = r#"{"kind":"Secret","stringData":{"a":"CANARY"},"data":{"b":"BASE64"}}"#;
        let cbor = encoded(&serde_json::from_str(&filled(secret)).unwrap());
        let bodies = [
            filled(&format!("{secret}\n{{\"kind\":\"ConfigMap\"}}\n")).into_bytes(),
            filled("kind: ConfigMap\n---\nkind: Secret\nstringData:\n  a: CANARY\ndata:\n  b: BASE64\n")
                .into_bytes(),
            cbor[..cbor.len() - 1].to_vec(),
        ];
        let types = [
            None,
            Some("application/octet-stream"),
            Some("application/x-ndjson"),
            Some("application/x-protobuf"),
            Some("application/cbor"),
            Some("application/vnd.example+cbor"),
            Some("application/yaml"),
            Some(JSON),
        ];
        for (content_type, body) in types.into_iter().flat_map(|of| bodies.iter().map(move |body| (of, body)))
        {
            let shown = match record(&masker(), Sensitivity::None, content_type, body, true) {
                Recorded::Clear(bytes) => bytes.to_vec(),
                Recorded::Masked { content, .. } => content,
                Recorded::Withheld { cause, .. } => {
                    assert_eq!(cause, Cause::Unread);
                    continue;
                }
            };
            let shown = String::from_utf8_lossy(&shown).into_owned();
            assert!(
                !shown.contains(CANARY) && !shown.contains(&STANDARD.encode(CANARY)),
                "{content_type:?}: {shown}"
            );
        }
    }

    #[test]
    fn escaped_letters_count_as_a_mention_and_escaped_brackets_do_not() {
        assert!(mentions_secret(br#"{"kind":"\u0053ecret"}"#));
        assert!(!mentions_secret(br#"{"a":"\u003cb\u003e"}"#));
    }

    #[test]
    fn sensitive_resources_are_told_by_group_resource_and_subresource() {
        let of = |group: &str, resource: &str, subresource: &str| {
            Sensitivity::of(&Attributes {
                api_group: group.into(),
                resource: resource.into(),
                subresource: subresource.into(),
                ..Attributes::default()
            })
        };
        assert_eq!(of("", "secrets", ""), Sensitivity::Secrets);
        assert_eq!(of("", "serviceaccounts", "token"), Sensitivity::Tokens);
        assert_eq!(of("authentication.k8s.io", "tokenreviews", ""), Sensitivity::Tokens);
        assert_eq!(of("example.com", "secrets", ""), Sensitivity::None);
        assert_eq!(of("", "configmaps", ""), Sensitivity::None);
    }

    proptest! {
        #[test]
        fn no_body_panics_and_no_sensitive_body_is_recorded_as_it_is(
            body in ".{1,200}", content_type in prop_oneof![Just(JSON), Just("application/yaml"), Just("x")], whole: bool,
        ) {
            let recorded = record(&masker(), Sensitivity::Secrets, Some(content_type), body.as_bytes(), whole);
            prop_assert!(!matches!(recorded, Recorded::Clear(_)), "{:?}", recorded);
        }

        #[test]
        fn a_secret_never_survives_whatever_stands_around_it(
            key in "[a-z\\.]{1,9}", other in "[ -~]{0,40}", order: bool, yaml: bool,
        ) {
            let data = serde_json::json!({ key: STANDARD.encode(CANARY) });
            let body = serde_json::json!({ "kind": "Secret", "metadata": { "annotations": { "o": other } },
                "data": data, "stringData": { "x": CANARY } });
            let text = if yaml { serde_yaml_ng::to_string(&body).unwrap() } else { body.to_string() };
            let sensitivity = if order { Sensitivity::Secrets } else { Sensitivity::None };
            let content_type = if yaml { "application/yaml" } else { JSON };
            let shown = format!("{:?}", match record(&masker(), sensitivity, Some(content_type), text.as_bytes(), true) {
                Recorded::Masked { content, .. } => String::from_utf8(content).unwrap(),
                other => format!("{other:?}"),
            });
            prop_assert!(!shown.contains(CANARY) && !shown.contains(&STANDARD.encode(CANARY)), "{}", shown);
        }
    }
}
