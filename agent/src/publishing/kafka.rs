//! Kafka through librdkafka: only this file and [`super::inspection`] know it.
//!
//! The producer is idempotent and waits for all replicas that are in sync; it retries for ever by itself, and within one
//! life of it the messages of a key stay in order. OpenSSL lives inside librdkafka alone.

use std::{
    collections::HashMap,
    error::Error,
    fs::File,
    io::Read as _,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use rdkafka::{
    ClientContext,
    client::OAuthToken,
    config::{ClientConfig, RDKafkaLogLevel},
    error::{KafkaError, RDKafkaErrorCode},
    message::{DeliveryResult, Header, Message as _, OwnedHeaders, Timestamp},
    producer::{BaseProducer, BaseRecord, NoCustomPartitioner, Producer as _, ProducerContext},
};
use weir_common::message::{MESSAGE_BYTES_MAX, Message};
use zeroize::Zeroizing;

use super::{
    publisher::{FLIGHT_BYTES_MAX, FLIGHT_MESSAGES_MAX},
    sink::{Failure, MakeSink, Outcome, Sink, Taken, Ticket},
    stamps::{Stamps, TopicIndex, TopicStamps},
    token::token,
};
use crate::config::{Kafka, OAuth};

/// Most bytes of a file with a property's value.
const PROPERTY_BYTES_MAX: u64 = 64 * 1024;

/// How long a client that cannot go on may still tell why.
pub(super) const LAST_WORDS: Duration = Duration::from_millis(100);

/// So many looks in a row that bring no outcome mean that there is none: errors of brokers may come between.
const QUIET: u32 = 64;

/// What may be set otherwise by `kafka.properties`.
const DEFAULTS: [(&str, &str); 5] = [
    ("client.id", "weir-agent"),
    ("compression.type", "zstd"),
    // Events are made durable in groups; a little patience makes batches that compress.
    ("linger.ms", "50"),
    ("socket.keepalive.enable", "true"),
    // The vendored OpenSSL knows no certificates of its own: the system's are looked for.
    ("ssl.ca.location", "probe"),
];

/// What nobody may set otherwise; `config` refuses it there.
fn fixed(kafka: &Kafka) -> [(&'static str, String); 11] {
    let kilobytes = 4 * FLIGHT_BYTES_MAX / 1024;
    [
        ("bootstrap.servers", kafka.brokers.join(",")),
        ("enable.idempotence", "true".to_owned()),
        ("acks", "all".to_owned()),
        // A topic that is made by a slip would have the brokers' defaults, often one replica.
        ("allow.auto.create.topics", "false".to_owned()),
        // What follows a message that is refused for good must not arrive before it: the client fails as a whole.
        ("enable.gapless.guarantee", "true".to_owned()),
        // The journal is what bounds how long is tried.
        ("message.timeout.ms", "0".to_owned()),
        // A batch must fit where the longest message fits.
        ("batch.size", MESSAGE_BYTES_MAX.to_string()),
        ("queue.buffering.max.messages", (2 * FLIGHT_MESSAGES_MAX).to_string()),
        ("queue.buffering.max.kbytes", kilobytes.to_string()),
        // As Java clients do it, so that whoever else writes to the topic keeps keys together with these.
        ("partitioner", "murmur2_random".to_owned()),
        ("statistics.interval.ms", "0".to_owned()),
    ]
}

/// The client's configuration; secrets are read from their files anew each time.
pub(super) fn client_config(kafka: &Kafka) -> Result<ClientConfig, Failure> {
    let mut config = ClientConfig::new();
    config.set_log_level(RDKafkaLogLevel::Info);
    for (name, value) in DEFAULTS {
        // Both would contradict each other.
        if name != "ssl.ca.location" || !kafka.sets("ssl.ca.pem") {
            config.set(name, value);
        }
    }
    for (name, value) in &kafka.properties {
        config.set(name, value);
    }
    for (name, path) in &kafka.property_files {
        let value = read_property(path).map_err(|error| Failure::Configuration {
            key: format!("propertyFiles.{name}"),
            problem: format!("cannot read {}: {error}", path.display()),
        })?;
        config.set(name, value.as_str());
    }
    for (name, value) in fixed(kafka) {
        config.set(name, value);
    }
    if kafka.oauth.is_some() {
        // A token in the clear is anybody's.
        config.set("security.protocol", "SASL_SSL").set("sasl.mechanisms", "OAUTHBEARER");
    }
    Ok(config)
}

fn read_property(path: &Path) -> std::io::Result<Zeroizing<String>> {
    let mut value = Zeroizing::new(String::new());
    File::open(path)?.take(PROPERTY_BYTES_MAX).read_to_string(&mut value)?;
    let length = value.trim_end_matches(['\r', '\n']).len();
    value.truncate(length);
    Ok(value)
}

/// Why no client can be made. What librdkafka says of a value is left out where the value is a secret.
pub(super) fn refused(kafka: &Kafka, error: &KafkaError) -> Failure {
    match error {
        KafkaError::ClientConfig(_, problem, name, _) => {
            let (key, problem) = if kafka.property_files.contains_key(name) {
                (format!("propertyFiles.{name}"), "its value is refused".to_owned())
            } else {
                (format!("properties.{name}"), problem.clone())
            };
            Failure::Configuration { key, problem }
        }
        KafkaError::ClientCreation(problem) => {
            // The library names the property, and not the file.
            let is_of = |name: &str| {
                problem.starts_with(name) && (name.ends_with(".location") || name.ends_with(".pem"))
            };
            let by_file = kafka.property_files.iter().find(|(name, _)| is_of(name));
            let by_file = by_file.map(|(name, path)| (name, "propertyFiles", path.display().to_string()));
            let itself = kafka.properties.iter().find(|(name, _)| is_of(name));
            let itself = itself.map(|(name, value)| {
                let is_path = name.ends_with(".location");
                (name, "properties", if is_path { value.clone() } else { "its value".to_owned() })
            });
            match itself.or(by_file) {
                Some((name, key, what)) => {
                    let problem = format!("{what} cannot be used ({problem}); {}", mend_of(name));
                    Failure::Configuration { key: format!("{key}.{name}"), problem }
                }
                None => Failure::Configuration { key: "properties".to_owned(), problem: problem.clone() },
            }
        }
        other => Failure::Other { reason: other.to_string() },
    }
}

/// What to look at where a certificate or a key cannot be used.
fn mend_of(property: &str) -> &'static str {
    match property {
        "ssl.key.location" | "ssl.key.pem" => {
            "is it mounted, is it in PEM, and if it is encrypted, is ssl.key.password right (kafka.propertyFiles)?"
        }
        "ssl.keystore.location" => {
            "is it mounted, is it PKCS#12, and is ssl.keystore.password right (kafka.propertyFiles)?"
        }
        _ => "is it mounted, and is it in PEM (ssl.ca.location: the CA of the brokers)?",
    }
}

const UNKNOWN: u8 = 0;
const UP: u8 = 1;
const DOWN: u8 = 2;

/// What librdkafka's threads tell.
#[derive(Default)]
pub(super) struct Context {
    /// Where the token comes from that the brokers are shown.
    oauth: Option<OAuth>,
    outcomes: Mutex<Vec<Outcome>>,
    on_their_way: Mutex<OnTheirWay>,
    /// Which timestamps the topics take; outlives a client.
    stamps: Arc<Mutex<TopicStamps>>,
    connected: AtomicU8,
    /// Each broker was tried when none let the client in, or there was no token to try one with.
    tried_all: AtomicBool,
    /// Why the brokers let nobody in, as they say.
    pub(super) denied: Mutex<Option<String>>,
    /// The last line that tells of a problem.
    pub(super) problem: Mutex<Option<String>>,
}

/// The timestamps of messages that are on their way: the client tells none of one that was refused.
#[derive(Default)]
struct OnTheirWay {
    /// By their tickets.
    messages: HashMap<usize, Stamped>,
    /// The latest of each topic that was refused just now.
    refused: Vec<Stamped>,
}

/// Which timestamp a message has, on which topic.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamped {
    topic: TopicIndex,
    unix_ms: i64,
}

