//! Makes the library's clients, and hears what it tells them: why connections fail, that a token is wanted, which partitions
//! a group gives. Values of properties are secrets and never part of an error.

use std::{
    error::Error,
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use rdkafka::{
    ClientConfig, ClientContext, Offset, TopicPartitionList,
    client::OAuthToken,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, CommitMode, Consumer as _, ConsumerContext},
    error::{KafkaError, RDKafkaErrorCode},
    types::{RDKafkaConfRes, RDKafkaRespErr},
};

use super::{
    address::Topics,
    group::Begin,
    kafka::{Patience, ReadError, silence_guarded_panics},
    properties::Properties,
    token::token,
};
use crate::{moment::Moment, terminal::escaped};

/// What Weir sets itself; properties of the user come before these. `group.id` is needed to assign partitions, although
/// no group is joined; the user may set another one, where access is granted by its name.
const SETTINGS: [(&str, &str); 10] = [
    ("allow.auto.create.topics", "false"),
    ("auto.offset.reset", "earliest"),
    ("enable.auto.commit", "false"),
    ("enable.auto.offset.store", "false"),
    ("enable.partition.eof", "true"),
    // Nobody's open transaction may hold the reading up; Weir writes none.
    ("isolation.level", "read_uncommitted"),
    // Reading sees to it itself that much is not held in memory.
    ("queued.max.messages.kbytes", "16384"),
    ("client.id", "weir"),
    ("group.id", "weir"),
    // The vendored OpenSSL knows no certificates of its own: the system's are looked for.
    ("ssl.ca.location", "probe"),
];

/// Keeps what the library says of its connections, for errors.
#[derive(Debug, Default)]
pub(super) struct Context {
    reason: Mutex<Option<String>>,
    /// Why a broker does not let this client in, or there is no token.
    denied: Mutex<Option<String>>,
    /// Each broker was tried when none let the client in, or there was no token to try one with.
    tried_all: AtomicBool,
    /// Where the token is that the brokers are shown.
    token_file: Option<PathBuf>,
    /// Where a group begins in a partition that it has no offset of.
    begin: Begin,
}

fn keep(place: &Mutex<Option<String>>, reason: &str) {
    // It has words of whoever answers in it.
    let reason = escaped(reason).into_owned();
    *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
}

impl Context {
    fn remember(&self, reason: &str) {
        keep(&self.reason, reason);
    }

    /// Why a new client is refused, if no broker is left that may let it in.
    pub(super) fn refusal(&self) -> Option<String> {
        let tried_all = self.tried_all.load(Ordering::Relaxed);
        self.denied.lock().unwrap_or_else(PoisonError::into_inner).clone().filter(|_| tried_all)
    }

    /// Whether the brokers are shown a token.
    pub(super) fn has_token(&self) -> bool {
        self.token_file.is_some()
    }

    pub(super) fn known_reason(&self) -> Option<String> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn reason(&self) -> String {
        self.known_reason().unwrap_or_else(|| "nothing is known".into())
    }
}

impl ClientContext for Context {
    const ENABLE_REFRESH_OAUTH_TOKEN: bool = true;

    fn generate_oauth_token(&self, _config: Option<&str>) -> Result<OAuthToken, Box<dyn Error>> {
        let now_unix_ms = Moment::now().0.div_euclid(1000);
        let token = token(self.token_file.as_deref(), now_unix_ms);
        let token = token.inspect_err(|_| self.tried_all.store(true, Ordering::Relaxed))?;
        // The name is the client's own word; the brokers take the token's.
        let principal_name = "weir".to_owned();
        Ok(OAuthToken { token: token.text, principal_name, lifetime_ms: token.end_unix_ms })
    }

    fn log(&self, _level: RDKafkaLogLevel, facility: &str, message: &str) {
        // Why a connection failed may stand nowhere else: a broker that wants TLS just hangs up.
        if facility == "FAIL" && self.known_reason().is_none() {
            self.remember(message);
        }
    }

    fn error(&self, error: KafkaError, reason: &str) {
        use RDKafkaErrorCode::{AllBrokersDown, Authentication, SSL, SaslAuthenticationFailed};
        let code = error.rdkafka_error_code();
        if matches!(code, Some(Authentication | SaslAuthenticationFailed | SSL)) {
            keep(&self.denied, reason);
        }
        // That all brokers are down tells less than why the last one is.
        let summary = matches!(code, Some(AllBrokersDown));
        if summary {
            self.tried_all.store(true, Ordering::Relaxed);
        }
        if !summary && !matches!(error, KafkaError::PartitionEOF(_)) {
            self.remember(reason);
        }
    }
}

