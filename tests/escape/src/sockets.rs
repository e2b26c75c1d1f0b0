//! Ways through ordinary sockets.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, TcpStream},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
    sync::Arc,
    thread,
    time::Duration,
};

use nix::{
    cmsg_space,
    sched::{CloneFlags, setns, unshare},
    sys::{
        socket::{
            ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, bind, connect, getsockopt,
            recvmsg, sendmsg, sendto, setsockopt,
            sockopt::{Mark, ReceiveTimeout, ReuseAddr, ReusePort, SendTimeout, SocketError},
        },
        time::{TimeVal, TimeValLike as _},
    },
};

use crate::{Outcome, PATIENCE, TIMEOUT, again, before::Gate};

/// `TCP_FASTOPEN_CONNECT`, linux/tcp.h.
const TCP_FASTOPEN_CONNECT: libc::c_int = 30;
/// Connections at once: more than the agent serves of one pod.
const CONCURRENT: usize = 2000;
/// Most bytes that are passed on at once.
const RELAY_BYTES: usize = 16 * 1024;
/// How many of them wait at a time.
const THREADS: usize = 50;
/// How long a thief waits for somebody to come.
const HEARD_MS: u16 = 100;

/// What comes of a connection that was used.
pub(crate) const ENDED: &str = "ended";

/// Where the process goes before it tries.
#[derive(Debug, Default)]
pub(crate) struct Place {
    /// A cgroup v2 folder.
    pub(crate) cgroup: Option<String>,
    /// Process whose network namespace is entered.
    pub(crate) netns: Option<String>,
    /// The cgroup is entered only after the socket is made.
    pub(crate) late: bool,
    /// The cgroup v2 folder that is entered once the socket is made, out of the one before.
    pub(crate) leave: Option<String>,
    /// What is connected then carries standard input and output, so that more can be seen of it than that it is connected.
    pub(crate) relay: bool,
    /// What is made waits here until it is used.
    pub(crate) gate: Option<Arc<Gate>>,
    /// The machine that takes packets out of their wrapping.
    pub(crate) via: Option<Ipv4Addr>,
    /// The machine that a routing header sends packets to first.
    pub(crate) station: Option<Ipv6Addr>,
    /// Whom the packet in the wrapping is from; else this machine.
    pub(crate) from: Option<Ipv4Addr>,
    /// How long an agent may take for a connection; else [`PATIENCE`].
    pub(crate) patience: Option<Duration>,
}

impl Place {
    /// Enters what is to be entered before the socket is made.
    pub(crate) fn enter(&self) -> nix::Result<()> {
        if let Some(pid) = &self.netns {
            let file = File::open(format!("/proc/{pid}/ns/net")).map_err(|_| nix::Error::ESRCH)?;
            setns(&file, CloneFlags::CLONE_NEWNET)?;
        }
        if self.late { Ok(()) } else { self.enter_cgroup() }
    }

    /// Says that the socket is made.
    pub(crate) fn made(&self) {
        if let Some(gate) = &self.gate {
            gate.wait();
        }
    }

    /// What goes with a connection at once, where that is possible.
    fn first_bytes(&self) -> nix::Result<Vec<u8>> {
        if !self.relay {
            return Ok(b"x".to_vec());
        }
        let mut bytes = vec![0; RELAY_BYTES];
        let length = nix::unistd::read(std::io::stdin(), &mut bytes)?;
        bytes.truncate(length);
        Ok(bytes)
    }

    /// What comes of a connection: with `relay` it is used first, until the other side ends it.
    pub(crate) fn connected(&self, stream: TcpStream) -> Outcome {
        if !self.relay {
            return Ok("connected");
        }
        let failed = |error: std::io::Error| nix::Error::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
        stream.set_nonblocking(false).map_err(failed)?;
        let mut out = std::io::stdout();
        out.write_all(b"connected\n").and_then(|()| out.flush()).map_err(failed)?;
        let mut up = stream.try_clone().map_err(failed)?;
        thread::spawn(move || {
            let _ = std::io::copy(&mut std::io::stdin(), &mut up);
            let _ = up.shutdown(std::net::Shutdown::Write);
        });
        let mut from = &stream;
        let mut bytes = vec![0; RELAY_BYTES];
        loop {
            let length = from.read(&mut bytes).map_err(failed)?;
            if length == 0 {
                return Ok(ENDED);
            }
            out.write_all(&bytes[..length]).and_then(|()| out.flush()).map_err(failed)?;
        }
    }

