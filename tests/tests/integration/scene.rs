//! What every test begins with: the testbed, namespaces of its own, an agent and its journal, of which it waits for events.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};

use weir_common::event::{Event, Kind};
use weir_tests::{
    AgentProcess, Testbed,
    agent::{self, ENROL_LABEL, TrustSource},
    progress::Progress,
    wait_until,
};

use super::DEADLINE;

/// A node has one agent.
static ONE_AGENT: Mutex<()> = Mutex::new(());

/// A test's testbed, namespaces and journal.
pub(crate) struct Scene {
    pub(crate) testbed: Testbed,
    namespaces: Vec<String>,
    pub(crate) scratch: tempfile::TempDir,
    _one: MutexGuard<'static, ()>,
}

impl Scene {
    /// None only where the test cannot run for lack of privilege, outside CI.
    pub(crate) fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            assert!(std::env::var("CI").is_err(), "integration tests need root");
            eprintln!("DID NOT RUN: integration tests need root");
            return None;
        }
        let one = ONE_AGENT.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = Testbed::default_folder().unwrap();
        let testbed = Testbed::up(&folder, Progress::Shown).unwrap().down_on_drop();
        let scratch = tempfile::tempdir().unwrap();
        Some(Self { testbed, namespaces: Vec::new(), scratch, _one: one })
    }

    /// A namespace whose default service account may do everything, enrolled or not.
    pub(crate) fn namespace(&mut self, name: &str, enrolled: bool) {
        self.namespaces.push(name.to_owned());
        let labels: &[_] = if enrolled { &[ENROL_LABEL] } else { &[] };
        self.testbed.create_namespace(name, labels).unwrap();
        let binding = format!(
            "{{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRoleBinding, metadata: {{name: {name}}},
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: cluster-admin}},
subjects: [{{kind: ServiceAccount, name: default, namespace: {name}}}]}}"
        );
        self.testbed.apply(&binding).unwrap();
    }

    pub(crate) fn journal(&self) -> PathBuf {
        self.scratch.path().join("journal")
    }

    pub(crate) fn config(&self, trust: TrustSource) -> PathBuf {
        let path = self.scratch.path().join("agent.yaml");
        let configuration = agent::configuration(&self.testbed, &self.journal(), trust);
        agent::write_configuration(&configuration, &path).unwrap();
        path
    }

    pub(crate) fn agent(&self, trust: TrustSource) -> AgentProcess {
        AgentProcess::start(&self.config(trust), &self.scratch.path().join("agent.log")).unwrap()
    }

    pub(crate) fn events(&self) -> Vec<Event> {
        agent::read_events(&self.journal()).unwrap()
    }

    /// Waits until an event is in the journal.
    #[track_caller]
    pub(crate) fn event(&self, what: &str, is_it: impl Fn(&Event) -> bool) -> Event {
        wait_until(what, DEADLINE, || Ok(self.events().into_iter().find(|event| is_it(event)))).unwrap()
    }

    /// The events since there were `earlier`, once all that must be there is, and each request that was opened has ended. The end alone
    /// says nothing of a request whose beginning is not written yet: a client has the answer to a read before that.
    #[track_caller]
    pub(crate) fn ended(&self, earlier: usize, is_all: impl Fn(&[Event]) -> bool) -> Vec<Event> {
        let has_ended = |events: &[Event]| {
            let ended: BTreeSet<_> = events
                .iter()
                .filter(|event| matches!(event.kind, Kind::RequestClosed(_)))
                .map(|event| event.request.clone())
                .collect();
            let mut opened = events.iter().filter(|event| matches!(event.kind, Kind::RequestOpened(_)));
            opened.all(|event| ended.contains(&event.request))
        };
        let ended = wait_until("all requests, and their ends", DEADLINE, || {
            let events = self.events().split_off(earlier);
            Ok((is_all(&events) && has_ended(&events)).then_some(events))
        });
        ended.unwrap_or_else(|error| {
            let uris = self.events().split_off(earlier).into_iter().filter_map(|event| match event.kind {
                Kind::RequestOpened(opened) => Some(opened.uri),
                _ => None,
            });
            panic!("{error:#}; opened are {:#?}", uris.collect::<Vec<_>>())
        })
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        for namespace in &self.namespaces {
            let _ = self.testbed.kubectl(&["delete", "clusterrolebinding", namespace]);
            let _ = self.testbed.delete_namespace(namespace);
        }
    }
}
