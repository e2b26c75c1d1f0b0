//! The calls of bpf(2) that aya 0.14 does not offer: opening a pinned link, replacing its program, detaching it, asking what is
//! attached to a cgroup, and loading and attaching programs that decide in the place of a function of the kernel.

use std::{
    ffi::{CStr, CString},
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use aya_obj::generated::{bpf_func_info, bpf_insn};
use weir_common::kernel::programs;

/// `BPF_PROG_LOAD` of `enum bpf_cmd`, linux/bpf.h.
const BPF_PROG_LOAD: libc::c_long = 5;
/// `BPF_OBJ_PIN` of `enum bpf_cmd`, linux/bpf.h.
const BPF_OBJ_PIN: libc::c_long = 6;
/// `BPF_OBJ_GET` of `enum bpf_cmd`, linux/bpf.h.
const BPF_OBJ_GET: libc::c_long = 7;
/// `BPF_OBJ_GET_INFO_BY_FD` of `enum bpf_cmd`, linux/bpf.h.
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
/// `BPF_PROG_QUERY` of `enum bpf_cmd`, linux/bpf.h.
const BPF_PROG_QUERY: libc::c_long = 16;
/// `BPF_RAW_TRACEPOINT_OPEN` of `enum bpf_cmd`, linux/bpf.h.
const BPF_RAW_TRACEPOINT_OPEN: libc::c_long = 17;
/// `BPF_BTF_LOAD` of `enum bpf_cmd`, linux/bpf.h.
const BPF_BTF_LOAD: libc::c_long = 18;
/// `BPF_LINK_UPDATE` of `enum bpf_cmd`, linux/bpf.h.
const BPF_LINK_UPDATE: libc::c_long = 29;
/// `BPF_LINK_DETACH` of `enum bpf_cmd`, linux/bpf.h.
const BPF_LINK_DETACH: libc::c_long = 34;
/// Most programs of one kind at one cgroup (`BPF_CGROUP_MAX_PROGS`).
const PROGRAMS_MAX: usize = 64;
/// `BPF_LINK_TYPE_TRACING` of `enum bpf_link_type`, linux/bpf.h: links of LSM programs are of this type as well.
const LINK_TYPE_TRACING: u32 = 2;
/// How often a program is loaded that the kernel gave up for a signal (`EAGAIN`).
const LOADS_MAX: usize = 5;

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

/// `struct { pathname, bpf_fd, file_flags }` of `union bpf_attr`.
#[repr(C)]
struct AtPath {
    path: u64,
    fd: RawFd,
    flags: u32,
}

/// Opens a pinned link. aya's own type hides the descriptor that the update needs.
pub(super) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let attributes = AtPath { path: path.as_ptr() as u64, fd: 0, flags: 0 };
    // SAFETY: the attributes are valid for this command, their size is given, and the path outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, &raw const attributes, size_of::<AtPath>()) };
    opened(fd)
}

/// Pins a link. aya's own type has no constructor for a link that it has not made.
pub(super) fn pin(link: &OwnedFd, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let attributes = AtPath { path: path.as_ptr() as u64, fd: link.as_raw_fd(), flags: 0 };
    // SAFETY: the attributes are valid for this command, their size is given, and the path outlives the call.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_PIN, &raw const attributes, size_of::<AtPath>()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What a call has returned that opens a descriptor.
fn opened(result: libc::c_long) -> io::Result<OwnedFd> {
    match RawFd::try_from(result) {
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

/// Loads an object's type information.
pub(super) fn load_types(types: &[u8]) -> io::Result<OwnedFd> {
    /// The struct of `BPF_BTF_LOAD` of `union bpf_attr`, up to the level of the log.
    #[repr(C)]
    struct TypesLoad {
        types: u64,
        log: u64,
        size: u32,
        log_size: u32,
        log_level: u32,
        padding: u32,
    }
    let size = types.len() as u32;
    let attributes =
        TypesLoad { types: types.as_ptr() as u64, log: 0, size, log_size: 0, log_level: 0, padding: 0 };
    // SAFETY: the attributes are valid for this command and their size is given; the types outlive the call, which keeps no pointer.
    opened(unsafe {
        libc::syscall(libc::SYS_bpf, BPF_BTF_LOAD, &raw const attributes, size_of::<TypesLoad>())
    })
}

/// A program to be loaded that decides at a function of the kernel.
pub(super) struct Load<'a> {
    /// Up to 15 bytes of it are seen in the kernel.
    pub(super) name: &'a str,
    /// The number of `enum bpf_prog_type`, linux/bpf.h.
    pub(super) program_type: u32,
    /// The number of `enum bpf_attach_type`, linux/bpf.h.
    pub(super) attach_type: u32,
    /// The function's number in the kernel's type information.
    pub(super) function: u32,
    pub(super) instructions: &'a [bpf_insn],
    /// Which of the object's types its functions have, and the types; none if it has one function.
    pub(super) functions: Option<(&'a [bpf_func_info], &'a OwnedFd)>,
    pub(super) license: &'a CStr,
}

/// Loads a program; `log` takes what the verifier says, and may be empty.
pub(super) fn load(program: &Load<'_>, log: &mut [u8]) -> io::Result<OwnedFd> {
    /// The struct of `BPF_PROG_LOAD` of `union bpf_attr`, up to the function.
    #[repr(C)]
    struct ProgramLoad {
        program_type: u32,
        instruction_count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        interface: u32,
        attach_type: u32,
        types: RawFd,
        function_info_size: u32,
        function_info: u64,
        function_info_count: u32,
        line_info_size: u32,
        line_info: u64,
        line_info_count: u32,
        function: u32,
    }
    let functions = program.functions;
    let mut name = [0; 16];
    let length = program.name.len().min(name.len() - 1);
    name[..length].copy_from_slice(&program.name.as_bytes()[..length]);
    let attributes = ProgramLoad {
        program_type: program.program_type,
        instruction_count: program.instructions.len() as u32,
        instructions: program.instructions.as_ptr() as u64,
        license: program.license.as_ptr() as u64,
        log_level: u32::from(!log.is_empty()),
        log_size: log.len() as u32,
        log: if log.is_empty() { 0 } else { log.as_mut_ptr() as u64 },
        kernel_version: 0,
        flags: 0,
        name,
        interface: 0,
        attach_type: program.attach_type,
        types: functions.map_or(0, |(_, types)| types.as_raw_fd()),
        function_info_size: functions.map_or(0, |_| size_of::<bpf_func_info>() as u32),
        function_info: functions.map_or(0, |(functions, _)| functions.as_ptr() as u64),
        function_info_count: functions.map_or(0, |(functions, _)| functions.len() as u32),
        line_info_size: 0,
        line_info: 0,
        line_info_count: 0,
        function: program.function,
    };
    for _ in 1..LOADS_MAX {
        match load_with(&attributes) {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
            result => return result,
        }
    }
    return load_with(&attributes);

    fn load_with(attributes: &ProgramLoad) -> io::Result<OwnedFd> {
        let (attributes, size) = (std::ptr::from_ref(attributes), size_of::<ProgramLoad>());
        // SAFETY: the attributes are valid for this command and their size is given; what they point to outlives the
        // call, the kernel writes at most the log's length into that, and keeps no pointer.
        opened(unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, attributes, size) })
    }
}

