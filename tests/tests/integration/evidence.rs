//! What proves that a record is whole: keys that an operator makes, what is signed while nothing happens, and the verifiers of
//! others. Used by the tests that publish.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    process::Command,
};

use weir_common::event::{Channel, Event, Kind};
use weir_tests::{Kafka, command, components, kafka::Message, progress::Progress};

use super::{
    kafka::{CHECKPOINTS, EVENTS, Recorded, epochs, sound, weir},
    shown,
};

/// Topic of wrapped keys.
pub(super) const KEYS: &str = "weir-keys";

/// What only recipients may see, with a `-` between, in halves: no command line has it.
pub(super) const CANARY: (&str, &str) = ("canary", "4711");

/// Keys as an operator makes them: paths of the halves.
pub(super) struct KeyPair {
    pub(super) private: String,
    pub(super) public: String,
}

impl KeyPair {
    pub(super) fn make(folder: &Path, name: &str, algorithm: &str) -> Self {
        let [private, public] = ["pem", "pub"].map(|end| folder.join(format!("{name}.{end}")));
        let [private, public] = [private, public].map(|path| path.display().to_string());
        let openssl = |arguments: &[&str]| {
            let output = command::output(Command::new("openssl").args(arguments)).unwrap();
            assert!(output.status.success(), "{:?}", shown(&output));
        };
        openssl(&["genpkey", "-algorithm", algorithm, "-out", &private]);
        openssl(&["pkey", "-in", &private, "-pubout", "-out", &public]);
        Self { private, public }
    }
}

/// How many checkpoints are published that are not in the journal: those of silences, but for the last of each. Nothing else may
/// be there.
#[track_caller]
pub(super) fn silences(recorded: &[Recorded], published: &BTreeMap<String, Vec<Message>>) -> usize {
    let ids: BTreeSet<_> = recorded.iter().map(|frame| &frame.id).collect();
    let others = published.keys().filter(|id| !ids.contains(id));
    others.inspect(|id| assert!(id.contains("/checkpoint/"), "{id} is not in the journal")).count()
}

/// Whether a checkpoint is published that covers as many events as one in the journal, and is not in it: a later one.
pub(super) fn proves_silence(recorded: &[Recorded], published: &BTreeMap<String, Vec<Message>>) -> bool {
    let ids: BTreeSet<_> = recorded.iter().map(|frame| frame.id.as_str()).collect();
    let covers = |id: &str| id.rsplit_once('/').map(|(covers, _)| covers.to_owned());
    let logged: BTreeSet<_> = ids.iter().filter_map(|id| covers(id)).collect();
    let mut checkpoints = published.keys().filter(|id| id.contains("/checkpoint/"));
    checkpoints.any(|id| !ids.contains(id.as_str()) && covers(id).is_some_and(|id| logged.contains(&id)))
}

/// Checks that each session is in one partition and, as long as nothing came twice, in the order of its events.
#[track_caller]
pub(super) fn check_order(messages: &[Message]) -> usize {
    let mut partitions = BTreeMap::<&str, BTreeSet<u32>>::new();
    let mut sequences = BTreeMap::<(&str, String), Vec<u64>>::new();
    for message in messages {
        let Some(key) = message.key.as_deref() else { continue };
        partitions.entry(key).or_default().insert(message.partition);
        let event: Event = serde_json::from_str(&message.value).unwrap();
        assert_eq!(event.session, key);
        sequences.entry((key, event.epoch)).or_default().push(event.sequence);
    }
    assert!(partitions.values().all(|partitions| partitions.len() == 1), "{partitions:?}");
    for ((key, epoch), sequences) in &sequences {
        assert!(sequences.is_sorted_by(|one, next| one < next), "{key} in {epoch}: {sequences:?}");
    }
    partitions.len()
}

/// Each of the keys verifies, from wherever it is read, and nobody else's does.
#[track_caller]
pub(super) fn signed_by(keys: &[KeyPair], sources: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let stranger = KeyPair::make(folder.path(), "stranger", "ed25519").public;
    for source in sources {
        for key in keys {
            sound(source, &["--key", &key.public]);
        }
        let (code, out, err) = shown(&weir(&["verify", "--from", source, "--key", &stranger]));
        assert_eq!(code, Some(1), "{out}{err}");
    }
}

