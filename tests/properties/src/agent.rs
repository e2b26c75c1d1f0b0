//! Properties of what the agent reads beside bodies: request heads, its configuration, kubeconfigs, certificates,
//! cgroup paths.

use std::{net::SocketAddr, path::Path, sync::OnceLock};

use http::{HeaderValue, Method, Request, Version};
use serde_yaml_ng::Value;
use weir_agent::{
    config::{CLUSTERS_MAX, Config, JOURNAL_BYTES_MIN},
    exec,
    interception::{
        answers,
        pod::{self, PodCgroup},
    },
    nri::wire::{Decoder, Message},
    proxy,
    trust::{ClusterCa, ServingNames, authority::EphemeralCa},
};

use crate::{kernel, masks::header_map};

const CA: &str = "-----BEGIN CERTIFICATE-----\nV0VJUg==\n-----END CERTIFICATE-----\n";

/// The input is a request line's method and target, then headers. What is accepted names the cluster, and what goes
/// on has nothing of the client's connection and nothing that only Weir may say.
pub fn request_head(bytes: &[u8]) {
    let mut lines = bytes.splitn(3, |byte| *byte == b'\n');
    let (method, target) = (lines.next().unwrap_or(b""), lines.next().unwrap_or(b""));
    let (Ok(method), Ok(uri)) = (Method::from_bytes(method), http::Uri::try_from(target)) else { return };
    let headers = header_map(lines.next().unwrap_or(b""));
    let mut head = Request::new(()).into_parts().0;
    (head.method, head.uri, head.headers) = (method, uri, headers.clone());
    for version in [Version::HTTP_11, Version::HTTP_2] {
        head.version = version;
        let names = ["kubernetes.default.svc".to_owned(), "10.96.0.1".to_owned()];
        let dialled: SocketAddr = "10.0.0.5:6443".parse().expect("is an address");
        let Some((authority, upgrade)) = proxy::probe::accepted(&head, &names, dialled) else { continue };
        assert!(is_the_clusters(&authority), "{authority} was accepted");
        assert!(head.method != Method::CONNECT);
        assert!(upgrade.is_none() || version == Version::HTTP_11);
        for upgrade in [false, upgrade.is_some()] {
            goes_on(&headers, upgrade);
        }
    }
}

/// The input is what a container runtime sends, and how long the reads are that it comes in. The messages do not depend on that,
/// and no more is kept than what the longest message needs.
pub fn nri(bytes: &[u8]) {
    const KEPT_MAX: usize = 2 * ((4 << 20) + 10) + 8;
    let Some((read, bytes)) = bytes.split_first() else { return };
    let whole = Decoder::default().push(bytes);
    let (mut decoder, mut parts) = (Decoder::default(), Ok(Vec::new()));
    for part in bytes.chunks(usize::from(*read).max(1)) {
        match (&mut parts, decoder.push(part)) {
            (Ok(parts), Ok(more)) => parts.extend(more),
            (Ok(_), Err(error)) => {
                parts = Err(error);
                break;
            }
            (Err(_), _) => break,
        }
        assert!(decoder.kept() <= KEPT_MAX.min(bytes.len()), "more is kept than came");
    }
    assert_eq!(whole, parts);
    for message in parts.into_iter().flatten() {
        // What the agent can send itself, it reads as it was.
        let Ok(sent) = message.encode() else { continue };
        let read: Vec<Message> = Decoder::default().push(&sent).expect("is a message");
        assert_eq!(read, [message]);
    }
}

fn is_the_clusters(authority: &str) -> bool {
    let authority = authority.to_ascii_lowercase();
    let (host, port) = match authority.rsplit_once(':') {
        // What is behind the last colon of a bare IPv6 address is a part of it.
        Some((host, port)) if !port.ends_with(']') => (host, port),
        _ => (authority.as_str(), ""),
    };
    if !port.is_empty() && port.parse() != Ok(6443_u16) {
        return false;
    }
    let bare = host.trim_matches(['[', ']']).trim_end_matches('.');
    let address = bare.parse::<std::net::IpAddr>().map(|address| address.to_canonical().to_string());
    ["kubernetes.default.svc", "10.96.0.1", "10.0.0.5"].contains(&address.as_deref().unwrap_or(bare))
}

fn goes_on(headers: &http::HeaderMap, upgrade: bool) {
    let audit_id = HeaderValue::from_static("audit");
    let pod_ip = HeaderValue::from_static("10.1.2.3");
    for pod_ip in [None, Some(&pod_ip)] {
        let forwarded = proxy::probe::forwarded(headers, audit_id.clone(), pod_ip, 7, upgrade);
        for name in
            ["transfer-encoding", "te", "keep-alive", "proxy-authorization", "host", "trailer", "forwarded"]
        {
            assert!(!forwarded.contains_key(name), "{name} goes on");
        }
        assert!(forwarded.keys().all(|name| !name.as_str().starts_with("x-remote-")));
        assert!(upgrade || !(forwarded.contains_key("connection") || forwarded.contains_key("upgrade")));
        let only = |name: &str| forwarded.get_all(name).iter().collect::<Vec<_>>();
        assert_eq!(only("audit-id"), [&audit_id]);
        assert_eq!(only("x-forwarded-for"), pod_ip.into_iter().collect::<Vec<_>>());
        assert_eq!(only("content-length"), ["7"]);
    }
}

