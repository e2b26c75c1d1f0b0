//! The calls of bpf(2) that aya 0.14 does not offer: opening a pinned link, replacing its program, detaching it, and asking what
//! is attached to a cgroup.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use weir_common::kernel::programs;

/// `BPF_OBJ_GET` of `enum bpf_cmd`, linux/bpf.h.
const BPF_OBJ_GET: libc::c_long = 7;
/// `BPF_PROG_QUERY` of `enum bpf_cmd`, linux/bpf.h.
const BPF_PROG_QUERY: libc::c_long = 16;
/// `BPF_LINK_UPDATE` of `enum bpf_cmd`, linux/bpf.h.
const BPF_LINK_UPDATE: libc::c_long = 29;
/// `BPF_LINK_DETACH` of `enum bpf_cmd`, linux/bpf.h.
const BPF_LINK_DETACH: libc::c_long = 34;
/// Most programs of one kind at one cgroup (`BPF_CGROUP_MAX_PROGS`).
const PROGRAMS_MAX: usize = 64;

/// The number of a program's kind in `enum bpf_attach_type`, linux/bpf.h; 0 where it has none of a cgroup.
pub(super) fn attach_kind(program: &str) -> u32 {
    match program {
        programs::INGRESS => 0,
        programs::EGRESS => 1,
        programs::SOCK_CREATE => 2,
        programs::SOCK_OPS => 3,
        programs::BIND4 => 8,
        programs::BIND6 => 9,
        programs::CONNECT4 => 10,
        programs::CONNECT6 => 11,
        programs::SENDMSG4 => 14,
        programs::SENDMSG6 => 15,
        programs::GETPEERNAME4 => 29,
        programs::GETPEERNAME6 => 30,
        _ => 0,
    }
}

/// The ids of the programs that are attached to a cgroup itself; `kind` is a number of `enum bpf_attach_type`,
/// linux/bpf.h.
pub(super) fn attached_programs(cgroup: &impl AsRawFd, kind: u32) -> io::Result<Vec<u32>> {
    /// `struct query` of `union bpf_attr`, up to the count of programs.
    #[repr(C)]
    struct Query {
        target: RawFd,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        program_ids: u64,
        count: u32,
        padding: u32,
    }
    let mut ids = [0_u32; PROGRAMS_MAX];
    let mut query = Query {
        target: cgroup.as_raw_fd(),
        attach_type: kind,
        query_flags: 0,
        attach_flags: 0,
        program_ids: ids.as_mut_ptr() as u64,
        count: PROGRAMS_MAX as u32,
        padding: 0,
    };
    // SAFETY: the attributes are valid for this command and their size is given; the kernel writes at most `count` ids,
    // for which there is room, and keeps no pointer.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_QUERY, &raw mut query, size_of::<Query>()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(ids.into_iter().take(query.count as usize).collect())
}

/// Opens a pinned link. aya's own type hides the descriptor that the update needs.
pub(super) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    /// `struct { pathname, bpf_fd, file_flags }` of `union bpf_attr`.
    #[repr(C)]
    struct ObjectGet {
        path: u64,
        fd: u32,
        flags: u32,
    }
    let path = CString::new(path.as_os_str().as_bytes())?;
    let attributes = ObjectGet { path: path.as_ptr() as u64, fd: 0, flags: 0 };
    // SAFETY: the attributes are valid for this command, their size is given, and the path outlives the call.
    let fd =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, &raw const attributes, size_of::<ObjectGet>()) };
    match RawFd::try_from(fd) {
        // SAFETY: the kernel has just opened this descriptor for us, and nobody else knows it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Replaces the program of a link; connections meet the old one or the new one, never none.
pub(super) fn link_update(link: &OwnedFd, program: BorrowedFd<'_>) -> io::Result<()> {
    /// `struct { link_fd, new_prog_fd, flags, old_prog_fd }` of `union bpf_attr`.
    #[repr(C)]
    struct LinkUpdate {
        link: RawFd,
        program: RawFd,
        flags: u32,
        old_program: u32,
    }
    let attributes =
        LinkUpdate { link: link.as_raw_fd(), program: program.as_raw_fd(), flags: 0, old_program: 0 };
    // SAFETY: the attributes are valid for this command and their size is given; the call keeps no pointer.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_LINK_UPDATE, &raw const attributes, size_of::<LinkUpdate>())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Detaches a link now, whoever else holds it: what is unpinned the kernel detaches a little later.
pub(super) fn link_detach(link: &OwnedFd) -> io::Result<()> {
    let link: RawFd = link.as_raw_fd();
    // SAFETY: `link_fd` alone is the attributes of this command, and its size is given; the call keeps no pointer.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_LINK_DETACH, &raw const link, size_of::<RawFd>()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
