//! A byte of the journal turns on the disk while no agent runs: what the next one says of it, publishes, and keeps. Scenes of
//! `kafka_faults`.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use weir_common::{
    event::{Event, Kind},
    frame::FrameType,
};
use weir_tests::{AgentProcess, Kafka, kafka::Message, wait_until};

use super::{
    Scene,
    kafka::{
        EVENTS, PUBLISHED_DEADLINE, Recorded, check, configuration, epochs, published, publishing, recorded,
        segments, sound, source, weir,
    },
    kafka_faults::acknowledged,
    monitoring::Monitored,
    shown,
};

/// A byte that turns on the disk while no agent runs.
pub(super) struct Turned {
    segment: PathBuf,
    at: usize,
    /// The event that it is in, and the words that tell of it.
    id: String,
    reason: String,
}

impl Turned {
    const BITS: u8 = 0x10;

    /// Turns one amid an epoch that has a single segment; `recorded` is the whole journal.
    pub(super) fn turn(epoch: &Path, recorded: &[Recorded]) -> Self {
        let [segment] = &segments(epoch)[..] else { panic!("{epoch:?} has several segments") };
        let events = of_epoch(epoch, recorded).filter(|frame| frame.kind == FrameType::Event);
        let events: Vec<_> = events.collect();
        let hit = events[events.len() / 2];
        let bytes = std::fs::read(segment).unwrap();
        let value = bytes.windows(hit.value.len()).position(|part| part == hit.value.as_bytes()).unwrap();
        let frame = bytes[..value].windows(4).rposition(|part| part == b"WFr1").unwrap();
        let reason = format!("journal damaged: epoch {}, segment 0, offset {frame}: ", hit.epoch);
        let turned =
            Self { segment: segment.clone(), at: value + hit.value.len() / 2, id: hit.id.clone(), reason };
        turned.turn_again();
        turned
    }

    /// Turns it, back if it was turned.
    fn turn_again(&self) {
        let mut bytes = std::fs::read(&self.segment).unwrap();
        bytes[self.at] ^= Self::BITS;
        std::fs::write(&self.segment, bytes).unwrap();
    }

    /// The gap on the topic that tells of it; none yet, or one, however often its message came.
    #[track_caller]
    fn told(&self, kafka: &Kafka) -> Option<Event> {
        let messages = kafka.messages(EVENTS).unwrap();
        let told = messages.iter().filter(|message| message.value.contains("journal damaged: "));
        let told: BTreeSet<_> = told.map(|message| &message.value).collect();
        assert!(told.len() <= 1, "it is told once: {told:?}");
        let told: Event = serde_json::from_str(told.first()?).unwrap();
        let Kind::Gap { events, reason, .. } = &told.kind else { panic!("{told:?}") };
        assert_eq!((*events, reason.starts_with(&self.reason)), (Some(1), true), "{told:?}");
        Some(told)
    }

    /// The agent that found it has said so once, and the segment is there.
    #[track_caller]
    fn check_said(&self, agent: &AgentProcess) {
        let said = agent.log().unwrap().matches("journal-damaged").count();
        assert_eq!((said, self.segment.exists()), (1, true), "{}", agent.last_lines());
    }
}

/// An epoch's part of what a journal has.
pub(super) fn of_epoch<'r>(
    epoch: &Path,
    recorded: &'r [Recorded],
) -> impl Iterator<Item = &'r Recorded> + Clone {
    recorded.iter().filter(move |frame| epoch.ends_with(&frame.epoch))
}

