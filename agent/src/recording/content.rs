//! From the bytes of a body to what is recorded of it: decoded, masked, cut, digested, split. Sans-IO.
//!
//! [`reduce`] takes a body that was held; [`Streamed`] takes one piece by piece as it comes (watch, logs). Whatever is
//! left out is said in the summary or in a gap.

use std::borrow::Cow;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use weir_common::event::{BodySummary, Channel, Kind};

use super::{
    body::{self, Cause, Recorded, Sensitivity},
    cbor::{self, Sequence},
    encoding::{Decoded, Encoding, NOT_GZIP, is_readable},
    frames::{Frame, Frames, HEADER},
    gzip::Gunzip,
    mask::{KeyedDigest, Masker},
    names::Names,
    protobuf,
    sieve::Sieve,
    split::split,
};

/// Most bytes of one line (one event) of a watch; of one whose events have their length before them, too.
const LINE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Why the rest of a line is not recorded.
const LINE_LEFT_OUT: &str = "rest of a watch event or line that is left out";

/// See [`Held::is_small`].
const SMALL_BYTES_MAX: usize = 64 * 1024;

/// A body that was held while it passed.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// Its first bytes.
    pub(super) chunks: Vec<Bytes>,
    /// Length of the whole.
    pub(super) wire_bytes: u64,
    /// Why `chunks` is not the whole, if it is not, and the keyed digest of the whole if it was taken.
    pub(super) cut: Option<(String, Option<String>)>,
    pub(super) content_type: Option<String>,
    pub(super) content_encoding: Option<String>,
    /// Most bytes that are recorded.
    pub(super) bytes_max: usize,
    /// Whether objects in text are named: no other place says which they are.
    pub(super) names_text: bool,
}

impl Held {
    /// Whether it is masked in the task that has it, not on a thread for what takes long: a compressed one may be many times as
    /// long as it looks.
    pub(super) fn is_small(&self) -> bool {
        self.content_encoding.is_none()
            && self.chunks.iter().map(Bytes::len).sum::<usize>() <= SMALL_BYTES_MAX
    }

    fn bytes(&self) -> Cow<'_, [u8]> {
        match &self.chunks[..] {
            [one] => Cow::Borrowed(one),
            many => Cow::Owned(many.concat()),
        }
    }
}

/// What is recorded of a body.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) content: Vec<u8>,
    pub(super) summary: BodySummary,
    /// Objects in it.
    pub(super) names: Names,
    /// Why nothing of it is recorded, where it could not be read.
    pub(super) unread: Option<&'static str>,
}

fn sha256(content: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(content)))
}

/// The keyed digest of what is not recorded.
pub(super) fn keyed(masker: &Masker, content: &[u8]) -> String {
    let mut digest = masker.digest();
    digest.update(content);
    digest.finish()
}

/// CBOR as JSON, which is recorded in its place, with its type; anything else as it is.
fn as_json<'a>(
    held: &'a Held,
    content: Cow<'a, [u8]>,
    summary: &mut BodySummary,
) -> (Cow<'a, [u8]>, Option<&'a str>) {
    let content_type = held.content_type.as_deref();
    let Some(json) = cbor::as_json(content_type, &content) else { return (content, content_type) };
    summary.decoded = Some(match summary.decoded.take() {
        Some(encoding) => format!("{encoding}, cbor"),
        None => "cbor".to_owned(),
    });
    (json.into(), Some("application/json"))
}

/// What is recorded of an answer's body that was held.
pub(super) fn reduce_answer(masker: &Masker, sensitivity: Sensitivity, held: &Held) -> Kept {
    reduced(masker, sensitivity, held, true)
}

/// What is recorded of a request's body that was held. API servers do not look at the encoding of a request: where it is not what
/// the header says, the bytes are read as they are.
pub(super) fn reduce(masker: &Masker, sensitivity: Sensitivity, held: &Held) -> Kept {
    reduced(masker, sensitivity, held, false)
}

