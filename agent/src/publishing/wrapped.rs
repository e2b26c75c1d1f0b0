//! Wrapped keys on their way: each is sent before the first event whose content it encrypted, so that whoever has the event, and
//! may read it, can. One that was erased from the journal is not sent; its events are.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use uuid::Uuid;
use weir_common::{
    encryption::{KEY_LIFE, WRAPPED_KEY_BYTES_MAX, WrappedKey, message_key, wrapped_key_file},
    envelope::Envelope,
    message::Message,
};

use super::{
    feed,
    silence::Stopped,
    sink::{Failure, Sink, Taken, Ticket},
};
use crate::storage::{Storage, read_bounded};

/// Most keys of which it is remembered that they were sent; then they are sent again, which a compacted topic bears.
const SENT_MAX: usize = 4096;

/// The longest that content may wait between its encryption and its segment.
const QUEUED_MAX: Duration = Duration::from_secs(3600);

/// The wrapped keys of an epoch.
#[derive(Debug)]
pub(super) struct Keys {
    storage: Arc<dyn Storage>,
    folder: PathBuf,
    epoch: Uuid,
    /// Those that were sent since the epoch was last read again.
    sent: BTreeSet<u64>,
    /// Those that were ever sent and are still there, and since when: what they encrypt comes within a day of that, whatever the
    /// clock is set to meanwhile.
    left: BTreeMap<u64, Instant>,
}

impl Keys {
    pub(super) fn new(storage: Arc<dyn Storage>, folder: PathBuf, epoch: Uuid) -> Self {
        Self { storage, folder, epoch, sent: BTreeSet::new(), left: BTreeMap::new() }
    }

    /// What was sent and not acknowledged is lost.
    pub(super) fn rewind(&mut self) {
        self.sent.clear();
    }