impl OnTheirWay {
    /// A message was refused for its timestamp, as it is told: where one of a batch is too far ahead, all are told so. Which is meant is
    /// known when all have been: the latest.
    fn refused(&mut self, message: Stamped) {
        match self.refused.iter_mut().find(|other| other.topic == message.topic) {
            Some(other) => other.unix_ms = other.unix_ms.max(message.unix_ms),
            None => self.refused.push(message),
        }
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Context {
    pub(super) fn new(kafka: &Kafka) -> Self {
        Self { oauth: kafka.oauth.clone(), ..Self::default() }
    }

    /// Whether a new client is refused, and no broker is left that may let it in.
    pub(super) fn is_refused(&self) -> bool {
        self.tried_all.load(Ordering::Relaxed) && lock(&self.denied).is_some()
    }

    fn stamps(&self, topic: TopicIndex, act: impl FnOnce(&mut Stamps, Instant)) {
        act(lock(&self.stamps).of(topic), Instant::now());
    }
}

impl ClientContext for Context {
    const ENABLE_REFRESH_OAUTH_TOKEN: bool = true;

    fn generate_oauth_token(&self, _config: Option<&str>) -> Result<OAuthToken, Box<dyn Error>> {
        let token = token(self.oauth.as_ref(), SystemTime::now());
        let token = token.inspect_err(|_| self.tried_all.store(true, Ordering::Relaxed))?;
        tracing::debug!(end_unix_ms = token.end_unix_ms, "the brokers are shown a new token");
        // The name is the client's own word; the brokers take the token's.
        let principal_name = "weir-agent".to_owned();
        Ok(OAuthToken { token: token.text.to_string(), principal_name, lifetime_ms: token.end_unix_ms })
    }

    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        // What matters of it is said in the agent's own words.
        tracing::debug!(facility, message, "librdkafka");
        if (level as i32) <= RDKafkaLogLevel::Error as i32 {
            *lock(&self.problem) = Some(message.to_owned());
        }
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(%error, reason, "librdkafka");
        match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::AllBrokersDown) => {
                self.connected.store(DOWN, Ordering::Relaxed);
                self.tried_all.store(true, Ordering::Relaxed);
            }
            Some(
                RDKafkaErrorCode::Authentication
                | RDKafkaErrorCode::SaslAuthenticationFailed
                | RDKafkaErrorCode::SSL,
            ) => {
                self.connected.store(DOWN, Ordering::Relaxed);
                *lock(&self.denied) = Some(reason.to_owned());
            }
            _ => *lock(&self.problem) = Some(reason.to_owned()),
        }
    }
}

