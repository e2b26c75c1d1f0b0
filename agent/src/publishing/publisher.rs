//! The publisher: reads epochs, sends their frames, moves their cursors, removes what was published.
//!
//! One thread takes one turn after another; a turn never waits long. Epochs that have ended come before the agent's own,
//! the oldest first. Whatever goes wrong with the sink, it is made anew after a pause and everything that was not
//! acknowledged is read again: the journal is the queue, memory holds only a bounded window of it.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use uuid::Uuid;
use weir_common::{
    frame::FrameType,
    message::{MESSAGE_BYTES_MAX, Message},
};

use super::{
    feed::{Damage, Next, Position},
    measures::Measures,
    retention,
    silence::Stopped,
    sink::{Failure, MakeSink, Outcome, Sink, Taken, Ticket},
    steps::Steps,
    stream::{Now, Stream, remove_oldest},
};
use crate::{
    recording::{Durable, DurablePosition},
    storage::Storage,
};

/// Most bytes that are on their way.
pub(super) const FLIGHT_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Most messages that are on their way.
pub(super) const FLIGHT_MESSAGES_MAX: usize = 8192;
/// How often it is looked for epochs that have ended.
const ADOPT_INTERVAL: Duration = Duration::from_secs(10);
/// How often it is looked for what may be removed, unless the replay window is shorter.
const REMOVE_INTERVAL: Duration = Duration::from_secs(15);
/// How often the backlog is measured.
const MEASURE_INTERVAL: Duration = Duration::from_secs(1);
/// The pause before a sink is made anew; it doubles up to the longest.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(30);
/// How long is waited for outcomes: a little, and longer while none come.
const POLL_SHORT: Duration = Duration::from_millis(5);
const POLL_LONG: Duration = Duration::from_millis(100);
/// The brokers have refused the agent, and acknowledged nothing, for this long: the client is made anew, which reads
/// passwords and certificates again.
const REFUSED: Duration = Duration::from_secs(10);
/// Nothing acknowledged for this long while something is on its way: Kafka is not there.
const SILENCE: Duration = Duration::from_secs(30);

/// Records that something is missing: why, and how many events, if that is known.
pub(super) type RecordGap = Box<dyn FnMut(String, Option<u64>) + Send>;

/// What is published, where.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    /// Where the journal is.
    pub(super) storage: Arc<dyn Storage>,
    /// Its folder.
    pub(super) journal: PathBuf,
    /// The epoch that this agent writes.
    pub(super) own: Uuid,
    /// Topic of events.
    pub(super) topic: String,
    /// Topic of checkpoints.
    pub(super) checkpoint_topic: String,
    /// Topic of wrapped keys.
    pub(super) key_topic: Option<String>,
    /// How long what was acknowledged stays in the journal.
    pub(super) replay_window: Duration,
}

/// See the module.
pub(super) struct Publisher {
    pub(super) settings: Settings,
    pub(super) durable: Arc<DurablePosition>,
    make: Box<dyn MakeSink>,
    gap: RecordGap,
    pub(super) measures: Arc<Measures>,
    sink: Option<Box<dyn Sink>>,
    /// When it is tried to make one, and the pause after that.
    retry: (Option<Instant>, Duration),
    /// The oldest first.
    pub(super) streams: Vec<Stream>,
    pub(super) ticket: Ticket,
    adopted: Option<Instant>,
    removed: Option<Instant>,
    measured: Option<Instant>,
    heard: Option<Instant>,
    patience: Duration,
    /// When the turn began.
    pub(super) turned: Instant,
    outcomes: Vec<Outcome>,
    /// After a failure one message is sent at a time, until one arrives that holds the watermark back: what fails again
    /// and again must not make others arrive again and again.
    is_probing: bool,
    /// When the oldest event was made that waited when the sink failed.
    pub(super) oldest: Option<i64>,
    pub(super) steps: Steps,
}

impl Publisher {
    pub(super) fn new(
        settings: Settings,
        durable: Arc<DurablePosition>,
        make: Box<dyn MakeSink>,
        gap: RecordGap,
        measures: Arc<Measures>,
    ) -> Self {
        Self {
            settings,
            durable,
            make,
            gap,
            measures,
            sink: None,
            retry: (None, RETRY_PAUSE),
            streams: Vec::new(),
            ticket: 0,
            adopted: None,
            removed: None,
            measured: None,
            heard: None,
            patience: POLL_SHORT,
            turned: Instant::now(),
            outcomes: Vec::new(),
            is_probing: false,
            oldest: None,
            steps: Steps::default(),
        }
    }

