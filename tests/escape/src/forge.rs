//! Name servers' answers: one that no name server gave, and one that is used in the moment in which it comes.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use nix::sys::socket::{SockaddrIn6, SockaddrStorage, connect, getsockname};

use crate::{
    Outcome, TIMEOUT,
    sockets::{ENDED, Place},
};

/// How long one answer is waited for.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(200);
/// How long the name server may take until it has the answer that is to be told: it may be about to read it.
const TOLD_TIMEOUT: Duration = Duration::from_secs(30);
/// Most connections past the redirect that a race keeps open.
const DIRECT_MAX: usize = 500;

fn failed(error: std::io::Error) -> nix::Error {
    nix::Error::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

/// Asks for the IPv6 address of `name` until it is `address`, and connects there at once.
pub(crate) fn race(name: &str, server: &str, address: &str, place: &Place) -> Outcome {
    let address = until_told(name, server, address)?;
    place.connected(TcpStream::connect_timeout(&address, TIMEOUT).map_err(failed)?)
}

/// The same, with one connection after the other until one is redirected, and a byte over each that is not. Says after how
/// many microseconds that was, and how many connections were begun before.
#[expect(clippy::print_stdout, reason = "what came of it is what the program is for")]
pub(crate) fn race_until_redirected(name: &str, server: &str, address: &str) -> Outcome {
    let to = SockaddrStorage::from(until_told(name, server, address)?);
    let (told, mut direct) = (Instant::now(), Vec::<OwnedFd>::new());
    while told.elapsed() < TIMEOUT && direct.len() < DIRECT_MAX {
        // SAFETY: takes numbers only; the descriptor is new and ours.
        let socket = unsafe {
            let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK;
            OwnedFd::from_raw_fd(nix::Error::result(libc::socket(libc::AF_INET6, kind, 0))?)
        };
        match connect(socket.as_raw_fd(), &to) {
            Ok(()) | Err(nix::Error::EINPROGRESS) => {}
            Err(errno) => return Err(errno),
        }
        // A redirected one has the loopback address, whatever its peer is said to be.
        if getsockname::<SockaddrIn6>(socket.as_raw_fd())?.ip().is_loopback() {
            println!("redirected {} {}", told.elapsed().as_micros(), direct.len());
            return Ok(ENDED);
        }
        direct.push(socket);
        for socket in &direct {
            // Not connected yet, most of them; whether a byte arrives the far side says.
            let _ = nix::unistd::write(socket, b"x");
        }
    }
    Err(nix::Error::ETIMEDOUT)
}

/// Asks for the IPv6 address of `name` until it is that of `address`.
fn until_told(name: &str, server: &str, address: &str) -> nix::Result<SocketAddr> {
    let (Ok(server), Ok(address)) = (server.parse::<IpAddr>(), address.parse::<SocketAddr>()) else {
        return Err(nix::Error::EINVAL);
    };
    let IpAddr::V6(wanted) = address.ip() else { return Err(nix::Error::EAFNOSUPPORT) };
    // Id, flags (recursion is wanted), one question (RFC 1035, 4.1.1); type AAAA, class IN.
    let mut question = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    question.extend(labels(name)?);
    question.extend([0, 28, 0, 1]);
    let socket = UdpSocket::bind("0.0.0.0:0").map_err(failed)?;
    socket.connect((server, 53)).map_err(failed)?;
    socket.set_read_timeout(Some(ANSWER_TIMEOUT)).map_err(failed)?;
    let (started, mut answer) = (Instant::now(), [0; 512]);
    while started.elapsed() < TOLD_TIMEOUT {
        socket.send(&question).map_err(failed)?;
        let length = socket.recv(&mut answer).unwrap_or_default();
        if answer[..length].windows(16).any(|bytes| bytes == wanted.octets()) {
            return Ok(address);
        }
    }
    Err(nix::Error::ETIMEDOUT)
}

/// A name as messages have it.
fn labels(name: &str) -> Result<Vec<u8>, nix::Error> {
    let mut labels = Vec::new();
    for label in name.split('.') {
        labels.push(u8::try_from(label.len()).map_err(|_| nix::Error::EINVAL)?);
        labels.extend(label.as_bytes());
    }
    labels.push(0);
    Ok(labels)
}

/// Sends an answer that gives `name` the address `address`, from the port of name servers, to `to`.
pub(crate) fn answer(name: &str, address: &str, to: &str) -> Outcome {
    let address: Ipv4Addr = address.parse().map_err(|_| nix::Error::EINVAL)?;
    let to: SocketAddr = to.parse().map_err(|_| nix::Error::EINVAL)?;
    // Id, flags (an answer), one question, one answer, nothing else (RFC 1035, 4.1.1).
    let mut message = vec![0, 7, 0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0];
    message.extend(labels(name)?);
    message.extend([0, 1, 0, 1]);
    // The question's name again, type A, class IN, an hour, four bytes.
    message.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0x0e, 0x10, 0, 4]);
    message.extend(address.octets());
    let socket = UdpSocket::bind("0.0.0.0:53").map_err(failed)?;
    socket.send_to(&message, to).map_err(failed)?;
    Ok("sent")
}
