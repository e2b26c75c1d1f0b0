//! Decoders against conversations of Kubernetes' own clients and servers, however they are cut, and against what no
//! well-behaved peer sends.

use std::{collections::BTreeMap, path::Path};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use expect_test::{Expect, expect};
use proptest::prelude::*;
use serde::Deserialize;
use weir_common::event::Channel;

use super::{
    Agreed, Decoder, Direction, Event,
    probe::{Decoded, decode},
};

pub(super) const CLIENT: Direction = Direction::ClientToServer;
pub(super) const SERVER: Direction = Direction::ServerToClient;

/// What `tests/testbed/streams` writes.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Conversation {
    #[serde(skip)]
    pub(super) name: String,
    pub(super) subresource: String,
    query: String,
    upgrade: String,
    subprotocol: String,
    #[serde(default)]
    lanes: BTreeMap<String, String>,
    #[serde(default)]
    forwarded: Vec<Forwarded>,
    pub(super) exit_code: Option<i32>,
    pieces: Vec<Piece>,
}

#[derive(Deserialize)]
struct Forwarded {
    port: u16,
    #[serde(rename = "in")]
    input: String,
    out: String,
}

#[derive(Deserialize)]
struct Piece {
    client: bool,
    bytes: String,
}

impl Conversation {
    pub(super) fn agreed(&self) -> Agreed<'_> {
        Agreed {
            subresource: &self.subresource,
            query: &self.query,
            upgrade: &self.upgrade,
            subprotocol: &self.subprotocol,
            spdy_protocol: "v4.channel.k8s.io",
            verb: "create",
            ..Agreed::default()
        }
    }

    pub(super) fn pieces(&self) -> Vec<(Direction, Bytes)> {
        let piece = |piece: &Piece| (if piece.client { CLIENT } else { SERVER }, binary(&piece.bytes).into());
        self.pieces.iter().map(piece).collect()
    }
}

fn binary(text: &str) -> Vec<u8> {
    STANDARD.decode(text).unwrap()
}

pub(super) fn conversations() -> Vec<Conversation> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/streams/conversations");
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let mut conversation: Conversation = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        conversation.name = path.file_stem().unwrap().to_string_lossy().into_owned();
        found.push(conversation);
    }
    assert_eq!(found.len(), 11, "all conversations are there");
    found
}

/// Cuts the pieces anew: `sizes` are used in turn.
pub(super) fn cut(pieces: &[(Direction, Bytes)], sizes: &[usize]) -> Vec<(Direction, Bytes)> {
    let (mut out, mut sizes) = (Vec::new(), sizes.iter().cycle());
    for (direction, bytes) in pieces {
        let mut bytes = bytes.clone();
        while !bytes.is_empty() {
            let size = sizes.next().copied().unwrap_or(1).clamp(1, bytes.len());
            out.push((*direction, bytes.split_to(size)));
        }
    }
    out
}

pub(super) fn lane(decoded: &Decoded, channel: Channel) -> Vec<u8> {
    decoded.lanes.get(&(channel, None)).cloned().unwrap_or_default()
}

#[test]
fn what_is_decoded_is_what_the_pod_saw() {
    for conversation in conversations() {
        let name = &conversation.name;
        let decoded = decode(conversation.agreed(), &conversation.pieces());
        assert_eq!(decoded.exit_code, conversation.exit_code, "{name}");
        for (said, channel) in
            [("stdin", Channel::Stdin), ("stdout", Channel::Stdout), ("stderr", Channel::Stderr)]
        {
            let expected = conversation.lanes.get(said).map(|text| binary(text)).unwrap_or_default();
            assert_eq!(lane(&decoded, channel), expected, "{name} {said}");
        }
        if let Some(size) = conversation.lanes.get("size") {
            let resize: serde_json::Value =
                serde_json::Deserializer::from_slice(&lane(&decoded, Channel::Resize))
                    .into_iter()
                    .next()
                    .unwrap()
                    .unwrap();
            assert_eq!(
                format!("{}x{}", resize["Width"], resize["Height"]).into_bytes(),
                binary(size),
                "{name}"
            );
        }
        let mut forwarded: Vec<(u16, Vec<u8>, Vec<u8>)> = Vec::new();
        for ((channel, connection), bytes) in &decoded.lanes {
            if *channel == Channel::PortIn {
                let answer = decoded.lanes.get(&(Channel::PortOut, *connection)).cloned().unwrap_or_default();
                forwarded.push((connection.unwrap().port, bytes.clone(), answer));
            }
        }
        forwarded.sort_by(|a, b| a.1.cmp(&b.1));
        let expected = |seen: &Forwarded| (seen.port, binary(&seen.input), binary(&seen.out));
        assert_eq!(forwarded, conversation.forwarded.iter().map(expected).collect::<Vec<_>>(), "{name}");
        assert!(
            lane(&decoded, Channel::ClientRaw).is_empty() && lane(&decoded, Channel::ServerRaw).is_empty()
        );
        assert!(
            decoded.said.iter().flatten().all(|said| said.contains(' ')),
            "{name} has gaps: {:?}",
            decoded.said
        );
    }
}

