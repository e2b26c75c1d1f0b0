//! Properties of the journal's parsers: frames, segments, envelopes, checkpoints, messages, wrapped keys, and what was removed.
//!
//! The `sealed` ones put right checksums over the input first: without that a fuzzer never comes past them.

use weir_common::{
    checkpoint::{Checkpoint, NoteSigner, NoteVerifier},
    encryption::{self, Identity, WrappedKey},
    envelope::{CODEC_BINCODE_STANDARD, Envelope},
    frame::{self, FRAME_HEADER_BYTES, FRAME_MAGIC, FRAME_VERSION},
    merkle::leaf_hash,
    message::{Kind, Message, Received},
    removed::Removed,
    segment::{SEGMENT_HEADER_BYTES, SegmentHeader, SegmentReader},
};

/// An envelope that is accepted is the one encoding of what it says: it is not under the Merkle root, so nothing
/// else would tell two encodings apart.
pub fn envelope(bytes: &[u8]) {
    if let Ok(envelope) = Envelope::decode(CODEC_BINCODE_STANDARD, bytes) {
        let mut again = Vec::new();
        let length = envelope.encode(&mut again).expect("what was decoded fits its limit");
        assert_eq!(length, again.len(), "the length told is the length written");
        assert_eq!(again, bytes, "an envelope was accepted and is encoded differently");
    }
}

/// A frame that is accepted is encoded to the same bytes again.
pub fn frame(bytes: &[u8]) {
    if let Ok((decoded, length)) = frame::decode(bytes) {
        assert!(length >= FRAME_HEADER_BYTES && length <= bytes.len(), "length {length} of {}", bytes.len());
        let mut again = Vec::new();
        let leaf = frame::encode(
            &mut again,
            decoded.frame_type,
            decoded.sequence,
            decoded.commit,
            &decoded.envelope,
            decoded.value,
        )
        .expect("what was decoded fits its limits");
        assert_eq!(leaf, decoded.leaf_hash);
        assert_eq!(again, bytes[..length], "a frame was accepted and is encoded differently");
    }
}

/// [`frame`] on the input with magic, version and right checksums.
pub fn sealed_frame(bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    if let Some(start) = bytes.first_chunk_mut::<5>() {
        start[..4].copy_from_slice(&FRAME_MAGIC);
        start[4] = FRAME_VERSION;
        seal(&mut bytes, 0);
    }
    frame(&bytes);
}

/// A message that is accepted is that of the frame that it becomes. The input is lines `name=value` of headers, an empty
/// line, the key, a line's end, and the value.
pub fn message(bytes: &[u8]) {
    let mut headers = Vec::new();
    let mut rest = bytes;
    let mut line = || {
        let end = rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len());
        let (line, behind) = rest.split_at(end);
        rest = behind.get(1..).unwrap_or_default();
        line
    };
    while let Some((name, value)) = split_header(line()) {
        headers.push((name, value));
    }
    let key = line();
    let Ok(received) = Received::parse(Some(key), headers, Some(rest)) else { return };
    let value = received.value;
    let frame = frame::Frame {
        frame_type: received.kind.frame_type(),
        sequence: received.kind.sequence(),
        commit: 0,
        leaf_hash: leaf_hash(value),
        envelope: received.envelope.clone(),
        value,
    };
    let message = Message::of_frame(&frame, received.verifier.as_deref());
    let headers = message.headers.iter().map(|(name, value)| (*name, Some(value.as_bytes())));
    let again = Received::parse(message.key.map(str::as_bytes), headers, Some(value));
    let again = again.expect("what became of a message becomes one again");
    // A frame has no id: what is made of it says when the note in its value was signed, whatever the id claimed that came.
    let kind = match received.kind {
        Kind::Checkpoint { size, .. } => Kind::Checkpoint { size, signed_unix_us: signed(value) },
        event @ Kind::Event { .. } => event,
    };
    assert_eq!((again.epoch, again.kind, again.envelope), (received.epoch, kind, received.envelope));
}

fn signed(note: &[u8]) -> Option<u64> {
    let checkpoint = Checkpoint::parse_unverified(std::str::from_utf8(note).ok()?).ok()?;
    u64::try_from(checkpoint.time_unix_us?).ok()
}

fn split_header(line: &[u8]) -> Option<(&str, Option<&[u8]>)> {
    let at = line.iter().position(|byte| *byte == b'=')?;
    Some((std::str::from_utf8(&line[..at]).ok()?, Some(&line[at + 1..])))
}

/// An account of removed segments that is accepted is encoded to the same bytes again; so is one with a right checksum.
pub fn removed(bytes: &[u8]) {
    let mut sealed = bytes.to_vec();
    let body = sealed.len().saturating_sub(4);
    let checksum = crc32c::crc32c(&sealed[..body]).to_le_bytes();
    let length = sealed.len() - body;
    sealed[body..].copy_from_slice(&checksum[..length]);
    for bytes in [bytes, &sealed] {
        if let Ok(removed) = Removed::decode(bytes) {
            assert_eq!(removed.encode(), bytes, "an account was accepted and is encoded differently");
        }
    }
}

/// Who the keys of the corpus are wrapped to: Bob of RFC 7748, section 6.1.
const IDENTITY: &str = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VuBCIEIF2rCH5iSopLeeF/i4OADuZvO7EpJhi2/Rwviyf/iODr\n-----END PRIVATE KEY-----\n";

