//! Proxies that would carry API traffic past Weir: `HTTPS_PROXY` and its kin, `NO_PROXY` respected.
//!
//! Judges as Go's `golang.org/x/net/http/httpproxy` does, which is what kubectl, Helm and client-go use;
//! `ALL_PROXY`, which curl and Python respect, counts as well. Pure: the environment is a parameter.

use std::net::IpAddr;

use super::kubeconfig::Server;

/// A variable that would send requests for a server to a proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Carried {
    /// Name of the variable.
    pub variable: &'static str,
    /// The server's host.
    pub host: String,
}

/// The first variable of `environment` that applies to `server`, if one does.
pub fn carried(server: &Server, environment: impl Fn(&str) -> Option<String>) -> Option<Carried> {
    let set = |name: &&str| environment(name).is_some_and(|value| !value.trim().is_empty());
    let variables: &[&'static str] = if server.tls {
        &["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"]
    } else {
        &["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"]
    };
    let variable = variables.iter().copied().find(|name| set(name))?;
    let exceptions =
        ["NO_PROXY", "no_proxy"].into_iter().find(set).and_then(&environment).unwrap_or_default();
    (!is_exempt(server, &exceptions)).then(|| Carried { variable, host: server.host.clone() })
}

/// Whether Go would dial `server` itself, given `exceptions` (the value of `NO_PROXY`).
fn is_exempt(server: &Server, exceptions: &str) -> bool {
    let host = server.host.to_ascii_lowercase();
    let address: Option<IpAddr> = host.parse().ok();
    if host == "localhost" || address.is_some_and(|address| address.is_loopback()) {
        return true;
    }
    exceptions.split(',').map(|entry| entry.trim().to_ascii_lowercase()).any(|entry| {
        if entry == "*" {
            return true;
        }
        if let Some((network, bits)) = entry.split_once('/')
            && let (Ok(network), Ok(bits)) = (network.parse(), bits.parse())
        {
            return address.is_some_and(|address| in_network(address, network, bits));
        }
        let (name, port) = split_port(&entry);
        if name.is_empty() || port.is_some_and(|port| port != server.port) {
            return false;
        }
        if let Ok(exempt) = name.parse::<IpAddr>() {
            return address.is_some_and(|address| address.to_canonical() == exempt.to_canonical());
        }
        let suffix = name.strip_prefix('*').filter(|rest| rest.starts_with('.')).unwrap_or(name);
        match suffix.strip_prefix('.') {
            Some(_) => host.ends_with(suffix),
            None => host == suffix || host.strip_suffix(suffix).is_some_and(|rest| rest.ends_with('.')),
        }
    })
}

/// `host:port`, `[v6]:port`, or a host without port; a bare IPv6 address has none.
fn split_port(entry: &str) -> (&str, Option<u16>) {
    let unbracket = |host: &str| host.starts_with('[') && host.ends_with(']');
    if let Some((host, port)) = entry.rsplit_once(':')
        && let Ok(port) = port.parse()
        && (unbracket(host) || !host.contains(':'))
    {
        return (host.trim_matches(['[', ']']), Some(port));
    }
    (entry.trim_matches(['[', ']']), None)
}

fn in_network(address: IpAddr, network: IpAddr, bits: u32) -> bool {
    fn same<const N: usize>(address: [u8; N], network: [u8; N], bits: u32) -> bool {
        let length = u32::try_from(N * 8).unwrap_or(0);
        bits <= length
            && (0..bits).all(|bit| {
                let (byte, shift) = ((bit / 8) as usize, 7 - bit % 8);
                (address[byte] ^ network[byte]) >> shift & 1 == 0
            })
    }
    match (address.to_canonical(), network) {
        (IpAddr::V4(address), IpAddr::V4(network)) => same(address.octets(), network.octets(), bits),
        (IpAddr::V6(address), IpAddr::V6(network)) => same(address.octets(), network.octets(), bits),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(host: &str) -> Server {
        Server { tls: true, host: host.to_owned(), port: 6443 }
    }

    fn with<'a>(variables: &'a [(&str, &str)]) -> impl Fn(&str) -> Option<String> + 'a {
        |name| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
    }

    #[test]
    fn the_variable_that_carries_is_named() {
        let variable = |variables: &[(&str, &str)]| {
            carried(&server("api.example"), with(variables)).map(|carried| carried.variable)
        };
        assert_eq!(variable(&[]), None);
        assert_eq!(variable(&[("HTTPS_PROXY", "")]), None);
        assert_eq!(variable(&[("HTTP_PROXY", "p")]), None, "Go sends https:// by HTTPS_PROXY alone");
        assert_eq!(variable(&[("https_proxy", "p")]), Some("https_proxy"));
        assert_eq!(variable(&[("ALL_PROXY", "socks5://p")]), Some("ALL_PROXY"));
        assert_eq!(variable(&[("HTTPS_PROXY", "p"), ("NO_PROXY", "api.example")]), None);
        assert_eq!(variable(&[("HTTPS_PROXY", "p"), ("no_proxy", "other")]), Some("HTTPS_PROXY"));
    }

    #[test]
    fn exceptions_are_read_as_go_reads_them() {
        for (host, exceptions, exempt) in [
            ("localhost", "", true),
            ("127.8.0.1", "", true),
            ("::1", "", true),
            ("api.example", "", false),
            ("api.example", " * ", true),
            ("api.example", "example", true),
            ("api.example", ".example", true),
            ("api.example", "*.example", true),
            ("example", ".example", false),
            ("example", "example", true),
            ("badexample", "example", false),
            ("API.Example", "api.EXAMPLE", true),
            ("api.example", "a,, api.example:6443", true),
            ("api.example", "api.example:443", false),
            ("10.1.2.3", "10.0.0.0/8", true),
            ("11.1.2.3", "10.0.0.0/8", false),
            ("10.1.2.3", "0.0.0.0/0", true),
            ("10.1.2.3", "10.1.2.3:6443", true),
            ("10.1.2.3", "10.1.2", false),
            ("fd00::5", "fd00::/64", true),
            ("fd00::5", "[fd00::5]:6443", true),
            ("fd00::5", "fd00::5", true),
            ("fd00::6", "fd00::5", false),
            ("10.1.2.3", "10.0.0.0/99", false),
        ] {
            assert_eq!(is_exempt(&server(host), exceptions), exempt, "{host} with NO_PROXY={exceptions}");
        }
    }
}
