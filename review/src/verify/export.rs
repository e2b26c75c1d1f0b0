//! Verifies what `weir export` wrote, without the journal: each event against its proof, each proof against a signed
//! checkpoint. Streams both files; memory is that of one line of each.
//!
//! Events and proofs are walked in step, both in the order of epoch and sequence, so that each way to tamper has a name:
//! changed, missing, appended, out of order.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io::{self, BufRead as _, BufReader, Read as _},
    path::{Path, PathBuf},
};

use serde::de::DeserializeOwned;
use uuid::Uuid;
use weir_common::{
    checkpoint::{Checkpoint, NoteVerifier},
    frame::VALUE_BYTES_MAX,
    merkle::{Hash, leaf_hash, verify_inclusion},
};

use super::{EpochReport, Finding, Kept, Options, Report, VerifyError, keys::Keys, read_text};
use crate::{
    export::{
        CHECKPOINT_SUFFIX, EVENTS_FILE, KEY_SUFFIX, MANIFEST_FILE, Manifest, Named, PROOFS_FILE, Proof,
        VERSION,
    },
    moment::{Moment, counted},
    source::with_sources,
    terminal::Progress,
};

/// Most bytes of a line: the longest event, and its end.
const LINE_BYTES_MAX: u64 = VALUE_BYTES_MAX as u64 + 1;
/// Most epochs of an export; a session is of one.
const EPOCHS_MAX: usize = 1000;

/// Whether a folder is an export.
pub(crate) fn is_export(folder: &Path) -> bool {
    folder.join(MANIFEST_FILE).is_file()
}

/// Verifies an export.
///
/// # Errors
/// It cannot be read, or is none that this version knows; or keys cannot be read.
pub(crate) fn verify(folder: &Path, options: &Options<'_>) -> Result<Report, VerifyError> {
    let path = folder.join(MANIFEST_FILE);
    let manifest: Option<Manifest> = serde_json::from_str(&read_text(&path)?).ok();
    let manifest =
        manifest.filter(|manifest| manifest.version == VERSION && manifest.epochs.len() <= EPOCHS_MAX);
    let manifest = manifest.ok_or(VerifyError::Export { path })?;
    let keys = match Keys::given(options.keys)? {
        Some(keys) => keys,
        None => Keys::brought(brought(folder, &manifest)?),
    };
    let mut checked = Check {
        folder,
        report: Report::new(folder.display().to_string(), "export", &keys),
        logs: BTreeMap::new(),
        open: HashMap::new(),
        events: 0,
    };
    checked.checkpoints(&manifest, &keys)?;
    checked.walk(&manifest)?;
    let kept = options.checkpoint.map(|path| super::load_checkpoint(path, &keys)).transpose()?;
    Ok(checked.finish(&manifest, kept.as_ref()))
}

fn brought(folder: &Path, manifest: &Manifest) -> Result<Vec<NoteVerifier>, VerifyError> {
    let mut list = Vec::new();
    for epoch in &manifest.epochs {
        let path = folder.join(format!("{epoch}{KEY_SUFFIX}"));
        let text = read_text(&path)?;
        list.extend(text.lines().filter_map(|line| NoteVerifier::parse(line).ok()));
    }
    if list.is_empty() {
        return Err(VerifyError::NoKeyInJournal { journal: folder.display().to_string() });
    }
    Ok(list)
}

/// A log of which events are in the export.
struct Log {
    /// None: its checkpoint is not signed, and proves nothing.
    checkpoint: Option<Checkpoint>,
    events: u64,
    node: String,
}

struct Check<'a> {
    folder: &'a Path,
    report: Report,
    logs: BTreeMap<Uuid, Log>,
    open: HashMap<String, u64>,
    events: u64,
}

/// Where an event belongs.
type Key = (Uuid, u64);

