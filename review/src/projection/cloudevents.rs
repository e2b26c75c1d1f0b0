//! CloudEvents 1.0 in their JSON format: what a message of Kafka has as headers stands beside the event, which is `data`.
//!
//! The attributes are made by the very code that makes the headers (`weir_common::message`), so they cannot differ.

use serde_json::{Map, Value};
use weir_common::{
    frame::{Frame, FrameType},
    message::Message,
};

use crate::source::Record;

/// The message's key, by the name that CloudEvents' partitioning extension gives it.
const PARTITION_KEY: &str = "partitionkey";

/// The line of a record, whatever its event is: its bytes are taken as they are.
pub(super) fn lines(record: &Record) -> Vec<String> {
    let Ok(recorded) = std::str::from_utf8(&record.value) else { return Vec::new() };
    let frame = Frame {
        frame_type: FrameType::Event,
        sequence: 0,
        commit: 0,
        leaf_hash: Default::default(),
        envelope: record.envelope.clone(),
        value: &record.value,
    };
    let message = Message::of_frame(&frame, None);
    let named = message.headers.iter().map(|(name, text)| {
        let name = name.strip_prefix("ce_").unwrap_or("datacontenttype");
        (name.to_owned(), Value::from(text.as_ref()))
    });
    let mut attributes: Map<String, Value> = named.collect();
    attributes.extend(message.key.map(|key| (PARTITION_KEY.to_owned(), key.into())));
    let attributes = Value::Object(attributes).to_string();
    // There are some, so that a comma is right.
    let attributes = attributes.strip_suffix('}').unwrap_or_default();
    vec![format!("{attributes},\"data\":{recorded}}}")]
}
