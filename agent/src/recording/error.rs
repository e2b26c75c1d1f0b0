//! Why recording is not possible: what the operator reads in the log and the client in a 503 `Status`.
//!
//! Cloneable, since one failed group commit refuses every request that waited for it. No text here may hold
//! anything of a request.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use weir_common::kms::KmsError;

/// What went wrong with recording; the proxy answers 503 with it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum RecordingError {
    /// The journal has reached its limit.
    #[error(
        "journal {path} is full ({bytes_max} bytes); copy all but its newest epoch folder elsewhere and remove them, \
         and recording goes on by itself; or raise journal.bytesMax and restart the agent"
    )]
    Full {
        /// The journal's folder.
        path: PathBuf,
        /// Its limit.
        bytes_max: u64,
    },
    /// The file system has no space.
    #[error("no space left for journal {path}; free space on its file system")]
    NoSpace {
        /// What was written.
        path: PathBuf,
    },
    /// The file system cannot be written.
    #[error("journal {path} is on a read-only file system; mount it writable")]
    ReadOnly {
        /// What was written.
        path: PathBuf,
    },
    /// The process may not write there.
    #[error("journal {path} may not be written by this process; check owner, mode and security profile")]
    Denied {
        /// What was written.
        path: PathBuf,
    },
    /// Anything else the disk says.
    #[error("journal {path} cannot be written; check its disk and the kernel log")]
    Storage {
        /// What was written.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: Arc<io::Error>,
    },
    /// Another process holds the epoch's lock.
    #[error("journal epoch {path} is locked by another process")]
    Locked {
        /// The lock file.
        path: PathBuf,
    },
    /// A key file cannot be used.
    #[error("key file {path} cannot be used: {reason}")]
    Key {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The key that content is to be encrypted with cannot be stored: nothing may be recorded with it.
    #[error("content cannot be encrypted, its key is not stored")]
    NoKey(#[source] Arc<RecordingError>),
    /// The key service does not wrap it.
    #[error("AWS KMS does not wrap the key; without that nobody could read what it encrypts")]
    KeyService(#[source] KmsError),
    /// The name does not fit into a segment header.
    #[error("node name {node:?} is longer than 253 bytes")]
    Node {
        /// The name.
        node: String,
    },
    /// A thread of the recorder cannot be started.
    #[error("recorder thread cannot be started; is the process limited in threads?")]
    Thread(#[source] Arc<io::Error>),
    /// One event is longer than a frame may be: the request is refused rather than half recorded.
    #[error("an event of {bytes} bytes is longer than a journal frame may be")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// What is recorded is not acknowledged fast enough.
    #[error(
        "{bytes} bytes of the journal are not acknowledged by Kafka (without Kafka: are in it), the oldest event for {seconds} \
         seconds: more than recording.backlog allows; see to Kafka, or copy epochs away, or raise the limit"
    )]
    Behind {
        /// How many.
        bytes: u64,
        /// For how long.
        seconds: u64,
    },
    /// A pod records more than it may, on and on.
    #[error(
        "the pod records more than limits.podBytesPerSecond allows; it goes on by itself when the pod slows down, or raise that key \
         and restart the agent"
    )]
    OverQuota,
    /// A pod has filled its part of a backlog.
    #[error(
        "the pod has filled limits.podBacklogPercent of the journal, which is more than half full; make room (with Kafka: see why it \
         does not acknowledge), or raise that key and restart the agent"
    )]
    OverPart,
    /// The disk hangs.
    #[error("the journal does not become durable in time; is its disk overloaded or gone?")]
    TooSlow,
    /// A client's bytes on a stream into a pod are not in the form that was agreed on, and rules mask by expressions.
    #[error(
        "what the client says on this stream into a pod is not in the form that was agreed on, so recording.masks.patterns cannot be applied"
    )]
    Unreadable,
    /// The recorder has stopped.
    #[error("recording has stopped; the agent is shutting down")]
    Closed,
}

impl RecordingError {
    /// What the client reads of it: what is wrong, without what only the node's operator should know.
    pub fn for_client(&self) -> &'static str {
        match self {
            Self::Full { .. } => "the journal is full; its operator must make room",
            Self::NoSpace { .. } => "no space left for the journal; free space on its file system",
            Self::ReadOnly { .. } => "the journal is on a read-only file system; mount it writable",
            Self::Denied { .. } | Self::Storage { .. } | Self::Locked { .. } => {
                "the journal cannot be written"
            }
            Self::NoKey(why) => why.for_client(),
            Self::KeyService(_) => {
                "the key service (AWS KMS) that recorded content is encrypted with does not answer, or refuses; its operator must see to it"
            }
            Self::Key { .. } | Self::Node { .. } | Self::Thread(_) => "recording is not set up",
            Self::TooLong { .. } => "an event of it is longer than a journal frame may be",
            Self::Behind { .. } => {
                "the journal holds more than its operator allows; the operator must see to Kafka or make room"
            }
            Self::OverQuota => {
                "the pod records more bytes a second than it may; make fewer requests, or smaller ones"
            }
            Self::OverPart => {
                "the journal is more than half full and the pod has used its part of it; the operator must make room"
            }
            Self::TooSlow => "the journal does not become durable in time",
            Self::Unreadable => {
                "what the client says on it is not in the form that was agreed on, and could not be masked"
            }
            Self::Closed => "recording has stopped; the agent is shutting down",
        }
    }

    /// Whether it is the pod itself that has to wait, not everybody.
    pub fn is_of_pod(&self) -> bool {
        matches!(self, Self::OverQuota | Self::OverPart)
    }

    /// Whether waiting may help.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Self::NoKey(why) => why.may_pass(),
            Self::Full { .. }
            | Self::NoSpace { .. }
            | Self::ReadOnly { .. }
            | Self::Denied { .. }
            | Self::KeyService(_)
            | Self::Storage { .. } => true,
            _ => false,
        }
    }

    /// Whether the key service is to blame.
    pub(super) fn is_of_key_service(&self) -> bool {
        match self {
            Self::NoKey(why) => why.is_of_key_service(),
            Self::KeyService(_) => true,
            _ => false,
        }
    }

    /// Of a key that was to be stored.
    pub(super) fn no_key(self) -> Self {
        Self::NoKey(Arc::new(self))
    }

    /// Names what the system said about `path`.
    pub(super) fn storage(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace { path },
            io::ErrorKind::ReadOnlyFilesystem => Self::ReadOnly { path },
            io::ErrorKind::PermissionDenied => Self::Denied { path },
            _ => Self::Storage { path, source: Arc::new(source) },
        }
    }
}