    fn enter_cgroup(&self) -> nix::Result<()> {
        self.cgroup.as_deref().map_or(Ok(()), enter)
    }

    /// Goes elsewhere, with the socket that is made.
    pub(crate) fn leave(&self) -> nix::Result<()> {
        self.leave.as_deref().map_or(Ok(()), enter)
    }
}

fn enter(cgroup: &str) -> nix::Result<()> {
    let opened = File::options().write(true).open(format!("{cgroup}/cgroup.procs"));
    opened.and_then(|mut procs| procs.write_all(b"0")).map_err(|_| nix::Error::EACCES)
}

pub(crate) fn attempt(way: &str, target: SocketAddrV4, place: &Place) -> Outcome {
    place.enter()?;
    let to = SocketAddr::V4(target);
    match way {
        "nested" => {
            unshare(CloneFlags::CLONE_NEWNET)?;
            return tcp(to);
        }
        "nested-user" => {
            unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET)?;
            return tcp(to);
        }
        "passed" => return passed(to, place),
        "concurrent" => return concurrent(to, place),
        "steal" => return steal(to),
        _ => {}
    }
    let (family, kind, protocol) = match way {
        "mptcp" | "mptcp-fastopen" | "mptcp-before" => {
            (libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_MPTCP)
        }
        "sctp" => (libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_SCTP),
        "dccp" => (libc::AF_INET, libc::SOCK_DCCP, libc::IPPROTO_DCCP),
        "mapped" => (libc::AF_INET6, libc::SOCK_STREAM, 0),
        "udp-mapped-sendto" | "udp6-connect4" | "udp6-sendto4" => (libc::AF_INET6, libc::SOCK_DGRAM, 0),
        "udplite" => (libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_UDPLITE),
        _ if way.starts_with("udp") => (libc::AF_INET, libc::SOCK_DGRAM, 0),
        _ => (libc::AF_INET, libc::SOCK_STREAM, 0),
    };
    let socket = new_socket(family, kind, protocol)?;
    if place.late {
        place.enter_cgroup()?;
    }
    place.leave()?;
    if way.starts_with("udp6") {
        place.made();
        return again::other_family(way, &socket, target);
    }
    let to = if family == libc::AF_INET6 {
        SocketAddr::new(target.ip().to_ipv6_mapped().into(), target.port())
    } else {
        to
    };
    through(way, socket, to, place)
}

/// What is done with a socket that is there.
pub(crate) fn through(way: &str, socket: OwnedFd, to: SocketAddr, place: &Place) -> Outcome {
    if way.ends_with("-before") {
        connect(socket.as_raw_fd(), &SockaddrStorage::from(to))?;
    }
    place.made();
    match way {
        "unspec" | "unspec-after" | "unspec-pending" | "unspec-accepted" => {
            return again::stream(way, socket, to, place);
        }
        "udp-unspec" | "udp-unspec-sendto" | "udp-unspec-address" | "udp-connected-sendto" => {
            return again::datagram(way, &socket, to);
        }
        _ => {}
    }
    let first = if way.contains("fastopen") { place.first_bytes()? } else { Vec::new() };
    if way == "ask" {
        return ask(&socket, &SockaddrStorage::from(to), place.patience.unwrap_or(PATIENCE));
    }
    match connect_by(way, &socket, to, &first)? {
        "connected" => place.connected(socket.into()),
        word => Ok(word),
    }
}

