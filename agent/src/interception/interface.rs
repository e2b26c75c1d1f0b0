//! The host's ends of a pod's network interfaces: where a guard sees whatever leaves the pod, also what no socket of
//! it sends (packet sockets, tun devices, nested network namespaces).
//!
//! Bridge, ptp and the VPC CNI all give a pod one end of a veth pair. Interfaces without an end of their own on the
//! host (ipvlan, macvlan, a network card moved into the pod) are named: their pods lack this guard.
//!
//! Here is also how the guard comes there, and stays the first that is asked.

use std::{
    fs::{self, File},
    io,
    mem::ManuallyDrop,
    os::fd::AsRawFd as _,
    path::Path,
};

use aya::{
    maps::{HashMap, MapData},
    programs::{
        LinkOrder, Program, SchedClassifier, TcAttachType,
        links::LinkError,
        tc::{self, NlOptions, TcAttachOptions, TcError},
    },
    util::KernelVersion,
};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage},
    nsid::{NsidAttribute, NsidMessage},
    tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption},
};
use netlink_sys::protocols::NETLINK_ROUTE;
use weir_common::kernel::{maps, programs};

use super::{
    attach::{AttachError, Attached, Inspection},
    bpf::{link_detach, open_pin},
    namespace,
    netlink::{LinkWatch, Netlink},
    pinned::pinned_map,
};

/// The priority of a filter that is asked before those of others.
const FIRST: u16 = 1;
/// How the pins of the guards of interfaces begin.
pub(super) const PIN: &str = "interface-";

/// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)`, linux/pkt_sched.h: where filters of what comes in are.
const INGRESS_FILTERS: u32 = 0xffff_fff2;

/// The host's end of a veth pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HostEnd {
    /// Index of the interface in the host's network namespace.
    pub(super) index: u32,
    /// Its name there.
    pub(super) name: String,
}

/// How a pod's interfaces can be guarded.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Interfaces {
    /// Those with an end on the host.
    pub(super) guardable: Vec<HostEnd>,
    /// Names in the pod of those without one that reach beyond the pod all the same.
    pub(super) unguarded: Vec<String>,
}

/// What matters of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Link {
    index: u32,
    name: String,
    /// None: a device of the machine, or `lo`.
    kind: Option<InfoKind>,
    loopback: bool,
    /// Index of the other end (veth) or of the device below (ipvlan, macvlan, vlan).
    other: Option<u32>,
    /// If that, or what a tunnel sends through, is in another network namespace: the number that the one this was asked
    /// in has for it, negative where it has none.
    elsewhere: Option<i32>,
}

/// The interfaces of the pod whose network namespace this is; call it in the host's.
///
/// # Errors
/// The namespace cannot be entered, or the kernel does not answer.
pub(super) fn of_pod(pod: &File) -> io::Result<Interfaces> {
    judge(pod, namespace::within(pod, links)??)
}

/// The same, and from before it was read on whatever changes.
///
/// # Errors
/// As of [`of_pod`].
pub(super) fn watch_pod(pod: &File) -> io::Result<(LinkWatch, Interfaces)> {
    let (watch, links) = namespace::within(pod, || io::Result::Ok((LinkWatch::open()?, links()?)))??;
    Ok((watch, judge(pod, links)?))
}

/// Looks for the ends on the host of a pod's interfaces.
fn judge(pod: &File, links: Vec<Link>) -> io::Result<Interfaces> {
    let host = Netlink::open(NETLINK_ROUTE)?;
    let mut interfaces = Interfaces::default();
    for link in links {
        match link.role() {
            Role::Internal => {}
            Role::Veth(other) => {
                // Without one here its other end is in another namespace, and what it sends comes through that one's
                // interfaces.
                let end = link_at(&host, other)?.filter(|end| end.is_paired_with(&link));
                let Some(end) = end else { continue };
                // Only then: with its answer above, the kernel has numbered the namespace that the other end is in. A pod
                // gives the interfaces in its own what indices it likes, also those of another pod's pair.
                if end.is_other_end_in(number(&host, pod)?)? {
                    interfaces.guardable.push(HostEnd { index: end.index, name: end.name });
                }
            }
            Role::Direct => interfaces.unguarded.push(link.name),
        }
    }
    Ok(interfaces)
}

/// What an interface is to a guard.
enum Role {
    /// Sends nothing beyond the pod by itself.
    Internal,
    /// One end of a pair; the index of the other.
    Veth(u32),
    /// Reaches beyond the pod without an end on the host.
    Direct,
}

