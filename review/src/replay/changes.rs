//! What a change made of an object: as the session saw it before, and as the server answered after.
//!
//! Objects are known by their uid, from what the API itself answered in JSON: not from logs or through proxies, whose text is a pod's own
//! ([`is_of_the_api`]). Where the object before is not on record (nobody read
//! it, or in protobuf), nothing is said. Pure; the lines that come back are escaped.

use std::collections::{BTreeSet, HashMap, VecDeque};

use serde_json::Value;
use weir_common::{attributes::Attributes, event::RequestOpened};

use super::body;

/// Most bytes of objects that are remembered; those not heard of the longest go first.
const KNOWN_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Most times that objects are heard of which are remembered.
const HEARD_MAX: usize = 100_000;
/// Most entries of a list that are told apart by name.
const NAMED_MAX: usize = 1_000;
/// What the server keeps for itself, and the copy that `kubectl apply` keeps of what it sent.
const LEFT_OUT: [&str; 4] = [
    "metadata.managedFields",
    "metadata.resourceVersion",
    "metadata.generation",
    "metadata.annotations[kubectl.kubernetes.io/last-applied-configuration]",
];

/// Subresources whose answer is the object itself.
const OF_THE_OBJECT: [&str; 4] = ["", "status", "ephemeralcontainers", "resize"];

/// Whether the answer is the API's own, and a good one.
fn is_of_the_api(attributes: &Attributes, status: Option<u16>) -> bool {
    attributes.is_resource()
        && attributes.verb != "proxy"
        && OF_THE_OBJECT.contains(&attributes.subresource.as_str())
        && status.is_some_and(|status| (200..300).contains(&status))
}

/// Objects as they were last seen.
#[derive(Debug, Default)]
pub(super) struct Objects {
    by_uid: HashMap<String, Known>,
    /// Uids, those heard of the longest ago first; one may stand there more than once.
    heard: VecDeque<String>,
    bytes: usize,
}

#[derive(Debug)]
struct Known {
    /// Number of the request.
    seen_in: String,
    kind: String,
    json: Box<str>,
    /// How often it stands in what was heard.
    times: usize,
}

/// What became of an object.
#[derive(Debug, PartialEq, Eq)]
struct Change {
    /// Number of the request in which it was seen before.
    seen_in: String,
    lines: Vec<String>,
}

impl Change {
    /// What stands before the lines.
    fn title(&self, dry: bool) -> String {
        let would = if dry { "would change" } else { "changes" };
        match self.lines.len() {
            0 => format!("{would} nothing of the object as [{}] saw it", self.seen_in),
            _ => format!("{would}, against the object as [{}] saw it:", self.seen_in),
        }
    }
}

impl Objects {
    /// Takes what was answered to request number `label`; what its patch, apply or update made of an object, with a title.
    pub(super) fn changed(
        &mut self,
        label: &str,
        opened: &RequestOpened,
        status: Option<u16>,
        answer: &[u8],
    ) -> Option<(String, Vec<String>)> {
        let attributes = &opened.attributes;
        if !is_of_the_api(attributes, status) {
            return None;
        }
        let changes = matches!(attributes.verb.as_str(), "patch" | "update");
        let dry = opened.uri.split_once('?').is_some_and(|(_, query)| query.contains("dryRun="));
        let change = self.answered(label, answer, changes, dry)?;
        Some((change.title(dry), change.lines))
    }

    /// Takes the JSON that a server answered in request number `label`. With `changes`, what it says that was made of an object that is
    /// known; of a dry run nothing is remembered.
    fn answered(&mut self, label: &str, json: &[u8], changes: bool, dry: bool) -> Option<Change> {
        let answer: Value = serde_json::from_slice(json).ok()?;
        if let Some(items) = answer.get("items").and_then(Value::as_array) {
            let kind = kind(&answer)?.strip_suffix("List")?;
            items.iter().for_each(|item| self.remember(label, kind, item));
            return None;
        }
        let known = self.by_uid.get(uid(&answer)?).filter(|_| changes);
        let change = known.and_then(|known| {
            let mut before: Value = serde_json::from_str(&known.json).ok()?;
            // Entries of lists need not say what they are.
            for name in ["kind", "apiVersion"] {
                if let (None, Some(said)) = (before.get(name), answer.get(name)) {
                    before[name] = said.clone();
                }
            }
            if known.kind != kind(&answer)?
                || ["name", "namespace"].iter().any(|of| before["metadata"][of] != answer["metadata"][of])
            {
                return None;
            }
            let mut lines = Vec::new();
            compare("", Some(&before), Some(&answer), &mut lines);
            Some(Change { seen_in: known.seen_in.clone(), lines })
        });
        if !dry {
            self.remember(label, kind(&answer)?, &answer);
        }
        change
    }

