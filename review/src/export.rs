//! `weir export`: one session with the proof that its events are in their log, for someone who has no access to the rest.
//!
//! A folder of text files that other tools read as well; `docs/verify.md` describes them, `verify` checks them offline.
//! Each log is read twice, as a stream: first all of it, for the tree and the newest checkpoint that holds, then the
//! session's events. Proofs show that what is exported was recorded, not that nothing was left out: that shows only the
//! log itself.

mod nodes;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    fs::{DirBuilder, File},
    io::{self, BufWriter, Write as _},
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use weir_common::{
    checkpoint::{Checkpoint, NOTE_BYTES_MAX},
    frame::{Frame, FrameType},
    merkle::{Tree, leaf_hash, verify_inclusion},
    segment::{SegmentError, SegmentReader},
};

use crate::{
    invoked,
    source::{Epoch, Journal, SourceError, is_unmade, read_segment, with_sources},
    terminal::{Progress, escaped},
    verify::{Keys, VerifyError},
};
use nodes::{Growing, Nodes};

/// The file that says what an export holds; it is written last.
pub(crate) const MANIFEST_FILE: &str = "export.json";
/// The events, one a line, byte for byte as they were recorded.
pub(crate) const EVENTS_FILE: &str = "events.jsonl";
/// The proofs, in the order of the events.
pub(crate) const PROOFS_FILE: &str = "proofs.jsonl";
/// Ending of the files with an epoch's signed checkpoint.
pub(crate) const CHECKPOINT_SUFFIX: &str = ".checkpoint";
/// Ending of the files with an epoch's verifier keys.
pub(crate) const KEY_SUFFIX: &str = ".pub";
/// Version of the export.
pub(crate) const VERSION: u32 = 1;

/// What an export holds. Nobody signs it: it tells of an accident, not of an attack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Manifest {
    pub(crate) version: u32,
    pub(crate) session: String,
    pub(crate) events: u64,
    /// Events of the session that no checkpoint proves (yet), and that are not in it.
    pub(crate) left_out: u64,
    pub(crate) epochs: Vec<Uuid>,
}

/// The proof of one event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Proof {
    pub(crate) epoch: Uuid,
    /// Index of its leaf.
    pub(crate) sequence: u64,
    /// Hashes, hex, from the leaf's sibling on.
    pub(crate) path: Vec<String>,
}

/// What of an event says where it belongs.
#[derive(Debug, Deserialize)]
pub(crate) struct Named {
    pub(crate) epoch: Uuid,
    pub(crate) sequence: u64,
    #[serde(default)]
    pub(crate) session: String,
    #[serde(default)]
    pub(crate) request: Option<String>,
    #[serde(rename = "type")]
    pub(crate) kind: String,
    #[serde(default)]
    pub(crate) node: String,
}

/// Why a session cannot be exported.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExportError {
    /// The journal cannot be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Keys cannot be read.
    #[error(transparent)]
    Keys(#[from] VerifyError),
    /// Something is wrong with the log.
    #[error(
        "{place}: {what}; nothing can be proven with a damaged log, `{} verify --from {journal}` tells more",
        invoked::name()
    )]
    Damaged { place: String, what: String, journal: String },
    /// Nothing has this id.
    #[error(
        "no session in {journal} has the id {id}; `{} sessions --from {journal}` lists the sessions",
        invoked::name()
    )]
    Unknown { id: String, journal: String },
    /// No checkpoint covers the session.
    #[error(
        "no checkpoint proves any of the session's {events} events yet; an agent signs one within seconds, try again"
    )]
    Unproven { events: u64 },
    /// The export cannot be written.
    #[error("cannot write {path}; name a folder that does not exist yet, where you may write")]
    Output { path: PathBuf, source: io::Error },
    /// The temporary file cannot be written.
    #[error("cannot write the log's hashes to a temporary file; is there room? TMPDIR names another folder")]
    Nodes(#[source] io::Error),
}

/// An epoch with events of the session.
#[derive(Debug)]
struct Log {
    nodes: Nodes,
    note: String,
    checkpoint: Checkpoint,
    /// The first event that can be proven: those before are gone, or stand before missing ones.
    first: u64,
}

/// A log that is being read.
struct Reading<'a> {
    journal: &'a Journal,
    keys: &'a Keys,
    session: &'a str,
    growing: Option<Growing>,
    first: u64,
    events: u64,
    newest: Option<(String, Checkpoint)>,
}

