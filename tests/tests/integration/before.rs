//! Sockets that are there before the kernel programs are: nothing is noted of them, neither whose they are nor in which network.

use std::{
    io::{Read as _, Write as _},
    process::{Child, Stdio},
};

use super::{
    escape::{
        Attack,
        Expected::{self, Dropped, Proxied, Says},
        GUARDED, REFUSED, Target,
    },
    watch::PROGRAM,
};

/// A way, whom it goes to, and what may come of it.
type Made = (&'static str, Target, Expected);

/// What may come of them while an agent serves the pod.
const BEFORE: [Made; 14] = [
    ("tcp", Target::Service, Proxied),
    ("bound", Target::Service, Proxied),
    ("nonblocking", Target::Service, Proxied),
    ("fastopen", Target::Service, Proxied),
    ("mapped", Target::Service, Proxied),
    ("unspec-after", Target::Service, Proxied),
    ("tcp", Target::Endpoint, Proxied),
    ("tcp", Target::Kubelet, REFUSED),
    ("udp", Target::Service, REFUSED),
    ("udp-sendto", Target::Service, REFUSED),
    // Connected before as well: its pod's enrolment has ended that.
    ("udp-before", Target::Service, Says("failed EDESTADDRREQ")),
    ("raw", Target::Service, GUARDED),
    ("raw", Target::Kubelet, GUARDED),
    ("frame", Target::Service, Dropped),
];

/// Sockets in a pod, made and not used yet.
pub(super) struct Before {
    process: Child,
    ways: Vec<Made>,
}

impl Before {
    /// Those whose expectation is wanted.
    pub(super) fn make(attack: &Attack<'_>, is_wanted: impl Fn(&Expected) -> bool) -> Self {
        let ways: Vec<_> = BEFORE.into_iter().filter(|(.., expected)| is_wanted(expected)).collect();
        let mut command = attack.pod.runtime_command("before");
        command.args([PROGRAM, "before"]);
        for (way, target, _) in &ways {
            command.args([way, attack.address(*target)]);
        }
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut made = [0; 5];
        process.stdout.as_mut().unwrap().read_exact(&mut made).unwrap();
        assert_eq!(&made, b"made\n");
        Self { process, ways }
    }

    /// Uses them: each comes to what it may say, and the far side sees none.
    #[track_caller]
    pub(super) fn check(mut self, attack: &Attack<'_>, may_say: impl Fn(&Expected, &str) -> bool) {
        self.process.stdin.take().unwrap().write_all(b"\n").unwrap();
        let mut said = String::new();
        self.process.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(self.process.wait().unwrap().success(), "{said}");
        let direct = attack.direct();
        let lines: Vec<_> = said.lines().filter_map(|line| line.split_once(' ')).collect();
        assert_eq!(lines.len(), self.ways.len(), "{said}");
        for ((way, target, expected), (_, said)) in self.ways.iter().zip(lines) {
            assert!(may_say(expected, said), "{way} to the {target:?}, made before: {said}");
        }
        assert!(direct.is_empty(), "made before: the far side saw {direct:?}");
    }
}
