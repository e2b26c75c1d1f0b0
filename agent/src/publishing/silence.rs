//! The checkpoint that an agent signs while nothing is recorded: it is in the file `checkpoint`, and goes to the topic from there.

use std::time::{Duration, Instant};

use weir_common::{
    frame::{Frame, FrameType},
    merkle::Hash,
    message::Message,
};

use super::{
    publisher::Publisher,
    sink::{Failure, Sink, Taken},
    stream::Stream,
};

/// How often it is looked for a checkpoint that is not in the log, where everything in it was sent.
const IDLE_INTERVAL: Duration = Duration::from_secs(5);

/// Why no more is sent.
pub(super) enum Stopped {
    /// No room.
    Full,
    /// The sink must be made anew.
    Failed(Failure),
}

impl Publisher {
    /// Sends the checkpoint that says that nothing was recorded since the last frame, if there is a new one.
    pub(super) fn send_silence(
        &mut self,
        stream: &mut Stream,
        sink: &mut dyn Sink,
    ) -> Result<Option<usize>, Stopped> {
        let waits = |looked: Instant| self.turned.saturating_duration_since(looked) < IDLE_INTERVAL;
        if stream.looked.is_some_and(waits) {
            return Ok(None);
        }
        let Some((note, envelope)) = stream.idle_checkpoint() else {
            stream.looked = Some(self.turned);
            return Ok(None);
        };
        let (end, time) = (stream.feed.position(), envelope.time_unix_us);
        let (frame_type, leaf_hash) = (FrameType::Checkpoint, Hash::default());
        let value = note.as_bytes();
        let frame =
            Frame { frame_type, sequence: end.sequence, commit: end.commit, leaf_hash, envelope, value };
        let message = Message::of_frame(&frame, stream.verifier.as_deref());
        match sink.send(self.ticket, &self.settings.checkpoint_topic, &message, time / 1000) {
            Ok(Taken::Yes) => {}
            Ok(Taken::Full) => return Err(Stopped::Full),
            Err(failure) => return Err(Stopped::Failed(failure)),
        }
        let signed = self.steps.unlogged_by_now(time);
        stream.flight.sent_unlogged(self.ticket, end, message.bytes(), signed);
        self.ticket += 1;
        stream.checkpoint = Some((end.sequence, time));
        stream.looked = Some(self.turned);
        Ok(Some(message.bytes()))
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, sync::Arc, time::Duration};

    use weir_common::message::Kind;

    use crate::publishing::{
        clock::Clock,
        fixture::{Broker, Log, Run},
        publisher_tests::settle,
    };

    #[test]
    fn silence_is_published_while_the_clock_is_set_and_is_as_old_as_it_is() {
        const DAY_S: i64 = 86_400;
        let (mut log, broker, mut clock) = (Log::new(), Broker::new(), Clock::new());
        clock.set(3 * DAY_S);
        log.events(3);
        let mut run = Run::with(&log, Box::new(broker.clone()));
        let mut signed = Vec::new();
        settle(&mut run, &broker, &mut clock);
        let before = run.published().delivery_us;
        for by in [0, DAY_S, -2 * DAY_S, DAY_S] {
            clock.set(by);
            // What is in the file is of before, at first.
            settle(&mut run, &broker, &mut clock);
            for _ in 0..2 {
                signed.push(clock.pass(Duration::from_secs(10)).unix_us);
                log.idle_checkpoint(*signed.last().unwrap());
                settle(&mut run, &broker, &mut clock);
            }
        }
        // One that waits for its acknowledgement for minutes, while the clock is set.
        signed.push(clock.pass(Duration::from_secs(10)).unix_us);
        log.idle_checkpoint(*signed.last().unwrap());
        (0..2).for_each(|_| run.turn_at(clock.pass(Duration::from_secs(120))));
        clock.set(DAY_S);
        settle(&mut run, &broker, &mut clock);
        let kinds = broker.with(|state| state.acknowledged.clone()).into_iter().map(|(_, kind)| kind);
        let published: BTreeSet<_> = kinds
            .filter_map(|kind| match kind {
                Kind::Checkpoint { signed_unix_us, .. } => signed_unix_us.map(u64::cast_signed),
                _ => None,
            })
            .collect();
        assert_eq!(published, signed.into_iter().collect());
        let seconds = (run.published().delivery_us - before) / 1_000_000;
        assert!(seconds < 3600, "{seconds}");
    }

    #[test]
    fn silence_is_published_from_the_checkpoint_file_once_and_an_ended_epoch_tells_of_it_too() {
        let (mut log, broker, mut clock) = (Log::new(), Broker::new(), Clock::new());
        log.events(3);
        log.checkpoint();
        log.idle_checkpoint(1_000_003);
        let mut run = Run::with(&log, Box::new(broker.clone()));
        settle(&mut run, &broker, &mut clock);
        let checkpoints = || -> Vec<Kind> {
            let kinds = broker.with(|state| state.acknowledged.clone()).into_iter().map(|(_, kind)| kind);
            kinds.filter(|kind| matches!(kind, Kind::Checkpoint { .. })).collect()
        };
        let signed = |time| Kind::Checkpoint { size: 3, signed_unix_us: Some(time) };
        assert_eq!(checkpoints(), [signed(1_000_003)], "the file says what the log says");
        for time in [60_000_000, 120_000_000] {
            log.idle_checkpoint(time);
            settle(&mut run, &broker, &mut clock);
        }
        assert_eq!(checkpoints(), [1_000_003, 60_000_000, 120_000_000].map(signed));
        // When it ends, the log has the last of them too: it is not sent again.
        let sent = run.published().messages;
        log.logged_checkpoint(120_000_000);
        run.durable.publish(log.durable());
        settle(&mut run, &broker, &mut clock);
        assert_eq!(run.published().messages, sent);
        assert!(run.publisher.is_done());
        // What covers more than was sent waits until that was.
        log.events(2);
        log.idle_checkpoint(180_000_000);
        settle(&mut run, &broker, &mut clock);
        assert_eq!(checkpoints().len(), 3);
        // The agent ended: who takes its epoch over publishes the last word that it left.
        drop(run);
        let other = Log::in_journal(Arc::clone(log.journal()), 2);
        let mut run = Run::with(&other, Box::new(broker.clone()));
        settle(&mut run, &broker, &mut clock);
        let last = Kind::Checkpoint { size: 5, signed_unix_us: Some(180_000_000) };
        assert_eq!(checkpoints().last(), Some(&last));
        assert!(run.publisher.is_done());
    }
}
