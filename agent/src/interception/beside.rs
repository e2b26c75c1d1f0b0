//! What runs beside enrolment: reports of the kernel, the canary, listeners inside pods, an end to direct connections.

use std::{path::Path, sync::Arc};

use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use super::{
    accept::Sink,
    canary::Canary,
    enrolment::Tenants,
    handover::Passed,
    namespace::NamespaceId,
    nested::{self, Nested},
    pod_network, report,
    run::InterceptionError,
};

/// Parts that run until they are told to end; one that ends earlier ends the agent. Each gives what it is.
pub(super) type Tasks = JoinSet<Result<&'static str, InterceptionError>>;

/// Does `work` beside the rest; it must not end before it is told to.
pub(super) fn also(tasks: &mut Tasks, part: &'static str, work: impl Future<Output = ()> + Send + 'static) {
    tasks.spawn(async move {
        work.await;
        Ok(part)
    });
}

/// What they share.
#[derive(Clone)]
pub(super) struct Beside {
    pub(super) sink: Sink,
    pub(super) tenants: Tenants,
    /// The host's network namespace.
    pub(super) host: NamespaceId,
    /// Whether a successor takes over: what the kernel reports is for it to read then, and the maps are for it to change.
    pub(super) frozen: watch::Receiver<bool>,
    pub(super) cancellation: CancellationToken,
}

impl Beside {
    /// Starts all of it. `grown` tells that an address has come into the API set, `inside` are listeners inside pods that a
    /// former agent has passed.
    pub(super) fn start(
        self,
        mount: &Path,
        ready: &watch::Sender<bool>,
        grown: watch::Receiver<()>,
        (nested, inside): (&Arc<Nested>, Vec<Passed>),
    ) -> Result<Tasks, InterceptionError> {
        let mut tasks = JoinSet::new();
        let (wanted, denied) = mpsc::channel(nested::WANTED_MAX);
        self.report(&mut tasks, wanted)?;
        let Sink { kernel, recorder, observed, .. } = &self.sink;
        let canary = Canary::new(kernel.clone(), recorder.clone(), observed.clone(), mount);
        tasks.spawn(canary.run(ready.subscribe(), self.frozen.clone(), self.cancellation.clone()));
        let listening = nested.clone().follow(self.clone(), inside, denied);
        also(&mut tasks, "listening in pods' own network namespaces", listening);
        let Self { sink, tenants, host, cancellation, .. } = self;
        let direct = pod_network::end_direct_connections_of_all(sink, host, tenants, grown, cancellation);
        also(&mut tasks, "ending direct connections", direct);
        Ok(tasks)
    }

    /// What the kernel says, and what pods' environments would do.
    fn report(
        &self,
        tasks: &mut Tasks,
        wanted: mpsc::Sender<nested::Wanted>,
    ) -> Result<(), InterceptionError> {
        let Sink { kernel, recorder, observed, .. } = &self.sink;
        let notices = kernel
            .notices()
            .map_err(|source| InterceptionError::Io { action: "wait for notices", source })?;
        if let Some(notices) = notices {
            tasks.spawn(report::notices(
                notices,
                self.tenants.clone(),
                recorder.clone(),
                observed.clone(),
                self.frozen.clone(),
                wanted,
                self.cancellation.clone(),
            ));
        }
        if let Some(log) = kernel.take_debug_log() {
            let cancellation = self.cancellation.clone();
            tasks.spawn(async move {
                tokio::select! {
                    () = cancellation.cancelled() => Ok("copying the programs' log"),
                    result = log => result
                        .map(|()| "copying the programs' log")
                        .map_err(|source| InterceptionError::Io { action: "read the programs' log", source }),
                }
            });
        }
        let cancellation = self.cancellation.clone();
        tasks.spawn(report::proxy_environments(
            self.tenants.clone(),
            kernel.clone(),
            recorder.clone(),
            cancellation,
        ));
        Ok(())
    }
}
