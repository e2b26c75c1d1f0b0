//! Questions to the kernel over netlink, asked in the network namespace of the calling thread, and what it tells of that
//! namespace's interfaces by itself. What they mean is in `interface` and `sockets`.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// Most answers to one question that are read; a node has far fewer interfaces, a pod far fewer sockets.
const ANSWERS_MAX: usize = 1 << 20;
/// Most messages about changed interfaces that are read at once; what is left counts as one more change.
const HEARD_MAX: usize = 256;
/// Room for such messages. Only that there were some matters, and the kernel says when they did not fit.
const HEARD_BYTES: u32 = 4096;

/// A netlink socket for one protocol.
pub(super) struct Netlink(Socket);

impl Netlink {
    /// Opens a socket in the network namespace of this thread.
    ///
    /// # Errors
    /// As of `socket` and `bind`.
    pub(super) fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self(socket))
    }

    /// Asks for everything of a kind.
    ///
    /// # Errors
    /// The kernel refuses, or answers what cannot be read.
    pub(super) fn dump<M>(&self, question: M, each: impl FnMut(M)) -> io::Result<()>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        self.ask(question, NLM_F_REQUEST | NLM_F_DUMP, None, each)
    }

    /// Asks for one thing, or tells to do one: `kind` is the message's type where the message itself cannot say it.
    ///
    /// # Errors
    /// The kernel refuses (its errno), or answers what cannot be read.
    pub(super) fn request<M>(&self, message: M, kind: Option<u16>, each: impl FnMut(M)) -> io::Result<()>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        self.ask(message, NLM_F_REQUEST | NLM_F_ACK, kind, each)
    }

    fn ask<M>(&self, message: M, flags: u16, kind: Option<u16>, mut each: impl FnMut(M)) -> io::Result<()>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        message.finalize();
        if let Some(kind) = kind {
            message.header.message_type = kind;
        }
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.0.send(&bytes, 0)?;
        for _ in 0..ANSWERS_MAX {
            let (datagram, _) = self.0.recv_from_full()?;
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let answer = NetlinkMessage::<M>::deserialize(rest)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
                match answer.payload {
                    NetlinkPayload::InnerMessage(message) => each(message),
                    NetlinkPayload::Done(done) => return errno(done.code),
                    NetlinkPayload::Error(error) => return errno(error.raw_code()),
                    _ => {}
                }
                // Messages are aligned to four bytes (netlink(7)).
                let length = usize::try_from(answer.header.length).unwrap_or_default().next_multiple_of(4);
                rest = rest.get(length.max(1)..).unwrap_or_default();
            }
        }
        Err(io::Error::other("the kernel does not stop answering"))
    }
}

/// Hears of every change of the interfaces of one network namespace, from when it is opened.
#[derive(Debug)]
pub(super) struct LinkWatch(Socket);

impl LinkWatch {
    /// Listens in the network namespace of this thread.
    ///
    /// # Errors
    /// As of `socket` and `bind`.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.set_rx_buf_sz(HEARD_BYTES)?;
        socket.bind(&SocketAddr::new(0, libc::RTMGRP_LINK as u32))?;
        socket.set_non_blocking(true)?;
        Ok(Self(socket))
    }

    /// Whether something has changed since the last time.
    pub(super) fn changed(&self) -> bool {
        let mut changed = false;
        for _ in 0..HEARD_MAX {
            match self.0.recv(&mut &mut [0; 64][..], 0) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return changed,
                // An error tells that more was said than had room.
                Ok(_) | Err(_) => changed = true,
            }
        }
        true
    }
}

/// The result that the kernel gives as a negative errno.
fn errno(code: i32) -> io::Result<()> {
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code.abs())) }
}
