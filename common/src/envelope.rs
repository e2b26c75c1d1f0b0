//! The envelope of a frame: what a shipper needs to know of a value without parsing it.
//!
//! It holds the Kafka key, the CloudEvents attributes that become Kafka headers, flags and the id of the key that
//! encrypts the value. This is the only file that knows bincode (`=2.0.1`, unmaintained but pinned and contained,
//! see `docs/adr/0002-own-journal-format-and-bincode.md`); frames name the codec by a number, so that another one
//! can take its place without a new frame format. Sans-IO.
//!
//! Codec 1 is bincode 2's *standard* configuration: little endian, variable-length integers (below 251 one byte;
//! 251, 252, 253 announce 2, 4, 8 bytes), signed integers zigzag, a string as its length and its UTF-8 bytes, the
//! fields of a struct in their order without names. Hence the order of [`Envelope`]'s fields is the format.

use bincode::{
    Decode, Encode,
    config::{Configuration, Limit, LittleEndian, Varint},
};

/// Number of the codec in the frame header: bincode 2, standard configuration.
pub const CODEC_BINCODE_STANDARD: u8 = 1;

/// Most bytes of an encoded envelope.
pub const ENVELOPE_BYTES_MAX: usize = 4096;

/// What accompanies a value on its way. Encoded field by field, in this order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Envelope {
    /// Kafka key: the session's id; empty for events of the agent itself.
    pub key: String,
    /// CloudEvents `id`: `<epoch>/<sequence>`, with the frame's sequence.
    pub id: String,
    /// CloudEvents `type`, for example `weir.v1.requestOpened`.
    pub event_type: String,
    /// CloudEvents `source`: `/weir/<node>/<epoch>`.
    pub source: String,
    /// CloudEvents `time`, in microseconds since the Unix epoch.
    pub time_unix_us: i64,
    /// None defined yet: 0.
    pub flags: u32,
    /// Key that the value is encrypted with; 0: not encrypted.
    pub key_id: u64,
}

/// Why an envelope cannot be encoded or decoded.
#[derive(Debug, thiserror::Error)]
pub enum EnvelopeError {
    /// A frame made by a later version, or damage that no checksum saw.
    #[error("envelope codec {codec} is not known; read this journal with a later version")]
    UnknownCodec {
        /// The number in the frame header.
        codec: u8,
    },
    /// The bytes are not an envelope.
    #[error("envelope is not valid")]
    Invalid(#[source] bincode::error::DecodeError),
    /// There are bytes behind the envelope.
    #[error("envelope has {trailing} bytes too many")]
    Trailing {
        /// How many.
        trailing: usize,
    },
    /// Another encoding of the envelope than the one its encoder makes.
    #[error("envelope is not in its one encoding; something other than a Weir agent wrote it")]
    NotCanonical,
    /// The envelope is longer than a frame may carry.
    #[error("envelope is longer than {ENVELOPE_BYTES_MAX} bytes")]
    TooLong,
}

const CONFIGURATION: Configuration<LittleEndian, Varint, Limit<ENVELOPE_BYTES_MAX>> =
    bincode::config::standard().with_limit::<ENVELOPE_BYTES_MAX>();

impl Envelope {
    /// That of a checkpoint over the first `size` events of an epoch, which was signed at this time.
    pub fn of_checkpoint(node: &str, epoch: &str, size: u64, time_unix_us: i64) -> Self {
        Self {
            id: format!("{epoch}/{size}"),
            event_type: "weir.v1.checkpoint".to_owned(),
            source: format!("/weir/{node}/{epoch}"),
            time_unix_us,
            ..Self::default()
        }
    }

    /// Appends the envelope in codec [`CODEC_BINCODE_STANDARD`] and returns its length.
    ///
    /// # Errors
    /// The encoded envelope is longer than [`ENVELOPE_BYTES_MAX`]; `buffer` is as it was then.
    pub fn encode(&self, buffer: &mut Vec<u8>) -> Result<usize, EnvelopeError> {
        let start = buffer.len();
        let written = bincode::encode_into_std_write(self, buffer, CONFIGURATION);
        let length = buffer.len() - start;
        if written.is_err() || length > ENVELOPE_BYTES_MAX {
            buffer.truncate(start);
            return Err(EnvelopeError::TooLong);
        }
        Ok(length)
    }

