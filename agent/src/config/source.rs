//! A configuration file that is read again while the agent runs: what of it can change then, and what cannot.
//!
//! A change is taken whole or not at all: an invalid file, or one that changes what only a restart can change, leaves the
//! running configuration in force, and says so.

use std::path::{Path, PathBuf};

use serde_yaml_ng::{Mapping, Value};

use weir_common::kms::endpoint::check_environment;

use super::{Config, ConfigError};

/// The key of a cluster's issuers.
const ISSUERS: &str = "authentication";
/// Keys of the file that change while the agent runs.
const LIVE: [&str; 2] = ["enrolment", "recording"];
/// The same, of one cluster.
const LIVE_OF_CLUSTER: [&str; 2] = [ISSUERS, "roles"];

/// Why a changed file was not taken.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// It is invalid.
    #[error(transparent)]
    Invalid(#[from] ConfigError),
    /// It changes something that is fixed while the agent runs.
    #[error(
        "configuration {}: {keys} cannot change while the agent runs, so nothing of the change was taken; restart \
         the agent", path.display()
    )]
    Fixed {
        /// The file.
        path: PathBuf,
        /// What has changed, separated by commas.
        keys: String,
    },
}

/// A change that can be taken.
#[derive(Clone, Debug)]
pub struct Changed {
    /// The whole configuration.
    pub config: Config,
    /// For each cluster, whether its issuers are as they were: what is remembered of them stays good.
    pub same_issuers: Vec<bool>,
}

/// The file, and what of it is in force.
#[derive(Clone, Debug)]
pub struct Source {
    path: PathBuf,
    node: String,
    /// What is in force.
    text: String,
    /// What was read last, in force or not.
    last: String,
}

impl Source {
    /// Reads and validates the file at `path`; `node` is used where it names no node.
    ///
    /// # Errors
    /// Those of [`Config::load`].
    pub fn load(path: &Path, node: &str) -> Result<(Self, Config), ConfigError> {
        check_environment(std::env::vars_os()).map_err(ConfigError::Environment)?;
        let text = super::read(path)?;
        let config = Config::parse(path, &text, node)?;
        let source = Self { path: path.to_owned(), node: node.to_owned(), last: text.clone(), text };
        Ok((source, config))
    }

    /// Reads the file again; none if it is as it was when it was last read.
    ///
    /// # Errors
    /// It was changed to something that cannot be taken; said once for each change.
    pub fn reload(&mut self) -> Result<Option<Changed>, ReloadError> {
        let text = match super::read(&self.path) {
            Ok(text) => text,
            // Said once, too: until it can be read again, what was read last is "nothing".
            Err(_) if self.last.is_empty() => return Ok(None),
            Err(error) => {
                self.last.clear();
                return Err(error.into());
            }
        };
        if text == self.last {
            return Ok(None);
        }
        self.last.clone_from(&text);
        let config = Config::parse(&self.path, &text, &self.node)?;
        let (old, new) = (Parsed::of(&self.text), Parsed::of(&text));
        let keys = old.fixed_changes(&new);
        if !keys.is_empty() {
            return Err(ReloadError::Fixed { path: self.path.clone(), keys: keys.join(", ") });
        }
        let pairs = old.clusters.iter().zip(&new.clusters);
        let same_issuers = pairs.map(|(old, new)| old.get(ISSUERS) == new.get(ISSUERS)).collect();
        self.text = text;
        Ok(Some(Changed { config, same_issuers }))
    }
}

/// A valid configuration as it is written.
struct Parsed {
    whole: Mapping,
    clusters: Vec<Mapping>,
}

impl Parsed {
    fn of(text: &str) -> Self {
        let whole: Mapping = serde_yaml_ng::from_str(text).unwrap_or_default();
        let clusters = match whole.get("clusters") {
            Some(Value::Sequence(clusters)) => {
                clusters.iter().filter_map(Value::as_mapping).cloned().collect()
            }
            _ => Vec::new(),
        };
        Self { whole, clusters }
    }