/// Exports a session into a new folder; returns what it holds.
///
/// # Errors
/// The journal cannot be read or is damaged, nothing is proven, or the folder cannot be made.
pub(crate) fn export(
    journal: &Journal,
    session: &str,
    keys: &Keys,
    folder: &Path,
) -> Result<Manifest, ExportError> {
    let (mut logs, mut events) = (BTreeMap::new(), 0);
    let mut progress = Progress::new("proving", journal.bytes().saturating_mul(2));
    for epoch in &journal.epochs {
        let mut reading =
            Reading { journal, keys, session, growing: None, first: 0, events: 0, newest: None };
        reading.epoch(epoch, &mut progress)?;
        events += reading.events;
        if let (true, Ok(id)) = (reading.events > 0, Uuid::try_parse(&epoch.name))
            && let Some(log) = reading.finish()?
        {
            logs.insert(id, (log, epoch));
        }
    }
    if events == 0 {
        return Err(ExportError::Unknown { id: escaped(session).into_owned(), journal: journal.name() });
    }
    if logs.is_empty() {
        return Err(ExportError::Unproven { events });
    }
    let output = |path: &Path| {
        let path = path.to_owned();
        move |source| ExportError::Output { path, source }
    };
    DirBuilder::new().mode(0o700).create(folder).map_err(output(folder))?;
    let written = write_events(journal, session, &logs, folder, &mut progress)?;
    if written == 0 {
        std::fs::remove_dir_all(folder).map_err(output(folder))?;
        return Err(ExportError::Unproven { events });
    }
    for (id, (log, epoch)) in &logs {
        let path = folder.join(format!("{id}{CHECKPOINT_SUFFIX}"));
        std::fs::write(&path, &log.note).map_err(output(&path))?;
        let path = folder.join(format!("{id}{KEY_SUFFIX}"));
        let keys = read_keys(&epoch.directory).unwrap_or_default();
        std::fs::write(&path, keys).map_err(output(&path))?;
    }
    let manifest = Manifest {
        version: VERSION,
        session: session.to_owned(),
        events: written,
        left_out: events - written.min(events),
        epochs: logs.into_keys().collect(),
    };
    let path = folder.join(MANIFEST_FILE);
    let json = serde_json::to_string(&manifest).map_err(io::Error::from);
    json.and_then(|json| std::fs::write(&path, json + "\n")).map_err(output(&path))?;
    Ok(manifest)
}

/// What lies beside the log as `node.pub`, for who has no key from elsewhere.
fn read_keys(epoch: &Path) -> io::Result<String> {
    let mut keys = String::new();
    io::Read::read_to_string(
        &mut io::Read::take(File::open(epoch.join("node.pub"))?, NOTE_BYTES_MAX as u64),
        &mut keys,
    )?;
    Ok(keys)
}

/// Writes events and proofs; returns how many.
fn write_events(
    journal: &Journal,
    session: &str,
    logs: &BTreeMap<Uuid, (Log, &Epoch)>,
    folder: &Path,
    progress: &mut Progress,
) -> Result<u64, ExportError> {
    let create = |name: &str| {
        let path = folder.join(name);
        let file = File::create_new(&path);
        file.map(BufWriter::new).map_err(|source| ExportError::Output { path, source })
    };
    let (mut events, mut proofs, mut written) = (create(EVENTS_FILE)?, create(PROOFS_FILE)?, 0);
    let output = |source| ExportError::Output { path: folder.to_owned(), source };
    for record in journal.records() {
        let record = record?;
        progress.advance(record.frame_bytes);
        if record.session() != session {
            continue;
        }
        let damaged = |what: &str| ExportError::Damaged {
            place: journal.place(record.place),
            what: what.to_owned(),
            journal: journal.name(),
        };
        let named: Named =
            serde_json::from_slice(&record.value).map_err(|_| damaged("its value is not an event"))?;
        let Some((log, _)) = logs.get(&named.epoch) else { continue };
        let Checkpoint { size, root, .. } = &log.checkpoint;
        if named.sequence < log.first || named.sequence >= *size {
            continue;
        }
        let proof = log.nodes.proof(named.sequence, *size).map_err(ExportError::Nodes)?.unwrap_or_default();
        let leaf = leaf_hash(&record.value);
        if !verify_inclusion(&leaf, named.sequence, *size, root, &proof) || record.value.contains(&b'\n') {
            return Err(damaged("the event is not the one that its checkpoint covers"));
        }
        let path = proof.iter().map(hex::encode).collect();
        let proof = Proof { epoch: named.epoch, sequence: named.sequence, path };
        let proof = serde_json::to_string(&proof).map_err(io::Error::from).map_err(output)?;
        events.write_all(&record.value).and_then(|()| events.write_all(b"\n")).map_err(output)?;
        writeln!(proofs, "{proof}").map_err(output)?;
        written += 1;
    }
    events.flush().and_then(|()| proofs.flush()).map_err(output)?;
    Ok(written)
}

