//! What the interception lets others know while it runs, for metrics and readiness. On a connection's way it costs two
//! atomic additions.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use tokio::sync::watch;
use weir_common::kernel::NoticeKind;

use super::{
    canary::Health,
    counters::Counters,
    waits::{WaitNumbers, Waits},
};

/// Longest account of why a cluster cannot be served.
const PROBLEM_CHARS_MAX: usize = 1000;

/// Something that publishes what is recorded.
pub trait Publishes: std::fmt::Debug + Send + Sync {
    /// What is not published yet, in words, if that is late or cannot be published.
    fn unpublished(&self) -> Option<String>;
}

/// See the module.
#[derive(Debug, Default)]
pub struct Observed {
    settled: AtomicBool,
    /// Containers that waited for their pod.
    pub(super) waits: Waits,
    proxied: AtomicU64,
    closed: AtomicU64,
    disagreed: AtomicU64,
    answers_refused: AtomicU64,
    questions_refused: AtomicU64,
    handovers_taken: AtomicU64,
    handovers_given: AtomicU64,
    handovers_broken_off: AtomicU64,
    canary: watch::Sender<Health>,
    /// Its cgroup now, or the last time; what the kernel reports of that is no pod's.
    canary_cgroup: AtomicU64,
    canary_passed: AtomicU64,
    canary_failed: AtomicU64,
    canary_redirected: AtomicU64,
    canary_denied: AtomicU64,
    configurations_taken: AtomicU64,
    configurations_refused: AtomicU64,
    /// Why the configuration file as it is now is not in force; none if it is.
    configuration_problem: Mutex<Option<String>>,
    /// Why the cluster that is being made ready cannot be served yet.
    cluster_problem: Mutex<Option<String>>,
    publishing: OnceLock<Arc<dyn Publishes>>,
    /// Connections that reached the proxy, by the pod's UID. Locked when pods come and go, and to be read.
    pods: Mutex<HashMap<String, Arc<AtomicU64>>>,
}

/// The same as numbers, since this process started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Numbers {
    /// Connections that arrived with a flow record of the listener's pod and reached the proxy.
    pub proxied: u64,
    /// Connections that arrived without any, and were closed.
    pub closed: u64,
    /// Connections whose flow record is of another pod than the listener's, and were closed.
    pub disagreed: u64,
    /// Reports of answers of name servers that were kept from pods.
    pub answers_refused: u64,
    /// Reports of questions that did not get to a name server.
    pub questions_refused: u64,
    /// Whether the listeners of the agent before were taken (once at most).
    pub handovers_taken: u64,
    /// Whether they were given to the one after (once at most).
    pub handovers_given: u64,
    /// Successors that did not take over after all.
    pub handovers_broken_off: u64,
    /// Checks with the canary that passed.
    pub canary_passed: u64,
    /// … that failed.
    pub canary_failed: u64,
    /// Connections of the canary that the kernel redirected.
    pub canary_redirected: u64,
    /// … that it denied.
    pub canary_denied: u64,
    /// Changes of the configuration that were taken.
    pub configurations_taken: u64,
    /// … that were refused.
    pub configurations_refused: u64,
}

