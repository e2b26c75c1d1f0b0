//! Somebody else's program at a cgroup, which rewrites where connections go: of the kind of Weir's own, attached beside it. It is
//! loaded by bpf(2) itself, and goes with this process.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::SocketAddrV4,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
};

use crate::{Outcome, sockets::ENDED};

/// `BPF_PROG_LOAD` of `enum bpf_cmd`, linux/bpf.h.
const BPF_PROG_LOAD: libc::c_long = 5;
/// `BPF_LINK_CREATE` of `enum bpf_cmd`. Links to cgroups are as with `BPF_F_ALLOW_MULTI`.
const BPF_LINK_CREATE: libc::c_long = 28;
/// `BPF_PROG_TYPE_CGROUP_SOCK_ADDR` of `enum bpf_prog_type`.
const SOCK_ADDR: u32 = 18;
/// `BPF_CGROUP_INET4_CONNECT` of `enum bpf_attach_type`.
const CONNECT4: u32 = 10;
/// Where `struct bpf_sock_addr` has the address and the port.
const ADDRESS: u64 = 4;
const PORT: u64 = 24;

/// Sends what connects to `from` to `to`, until the standard input ends; says `attached` when it does.
pub(crate) fn run(cgroup: &str, from: &str, to: &str) -> Outcome {
    let parsed = |text: &str| text.parse::<SocketAddrV4>().map_err(|_| nix::Error::EDESTADDRREQ);
    let code = program(parsed(from)?, parsed(to)?);
    let program = load(&code)?;
    let folder = File::open(cgroup).map_err(|_| nix::Error::ENOENT)?;
    let link = [program.as_raw_fd().cast_unsigned(), folder.as_raw_fd().cast_unsigned(), CONNECT4, 0];
    let _attached = bpf(BPF_LINK_CREATE, &link)?;
    let mut out = std::io::stdout();
    let said = out.write_all(b"attached\n").and_then(|()| out.flush());
    said.and_then(|()| std::io::stdin().read_to_end(&mut Vec::new())).map_err(|_| nix::Error::EIO)?;
    Ok(ENDED)
}

/// The instructions, as linux/bpf.h has them: code, registers (destination low), offset, immediate.
fn program(from: SocketAddrV4, to: SocketAddrV4) -> Vec<u64> {
    /// `r2 = *(u32 *)(r1 + offset)`, and the other way about.
    const LOAD: u64 = 0x1261;
    const STORE: u64 = 0x2163;
    /// `if w2 != immediate goto +offset`.
    const UNLESS: u64 = 0x0256;
    /// `w2 = immediate`, `r0 = immediate`, `exit`.
    const SET: u64 = 0x02b4;
    const RESULT: u64 = 0x00b7;
    const EXIT: u64 = 0x95;
    let instruction =
        |code: u64, offset: u64, immediate: u32| code | offset << 16 | u64::from(immediate) << 32;
    // As they lie in memory.
    let address = |end: &SocketAddrV4| u32::from_ne_bytes(end.ip().octets());
    let port = |end: &SocketAddrV4| u32::from(end.port().to_be());
    vec![
        instruction(LOAD, ADDRESS, 0),
        instruction(UNLESS, 6, address(&from)),
        instruction(LOAD, PORT, 0),
        instruction(UNLESS, 4, port(&from)),
        instruction(SET, 0, address(&to)),
        instruction(STORE, ADDRESS, 0),
        instruction(SET, 0, port(&to)),
        instruction(STORE, PORT, 0),
        instruction(RESULT, 0, 1),
        EXIT,
    ]
}

fn load(code: &[u64]) -> nix::Result<OwnedFd> {
    /// The first fields of `struct { prog_type, … }` of `union bpf_attr`.
    #[repr(C)]
    #[derive(Default)]
    struct Load {
        program_type: u32,
        instructions: u32,
        code: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        interface: u32,
        expected_attach_type: u32,
    }
    let license = c"GPL";
    let load = Load {
        program_type: SOCK_ADDR,
        instructions: code.len() as u32,
        code: code.as_ptr() as u64,
        license: license.as_ptr() as u64,
        expected_attach_type: CONNECT4,
        ..Load::default()
    };
    bpf(BPF_PROG_LOAD, &load)
}

fn bpf<T>(command: libc::c_long, attributes: &T) -> nix::Result<OwnedFd> {
    // SAFETY: the attributes are valid for this command, their size is given, and what they point to lives as long as the call.
    let descriptor =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    let descriptor = nix::Error::result(descriptor)?;
    // SAFETY: the kernel has just opened this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(RawFd::try_from(descriptor).map_err(|_| nix::Error::EBADF)?) })
}
