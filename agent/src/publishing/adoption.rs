//! Whose journals are published: this agent's, and those of agents that have ended.

use std::sync::Arc;

use weir_common::removed::REMOVED_FILE;

use super::{
    feed,
    publisher::{Publisher, Settings},
    retention,
    stream::Stream,
};
use crate::recording::has_ended;

impl Publisher {
    /// Takes epochs that nobody publishes: the agent's own, and those whose agents have ended.
    pub(super) fn adopt(&mut self) {
        let Settings { storage, journal, own, .. } = &self.settings;
        // An operator may have taken epochs away, for want of space.
        self.streams.retain(|stream| stream.epoch == *own || storage.exists(&stream.folder));
        let epochs = match retention::epochs(storage.as_ref(), journal) {
            Ok(epochs) => epochs,
            Err(error) => {
                tracing::warn!(event = "epochs-not-found", journal = %journal.display(), %error, "cannot look for epochs to publish");
                return;
            }
        };
        let mut unreadable = 0;
        for (epoch, folder) in epochs {
            if self.streams.iter().any(|stream| stream.epoch == epoch) {
                continue;
            }
            // An epoch without a segment may be one that is just begun, and not locked yet.
            let holds_something = feed::segments(storage.as_ref(), &folder)
                .is_ok_and(|segments| !segments.is_empty())
                || storage.exists(&folder.join(REMOVED_FILE));
            if epoch != *own && !(holds_something && has_ended(storage.as_ref(), &folder)) {
                continue;
            }
            match Stream::open(Arc::clone(storage), epoch, folder) {
                Ok(Some(stream)) => {
                    if epoch != *own {
                        tracing::info!(event = "epoch-adopted", %epoch, "publishes the journal of an agent that has ended");
                    }
                    self.streams.push(stream);
                }
                Ok(None) => {}
                Err(error) => {
                    unreadable += 1;
                    tracing::warn!(event = "epoch-not-adopted", %epoch, %error, "cannot publish this epoch yet");
                }
            }
        }
        self.measures.unreadable(unreadable);
        // Those that ended come first, whatever their age: the own one never ends.
        self.streams.sort_by_key(|stream| (stream.epoch == self.settings.own, stream.epoch));
    }
}

#[cfg(test)]
mod tests {
    use crate::publishing::{
        clock::Clock,
        fixture::{Broker, Log, Run},
        publisher_tests::{events, settle},
    };

    #[test]
    fn an_epoch_whose_account_of_removed_segments_cannot_be_read_is_counted_and_published() {
        let (mut log, broker, mut clock) = (Log::new(), Broker::new(), Clock::new());
        log.events(3);
        std::fs::write(log.folder().join("removed"), "nonsense").unwrap();
        let mut run = Run::with(&log, Box::new(broker.clone()));
        settle(&mut run, &broker, &mut clock);
        assert_eq!(run.published().unaccounted, 1);
        assert_eq!(broker.with(|state| state.acknowledged.clone()), events(log.epoch, 0..3));
    }
}
