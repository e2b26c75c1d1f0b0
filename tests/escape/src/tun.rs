//! A packet that no socket of the pod sends: whoever may make interfaces in a pod's network writes it into one of its own, and the pod's
//! kernel forwards it, as a router does.

use std::{
    fs::{self, File},
    io::Write as _,
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::{AsRawFd as _, OwnedFd},
};

use crate::{Outcome, packet, sockets::Place};

/// Where interfaces of this kind are made (kernel documentation, networking/tuntap).
const DEVICE: &str = "/dev/net/tun";
/// The kernel puts a number in: several may be there at a time.
const NAME: &[u8] = b"weirtun%d";
/// Of the pods' network, behind those that the CNI gives away: the interface's own address, the one that the packet says that it is from, and
/// the network of both, through which the kernel would answer it, so that it forwards it.
const OWN: Ipv4Addr = Ipv4Addr::new(10, 244, 0, 253);
const SOURCE: Ipv4Addr = Ipv4Addr::new(10, 244, 0, 254);
const NETWORK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 252);

/// Has the pod forward a request for a connection.
pub(crate) fn forwarded(target: SocketAddrV4, place: &Place) -> Outcome {
    let failed = |error: std::io::Error| nix::Error::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
    place.enter()?;
    let mut device = File::options().read(true).write(true).open(DEVICE).map_err(failed)?;
    let mut request = blank();
    for (to, from) in request.ifr_name.iter_mut().zip(NAME) {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    ask(device.as_raw_fd(), libc::TUNSETIFF, &mut request)?;
    let socket = packet::socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    up(&socket, request)?;
    fs::write("/proc/sys/net/ipv4/ip_forward", "1").map_err(failed)?;
    device.write_all(&packet::ip(target, SOURCE, 6, 0)).map_err(failed)?;
    Ok("sent")
}

/// Gives the interface that a request names its address, and takes it into use.
fn up(socket: &OwnedFd, named: libc::ifreq) -> nix::Result<()> {
    let fd = socket.as_raw_fd();
    ask(fd, libc::SIOCSIFADDR, &mut with_address(named, OWN))?;
    ask(fd, libc::SIOCSIFNETMASK, &mut with_address(named, NETWORK))?;
    let mut request = named;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    ask(fd, libc::SIOCSIFFLAGS, &mut request)
}

fn with_address(mut request: libc::ifreq, address: Ipv4Addr) -> libc::ifreq {
    let mut parts = libc::sockaddr { sa_family: libc::AF_INET as u16, sa_data: [0; 14] };
    // `struct sockaddr_in`: the address behind the port.
    for (to, from) in parts.sa_data[2..].iter_mut().zip(address.octets()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_addr = parts;
    request
}

fn blank() -> libc::ifreq {
    // SAFETY: every field is a number or a union of such, and any of them is valid.
    unsafe { std::mem::zeroed() }
}

fn ask(fd: i32, number: libc::Ioctl, request: &mut libc::ifreq) -> nix::Result<()> {
    // SAFETY: each of these numbers reads or writes one request of this type, which outlives the call.
    nix::Error::result(unsafe { libc::ioctl(fd, number, std::ptr::from_mut(request)) }).map(drop)
}
