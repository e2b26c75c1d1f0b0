//! The walk through one body that is parsed: what of it is masked, by what it is and by rule. Sans-IO.

use std::borrow::Cow;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Map, Value};

use super::{
    body::{LAST_APPLIED, Sensitivity, mentions_secret},
    bounded,
    mask::{MASK_PREFIX, Masker},
    masks::{FieldSet, PRIVATE_KEYS, Segment},
    quoted,
};

/// [`LAST_APPLIED`] as it stands in a JSON Patch path.
const LAST_APPLIED_ESCAPED: &str = "last-applied-configuration";

/// What holds where the walk is.
#[derive(Clone, Copy)]
pub(super) struct Around {
    pub(super) sensitivity: Sensitivity,
    /// Fields that are masked in the object that may begin here.
    pub(super) fields: FieldSet,
    /// Those of the object that this is in.
    pub(super) own: FieldSet,
}

/// The walk through one body.
pub(super) struct Walk<'a> {
    pub(super) masker: &'a Masker,
    pub(super) masks: u64,
}

impl Walk<'_> {
    pub(super) fn root(&mut self, value: &mut Value, around: Around) {
        match value {
            Value::Array(operations) => {
                operations.iter_mut().for_each(|operation| self.patch(operation, around));
            }
            _ => self.value(value, around),
        }
    }

    /// One operation of a JSON Patch (RFC 6902), if it is one.
    fn patch(&mut self, operation: &mut Value, around: Around) {
        let Value::Object(operation) = operation else {
            return match around.sensitivity {
                Sensitivity::None => self.value(operation, around),
                _ => self.leaves(operation),
            };
        };
        let path = operation.get("path").and_then(Value::as_str).unwrap_or_default();
        let metadata = path.starts_with("/metadata") && !path.contains(LAST_APPLIED_ESCAPED);
        let pointer: Vec<_> =
            path.split('/').skip(1).map(|name| name.replace("~1", "/").replace("~0", "~")).collect();
        let value = operation.get_mut("value").map(Value::take);
        // Nothing says that it is an operation: a list of objects that the API server will refuse looks the same.
        self.object(operation, around);
        if let Some(mut value) = value {
            self.target(&pointer, &mut value, around);
            if metadata || around.sensitivity == Sensitivity::None {
                self.value(&mut value, Around { fields: 0, ..around })
            } else {
                self.leaves(&mut value)
            }
            operation.insert("value".to_owned(), value);
        }
    }

    /// What a patch puts where `pointer` says.
    fn target(&mut self, pointer: &[String], value: &mut Value, around: Around) {
        for path in self.masker.masks().paths(around.fields) {
            path.behind(pointer).into_iter().for_each(|left| self.path(left, value));
        }
        if around.sensitivity == Sensitivity::None && pointer.last().is_some_and(|name| name == LAST_APPLIED)
        {
            self.last_applied(value, around);
        }
        match pointer.iter().rposition(|name| name == "env").and_then(|at| pointer.get(at + 1..)) {
            Some([]) => self.environment(value),
            Some([_]) => self.variable(value),
            // Of which variable nothing says.
            Some([_, field]) if field == "value" && self.masker.masks().has_environment() => {
                self.leaves(value)
            }
            _ => {}
        }
    }

    /// Masks what is left of a path from here on.
    fn path(&mut self, left: &[Segment], value: &mut Value) {
        let Some((first, rest)) = left.split_first() else { return self.leaves(value) };
        match value {
            Value::Array(items) => items.iter_mut().for_each(|item| self.path(left, item)),
            Value::Object(entries) => {
                let chosen = entries.iter_mut().filter(|(name, _)| first.is(name));
                chosen.for_each(|(_, value)| self.path(rest, value));
            }
            // It should go on here: what stands in its place is not what the rule knows.
            _ => self.leaves(value),
        }
    }

    fn environment(&mut self, value: &mut Value) {
        match value {
            Value::Array(variables) => variables.iter_mut().for_each(|variable| self.variable(variable)),
            _ => self.variable(value),
        }
    }

    /// `EnvVar`. One without a name belongs to one that has it: a patch, or what a cut has left.
    fn variable(&mut self, variable: &mut Value) {
        let Some(variable) = variable.as_object_mut() else { return };
        let masks = self.masker.masks();
        let is_masked = match variable.get("name").and_then(Value::as_str) {
            Some(name) => masks.environment(name),
            None => masks.has_environment(),
        };
        if let Some(value) = variable.get_mut("value").filter(|_| is_masked) {
            self.leaves(value);
        }
    }

    fn value(&mut self, value: &mut Value, around: Around) {
        match value {
            Value::Array(items) => items.iter_mut().for_each(|item| self.value(item, around)),
            Value::Object(object) => self.object(object, around),
            Value::String(_) | Value::Number(_) => self.scalar(value),
            Value::Null | Value::Bool(_) => {}
        }
    }

    /// Lists, watch events and tables need no case of their own: within what is sensitive, the names decide at any depth.
    fn object(&mut self, object: &mut Map<String, Value>, surroundings: Around) {
        let masks = self.masker.masks();
        let kind = object.get("kind").and_then(Value::as_str);
        let sensitivity = surroundings.sensitivity.of_kind(kind);
        let fields = surroundings.fields | kind.map_or(0, |kind| masks.of_kind(kind));
        // Entries of a list need not say their kind.
        let listed = kind.and_then(|kind| kind.strip_suffix("List")).map_or(0, |kind| masks.of_kind(kind));
        let own = if fields == 0 { surroundings.own } else { fields };
        for path in masks.paths(fields) {
            let (first, rest) = path.segments().split_at(1);
            for (name, value) in object.iter_mut().filter(|(name, _)| first[0].is(name)) {
                // What the object is must be known.
                if !matches!(name.as_str(), "kind" | "apiVersion") {
                    self.path(rest, value);
                }
            }
        }
        match object.get("kind").and_then(Value::as_str) {
            Some("Status") => self.status(object, Around { sensitivity, fields, own }),
            Some("Table") => self.table(object, Around { sensitivity, fields, own }),
            _ => {}
        }
        for (name, value) in object.iter_mut() {
            let fields = match name.as_str() {
                "items" => fields | listed,
                "object" | "rows" => fields,
                _ => 0,
            };
            let around = Around { sensitivity, fields, own };
            match (name.as_str(), sensitivity) {
                ("data", Sensitivity::Secrets) => self.data(value),
                ("stringData", Sensitivity::Secrets) | ("token", Sensitivity::Tokens) => self.leaves(value),
                (LAST_APPLIED, _) => self.last_applied(value, around),
                ("managedFields", _) if own != 0 => self.managed(value),
                ("env", _) => {
                    self.environment(value);
                    self.value(value, around);
                }
                _ => self.value(value, around),
            }
        }
        self.names(object);
    }

    /// `managedFields` name entries of lists by values that stand in them: `k:{"name":"a"}`, `v:"a"`
    /// (sigs.k8s.io/structured-merge-diff `fieldpath`).
    fn managed(&mut self, value: &mut Value) {
        match value {
            Value::Array(items) => items.iter_mut().for_each(|item| self.managed(item)),
            Value::Object(entries) => {
                let renamed = std::mem::take(entries).into_iter().map(|(name, mut value)| {
                    self.managed(&mut value);
                    let hidden = name.split_at_checked(2).filter(|(form, _)| matches!(*form, "k:" | "v:"));
                    (
                        hidden.map_or(name.clone(), |(form, entry)| {
                            format!("{form}{}", self.mask(entry.as_bytes()))
                        }),
                        value,
                    )
                });
                *entries = renamed.collect();
            }
            _ => {}
        }
    }

    /// Words that may quote what was sent.
    fn status(&mut self, status: &mut Map<String, Value>, around: Around) {
        let words = status.get("message").and_then(Value::as_str).unwrap_or_default();
        let on_variables =
            self.masker.masks().has_environment() && quoted::speaks_of_variables(words.as_bytes());
        if around.sensitivity == Sensitivity::None && around.own == 0 && !on_variables {
            return;
        }
        self.words(status);
        let causes = status.get_mut("details").and_then(|details| details.get_mut("causes"));
        let Some(causes) = causes.and_then(Value::as_array_mut) else { return };
        for cause in causes.iter_mut().filter_map(Value::as_object_mut) {
            self.words(cause);
            let field = cause.get_mut("field");
            if let Some(field) = field
                .filter(|field| !matches!(field, Value::String(path) if !quoted::has_keys(path.as_bytes())))
            {
                self.leaves(field);
            }
        }
    }

    fn words(&mut self, of: &mut Map<String, Value>) {
        let message = of.get_mut("message");
        if let Some(message) = message
            .filter(|message| !matches!(message, Value::String(words) if quoted::is_plain(words.as_bytes())))
        {
            self.leaves(message);
        }
    }

    /// What API servers print of objects: a column of a custom resource may be a field that is masked.
    fn table(&mut self, table: &mut Map<String, Value>, around: Around) {
        // What only calls itself a table has rows of another kind, which stay.
        let Some(rows) = table.get_mut("rows").and_then(Value::as_array_mut) else { return };
        let mut rows = std::mem::take(rows);
        for row in &mut rows {
            let kind = row.pointer("/object/kind").and_then(Value::as_str);
            let sensitivity = around.sensitivity.of_kind(kind);
            let fields = around.fields | kind.map_or(0, |kind| self.masker.masks().of_kind(kind));
            if sensitivity == Sensitivity::None && fields == 0 {
                continue;
            }
            let of_secrets = sensitivity == Sensitivity::Secrets && fields == 0;
            for at in quoted::cells_with_values(table, row, of_secrets) {
                if let Some(cell) = row.get_mut("cells").and_then(|cells| cells.get_mut(at)) {
                    self.leaves(cell);
                }
            }
        }
        table.insert("rows".to_owned(), Value::Array(rows));
    }

    /// Names in which an expression finds something.
    fn names(&mut self, object: &mut Map<String, Value>) {
        let Some(patterns) = self.masker.masks().patterns() else { return };
        if !object.keys().any(|name| patterns.are_in(name.as_bytes())) {
            return;
        }
        let renamed = std::mem::take(object)
            .into_iter()
            .map(|(name, value)| (self.found(&name).unwrap_or(name), value));
        *object = renamed.collect();
    }

    /// A value that is not masked as a whole: a private key is, and what an expression finds in it.
    fn scalar(&mut self, value: &mut Value) {
        if let Value::String(text) = value
            && PRIVATE_KEYS.iter().any(|begin| text.contains(begin))
        {
            *text = self.mask(text.as_bytes());
            return;
        }
        if self.masker.masks().patterns().is_none() {
            return;
        }
        let text = match value {
            // A mask is no text of anybody's.
            Value::String(text) if is_mask(text) => return,
            Value::String(text) => Cow::Borrowed(text.as_str()),
            ref other => Cow::Owned(other.to_string()),
        };
        if let Some(masked) = self.found(&text) {
            *value = Value::String(masked);
        }
    }

    fn found(&mut self, text: &str) -> Option<String> {
        let masked = self.masker.masks().patterns()?.mask(self.masker, text.as_bytes())?;
        self.masks += masked.masks;
        Some(String::from_utf8_lossy(&masked.content).into_owned())
    }

    /// `data` holds base64; the mask is of what it encodes, so that it equals that of `stringData`.
    fn data(&mut self, value: &mut Value) {
        match value {
            Value::Object(entries) => entries.values_mut().for_each(|value| match value {
                Value::String(text) => {
                    let decoded = STANDARD.decode(&*text).map_or(Cow::Borrowed(text.as_bytes()), Cow::Owned);
                    *text = self.mask(&decoded);
                }
                other => self.leaves(other),
            }),
            other => self.leaves(other),
        }
    }

    /// Masks every scalar; names stay.
    fn leaves(&mut self, value: &mut Value) {
        match value {
            Value::Null => {}
            Value::Array(items) => items.iter_mut().for_each(|item| self.leaves(item)),
            Value::Object(entries) => entries.values_mut().for_each(|value| self.leaves(value)),
            // Two rules are for the same value.
            Value::String(text) if is_mask(text) => {}
            Value::String(text) => *text = self.mask(text.as_bytes()),
            Value::Bool(_) | Value::Number(_) => {
                *value = Value::String(self.mask(value.to_string().as_bytes()))
            }
        }
    }

    fn last_applied(&mut self, value: &mut Value, around: Around) {
        let Value::String(text) = value else { return self.leaves(value) };
        if let Some(masked) = self.copy(text, around) {
            *text = masked;
        }
    }

    /// A copy of an object as text; none if it is recorded as it is.
    pub(super) fn copy(&mut self, text: &str, around: Around) -> Option<String> {
        let Around { sensitivity, own, .. } = around;
        let may_be_in = self.masker.masks().may_be_in(text.as_bytes(), own, false);
        if sensitivity == Sensitivity::None && !may_be_in && !mentions_secret(text.as_bytes()) {
            return None;
        }
        Some(match bounded::json(text.as_bytes()) {
            Some(mut copy @ Value::Object(_)) => {
                self.value(&mut copy, Around { fields: own, ..around });
                copy.to_string()
            }
            _ => self.mask(text.as_bytes()),
        })
    }

    fn mask(&mut self, secret: &[u8]) -> String {
        self.masks += 1;
        self.masker.mask(secret)
    }
}

/// Whether this has the form of a mask: whatever it is, it tells no more than one.
pub(super) fn is_mask(text: &str) -> bool {
    let parts = text.strip_prefix(MASK_PREFIX).and_then(|rest| rest.split_once(':'));
    parts.is_some_and(|(class, digest)| {
        let length = class.strip_prefix("le").unwrap_or(class);
        (1..=20).contains(&length.len())
            && length.bytes().all(|byte| byte.is_ascii_digit())
            && digest.len() == 16
            && digest.bytes().all(|byte| byte.is_ascii_hexdigit())
    })
}
