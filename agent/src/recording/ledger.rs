//! A journal whose account is kept by who writes it: what was tried, and what it said is durable. For tests.
//!
//! One thread, as the writer's, and no clock: the same steps make the same calls to the storage.

use std::{path::Path, sync::Arc, time::Duration};

use uuid::Uuid;
use weir_common::event::Kind;

use super::{
    DurablePosition, RecordingError,
    entry::{Append, Entry, Ids, Origin},
    epoch::{self, Epoch},
    journal::{Journal, Tuning},
};
use crate::storage::Storage;

/// Segments are as small as they may be, so that there are many.
pub(super) const TUNING: Tuning = Tuning {
    retry_interval: Duration::ZERO,
    segment_bytes_first: 132 * 1024,
    segment_bytes_max: 132 * 1024,
    checkpoint_events: 6,
    idle_interval: Duration::from_secs(3600),
};

/// What is tried and what holds, over all lives of the agent.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    /// Numbers of all events that were ever handed to a journal, by epoch: each has one, and they grow.
    pub(crate) tried: Vec<(Uuid, u64)>,
    /// Of those, what the journal said is durable.
    pub(crate) held: Vec<(Uuid, u64)>,
}

/// An agent's journal from its start on.
#[derive(Debug)]
pub(crate) struct Life {
    journal: Journal,
    origin: Arc<Origin>,
    pub(crate) epoch: Uuid,
}

impl Life {
    pub(crate) fn start(
        storage: &Arc<dyn Storage>,
        folder: &Path,
        bytes_max: u64,
    ) -> Result<Self, RecordingError> {
        let epoch = Epoch::create(storage.as_ref(), folder, "node-1", &[])?;
        epoch::mask_key(storage.as_ref(), folder)?;
        let id = epoch.id;
        let origin = Arc::new(Origin {
            node: "node-1".to_owned(),
            epoch: id.to_string(),
            tenant: None,
            clusters: Vec::new(),
            encryption: None,
        });
        let predecessor = epoch.predecessor.clone();
        let mut journal = Journal::create(
            Arc::clone(storage),
            folder.to_owned(),
            bytes_max,
            TUNING,
            epoch,
            Arc::clone(&origin),
            Arc::default(),
        )?;
        let started = Kind::AgentStarted { version: "1".to_owned(), predecessor };
        journal.commit(&[Append::behind(vec![origin.entry(None, Ids::default(), started)?])])?;
        Ok(Self { journal, origin, epoch: id })
    }

    /// How far it is durable.
    pub(crate) fn durable(&self) -> Arc<DurablePosition> {
        Arc::clone(self.journal.durable())
    }

    /// Whether it says that it can record.
    pub(crate) fn is_failing(&self) -> bool {
        self.journal.failure().is_some()
    }

    fn entry(&self, number: u64, bytes: usize) -> Entry {
        let (name, message) = (number.to_string(), "x".repeat(bytes));
        // Of one session in three, so that messages have keys.
        let session = ["a", "b", "c"][(number % 3) as usize];
        let ids = Ids { session, ..Ids::default() };
        self.origin.entry(None, ids, Kind::Finding { name, message, caller: None }).expect("it is short")
    }

    /// Writes a group of events of these lengths, all or none of which hold.
    pub(crate) fn append(&mut self, ledger: &mut Ledger, lengths: &[usize]) -> Result<(), RecordingError> {
        let first = ledger.tried.len() as u64;
        let entries: Vec<_> = (first..).zip(lengths).map(|(n, bytes)| self.entry(n, *bytes)).collect();
        let numbers: Vec<_> = (first..).take(lengths.len()).map(|number| (self.epoch, number)).collect();
        ledger.tried.extend(&numbers);
        self.journal.commit(&[Append::behind(entries)])?;
        ledger.held.extend(&numbers);
        Ok(())
    }

    /// Ends in an orderly way.
    pub(crate) fn finish(self) -> Result<(), RecordingError> {
        self.journal.finish("test")
    }
}