/// Attaches a program to the function that it was loaded for. The link is detached when nobody has it open or pinned.
pub(super) fn attach(program: &OwnedFd) -> io::Result<OwnedFd> {
    /// `struct { name, prog_fd }` of `union bpf_attr`.
    #[repr(C)]
    struct Open {
        name: u64,
        program: RawFd,
        padding: u32,
    }
    let attributes = Open { name: 0, program: program.as_raw_fd(), padding: 0 };
    // SAFETY: the attributes are valid for this command and their size is given; the call keeps no pointer.
    opened(unsafe {
        libc::syscall(libc::SYS_bpf, BPF_RAW_TRACEPOINT_OPEN, &raw const attributes, size_of::<Open>())
    })
}

/// What a link attaches to which function of the kernel, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AtFunction {
    /// The program's id.
    pub(super) program: u32,
    /// The number of `enum bpf_attach_type`, linux/bpf.h.
    pub(super) attach_type: u32,
    /// The function's number in the kernel's type information.
    pub(super) function: u32,
}

/// What a link attaches; none if it is no link to a function of the kernel.
pub(super) fn at_function(link: &OwnedFd) -> io::Result<Option<AtFunction>> {
    /// `struct bpf_link_info`, linux/bpf.h, of a link to a function.
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        link_type: u32,
        id: u32,
        program: u32,
        padding: u32,
        attach_type: u32,
        object: u32,
        function: u32,
        end: u32,
    }
    let mut info = Info::default();
    // SAFETY: every field is a number, and any of them is valid.
    unsafe { read_info(link, &mut info) }?;
    let Info { program, attach_type, function, .. } = info;
    Ok((info.link_type == LINK_TYPE_TRACING).then_some(AtFunction { program, attach_type, function }))
}

/// A program's id, and the tag that its instructions have.
pub(super) fn id_and_tag(program: &OwnedFd) -> io::Result<(u32, u64)> {
    /// How `struct bpf_prog_info`, linux/bpf.h, begins.
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        program_type: u32,
        id: u32,
        tag: [u8; 8],
    }
    let mut info = Info::default();
    // SAFETY: every field is a number, and any of them is valid.
    unsafe { read_info(program, &mut info) }?;
    Ok((info.id, u64::from_be_bytes(info.tag)))
}

/// Asks the kernel about an object.
///
/// # Safety
/// Any bytes must be a valid `T`.
unsafe fn read_info<T>(object: &OwnedFd, info: &mut T) -> io::Result<()> {
    /// `struct { bpf_fd, info_len, info }` of `union bpf_attr`.
    #[repr(C)]
    struct Ask {
        object: RawFd,
        length: u32,
        info: u64,
    }
    let info = std::ptr::from_mut(info);
    let mut ask = Ask { object: object.as_raw_fd(), length: size_of::<T>() as u32, info: info as u64 };
    // SAFETY: the attributes are valid for this command and their size is given; the kernel writes at most `length` bytes, for
    // which there is room, and keeps no pointer.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET_INFO_BY_FD, &raw mut ask, size_of::<Ask>()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