fn reduced(masker: &Masker, sensitivity: Sensitivity, held: &Held, is_answer: bool) -> Kept {
    let wire = held.bytes();
    let mut summary = BodySummary { wire_bytes: held.wire_bytes, ..BodySummary::default() };
    let mut truncated = held.cut.as_ref().map(|(reason, _)| reason.clone());
    let mut unread = None;
    let content = match Decoded::of(held.content_encoding.as_deref(), &wire, held.bytes_max) {
        Decoded::Plain => Cow::Borrowed(&wire[..]),
        Decoded::Undone { encoding, content, whole } => {
            summary.decoded = Some(encoding.to_owned());
            if !whole && truncated.is_none() {
                truncated = Some("decoded content is cut".to_owned());
            }
            Cow::Owned(content)
        }
        Decoded::Unread(reason) => {
            unread = Some(reason);
            Cow::Borrowed(&wire[..])
        }
    };
    let whole = truncated.is_none();
    let (content, content_type) = if whole && (unread.is_none() || !is_answer) {
        as_json(held, content, &mut summary)
    } else {
        (content, held.content_type.as_deref())
    };
    let mut names = Names::new(held.names_text);
    let recorded = match unread.take().filter(|_| is_answer || !is_readable(&content)) {
        Some(reason) if body::may_hide(masker, sensitivity, &content) => {
            Recorded::Withheld { reason, cause: Cause::Unread }
        }
        Some(_) => Recorded::Clear(&content),
        None => body::record(masker, sensitivity, content_type, &content, whole, &mut names),
    };
    let (mut kept, unmasked) = match recorded {
        Recorded::Clear(bytes) => (bytes.to_vec(), true),
        Recorded::Masked { content, masks } => {
            summary.masked = masks;
            (content, masks == 0)
        }
        Recorded::Withheld { reason, cause } => {
            summary.masked = 1;
            unread = Some(reason).filter(|_| cause == Cause::Unread);
            truncated = Some(match truncated {
                Some(cut) => format!("withheld: {reason} ({cut})"),
                None => format!("withheld: {reason}"),
            });
            (Vec::new(), false)
        }
    };
    if kept.len() > held.bytes_max {
        truncated.get_or_insert_with(|| format!("recorded content is longer than {} bytes", held.bytes_max));
        kept.truncate(held.bytes_max);
    }
    summary.digest = match (&held.cut, &truncated, unmasked) {
        (Some((_, digest)), _, _) => digest.clone(),
        (None, None, true) => Some(sha256(&kept)),
        (None, _, _) => Some(keyed(masker, if whole { &content } else { &wire })),
    };
    summary.recorded_bytes = kept.len() as u64;
    summary.truncated = truncated;
    Kept { content: kept, summary, names, unread }
}

/// A response body that is recorded while it comes.
#[derive(Debug)]
pub(super) struct Streamed {
    sensitivity: Sensitivity,
    content_type: Option<String>,
    gunzip: Option<Gunzip>,
    /// JSON objects by lines, as a watch has them.
    lines: bool,
    /// What its form is, its first byte will say.
    is_unsure: bool,
    line: Vec<u8>,
    /// Events with their length before them, as a watch in protobuf has them.
    frames: Option<Frames>,
    /// Events in CBOR, one after the other, which become lines of JSON.
    sequence: Option<Sequence>,
    /// Finds what rules mask in text.
    sieve: Option<Sieve>,
    /// Bytes of a line that is skipped; it ends with the next newline.
    skipping: Option<u64>,
    /// Nothing more can be made of this stream.
    broken: Option<&'static str>,
    left_out: u64,
    masks: u64,
    recorded: u64,
    digest: Sha256,
    whole: KeyedDigest,
}

impl Streamed {
    pub(super) fn new(
        masker: &Masker,
        sensitivity: Sensitivity,
        content_type: Option<String>,
        content_encoding: Option<&str>,
        watch: bool,
    ) -> Self {
        let essence = content_type.as_deref().unwrap_or_default();
        let is_sequence = watch && cbor::is_sequence(essence);
        let lines = watch && (is_sequence || essence.contains("json"));
        let framed = watch && body::is_protobuf(content_type.as_deref());
        let encoding = Encoding::of(content_encoding);
        let sensitive = sensitivity != Sensitivity::None;
        let broken = match encoding {
            _ if sensitive && !lines && !framed => Some("may hold secrets in a form that is not parsed"),
            _ if watch && !lines && !framed && (masker.hides() || masker.masks().has_environment()) => {
                Some("may hold what a rule masks in a form that is not parsed")
            }
            // A stream in zstd has no bound: of each byte may become thousands.
            Encoding::Unknown | Encoding::Zstd if sensitive || lines || framed || masker.hides() => {
                Some("has a content encoding that is not decoded")
            }
            _ => None,
        };
        let gunzip = matches!(encoding, Encoding::Gzip).then(Gunzip::new);
        Self {
            sensitivity,
            content_type: if is_sequence { Some("application/json".to_owned()) } else { content_type },
            gunzip,
            lines,
            is_unsure: false,
            line: Vec::new(),
            frames: framed.then(|| Frames::new(LINE_BYTES_MAX)),
            sequence: is_sequence.then(|| Sequence::new(LINE_BYTES_MAX)),
            sieve: masker.masks().patterns().filter(|_| !lines && !framed).map(|_| Sieve::default()),
            skipping: None,
            broken,
            left_out: 0,
            masks: 0,
            recorded: 0,
            digest: Sha256::new(),
            whole: masker.digest(),
        }
    }

