//! Names of the objects in a body, as `objectsNamed` tells them: of those in JSON and YAML, and the bounds for all. Sans-IO.
//!
//! A body in text is read for nothing but names, without anything being kept of it, and only where its request names no object: what
//! a list, a watch or a `generateName` is about stands nowhere else. What comes before a cut or a mistake is named.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use weir_common::event::{Channel, Kind, NamedObject, ObjectsNamed};

use super::{
    bounded,
    lenient_json::{self, Repaired},
    mask::Masker,
};

/// Most objects of one event of the record, and of a body.
const NAMED_PER_EVENT_MAX: usize = 64;
const NAMED_MAX: usize = 512;

/// Longest name of an object: that of a DNS subdomain.
const NAME_BYTES_MAX: usize = 253;

/// The objects that were named, within bounds.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Names {
    objects: Vec<NamedObject>,
    left_out: u64,
    /// Those in JSON and YAML are named, too.
    of_text: bool,
}

impl Names {
    /// With those in JSON and YAML, if that is wanted.
    pub(super) fn new(of_text: bool) -> Self {
        Self { of_text, ..Self::default() }
    }

    pub(super) fn push(&mut self, object: NamedObject) {
        if self.objects.len() < NAMED_MAX {
            self.objects.push(object);
        } else {
            self.left_out += 1;
        }
    }

    /// As events of the record.
    pub(super) fn kinds(self, channel: Channel) -> Vec<Kind> {
        let last = self.objects.len().div_ceil(NAMED_PER_EVENT_MAX).saturating_sub(1);
        let chunks = self.objects.chunks(NAMED_PER_EVENT_MAX).enumerate();
        let kind = |(number, objects): (usize, &[NamedObject])| {
            let left_out = if number == last { self.left_out } else { 0 };
            Kind::ObjectsNamed(Box::new(ObjectsNamed { channel, objects: objects.to_vec(), left_out }))
        };
        chunks.map(kind).collect()
    }

    /// Names the objects in a body in JSON, or else YAML.
    pub(super) fn read(&mut self, masker: &Masker, body: &[u8], may_be_yaml: bool) {
        if !self.of_text {
            return;
        }
        let before = self.objects.len();
        let is_json = body.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'{');
        let mut read = Read { names: self, masker };
        let object = Object { read: &mut read, kind: "", api_version: "", event: None };
        if is_json {
            // What cannot be read on has been named up to there.
            let read = object.deserialize(&mut serde_json::Deserializer::from_slice(body));
            if read.is_err()
                && let Some(Repaired { text, .. }) = lenient_json::repaired(masker, body)
            {
                self.objects.truncate(before);
                let mut read = Read { names: self, masker };
                let object = Object { read: &mut read, kind: "", api_version: "", event: None };
                let _ = object.deserialize(&mut serde_json::Deserializer::from_slice(&text));
            }
        } else if may_be_yaml
            && let Some(value) = bounded::yaml(body)
            && object.deserialize(value).is_err()
        {
            // Of YAML, which is read as a whole, nothing is left half.
            self.objects.truncate(before);
        }
        // Where the body is cut, nothing more is said of what the last one is in.
        Held { object: Some(before), listed: None }.settle(&mut self.objects, ("", ""), None);
    }
}

/// A name as it is recorded: nothing that could not be one.
pub(super) fn word(bytes: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(bytes).ok().filter(|text| text.len() <= NAME_BYTES_MAX)?;
    text.chars().all(|c| !c.is_control()).then(|| text.to_owned())
}

struct Read<'a> {
    names: &'a mut Names,
    masker: &'a Masker,
}

/// An object, or what holds some: a list, a table, an event of a watch.
struct Object<'r, 'a, 'k> {
    read: &'r mut Read<'a>,
    /// What it is if it does not say it: an entry of a list.
    kind: &'k str,
    api_version: &'k str,
    /// What happened to it.
    event: Option<String>,
}

/// Several of them.
struct Objects<'r, 'a, 'k>(Object<'r, 'a, 'k>);

/// A text, or nothing where there is something else.
#[derive(Default)]
struct Word(String);

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Metadata {
    name: Word,
    namespace: Word,
    resource_version: Word,
}

