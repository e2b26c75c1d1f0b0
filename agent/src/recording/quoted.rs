//! Words about a request that may quote what was in it: those of a `Status` (values that are not valid, whole objects, what an admission
//! webhook makes of them), and the cells of a `Table`. Sans-IO.
//!
//! Where a request may carry what is masked, words are recorded in the forms that name nothing but objects, users and fields; of
//! any other there is a mask.

use std::sync::LazyLock;

use regex::bytes::{Regex, RegexBuilder};
use serde_json::{Map, Value};

/// Longest words that are looked at.
const WORDS_BYTES_MAX: usize = 2 * 1024;

/// Bytes before `Status` in which `kind` must stand for it to be one.
const KIND_WINDOW: usize = 24;

/// Where these stand in a form: a resource or a kind, a name, a field without keys of list entries.
const PARTS: [(&str, &str); 3] = [
    ("RESOURCE", r"[A-Za-z0-9.-]+(?:/[a-z]+)?"),
    ("NAME", r"[A-Za-z0-9._:/@*+-]+"),
    ("FIELD", r"\.?[A-Za-z][A-Za-z0-9./-]*"),
];

/// What API servers say without a value (k8s.io/apimachinery `pkg/api/errors`, k8s.io/apiserver `pkg/endpoints/handlers/responsewriters`,
/// structured-merge-diff's conflicts).
const FORMS: [&str; 9] = [
    "Unauthorized",
    "the server could not find the requested resource",
    r#"RESOURCE "NAME" (?:not found|already exists)"#,
    r#"RESOURCE(?: "NAME")? is forbidden: User "[^"\\]+" cannot [a-z]+ resource "RESOURCE" in API group "[a-z0-9.-]*"(?: in the namespace "NAME"| at the cluster scope)(?:: RBAC: RESOURCE "NAME" not found)?"#,
    r#"RESOURCE "NAME" is forbidden: unable to create new content in namespace NAME because it is being terminated"#,
    r#"Operation cannot be fulfilled on RESOURCE "NAME": the object has been modified; please apply your changes to the latest version and try again"#,
    r#"RESOURCE "NAME" is invalid: FIELD: Forbidden: field is immutable when `immutable` is set"#,
    r#"(?:Apply failed with [0-9]+ conflicts?: )?conflicts? with "NAME"(?: with subresource "NAME")?(?: using NAME)?(?:: FIELD|:(?:\n- FIELD)+)?"#,
    r"too old resource version: [0-9]+ \([0-9]+\)",
];

static PLAIN: LazyLock<Option<Regex>> = LazyLock::new(|| {
    let forms = FORMS.join("|");
    let forms = PARTS.iter().fold(forms, |forms, (part, stands_for)| forms.replace(part, stands_for));
    RegexBuilder::new(&format!("^(?:{forms})$")).unicode(false).build().ok()
});

/// Whether these words name nothing but objects, users and fields.
pub(super) fn is_plain(words: &[u8]) -> bool {
    words.is_empty()
        || words.len() <= WORDS_BYTES_MAX && PLAIN.as_ref().is_some_and(|plain| plain.is_match(words))
}

/// Whether the path of a field has keys of list entries in it, which are values (`users[name="x"]`).
pub(super) fn has_keys(field: &[u8]) -> bool {
    field.iter().any(|byte| matches!(byte, b'"' | b'\'' | b'=' | b':' | b'{'))
}

/// Whether words may be about environment variables: of a pod whose template may not be changed they have all of it.
pub(super) fn speaks_of_variables(words: &[u8]) -> bool {
    words.windows(3).any(|word| word.eq_ignore_ascii_case(b"env"))
}

/// Whether a body has a `Status` that speaks of environment variables.
pub(super) fn has_status_on_variables(body: &[u8]) -> bool {
    let is_kind = |at: usize| body[at.saturating_sub(KIND_WINDOW)..at].windows(4).any(|word| word == b"kind");
    memchr::memmem::find_iter(body, b"Status").any(is_kind) && speaks_of_variables(body)
}