    /// One turn; returns whether there is more to do at once.
    pub(super) fn turn(&mut self, now: Now) -> bool {
        self.turned = now.instant;
        self.look_at_clock(now);
        if now.is_due(&mut self.adopted, ADOPT_INTERVAL) {
            self.adopt();
        }
        self.connect(now);
        let sent = self.fill().unwrap_or_else(|failure| {
            self.fail(now, &failure);
            false
        });
        let heard = self.hear(now);
        self.write_cursors(now, false);
        let window = if self.measures.is_short() { Duration::ZERO } else { self.settings.replay_window };
        if now.is_due(&mut self.removed, window.clamp(MEASURE_INTERVAL, REMOVE_INTERVAL)) {
            self.remove(now);
            if self.measures.is_short() {
                self.measures.removed_early(remove_oldest(&mut self.streams, now));
            }
        }
        if now.is_due(&mut self.measured, MEASURE_INTERVAL) {
            self.measure(now);
        }
        sent || heard || self.in_flight().1 > 0
    }

    /// Whether everything is acknowledged that is durable.
    pub(super) fn is_done(&self) -> bool {
        let own = self.streams.iter().find(|stream| stream.epoch == self.settings.own);
        let durable = self.durable.get();
        own.is_some_and(|own| {
            let Position { segment, offset, .. } = own.flight.watermark();
            Durable { segment, offset } >= durable
        }) && self.in_flight().1 == 0
    }

    /// Writes down how far all is acknowledged.
    pub(super) fn finish(&mut self, now: Now) {
        self.write_cursors(now, true);
        self.measure(now);
    }

    /// Makes a sink where there is none and the pause has passed.
    fn connect(&mut self, now: Now) {
        if self.sink.is_some() || self.retry.0.is_some_and(|at| at > now.instant) {
            return;
        }
        match self.make.make() {
            Ok(sink) => {
                self.sink = Some(sink);
                self.heard = Some(now.instant);
            }
            Err(failure) => self.fail(now, &failure),
        }
    }

    /// Something is wrong: another sink is made after a pause.
    fn fail(&mut self, now: Now, failure: &Failure) {
        self.measures.failed(failure);
        self.measures.connected(false);
        if self.measures.trouble(Some(failure.to_string())) {
            tracing::warn!(event = "not-publishing", %failure, "events are not published just now; the journal keeps them");
        }
        self.give_up();
        self.is_probing = true;
        let pause = self.retry.1;
        self.retry = (Some(now.instant + pause), (pause * 2).min(RETRY_PAUSE_MAX));
    }

    /// Throws the sink away with all that it holds.
    pub(super) fn give_up(&mut self) {
        if self.sink.take().is_some() {
            self.measures.resent(self.in_flight().1);
        }
        self.outcomes.clear();
        self.oldest = self.oldest_in_flight().or(self.oldest);
        self.streams.iter_mut().for_each(Stream::rewind);
    }

    /// Bytes and messages on their way.
    fn in_flight(&self) -> (usize, usize) {
        let each = self.streams.iter().map(|stream| (stream.flight.bytes(), stream.flight.len()));
        each.fold((0, 0), |(bytes, messages), (more, others)| (bytes + more, messages + others))
    }

    fn limit(&self, stream: &Stream) -> Option<Durable> {
        (stream.epoch == self.settings.own).then(|| self.durable.get())
    }

    /// Sends what there is room for; returns whether anything was.
    ///
    /// # Errors
    /// The sink must be made anew.
    fn fill(&mut self) -> Result<bool, Failure> {
        let Some(mut sink) = self.sink.take() else { return Ok(false) };
        let before = self.ticket;
        let mut streams = std::mem::take(&mut self.streams);
        let filled = self.fill_from(&mut streams, sink.as_mut());
        // Also a sink that failed: what it has is counted when it is given up.
        (self.streams, self.sink) = (streams, Some(sink));
        if let Err(Stopped::Failed(failure)) = filled {
            return Err(failure);
        }
        Ok(self.ticket > before)
    }

    fn fill_from(&mut self, streams: &mut [Stream], sink: &mut dyn Sink) -> Result<(), Stopped> {
        let each = streams.iter().map(|stream| (stream.flight.bytes(), stream.flight.len()));
        let (mut bytes, mut messages) =
            each.fold((0, 0), |(bytes, messages), (more, others)| (bytes + more, messages + others));
        let messages_max = if self.is_probing { 1 } else { FLIGHT_MESSAGES_MAX };
        for stream in streams {
            let limit = self.limit(stream);
            while !stream.is_read {
                if bytes + MESSAGE_BYTES_MAX > FLIGHT_BYTES_MAX || messages >= messages_max {
                    return Err(Stopped::Full);
                }
                let Some(sent) = self.send_next(stream, limit, sink)? else { break };
                bytes += sent;
                messages += 1;
            }
        }
        Ok(())
    }