/// `first` goes with the connection where it takes data along.
fn connect_by(way: &str, socket: &OwnedFd, to: SocketAddr, first: &[u8]) -> Outcome {
    let (fd, address) = (socket.as_raw_fd(), SockaddrStorage::from(to));
    match way {
        "bound" if to.is_ipv6() => {
            bind(fd, &SockaddrStorage::from(SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0))))?;
        }
        "bound" => bind(fd, &SockaddrStorage::from(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))))?,
        "mark" => setsockopt(socket, Mark, &77)?,
        "device" => set_option(fd, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, b"eth0\0")?,
        "fastopen-connect" => {
            set_option(fd, libc::IPPROTO_TCP, TCP_FASTOPEN_CONNECT, &1_i32.to_ne_bytes())?;
            connect_timed(socket, &address)?;
            sendto(fd, first, &address, MsgFlags::empty())?;
            return Ok("connected");
        }
        "fastopen" | "mptcp-fastopen" => {
            timeout(socket)?;
            let flags = MsgFlags::from_bits_retain(libc::MSG_FASTOPEN) | MsgFlags::MSG_NOSIGNAL;
            sendto(fd, first, &address, flags)?;
            return Ok("connected");
        }
        "udp-sendto" | "udp-mapped-sendto" => {
            sendto(fd, b"x", &address, MsgFlags::empty())?;
            return Ok("sent");
        }
        "udp" | "udplite" => {
            connect(fd, &address)?;
            nix::unistd::write(socket, b"x")?;
            return Ok("sent");
        }
        // Connected when it was made.
        "udp-before" | "tcp-before" | "mptcp-before" => {
            nix::unistd::write(socket, b"x")?;
            return Ok("sent");
        }
        "nonblocking" => return non_blocking(socket, &address),
        "io-uring" => return io_uring(socket, &address),
        _ => {}
    }
    connect_timed(socket, &address)?;
    Ok("connected")
}

/// Connects and says something: whether who has the connection says anything to that, or closes it.
fn ask(socket: &OwnedFd, address: &SockaddrStorage, patience: Duration) -> Outcome {
    connect_timed(socket, address)?;
    setsockopt(socket, ReceiveTimeout, &TimeVal::milliseconds(patience.as_millis() as i64))?;
    let said = nix::unistd::write(socket, b"GET / HTTP/1.1\r\n\r\n");
    match said.and_then(|_| nix::unistd::read(socket, &mut [0; 1])) {
        Ok(0) | Err(nix::Error::ECONNRESET | nix::Error::EPIPE) => Ok("closed"),
        Ok(_) => Ok("answered"),
        Err(errno) => Err(errno),
    }
}

/// Asks an agent whether it is alive, where its successor would ask for its listeners.
pub(crate) fn ask_agent(path: &str) -> Outcome {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, socket};
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    setsockopt(&socket, ReceiveTimeout, &TimeVal::milliseconds(TIMEOUT.as_millis() as i64))?;
    let said = sendmsg::<()>(
        socket.as_raw_fd(),
        &[std::io::IoSlice::new(br#""ping""#)],
        &[],
        MsgFlags::MSG_NOSIGNAL,
        None,
    );
    match said.and_then(|_| nix::unistd::read(&socket, &mut [0; 8192])) {
        Ok(0) | Err(nix::Error::ECONNRESET | nix::Error::EPIPE) => Ok("closed"),
        Ok(_) => Ok("answered"),
        Err(errno) => Err(errno),
    }
}

fn tcp(to: SocketAddr) -> Outcome {
    let socket = new_socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    connect_timed(&socket, &SockaddrStorage::from(to))?;
    Ok("connected")
}

fn timeout(socket: &OwnedFd) -> nix::Result<()> {
    setsockopt(socket, SendTimeout, &TimeVal::milliseconds(TIMEOUT.as_millis() as i64))
}

pub(crate) fn connect_timed(socket: &OwnedFd, address: &SockaddrStorage) -> nix::Result<()> {
    timeout(socket)?;
    connect(socket.as_raw_fd(), address)
}

/// The kernel connects on behalf of a ring, without a system call of this thread for it.
fn io_uring(socket: &OwnedFd, address: &SockaddrStorage) -> Outcome {
    use io_uring::{IoUring, opcode, types};
    use nix::sys::socket::SockaddrLike as _;
    let failed = |error: std::io::Error| nix::Error::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
    let mut ring = IoUring::new(4).map_err(failed)?;
    let connect =
        opcode::Connect::new(types::Fd(socket.as_raw_fd()), address.as_ptr(), address.len()).build();
    // SAFETY: socket and address live until the ring's only entry is complete, which is waited for below.
    unsafe { ring.submission().push(&connect) }.map_err(|_| nix::Error::EBUSY)?;
    ring.submit_and_wait(1).map_err(failed)?;
    match ring.completion().next().map(|done| done.result()) {
        Some(0) => Ok("connected"),
        Some(result) => Err(nix::Error::from_raw(-result)),
        None => Err(nix::Error::EIO),
    }
}

pub(crate) fn non_blocking(socket: &OwnedFd, address: &SockaddrStorage) -> Outcome {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd as _;
    nix::fcntl::fcntl(socket, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))?;
    match connect(socket.as_raw_fd(), address) {
        Err(nix::Error::EINPROGRESS) => {}
        result => return result.map(|()| "connected"),
    }
    let mut waiting = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
    let limit = PollTimeout::try_from(TIMEOUT).unwrap_or(PollTimeout::MAX);
    if poll(&mut waiting, limit)? == 0 {
        return Err(nix::Error::ETIMEDOUT);
    }
    match getsockopt(socket, SocketError)? {
        0 => Ok("connected"),
        errno => Err(nix::Error::from_raw(errno)),
    }
}

