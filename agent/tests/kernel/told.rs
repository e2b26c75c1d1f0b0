//! What a pod is told by a name server is an API server's for that pod before it has the answer; there is no agent here that
//! would say so as well.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    str::FromStr as _,
    sync::Arc,
    time::{Duration, Instant},
};

use hickory_resolver::proto::{
    op::{Message, MessageType, OpCode, Query},
    rr::{Name, RData, Record, RecordType, rdata::CNAME},
};
use nix::sys::socket::{SockaddrStorage, bind, connect, setsockopt, sockopt::ReuseAddr};
use weir_agent::{
    config::EndpointName,
    interception::{
        listener::{Listener, Namespace},
        loader::{Kernel, Pinning},
    },
};
use weir_common::{
    answer::{KeptAnswer, STEPS_MAX},
    kernel::{CgroupEntry, Class, NoticeKind, STEPS_AHEAD_MAX, SUSPECTED_BY_POD_MAX},
};

use crate::world::{BRIEFLY, DEADLINE, Dial, OwnCgroup, OwnNetns, dial, dial_for, load, new_socket};

const TCP: u8 = 6;
const UDP: u8 = 17;
const REFUSED: nix::Error = nix::Error::ECONNREFUSED;
/// What who is kept from an answer sees: none within the time.
const NO_ANSWER: nix::Error = nix::Error::EAGAIN;
/// How often something is tried that a machine that stands still may spoil.
const TRIES: usize = 5;
const SERVER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 53);
const NAME: &str = "api.example.test";

/// A connection from this very address, as soon as somebody listens at the other.
fn connect_from(own: SocketAddr, to: SocketAddr) -> TcpStream {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let socket = new_socket(libc::AF_INET, libc::SOCK_STREAM, 0).unwrap();
        // A child that is forked at this moment keeps it open as well.
        setsockopt(&socket, ReuseAddr, &true).unwrap();
        bind(socket.as_raw_fd(), &SockaddrStorage::from(own)).unwrap();
        match connect(socket.as_raw_fd(), &SockaddrStorage::from(to)) {
            Ok(()) => return TcpStream::from(socket),
            Err(error) => assert!(Instant::now() < deadline, "nobody listens at {to}: {error}"),
        }
        std::thread::yield_now();
    }
}

/// A root of pods with two pods in it, below the root of a node, and a network namespace in which a name server answers what it
/// is told to. Cgroups in the order in which they can be removed.
struct Scene {
    kernel: Arc<Kernel>,
    pod: OwnCgroup,
    other: OwnCgroup,
    above: [OwnCgroup; 2],
    netns: OwnNetns,
    datagrams: UdpSocket,
    streams: TcpListener,
}

impl Scene {
    fn new(name: &str) -> Option<Self> {
        let kernel = load(Pinning::Unpinned)?;
        let (root, netns) = (OwnCgroup::new(name), OwnNetns::new());
        let kubepods = root.below("kubepods");
        let (pod, other) = (kubepods.below("pod"), kubepods.below("other"));
        kernel.set_settings(0, 2).unwrap();
        kernel.attach(&root.0).unwrap();
        kernel.attach_hooks(&kubepods.0).unwrap();
        let names = [443, 6443].map(|port| (EndpointName { host: NAME.to_owned(), port }, 3));
        kernel.set_names(&names).unwrap();
        let (datagrams, streams) =
            netns.within(|| (UdpSocket::bind(SERVER).unwrap(), TcpListener::bind(SERVER).unwrap()));
        let scene = Self { kernel, pod, other, above: [kubepods, root], netns, datagrams, streams };
        for pod in [&scene.pod, &scene.other] {
            scene.classify(pod, Class::Enrolled, None);
        }
        Some(scene)
    }

