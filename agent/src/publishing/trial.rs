//! A publisher with all that it needs, for tests.

use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use uuid::Uuid;

use super::{
    clock::Clock,
    fixture::{Broker, Log},
    measures::{Measures, Published},
    publisher::{Publisher, Settings},
    sink::MakeSink,
    stream::Now,
};
use crate::{
    recording::DurablePosition,
    storage::{FileSystem, Storage},
};

/// Why something is missing, and how many events.
type Gap = (String, Option<u64>);

/// A publisher with all that it needs.
pub(crate) struct Run {
    pub(super) publisher: Publisher,
    pub(super) durable: Arc<DurablePosition>,
    pub(super) gaps: Arc<Mutex<Vec<Gap>>>,
    pub(super) measures: Arc<Measures>,
}

/// How long tests keep what was acknowledged.
pub(crate) const WINDOW: Duration = Duration::from_secs(100);

impl Run {
    /// Publishes the journal of `log`, which is written.
    pub(super) fn with(log: &Log, make: Box<dyn MakeSink>) -> Self {
        let durable = Arc::new(DurablePosition::default());
        durable.publish(log.durable());
        Self::new(Arc::new(FileSystem), log.journal().path(), log.epoch, durable, make)
    }

    /// Publishes the journal in this folder, of which the epoch `own` is written, to `broker`.
    pub(crate) fn of(
        storage: Arc<dyn Storage>,
        journal: &Path,
        own: Uuid,
        durable: Arc<DurablePosition>,
        broker: &Broker,
    ) -> Self {
        Self::new(storage, journal, own, durable, Box::new(broker.clone()))
    }

    fn new(
        storage: Arc<dyn Storage>,
        journal: &Path,
        own: Uuid,
        durable: Arc<DurablePosition>,
        make: Box<dyn MakeSink>,
    ) -> Self {
        let settings = Settings {
            storage,
            journal: journal.to_owned(),
            own,
            topic: "weir".into(),
            checkpoint_topic: "weir".into(),
            key_topic: Some("weir-keys".into()),
            replay_window: WINDOW,
        };
        let gaps = Arc::<Mutex<Vec<_>>>::default();
        let kept = Arc::clone(&gaps);
        let gap = Box::new(move |reason, events| kept.lock().unwrap().push((reason, events)));
        let measures = Arc::new(Measures::default());
        let publisher = Publisher::new(settings, Arc::clone(&durable), make, gap, Arc::clone(&measures));
        Self { publisher, durable, gaps, measures }
    }

    pub(super) fn turn_at(&mut self, now: Now) {
        self.publisher.turn(now);
    }

    /// A turn when this time has passed.
    pub(crate) fn turn_after(&mut self, clock: &mut Clock, time: Duration) {
        self.publisher.turn(clock.pass(time));
    }

    /// What it found missing, and how many events.
    pub(crate) fn gaps(&self) -> Vec<(String, Option<u64>)> {
        self.gaps.lock().unwrap().clone()
    }

    pub(super) fn published(&self) -> Published {
        self.measures.read(5_000_000)
    }
}
