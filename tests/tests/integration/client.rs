//! A client inside a pod that sends exactly the bytes it is told. TLS is made here; the connection is that of a program in
//! the pod (its own `nc`, or one that connects in an unusual way), so that it comes from the pod's cgroup and network
//! namespace.

use std::{
    io::{self, Read, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::Arc,
};

use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use weir_tests::{Pod, Testbed, testbed::API_CLUSTER_IP};

use super::random_text;

/// Seconds after which `nc` ends, so that a server that waits for ever fails the test instead of stopping it. A test may use one
/// connection from its beginning to its end, however long a busy machine takes for what lies between.
const CONNECTION_SECONDS: &str = "600";

/// What a program says that is connected.
const CONNECTED: &str = "connected";

/// One connection.
pub(super) struct RawClient {
    stream: StreamOwned<ClientConnection, Pipe>,
    program: Child,
}

/// What the server said to one request.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) head: String,
    pub(super) body: Vec<u8>,
}

struct Pipe {
    to: Option<ChildStdin>,
    from: ChildStdout,
    /// Whether the program says first what has come of its connection.
    speaks: bool,
    /// What it said.
    said: String,
}

impl Read for Pipe {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.speaks {
            let mut byte = [0];
            self.from.read_exact(&mut byte)?;
            match byte[0] {
                b'\n' if self.said == CONNECTED => self.speaks = false,
                b'\n' => return Err(io::ErrorKind::NotConnected.into()),
                byte => self.said.push(char::from(byte)),
            }
        }
        self.from.read(buffer)
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.to.as_mut().map_or(Err(io::ErrorKind::BrokenPipe.into()), |to| to.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.as_mut().map_or(Ok(()), Write::flush)
    }
}

impl RawClient {
    /// Connects to the API server's ClusterIP. `name` is verified, and sent as SNI where it is no address.
    pub(super) fn connect(testbed: &Testbed, pod: &Pod<'_>, name: &str, alpn: &str) -> Self {
        let mut command = testbed.kubectl_command();
        command.args(["exec", "-i", "-n", &pod.namespace, &pod.name, "--"]);
        command.args(["timeout", CONNECTION_SECONDS, "nc", API_CLUSTER_IP, "443"]);
        Self::over(testbed, command, false, name, alpn)
    }

    /// Connects by a program that says in a line what has come of it, and then is the connection.
    ///
    /// # Errors
    /// What it said, if it is not connected.
    pub(super) fn by(testbed: &Testbed, command: Command) -> Result<Self, String> {
        let mut client = Self::over(testbed, command, true, API_CLUSTER_IP, "http/1.1");
        let handshake = client.stream.conn.complete_io(&mut client.stream.sock);
        let Err(error) = handshake else { return Ok(client) };
        // One that is not connected may have ended before it was told anything.
        let _ = client.stream.sock.read(&mut [0]);
        match std::mem::take(&mut client.stream.sock.said) {
            said if said.is_empty() || said == CONNECTED => Err(format!("{said:?}, then {error}")),
            said => Err(said),
        }
    }

    /// The certificate that the server showed.
    pub(super) fn certificate(&self) -> &[u8] {
        let certificates = self.stream.conn.peer_certificates();
        certificates.and_then(|certificates| certificates.first()).expect("a handshake is done")
    }

    fn over(testbed: &Testbed, mut command: Command, speaks: bool, name: &str, alpn: &str) -> Self {
        let mut roots = RootCertStore::empty();
        let ca = testbed.layout().path("pki/ca.crt");
        for certificate in CertificateDer::pem_file_iter(ca).unwrap() {
            roots.add(certificate.unwrap()).unwrap();
        }
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let tls = ClientConnection::new(Arc::new(config), name).unwrap();
        let mut program = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (to, from) = (program.stdin.take(), program.stdout.take().unwrap());
        let pipe = Pipe { to, from, speaks, said: String::new() };
        Self { stream: StreamOwned::new(tls, pipe), program }
    }

    /// Now, where the first bytes are sent later: a server waits some seconds only for a client to say who it is.
    fn handshake(&mut self) -> io::Result<()> {
        while self.stream.conn.is_handshaking() {
            self.stream.conn.complete_io(&mut self.stream.sock)?;
        }
        Ok(())
    }