    /// A watch that comes in messages of a WebSocket, one event in each: its head names no type.
    pub(super) fn in_messages(masker: &Masker, sensitivity: Sensitivity) -> Self {
        Self {
            is_unsure: true,
            ..Self::new(masker, sensitivity, Some("application/json".into()), None, true)
        }
    }

    /// Takes the next bytes and returns the events that they make.
    pub(super) fn push(&mut self, masker: &Masker, bytes: &[u8]) -> Vec<Kind> {
        self.whole.update(bytes);
        let mut out = Out { names: Names::new(self.lines), ..Out::default() };
        if self.broken.is_some() {
            self.left_out += bytes.len() as u64;
            return Vec::new();
        }
        match self.gunzip.take() {
            None => self.decoded(masker, bytes, &mut out),
            Some(mut gunzip) => {
                let decoded = gunzip.push(bytes, |piece| {
                    self.decoded(masker, piece, &mut out);
                    std::ops::ControlFlow::Continue(())
                });
                self.gunzip = Some(gunzip);
                if decoded.is_err() {
                    self.broken = Some(NOT_GZIP);
                    self.left_out += bytes.len() as u64;
                }
            }
        }
        self.events(out)
    }

    /// Bytes passed that could not be kept.
    pub(super) fn lost(&mut self, bytes: u64) -> Vec<Kind> {
        self.left_out += bytes;
        if self.gunzip.is_some() {
            self.broken = Some("is compressed and a part of it was lost");
        }
        let mut partial = std::mem::take(&mut self.line).len() as u64;
        let begun = self.frames.as_mut().map(Frames::finish);
        if let Some(begun) = begun.or(self.sequence.as_mut().map(Sequence::finish)) {
            self.broken = Some("is not text and a part of it was lost");
            partial += begun;
        }
        self.left_out += partial;
        // Of a line whose beginning is lost nothing can say what it is.
        self.sieve.iter_mut().for_each(Sieve::forget);
        self.skipping = (self.lines || self.sieve.is_some()).then_some(0);
        let reason = "response came faster than it could be recorded".to_owned();
        vec![Kind::Gap { reason, events: None, bytes: Some(bytes + partial) }]
    }

    /// The stream is over.
    pub(super) fn finish(mut self, masker: &Masker, wire_bytes: u64) -> (Vec<Kind>, BodySummary) {
        let mut out = Out { names: Names::new(self.lines), ..Out::default() };
        if !self.line.is_empty() {
            let line = std::mem::take(&mut self.line);
            self.line(masker, &line, &mut out);
        }
        if let Some((mut sieve, patterns)) = self.sieve.take().zip(masker.masks().patterns()) {
            out.content.append(&mut sieve.finish(masker, patterns));
        }
        if let Some(skipped) = self.skipping.take().filter(|skipped| *skipped > 0) {
            self.gap(&mut out, LINE_LEFT_OUT, skipped);
        }
        let begun = self.frames.take().map_or(0, |mut frames| frames.finish());
        let begun = begun + self.sequence.as_mut().map_or(0, Sequence::finish);
        self.gap(&mut out, "watch event is not whole", begun);
        let undone = [("gzip", self.gunzip.is_some()), ("cbor-seq", self.sequence.is_some())];
        let undone: Vec<_> = undone.iter().filter_map(|(name, is)| is.then_some(*name)).collect();
        let decoded = (!undone.is_empty()).then(|| undone.join(", "));
        let (broken, left_out, masks) = (self.broken, self.left_out, self.masks);
        let kinds = self.events(out);
        let changed = masks > 0 || left_out > 0;
        let truncated = broken.map(|reason| format!("withheld: {left_out} bytes: {reason}"));
        let some_left_out = || format!("{left_out} bytes are left out; see the gaps");
        let truncated = truncated.or_else(|| (left_out > 0).then(some_left_out));
        let digest = hex::encode(self.digest.finalize());
        let digest = if changed { self.whole.finish() } else { format!("sha256:{digest}") };
        let summary = BodySummary {
            wire_bytes,
            recorded_bytes: self.recorded,
            decoded,
            digest: Some(digest),
            masked: masks,
            truncated,
        };
        (kinds, summary)
    }

