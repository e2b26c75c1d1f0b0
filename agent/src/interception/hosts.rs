//! The machines of the node's cluster and every address by which each is reached.
//!
//! An API server that listens on all addresses of its machine is reached by each of them, and every machine's kubelet
//! takes exec and logs for all of its pods: where those listen, enrolled pods must not get past Weir. What another
//! machine's addresses are, its Node object says; this one's are read from its interfaces, bridges of the CNI included.

use std::{
    collections::{BTreeSet, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use tokio::{sync::watch, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;

/// How often this machine's addresses are read: interfaces come and go with pods and CNI.
const LOCAL_CHECK: Duration = Duration::from_secs(2);
/// The kubelet's port where no Node object says another one (`--port`, kubelet.config.k8s.io/v1beta1).
pub(super) const KUBELET_PORT: u16 = 10250;

/// A machine, as its Node object describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Every address, in no order.
    pub addresses: BTreeSet<IpAddr>,
    /// Where its kubelet listens.
    pub kubelet_port: u16,
}

/// All machines that are known.
pub type Hosts = Arc<Vec<Host>>;

/// Keeps `publish` up to date with the Node objects and this machine's own addresses until cancelled.
pub(super) async fn follow(
    mut nodes: watch::Receiver<Hosts>,
    publish: watch::Sender<Hosts>,
    cancellation: CancellationToken,
) {
    let mut check = tokio::time::interval(LOCAL_CHECK);
    check.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut watched = true;
    loop {
        tokio::select! {
            () = cancellation.cancelled() => return,
            // Whoever watched may have ended: what is known stays.
            changed = nodes.changed(), if watched => watched = changed.is_ok(),
            _ = check.tick() => {}
        }
        let local = match local_addresses() {
            Ok(local) => local,
            Err(error) => {
                tracing::error!(event = "host-addresses-not-read", %error, "cannot read this machine's addresses; the last known ones stay");
                continue;
            }
        };
        let hosts = with_local(&nodes.borrow_and_update(), local);
        publish.send_if_modified(|current| {
            let changed = **current != hosts;
            if changed {
                *current = Arc::new(hosts);
            }
            changed
        });
    }
}

/// The addresses of this machine's interfaces; 127.0.0.1 stands for all that mean the machine itself.
///
/// # Errors
/// As of `getifaddrs`.
pub(super) fn local_addresses() -> std::io::Result<BTreeSet<IpAddr>> {
    let interfaces = nix::ifaddrs::getifaddrs()?;
    // kube-proxy's dummy interface bears every ClusterIP: those are no addresses of this machine.
    let interfaces = interfaces.filter(|interface| interface.interface_name != "kube-ipvs0");
    let addresses = interfaces.filter_map(|interface| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
    });
    Ok(addresses.collect())
}

/// The machines of the Node objects, this one with what only it knows of itself.
pub(super) fn with_local(nodes: &[Host], local: BTreeSet<IpAddr>) -> Vec<Host> {
    let mut hosts = nodes.to_vec();
    let is_this = |host: &&mut Host| host.addresses.iter().any(|address| local.contains(address));
    match hosts.iter_mut().find(is_this) {
        Some(this) => this.addresses.extend(local),
        None => hosts.push(Host { addresses: local, kubelet_port: KUBELET_PORT }),
    }
    hosts
}

/// The addresses that reach these endpoints beside the ones they are published with.
pub(super) fn aliases(endpoints: &HashSet<SocketAddr>, hosts: &[Host]) -> HashSet<SocketAddr> {
    let of_endpoint = |endpoint: &SocketAddr| {
        let (ip, port) = (endpoint.ip(), endpoint.port());
        let hosts = hosts.iter().filter(move |host| host.addresses.contains(&ip));
        hosts.flat_map(move |host| host.addresses.iter().map(move |address| SocketAddr::new(*address, port)))
    };
    endpoints.iter().flat_map(of_endpoint).filter(|address| !endpoints.contains(address)).collect()
}

/// The addresses of all kubelets.
pub(super) fn kubelets(hosts: &[Host]) -> HashSet<SocketAddr> {
    let of_host = |host: &Host| {
        let port = host.kubelet_port;
        host.addresses.iter().map(|address| SocketAddr::new(*address, port)).collect::<Vec<_>>()
    };
    hosts.iter().flat_map(of_host).collect()
}

/// The addresses that CNIs give the machine in its own range of pod addresses: the range's own address (Flannel's tunnel)
/// and the first one (bridges). None if it is no range.
pub(super) fn gateways(range: &str) -> Vec<IpAddr> {
    fn of(range: &str) -> Option<[IpAddr; 2]> {
        let (address, length) = range.split_once('/')?;
        let length: u32 = length.parse().ok()?;
        Some(match address.parse().ok()? {
            IpAddr::V4(address) => {
                let mask = u32::MAX.checked_shl(32_u32.checked_sub(length)?).unwrap_or(0);
                let first = u32::from(address) & mask;
                [first, first.saturating_add(1)].map(|address| Ipv4Addr::from(address).into())
            }
            IpAddr::V6(address) => {
                let mask = u128::MAX.checked_shl(128_u32.checked_sub(length)?).unwrap_or(0);
                let first = u128::from(address) & mask;
                [first, first.saturating_add(1)].map(|address| Ipv6Addr::from(address).into())
            }
        })
    }
    of(range).into_iter().flatten().collect()
}

/// Whether an annotation of a Node object names an address of the machine: tunnels of Calico and Cilium.
pub(super) fn is_address_annotation(name: &str) -> bool {
    let calico = name.strip_prefix("projectcalico.org/");
    calico.is_some_and(|name| {
        name.ends_with("TunnelAddr") || name.ends_with("InterfaceAddr") || name.ends_with("Address")
    }) || name.starts_with("network.cilium.io/ipv")
        || name == "flannel.alpha.coreos.com/public-ip"
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, net::IpAddr};

    use super::{Host, aliases, gateways, is_address_annotation, kubelets, with_local};

    fn host(addresses: &[&str], kubelet_port: u16) -> Host {
        Host {
            addresses: addresses.iter().map(|address| address.parse().expect("an address")).collect(),
            kubelet_port,
        }
    }

    fn sorted(addresses: HashSet<std::net::SocketAddr>) -> Vec<String> {
        let mut addresses: Vec<_> = addresses.into_iter().map(|address| address.to_string()).collect();
        addresses.sort();
        addresses
    }

    #[test]
    fn an_api_server_is_reached_by_every_address_of_its_machine() {
        let hosts = [host(&["192.0.2.1", "198.51.100.1", "2001:db8::1"], 10250), host(&["192.0.2.2"], 10250)];
        let endpoints = HashSet::from(["192.0.2.1:6443".parse().expect("an address")]);
        assert_eq!(sorted(aliases(&endpoints, &hosts)), ["198.51.100.1:6443", "[2001:db8::1]:6443"]);
        let elsewhere = HashSet::from(["203.0.113.9:443".parse().expect("an address")]);
        assert!(aliases(&elsewhere, &hosts).is_empty());
    }

    #[test]
    fn this_machine_is_known_by_its_interfaces_also_before_its_node_is() {
        let local = || host(&["192.0.2.1", "10.244.0.1"], 0).addresses;
        assert_eq!(with_local(&[], local()), [host(&["192.0.2.1", "10.244.0.1"], 10250)]);
        let nodes = [host(&["192.0.2.2"], 10250), host(&["192.0.2.1"], 10255)];
        let expected = [host(&["192.0.2.2"], 10250), host(&["192.0.2.1", "10.244.0.1"], 10255)];
        assert_eq!(with_local(&nodes, local()), expected);
        assert_eq!(sorted(kubelets(&expected)), ["10.244.0.1:10255", "192.0.2.1:10255", "192.0.2.2:10250"]);
    }

    #[test]
    fn a_machine_has_the_first_two_addresses_of_its_range() {
        for (range, expected) in [
            ("10.244.3.0/24", &["10.244.3.0", "10.244.3.1"][..]),
            ("10.244.3.7/24", &["10.244.3.0", "10.244.3.1"]),
            ("0.0.0.0/0", &["0.0.0.0", "0.0.0.1"]),
            ("255.255.255.255/32", &["255.255.255.255", "255.255.255.255"]),
            ("fd00:10:244:1::/64", &["fd00:10:244:1::", "fd00:10:244:1::1"]),
            ("10.244.3.0/33", &[]),
            ("10.244.3.0", &[]),
            ("x/24", &[]),
        ] {
            let expected: Vec<IpAddr> =
                expected.iter().map(|address| address.parse().expect("an address")).collect();
            assert_eq!(gateways(range), expected, "{range}");
        }
    }

    #[test]
    fn tunnels_of_calico_and_cilium_are_addresses_of_the_machine() {
        for (name, expected) in [
            ("projectcalico.org/IPv4VXLANTunnelAddr", true),
            ("projectcalico.org/IPv4WireguardInterfaceAddr", true),
            ("network.cilium.io/ipv4-cilium-host", true),
            ("projectcalico.org/WireguardPublicKey", false),
            ("node.alpha.kubernetes.io/ttl", false),
        ] {
            assert_eq!(is_address_annotation(name), expected, "{name}");
        }
    }
}