    /// An error means that the server has closed.
    pub(super) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)?;
        self.stream.flush()
    }

    /// The next answer; none if the server closes without one.
    pub(super) fn answer(&mut self) -> Option<Answer> {
        let head = self.until(b"\r\n\r\n")?;
        let head = String::from_utf8_lossy(&head).into_owned();
        let status = head.split(' ').nth(1)?.parse().ok()?;
        let lower = head.to_ascii_lowercase();
        let length = lower.lines().find_map(|line| line.strip_prefix("content-length:"));
        let body = match length {
            Some(length) => self.exactly(length.trim().parse().ok()?)?,
            None if lower.contains("transfer-encoding: chunked") => self.chunks()?,
            None => Vec::new(),
        };
        Some(Answer { status, head, body })
    }

    /// Kind and stream of the next HTTP/2 frame, whose payload is passed over.
    pub(super) fn frame(&mut self) -> Option<(u8, u32)> {
        let head = self.exactly(9)?;
        self.exactly(u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize)?;
        Some((head[3], u32::from_be_bytes([head[5], head[6], head[7], head[8]])))
    }

    fn chunks(&mut self) -> Option<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            let line = self.until(b"\r\n")?;
            let length = usize::from_str_radix(std::str::from_utf8(&line).ok()?.trim(), 16).ok()?;
            body.extend(self.exactly(length)?);
            self.exactly(2)?;
            if length == 0 {
                return Some(body);
            }
        }
    }

    fn until(&mut self, end: &[u8]) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        while !bytes.ends_with(end) {
            bytes.extend(self.exactly(1)?);
        }
        Some(bytes)
    }

    fn exactly(&mut self, count: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; count];
        self.stream.read_exact(&mut bytes).ok()?;
        Some(bytes)
    }
}

impl Drop for RawClient {
    fn drop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

/// The token of the pod's service account.
pub(super) fn token(pod: &Pod<'_>) -> String {
    let read = "cat /var/run/secrets/kubernetes.io/serviceaccount/token";
    pod.shell(read).unwrap().trim().to_owned()
}

/// Requests of one pod over one connection.
pub(super) struct Requests {
    client: RawClient,
    namespace: String,
    token: String,
}

impl Requests {
    pub(super) fn new(testbed: &Testbed, pod: &Pod<'_>) -> Self {
        let token = token(pod);
        let mut client = RawClient::connect(testbed, pod, API_CLUSTER_IP, "http/1.1");
        client.handshake().unwrap();
        Self { client, namespace: pod.namespace.clone(), token }
    }

    fn request(&self, method: &str, path: &str, content_type: &str, body: &str) -> String {
        let (token, length) = (&self.token, body.len());
        format!(
            "{method} {path} HTTP/1.1\r\nHost: {API_CLUSTER_IP}\r\nAuthorization: Bearer {token}\r\n\
             Content-Type: {content_type}\r\nContent-Length: {length}\r\n\r\n{body}"
        )
    }

    #[track_caller]
    fn ask(&mut self, method: &str, path: &str, body: &str) -> Answer {
        let request = self.request(method, path, "application/json", body);
        self.client.send(request.as_bytes()).unwrap();
        self.client.answer().expect("an answer")
    }

    #[track_caller]
    pub(super) fn read(&mut self) -> Answer {
        self.ask("GET", "/api/v1/namespaces/default", "")
    }

    #[track_caller]
    pub(super) fn create(&mut self, name: &str, bytes: usize) -> Answer {
        self.try_create(name, bytes).expect("an answer")
    }

    /// The same; none if the answer breaks off.
    #[track_caller]
    pub(super) fn try_create(&mut self, name: &str, bytes: usize) -> Option<Answer> {
        let path = format!("/api/v1/namespaces/{}/configmaps", self.namespace);
        let object = serde_json::json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"value": random_text(bytes)},
        });
        let request = self.request("POST", &path, "application/json", &object.to_string());
        self.client.send(request.as_bytes()).unwrap();
        self.client.answer()
    }

    /// Changes an object that [`Self::create`] made, once for each marker; all requests are sent before the first answer is
    /// waited for.
    #[track_caller]
    pub(super) fn mark(&mut self, name: &str, markers: std::ops::Range<usize>) {
        let path = format!("/api/v1/namespaces/{}/configmaps/{name}", self.namespace);
        let change = |marker| {
            let change = serde_json::json!({"data": {"marker": format!("marker-{marker}")}});
            self.request("PATCH", &path, "application/merge-patch+json", &change.to_string())
        };
        let requests: String = markers.clone().map(change).collect();
        self.client.send(requests.as_bytes()).unwrap();
        for _ in markers {
            assert_eq!(self.client.answer().expect("an answer").status, 200);
        }
    }
}
