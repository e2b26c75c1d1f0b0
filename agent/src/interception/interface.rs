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
    /// Whether that, or what a tunnel sends through, is in another network namespace.
    elsewhere: bool,
}

/// The interfaces of the pod whose network namespace this is; call it in the host's.
///
/// # Errors
/// The namespace cannot be entered, or the kernel does not answer.
pub(super) fn of_pod(pod: &File) -> io::Result<Interfaces> {
    judge(namespace::within(pod, links)??)
}

/// The same, and from before it was read on whatever changes.
///
/// # Errors
/// As of [`of_pod`].
pub(super) fn watch_pod(pod: &File) -> io::Result<(LinkWatch, Interfaces)> {
    let (watch, links) = namespace::within(pod, || io::Result::Ok((LinkWatch::open()?, links()?)))??;
    Ok((watch, judge(links)?))
}

/// Looks for the ends on the host of a pod's interfaces.
fn judge(links: Vec<Link>) -> io::Result<Interfaces> {
    let host = Netlink::open(NETLINK_ROUTE)?;
    let mut interfaces = Interfaces::default();
    for link in links {
        match link.role() {
            Role::Internal => {}
            Role::Veth(other) => {
                // Without one here its other end is in another namespace, and what it sends comes through that one's
                // interfaces.
                let end = link_at(&host, other)?.filter(|end| end.is_other_end_of(&link));
                interfaces.guardable.extend(end.map(|end| HostEnd { index: end.index, name: end.name }));
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
            (Some(kind), _) if self.elsewhere && *kind != InfoKind::Veth => Role::Direct,
            _ => Role::Internal,
        }
    }

    fn is_other_end_of(&self, link: &Self) -> bool {
        self.kind == Some(InfoKind::Veth) && self.other == Some(link.index)
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

fn link(message: RouteNetlinkMessage) -> Option<Link> {
    let RouteNetlinkMessage::NewLink(message) = message else { return None };
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        kind: None,
        loopback: message.header.flags.contains(netlink_packet_route::link::LinkFlags::Loopback),
        other: None,
        elsewhere: false,
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Link(other) => link.other = Some(other),
            LinkAttribute::LinkNetNsId(_) => link.elsewhere = true,
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
    pub(super) fn guard_interface(&mut self, end: &HostEnd) -> Result<(), AttachError> {
        self.attach_to_interface(end)?;
        // From here on a look at the kernel expects it there.
        self.interfaces.insert(end.index, end.name.clone());
        Ok(())
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
        end: &HostEnd,
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
        let guarded = self.guard_interface(end);
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
        Link { index: 2, name: "eth0".to_owned(), kind, loopback: false, other, elsewhere: false }
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
        assert!(matches!(Link { elsewhere: true, ..tunnel }.role(), Role::Direct));
        let pair = Link { elsewhere: true, ..link(Some(InfoKind::Veth), Some(7)) };
        assert!(matches!(pair.role(), Role::Veth(7)));
    }

    #[test]
    fn a_pair_is_known_by_both_ends() {
        let pod = link(Some(InfoKind::Veth), Some(7));
        let host = Link { index: 7, other: Some(2), ..pod.clone() };
        assert!(host.is_other_end_of(&pod));
        assert!(!Link { other: Some(3), ..host.clone() }.is_other_end_of(&pod));
        assert!(!Link { kind: None, ..host }.is_other_end_of(&pod));
    }
}
