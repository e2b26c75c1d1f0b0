//! A Kafka at the other end of a pipe: what is sent goes to standard output, what comes on standard input is acknowledged. For
//! tests that kill the process in between. Of events with content all is said, of wrapped keys too; of others what tells them apart.

use std::{
    io::{BufRead as _, Write as _},
    path::Path,
    sync::{Arc, Condvar, Mutex},
    time::Duration,
};

use base64::prelude::{BASE64_STANDARD, Engine as _};
use uuid::Uuid;
use weir_common::{
    encryption::of_message_key,
    event::{Event, Kind as EventKind},
    message::{Kind, Message, Received},
};

use super::{
    measures::Measures,
    publisher::{Publisher, Settings},
    sink::{Failure, MakeSink, Outcome, Sink, Taken, Ticket},
};
use crate::{recording::Recorder, storage::Storage};

/// Says something to whoever started this process; a line that does not end so was cut.
pub(crate) fn say(words: &str) {
    let line = format!("weir {words} .\n");
    // In one write, so that nothing of another thread comes between.
    let _ = std::io::stdout().lock().write_all(line.as_bytes());
}

#[derive(Default)]
struct Acknowledged {
    tickets: Mutex<Vec<Ticket>>,
    came: Condvar,
}

struct Pipe(Arc<Acknowledged>);

impl Sink for Pipe {
    fn send(
        &mut self,
        ticket: Ticket,
        _topic: &str,
        message: &Message<'_>,
        _unix_ms: i64,
    ) -> Result<Taken, Failure> {
        // Of a wrapped key, all of it.
        if let Some((epoch, number)) = message.key.and_then(|key| of_message_key(key.as_bytes())) {
            say(&format!("key {ticket} {epoch} {number} {}", BASE64_STANDARD.encode(message.value)));
            return Ok(Taken::Yes);
        }
        let headers = message.headers.iter().map(|(name, value)| (*name, Some(value.as_bytes())));
        let received = Received::parse(message.key.map(str::as_bytes), headers, Some(message.value)).unwrap();
        match received.kind {
            Kind::Event { sequence } => {
                let event: Event = serde_json::from_slice(message.value).unwrap();
                let words = match &event.kind {
                    EventKind::Gap { reason, .. } => reason.replace(' ', "_"),
                    EventKind::Content(_) => format!("={}", BASE64_STANDARD.encode(message.value)),
                    _ => "-".to_owned(),
                };
                say(&format!("sent {ticket} {} {sequence} {words}", received.epoch));
            }
            Kind::Checkpoint { .. } => say(&format!("sent {ticket} {} - -", received.epoch)),
        }
        Ok(Taken::Yes)
    }

    fn poll(&mut self, timeout: Duration, outcomes: &mut Vec<Outcome>) -> Result<(), Failure> {
        let tickets = self.0.tickets.lock().unwrap();
        let (mut tickets, _) =
            self.0.came.wait_timeout_while(tickets, timeout, |some| some.is_empty()).unwrap();
        outcomes.extend(tickets.drain(..).map(|ticket| Outcome { ticket, result: Ok(()) }));
        Ok(())
    }

    fn is_connected(&self) -> Option<bool> {
        None
    }
}

struct Pipes(Arc<Acknowledged>);

impl MakeSink for Pipes {
    fn make(&mut self) -> Result<Box<dyn Sink>, Failure> {
        Ok(Box::new(Pipe(Arc::clone(&self.0))))
    }
}

/// Publishes what `recorder` writes to `journal` on this storage, and what agents before it have left there; what was acknowledged goes
/// without a window. Ends when standard input does.
pub(crate) fn publish(storage: Arc<dyn Storage>, recorder: &Recorder, journal: &Path, own: Uuid) {
    let acknowledged = Arc::new(Acknowledged::default());
    let settings = Settings {
        storage,
        journal: journal.to_owned(),
        own,
        topic: "weir".into(),
        checkpoint_topic: "weir".into(),
        key_topic: Some("weir-keys".into()),
        replay_window: Duration::ZERO,
    };
    let durable = recorder.durable();
    let make = Box::new(Pipes(Arc::clone(&acknowledged)));
    let gap = Box::new(|reason: String, _| say(&format!("damage {}", reason.replace(' ', "_"))));
    let mut publisher = Publisher::new(settings, Arc::clone(&durable), make, gap, Arc::<Measures>::default());
    let ends = Arc::new(Mutex::new(false));
    let ended = Arc::clone(&ends);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            let Ok(ticket) = line.unwrap_or_default().parse() else { break };
            acknowledged.tickets.lock().unwrap().push(ticket);
            acknowledged.came.notify_all();
        }
        *ended.lock().unwrap() = true;
    });
    while !*ends.lock().unwrap() {
        let seen = durable.get();
        if !publisher.turn(super::now()) {
            durable.wait_beyond(seen, Duration::from_millis(20));
        }
    }
    publisher.finish(super::now());
}
