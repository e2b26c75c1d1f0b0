//! Answers of name servers that pass through this node, to whomever: a pod that has just been told a new address of an
//! API server must not be the first to use it.
//!
//! A packet socket in the host's network namespace sees what goes to pods before it is theirs. [`answer`] reads a packet
//! without doing anything; what it says is a suspicion only, since anybody can send such a packet. Not seen are answers over
//! TCP, TLS or HTTPS, inside a pod, and those that bypass the host's network stack.

use std::{
    io,
    mem::size_of,
    net::{IpAddr, SocketAddr},
    os::{
        fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use hickory_resolver::proto::{
    op::{Message, MessageType},
    rr::{Name, RData},
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::{
    api_set::Suspicions,
    resolution::{ADDRESSES_MAX, is_of_a_machine},
};
use crate::config::EndpointName;

/// Longest packet that is read: what name servers send over UDP is shorter (RFC 6891 recommends 4096 bytes at most).
const PACKET_BYTES_MAX: usize = 4096 + 128;
/// Most names of one answer that are compared: the question, and a chain of aliases.
const NAMES_MAX: usize = 32;
/// How much the kernel keeps of what was not read yet.
const RECEIVE_BUFFER_BYTES: usize = 4 * 1024 * 1024;
/// How often it is asked whether packets were lost.
const LOSS_CHECK: Duration = Duration::from_secs(1);
/// The least niceness: who is told an address is awake as soon as this thread is, and must not be the first to use it.
const NICENESS: libc::c_int = -20;
/// `ETH_P_ALL`, linux/if_ether.h.
const ALL: u16 = 3;

/// What an answer says.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// The names that were asked for, or that the answer leads through: lower case, without a dot at the end.
    pub names: Vec<String>,
    /// The addresses that it gives, whichever name they stand with.
    pub addresses: Vec<IpAddr>,
}

/// Reads a packet, from its IP header on: none unless it is an answer of a name server with an address in it.
pub fn answer(packet: &[u8]) -> Option<Answer> {
    let sliced = etherparse::SlicedPacket::from_ip(packet).ok()?;
    let Some(etherparse::TransportSlice::Udp(datagram)) = sliced.transport else { return None };
    if datagram.source_port() != 53 {
        return None;
    }
    let message = Message::from_vec(datagram.payload()).ok()?;
    if message.metadata.message_type != MessageType::Response {
        return None;
    }
    let mut addresses = Vec::new();
    let mut names: Vec<String> = message.queries.iter().map(|query| plain(query.name())).collect();
    for record in &message.answers {
        match &record.data {
            RData::A(address) => addresses.push(IpAddr::V4(address.0)),
            RData::AAAA(address) => addresses.push(IpAddr::V6(address.0)),
            RData::CNAME(target) => names.push(plain(&target.0)),
            _ => {}
        }
        names.push(plain(&record.name));
    }
    addresses.retain(|address| is_of_a_machine(*address));
    addresses.truncate(ADDRESSES_MAX);
    names.dedup();
    names.truncate(NAMES_MAX);
    (!addresses.is_empty()).then_some(Answer { names, addresses })
}

fn plain(name: &Name) -> String {
    name.to_ascii().trim_end_matches('.').to_ascii_lowercase()
}

/// A name, and where its addresses go.
#[derive(Clone)]
pub(super) struct Interest {
    pub(super) name: EndpointName,
    pub(super) suspicions: Arc<Suspicions>,
}

/// The packet socket.
pub(super) struct Answers(OwnedFd);

impl Answers {
    /// Starts to see the answers of all interfaces of this network namespace.
    ///
    /// # Errors
    /// The kernel refuses (`CAP_NET_RAW`).
    pub(super) fn open() -> io::Result<Self> {
        // Without a protocol it sees nothing until it is filtered.
        // SAFETY: takes numbers only; the descriptor is new and ours.
        let socket = unsafe {
            let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
            OwnedFd::from_raw_fd(nix::Error::result(libc::socket(libc::AF_PACKET, kind, 0))?)
        };
        let mut filter = FILTER.map(|(code, jt, jf, k)| libc::sock_filter { code, jt, jf, k });
        let program = libc::sock_fprog { len: FILTER.len() as u16, filter: filter.as_mut_ptr() };
        set_option(&socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)?;
        let bytes = i32::try_from(RECEIVE_BUFFER_BYTES).unwrap_or(i32::MAX);
        set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &bytes)?;
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: ALL.to_be(),
            sll_ifindex: 0,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        // SAFETY: the address is valid and its size is given.
        let bound = unsafe {
            let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length)
        };
        nix::Error::result(bound)?;
        Ok(Self(socket))
    }

    /// Puts the addresses that are seen under suspicion until cancelled. On a thread of its own: each microsecond from the
    /// packet to the kernel's map is one in which whom it is for may be quicker.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) async fn follow(
        self,
        interests: Vec<Interest>,
        cancellation: CancellationToken,
    ) -> io::Result<()> {
        let (stop, stopped) = UnixStream::pair()?;
        let (end, mut ended) = oneshot::channel();
        thread::Builder::new().name("answers".to_owned()).spawn(move || {
            // Nobody waits for it any more where the agent ends in disorder.
            let _ = end.send(self.see(&interests, &stopped));
        })?;
        let result = tokio::select! {
            result = &mut ended => result,
            () = cancellation.cancelled() => {
                drop(stop);
                ended.await
            }
        };
        result.unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
    }

    /// Until the other end of `stopped` is closed.
    fn see(&self, interests: &[Interest], stopped: &UnixStream) -> io::Result<()> {
        // SAFETY: takes numbers only; 0 is this thread.
        if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICENESS) } != 0 {
            tracing::warn!(
                event = "answers-read-late",
                "cannot be quicker than others in seeing the answers of name servers; has the agent CAP_SYS_NICE?"
            );
        }
        let wait = PollTimeout::try_from(LOSS_CHECK).unwrap_or(PollTimeout::MAX);
        let (mut buffer, mut checked) = (vec![0; PACKET_BYTES_MAX], Instant::now());
        loop {
            let mut ready = [
                PollFd::new(self.0.as_fd(), PollFlags::POLLIN),
                PollFd::new(stopped.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut ready, wait) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            if ready[1].any().unwrap_or_default() {
                return Ok(());
            }
            while let Some(length) = self.next(&mut buffer)? {
                if let Some(answer) = answer(&buffer[..length]) {
                    interests.iter().for_each(|interest| interest.tell(&answer));
                }
                if checked.elapsed() >= LOSS_CHECK {
                    break;
                }
            }
            if checked.elapsed() >= LOSS_CHECK {
                checked = Instant::now();
                if self.lost()? > 0 {
                    // What it was, the name servers say.
                    interests.iter().for_each(|interest| interest.suspicions.ask());
                }
            }
        }
    }

    /// The next packet, if there is one.
    fn next(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match nix::unistd::read(&self.0, buffer) {
            Ok(length) => Ok(Some(length)),
            // An interface that goes down is told to every packet socket, and is no end of it.
            Err(nix::Error::EAGAIN | nix::Error::EINTR | nix::Error::ENETDOWN) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// How many packets there was no room for since the last time.
    fn lost(&self) -> io::Result<u32> {
        let mut statistics = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
        let mut length = size_of::<libc::tpacket_stats>() as libc::socklen_t;
        // SAFETY: the kernel writes no more than the length that it is given.
        let result = unsafe {
            libc::getsockopt(
                self.0.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut statistics).cast(),
                &raw mut length,
            )
        };
        nix::Error::result(result)?;
        Ok(statistics.tp_drops)
    }
}

