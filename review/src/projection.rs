//! Recorded events in the words of others: what `weir events --format` prints instead of the record.
//!
//! A projection is a pure function of an event and of what was said before it ([`context`]): who the session's caller is, which
//! process asks, how the request began. Events go in in the order of the record, lines of JSON come out; no clock, no file.
//! What a format has no place for is counted, so that the caller can tell. `docs/schema.md` has every field.

mod attested;
mod audit;
mod body;
mod cloudevents;
mod context;
mod ecs;
mod facts;
mod kept;
mod ocsf;
mod protobuf;
#[cfg(test)]
mod sample;

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use weir_common::event::Event;

use crate::source::Record;
use context::Context;

/// How events are counted that this version cannot read.
const UNREADABLE: &str = "unreadable";

/// Whose words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// `audit.k8s.io/v1` events, as the API server's own audit log has them.
    Audit,
    /// OCSF 1.5.0.
    Ocsf,
    /// Elastic Common Schema 8.11.
    Ecs,
    /// CloudEvents 1.0 in JSON.
    CloudEvents,
}

impl Format {
    /// All of them.
    pub(crate) const ALL: [Self; 4] = [Self::Audit, Self::Ocsf, Self::Ecs, Self::CloudEvents];

    /// What `--format` calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Audit => "audit",
            Self::Ocsf => "ocsf",
            Self::Ecs => "ecs",
            Self::CloudEvents => "cloudevents",
        }
    }
}

/// Makes lines of events.
#[derive(Debug)]
pub(crate) struct Projector {
    format: Format,
    context: Context,
    left_out: BTreeMap<&'static str, u64>,
}

impl Projector {
    /// Makes lines in this format.
    pub(crate) fn new(format: Format) -> Self {
        Self { format, context: Context::new(format == Format::Audit), left_out: BTreeMap::new() }
    }

    /// The lines that a record is worth, without their ends; none for one that the format has no place for or that a later one
    /// tells, and for one that this version cannot read.
    pub(crate) fn take(&mut self, record: &Record) -> Vec<String> {
        let Ok(event) = serde_json::from_slice::<Event>(&record.value) else {
            *self.left_out.entry(UNREADABLE).or_default() += 1;
            return Vec::new();
        };
        self.context.learn(&event);
        let scene = self.context.scene(&event);
        let (lines, told_later) = match self.format {
            Format::Audit => (audit::lines(&scene), audit::is_told_later(&scene)),
            Format::Ocsf => (ocsf::lines(&scene), ocsf::is_told_later(&scene)),
            Format::Ecs => (ecs::lines(&scene), ecs::is_told_later(&scene)),
            Format::CloudEvents => (cloudevents::lines(record), false),
        };
        if lines.is_empty() && !told_later {
            *self.left_out.entry(event.kind.name()).or_default() += 1;
        }
        self.context.forget(&event);
        lines
    }

    /// What the format had no place for, in words; none if it had place for everything.
    pub(crate) fn left_out(&self) -> Option<String> {
        let counts: Vec<String> =
            self.left_out.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
        let name = self.format.name();
        (!counts.is_empty()).then(|| format!("events that {name} has no place for: {}", counts.join(", ")))
    }
}

/// A value without what is not known: nulls, empty texts, lists and objects, at any depth. Texts in lists stay, empty ones too:
/// an argument may be empty.
fn known(value: Value) -> Option<Value> {
    match value {
        Value::Null => None,
        Value::String(text) => (!text.is_empty()).then_some(Value::String(text)),
        Value::Array(items) => {
            let items =
                items.into_iter().filter_map(|item| if item.is_string() { Some(item) } else { known(item) });
            let items: Vec<Value> = items.collect();
            (!items.is_empty()).then_some(Value::Array(items))
        }
        Value::Object(fields) => {
            let fields: Map<String, Value> =
                fields.into_iter().filter_map(|(name, value)| Some((name, known(value)?))).collect();
            (!fields.is_empty()).then_some(Value::Object(fields))
        }
        other => Some(other),
    }
}

/// Puts fields in, into objects that are there too.
fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (name, value) in from {
                merge(into.entry(name).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}

/// A list as short JSON, for where a format has texts alone.
fn listed(items: &[String]) -> String {
    json!(items).to_string()
}

#[cfg(test)]
mod tests;
