//! The verdict on what a task or socket sends to the API set: one pure function for every hook and guard.
//!
//! The order is the one of the design: the agent passes; an enrolled pod is redirected, or denied while its
//! network namespace has no listener; a known, unselected pod passes; a host process outside every container
//! cgroup in the host's network namespace passes; anything else is denied. A kubelet is no API server, but takes
//! commands for every pod of its node: enrolled pods are never let to one, redirected neither.

use crate::kernel::Class;

/// What is at the address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// An API server.
    ApiServer,
    /// A kubelet.
    Kubelet,
}

/// What a hook must do with a connection to the API set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Let it go where it was meant to go.
    Pass,
    /// Let it go, count it, report it: what an enforced pod would have had redirected.
    PassObserved,
    /// Rewrite its address to the listener of its network namespace.
    Redirect,
    /// Refuse: enrolled, but no listener in its network namespace.
    DenyNoListener,
    /// Refuse: nobody has said what this cgroup is.
    DenyUnknown,
    /// Refuse: enrolled, and it goes to a kubelet.
    DenyKubelet,
    /// Refuse: the pod is in quarantine. Not decided here: it holds for every address, before this table is asked.
    DenyQuarantined,
}

/// Judges a connection to the API set.
///
/// `class` is that of the nearest classified cgroup at or above the task's; `listener_here` tells whether that
/// cgroup's listener is in the network namespace of the socket; `host_netns` whether the socket is in the
/// network namespace of the host.
pub const fn verdict(target: Target, class: Option<Class>, listener_here: bool, host_netns: bool) -> Verdict {
    match (class, target) {
        (Some(Class::Agent | Class::Unselected), _) => Verdict::Pass,
        (Some(Class::Observed), _) => Verdict::PassObserved,
        (Some(Class::Enrolled), Target::Kubelet) => Verdict::DenyKubelet,
        (Some(Class::Enrolled), Target::ApiServer) if listener_here => Verdict::Redirect,
        (Some(Class::Enrolled), Target::ApiServer) => Verdict::DenyNoListener,
        (Some(Class::Container), _) => Verdict::DenyUnknown,
        (None, _) if host_netns => Verdict::Pass,
        (None, _) => Verdict::DenyUnknown,
    }
}

/// Whether a guard lets a packet to the API set through: what was redirected bears another address, so only what
/// may pass as it is does.
pub const fn guard_passes(class: Option<Class>, host_netns: bool) -> bool {
    matches!(verdict(Target::ApiServer, class, false, host_netns), Verdict::Pass | Verdict::PassObserved)
}

/// Whether a task may make packet sockets, where the kernel asks: nobody may whom a guard must stop and an interface may not be
/// guarded yet. Where nobody can have said what a task is, it is the host's.
pub const fn packet_sockets_pass(class: Option<Class>) -> bool {
    guard_passes(class, true)
}

#[cfg(test)]
mod tests {
    use super::{Target, Verdict, guard_passes, packet_sockets_pass, verdict};
    use crate::kernel::Class;

    const CLASSES: [Option<Class>; 6] = [
        None,
        Some(Class::Agent),
        Some(Class::Unselected),
        Some(Class::Enrolled),
        Some(Class::Observed),
        Some(Class::Container),
    ];

    /// Without and with the host's network namespace, then both again with a listener here.
    fn all(target: Target, class: Option<Class>) -> [Verdict; 4] {
        [(false, false), (false, true), (true, false), (true, true)]
            .map(|(listener_here, host_netns)| verdict(target, class, listener_here, host_netns))
    }

    #[test]
    fn every_combination_has_the_verdict_of_the_design() {
        use Verdict::{DenyKubelet, DenyNoListener, DenyUnknown, Pass, PassObserved, Redirect};
        let expected = [
            ([DenyUnknown, Pass, DenyUnknown, Pass], None),
            ([Pass; 4], None),
            ([Pass; 4], None),
            ([DenyNoListener, DenyNoListener, Redirect, Redirect], Some([DenyKubelet; 4])),
            ([PassObserved; 4], None),
            ([DenyUnknown; 4], None),
        ];
        for (class, (api_server, kubelet)) in CLASSES.into_iter().zip(expected) {
            assert_eq!(all(Target::ApiServer, class), api_server, "{class:?}");
            assert_eq!(all(Target::Kubelet, class), kubelet.unwrap_or(api_server), "{class:?}");
        }
    }

    #[test]
    fn packet_sockets_are_for_the_host_and_for_pods_that_are_known_and_not_enrolled() {
        let passing = CLASSES.into_iter().filter(|class| packet_sockets_pass(*class));
        let expected = [None, Some(Class::Agent), Some(Class::Unselected), Some(Class::Observed)];
        assert!(passing.eq(expected));
    }

    #[test]
    fn a_guard_passes_just_what_a_hook_lets_go_where_it_was_meant_to() {
        for class in CLASSES {
            for host_netns in [false, true] {
                let hook = verdict(Target::Kubelet, class, true, host_netns);
                let passes = matches!(hook, Verdict::Pass | Verdict::PassObserved);
                assert_eq!(guard_passes(class, host_netns), passes, "{class:?} {host_netns}");
            }
        }
    }
}