/// A byte of the first epoch turns while no agent runs. The next one publishes what is left of it once more, says what is missing, and
/// keeps the segment; what is whole leaves when its time is over.
#[track_caller]
pub(super) fn a_damage_is_told_once(
    scene: &Scene,
    kafka: &Kafka,
    recorded: &[Recorded],
    before: &BTreeMap<String, Vec<Message>>,
) {
    let journal = scene.journal();
    let [damaged, whole] = &epochs(&journal)[..] else { panic!("two agents ran") };
    let turned = Turned::turn(damaged, recorded);
    std::fs::remove_file(damaged.join("cursor")).unwrap();

    let mut publishing = publishing(&kafka.bootstrap());
    publishing["replayWindowSeconds"] = json!(1);
    let (mut agent, monitored) = Monitored::start_with(scene, configuration(scene, publishing));
    let told = wait_until("the gap to be on the topic", PUBLISHED_DEADLINE, || Ok(turned.told(kafka)));
    wait_until("what is whole to leave, and what is not to be kept", PUBLISHED_DEADLINE, || {
        let is_kept = agent.log()?.contains("segment-unreadable");
        Ok((is_kept && segments(whole).is_empty()).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error}; {}", agent.last_lines()));
    let metrics = monitored.metrics();
    assert_eq!((metrics["weir_journal_damages_total"], metrics["weir_kafka_backlog_bytes"]), (1.0, 0.0));
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    turned.check_said(&agent);
    assert_eq!(agent.log().unwrap().matches("segment-unreadable").count(), 1, "{}", agent.last_lines());

    // All but that event came again, and the next agent need not read it again to know.
    let (after, mut events) = (published(kafka), 0);
    for frame in of_epoch(damaged, recorded) {
        let again = after[&frame.id].len() - before[&frame.id].len();
        assert_eq!(again, usize::from(frame.id != turned.id), "{} came {again} times more", frame.id);
        events += u64::from(frame.kind == FrameType::Event);
    }
    assert_eq!(acknowledged(damaged).1, events, "behind the damage all is acknowledged");
    let (code, out, err) = shown(&weir(&["verify", "--from", journal.to_str().unwrap()]));
    assert_eq!(code, Some(1), "{out}{err}");
    let epoch = damaged.file_name().unwrap().to_str().unwrap();
    let named = out.lines().find(|line| line.contains("00000000000000000000.seg"));
    assert!(named.is_some_and(|line| line.contains(epoch)), "{out}{err}");
    // Of the topic, which had it before, nothing is missing, and that the node lacks it is said there once, and signed.
    let report = sound(&source(&kafka.bootstrap()), &[]);
    assert_eq!(report["gaps"].to_string().matches(&turned.reason).count(), 1, "{report:#}");
    is_signed(&report, &told.unwrap());
}

/// A signed checkpoint on the topic covers the event.
#[track_caller]
fn is_signed(report: &Value, event: &Event) {
    let epochs = report["epochs"].as_array().unwrap();
    let covered = epochs.iter().find(|epoch| epoch["epoch"] == event.epoch.as_str());
    let covered = covered.and_then(|epoch| epoch["covered"].as_u64());
    assert!(covered.is_some_and(|covered| event.sequence < covered), "{report:#}");
}

/// What nobody had published when the byte turned, and the agent read again with each client that it made: told once, and the rest is
/// there.
#[track_caller]
pub(super) fn all_but_one_is_published(scene: &Scene, kafka: &Kafka, agent: &AgentProcess, turned: &Turned) {
    turned.check_said(agent);
    let told = turned.told(kafka).unwrap();
    // As it was, to say what should be there.
    turned.turn_again();
    let (hit, rest) =
        recorded(&scene.journal()).into_iter().partition::<Vec<_>, _>(|frame| frame.id == turned.id);
    let published = published(kafka);
    check(&rest, &published);
    assert!(hit.len() == 1 && !published.contains_key(&turned.id), "{}", turned.id);
    let (code, out, err) = shown(&weir(&["verify", "--json", "--from", &source(&kafka.bootstrap())]));
    assert_eq!(code, Some(1), "{out}{err}");
    let report: Value = serde_json::from_str(&out).unwrap();
    let (number, found) = (hit[0].sequence, &report["damage"]["listed"]);
    assert_eq!(found[0]["what"], format!("event {number} is missing"), "{report:#}");
    assert_eq!((found[0]["sequence"].as_u64(), found[1].is_null()), (Some(number), true), "{report:#}");
    is_signed(&report, &told);
}
