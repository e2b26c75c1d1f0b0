//! What an object in Kubernetes' protobuf is called: as much of it as an audit event names.
//!
//! A body is `k8s\0` and a `runtime.Unknown` whose field 2 holds the object (k8s.io/apimachinery
//! `pkg/runtime/generated.proto`); an object's field 1 is its `ObjectMeta` (`pkg/apis/meta/v1/generated.proto`). Clients say both.

use serde_json::{Map, Value};

/// Numbers of fields of `ObjectMeta`, and what audit events call them.
const NAMED: [(u64, &str); 4] = [(1, "name"), (3, "namespace"), (5, "uid"), (6, "resourceVersion")];

/// Wire types of protobuf.
const VARINT: u64 = 0;
const EIGHT_BYTES: u64 = 1;
const LENGTH: u64 = 2;
const FOUR_BYTES: u64 = 5;

/// What a body's object is called; none if it is no such body.
pub(super) fn names(body: &[u8]) -> Option<Value> {
    let unknown = body.strip_prefix(b"k8s\0")?;
    let metadata = field(field(unknown, 2)?, 1)?;
    let named = NAMED.into_iter().filter_map(|(number, name)| {
        let text = std::str::from_utf8(field(metadata, number)?).ok()?;
        Some((name.to_owned(), Value::from(text)))
    });
    Some(Value::Object(named.collect::<Map<_, _>>()))
}

/// The first field of this number in a message; none if it has no length of its own.
fn field(mut message: &[u8], number: u64) -> Option<&[u8]> {
    loop {
        let tag = varint(&mut message)?;
        let length = match tag & 7 {
            VARINT => {
                varint(&mut message)?;
                continue;
            }
            EIGHT_BYTES => 8,
            FOUR_BYTES => 4,
            LENGTH => usize::try_from(varint(&mut message)?).ok()?,
            _ => return None,
        };
        let (content, rest) = message.split_at_checked(length)?;
        if tag >> 3 == number {
            return (tag & 7 == LENGTH).then_some(content);
        }
        message = rest;
    }
}

fn varint(message: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = message.split_first()?;
        *message = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::names;

    #[test]
    fn an_object_is_called_what_its_metadata_says() {
        // As `protoc` writes it: a ConfigMap `one` in `it`, with a creation time and data behind it.
        let metadata = b"\n\x03one\x12\x00\x1a\x02it\"\x00*\x00B\x00";
        let object = [&b"\n\x11"[..], metadata, b"\x12\x06\n\x01a\x12\x01b"].concat();
        let unknown =
            [&b"k8s\0\n\x0f\n\x02v1\x12\x09ConfigMap\x12\x1b"[..], &object, b"\x1a\x00\"\x00"].concat();
        assert_eq!(names(&unknown), Some(json!({"name": "one", "namespace": "it", "uid": ""})));
        for end in 0..unknown.len() - 4 {
            let cut = names(&unknown[..end]);
            assert_eq!(cut, None, "{end}");
        }
        assert_eq!(names(b"{}"), None);
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = names(&[&b"k8s\0"[..], &bytes].concat());
        }
    }
}
