//! Ids of traces: random ones, and those that a client sends in W3C's `traceparent`.

use http::HeaderMap;

/// Where W3C has a client say which trace its request is part of.
const TRACEPARENT: &str = "traceparent";

/// A span of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Context {
    /// Never all zeros.
    pub(super) trace: [u8; 16],
    /// Never all zeros.
    pub(super) span: [u8; 8],
}

impl Context {
    /// A trace of its own.
    pub(super) fn new() -> Self {
        Self { trace: rand::random(), span: span() }
    }

    /// What a client says: to be linked, not to be believed. None if it says nothing, twice, or what is no
    /// `traceparent` (<https://www.w3.org/TR/trace-context/#traceparent-header>).
    pub(crate) fn of_client(headers: &HeaderMap) -> Option<Self> {
        let mut values = headers.get_all(TRACEPARENT).iter();
        let (value, None) = (values.next()?.to_str().ok()?, values.next()) else { return None };
        let mut parts = value.split('-');
        let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        // Later versions may have more behind it; ff is none.
        let fits = match lower_hex::<1>(version)? {
            [0] => parts.next().is_none(),
            [version] => version != 0xff,
        };
        lower_hex::<1>(flags)?;
        let context = Self { trace: lower_hex(trace)?, span: lower_hex(span)? };
        (fits && context.trace != [0; 16] && context.span != [0; 8]).then_some(context)
    }
}

/// Whether a trace is among so many of a hundred, by its id, which is random.
pub(super) fn is_sampled(context: &Context, percent: u8) -> bool {
    let [first, second, ..] = context.trace;
    u32::from(u16::from_be_bytes([first, second])) * 100 < u32::from(percent) * 65536
}

/// A random id that is not zero.
pub(super) fn span() -> [u8; 8] {
    rand::random::<u64>().max(1).to_be_bytes()
}

fn lower_hex<const BYTES: usize>(text: &str) -> Option<[u8; BYTES]> {
    let is_lower = text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let mut bytes = [0; BYTES];
    (is_lower && hex::decode_to_slice(text, &mut bytes).is_ok()).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, HeaderValue};

    use super::{Context, is_sampled};

    const VALID: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn of(values: &[&str]) -> Option<Context> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append("traceparent", HeaderValue::from_str(value).expect("a value"));
        }
        Context::of_client(&headers)
    }

    #[test]
    fn a_traceparent_is_read_and_what_is_none_is_not() {
        let read = of(&[VALID]).expect("is one");
        assert_eq!(hex::encode(read.trace), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(hex::encode(read.span), "00f067aa0ba902b7");
        assert!(of(&[&VALID.replace("00-4", "cc-4"), ""][..1]).is_some());
        assert!(of(&[&format!("{}-more", VALID.replace("00-4", "01-4"))]).is_some());
        for wrong in [
            String::new(),
            VALID.to_uppercase(),
            VALID.replace("00-4", "ff-4"),
            format!("{VALID}-more"),
            VALID.replace("00f067aa0ba902b7", "0000000000000000"),
            VALID.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)),
            VALID.replace("-01", ""),
            VALID.replace("4bf9", "4bf"),
        ] {
            assert_eq!(of(&[&wrong]), None, "{wrong}");
        }
        assert_eq!(of(&[VALID, VALID]), None);
        assert_eq!(of(&[]), None);
    }

    #[test]
    fn so_many_of_a_hundred_are_sampled() {
        let sampled = |percent| (0..10_000).filter(|_| is_sampled(&Context::new(), percent)).count();
        assert_eq!(sampled(100), 10_000);
        let tenth = sampled(10);
        assert!((500..1500).contains(&tenth), "{tenth}");
    }
}