/// Which cells of a row are values, not what is known of every object: its name, and what API servers print of a Secret.
pub(super) fn cells_with_values(table: &Map<String, Value>, row: &Value, of_secrets: bool) -> Vec<usize> {
    let Some(cells) = row.get("cells").and_then(Value::as_array) else { return Vec::new() };
    let name = row.pointer("/object/metadata/name").and_then(Value::as_str);
    let columns = table.get("columnDefinitions").and_then(Value::as_array).filter(|list| !list.is_empty());
    // After the first event of a watch nothing says what the columns are.
    let name_is_first =
        columns.is_none_or(|columns| columns[0].get("format").is_some_and(|format| format == "name"));
    let is_name = |at: usize, cell: &Value| match (name, cell.as_str()) {
        (Some(name), Some(text)) => name == text,
        (None, Some(text)) => at == 0 && name_is_first && is_object_name(text),
        (_, None) => false,
    };
    // Name, type, number of its values, age (k8s.io/kubernetes `pkg/printers/internalversion`).
    let is_printed = of_secrets
        && matches!(&cells[..], [_, Value::String(of_type), Value::Number(_), Value::String(age)]
            if is_secret_type(of_type) && is_age(age));
    let is_known = |at: usize, cell: &Value| cell.is_null() || is_name(at, cell) || is_printed && at > 0;
    cells.iter().enumerate().filter(|(at, cell)| !is_known(*at, cell)).map(|(at, _)| at).collect()
}

fn is_object_name(text: &str) -> bool {
    text.len() <= 253
        && text.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b':' | b'-'))
}

/// One of Kubernetes' own types, or a name that is qualified as they are.
fn is_secret_type(text: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'/' | b'-');
    text == "Opaque" || text.contains(['/']) && text.len() <= 253 && text.bytes().all(is_word)
}