    /// Sends the next message of a stream; returns its length, and none if nothing more can be read.
    fn send_next(
        &mut self,
        stream: &mut Stream,
        limit: Option<Durable>,
        sink: &mut dyn Sink,
    ) -> Result<Option<usize>, Stopped> {
        let (mut ticket, turned) = (self.ticket, self.turned);
        let (keys, before) = (&mut stream.keys, stream.feed.position());
        let (settings, verifier, flight) = (&self.settings, stream.verifier.as_deref(), &mut stream.flight);
        let checkpoint = &mut stream.checkpoint;
        let mut sent = Ok(0);
        let next = stream.feed.next(limit, &mut |frame, end| {
            let is_sent = Some((frame.sequence, frame.envelope.time_unix_us)) == *checkpoint;
            if frame.frame_type == FrameType::Checkpoint && is_sent {
                // The last word of a silence: it was in its file before it was in the log.
                flight.passed(ticket, end);
                return true;
            }
            if frame.envelope.key_id != 0 {
                match keys.send(&frame.envelope, settings.key_topic.as_deref(), (ticket, turned), sink) {
                    Ok(None) => {}
                    Ok(Some((bytes, time))) => {
                        flight.sent(ticket, before, bytes, time);
                        ticket += 1;
                    }
                    Err(stopped) => {
                        sent = Err(stopped);
                        return false;
                    }
                }
            }
            let message = Message::of_frame(frame, verifier);
            let topic = match frame.frame_type {
                FrameType::Event => &settings.topic,
                FrameType::Checkpoint => &settings.checkpoint_topic,
            };
            let time = frame.envelope.time_unix_us;
            match sink.send(ticket, topic, &message, time / 1000) {
                Ok(Taken::Yes) => {
                    flight.sent(ticket, end, message.bytes(), time);
                    if frame.frame_type == FrameType::Checkpoint {
                        *checkpoint = Some((frame.sequence, time));
                    }
                    sent = Ok(message.bytes());
                    true
                }
                Ok(Taken::Full) => false,
                Err(failure) => {
                    sent = Err(Stopped::Failed(failure));
                    false
                }
            }
        });
        // Spent only where something bears it.
        self.ticket = ticket + u64::from(matches!(next, Ok(Next::Taken | Next::Damage(_) | Next::End)));
        match next {
            Ok(Next::Taken) => sent.map(Some),
            Ok(Next::NotTaken) => sent.and(Err(Stopped::Full)),
            Ok(Next::Damage(damage)) => {
                self.pass(stream, ticket, &damage);
                Ok(Some(0))
            }
            Ok(Next::Waiting) => self.send_silence(stream, sink),
            Ok(Next::End) => {
                stream.flight.passed(ticket, stream.feed.position());
                let sent = self.send_silence(stream, sink);
                // Where there was no room, the end comes again.
                stream.is_read = sent.is_ok();
                sent
            }
            Err(error) => {
                let trouble = format!("journal {} cannot be read: {error}", stream.folder.display());
                self.tell(trouble);
                Ok(None)
            }
        }
    }

    fn tell(&self, trouble: String) {
        if self.measures.trouble(Some(trouble.clone())) {
            tracing::warn!(event = "not-publishing", trouble, "events are not published just now");
        }
    }

    /// Goes on behind a damage, and records it once.
    fn pass(&mut self, stream: &mut Stream, ticket: Ticket, damage: &Damage) {
        stream.flight.passed(ticket, damage.end);
        let at = (damage.segment, damage.offset);
        if at < stream.damaged_to {
            return;
        }
        stream.damaged_to = (damage.segment, damage.offset + 1);
        self.measures.damaged();
        if damage.is_unreadable
            && let Err(error) = stream.keep(damage.segment)
        {
            let (epoch, segment) = (stream.epoch, damage.segment);
            tracing::warn!(event = "segment-keep-not-written", %epoch, segment, %error, "that a segment is to be kept cannot be written down");
        }
        let Damage { segment, offset, what, events, .. } = damage;
        let reason = format!(
            "journal damaged: epoch {}, segment {segment}, offset {offset}: {what}; published without it, the segment is kept",
            stream.epoch
        );
        tracing::error!(
            event = "journal-damaged",
            reason,
            events,
            "what the journal held cannot be read any more"
        );
        (self.gap)(reason, *events);
    }

