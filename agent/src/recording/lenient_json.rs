//! JSON that the API server's decoder takes and ours does not, made such that ours does: halves of surrogate pairs and bytes that
//! are no UTF-8 become U+FFFD, as Go reads them; numbers beyond all bounds become texts; what is nested too deep has one mask. Sans-IO.
//!
//! Only for what could not be parsed and would have to be withheld. What Go would refuse, too, is refused.

use super::mask::Masker;

/// Deepest nesting that is kept; `serde_json` reads 127, Go 10,000.
const DEPTH_MAX: usize = 120;

/// What stands for half of a pair.
const REPLACEMENT: &[u8] = br"\ufffd";

/// JSON that can be parsed.
#[derive(Debug)]
pub(super) struct Repaired {
    pub(super) text: Vec<u8>,
    /// Containers that were too deep.
    pub(super) masks: u64,
}

/// The same document, as far as it can be kept; none: it is not JSON, or becomes too long.
pub(super) fn repaired(masker: &Masker, text: &[u8]) -> Option<Repaired> {
    let mut scanner = Scanner { rest: text, out: Vec::with_capacity(text.len()), masks: 0 };
    let bytes_max = text.len().saturating_mul(2);
    let mut depth = 0;
    while let Some(first) = scanner.rest.first() {
        match first {
            b'"' => scanner.string()?,
            b'{' | b'[' if depth == DEPTH_MAX => scanner.container(masker)?,
            b'{' | b'[' => {
                depth += 1;
                scanner.keep(1);
            }
            b'}' | b']' => {
                depth = depth.checked_sub(1)?;
                scanner.keep(1);
            }
            b'-' | b'0'..=b'9' => scanner.number(),
            _ => scanner.keep(1),
        }
        if scanner.out.len() > bytes_max {
            return None;
        }
    }
    let text = match String::from_utf8(scanner.out) {
        Ok(text) => text.into_bytes(),
        Err(error) => String::from_utf8_lossy(error.as_bytes()).into_owned().into_bytes(),
    };
    Some(Repaired { text, masks: scanner.masks })
}

struct Scanner<'a> {
    rest: &'a [u8],
    out: Vec<u8>,
    masks: u64,
}

impl Scanner<'_> {
    fn keep(&mut self, bytes: usize) {
        let (kept, rest) = self.rest.split_at(bytes.min(self.rest.len()));
        self.out.extend_from_slice(kept);
        self.rest = rest;
    }

    /// A string; none where it does not end.
    fn string(&mut self) -> Option<()> {
        self.keep(1);
        loop {
            let plain = self.rest.iter().position(|byte| matches!(byte, b'"' | b'\\'))?;
            self.keep(plain);
            if self.rest.first() == Some(&b'"') {
                self.keep(1);
                return Some(());
            }
            match (escaped(self.rest), self.rest.get(6..).and_then(escaped)) {
                (Some(0xd800..=0xdbff), Some(0xdc00..=0xdfff)) => self.keep(12),
                (Some(0xd800..=0xdfff), _) => {
                    self.out.extend_from_slice(REPLACEMENT);
                    self.rest = self.rest.get(6..)?;
                }
                _ => self.keep(2),
            }
        }
    }

    fn number(&mut self) {
        let is_part = |byte: &u8| matches!(byte, b'0'..=b'9' | b'+' | b'-' | b'.' | b'e' | b'E');
        let length = self.rest.iter().position(|byte| !is_part(byte)).unwrap_or(self.rest.len());
        let number = self.rest.get(..length).and_then(|number| std::str::from_utf8(number).ok());
        let is_endless = number.and_then(|number| number.parse::<f64>().ok()).is_some_and(f64::is_infinite);
        let quote: &[u8] = if is_endless { b"\"" } else { b"" };
        self.out.extend_from_slice(quote);
        self.keep(length);
        self.out.extend_from_slice(quote);
    }

    /// A container that is too deep: its mask. None where it does not end.
    fn container(&mut self, masker: &Masker) -> Option<()> {
        let (mut open, mut in_string, mut is_escaped) = (0_usize, false, false);
        let end = self.rest.iter().position(|byte| {
            match byte {
                _ if is_escaped => is_escaped = false,
                b'\\' if in_string => is_escaped = true,
                b'"' => in_string = !in_string,
                b'{' | b'[' if !in_string => open += 1,
                b'}' | b']' if !in_string => open = open.saturating_sub(1),
                _ => {}
            }
            open == 0
        })?;
        let (deep, rest) = self.rest.split_at(end + 1);
        self.out.extend_from_slice(format!("\"{}\"", masker.mask(deep)).as_bytes());
        self.masks += 1;
        self.rest = rest;
        Some(())
    }
}

