//! A recorded body put together from its pieces, as far as a projection wants it: whole, JSON, and of bounded size.

use serde_json::Value;
use weir_common::event::{Bytes, Content};

/// Most bytes of one body: what the agent records of one at most.
pub(super) const BODY_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Why a body is not shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Missing {
    /// It is not JSON, or nested deeper than is read.
    NotJson,
    /// Only recipients may read it.
    Encrypted,
    /// Pieces of it are not there, or the record is cut.
    NotWhole,
    /// It is larger than is put together, or others took the room.
    TooLarge,
}

impl Missing {
    pub(super) fn text(self) -> &'static str {
        match self {
            Self::NotJson => "not JSON",
            Self::Encrypted => "encrypted",
            Self::NotWhole => "not whole",
            Self::TooLarge => "too large",
        }
    }
}

/// What is there of a body.
#[derive(Debug)]
pub(super) struct Body {
    bytes: Result<Vec<u8>, Missing>,
}

impl Default for Body {
    fn default() -> Self {
        Self { bytes: Ok(Vec::new()) }
    }
}

impl Body {
    /// Length of what is held.
    pub(super) fn held_bytes(&self) -> usize {
        self.bytes.as_ref().map_or(0, Vec::len)
    }

    /// Puts a piece behind the others. One that came before is passed over: a topic may have it twice.
    pub(super) fn add(&mut self, content: &Content) {
        let Ok(held) = &mut self.bytes else { return };
        let piece = match &content.bytes {
            Bytes::Encrypted { .. } => Err(Missing::Encrypted),
            bytes => bytes.to_vec().map_err(|_| Missing::NotWhole),
        };
        let offset = usize::try_from(content.offset).unwrap_or(usize::MAX);
        match piece {
            Ok(piece) if offset.saturating_add(piece.len()) <= held.len() => {}
            Ok(_) if offset != held.len() => self.drop_for(Missing::NotWhole),
            Ok(piece) if held.len() + piece.len() > BODY_BYTES_MAX => self.drop_for(Missing::TooLarge),
            Ok(piece) => held.extend(piece),
            Err(missing) => self.drop_for(missing),
        }
    }

    /// Lets go of what is held.
    pub(super) fn drop_for(&mut self, missing: Missing) {
        self.bytes = Err(missing);
    }

    /// What is held of it.
    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.as_deref().unwrap_or_default()
    }

    /// Its object; none if there is no body. `recorded_bytes` is what the record says its length is.
    pub(super) fn object(&self, recorded_bytes: Option<u64>) -> Result<Option<Value>, Missing> {
        let bytes = self.bytes.as_deref().map_err(|missing| *missing)?;
        if recorded_bytes.is_some_and(|recorded| recorded != bytes.len() as u64) {
            return Err(Missing::NotWhole);
        }
        if bytes.is_empty() {
            return Ok(None);
        }
        serde_json::from_slice(bytes).map(Some).map_err(|_| Missing::NotJson)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use weir_common::event::{Bytes, Channel, Content};

    use super::{BODY_BYTES_MAX, Body, Missing};

    fn piece(offset: u64, bytes: &[u8]) -> Content {
        Content { channel: Channel::RequestBody, connection: None, offset, bytes: Bytes::from_slice(bytes) }
    }

    fn of(pieces: &[Content]) -> Body {
        let mut body = Body::default();
        pieces.iter().for_each(|piece| body.add(piece));
        body
    }

    #[test]
    fn pieces_are_put_together_also_those_that_come_twice() {
        let body = of(&[piece(0, b"{\"a\""), piece(0, b"{\"a\""), piece(4, b":1}"), piece(4, b":1}")]);
        assert_eq!(body.object(Some(7)), Ok(Some(json!({"a": 1}))));
        assert_eq!(body.object(Some(8)), Err(Missing::NotWhole));
        assert_eq!(of(&[]).object(None), Ok(None));
    }

    #[test]
    fn what_is_not_shown_says_why_and_takes_no_room() {
        let encrypted = Content { bytes: Bytes::Encrypted { key: 1, data: String::new() }, ..piece(0, b"") };
        let half = vec![b' '; BODY_BYTES_MAX / 2 + 1];
        for (pieces, missing) in [
            (vec![piece(1, b"{}")], Missing::NotWhole),
            (vec![piece(0, b"{}"), piece(1, b"}}")], Missing::NotWhole),
            (vec![encrypted], Missing::Encrypted),
            (vec![piece(0, b"k8s\0\xff")], Missing::NotJson),
            (vec![piece(0, "[".repeat(200).as_bytes())], Missing::NotJson),
            (vec![piece(0, &half), piece(half.len() as u64, &half)], Missing::TooLarge),
        ] {
            let body = of(&pieces);
            assert_eq!(body.object(None), Err(missing));
            assert!(missing == Missing::NotJson || body.held_bytes() == 0);
        }
    }
}
