//! Topics as a source: all partitions, from their beginnings (or a time) to what they hold now, as a [`Journal`].
//!
//! What a topic has and a journal has not is kept beside it: messages of others, messages that came again, and where
//! retention may have removed something. A topic is written to while it is read, so partitions end at slightly
//! different moments: holes that this leaves are filled by a second look.

use std::{
    cell::RefCell,
    collections::{BTreeMap, VecDeque},
};

use uuid::Uuid;
use weir_common::message::Kind;

use super::{
    Journal, Place, Record, Records, SourceError,
    address::Topics,
    kafka::{Consumer, Patience, Span, Taken},
    properties::Properties,
    ranges::{Ranges, Recent},
    spool::{Conflict, EPOCHS_MAX, MessagePlace, Places, Spool, SpoolError, Spooled, digest},
    with_sources,
};
use crate::{
    moment::{Moment, counted},
    terminal::Progress,
};

/// How often a second look is taken at what came while the first one was.
const SECOND_LOOKS: usize = 2;
/// Most messages of a topic that one look at a followed one takes: 32 MiB of the longest.
const LOOK_MESSAGES_MAX: usize = 64;

/// How to read topics.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Reading {
    /// Only what was written at or after this.
    pub(crate) since: Option<Moment>,
    /// Whether the reading goes on after what is there now.
    pub(crate) follow: bool,
    /// How long Kafka may keep us waiting.
    pub(crate) patience: Patience,
}

/// A message that Weir did not write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stranger {
    pub(crate) place: MessagePlace,
    /// What is wrong with it.
    pub(crate) what: String,
}

/// What is known of topics beside the journal that they hold.
#[derive(Debug, Default)]
pub(crate) struct Facts {
    /// Messages that were read.
    pub(crate) messages: u64,
    pub(crate) partitions: u64,
    pub(crate) foreign: Places<Stranger>,
    /// Partitions whose beginning is gone.
    pub(crate) trimmed: u64,
    /// Events before this time may be gone with it.
    pub(crate) horizon_us: Option<i64>,
}

/// Where a journal came from.
pub(crate) struct Topic {
    topics: Topics,
    spooled: Spooled,
    facts: Facts,
    /// What to follow, and from where; taken by the one who does.
    live: RefCell<Vec<(Consumer, Vec<Span>)>>,
}

impl std::fmt::Debug for Topic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Topic")
            .field("topics", &self.topics)
            .field("facts", &self.facts)
            .finish_non_exhaustive()
    }
}

impl Topic {
    /// As the user wrote it.
    pub(crate) fn name(&self) -> String {
        self.topics.to_string()
    }

    /// What is known of it.
    pub(crate) fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Messages of which there was one already.
    pub(crate) fn duplicates(&self) -> u64 {
        self.spooled.duplicates
    }

    /// Messages that should be the same and are not.
    pub(crate) fn conflicts(&self) -> &Places<Conflict> {
        &self.spooled.conflicts
    }

    /// A place in words.
    pub(crate) fn place(&self, place: MessagePlace) -> String {
        let topic = self.topics.names.get(usize::from(place.topic)).map_or("?", String::as_str);
        format!("topic {topic} partition {} offset {}", place.partition, place.offset)
    }
}

/// Takes messages of several topics.
struct Reader {
    spool: Spool,
    facts: Facts,
    /// Time of the first event of each partition that has one, by topic.
    first_us: Vec<BTreeMap<i32, i64>>,
}

impl Reader {
    fn take(&mut self, topic: u8, taken: &Taken<'_>) -> Result<(), SourceError> {
        self.facts.messages += 1;
        let place = MessagePlace { topic, partition: taken.partition, offset: taken.offset };
        if let Some((epoch, number, value)) = taken.wrapped_key {
            return Ok(self.spool.add_key(epoch, number, value)?);
        }
        let received = match &taken.received {
            Ok(received) => received,
            Err(error) => {
                self.facts.foreign.push(Stranger { place, what: with_sources(error) });
                return Ok(());
            }
        };
        if !self.spool.add(received, place)? {
            let what = "key and headers are longer than an agent makes them".into();
            self.facts.foreign.push(Stranger { place, what });
        } else if let (Kind::Event { .. }, Some(first)) =
            (received.kind, self.first_us.get_mut(usize::from(topic)))
        {
            first.entry(taken.partition).or_insert(received.envelope.time_unix_us);
        }
        Ok(())
    }

