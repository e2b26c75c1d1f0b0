//! Whether Kafka takes what the journal holds: brokers, topics, and what the topics promise.

use std::time::Duration;

use weir_common::message::MESSAGE_BYTES_MAX;

use super::{Check, Need};
use crate::{
    config::{Config, Kafka},
    publishing::{self, ClusterFacts, Failure, TopicFacts},
};

/// How long the brokers may take to answer.
const TIMEOUT: Duration = Duration::from_secs(10);

/// An outage over a night must not cost what comes late.
const RETENTION_MIN: Duration = Duration::from_hours(24);

/// Of the Kafka that is configured; that there is none is a choice with a price.
pub fn configured(config: &Config) -> Vec<Check> {
    match &config.kafka {
        Some(kafka) => checks(kafka),
        None => vec![Check::bad(
            "kafka",
            Need::Should,
            "not configured: nothing leaves this node's journal, and when that is full enrolled pods are refused every request",
            "set kafka.brokers and kafka.topic",
        )],
    }
}

/// Asks the brokers. Blocks. Without Kafka the journal keeps the events, so little here is a must: what keeps the
/// agent from starting, and a topic that loses what was acknowledged.
pub fn checks(kafka: &Kafka) -> Vec<Check> {
    judge(kafka, publishing::inspect(kafka, TIMEOUT))
}

fn judge(kafka: &Kafka, found: Result<ClusterFacts, Failure>) -> Vec<Check> {
    match found {
        // What is wrong in the configuration keeps the agent from starting.
        Err(failure @ Failure::Configuration { .. }) => vec![Check::failed("kafka", Need::Must, &failure)],
        Err(failure) => vec![Check::failed("kafka", Need::Should, &failure)],
        Ok(facts) => {
            let found = format!("{} brokers, asked at {}", facts.brokers, kafka.brokers.join(", "));
            let brokers = Check::good("kafka", Need::Should, found);
            [brokers, transport(kafka)]
                .into_iter()
                .chain(facts.topics.iter().map(|facts| topic(kafka, facts)))
                .collect()
        }
    }
}

/// Whether what is published is encrypted on its way.
fn transport(kafka: &Kafka) -> Check {
    let name = "kafka transport";
    let configured = kafka.properties.get("security.protocol").map_or("plaintext", String::as_str);
    let protocol = if kafka.oauth.is_some() { "SASL_SSL" } else { configured };
    let found = format!("security.protocol is {protocol}");
    if protocol.to_ascii_lowercase().ends_with("ssl") {
        return Check::good(name, Need::Should, found);
    }
    let mend = "set kafka.properties.security.protocol to SSL or SASL_SSL: as it is, whoever sees the network reads the events";
    Check::bad(name, Need::Should, found, mend)
}

/// What is wrong with a topic: in words, and the mend.
struct Fault {
    what: Option<String>,
    mend: String,
}

fn fault(what: impl Into<String>, mend: impl Into<String>) -> Fault {
    Fault { what: Some(what.into()), mend: mend.into() }
}

/// What the numbers that are shown anyway say already.
fn mend(mend: impl Into<String>) -> Fault {
    Fault { what: None, mend: mend.into() }
}

fn topic(kafka: &Kafka, facts: &TopicFacts) -> Check {
    let name = format!("kafka topic {}", facts.name);
    let Some(partitions) = facts.partitions else {
        let mend = "create it (see docs/kafka.md), or let the agent describe it";
        return Check::bad(name, Need::Should, "there is no such topic, or the agent may not see it", mend);
    };
    let faults: Vec<Fault> = replicas(facts).into_iter().chain(keeping(kafka, facts)).collect();
    let mut found = format!("{partitions} partitions, {}", shown(facts));
    if kafka.oauth.is_some() {
        found.push_str("; with kafka.oauth the settings are not read: hold them against docs/kafka.md");
    }
    for what in faults.iter().filter_map(|fault| fault.what.as_deref()) {
        found.push_str("; ");
        found.push_str(what);
    }
    // What is lost by it is acknowledged before, so that no journal has it any more.
    let need = if is_compacted(facts) && !is_of_keys(kafka, facts) { Need::Must } else { Need::Should };
    if faults.is_empty() {
        return Check::good(name, need, found);
    }
    let mends: Vec<String> = faults.into_iter().map(|fault| fault.mend).collect();
    Check::bad(name, need, found, mends.join("; "))
}

