//! What a kernel adds that lets programs decide in its security hooks, as BPF LSM or before the functions that ask the security
//! modules (both give the same arguments, and take 0 for yes): pods that are enrolled, or that nobody has said anything of yet, make no packet sockets, and
//! enrolled ones do not call bpf(2), whatever privilege they have. Elsewhere the guards at interfaces stand alone, and a pod that
//! starts while no agent runs has none yet. Never a connect hook: TCP fast open passes it by.

use weir_common::{
    kernel::{Class, NoticeKind},
    verdict::packet_sockets_pass,
};

use crate::{
    class::{self, Classified},
    socket::NO_ENDPOINT,
};

/// `EPERM`.
const EPERM: i32 = 1;
/// `AF_PACKET`.
const PACKET: u32 = 17;
/// `AF_XDP`: frames as well, past everything.
const XDP: u32 = 44;

/// `socket_create`.
#[inline(always)]
pub(crate) fn socket_created(family: u32) -> i32 {
    if family != PACKET && family != XDP {
        return 0;
    }
    let cgroup = class::own();
    let nearest = class::nearest(cgroup);
    // A number that no class has is a class of a newer agent: unknown.
    let class = Class::from_number(nearest.entry.class);
    if (class.is_some() || nearest.id == 0) && packet_sockets_pass(class) {
        return 0;
    }
    refuse(NoticeKind::PacketSocketRefused, family, cgroup, &nearest)
}

/// `bpf`. Who is not known yet may: agents are among them, of Weir and of network plug-ins.
#[inline(always)]
pub(crate) fn bpf_called(command: u32) -> i32 {
    let cgroup = class::own();
    let nearest = class::nearest(cgroup);
    if nearest.entry.class != Class::Enrolled as u32 {
        return 0;
    }
    refuse(NoticeKind::BpfRefused, command, cgroup, &nearest)
}

#[inline(always)]
fn refuse(kind: NoticeKind, what: u32, cgroup: u64, nearest: &Classified) -> i32 {
    // These hooks know no socket yet, and so no network namespace.
    class::report(kind, what, &class::record(NO_ENDPOINT, 0, (cgroup, nearest.id), 0, class::now()));
    -EPERM
}