    /// Takes what became of messages; returns whether anything did.
    fn hear(&mut self, now: Now) -> bool {
        let waits = self.in_flight().1 > 0;
        let Some(sink) = &mut self.sink else { return false };
        let polled = sink.poll(if waits { self.patience } else { Duration::ZERO }, &mut self.outcomes);
        let (connected, denied) = (sink.is_connected(), sink.denied());
        let (mut messages, mut bytes, mut failure) = (0, 0, polled.err());
        let before: Vec<Position> = self.watermarks().collect();
        for Outcome { ticket, result } in self.outcomes.drain(..) {
            match result {
                Ok(()) => {
                    let acknowledged = self
                        .streams
                        .iter_mut()
                        .find_map(|stream| Some((stream.epoch, stream.flight.acknowledge(ticket)?)));
                    if let Some((epoch, (length, made, end))) = acknowledged {
                        messages += 1;
                        bytes += length as u64;
                        let made = self.steps.by_now(made, (epoch == self.settings.own).then_some(end));
                        self.measures.delivered(now.unix_us.saturating_sub(made));
                    }
                }
                Err(error) => failure = Some(failure.map_or(error.clone(), |other| other.or_clearer(error))),
            }
        }
        self.measures.acknowledged(messages, bytes);
        self.patience = if messages > 0 { POLL_SHORT } else { (self.patience * 2).min(POLL_LONG) };
        if messages > 0 {
            self.heard = Some(now.instant);
        }
        if !self.watermarks().eq(before) {
            (self.retry, self.is_probing, self.oldest) = ((None, RETRY_PAUSE), false, None);
            if self.measures.trouble(None) {
                tracing::info!(event = "publishing", "events are published");
            }
        }
        let is_silent_for =
            |time| waits && self.heard.is_some_and(|at| now.instant.duration_since(at) >= time);
        let is_silent = is_silent_for(SILENCE);
        match connected {
            Some(connected) if !is_silent => self.measures.connected(connected),
            _ if messages > 0 => self.measures.connected(true),
            _ if is_silent => self.measures.connected(false),
            _ => {}
        }
        if let (Some(reason), 0) = (denied, messages) {
            let refused = Failure::Denied { reason };
            if is_silent_for(REFUSED) {
                failure.get_or_insert(refused);
            } else if self.measures.trouble(Some(refused.to_string())) {
                tracing::warn!(event = "not-publishing", %refused, "events are not published just now; the journal keeps them");
            }
        } else if is_silent && self.measures.trouble(Some("no broker acknowledges anything".to_owned())) {
            tracing::warn!(
                event = "not-publishing",
                "no broker acknowledges anything; the journal keeps the events"
            );
        }
        if let Some(failure) = failure {
            self.fail(now, &failure);
        }
        messages > 0
    }

    fn write_cursors(&mut self, now: Now, at_once: bool) {
        for stream in &mut self.streams {
            if let Err(error) = stream.write_cursor(now, self.settings.replay_window, at_once) {
                tracing::warn!(
                    event = "cursor-not-written",
                    epoch = %stream.epoch, %error,
                    "how far events are published cannot be written down; after a crash some come twice"
                );
            }
        }
    }

    /// Removes what was acknowledged long enough ago.
    fn remove(&mut self, now: Now) {
        for stream in &mut self.streams {
            match stream.remove_published(now, self.settings.replay_window) {
                Ok(count) => self.measures.removed(count),
                Err(error) => {
                    tracing::warn!(event = "segments-not-removed", epoch = %stream.epoch, %error, "published segments cannot be removed");
                }
            }
        }
        let (storage, journal) = (self.settings.storage.as_ref(), &self.settings.journal);
        if let Err(error) = retention::sweep(storage, journal) {
            tracing::warn!(event = "epochs-not-removed", journal = %journal.display(), %error, "what is left of removed epochs stays");
        }
        if !self.streams.iter().any(Stream::is_gone) {
            return;
        }
        let Ok(named) = retention::predecessors(storage, journal) else { return };
        self.streams.retain(|stream| {
            let goes = stream.epoch != self.settings.own
                && stream.is_gone()
                && !named.contains(&stream.epoch.to_string());
            if !goes {
                return true;
            }
            match retention::remove_epoch(storage, &stream.folder) {
                Ok(()) => tracing::info!(event = "epoch-removed", epoch = %stream.epoch, "published, and removed from the journal"),
                Err(error) => {
                    tracing::warn!(event = "epochs-not-removed", epoch = %stream.epoch, %error, "a published epoch cannot be removed");
                }
            }
            false
        });
    }

    pub(super) fn measure(&self, now: Now) {
        let unaccounted = self.streams.iter().filter(|stream| stream.is_unaccounted()).count();
        self.measures.unaccounted(unaccounted as u64);
        let bytes: u64 = self.streams.iter().map(|stream| stream.backlog_bytes(self.limit(stream))).sum();
        // Without a sink nothing is on its way, and what waits is as old as what waited when it failed.
        let waiting = || (bytes > 0).then(|| self.oldest.unwrap_or(now.unix_us));
        self.measures.backlog(bytes, self.oldest_in_flight().or_else(waiting));
    }

    fn watermarks(&self) -> impl Iterator<Item = Position> {
        self.streams.iter().map(|stream| stream.flight.watermark())
    }
}
