//! Holds envelopes against what they accompany.
//!
//! No leaf of the Merkle log covers an envelope: a leaf is the hash of a value. So it may not say anything that the value, or the
//! signed checkpoint, does not; what it says is computed from there and compared, whether it stood in a frame or came as the
//! key and headers of a message.

use serde::{Deserialize, de::IgnoredAny};
use weir_common::{encryption::key_of_digest, envelope::Envelope, event::SCHEMA_VERSION, frame::Frame};

use super::epoch::Check;
use crate::moment::Moment;

/// What every event says, whatever version made it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Said {
    pub(super) schema: u32,
    sequence: u64,
    pub(super) time_unix_us: i64,
    node: String,
    epoch: String,
    #[serde(default)]
    session: String,
    #[serde(default)]
    pub(super) request: Option<String>,
    #[serde(rename = "type")]
    pub(super) kind: String,
    #[serde(default)]
    data: Perhaps<Protected>,
}

/// What of an event's data names the key that protects it.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Protected {
    encrypted: Perhaps<Encrypted>,
    body: Perhaps<Digested>,
    digest: Perhaps<String>,
}

#[derive(Deserialize)]
struct Encrypted {
    key: u64,
}

#[derive(Deserialize)]
struct Digested {
    digest: String,
}

/// Something that other events may have in another form under the same name.
#[derive(Deserialize)]
#[serde(untagged)]
enum Perhaps<T> {
    Is(T),
    Other(IgnoredAny),
}

impl<T> Default for Perhaps<T> {
    fn default() -> Self {
        Self::Other(IgnoredAny)
    }
}

impl<T> Perhaps<T> {
    fn get(&self) -> Option<&T> {
        match self {
            Self::Is(it) => Some(it),
            Self::Other(_) => None,
        }
    }
}

impl Said {
    /// Number of the key that protects what it says; 0: none does.
    fn key(&self) -> u64 {
        let Perhaps::Is(Protected { encrypted, body, digest }) = &self.data else { return 0 };
        let encrypted = encrypted.get().map(|encrypted| encrypted.key);
        let digest = body.get().map(|body| &body.digest).or(digest.get());
        encrypted.or_else(|| key_of_digest(digest?)).unwrap_or(0)
    }
}

impl Check<'_> {
    pub(super) fn envelope_of_event(&mut self, offset: usize, frame: &Frame<'_>, event: &Said) {
        let (envelope, totals) = (&frame.envelope, &self.totals);
        let id = format!("{}/{}", event.epoch, event.sequence);
        let source = format!("/weir/{}/{}", event.node, event.epoch);
        let event_type = format!("weir.v{}.{}", event.schema, event.kind);
        // A later version may have flags, and protect more than this one knows.
        let known = event.schema <= SCHEMA_VERSION;
        let wrong = [
            (event.sequence != frame.sequence, "sequence of the event differs from that of its frame"),
            (event.epoch != totals.epoch, "event belongs to another epoch"),
            (event.node != totals.node, "event belongs to another node"),
            (envelope.key != event.session, "key of the envelope is not the event's session"),
            (envelope.id != id, "id of the envelope is not the event's"),
            (envelope.source != source, "source of the envelope is not the event's"),
            (envelope.event_type != event_type, "type of the envelope is not the event's"),
            (envelope.time_unix_us != event.time_unix_us, "time of the envelope is not the event's"),
            (known && envelope.flags != 0, "envelope has flags, of which none is defined"),
            (
                known && envelope.key_id != event.key(),
                "key id of the envelope is not that of the key that protects the event",
            ),
        ];
        for (is_wrong, what) in wrong {
            if is_wrong {
                self.damage(Some(offset), Some(frame.sequence), what.into());
            }
        }
    }

    /// `signed_us` is when the checkpoint says that it was signed; earlier versions did not say.
    pub(super) fn envelope_of_checkpoint(
        &mut self,
        offset: usize,
        frame: &Frame<'_>,
        signed_us: Option<i64>,
    ) {
        let (envelope, totals) = (&frame.envelope, &self.totals);
        let time = signed_us.unwrap_or(envelope.time_unix_us);
        let expected = Envelope::of_checkpoint(&totals.node, &totals.epoch, frame.sequence, time);
        let signed = format!("checkpoint was signed at {}, its envelope says other", Moment(time).text());
        let wrong = [
            (envelope.time_unix_us != expected.time_unix_us, signed.as_str()),
            (envelope.key != expected.key, "envelope of a checkpoint has a key"),
            (envelope.id != expected.id, "id of the envelope is not the checkpoint's"),
            (envelope.source != expected.source, "source of the envelope is not the checkpoint's"),
            (envelope.event_type != expected.event_type, "type of the envelope is not that of a checkpoint"),
            (envelope.flags != expected.flags, "envelope has flags, of which none is defined"),
            (envelope.key_id != expected.key_id, "envelope of a checkpoint has the id of a key"),
        ];
        for (is_wrong, what) in wrong {
            if is_wrong {
                self.damage(Some(offset), Some(frame.sequence), what.to_owned());
            }
        }
    }
}
