//! Bodies in Kubernetes' protobuf: which objects they hold, and the masks of their secrets.
//!
//! ```text
//! "k8s" 0x00, then runtime.Unknown: 1 typeMeta {1 apiVersion, 2 kind} · 2 raw, the object · 3, 4 its encoding, empty
//! ```
//!
//! The numbers of fields are those of `generated.proto` beside Kubernetes' types. What holds secrets by its kind is
//! recorded field by field as its [`Schema`] says, and fields that the schema does not name are left out. Of any
//! other kind only the metadata is known: where something else in it looks like a Secret within, nothing of the body is
//! recorded. A masked body is protobuf again. Sans-IO.

use std::borrow::Cow;

use weir_common::event::NamedObject;

use super::{
    body::{self, Cause, Recorded, Sensitivity},
    mask::Masker,
    masks::FieldSet,
    names::{Names, word},
    quoted,
    schema::{self, Others, Rule, Schema, WATCH_EVENT, schema_of},
    wire::{Field, Malformed, field, fields, put},
};

/// What a body in this encoding begins with (k8s.io/apimachinery `pkg/runtime/serializer/protobuf`).
pub(super) const MAGIC: &[u8] = b"k8s\0";

/// The type of bodies in this encoding.
pub(super) const CONTENT_TYPE: &str = "application/vnd.kubernetes.protobuf";

/// Most objects in objects: a `List` in a watch event has three.
const DEPTH_MAX: u32 = 8;

/// Why nothing of a body is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Unsafe(&'static str, Cause);

impl From<Malformed> for Unsafe {
    fn from(_: Malformed) -> Self {
        MALFORMED
    }
}

const MALFORMED: Unsafe = Unsafe("may hold secrets and is not the protobuf it claims to be", Cause::Unread);
const UNKNOWN: Unsafe = Unsafe("may hold secrets in a type whose fields are not known", Cause::Unread);
const FIELDS: Unsafe =
    Unsafe("a rule masks fields of this kind, which are not known in protobuf", Cause::Rule);
const FOUND: Unsafe = Unsafe("a rule masks text in it, which cannot be replaced in protobuf", Cause::Rule);
const WITHIN: Unsafe = Unsafe("may hold a secret in a field that is not known", Cause::Unread);
const CUT: Unsafe = Unsafe("may hold secrets and is cut, so it cannot be parsed", Cause::Unread);

/// Decides what is recorded of a body, and names its objects; of one that is cut (not `whole`) only what it is can be told.
pub(super) fn record<'a>(
    masker: &Masker,
    sensitivity: Sensitivity,
    body: &'a [u8],
    whole: bool,
    names: &mut Names,
) -> Recorded<'a> {
    if !whole {
        return match cut(masker, sensitivity, body) {
            Ok(()) => Recorded::Clear(body),
            Err(Unsafe(reason, cause)) => Recorded::Withheld { reason, cause },
        };
    }
    let mut walk = Walk::new(masker, names);
    let made = walk.envelope(body, sensitivity);
    walk.recorded(made, body)
}

/// Decides what is recorded of one event of a watch, without what frames it.
pub(super) fn record_event<'a>(
    masker: &Masker,
    sensitivity: Sensitivity,
    event: &'a [u8],
    names: &mut Names,
) -> Recorded<'a> {
    let mut walk = Walk::new(masker, names);
    walk.event = field(event, 1).and_then(word);
    let place = Place { sensitivity, api_version: "", kind: "", fields: 0 };
    let mut out = Vec::with_capacity(event.len());
    let made = walk.message(&WATCH_EVENT, place, event, &mut out).map(|()| out);
    walk.recorded(made, event)
}

/// Whether the beginning of a body may be recorded.
fn cut(masker: &Masker, sensitivity: Sensitivity, body: &[u8]) -> Result<(), Unsafe> {
    let rest = body.strip_prefix(MAGIC).ok_or(CUT)?;
    let (first, _) = Field::next(rest).map_err(|_| CUT)?;
    let Field { number: 1, bytes: Some(meta), .. } = first else { return Err(CUT) };
    let kind = std::str::from_utf8(field(meta, 2).ok_or(CUT)?).map_err(|_| CUT)?;
    let (_, sensitivity) = schema_of(kind, sensitivity).ok_or(UNKNOWN)?;
    if sensitivity != Sensitivity::None || looks_secret(rest) {
        return Err(CUT);
    }
    // A variable's name stands before its value, as a string: what is cut between them has no value yet.
    let masks = masker.masks();
    let found = masks.patterns().is_some_and(|patterns| patterns.may_be_in(rest));
    let on_variables = kind == "Status" && masks.has_environment() && quoted::speaks_of_variables(rest);
    if found
        || on_variables
        || fields_of(masker, kind) != 0
        || schema::has_variables(kind) && masks.environment_in(rest)
    {
        return Err(CUT);
    }
    Ok(())
}

