//! A name server's answer that no name server gave.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};

use crate::Outcome;

/// Sends an answer that gives `name` the address `address`, from the port of name servers, to `to`.
pub(crate) fn answer(name: &str, address: &str, to: &str) -> Outcome {
    let address: Ipv4Addr = address.parse().map_err(|_| nix::Error::EINVAL)?;
    let to: SocketAddr = to.parse().map_err(|_| nix::Error::EINVAL)?;
    // Id, flags (an answer), one question, one answer, nothing else (RFC 1035, 4.1.1).
    let mut message = vec![0, 7, 0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0];
    for label in name.split('.') {
        message.push(u8::try_from(label.len()).map_err(|_| nix::Error::EINVAL)?);
        message.extend(label.as_bytes());
    }
    message.extend([0, 0, 1, 0, 1]);
    // The question's name again, type A, class IN, an hour, four bytes.
    message.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0x0e, 0x10, 0, 4]);
    message.extend(address.octets());
    let failed = |error: std::io::Error| nix::Error::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
    let socket = UdpSocket::bind("0.0.0.0:53").map_err(failed)?;
    socket.send_to(&message, to).map_err(failed)?;
    Ok("sent")
}
