//! Whether Kafka takes what the journal holds: brokers, topics, and what the topics promise.

use std::time::Duration;

use weir_common::message::MESSAGE_BYTES_MAX;

use super::{Check, Need};
use crate::{
    config::Kafka,
    publishing::{self, ClusterFacts, Failure, TopicFacts},
};

/// How long the brokers may take to answer.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Asks the brokers. Blocks. Nothing here is a must: without Kafka the journal keeps the events.
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
            [brokers, transport(kafka)].into_iter().chain(facts.topics.iter().map(topic)).collect()
        }
    }
}

/// Whether what is published is encrypted on its way.
fn transport(kafka: &Kafka) -> Check {
    let name = "kafka transport";
    let protocol = kafka.properties.get("security.protocol").map_or("plaintext", String::as_str);
    let found = format!("security.protocol is {protocol}");
    if protocol.to_ascii_lowercase().ends_with("ssl") {
        return Check::good(name, Need::Should, found);
    }
    let mend = "set kafka.properties.security.protocol to SSL or SASL_SSL: as it is, whoever sees the network reads the events";
    Check::bad(name, Need::Should, found, mend)
}

fn topic(facts: &TopicFacts) -> Check {
    let name = format!("kafka topic {}", facts.name);
    let bad = |found: String, mend: String| Check::bad(&name, Need::Should, found, mend);
    let Some(partitions) = facts.partitions else {
        let mend = "create it (see docs/kafka.md), or let the agent describe it";
        return bad("there is no such topic, or the agent may not see it".to_owned(), mend.to_owned());
    };
    let shown = |value: Option<u64>| value.map_or_else(|| "unknown".to_owned(), |value| value.to_string());
    let found = format!(
        "{partitions} partitions, {} replicas, min.insync.replicas {}, max.message.bytes {}",
        facts.replicas,
        shown(facts.min_insync),
        shown(facts.message_bytes_max)
    );
    if facts.leaderless > 0 {
        let mend = "bring the brokers back that lead them: until then what belongs there waits";
        return bad(format!("{found}; {} partitions have no leader", facts.leaderless), mend.to_owned());
    }
    if facts.message_bytes_max.is_some_and(|bytes| bytes < MESSAGE_BYTES_MAX as u64) {
        let mend = format!(
            "set max.message.bytes of the topic to at least {MESSAGE_BYTES_MAX}: the first longer event would stop publishing"
        );
        return bad(found, mend);
    }
    if facts.replicas < 2 || facts.min_insync.is_some_and(|replicas| replicas < 2) {
        let mend = "use 3 replicas and min.insync.replicas 2: as it is, one broker's disk can lose what was acknowledged, and the journal lets go of it";
        return bad(found, mend.to_owned());
    }
    if facts.min_insync.is_some_and(|replicas| replicas >= facts.replicas as u64) {
        let mend = "lower min.insync.replicas below the number of replicas: as it is, one broker that is away stops publishing";
        return bad(found, mend.to_owned());
    }
    Check::good(&name, Need::Should, found)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use super::{ClusterFacts, Failure, Kafka, TopicFacts, judge};

    fn kafka() -> Kafka {
        Kafka {
            brokers: vec!["kafka:9092".into()],
            topic: "weir".into(),
            checkpoint_topic: "weir".into(),
            properties: BTreeMap::from([("security.protocol".into(), "SASL_SSL".into())]),
            property_files: BTreeMap::new(),
            replay_window: Duration::ZERO,
        }
    }

    fn good() -> TopicFacts {
        TopicFacts {
            name: "weir".into(),
            partitions: Some(12),
            replicas: 3,
            leaderless: 0,
            min_insync: Some(2),
            message_bytes_max: Some(1_048_588),
        }
    }

    #[track_caller]
    fn mend(facts: TopicFacts) -> String {
        let checks = judge(&kafka(), Ok(ClusterFacts { brokers: 3, topics: vec![facts] }));
        assert!(checks[0].ok && checks[1].ok && checks.len() == 3);
        assert!(!checks[2].ok);
        checks[2].mend.clone().unwrap()
    }

    #[test]
    fn a_topic_as_it_should_be_is_good_also_where_its_settings_may_not_be_read() {
        for facts in [good(), TopicFacts { min_insync: None, message_bytes_max: None, ..good() }] {
            let checks = judge(&kafka(), Ok(ClusterFacts { brokers: 3, topics: vec![facts] }));
            assert!(checks.iter().all(|check| check.ok), "{checks:?}");
        }
    }

    #[test]
    fn what_a_topic_lacks_is_named_with_the_mend() {
        assert!(mend(TopicFacts { partitions: None, ..good() }).contains("create it"));
        assert!(mend(TopicFacts { leaderless: 1, ..good() }).contains("bring the brokers back"));
        assert!(mend(TopicFacts { message_bytes_max: Some(1000), ..good() }).contains("at least 540672"));
        assert!(mend(TopicFacts { replicas: 1, ..good() }).contains("3 replicas"));
        assert!(mend(TopicFacts { min_insync: Some(1), ..good() }).contains("min.insync.replicas 2"));
        assert!(mend(TopicFacts { min_insync: Some(3), ..good() }).contains("lower min.insync.replicas"));
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