/// Go's `sumdb/note` takes the notes, the parser of C2SP checkpoints reads them, and the verifier that other logs use takes the
/// proofs of an export, from wherever it was exported.
#[track_caller]
pub(super) fn verified_by_others(epoch: &Path, sources: &[&str], session: &str) {
    let verifier = components::note_verifier(Progress::Shown).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let verify = |arguments: &[&Path]| {
        let output = command::output(Command::new(&verifier).args(arguments)).unwrap();
        let (code, out, err) = shown(&output);
        assert_eq!(code, Some(0), "{err}");
        out
    };
    let [key, checkpoint] = ["node.pub", "checkpoint"].map(|name| epoch.join(name));
    let last = verify(&[&key, &checkpoint]);
    for (number, source) in sources.iter().enumerate() {
        let out = folder.path().join(number.to_string());
        let path = out.to_str().unwrap();
        let (code, _, err) = shown(&weir(&["export", "--from", source, "--session", session, "--out", path]));
        assert_eq!(code, Some(0), "{err}");
        let report = sound(path, &["--key", key.to_str().unwrap()]);
        assert!(report["epochs"][0]["events"].as_u64().unwrap() > 5, "{report:#}");
        let checkpoint = out.join(format!("{}.checkpoint", epoch.file_name().unwrap().to_str().unwrap()));
        let proven = verify(&[&key, &checkpoint, &out.join("events.jsonl"), &out.join("proofs.jsonl")]);
        assert_eq!(proven, last, "the newest checkpoint: {source}");
    }
}

/// The canary is in no file of the journal and in no message, but those see it, from either, whom it is for; Go's HPKE reads it,
/// too. With the wrapped keys it is gone, and the log is whole as before.
#[track_caller]
pub(super) fn only_recipients_read(kafka: &Kafka, recipient: &KeyPair, journal: &Path) {
    let canary = format!("{}-{}", CANARY.0, CANARY.1);
    let holds = |bytes: &[u8]| bytes.windows(canary.len()).any(|part| part == canary.as_bytes());
    let epoch = &epochs(journal)[0];
    let files = || std::fs::read_dir(epoch).unwrap().map(|entry| entry.unwrap().path());
    for path in files() {
        assert!(!holds(&std::fs::read(&path).unwrap()), "{}", path.display());
    }
    for topic in [EVENTS, CHECKPOINTS, KEYS] {
        let messages = kafka.messages(topic).unwrap();
        assert!(
            !messages.is_empty() && messages.iter().all(|message| !holds(message.value.as_bytes())),
            "{topic}"
        );
    }
    let topics = format!("kafka://{}/{EVENTS},{CHECKPOINTS},{KEYS}", kafka.bootstrap());
    let sources = [journal.to_str().unwrap(), &topics];
    // The channels on which the canary is seen; bodies may be protobuf.
    let seen = |source: &str| {
        let (code, out, err) = shown(&weir(&["events", "--from", source, "--identity", &recipient.private]));
        assert_eq!(code, Some(0), "{err}");
        let events = out.lines().map(|line| serde_json::from_str::<Event>(line).unwrap());
        let told = events.filter_map(|event| match event.kind {
            Kind::Content(content) => holds(&content.bytes.to_vec().ok()?).then_some(content.channel),
            _ => None,
        });
        told.collect::<BTreeSet<_>>()
    };
    for source in sources {
        let expected = [Channel::RequestBody, Channel::ResponseBody, Channel::Stdout];
        assert_eq!(seen(source), BTreeSet::from(expected), "{source}");
        assert_eq!(sound(source, &[])["epochs"].as_array().unwrap().len(), 1);
    }
    let events = tempfile::NamedTempFile::new().unwrap();
    let (_, out, _) = shown(&weir(&["events", "--from", sources[0]]));
    std::fs::write(&events, out).unwrap();
    let verifier = components::note_verifier(Progress::Shown).unwrap();
    let opened =
        command::output(Command::new(verifier).arg(&recipient.private).arg(epoch).arg(events.path()));
    let (code, out, err) = shown(&opened.unwrap());
    assert!(code == Some(0) && out.contains(&canary), "{out}{err}");

    for path in files().filter(|path| path.extension().is_some_and(|end| end == "key")) {
        let number: u64 = path.file_stem().unwrap().to_str().unwrap().parse().unwrap();
        let epoch = epoch.file_name().unwrap().to_str().unwrap();
        kafka.erase(KEYS, &format!("{epoch}/key/{number}")).unwrap();
        std::fs::remove_file(path).unwrap();
    }
    for source in sources {
        assert!(seen(source).is_empty(), "{source}");
        sound(source, &[]);
    }
}
