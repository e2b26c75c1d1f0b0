//! What the tests' Kafka is made of: its jars from Maven, Java and kcat from Debian. Starting it is [`super`]'s.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::maven::{self, Installed, Project, Tool};
use crate::progress::Progress;

const KCAT: Tool = ("kcat", "kcat");
const PROJECT: Project = Project { folder: "kafka", name: "Kafka", tools: &[KCAT] };

/// A broker with some topics stays well below; the tools too.
const HEAP: &str = "-Xmx256m";

/// What is there to run.
#[derive(Clone, Debug)]
pub(super) struct Installation {
    kafka: Installed,
    kcat: PathBuf,
}

/// What [`install`] would do; none when all is there.
///
/// # Errors
/// When the lock cannot be read or there is no place for the cache.
pub fn plan() -> Result<Option<String>> {
    PROJECT.plan()
}

/// Installs what is missing of the tests' Kafka.
///
/// # Errors
/// When a package cannot be installed or a jar not be fetched, or when a jar is not the one of the lock.
pub fn install(progress: Progress) -> Result<()> {
    installed(progress).map(drop)
}

/// The same, to run it.
pub(super) fn installed(progress: Progress) -> Result<Installation> {
    let kafka = PROJECT.install(progress)?;
    Ok(Installation { kafka, kcat: maven::path(KCAT)? })
}

impl Installation {
    /// A class of Kafka's, to add arguments to. Libraries for compression unpack themselves into `scratch`.
    pub(super) fn class(&self, name: &str, log_level: &str, scratch: &Path) -> Command {
        let log = format!("-Dorg.slf4j.simpleLogger.defaultLogLevel={log_level}");
        self.kafka.class(name, &[HEAP, &log], scratch)
    }

    /// kcat, to add arguments to; ended if it takes longer than `seconds`.
    pub(super) fn kcat(&self, seconds: u32) -> Command {
        let mut command = Command::new("timeout");
        command.arg(seconds.to_string()).arg(&self.kcat);
        // It reads ~/.config/kcat.conf otherwise.
        command.env("KCAT_CONFIG", "/dev/null");
        command
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::PROJECT;

    #[test]
    fn the_lock_has_the_version_that_the_project_asks_for() {
        let pom = fs::read_to_string(PROJECT.source("pom.xml")).unwrap();
        let version = pom.split("<kafka.version>").nth(1).unwrap().split('<').next().unwrap();
        let locked = PROJECT.locked().unwrap();
        for name in ["kafka_2.13", "kafka-clients", "kafka-tools"] {
            assert!(locked.contains_key(&format!("{name}-{version}.jar")), "{name} {version}");
        }
        assert!(locked.values().all(|hash| hash.len() == 64), "{locked:?}");
    }
}
