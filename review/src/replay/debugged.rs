//! What `kubectl debug` puts into a running pod: ephemeral containers, as the body of the request says them.
//!
//! The answer is in protobuf for clients in Go; the request is JSON for all. Pure; the lines that come back are escaped.

use serde_json::Value;
use weir_common::{attributes::Execution, event::RequestOpened};

use super::{body::Shown, wording};
use crate::terminal::escaped;

/// Most containers of one request that are said.
const CONTAINERS_MAX: usize = 32;

/// A line for each container that a request asks for; none of other requests, and of what is no JSON.
pub(super) fn containers(opened: &RequestOpened, body: &[u8]) -> Shown {
    Shown { label: None, lines: lines(opened, body) }
}

fn lines(opened: &RequestOpened, body: &[u8]) -> Vec<String> {
    let attributes = &opened.attributes;
    if attributes.resource != "pods"
        || attributes.subresource != "ephemeralcontainers"
        || !matches!(attributes.verb.as_str(), "patch" | "update")
    {
        return Vec::new();
    }
    let Ok(body) = serde_json::from_slice::<Value>(body) else { return Vec::new() };
    let asked: Vec<&Value> = match &body {
        // A JSON Patch: what it puts anywhere among them.
        Value::Array(operations) => {
            let put = operations.iter().filter(|operation| {
                operation["path"].as_str().is_some_and(|path| path.starts_with("/spec/ephemeralContainers"))
            });
            put.filter_map(|operation| operation.get("value")).flat_map(entries).collect()
        }
        object => entries(&object["spec"]["ephemeralContainers"]),
    };
    // One without a name says what becomes of the others' order.
    let named = asked.into_iter().filter(|container| container["name"].is_string());
    named.take(CONTAINERS_MAX).map(line).collect()
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
        target.map(|target| format!(", among the processes of {}", escaped(target))).unwrap_or_default();
    format!("debug container {}: image {}{target}{runs}", escaped(text("name")), escaped(text("image")))
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
        check("patch", "ephemeralcontainers", json_patch, &[r"debug container a\x1b: image b"]);
        let update = r#"{"kind":"Pod","spec":{"ephemeralContainers":[{"name":"a","image":"b","args":["c"]},{"name":"d","image":"e"}]}}"#;
        let lines = ["debug container a: image b, runs c", "debug container d: image e"];
        check("update", "ephemeralcontainers", update, &lines);
        check("patch", "", strategic, &[]);
        check("get", "ephemeralcontainers", strategic, &[]);
        check("patch", "ephemeralcontainers", "\u{0}", &[]);
        check("patch", "ephemeralcontainers", "{}", &[]);
    }
}
