//! Kinds of gap records, for a metric: what is missing, or is not what was sent, and why.
//!
//! An event says in words why something is missing. Those words are all written in this crate; which kind they are of, the
//! first of them tell.

use weir_common::event::Kind;

/// Names of the kinds; the last is for words that none of the others begins with.
pub(super) const KINDS: [&str; 11] = [
    "stopped",
    "not_written",
    "damaged",
    "bodies_left_out",
    "by_rule",
    "withheld",
    "cut",
    "not_decoded",
    "summed_up",
    "defect",
    "other",
];

/// What the words of a kind begin with.
const WORDS: [(&str, &str); 15] = [
    ("recording stopped", "stopped"),
    ("events could not be written", "not_written"),
    ("an event of ", "not_written"),
    ("journal damaged", "damaged"),
    ("bodies of this request are left out", "bodies_left_out"),
    ("left out: a rule", "by_rule"),
    ("masked by rule", "by_rule"),
    ("withheld", "withheld"),
    ("watch event withheld", "withheld"),
    ("response came faster", "cut"),
    ("rest of a watch event", "cut"),
    ("watch event is not whole", "cut"),
    ("watch event is longer", "cut"),
    ("refused connections of ", "summed_up"),
    ("the recorder failed", "defect"),
];

/// How many of each kind, in the order of [`KINDS`].
pub(super) type Counts = [u64; KINDS.len()];

/// Which kind of gap record it is, as a place in [`KINDS`]; none: it is none.
pub(super) fn kind(event: &Kind) -> Option<usize> {
    let Kind::Gap { reason, bytes, .. } = event else { return None };
    let known = WORDS.iter().find(|(words, _)| reason.starts_with(words));
    let name = match known {
        Some((_, name)) => name,
        // Nothing is missing of a stream that cannot be decoded: its bytes follow as they came.
        None if *bytes == Some(0) => "not_decoded",
        None => "other",
    };
    KINDS.iter().position(|kind| *kind == name)
}

#[cfg(test)]
mod tests {
    use weir_common::event::Kind;

    use super::{KINDS, WORDS, kind};
    use crate::{recording::RecordingError, streams::Reason};

    fn name(reason: &str, bytes: Option<u64>) -> &'static str {
        KINDS[kind(&Kind::Gap { reason: reason.to_owned(), events: None, bytes }).unwrap()]
    }

    #[test]
    fn words_are_of_a_kind_and_every_kind_has_words() {
        for (words, kind) in WORDS {
            assert_eq!(name(words, Some(7)), kind);
        }
        let without_words = KINDS.iter().filter(|kind| WORDS.iter().all(|(_, name)| name != *kind));
        assert_eq!(without_words.collect::<Vec<_>>(), [&"not_decoded", &"other"]);
        assert_eq!(name("words of another version", Some(7)), "other");
        assert_eq!(kind(&Kind::AgentStopped { reason: "withheld".into() }), None);
    }

    #[test]
    fn what_is_not_decoded_is_told_by_all_its_reasons() {
        for reason in [
            Reason::Protocol,
            Reason::Extension,
            Reason::Frame,
            Reason::Fragment,
            Reason::Channel,
            Reason::Base64,
            Reason::Port,
            Reason::SpdyFrame,
            Reason::SpdyControl,
            Reason::SpdyHeaders,
            Reason::SpdyStream,
            Reason::Archive,
            Reason::Ended,
            Reason::Cut,
        ] {
            assert_eq!(name(&reason.to_string(), Some(0)), "not_decoded", "{reason}");
        }
        assert_eq!(name(&RecordingError::TooLong { bytes: 9 }.to_string(), None), "not_written");
    }
}
