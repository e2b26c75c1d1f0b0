//! What is on a topic, by readers that share no code with this repository: kcat, and the consumer that comes with Kafka.
//!
//! kcat is quick enough to be asked again and again. Kafka's own is in Java as most that reads from Kafka is, and takes
//! seconds; it answers for what a C library might take from a C library and nobody else would.

use std::collections::BTreeSet;
use std::io::Read as _;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::Value;

use super::{KCAT_SECONDS, Kafka};
use crate::command::{output, run};

/// Kafka's own consumer ends when no message came for so long.
const SILENCE_MS: &str = "30000";

/// One message as it stands on a topic.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Message {
    /// Partition.
    pub partition: u32,
    /// Offset in the partition.
    pub offset: u64,
    /// Key, if it has one.
    pub key: Option<String>,
    /// Names and values of its headers, in their order.
    #[serde(default, deserialize_with = "pairs")]
    pub headers: Vec<(String, String)>,
    /// The value. What Weir publishes is UTF-8; a topic with anything else cannot be read here.
    #[serde(rename = "payload")]
    pub value: String,
}

impl Message {
    /// The value of the one header of this name.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut of_name = self.headers.iter().filter(|(found, _)| found == name);
        let value = of_name.next().map(|(_, value)| value.as_str());
        value.filter(|_| of_name.next().is_none())
    }
}

/// kcat writes headers as one list of names and values in turn.
fn pairs<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Vec<(String, String)>, D::Error> {
    let flat = Vec::<String>::deserialize(from)?;
    if flat.len() % 2 != 0 {
        return Err(serde::de::Error::custom("a header without a value"));
    }
    Ok(flat.chunks_exact(2).map(|pair| (pair[0].clone(), pair[1].clone())).collect())
}

/// Whether every partition that `kcat -L -J` lists has a leader, and something is listed without an error.
pub(super) fn is_led(listed: &[u8]) -> bool {
    let Ok(listed) = serde_json::from_slice::<Value>(listed) else { return false };
    let topics = listed["topics"].as_array().map_or(&[][..], Vec::as_slice);
    let led = |topic: &Value| {
        let partitions = topic["partitions"].as_array().map_or(&[][..], Vec::as_slice);
        let leader = |partition: &Value| partition["leader"].as_i64().is_some_and(|leader| leader >= 0);
        topic["error"].is_null() && !partitions.is_empty() && partitions.iter().all(leader)
    };
    listed["brokers"].as_array().is_some_and(|brokers| !brokers.is_empty()) && topics.iter().all(led)
}

/// Partitions that `kcat -L -J` lists without a leader.
pub(super) fn leaderless(listed: &[u8]) -> BTreeSet<u32> {
    let Ok(listed) = serde_json::from_slice::<Value>(listed) else { return BTreeSet::new() };
    let topics = listed["topics"].as_array().map_or(&[][..], Vec::as_slice);
    let partitions = topics.iter().filter_map(|topic| topic["partitions"].as_array()).flatten();
    let without = partitions.filter(|partition| partition["leader"].as_i64() == Some(-1));
    without.filter_map(|partition| u32::try_from(partition["partition"].as_u64()?).ok()).collect()
}

impl Kafka {
    /// All that is on a topic now, partition by partition in the order of offsets, by kcat.
    ///
    /// # Errors
    /// When the broker is away or there is no such topic; when a message has no value, or anything in it is not UTF-8.
    pub fn messages(&self, topic: &str) -> Result<Vec<Message>> {
        let text = self.lines(topic)?;
        let message = |line: &str| serde_json::from_str(line).with_context(|| format!("no message: {line}"));
        let mut messages: Vec<Message> = text.lines().map(message).collect::<Result<_>>()?;
        messages.sort_by_key(|message| (message.partition, message.offset));
        Ok(messages)
    }

    /// What the topic has for the time of each message that is on it now, in milliseconds since 1970.
    ///
    /// # Errors
    /// As of [`Self::messages`].
    pub fn timestamps(&self, topic: &str) -> Result<Vec<(Message, i64)>> {
        let timed = |line: &str| {
            let message = serde_json::from_str(line)?;
            let time = serde_json::from_str::<Value>(line)?["ts"].as_i64();
            Ok((message, time.with_context(|| format!("no time: {line}"))?))
        };
        self.lines(topic)?.lines().map(timed).collect()
    }

