//! The verdict on a connection to the API set: one pure function for every hook.
//!
//! The order is the one of the design: the agent passes; an enrolled pod is redirected, or denied while its
//! network namespace has no listener; a known, unselected pod passes; a host process outside every container
//! cgroup in the host's network namespace passes; anything else is denied.

use crate::kernel::Class;

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
}

/// Judges a connection to the API set.
///
/// `class` is that of the nearest classified cgroup at or above the task's; `listener_here` tells whether that
/// cgroup's listener is in the network namespace of the socket; `host_netns` whether the socket is in the
/// network namespace of the host.
pub const fn verdict(class: Option<Class>, listener_here: bool, host_netns: bool) -> Verdict {
    match class {
        Some(Class::Agent | Class::Unselected) => Verdict::Pass,
        Some(Class::Observed) => Verdict::PassObserved,
        Some(Class::Enrolled) if listener_here => Verdict::Redirect,
        Some(Class::Enrolled) => Verdict::DenyNoListener,
        Some(Class::Container) => Verdict::DenyUnknown,
        None if host_netns => Verdict::Pass,
        None => Verdict::DenyUnknown,
    }
}

#[cfg(test)]
mod tests {
    use super::{Class, Verdict, verdict};

    #[test]
    fn every_combination_has_the_verdict_of_the_design() {
        let table = [
            (Some(Class::Agent), [Verdict::Pass; 4]),
            (Some(Class::Unselected), [Verdict::Pass; 4]),
            (Some(Class::Observed), [Verdict::PassObserved; 4]),
            (
                Some(Class::Enrolled),
                [Verdict::DenyNoListener, Verdict::DenyNoListener, Verdict::Redirect, Verdict::Redirect],
            ),
            (Some(Class::Container), [Verdict::DenyUnknown; 4]),
            (None, [Verdict::DenyUnknown, Verdict::Pass, Verdict::DenyUnknown, Verdict::Pass]),
        ];
        for (class, expected) in table {
            for (index, expected) in expected.into_iter().enumerate() {
                let (listener_here, host_netns) = (index & 2 != 0, index & 1 != 0);
                assert_eq!(
                    verdict(class, listener_here, host_netns),
                    expected,
                    "{class:?} {listener_here} {host_netns}"
                );
            }
        }
    }
}
