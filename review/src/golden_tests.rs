//! A journal of format 1 as earlier versions wrote it. Nothing writes it anew: whatever becomes of the format, later versions must read it
//! as this one does. What this version writes is golden apart from it (`golden/journal`).

use std::{
    collections::BTreeMap,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use weir_common::merkle::leaf_hash;

use crate::{
    events::{Lines, list},
    replay::{self, Subject},
    sessions::{Filter, Sessions},
    source::{Journal, decryption::Reader},
    terminal::Style,
    verify::{Options, verify},
};

/// Its files, and SHA-256 of a zero byte and what they hold.
///
/// The first epoch was written with the encoder of commit f276177 (2026-11-28), before checkpoints had `time` and `peaks` and before the first event
/// came with one; it was still being written. The second, which follows it, was written by a recorder of 2026-11-29: a mutation, and an
/// exec by which a file is copied, with content for Bob's key of RFC 7748.
const FILES: [(&str, &str); 8] = [
    (
        "00000000-0000-0000-0000-000000000001/00000000000000000000.seg",
        "8951d8ea052388f3ac00a396afcbceb913770f4c41f994820730f6acf1a94d8d",
    ),
    (
        "00000000-0000-0000-0000-000000000001/00000000000000000001.seg",
        "d7e1056e662f0a222359ec6c7e6793bac82987fa568427c024a69a6b2f2c5d32",
    ),
    (
        "00000000-0000-0000-0000-000000000001/checkpoint",
        "24dbf47f3950d68293faa60cdb0cea1b1fb26117738f28d18d8601b22f97f66d",
    ),
    (
        "00000000-0000-0000-0000-000000000001/node.pub",
        "3ab7a9331ca8087dc12db15268eef543322aaf5dcdd3b915bc51b326e59826c6",
    ),
    (
        "01a22885-ee23-73e3-9812-22043f0f4814/00000000000000000000.seg",
        "cccd82bac430709b35070fac45020eb107988d7b5b6562ce7c69b89b54e699d9",
    ),
    (
        "01a22885-ee23-73e3-9812-22043f0f4814/00000000000000000001.key",
        "7c5ad6cb1ea87b15d61c17154325c65f1d391b0b980d9b412f6117a9b8455a38",
    ),
    (
        "01a22885-ee23-73e3-9812-22043f0f4814/checkpoint",
        "2a6e7ca381f7e2bc88d37561dc1eb6fdfc6a58aa70f2e921564a08180881c65c",
    ),
    (
        "01a22885-ee23-73e3-9812-22043f0f4814/node.pub",
        "b8567865611e7b19c5abdbb24198a8e6e8f930815f66e2ee0c2ce0f10b8a0fb1",
    ),
];

const IDENTITY: &str = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VuBCIEIF2rCH5iSopLeeF/i4OADuZvO7EpJhi2/Rwviyf/iODr\n-----END PRIVATE KEY-----\n";

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/journal-v1")
}

#[test]
fn a_journal_of_format_1_is_what_it_was_and_verifies() {
    let mut files = BTreeMap::new();
    for epoch in fs::read_dir(golden()).unwrap() {
        for file in fs::read_dir(epoch.unwrap().path()).unwrap() {
            let path = file.unwrap().path();
            let name = path.strip_prefix(golden()).unwrap().display().to_string();
            files.insert(name, hex::encode(leaf_hash(&fs::read(path).unwrap())));
        }
    }
    let files: Vec<_> = files.iter().map(|(name, hash)| (name.as_str(), hash.as_str())).collect();
    assert_eq!(files, FILES, "it is kept as it was written");
    let report = verify(&Journal::open(&golden()).unwrap(), &Options::default()).unwrap();
    assert!(report.is_sound(), "{report:#?}");
    let epochs: Vec<_> = report
        .epochs
        .iter()
        .map(|epoch| {
            (epoch.node.as_str(), epoch.events, epoch.covered, epoch.stopped, epoch.root.as_deref().unwrap())
        })
        .collect();
    assert_eq!(
        epochs,
        [
            ("node-1", 21, 21, false, "91e9d593ecaad28cfab1353071c5e9bf12170db3602eac73790a13116d298f18"),
            ("node-1", 37, 37, true, "527613d98f0d37858e838b5ae37af32509b9b9863565f512b7f01bbc7b2799b7"),
        ]
    );
    assert_eq!(report.gaps.number(), 1, "{report:#?}");
}

#[test]
fn a_journal_of_format_1_is_listed_replayed_and_decrypted() {
    let directory = tempfile::tempdir().unwrap();
    let identity = directory.path().join("identity.pem");
    fs::write(&identity, IDENTITY).unwrap();
    fs::set_permissions(&identity, Permissions::from_mode(0o400)).unwrap();
    let journal = Journal::open(&golden()).unwrap().read_by(Reader::new(&[identity], None).unwrap());
    let mut lines = Vec::new();
    list(&journal, Lines::new(&mut lines, false, None)).unwrap();
    let lines = String::from_utf8(lines).unwrap();
    assert_eq!(lines.lines().count(), 58);
    assert!(!lines.contains("\"encrypted\""), "{lines}");
    let mut sessions = Sessions::default();
    for record in journal.records() {
        sessions.add(&journal.event(&record.unwrap()).unwrap());
    }
    let (sessions, _) = sessions.finish(&Filter::default());
    let mut replayed = Vec::new();
    for session in &sessions {
        let subject = Subject::Session(session.session.clone());
        replay::play(&journal, &subject, None, None, &mut replayed, Style::PLAIN).unwrap();
    }
    let replayed = String::from_utf8(replayed).unwrap();
    // Of each epoch: what was asked, what was said, and how it ended.
    for words in [
        "watch: ADDED Pod web/a",
        "server → client, 21 bytes (raw",
        "no end on record",
        "\"name\": \"a\"",
        "done",
    ] {
        assert!(replayed.contains(words), "{words}: {replayed}");
    }
    assert_eq!(journal.warnings().0, Vec::<String>::new());
}