    fn decoded(&mut self, masker: &Masker, bytes: &[u8], out: &mut Out) {
        if std::mem::take(&mut self.is_unsure) {
            self.sequence = (bytes.first() == Some(&cbor::FIRST)).then(|| Sequence::new(LINE_BYTES_MAX));
            // Protobuf: without the messages' ends nothing tells its events apart.
            let is_parsed = self.sequence.is_some() || bytes.starts_with(b"{");
            self.broken = (!is_parsed).then_some("is a watch over WebSocket in a form that is not parsed");
        }
        if self.broken.is_some() {
            self.left_out += bytes.len() as u64;
            return;
        }
        if let Some(mut frames) = self.frames.take() {
            frames.push(bytes, |frame| self.frame(masker, &frame, out));
            self.frames = Some(frames);
            return;
        }
        if let Some(mut sequence) = self.sequence.take() {
            let (lines, read) = sequence.lines(bytes);
            self.json_lines(masker, &lines, out);
            if let Err(left) = read {
                self.broken = Some("has an event that is not the CBOR it claims to be, or too long");
                self.left_out += left;
            }
            self.sequence = Some(sequence);
            return;
        }
        if !self.lines {
            return self.text(masker, bytes, out);
        }
        self.json_lines(masker, bytes, out);
    }

    fn json_lines(&mut self, masker: &Masker, mut bytes: &[u8], out: &mut Out) {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            let (line, rest) = bytes.split_at(end + 1);
            bytes = rest;
            if let Some(skipped) = self.skipping.take() {
                self.gap(out, LINE_LEFT_OUT, skipped + line.len() as u64);
            } else if self.line.is_empty() {
                self.line(masker, line, out);
            } else {
                let mut begun = std::mem::take(&mut self.line);
                begun.extend_from_slice(line);
                self.line(masker, &begun, out);
                begun.clear();
                self.line = begun;
            }
        }
        match &mut self.skipping {
            Some(skipped) => *skipped += bytes.len() as u64,
            None => self.line.extend_from_slice(bytes),
        }
        if self.line.len() > LINE_BYTES_MAX {
            let begun = std::mem::take(&mut self.line).len() as u64;
            self.gap(out, "watch event is longer than can be recorded", begun);
            self.skipping = Some(0);
        }
    }

    fn text(&mut self, masker: &Masker, mut bytes: &[u8], out: &mut Out) {
        if let Some(skipped) = self.skipping.take() {
            let end = bytes.iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |end| end + 1);
            let (line, rest) = bytes.split_at(end);
            let skipped = skipped + line.len() as u64;
            if !line.ends_with(b"\n") {
                self.skipping = Some(skipped);
                return;
            }
            self.gap(out, LINE_LEFT_OUT, skipped);
            bytes = rest;
        }
        let Some((sieve, patterns)) = self.sieve.as_mut().zip(masker.masks().patterns()) else {
            return out.content.extend_from_slice(bytes);
        };
        let masks = sieve.masks;
        out.content.extend_from_slice(&sieve.push(masker, patterns, bytes));
        self.masks += sieve.masks - masks;
    }

    fn line(&mut self, masker: &Masker, line: &[u8], out: &mut Out) {
        match body::record(masker, self.sensitivity, self.content_type.as_deref(), line, true, &mut out.names)
        {
            Recorded::Clear(line) => out.content.extend_from_slice(line),
            Recorded::Masked { content, masks } => {
                self.masks += masks;
                out.content.extend_from_slice(&content);
                out.content.push(b'\n');
            }
            Recorded::Withheld { reason, .. } => self.withhold(masker, reason, line, out),
        }
    }

    fn frame(&mut self, masker: &Masker, frame: &Frame<'_>, out: &mut Out) {
        let whole = match *frame {
            Frame::Whole(whole) => whole,
            Frame::TooLong(bytes) => {
                return self.gap(out, "watch event is longer than can be recorded", bytes);
            }
        };
        let event = whole.get(HEADER..).unwrap_or_default();
        match protobuf::record_event(masker, self.sensitivity, event, &mut out.names) {
            Recorded::Clear(_) => out.content.extend_from_slice(whole),
            Recorded::Masked { content, masks } => {
                self.masks += masks;
                // Masks make it no more than some times as long.
                let length = u32::try_from(content.len()).unwrap_or(u32::MAX);
                out.content.extend_from_slice(&length.to_be_bytes());
                out.content.extend_from_slice(&content);
            }
            Recorded::Withheld { reason, .. } => self.withhold(masker, reason, whole, out),
        }
    }

    fn withhold(&mut self, masker: &Masker, reason: &str, event: &[u8], out: &mut Out) {
        self.masks += 1;
        let reason = format!("watch event withheld: {reason}; {}", keyed(masker, event));
        self.gap(out, &reason, event.len() as u64);
    }

    fn gap(&mut self, out: &mut Out, reason: &str, bytes: u64) {
        if bytes == 0 {
            return;
        }
        self.left_out += bytes;
        let content = std::mem::take(&mut out.content);
        out.before.push((content, Kind::Gap { reason: reason.to_owned(), events: None, bytes: Some(bytes) }));
    }

    fn events(&mut self, out: Out) -> Vec<Kind> {
        let mut kinds = Vec::new();
        for (content, gap) in out.before {
            kinds.append(&mut self.content(&content));
            kinds.push(gap);
        }
        kinds.append(&mut self.content(&out.content));
        kinds.append(&mut out.names.kinds(Channel::ResponseBody));
        kinds
    }

    fn content(&mut self, content: &[u8]) -> Vec<Kind> {
        let kinds = split(Channel::ResponseBody, self.recorded, content);
        self.digest.update(content);
        self.recorded += content.len() as u64;
        kinds
    }
}

