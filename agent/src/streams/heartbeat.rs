//! Pings: what a client says on an upgraded connection only to learn whether somebody is there. Sans-IO.

/// Bytes in front of a SPDY/3.1 PING's payload: control bit and version, type 6, no flags, a length of four.
const SPDY_PING: [u8; 8] = [0x80, 3, 0, 6, 0, 0, 0, 4];
/// Bytes of a SPDY PING's id.
const SPDY_ID: usize = 4;
/// First byte of a whole PING of RFC 6455.
const WEBSOCKET_PING: u8 = 0x89;
/// Second byte's bit of a frame with a mask, as each of a client's has.
const MASKED: u8 = 0x80;
/// Longest payload of a control frame.
const CONTROL_BYTES_MAX: u8 = 125;
/// Bytes of a mask.
const MASK: usize = 4;

/// Whether these bytes of a client are whole pings and nothing else, if a frame begins where they do.
pub(crate) fn only_pings(bytes: &[u8]) -> bool {
    let mut rest = bytes;
    while !rest.is_empty() {
        let Some(after) = after_ping(rest) else { return false };
        rest = after;
    }
    !bytes.is_empty()
}

fn after_ping(bytes: &[u8]) -> Option<&[u8]> {
    if let Some(id) = bytes.strip_prefix(&SPDY_PING) {
        return id.get(SPDY_ID..);
    }
    let [WEBSOCKET_PING, length, rest @ ..] = bytes else { return None };
    let length = length.checked_sub(MASKED).filter(|length| *length <= CONTROL_BYTES_MAX)?;
    rest.get(MASK + usize::from(length)..)
}

#[cfg(test)]
mod tests {
    use super::only_pings;

    #[test]
    fn whole_pings_are_told_from_all_else() {
        let websocket = b"\x89\x80mask".to_vec();
        let with_payload = b"\x89\x83maskabc".to_vec();
        let spdy = b"\x80\x03\0\x06\0\0\0\x04\0\0\0\x01".to_vec();
        for pings in [&websocket, &with_payload, &spdy, &[&*websocket, &with_payload, &spdy].concat()] {
            assert!(only_pings(pings), "{pings:x?}");
            for cut in 1..pings.len() {
                let is_boundary = only_pings(&pings[..cut]) && only_pings(&pings[cut..]);
                assert!(is_boundary || !only_pings(&pings[..cut]), "{pings:x?} {cut}");
            }
            assert!(!only_pings(&[&**pings, b"\x82"].concat()));
        }
        for other in
            [&b""[..], b"\x82\x81mask\x03", b"\x8a\x80mask", b"\x89\x00", b"\x89\xffmask", b"\x88\x80mask"]
        {
            assert!(!only_pings(other), "{other:x?}");
        }
    }
}
