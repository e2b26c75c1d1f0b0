//! Streams that are cut: what they lack is known, wherever the cut is.

use weir_common::event::Channel;

use super::{
    Agreed, Decoder, Lack,
    probe::decode,
    tests::{CLIENT, SERVER, conversations, cut, frame, lane, process},
};

#[test]
fn a_process_whose_end_was_not_said_lacks_it_wherever_the_stream_is_cut() {
    let mut lacking = 0;
    for conversation in conversations().into_iter().filter(|one| one.subresource == "exec") {
        let bytes = cut(&conversation.pieces(), &[1]);
        for length in 0..=bytes.len() {
            let decoded = decode(conversation.agreed(), &bytes[..length]);
            // The first version says nothing of what succeeds.
            let may_lack = conversation.exit_code.is_some() && decoded.exit_code.is_none();
            assert_eq!(decoded.lacks, may_lack.then_some(Lack::Status), "{} {length}", conversation.name);
            lacking += usize::from(may_lack);
        }
        let lacks = decode(conversation.agreed(), &bytes).lacks;
        assert_eq!(lacks, None, "{}: it was whole", conversation.name);
    }
    assert!(lacking > 1000, "{lacking}");
}

#[test]
fn a_port_forward_lacks_the_ends_of_connections_that_were_open() {
    for conversation in conversations().into_iter().filter(|one| one.subresource == "portforward") {
        let (name, bytes) = (&conversation.name, cut(&conversation.pieces(), &[1]));
        let (mut open, mut lacking) = (0_usize, 0);
        for length in 0..=bytes.len() {
            let decoded = decode(conversation.agreed(), &bytes[..length]);
            let count =
                |what: &str| decoded.said.iter().flatten().filter(|said| said.ends_with(what)).count();
            let begun = count("Opened");
            open = open.max(begun);
            assert!(decoded.lacks.is_none() || begun > 0, "{name} {length}: none was open");
            lacking += usize::from(decoded.lacks == Some(Lack::Connections));
        }
        // Channels of WebSocket end with the stream alone.
        assert_eq!(open > 0, lacking > 0, "{name}");
        assert_eq!(decode(conversation.agreed(), &bytes).lacks, None, "{name}: it was whole");
    }
}

#[test]
fn what_is_not_decoded_may_have_been_it() {
    let exec = Agreed {
        subresource: "exec",
        upgrade: "websocket",
        subprotocol: "v5.channel.k8s.io",
        ..Agreed::default()
    };
    assert_eq!(decode(exec, &[(SERVER, b"\x82\x02\x01a")]).lacks, Some(Lack::Status));
    assert_eq!(decode(exec, &[(SERVER, b"\xf2\x02\x01a")]).lacks, None);
    let from_client = decode(exec, &[(CLIENT, b"\xf2\x02\x01a")]);
    assert!(from_client.lanes.contains_key(&(Channel::ClientRaw, None)));
    assert_eq!(from_client.lacks, Some(Lack::Status), "a client cannot hide it");
    assert_eq!(decode(Agreed { subprotocol: "", ..exec }, &[(SERVER, b"")]).lacks, None);
}

#[test]
fn a_client_says_that_it_goes_by_a_close_frame_or_goaway() {
    let websocket = Agreed {
        subresource: "attach",
        upgrade: "websocket",
        subprotocol: "v4.channel.k8s.io",
        ..Agreed::default()
    };
    let spdy = Agreed { upgrade: "SPDY/3.1", ..websocket };
    let closes: [(_, &[u8]); 2] =
        [(websocket, b"\x88\x80mask"), (spdy, b"\x80\x03\0\x07\0\0\0\x08\0\0\0\0\0\0\0\0")];
    for (agreed, close) in closes {
        let mut decoder = Decoder::new(agreed);
        decoder.feed(SERVER, &close.to_vec().into());
        assert!(!decoder.client_left(), "the server does");
        decoder.feed(CLIENT, &close.to_vec().into());
        assert!(decoder.client_left());
    }
}

/// `golang.org/x/net/websocket` reads nothing behind a close frame.
#[test]
fn messages_behind_a_close_frame_are_no_channels() {
    let bytes = [
        frame(true, 2, b"\0ls"),
        frame(true, 8, b""),
        frame(true, 9, b"?"),
        frame(true, 2, b"\0rm -rf /"),
        frame(true, 2, b"\0x"),
    ];
    let decoded = decode(process("v4.channel.k8s.io"), &[(CLIENT, bytes.concat())]);
    assert_eq!(lane(&decoded, Channel::Stdin), b"ls");
    assert_eq!(lane(&decoded, Channel::ClientRaw), bytes[3..].concat());
    assert_eq!(decoded.said[0], ["Ended"]);
}