/// A configuration that is accepted keeps the bounds that the documentation states.
pub fn configuration(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match Config::parse(Path::new("weir.yaml"), text, "node") {
        Ok(config) => {
            assert!((1..=CLUSTERS_MAX).contains(&config.clusters.len()));
            assert!(!config.enrolment.is_empty());
            assert!(config.journal.bytes_max >= JOURNAL_BYTES_MIN && config.journal.directory.is_absolute());
            assert!(config.limits.drain.as_secs() <= 3600 && !config.limits.session_idle_timeout.is_zero());
            let mut names: Vec<&str> = config.clusters.iter().map(|cluster| cluster.name.as_str()).collect();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), config.clusters.len(), "two clusters have one name");
        }
        Err(error) => assert!(error.to_string().starts_with("configuration weir.yaml: "), "{error}"),
    }
}

/// The copy of a kubeconfig can be read and says the same but for the clusters' certificate authorities; those hold
/// what was given and certificates, nothing else.
pub fn kubeconfig(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Some(copied) = exec::probe::copied(text, CA) else { return };
    let copied = copied.unwrap_or_else(|error| panic!("the copy cannot be read: {error}"));
    let rest = |mut document: Value| {
        let clusters = document.get_mut("clusters").and_then(Value::as_sequence_mut);
        for cluster in clusters.into_iter().flatten().filter_map(|entry| entry.get_mut("cluster")) {
            if let Some(cluster) = cluster.as_mapping_mut() {
                cluster.remove("certificate-authority");
                cluster.remove("certificate-authority-data");
            }
        }
        document
    };
    assert_eq!(rest(copied.document), rest(copied.copy), "the copy {:?} says something else", copied.content);
}

/// No chain is trusted by a CA that did not sign it, and a bundle that is accepted is not empty.
pub fn certificates(bytes: &[u8]) {
    static OWN: OnceLock<(ClusterCa, ServingNames)> = OnceLock::new();
    let (own, names) = OWN.get_or_init(|| {
        let ca = EphemeralCa::generate().expect("a CA can be made");
        let own =
            ClusterCa::from_pem(ca.certificate_pem().as_bytes(), "own").expect("its certificate is valid");
        (own, ServingNames::of_own_cluster([]))
    });
    if let Ok(bundle) = ClusterCa::from_pem(bytes, "bundle") {
        assert!(!bundle.roots().is_empty());
    }
    if let Ok(bundle) = ClusterCa::from_der([bytes], "bundle") {
        assert_eq!(bundle.roots().len(), 1);
    }
    let chain = weir_agent::trust::probe::chain(bytes);
    assert!(own.verify(&chain, names).is_err(), "a stranger's chain is trusted");
    assert!(own.verify(&[bytes.to_vec().into()], names).is_err(), "a stranger's certificate is trusted");
}

/// A cgroup below a pod's or a container's is of the same pod and container, and ids are what they look like.
pub fn cgroup_path(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let path = Path::new(text);
    let Some(PodCgroup { pod, container }) = pod::parse(path) else { return };
    assert!(text.contains("kubepods"));
    assert!(pod::PodUid::new(pod.as_str()).as_ref() == Some(&pod), "{pod:?} is no UID");
    assert!(text.replace('_', "-").contains(pod.as_str()), "{pod:?} does not stand in {text:?}");
    if let Some(container) = &container {
        assert!(container.len() == 64 && text.contains(container.as_str()), "{container:?} is no container");
    }
    let below = pod::parse(&path.join("kubepods/pod00/own")).expect("below a pod's is a pod's");
    assert_eq!((below.pod, below.container), (pod, container));
}

/// Any packet: what is taken for an answer is bounded, and names no address of this machine itself; the kernel reads the same in
/// it ([`kernel::told`]).
pub fn answer(bytes: &[u8]) {
    kernel::told(bytes);
    let Some(answer) = answers::answer(bytes) else { return };
    assert!((1..=64).contains(&answer.addresses.len()));
    assert!(answer.names.len() <= 32);
    for name in &answer.names {
        assert!(!name.ends_with('.') && !name.bytes().any(|byte| byte.is_ascii_uppercase()), "{name}");
    }
    for address in &answer.addresses {
        assert!(
            !address.to_canonical().is_loopback() && !address.is_unspecified() && !address.is_multicast()
        );
    }
}