/// As `kubectl get` prints it: `5d`, `3h20m`.
fn is_age(text: &str) -> bool {
    let is_part = |byte: u8| byte.is_ascii_digit() || matches!(byte, b's' | b'm' | b'h' | b'd' | b'y');
    matches!(text, "<unknown>" | "<invalid>")
        || text.starts_with(|first: char| first.is_ascii_digit())
            && text.len() <= 12
            && text.bytes().all(is_part)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;
    use weir_common::attributes::Attributes;

    use super::{has_keys, has_status_on_variables, is_plain};
    use crate::recording::{
        body::{self, Recorded, Sensitivity},
        mask::Masker,
        masks::{FieldMask, MaskRules, Masks},
        names::Names,
    };

    const CANARY: &str = "canary-hunter2";

    /// For a request about this resource, where a rule is for a field of databases.
    fn masker(resource: &str) -> Masker {
        let field = FieldMask { kinds: vec!["Database".into()], paths: vec!["spec.password".into()] };
        let masks = Masks::new(MaskRules { fields: vec![field], ..MaskRules::default() }).unwrap();
        let attributes = Attributes { resource: resource.into(), ..Attributes::default() };
        Masker::for_cluster(&[1; 32], "c").by(&Arc::new(masks)).of(&attributes)
    }

    /// What is recorded of an answer.
    fn recorded(resource: &str, body: &serde_json::Value) -> serde_json::Value {
        let attributes = Attributes { resource: resource.into(), ..Attributes::default() };
        let (masker, sensitivity) = (masker(resource), Sensitivity::of(&attributes));
        let text = body.to_string();
        let mut names = Names::default();
        match body::record(&masker, sensitivity, Some("application/json"), text.as_bytes(), true, &mut names)
        {
            Recorded::Clear(clear) => serde_json::from_slice(clear).unwrap(),
            Recorded::Masked { content, .. } => serde_json::from_slice(&content).unwrap(),
            Recorded::Withheld { reason, .. } => panic!("{reason}"),
        }
    }

    fn mask_of(text: &str) -> String {
        masker("").mask(text.as_bytes())
    }

    #[test]
    fn words_of_a_status_that_may_quote_have_a_mask_and_others_stay() {
        let quoting = format!("Invalid value: \"{CANARY}\": must be a number");
        let status = |message: &str, field: &str| {
            json!({"kind": "Status", "message": message, "reason": "Invalid", "code": 422,
                "details": {"name": "db", "causes": [{"reason": "FieldValueInvalid", "message": message, "field": field}]}})
        };
        let quoted = status(&quoting, "spec.users[name=\"canary-hunter2\"].x");
        for resource in ["secrets", "databases"] {
            let kept = recorded(resource, &quoted);
            assert!(!kept.to_string().contains(CANARY), "{kept}");
            let expected = status(&mask_of(&quoting), &mask_of("spec.users[name=\"canary-hunter2\"].x"));
            assert_eq!(kept, expected);
            let plain = status("secrets \"db\" not found", "data[tls.key]");
            assert_eq!(recorded(resource, &plain), plain);
            let event = recorded(resource, &json!({"type": "ERROR", "object": quoted}));
            assert_eq!(event["object"], expected);
        }
        assert_eq!(recorded("nodes", &quoted), quoted, "nothing of a node is masked");
    }

    #[test]
    fn a_template_in_a_status_has_a_mask_where_variables_do() {
        let message = format!(
            "Job.batch \"j\" is invalid: spec.template: Invalid value: {{Env:[]core.EnvVar{{Value:\"{CANARY}\"}}}}: field is immutable"
        );
        let status = json!({"kind": "Status", "message": message, "details": {"causes": [{"message": message, "field": "spec.template"}]}});
        let kept = recorded("jobs", &status);
        assert_eq!(
            (&kept["message"], &kept["details"]["causes"][0]["message"]),
            (&json!(mask_of(&message)), &json!(mask_of(&message)))
        );
        assert_eq!(kept["details"]["causes"][0]["field"], "spec.template");
    }

    #[test]
    fn cells_of_a_table_that_are_values_have_masks() {
        let columns = json!([{"name": "Name", "type": "string", "format": "name"}, {"name": "Password", "type": "string", "format": ""}]);
        let row = |cells, object: serde_json::Value| json!({"cells": cells, "object": object});
        let partial = |name: &str| json!({"kind": "PartialObjectMetadata", "metadata": {"name": name}});
        let table =
            |rows: serde_json::Value| json!({"kind": "Table", "columnDefinitions": columns, "rows": rows});
        let mask = mask_of(CANARY);
        let body = table(json!([
            row(json!(["db", CANARY]), partial("db")),
            row(json!(["db", CANARY]), json!(null)),
            row(json!(["Db 2", 7]), partial("db"))
        ]));
        let expected = table(json!([
            row(json!(["db", mask]), partial("db")),
            row(json!(["db", mask]), json!(null)),
            row(json!([mask_of("Db 2"), mask_of("7")]), partial("db"))
        ]));
        for resource in ["databases", "secrets"] {
            assert_eq!(recorded(resource, &body), expected);
            assert_eq!(recorded(resource, &json!({"type": "ADDED", "object": body}))["object"], expected);
        }
        assert_eq!(recorded("nodes", &body), body, "no rule is for nodes");
        // With the whole object, which says what it is.
        let whole = json!({"kind": "Database", "metadata": {"name": "db"}, "spec": {"password": CANARY}});
        let kept = recorded("", &table(json!([row(json!(["db", CANARY]), whole)])));
        assert_eq!(kept["rows"][0]["cells"], json!(["db", mask]));
        assert_eq!(kept["rows"][0]["object"]["spec"]["password"], json!(mask));
    }

    #[test]
    fn what_servers_print_of_a_secret_stays() {
        let body = |cells| json!({"kind": "Table", "rows": [{"cells": cells, "object": {"kind": "PartialObjectMetadata", "metadata": {"name": "s"}}}]});
        for of_type in ["Opaque", "kubernetes.io/tls"] {
            let printed = body(json!(["s", of_type, 2, "3h20m"]));
            assert_eq!(recorded("secrets", &printed), printed);
        }
        for odd in [
            json!(["s", CANARY, 2, "5d"]),
            json!(["s", "Opaque", 2, CANARY]),
            json!([CANARY, "Opaque", 2, "5d"]),
            json!(["s", CANARY]),
        ] {
            let kept = recorded("secrets", &body(odd)).to_string();
            assert!(!kept.contains(CANARY) && kept.contains(&mask_of(CANARY)), "{kept}");
        }
    }

    #[test]
    fn warnings_have_a_mask_where_words_may_quote() {
        let mut headers = http::HeaderMap::new();
        headers.insert("warning", format!("299 - \"{CANARY} is weak\"").parse().unwrap());
        let value = |resource| masker(resource).headers(&headers).remove(0).value;
        assert!(
            value("secrets").starts_with("weir:masked:") && value("databases").starts_with("weir:masked:")
        );
        assert!(value("nodes").contains(CANARY));
    }

    #[test]
    fn words_without_values_are_plain() {
        for words in [
            "",
            r#"secrets "db" not found"#,
            r#"secrets "db" already exists"#,
            r#"roles.rbac.authorization.k8s.io "db" already exists"#,
            r#"secrets is forbidden: User "system:serviceaccount:ns:sa" cannot list resource "secrets" in API group "" in the namespace "ns""#,
            r#"secrets "db" is forbidden: User "a b" cannot get resource "secrets/status" in API group "" at the cluster scope: RBAC: clusterrole.rbac.authorization.k8s.io "x" not found"#,
            r#"Operation cannot be fulfilled on secrets "db": the object has been modified; please apply your changes to the latest version and try again"#,
            "Secret \"db\" is invalid: data: Forbidden: field is immutable when `immutable` is set",
            r#"Apply failed with 1 conflict: conflict with "kubectl" using v1: .data.password"#,
            "Apply failed with 2 conflicts: conflicts with \"a\":\n- .data.a\n- .data.b",
            r#"conflict with "kubectl" with subresource "status" using v1"#,
            "too old resource version: 1 (7)",
        ] {
            assert!(is_plain(words.as_bytes()), "{words}");
        }
    }

    #[test]
    fn words_that_may_quote_are_not() {
        for words in [
            "hunter2",
            r#"Secret "db" is invalid: data[a]: Invalid value: "hunter2": must be a number"#,
            r#"admission webhook "x.y" denied the request: hunter2 is too short"#,
            r#"admission webhook "x.y" denied the request: secrets "hunter2" not found"#,
            r#"secrets "db" is forbidden: ValidatingAdmissionPolicy 'p' with binding 'b' denied request: hunter2"#,
            r#"Apply failed with 1 conflict: conflict with "kubectl" using v1: .spec.users[name="hunter2"].x"#,
            r#"failed to create typed patch object (ns/db; /v1, Kind=Secret): .data.a: expected string, got &value.valueUnstructured{Value:"hunter2"}"#,
            "secrets \"db\" not found\nhunter2",
            "secrets \"db\" not found\n",
            "secrets \"hunter 2\" not found",
        ] {
            assert!(!is_plain(words.as_bytes()), "{words}");
        }
        assert!(!is_plain(&[b'a'; 5000]));
        assert!(
            has_keys(br#".spec.users[name="x"].y"#) && !has_keys(b"data[tls.key]") && !has_keys(b".data.a")
        );
    }

    #[test]
    fn a_status_on_variables_is_found() {
        assert!(has_status_on_variables(br#"{"kind":"Status","message":"Env:[]core.EnvVar"}"#));
        assert!(!has_status_on_variables(br#"{"kind":"Status","message":"x"}"#));
        assert!(!has_status_on_variables(
            br#"{"kind":"Pod","spec":{"env":[]},"x":"Status of this and that"}"#
        ));
    }
}