/// The settings, as far as they may be read.
fn shown(facts: &TopicFacts) -> String {
    fn value<T: ToString>(value: Option<&T>) -> String {
        value.map_or_else(|| "unknown".to_owned(), ToString::to_string)
    }
    let settings = &facts.settings;
    format!(
        "{} replicas, min.insync.replicas {}, max.message.bytes {}, cleanup.policy {}, retention.ms {}",
        facts.replicas,
        value(settings.min_insync.as_ref()),
        value(settings.message_bytes_max.as_ref()),
        value(settings.cleanup_policy.as_ref()),
        value(settings.retention_ms.as_ref())
    )
}

/// Whether it is the topic of wrapped keys, which is compacted: whoever erases a key there erases content.
fn is_of_keys(kafka: &Kafka, facts: &TopicFacts) -> bool {
    kafka.key_topic.as_ref() == Some(&facts.name)
}

fn is_compacted(facts: &TopicFacts) -> bool {
    facts.settings.cleanup_policy.as_deref().is_some_and(|policy| policy.contains("compact"))
}

/// Whether an acknowledged message survives a broker, and whether one can be acknowledged at all.
fn replicas(facts: &TopicFacts) -> Vec<Fault> {
    let (mut faults, least) = (Vec::new(), facts.settings.min_insync);
    if facts.leaderless > 0 {
        let what = format!("{} partitions have no leader", facts.leaderless);
        faults
            .push(fault(what, "bring the brokers back that lead them: until then what belongs there waits"));
    } else if least.is_some_and(|least| (facts.in_sync as u64) < least.min(facts.replicas as u64)) {
        let what =
            format!("a partition has {} replicas in sync, fewer than min.insync.replicas", facts.in_sync);
        faults.push(fault(what, "bring the brokers back that are away: until then that partition takes nothing, and the journal keeps it"));
    } else if facts.behind > 0 {
        let what = format!("{} partitions have replicas that are not in sync", facts.behind);
        faults.push(fault(what, "bring the brokers back that hold them: what is published now is on fewer disks than it should be"));
    }
    if facts.replicas < 2 || least.is_some_and(|replicas| replicas < 2) {
        faults.push(mend("use 3 replicas and min.insync.replicas 2: as it is, one broker's disk can lose what was acknowledged, and the journal lets go of it"));
    } else if least.is_some_and(|least| least > facts.replicas as u64) {
        faults.push(mend(
            "lower min.insync.replicas below the number of replicas: as it is, nothing can be published",
        ));
    } else if least.is_some_and(|least| least == facts.replicas as u64) {
        faults.push(mend("lower min.insync.replicas below the number of replicas: as it is, one broker that is away stops publishing"));
    }
    if facts.settings.unclean_election == Some(true) {
        faults.push(fault("unclean.leader.election.enable is true", "set unclean.leader.election.enable to false: as it is, a replica that lacks acknowledged events may lead, and they are gone"));
    }
    faults
}