impl ProducerContext<NoCustomPartitioner> for Context {
    type DeliveryOpaque = usize;

    fn delivery(&self, delivered: &DeliveryResult<'_>, ticket: usize) {
        let sent = lock(&self.on_their_way).messages.remove(&ticket);
        let result = match delivered {
            Ok(message) => {
                self.connected.store(UP, Ordering::Relaxed);
                *lock(&self.denied) = None;
                // A topic that sets the time itself says nothing of ours.
                let is_ours = matches!(message.timestamp(), Timestamp::CreateTime(_));
                if let Some(Stamped { topic, unix_ms }) = sent.filter(|_| is_ours) {
                    self.stamps(topic, |stamps, now| stamps.taken(unix_ms, now));
                }
                Ok(())
            }
            Err((error, message)) => {
                let is_time = error.rdkafka_error_code() == Some(RDKafkaErrorCode::InvalidTimestamp);
                if let Some(sent) = sent.filter(|_| is_time) {
                    lock(&self.on_their_way).refused(sent);
                }
                let length = |part: Option<&[u8]>| part.map_or(0, <[u8]>::len);
                let bytes = length(message.payload()) + length(message.key());
                Err(failure(error, message.topic(), bytes))
            }
        };
        lock(&self.outcomes).push(Outcome { ticket: ticket as Ticket, result });
    }
}

/// What an error of a message means.
fn failure(error: &KafkaError, topic: &str, bytes: usize) -> Failure {
    let (topic, reason) = (topic.to_owned(), error.to_string());
    match error.rdkafka_error_code() {
        Some(RDKafkaErrorCode::MessageSizeTooLarge | RDKafkaErrorCode::InvalidMessageSize) => {
            Failure::TooLarge { topic, bytes }
        }
        Some(RDKafkaErrorCode::UnknownTopic | RDKafkaErrorCode::UnknownTopicOrPartition) => {
            Failure::UnknownTopic { topic }
        }
        Some(
            RDKafkaErrorCode::TopicAuthorizationFailed
            | RDKafkaErrorCode::ClusterAuthorizationFailed
            | RDKafkaErrorCode::TransactionalIdAuthorizationFailed
            | RDKafkaErrorCode::Authentication
            | RDKafkaErrorCode::SaslAuthenticationFailed,
        ) => Failure::Denied { reason },
        Some(RDKafkaErrorCode::InvalidTimestamp) => Failure::Time { topic },
        Some(RDKafkaErrorCode::Fatal) => Failure::Fatal { reason },
        _ => Failure::Other { reason },
    }
}

