//! What the tests make: cgroups, network namespaces, clients in them. Each is removed by its guard.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use nix::sys::{
    socket::{
        Backlog, MsgFlags, SockaddrStorage, accept, bind, connect, getpeername, getsockname, listen, sendto,
        setsockopt,
        sockopt::{ReceiveTimeout, ReuseAddr},
    },
    time::{TimeVal, TimeValLike as _},
};
use weir_agent::{
    doctor,
    interception::{
        cgroup,
        loader::{Kernel, KernelError, Pinning},
    },
};

/// How long a state may take to come about; far longer than it takes, also in an emulated machine that has little of a processor.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);

/// How long who asks waits for an answer that is not to come. One that is to come is waited for until [`DEADLINE`]: on a busy machine a
/// server may be long about it.
pub(crate) const BRIEFLY: Duration = Duration::from_millis(500);

/// Between two looks: an emulated machine has better to do than to look.
pub(crate) const PACE: Duration = Duration::from_millis(10);

pub(crate) const API4: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 443);
pub(crate) const API6: SocketAddr =
    SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)), 6443);

/// A cgroup that is removed at the end; its processes are moved out by their own end.
pub(crate) struct OwnCgroup(pub(crate) PathBuf);

impl OwnCgroup {
    pub(crate) fn new(name: &str) -> Self {
        let path = cgroup::mount_point().unwrap().join(format!("weir-test-{}-{name}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// One below this one.
    pub(crate) fn below(&self, name: &str) -> Self {
        let path = self.0.join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// Moves a process into it.
    pub(crate) fn take(&self, pid: u32) {
        std::fs::write(self.0.join("cgroup.procs"), pid.to_string()).unwrap();
    }

    pub(crate) fn id(&self) -> u64 {
        cgroup::id(&self.0).unwrap()
    }
}

impl Drop for OwnCgroup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// A process in a network namespace of its own with `lo` up; the namespace goes with it.
pub(crate) struct OwnNetns(Child);

impl OwnNetns {
    pub(crate) fn new() -> Self {
        let mut child = Command::new("unshare")
            .args(["--net", "sh", "-c", "ip link set lo up && echo up && exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = [0; 3];
        io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
        assert_eq!(&line, b"up\n");
        Self(child)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Gives it an address, whose packets then stay in the namespace; one of IPv6 is its own at once, not when the kernel gets round to it.
    pub(crate) fn take_address(&self, address: IpAddr) {
        let nodad = if address.is_ipv6() { "nodad" } else { "" };
        self.run(&format!("ip address add {address} dev lo {nodad}"));
    }

    /// Joins it to this machine by a veth pair, as a CNI does: this machine's end has the first address, of a /24.
    pub(crate) fn join(&self, interface: &str, ours: IpAddr, theirs: IpAddr) {
        let pid = self.pid().to_string();
        let (ours, theirs) = (format!("{ours}/24"), format!("{theirs}/24"));
        let inside = ["nsenter", "-t", &pid, "-n", "ip"];
        for command in [
            &["ip", "link", "add", interface, "type", "veth", "peer", "name", "eth0", "netns", &pid][..],
            &["ip", "address", "add", &ours, "dev", interface],
            &["ip", "link", "set", interface, "up"],
            &[&inside[..], &["address", "add", &theirs, "dev", "eth0"]].concat(),
            &[&inside[..], &["link", "set", "eth0", "up"]].concat(),
        ] {
            assert!(Command::new(command[0]).args(&command[1..]).status().unwrap().success(), "{command:?}");
        }
    }

    /// Joins it as the VPC CNI of EKS does: a veth pair without a bridge and without a network, the pod's own address alone, a route
    /// to a neighbour that is written down, and one from this machine to the pod. `ours` is this machine's all the same.
    pub(crate) fn join_by_routes(&self, interface: &str, ours: IpAddr, theirs: IpAddr) {
        const MAC: &str = "02:00:00:00:00:01";
        const GATEWAY: &str = "169.254.1.1";
        let pid = self.pid().to_string();
        let (ours, theirs) = (format!("{ours}/32"), format!("{theirs}/32"));
        let peer = ["type", "veth", "peer", "name", "eth0", "netns", &pid];
        let inside = ["nsenter", "-t", &pid, "-n", "ip"];
        for command in [
            &[&["ip", "link", "add", interface, "address", MAC][..], &peer].concat()[..],
            &["ip", "address", "add", &ours, "dev", interface],
            &["ip", "link", "set", interface, "up"],
            &["ip", "route", "add", &theirs, "dev", interface, "scope", "link"],
            &[&inside[..], &["address", "add", &theirs, "dev", "eth0"]].concat(),
            &[&inside[..], &["link", "set", "eth0", "up"]].concat(),
            &[&inside[..], &["route", "add", GATEWAY, "dev", "eth0", "scope", "link"]].concat(),
            &[&inside[..], &["route", "add", "default", "via", GATEWAY]].concat(),
            &[&inside[..], &["neighbour", "add", GATEWAY, "lladdr", MAC, "dev", "eth0"]].concat(),
        ] {
            assert!(Command::new(command[0]).args(&command[1..]).status().unwrap().success(), "{command:?}");
        }
    }

    /// Gives it one end of a veth pair, and this machine the other, both without an address: the guard needs no more.
    pub(crate) fn pair(&self, interface: &str) {
        let pid = self.pid().to_string();
        let arguments = ["link", "add", interface, "type", "veth", "peer", "name", "eth0", "netns", &pid];
        assert!(Command::new("ip").args(arguments).status().unwrap().success(), "{interface}");
    }

    /// Gives it an interface that sends through one of this machine and has no end here.
    pub(crate) fn plug_direct(&self, through: &str, name: &str) {
        let pid = self.pid().to_string();
        let arguments =
            ["link", "add", name, "link", through, "netns", &pid, "type", "macvlan", "mode", "bridge"];
        assert!(Command::new("ip").args(arguments).status().unwrap().success(), "{name}");
    }

    /// Joins it to another one, with these addresses of a /24.
    pub(crate) fn join_to(&self, other: &Self, (own, others): (IpAddr, IpAddr)) {
        let pids = [self, other].map(|netns| netns.pid().to_string());
        let arguments = ["link", "add", "eth0", "netns", &pids[0], "type", "veth", "peer", "name", "eth0"];
        let status = Command::new("ip").args(arguments).args(["netns", &pids[1]]).status();
        assert!(status.unwrap().success());
        for (netns, address) in [(self, own), (other, others)] {
            netns.run(&format!("ip address add {address}/24 dev eth0 && ip link set eth0 up"));
        }
    }

    /// Runs a shell script in it.
    pub(crate) fn run(&self, script: &str) {
        let pid = self.pid().to_string();
        let status = Command::new("nsenter").args(["-t", &pid, "-n", "sh", "-c", script]).status();
        assert!(status.unwrap().success(), "{script}");
    }

    /// Does something in it, on a thread of its own.
    pub(crate) fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let file = std::fs::File::open(format!("/proc/{}/ns/net", self.pid())).unwrap();
        std::thread::scope(|scope| {
            let work = || {
                nix::sched::setns(&file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
                work()
            };
            scope.spawn(work).join().unwrap()
        })
    }
}

impl OwnNetns {
    /// Ends its process.
    pub(crate) fn end(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for OwnNetns {
    fn drop(&mut self) {
        self.end();
    }
}

/// What a client thread in the cgroup and namespace saw.
pub(crate) type Dialled = Result<(SocketAddr, SocketAddr), nix::Error>;

#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Dial {
    Tcp(SocketAddr),
    /// Connects with TCP fast open, and sends its first byte, with which the SYN leaves, only after this time.
    Late(SocketAddr, Duration),
    /// An IPv6 socket that dials a v4-mapped address.
    Mapped(SocketAddr),
    Mptcp(SocketAddr),
    Sctp(SocketAddr),
    Udp(SocketAddr),
    /// A datagram without a connect.
    SendTo(SocketAddr),
    /// Asks a server, and waits for its answer.
    Ask(SocketAddr),
    /// The same without a connect, and the answer may come from anywhere.
    AskAnybody(SocketAddr),
    /// The same, and what hears the answer is another socket, at the same port.
    AskByAnother(SocketAddr),
    /// The same by a socket whose memory for all that the kernel notes with it is used up, v4-mapped.
    AskWithoutRoom(SocketAddr),
    /// The same over TCP.
    AskStream(SocketAddr),
    /// Waits at this address for a connection and its answer, for half a second each.
    Heed(SocketAddr),
    /// Takes an address, and does not connect.
    Bind(SocketAddr),
    /// A raw IPv4 packet with this protocol and this as fragment offset (units of eight bytes).
    Raw(SocketAddr, u8, u16),
    /// Makes a packet socket, and sends nothing.
    Packet,
    /// A call of bpf(2) that changes nothing.
    Bpf,
}

/// `BPF_PROG_GET_NEXT_ID` of `enum bpf_cmd`, linux/bpf.h.
const BPF_PROG_GET_NEXT_ID: libc::c_long = 11;

/// `TCP_FASTOPEN_NO_COOKIE`, linux/tcp.h.
const TCP_FASTOPEN_NO_COOKIE: i32 = 34;

/// Dials from a child process that is in the cgroup (a cgroup holds whole processes), inside the namespace, and
/// reports the errno or the own and the peer's address through a pipe.
pub(crate) fn dial(cgroup: &Path, netns: Option<&OwnNetns>, dial: Dial) -> Dialled {
    dial_for(cgroup, netns, dial, BRIEFLY)
}

/// The same; whoever waits for an answer does so for this time.
pub(crate) fn dial_for(cgroup: &Path, netns: Option<&OwnNetns>, dial: Dial, patience: Duration) -> Dialled {
    let (own, other) = std::os::unix::net::UnixStream::pair().unwrap();
    let netns = netns.map(|netns| std::fs::File::open(format!("/proc/{}/ns/net", netns.0.id())).unwrap());
    let procs = std::fs::OpenOptions::new().write(true).open(cgroup.join("cgroup.procs")).unwrap();
    // SAFETY: the child only makes system calls on what was opened before, and leaves by _exit.
    match unsafe { nix::unistd::fork() }.unwrap() {
        nix::unistd::ForkResult::Child => {
            let result = in_child(&procs, netns.as_ref(), dial, patience);
            let text = match result {
                Ok((own, peer)) => format!("{own} {peer}"),
                Err(errno) => format!("{}", errno as i32),
            };
            let _ = nix::unistd::write(&other, text.as_bytes());
            // SAFETY: ends the child without running the test harness's exit handlers.
            unsafe { libc::_exit(0) };
        }
        nix::unistd::ForkResult::Parent { child } => {
            drop(other);
            let mut text = String::new();
            io::Read::read_to_string(&mut &own, &mut text).unwrap();
            nix::sys::wait::waitpid(child, None).unwrap();
            match text.split_once(' ') {
                Some((own, peer)) => Ok((own.parse().unwrap(), peer.parse().unwrap())),
                None => Err(nix::Error::from_raw(text.parse().unwrap())),
            }
        }
    }
}

fn in_child(procs: &std::fs::File, netns: Option<&std::fs::File>, dial: Dial, patience: Duration) -> Dialled {
    nix::unistd::write(procs, b"0")?;
    if let Some(netns) = netns {
        nix::sched::setns(netns, nix::sched::CloneFlags::CLONE_NEWNET)?;
    }
    if let Dial::Packet = dial {
        new_socket(libc::AF_PACKET, libc::SOCK_RAW, 0)?;
        return Ok((API4, API4));
    }
    if let Dial::Bpf = dial {
        let mut attributes = [0_u32; 4];
        // SAFETY: the attributes are valid for this command, which reads one number and writes another within them.
        let result = unsafe {
            libc::syscall(libc::SYS_bpf, BPF_PROG_GET_NEXT_ID, &raw mut attributes, size_of_val(&attributes))
        };
        return nix::Error::result(result).map(|_| (API4, API4));
    }
    if let Dial::Raw(SocketAddr::V4(address), protocol, fragment) = dial {
        let packet = raw_packet(address, protocol, fragment);
        let socket = new_socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
        let to = SockaddrStorage::from(SocketAddr::V4(address));
        sendto(socket.as_raw_fd(), &packet, &to, MsgFlags::empty())?;
        return Ok((address.into(), address.into()));
    }
    let (address, kind, protocol) = match dial {
        Dial::Raw(..) | Dial::Packet | Dial::Bpf => return Err(nix::Error::EINVAL),
        Dial::Tcp(address) | Dial::Late(address, _) | Dial::AskStream(address) => {
            (address, libc::SOCK_STREAM, 0)
        }
        Dial::Mapped(address) => {
            let IpAddr::V4(ip) = address.ip() else { return Err(nix::Error::EINVAL) };
            (SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()), libc::SOCK_STREAM, 0)
        }
        Dial::AskWithoutRoom(address) => {
            let IpAddr::V4(ip) = address.ip() else { return Err(nix::Error::EINVAL) };
            (SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()), libc::SOCK_DGRAM, 0)
        }
        Dial::Mptcp(address) => (address, libc::SOCK_STREAM, libc::IPPROTO_MPTCP),
        Dial::Sctp(address) => (address, libc::SOCK_STREAM, libc::IPPROTO_SCTP),
        Dial::Udp(address)
        | Dial::SendTo(address)
        | Dial::Ask(address)
        | Dial::AskAnybody(address)
        | Dial::AskByAnother(address) => (address, libc::SOCK_DGRAM, 0),
        Dial::Bind(address) | Dial::Heed(address) => (address, libc::SOCK_STREAM, 0),
    };
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let socket = new_socket(family, kind, protocol)?;
    let to = SockaddrStorage::from(address);
    if without_a_connection(&socket, &to, dial, patience)? {
        return Ok((address, address));
    }
    connect(socket.as_raw_fd(), &to)?;
    if let Dial::Late(_, time) = dial {
        // The time is what is tested: nothing happens meanwhile that could be waited for.
        // SAFETY: waits for none of no descriptors.
        unsafe { libc::poll(std::ptr::null_mut(), 0, i32::try_from(time.as_millis()).unwrap_or(0)) };
        nix::unistd::write(&socket, b"x")?;
    }
    let name = |storage: SockaddrStorage| -> Result<SocketAddr, nix::Error> {
        match (storage.as_sockaddr_in(), storage.as_sockaddr_in6()) {
            (Some(v4), _) => Ok(SocketAddr::new(v4.ip().into(), v4.port())),
            (_, Some(v6)) => Ok(SocketAddr::new(v6.ip().into(), v6.port())),
            _ => Err(nix::Error::EINVAL),
        }
    };
    Ok((name(getsockname(socket.as_raw_fd())?)?, name(getpeername(socket.as_raw_fd())?)?))
}

/// What does not end with a connection to tell of; or, for all others, what comes before the connect.
fn without_a_connection(
    socket: &OwnedFd,
    to: &SockaddrStorage,
    dial: Dial,
    patience: Duration,
) -> nix::Result<bool> {
    match dial {
        Dial::SendTo(_) => {
            sendto(socket.as_raw_fd(), b"x", to, MsgFlags::empty())?;
        }
        Dial::Bind(_) => bind(socket.as_raw_fd(), to)?,
        Dial::Ask(_) | Dial::AskStream(_) => ask(socket, to, patience)?,
        Dial::AskWithoutRoom(_) => {
            fill(socket)?;
            ask(socket, to, patience)?;
        }
        Dial::AskAnybody(_) => {
            be_patient(socket, patience)?;
            sendto(socket.as_raw_fd(), b"x", to, MsgFlags::empty())?;
            nix::unistd::read(socket, &mut [0; 4096])?;
        }
        Dial::AskByAnother(_) => {
            let hearing = new_socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
            setsockopt(socket, ReuseAddr, &true)?;
            setsockopt(&hearing, ReuseAddr, &true)?;
            bind(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::from(([127, 0, 0, 1], 0))))?;
            // Of two at one port the one that came last is found first.
            bind(hearing.as_raw_fd(), &getsockname::<SockaddrStorage>(socket.as_raw_fd())?)?;
            be_patient(&hearing, patience)?;
            sendto(socket.as_raw_fd(), b"x", to, MsgFlags::empty())?;
            nix::unistd::read(&hearing, &mut [0; 4096])?;
        }
        Dial::Heed(_) => {
            be_patient(socket, patience)?;
            bind(socket.as_raw_fd(), to)?;
            listen(socket, Backlog::new(1)?)?;
            // SAFETY: the descriptor is new and ours.
            let accepted = unsafe { OwnedFd::from_raw_fd(accept(socket.as_raw_fd())?) };
            be_patient(&accepted, patience)?;
            nix::unistd::read(&accepted, &mut [0; 4096])?;
        }
        Dial::Late(..) => {
            for option in [libc::TCP_FASTOPEN_CONNECT, TCP_FASTOPEN_NO_COOKIE] {
                set_tcp_option(socket, option)?;
            }
            return Ok(false);
        }
        _ => return Ok(false),
    }
    Ok(true)
}

/// Joins groups until there is no memory left for one (`net.core.optmem_max`).
fn fill(socket: &OwnedFd) -> nix::Result<()> {
    for group in 1_u128.. {
        let request = libc::ipv6_mreq {
            ipv6mr_multiaddr: libc::in6_addr { s6_addr: Ipv6Addr::from((0xff02 << 112) | group).octets() },
            ipv6mr_interface: 1,
        };
        match set_option(socket, libc::IPPROTO_IPV6, libc::IPV6_ADD_MEMBERSHIP, &request) {
            Ok(()) => {}
            Err(nix::Error::ENOMEM | nix::Error::ENOBUFS) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn be_patient(socket: &OwnedFd, patience: Duration) -> nix::Result<()> {
    let milliseconds = i64::try_from(patience.as_millis()).unwrap_or(i64::MAX);
    setsockopt(socket, ReceiveTimeout, &TimeVal::milliseconds(milliseconds))
}

fn ask(socket: &OwnedFd, server: &SockaddrStorage, patience: Duration) -> nix::Result<()> {
    be_patient(socket, patience)?;
    connect(socket.as_raw_fd(), server)?;
    nix::unistd::write(socket, b"x")?;
    nix::unistd::read(socket, &mut [0; 4096]).map(drop)
}

fn set_tcp_option(socket: &OwnedFd, option: i32) -> nix::Result<()> {
    set_option(socket, libc::IPPROTO_TCP, option, &1_i32)
}

fn set_option<T>(socket: &OwnedFd, level: i32, option: i32, value: &T) -> nix::Result<()> {
    let size = size_of::<T>() as libc::socklen_t;
    // SAFETY: the value is of the size that is given.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, option, std::ptr::from_ref(value).cast(), size)
    };
    nix::Error::result(result).map(drop)
}

pub(crate) fn new_socket(family: i32, kind: i32, protocol: i32) -> nix::Result<OwnedFd> {
    // SAFETY: takes numbers only; the descriptor is new and ours.
    unsafe { Ok(OwnedFd::from_raw_fd(nix::Error::result(libc::socket(family, kind, protocol))?)) }
}

/// An IPv4 packet to this address; the kernel fills in length, checksum and source (raw(7)).
fn raw_packet(to: SocketAddrV4, protocol: u8, fragment: u16) -> Vec<u8> {
    let mut packet = vec![0; 40];
    packet[0] = 0x45;
    packet[6..8].copy_from_slice(&fragment.to_be_bytes());
    packet[8] = 64;
    packet[9] = protocol;
    packet[16..20].copy_from_slice(&to.ip().octets());
    packet[22..24].copy_from_slice(&to.port().to_be_bytes());
    // The length in a UDP header; without a checksum it is whole.
    packet[25] = 20;
    packet
}

/// Loads the programs, or says why this machine cannot: `None` skips the test, loudly; under CI=true it fails.
pub(crate) fn load(pinning: Pinning) -> Option<Arc<Kernel>> {
    match Kernel::load(pinning) {
        Ok(kernel) => Some(Arc::new(kernel)),
        Err(error) => {
            not_tested(&error);
            None
        }
    }
}

/// Says that it was not; under CI=true that fails.
pub(crate) fn not_tested(error: &KernelError) {
    let text = doctor::chain(error);
    assert!(std::env::var("CI").as_deref() != Ok("true"), "cannot test the kernel programs: {text}");
    eprintln!("NOT TESTED: the kernel programs: {text}");
}

/// Dials again and again until this comes about.
pub(crate) async fn eventually(
    expected: &str,
    mut dial: impl FnMut() -> Dialled,
    holds: impl Fn(&Dialled) -> bool,
) {
    let wait = async {
        let mut pace = tokio::time::interval(PACE);
        while !holds(&dial()) {
            pace.tick().await;
        }
    };
    tokio::time::timeout(DEADLINE, wait).await.unwrap_or_else(|_| panic!("{expected}; now: {:?}", dial()));
}

/// Whether a dial ended with this error.
pub(crate) fn is(errno: nix::Error) -> impl Fn(&Dialled) -> bool {
    move |dialled| *dialled == Err(errno)
}