    fn classify(&self, pod: &OwnCgroup, class: Class, listener: Option<&Listener>) {
        let entry = CgroupEntry {
            listener_netns: listener.map_or(0, Listener::netns),
            class: class as u32,
            listener_port: listener.map_or(0, |listener| u32::from(listener.port())),
        };
        self.kernel.classify(pod.id(), entry).unwrap();
    }

    fn dial(&self, pod: &OwnCgroup, how: Dial) -> Result<(), nix::Error> {
        dial(&pod.0, Some(&self.netns), how).map(|_| ())
    }

    /// The same; an answer is waited for for this time.
    fn dial_for(&self, pod: &OwnCgroup, how: Dial, patience: Duration) -> Result<(), nix::Error> {
        dial_for(&pod.0, Some(&self.netns), how, patience).map(|_| ())
    }

    /// Has a pod ask the name server, which answers so. The answer is not to come.
    fn tell(&self, pod: &OwnCgroup, answer: &[u8]) -> Result<(), nix::Error> {
        self.tell_for(pod, answer, BRIEFLY)
    }

    /// The same; the answer is to come.
    #[track_caller]
    fn is_told(&self, pod: &OwnCgroup, answer: &[u8]) {
        self.tell_for(pod, answer, DEADLINE).expect("the pod has the answer");
    }

    fn tell_for(&self, pod: &OwnCgroup, answer: &[u8], patience: Duration) -> Result<(), nix::Error> {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (_, from) = self.datagrams.recv_from(&mut [0; 64]).unwrap();
                self.datagrams.send_to(answer, from).unwrap();
            });
            self.dial_for(pod, Dial::Ask(SERVER), patience)
        })
    }

    /// [`Self::tell`] over TCP, for this time.
    fn tell_stream(&self, pod: &OwnCgroup, answer: &[u8], patience: Duration) -> Result<(), nix::Error> {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut client, _) = self.streams.accept().unwrap();
                client.read_exact(&mut [0]).unwrap();
                let length = u16::try_from(answer.len()).unwrap().to_be_bytes();
                client.write_all(&[&length, answer].concat()).unwrap();
                // Until the client has it, or has given up.
                let _ = client.read(&mut [0]);
            });
            self.dial_for(pod, Dial::AskStream(SERVER), patience)
        })
    }

    /// An address that nobody was told yet, at which a server answers whoever gets there.
    fn fresh(&self, address: &str) -> (SocketAddr, TcpListener) {
        let address = SocketAddr::new(address.parse().unwrap(), 443);
        self.netns.take_address(address.ip());
        (address, self.netns.within(|| TcpListener::bind(address).unwrap()))
    }
}

fn name(text: &str) -> Name {
    Name::from_str(text).unwrap()
}

fn answer(question: &str, records: &[(&str, RData)]) -> Vec<u8> {
    let mut message = Message::new(7, MessageType::Response, OpCode::Query);
    message.add_query(Query::query(name(question), RecordType::A));
    for (owner, data) in records {
        message.add_answer(Record::from_rdata(name(owner), 60, data.clone()));
    }
    message.to_vec().unwrap()
}

fn data(address: IpAddr) -> RData {
    match address {
        IpAddr::V4(address) => RData::A(address.into()),
        IpAddr::V6(address) => RData::AAAA(address.into()),
    }
}