/// Makes producers of this configuration.
pub(super) struct Producers {
    kafka: Kafka,
    stamps: Arc<Mutex<TopicStamps>>,
}

impl Producers {
    pub(super) fn new(kafka: Kafka) -> Self {
        Self { kafka, stamps: Arc::default() }
    }
}

impl MakeSink for Producers {
    fn make(&mut self) -> Result<Box<dyn Sink>, Failure> {
        let context = Context { stamps: Arc::clone(&self.stamps), ..Context::new(&self.kafka) };
        Ok(Box::new(Producer::with(&self.kafka, context)?))
    }
}

/// A producer of librdkafka.
pub(super) struct Producer(pub(super) BaseProducer<Context>);

impl Producer {
    /// Makes one; it connects by itself, sooner or later.
    pub(super) fn new(kafka: &Kafka) -> Result<Self, Failure> {
        Self::with(kafka, Context::new(kafka))
    }

    fn with(kafka: &Kafka, context: Context) -> Result<Self, Failure> {
        let made = client_config(kafka)?.create_with_context(context);
        made.map(Self).map_err(|error| refused(kafka, &error))
    }

    pub(super) fn context(&self) -> &Context {
        self.0.context()
    }

    /// Takes what became of messages, after this time. librdkafka is not asked to wait: it does so for an absolute time of the
    /// node's clock, and would not come back while that is set back.
    fn hear(&self, after: Duration, outcomes: &mut Vec<Outcome>) {
        std::thread::park_timeout(after);
        let mut quiet = 0;
        while quiet < QUIET {
            self.0.poll(Duration::ZERO);
            let before = outcomes.len();
            outcomes.append(&mut lock(&self.context().outcomes));
            quiet = if outcomes.len() > before { 0 } else { quiet + 1 };
        }
        let refused = std::mem::take(&mut lock(&self.context().on_their_way).refused);
        for Stamped { topic, unix_ms } in refused {
            self.context().stamps(topic, |stamps, now| stamps.refused(unix_ms, now));
        }
    }
}

impl Sink for Producer {
    fn send(
        &mut self,
        ticket: Ticket,
        topic: &str,
        message: &Message<'_>,
        unix_ms: i64,
    ) -> Result<Taken, Failure> {
        let headers = OwnedHeaders::new_with_capacity(message.headers.len());
        let headers = message.headers.iter().fold(headers, |headers, (key, value)| {
            headers.insert(Header { key, value: Some(value.as_ref()) })
        });
        // An opaque pointer's width; it comes back as it is.
        let opaque = usize::try_from(ticket).unwrap_or(usize::MAX);
        let sent = {
            let mut stamps = lock(&self.context().stamps);
            let index = stamps.index(topic);
            Stamped { topic: index, unix_ms: stamps.of(index).stamp(unix_ms, Instant::now()) }
        };
        let record = BaseRecord::with_opaque_to(topic, opaque)
            .payload(message.value)
            .timestamp(sent.unix_ms.max(0))
            .headers(headers);
        let record: BaseRecord<'_, str, [u8], usize> = BaseRecord { key: message.key, ..record };
        // Before: it may be told at once what became of it.
        lock(&self.context().on_their_way).messages.insert(opaque, sent);
        let result = self.0.send(record);
        if result.is_err() {
            lock(&self.context().on_their_way).messages.remove(&opaque);
        }
        match result {
            Ok(()) => Ok(Taken::Yes),
            Err((error, _)) if error.rdkafka_error_code() == Some(RDKafkaErrorCode::QueueFull) => {
                Ok(Taken::Full)
            }
            Err((error, _)) => Err(failure(&error, topic, message.bytes())),
        }
    }

    fn poll(&mut self, timeout: Duration, outcomes: &mut Vec<Outcome>) -> Result<(), Failure> {
        self.hear(timeout, outcomes);
        let Some((_, reason)) = self.0.client().fatal_error() else { return Ok(()) };
        // Which message it was, and why, says more.
        self.hear(LAST_WORDS, outcomes);
        Err(Failure::Fatal { reason })
    }