impl<'de> DeserializeSeed<'de> for Object<'_, '_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Object<'_, '_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object, or nothing")
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Self { read, kind: listed, api_version: listed_version, event } = self;
        let (mut kind, mut api_version) = (String::new(), String::new());
        let (mut metadata, mut happened, mut held) = (Metadata::default(), None, Held::default());
        while let Some(Word(key)) = map.next_key()? {
            match key.as_str() {
                "kind" => kind = map.next_value::<Word>()?.0,
                "apiVersion" => api_version = map.next_value::<Word>()?.0,
                "type" => happened = Some(map.next_value::<Word>()?.0),
                "metadata" => metadata = map.next_value::<Option<Metadata>>()?.unwrap_or_default(),
                "items" | "rows" => {
                    let kind = kind.strip_suffix("List").unwrap_or_default();
                    let version = if kind.is_empty() { "" } else { api_version.as_str() };
                    let (event, read) = (event.clone(), &mut *read);
                    held.listed.get_or_insert(read.names.objects.len());
                    map.next_value_seed(Objects(Object { read, kind, api_version: version, event }))?;
                }
                "object" => {
                    let (event, read) = (happened.clone().or_else(|| event.clone()), &mut *read);
                    held.object.get_or_insert(read.names.objects.len());
                    // Whether something happened to it may be said behind it, and a bookmark has no name.
                    let event = event.or_else(|| Some(String::new()));
                    map.next_value_seed(Object { read, kind: "", api_version: "", event })?;
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        held.settle(&mut read.names.objects, (&kind, &api_version), happened.or_else(|| event.clone()));
        let masker = read.masker;
        let text = |Word(text): &Word| masker.text(text);
        let or = |own: String, listed: &str| if own.is_empty() { listed.to_owned() } else { own };
        let object = NamedObject {
            event,
            api_version: or(api_version, listed_version),
            kind: or(kind, listed),
            namespace: text(&metadata.namespace),
            name: text(&metadata.name),
            resource_version: text(&metadata.resource_version),
        };
        // A table and its rows are none: what they hold is named.
        let is_nothing_else = held.listed.is_none() && held.object.is_none();
        if !object.name.is_empty() || object.event.is_some() && is_nothing_else {
            read.names.push(object);
        }
        Ok(())
    }
}

/// From where on the objects are those that an object holds.
#[derive(Default)]
struct Held {
    /// Items of a list, rows of a table.
    listed: Option<usize>,
    /// The object of a watch's event or of a row.
    object: Option<usize>,
}

impl Held {
    /// What was said of them only behind them, as CBOR has it, whose keys are recorded in their order.
    fn settle(
        &self,
        objects: &mut Vec<NamedObject>,
        (kind, api_version): (&str, &str),
        event: Option<String>,
    ) {
        if let (Some(from), Some(kind)) = (self.listed, kind.strip_suffix("List")) {
            for object in objects.iter_mut().skip(from).filter(|object| object.kind.is_empty()) {
                kind.clone_into(&mut object.kind);
                api_version.clone_into(&mut object.api_version);
            }
        }
        let Some(from) = self.object else { return };
        for mut object in objects.split_off(from.min(objects.len())) {
            if object.event.as_ref().is_none_or(String::is_empty) {
                object.event.clone_from(&event);
            }
            if !object.name.is_empty() || object.event.is_some() {
                objects.push(object);
            }
        }
    }
}

impl<'de> DeserializeSeed<'de> for Objects<'_, '_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Objects<'_, '_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of objects, or nothing")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let Self(Object { read, kind, api_version, event }) = self;
        loop {
            let entry = Object { read: &mut *read, kind, api_version, event: event.clone() };
            if list.next_element_seed(entry)?.is_none() {
                return Ok(());
            }
        }
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }
}

