//! What `kubectl debug` puts into a running pod: ephemeral containers, as the body of the request says them.
//!
//! The answer is in protobuf for clients in Go; the request is JSON for `kubectl`. A request may also be made so that its body says one
//! thing and means another: what is not simply a container is said to be in the body. Pure; the lines that come back are escaped.

use serde_json::Value;
use weir_common::{attributes::Execution, event::RequestOpened};

use super::{
    body::Shown,
    wording::{self, quoted},
};

/// Most containers of one request that are said.
const CONTAINERS_MAX: usize = 32;

/// Where a JSON Patch puts them.
const PATH: &str = "/spec/ephemeralContainers";

/// A line for each container that a request asks for, and one where there is more to it; none of other requests.
pub(super) fn containers(opened: &RequestOpened, body: &[u8]) -> Shown {
    Shown { label: None, lines: lines(opened, body) }
}

fn lines(opened: &RequestOpened, body: &[u8]) -> Vec<String> {
    let attributes = &opened.attributes;
    if attributes.resource != "pods"
        || attributes.subresource != "ephemeralcontainers"
        || !matches!(attributes.verb.as_str(), "patch" | "update")
        || body.is_empty()
    {
        return Vec::new();
    }
    let Ok(body) = serde_json::from_slice::<Value>(body) else {
        return vec!["debug containers: not read here, what is recorded of the body is no JSON".to_owned()];
    };
    let (asked, is_more) = match &body {
        Value::Array(operations) => put(operations),
        object => (entries(&object["spec"]["ephemeralContainers"]), false),
    };
    // One without a name says what becomes of the others' order.
    let mut named = asked.into_iter().filter(|container| container["name"].is_string());
    let mut lines: Vec<_> = named.by_ref().take(CONTAINERS_MAX).map(line).collect();
    let left = named.count();
    if left > 0 {
        lines.push(format!("debug containers: {left} more in the body"));
    }
    if is_more {
        lines.push("debug containers: changed further by the body's other operations".to_owned());
    }
    lines
}

/// The containers that operations of a JSON Patch (RFC 6902) add as they are, and whether others may change them.
fn put(operations: &[Value]) -> (Vec<&Value>, bool) {
    let (mut asked, mut is_more) = (Vec::new(), false);
    for operation in operations {
        let path = operation["path"].as_str().unwrap_or_default();
        let place = path.strip_prefix(PATH).and_then(|place| match place.split_once('/') {
            None => place.is_empty().then_some(place),
            Some((before, place)) => (before.is_empty() && !place.contains('/')).then_some(place),
        });
        // What is above them is replaced with them.
        let touches = |field: &str| {
            operation[field]
                .as_str()
                .is_some_and(|path| path.starts_with(PATH) || matches!(path, "" | "/spec"))
        };
        match (operation["op"].as_str(), place) {
            (Some("add"), Some(_)) => asked.extend(entries(&operation["value"])),
            (Some("test"), _) => {}
            // What is moved away from there is gone there.
            _ => is_more |= touches("path") || touches("from"),
        }
    }
    (asked, is_more)
}

/// A list's, or the one.
fn entries(value: &Value) -> Vec<&Value> {
    value.as_array().map_or_else(|| vec![value], |list| list.iter().collect())
}

fn line(container: &Value) -> String {
    let text = |field: &str| container[field].as_str().unwrap_or_default();
    let words = ["command", "args"].into_iter().filter_map(|field| container[field].as_array()).flatten();
    let runs = Execution {
        container: None,
        command: words.filter_map(Value::as_str).map(str::to_owned).collect(),
        stdin: container["stdin"] == true,
        tty: container["tty"] == true,
    };
    let runs =
        if runs.command.is_empty() { String::new() } else { format!(", {}", wording::execution(&runs)) };
    let target = Some(text("targetContainerName")).filter(|target| !target.is_empty());
    let target =
        target.map(|target| format!(", among the processes of {}", quoted(target))).unwrap_or_default();
    format!("debug container {}: image {}{target}{runs}", quoted(text("name")), quoted(text("image")))
}

#[cfg(test)]
mod tests {
    use weir_common::{attributes::Attributes, event::RequestOpened};

