//! JSON that is cut: what is whole in it, closed so that it can be parsed. Sans-IO.

/// Deepest nesting; `serde_json` reads no deeper.
const DEPTH_MAX: usize = 128;

/// The beginning of a JSON document up to the last value that is whole, with what is open there closed. None: nothing is whole.
pub(super) fn closed(text: &[u8]) -> Option<Vec<u8>> {
    // What closes each container that is open.
    let mut open: Vec<u8> = Vec::new();
    // Up to where all is whole. Nothing is opened or closed from there on.
    let mut whole = None;
    let (mut in_string, mut is_escaped) = (false, false);
    for (at, byte) in text.iter().enumerate() {
        if in_string {
            match byte {
                _ if is_escaped => is_escaped = false,
                b'\\' => is_escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'{' | b'[' => {
                if open.len() == DEPTH_MAX {
                    return None;
                }
                open.push(if *byte == b'{' { b'}' } else { b']' });
                whole = Some(at + 1);
            }
            b'}' | b']' => {
                if open.pop() != Some(*byte) {
                    return None;
                }
                whole = Some(at + 1);
            }
            // The value before it is whole.
            b',' => whole = Some(at),
            _ => {}
        }
    }
    let mut closed = text.get(..whole?)?.to_vec();
    closed.extend(open.iter().rev());
    Some(closed)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::closed;

    #[test]
    fn what_is_whole_stays_and_what_is_cut_goes() {
        for (text, expected) in [
            (r#"{"a":1,"b":{"c":"x,]}","d":"y"#, json!({"a": 1, "b": {"c": "x,]}"}})),
            (r#"{"a":[1,2"#, json!({"a": [1]})),
            (r#"{"a":"#, json!({})),
            (r#"{"a":1}"#, json!({"a": 1})),
        ] {
            let value: Value = serde_json::from_slice(&closed(text.as_bytes()).unwrap()).unwrap();
            assert_eq!(value, expected, "{text}");
        }
        assert_eq!(closed(b"\"text"), None);
        assert_eq!(closed(&[b'['; 200]), None);
    }

    proptest! {
        #[test]
        fn whatever_is_cut_can_be_parsed(keys in proptest::collection::vec("[a-z\"\\\\,{}]{0,6}", 1..5), cut in 0_usize..200) {
            let value = json!({"items": keys.iter().map(|key| json!({key: [key, 1.5, null, {"x": key}]})).collect::<Vec<_>>()});
            let text = value.to_string();
            let begun = closed(&text.as_bytes()[..cut.min(text.len())]);
            prop_assert_eq!(begun.is_none(), cut == 0);
            if let Some(begun) = begun {
                prop_assert!(serde_json::from_slice::<Value>(&begun).is_ok(), "{}", String::from_utf8_lossy(&begun));
            }
        }
    }
}