/// Fields that rules mask in an object of this kind, or in those of such a list.
fn fields_of(masker: &Masker, kind: &str) -> FieldSet {
    let of = |kind| masker.masks().of_kind(kind);
    masker.fields() | of(kind) | kind.strip_suffix("List").map_or(0, of)
}

/// Whether what rules mask in objects of this kind is known by its number.
fn are_known(masker: &Masker, kind: &str, fields: FieldSet) -> bool {
    if fields == 0 {
        return true;
    }
    // Metadata are kept as they are.
    let is_for_metadata = masker.masks().paths(fields).any(|path| path.segments()[0].is("metadata"));
    schema::are_fields_known(kind) && !is_for_metadata
}

/// Whether something in these bytes may be an object that holds secrets: in an envelope, or in JSON or YAML.
fn looks_secret(bytes: &[u8]) -> bool {
    bytes.windows(MAGIC.len()).any(|window| window == MAGIC) || body::mentions_secret(bytes)
}

/// Whether no object that holds secrets is in these bytes of an unknown type. Text that only speaks of one is none, as it is none in
/// JSON: that takes braces, or an envelope.
fn is_harmless(bytes: &[u8], depth: u32) -> bool {
    let is_plain = |c: char| c != '{' && (!c.is_control() || matches!(c, '\n' | '\r' | '\t'));
    if !looks_secret(bytes) || std::str::from_utf8(bytes).is_ok_and(|text| text.chars().all(is_plain)) {
        return true;
    }
    // What is no string may be a message that holds some.
    let is_message = depth > 0 && !bytes.starts_with(MAGIC);
    is_message
        && fields(bytes).all(|field| {
            field.is_ok_and(|field| {
                !field.is_group() && field.bytes.is_none_or(|bytes| is_harmless(bytes, depth - 1))
            })
        })
}

/// Where a message stands.
#[derive(Clone, Copy)]
struct Place<'a> {
    sensitivity: Sensitivity,
    api_version: &'a str,
    kind: &'a str,
    /// Fields that rules mask in the object.
    fields: FieldSet,
}

/// The walk through one body.
struct Walk<'a> {
    masker: &'a Masker,
    names: &'a mut Names,
    masks: u64,
    /// Something is recorded otherwise than it came.
    changed: bool,
    depth: u32,
    event: Option<String>,
}

impl<'a> Walk<'a> {
    fn new(masker: &'a Masker, names: &'a mut Names) -> Self {
        Self { masker, names, masks: 0, changed: false, depth: 0, event: None }
    }

