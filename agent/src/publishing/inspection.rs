//! What Kafka says of itself before anything is published: its brokers, its topics, and what the topics promise. The judgement is
//! `doctor`'s.

use std::time::{Duration, Instant};

use rdkafka::{
    admin::{AdminClient, AdminOptions, ConfigResource, ResourceSpecifier},
    error::RDKafkaErrorCode,
    metadata::{Metadata, MetadataPartition},
    producer::Producer as _,
};

use super::{
    kafka::{Context, LAST_WORDS, Producer, client_config, lock, refused},
    sink::Failure,
};
use crate::config::Kafka;

/// How long a topic's settings are waited for: they are of use, and not everybody may read them.
const SETTINGS_TIMEOUT: Duration = Duration::from_secs(3);

/// How long one look for a broker takes, while there is none.
const LOOK: Duration = Duration::from_millis(500);

/// So long brokers that refuse are tried again: one that has just started may not know yet whom it lets in.
const REFUSED_FOR: Duration = Duration::from_secs(2);

/// What is known of a topic.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct TopicFacts {
    pub(crate) name: String,
    /// None: there is no such topic, or the agent may not see it.
    pub(crate) partitions: Option<usize>,
    /// Replicas of the partition that has the fewest.
    pub(crate) replicas: usize,
    /// Partitions that nobody leads just now.
    pub(crate) leaderless: usize,
    /// Partitions of which a replica is not in sync.
    pub(crate) behind: usize,
    /// Replicas in sync of the partition that has the fewest.
    pub(crate) in_sync: usize,
    pub(crate) settings: TopicSettings,
}

/// Settings of a topic, each where it may be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct TopicSettings {
    /// `min.insync.replicas`.
    pub(crate) min_insync: Option<u64>,
    /// `max.message.bytes`.
    pub(crate) message_bytes_max: Option<u64>,
    /// `cleanup.policy`: `delete`, `compact` or both with a comma.
    pub(crate) cleanup_policy: Option<String>,
    /// `retention.ms`; -1 is for ever.
    pub(crate) retention_ms: Option<i64>,
    /// `retention.bytes` of a partition; -1 is without limit.
    pub(crate) retention_bytes: Option<i64>,
    /// `message.timestamp.type`.
    pub(crate) timestamp_type: Option<String>,
    /// `message.timestamp.before.max.ms`: an older message is refused.
    pub(crate) age_ms_max: Option<i64>,
    /// `unclean.leader.election.enable`.
    pub(crate) unclean_election: Option<bool>,
}

/// What is known of Kafka.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ClusterFacts {
    pub(crate) brokers: usize,
    pub(crate) topics: Vec<TopicFacts>,
}

/// Asks the brokers for the topics; blocks for `timeout` and a few seconds at most.
///
/// # Errors
/// The configuration is wrong, or no broker answers.
pub(crate) fn inspect(kafka: &Kafka, timeout: Duration) -> Result<ClusterFacts, Failure> {
    // A producer asks: what is wrong comes as an event, which nobody can take from an admin client's queue.
    let producer = Producer::new(kafka)?;
    if kafka.oauth.is_some() {
        // The first token is asked for by an event, which a question that blocks does not look at.
        producer.0.poll(LAST_WORDS);
    }
    let metadata = metadata(&producer, timeout)?;
    // Nor can an admin client be given a token, for the same reason.
    let admin: Option<AdminClient<Context>> = match kafka.oauth {
        Some(_) => None,
        None => Some(
            client_config(kafka)?
                .create_with_context(Context::new(kafka))
                .map_err(|error| refused(kafka, &error))?,
        ),
    };
    let mut names = vec![kafka.topic.clone()];
    names.extend(Some(kafka.checkpoint_topic.clone()).filter(|name| *name != kafka.topic));
    names.extend(kafka.key_topic.clone());
    let topics = names.into_iter().map(|name| {
        let found = metadata.topics().iter().find(|topic| topic.name() == name && topic.error().is_none());
        let Some(found) = found else { return TopicFacts { name, ..TopicFacts::default() } };
        let settings = admin.as_ref().map(|admin| settings(admin, &name, timeout)).unwrap_or_default();
        TopicFacts { settings, ..partitions(name, found.partitions()) }
    });
    let topics = topics.collect();
    Ok(ClusterFacts { brokers: metadata.brokers().len(), topics })
}

/// What the brokers say of all topics: to ask for one by its name may make it. The library would try brokers that refuse until all of
/// the time is over; who is let in by none is told so before.
fn metadata(producer: &Producer, timeout: Duration) -> Result<Metadata, Failure> {
    let (begun, context, mut wait) = (Instant::now(), producer.context(), LOOK);
    loop {
        let left = timeout.saturating_sub(begun.elapsed());
        let error = match producer.0.client().fetch_metadata(None, wait.min(left)) {
            Ok(metadata) => return Ok(metadata),
            Err(error) => error,
        };
        producer.0.poll(LAST_WORDS);
        let is_refused = begun.elapsed() >= REFUSED_FOR && context.is_refused();
        if is_refused || begun.elapsed() >= timeout {
            if let Some(reason) = lock(&context.denied).take() {
                return Err(Failure::Denied { reason });
            }
            let problem = lock(&context.problem).take();
            return Err(Failure::Unreachable { reason: problem.unwrap_or_else(|| error.to_string()) });
        }
        // It was asked, and takes its time: to ask again would take as long.
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::OperationTimedOut) {
            wait = timeout;
        }
    }
}