impl<'de> Deserialize<'de> for Word {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Word;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text")
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Word, E> {
                Ok(Word(word(text.as_bytes()).unwrap_or_default()))
            }
            fn visit_bool<E: Error>(self, _: bool) -> Result<Word, E> {
                Ok(Word::default())
            }
            fn visit_i64<E: Error>(self, _: i64) -> Result<Word, E> {
                Ok(Word::default())
            }
            fn visit_u64<E: Error>(self, _: u64) -> Result<Word, E> {
                Ok(Word::default())
            }
            fn visit_f64<E: Error>(self, _: f64) -> Result<Word, E> {
                Ok(Word::default())
            }
            fn visit_unit<E: Error>(self) -> Result<Word, E> {
                Ok(Word::default())
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Word, A::Error> {
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Word::default())
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Word, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Word::default())
            }
        }
        deserializer.deserialize_any(Any)
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::{Channel, Kind, NAMED_MAX, Names};
    use crate::recording::mask::Masker;

    fn named(body: &str, may_be_yaml: bool) -> String {
        let mut names = Names::new(true);
        names.read(&Masker::for_cluster(&[1; 32], "c"), body.as_bytes(), may_be_yaml);
        let kinds = names.kinds(Channel::ResponseBody);
        let mut words = Vec::new();
        for kind in kinds {
            let Kind::ObjectsNamed(named) = kind else { panic!("{kind:?}") };
            words.extend(named.objects.iter().map(|object| {
                let event = object.event.as_deref().unwrap_or_default();
                format!(
                    "{event}[{} {} {}/{} {}]",
                    object.api_version, object.kind, object.namespace, object.name, object.resource_version
                )
            }));
        }
        words.join(" ")
    }

    #[track_caller]
    fn check(body: &str, expected: Expect) {
        expected.assert_eq(&named(body, true));
    }

    #[test]
    fn objects_are_named_in_whatever_holds_them() {
        check(
            r#"{"kind":"Pod","apiVersion":"v1","metadata":{"name":"p","namespace":"a","resourceVersion":"7","labels":{"name":"x"}},"spec":{"metadata":{"name":"no"}}}"#,
            expect!["[v1 Pod a/p 7]"],
        );
        check(
            r#"{"kind":"PodList","apiVersion":"v1","metadata":{"resourceVersion":"9"},"items":[{"metadata":{"name":"p"}},{"kind":"Other","metadata":{"name":"q"}}]}"#,
            expect!["[v1 Pod /p ] [v1 Other /q ]"],
        );
        check(
            r#"{"type":"ADDED","object":{"kind":"Pod","apiVersion":"v1","metadata":{"name":"p"}}}"#,
            expect!["ADDED[v1 Pod /p ]"],
        );
        check(
            r#"{"type":"BOOKMARK","object":{"kind":"Pod","apiVersion":"v1","metadata":{"resourceVersion":"9"}}}"#,
            expect!["BOOKMARK[v1 Pod / 9]"],
        );
        check(
            r#"{"kind":"Table","apiVersion":"meta.k8s.io/v1","rows":[{"cells":["p"],"object":{"kind":"PartialObjectMetadata","apiVersion":"meta.k8s.io/v1","metadata":{"name":"p"}}}]}"#,
            expect!["[meta.k8s.io/v1 PartialObjectMetadata /p ]"],
        );
        check(
            r#"{"type":"DELETED","object":{"kind":"Table","apiVersion":"meta.k8s.io/v1","rows":[{"cells":["p"],"object":{"kind":"PartialObjectMetadata","apiVersion":"meta.k8s.io/v1","metadata":{"name":"p","resourceVersion":"8"}}}]}}"#,
            expect!["DELETED[meta.k8s.io/v1 PartialObjectMetadata /p 8]"],
        );
        check("kind: ConfigMap\nmetadata: {name: m, namespace: 7}\n", expect!["[ ConfigMap /m ]"]);
    }

    #[test]
    fn what_is_said_of_objects_behind_them_counts_as_well() {
        check(
            r#"{"object":{"apiVersion":"v1","kind":"Pod","metadata":{"name":"p"}},"type":"ADDED"}"#,
            expect!["ADDED[v1 Pod /p ]"],
        );
        check(
            r#"{"object":{"apiVersion":"v1","kind":"Pod","metadata":{"resourceVersion":"9"}},"type":"BOOKMARK"}"#,
            expect!["BOOKMARK[v1 Pod / 9]"],
        );
        check(r#"{"object":{"kind":"Status","metadata":{}},"type":"ERROR"}"#, expect!["ERROR[ Status / ]"]);
        check(r#"{"object":{"kind":"Status","metadata":{}}}"#, expect![""]);
        check(
            r#"{"object":{"rows":[{"object":{"kind":"PartialObjectMetadata","metadata":{"name":"p"}}}]},"type":"ADDED"}"#,
            expect!["ADDED[ PartialObjectMetadata /p ]"],
        );
        check(
            r#"{"apiVersion":"v1","items":[{"metadata":{"name":"p"}},{"kind":"Other","metadata":{"name":"q"}}],"kind":"PodList"}"#,
            expect!["[v1 Pod /p ] [ Other /q ]"],
        );
    }

    #[test]
    fn what_comes_before_a_cut_is_named_and_what_is_no_object_is_not() {
        check(
            r#"{"kind":"PodList","items":[{"metadata":{"name":"p"}},{"metadata":{"name":"q"},"spec"#,
            expect!["[ Pod /p ]"],
        );
        check(
            r#"{"kind":"Table","rows":[{"object":{"kind":"Pod","metadata":{"name":"p"}}},{"object":{"kind":"Pod","metadata":{"name":"q"}},"ce"#,
            expect!["[ Pod /p ] [ Pod /q ]"],
        );
        check(r#"{"rows":[{"object":{"kind":"Pod","metadata":{"name":""}},"ce"#, expect![""]);
        for body in [
            "",
            "[1]",
            "text",
            "{",
            r#"{"metadata":null,"items":null}"#,
            r#"{"metadata":{"name":"a\u0000"}}"#,
            "a: [",
            "- a",
        ] {
            check(body, expect![""]);
        }
        assert_eq!(named("metadata: {name: m}", false), "");
    }

    #[test]
    fn names_are_bounded() {
        let items = vec![serde_json::json!({"metadata": {"name": "p"}}); NAMED_MAX + 9];
        let mut names = Names::new(true);
        let body = serde_json::json!({"items": items}).to_string();
        names.read(&Masker::for_cluster(&[1; 32], "c"), body.as_bytes(), false);
        assert_eq!((names.objects.len(), names.left_out), (NAMED_MAX, 9));
        let mut none = Names::default();
        none.read(&Masker::for_cluster(&[1; 32], "c"), body.as_bytes(), false);
        assert_eq!(none, Names::default());
    }
}