    /// Sends the key that encrypted what goes with this envelope, unless it was sent, or is not there any more; returns the
    /// length of its message and when it was made.
    pub(super) fn send(
        &mut self,
        envelope: &Envelope,
        topic: Option<&str>,
        (ticket, now): (Ticket, Instant),
        sink: &mut dyn Sink,
    ) -> Result<Option<(usize, i64)>, Stopped> {
        let key = envelope.key_id;
        if self.sent.contains(&key) {
            return Ok(None);
        }
        let path = self.folder.join(wrapped_key_file(key));
        let failed = |reason: String| Stopped::Failed(Failure::Other { reason });
        let bytes = match read_bounded(self.storage.as_ref(), &path, WRAPPED_KEY_BYTES_MAX + 1) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => read.map_err(|error| failed(format!("{} cannot be read: {error}", path.display())))?,
        };
        let wrapped = WrappedKey::decode(&bytes).ok();
        let Some(wrapped) = wrapped.filter(|wrapped| (wrapped.epoch, wrapped.key) == (self.epoch, key))
        else {
            tracing::warn!(event = "foreign-key-file", path = %path.display(), "is no wrapped key of this epoch, and is not published");
            self.remember(key);
            return Ok(None);
        };
        // Without its key nobody could read what leaves the journal.
        let missing = "content is encrypted, and kafka.keyTopic names no topic for its keys";
        let topic = topic.ok_or_else(|| failed(missing.to_owned()))?;
        let (name, time) = (message_key(&self.epoch, key), wrapped.time_unix_us);
        let message = Message::of_wrapped_key(&name, &envelope.source, time, &bytes);
        match sink.send(ticket, topic, &message, time / 1000) {
            Ok(Taken::Yes) => {}
            Ok(Taken::Full) => return Err(Stopped::Full),
            Err(failure) => return Err(Stopped::Failed(failure)),
        }
        self.remember(key);
        self.left.entry(key).or_insert(now);
        Ok(Some((message.bytes(), time)))
    }

    fn remember(&mut self, key: u64) {
        if self.sent.len() >= SENT_MAX {
            self.sent.clear();
        }
        self.sent.insert(key);
    }

    /// Removes keys that were published and encrypted nothing of what is left; to be called when segments went.
    ///
    /// # Errors
    /// The disk.
    pub(super) fn remove_unused(&mut self, now: Instant) -> io::Result<()> {
        let storage = self.storage.as_ref();
        let segments = feed::segments(storage, &self.folder)?;
        let first = segments.values().find_map(|(path, _)| feed::good_header(storage, path));
        // Without a segment the epoch goes whole.
        let Some(first) = first else { return Ok(()) };
        let life = KEY_LIFE + QUEUED_MAX;
        let oldest = first.created_unix_us.saturating_sub_unsigned(life.as_micros() as u64);
        // Of those alone that this process has sent: a clock that was set must not take one that nobody has. The others go with
        // their epoch.
        for (key, sent) in self.left.clone() {
            if now.saturating_duration_since(sent) < life {
                continue;
            }
            let path = self.folder.join(wrapped_key_file(key));
            let is_used = match read_bounded(storage, &path, WRAPPED_KEY_BYTES_MAX) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => false,
                wrapped => {
                    let is_used =
                        WrappedKey::decode(&wrapped?).is_ok_and(|wrapped| wrapped.time_unix_us >= oldest);
                    if !is_used {
                        storage.remove_file(&path)?;
                    }
                    is_used
                }
            };
            if !is_used {
                self.left.remove(&key);
            }
        }
        storage.sync_folder(&self.folder)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use weir_common::encryption::{ContentKey, Recipient, wrapped_key_file};

    use crate::{
        publishing::{
            clock::Clock,
            fixture::{Broker, Log, Run, WINDOW},
            publisher_tests::{events, settle},
        },
        recipients::RECIPIENT,
    };

    /// Puts a key there that was made at this time.
    fn wrap(log: &Log, key: u64, time_unix_us: i64) {
        let recipient = Recipient::from_pem(RECIPIENT.as_bytes()).unwrap();
        let made = ContentKey::generate(log.epoch, key, "session", time_unix_us, &[recipient]);
        fs::write(log.folder().join(wrapped_key_file(key)), made.unwrap().1.encode()).unwrap();
    }

    #[test]
    fn a_key_is_there_before_what_it_encrypted_and_one_that_was_erased_is_not_missed() {
        let (mut log, broker, mut clock) = (Log::new(), Broker::new(), Clock::new());
        wrap(&log, 1, 0);
        for key_id in [0, 1, 1, 2] {
            log.key_id = key_id;
            log.events(1);
        }
        let mut run = Run::with(&log, Box::new(broker.clone()));
        run.turn_at(clock.pass(Duration::from_secs(1)));
        let name = format!("{}/key/1", log.epoch);
        let sent = broker.with(|state| state.keys.clone());
        assert_eq!(sent, [(name.clone(), 1)], "after one event, before the second");
        // Not acknowledged: with all else that is lost it comes again.
        broker.with(|state| state.fatal = true);
        settle(&mut run, &broker, &mut clock);
        assert_eq!(broker.with(|state| state.keys.last().cloned()), Some((name, 1)));
        assert_eq!(broker.with(|state| state.acknowledged.clone()), events(log.epoch, 0..4));
        assert!(run.publisher.is_done());
    }

    #[test]
    fn keys_go_a_day_after_they_were_sent_and_after_the_segments_that_need_them() {
        let day_us = 24 * 3_600_000_000;
        // A clock that says that all was long ago takes none: what a key encrypts may still be on its way.
        for (hours, expected) in [(0, [true; 3]), (26, [false, true, true])] {
            let (mut log, broker, mut clock) = (Log::new(), Broker::new(), Clock::new());
            for (key, time_unix_us) in [(1, -day_us * 2), (2, -day_us), (3, -day_us * 2)] {
                wrap(&log, key, time_unix_us);
            }
            for key_id in [1, 2] {
                log.key_id = key_id;
                log.events(1);
            }
            log.rotate();
            log.events(1);
            let mut run = Run::with(&log, Box::new(broker.clone()));
            run.turn_at(clock.pass(Duration::ZERO));
            run.turn_at(clock.pass(Duration::from_hours(hours)));
            settle(&mut run, &broker, &mut clock);
            run.turn_at(clock.pass(WINDOW * 2));
            assert!(!log.segment(0).exists());
            let is_there = |key| log.folder().join(wrapped_key_file(key)).exists();
            assert_eq!([1, 2, 3].map(is_there), expected, "the third was never published");
        }
    }

    #[test]
    fn without_a_topic_for_keys_nothing_leaves_that_nobody_could_read() {
        let (mut log, broker, mut clock) = (Log::new(), Broker::new(), Clock::new());
        wrap(&log, 1, 0);
        log.events(1);
        log.key_id = 1;
        log.events(1);
        let mut run = Run::with(&log, Box::new(broker.clone()));
        run.publisher.settings.key_topic = None;
        settle(&mut run, &broker, &mut clock);
        assert_eq!(broker.with(|state| state.acknowledged.clone()), events(log.epoch, 0..1));
        assert!(run.published().trouble.unwrap().contains("kafka.keyTopic"));
    }
}