/// Content and gaps in their order.
#[derive(Debug, Default)]
struct Out {
    before: Vec<(Vec<u8>, Kind)>,
    content: Vec<u8>,
    /// Objects in it.
    names: Names,
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;
    use proptest::prelude::*;
    use weir_common::event::{BodySummary, CONTENT_BYTES_MAX, Channel, Kind};

    use super::{Held, Kept, LINE_BYTES_MAX, Streamed, reduce, reduce_answer, split};
    use crate::recording::{
        body::Sensitivity,
        cbor::tests::encoded,
        mask::Masker,
        masks::{MaskRules, Masks},
    };

    fn masker() -> Masker {
        Masker::for_cluster(&[1; 32], "c")
    }

    fn watch(sensitivity: Sensitivity) -> Streamed {
        Streamed::new(&masker(), sensitivity, Some("application/json".into()), None, true)
    }

    /// Content and gap reasons of events, in order.
    fn shown(kinds: Vec<Kind>) -> (String, Vec<String>) {
        let (mut text, mut gaps) = (Vec::new(), Vec::new());
        for kind in kinds {
            match kind {
                Kind::Content(content) => text.extend(content.bytes.to_vec().unwrap()),
                Kind::Gap { reason, .. } => gaps.push(reason),
                other => panic!("{other:?}"),
            }
        }
        (String::from_utf8(text).unwrap(), gaps)
    }

    fn run(mut streamed: Streamed, pieces: &[&[u8]]) -> (String, Vec<String>, BodySummary) {
        let mut kinds: Vec<_> = pieces.iter().flat_map(|piece| streamed.push(&masker(), piece)).collect();
        let (mut rest, summary) = streamed.finish(&masker(), 0);
        kinds.append(&mut rest);
        let (text, gaps) = shown(kinds);
        (text, gaps, summary)
    }

