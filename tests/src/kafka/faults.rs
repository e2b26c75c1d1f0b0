//! What an operator, or a disk, does to a broker while somebody publishes: rights, passwords, settings of topics, full disks.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::{Kafka, Setup, USER, consumer};
use crate::command::{output, run};

impl Kafka {
    /// Starts one that lets the user of the listener with TLS do nothing but what [`Self::allow`] says, and keeps topics on these
    /// folders: with one full, or gone, the partitions on it have no leader.
    ///
    /// # Errors
    /// When it cannot be installed or does not come up.
    pub fn start_guarded(disks: &[PathBuf]) -> Result<Self> {
        Self::start_with(Setup { issuer: None, disks: disks.to_vec() })
    }

    /// Lets the user of the listener with TLS write to a topic.
    ///
    /// # Errors
    /// When Kafka refuses.
    pub fn allow(&self, topic: &str) -> Result<()> {
        self.access(topic, &["--add", "--operation", "Describe", "--operation", "Write"])
    }

    /// Takes that back; it still sees the topic.
    ///
    /// # Errors
    /// When Kafka refuses.
    pub fn forbid(&self, topic: &str) -> Result<()> {
        self.access(topic, &["--remove", "--force", "--operation", "Write"])
    }

    fn access(&self, topic: &str, change: &[&str]) -> Result<()> {
        let mut command = self.tool("org.apache.kafka.tools.AclCommand");
        command.args(["--allow-principal", &format!("User:{USER}"), "--topic", topic]).args(change);
        run(&mut command).map(drop)
    }

    /// Changes a setting of a topic; none: as the broker has it.
    ///
    /// # Errors
    /// When Kafka refuses.
    pub fn set_topic(&self, topic: &str, name: &str, value: Option<&str>) -> Result<()> {
        let change = match value {
            Some(value) => ["--add-config".to_owned(), format!("{name}={value}")],
            None => ["--delete-config".to_owned(), name.to_owned()],
        };
        let mut command = self.tool("kafka.admin.ConfigCommand");
        command.args(["--alter", "--entity-type", "topics", "--entity-name", topic]).args(change);
        run(&mut command).map(drop)
    }

    /// Gives the user of the listener with TLS another password; who is connected stays so.
    ///
    /// # Errors
    /// When Kafka refuses.
    pub fn set_password(&self, password: &str) -> Result<()> {
        let mut command = self.tool("kafka.admin.ConfigCommand");
        command.args(["--alter", "--entity-type", "users", "--entity-name", USER]);
        command.args(["--add-config", &format!("SCRAM-SHA-512=[password={password}]")]);
        run(&mut command).map(drop)
    }

    /// Partitions of a topic that have no leader, by kcat.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub fn leaderless(&self, topic: &str) -> Result<BTreeSet<u32>> {
        let mut command = self.installation.kcat(super::ASK_SECONDS);
        command.args(["-L", "-J", "-m", "1", "-b", &self.bootstrap(), "-t", topic]);
        Ok(consumer::leaderless(&output(&mut command)?.stdout))
    }

    /// On which of its disks a partition is.
    ///
    /// # Errors
    /// When it is on none.
    pub fn disk_of(&self, topic: &str, partition: u32) -> Result<&Path> {
        let name = format!("{topic}-{partition}");
        let found = self.setup.disks.iter().find(|disk| fs::exists(disk.join(&name)).unwrap_or_default());
        found.map(PathBuf::as_path).with_context(|| format!("{name} is on no disk"))
    }
}