fn partitions(name: String, partitions: &[MetadataPartition]) -> TopicFacts {
    let least =
        |count: fn(&MetadataPartition) -> usize| partitions.iter().map(count).min().unwrap_or_default();
    let number = |is: fn(&&MetadataPartition) -> bool| partitions.iter().filter(is).count();
    TopicFacts {
        name,
        partitions: Some(partitions.len()),
        replicas: least(|partition| partition.replicas().len()),
        leaderless: number(|partition| partition.leader() < 0),
        behind: number(|partition| partition.isr().len() < partition.replicas().len()),
        in_sync: least(|partition| partition.isr().len()),
        settings: TopicSettings::default(),
    }
}

fn settings(admin: &AdminClient<Context>, topic: &str, timeout: Duration) -> TopicSettings {
    let options = AdminOptions::new().request_timeout(Some(timeout.min(SETTINGS_TIMEOUT)));
    let asked = [ResourceSpecifier::Topic(topic)];
    let described = futures::executor::block_on(admin.describe_configs(&asked, &options));
    let resource = described.ok().and_then(|mut described| described.pop()?.ok());
    resource.as_ref().map(read_settings).unwrap_or_default()
}

fn read_settings(resource: &ConfigResource) -> TopicSettings {
    let text = |name: &str| resource.get(name)?.value.clone();
    let signed = |name: &str| text(name)?.parse().ok();
    let number = |name: &str| text(name)?.parse().ok();
    TopicSettings {
        min_insync: number("min.insync.replicas"),
        message_bytes_max: number("max.message.bytes"),
        cleanup_policy: text("cleanup.policy"),
        retention_ms: signed("retention.ms"),
        retention_bytes: signed("retention.bytes"),
        timestamp_type: text("message.timestamp.type"),
        age_ms_max: signed("message.timestamp.before.max.ms"),
        unclean_election: text("unclean.leader.election.enable").and_then(|text| text.parse().ok()),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeMap,
        io::{Read as _, Write as _},
        net::{TcpListener, TcpStream},
        time::{Duration, Instant},
    };

    use rdkafka::mocking::MockCluster;

    use super::{Failure, Kafka, inspect};

    fn asked(brokers: Vec<String>) -> Kafka {
        Kafka {
            brokers,
            topic: "weir".to_owned(),
            checkpoint_topic: "other".to_owned(),
            key_topic: None,
            properties: BTreeMap::new(),
            property_files: BTreeMap::new(),
            oauth: None,
            replay_window: Duration::ZERO,
        }
    }

    #[test]
    fn a_look_at_kafka_finds_its_topics_or_says_that_nobody_answers() {
        let cluster = MockCluster::new(1).unwrap();
        cluster.create_topic("weir", 3, 1).unwrap();
        let asked = asked(vec![cluster.bootstrap_servers()]);
        let facts = inspect(&asked, Duration::from_secs(30)).unwrap();
        assert_eq!((facts.brokers, facts.topics.len()), (1, 2));
        assert_eq!((facts.topics[0].partitions, facts.topics[0].replicas), (Some(3), 1));
        assert_eq!((facts.topics[0].in_sync, facts.topics[0].behind), (1, 0));
        assert_eq!((facts.topics[1].name.as_str(), facts.topics[1].partitions), ("other", None));
        cluster.broker_down(-1).unwrap();
        let refused = inspect(&asked, Duration::from_millis(500)).unwrap_err();
        assert!(matches!(refused, Failure::Unreachable { .. }), "{refused}");
    }

    /// Somebody who does `act` with each connection. The thread ends with the test's process.
    fn somebody(mut act: impl FnMut(TcpStream) + Send + 'static) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        std::thread::spawn(move || listener.incoming().for_each(|stream| act(stream.unwrap())));
        address
    }

    /// Somebody with whom no TLS comes about: a refusal, since the connection stands.
    fn refusing() -> String {
        somebody(|mut stream| {
            // It reads first: what is closed with bytes unread is reset, which is no refusal.
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        })
    }

    #[test]
    fn who_is_refused_is_told_so_before_the_time_is_over_unless_another_broker_may_let_it_in() {
        let mut asked = asked(vec![refusing()]);
        asked.properties.insert("security.protocol".to_owned(), "SSL".to_owned());
        let begun = Instant::now();
        let refused = inspect(&asked, Duration::from_secs(60)).unwrap_err();
        let Failure::Denied { reason } = &refused else { panic!("{refused}") };
        assert!(reason.contains("SSL handshake failed"), "{reason}");
        assert!(begun.elapsed() < Duration::from_secs(30), "after {:?}", begun.elapsed());
        // One that has not answered yet.
        let mut open = Vec::new();
        asked.brokers.push(somebody(move |stream| open.push(stream)));
        let (begun, timeout) = (Instant::now(), Duration::from_secs(4));
        inspect(&asked, timeout).unwrap_err();
        assert!(begun.elapsed() >= timeout, "after {:?}", begun.elapsed());
    }
}