    /// Notes where the beginning of a topic is gone: `spans` are those of its first reading.
    fn trimmed(&mut self, topic: usize, spans: &[Span]) {
        let first = self.first_us.get(topic).filter(|first| !first.is_empty());
        for span in spans.iter().filter(|span| span.from > 0) {
            self.facts.trimmed += 1;
            // In a partition that has no event left anything may be gone; a topic of checkpoints never had one.
            if let Some(first) = first {
                let horizon = first.get(&span.partition).copied().unwrap_or(i64::MAX);
                self.facts.horizon_us = self.facts.horizon_us.max(Some(horizon));
            }
        }
    }
}

impl Journal {
    /// Reads topics into a journal.
    ///
    /// # Errors
    /// Kafka or the disk fail, or nothing of Weir's is there.
    pub(crate) fn of_topics(
        topics: &Topics,
        properties: &Properties,
        reading: Reading,
    ) -> Result<Self, SourceError> {
        let since_ms = reading.since.map(|since| since.0.div_euclid(1000));
        let mut live = Vec::new();
        for name in &topics.names {
            let consumer = Consumer::new(topics, name, properties, reading.patience)?;
            let spans = consumer.spans(since_ms)?;
            live.push((consumer, spans));
        }
        let first_us = vec![BTreeMap::new(); live.len()];
        let mut reader = Reader { spool: Spool::new()?, facts: Facts::default(), first_us };
        reader.facts.partitions = live.iter().map(|(_, spans)| spans.len() as u64).sum();
        let total = live.iter().flat_map(|(_, spans)| spans).map(|span| span.until.abs_diff(span.from)).sum();
        let mut progress = Progress::new("reading", total);
        read_all(&live, &mut reader, &mut || progress.advance(1))?;
        drop(progress);
        for (number, (_, spans)) in live.iter().enumerate() {
            reader.trimmed(number, spans);
        }
        if !reading.follow && reading.since.is_none() {
            look_again(&mut live, &mut reader)?;
        }
        let Reader { spool, facts, .. } = reader;
        let spooled = spool.finish()?;
        let mut journal = match Self::open(spooled.path()) {
            Err(SourceError::Empty { .. }) if !reading.follow && reading.since.is_none() => {
                let foreign = counted(facts.foreign.number(), "message");
                return Err(SourceError::NoMessages { name: topics.to_string(), foreign });
            }
            Err(SourceError::Empty { path }) => Self::empty(path),
            opened => opened?,
        };
        let live = RefCell::new(if reading.follow { live } else { Vec::new() });
        let topic = Topic { topics: topics.clone(), spooled, facts, live };
        journal.tell_of_strangers(&topic);
        journal.topic = Some(topic);
        Ok(journal)
    }

    fn tell_of_strangers(&self, topic: &Topic) {
        if let Some(first) = topic.facts.foreign.listed.first() {
            let number = counted(topic.facts.foreign.number(), "message");
            let place = topic.place(first.place);
            self.warn(format!("{number} of others were passed over, the first at {place}: {}", first.what));
        }
        for conflict in &topic.conflicts().listed {
            self.warn(format!(
                "epoch {} sequence {}: {} says other than {}, which is shown",
                conflict.epoch,
                conflict.sequence,
                topic.place(conflict.other),
                topic.place(conflict.first),
            ));
        }
    }
}

