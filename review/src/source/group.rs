//! Reads topics as a member of a consumer group: the members share the partitions, and each goes on where the group was.
//!
//! At least once: offsets are committed when what was read has been written out ([`Group::commit`] is the caller's word for
//! that), so whoever dies or loses a partition before has it read again by another. Within a partition, and so within a
//! session, the order is the topic's. What this member gave already it does not give again.

use std::{collections::BTreeMap, time::Duration};

use rdkafka::{
    Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, CommitMode, Consumer as _},
    error::{KafkaError, RDKafkaErrorCode},
};
use uuid::Uuid;
use weir_common::message::Kind;

use super::{
    Place, Record, SourceError,
    address::Topics,
    client::{Context, client},
    kafka::{Consumer, Patience, ReadError, taken},
    properties::Properties,
    ranges::Ranges,
    spool::{EPOCHS_MAX, SpoolError},
};
use crate::moment::Moment;

/// How long one look for a message waits.
const POLL: Duration = Duration::from_millis(100);
/// Most messages that one look passes over.
const PASSED_OVER_MAX: usize = 512;
/// Longest name of a group that is taken.
const NAME_BYTES_MAX: usize = 249;

/// Where a group begins in a partition that it has no offset of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Begin {
    /// With the first message.
    #[default]
    Earliest,
    /// With what comes from now on.
    Latest,
    /// With what was written at or after this.
    Since(Moment),
}

/// A member of a group.
pub(crate) struct Group {
    name: String,
    inner: BaseConsumer<Context>,
    /// What was given and is not committed: the offset behind it.
    given: BTreeMap<(String, i32), i64>,
    seen: BTreeMap<Uuid, Ranges>,
}

impl Group {
    /// Whether a text may name a group.
    ///
    /// # Errors
    /// In words.
    pub(crate) fn parse(text: &str) -> Result<String, String> {
        let is_name = !text.is_empty()
            && text.len() <= NAME_BYTES_MAX
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
        let form = "a group's name has letters, digits, `.`, `_` and `-`, at most 249";
        is_name.then(|| text.to_owned()).ok_or_else(|| form.to_owned())
    }

    /// Joins it.
    ///
    /// # Errors
    /// No broker answers, a topic is not there, or the library refuses a property.
    pub(crate) fn join(
        topics: &Topics,
        properties: &Properties,
        name: &str,
        begin: Begin,
    ) -> Result<Self, ReadError> {
        // A member waits for ever for a topic that is not there; who made a slip shall be told.
        for topic in &topics.names {
            Consumer::new(topics, topic, properties, Patience::default())?.spans(None)?;
        }
        // Of where it has been and what is no more; where it begins is set when it is given partitions.
        let reset = if begin == Begin::Latest { "latest" } else { "earliest" };
        let last = [
            ("group.id", name),
            ("auto.offset.reset", reset),
            ("enable.partition.eof", "false"),
            // Taking away and giving anew is what this file is written for.
            ("partition.assignment.strategy", "range,roundrobin"),
        ];
        let inner = client(topics, properties, &last, begin)?;
        let names: Vec<&str> = topics.names.iter().map(String::as_str).collect();
        inner.subscribe(&names).map_err(|error| ReadError::Client { reason: error.to_string() })?;
        Ok(Self { name: name.to_owned(), inner, given: BTreeMap::new(), seen: BTreeMap::new() })
    }

    /// The next event, if one has come. Waits a moment for it.
    ///
    /// # Errors
    /// A topic cannot be read any more. Brokers that are away are waited for.
    pub(crate) fn next_record(&mut self) -> Result<Option<Record>, SourceError> {
        // Messages that are passed over shall not keep from committing.
        for _ in 0..PASSED_OVER_MAX {
            let message = match self.inner.poll(POLL) {
                None => return Ok(None),
                Some(Err(error)) => {
                    self.judge(&error)?;
                    return Ok(None);
                }
                Some(Ok(message)) => message,
            };
            let taken = taken(&message);
            self.given.insert((message.topic().to_owned(), taken.partition), taken.offset + 1);
            let Ok(received) = &taken.received else { continue };
            let Kind::Event { sequence } = received.kind else { continue };
            // Whoever may write to the topic can make up epochs.
            if self.seen.len() == EPOCHS_MAX && !self.seen.contains_key(&received.epoch) {
                return Err(SpoolError::TooManyEpochs.into());
            }
            if self.seen.entry(received.epoch).or_default().insert(sequence) {
                return Ok(Some(Record {
                    // Nothing is read back from what is followed.
                    place: Place { segment: usize::MAX, offset: 0 },
                    envelope: received.envelope.clone(),
                    frame_bytes: received.value.len() as u64,
                    value: received.value.to_vec(),
                }));
            }
        }
        Ok(None)
    }

