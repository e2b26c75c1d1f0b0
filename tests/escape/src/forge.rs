//! Name servers' answers: one that no name server gave, and one that is used in the moment in which it comes.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use crate::{Outcome, TIMEOUT, sockets::Place};

/// How long one answer is waited for.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(200);

/// Asks for the IPv6 address of `name` until it is `address`, and connects there at once.
pub(crate) fn race(name: &str, server: &str, address: &str, place: &Place) -> Outcome {
    let (Ok(server), Ok(address)) = (server.parse::<IpAddr>(), address.parse::<SocketAddr>()) else {
        return Err(nix::Error::EINVAL);
    };
    let IpAddr::V6(wanted) = address.ip() else { return Err(nix::Error::EAFNOSUPPORT) };
    let failed = |error: std::io::Error| nix::Error::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
    // Id, flags (recursion is wanted), one question (RFC 1035, 4.1.1); type AAAA, class IN.
    let mut question = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    question.extend(labels(name)?);
    question.extend([0, 28, 0, 1]);
    let socket = UdpSocket::bind("0.0.0.0:0").map_err(failed)?;
    socket.connect((server, 53)).map_err(failed)?;
    socket.set_read_timeout(Some(ANSWER_TIMEOUT)).map_err(failed)?;
    let (started, mut answer) = (Instant::now(), [0; 512]);
    while started.elapsed() < TIMEOUT {
        socket.send(&question).map_err(failed)?;
        let length = socket.recv(&mut answer).unwrap_or_default();
        if answer[..length].windows(16).any(|bytes| bytes == wanted.octets()) {
            return place.connected(TcpStream::connect_timeout(&address, TIMEOUT).map_err(failed)?);
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
    let failed = |error: std::io::Error| nix::Error::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
    let socket = UdpSocket::bind("0.0.0.0:53").map_err(failed)?;
    socket.send_to(&message, to).map_err(failed)?;
    Ok("sent")
}
