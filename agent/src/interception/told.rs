//! What pods were told by name servers, as the kernel has noted it before it was theirs: addresses of configured host names that
//! nobody knew. Each is an API server's for the pod that was told it, until it is judged: it is one for everybody, or it is
//! none. Judging is the matter of [`Suspicions`](super::api_set::Suspicions); here it is asked for, and what is judged is taken
//! out of the kernel's maps.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use weir_common::{
    answer::name_hash,
    kernel::{ApiEndpoint, Named, NamedEndpoint, Suspect, Suspicion, maps},
    packet::PORT_UNKNOWN,
};

use super::{
    answers::Interest,
    loader::{Kernel, KernelError},
    maps::{absent_is_fine, filled, lock, socket_address},
};
use crate::config::EndpointName;

/// How often what was noted is looked at. Addresses that the agent sees itself are judged sooner; those that it does not see (in
/// answers over TCP) wait so long.
const LOOK: Duration = Duration::from_secs(1);
/// The key that says that there are names.
const ANY_NAME: u64 = 0;

impl Kernel {
    /// Says which host names lead to API servers, of all clusters, with the clusters' indices. Those of before go.
    ///
    /// # Errors
    /// The map is full, or the kernel refuses.
    pub fn set_names(&self, configured: &[(EndpointName, u32)]) -> Result<(), KernelError> {
        let failed = |source| KernelError::Map { map: maps::NAMES, source };
        let mut wanted: HashMap<u64, Named> = HashMap::new();
        for (name, cluster) in configured {
            let named = wanted.entry(name_hash(&name.host)).or_default();
            let endpoint = NamedEndpoint { cluster: *cluster, port: u32::from(name.port) };
            // As many as the configuration may have.
            if let Some(free) = named.endpoints.iter_mut().find(|free| free.port == 0) {
                *free = endpoint;
            }
        }
        if !wanted.is_empty() {
            wanted.insert(ANY_NAME, Named::default());
        }
        let mut names = lock(&self.names);
        for (hash, named) in &wanted {
            filled(|| names.insert(hash, named, 0)).map_err(failed)?;
        }
        let there = names.keys().collect::<Result<Vec<_>, _>>().map_err(failed)?;
        there
            .iter()
            .filter(|hash| !wanted.contains_key(*hash))
            .try_for_each(|hash| absent_is_fine(names.remove(hash), maps::NAMES))
    }

    /// What pods were told and nobody has judged yet.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn suspected(&self) -> Result<Vec<(Suspect, Suspicion)>, KernelError> {
        let suspected = lock(&self.suspected).iter().collect::<Result<_, _>>();
        suspected.map_err(|source| KernelError::Map { map: maps::SUSPECTED, source })
    }

    /// Takes out what is judged. `left` is what stays.
    fn forget_suspects(&self, judged: &[Suspect], left: &[Suspect]) -> Result<(), KernelError> {
        let mut suspected = lock(&self.suspected);
        let stays: HashSet<_> = left.iter().map(|suspect| (suspect.cgroup, suspect.address)).collect();
        for suspect in judged {
            let any = Suspect { port: PORT_UNKNOWN, ..*suspect };
            // First: told anew at this moment, it is noted anew, and found when it is looked for the next time.
            if !stays.contains(&(suspect.cgroup, suspect.address)) {
                absent_is_fine(suspected.remove(&any), maps::SUSPECTED)?;
            }
            absent_is_fine(suspected.remove(suspect), maps::SUSPECTED)?;
        }
        drop(suspected);
        // The kernel counts on meanwhile: a bound that is off by a few is one.
        let mut counts: HashMap<u64, u32> = HashMap::new();
        for cgroup in stays.iter().map(|(cgroup, _)| cgroup).chain(left.iter().map(|left| &left.cgroup)) {
            *counts.entry(*cgroup).or_default() += 1;
        }
        let failed = |source| KernelError::Map { map: maps::SUSPICIONS, source };
        let mut suspicions = lock(&self.suspicions);
        let there = suspicions.keys().collect::<Result<Vec<_>, _>>().map_err(failed)?;
        for cgroup in there {
            match counts.get(&cgroup) {
                Some(count) => suspicions.insert(cgroup, count, 0).map_err(failed)?,
                None => absent_is_fine(suspicions.remove(&cgroup), maps::SUSPICIONS)?,
            }
        }
        Ok(())
    }

    /// Has what pods were told judged, and takes out what is.
    fn judge_suspects(&self, interests: &[Interest]) -> Result<(), KernelError> {
        let suspected = self.suspected()?;
        if suspected.is_empty() {
            return Ok(());
        }
        let cgroups = self.cgroups()?;
        let (mut judged, mut left) = (Vec::new(), Vec::new());
        let (any, ports): (Vec<_>, Vec<_>) =
            suspected.into_iter().partition(|(suspect, _)| suspect.port == PORT_UNKNOWN);
        for (suspect, suspicion) in ports {
            let endpoint = ApiEndpoint { address: suspect.address, port: suspect.port };
            let address = socket_address(&endpoint);
            let is_open = cgroups.contains_key(&suspect.cgroup)
                && !self.is_api_endpoint(address)
                && interests.iter().any(|interest| {
                    u32::from(interest.name.port) == suspect.port
                        && name_hash(&interest.name.host) == suspicion.name
                        && interest.suspicions.meet(&interest.name, address)
                });
            if is_open { left.push(suspect) } else { judged.push(suspect) }
        }
        // Those that have lost their ports. A pod decides how many there are, so they are not looked for one by one.
        let with_port: HashSet<_> = left.iter().chain(&judged).map(|one| (one.cgroup, one.address)).collect();
        let alone = any.into_iter().map(|(any, _)| any);
        judged.extend(alone.filter(|any| !with_port.contains(&(any.cgroup, any.address))));
        self.forget_suspects(&judged, &left)
    }
}

/// Has what pods were told judged until cancelled.
pub(super) async fn follow(kernel: Arc<Kernel>, interests: Vec<Interest>, cancellation: CancellationToken) {
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = cancellation.cancelled() => return,
            _ = look.tick() => {}
        }
        if let Err(error) = kernel.judge_suspects(&interests) {
            // What is noted stays, and denies the pods that were told it.
            let error = &error as &dyn std::error::Error;
            tracing::error!(
                event = "answers-not-judged",
                error,
                "cannot look at what pods were told by name servers"
            );
        }
    }
}
