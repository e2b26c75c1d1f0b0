//! Sockets that are there before the kernel programs are: nothing is noted of them, neither whose they are nor in which network.

use std::{
    io::{Read as _, Write as _},
    process::{Child, Stdio},
    sync::atomic::{AtomicU16, Ordering},
};

use weir_tests::Pod;

use super::{
    escape::{
        Attack,
        Expected::{self, Dropped, Proxied, Says},
        GUARDED, REFUSED, Target,
    },
    watch::PROGRAM,
};

/// A way, the address that it goes to, and what may come of it.
pub(super) type Made = (&'static str, String, Expected);

/// What is said of a connection that was ended.
pub(super) const ENDED_WORD: &str = "failed ECONNABORTED";
const ENDED: Expected = Says(ENDED_WORD);

/// What may come of them while an agent serves the pod.
const BEFORE: [(&str, Target, Expected); 18] = [
    ("tcp", Target::Service, Proxied),
    ("bound", Target::Service, Proxied),
    ("nonblocking", Target::Service, Proxied),
    ("fastopen", Target::Service, Proxied),
    ("mapped", Target::Service, Proxied),
    ("unspec-after", Target::Service, Proxied),
    ("mptcp", Target::Service, Proxied),
    ("mptcp-fastopen", Target::Service, Proxied),
    // Connected before: its pod's enrolment has ended that.
    ("tcp-before", Target::Service, ENDED),
    // Its way was ended; the connection waits for another one, as MPTCP does, and gets none.
    ("mptcp-before", Target::Service, Dropped),
    ("tcp", Target::Endpoint, Proxied),
    ("tcp", Target::Kubelet, REFUSED),
    ("udp", Target::Service, REFUSED),
    ("udp-sendto", Target::Service, REFUSED),
    ("udp-before", Target::Service, Says("failed EDESTADDRREQ")),
    ("raw", Target::Service, GUARDED),
    ("raw", Target::Kubelet, GUARDED),
    ("frame", Target::Service, Dropped),
];

/// The same over IPv6, to the API server; what was connected before is told so when it is used. The far side speaks plain TCP, so the connection
/// that could have several ways has one.
pub(super) const BEFORE6: [(&str, Expected); 13] = [
    ("tcp", Proxied),
    ("bound", Proxied),
    ("nonblocking", Proxied),
    ("fastopen", Proxied),
    ("unspec-after", Proxied),
    ("tcp-before", ENDED),
    ("mptcp", Proxied),
    ("mptcp-fastopen", Proxied),
    ("mptcp-before", ENDED),
    ("udp", REFUSED),
    ("udp-sendto", REFUSED),
    ("raw", GUARDED),
    ("frame", Dropped),
];

/// How many were made: a pod may have several.
static MADE: AtomicU16 = AtomicU16::new(0);

/// Sockets in a pod, made and not used yet.
pub(super) struct Before {
    process: Child,
    ways: Vec<Made>,
}

impl Before {
    /// Those of an attack that are wanted.
    pub(super) fn make(attack: &Attack<'_>, is_wanted: impl Fn(&Expected) -> bool) -> Self {
        let wanted = BEFORE.into_iter().filter(|(.., expected)| is_wanted(expected));
        let ways = wanted.map(|(way, target, expected)| (way, attack.address(target).to_owned(), expected));
        Self::in_pod(attack.pod, ways.collect())
    }

    /// These.
    pub(super) fn in_pod(pod: &Pod<'_>, ways: Vec<Made>) -> Self {
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let mut command = pod.runtime_command(&format!("before-{number}"));
        command.args([PROGRAM, "before"]);
        for (way, address, _) in &ways {
            command.args([way, address.as_str()]);
        }
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut made = [0; 5];
        process.stdout.as_mut().unwrap().read_exact(&mut made).unwrap();
        assert_eq!(&made, b"made\n");
        Self { process, ways }
    }

    /// Uses them: each comes to what it may say, and the far side, which is asked then, sees none.
    #[track_caller]
    pub(super) fn check(
        mut self,
        direct: impl FnOnce() -> Vec<String>,
        may_say: impl Fn(&Expected, &str) -> bool,
    ) {
        self.process.stdin.take().unwrap().write_all(b"\n").unwrap();
        let mut said = String::new();
        self.process.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(self.process.wait().unwrap().success(), "{said}");
        let direct = direct();
        let lines: Vec<_> = said.lines().filter_map(|line| line.split_once(' ')).collect();
        assert_eq!(lines.len(), self.ways.len(), "{said}");
        for ((way, address, expected), (_, said)) in self.ways.iter().zip(lines) {
            assert!(may_say(expected, said), "{way} to {address}, made before: {said}");
        }
        assert!(direct.is_empty(), "made before: the far side saw {direct:?}");
    }
}