    fn lines(&self, topic: &str) -> Result<String> {
        let mut command = self.installation.kcat(KCAT_SECONDS);
        command.args(["-C", "-J", "-e", "-q", "-o", "beginning", "-X", "check.crcs=true", "-m", "10"]);
        // That nothing more is there a broker says when it has waited for it; half a second unless it is told otherwise.
        command.args(["-X", "fetch.wait.max.ms=10"]);
        let output = output(command.args(["-b", &self.bootstrap(), "-t", topic]))?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "kcat cannot read {topic} ({}): {said}", output.status);
        String::from_utf8(output.stdout).context("kcat wrote something that is not UTF-8")
    }

    /// The same by the consumer that comes with Kafka.
    ///
    /// # Errors
    /// When the broker is away, there is no such topic, or another number of messages comes than kcat sees.
    pub fn messages_by_java(&self, topic: &str) -> Result<Vec<Message>> {
        let count = self.messages(topic)?.len();
        if count == 0 {
            return Ok(Vec::new());
        }
        // Between its parts it writes what it is told: what nobody can have put into a message.
        let [field, header, line, null] = ["field", "header", "line", "null"].map(separator);
        let mut command = self.tool("org.apache.kafka.tools.consumer.ConsoleConsumer");
        command.args(["--topic", topic, "--from-beginning", "--timeout-ms", SILENCE_MS]);
        command.args(["--max-messages", &count.to_string()]);
        for property in [
            "print.partition=true",
            "print.offset=true",
            "print.headers=true",
            "print.key=true",
            &format!("key.separator={field}"),
            &format!("headers.separator={header}"),
            &format!("line.separator={line}"),
            &format!("null.literal={null}"),
        ] {
            command.args(["--formatter-property", property]);
        }
        let text = run(&mut command)?;
        let message = |text: &str| parse(text, &field, &header, &null);
        let mut messages: Vec<Message> = text.split_terminator(&line).map(message).collect::<Result<_>>()?;
        ensure!(messages.len() == count, "Kafka's own consumer reads {} of {count} messages", messages.len());
        messages.sort_by_key(|message| (message.partition, message.offset));
        Ok(messages)
    }
}

/// One message as Kafka's `DefaultMessageFormatter` writes it.
fn parse(text: &str, field: &str, header: &str, null: &str) -> Result<Message> {
    let parts: Vec<&str> = text.split(field).collect();
    let [partition, offset, headers, key, value] = parts[..] else {
        anyhow::bail!("{} parts instead of 5: {text}", parts.len());
    };
    let number = |part: &str, name: &str| {
        let number = part.strip_prefix(name).and_then(|number| number.parse::<u64>().ok());
        number.with_context(|| format!("no {name} in {part:?}"))
    };
    let pair = |pair: &str| {
        let (name, value) = pair.split_once(':').with_context(|| format!("no header: {pair}"))?;
        Ok((name.to_owned(), value.to_owned()))
    };
    let headers = match headers {
        "NO_HEADERS" => Vec::new(),
        headers => headers.split(header).map(pair).collect::<Result<_>>()?,
    };
    ensure!(value != null, "a message without a value");
    Ok(Message {
        partition: u32::try_from(number(partition, "Partition:")?).context("partition out of range")?,
        offset: number(offset, "Offset:")?,
        key: (key != null).then(|| key.to_owned()),
        headers,
        value: value.to_owned(),
    })
}

fn separator(name: &str) -> String {
    let mut bytes = [0; 16];
    // Where there is no randomness, the test that relies on it fails by a message that has no five parts.
    if let Ok(mut random) = std::fs::File::open("/dev/urandom") {
        let _ = random.read_exact(&mut bytes);
    }
    format!("<{name} {}>", hex::encode(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topic_without_leaders_is_not_ready() {
        let listed =
            |topics: &str| format!("{{\"brokers\":[{{\"id\":1}}],\"topics\":[{topics}]}}").into_bytes();
        let topic = |leader: i64| {
            format!("{{\"topic\":\"t\",\"partitions\":[{{\"partition\":0,\"leader\":{leader}}}]}}")
        };
        assert!(is_led(&listed("")) && is_led(&listed(&topic(1))));
        assert!(!is_led(&listed(&topic(-1))));
        assert!(!is_led(&listed("{\"topic\":\"t\",\"error\":\"Unknown topic\",\"partitions\":[]}")));
        assert!(!is_led(b"{\"brokers\":[],\"topics\":[]}") && !is_led(b""));
    }

    #[test]
    fn what_kafkas_formatter_writes_is_read() {
        let read = |text: &str| parse(text, "|", "^", "NIL");
        let message = read("Partition:2|Offset:17|ce_id:a/1^odd:a,b:c|key|{\"v\":1}").unwrap();
        assert_eq!((message.partition, message.offset, message.key.as_deref()), (2, 17, Some("key")));
        assert_eq!((message.header("odd"), message.header("absent")), (Some("a,b:c"), None));
        let bare = read("Partition:0|Offset:0|NO_HEADERS|NIL|v").unwrap();
        assert_eq!((bare.key, bare.headers), (None, vec![]));
        assert!(read("Partition:0|Offset:0|NO_HEADERS|NIL|NIL").is_err());
        assert!(read("Partition:0|Offset:0|NO_HEADERS|NIL").is_err());
    }
}