/// A wrapped key that is accepted says the same when it is encoded again, and whatever it wraps, unwrapping ends without a panic.
/// Bytes that are the Kafka key of one are its only spelling.
pub fn wrapped_key(bytes: &[u8]) {
    if let Ok(wrapped) = WrappedKey::decode(bytes) {
        assert_eq!(WrappedKey::decode(&wrapped.encode()).as_ref(), Ok(&wrapped));
        let identity = Identity::from_pem(IDENTITY.as_bytes()).expect("a key");
        if let Ok(key) = wrapped.unwrap(&[identity]) {
            assert_eq!(key.number(), wrapped.key);
        }
    }
    if let Some((epoch, number)) = encryption::of_message_key(bytes) {
        assert_eq!(encryption::message_key(&epoch, number).as_bytes(), bytes);
    }
}

/// Reading a segment ends, goes forward only, tells how the segment ended, and gives only frames that stand there.
pub fn segment(bytes: &[u8]) {
    if let Ok(header) = SegmentHeader::decode(bytes) {
        let again = header.encode().expect("what was decoded fits its limits");
        assert_eq!(SegmentHeader::decode(&again).expect("an encoded header is valid"), header);
        let first = header.first_sequence;
        for successor in [None, Some(first), Some(first.saturating_add(2))] {
            read(bytes, successor);
        }
    }
}

/// [`segment`] on a valid header with the input behind it, every frame in it with right checksums.
pub fn sealed_segment(bytes: &[u8]) {
    let header = SegmentHeader {
        index: 0,
        first_sequence: 0,
        first_commit: 1,
        created_unix_us: 0,
        epoch: "01890a5d-ac96-774b-bcce-b302099a8057".parse().expect("is a UUID"),
        node: "node".to_owned(),
    };
    let mut sealed = header.encode().expect("is short").to_vec();
    sealed.extend_from_slice(bytes);
    let mut offset = SEGMENT_HEADER_BYTES;
    while let Some(rest) = sealed.get(offset..).filter(|rest| rest.len() >= FRAME_HEADER_BYTES) {
        offset += if rest.starts_with(&FRAME_MAGIC) { seal(&mut sealed, offset) } else { 1 };
    }
    segment(&sealed);
}

fn read(bytes: &[u8], successor: Option<u64>) {
    let mut reader = SegmentReader::new(bytes, successor).expect("its header was valid");
    let mut past = SEGMENT_HEADER_BYTES;
    let mut items = 0;
    for item in reader.by_ref() {
        items += 1;
        assert!(items <= bytes.len(), "more items than bytes: the reader does not go forward");
        if let Ok(located) = item {
            assert!(located.offset >= past, "frame at {} overlaps one before {past}", located.offset);
            let (there, length) = frame::decode(&bytes[located.offset..]).expect("a frame given can be read");
            assert_eq!(there, located.frame);
            past = located.offset + length;
        }
    }
    assert!(reader.tail().is_some(), "an exhausted reader says how the segment ended");
    assert!(reader.next().is_none(), "an exhausted reader stays so");
}

/// A checkpoint that is accepted begins with its own canonical text; no key verifies what it did not sign.
pub fn checkpoint(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(parsed) = Checkpoint::parse(text) {
        // Lines that are not known may stand between those that are.
        let required = Checkpoint { time_unix_us: None, tree: None, ..parsed.clone() }.text();
        assert!(text.starts_with(&required), "a checkpoint was accepted and is written differently");
        let lines = parsed.text();
        let known = lines.lines().all(|line| text.lines().any(|other| other == line));
        assert!(known, "an extension line was accepted and is written differently");
        assert_eq!(Checkpoint::parse(&parsed.text()).expect("its own text is valid"), parsed);
    }
    let signer = NoteSigner::from_seed("weir/node", &[7; 32]).expect("is a valid name");
    if let Ok(parsed) = Checkpoint::parse_unverified(text) {
        let verified = Checkpoint::verify(&parsed.sign(std::slice::from_ref(&signer)), signer.verifier());
        assert_eq!(verified.expect("its own signature verifies"), parsed);
    }
    // Nobody signed anything with this key.
    let stranger = NoteSigner::from_seed("weir/node", &[8; 32]).expect("is a valid name");
    assert!(Checkpoint::verify(text, stranger.verifier()).is_err(), "verified without a signature");
    if let Ok(verifier) = NoteVerifier::parse(text) {
        assert_eq!(verifier.to_string(), text.trim(), "a key was accepted and is written differently");
    }
}

/// Puts right hashes and checksums into the frame at `offset`, as far as its lengths lie within `bytes`; returns
/// how many bytes it covers, at least 1.
fn seal(bytes: &mut [u8], offset: usize) -> usize {
    let frame = &mut bytes[offset..];
    if frame.len() < FRAME_HEADER_BYTES {
        return 1;
    }
    let length =
        |at: usize| u32::from_le_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]]) as usize;
    let (value_at, end) = (FRAME_HEADER_BYTES + length(8), FRAME_HEADER_BYTES + length(8) + length(12));
    if let Some(body) = frame.get(FRAME_HEADER_BYTES..end) {
        let checksum = crc32c::crc32c(body);
        let leaf = leaf_hash(&frame[value_at..end]);
        frame[32..64].copy_from_slice(&leaf);
        frame[64..68].copy_from_slice(&checksum.to_le_bytes());
    }
    let checksum = crc32c::crc32c(&frame[..68]);
    frame[68..72].copy_from_slice(&checksum.to_le_bytes());
    if end <= frame.len() { end } else { FRAME_HEADER_BYTES }
}