/// A socket that a process outside the cgroup has made comes over a unix socket; it is connected from inside.
fn passed(to: SocketAddr, place: &Place) -> Outcome {
    let outside = new_socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    let (ours, theirs) = nix::sys::socket::socketpair(
        nix::sys::socket::AddressFamily::Unix,
        nix::sys::socket::SockType::Datagram,
        None,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
    )?;
    let descriptors = [outside.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&descriptors)];
    sendmsg::<()>(ours.as_raw_fd(), &[std::io::IoSlice::new(b"x")], &rights, MsgFlags::empty(), None)?;
    drop(outside);
    place.enter_cgroup()?;
    let (mut byte, mut space) = ([0], cmsg_space!(RawFd));
    let mut parts = [std::io::IoSliceMut::new(&mut byte)];
    let received =
        recvmsg::<()>(theirs.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for control in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control
            && let Some(descriptor) = descriptors.first()
        {
            // SAFETY: the kernel has just installed this descriptor for us, and nobody else knows it.
            let socket = unsafe { OwnedFd::from_raw_fd(*descriptor) };
            connect_timed(&socket, &SockaddrStorage::from(to))?;
            return place.connected(socket.into());
        }
    }
    Err(nix::Error::EBADF)
}

/// Many at once: `connected` if all were, over the first of them. The agent closes those that are too many for one pod.
fn concurrent(to: SocketAddr, place: &Place) -> Outcome {
    let failed = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::TimedOut => nix::Error::ETIMEDOUT,
        _ => nix::Error::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
    };
    let patience = place.patience.unwrap_or(PATIENCE);
    let connect = move || TcpStream::connect_timeout(&to, patience);
    let first = connect().map_err(failed)?;
    let workers: Vec<_> = (0..THREADS)
        .map(|_| {
            thread::spawn(move || {
                (0..CONCURRENT / THREADS).map(|_| connect()).collect::<std::io::Result<Vec<_>>>()
            })
        })
        .collect();
    // All stay open until the last is.
    let mut open = Vec::with_capacity(CONCURRENT);
    for worker in workers {
        match worker.join() {
            Ok(Ok(streams)) => open.extend(streams),
            Ok(Err(error)) => return Err(failed(error)),
            Err(_) => return Err(nix::Error::EIO),
        }
    }
    place.connected(first)
}

/// Tries to share or take the port of a listener; `heard` if somebody then comes to the thief.
pub(crate) fn steal(listener: SocketAddr) -> Outcome {
    use nix::poll::{PollFd, PollFlags, poll};
    use std::os::fd::AsFd as _;
    let family = if listener.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let socket = new_socket(family, libc::SOCK_STREAM, 0)?;
    setsockopt(&socket, ReusePort, &true)?;
    // What is left of connections of the listener's would keep the thief out for a minute.
    setsockopt(&socket, ReuseAddr, &true)?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(listener))?;
    nix::sys::socket::listen(&socket, nix::sys::socket::Backlog::new(8)?)?;
    let mut waiting = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    Ok(if poll(&mut waiting, HEARD_MS)? == 0 { "stolen" } else { "heard" })
}

fn new_socket(family: i32, kind: i32, protocol: i32) -> nix::Result<OwnedFd> {
    // SAFETY: takes numbers only; the descriptor is new and ours.
    unsafe {
        let descriptor = libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol);
        Ok(OwnedFd::from_raw_fd(nix::Error::result(descriptor)?))
    }
}

fn set_option(fd: RawFd, level: i32, name: i32, value: &[u8]) -> nix::Result<()> {
    // SAFETY: the value and its length are given, and the call keeps no pointer.
    let result =
        unsafe { libc::setsockopt(fd, level, name, value.as_ptr().cast(), value.len() as libc::socklen_t) };
    nix::Error::result(result).map(drop)
}
