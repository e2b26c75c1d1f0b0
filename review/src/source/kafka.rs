//! Knows the Kafka library, with [`super::client`] and [`super::group`] alone: reads a topic's partitions between two offsets, and follows them.
//!
//! Partitions are assigned by hand from known offsets; nothing is ever committed and no group is joined, so reading
//! leaves no trace in the cluster (but for [`super::group`], which is asked for by name). Every wait has an end. What messages mean is told by `weir_common::message`; what is
//! done with them is the caller's. Values of properties are secrets and never part of an error.

use std::{
    cell::Cell,
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Once,
    time::{Duration, Instant},
};

use rdkafka::{
    Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    error::{KafkaError, RDKafkaErrorCode},
    message::{BorrowedMessage, Headers as _},
    metadata::Metadata,
};
use uuid::Uuid;
use weir_common::{
    encryption::of_message_key,
    message::{HEADERS_MAX, MessageError, Received},
};

use super::{
    address::Topics,
    client::{Context, client},
    group::Begin,
    properties::{Properties, PropertiesError},
};

/// How long one look for messages waits.
const POLL: Duration = Duration::from_millis(100);

/// How long one look for a broker takes, while there is none.
const LOOK: Duration = Duration::from_millis(500);

/// So long brokers that refuse are tried again: one that has just started may not know yet whom it lets in.
const REFUSED_FOR: Duration = Duration::from_secs(2);

/// How long Kafka may keep a reader waiting.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// For the answer to one question (metadata, offsets), the first connection included.
    pub(crate) answer: Duration,
    /// For the next message, while there must be one.
    pub(crate) stall: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { answer: Duration::from_secs(15), stall: Duration::from_secs(60) }
    }
}

/// Why a topic cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    /// A property is not accepted.
    #[error(transparent)]
    Properties(#[from] PropertiesError),
    /// The client cannot be made.
    #[error("the Kafka client does not accept its configuration: {reason}")]
    Client { reason: String },
    /// No broker answers.
    #[error(
        "no answer from {brokers} within {seconds} s: {reason}; are address and --kafka-config (TLS, SASL) right?"
    )]
    Unreachable { brokers: String, seconds: u64, reason: String },
    /// The brokers do not let the reader in.
    #[error("{brokers} refuses: {reason}; is --kafka-config (TLS, SASL) right?")]
    Refused { brokers: String, reason: String },
    /// There is no such topic, or the reader may not know of it.
    #[error(
        "there is no topic {topic} on {brokers}, or you may not see it; is `kafka.topic` of the agent's configuration \
         another?"
    )]
    NoTopic { topic: String, brokers: String },
    /// The reader may not read it.
    #[error("you may not read topic {topic}: {reason}; it takes DESCRIBE and READ on the topic")]
    Forbidden { topic: String, reason: String },
    /// The reader may not be of the group.
    #[error("you may not read as group {group}: {reason}; it takes READ on the group")]
    Group { group: String, reason: String },
    /// Something else.
    #[error("topic {topic} cannot be read: {reason}")]
    Topic { topic: String, reason: String },
    /// Messages stopped coming.
    #[error(
        "partition {partition} of topic {topic} gave nothing for {seconds} s, and messages up to offset {until} must \
         be there: {reason}"
    )]
    Stalled { topic: String, partition: i32, until: i64, seconds: u64, reason: String },
}

/// What is to be read of one partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) partition: i32,
    /// The first offset that the partition still has.
    pub(crate) low: i64,
    /// Where reading begins.
    pub(crate) from: i64,
    /// Where it ends: the high watermark.
    pub(crate) until: i64,
}

/// A message as it came.
#[derive(Debug)]
pub(crate) struct Taken<'a> {
    pub(crate) partition: i32,
    pub(crate) offset: i64,
    /// What it holds, if Weir wrote it.
    pub(crate) received: Result<Received<'a>, Foreign>,
    /// Epoch and number of the wrapped key that it holds, or erases.
    pub(crate) wrapped_key: Option<(Uuid, u64, Option<&'a [u8]>)>,
}