impl Interest {
    fn tell(&self, answer: &Answer) {
        if !answer.names.contains(&self.name.host) {
            return;
        }
        for address in &answer.addresses {
            self.suspicions.meet(&self.name, SocketAddr::new(*address, self.name.port));
        }
    }
}

/// UDP from port 53, no later fragment, over IPv4 or IPv6 (classic BPF: code, jump if true, jump if false, constant). A
/// packet socket of this kind sees packets from the IP header on.
const FILTER: [(u16, u8, u8, u32); 17] = [
    (0x30, 0, 0, 0),       // 0: A = version and length
    (0x74, 0, 0, 4),       // 1: A >>= 4
    (0x15, 0, 7, 4),       // 2: IPv4, else 10
    (0x30, 0, 0, 9),       // 3: A = protocol
    (0x15, 0, 11, 17),     // 4: UDP, else 16
    (0x28, 0, 0, 6),       // 5: A = flags and offset
    (0x45, 9, 0, 0x1fff),  // 6: a later fragment: 16
    (0xb1, 0, 0, 0),       // 7: X = length of the header
    (0x48, 0, 0, 0),       // 8: A = source port
    (0x15, 5, 6, 53),      // 9: 15, else 16
    (0x15, 0, 5, 6),       // 10: IPv6, else 16
    (0x30, 0, 0, 6),       // 11: A = next header
    (0x15, 0, 3, 17),      // 12: UDP, else 16
    (0x28, 0, 0, 40),      // 13: A = source port
    (0x15, 0, 1, 53),      // 14: 15, else 16
    (0x06, 0, 0, 0x40000), // 15: take it
    (0x06, 0, 0, 0),       // 16: leave it
];

