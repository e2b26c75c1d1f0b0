//! JSON and YAML read into memory within bounds: some bytes of a body can take a thousand times their length, and an alias in YAML
//! repeats whatever it stands for. Sans-IO.

use std::{cell::Cell, fmt};

use serde::{
    Deserializer,
    de::{DeserializeSeed, Error, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Value};

/// Most bytes of memory, as estimated, that one body takes once it is read.
const MEMORY_BYTES_MAX: usize = 128 * 1024 * 1024;

/// Of a value in its place, in a list that has grown.
const VALUE_BYTES: usize = 2 * size_of::<Value>();
/// Of a node of a map: it has room for eleven entries.
const MAP_BYTES: usize = 700;

/// What one body may still take.
#[derive(Debug)]
pub(super) struct Budget(Cell<usize>);

/// More than a body may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Exceeded;

impl Default for Budget {
    fn default() -> Self {
        Self(Cell::new(MEMORY_BYTES_MAX))
    }
}

impl Budget {
    /// Takes what a value with that many bytes of text costs.
    ///
    /// # Errors
    /// There is not as much left.
    pub(super) fn value(&self, text_bytes: usize) -> Result<(), Exceeded> {
        self.take(VALUE_BYTES.saturating_add(text_bytes))
    }

    /// Takes what the `number`th entry of a map costs, beside its value.
    ///
    /// # Errors
    /// As above.
    pub(super) fn entry(&self, number: usize, name_bytes: usize) -> Result<(), Exceeded> {
        let node = if number.is_multiple_of(11) { MAP_BYTES } else { 0 };
        self.take(node.saturating_add(name_bytes))
    }

    fn take(&self, bytes: usize) -> Result<(), Exceeded> {
        self.0.set(self.0.get().checked_sub(bytes).ok_or(Exceeded)?);
        Ok(())
    }
}

/// A JSON document, all of `body`; none if it is none, or too much.
pub(super) fn json(body: &[u8]) -> Option<Value> {
    let budget = Budget::default();
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let value = Reading { budget: &budget, merges: true }.deserialize(&mut deserializer).ok()?;
    deserializer.end().ok()?;
    Some(value)
}

/// A YAML document; none if it is none, or too much, or has merge keys (`<<`), whose entries a reader of the value would not find where
/// they are.
pub(super) fn yaml(body: &[u8]) -> Option<Value> {
    let budget = Budget::default();
    Reading { budget: &budget, merges: false }.deserialize(serde_yaml_ng::Deserializer::from_slice(body)).ok()
}

#[derive(Clone, Copy)]
struct Reading<'b> {
    budget: &'b Budget,
    /// Whether the key `<<` is one like any other.
    merges: bool,
}

impl Reading<'_> {
    fn scalar<E: Error>(self, value: Value, text_bytes: usize) -> Result<Value, E> {
        self.budget.value(text_bytes).map_err(|Exceeded| E::custom("too much"))?;
        Ok(value)
    }
}

impl<'de> DeserializeSeed<'de> for Reading<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Reading<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        self.scalar(value.into(), 0)
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        self.scalar(value.into(), 0)
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        self.scalar(value.into(), 0)
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        self.scalar(value.into(), 0)
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        self.scalar(Value::Null, 0)
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        self.scalar(value.into(), value.len())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = list.next_element_seed(self)? {
            entries.push(entry);
        }
        self.scalar(Value::Array(entries), 0)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries = Map::new();
        while let Some(name) = map.next_key::<String>()? {
            if !self.merges && name == "<<" {
                return Err(A::Error::custom("a merge key"));
            }
            let taken = self.budget.entry(entries.len(), name.len());
            taken.map_err(|Exceeded| A::Error::custom("too much"))?;
            entries.insert(name, map.next_value_seed(self)?);
        }
        self.scalar(Value::Object(entries), 0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::{json, yaml};

    #[test]
    fn what_takes_too_much_memory_is_not_read() {
        let list = |entry: &str, times: usize| format!("[{}]", vec![entry; times].join(","));
        assert!(json(list(r#"{"a":0}"#, 100_000).as_bytes()).is_some());
        assert!(json(list(r#"{"a":0}"#, 400_000).as_bytes()).is_none());
        // Each alias is 16,000 numbers.
        let aliases = |times: usize| format!("a: &a {}\nb: {}\n", list("0", 16_000), list("*a", times));
        assert_eq!(yaml(aliases(2).as_bytes()).unwrap()["b"][1][15_999], json!(0));
        assert_eq!(yaml(aliases(10_000).as_bytes()), None);
    }

    #[test]
    fn merge_keys_are_not_read() {
        assert_eq!(yaml(b"a: &a {value: x}\nb: {<<: *a, name: y}"), None);
        assert_eq!(json(br#"{"<<": 1}"#), Some(json!({"<<": 1})));
    }

    proptest! {
        #[test]
        fn what_is_read_is_what_serde_reads(text in "[\\[\\]{}\",:a0 .e-]{0,40}") {
            prop_assert_eq!(json(text.as_bytes()), serde_json::from_str::<Value>(&text).ok());
            // Of nothing serde makes null by itself, which is no body.
            prop_assume!(!text.trim().is_empty());
            prop_assert_eq!(yaml(text.as_bytes()), serde_yaml_ng::from_str::<Value>(&text).ok());
        }
    }
}