fn read_all(
    live: &[(Consumer, Vec<Span>)],
    reader: &mut Reader,
    advance: &mut dyn FnMut(),
) -> Result<(), SourceError> {
    for (number, (consumer, spans)) in (0_u8..).zip(live) {
        consumer.read::<SourceError>(spans, &mut |taken| {
            advance();
            reader.take(number, taken)
        })?;
    }
    Ok(())
}

/// Fills holes with what came while partitions were read.
fn look_again(live: &mut [(Consumer, Vec<Span>)], reader: &mut Reader) -> Result<(), SourceError> {
    for _ in 0..SECOND_LOOKS {
        if !reader.spool.has_holes() {
            return Ok(());
        }
        reader.spool.fill_holes_only();
        for (consumer, spans) in &mut *live {
            for span in spans {
                let (low, high) = consumer.watermarks(span.partition)?;
                *span = Span { low, from: span.until.max(low), until: high.max(span.until), ..*span };
            }
        }
        read_all(live, reader, &mut || ())?;
    }
    Ok(())
}

/// Follows topics: what was there, then what comes.
pub(crate) struct TopicTail<'a> {
    journal: &'a Journal,
    topic: &'a Topic,
    /// What was there, until all of it was given.
    stored: Option<Records<'a>>,
    live: Vec<(Consumer, Vec<Span>)>,
    seen: BTreeMap<Uuid, Ranges>,
    recent: Recent,
    ready: VecDeque<Record>,
}

impl<'a> TopicTail<'a> {
    pub(crate) fn new(journal: &'a Journal, topic: &'a Topic) -> Self {
        Self {
            journal,
            topic,
            stored: Some(journal.records()),
            live: topic.live.take(),
            seen: topic.spooled.events.clone(),
            recent: topic.spooled.recent.clone(),
            ready: VecDeque::new(),
        }
    }

    /// The next event, if there is one by now.
    ///
    /// # Errors
    /// The topic cannot be read any more.
    pub(crate) fn next_record(&mut self) -> Result<Option<Record>, SourceError> {
        if let Some(stored) = &mut self.stored {
            if let Some(record) = stored.next() {
                return record.map(Some);
            }
            self.stored = None;
            for (consumer, spans) in &self.live {
                consumer.assign(spans.iter().map(|span| (span.partition, span.until)))?;
            }
        }
        if self.ready.is_empty() {
            self.look()?;
        }
        Ok(self.ready.pop_front())
    }

    /// Takes what has come, in the order of epochs and sequences.
    fn look(&mut self) -> Result<(), SourceError> {
        let mut fresh = BTreeMap::new();
        for (number, (consumer, _)) in (0_u8..).zip(&self.live) {
            consumer.poll::<SourceError>(LOOK_MESSAGES_MAX, &mut |taken| {
                let Ok(received) = &taken.received else { return Ok(()) };
                let Kind::Event { sequence } = received.kind else { return Ok(()) };
                // Whoever may write to the topic can make up epochs.
                if self.seen.len() == EPOCHS_MAX && !self.seen.contains_key(&received.epoch) {
                    return Err(SpoolError::TooManyEpochs.into());
                }
                let Some(digest) = digest(received) else { return Ok(()) };
                if self.seen.entry(received.epoch).or_default().insert(sequence) {
                    self.recent.keep(received.epoch, sequence, digest);
                    let record = Record {
                        // Nothing is read back from what is followed.
                        place: Place { segment: usize::MAX, offset: 0 },
                        envelope: received.envelope.clone(),
                        frame_bytes: received.value.len() as u64,
                        value: received.value.to_vec(),
                    };
                    fresh.insert((received.epoch, sequence), record);
                } else if self.recent.contradicts(received.epoch, sequence, &digest) {
                    let place =
                        MessagePlace { topic: number, partition: taken.partition, offset: taken.offset };
                    self.journal.warn(format!(
                        "epoch {} sequence {sequence}: {} says other than what was shown",
                        received.epoch,
                        self.topic.place(place),
                    ));
                }
                Ok(())
            })?;
        }
        self.ready.extend(fresh.into_values());
        Ok(())
    }
}