fn add(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Observed {
    /// Whether every pod that was known once has its verdict, and its listener if it runs.
    pub fn is_settled(&self) -> bool {
        self.settled.load(Ordering::Relaxed)
    }

    /// What the last check with the canary has shown.
    pub fn canary(&self) -> Health {
        self.canary.borrow().clone()
    }

    /// The same, as it changes.
    pub fn watch_canary(&self) -> watch::Receiver<Health> {
        self.canary.subscribe()
    }

    /// A changed configuration was taken, or refused for this reason.
    pub fn configured(&self, problem: Option<String>) {
        add(if problem.is_none() { &self.configurations_taken } else { &self.configurations_refused });
        *self.configuration_problem.lock().unwrap_or_else(PoisonError::into_inner) = problem;
    }

    /// Why the configuration file as it is now is not in force; none if it is.
    pub fn configuration_problem(&self) -> Option<String> {
        self.configuration_problem.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A cluster cannot be served for this reason, or nothing keeps it from that any more.
    pub fn cluster_waits(&self, problem: Option<String>) {
        // Others' words are in it: one line, and no endless one.
        let one_line = |character: char| if character.is_control() { ' ' } else { character };
        let problem = problem.map(|text| text.chars().take(PROBLEM_CHARS_MAX).map(one_line).collect());
        *self.cluster_problem.lock().unwrap_or_else(PoisonError::into_inner) = problem;
    }

    /// Why a cluster cannot be served yet, as far as it is known.
    pub fn cluster_problem(&self) -> Option<String> {
        self.cluster_problem.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What is recorded is published by it from now on.
    pub fn published_by(&self, publishing: Arc<dyn Publishes>) {
        // There is one in an agent's life.
        let _ = self.publishing.set(publishing);
    }

    /// What is not published yet, if that is late or cannot be published.
    pub fn unpublished(&self) -> Option<String> {
        self.publishing.get().and_then(|publishing| publishing.unpublished())
    }

    /// Whether a cgroup is the canary's.
    pub(super) fn is_canary(&self, cgroup: u64) -> bool {
        cgroup != 0 && self.canary_cgroup.load(Ordering::Relaxed) == cgroup
    }

    pub(super) fn canary_begins(&self, cgroup: u64) {
        self.canary_cgroup.store(cgroup, Ordering::Relaxed);
    }

    /// What the kernel counted of one check.
    pub(super) fn canary_counted(&self, counters: &Counters) {
        self.canary_redirected.fetch_add(counters.redirected, Ordering::Relaxed);
        self.canary_denied.fetch_add(counters.denied_no_listener, Ordering::Relaxed);
    }

    pub(super) fn checked(&self, health: Health) {
        match health {
            Health::Unknown => {}
            Health::Passed => add(&self.canary_passed),
            Health::Failed(_) => add(&self.canary_failed),
        }
        self.canary.send_if_modified(|current| {
            let differs = *current != health;
            *current = health;
            differs
        });
    }

    /// The numbers.
    pub fn read(&self) -> Numbers {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Numbers {
            proxied: read(&self.proxied),
            closed: read(&self.closed),
            disagreed: read(&self.disagreed),
            answers_refused: read(&self.answers_refused),
            questions_refused: read(&self.questions_refused),
            handovers_taken: read(&self.handovers_taken),
            handovers_given: read(&self.handovers_given),
            handovers_broken_off: read(&self.handovers_broken_off),
            canary_passed: read(&self.canary_passed),
            canary_failed: read(&self.canary_failed),
            canary_redirected: read(&self.canary_redirected),
            canary_denied: read(&self.canary_denied),
            configurations_taken: read(&self.configurations_taken),
            configurations_refused: read(&self.configurations_refused),
        }
    }

    /// What is counted of containers that waited for their pod.
    pub fn waits(&self) -> WaitNumbers {
        self.waits.read()
    }

    /// Whether containers wait until their pod is enrolled; else why not.
    ///
    /// # Errors
    /// The reason.
    pub fn containers_wait(&self) -> Result<(), String> {
        self.waits.are_made()
    }

    /// Connections of a pod that reached the proxy.
    pub fn proxied_of(&self, uid: &str) -> u64 {
        let pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        pods.get(uid).map(|proxied| proxied.load(Ordering::Relaxed)).unwrap_or_default()
    }

    /// The counter of a pod, for its listener.
    pub(super) fn counter_of(&self, uid: &str) -> Arc<AtomicU64> {
        let mut pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        pods.entry(uid.to_owned()).or_default().clone()
    }

    /// The pod is gone.
    pub(super) fn forget(&self, uid: &str) {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
    }

    pub(super) fn settle(&self) {
        self.settled.store(true, Ordering::Relaxed);
    }

    pub(super) fn proxied(&self) {
        add(&self.proxied);
    }

    pub(super) fn closed(&self) {
        add(&self.closed);
    }

    pub(super) fn disagreed(&self) {
        add(&self.disagreed);
    }

    /// The kernel has reported this.
    pub(super) fn reported(&self, kind: NoticeKind) {
        match kind {
            NoticeKind::AnswerRefused => add(&self.answers_refused),
            NoticeKind::QuestionRefused => add(&self.questions_refused),
            _ => {}
        }
    }

    pub(super) fn taken(&self) {
        add(&self.handovers_taken);
    }

    pub(super) fn given(&self) {
        add(&self.handovers_given);
    }

    pub(super) fn broken_off(&self) {
        add(&self.handovers_broken_off);
    }
}