    fn recorded<'b>(self, made: Result<Vec<u8>, Unsafe>, body: &'b [u8]) -> Recorded<'b> {
        let patterns = self.masker.masks().patterns();
        match made {
            Ok(content) if patterns.is_some_and(|patterns| patterns.are_in(&content)) => {
                let Unsafe(reason, cause) = FOUND;
                Recorded::Withheld { reason, cause }
            }
            Ok(content) if self.masks > 0 || self.changed => Recorded::Masked { content, masks: self.masks },
            Ok(_) => Recorded::Clear(body),
            Err(Unsafe(reason, cause)) => Recorded::Withheld { reason, cause },
        }
    }

    /// An object in its envelope. What a decoder could understand otherwise than this one is refused.
    fn envelope(&mut self, body: &[u8], surroundings: Sensitivity) -> Result<Vec<u8>, Unsafe> {
        self.depth += 1;
        let message = body.strip_prefix(MAGIC).filter(|_| self.depth <= DEPTH_MAX).ok_or(MALFORMED)?;
        let mut parts: [Option<&[u8]>; 5] = [None; 5];
        for field in fields(message) {
            let Field { number, bytes, .. } = field?;
            // Kubernetes skips what it does not know.
            let Some(part) = parts.get_mut(number as usize) else {
                self.masks += 1;
                continue;
            };
            let part = Some(part).filter(|part| part.is_none()).ok_or(MALFORMED)?;
            *part = Some(bytes.ok_or(MALFORMED)?);
        }
        let [_, meta, raw, encoding, content_type] = parts.map(Option::unwrap_or_default);
        if !encoding.is_empty() || !(content_type.is_empty() || content_type == CONTENT_TYPE.as_bytes()) {
            return Err(UNKNOWN);
        }
        let text =
            |number| std::str::from_utf8(field(meta, number).unwrap_or_default()).map_err(|_| MALFORMED);
        let (api_version, kind) = (text(1)?, text(2)?);
        let (schema, sensitivity) = schema_of(kind, surroundings).ok_or(UNKNOWN)?;
        let fields = fields_of(self.masker, kind);
        if !are_known(self.masker, kind, fields) {
            return Err(FIELDS);
        }
        let mut object = Vec::with_capacity(raw.len());
        self.message(schema, Place { sensitivity, api_version, kind, fields }, raw, &mut object)?;
        let mut out = MAGIC.to_vec();
        for (number, part) in (1..).zip([meta, &object, encoding, content_type]) {
            put(&mut out, number, part);
        }
        self.depth -= 1;
        Ok(out)
    }

    fn message(
        &mut self,
        schema: &Schema,
        place: Place<'_>,
        message: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), Unsafe> {
        for field in fields(message) {
            let field @ Field { number, bytes, whole } = field?;
            let rule = schema.fields.iter().find(|(known, _)| *known == number).map(|(_, rule)| *rule);
            match (rule, bytes) {
                (Some(Rule::Keep), _) => out.extend_from_slice(whole),
                (Some(Rule::Mask), Some([])) => out.extend_from_slice(whole),
                (Some(Rule::Mask), Some(secret)) => put(out, number, self.mask(secret).as_bytes()),
                (Some(Rule::MaskedMap), Some(entry)) => {
                    let entry = self.masked_entry(entry)?;
                    put(out, number, &entry);
                }
                (Some(Rule::Metadata), Some(metadata)) => {
                    let metadata = self.metadata(place, metadata)?;
                    put(out, number, &metadata);
                }
                (Some(Rule::Message(schema)), Some(message)) => {
                    let kind = place.kind.strip_suffix("List").unwrap_or(place.kind);
                    let mut inner = Vec::with_capacity(message.len());
                    self.message(schema, Place { kind, ..place }, message, &mut inner)?;
                    put(out, number, &inner);
                }
                (Some(Rule::Object), Some(extension)) => {
                    let extension = self.extension(place.sensitivity, extension)?;
                    put(out, number, &extension);
                }
                (Some(Rule::Variable), Some(variable)) => {
                    let variable = self.variable(variable)?;
                    put(out, number, &variable);
                }
                (Some(Rule::NamedMap(name)), Some(entry)) => {
                    let entry = self.entry_by_rule(place.fields, name, entry)?;
                    put(out, number, &entry);
                }
                (Some(Rule::Words), Some(words))
                    if !self.may_quote(place, words) || quoted::is_plain(words) =>
                {
                    out.extend_from_slice(whole);
                }
                (Some(Rule::FieldPath), Some(path)) if !self.quotes(place) || !quoted::has_keys(path) => {
                    out.extend_from_slice(whole);
                }
                (Some(Rule::Words | Rule::FieldPath), Some(words)) => {
                    put(out, number, self.mask(words).as_bytes());
                }
                // Of another type than it should be.
                (Some(_), None) => self.masks += 1,
                (None, _) => self.other(schema.others, field, out)?,
            }
        }
        Ok(())
    }

    /// Whether words about what is in this place may quote what is masked.
    fn quotes(&self, place: Place<'_>) -> bool {
        place.sensitivity != Sensitivity::None || place.fields != 0
    }

    fn may_quote(&self, place: Place<'_>, words: &[u8]) -> bool {
        self.quotes(place) || self.masker.masks().has_environment() && quoted::speaks_of_variables(words)
    }

    /// A field that the schema does not name.
    fn other(&mut self, others: Others, field: Field<'_>, out: &mut Vec<u8>) -> Result<(), Unsafe> {
        match others {
            Others::Drop => self.masks += 1,
            Others::Inspect if !is_harmless(field.bytes.unwrap_or(field.whole), DEPTH_MAX) => {
                return Err(WITHIN);
            }
            Others::Keep | Others::Inspect => out.extend_from_slice(field.whole),
        }
        Ok(())
    }

    fn mask(&mut self, secret: &[u8]) -> String {
        self.masks += 1;
        self.masker.mask(secret)
    }

    /// `EnvVar`: 1 name, 2 value.
    fn variable<'b>(&mut self, variable: &'b [u8]) -> Result<Cow<'b, [u8]>, Unsafe> {
        let name = field(variable, 1).map(String::from_utf8_lossy);
        if field(variable, 2).is_none() || !name.is_none_or(|name| self.masker.masks().environment(&name)) {
            return Ok(Cow::Borrowed(variable));
        }
        let mut out = Vec::with_capacity(variable.len());
        for field in fields(variable) {
            match field? {
                Field { number: 2, bytes: Some([]), whole } => out.extend_from_slice(whole),
                Field { number: 2, bytes: Some(secret), .. } => {
                    put(&mut out, 2, self.mask(secret).as_bytes())
                }
                field => out.extend_from_slice(field.whole),
            }
        }
        Ok(out.into())
    }

    /// An entry of a map of this name, masked if a rule is for it.
    fn entry_by_rule<'b>(
        &mut self,
        set: FieldSet,
        map: &str,
        entry: &'b [u8],
    ) -> Result<Cow<'b, [u8]>, Unsafe> {
        let name = field(entry, 1).map(String::from_utf8_lossy).unwrap_or_default();
        let is_masked = self.masker.masks().paths(set).any(|path| match path.segments() {
            [of] => of.is(map),
            [of, named, ..] => of.is(map) && named.is(&name),
            [] => false,
        });
        if is_masked { self.masked_entry(entry).map(Cow::Owned) } else { Ok(Cow::Borrowed(entry)) }
    }

    /// An entry of a map: 1 its name, 2 the secret.
    fn masked_entry(&mut self, entry: &[u8]) -> Result<Vec<u8>, Unsafe> {
        let mut out = Vec::with_capacity(entry.len());
        for field in fields(entry) {
            match field? {
                Field { number: 1, bytes: Some(_), whole } => out.extend_from_slice(whole),
                Field { number: 2, bytes: Some(secret), .. } => {
                    put(&mut out, 2, self.mask(secret).as_bytes());
                }
                _ => self.masks += 1,
            }
        }
        Ok(out)
    }

    /// `ObjectMeta`: 1 name, 3 namespace, 6 resourceVersion, 12 annotations.
    fn metadata(&mut self, place: Place<'_>, metadata: &[u8]) -> Result<Vec<u8>, Unsafe> {
        let mut out = Vec::with_capacity(metadata.len());
        for field in fields(metadata) {
            match field? {
                Field { number: 12, bytes: Some(entry), .. } => {
                    put(&mut out, 12, &self.annotation(place.sensitivity, entry)?);
                }
                field => out.extend_from_slice(field.whole),
            }
        }
        let text = |number| {
            let word = field(metadata, number).and_then(word);
            word.map_or_else(String::new, |word| self.masker.text(&word))
        };
        let of_type = |text: &str| word(text.as_bytes()).unwrap_or_default();
        let object = NamedObject {
            event: self.event.clone(),
            api_version: of_type(place.api_version),
            kind: of_type(place.kind),
            namespace: text(3),
            name: text(1),
            resource_version: text(6),
        };
        if !object.name.is_empty() || object.event.is_some() {
            self.names.push(object);
        }
        Ok(out)
    }

    /// An entry of the annotations: 1 its name, 2 its text.
    fn annotation<'b>(
        &mut self,
        surroundings: Sensitivity,
        entry: &'b [u8],
    ) -> Result<Cow<'b, [u8]>, Unsafe> {
        let mut is_copy = false;
        for field in fields(entry) {
            let field = field?;
            is_copy |= field.number == 1 && field.bytes == Some(body::LAST_APPLIED.as_bytes());
        }
        if !is_copy {
            return Ok(Cow::Borrowed(entry));
        }
        let mut out = Vec::with_capacity(entry.len());
        for field in fields(entry) {
            let Field { number, bytes, whole } = field?;
            match bytes {
                Some(copy) if number == 2 => {
                    let (masked, masks) = match std::str::from_utf8(copy) {
                        Ok(text) => body::last_applied(self.masker, surroundings, text),
                        Err(_) => (self.masker.mask(copy), 1),
                    };
                    self.masks += masks;
                    self.changed |= masked.as_bytes() != copy;
                    put(&mut out, number, masked.as_bytes());
                }
                _ if number == 1 => out.extend_from_slice(whole),
                _ => self.masks += 1,
            }
        }
        Ok(Cow::Owned(out))
    }

    /// `RawExtension`: 1 raw, an object in an envelope, or in JSON.
    fn extension(&mut self, surroundings: Sensitivity, extension: &[u8]) -> Result<Vec<u8>, Unsafe> {
        let mut out = Vec::with_capacity(extension.len());
        for field in fields(extension) {
            match field? {
                Field { number: 1, bytes: Some([]), whole } => out.extend_from_slice(whole),
                Field { number: 1, bytes: Some(raw), .. } if raw.starts_with(b"{") => {
                    match body::record_json(self.masker, surroundings, raw) {
                        Recorded::Clear(raw) => put(&mut out, 1, raw),
                        Recorded::Masked { content, masks } => {
                            (self.masks, self.changed) = (self.masks + masks, true);
                            put(&mut out, 1, &content);
                        }
                        Recorded::Withheld { reason, cause } => return Err(Unsafe(reason, cause)),
                    }
                }
                Field { number: 1, bytes: Some(raw), .. } => {
                    let object = self.envelope(raw, surroundings)?;
                    put(&mut out, 1, &object);
                }
                _ => self.masks += 1,
            }
        }
        Ok(out)
    }
}