/// Whether the topic takes every event, and keeps it long enough.
fn keeping(kafka: &Kafka, facts: &TopicFacts) -> Vec<Fault> {
    let (mut faults, settings) = (Vec::new(), &facts.settings);
    if settings.message_bytes_max.is_some_and(|bytes| bytes < MESSAGE_BYTES_MAX as u64) {
        faults.push(mend(format!(
            "set max.message.bytes of the topic to at least {MESSAGE_BYTES_MAX}: the first longer event would stop publishing"
        )));
    }
    if is_of_keys(kafka, facts) {
        if settings.cleanup_policy.as_deref().is_some_and(|policy| policy != "compact") {
            faults.push(mend("set cleanup.policy to compact: as it is, keys end with the topic's retention and the content with them, and none can be erased before"));
        }
    } else if is_compacted(facts) {
        faults.push(mend("set cleanup.policy to delete: a compacted topic keeps one event of each session and loses the others"));
    }
    let least = i64::try_from(kafka.replay_window.max(RETENTION_MIN).as_millis()).unwrap_or(i64::MAX);
    // Without deletion retention says nothing; where it is unknown, it counts.
    let deletes = settings.cleanup_policy.as_deref().is_none_or(|policy| policy.contains("delete"));
    if deletes && settings.retention_ms.is_some_and(|ms| (0..least).contains(&ms)) {
        faults.push(mend(format!(
            "set retention.ms to more than the longest outage, and to {least} at least: it counts from when an event happened, so that what comes late is deleted at once"
        )));
    }
    if let Some(bytes) = settings.retention_bytes.filter(|bytes| deletes && *bytes >= 0) {
        faults.push(fault(
            format!("retention.bytes is {bytes}"),
            "set retention.bytes to -1: as it is, whoever makes many events has older ones deleted before retention.ms has passed",
        ));
    }
    if settings.timestamp_type.as_deref() == Some("LogAppendTime") {
        faults.push(fault("message.timestamp.type is LogAppendTime", "set message.timestamp.type to CreateTime: as it is, --since finds events by when they came, not by when they happened"));
    }
    if let Some(ms) = settings.age_ms_max.filter(|ms| (0..least).contains(ms)) {
        faults.push(fault(
            format!("message.timestamp.before.max.ms is {ms}"),
            format!("set message.timestamp.before.max.ms to {least} at least: the first event that is older, after an outage, would stop publishing"),
        ));
    }
    faults
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use super::{ClusterFacts, Failure, Kafka, TopicFacts, judge};
    use crate::publishing::TopicSettings;

    fn kafka() -> Kafka {
        Kafka {
            brokers: vec!["kafka:9092".into()],
            topic: "weir".into(),
            checkpoint_topic: "weir".into(),
            key_topic: None,
            properties: BTreeMap::from([("security.protocol".into(), "SASL_SSL".into())]),
            property_files: BTreeMap::new(),
            oauth: None,
            replay_window: Duration::ZERO,
        }
    }

    fn good() -> TopicFacts {
        TopicFacts {
            name: "weir".into(),
            partitions: Some(12),
            replicas: 3,
            leaderless: 0,
            behind: 0,
            in_sync: 3,
            settings: settings(),
        }
    }

    fn settings() -> TopicSettings {
        TopicSettings {
            min_insync: Some(2),
            message_bytes_max: Some(1_048_588),
            cleanup_policy: Some("delete".into()),
            retention_ms: Some(604_800_000),
            retention_bytes: Some(-1),
            timestamp_type: Some("CreateTime".into()),
            age_ms_max: Some(i64::MAX),
            unclean_election: Some(false),
        }
    }

    #[track_caller]
    fn mend(facts: TopicFacts) -> String {
        let checks = judge(&kafka(), Ok(ClusterFacts { brokers: 3, topics: vec![facts] }));
        assert!(checks[0].ok && checks[1].ok && checks.len() == 3);
        assert!(!checks[2].ok && checks[2].need == super::Need::Should);
        checks[2].mend.clone().unwrap()
    }

    #[test]
    fn a_topic_as_it_should_be_is_good_also_where_its_settings_may_not_be_read() {
        let forever = TopicSettings { retention_ms: Some(-1), ..settings() };
        for settings in [settings(), forever, TopicSettings::default()] {
            let facts = TopicFacts { settings, ..good() };
            let checks = judge(&kafka(), Ok(ClusterFacts { brokers: 3, topics: vec![facts] }));
            assert!(checks.iter().all(|check| check.ok), "{checks:?}");
        }
    }

    #[test]
    fn what_a_topic_lacks_is_named_with_the_mend() {
        assert!(mend(TopicFacts { partitions: None, ..good() }).contains("create it"));
        assert!(
            mend(TopicFacts { leaderless: 1, in_sync: 0, ..good() })
                .contains("bring the brokers back that lead")
        );
        assert!(mend(TopicFacts { behind: 1, in_sync: 1, ..good() }).contains("takes nothing"));
        assert!(mend(TopicFacts { behind: 1, in_sync: 2, ..good() }).contains("fewer disks"));
        assert!(mend(TopicFacts { replicas: 1, in_sync: 1, ..good() }).contains("3 replicas"));
        let set = |change: fn(&mut TopicSettings)| {
            let mut settings = settings();
            change(&mut settings);
            mend(TopicFacts { settings, ..good() })
        };
        assert!(set(|s| s.message_bytes_max = Some(1000)).contains("at least 540672"));
        assert!(set(|s| s.min_insync = Some(1)).contains("min.insync.replicas 2"));
        assert!(set(|s| s.min_insync = Some(3)).contains("one broker that is away stops publishing"));
        assert!(set(|s| s.min_insync = Some(4)).contains("nothing can be published"));
        assert!(set(|s| s.unclean_election = Some(true)).contains("unclean.leader.election.enable to false"));
        assert!(set(|s| s.retention_ms = Some(3_600_000)).contains("retention.ms"));
        assert!(set(|s| s.retention_bytes = Some(1 << 30)).contains("retention.bytes to -1"));
        assert!(set(|s| s.timestamp_type = Some("LogAppendTime".into())).contains("CreateTime"));
        assert!(
            set(|s| s.age_ms_max = Some(3_600_000)).contains("message.timestamp.before.max.ms to 86400000")
        );
        let both = set(|s| (s.retention_bytes, s.min_insync) = (Some(1), Some(1)));
        assert!(both.contains("retention.bytes to -1") && both.contains("min.insync.replicas 2"), "{both}");
    }

    #[test]
    fn a_compacted_topic_is_a_must_since_it_loses_what_was_acknowledged() {
        for policy in ["compact", "compact,delete"] {
            let settings = TopicSettings { cleanup_policy: Some(policy.into()), ..settings() };
            let facts = TopicFacts { settings, ..good() };
            let checks = judge(&kafka(), Ok(ClusterFacts { brokers: 3, topics: vec![facts] }));
            assert_eq!((checks[2].ok, checks[2].need), (false, super::Need::Must));
            assert!(checks[2].mend.as_ref().unwrap().contains("cleanup.policy to delete"), "{checks:?}");
        }
    }

    #[test]
    fn the_topic_of_keys_is_to_be_compacted() {
        let kafka = Kafka { key_topic: Some("keys".into()), ..kafka() };
        for (policy, ok) in [("compact", true), ("delete", false), ("compact,delete", false)] {
            let settings = TopicSettings { cleanup_policy: Some(policy.into()), ..settings() };
            let facts = TopicFacts { name: "keys".into(), settings, ..good() };
            let checks = judge(&kafka, Ok(ClusterFacts { brokers: 3, topics: vec![facts] }));
            assert_eq!((checks[2].ok, checks[2].need), (ok, super::Need::Should), "{checks:?}");
        }
    }

    #[test]
    fn events_in_the_clear_are_advised_against() {
        let plain = Kafka { properties: BTreeMap::new(), ..kafka() };
        let checks = judge(&plain, Ok(ClusterFacts { brokers: 3, topics: vec![good()] }));
        assert!(!checks[1].ok && checks[1].mend.as_ref().unwrap().contains("SASL_SSL"), "{checks:?}");
    }

    #[test]
    fn an_agent_that_cannot_start_is_a_must_and_brokers_that_are_away_are_not() {
        let wrong = Failure::Configuration { key: "properties.x".into(), problem: "no such thing".into() };
        assert_eq!(judge(&kafka(), Err(wrong))[0].need, super::Need::Must);
        let away = judge(&kafka(), Err(Failure::Unreachable { reason: "refused".into() }));
        assert_eq!(away[0].need, super::Need::Should);
        assert!(away[0].mend.as_ref().unwrap().contains("kafka.brokers"), "{away:?}");
    }
}
