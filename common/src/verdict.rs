//! The verdict on what a task or socket sends to the API set: one pure function for every hook and guard.
//!
//! The order is the one of the design: the agent passes; an enrolled pod is redirected, or denied while its
//! network namespace has no listener; a known, unselected pod passes; a host process outside every container
//! cgroup in the host's network namespace passes; anything else is denied. A kubelet is no API server, but takes
//! commands for every pod of its node: enrolled pods are never let to one, redirected neither.

use crate::kernel::{Class, Counter, NoticeKind};

/// What is at the address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// An API server.
    ApiServer,
    /// A kubelet.
    Kubelet,
}

/// What a hook must do with a connection to the API set.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Let it go where it was meant to go.
    Pass = 0,
    /// Let it go, count it, report it: what an enforced pod would have had redirected.
    PassObserved = 1,
    /// Rewrite its address to the listener of its network namespace.
    Redirect = 2,
    /// Refuse: enrolled, but no listener in its network namespace.
    DenyNoListener = 3,
    /// Refuse: nobody has said what this cgroup is.
    DenyUnknown = 4,
    /// Refuse: enrolled, and it goes to a kubelet.
    DenyKubelet = 5,
    /// Refuse: the pod is in quarantine. Not decided here: it holds for every address, before this table is asked.
    DenyQuarantined = 6,
    /// Refuse: to be redirected, and no TCP. Nor is this decided here.
    DenyProtocol = 7,
    /// Refuse: to be redirected, and there is no room for its flow. Nor is this.
    DenyNoRoom = 8,
}

impl Verdict {
    const ALL: [Self; 9] = [
        Self::Pass,
        Self::PassObserved,
        Self::Redirect,
        Self::DenyNoListener,
        Self::DenyUnknown,
        Self::DenyKubelet,
        Self::DenyQuarantined,
        Self::DenyProtocol,
        Self::DenyNoRoom,
    ];

    /// What is counted of it.
    const fn counter(self) -> Counter {
        match self {
            Self::Pass => Counter::Passed,
            Self::PassObserved => Counter::WouldRedirect,
            Self::Redirect => Counter::Redirected,
            Self::DenyNoListener => Counter::DeniedNoListener,
            Self::DenyUnknown => Counter::DeniedUnknown,
            Self::DenyKubelet => Counter::DeniedKubelet,
            Self::DenyQuarantined => Counter::DeniedQuarantined,
            Self::DenyProtocol => Counter::ProtocolRefused,
            Self::DenyNoRoom => Counter::FlowsLost,
        }
    }

    /// What is reported of it.
    const fn notice(self) -> Option<NoticeKind> {
        match self {
            Self::Pass | Self::Redirect | Self::DenyNoRoom => None,
            Self::PassObserved => Some(NoticeKind::WouldRedirect),
            Self::DenyNoListener => Some(NoticeKind::DeniedNoListener),
            Self::DenyUnknown => Some(NoticeKind::DeniedUnknown),
            Self::DenyKubelet => Some(NoticeKind::DeniedKubelet),
            Self::DenyQuarantined => Some(NoticeKind::DeniedQuarantined),
            Self::DenyProtocol => Some(NoticeKind::ProtocolRefused),
        }
    }

    /// Whether the connection goes where it was meant to go, by the verdict's number; not if no verdict has it.
    #[inline(always)]
    pub const fn passes(number: u64) -> bool {
        number <= Self::PassObserved as u64
    }

    /// Number of the [`Counter`] of a verdict, by the verdict's number.
    #[inline(always)]
    pub const fn counter_number(number: u64) -> u32 {
        of_table(COUNTERS, number)
    }

    /// Number of the [`NoticeKind`] of a verdict, by the verdict's number; 0: nothing is reported.
    #[inline(always)]
    pub const fn notice_number(number: u64) -> u32 {
        of_table(NOTICES, number)
    }
}

/// Four bits for each verdict: the kernel's verifier looks at what follows on a branch once for each way, and behind a shift once.
const fn table(of: [u32; Verdict::ALL.len()]) -> u64 {
    let (mut table, mut at) = (0, 0);
    while at < of.len() {
        assert!(of[at] < 16 && Verdict::ALL[at] as usize == at);
        table |= (of[at] as u64) << (4 * at);
        at += 1;
    }
    table
}

#[inline(always)]
const fn of_table(table: u64, number: u64) -> u32 {
    (table >> (4 * (number & 15))) as u32 & 15
}

const COUNTERS: u64 = {
    let (mut of, mut at) = ([0; Verdict::ALL.len()], 0);
    while at < of.len() {
        of[at] = Verdict::ALL[at].counter() as u32;
        at += 1;
    }
    table(of)
};

const NOTICES: u64 = {
    let (mut of, mut at) = ([0; Verdict::ALL.len()], 0);
    while at < of.len() {
        of[at] = match Verdict::ALL[at].notice() {
            Some(kind) => kind as u32,
            None => 0,
        };
        at += 1;
    }
    table(of)
};

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
    use crate::kernel::{Class, NoticeKind};

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
    fn what_is_counted_and_reported_of_a_number_is_its_verdicts() {
        for (verdict, number) in Verdict::ALL.into_iter().zip(0..) {
            assert_eq!(verdict as u64, number);
            assert_eq!(Verdict::counter_number(number), verdict.counter() as u32, "{verdict:?}");
            let kind = NoticeKind::from_number(Verdict::notice_number(number));
            assert_eq!(kind, verdict.notice(), "{verdict:?}");
            let passes = matches!(verdict, Verdict::Pass | Verdict::PassObserved);
            assert_eq!(Verdict::passes(number), passes, "{verdict:?}");
        }
        for number in [9, 15, 16, 1 << 32, u64::MAX] {
            assert!(!Verdict::passes(number), "{number}");
        }
        // Where two have the same, one is not told from the other.
        let counters: std::collections::HashSet<_> = (0..9).map(Verdict::counter_number).collect();
        assert_eq!(counters.len(), 9);
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
