//! What a body is encoded with, and what is left of it when that is undone. Sans-IO.

use super::{gzip, protobuf, zstd};

/// A compressed body may become this many times its limit before it counts as cut.
const DECODED_FACTOR: usize = 4;

/// Why something is not decoded.
pub(super) const NOT_GZIP: &str = "is not the gzip it claims to be";
const NOT_ZSTD: &str = "is not the zstd it claims to be";

/// What a body is encoded with.
pub(super) enum Encoding {
    Identity,
    Gzip,
    Zstd,
    Unknown,
}

impl Encoding {
    /// By the header.
    pub(super) fn of(name: Option<&str>) -> Self {
        let name = name.map(str::trim).unwrap_or_default();
        let is = |names: &[&str]| names.iter().any(|of| name.eq_ignore_ascii_case(of));
        match () {
            () if is(&["", "identity"]) => Self::Identity,
            () if is(&["gzip", "x-gzip"]) => Self::Gzip,
            () if is(&["zstd"]) => Self::Zstd,
            () => Self::Unknown,
        }
    }
}

/// What became of a body's encoding.
pub(super) enum Decoded {
    /// Nothing: there was none.
    Plain,
    Undone {
        encoding: &'static str,
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
        // A few bytes of text would count as a header that is cut.
        let begins = |magic: &[u8]| wire.is_empty() || wire.starts_with(magic);
        let (encoding, decoded, reason) = match Encoding::of(encoding) {
            Encoding::Identity => return Self::Plain,
            Encoding::Unknown => return Self::Unread("has a content encoding that is not decoded"),
            Encoding::Gzip => {
                let decoded = begins(&gzip::MAGIC).then(|| gzip::decode(wire, decoded_max).ok());
                ("gzip", decoded.flatten(), NOT_GZIP)
            }
            Encoding::Zstd => {
                let decoded = begins(&zstd::MAGIC).then(|| zstd::decode(wire, decoded_max).ok());
                ("zstd", decoded.flatten(), NOT_ZSTD)
            }
        };
        match decoded {
            Some((content, whole)) => Self::Undone { encoding, content, whole },
            None => Self::Unread(reason),
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
