//! Properties of what is recorded: the event schema and the attributes of requests.

use weir_common::{
    attributes::Attributes,
    event::{Bytes, Event},
};

/// Most bytes that JSON adds around content, beside the third that base64 adds.
const CONTENT_OVERHEAD_BYTES: usize = 96;

/// An event that is accepted is written and read without change. Any bytes are content, come back whole, and grow
/// by no more than base64 makes them: otherwise an event could outgrow its frame.
pub fn event(bytes: &[u8]) {
    if let Ok(event) = serde_json::from_slice::<Event>(bytes) {
        let written = serde_json::to_vec(&event).expect("an event can be written");
        let again: Event = serde_json::from_slice(&written).expect("what is written can be read");
        assert_eq!(again, event);
        assert_eq!(serde_json::to_vec(&again).expect("an event can be written"), written);
    }
    let content = Bytes::from_slice(bytes);
    assert_eq!(content.to_vec().expect("our own base64 is valid"), bytes);
    let written = serde_json::to_vec(&content).expect("content can be written");
    assert!(
        written.len() <= bytes.len() + bytes.len() / 3 + CONTENT_OVERHEAD_BYTES,
        "{} bytes",
        written.len()
    );
}

/// The input's lines are method, path and query. No attribute holds a slash, none grows beyond what replacing bytes
/// that are not UTF-8 makes of it, and only the methods that read are reads.
pub fn attributes(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let mut lines = text.splitn(3, '\n');
    let (method, path, query) = (lines.next().unwrap_or(""), lines.next().unwrap_or(""), lines.next());
    let attributes = Attributes::parse(method, path, query);
    for field in [
        &attributes.api_group,
        &attributes.api_version,
        &attributes.resource,
        &attributes.subresource,
        &attributes.namespace,
        &attributes.name,
    ] {
        assert!(!field.contains('/'), "{field:?} holds a slash");
        assert!(field.len() <= 3 * text.len(), "{} bytes of {}", field.len(), text.len());
    }
    assert!(attributes.is_mutating(method) || matches!(method, "GET" | "HEAD" | "OPTIONS"));
    assert!(!attributes.is_connect() || attributes.is_mutating(method));
    assert!(!attributes.is_connect() || attributes.is_long_running(query));
    let written = serde_json::to_vec(&attributes).expect("attributes can be written");
    assert_eq!(serde_json::from_slice::<Attributes>(&written).expect("and read"), attributes);
}
