//! SPDY against what no well-behaved peer sends; conversations of those that are are in the module's other tests.

use expect_test::expect;
use weir_common::event::Channel;

use super::{
    Agreed, Decoder,
    header_block::{BLOCK_BYTES_MAX, HeaderBlocks},
    probe::decode,
    spdy::CONTROL_BYTES_MAX,
    tests::{CLIENT, SERVER, check, lane, text},
};

/// A control frame.
fn control(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&[0x80, 3, 0, kind, flags, length[1], length[2], length[3]][..], payload].concat()
}

/// Headers in a stored block, with the zlib head and dictionary in front for the first.
fn block(first: bool, headers: &[(&str, &str)]) -> Vec<u8> {
    let mut plain = (headers.len() as u32).to_be_bytes().to_vec();
    for text in headers.iter().flat_map(|(name, value)| [name, value]) {
        plain.extend((text.len() as u32).to_be_bytes());
        plain.extend(text.as_bytes());
    }
    let length = plain.len() as u16;
    let head = if first { &[0x78, 0xbb, 0xe3, 0xc6, 0xa7, 0xc2][..] } else { &[] };
    [head, &[0], &length.to_le_bytes(), &(!length).to_le_bytes(), &plain].concat()
}

fn syn_stream(id: u8, flags: u8, block: &[u8]) -> Vec<u8> {
    control(1, flags, &[&[0, 0, 0, id, 0, 0, 0, 0, 0, 0], block].concat())
}

fn data(id: u8, fin: bool, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&[0, 0, 0, id, u8::from(fin), length[1], length[2], length[3]][..], payload].concat()
}

const SPDY: Agreed<'static> = Agreed {
    api_group: "",
    subresource: "exec",
    verb: "create",
    query: "",
    upgrade: "SPDY/3.1",
    subprotocol: "",
    spdy_protocol: "v4.channel.k8s.io",
    extensions: false,
};

