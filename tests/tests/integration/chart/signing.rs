//! The key that signs the journal, changed through the chart by the lines of `docs/verify.md`: agents of the old key, of both, and of the
//! new one, each along with what the chart's test does anyway.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use weir_tests::{command, components};

use super::{
    super::{
        guides::with_kubectl,
        kafka::{epochs, weir},
        shown,
    },
    JOURNAL,
    release::Release,
};

/// Where the document has the keys without a chart.
const WITHOUT_CHART: &str = "/etc/weir/signing/";

pub(super) struct Keys<'a> {
    release: &'a Release<'a>,
    folder: PathBuf,
    /// How they are made anew, and what is named then.
    change: String,
    both: Vec<String>,
}

impl<'a> Keys<'a> {
    /// Makes the first one and its Secret, and has the values name it.
    pub(super) fn make(release: &'a Release<'a>) -> Self {
        let text = fs::read_to_string(components::repository().join("docs/verify.md")).unwrap();
        let section = text.split("\n## ").find(|section| section.starts_with("Keys\n")).unwrap();
        let blocks = section.split("\n\n").filter(|block| block.starts_with("    "));
        let blocks: Vec<_> =
            blocks.map(|block| block.replace("\n    ", "\n").trim_start().to_owned()).collect();
        let [make, secret, change] = blocks.try_into().unwrap_or_else(|blocks| panic!("{blocks:?}"));
        let values = section.split("```yaml\nsecrets:").nth(1).unwrap().split("```").next().unwrap();
        let values: Value = serde_yaml_ng::from_str(&format!("secrets:{values}")).unwrap();
        let file = values["config"]["journal"]["signingKeyFiles"][0].as_str().unwrap();
        let of_secret = Path::new(file).parent().unwrap();
        let named = section.split("`signingKeyFiles: [").nth(1).unwrap().split(']').next().unwrap();
        let both = named.split(", ").map(|path| {
            let name = path.strip_prefix(WITHOUT_CHART).unwrap();
            of_secret.join(name).display().to_string()
        });
        let keys = Self { release, folder: release.scratch.join("signing"), change, both: both.collect() };
        assert_eq!(keys.both[1..], [file]);
        fs::create_dir(&keys.folder).unwrap();
        keys.run(&make);
        keys.run(&secret);
        release.change_values(|all| {
            all["secrets"] = values["secrets"].clone();
            all["config"]["journal"] = values["config"]["journal"].clone();
        });
        keys
    }

    fn run(&self, script: &str) {
        command::run(with_kubectl(self.release.testbed, script).current_dir(&self.folder)).unwrap();
    }

    /// Makes another one beside it; gives the value by which agents sign with both.
    pub(super) fn both(&self) -> String {
        self.run(&self.change);
        format!("config.journal.signingKeyFiles={{{}}}", self.both.join(","))
    }

    /// The next change of the release takes the old one away.
    pub(super) fn new_alone(&self) {
        self.release.change_values(|all| all["config"]["journal"]["signingKeyFiles"] = json!([self.both[0]]));
    }

    /// Of the agents' epochs the first ones are verified by the old key alone, those of the upgrade by each, the last by the new one alone; the
    /// whole journal by both together.
    #[track_caller]
    pub(super) fn have_signed(&self) {
        let public = |name: &str| self.folder.join(format!("{name}.pub")).display().to_string();
        let (old, new) = (public("key-1"), public("key-2"));
        let verify = |from: &str, keys: &[&str]| {
            let options: Vec<_> = keys.iter().flat_map(|key| ["--key", key]).collect();
            shown(&weir(&[&["verify", "--from", from], &options[..]].concat()))
        };
        let mut signed: BTreeMap<(bool, bool), Vec<usize>> = BTreeMap::new();
        for (number, epoch) in epochs(Path::new(JOURNAL)).iter().enumerate() {
            let by = |key: &str| verify(epoch.to_str().unwrap(), &[key]).0 == Some(0);
            signed.entry((by(&old), by(&new))).or_default().push(number);
        }
        let of = |old, new| signed.get(&(old, new)).cloned().unwrap_or_default();
        assert!(of(false, false).is_empty(), "by neither: {signed:?}");
        assert_eq!(of(true, true), [1], "the upgrade: {signed:?}");
        assert!(of(true, false).starts_with(&[0, 2]), "before it, and after it was taken back: {signed:?}");
        let last = of(true, false).last().copied();
        assert!(!of(false, true).is_empty() && of(false, true).first().copied() > last, "{signed:?}");
        let (code, said, error) = verify(JOURNAL, &[&old, &new]);
        assert_eq!(code, Some(0), "{said}{error}");
    }
}