impl Link {
    fn role(&self) -> Role {
        match (&self.kind, self.other) {
            _ if self.loopback => Role::Internal,
            (Some(InfoKind::Veth), Some(other)) => Role::Veth(other),
            (None | Some(InfoKind::IpVlan | InfoKind::IpVtap | InfoKind::MacVlan | InfoKind::MacVtap), _) => {
                Role::Direct
            }
            // A VLAN of a device outside is as direct as that device; tunnels, bridges, dummies and tun devices send
            // through one of the others, unless they were made in another namespace and moved here.
            (Some(InfoKind::Vlan), _) => Role::Direct,
            (Some(kind), _) if self.elsewhere.is_some() && *kind != InfoKind::Veth => Role::Direct,
            _ => Role::Internal,
        }
    }

    /// Whether kind and indices are those of the pair that an interface of another network namespace is of. Interfaces of a third
    /// one may have the same.
    fn is_paired_with(&self, link: &Self) -> bool {
        let both = [self, link].iter().all(|end| end.kind == Some(InfoKind::Veth) && end.elsewhere.is_some());
        both && self.other == Some(link.index) && link.other == Some(self.index)
    }

    /// Whether its other end is in the network namespace with this number, none if that has none.
    fn is_other_end_in(&self, namespace: Option<i32>) -> io::Result<bool> {
        match self.elsewhere {
            // Not to be taken for another pod's, which would have no guard.
            Some(..0) => Err(io::Error::other("the kernel has no number for a network namespace")),
            other => Ok(other.is_some() && other == namespace),
        }
    }
}

/// All interfaces of this thread's network namespace.
fn links() -> io::Result<Vec<Link>> {
    let mut links = Vec::new();
    Netlink::open(NETLINK_ROUTE)?.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()), |answer| {
        links.extend(link(answer));
    })?;
    Ok(links)
}

