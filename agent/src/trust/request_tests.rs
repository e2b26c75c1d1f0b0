//! What is approved and what is not, of requests that rcgen makes.

use rcgen::{CertificateParams, CustomExtension, DnType, ExtendedKeyUsagePurpose, KeyPair, SanType};

use super::*;
use crate::trust::leaf;

const AGENT: &str = "system:serviceaccount:weir-system:weir-agent";
const OTHER: &str = "system:serviceaccount:weir-system:default";

fn allowed() -> ServingNames {
    ServingNames::of_own_cluster([
        "10.96.0.1".parse().expect("an address"),
        "fd00::1".parse().expect("an address"),
    ])
}

fn usages() -> Vec<String> {
    USAGES.map(str::to_owned).to_vec()
}

/// The request of the agent of `node-a`, as the agent makes it but for a change.
fn pem(change: impl FnOnce(&mut CertificateParams)) -> String {
    let subject = [(DnType::OrganizationName, "system:nodes"), (DnType::CommonName, "system:node:node-a")];
    let mut params = leaf::serving_params(&allowed(), &subject).expect("parameters");
    change(&mut params);
    let key = KeyPair::generate().expect("a key");
    params.serialize_request(&key).expect("a request").pem().expect("PEM")
}

fn judged(pem: &[u8], change: impl FnOnce(&mut Asked<'_>)) -> Result<(), Denial> {
    let usages = usages();
    let mut asked = Asked {
        user: AGENT,
        node: Some("node-a"),
        pem,
        usages: &usages,
        expiration_seconds: Some(EXPIRATION_SECONDS_MAX),
    };
    change(&mut asked);
    judge(&asked, AGENT, &allowed())
}

#[track_caller]
fn refused(change: impl FnOnce(&mut CertificateParams), said: &str) {
    let denial = judged(pem(change).as_bytes(), |_| {}).expect_err("must be denied").to_string();
    assert!(denial.contains(said), "{denial}");
}

#[test]
fn what_an_agent_asks_for_is_approved() {
    assert_eq!(judged(pem(|_| {}).as_bytes(), |_| {}), Ok(()));
    let fewer = pem(|params| params.subject_alt_names.truncate(1));
    assert_eq!(judged(fewer.as_bytes(), |asked| asked.expiration_seconds = Some(600)), Ok(()));
}

#[test]
fn who_asks_and_for_how_long_and_what_for_is_judged() {
    let pem = pem(|_| {});
    let refused =
        |change: fn(&mut Asked<'_>)| judged(pem.as_bytes(), change).expect_err("must be denied").to_string();
    let by_another = refused(|asked| asked.user = OTHER);
    assert!(by_another.starts_with(OTHER) && by_another.contains(AGENT), "{by_another}");
    for node in [None, Some("")] {
        let unbound = judged(pem.as_bytes(), |asked| asked.node = node).expect_err("must be denied");
        assert_eq!(unbound, Denial::NotBoundToNode { user: AGENT.to_owned() });
    }
    let of_another = refused(|asked| asked.node = Some("node-b"));
    assert!(of_another.contains("must be O=system:nodes, CN=system:node:node-b"), "{of_another}");
    assert!(
        of_another.contains("CN=system:node:node-a, and") || of_another.contains("system:node:node-a"),
        "{of_another}"
    );
    for life in [None, Some(0), Some(-1), Some(EXPIRATION_SECONDS_MAX + 1), Some(i32::MAX)] {
        let denial = judged(pem.as_bytes(), |asked| asked.expiration_seconds = life);
        assert!(matches!(denial, Err(Denial::Life { .. })), "{life:?}");
    }
    let usages = |of: &[&str]| {
        let usages: Vec<_> = of.iter().map(|usage| (*usage).to_owned()).collect();
        let mut asked = Asked {
            user: AGENT,
            node: Some("node-a"),
            pem: pem.as_bytes(),
            usages: &usages,
            expiration_seconds: Some(600),
        };
        asked.node = Some("node-a");
        judge(&asked, AGENT, &allowed())
    };
    assert_eq!(usages(&["server auth"]), Ok(()));
    for of in
        [&["server auth", "client auth"][..], &["digital signature"], &[], &["server auth", "cert sign"]]
    {
        assert!(matches!(usages(of), Err(Denial::Usages { .. })), "{of:?}");
    }
}

#[test]
fn names_are_the_api_servers_and_no_others() {
    let adds = |name: &str| {
        let name = SanType::DnsName(name.try_into().expect("ASCII"));
        move |params: &mut CertificateParams| params.subject_alt_names.push(name)
    };
    for name in [
        "*.default.svc",
        "kubernetes.",
        "KUBERNETES",
        "node-a",
        "kubernetes.default.svc.evil",
        "",
        "kubernetes\0",
    ] {
        refused(
            adds(name),
            "is not a name or address of the API server; those are kubernetes, kubernetes.default",
        );
    }
    for address in ["10.96.0.2", "::ffff:10.96.0.1", "127.0.0.1"] {
        let address = address.parse().expect("an address");
        refused(
            |params| params.subject_alt_names.push(SanType::IpAddress(address)),
            "is not a name or address",
        );
    }
    let text = |text: &str| text.try_into().expect("ASCII");
    refused(
        |params| params.subject_alt_names.push(SanType::Rfc822Name(text("a@b.c"))),
        "RFC822Name(a@b.c) is not a name",
    );
    refused(
        |params| params.subject_alt_names.push(SanType::URI(text("https://kubernetes"))),
        "is not a name",
    );
    refused(|params| params.subject_alt_names.clear(), "the request has no name");
}

#[test]
fn nothing_is_asked_for_beside_names() {
    refused(
        |params| params.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth),
        "the extension 2.5.29.37",
    );
    refused(|params| params.key_usages.push(rcgen::KeyUsagePurpose::KeyCertSign), "the extension 2.5.29.15");
    // Basic constraints: a CA. rcgen refuses to write them into a request by itself.
    let ca = CustomExtension::from_oid_content(&[2, 5, 29, 19], vec![0x30, 3, 1, 1, 0xff]);
    refused(|params| params.custom_extensions.push(ca), "the extension 2.5.29.19");
    let names = CustomExtension::from_oid_content(&[2, 5, 29, 17], vec![0x30, 3, 0x82, 1, b'x']);
    refused(|params| params.custom_extensions.push(names), "the extension 2.5.29.17");
}

#[test]
fn the_subject_is_the_node_of_the_token_and_nothing_else() {
    for (kind, value) in [
        (DnType::CommonName, "system:node:node-b"),
        (DnType::OrganizationName, "system:masters"),
        (DnType::OrganizationalUnitName, "more"),
    ] {
        refused(
            |params| params.distinguished_name.push(kind, value),
            "must be O=system:nodes, CN=system:node:node-a",
        );
    }
    refused(|params| params.distinguished_name = rcgen::DistinguishedName::new(), "must be O=system:nodes");
}

#[test]
fn what_two_readers_could_read_differently_is_refused() {
    let good = pem(|_| {});
    let unreadable = |pem: &str| judged(pem.as_bytes(), |_| {}).expect_err("must be denied").to_string();
    for (text, said) in [
        (format!("{good}{good}"), "not base64"),
        (format!("# first\n{good}"), "not one PEM block"),
        (format!("{good}# last\n"), "not one PEM block"),
        (good.replacen("REQUEST-----\n", "REQUEST-----\nName: value\n\n", 1), "not base64"),
        (good.replace("CERTIFICATE REQUEST", "CERTIFICATE"), "not one PEM block"),
        (String::new(), "not one PEM block"),
        (format!("{PEM_BEGIN}\n{PEM_END}\n"), "cannot be read"),
        (format!("{PEM_BEGIN}\n{}\n{PEM_END}", "A".repeat(REQUEST_BYTES_MAX)), "longer than 16384 bytes"),
    ] {
        let found = unreadable(&text);
        assert!(found.starts_with("spec.request cannot be read") && found.contains(said), "{said}: {found}");
    }
    let with = |change: fn(&mut Vec<u8>)| {
        let mut bytes = der(good.as_bytes()).expect("DER");
        change(&mut bytes);
        unreadable(&format!("{PEM_BEGIN}\n{}\n{PEM_END}\n", STANDARD.encode(bytes)))
    };
    assert!(with(|bytes| bytes.push(0)).contains("something behind it"));
    // One bit of a name: the key has not signed that.
    let changed = with(|bytes| {
        let at = bytes.windows(10).position(|window| window == b"kubernetes").expect("a name");
        bytes[at] ^= 1;
    });
    assert!(changed.contains("its signature is not of its own key"), "{changed}");
}

#[test]
fn a_requests_own_words_are_bounded_in_messages() {
    let long = "x".repeat(500);
    let name: rcgen::string::Ia5String = format!("{long}.evil").as_str().try_into().expect("ASCII");
    let pem = pem(|params| params.subject_alt_names.push(SanType::DnsName(name)));
    let denial = judged(pem.as_bytes(), |_| {}).expect_err("must be denied").to_string();
    assert!(
        denial.contains("x… is not a name") && !denial.contains(&long[..QUOTED_CHARS_MAX + 1]),
        "{denial}"
    );
    assert_eq!(quoted("a\u{1b}[1m\nb"), "a?[1m?b");
}

/// Whatever the bytes are, there is no panic, and what is signed and judged cannot be changed.
#[test]
fn damaged_requests_are_refused() {
    let good = der(pem(|_| {}).as_bytes()).expect("DER");
    let (_, request) = X509CertificationRequest::from_der(&good).expect("a request");
    let signed = request.certification_request_info.raw;
    let end = good.windows(signed.len()).position(|window| window == signed).expect("a part") + signed.len();
    for at in 0..good.len() {
        for value in [0, 0x7f, 0x80, 0xff, good[at] ^ 1] {
            let mut bytes = good.clone();
            bytes[at] = value;
            let text = format!("{PEM_BEGIN}\n{}\n{PEM_END}\n", STANDARD.encode(&bytes));
            assert!(judged(text.as_bytes(), |_| {}).is_err() || bytes == good || at >= end, "byte {at}");
        }
        let cut = format!("{PEM_BEGIN}\n{}\n{PEM_END}\n", STANDARD.encode(&good[..at]));
        judged(cut.as_bytes(), |_| {}).expect_err("a part of it is none");
    }
}
