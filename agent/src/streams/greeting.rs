//! What a forwarded connection speaks, as far as the client's first bytes say: TLS and whom it asks for, HTTP, SSH.

use std::fmt;

use rustls::server::Acceptor;

/// Most bytes that are looked at for anything but TLS.
const HEAD_BYTES_MAX: usize = 16;

/// Most bytes of a TLS client's hello that are looked at.
const HELLO_BYTES_MAX: usize = 16 * 1024;

/// How other protocols begin.
const BEGINNINGS: [(&[u8], &str); 11] = [
    (b"PRI * HTTP/2", "h2"),
    (b"GET /", "http/1"),
    (b"HEAD /", "http/1"),
    (b"POST /", "http/1"),
    (b"PUT /", "http/1"),
    (b"PATCH /", "http/1"),
    (b"DELETE /", "http/1"),
    (b"OPTIONS ", "http/1"),
    (b"CONNECT ", "http/1"),
    (b"GET http", "http/1"),
    (b"SSH-", "ssh"),
];

/// Reads the first bytes of one connection.
#[derive(Debug, Default)]
pub(super) struct Greeting {
    state: State,
    pub(super) protocol: Option<&'static str>,
    pub(super) server_name: Option<String>,
}

#[derive(Default)]
enum State {
    Head(Vec<u8>),
    Hello {
        acceptor: Box<Acceptor>,
        bytes: usize,
    },
    #[default]
    Over,
}

impl fmt::Debug for State {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Head(_) => "Head",
            Self::Hello { .. } => "Hello",
            Self::Over => "Over",
        })
    }
}

impl Greeting {
    /// One that is read; the default is not.
    pub(super) fn expected() -> Self {
        Self { state: State::Head(Vec::new()), ..Self::default() }
    }

    /// Whether bytes are kept for it.
    pub(super) fn is_read(&self) -> bool {
        !matches!(self.state, State::Over)
    }

    /// Takes the client's next bytes.
    pub(super) fn feed(&mut self, bytes: &[u8]) {
        match &mut self.state {
            State::Over => {}
            State::Hello { .. } => self.hello(bytes),
            State::Head(head) => {
                let before = head.len();
                head.extend(bytes.iter().take(HEAD_BYTES_MAX - before));
                if head.starts_with(&[0x16, 3]) {
                    let begun = head[..before].to_vec();
                    self.protocol = Some("tls");
                    self.state = State::Hello { acceptor: Box::default(), bytes: 0 };
                    self.hello(&begun);
                    return self.hello(bytes);
                }
                let found = BEGINNINGS.iter().find(|(beginning, _)| head.starts_with(beginning));
                self.protocol = found.map(|(_, protocol)| *protocol);
                if found.is_some() || head.len() == HEAD_BYTES_MAX {
                    self.state = State::Over;
                }
            }
        }
    }

    fn hello(&mut self, input: &[u8]) {
        let State::Hello { acceptor, bytes } = &mut self.state else { return };
        let mut input = &input[..input.len().min(HELLO_BYTES_MAX - *bytes)];
        *bytes += input.len();
        let mut over = *bytes == HELLO_BYTES_MAX;
        while !input.is_empty() {
            let read = acceptor.read_tls(&mut input).unwrap_or_default();
            match acceptor.accept() {
                Ok(None) if read > 0 => {}
                Ok(accepted) => {
                    let name = accepted.and_then(|it| it.client_hello().server_name().map(str::to_owned));
                    self.server_name = name;
                    over = true;
                    break;
                }
                Err(_) => {
                    over = true;
                    break;
                }
            }
        }
        if over {
            self.state = State::Over;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::{ClientConfig, ClientConnection, RootCertStore};

    use super::{Greeting, HELLO_BYTES_MAX};

    /// What rustls' own client begins with.
    fn hello(name: &str) -> Vec<u8> {
        let builder = ClientConfig::builder_with_provider(crate::trust::leaf::crypto_provider());
        let roots = RootCertStore::empty();
        let config = builder.with_safe_default_protocol_versions().unwrap();
        let config = config.with_root_certificates(roots).with_no_client_auth();
        let name = name.to_owned().try_into().unwrap();
        let mut client = ClientConnection::new(Arc::new(config), name).unwrap();
        let mut hello = Vec::new();
        client.write_tls(&mut hello).unwrap();
        hello
    }

    #[track_caller]
    fn check(bytes: &[u8], protocol: Option<&str>, server_name: Option<&str>) {
        for piece_bytes in [1, 7, bytes.len()] {
            let mut greeting = Greeting::expected();
            bytes.chunks(piece_bytes).for_each(|piece| greeting.feed(piece));
            assert_eq!((greeting.protocol, greeting.server_name.as_deref()), (protocol, server_name));
        }
    }

    #[test]
    fn a_tls_client_says_whom_it_asks_for_however_its_hello_is_cut() {
        let hello = hello("db.example");
        check(&hello, Some("tls"), Some("db.example"));
        check(&[&hello[..], &[0x17; 400]].concat(), Some("tls"), Some("db.example"));
        check(&hello[..hello.len() - 1], Some("tls"), None);
        check(&self::hello("10.0.0.1"), Some("tls"), None);
    }

    #[test]
    fn other_protocols_are_known_by_their_beginnings() {
        check(b"GET /metrics HTTP/1.1\r\n", Some("http/1"), None);
        check(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Some("h2"), None);
        check(b"SSH-2.0-OpenSSH_9.6\r\n", Some("ssh"), None);
        check(b"GETAWAY this is none of them", None, None);
        check(b"\x16\x03\x01\x00\x02\x01\xff and garbage", Some("tls"), None);
    }

    #[test]
    fn what_is_kept_of_a_hello_without_end_is_bounded() {
        let mut greeting = Greeting::expected();
        // Records of a handshake message that is longer than it may be.
        let record = [&[0x16, 3, 1, 0x10, 0][..], &[1, 0, 0xff, 0xff], &[0; 4092]].concat();
        for _ in 0..HELLO_BYTES_MAX / record.len() + 1 {
            greeting.feed(&record);
        }
        assert!(!greeting.is_read());
    }
}
