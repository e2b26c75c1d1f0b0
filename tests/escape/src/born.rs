//! A process that is cloned straight into its cgroup, as a runtime does it: it was never anywhere else, so nothing that
//! happens on a move can have prepared for it.

use std::{fs::File, os::fd::AsRawFd as _};

use nix::{
    sched::{CloneFlags, setns},
    sys::{prctl::set_pdeathsig, signal::Signal, wait::waitpid},
    unistd::Pid,
};

use crate::sockets::Place;

/// `CLONE_INTO_CGROUP`, linux/sched.h.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// `struct clone_args` of the version that has a cgroup, linux/sched.h.
#[repr(C)]
#[derive(Default)]
struct CloneArguments {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

const _: () = assert!(size_of::<CloneArguments>() == 88, "CLONE_ARGS_SIZE_VER2");

/// Enters the network namespace and clones this process into the cgroup of `place`. Returns whether this is the clone,
/// which has nothing of `place` left to enter; the other one returns once the clone has ended.
pub(crate) fn clone_into(place: &mut Place) -> nix::Result<bool> {
    if let Some(pid) = place.netns.take() {
        let file = File::open(format!("/proc/{pid}/ns/net")).map_err(|_| nix::Error::ESRCH)?;
        setns(&file, CloneFlags::CLONE_NEWNET)?;
    }
    let cgroup = place.cgroup.take().ok_or(nix::Error::EINVAL)?;
    let cgroup = File::open(cgroup).map_err(|_| nix::Error::ENOENT)?;
    let arguments = CloneArguments {
        flags: CLONE_INTO_CGROUP,
        exit_signal: libc::SIGCHLD as u64,
        cgroup: cgroup.as_raw_fd() as u64,
        ..CloneArguments::default()
    };
    // SAFETY: shares no memory, as fork(2); this process has one thread, so that the clone lacks none that holds a lock.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of_val(&arguments)) };
    match nix::Error::result(pid)? {
        // Who ends the one ends the other.
        0 => set_pdeathsig(Signal::SIGKILL).map(|()| true),
        pid => waitpid(Pid::from_raw(pid as i32), None).map(|_| false),
    }
}