    use super::lines;

    #[track_caller]
    fn check(verb: &str, subresource: &str, body: &str, expected: &[&str]) {
        let attributes = Attributes {
            verb: verb.into(),
            resource: "pods".into(),
            subresource: subresource.into(),
            ..Attributes::default()
        };
        let opened = RequestOpened {
            method: "PATCH".into(),
            uri: "/".into(),
            protocol: "HTTP/2".into(),
            headers: Vec::new(),
            attributes,
            execution: None,
            upgrade: None,
            identity: None,
            body: None,
        };
        assert_eq!(lines(&opened, body.as_bytes()), expected);
    }

    #[test]
    fn what_a_debug_session_puts_into_a_pod_is_said_in_a_line() {
        // As kubectl 1.36 sends it.
        let strategic = r#"{"spec":{"$setElementOrder/ephemeralContainers":[{"name":"debug"}],"ephemeralContainers":[
            {"command":["sh","-c","id; ls"],"image":"busybox:1.37","name":"debug","stdin":true,"targetContainerName":"web","tty":true}]}}"#;
        let line = "debug container debug: image busybox:1.37, among the processes of web, runs sh -c 'id; ls', with input and a terminal";
        check("patch", "ephemeralcontainers", strategic, &[line]);
        let json_patch = r#"[{"op":"add","path":"/spec/ephemeralContainers/-","value":{"name":"a\u001b","image":"b"}},
            {"op":"add","path":"/metadata/labels","value":{"name":"c"}}]"#;
        check("patch", "ephemeralcontainers", json_patch, &[r"debug container 'a\x1b': image b"]);
        let update = r#"{"kind":"Pod","spec":{"ephemeralContainers":[{"name":"a","image":"b","args":["c"]},{"name":"d","image":"e"}]}}"#;
        let lines = ["debug container a: image b, runs c", "debug container d: image e"];
        check("update", "ephemeralcontainers", update, &lines);
        check("patch", "", strategic, &[]);
        check("get", "ephemeralcontainers", strategic, &[]);
        check("patch", "ephemeralcontainers", "", &[]);
        check("patch", "ephemeralcontainers", "{}", &[]);
    }

    #[test]
    fn what_only_looks_like_a_container_is_said_to_be_more() {
        let more = "debug containers: changed further by the body's other operations";
        let harmless = r#"{"op":"add","path":"/spec/ephemeralContainers/0","value":{"name":"a","image":"b, runs true"}}"#;
        let line = "debug container a: image 'b, runs true'";
        for other in [
            r#"{"op":"replace","path":"/spec/ephemeralContainers/0/image","value":"c"}"#,
            r#"{"op":"add","path":"/spec/ephemeralContainers/0/command","value":["c"]}"#,
            r#"{"op":"replace","path":"/spec/ephemeralContainers","value":[]}"#,
            r#"{"op":"copy","path":"/spec/ephemeralContainers/0/image","from":"/metadata/labels/a"}"#,
            r#"{"op":"move","path":"/metadata/annotations/a","from":"/spec/ephemeralContainers/0"}"#,
            r#"{"op":"replace","path":"/spec","value":{}}"#,
            r#"{"op":"replace","path":"","value":{}}"#,
        ] {
            check("patch", "ephemeralcontainers", &format!("[{harmless},{other}]"), &[line, more]);
        }
        let test = r#"{"op":"test","path":"/spec/ephemeralContainers","value":[]}"#;
        check("patch", "ephemeralcontainers", &format!("[{test},{harmless}]"), &[line]);
        check(
            "patch",
            "ephemeralcontainers",
            "spec: {}",
            &["debug containers: not read here, what is recorded of the body is no JSON"],
        );
        let many = vec![r#"{"name":"a","image":"b"}"#; super::CONTAINERS_MAX + 2].join(",");
        let many = format!(r#"{{"spec":{{"ephemeralContainers":[{many}]}}}}"#);
        let mut expected = vec!["debug container a: image b"; super::CONTAINERS_MAX];
        expected.push("debug containers: 2 more in the body");
        check("update", "ephemeralcontainers", &many, &expected);
    }
}
