//! What a kernel with BPF LSM adds: enrolled pods make no packet sockets and do not call bpf(2), whatever privilege they have.
//! Elsewhere the guards at interfaces stand alone; nothing here is relied upon. Never a connect hook: TCP fast open passes it by.

use weir_common::kernel::{Class, NoticeKind};

use crate::{class, socket::NO_ENDPOINT};

/// `EPERM`.
const EPERM: i32 = 1;
/// `AF_PACKET`.
const PACKET: u32 = 17;
/// `AF_XDP`: frames as well, past everything.
const XDP: u32 = 44;

/// `socket_create`.
#[inline(always)]
pub(crate) fn socket_created(family: u32) -> i32 {
    if family == PACKET || family == XDP {
        refuse_enrolled(NoticeKind::PacketSocketRefused, family)
    } else {
        0
    }
}

/// `bpf`.
#[inline(always)]
pub(crate) fn bpf_called(command: u32) -> i32 {
    refuse_enrolled(NoticeKind::BpfRefused, command)
}

#[inline(always)]
fn refuse_enrolled(kind: NoticeKind, what: u32) -> i32 {
    let cgroup = class::own();
    let nearest = class::nearest(cgroup);
    if nearest.entry.class != Class::Enrolled as u32 {
        return 0;
    }
    // These hooks know no socket yet, and so no network namespace.
    class::report(kind, what, &class::record(NO_ENDPOINT, 0, (cgroup, nearest.id), 0, class::now()));
    -EPERM
}
