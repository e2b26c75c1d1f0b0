//! Where messages go, as a trait: Kafka, or what tests put in its place.
//!
//! A sink takes messages and says later what became of each, in any order. It may be thrown away at any time with all
//! that it holds: whoever uses it sends again what was not acknowledged.

use std::time::Duration;

use weir_common::message::Message;

/// Names a message between sending and its outcome.
pub(super) type Ticket = u64;

/// Why a message did not arrive, or a sink cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The client cannot be made with this configuration.
    #[error("kafka.{key}: {problem}")]
    Configuration {
        /// The key below `kafka`.
        key: String,
        /// What is wrong with it, without its value.
        problem: String,
    },
    /// The topic takes no message of this length.
    #[error(
        "topic {topic} refuses a message of {bytes} bytes; set its max.message.bytes to at least {}",
        weir_common::message::MESSAGE_BYTES_MAX
    )]
    TooLarge {
        /// The topic.
        topic: String,
        /// Length of the message.
        bytes: usize,
    },
    /// Kafka knows no such topic.
    #[error("topic {topic} does not exist; create it, or may the agent not describe it?")]
    UnknownTopic {
        /// The topic.
        topic: String,
    },
    /// The brokers do not let the agent in, or not write.
    #[error(
        "the brokers refuse the agent ({reason}); check its credentials and that it may write to the topics"
    )]
    Denied {
        /// What they say.
        reason: String,
    },
    /// The topic takes no message of that time.
    #[error(
        "topic {topic} refuses the time of an event; is this node's clock right, and is the topic's message.timestamp.before.max.ms \
         longer than the age of the oldest event in the journal?"
    )]
    Time {
        /// The topic.
        topic: String,
    },
    /// The client has lost its footing and must be made anew.
    #[error("the Kafka client cannot go on and is made anew: {reason}")]
    Fatal {
        /// What it says.
        reason: String,
    },
    /// No broker answers.
    #[error("no broker answers ({reason}); are kafka.brokers right, and reached from this node?")]
    Unreachable {
        /// What the client says.
        reason: String,
    },
    /// Anything else.
    #[error("Kafka did not take a message: {reason}")]
    Other {
        /// What it says.
        reason: String,
    },
}

impl Failure {
    /// All names, for metrics.
    pub(crate) const NAMES: [&'static str; 8] =
        ["configuration", "tooLarge", "unknownTopic", "denied", "fatal", "unreachable", "other", "time"];

    /// That of the two which says more about what to do.
    pub(super) fn or_clearer(self, other: Self) -> Self {
        match self {
            Self::Fatal { .. } | Self::Other { .. } if !matches!(other, Self::Other { .. }) => other,
            _ => self,
        }
    }

    /// Its place in [`Self::NAMES`].
    pub(super) fn index(&self) -> usize {
        match self {
            Self::Configuration { .. } => 0,
            Self::TooLarge { .. } => 1,
            Self::UnknownTopic { .. } => 2,
            Self::Denied { .. } => 3,
            Self::Fatal { .. } => 4,
            Self::Unreachable { .. } => 5,
            Self::Other { .. } => 6,
            Self::Time { .. } => 7,
        }
    }
}

/// What became of a message.
#[derive(Clone, Debug)]
pub(super) struct Outcome {
    pub(super) ticket: Ticket,
    /// Acknowledged by all replicas that are in sync, or not.
    pub(super) result: Result<(), Failure>,
}

/// Whether a message was taken.
#[derive(Clone, Debug)]
pub(super) enum Taken {
    /// Its outcome follows.
    Yes,
    /// No room just now.
    Full,
}

/// Takes messages. Dropped, it forgets what it holds.
pub(super) trait Sink: Send {
    /// Takes a message for `topic`, made at this time, if it has room. Messages of one key arrive in the order in which
    /// they were taken.
    ///
    /// # Errors
    /// The sink must be made anew.
    fn send(
        &mut self,
        ticket: Ticket,
        topic: &str,
        message: &Message<'_>,
        unix_ms: i64,
    ) -> Result<Taken, Failure>;

    /// Waits up to `timeout` for outcomes and adds them to `outcomes`.
    ///
    /// # Errors
    /// The sink must be made anew.
    fn poll(&mut self, timeout: Duration, outcomes: &mut Vec<Outcome>) -> Result<(), Failure>;

    /// Whether it has reached Kafka, as far as it knows; none if it has not tried.
    fn is_connected(&self) -> Option<bool>;

    /// What the brokers say if they let the agent not in.
    fn denied(&self) -> Option<String> {
        None
    }
}

/// Makes sinks.
pub(super) trait MakeSink: Send {
    /// Makes a new one; it need not reach anything yet.
    ///
    /// # Errors
    /// It cannot be made: the configuration is wrong.
    fn make(&mut self) -> Result<Box<dyn Sink>, Failure>;
}