    #[test]
    fn a_watch_line_that_cannot_be_masked_is_withheld_and_the_next_is_recorded() {
        let pieces: [&[u8]; 2] = [b"{broken\n{\"type\":\"BOOKMARK\"}\n", b"{\"type\":1"];
        let (text, gaps, summary) = run(watch(Sensitivity::Secrets), &pieces);
        assert_eq!(text, "{\"type\":\"BOOKMARK\"}\n");
        assert_eq!(gaps.len(), 2);
        assert!(gaps[0].contains("withheld") && gaps[0].contains("hmac-sha256:"), "{gaps:?}");
        assert!(summary.truncated.is_some() && summary.digest.unwrap().starts_with("hmac-sha256:"));
    }

    #[test]
    fn a_watch_in_cbor_is_recorded_as_lines_of_json_with_masks() {
        let event = serde_json::json!({"type": "ADDED", "object": {"kind": "Secret", "stringData": {"a": "canary-hunter2"}}});
        let bookmark = serde_json::json!({"type": "BOOKMARK"});
        let wire = [encoded(&event), encoded(&bookmark), encoded(&bookmark)].concat();
        let cut = wire.len() - 3;
        for at in [1, 30, cut] {
            let content_type = Some("application/cbor-seq".to_owned());
            let mut streamed = Streamed::new(&masker(), Sensitivity::None, content_type, None, true);
            let mut kinds = Vec::new();
            for piece in [&wire[..at], &wire[at..cut]] {
                kinds.append(&mut streamed.push(&masker(), piece));
            }
            let (mut rest, summary) = streamed.finish(&masker(), 0);
            kinds.append(&mut rest);
            kinds.retain(|kind| !matches!(kind, Kind::ObjectsNamed(_)));
            let (text, gaps) = shown(kinds);
            let mask = masker().mask(b"canary-hunter2");
            assert_eq!(text, format!("{}\n{bookmark}\n", event.to_string().replace("canary-hunter2", &mask)));
            assert_eq!((summary.masked, summary.decoded.as_deref()), (1, Some("cbor-seq")));
            assert_eq!(gaps, ["watch event is not whole"]);
        }
    }

    #[test]
    fn a_line_without_end_is_left_out_and_memory_stays_bounded() {
        let mut streamed = watch(Sensitivity::None);
        let piece = vec![b'x'; 1 << 20];
        let mut gaps = Vec::new();
        for _ in 0..10 {
            gaps.extend(shown(streamed.push(&masker(), &piece)).1);
            assert!(streamed.line.len() <= LINE_BYTES_MAX);
        }
        let (text, more) = shown(streamed.push(&masker(), b"\n{}\n"));
        assert_eq!((text.as_str(), gaps.len(), more.len()), ("{}\n", 1, 1));
    }

    #[test]
    fn what_is_lost_is_a_gap_and_the_watch_goes_on_with_the_next_line() {
        let mut streamed = watch(Sensitivity::None);
        assert_eq!(shown(streamed.push(&masker(), b"{\"a\":1}\n{\"b\"")).0, "{\"a\":1}\n");
        assert!(matches!(streamed.lost(100)[..], [Kind::Gap { bytes: Some(104), .. }]));
        assert_eq!(shown(streamed.push(&masker(), b":2}\n{\"c\":3}\n")).0, "{\"c\":3}\n");
        assert!(streamed.finish(&masker(), 0).1.truncated.is_some());
    }

    #[test]
    fn a_sensitive_stream_that_is_not_parsed_is_withheld() {
        let kind = Some("application/cbor-seq".to_owned());
        let streamed = Streamed::new(&masker(), Sensitivity::Secrets, kind, None, true);
        let (text, _, summary) = run(streamed, &[b"secret", b"bytes"]);
        assert_eq!((text.as_str(), summary.recorded_bytes), ("", 0));
        assert!(summary.truncated.unwrap().contains("11 bytes"));
    }

    #[test]
    fn an_unknown_encoding_is_recorded_as_it_is_unless_it_may_hold_secrets() {
        let held = || Held {
            chunks: vec![Bytes::from_static(b"abc")],
            wire_bytes: 3,
            content_encoding: Some("br".into()),
            bytes_max: 10,
            ..Held::default()
        };
        let rules = MaskRules { environment: Vec::new(), ..MaskRules::default() };
        let without = masker().by(&Arc::new(Masks::new(rules).unwrap()));
        assert_eq!(reduce_answer(&without, Sensitivity::None, &held()).content, b"abc");
        let mention = Held { chunks: vec![Bytes::from_static(b"kind: Secret")], ..held() };
        for (masker, sensitivity, held) in [
            (&without, Sensitivity::Secrets, held()),
            (&without, Sensitivity::None, mention),
            (&masker(), Sensitivity::None, held()),
        ] {
            let Kept { content, summary, .. } = reduce_answer(masker, sensitivity, &held);
            assert!(content.is_empty() && summary.truncated.is_some());
        }
    }