/// Why a message is not one of Weir's.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Foreign {
    /// It is not in Weir's form.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// The name of a header is not even text.
    #[error("the name of a header is not UTF-8")]
    HeaderName,
}

/// Reads one topic.
pub(crate) struct Consumer {
    inner: BaseConsumer<Context>,
    brokers: String,
    topic: String,
    patience: Patience,
}

impl Consumer {
    /// Makes a client for one topic. Connects to nothing yet.
    ///
    /// # Errors
    /// The library refuses a property.
    pub(crate) fn new(
        topics: &Topics,
        topic: &str,
        properties: &Properties,
        patience: Patience,
    ) -> Result<Self, ReadError> {
        let inner = client(topics, properties, &[], Begin::Earliest)?;
        Ok(Self { inner, brokers: topics.brokers.clone(), topic: topic.to_owned(), patience })
    }

    /// What there is to read at this moment: all of it, or what was written at or after a time (milliseconds since the
    /// Unix epoch).
    ///
    /// # Errors
    /// No broker answers, or the topic cannot be read.
    pub(crate) fn spans(&self, since_ms: Option<i64>) -> Result<Vec<Span>, ReadError> {
        if self.inner.client().context().has_token() {
            // The first one is asked for by an event, which a question that blocks does not look at.
            let _ = self.inner.poll(POLL);
        }
        let metadata = self.metadata()?;
        let topic = metadata.topics().iter().find(|topic| topic.name() == self.topic);
        let topic = topic.ok_or_else(|| self.no_topic())?;
        if let Some(error) = topic.error() {
            return Err(self.refused(error.into()));
        }
        if topic.partitions().is_empty() {
            return Err(self.no_topic());
        }
        let mut spans = Vec::with_capacity(topic.partitions().len());
        for partition in topic.partitions() {
            let (low, high) = self.watermarks(partition.id())?;
            spans.push(Span { partition: partition.id(), low, from: low, until: high });
        }
        if let Some(since_ms) = since_ms {
            self.seek(&mut spans, since_ms)?;
        }
        Ok(spans)
    }

    /// What the brokers say of the topic. The library would try brokers that refuse until all of the time is over; who is let in by
    /// none is told so before.
    fn metadata(&self) -> Result<Metadata, ReadError> {
        let (begun, context, mut wait) = (Instant::now(), self.inner.client().context(), LOOK);
        loop {
            let left = self.patience.answer.saturating_sub(begun.elapsed());
            let error = match self.inner.fetch_metadata(Some(&self.topic), wait.min(left)) {
                Ok(metadata) => return Ok(metadata),
                Err(error) => error,
            };
            let code = error.rdkafka_error_code();
            // Reasons come as events, one a look; nothing else can come yet.
            let heard = Instant::now();
            while heard.elapsed() < POLL && self.inner.poll(POLL).is_some() {}
            let is_over = begun.elapsed() >= self.patience.answer;
            if let Some(reason) = context.refusal().filter(|_| is_over || begun.elapsed() >= REFUSED_FOR) {
                return Err(ReadError::Refused { brokers: self.brokers.clone(), reason });
            }
            let failed = self.failed(&error);
            if is_over || !matches!(failed, ReadError::Unreachable { .. }) {
                return Err(failed);
            }
            // It was asked, and takes its time: to ask again would take as long.
            if code == Some(RDKafkaErrorCode::OperationTimedOut) {
                wait = self.patience.answer;
            }
        }
    }

    /// First offset, and the one behind the last.
    ///
    /// # Errors
    /// No broker answers.
    pub(crate) fn watermarks(&self, partition: i32) -> Result<(i64, i64), ReadError> {
        let wait = self.patience.answer;
        self.inner.fetch_watermarks(&self.topic, partition, wait).map_err(|e| self.failed(&e))
    }