/// The interface with this index; none if there is none (any more).
fn link_at(netlink: &Netlink, index: u32) -> io::Result<Option<Link>> {
    let mut question = LinkMessage::default();
    question.header.index = index;
    let mut found = None;
    match netlink.request(RouteNetlinkMessage::GetLink(question), None, |answer| found = link(answer)) {
        Ok(()) => Ok(found),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The number that a network namespace has in the one that is asked in; none if it has none. It keeps it while it is there.
fn number(netlink: &Netlink, namespace: &File) -> io::Result<Option<i32>> {
    let mut question = NsidMessage::default();
    let file = u32::try_from(namespace.as_raw_fd()).map_err(io::Error::other)?;
    question.attributes.push(NsidAttribute::Fd(file));
    let mut number = None;
    netlink.request(RouteNetlinkMessage::GetNsId(question), None, |answer| {
        let RouteNetlinkMessage::NewNsId(answer) = answer else { return };
        number = answer.attributes.iter().find_map(|attribute| match attribute {
            NsidAttribute::Id(number) => Some(*number),
            _ => None,
        });
    })?;
    Ok(number.filter(|number| *number >= 0))
}

fn link(message: RouteNetlinkMessage) -> Option<Link> {
    let RouteNetlinkMessage::NewLink(message) = message else { return None };
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        kind: None,
        loopback: message.header.flags.contains(netlink_packet_route::link::LinkFlags::Loopback),
        other: None,
        elsewhere: None,
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Link(other) => link.other = Some(other),
            LinkAttribute::LinkNetNsId(number) => link.elsewhere = Some(number),
            LinkAttribute::LinkInfo(infos) => {
                link.kind = infos.into_iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    Some(link)
}

/// What judges what comes in by an interface on a kernel without links for it, in the order in which it is asked: the ids of
/// programs, none for a filter of another kind.
///
/// # Errors
/// The kernel does not answer.
fn filters(index: u32) -> io::Result<Vec<Option<u32>>> {
    let mut question = TcMessage::with_index(i32::try_from(index).map_err(io::Error::other)?);
    question.header.parent = TcHandle::from(INGRESS_FILTERS);
    let mut filters = Vec::new();
    Netlink::open(NETLINK_ROUTE)?.dump(RouteNetlinkMessage::GetTrafficFilter(question), |answer| {
        if let RouteNetlinkMessage::NewTrafficFilter(filter) = answer {
            filters.extend(judges(&filter).then(|| program(&filter)));
        }
    })?;
    Ok(filters)
}

/// Not the first message of each priority, which stands for the filters that follow, and no chain that others lead to.
fn judges(filter: &TcMessage) -> bool {
    let in_other_chain =
        |attribute: &TcAttribute| matches!(attribute, TcAttribute::Chain(chain) if *chain != 0);
    filter.header.handle != TcHandle::default() && !filter.attributes.iter().any(in_other_chain)
}

fn program(filter: &TcMessage) -> Option<u32> {
    let options = filter.attributes.iter().filter_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    });
    options.flatten().find_map(|option| match option {
        TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => Some(*id),
        _ => None,
    })
}

impl Attached {
    /// Attaches the guard of an interface, before whatever else is there, or replaces the pinned one.
    pub(super) fn guard_interface(&mut self, end: &HostEnd, cgroup: u64) -> Result<(), AttachError> {
        self.attach_to_interface(end)?;
        // From here on a look at the kernel expects it there.
        self.interfaces.insert(end.index, (end.name.clone(), cgroup));
        Ok(())
    }

    /// The cgroup of the pod that this process guards an interface for.
    pub(super) fn owner(&self, index: u32) -> Option<u64> {
        self.interfaces.get(&index).map(|(_, cgroup)| *cgroup)
    }

    fn attach_to_interface(&mut self, end: &HostEnd) -> Result<(), AttachError> {
        let program = programs::INTERFACE;
        let failed = |source| AttachError::Interface { name: end.name.clone(), source };
        let pin = self.pin(&interface_pin(end.index))?;
        if self.replaced(pin.as_deref(), program)? {
            return Ok(());
        }
        let Some(Program::SchedClassifier(classifier)) = self.ebpf.program_mut(program) else {
            return Err(AttachError::Link { program, source: LinkError::InvalidLink });
        };
        if links_for_interfaces() {
            let order = TcAttachOptions::TcxOrder(LinkOrder::first());
            let id =
                classifier.attach_with_options(&end.name, TcAttachType::Ingress, order).map_err(failed)?;
            let link = classifier.take_link(id).map_err(failed)?;
            let link = link.try_into().map_err(|source| AttachError::Link { program, source })?;
            return self.keep(link, pin);
        }
        // Before links for interfaces: a filter that stays on the interface until it is removed, or the interface
        // is. A former one, of another process as well, goes first: by its name both would go.
        match tc::qdisc_add_clsact(&end.name) {
            Ok(()) | Err(TcError::AlreadyAttached) => {}
            Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {}
            Err(error) => return Err(failed(error.into())),
        }
        remove_filter(&end.name).map_err(|error| failed(error.into()))?;
        let first = TcAttachOptions::Netlink(NlOptions { priority: FIRST, ..NlOptions::default() });
        let id = classifier.attach_with_options(&end.name, TcAttachType::Ingress, first).map_err(failed)?;
        let filter = classifier.take_link(id).map_err(failed)?;
        if self.pins.is_some() {
            self.filters.push(ManuallyDrop::new(filter));
        } else {
            self.own_filters.push(filter);
        }
        Ok(())
    }

    /// Forgets the guard of an interface that is gone.
    pub(super) fn unguard_interface(&mut self, index: u32) -> Result<(), AttachError> {
        self.interfaces.remove(&index);
        let Some(path) = self.pin(&interface_pin(index))? else { return Ok(()) };
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(AttachError::Remove { path, source })
            }
            _ => Ok(()),
        }
    }

    /// Ours is to be the first that is asked: what stands before it may let everything pass without it.
    pub(super) fn inspect_interface(
        &mut self,
        (end, cgroup): (&HostEnd, u64),
        found: &mut Inspection,
    ) -> Result<(), AttachError> {
        if !is_there(end) {
            return Ok(());
        }
        let Some((own, _)) = self.id_and_kind(programs::INTERFACE) else { return Ok(()) };
        let attached = if links_for_interfaces() {
            SchedClassifier::query_tcx(&end.name, TcAttachType::Ingress)
                .map(|(_, programs)| programs.iter().map(|program| Some(program.id())).collect())
                .map_err(io::Error::other)
        } else {
            filters(end.index)
        };
        // An interface that goes at this moment cannot be asked.
        let Ok(attached): io::Result<Vec<Option<u32>>> = attached else { return Ok(()) };
        let pin = self.pin(&interface_pin(end.index))?;
        let pinned = !links_for_interfaces() || pin.as_ref().is_none_or(|pin| pin.exists());
        let place = attached.iter().position(|program| *program == Some(own));
        if pinned && place == Some(0) {
            return Ok(());
        }
        let before = &attached[..place.unwrap_or_default()];
        let beside = |other: &u32| (*other, format!("{other} before Weir's at the interface {}", end.name));
        found.foreign.extend(before.iter().flatten().map(beside));
        if links_for_interfaces() && !before.is_empty() {
            // A link cannot be moved, and the kernel attaches no program twice. In between nothing passes that did not before.
            // A link that is not pinned is out of reach here: what stands before it is only reported.
            let Some(pin) = pin.as_deref() else { return Ok(()) };
            if pin.exists() {
                let update = |source| AttachError::Update { path: pin.to_owned(), source };
                open_pin(pin).and_then(|link| link_detach(&link)).map_err(update)?;
                self.remove_pin(Some(pin))?;
            }
        }
        // Replaced in place if the link is still there. An interface that goes at this moment has lost its guard first, and needs none.
        let guarded = self.guard_interface(end, cgroup);
        if guarded.is_err() && !is_there(end) {
            return Ok(());
        }
        guarded?;
        found.repaired.push(format!("{} at the interface {}", programs::INTERFACE, end.name));
        Ok(())
    }
}