impl Reading<'_> {
    /// Reads all of a log.
    fn epoch(&mut self, epoch: &Epoch, progress: &mut Progress) -> Result<(), ExportError> {
        let tree = epoch.removed.as_ref().map_or_else(Tree::new, |removed| removed.tree.clone());
        self.begin(tree)?;
        for number in epoch.segments.clone() {
            let path = &self.journal.segments[number];
            let bytes = read_segment(path)?;
            progress.advance(bytes.len() as u64);
            let damaged = |error: &SegmentError| ExportError::Damaged {
                place: self.journal.label(path),
                what: with_sources(error),
                journal: self.journal.name(),
            };
            let reader = match SegmentReader::new(&bytes, self.journal.successor(number)) {
                Err(_) if is_unmade(&bytes) => continue,
                Err(error) => return Err(damaged(&error)),
                Ok(reader) => reader,
            };
            let expected = self.growing.as_ref().map(|growing| growing.tree().size());
            if expected.is_some_and(|expected| expected != reader.header().first_sequence) {
                self.growing = None;
            }
            for located in reader {
                match located {
                    Ok(located) => self.frame(&located.frame)?,
                    // Of a topic events may be gone: proofs begin behind them.
                    Err(SegmentError::Sequence { .. } | SegmentError::Missing { .. })
                        if self.journal.topic().is_some() =>
                    {
                        self.growing = None;
                    }
                    Err(error) => return Err(damaged(&error)),
                }
            }
        }
        // Signed while nothing was recorded.
        let last = std::fs::read_to_string(epoch.directory.join("checkpoint"));
        if let (Ok(note), true) = (last, self.growing.is_some()) {
            self.checkpoint(&note)?;
        }
        Ok(())
    }

    fn begin(&mut self, tree: Tree) -> Result<(), ExportError> {
        self.first = tree.size();
        self.newest = None;
        self.growing = Some(Growing::from(tree).map_err(ExportError::Nodes)?);
        Ok(())
    }

    fn frame(&mut self, frame: &Frame<'_>) -> Result<(), ExportError> {
        match frame.frame_type {
            FrameType::Checkpoint => match std::str::from_utf8(frame.value) {
                Ok(note) => self.checkpoint(note),
                Err(_) => Ok(()),
            },
            FrameType::Event => {
                self.events += u64::from(frame.envelope.key == self.session);
                match &mut self.growing {
                    Some(growing) => growing.push(frame.leaf_hash).map_err(ExportError::Nodes),
                    None => Ok(()),
                }
            }
        }
    }

    /// Keeps the newest checkpoint that holds; where events are gone, goes on from the tree that it brings.
    fn checkpoint(&mut self, note: &str) -> Result<(), ExportError> {
        let Ok(checkpoint) = self.keys.verify(note) else { return Ok(()) };
        if self.growing.is_none()
            && let Some(tree) = &checkpoint.tree
        {
            self.begin(tree.clone())?;
        }
        let holds = self.growing.as_ref().is_some_and(|growing| {
            (growing.tree().size(), growing.tree().root()) == (checkpoint.size, checkpoint.root)
        });
        if holds {
            self.newest = Some((note.to_owned(), checkpoint));
        }
        Ok(())
    }

    fn finish(self) -> Result<Option<Log>, ExportError> {
        let Some((growing, (note, checkpoint))) = self.growing.zip(self.newest) else { return Ok(None) };
        let nodes = growing.finish().map_err(ExportError::Nodes)?;
        Ok(Some(Log { nodes, note, checkpoint, first: self.first }))
    }
}
