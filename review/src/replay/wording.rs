//! Requests in words: what they mean, what they run, as whom they went on. What comes back is escaped where it says so.

use weir_common::{
    attributes::Execution,
    event::{
        ActsAs, Channel, ConnectionForwarded, FileCopied, Identity, NamedObject, ObjectsNamed, RequestOpened,
    },
};

use crate::{moment::bytes, terminal::escaped};

/// Most objects of a body that a note names.
const OBJECTS_SHOWN_MAX: usize = 5;

/// What a request means, in words: `get pods web in default`, `create pods/exec web in default`.
pub(super) fn meaning(opened: &RequestOpened) -> String {
    let attributes = &opened.attributes;
    if attributes.resource.is_empty() {
        return format!("{} {}", attributes.verb, opened.uri.split('?').next().unwrap_or_default());
    }
    let mut text = format!("{} {}", attributes.verb, attributes.resource);
    for (before, part) in [
        ("/", &attributes.subresource),
        (".", &attributes.api_group),
        (" ", &attributes.name),
        (" in ", &attributes.namespace),
    ] {
        if !part.is_empty() {
            text.push_str(before);
            text.push_str(part);
        }
    }
    text
}

/// An argument as one would type it to a shell; for reading only. Escaped.
pub(super) fn quoted(argument: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
    if !argument.is_empty() && argument.chars().all(plain) {
        return argument.to_owned();
    }
    format!("'{}'", escaped(&argument.replace('\'', r"'\''")))
}

/// What is run in a pod, or attached to. Escaped.
pub(super) fn execution(execution: &Execution) -> String {
    let command: Vec<String> = execution.command.iter().map(|argument| quoted(argument)).collect();
    let mut text =
        if command.is_empty() { "attached".to_owned() } else { format!("runs {}", command.join(" ")) };
    if let Some(container) = &execution.container {
        text.push_str(&format!(", in container {}", escaped(container)));
    }
    let with = match (execution.stdin, execution.tty) {
        (true, true) => ", with input and a terminal",
        (true, false) => ", with input",
        (false, true) => ", with a terminal",
        (false, false) => "",
    };
    text + with
}

/// As whom a request went on, where that is not the caller.
pub(super) fn acting(identity: &Identity) -> Option<String> {
    let rule = identity.rule.as_deref().unwrap_or_default();
    match identity.acts_as.as_ref()? {
        ActsAs::PassThrough => None,
        ActsAs::Impersonate { user } => Some(format!("as {} by rule {rule}", user.username)),
        ActsAs::Role { arn, by } => Some(format!("in {arn} ({by}) by rule {rule}")),
    }
}

/// A file that went through exec.
pub(super) fn copied(file: &FileCopied) -> String {
    let way = if file.channel == Channel::Stdin { "into the container" } else { "out of the container" };
    let FileCopied { path, link_target, digest, passed_bytes, .. } = file;
    if let Some(target) = link_target {
        return format!("link {way}: {path} → {target}");
    }
    let passed = passed_bytes.map(|passed| format!(", cut after {}", bytes(passed))).unwrap_or_default();
    let digest = digest.as_ref().map(|digest| format!(", {digest}")).unwrap_or_default();
    format!("file {way}: {path}, {}{passed}{digest}", bytes(file.bytes))
}

/// Objects of a body that is not text.
pub(super) fn named(named: &ObjectsNamed) -> String {
    let one = |object: &NamedObject| {
        let event = object.event.as_ref().map(|event| format!("{event} ")).unwrap_or_default();
        let namespace = Some(&object.namespace).filter(|namespace| !namespace.is_empty());
        let namespace = namespace.map(|namespace| format!("{namespace}/")).unwrap_or_default();
        format!("{event}{} {namespace}{}", object.kind, object.name)
    };
    let body = if named.channel.is_from_client() { "request" } else { "response" };
    let shown: Vec<_> = named.objects.iter().take(OBJECTS_SHOWN_MAX).map(one).collect();
    let more = (named.objects.len() - shown.len()) as u64 + named.left_out;
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("the {body} holds {}{more}", shown.join(", "))
}

/// A connection through a port-forward.
pub(super) fn forwarded(forwarded: &ConnectionForwarded) -> String {
    let ConnectionForwarded { connection, bytes_in, bytes_out, protocol, server_name } = forwarded;
    let spoken = protocol.as_ref().map(|protocol| format!(", {protocol}")).unwrap_or_default();
    let name = server_name.as_ref().map(|name| format!(" to {name}")).unwrap_or_default();
    format!(
        "connection {} to port {} is over: {} in, {} out{spoken}{name}",
        connection.id,
        connection.port,
        bytes(*bytes_in),
        bytes(*bytes_out)
    )
}