impl ConsumerContext for Context {
    fn rebalance(
        &self,
        consumer: &BaseConsumer<Self>,
        what: RDKafkaRespErr,
        partitions: &mut TopicPartitionList,
    ) {
        // Whoever is told of an error here is told of it by the next look at messages as well.
        let done = if what == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS {
            let begun = match self.begin {
                Begin::Earliest => Ok(()),
                Begin::Latest => self.begin_at_the_end(consumer, partitions),
                Begin::Since(moment) => begin_since(consumer, partitions, moment.0.div_euclid(1000)),
            };
            begun.and_then(|()| consumer.assign(partitions))
        } else {
            consumer.unassign()
        };
        if let Err(error) = done {
            self.remember(&error.to_string());
        }
    }
}

impl Context {
    /// Sets that reading begins behind what is there now of partitions that the group has no offset of. It has one then: a partition in
    /// which nothing comes for long would have none, and who reads it next would begin behind what came in between.
    fn begin_at_the_end(
        &self,
        consumer: &BaseConsumer<Self>,
        partitions: &mut TopicPartitionList,
    ) -> Result<(), KafkaError> {
        let mut ends = TopicPartitionList::new();
        for (topic, partition) in without_offset(consumer, partitions)? {
            let (_, end) = consumer.fetch_watermarks(&topic, partition, Patience::default().answer)?;
            partitions.set_partition_offset(&topic, partition, Offset::Offset(end))?;
            ends.add_partition_offset(&topic, partition, Offset::Offset(end))?;
        }
        // Who may not commit is told so when there is something to commit.
        if ends.count() > 0
            && let Err(error) = consumer.commit(&ends, CommitMode::Sync)
        {
            self.remember(&error.to_string());
        }
        Ok(())
    }
}

/// Those of the partitions that the group has no offset of.
fn without_offset(
    consumer: &BaseConsumer<Context>,
    partitions: &TopicPartitionList,
) -> Result<Vec<(String, i32)>, KafkaError> {
    let committed = consumer.committed_offsets(partitions.clone(), Patience::default().answer)?;
    let elements = committed.elements();
    let without = elements.iter().filter(|element| element.offset() == Offset::Invalid);
    Ok(without.map(|element| (element.topic().to_owned(), element.partition())).collect())
}

/// Sets where reading begins of partitions that the group has no offset of.
fn begin_since(
    consumer: &BaseConsumer<Context>,
    partitions: &mut TopicPartitionList,
    since_ms: i64,
) -> Result<(), KafkaError> {
    let wait = Patience::default().answer;
    let mut times = TopicPartitionList::new();
    for (topic, partition) in without_offset(consumer, partitions)? {
        times.add_partition_offset(&topic, partition, Offset::Offset(since_ms.max(0)))?;
    }
    if times.count() == 0 {
        return Ok(());
    }
    for element in consumer.offsets_for_times(times, wait)?.elements() {
        let offset = match element.offset() {
            Offset::Offset(offset) => Offset::Offset(offset),
            // Nothing of that time or later.
            _ => Offset::End,
        };
        partitions.set_partition_offset(element.topic(), element.partition(), offset)?;
    }
    Ok(())
}

/// Makes a client; `last` is what the user's properties do not change.
pub(super) fn client(
    topics: &Topics,
    properties: &Properties,
    last: &[(&str, &str)],
    begin: Begin,
) -> Result<BaseConsumer<Context>, ReadError> {
    silence_guarded_panics();
    let mut config = ClientConfig::new();
    // Nothing of it is shown, but for the reason of an error.
    config.set_log_level(RDKafkaLogLevel::Info);
    for (name, value) in SETTINGS {
        config.set(name, value);
    }
    for property in properties.list() {
        config.set(&property.name, &property.value);
    }
    let token_file = properties.token_file().map(Path::to_owned);
    if token_file.is_some() {
        // A token in the clear is anybody's.
        config.set("security.protocol", "SASL_SSL").set("sasl.mechanisms", "OAUTHBEARER");
    }
    config.set("bootstrap.servers", &topics.brokers);
    for (name, value) in last {
        config.set(*name, *value);
    }
    let context = Context { token_file, begin, ..Context::default() };
    config.create_with_context(context).map_err(|error| refusal(&error, properties))
}

/// Why the library refuses its configuration, without the value that it shows in its own text.
fn refusal(error: &KafkaError, properties: &Properties) -> ReadError {
    match error {
        KafkaError::ClientConfig(result, _, name, _) => {
            let why = match result {
                RDKafkaConfRes::RD_KAFKA_CONF_UNKNOWN => {
                    "is no property that the Kafka client (librdkafka) knows"
                }
                _ => "has a value that the Kafka client (librdkafka) does not take",
            };
            match properties.refused(name, why) {
                Some(error) => error.into(),
                None => ReadError::Client { reason: format!("{name} {why}") },
            }
        }
        KafkaError::ClientCreation(reason) => ReadError::Client { reason: reason.clone() },
        other => ReadError::Client { reason: other.to_string() },
    }
}
