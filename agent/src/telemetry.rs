//! What an operator's monitoring sees: metrics, and whether the agent is alive and ready, over HTTP.
//!
//! `families` says which metrics there are and reads them when they are asked for, `exposition` writes them in the
//! format that Prometheus reads, `server` answers. What is counted is counted where it happens; nothing here is on a
//! connection's way.

use std::{
    path::PathBuf,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::SystemTime,
};

use self::server::Monitored;
use crate::{
    interception::{canary::Health, observed::Observed},
    proxy::Proxy,
    publishing::{Published, Publishing},
    recording::Recorder,
};

mod approver;
mod arrivals;
mod exposition;
mod families;
mod journal;
mod nri;
mod publishing;
#[cfg(test)]
mod reference;
mod roles;
pub mod server;
mod traces;

/// Where the numbers come from.
#[derive(Debug)]
pub struct Telemetry {
    recorder: Recorder,
    /// None: nothing is published.
    publishing: Option<Arc<Publishing>>,
    observed: Arc<Observed>,
    /// Folder of pins: the kernel's counters are read from the maps themselves.
    pins: PathBuf,
    /// There is none before every cluster has been reached.
    proxy: OnceLock<Proxy>,
    ending: AtomicBool,
    started: SystemTime,
}

impl Telemetry {
    /// Of an agent that has just started.
    pub fn new(
        recorder: Recorder,
        publishing: Option<Arc<Publishing>>,
        observed: Arc<Observed>,
        pins: PathBuf,
    ) -> Self {
        let (proxy, ending, started) = (OnceLock::new(), AtomicBool::new(false), SystemTime::now());
        Self { recorder, publishing, observed, pins, proxy, ending, started }
    }

    fn published(&self) -> Option<Published> {
        self.publishing.as_ref().map(|publishing| publishing.published())
    }

    /// The proxy serves from now on.
    pub fn serves(&self, proxy: Proxy) {
        // There is one proxy in an agent's life.
        let _ = self.proxy.set(proxy);
    }

    /// The agent takes no new connections from now on.
    pub fn ends(&self) {
        self.ending.store(true, Ordering::Relaxed);
    }
}

impl Monitored for Telemetry {
    fn unready(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        if self.ending.load(Ordering::Relaxed) {
            reasons.push("the agent ends: it serves what is open and takes nothing new".to_owned());
        }
        if self.proxy.get().is_none() {
            let problem = self.observed.cluster_problem().map(|problem| format!(": {problem}"));
            reasons.push(format!(
                "not every cluster has been reached and given a serving certificate yet; enrolled pods are refused{}",
                problem.unwrap_or_default()
            ));
        }
        if !self.observed.is_settled() {
            reasons.push(
                "the pods of this node are not known or not enrolled yet; new ones are refused".to_owned(),
            );
        }
        match self.observed.canary() {
            Health::Passed => {}
            Health::Unknown => reasons.push("no canary has been refused and redirected yet".to_owned()),
            Health::Failed(reason) => {
                reasons.push(format!("the canary failed, so what must be intercepted may not be: {reason}"));
            }
        }
        if let Some(failure) = self.recorder.measured().failure {
            reasons.push(format!("recording stopped: {failure}; requests that must be recorded are refused"));
        }
        reasons
    }

    fn notes(&self) -> Option<String> {
        let emergency = self.recorder.measured().emergency.map(|left| {
            format!(
                "an emergency is on for {} more seconds: requests go on although their records may be lost",
                left.as_secs()
            )
        });
        let notes: Vec<_> = emergency.into_iter().chain(self.observed.unpublished()).collect();
        (!notes.is_empty()).then(|| notes.join("\n"))
    }

    fn metrics(&self) -> String {
        exposition::render(families::gather(self))
    }
}