    fn remember(&mut self, label: &str, kind: &str, object: &Value) {
        // Metadata alone are not the object.
        let Some(uid) = uid(object).filter(|_| kind != "PartialObjectMetadata") else { return };
        let json = object.to_string().into_boxed_str();
        self.bytes += json.len();
        let times = self.by_uid.get(uid).map_or(0, |known| {
            self.bytes -= known.json.len();
            known.times
        });
        self.by_uid
            .insert(uid.to_owned(), Known { seen_in: label.to_owned(), kind: kind.to_owned(), json, times });
        if self.heard.back().is_none_or(|last| last != uid) {
            self.heard.push_back(uid.to_owned());
            self.by_uid.entry(uid.to_owned()).and_modify(|known| known.times += 1);
        }
        while (self.bytes > KNOWN_BYTES_MAX || self.heard.len() > HEARD_MAX)
            && let Some(uid) = self.heard.pop_front()
        {
            let Some(known) = self.by_uid.get_mut(&uid) else { continue };
            known.times -= 1;
            if known.times == 0 {
                self.bytes -= known.json.len();
                self.by_uid.remove(&uid);
            }
        }
    }
}

fn kind(object: &Value) -> Option<&str> {
    object.get("kind")?.as_str()
}

fn uid(object: &Value) -> Option<&str> {
    object.get("metadata")?.get("uid")?.as_str().filter(|uid| !uid.is_empty())
}

/// Says where two values are not the same.
fn compare(path: &str, before: Option<&Value>, after: Option<&Value>, lines: &mut Vec<String>) {
    if before == after || LEFT_OUT.contains(&path) {
        return;
    }
    match (before, after) {
        (Some(Value::Object(before)), Some(Value::Object(after))) => {
            let names: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
            for name in names {
                compare(&below(path, name), before.get(name), after.get(name), lines);
            }
        }
        (Some(Value::Array(before)), Some(Value::Array(after))) => entries(path, before, after, lines),
        _ => {
            for (sign, value) in [('-', before), ('+', after)] {
                if let Some(value) = value {
                    lines.push(body::one_line(&format!("{sign} {path}: {value}")));
                }
            }
        }
    }
}

/// Entries of lists: by their names where all have one, else by their places.
fn entries(path: &str, before: &[Value], after: &[Value], lines: &mut Vec<String>) {
    if let (Some(before), Some(after)) = (named(before), named(after)) {
        let names: BTreeSet<&&str> = before.keys().chain(after.keys()).collect();
        for name in names {
            let [before, after] = [&before, &after].map(|named| named.get(*name).copied());
            compare(&format!("{path}[{name}]"), before, after, lines);
        }
        return;
    }
    for at in 0..before.len().max(after.len()) {
        compare(&format!("{path}[{at}]"), before.get(at), after.get(at), lines);
    }
}

fn named(entries: &[Value]) -> Option<HashMap<&str, &Value>> {
    if entries.len() > NAMED_MAX {
        return None;
    }
    let names = entries.iter().map(|entry| Some((entry.get("name")?.as_str()?, entry)));
    let named: HashMap<&str, &Value> = names.collect::<Option<_>>()?;
    (named.len() == entries.len()).then_some(named)
}