    /// Moves the beginning of each span to the first message of that time or later.
    fn seek(&self, spans: &mut [Span], since_ms: i64) -> Result<(), ReadError> {
        let mut times = TopicPartitionList::with_capacity(spans.len());
        for span in &*spans {
            times
                .add_partition_offset(&self.topic, span.partition, Offset::Offset(since_ms.max(0)))
                .map_err(|e| self.failed(&e))?;
        }
        let found = self.inner.offsets_for_times(times, self.patience.answer).map_err(|e| self.failed(&e))?;
        for element in found.elements() {
            element.error().map_err(|e| self.failed(&e))?;
            let Some(span) = spans.iter_mut().find(|span| span.partition == element.partition()) else {
                continue;
            };
            span.from = match element.offset() {
                Offset::Offset(offset) => offset.clamp(span.low, span.until.max(span.low)),
                // Nothing of that time or later.
                _ => span.until,
            };
        }
        Ok(())
    }

    /// Reads the spans to their ends and gives each message to `take`.
    ///
    /// # Errors
    /// Kafka fails or falls silent, or what `take` returns.
    pub(crate) fn read<E: From<ReadError>>(
        &self,
        spans: &[Span],
        take: &mut dyn FnMut(&Taken<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let open = spans.iter().filter(|span| span.from < span.until);
        let mut open: BTreeMap<i32, i64> = open.map(|span| (span.partition, span.until)).collect();
        if open.is_empty() {
            return Ok(());
        }
        self.assign(spans.iter().filter(|span| span.from < span.until).map(|s| (s.partition, s.from)))?;
        let mut last = Instant::now();
        while let Some((&partition, &until)) = open.first_key_value() {
            let ended = match self.inner.poll(POLL) {
                None if last.elapsed() < self.patience.stall => continue,
                None => return Err(self.stalled(partition, until).into()),
                Some(Err(KafkaError::PartitionEOF(partition))) => partition,
                Some(Err(error)) => {
                    self.judge(&error)?;
                    if last.elapsed() < self.patience.stall {
                        continue;
                    }
                    return Err(self.stalled(partition, until).into());
                }
                Some(Ok(message)) => {
                    let (partition, offset) = (message.partition(), message.offset());
                    // What comes behind the end belongs to a later reading.
                    let Some(until) = open.get(&partition) else { continue };
                    if offset < *until {
                        take(&taken(&message))?;
                    }
                    last = Instant::now();
                    if offset + 1 < *until {
                        continue;
                    }
                    partition
                }
            };
            last = Instant::now();
            if open.remove(&ended).is_some() {
                self.pause(ended);
            }
        }
        Ok(())
    }

    /// Begins to follow partitions from these offsets.
    ///
    /// # Errors
    /// The library refuses.
    pub(crate) fn assign(&self, from: impl Iterator<Item = (i32, i64)>) -> Result<(), ReadError> {
        let mut list = TopicPartitionList::new();
        for (partition, offset) in from {
            list.add_partition_offset(&self.topic, partition, Offset::Offset(offset))
                .map_err(|e| self.failed(&e))?;
        }
        self.inner.assign(&list).map_err(|e| self.failed(&e))?;
        // What an earlier reading paused would stay so.
        self.inner.resume(&list).map_err(|e| self.failed(&e))
    }

    /// Gives what has come by now to `take`, at most `most` messages. Waits for nothing.
    ///
    /// # Errors
    /// The topic cannot be read any more, or what `take` returns. Brokers that are away are waited for.
    pub(crate) fn poll<E: From<ReadError>>(
        &self,
        most: usize,
        take: &mut dyn FnMut(&Taken<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        for _ in 0..most {
            match self.inner.poll(Duration::ZERO) {
                None => return Ok(()),
                Some(Err(error)) => self.judge(&error)?,
                Some(Ok(message)) => take(&taken(&message))?,
            }
        }
        Ok(())
    }

    /// A partition that is read to its end need not be fetched further.
    fn pause(&self, partition: i32) {
        let mut list = TopicPartitionList::new();
        list.add_partition(&self.topic, partition);
        // Only traffic is saved: what comes nevertheless is passed over.
        let _ = self.inner.pause(&list);
    }

    /// Ends the reading on an error that does not go away by itself; the library goes on trying after others.
    fn judge(&self, error: &KafkaError) -> Result<(), ReadError> {
        let fatal = matches!(error, KafkaError::MessageConsumptionFatal(_));
        match error.rdkafka_error_code() {
            Some(
                code @ (RDKafkaErrorCode::TopicAuthorizationFailed
                | RDKafkaErrorCode::UnknownTopicOrPartition
                | RDKafkaErrorCode::UnknownTopic
                | RDKafkaErrorCode::UnknownPartition),
            ) => Err(self.refused(code)),
            Some(code) if fatal => Err(self.refused(code)),
            _ => Ok(()),
        }
    }

    fn refused(&self, code: RDKafkaErrorCode) -> ReadError {
        let (topic, reason) = (self.topic.clone(), code.to_string());
        match code {
            RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic => self.no_topic(),
            RDKafkaErrorCode::TopicAuthorizationFailed => ReadError::Forbidden { topic, reason },
            _ => ReadError::Topic { topic, reason },
        }
    }

    fn no_topic(&self) -> ReadError {
        ReadError::NoTopic { topic: self.topic.clone(), brokers: self.brokers.clone() }
    }

    /// A question that was not answered, with the reason that the library gave beside it.
    fn failed(&self, error: &KafkaError) -> ReadError {
        // Reasons come as events; there may be some that nobody has looked at.
        let context = self.inner.client().context();
        let begun = Instant::now();
        while context.known_reason().is_none() && begun.elapsed() < POLL {
            self.inner.poll(POLL);
        }
        match error.rdkafka_error_code() {
            Some(
                RDKafkaErrorCode::BrokerTransportFailure
                | RDKafkaErrorCode::OperationTimedOut
                | RDKafkaErrorCode::AllBrokersDown
                | RDKafkaErrorCode::Resolve,
            ) => ReadError::Unreachable {
                brokers: self.brokers.clone(),
                seconds: self.patience.answer.as_secs(),
                reason: context.reason(),
            },
            Some(code) => self.refused(code),
            None => ReadError::Topic { topic: self.topic.clone(), reason: error.to_string() },
        }
    }

    fn stalled(&self, partition: i32, until: i64) -> ReadError {
        ReadError::Stalled {
            topic: self.topic.clone(),
            partition,
            until,
            seconds: self.patience.stall.as_secs(),
            reason: self.inner.client().context().reason(),
        }
    }
}

pub(super) fn taken<'a>(message: &'a BorrowedMessage<'_>) -> Taken<'a> {
    let received = match guarded(|| headers(message)) {
        Some(headers) => Received::parse(message.key(), headers, message.payload()).map_err(Foreign::from),
        None => Err(Foreign::HeaderName),
    };
    // Who erases a key writes no headers, and may be no agent.
    let key = message.key().filter(|_| received.is_err()).and_then(of_message_key);
    let wrapped_key = key.map(|(epoch, number)| (epoch, number, message.payload()));
    Taken { partition: message.partition(), offset: message.offset(), received, wrapped_key }
}

/// Headers, as far as they are looked at.
fn headers<'a>(message: &'a BorrowedMessage<'_>) -> Vec<(&'a str, Option<&'a [u8]>)> {
    let Some(headers) = message.headers() else { return Vec::new() };
    headers.iter().take(HEADERS_MAX + 1).map(|header| (header.key, header.value)).collect()
}

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `read`; none if it panics. The library does on a header whose name is not UTF-8, and whoever may write to a
/// topic can make one: nobody shall end a review by that.
fn guarded<T>(read: impl FnOnce() -> T) -> Option<T> {
    GUARDED.set(true);
    let result = catch_unwind(AssertUnwindSafe(read));
    GUARDED.set(false);
    result.ok()
}

/// Panics that [`guarded`] catches are not printed.
pub(super) fn silence_guarded_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let print = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !GUARDED.get() {
                print(panic);
            }
        }));
    });
}