/// The code unit of an escape `\uXXXX`.
fn escaped(text: &[u8]) -> Option<u16> {
    let digits = text.strip_prefix(br"\u")?.first_chunk::<4>()?;
    if !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    u16::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::{DEPTH_MAX, repaired};
    use crate::recording::{
        body::{self, Recorded, Sensitivity},
        mask::Masker,
        names::Names,
    };

    fn masker() -> Masker {
        Masker::for_cluster(&[1; 32], "c")
    }

    fn read(text: &[u8]) -> Option<Value> {
        serde_json::from_slice(&repaired(&masker(), text)?.text).ok()
    }

    #[test]
    fn what_go_reads_is_read_as_go_reads_it() {
        for (text, expected) in [
            (&br#"["\ud800"]"#[..], json!(["\u{fffd}"])),
            (br#"["\udc00\ud83d\ude00\ud83dx\ud83d\u0041"]"#, json!(["\u{fffd}\u{1f600}\u{fffd}x\u{fffd}A"])),
            (br#"{"\ud800":"\\ud800"}"#, json!({"\u{fffd}": "\\ud800"})),
            (b"[\"a\xff\"]", json!(["a\u{fffd}"])),
            (
                b"[1e400,-1e999,1.5,12345678901234567890123]",
                json!(["1e400", "-1e999", 1.5, 12345678901234567890123_f64]),
            ),
        ] {
            assert_eq!(read(text), Some(expected), "{}", String::from_utf8_lossy(text));
        }
        for text in [
            &b"[\"a"[..],
            br#"["\"#,
            br#"["\u12"]"#,
            b"]",
            b"{\"a\" 1}",
            b"[\"\n\"]",
            b"\xff",
            b"[1e400",
            b"[1e4e400]",
        ] {
            assert_eq!(read(text), None, "{}", String::from_utf8_lossy(text));
        }
    }

    /// `depth` lists in each other, around this.
    fn nested(depth: usize, within: &str) -> String {
        format!("{}{within}{}", "[".repeat(depth), "]".repeat(depth))
    }

    #[test]
    fn what_is_too_deep_has_one_mask_and_all_around_it_is_kept() {
        let text = format!(r#"{{"a":{},"b":1}}"#, nested(5000, r#""]hunter2\"""#));
        let made = repaired(&masker(), text.as_bytes()).unwrap();
        assert_eq!(made.masks, 1);
        let value: Value = serde_json::from_slice(&made.text).unwrap();
        assert_eq!(value["b"], 1);
        let mask = masker().mask(nested(5000 - (DEPTH_MAX - 1), r#""]hunter2\"""#).as_bytes());
        assert!(value.to_string().contains(&mask) && !value.to_string().contains("hunter2"), "{value}");
        assert_eq!(read(nested(DEPTH_MAX, "1").as_bytes()).unwrap().to_string(), nested(DEPTH_MAX, "1"));
        // Many that are short would become many masks.
        let many = format!("{}{}", nested(DEPTH_MAX, ""), "");
        let many = many.replace("[]", &format!("[{}[]]", "[],".repeat(9999)));
        assert!(repaired(&masker(), many.as_bytes()).is_none());
    }

    #[test]
    fn a_secret_in_json_that_only_go_reads_is_recorded_with_masks_and_named() {
        for odd in [r#""\ud800""#, &nested(300, r#""hunter2""#), "1e400"] {
            let body = format!(
                r#"{{"kind":"Secret","metadata":{{"labels":{{"x":{odd}}},"name":"s"}},"data":{{"a":"aHVudGVyMg=="}},"stringData":{{"b":"hunter2\udead"}}}}"#
            );
            let mut names = Names::new(true);
            let recorded = body::record(
                &masker(),
                Sensitivity::None,
                Some("application/json"),
                body.as_bytes(),
                true,
                &mut names,
            );
            let Recorded::Masked { content, .. } = recorded else { panic!("{recorded:?}") };
            let value: Value = serde_json::from_slice(&content).unwrap();
            assert!(!value.to_string().contains("hunter2"), "{value}");
            assert_eq!(value["data"]["a"], masker().mask(b"hunter2"));
            assert_eq!(value["metadata"]["name"], "s");
            assert_eq!(names.kinds(weir_common::event::Channel::RequestBody).len(), 1);
        }
    }

    fn values() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            (-1e9..1e9).prop_map(Value::from),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(5, 40, 5, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                proptest::collection::btree_map(any::<String>(), inner, 0..5)
                    .prop_map(|entries| Value::Object(entries.into_iter().collect())),
            ]
        })
    }

    /// JSON with every character in texts as an escape.
    fn escaped(value: &Value) -> String {
        let text = |text: &str| {
            let units: String = text.encode_utf16().map(|unit| format!("\\u{unit:04x}")).collect();
            format!("\"{units}\"")
        };
        match value {
            Value::String(string) => text(string),
            Value::Array(list) => format!("[{}]", list.iter().map(escaped).collect::<Vec<_>>().join(" ,\n")),
            Value::Object(map) => {
                let entries = map.iter().map(|(name, value)| format!("{}: {}", text(name), escaped(value)));
                format!("{{{}}}", entries.collect::<Vec<_>>().join(","))
            }
            plain => plain.to_string(),
        }
    }

    proptest! {
        #[test]
        fn json_that_is_read_anyway_stays_the_same(value in values()) {
            for text in [value.to_string(), escaped(&value)] {
                let made = repaired(&masker(), text.as_bytes()).unwrap();
                prop_assert_eq!(made.masks, 0);
                prop_assert_eq!(serde_json::from_slice::<Value>(&made.text).ok(), serde_json::from_str(&text).ok());
            }
        }

        #[test]
        fn no_bytes_panic(text in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = repaired(&masker(), &text);
        }
    }
}