    /// Decodes an envelope that fills `bytes`.
    ///
    /// # Errors
    /// The codec is not known, the bytes are not exactly one envelope, or [`Self::encode`] writes it differently.
    pub fn decode(codec: u8, bytes: &[u8]) -> Result<Self, EnvelopeError> {
        if codec != CODEC_BINCODE_STANDARD {
            return Err(EnvelopeError::UnknownCodec { codec });
        }
        if bytes.len() > ENVELOPE_BYTES_MAX {
            return Err(EnvelopeError::TooLong);
        }
        let (envelope, used) =
            bincode::decode_from_slice::<Self, _>(bytes, CONFIGURATION).map_err(EnvelopeError::Invalid)?;
        if used != bytes.len() {
            return Err(EnvelopeError::Trailing { trailing: bytes.len() - used });
        }
        // bincode reads a number in more bytes than it needs. No Merkle root covers the envelope: with one encoding
        // only, equal envelopes are equal bytes.
        let mut encoded = Vec::with_capacity(bytes.len());
        envelope.encode(&mut encoded)?;
        if encoded != bytes {
            return Err(EnvelopeError::NotCanonical);
        }
        Ok(envelope)
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use proptest::prelude::*;

    use super::{CODEC_BINCODE_STANDARD, ENVELOPE_BYTES_MAX, Envelope, EnvelopeError};

    fn sample() -> Envelope {
        Envelope {
            key: "s".into(),
            id: "e/300".into(),
            event_type: "weir.v1.gap".into(),
            source: "/weir/n/e".into(),
            time_unix_us: 1_700_000_000_000_000,
            flags: 0,
            key_id: 0,
        }
    }

    #[test]
    fn the_bytes_of_codec_1_are_golden() {
        let mut bytes = Vec::new();
        sample().encode(&mut bytes).unwrap();
        expect!["017305652f3330300b776569722e76312e676170092f776569722f6e2f65fd00803c3048140c000000"]
            .assert_eq(&hex::encode(&bytes));
        assert_eq!(Envelope::decode(CODEC_BINCODE_STANDARD, &bytes).unwrap(), sample());
    }

    #[test]
    fn other_codecs_trailing_bytes_and_long_envelopes_are_refused() {
        let mut bytes = Vec::new();
        sample().encode(&mut bytes).unwrap();
        assert!(matches!(Envelope::decode(2, &bytes), Err(EnvelopeError::UnknownCodec { codec: 2 })));
        bytes.push(0);
        assert!(matches!(Envelope::decode(1, &bytes), Err(EnvelopeError::Trailing { trailing: 1 })));
        let long = Envelope { key: "k".repeat(ENVELOPE_BYTES_MAX), ..sample() };
        let mut bytes = vec![7];
        assert!(matches!(long.encode(&mut bytes), Err(EnvelopeError::TooLong)));
        assert_eq!(bytes, [7]);
    }

    proptest! {
        #[test]
        fn decoding_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Envelope::decode(CODEC_BINCODE_STANDARD, &bytes);
        }

        #[test]
        fn what_is_encoded_decodes_to_itself(
            key in ".{0,40}", id in ".{0,40}", event_type in ".{0,40}", source in ".{0,40}",
            time_unix_us: i64, flags: u32, key_id: u64,
        ) {
            let envelope = Envelope { key, id, event_type, source, time_unix_us, flags, key_id };
            let mut bytes = Vec::new();
            envelope.encode(&mut bytes).unwrap();
            prop_assert_eq!(Envelope::decode(CODEC_BINCODE_STANDARD, &bytes).unwrap(), envelope);
        }
    }

    #[test]
    fn a_number_in_more_bytes_than_it_needs_is_refused() {
        let mut bytes = Vec::new();
        Envelope::default().encode(&mut bytes).unwrap();
        // The first field's length, 0, as a 16-bit number behind bincode's mark for one.
        let long = [&[251, 0, 0], &bytes[1..]].concat();
        let refused = Envelope::decode(CODEC_BINCODE_STANDARD, &long);
        assert!(matches!(refused, Err(EnvelopeError::NotCanonical)), "{refused:?}");
    }
}