#[test]
fn an_address_is_an_api_servers_for_the_pod_that_is_told_it_before_it_can_use_it() {
    let Some(scene) = Scene::new("told") else { return };
    for address in ["198.51.100.7", "2001:db8::7"] {
        let (fresh, _server) = scene.fresh(address);
        let told = answer("API.example.test.", &[("API.example.test.", data(fresh.ip()))]);
        scene.dial(&scene.pod, Dial::Tcp(fresh)).expect("nobody has said anything of it");
        scene.is_told(&scene.pod, &told);
        assert_eq!(scene.dial(&scene.pod, Dial::Tcp(fresh)), Err(REFUSED), "{address}");
        assert_eq!(scene.dial(&scene.pod, Dial::SendTo(fresh)), Err(REFUSED));
        if fresh.is_ipv4() {
            assert_eq!(scene.dial(&scene.pod, Dial::Mapped(fresh)), Err(REFUSED));
            assert_eq!(scene.dial(&scene.pod, Dial::Raw(fresh, UDP, 0)), Err(nix::Error::EPERM), "the guard");
            assert_eq!(scene.dial(&scene.pod, Dial::Raw(fresh, UDP, 185)), Err(nix::Error::EPERM), "no port");
        }
        let elsewhere = SocketAddr::new(fresh.ip(), 80);
        scene.dial(&scene.pod, Dial::SendTo(elsewhere)).expect("another port is none of the name's");
        scene.dial(&scene.other, Dial::Tcp(fresh)).expect("a pod that was not told it is not concerned");
    }
    let (fresh, _server) = scene.fresh("198.51.100.6");
    let told = answer("api.example.test.", &[("api.example.test.", data(fresh.ip()))]);
    // As long as an answer may be.
    scene.is_told(&scene.pod, &[&told[..], &vec![0; 4096 - told.len()]].concat());
    assert_eq!(scene.dial(&scene.pod, Dial::Tcp(fresh)), Err(REFUSED));
    // With a listener it is served by that.
    let entered = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _entered = entered.enter();
    let listener = Listener::in_netns(Namespace::of_process(scene.netns.pid()).unwrap()).unwrap();
    scene.classify(&scene.pod, Class::Enrolled, Some(&listener));
    let redirected = scene.kernel.counters().unwrap().redirected;
    let (fresh, _server) = scene.fresh("198.51.100.8");
    let alias = RData::CNAME(CNAME(name("api.example.test.")));
    let told = answer("alias.test.", &[("alias.test.", alias), ("api.example.test.", data(fresh.ip()))]);
    scene.is_told(&scene.pod, &told);
    let (_, peer) = dial(&scene.pod.0, Some(&scene.netns), Dial::Tcp(fresh)).unwrap();
    assert_eq!((peer, scene.kernel.counters().unwrap().redirected), (fresh, redirected + 1));
    // Over TCP as well, which resolvers use for long answers.
    let (fresh, _server) = scene.fresh("198.51.100.9");
    let told = answer("api.example.test.", &[("api.example.test.", data(fresh.ip()))]);
    scene.tell_stream(&scene.pod, &told, DEADLINE).unwrap();
    scene.dial(&scene.pod, Dial::Tcp(fresh)).unwrap();
    assert_eq!(scene.kernel.counters().unwrap().redirected, redirected + 2);
    let suspected = scene.kernel.suspected().unwrap();
    // Each with two ports, and with any.
    assert_eq!(suspected.len(), 5 * 3, "{suspected:?}");
    assert!(
        suspected
            .iter()
            .all(|(suspect, suspicion)| (suspect.cgroup, suspicion.cluster) == (scene.pod.id(), 3))
    );
}