#[test]
fn ends_and_connections_are_told() {
    let said = |wanted: &str| {
        let conversation = conversations().into_iter().find(|one| one.name == wanted).unwrap();
        let mut said = decode(conversation.agreed(), &conversation.pieces()).said;
        // A server breaks off the streams of an exec in no particular order.
        said[1].sort();
        said
    };
    expect![[r#"
        [
            [
                "Stdin None Ended",
            ],
            [],
        ]
    "#]]
    .assert_debug_eq(&said("exec-websocket-v5"));
    expect![[r#"
        [
            [
                "Stdin None Ended",
            ],
            [
                "Status None Reset",
                "Stderr None Reset",
                "Stdin None Reset",
                "Stdout None Reset",
            ],
        ]
    "#]]
    .assert_debug_eq(&said("exec-spdy"));
    expect![[r#"
        [
            [
                "PortIn Some(Connection { port: 8080, id: 1 }) Opened",
                "PortIn Some(Connection { port: 8080, id: 1 }) Reset",
                "ConnectionForwarded { connection: Connection { port: 8080, id: 1 }, bytes_in: 4, bytes_out: 4, protocol: None, server_name: None }",
                "PortIn Some(Connection { port: 443, id: 5 }) Opened",
                "PortIn Some(Connection { port: 443, id: 5 }) Reset",
                "ConnectionForwarded { connection: Connection { port: 443, id: 5 }, bytes_in: 8, bytes_out: 8, protocol: None, server_name: None }",
                "PortIn Some(Connection { port: 8080, id: 9 }) Opened",
                "PortIn Some(Connection { port: 8080, id: 9 }) Reset",
                "ConnectionForwarded { connection: Connection { port: 8080, id: 9 }, bytes_in: 6, bytes_out: 6, protocol: None, server_name: None }",
            ],
            [
                "PortError Some(Connection { port: 443, id: 5 }) Ended",
                "PortError Some(Connection { port: 8080, id: 1 }) Ended",
                "PortError Some(Connection { port: 8080, id: 9 }) Ended",
                "PortOut Some(Connection { port: 443, id: 5 }) Ended",
                "PortOut Some(Connection { port: 8080, id: 1 }) Ended",
                "PortOut Some(Connection { port: 8080, id: 9 }) Ended",
            ],
        ]
    "#]]
    .assert_debug_eq(&said("portforward-tunnel"));
}

#[test]
fn a_cut_at_every_byte_changes_nothing() {
    for conversation in conversations() {
        let whole = decode(conversation.agreed(), &conversation.pieces());
        let pieces = cut(&conversation.pieces(), &[1]);
        assert_eq!(decode(conversation.agreed(), &pieces), whole, "{}", conversation.name);
    }
}

#[test]
fn bytes_that_are_kept_back_are_no_payload() {
    // Whatever has been fed, what came out of a masked frame so far is all of its payload so far.
    let mut decoder = Decoder::new(process("v4.channel.k8s.io"));
    let mut frame = frame(true, 2, b"\0abcdef");
    for (at, byte) in frame.split_off(0).into_iter().enumerate() {
        let events = decoder.feed(CLIENT, &Bytes::from(vec![byte]));
        assert_eq!(events.len(), usize::from(at >= 7), "{at}: {events:?}");
    }
}

proptest! {
    #[test]
    fn any_cut_changes_nothing(sizes in proptest::collection::vec(1_usize..80, 1..12)) {
        for conversation in conversations() {
            let whole = decode(conversation.agreed(), &conversation.pieces());
            prop_assert_eq!(&decode(conversation.agreed(), &cut(&conversation.pieces(), &sizes)), &whole);
        }
    }

    #[test]
    fn what_is_damaged_never_panics_and_a_cut_still_changes_nothing(
        which in 0_usize..11, at in 0_usize..4096, with: u8, sizes in proptest::collection::vec(1_usize..80, 1..6),
    ) {
        let conversation = conversations().swap_remove(which);
        let mut pieces = cut(&conversation.pieces(), &sizes);
        let number = at % pieces.len();
        let mut damaged = pieces[number].1.to_vec();
        let place = at % damaged.len();
        damaged[place] = with;
        pieces[number].1 = damaged.into();
        let decoded = decode(conversation.agreed(), &pieces);
        prop_assert_eq!(decode(conversation.agreed(), &cut(&pieces, &[1])), decoded);
    }
}

pub(super) fn process(subprotocol: &str) -> Agreed<'_> {
    Agreed { subresource: "exec", upgrade: "websocket", subprotocol, ..Agreed::default() }
}

/// A frame with its first byte as given; a client's is masked.
pub(super) fn frame(masked: bool, opcode: u8, payload: &[u8]) -> Vec<u8> {
    fragment(masked, opcode | 0x80, payload)
}

fn fragment(masked: bool, first: u8, payload: &[u8]) -> Vec<u8> {
    let mask_bit = if masked { 0x80 } else { 0 };
    let mut frame = vec![first];
    match payload.len() {
        length @ 0..126 => frame.push(mask_bit | length as u8),
        length => {
            frame.push(mask_bit | 126);
            frame.extend((length as u16).to_be_bytes());
        }
    }
    let mask = [0x11, 0x22, 0x33, 0x44];
    if masked {
        frame.extend(mask);
        frame.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, key)| byte ^ key));
    } else {
        frame.extend(payload);
    }
    frame
}

pub(super) fn text(events: &[Event]) -> String {
    let mut out = String::new();
    for event in events {
        out.push_str(&match event {
            Event::Data { lane, offset, parts } => {
                format!("{:?} @{offset} {}\n", lane.channel, parts.concat().escape_ascii())
            }
            Event::Changed(lane, change) => format!("{:?} {change:?}\n", lane.channel),
            Event::Copied(file) => format!("{file:?}\n"),
            Event::Forwarded(connection) => format!("{connection:?}\n"),
            Event::Gap(reason) => format!("gap {reason:?}\n"),
        });
    }
    out
}

#[track_caller]
pub(super) fn check(agreed: Agreed<'_>, direction: Direction, bytes: &[u8], expected: Expect) {
    let mut decoder = Decoder::new(agreed);
    let mut events = decoder.feed(direction, &Bytes::copy_from_slice(bytes));
    events.extend(decoder.finish(direction));
    expected.assert_eq(&text(&events));
    let piece = (direction, Bytes::copy_from_slice(bytes));
    assert_eq!(decode(agreed, std::slice::from_ref(&piece)), decode(agreed, &cut(&[piece], &[1])));
}

#[test]
fn fragments_pings_and_empty_frames_are_read_as_rfc_6455_says() {
    let v5 = process("v5.channel.k8s.io");
    let ping = frame(true, 9, b"?");
    let whole = [fragment(true, 2, b"\0on"), ping, fragment(true, 0, b""), frame(true, 0, b"e\n")].concat();
    check(
        v5,
        CLIENT,
        &whole,
        expect![[r#"
        Stdin @0 on
        gap Fragment
        Stdin @2 e\n
    "#]],
    );
    let late =
        [fragment(false, 2, b""), fragment(false, 0, b"\x02"), frame(false, 0, b"x"), frame(false, 2, b"")];
    check(
        v5,
        SERVER,
        &late.concat(),
        expect![[r#"
        Stderr @0 x
    "#]],
    );
    let closes = [frame(true, 2, &[255, 0]), frame(true, 2, &[255, 0]), frame(true, 2, &[255, 9])].concat();
    check(
        v5,
        CLIENT,
        &closes,
        expect![[r#"
        Stdin Ended
        gap Channel
        ClientRaw @0 \xff\t
    "#]],
    );
    check(
        process("v4.channel.k8s.io"),
        CLIENT,
        &closes,
        expect![[r#"
        gap Channel
        ClientRaw @0 \xff\x00\xff\x00\xff\t
    "#]],
    );
}

#[test]
fn channels_of_the_other_side_and_unknown_ones_are_raw() {
    let v4 = process("v4.channel.k8s.io");
    let bytes = [frame(true, 2, b"\x01no"), frame(true, 2, b"\x07?"), frame(true, 2, b"\0ls")].concat();
    check(
        v4,
        CLIENT,
        &bytes,
        expect![[r#"
        gap Channel
        ClientRaw @0 \x01no\x07?
        Stdin @0 ls
    "#]],
    );
}

#[test]
fn what_is_no_frame_is_raw_from_there_on() {
    let v4 = process("v4.channel.k8s.io");
    for (first, second) in
        [(0xc2, 0x01), (0x83, 0x01), (0x80, 0x01), (0x09, 0x01), (0x89, 0x7e), (0x82, 0xff)]
    {
        let mut bytes = frame(false, 2, b"\x01ok");
        bytes.extend([first, second, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 2, 3, 4, 5]);
        let decoded = decode(v4, &[(SERVER, &bytes[..])]);
        assert_eq!(lane(&decoded, Channel::ServerRaw), bytes[5..], "{first:x} {second:x}");
        assert_eq!(
            (lane(&decoded, Channel::Stdout), &decoded.said[1][..]),
            (b"ok".to_vec(), &["Frame".to_owned()][..])
        );
    }
    check(
        v4,
        CLIENT,
        &frame(true, 2, b"\0whole")[..9],
        expect![[r#"
        Stdin @0 wh
    "#]],
    );
    check(
        v4,
        CLIENT,
        &[0x82, 0xfe, 0],
        expect![[r#"
        gap Cut
        ClientRaw @0 \x82\xfe\x00
    "#]],
    );
}

#[test]
fn base64_is_decoded_up_to_where_it_is_none() {
    let coded = process("base64.channel.k8s.io");
    let bytes =
        [frame(true, 1, b"0bHMg\nLWw="), frame(true, 1, b"0YWJj!WJj"), frame(true, 1, b"0YQ==YWJj")].concat();
    check(
        coded,
        CLIENT,
        &bytes,
        expect![[r#"
            Stdin @0 ls -labc
            gap Base64
            ClientRaw @0 !WJj
            Stdin @8 a
            ClientRaw @4 YWJj
        "#]],
    );
    check(
        coded,
        CLIENT,
        &[frame(true, 1, b"0YWJjYW"), frame(true, 1, b"0YQ==")].concat(),
        expect![[r#"
        Stdin @0 abc
        gap Base64
        ClientRaw @0 YW
        Stdin @3 a
    "#]],
    );
}

#[test]
fn other_upgrades_are_raw_and_say_so() {
    let agreed = process("v4.channel.k8s.io");
    check(
        Agreed { extensions: true, ..agreed },
        SERVER,
        b"\xc2\x01",
        expect![[r#"
        gap Extension
        ServerRaw @0 \xc2\x01
    "#]],
    );
    for other in [
        Agreed { upgrade: "tcp", ..agreed },
        Agreed { api_group: "subresources.kubevirt.io", ..agreed },
        Agreed { subresource: "proxy", ..agreed },
        Agreed { subprotocol: "plain.kubevirt.io", ..agreed },
        Agreed { subresource: "proxy", upgrade: "SPDY/3.1", ..agreed },
    ] {
        let decoded = decode(other, &[(SERVER, b"a"), (SERVER, b"b")]);
        assert_eq!(
            (lane(&decoded, Channel::ServerRaw), decoded.said[1].len()),
            (b"ab".to_vec(), 1),
            "{other:?}"
        );
    }
}

#[test]
fn watches_and_logs_over_websocket_are_response_bodies() {
    let watch = Agreed { verb: "watch", upgrade: "websocket", ..Agreed::default() };
    let bytes = [frame(false, 1, b"{\"a\":1}\n"), frame(false, 1, b"{\"a\":2}\n")].concat();
    // The API server agrees to any subprotocol of a watch, and sends it as it is.
    for subprotocol in ["", "base64.binary.k8s.io", "chat"] {
        let decoded = decode(Agreed { subprotocol, ..watch }, &[(SERVER, &bytes[..])]);
        assert_eq!(lane(&decoded, Channel::ResponseBody), b"{\"a\":1}\n{\"a\":2}\n", "{subprotocol}");
    }
    let coded = Agreed { verb: "get", subresource: "log", subprotocol: "base64.binary.k8s.io", ..watch };
    let decoded = decode(coded, &[(SERVER, &frame(false, 1, b"eyJhIjoxfQo=")[..])]);
    assert_eq!(lane(&decoded, Channel::ResponseBody), b"{\"a\":1}\n");
}

#[test]
fn a_peer_that_changes_channels_with_every_byte_makes_few_events() {
    let mut bytes = Vec::new();
    for number in 0..8000 {
        bytes.extend(frame(false, 2, &[1 + number as u8 % 2, b'x']));
    }
    let events = Decoder::new(process("v4.channel.k8s.io")).feed(SERVER, &bytes.into());
    assert!(events.len() <= 64, "{}", events.len());
}