fn set_option<T>(socket: &OwnedFd, level: i32, name: i32, value: &T) -> io::Result<()> {
    // SAFETY: the value and its length are given, and the call keeps no pointer.
    let result = unsafe {
        let length = size_of::<T>() as libc::socklen_t;
        libc::setsockopt(socket.as_raw_fd(), level, name, std::ptr::from_ref(value).cast(), length)
    };
    Ok(nix::Error::result(result).map(drop)?)
}

#[cfg(test)]
mod tests {
    use std::{net::IpAddr, str::FromStr as _};

    use etherparse::PacketBuilder;
    use hickory_resolver::proto::{
        op::{Message, MessageType, OpCode, Query},
        rr::{Name, RData, Record, RecordType},
    };

    use super::{Answer, answer};

    fn name(text: &str) -> Name {
        Name::from_str(text).expect("a name")
    }

    fn message(kind: MessageType, answers: &[(&str, RData)]) -> Vec<u8> {
        let mut message = Message::new(7, kind, OpCode::Query);
        message.add_query(Query::query(name("API.example.test."), RecordType::A));
        for (owner, data) in answers {
            message.add_answer(Record::from_rdata(name(owner), 60, data.clone()));
        }
        message.to_vec().expect("can be written")
    }

    fn packet(port: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let builder = PacketBuilder::ipv4([10, 96, 0, 10], [10, 244, 0, 7], 64).udp(port, 40_000);
        builder.write(&mut bytes, payload).expect("can be written");
        bytes
    }

    fn address(text: &str) -> RData {
        match text.parse().expect("an address") {
            IpAddr::V4(address) => RData::A(address.into()),
            IpAddr::V6(address) => RData::AAAA(address.into()),
        }
    }

    #[test]
    fn an_answer_gives_its_names_and_addresses() {
        use hickory_resolver::proto::rr::rdata::CNAME;
        let alias = RData::CNAME(CNAME(name("abc.eks.example.test.")));
        let answers = [
            ("api.example.test.", alias),
            ("abc.eks.example.test.", address("203.0.113.7")),
            ("abc.eks.example.test.", address("2001:db8::7")),
        ];
        let payload = message(MessageType::Response, &answers);
        let expected = Answer {
            names: ["api.example.test", "abc.eks.example.test", "api.example.test", "abc.eks.example.test"]
                .map(str::to_owned)
                .to_vec(),
            addresses: ["203.0.113.7", "2001:db8::7"].map(|text| text.parse().expect("an address")).to_vec(),
        };
        assert_eq!(answer(&packet(53, &payload)), Some(expected));
        let mut v6 = Vec::new();
        let builder = PacketBuilder::ipv6([1; 16], [2; 16], 64).udp(53, 40_000);
        builder.write(&mut v6, &payload).expect("can be written");
        assert!(answer(&v6).is_some(), "over IPv6");
    }

    #[test]
    fn what_is_no_answer_with_an_address_is_none() {
        let given = [("api.example.test.", address("203.0.113.7"))];
        let response = message(MessageType::Response, &given);
        assert_eq!(answer(&packet(54, &response)), None, "another port");
        assert_eq!(answer(&packet(53, &message(MessageType::Query, &given))), None, "a question");
        assert_eq!(answer(&packet(53, &message(MessageType::Response, &[]))), None, "nothing in it");
        let local = [("api.example.test.", address("127.0.0.1")), ("api.example.test.", address("::"))];
        assert_eq!(answer(&packet(53, &message(MessageType::Response, &local))), None, "no machine's");
        let whole = packet(53, &response);
        for length in 0..whole.len() {
            assert_eq!(answer(&whole[..length]), None, "cut off after {length} bytes");
        }
    }
}