#[test]
fn what_a_pod_has_not_asked_for_is_kept_from_it_and_not_noted() {
    let Some(scene) = Scene::new("unasked") else { return };
    let (fresh, _server) = scene.fresh("198.51.100.7");
    let told = answer("api.example.test.", &[("api.example.test.", data(fresh.ip()))]);
    // What a neighbour, or anybody, sends from port 53 to a socket that is there for something else.
    let neighbour = scene.netns.within(|| UdpSocket::bind("127.0.0.1:5300").unwrap());
    let answered = |asked: &UdpSocket, answer: &[u8], question, patience| {
        std::thread::scope(|threads| {
            threads.spawn(|| {
                let (_, from) = asked.recv_from(&mut [0; 64]).unwrap();
                scene.datagrams.send_to(answer, from).unwrap();
            });
            scene.dial_for(&scene.pod, question, patience)
        })
    };
    let asked_at = |asked, question, patience| answered(asked, &told, question, patience);
    let by_neighbour = Dial::AskAnybody(neighbour.local_addr().unwrap());
    assert_eq!(asked_at(&neighbour, by_neighbour, BRIEFLY), Err(NO_ANSWER));
    // One socket asks, and another one at the same port hears.
    assert_eq!(asked_at(&scene.datagrams, Dial::AskByAnother(SERVER), BRIEFLY), Err(NO_ANSWER));
    // What is nobody's business arrives, whoever asked.
    let other = answer("other.test.", &[("other.test.", data(fresh.ip()))]);
    let asking = Dial::AskByAnother(SERVER);
    assert_eq!(answered(&scene.datagrams, &other, asking, DEADLINE), Ok(()));
    scene.dial(&scene.pod, Dial::Tcp(fresh)).expect("nothing is noted");
    // Over a connection to an open port of the pod.
    let (stranger, open) = ([127, 0, 0, 2], [127, 0, 0, 1]);
    let (stranger, open) = (SocketAddr::from((stranger, 53)), SocketAddr::from((open, 8080)));
    std::thread::scope(|threads| {
        threads.spawn(|| {
            let length = u16::try_from(told.len()).unwrap().to_be_bytes();
            let mut client = scene.netns.within(|| connect_from(stranger, open));
            client.write_all(&[&length[..], &told].concat()).unwrap();
        });
        assert_eq!(scene.dial(&scene.pod, Dial::Heed(open)), Err(NO_ANSWER));
    });
    scene.dial(&scene.pod, Dial::Tcp(fresh)).expect("nothing is noted");
    assert!(scene.kernel.suspected().unwrap().is_empty());
    // Without a connect is asked as well.
    asked_at(&scene.datagrams, Dial::AskAnybody(SERVER), DEADLINE).expect("the pod has the answer");
    assert_eq!(scene.dial(&scene.pod, Dial::Tcp(fresh)), Err(REFUSED));
}

#[test]
fn an_answer_that_cannot_be_read_is_kept_from_enrolled_pods_if_it_is_about_a_configured_name() {
    let Some(scene) = Scene::new("unread") else { return };
    let (fresh, _server) = scene.fresh("198.51.100.7");
    let told = answer("api.example.test.", &[("api.example.test.", data(fresh.ip()))]);
    let cut = &told[..told.len() - 1];
    assert_eq!(scene.tell(&scene.pod, cut), Err(NO_ANSWER));
    assert_eq!(
        scene
            .tell_stream(&scene.pod, cut, BRIEFLY)
            .and(scene.tell(&scene.pod, &[&told[..], &[0; 4096]].concat())),
        Err(NO_ANSWER)
    );
    scene.dial(&scene.pod, Dial::Tcp(fresh)).expect("and nothing is noted");
    // Nobody else's business.
    let other = answer("other.test.", &[("other.test.", data(fresh.ip()))]);
    scene.is_told(&scene.pod, &other);
    scene.is_told(&scene.pod, &other[..other.len() - 1]);
    scene.is_told(&scene.pod, b"no message at all");
    for class in [Class::Unselected, Class::Observed, Class::Agent] {
        scene.classify(&scene.pod, class, None);
        scene.is_told(&scene.pod, cut);
        scene.is_told(&scene.pod, &told);
    }
    scene.classify(&scene.pod, Class::Enrolled, None);
    scene.kernel.set_names(&[]).unwrap();
    scene.is_told(&scene.pod, cut);
    assert!(scene.kernel.suspected().unwrap().is_empty());
}