    /// Says that all that was given is safe. What belongs to partitions that others have now is left to them.
    ///
    /// # Errors
    /// The member may not commit. A commit that comes too late is no error: what it was for is read again.
    pub(crate) fn commit(&mut self) -> Result<(), ReadError> {
        if self.given.is_empty() {
            return Ok(());
        }
        let refused = |error: KafkaError| ReadError::Client { reason: error.to_string() };
        let own = self.inner.assignment().map_err(refused)?;
        self.given.retain(|(topic, partition), _| own.find_partition(topic, *partition).is_some());
        let mut offsets = TopicPartitionList::new();
        for ((topic, partition), offset) in &self.given {
            offsets.add_partition_offset(topic, *partition, Offset::Offset(*offset)).map_err(refused)?;
        }
        if offsets.count() == 0 {
            return Ok(());
        }
        match self.inner.commit(&offsets, CommitMode::Sync) {
            // Tried again with what comes next, while the partitions are this member's.
            Err(error) => self.judge(&error),
            Ok(()) => {
                self.given.clear();
                Ok(())
            }
        }
    }

    /// Ends the reading on an error that does not go away by itself; the library goes on trying after others.
    fn judge(&self, error: &KafkaError) -> Result<(), ReadError> {
        let reason = || error.to_string();
        match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::GroupAuthorizationFailed) => {
                Err(ReadError::Group { group: self.name.clone(), reason: reason() })
            }
            Some(RDKafkaErrorCode::TopicAuthorizationFailed) => {
                Err(ReadError::Forbidden { topic: "of the group".to_owned(), reason: reason() })
            }
            _ if matches!(error, KafkaError::MessageConsumptionFatal(_)) => {
                Err(ReadError::Client { reason: reason() })
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use rdkafka::consumer::Consumer as _;

    use super::{Begin, Group, Topics};
    use crate::{
        fixture::one_session,
        source::{
            kafka::{Broker, Sent},
            properties::Properties,
        },
    };

    /// A member that begins at the end and has been given its partitions.
    fn begins_at_the_end(topics: &Topics, properties: &Properties) -> Group {
        let mut group = Group::join(topics, properties, "siem", Begin::Latest).unwrap();
        let begun = Instant::now();
        while group.inner.assignment().unwrap().count() == 0 {
            assert!(begun.elapsed() < Duration::from_secs(60), "it is given no partitions");
            assert!(group.next_record().unwrap().is_none(), "it begins before the end");
        }
        group
    }

    #[test]
    fn a_group_that_began_at_the_end_misses_nothing_of_what_comes_while_it_has_no_member() {
        let (directory, _) = one_session();
        let sent = Sent::of_journal(directory.path(), "weir", "checkpoints");
        let sent: Vec<_> = sent.into_iter().filter(|sent| sent.topic == "weir").collect();
        let (before, after) = sent.split_at(sent.len() / 2);
        let broker = Broker::new(&["weir"]);
        let topics = broker.topics(&["weir"]);
        let path = directory.path().join("client.properties");
        // A member that has ended is missed after so long.
        std::fs::write(&path, "session.timeout.ms=6000\nheartbeat.interval.ms=500").unwrap();
        let properties = Properties::read(&path).unwrap();
        broker.send(before);
        // It is given nothing, and so commits nothing of what it was given.
        begins_at_the_end(&topics, &properties).inner.unsubscribe();
        broker.send(after);
        let mut group = Group::join(&topics, &properties, "siem", Begin::Latest).unwrap();
        let (mut given, begun) = (Vec::new(), Instant::now());
        while given.len() < after.len() && begun.elapsed() < Duration::from_secs(60) {
            given.extend(group.next_record().unwrap().map(|record| record.value));
        }
        let mut expected: Vec<_> = after.iter().map(|sent| sent.value.clone()).collect();
        given.sort();
        expected.sort();
        assert!(given == expected, "{} of {} events", given.len(), expected.len());
    }

    #[test]
    fn a_groups_name_is_plain() {
        assert_eq!(Group::parse("siem.weir-1_a"), Ok("siem.weir-1_a".to_owned()));
        for text in ["", "a b", "a/b", "ä", &"a".repeat(250)] {
            assert!(Group::parse(text).is_err(), "{text}");
        }
    }
}