    #[test]
    fn a_request_is_read_as_the_api_server_reads_it_whatever_encoding_it_claims() {
        const CANARY: &str = "canary-hunter2";
        let json = format!(r#"{{"env":[{{"name":"A_KEY","value":"{CANARY}"}}],"x":"shown"}}"#);
        let yaml = format!("env:\n- name: A_KEY\n  value: {CANARY}\nx: shown\n");
        let secret = format!(r#"{{"kind":"Secret","stringData":{{"a":"{CANARY}"}},"type":"shown"}}"#);
        let (json, yaml, secret) = (json.as_str(), yaml.as_str(), secret.as_str());
        let rules = MaskRules { patterns: vec!["canary-[a-z0-9]+".to_owned()], ..MaskRules::default() };
        let by_pattern = masker().by(&Arc::new(Masks::new(rules).unwrap()));
        let short = format!("{:>9}", "a");
        for masker in [masker(), by_pattern] {
            for encoding in ["br", "gzip", "x-gzip", "gzip, gzip"] {
                let reduced = |content_type: &str, body: &[u8]| {
                    let held = Held {
                        chunks: vec![Bytes::copy_from_slice(body)],
                        wire_bytes: body.len() as u64,
                        content_type: Some(content_type.to_owned()),
                        content_encoding: Some(encoding.to_owned()),
                        bytes_max: 1000,
                        ..Held::default()
                    };
                    reduce(&masker, Sensitivity::None, &held)
                };
                for (content_type, body) in
                    [("application/json", json), ("application/yaml", yaml), ("application/json", secret)]
                {
                    let Kept { content, summary, .. } = reduced(content_type, body.as_bytes());
                    let text = String::from_utf8(content).unwrap();
                    assert!(text.contains("shown") && !text.contains(CANARY), "{encoding}: {text}");
                    assert_eq!((summary.masked, summary.truncated), (1, None));
                }
                assert_eq!(reduced("text/plain", short.as_bytes()).content, short.as_bytes());
                // Not text: it may be what the header says.
                let Kept { content, summary, .. } = reduced("application/json", b"\x1f\x8b\xffabc");
                assert!(content.is_empty() && summary.truncated.is_some());
            }
        }
    }

    #[test]
    fn a_watch_in_an_unknown_encoding_is_withheld() {
        let kind = Some("application/json".to_owned());
        let streamed = Streamed::new(&masker(), Sensitivity::None, kind, Some("br"), true);
        let (text, _, summary) = run(streamed, &[b"some", b"bytes"]);
        assert_eq!(text, "");
        assert!(summary.truncated.unwrap().contains("9 bytes"));
    }

    #[test]
    fn text_is_split_between_characters() {
        let text = "ä".repeat(CONTENT_BYTES_MAX);
        let text = &text[..text.len() - 2];
        let kinds = split(Channel::ResponseBody, 0, format!("x{text}").as_bytes());
        assert!(kinds.len() > 1);
        assert_eq!(shown(kinds).0, format!("x{text}"));
    }

    proptest! {
        #[test]
        fn a_watch_is_recorded_alike_however_it_is_cut(
            lines in proptest::collection::vec("[ -~]{0,30}", 0..6), cuts in proptest::collection::vec(any::<u8>(), 0..6),
            secrets: bool,
        ) {
            let sensitivity = if secrets { Sensitivity::Secrets } else { Sensitivity::None };
            let wire = lines.join("\n").into_bytes();
            let mut cuts: Vec<_> = cuts.into_iter().map(|at| usize::from(at) % (wire.len() + 1)).collect();
            cuts.sort_unstable();
            let mut pieces: Vec<&[u8]> = Vec::new();
            let mut start = 0;
            for cut in cuts {
                pieces.push(&wire[start..cut]);
                start = cut;
            }
            pieces.push(&wire[start..]);
            prop_assert_eq!(run(watch(sensitivity), &pieces), run(watch(sensitivity), &[&wire]));
        }
    }
}