fn below(path: &str, name: &str) -> String {
    match (path.is_empty(), name.contains(['.', '/'])) {
        (true, _) => name.to_owned(),
        (false, true) => format!("{path}[{name}]"),
        (false, false) => format!("{path}.{name}"),
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};
    use serde_json::{Value, json};

    use weir_common::attributes::Attributes;

    use super::{Change, HEARD_MAX, KNOWN_BYTES_MAX, Objects, is_of_the_api};

    fn object(rest: &Value) -> Vec<u8> {
        let mut object =
            json!({"kind": "Pod", "metadata": {"uid": "u", "name": "p", "resourceVersion": "1"}});
        object.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        object.to_string().into_bytes()
    }

    #[track_caller]
    fn check(before: &Value, after: &Value, expected: Expect) {
        let mut objects = Objects::default();
        assert_eq!(objects.answered("1.1", &object(before), false, false), None);
        let Change { seen_in, lines } = objects.answered("1.2", &object(after), true, false).unwrap();
        assert_eq!(seen_in, "1.1");
        expected.assert_eq(&lines.join("\n"));
    }

    #[test]
    fn what_changed_is_said_by_its_path() {
        check(
            &json!({"spec": {"replicas": 1, "gone": {"a": [1]}, "same": [1, {"x": 2}]}, "data": {"tls.key": "weir:masked:le8:aa"}}),
            &json!({"spec": {"replicas": 3, "new": "\u{1b}[2J", "same": [1, {"x": 2}]}, "data": {"tls.key": "weir:masked:le8:bb"}}),
            expect![[r#"
                - data[tls.key]: "weir:masked:le8:aa"
                + data[tls.key]: "weir:masked:le8:bb"
                - spec.gone: {"a":[1]}
                + spec.new: "\u001b[2J"
                - spec.replicas: 1
                + spec.replicas: 3"#]],
        );
    }

    #[test]
    fn entries_of_lists_are_told_by_their_names_or_places() {
        check(
            &json!({"spec": {"containers": [{"name": "a", "image": "a:1"}, {"name": "b"}], "args": ["x", "y"]}}),
            &json!({"spec": {
                "containers": [{"name": "c"}, {"name": "b"}, {"name": "a", "image": "a:2"}], "args": ["x", "z", "w"],
                "ephemeralContainers": [{"name": "debug", "image": "tools"}],
            }}),
            expect![[r#"
                - spec.args[1]: "y"
                + spec.args[1]: "z"
                + spec.args[2]: "w"
                - spec.containers[a].image: "a:1"
                + spec.containers[a].image: "a:2"
                + spec.containers[c]: {"name":"c"}
                + spec.ephemeralContainers: [{"image":"tools","name":"debug"}]"#]],
        );
    }

    #[test]
    fn what_is_not_known_of_before_is_not_said() {
        let mut objects = Objects::default();
        let (one, two) = (object(&json!({"data": 1})), object(&json!({"data": 2})));
        assert_eq!(objects.answered("1.1", &one, true, false), None, "nobody has seen it");
        assert_eq!(objects.answered("1.2", &two, true, true).unwrap().lines.len(), 2);
        assert_eq!(
            objects.answered("1.3", &one, true, false).unwrap().lines,
            [""; 0],
            "the dry run changed nothing"
        );
        for other in [&b"k8s\0"[..], b"{}", b"[1]", br#"{"metadata":{"uid":7}}"#] {
            assert_eq!(objects.answered("1.4", other, true, false), None);
        }
        let other = String::from_utf8(two.clone()).unwrap().replace("\"p\"", "\"q\"");
        assert_eq!(
            objects.answered("1.4", other.as_bytes(), true, true),
            None,
            "another object says that it is this one"
        );
        let list = [b"{\"kind\":\"PodList\",\"items\":[", &two[..], b"]}"].concat();
        assert_eq!(objects.answered("1.5", &list, false, false), None);
        assert_eq!(objects.answered("1.6", &one, true, false).unwrap().seen_in, "1.5");
    }

    #[test]
    fn only_the_api_is_believed() {
        let of = |method: &str, path: &str, status| {
            is_of_the_api(&Attributes::parse(method, path, None), Some(status))
        };
        let pod = "/api/v1/namespaces/a/pods/p";
        assert!(of("GET", pod, 200) && of("PATCH", &format!("{pod}/ephemeralcontainers"), 200));
        for path in [
            &*format!("{pod}/log"),
            &*format!("{pod}/proxy/x"),
            "/api/v1/proxy/namespaces/a/pods/p",
            "/version",
        ] {
            assert!(!of("GET", path, 200), "{path}");
        }
        assert!(!of("GET", pod, 404) && !is_of_the_api(&Attributes::parse("GET", pod, None), None));
    }

    #[test]
    fn what_is_remembered_is_bounded_and_the_oldest_goes_first() {
        let mut objects = Objects::default();
        let large = "x".repeat(KNOWN_BYTES_MAX / 4);
        let answer = |uid: usize| {
            json!({"kind": "Pod", "metadata": {"uid": uid.to_string()}, "data": large})
                .to_string()
                .into_bytes()
        };
        for uid in [0, 1, 0, 2, 3] {
            objects.answered("1.1", &answer(uid), false, false);
        }
        assert!(objects.bytes <= KNOWN_BYTES_MAX);
        let known = |uid: usize| objects.by_uid.contains_key(&uid.to_string());
        assert_eq!([0, 1, 2, 3].map(known), [true, false, true, true]);
        let small = |uid: usize| {
            json!({"kind": "Pod", "metadata": {"uid": uid.to_string()}}).to_string().into_bytes()
        };
        for at in 0..HEARD_MAX + 10 {
            objects.answered("1.1", &small(7 + at % 2), false, false);
        }
        assert!(objects.heard.len() <= HEARD_MAX && objects.by_uid.len() == 2);
    }
}