#[tokio::test]
async fn an_answer_that_is_kept_from_a_pod_is_reported_with_whom_it_came_from_and_why() {
    let Some(scene) = Scene::new("kept") else { return };
    let mut notices = scene.kernel.notices().unwrap().expect("taken once");
    let told =
        answer("api.example.test.", &[("api.example.test.", data(Ipv4Addr::new(198, 51, 100, 8).into()))]);
    let long = [&told[..], &[0; 4096]].concat();
    assert_eq!(scene.tell(&scene.pod, &long), Err(NO_ANSWER));
    assert_eq!(scene.tell_stream(&scene.other, &told[..told.len() - 1], BRIEFLY), Err(NO_ANSWER));
    for (pod, protocol, why) in
        [(&scene.pod, UDP, KeptAnswer::TooLong), (&scene.other, TCP, KeptAnswer::Unreadable)]
    {
        let notice = notices.next().await.unwrap();
        assert_eq!(NoticeKind::from_number(notice.kind), Some(NoticeKind::AnswerRefused));
        assert_eq!(KeptAnswer::from_notice(notice.protocol), (u32::from(protocol), Some(why)));
        let from = Ipv4Addr::LOCALHOST.to_ipv6_mapped().octets();
        assert_eq!(
            (notice.flow.pod_cgroup, notice.flow.original.address, notice.flow.original.port),
            (pod.id(), from, u32::from(SERVER.port()))
        );
    }
}

#[tokio::test]
async fn who_could_not_be_known_for_asking_does_not_ask_and_it_is_reported() {
    let Some(scene) = Scene::new("noteless") else { return };
    let mut notices = scene.kernel.notices().unwrap().expect("taken once");
    assert_eq!(scene.dial(&scene.pod, Dial::AskWithoutRoom(SERVER)), Err(REFUSED));
    let notice = notices.next().await.unwrap();
    assert_eq!(NoticeKind::from_number(notice.kind), Some(NoticeKind::QuestionRefused));
    assert_eq!(
        (notice.flow.pod_cgroup, notice.flow.original.port),
        (scene.pod.id(), u32::from(SERVER.port()))
    );
    // What is reported of one thing hides no other.
    let (api, _server) = scene.fresh("198.51.100.7");
    scene.kernel.set_api_endpoint(api, 3).unwrap();
    assert_eq!(scene.dial(&scene.pod, Dial::Raw(api, UDP, 0)), Err(nix::Error::EPERM));
    let notice = notices.next().await.unwrap();
    assert_eq!(NoticeKind::from_number(notice.kind), Some(NoticeKind::GuardDropped));
    // Whose answers are not read asks as ever.
    scene.classify(&scene.other, Class::Unselected, None);
    assert_eq!(scene.dial(&scene.other, Dial::AskWithoutRoom(SERVER)), Err(NO_ANSWER));
    // Where no name is configured nothing is noted.
    scene.kernel.set_names(&[]).unwrap();
    assert_eq!(scene.dial(&scene.pod, Dial::AskWithoutRoom(SERVER)), Err(NO_ANSWER));
}

/// An answer about the configured name that takes as many steps to read as are taken, and is not read to its end.
fn long_answer() -> Vec<u8> {
    // Two in turn: one that follows itself is told by a pointer, and not read again.
    let owners = ["l", "m"].map(|letter| format!("{0}.{0}.{0}.{NAME}", letter.repeat(60)));
    let records = (0..120).map(|index| (owners[index % 2].as_str(), data([198, 51, 100, 7].into())));
    let message = answer(NAME, &records.collect::<Vec<_>>());
    assert!(message.len() < 4096, "{}", message.len());
    message
}

