//! What a body is encoded with, and what is left of it when that is undone. Sans-IO.

use super::{gzip, protobuf};

/// A compressed body may become this many times its limit before it counts as cut.
const DECODED_FACTOR: usize = 4;

/// Why something is not decoded.
pub(super) const NOT_GZIP: &str = "is not the gzip it claims to be";

/// What a body is encoded with.
pub(super) enum Encoding {
    Identity,
    Gzip,
    Unknown,
}

impl Encoding {
    /// By the header.
    pub(super) fn of(name: Option<&str>) -> Self {
        match name.map(str::trim) {
            None | Some("") => Self::Identity,
            Some(name) if name.eq_ignore_ascii_case("identity") => Self::Identity,
            Some(name) if name.eq_ignore_ascii_case("gzip") || name.eq_ignore_ascii_case("x-gzip") => {
                Self::Gzip
            }
            Some(_) => Self::Unknown,
        }
    }
}

/// What became of a body's encoding.
pub(super) enum Decoded {
    /// Nothing: there was none.
    Plain,
    Gzip {
        content: Vec<u8>,
        whole: bool,
    },
    /// It could not be undone.
    Unread(&'static str),
}

impl Decoded {
    /// Of a body of which at most `bytes_max` are recorded.
    pub(super) fn of(encoding: Option<&str>, wire: &[u8], bytes_max: usize) -> Self {
        let decoded_max = bytes_max.saturating_mul(DECODED_FACTOR);
        match Encoding::of(encoding) {
            Encoding::Identity => Self::Plain,
            Encoding::Unknown => Self::Unread("has a content encoding that is not decoded"),
            // A few bytes of text would count as a header that is cut.
            Encoding::Gzip if !wire.is_empty() && !wire.starts_with(&gzip::MAGIC) => Self::Unread(NOT_GZIP),
            Encoding::Gzip => match gzip::decode(wire, decoded_max) {
                Ok((content, whole)) => Self::Gzip { content, whole },
                Err(_) => Self::Unread(NOT_GZIP),
            },
        }
    }
}

/// Whether something reads these bytes as they are, or says that it cannot.
pub(super) fn is_readable(content: &[u8]) -> bool {
    let is_text = match std::str::from_utf8(content) {
        Ok(_) => true,
        // Cut within a character.
        Err(error) => error.error_len().is_none(),
    };
    is_text || content.starts_with(protobuf::MAGIC)
}