#[cfg(test)]
pub(crate) use tests::{Broker, Sent};

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::{TcpListener, TcpStream},
        path::Path,
        time::{Duration, Instant},
    };

    use rdkafka::{
        ClientConfig,
        message::{Header, OwnedHeaders},
        mocking::MockCluster,
        producer::{BaseProducer, BaseRecord, DefaultProducerContext, Producer as _},
    };
    use weir_common::{frame::FrameType, message::Message};

    use super::{Consumer, Patience, Properties, ReadError, Topics, guarded};
    use crate::source::{Journal, SourceError};

    /// A broker in this process.
    pub(crate) struct Broker {
        cluster: MockCluster<'static, DefaultProducerContext>,
        producer: BaseProducer,
    }

    /// A message for it.
    #[derive(Clone, Debug)]
    pub(crate) struct Sent {
        pub(crate) topic: &'static str,
        pub(crate) partition: i32,
        pub(crate) key: Option<String>,
        pub(crate) headers: Vec<(String, String)>,
        pub(crate) value: Vec<u8>,
    }

    impl Sent {
        /// The frames of all segments of a journal as messages, by session over three partitions.
        pub(crate) fn of_journal(
            directory: &Path,
            events: &'static str,
            checkpoints: &'static str,
        ) -> Vec<Self> {
            let journal = Journal::open(directory).unwrap();
            let mut list = Vec::new();
            for epoch in &journal.epochs {
                let verifier = std::fs::read_to_string(epoch.directory.join("node.pub")).unwrap();
                for path in &journal.segments[epoch.segments.clone()] {
                    let bytes = std::fs::read(path).unwrap();
                    let reader = weir_common::segment::SegmentReader::new(&bytes, None).unwrap();
                    for located in reader {
                        let frame = located.unwrap().frame;
                        let message = Message::of_frame(&frame, Some(&verifier));
                        let is_event = frame.frame_type == FrameType::Event;
                        let spread = message.key.map_or(0, |key| key.bytes().map(i32::from).sum());
                        let headers = message.headers.iter().map(|(n, v)| ((*n).to_owned(), v.to_string()));
                        list.push(Self {
                            topic: if is_event { events } else { checkpoints },
                            partition: if is_event { spread % 3 } else { 0 },
                            key: message.key.map(str::to_owned),
                            headers: headers.collect(),
                            value: message.value.to_vec(),
                        });
                    }
                }
            }
            list
        }

        pub(crate) fn id(&self) -> &str {
            self.headers.iter().find(|(name, _)| name == "ce_id").map_or("", |(_, value)| value)
        }
    }

    impl Broker {
        /// With topics of three partitions.
        pub(crate) fn new(topics: &[&str]) -> Self {
            let cluster = MockCluster::new(1).unwrap();
            for topic in topics {
                cluster.create_topic(topic, 3, 1).unwrap();
            }
            let producer = ClientConfig::new()
                .set("bootstrap.servers", cluster.bootstrap_servers())
                .set("linger.ms", "0")
                .create()
                .unwrap();
            Self { cluster, producer }
        }

        pub(crate) fn topics(&self, names: &[&str]) -> Topics {
            let names = names.iter().map(|name| (*name).to_owned()).collect();
            Topics { brokers: self.cluster.bootstrap_servers(), names }
        }

        pub(crate) fn send(&self, list: &[Sent]) {
            for sent in list {
                let mut headers = OwnedHeaders::new();
                for (key, value) in &sent.headers {
                    headers = headers.insert(Header { key, value: Some(value) });
                }
                let record = BaseRecord::to(sent.topic)
                    .partition(sent.partition)
                    .payload(&sent.value)
                    .headers(headers);
                let record = match &sent.key {
                    Some(key) => record.key(key.as_str()),
                    None => record,
                };
                self.producer.send(record).map_err(|(error, _)| error).unwrap();
            }
            self.producer.flush(Duration::from_secs(20)).unwrap();
        }
    }

    const HASTE: Patience = Patience { answer: Duration::from_secs(2), stall: Duration::from_secs(2) };

    fn topics(brokers: &str) -> Topics {
        Topics { brokers: brokers.into(), names: vec!["weir".into()] }
    }

    #[test]
    fn a_wrong_address_is_an_error_in_bounded_time_that_names_address_and_reason() {
        // A port that was free a moment ago, and that nobody listens on.
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let begun = std::time::Instant::now();
        let consumer =
            Consumer::new(&topics(&free.to_string()), "weir", &Properties::default(), HASTE).unwrap();
        let error = consumer.spans(None).unwrap_err();
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
        let text = error.to_string();
        assert!(text.starts_with(&format!("no answer from {free} within 2 s: ")), "{text}");
        assert!(text.contains("Connection refused"), "{text}");
    }

    /// Somebody who does `act` with each connection. The thread ends with the test's process.
    fn somebody(mut act: impl FnMut(TcpStream) + Send + 'static) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        std::thread::spawn(move || listener.incoming().for_each(|stream| act(stream.unwrap())));
        address
    }

    #[test]
    fn who_is_refused_is_told_so_before_the_time_is_over_unless_another_broker_may_let_it_in() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("client.properties");
        std::fs::write(&path, "security.protocol=SSL").unwrap();
        let properties = Properties::read(&path).unwrap();
        let read = |brokers: &str, seconds| {
            let patience = Patience { answer: Duration::from_secs(seconds), ..HASTE };
            let begun = Instant::now();
            let consumer = Consumer::new(&topics(brokers), "weir", &properties, patience).unwrap();
            (consumer.spans(None).unwrap_err(), begun.elapsed())
        };
        // No TLS comes about with it. It reads first: what is closed with bytes unread is reset, which is no refusal.
        let refusing = somebody(|mut stream| {
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        });
        let (error, took) = read(&refusing, 60);
        assert!(matches!(error, ReadError::Refused { .. }), "{error}");
        assert!(error.to_string().contains("SSL handshake failed"), "{error}");
        assert!(took < Duration::from_secs(30), "after {took:?}");
        // One that has not answered yet.
        let mut open = Vec::new();
        let silent = somebody(move |stream| open.push(stream));
        let (error, took) = read(&format!("{refusing},{silent}"), 4);
        assert!(matches!(error, ReadError::Unreachable { .. }), "{error}");
        assert!(took >= Duration::from_secs(4), "after {took:?}");
    }

    #[test]
    fn a_topic_that_is_not_there_is_an_error_and_is_not_made() {
        let broker = Broker::new(&["other"]);
        for _ in 0..2 {
            let read =
                Journal::of_topics(&broker.topics(&["weir"]), &Properties::default(), Default::default());
            let Err(SourceError::Kafka(error)) = read else { panic!("{read:?}") };
            assert!(matches!(error, ReadError::NoTopic { .. }), "{error}");
        }
    }

    #[test]
    fn a_property_that_the_client_refuses_is_named_by_its_line_and_its_value_is_not_shown() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("client.properties");
        for (text, expected) in [
            ("\nhunter.two=hunter2", "line 2: hunter.two is no property that the Kafka client"),
            ("security.protocol=hunter2", "line 1: security.protocol has a value that the Kafka client"),
            ("sasl.mechanism=OTHER\nsecurity.protocol=sasl_plaintext", "does not accept its configuration"),
        ] {
            std::fs::write(&path, text).unwrap();
            let properties = Properties::read(&path).unwrap();
            let made = Consumer::new(&topics("127.0.0.1:1"), "weir", &properties, HASTE);
            let error = made.err().map(|error| error.to_string()).unwrap();
            assert!(error.contains(expected), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn a_panic_of_the_library_is_caught() {
        assert_eq!(guarded(|| 1), Some(1));
        let name = vec![0xff];
        assert_eq!(guarded(|| String::from_utf8(name).unwrap()), None);
    }
}
