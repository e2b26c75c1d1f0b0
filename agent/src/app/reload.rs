//! The configuration as it changes while the agent runs: rules, issuers and enrolment, without a connection lost.

use std::{sync::Arc, time::Duration};

use tokio::sync::watch;

use super::cluster::Live;
use crate::{
    config::{Enrolment, Recording, Source, source::Changed},
    interception::observed::Observed,
    recording::Recorder,
};

/// How often the file is looked at. A ConfigMap takes a minute to reach a node's files anyway.
const INTERVAL: Duration = Duration::from_secs(2);
/// The finding by which an operator hears of a change that was not taken.
const FINDING: &str = "configurationRefused";

/// The finding by which a change of the rules for recording is in the record.
const RECORDING_FINDING: &str = "recordingRulesChanged";

/// Records that mutations may go on although their records could be lost, if they may.
pub(super) fn announce_async_mutations(recorder: &Recorder, recording: &Recording) {
    if recording.commits.async_mutations {
        let message = "recording.allowAsyncMutations is set: what rules make async goes on before its record is durable, \
             mutations and streams included; a crash can lose such records";
        tracing::warn!(event = "async-mutations", message);
        recorder.finding(None, None, "asyncMutations", message);
    }
}

/// What a change reaches.
pub(super) struct Reload {
    pub(super) clusters: Vec<Live>,
    pub(super) enrolment: watch::Sender<Arc<[Enrolment]>>,
    pub(super) recording: watch::Sender<Recording>,
    pub(super) recorder: Recorder,
    pub(super) observed: Arc<Observed>,
}

impl Reload {
    /// Follows the file until dropped.
    pub(super) async fn follow(self, mut source: Source) {
        loop {
            tokio::time::sleep(INTERVAL).await;
            let read = tokio::task::spawn_blocking(move || {
                let reloaded = source.reload();
                (source, reloaded)
            });
            let Ok((back, reloaded)) = read.await else { return };
            source = back;
            match reloaded {
                Ok(None) => {}
                Ok(Some(changed)) => self.take(&changed),
                Err(error) => self.refuse(&error.to_string()),
            }
        }
    }

    fn take(&self, Changed { config, same_issuers }: &Changed) {
        let pairs = self.clusters.iter().zip(config.clusters.iter().zip(same_issuers));
        // All of it, or nothing.
        let prepared: Result<Vec<_>, _> =
            pairs.map(|(live, (cluster, same))| live.prepare(cluster, *same)).collect();
        match prepared {
            Ok(prepared) => prepared.into_iter().for_each(|put_in_force| put_in_force()),
            Err(error) => return self.refuse(&error.to_string()),
        }
        self.enrolment.send_replace(config.enrolment.clone().into());
        self.take_recording(&config.recording);
        self.observed.configured(None);
        tracing::info!(
            event = "configuration-changed",
            "configuration changed: rules, issuers, recording and enrolment are in force"
        );
    }

    /// What may weaken the record is recorded before it is in force.
    fn take_recording(&self, recording: &Recording) {
        let before = self.recording.send_replace(recording.clone());
        if before == *recording {
            return;
        }
        let message = "rules by which requests are committed have changed (`recording` in the configuration)";
        self.recorder.finding(None, None, RECORDING_FINDING, message);
        if !before.commits.async_mutations {
            announce_async_mutations(&self.recorder, recording);
        }
        self.recorder.set_rules(recording.commits.clone());
    }

    fn refuse(&self, problem: &str) {
        tracing::error!(
            event = "configuration-refused",
            problem,
            "the changed configuration was refused; the one before stays in force"
        );
        let message = format!("{problem}; the configuration before stays in force");
        self.recorder.finding(None, None, FINDING, &message);
        self.observed.configured(Some(problem.to_owned()));
    }
}
