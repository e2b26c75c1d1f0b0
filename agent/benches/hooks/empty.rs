//! A program that does nothing, of the kind of one that does something: what the kernel takes for any program. Loaded by
//! bpf(2) itself, for aya takes whole object files only.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
    path::Path,
    time::Duration,
};

use weir_agent::interception::usage::ProgramUsage;
use weir_common::kernel::programs;

/// `BPF_PROG_LOAD` of `enum bpf_cmd`, linux/bpf.h.
const BPF_PROG_LOAD: libc::c_long = 5;
/// `BPF_LINK_CREATE` of `enum bpf_cmd`, linux/bpf.h.
const BPF_LINK_CREATE: libc::c_long = 28;
/// `r0 = 1; exit`: let it go on.
const PROCEED: [u64; 2] = [0x0000_0001_0000_00b7, 0x95];

/// An empty program at a cgroup; it goes with this value.
pub(crate) struct Empty {
    name: &'static str,
    program: OwnedFd,
    _link: OwnedFd,
}

impl Empty {
    /// Attaches one of the kind of `name`.
    pub(crate) fn at(cgroup: &Path, name: &'static str) -> io::Result<Self> {
        let program = load(name)?;
        let folder = File::open(cgroup)?;
        let attach =
            [program.as_raw_fd().cast_unsigned(), folder.as_raw_fd().cast_unsigned(), kinds(name).1, 0];
        let link = bpf(BPF_LINK_CREATE, &attach)?;
        Ok(Self { name, program, _link: link })
    }

    /// What it has cost, by the kernel's count.
    pub(crate) fn usage(&self) -> io::Result<ProgramUsage> {
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", self.program.as_raw_fd()))?;
        let number = |name: &str| {
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
            value.ok_or_else(|| io::Error::other(format!("the kernel does not say {name}")))
        };
        Ok(ProgramUsage {
            name: self.name,
            runs: number("run_cnt:")?,
            time: Duration::from_nanos(number("run_time_ns:")?),
        })
    }
}

/// Number in `enum bpf_prog_type` and in `enum bpf_attach_type`, linux/bpf.h.
fn kinds(name: &str) -> (u32, u32) {
    match name {
        programs::INGRESS => (8, 0),
        programs::EGRESS => (8, 1),
        programs::SOCK_CREATE => (9, 2),
        programs::SOCK_OPS => (13, 3),
        programs::CONNECT6 => (18, 11),
        _ => (18, 10),
    }
}

fn load(name: &str) -> io::Result<OwnedFd> {
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
    let (program_type, expected_attach_type) = kinds(name);
    let license = c"GPL";
    bpf(
        BPF_PROG_LOAD,
        &Load {
            program_type,
            instructions: 2,
            code: PROCEED.as_ptr() as u64,
            license: license.as_ptr() as u64,
            expected_attach_type,
            ..Load::default()
        },
    )
}

fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the attributes are valid for this command, their size is given, and what they point to is static.
    let descriptor =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    match RawFd::try_from(descriptor) {
        // SAFETY: the kernel has just opened this descriptor for us, and nobody else knows it.
        Ok(descriptor) if descriptor >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(descriptor) }),
        _ => Err(io::Error::last_os_error()),
    }
}