#[test]
fn reading_a_pods_answers_costs_no_more_than_its_share_and_nobody_else_pays() {
    let Some(scene) = Scene::new("spent") else { return };
    let (long, short) =
        (long_answer(), answer("other.test.", &[("other.test.", data([198, 51, 100, 7].into()))]));
    let datagrams = &scene.datagrams;
    let bound = |address: &str| scene.netns.within(|| UdpSocket::bind(address).unwrap());
    // More than all that a pod has, and what it makes good for in the fraction of a second meanwhile.
    let flood = |from: &UdpSocket, to: SocketAddr| {
        for _ in 0..2 * STEPS_AHEAD_MAX / u64::from(STEPS_MAX) {
            from.send_to(&long, to).unwrap();
        }
    };
    // A pod's socket asks `asked`, is sent a flood and then an answer; meanwhile `then` sees how others fare.
    let flooded_for =
        |pod: &OwnCgroup, question, asked: &UdpSocket, by: &UdpSocket, then: &(dyn Fn() + Sync), patience| {
            std::thread::scope(|threads| {
                threads.spawn(|| {
                    let (_, to) = asked.recv_from(&mut [0; 64]).unwrap();
                    flood(by, to);
                    datagrams.send_to(&short, to).unwrap();
                    then();
                });
                scene.dial_for(pod, question, patience)
            })
        };
    // Where the machine stands still after a flood, it has made good for a part of it before the answer comes.
    let is_over = |pod: &OwnCgroup, question: Dial, asked: &UdpSocket, then: &(dyn Fn() + Sync)| {
        let over = |_: &usize| flooded_for(pod, question, asked, datagrams, then, BRIEFLY) == Err(NO_ANSWER);
        (0..TRIES).filter(over).count() > TRIES / 2
    };
    // What no socket asks for costs those nothing that are asked for.
    let neighbour = bound("127.0.0.1:5300");
    let question = Dial::AskAnybody(neighbour.local_addr().unwrap());
    // Its own questions are answered.
    let own = || scene.is_told(&scene.pod, &short);
    assert!(is_over(&scene.pod, question, &neighbour, &own), "no more is read");
    // Nor does what a stranger sends to a socket that asks.
    let stranger = bound("127.0.0.2:53");
    let asking = Dial::AskAnybody(SERVER);
    assert_eq!(flooded_for(&scene.pod, asking, datagrams, &stranger, &own, DEADLINE), Ok(()));
    // Pods that are not known yet are no one pod.
    let [kubepods, _] = &scene.above;
    scene.classify(kubepods, Class::Container, None);
    let [first, second] = ["first", "second"].map(|name| kubepods.below(name));
    // Another pod has its own share.
    let other = || scene.is_told(&second, &short);
    assert!(is_over(&first, Dial::Ask(SERVER), datagrams, &other), "it has its share");
    let other = || scene.is_told(&scene.other, &short);
    assert!(is_over(&scene.pod, Dial::Ask(SERVER), datagrams, &other), "it has its share");
    let answered_again = (0..100).any(|_| scene.tell(&scene.pod, &short).is_ok());
    assert!(answered_again, "it makes good for what it has spent");
}

#[test]
fn a_pod_that_tells_itself_more_than_there_is_room_for_is_told_no_more_and_takes_nobodys_room() {
    let Some(scene) = Scene::new("flood") else { return };
    let of = |number: u32| {
        let address = IpAddr::from(Ipv4Addr::from(0xc633_6400 + number));
        answer("api.example.test.", &[("api.example.test.", data(address))])
    };
    // Each takes three: two ports, and any.
    let room = SUSPECTED_BY_POD_MAX / 3;
    for number in 0..room {
        scene.is_told(&scene.pod, &of(number));
    }
    // It is noted already.
    scene.is_told(&scene.pod, &of(0));
    assert_eq!(scene.tell(&scene.pod, &of(room)), Err(NO_ANSWER));
    // Another pod has its own room.
    scene.is_told(&scene.other, &of(room));
    let (known, _server) = scene.fresh("198.51.100.0");
    assert_eq!(scene.dial(&scene.pod, Dial::Tcp(known)), Err(REFUSED), "what is noted stays");
    // What everybody knows takes no room.
    let address = SocketAddr::from((Ipv4Addr::from(0xc633_6400 + room), 443));
    for port in [443, 6443] {
        scene.kernel.set_api_endpoint(SocketAddr::new(address.ip(), port), 3).unwrap();
    }
    scene.is_told(&scene.pod, &of(room));
}