    /// Keys that differ and cannot change while the agent runs.
    fn fixed_changes(&self, new: &Self) -> Vec<String> {
        let mut keys = differences("", &self.whole, &new.whole, &[LIVE.as_slice(), &["clusters"]].concat());
        // For whom content is encrypted: epochs have their recipients.
        let encryption = |parsed: &Self| parsed.whole.get("recording")?.get("encryption").cloned();
        if encryption(self) != encryption(new) {
            keys.push("recording.encryption".to_owned());
        }
        if self.clusters.len() != new.clusters.len() {
            keys.push("clusters".to_owned());
            return keys;
        }
        for (index, (old, new)) in self.clusters.iter().zip(&new.clusters).enumerate() {
            keys.extend(differences(&format!("clusters[{index}]."), old, new, &LIVE_OF_CLUSTER));
        }
        keys
    }
}

fn differences(prefix: &str, old: &Mapping, new: &Mapping, live: &[&str]) -> Vec<String> {
    let named = |key: &Value| key.as_str().map(str::to_owned);
    let mut keys: Vec<String> = old.keys().chain(new.keys()).filter_map(named).collect();
    keys.sort();
    keys.dedup();
    keys.retain(|key| !live.contains(&key.as_str()) && old.get(key.as_str()) != new.get(key.as_str()));
    keys.into_iter().map(|key| format!("{prefix}{key}")).collect()
}

#[cfg(test)]
mod tests {
    use super::{ReloadError, Source};

    fn text(tenant: &str, server_names: &str, roles: &str, label: &str) -> String {
        format!(
            "{{apiVersion: weir.dev/v1alpha1, kind: AgentConfiguration, tenant: {tenant},
enrolment: [{{namespaceSelector: {{matchLabels: {{{label}: 'true'}}}}, podSelector: {{}}}}],
clusters: [{{name: c, inCluster: true, hostNames: {server_names}, trust: {{clusterSigner: {{}}}}, roles: {roles}}}]}}"
        )
    }

    #[test]
    fn roles_and_enrolment_change_at_run_time_and_nothing_else_does() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("agent.yaml");
        let write = |text: String| std::fs::write(&path, text).expect("written");
        let pass = "[{name: a, when: 'true', passThrough: {}}]";
        write(text("t", "[]", pass, "a"));
        let (mut source, config) = Source::load(&path, "n").expect("loaded");
        assert_eq!(config.clusters[0].roles.as_ref().map(Vec::len), Some(1));
        assert!(source.reload().expect("unchanged").is_none());

        write(text("t", "[]", "[]", "b"));
        let changed = source.reload().expect("valid").expect("changed");
        assert_eq!(changed.config.clusters[0].roles.as_ref().map(Vec::len), Some(0));
        assert_eq!(changed.same_issuers, [true]);

        write(text("u", "[x.example]", pass, "b"));
        let error = source.reload().expect_err("fixed").to_string();
        assert!(
            error.contains(": clusters[0].hostNames") || error.contains("tenant, clusters[0].hostNames"),
            "{error}"
        );
        assert!(source.reload().expect("said once").is_none());
        let encrypted = "{recording: {encryption: {recipientFiles: [/a]}}, apiVersion";
        write(text("t", "[]", "[]", "b").replacen("{apiVersion", encrypted, 1));
        let error = source.reload().expect_err("fixed").to_string();
        assert!(error.contains(": recording.encryption cannot change"), "{error}");

        write("nonsense".to_owned());
        assert!(matches!(source.reload(), Err(ReloadError::Invalid(_))));
        std::fs::remove_file(&path).expect("removed");
        assert!(source.reload().expect_err("gone").to_string().contains("cannot read"));
        assert!(source.reload().expect("said once").is_none());
        // Back to what is in force is a change of what was read last.
        write(text("t", "[]", "[]", "b"));
        assert!(source.reload().expect("valid").is_some());
    }
}