impl Check<'_> {
    fn finding(&self, name: &str, key: Option<Key>, what: String) -> Finding {
        let what = key.map_or(what.clone(), |(epoch, _)| format!("epoch {epoch}: {what}"));
        let file = self.folder.join(name).display().to_string();
        Finding { file, offset: None, sequence: key.map(|(_, sequence)| sequence), what }
    }

    fn damage(&mut self, name: &str, key: Option<Key>, what: impl Into<String>) {
        let finding = self.finding(name, key, what.into());
        self.report.damage.push(finding);
    }

    fn note(&mut self, name: &str, key: Option<Key>, what: impl Into<String>) {
        let finding = self.finding(name, key, what.into());
        self.report.notes.push(finding);
    }

    fn checkpoints(&mut self, manifest: &Manifest, keys: &Keys) -> Result<(), VerifyError> {
        for epoch in &manifest.epochs {
            let name = format!("{epoch}{CHECKPOINT_SUFFIX}");
            let checkpoint = match keys.verify(&read_text(&self.folder.join(&name))?) {
                Ok(checkpoint) if checkpoint.origin.ends_with(&format!("/{epoch}")) => Some(checkpoint),
                Ok(checkpoint) => {
                    self.damage(&name, None, format!("is for another log: {}", checkpoint.origin));
                    None
                }
                Err(error) => {
                    self.damage(&name, None, with_sources(&error));
                    None
                }
            };
            self.logs.insert(*epoch, Log { checkpoint, events: 0, node: String::new() });
        }
        Ok(())
    }

    /// Walks events and proofs in step.
    fn walk(&mut self, manifest: &Manifest) -> Result<(), VerifyError> {
        let mut events = Lines::open(self.folder.join(EVENTS_FILE))?;
        let mut proofs = Lines::open(self.folder.join(PROOFS_FILE))?;
        let mut progress = Progress::new("verifying", events.bytes);
        let (mut event, mut proof) = (None, None);
        let (mut last_event, mut last_proof) = (None, None);
        loop {
            if event.is_none() {
                event =
                    self.next::<Named>(&mut events, EVENTS_FILE, &mut last_event, |e| (e.epoch, e.sequence))?;
                progress.advance(events.line.len() as u64);
            }
            if proof.is_none() {
                proof =
                    self.next::<Proof>(&mut proofs, PROOFS_FILE, &mut last_proof, |p| (p.epoch, p.sequence))?;
            }
            let keys = (
                event.as_ref().map(|event: &Named| (event.epoch, event.sequence)),
                proof.as_ref().map(|proof: &Proof| (proof.epoch, proof.sequence)),
            );
            match keys {
                (None, None) => return Ok(()),
                (Some(key), proof_key) if proof_key.is_none_or(|other| key < other) => {
                    self.damage(
                        EVENTS_FILE,
                        Some(key),
                        "has no proof: it was appended, or its proof removed",
                    );
                    event = None;
                }
                (event_key, Some(key)) if event_key.is_none_or(|other| key < other) => {
                    self.damage(EVENTS_FILE, Some(key), "event is missing: only its proof is there");
                    proof = None;
                }
                _ => {
                    if let Some((event, proof)) = event.take().zip(proof.take()) {
                        self.event(&event, &proof, &events.line, manifest);
                    }
                }
            }
        }
    }

    /// The next line that makes sense and stands in its order; others are named.
    fn next<T: DeserializeOwned>(
        &mut self,
        lines: &mut Lines,
        name: &str,
        last: &mut Option<Key>,
        key: impl Fn(&T) -> Key,
    ) -> Result<Option<T>, VerifyError> {
        while lines.read()? {
            let Ok(parsed) = serde_json::from_slice::<T>(&lines.line) else {
                let what = format!("line {} is none that `weir export` writes", lines.number);
                self.damage(name, None, what);
                continue;
            };
            let key = key(&parsed);
            if last.is_some_and(|last| key <= last) {
                self.damage(name, Some(key), format!("line {} stands out of order, or again", lines.number));
                continue;
            }
            *last = Some(key);
            return Ok(Some(parsed));
        }
        if std::mem::take(&mut lines.torn) {
            self.damage(name, None, format!("line {} is cut, or too long", lines.number));
        }
        Ok(None)
    }

    fn event(&mut self, event: &Named, proof: &Proof, value: &[u8], manifest: &Manifest) {
        let key = (event.epoch, event.sequence);
        self.events += 1;
        let Some(log) = self.logs.get_mut(&event.epoch) else {
            return self.damage(EVENTS_FILE, Some(key), "the export has no checkpoint of this epoch");
        };
        log.events += 1;
        if log.node.is_empty() {
            log.node.clone_from(&event.node);
        }
        // That its checkpoint proves nothing has been said.
        let holds = log.checkpoint.as_ref().is_none_or(|checkpoint| {
            let path: Option<Vec<Hash>> = proof.path.iter().map(|node| hash(node)).collect();
            path.is_some_and(|path| {
                let leaf = leaf_hash(value);
                verify_inclusion(&leaf, event.sequence, checkpoint.size, &checkpoint.root, &path)
            })
        });
        if !holds {
            let what =
                "event, or its proof, was changed: it is not the one that the signed checkpoint covers";
            return self.damage(EVENTS_FILE, Some(key), what);
        }
        if event.session != manifest.session {
            self.damage(EVENTS_FILE, Some(key), "event belongs to another session");
        }
        if self.events == 1 && event.kind != "sessionStarted" {
            self.note(EVENTS_FILE, Some(key), "the session's beginning is not in it");
        }
        match (event.kind.as_str(), &event.request) {
            ("requestOpened", Some(request)) => {
                self.open.insert(request.clone(), event.sequence);
            }
            ("requestClosed", Some(request)) => {
                self.open.remove(request);
            }
            _ => {}
        }
    }

    fn finish(mut self, manifest: &Manifest, kept: Option<&Kept>) -> Report {
        if self.events != manifest.events {
            let what = format!("{} were exported, {} are here and proven", manifest.events, self.events);
            self.damage(MANIFEST_FILE, None, what);
        }
        if manifest.left_out > 0 {
            let events = counted(manifest.left_out, "event");
            let what =
                format!("{events} of the session were not proven when it was exported, and are not in it");
            self.note(MANIFEST_FILE, None, what);
        }
        let mut open: Vec<(u64, String)> = self.open.drain().map(|(request, at)| (at, request)).collect();
        open.sort();
        for (sequence, request) in &open {
            let what = format!("request {request} has no end on record");
            let finding = Finding { sequence: Some(*sequence), ..self.finding(EVENTS_FILE, None, what) };
            self.report.notes.push(finding);
        }
        let what = "each event here is proven to be in its log; that none of the session was left out, only the log itself shows";
        self.note(MANIFEST_FILE, None, what);
        self.kept(kept);
        for (epoch, log) in std::mem::take(&mut self.logs) {
            let mut totals =
                EpochReport { epoch: epoch.to_string(), events: log.events, ..EpochReport::default() };
            totals.node = log.node;
            if let Some(checkpoint) = log.checkpoint {
                totals.checkpoints = 1;
                (totals.covered, totals.end) = (checkpoint.size, checkpoint.size);
                totals.root = Some(hex::encode(checkpoint.root));
                totals.last_signed = checkpoint.time_unix_us.map(|time| Moment(time).text());
            }
            totals.open_requests = open.len() as u64;
            self.report.epochs.push(totals);
        }
        self.report.sound = self.report.damage.number() == 0;
        self.report
    }

    /// A checkpoint that was kept speaks only of an export that was made with one over as many events.
    fn kept(&mut self, kept: Option<&Kept>) {
        let Some(kept) = kept else { return };
        let logs = self.logs.values().filter_map(|log| log.checkpoint.as_ref());
        let same = logs.into_iter().find(|log| {
            (log.origin.as_str(), log.size) == (kept.checkpoint.origin.as_str(), kept.checkpoint.size)
        });
        let text = match same.map(|log| log.root == kept.checkpoint.root) {
            Some(true) => "is of the same log as the export's",
            Some(false) => {
                self.damage(
                    MANIFEST_FILE,
                    None,
                    "the export's checkpoint has another root than the kept one",
                );
                "does not match"
            }
            None => "cannot be compared: it covers another number of events, or another log",
        };
        self.report.checkpoint = Some(text.into());
    }
}