#[test]
fn spdy_streams_are_what_their_headers_say() {
    let bytes = [
        syn_stream(1, 0, &block(true, &[("streamtype", "stdin")])),
        control(6, 0, &[0, 0, 0, 1]),
        data(1, false, b"ls"),
        data(1, true, b"\n"),
        data(1, false, b"after its end"),
        data(9, false, b"of none"),
        syn_stream(3, 0, &block(false, &[("streamtype", "stdout")])),
        data(3, false, b"not its to write"),
        syn_stream(3, 0, &block(false, &[("streamtype", "stdin")])),
        control(3, 0, &[0, 0, 0, 3, 0, 0, 0, 5]),
    ];
    check(
        SPDY,
        CLIENT,
        &bytes.concat(),
        expect![[r#"
            Stdin @0 ls\n
            Stdin Ended
            gap Ended
            ClientRaw @0 \x00\x00\x00\x01\x00\x00\x00\rafter its end
            gap SpdyStream
            ClientRaw @21 \x00\x00\x00\t\x00\x00\x00\x07of none\x00\x00\x00\x03\x00\x00\x00\x10not its to write
            Stdout Reset
        "#]],
    );
}

#[test]
fn spdy_that_cannot_be_read_is_raw() {
    check(
        SPDY,
        CLIENT,
        b"\x80\x02\0\x01\0\0\0\x02ab",
        expect![[r#"
        gap SpdyFrame
        ClientRaw @0 \x80\x02\x00\x01\x00\x00\x00\x02ab
    "#]],
    );
    check(
        SPDY,
        CLIENT,
        &[control(77, 0, b"??"), data(1, false, b"x")].concat(),
        expect![[r#"
            gap SpdyControl
            ClientRaw @0 \x80\x03\x00M\x00\x00\x00\x02??\x00\x00\x00\x01\x00\x00\x00\x01x
        "#]],
    );
    let lost =
        [syn_stream(1, 0, b"no zlib"), syn_stream(3, 0, &block(true, &[])), data(1, false, b"x")].concat();
    let decoded = decode(SPDY, &[(CLIENT, &lost)]);
    assert_eq!(lane(&decoded, Channel::ClientRaw).len(), lost.len(), "all of it");
    check(
        SPDY,
        CLIENT,
        &data(1, false, b"cut")[..5],
        expect![[r#"
        gap Cut
        ClientRaw @0 \x00\x00\x00\x01\x00
    "#]],
    );
}

#[test]
fn a_bomb_in_headers_stays_bounded() {
    use std::io::Write as _;
    let mut deflate = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
    deflate.write_all(&vec![0; 64 * 1024 * 1024]).unwrap();
    deflate.flush().unwrap();
    let bomb = [&[0x78, 0xbb, 0xe3, 0xc6, 0xa7, 0xc2][..], &deflate.finish().unwrap()].concat();
    let mut blocks = HeaderBlocks::default();
    assert_eq!(blocks.next(&bomb[..60_000]), None);
    assert_eq!(blocks.next(b""), None, "those that follow lean on it");
    let mut blocks = HeaderBlocks::default();
    let long = "v".repeat(4000);
    assert!(blocks.next(&block(true, &[("n", &long)])).unwrap().len() < BLOCK_BYTES_MAX);
}

#[test]
fn streams_beyond_the_most_that_are_kept_push_out_the_oldest() {
    let mut decoder = Decoder::new(Agreed { subresource: "portforward", ..SPDY });
    for number in 0..3000_u32 {
        let mut open = syn_stream(0, 0, &block(number == 0, &[("streamtype", "error"), ("port", "80")]));
        open[8..12].copy_from_slice(&(number * 2 + 1).to_be_bytes());
        decoder.feed(CLIENT, &open.into());
    }
    expect![[r#"
        gap SpdyStream
        ClientRaw @0 \x00\x00\x00\x01\x00\x00\x00\x01x
    "#]]
    .assert_eq(&text(&decoder.feed(CLIENT, &data(1, false, b"x").into())));
}

/// What the client's bytes come to.
#[track_caller]
fn client(bytes: &[Vec<u8>], expected: expect_test::Expect) {
    check(SPDY, CLIENT, &bytes.concat(), expected);
}

/// A session's beginning: the stream 1 is stdin.
fn stdin() -> Vec<u8> {
    syn_stream(1, 0, &block(true, &[("streamtype", "stdin")]))
}

#[test]
fn of_two_streams_for_one_channel_neither_is_it_and_servers_open_none() {
    let bytes = [
        stdin(),
        data(1, false, b"a"),
        syn_stream(3, 0, &block(false, &[("streamtype", "stdin")])),
        data(1, false, b"b"),
        data(3, false, b"c"),
        syn_stream(5, 0, &block(false, &[("streamtype", "stdin")])),
        data(5, true, b"d"),
    ];
    client(
        &bytes,
        expect![[r#"
            Stdin @0 a
            gap SpdyStream
            ClientRaw @0 \x00\x00\x00\x01\x00\x00\x00\x01b\x00\x00\x00\x03\x00\x00\x00\x01c\x00\x00\x00\x05\x01\x00\x00\x01d
        "#]],
    );
    check(
        SPDY,
        SERVER,
        &bytes.concat(),
        expect![[r#"
        gap SpdyStream
        ServerRaw @0 \x00\x00\x00\x01\x00\x00\x00\x01a\x00\x00\x00\x01\x00\x00\x00\x01b\x00\x00\x00\x03\x00\x00\x00\x01c\x00\x00\x00\x05\x01\x00\x00\x01d
    "#]],
    );
}

/// `PingFrame.read` and `RstStreamFrame.read` of spdystream take four and eight bytes, and `SettingsFrame.read` as many as the number in
/// front says, whatever the length; the bytes behind are the next frame.
#[test]
fn a_control_frame_that_servers_take_for_shorter_than_it_says_hides_nothing() {
    let hidden = data(1, false, b"touch /x\n");
    let longer = |kind, payload: &[u8]| control(kind, 0, &[payload, &hidden].concat());
    for frame in [
        // Of more bytes than are kept, and of a kind that nobody knows.
        longer(4, &vec![0; CONTROL_BYTES_MAX]),
        longer(77, &[]),
        longer(6, &[0, 0, 0, 1]),
        longer(3, &[0, 0, 0, 9, 0, 0, 0, 5]),
        longer(4, &[0, 0, 0, 0]),
        longer(4, &[0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1]),
        longer(7, &[0; 8]),
        longer(9, &[0; 8]),
    ] {
        let decoded = decode(SPDY, &[(CLIENT, [stdin(), frame.clone(), data(1, false, b"id\n")].concat())]);
        let all = [frame, data(1, false, b"id\n")].concat();
        assert_eq!(lane(&decoded, Channel::ClientRaw), all, "it and what follows");
    }
    // And for longer: what would be data is a part of the frame.
    for frame in [control(6, 0, &[]), control(3, 0, &[0; 4]), control(4, 0, &[0, 0, 0, 9])] {
        let decoded = decode(SPDY, &[(CLIENT, [stdin(), frame.clone(), data(1, false, b"id\n")].concat())]);
        assert_eq!(lane(&decoded, Channel::Stdin), b"");
        assert_eq!(lane(&decoded, Channel::ClientRaw), [frame, data(1, false, b"id\n")].concat());
    }
    // As they should be.
    let settings = control(4, 0, &[0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1]);
    let window = control(9, 0, &[0, 0, 0, 1, 0, 0, 1, 0]);
    client(
        &[stdin(), settings, window, control(6, 0, &[0, 0, 0, 1]), data(1, false, b"id")],
        expect![[r#"
            Stdin @0 id
        "#]],
    );
}

#[test]
fn what_a_client_says_of_a_stream_that_it_has_ended_is_not_its_channels() {
    let reset = |by| [(by, control(3, 0, &[0, 0, 0, 1, 0, 0, 0, 5])), (CLIENT, data(1, false, b"x"))];
    for (by, expected) in [(CLIENT, &b""[..]), (SERVER, b"x")] {
        let pieces = [vec![(CLIENT, stdin())], reset(by).to_vec()].concat();
        assert_eq!(lane(&decode(SPDY, &pieces), Channel::Stdin), expected, "reset by {by:?}");
    }
    let pieces = [(CLIENT, [stdin(), data(1, true, b"")].concat())].into_iter().chain(reset(SERVER));
    assert_eq!(lane(&decode(SPDY, &pieces.collect::<Vec<_>>()), Channel::Stdin), b"", "ended, and reset");
    client(
        &[
            stdin(),
            control(7, 0, &[0; 8]),
            data(1, false, b"x"),
            syn_stream(3, 0, &block(false, &[("streamtype", "resize")])),
            data(3, false, b"{}"),
        ],
        expect![[r#"
            gap Ended
            ClientRaw @0 \x00\x00\x00\x01\x00\x00\x00\x01x
            gap SpdyStream
            ClientRaw @9 \x00\x00\x00\x03\x00\x00\x00\x02{}
        "#]],
    );
    // Servers take an id of 32 bits for another stream, and refuse it.
    let mut other = syn_stream(1, 0, &block(true, &[("streamtype", "resize")]));
    other[8] = 0x80;
    let own = syn_stream(1, 0, &block(false, &[("streamtype", "stdin")]));
    client(
        &[other, own, data(1, false, b"id")],
        expect![[r#"
            gap SpdyStream
            Stdin @0 id
        "#]],
    );
    // And want those that go up by two.
    client(
        &[stdin(), syn_stream(2, 0, &block(false, &[("streamtype", "resize")])), data(2, false, b"{}")],
        expect![[r#"
            gap SpdyStream
            ClientRaw @0 \x00\x00\x00\x02\x00\x00\x00\x02{}
        "#]],
    );
}

#[test]
fn streams_of_a_connection_are_found_with_and_without_request_ids() {
    let forward = Agreed { subresource: "portforward", ..SPDY };
    let open = |id: u8, kind: &str, request: &[(&str, &str)]| {
        let headers = [&[("streamtype", kind), ("port", "80")], request].concat();
        syn_stream(id, 0, &block(id == 1, &headers))
    };
    let request = |id| [("requestid", id)];
    let numbers = |bytes: &[Vec<u8>]| {
        let decoded = decode(forward, &[(CLIENT, bytes.concat())]);
        let lanes = decoded.lanes.into_iter();
        lanes.map(|((_, of), bytes)| (of.unwrap().id, String::from_utf8(bytes).unwrap())).collect::<Vec<_>>()
    };
    let pairs = [
        open(1, "error", &[]),
        open(3, "data", &[]),
        data(3, true, b"one"),
        open(5, "error", &[]),
        open(7, "data", &[]),
        data(7, true, b"two"),
    ];
    assert_eq!(numbers(&pairs), [(1, "one".to_owned()), (5, "two".to_owned())]);
    // The same request id again, while the first one is still open.
    let pairs = [
        open(1, "error", &request("9")),
        open(3, "error", &request("8")),
        open(5, "data", &request("9")),
        open(7, "data", &request("9")),
        data(5, false, b"nine"),
        data(7, false, b"again"),
    ];
    assert_eq!(numbers(&pairs), [(1, "nine".to_owned()), (7, "again".to_owned())]);
}
