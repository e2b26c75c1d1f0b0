//! What proves that a record is whole: keys that an operator makes, what is signed while nothing happens, and the verifiers of
//! others. Used by the tests that publish.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    process::Command,
};

use weir_tests::{Kafka, command, components, kafka::Message, progress::Progress, wait_until};

use super::{
    kafka::{PUBLISHED_DEADLINE, Recorded, published, recorded, sound, weir},
    shown,
};

/// A key as an operator makes it: paths of its halves.
pub(super) struct SigningKey {
    pub(super) private: String,
    pub(super) public: String,
}

impl SigningKey {
    pub(super) fn make(folder: &Path, name: &str) -> Self {
        let [private, public] = ["pem", "pub"].map(|end| folder.join(format!("{name}.{end}")));
        let [private, public] = [private, public].map(|path| path.display().to_string());
        let openssl = |arguments: &[&str]| {
            let output = command::output(Command::new("openssl").args(arguments)).unwrap();
            assert!(output.status.success(), "{:?}", shown(&output));
        };
        openssl(&["genpkey", "-algorithm", "ed25519", "-out", &private]);
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

/// With `WEIR_TEST_LONG` waits until the agent has signed for a silence, which takes a minute.
#[track_caller]
pub(super) fn wait_for_silence(kafka: &Kafka, journal: &Path) {
    if std::env::var_os("WEIR_TEST_LONG").is_some() {
        let signed = || Ok((silences(&recorded(journal), &published(kafka)) > 0).then_some(()));
        wait_until("silence to be signed for", PUBLISHED_DEADLINE, signed).unwrap();
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