fn hash(hex: &str) -> Option<Hash> {
    let mut hash = Hash::default();
    hex::decode_to_slice(hex, &mut hash).ok()?;
    Some(hash)
}

/// Lines of a file, each bounded.
struct Lines {
    path: PathBuf,
    file: BufReader<File>,
    bytes: u64,
    line: Vec<u8>,
    number: u64,
    /// It ended within a line.
    torn: bool,
}

impl Lines {
    fn open(path: PathBuf) -> Result<Self, VerifyError> {
        let opened = File::open(&path).and_then(|file| Ok((file.metadata()?.len(), file)));
        let (bytes, file) = opened.map_err(|source| VerifyError::File { path: path.clone(), source })?;
        Ok(Self { path, file: BufReader::new(file), bytes, line: Vec::new(), number: 0, torn: false })
    }

    /// Reads the next line, without its end; false if there is none.
    fn read(&mut self) -> Result<bool, VerifyError> {
        self.line.clear();
        if self.torn {
            return Ok(false);
        }
        let read = (&mut self.file).take(LINE_BYTES_MAX).read_until(b'\n', &mut self.line);
        let read = read.map_err(|source: io::Error| VerifyError::File { path: self.path.clone(), source })?;
        if read == 0 {
            return Ok(false);
        }
        self.number += 1;
        self.torn = self.line.pop_if(|byte| *byte == b'\n').is_none();
        Ok(!self.torn)
    }
}
