//! `weir-agent ready`: whether the agent of this very pod is ready, for probes of the kubelet.
//!
//! While an agent follows another, two pods share the node's network, and a probe by HTTP would be answered by the former
//! one: its pod's successor would count as ready, and it would be ended, before it has handed over.

use std::path::Path;

use crate::interception::{
    handover,
    pod::PodUid,
    presence::Presence,
    succession::{own_pod, pod_of},
};

/// Why it is not ready.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unready {
    /// No agent has enrolled the node's pods.
    #[error("no agent has enrolled this node's pods yet; the agent's log says what it waits for")]
    Absent,
    /// One does not answer.
    #[error("the agent does not answer; is it stopped, stuck, or just handing over?")]
    Silent,
    /// Another pod's agent serves the node.
    #[error(
        "the agent of another pod (process {pid}) serves this node; this pod's follows it, or was followed by it"
    )]
    Elsewhere {
        /// That agent.
        pid: u32,
    },
    /// It says so itself.
    #[error("the agent says that it is not ready; its log and /readyz say why")]
    NotReady,
}

/// Asks the agent that listens at `handover`.
///
/// # Errors
/// It is not this pod's, or not ready.
pub fn check(handover: &Path) -> Result<(), Unready> {
    judge(&handover::presence(handover), own_pod().as_ref(), pod_of)
}

fn judge(
    presence: &Presence,
    own: Option<&PodUid>,
    pod_of: impl Fn(u32) -> Option<PodUid>,
) -> Result<(), Unready> {
    match presence {
        Presence::Absent => Err(Unready::Absent),
        Presence::Silent => Err(Unready::Silent),
        // Asked on the host itself, any agent of the node is meant.
        Presence::Running { pid, .. } if own.is_some() && pod_of(*pid).as_ref() != own => {
            Err(Unready::Elsewhere { pid: *pid })
        }
        Presence::Running { ready: false, .. } => Err(Unready::NotReady),
        Presence::Running { .. } => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::{PodUid, Presence, Unready, judge};

    fn running(pid: u32, ready: bool) -> Presence {
        let version = String::new();
        let (configuration_problem, unpublished, no_wait) = (None, None, None);
        let containers_wait = true;
        Presence::Running {
            pid,
            version,
            configuration_problem,
            unpublished,
            ready,
            containers_wait,
            no_wait,
        }
    }

    #[test]
    fn only_the_agent_of_the_pod_that_asks_makes_it_ready() {
        let pod = |text: &str| PodUid::new(text).expect("a uid");
        let (own, other) = (pod("a"), pod("b"));
        let ask = |presence: &Presence, asks: Option<&PodUid>| {
            judge(presence, asks, |pid| match pid {
                1 => Some(own.clone()),
                2 => Some(other.clone()),
                _ => None,
            })
        };
        assert_eq!(ask(&running(1, true), Some(&own)), Ok(()));
        assert_eq!(ask(&running(1, false), Some(&own)), Err(Unready::NotReady));
        assert_eq!(ask(&running(2, true), Some(&own)), Err(Unready::Elsewhere { pid: 2 }));
        assert_eq!(ask(&running(3, true), Some(&own)), Err(Unready::Elsewhere { pid: 3 }));
        assert_eq!(ask(&running(2, true), None), Ok(()));
        assert_eq!(ask(&Presence::Absent, Some(&own)), Err(Unready::Absent));
        assert_eq!(ask(&Presence::Silent, Some(&own)), Err(Unready::Silent));
    }
}