    fn is_connected(&self) -> Option<bool> {
        match self.context().connected.load(Ordering::Relaxed) {
            UNKNOWN => None,
            state => Some(state == UP),
        }
    }

    fn denied(&self) -> Option<String> {
        lock(&self.context().denied).clone()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, BTreeSet},
        sync::{
            Arc,
            atomic::{AtomicU32, Ordering},
        },
        time::{Duration, Instant},
    };

    use rdkafka::{
        config::ClientConfig,
        consumer::{BaseConsumer, Consumer as _},
        message::{Headers as _, Message as _},
        mocking::MockCluster,
        producer::DefaultProducerContext,
        topic_partition_list::{Offset, TopicPartitionList},
        types::{RDKafkaApiKey, RDKafkaRespErr},
    };
    use weir_common::{
        message::{Kind, Message, Received},
        segment::SEGMENT_HEADER_BYTES,
    };

    use super::{Failure, Kafka, MakeSink, Outcome, Producer, Producers, Sink, lock};
    use crate::publishing::{
        fixture::{Log, Run},
        sink::Taken,
        stream::Now,
    };
    use crate::{
        publishing::Publishing,
        recording::{Recorder, RecorderOptions},
    };

    const TOPIC: &str = "weir";
    const PARTITIONS: i32 = 3;
    /// Far longer than anything takes.
    const DEADLINE: Duration = Duration::from_secs(60);

    type Cluster = MockCluster<'static, DefaultProducerContext>;

    fn cluster() -> Cluster {
        let cluster = MockCluster::new(1).unwrap();
        cluster.create_topic(TOPIC, PARTITIONS, 1).unwrap();
        cluster
    }

    fn kafka(cluster: &Cluster) -> Kafka {
        Kafka {
            brokers: vec![cluster.bootstrap_servers()],
            topic: TOPIC.to_owned(),
            checkpoint_topic: TOPIC.to_owned(),
            key_topic: None,
            properties: BTreeMap::from([
                ("linger.ms".to_owned(), "0".to_owned()),
                ("reconnect.backoff.max.ms".to_owned(), "100".to_owned()),
                ("retry.backoff.max.ms".to_owned(), "100".to_owned()),
            ]),
            property_files: BTreeMap::new(),
            oauth: None,
            replay_window: Duration::from_secs(3600),
        }
    }

    /// Everything in the topic: key, sequence and value, by partition.
    fn consume(cluster: &Cluster, count: usize) -> Vec<(i32, Option<String>, Kind)> {
        consume_until(cluster, |messages| messages.len() >= count)
    }

    /// The same until it is enough.
    fn consume_until(
        cluster: &Cluster,
        is_enough: impl Fn(&[(i32, Option<String>, Kind)]) -> bool,
    ) -> Vec<(i32, Option<String>, Kind)> {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", cluster.bootstrap_servers())
            .set("group.id", "test")
            .create()
            .unwrap();
        let mut assignment = TopicPartitionList::new();
        for partition in 0..PARTITIONS {
            assignment.add_partition_offset(TOPIC, partition, Offset::Beginning).unwrap();
        }
        consumer.assign(&assignment).unwrap();
        let mut messages = Vec::new();
        let deadline = Instant::now() + DEADLINE;
        while !is_enough(&messages) {
            assert!(Instant::now() < deadline, "{messages:?}");
            let Some(Ok(message)) = consumer.poll(Duration::from_millis(100)) else { continue };
            let headers = message.headers().unwrap();
            let headers = headers.iter().map(|header| (header.key, header.value));
            let received = Received::parse(message.key(), headers, message.payload()).unwrap();
            let key = message.key().map(|key| String::from_utf8(key.to_vec()).unwrap());
            assert_eq!(received.envelope.key, key.clone().unwrap_or_default());
            messages.push((message.partition(), key, received.kind));
        }
        messages
    }

    /// Makes producers, and counts them.
    struct Counted(Producers, Arc<AtomicU32>);

    impl MakeSink for Counted {
        fn make(&mut self) -> Result<Box<dyn Sink>, Failure> {
            self.1.fetch_add(1, Ordering::Relaxed);
            self.0.make()
        }
    }

    /// Publishes until everything is acknowledged.
    fn publish_all(run: &mut Run) {
        let deadline = Instant::now() + DEADLINE;
        while !run.publisher.is_done() {
            assert!(Instant::now() < deadline, "{:?}", run.published());
            run.turn_at(Now::real());
        }
    }

    #[test]
    fn messages_arrive_with_key_headers_and_value_and_keys_stay_together_in_order() {
        let cluster = cluster();
        let mut log = Log::new();
        log.events(40);
        log.checkpoint();
        let mut run = Run::with(&log, Box::new(Producers::new(kafka(&cluster))));
        publish_all(&mut run);
        let messages = consume(&cluster, 41);
        for key in ["one", "two", "three"] {
            let of_key = messages.iter().filter(|(_, other, _)| other.as_deref() == Some(key));
            let (partitions, kinds): (Vec<_>, Vec<_>) = of_key.map(|(at, _, kind)| (*at, *kind)).unzip();
            assert!(partitions.iter().all(|partition| *partition == partitions[0]), "{partitions:?}");
            assert!(kinds.is_sorted() && kinds.len() == 10, "{kinds:?}");
        }
        assert!(messages.iter().any(|(_, _, kind)| matches!(kind, Kind::Checkpoint { size: 40, .. })));
        assert_eq!(run.published().messages, 41);
        assert!(run.published().connected && run.published().trouble.is_none());
    }

    #[tokio::test]
    async fn the_whole_life_of_an_agent_is_in_the_topic_and_the_next_one_goes_on() {
        let cluster = cluster();
        let folder = tempfile::tempdir().unwrap();
        let options = || RecorderOptions::new(folder.path().join("journal"), "node-1".into(), Vec::new());
        for life in 1..=2 {
            let recorder = Recorder::start(options()).unwrap();
            let publishing = Publishing::start(&kafka(&cluster), &recorder).unwrap();
            recorder.finding(None, None, "test", "a test");
            recorder.stop("test").await.unwrap();
            publishing.stop().await;
            assert_eq!(publishing.published().backlog_bytes, 0, "{:?}", publishing.published());
            let kinds: Vec<_> = consume(&cluster, 5 * life).into_iter().map(|(_, _, kind)| kind).collect();
            let events = kinds.iter().filter(|kind| matches!(kind, Kind::Event { .. })).count();
            assert_eq!(
                (events, kinds.len() - events),
                (3 * life, 2 * life),
                "started, finding, stopped; a checkpoint over the first and over all"
            );
        }
    }

    #[test]
    fn what_a_broker_misses_while_it_is_down_arrives_when_it_is_back() {
        let cluster = cluster();
        cluster.broker_down(-1).unwrap();
        let mut log = Log::new();
        log.events(20);
        let mut run = Run::with(&log, Box::new(Producers::new(kafka(&cluster))));
        let deadline = Instant::now() + DEADLINE;
        while run.published().backlog_bytes == 0 {
            assert!(Instant::now() < deadline);
            run.turn_at(Now::real());
        }
        assert!(!run.published().connected);
        cluster.broker_up(-1).unwrap();
        publish_all(&mut run);
        assert_eq!(consume(&cluster, 20).len(), 20);
        run.turn_at(Now::later(Duration::from_secs(2)));
        assert_eq!(run.published().backlog_bytes, 0);
    }

    #[test]
    fn a_topic_that_refuses_a_message_for_its_length_is_named_with_the_mend() {
        let cluster = cluster();
        cluster
            .request_errors(RDKafkaApiKey::Produce, &[RDKafkaRespErr::RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE]);
        let mut log = Log::new();
        log.events(1);
        let mut run = Run::with(&log, Box::new(Producers::new(kafka(&cluster))));
        let deadline = Instant::now() + DEADLINE;
        while run.published().trouble.is_none() {
            assert!(Instant::now() < deadline);
            run.turn_at(Now::real());
        }
        let trouble = run.published().trouble.unwrap();
        assert!(trouble.contains("max.message.bytes to at least 540672"), "{trouble}");
        // Once the topic takes it, it goes.
        publish_all(&mut run);
        assert_eq!(consume(&cluster, 1).len(), 1);
        assert_eq!(run.published().trouble, None);
    }

    #[test]
    fn an_event_whose_time_is_refused_goes_with_an_earlier_one() {
        let cluster = cluster();
        let mut log = Log::new();
        log.events(1);
        let producers = Producers::new(kafka(&cluster));
        let stamps = Arc::clone(&producers.stamps);
        let mut run = Run::with(&log, Box::new(producers));
        cluster
            .request_errors(RDKafkaApiKey::Produce, &[RDKafkaRespErr::RD_KAFKA_RESP_ERR_INVALID_TIMESTAMP]);
        publish_all(&mut run);
        assert!(run.published().errors.contains(&("time", 1)), "{:?}", run.published());
        let now = Instant::now();
        let stamp = |unix_ms| {
            let mut stamps = lock(&stamps);
            let topic = stamps.index(TOPIC);
            stamps.of(topic).stamp(unix_ms, now)
        };
        // Its events are made in the first second of 1970.
        assert!(stamp(i64::MAX) < 3_600_000, "{}", stamp(i64::MAX));
    }

    #[test]
    fn of_a_batch_whose_time_is_refused_the_latest_is_meant() {
        let cluster = cluster();
        cluster
            .request_errors(RDKafkaApiKey::Produce, &[RDKafkaRespErr::RD_KAFKA_RESP_ERR_INVALID_TIMESTAMP]);
        let mut kafka = kafka(&cluster);
        // All are one batch, which goes when it is whole; and they have no other partition.
        for (name, value) in [("linger.ms", "60000"), ("batch.num.messages", "3")] {
            kafka.properties.insert(name.to_owned(), value.to_owned());
        }
        let mut producers = Producers::new(kafka);
        let mut sink = producers.make().unwrap();
        let (early, late) = (1_000_000_000_000, 1_000_086_400_000);
        let message = Message { key: Some("session"), headers: Vec::new(), value: b"value" };
        for (ticket, unix_ms) in [early, late, early + 1].into_iter().enumerate() {
            assert!(matches!(sink.send(ticket as u64, TOPIC, &message, unix_ms).unwrap(), Taken::Yes));
        }
        let (mut outcomes, deadline) = (Vec::new(), Instant::now() + DEADLINE);
        while outcomes.len() < 3 {
            assert!(Instant::now() < deadline, "{outcomes:?}");
            // After that it cannot go on, as it says.
            sink.poll(Duration::from_millis(50), &mut outcomes).ok();
        }
        let is_refused = |outcome: &Outcome| matches!(outcome.result, Err(Failure::Time { .. }));
        assert!(outcomes.iter().all(is_refused), "{outcomes:?}");
        let mut stamps = lock(&producers.stamps);
        let topic = stamps.index(TOPIC);
        let mut stamp = |unix_ms| stamps.of(topic).stamp(unix_ms, Instant::now());
        assert_eq!((stamp(early), stamp(early + 1)), (early, early + 1));
        assert!(stamp(late) < late);
    }

    #[test]
    fn a_client_that_cannot_go_on_is_made_anew_and_nothing_is_lost() {
        let cluster = cluster();
        let mut log = Log::new();
        log.events(5);
        let made = Arc::new(AtomicU32::default());
        let producers = Counted(Producers::new(kafka(&cluster)), Arc::clone(&made));
        let mut run = Run::with(&log, Box::new(producers));
        publish_all(&mut run);
        assert_eq!(made.load(Ordering::Relaxed), 1);
        cluster.request_errors(
            RDKafkaApiKey::Produce,
            &[RDKafkaRespErr::RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER],
        );
        log.events(5);
        run.durable.publish(log.durable());
        publish_all(&mut run);
        // It did not mend by itself.
        assert_eq!(made.load(Ordering::Relaxed), 2);
        assert!(run.published().errors.contains(&("fatal", 1)), "{:?}", run.published());
        assert!(run.published().resent > 0);
        // What had arrived without an answer arrives once more, so their number does not say that all are there.
        let all: BTreeSet<_> = (0..10).map(|sequence| Kind::Event { sequence }).collect();
        let messages = consume_until(&cluster, |messages| {
            all.is_subset(&messages.iter().map(|(_, _, kind)| *kind).collect())
        });
        assert!(messages.len() <= 15, "only what was on its way comes again: {messages:?}");
    }

    #[test]
    fn a_wrong_property_is_named_and_a_secret_is_not() {
        let cluster = cluster();
        let mut wrong = kafka(&cluster);
        wrong.properties.insert("linger.mss".to_owned(), "5".to_owned());
        let refused = Producer::new(&wrong).err().unwrap();
        assert_eq!(
            refused.to_string(),
            "kafka.properties.linger.mss: No such configuration property: \"linger.mss\""
        );
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        std::fs::write(&path, "hunter2\n").unwrap();
        let mut wrong = kafka(&cluster);
        wrong.property_files.insert("socket.timeout.ms".to_owned(), path.clone());
        let refused = Producer::new(&wrong).err().unwrap().to_string();
        assert_eq!(refused, "kafka.propertyFiles.socket.timeout.ms: its value is refused");
        std::fs::remove_file(&path).unwrap();
        let refused = Producer::new(&wrong).err().unwrap().to_string();
        assert!(refused.contains("cannot read") && refused.contains("secret"), "{refused}");
        std::fs::write(&path, "no certificate\n").unwrap();
        let mut wrong = kafka(&cluster);
        wrong.properties.insert("security.protocol".to_owned(), "SSL".to_owned());
        wrong.properties.insert("ssl.ca.location".to_owned(), path.display().to_string());
        let refused = Producer::new(&wrong).err().unwrap().to_string();
        let named = format!(
            "kafka.properties.ssl.ca.location: {} cannot be used (ssl.ca.location failed",
            path.display()
        );
        assert!(
            refused.starts_with(&named) && refused.contains("; is it mounted, and is it in PEM"),
            "{refused}"
        );
    }

    /// Of no key: it says that it is encrypted, and nothing else is looked at without a password.
    const ENCRYPTED: &str = "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\
        DEK-Info: AES-128-CBC,00000000000000000000000000000000\n\n\
        AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\n-----END RSA PRIVATE KEY-----\n";

    #[test]
    fn a_key_that_is_encrypted_asks_for_its_password() {
        let cluster = cluster();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        std::fs::write(&path, ENCRYPTED).unwrap();
        let password = folder.path().join("password");
        std::fs::write(&password, "hunter2\n").unwrap();
        let mut whole = kafka(&cluster);
        whole.properties.insert("security.protocol".to_owned(), "SSL".to_owned());
        let refused = |wrong: &Kafka, key: &str| {
            let refused = Producer::new(wrong).err().unwrap().to_string();
            let (_, name) = key.split_once('.').unwrap();
            let named = format!("kafka.{key}: {} cannot be used ({name} failed", path.display());
            let asked = "if it is encrypted, is ssl.key.password right (kafka.propertyFiles)?";
            assert!(refused.starts_with(&named) && refused.contains(asked), "{refused}");
            assert!(!refused.contains("hunter2") && !refused.contains("AAAA"), "{refused}");
        };
        let mut wrong = whole.clone();
        wrong.properties.insert("ssl.key.location".to_owned(), path.display().to_string());
        refused(&wrong, "properties.ssl.key.location");
        wrong.property_files.insert("ssl.key.password".to_owned(), password.clone());
        refused(&wrong, "properties.ssl.key.location");
        whole.property_files.insert("ssl.key.pem".to_owned(), path.clone());
        whole.property_files.insert("ssl.key.password".to_owned(), password);
        refused(&whole, "propertyFiles.ssl.key.pem");
    }

    #[test]
    fn a_producer_alone_takes_a_message_and_acknowledges_it() {
        let cluster = cluster();
        let mut log = Log::new();
        log.events(1);
        let bytes = std::fs::read(log.segment(0)).unwrap();
        let (frame, _) = weir_common::frame::decode(&bytes[SEGMENT_HEADER_BYTES..]).unwrap();
        let message = weir_common::message::Message::of_frame(&frame, None);
        let mut producer = Producer::new(&kafka(&cluster)).unwrap();
        assert_eq!(producer.is_connected(), None);
        assert!(matches!(producer.send(7, TOPIC, &message, 1).unwrap(), Taken::Yes));
        let mut outcomes: Vec<Outcome> = Vec::new();
        let deadline = Instant::now() + DEADLINE;
        while outcomes.is_empty() {
            assert!(Instant::now() < deadline);
            producer.poll(Duration::from_millis(20), &mut outcomes).unwrap();
        }
        assert_eq!((outcomes[0].ticket, outcomes[0].result.clone()), (7, Ok(())));
        assert_eq!(producer.is_connected(), Some(true));
    }
}