fn is_there(end: &HostEnd) -> bool {
    nix::net::if_::if_nametoindex(end.name.as_str()).is_ok_and(|index| index == end.index)
}

/// Whether the kernel has links for programs at interfaces (tcx, 6.6).
pub(super) fn links_for_interfaces() -> bool {
    KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 6, 0))
}

fn interface_pin(index: u32) -> String {
    format!("{PIN}{index}")
}

/// Removes the guard of an interface on a kernel that has no links for it; that there is none is no error.
pub(super) fn remove_filter(interface: &str) -> Result<(), TcError> {
    match tc::qdisc_detach_program(interface, TcAttachType::Ingress, programs::INTERFACE) {
        Err(TcError::IoError(error)) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
        Err(error @ TcError::NetlinkError(_)) => {
            tracing::debug!(interface, error = &error as &dyn std::error::Error, "no guard to remove");
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Removes the guards of interfaces that no pin keeps; the pinned map says where they are.
pub(super) fn remove_filters(pins: &Path) {
    let interfaces: Result<HashMap<MapData, u32, u64>, _> = pinned_map(&pins.join("maps"), maps::INTERFACES);
    let Ok(interfaces) = interfaces else { return };
    for index in interfaces.keys().flatten() {
        // One that is gone took its guard along.
        let Ok(name) = nix::net::if_::if_indextoname(index) else { continue };
        let Ok(name) = name.into_string() else { continue };
        if let Err(error) = remove_filter(&name) {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(
                event = "interface-guard-stays",
                interface = name,
                error,
                "a guard stays; remove it with tc filter delete dev NAME ingress"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::link::InfoKind;

    use super::{Link, Role};

    fn link(kind: Option<InfoKind>, other: Option<u32>) -> Link {
        Link { index: 2, name: "eth0".to_owned(), kind, loopback: false, other, elsewhere: None }
    }

    #[test]
    fn only_a_veth_has_an_end_on_the_host() {
        assert!(matches!(link(Some(InfoKind::Veth), Some(7)).role(), Role::Veth(7)));
        for kind in [InfoKind::IpVlan, InfoKind::MacVlan, InfoKind::Vlan] {
            assert!(matches!(link(Some(kind), Some(7)).role(), Role::Direct));
        }
        assert!(matches!(link(None, None).role(), Role::Direct), "a network card");
        assert!(matches!(link(Some(InfoKind::Dummy), None).role(), Role::Internal));
        assert!(matches!(Link { loopback: true, ..link(None, None) }.role(), Role::Internal));
    }

    #[test]
    fn a_tunnel_that_sends_through_another_namespace_is_as_direct_as_a_network_card() {
        let tunnel = link(Some(InfoKind::Vxlan), None);
        assert!(matches!(tunnel.role(), Role::Internal));
        assert!(matches!(Link { elsewhere: Some(0), ..tunnel }.role(), Role::Direct));
        let pair = Link { elsewhere: Some(0), ..link(Some(InfoKind::Veth), Some(7)) };
        assert!(matches!(pair.role(), Role::Veth(7)));
    }

    #[test]
    fn a_pair_is_known_by_both_ends_and_the_pods_namespace() {
        let pod = Link { elsewhere: Some(0), ..link(Some(InfoKind::Veth), Some(7)) };
        let host = Link { index: 7, other: Some(2), elsewhere: Some(5), ..pod.clone() };
        assert!(host.is_paired_with(&pod));
        for other in [
            Link { other: Some(3), ..host.clone() },
            Link { index: 8, ..host.clone() },
            Link { kind: None, ..host.clone() },
            Link { elsewhere: None, ..host.clone() },
        ] {
            assert!(!other.is_paired_with(&pod), "{other:?}");
        }
        assert!(!host.is_paired_with(&Link { elsewhere: None, ..pod }), "both ends are in the pod");

        assert!(host.is_other_end_in(Some(5)).unwrap());
        assert!(!host.is_other_end_in(Some(0)).unwrap(), "another pod's");
        assert!(!host.is_other_end_in(None).unwrap());
        assert!(!Link { elsewhere: None, ..host.clone() }.is_other_end_in(None).unwrap());
        Link { elsewhere: Some(-1), ..host }.is_other_end_in(None).unwrap_err();
    }
}
