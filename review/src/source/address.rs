//! What `--from` names: a journal directory, or topics of Kafka.
//!
//! Only the text is judged here; nothing is opened. Credentials have no place in it: they would stand in the process
//! list and in every message that names the source.

use std::{fmt, path::PathBuf};

/// How a Kafka source begins.
const SCHEME: &str = "kafka://";
/// Most brokers that are named.
const BROKERS_MAX: usize = 32;
/// Most topics that are named.
const TOPICS_MAX: usize = 8;
/// Longest name of a topic that Kafka takes.
const TOPIC_BYTES_MAX: usize = 249;
/// Longest name of a host (DNS).
const HOST_BYTES_MAX: usize = 253;

/// Where events are read from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Address {
    /// A journal directory, or one epoch's folder.
    Directory(PathBuf),
    /// Topics.
    Topics(Topics),
}

/// Topics and the brokers that know of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Topics {
    /// As librdkafka takes them: `HOST:PORT`, with commas between.
    pub(crate) brokers: String,
    /// At least one.
    pub(crate) names: Vec<String>,
}

impl fmt::Display for Topics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/{}", self.brokers, self.names.join(","))
    }
}

impl Address {
    /// Reads a source as the user wrote it.
    ///
    /// # Errors
    /// In words, with what is accepted.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let form = "give a journal directory or kafka://HOST:PORT[,HOST:PORT]/TOPIC[,TOPIC]";
        if text.is_empty() {
            return Err(form.into());
        }
        let Some(rest) = text.strip_prefix(SCHEME) else {
            return Ok(Self::Directory(PathBuf::from(text)));
        };
        let (brokers, topics) = rest.split_once('/').ok_or_else(|| format!("no topic is named; {form}"))?;
        if brokers.contains('@') {
            return Err(
                "user and password do not belong here; put sasl.username and sasl.password into a file and \
                        name it with --kafka-config"
                    .into(),
            );
        }
        let brokers: Vec<&str> = brokers.split(',').collect();
        if brokers.len() > BROKERS_MAX || !brokers.iter().all(|broker| is_broker(broker)) {
            return Err(format!("brokers are HOST:PORT with commas between, at most {BROKERS_MAX}; {form}"));
        }
        let names: Vec<String> = topics.split(',').map(str::to_owned).collect();
        if names.len() > TOPICS_MAX || !names.iter().all(|name| is_topic(name)) {
            return Err(format!(
                "a topic's name has letters, digits, `.`, `_` and `-`, at most {TOPIC_BYTES_MAX}; at most {TOPICS_MAX} \
                 topics; {form}"
            ));
        }
        if (1..names.len()).any(|later| names[..later].contains(&names[later])) {
            return Err("a topic is named twice".into());
        }
        Ok(Self::Topics(Topics { brokers: brokers.join(","), names }))
    }
}

/// `HOST:PORT`; the host may be an IPv6 address in brackets.
fn is_broker(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let inner = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let host_is_valid = match inner {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => {
            !host.is_empty()
                && host.len() <= HOST_BYTES_MAX
                && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte))
        }
    };
    let port_is_valid =
        port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port > 0);
    host_is_valid && port_is_valid
}

fn is_topic(text: &str) -> bool {
    !matches!(text, "" | "." | "..")
        && text.len() <= TOPIC_BYTES_MAX
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::{Address, Topics};

    #[test]
    fn a_source_is_a_directory_or_topics() {
        assert_eq!(Address::parse("/var/lib/weir"), Ok(Address::Directory("/var/lib/weir".into())));
        let text = "kafka://a:9092,[::1]:9093,10.0.0.1:1/weir-events,weir.checkpoints_1";
        let topics = Topics {
            brokers: "a:9092,[::1]:9093,10.0.0.1:1".into(),
            names: vec!["weir-events".into(), "weir.checkpoints_1".into()],
        };
        assert_eq!(topics.to_string(), text);
        assert_eq!(Address::parse(text), Ok(Address::Topics(topics)));
    }

    #[test]
    fn what_is_no_source_is_refused_with_the_form() {
        for (text, expected) in [
            ("", "give a journal directory"),
            ("kafka://a:9092", "no topic is named"),
            ("kafka:///t", "HOST:PORT"),
            ("kafka://a/t", "HOST:PORT"),
            ("kafka://a:0/t", "HOST:PORT"),
            ("kafka://a:65536/t", "HOST:PORT"),
            ("kafka://a:+1/t", "HOST:PORT"),
            ("kafka://a:9092,/t", "HOST:PORT"),
            ("kafka://[::g]:1/t", "HOST:PORT"),
            ("kafka://a b:1/t", "HOST:PORT"),
            ("kafka://u:p@a:1/t", "--kafka-config"),
            ("kafka://a:1/", "a topic's name"),
            ("kafka://a:1/..", "a topic's name"),
            ("kafka://a:1/t/u", "a topic's name"),
            ("kafka://a:1/t,", "a topic's name"),
            ("kafka://a:1/t,u,t", "named twice"),
        ] {
            let error = Address::parse(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let long = format!("kafka://a:1/{}", "t".repeat(250));
        assert!(Address::parse(&long).is_err());
        assert!(Address::parse(&format!("kafka://{}/t", ["a:1"; 33].join(","))).is_err());
    }
}
