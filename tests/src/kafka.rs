//! A real Kafka on loopback, one node without ZooKeeper, and what a test does to it: topics, SIGKILL, SIGSTOP, start anew.
//!
//! It is Apache's ([`installation`]) and runs only while a test has a [`Kafka`]. Its listeners: a plain one, one that takes TLS and
//! a password alone (SCRAM-SHA-512 or PLAIN), and for who asks one that takes TLS and bearer tokens alone. What is on a topic is read by clients that share nothing with Weir ([`consumer`]).

mod consumer;
mod faults;
mod installation;

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use crate::certificates::{Authority, Subject};
use crate::command::{output, run, tail};
use crate::process::RecordedProcess;
use crate::progress::Progress;
use crate::wait::wait_until;

pub use consumer::Message;
pub use installation::{install, plan};

/// Where it listens; [`HOST`] is what its certificate is for.
const ADDRESS: &str = "127.0.0.1";
const HOST: &str = "localhost";

/// The one who may use the listener with TLS.
const USER: &str = "weir";
const PASSWORD: &str = "for-tests-only";

/// It listens within 3 s on an idle machine; builds may run beside it, and after SIGKILL it looks through its log.
const READY_DEADLINE: Duration = Duration::from_secs(120);
/// For SIGKILL to be the end.
const END_DEADLINE: Duration = Duration::from_secs(30);
/// Lines of its log that an error shows.
const LOG_LINES: usize = 20;
/// Of one question about what it knows.
const ASK_SECONDS: u32 = 10;
/// Of writing to a topic or reading all of it; it takes less, also beside builds.
const KCAT_SECONDS: u32 = 60;

/// Ports that are given out. Below those that the kernel gives to clients: nobody takes the port of a broker that is away, and
/// who keeps dialling it does not come to itself.
const PORTS: std::ops::Range<u16> = 20_000..29_999;

/// The broker; it ends when this value goes.
#[derive(Debug)]
pub struct Kafka {
    folder: tempfile::TempDir,
    installation: installation::Installation,
    /// Of the plain listener, of the one with TLS, of the controller, of the one with tokens.
    ports: [u16; 4],
    setup: Setup,
    process: Option<RecordedProcess>,
    starts: usize,
}

/// What not every broker has.
#[derive(Debug, Default)]
struct Setup {
    /// Whose tokens are taken.
    issuer: Option<Issuer>,
    /// Where topics are, if not in its own folder. With it, rights are asked for.
    disks: Vec<PathBuf>,
}

/// Who makes the tokens that the listener for them takes.
#[derive(Clone, Debug)]
pub struct Issuer {
    /// `iss` of its tokens.
    pub name: String,
    /// Its keys, as a JSON Web Key Set.
    pub keys: String,
    /// `aud` of tokens for the broker.
    pub audience: String,
}

/// How to reach the listener that takes TLS and a password alone, by SCRAM-SHA-512 or PLAIN.
#[derive(Debug)]
pub struct Secured {
    /// `HOST:PORT`.
    pub bootstrap: String,
    /// Who vouches for it, as PEM.
    pub certificate_authority: PathBuf,
    /// User name.
    pub user: &'static str,
    /// Password.
    pub password: &'static str,
}

impl Kafka {
    /// Starts one without topics, on ports that nobody uses; installs it where it is missing.
    ///
    /// # Errors
    /// When it cannot be installed or does not come up.
    pub fn start() -> Result<Self> {
        Self::start_with(Setup::default())
    }

    /// The same with a listener that takes tokens of an issuer, by Kafka's own check of them.
    ///
    /// # Errors
    /// When it cannot be installed or does not come up.
    pub fn start_with_tokens(issuer: Issuer) -> Result<Self> {
        Self::start_with(Setup { issuer: Some(issuer), disks: Vec::new() })
    }

    fn start_with(setup: Setup) -> Result<Self> {
        let installation = installation::installed(Progress::Shown)?;
        let folder = tempfile::tempdir().context("cannot make a scratch folder")?;
        fs::create_dir(folder.path().join("tmp")).context("cannot make a scratch folder")?;
        let ports = quiet_ports()?;
        write_certificate(folder.path())?;
        let mut kafka = Self { folder, installation, ports, setup, process: None, starts: 0 };
        if let Some(issuer) = &kafka.setup.issuer {
            fs::write(kafka.path("keys.json"), &issuer.keys).context("cannot write the issuer's keys")?;
        }
        fs::write(kafka.path("server.properties"), kafka.properties())
            .context("cannot write the broker's properties")?;
        kafka.format()?;
        kafka.restart()?;
        Ok(kafka)
    }

    /// `HOST:PORT` of the listener without TLS.
    #[must_use]
    pub fn bootstrap(&self) -> String {
        format!("{ADDRESS}:{}", self.ports[0])
    }

    /// The listener with TLS.
    #[must_use]
    pub fn secured(&self) -> Secured {
        Secured {
            bootstrap: format!("{HOST}:{}", self.ports[1]),
            certificate_authority: self.path("ca.crt"),
            user: USER,
            password: PASSWORD,
        }
    }

    /// `HOST:PORT` of the listener that takes tokens.
    #[must_use]
    pub fn bootstrap_for_tokens(&self) -> String {
        format!("{HOST}:{}", self.ports[3])
    }

    /// Makes a topic and waits until it can be written to. `configs` are those of topics, as `retention.ms`.
    ///
    /// # Errors
    /// When Kafka refuses it, or there is one of that name.
    pub fn create_topic(&self, name: &str, partitions: u32, configs: &[(&str, &str)]) -> Result<()> {
        let mut command = self.tool("org.apache.kafka.tools.TopicCommand");
        command.args(["--create", "--topic", name, "--replication-factor", "1"]);
        command.args(["--partitions", &partitions.to_string()]);
        for (key, value) in configs {
            command.arg("--config").arg(format!("{key}={value}"));
        }
        run(&mut command)?;
        self.wait_until_led(Some(name))
    }

    /// Deletes a topic with all that is in it.
    ///
    /// # Errors
    /// When Kafka refuses, or there is none of that name.
    pub fn delete_topic(&self, name: &str) -> Result<()> {
        let mut command = self.tool("org.apache.kafka.tools.TopicCommand");
        run(command.args(["--delete", "--topic", name])).map(drop)
    }

    /// Bytes that a topic takes in the broker's log.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn stored_bytes(&self, topic: &str) -> Result<u64> {
        let mut bytes = 0;
        for partition in fs::read_dir(self.path("data")).context("cannot read the broker's log")? {
            let partition = partition.context("cannot read the broker's log")?.path();
            let name = partition.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.rsplit_once('-').is_none_or(|(of, _)| of != topic) {
                continue;
            }
            for file in fs::read_dir(&partition).context("cannot read the broker's log")? {
                let file = file.context("cannot read the broker's log")?;
                if file.path().extension().is_some_and(|end| end == "log") {
                    bytes += file.metadata().context("cannot read the broker's log")?.len();
                }
            }
        }
        Ok(bytes)
    }

    /// Writes one message, by kcat: what somebody else may write to a topic.
    ///
    /// # Errors
    /// When the broker does not take it.
    pub fn produce(&self, topic: &str, key: Option<&str>, value: &str) -> Result<()> {
        let file = self.path("message");
        fs::write(&file, value).context("cannot write a scratch file")?;
        let mut command = self.installation.kcat(KCAT_SECONDS);
        command.args(["-P", "-b", &self.bootstrap(), "-t", topic]);
        if let Some(key) = key {
            command.args(["-k", key]);
        }
        run(command.arg(&file)).map(drop)
    }

    /// Sends a message with a key and no value: a compacted topic lets go of what has that key.
    ///
    /// # Errors
    /// The broker does not take it.
    pub fn erase(&self, topic: &str, key: &str) -> Result<()> {
        let file = self.path("message");
        fs::write(&file, format!("{key};\n")).context("cannot write a scratch file")?;
        let mut command = self.installation.kcat(KCAT_SECONDS);
        command.args(["-P", "-b", &self.bootstrap(), "-t", topic, "-K", ";", "-Z", "-l"]);
        run(command.arg(&file)).map(drop)
    }

    /// Stops its process: connections stay, and nobody answers.
    ///
    /// # Errors
    /// When it does not run.
    pub fn stop(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// Lets it go on after [`Self::stop`].
    ///
    /// # Errors
    /// When it has ended.
    pub fn cont(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    /// Kills it, as a crash would: connections are reset and new ones refused until [`Self::restart`].
    ///
    /// # Errors
    /// When it does not run, or the kernel does not let it go.
    pub fn kill(&mut self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        let process = self.process.take().context("the broker does not run")?;
        process.wait_for_end(END_DEADLINE)
    }

    /// Starts it after [`Self::kill`], on the same ports and with what it had written, and waits until it takes messages.
    ///
    /// # Errors
    /// When it runs, or does not come up.
    pub fn restart(&mut self) -> Result<()> {
        ensure!(self.process.is_none(), "the broker runs already");
        self.starts += 1;
        let mut command = self.class("kafka.Kafka", "info");
        command.arg(self.path("server.properties")).current_dir(self.folder.path());
        // It reads keys from nowhere that is not named here.
        let allowed = format!("-Dorg.apache.kafka.sasl.oauthbearer.allowed.urls={}", self.keys_url());
        command.env("JDK_JAVA_OPTIONS", allowed);
        let log = self.path(&format!("broker-{}.log", self.starts));
        self.process = Some(RecordedProcess::spawn("kafka", &mut command, &log)?);
        self.wait_until_led(None)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let process = self.process.as_ref().filter(|process| process.is_running());
        process.context("the broker does not run")?.signal(signal);
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn class(&self, name: &str, log_level: &str) -> Command {
        self.installation.class(name, log_level, &self.path("tmp"))
    }

    /// One of Kafka's own tools, told of the plain listener.
    fn tool(&self, class: &str) -> Command {
        let mut command = self.class(class, "error");
        command.args(["--bootstrap-server", &self.bootstrap()]);
        command
    }

    fn keys_url(&self) -> String {
        format!("file://{}", self.path("keys.json").display())
    }

    /// What the listener for tokens adds to the properties, and its part of the lists.
    fn token_properties(&self) -> (String, [String; 3]) {
        let Some(issuer) = &self.setup.issuer else { return Default::default() };
        let port = self.ports[3];
        let lists = [
            format!(",TOKENS://{ADDRESS}:{port}"),
            format!(",TOKENS://{HOST}:{port}"),
            ",TOKENS:SASL_SSL".to_owned(),
        ];
        let (folder, url) = (self.folder.path().display(), self.keys_url());
        let Issuer { name, audience, .. } = issuer;
        let package = "org.apache.kafka.common.security.oauthbearer";
        let properties = format!(
            "listener.name.tokens.ssl.keystore.type=PEM
listener.name.tokens.ssl.keystore.location={folder}/broker.pem
listener.name.tokens.sasl.enabled.mechanisms=OAUTHBEARER
listener.name.tokens.oauthbearer.sasl.jaas.config={package}.OAuthBearerLoginModule required;
listener.name.tokens.oauthbearer.sasl.server.callback.handler.class={package}.OAuthBearerValidatorCallbackHandler
sasl.oauthbearer.jwks.endpoint.url={url}
sasl.oauthbearer.expected.issuer={name}
sasl.oauthbearer.expected.audience={audience}
"
        );
        (properties, lists)
    }

    /// Where its log is, and who may do what. Who comes by the plain listener may do everything.
    fn disk_properties(&self) -> String {
        let folder = self.folder.path().display();
        if self.setup.disks.is_empty() {
            return format!("log.dirs={folder}/data");
        }
        let disks: Vec<_> = self.setup.disks.iter().map(|disk| disk.display().to_string()).collect();
        format!(
            "log.dirs={}
metadata.log.dir={folder}/data
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS",
            disks.join(",")
        )
    }

    fn properties(&self) -> String {
        let disks = self.disk_properties();
        let [plain, secured, controller, _] = self.ports;
        let (tokens, [listens, advertised, protocol]) = self.token_properties();
        let folder = self.folder.path().display();
        format!(
            "process.roles=broker,controller
node.id=1
controller.quorum.voters=1@{ADDRESS}:{controller}
listeners=PLAIN://{ADDRESS}:{plain},SECURED://{ADDRESS}:{secured},CONTROLLER://{ADDRESS}:{controller}{listens}
advertised.listeners=PLAIN://{ADDRESS}:{plain},SECURED://{HOST}:{secured}{advertised}
listener.security.protocol.map=PLAIN:PLAINTEXT,SECURED:SASL_SSL,CONTROLLER:PLAINTEXT{protocol}
inter.broker.listener.name=PLAIN
controller.listener.names=CONTROLLER
listener.name.secured.ssl.keystore.type=PEM
listener.name.secured.ssl.keystore.location={folder}/broker.pem
listener.name.secured.sasl.enabled.mechanisms=SCRAM-SHA-512,PLAIN
listener.name.secured.scram-sha-512.sasl.jaas.config=\
org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.secured.plain.sasl.jaas.config=\
org.apache.kafka.common.security.plain.PlainLoginModule required user_{USER}=\"{PASSWORD}\";
{disks}
log.index.size.max.bytes=1048576
auto.create.topics.enable=false
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
group.initial.rebalance.delay.ms=0
# After SIGKILL the controller takes the broker for alive as long; it may not come back before.
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
{tokens}"
        )
    }

    /// Makes its folder of data, and the user of the listener with TLS. What Kafka's tool writes is the same for each that keeps all in
    /// its own folder; it takes some seconds, and so is asked once.
    fn format(&self) -> Result<()> {
        static WRITTEN: Mutex<Vec<(String, Vec<u8>)>> = Mutex::new(Vec::new());
        if !self.setup.disks.is_empty() {
            return self.run_format();
        }
        let data = self.path("data");
        let mut written = WRITTEN.lock().unwrap_or_else(PoisonError::into_inner);
        if written.is_empty() {
            self.run_format()?;
            for entry in fs::read_dir(&data).context("cannot read what was formatted")? {
                let path = entry.context("cannot read what was formatted")?.path();
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                written.push((
                    name,
                    fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?,
                ));
            }
            return Ok(());
        }
        fs::create_dir(&data).context("cannot make the folder of data")?;
        for (name, content) in &*written {
            fs::write(data.join(name), content).with_context(|| format!("cannot write {name}"))?;
        }
        Ok(())
    }

    fn run_format(&self) -> Result<()> {
        let mut command = self.class("kafka.tools.StorageTool", "error");
        command.args(["format", "--cluster-id", "weir-testbed-kafka-000", "--config"]);
        command.arg(self.path("server.properties"));
        command.arg("--add-scram").arg(format!("SCRAM-SHA-512=[name={USER},password={PASSWORD}]"));
        run(&mut command).map(drop)
    }

    /// Waits until it answers and all partitions that it has, or those of `topic`, have a leader. That its port takes
    /// connections says less.
    fn wait_until_led(&self, topic: Option<&str>) -> Result<()> {
        let process = self.process.as_ref().context("the broker does not run")?;
        let what =
            topic.map_or("Kafka to answer".to_owned(), |topic| format!("topic {topic} to have leaders"));
        let led = wait_until(&what, READY_DEADLINE, || {
            if !process.is_running() {
                bail!("Kafka has ended");
            }
            // kcat waits for a second where nobody listens.
            if TcpStream::connect(self.bootstrap()).is_err() {
                return Ok(None);
            }
            let mut command = self.installation.kcat(ASK_SECONDS);
            command.args(["-L", "-J", "-m", "1", "-b", &self.bootstrap()]);
            if let Some(topic) = topic {
                command.args(["-t", topic]);
            }
            let answer = output(&mut command)?;
            Ok((answer.status.success() && consumer::is_led(&answer.stdout)).then_some(()))
        });
        led.with_context(|| {
            format!("last lines of {}:\n{}", process.log.display(), tail(&process.log, LOG_LINES))
        })
    }
}

impl Drop for Kafka {
    fn drop(&mut self) {
        // It has nothing to say at its end, and a stopped one would not hear SIGTERM. What survives SIGKILL, nobody can mend.
        let log = self.process.as_ref().map(|process| process.log.clone());
        if self.process.is_some() {
            let _ = self.kill();
        }
        if let (true, Some(log)) = (std::thread::panicking(), log) {
            self.folder.disable_cleanup(true);
            // Data may be large, and says little.
            let _ = fs::remove_dir_all(self.path("data"));
            Progress::Shown.say(&format!(
                "Kafka's log stays in {}; its last lines:\n{}",
                log.display(),
                tail(&log, LOG_LINES)
            ));
        }
    }
}

/// Makes an authority and the certificate of the listener with TLS.
fn write_certificate(folder: &Path) -> Result<()> {
    let authority = Authority::create(folder, "weir-testbed-kafka")?;
    authority.sign(&Subject { file: "broker", common_name: HOST, organization: None, names: &[HOST] })?;
    let mut both = String::new();
    for file in ["broker.key", "broker.crt"] {
        both += &fs::read_to_string(folder.join(file)).with_context(|| format!("cannot read {file}"))?;
    }
    fs::write(folder.join("broker.pem"), both).context("cannot write the broker's certificate")
}

/// Ports of [`PORTS`] that nobody listens on.
fn quiet_ports<const N: usize>() -> Result<[u16; N]> {
    let count = PORTS.end - PORTS.start;
    // Two that look at once look at different places.
    let first = u16::try_from(std::process::id() % u32::from(count)).unwrap_or_default();
    // All are held until all are chosen, so that none comes twice.
    let mut held = Vec::with_capacity(N);
    let mut ports = [0; N];
    let mut candidates = (0..count).map(|step| PORTS.start + (first + step) % count);
    for port in &mut ports {
        let mut free =
            || candidates.find_map(|port| TcpListener::bind((ADDRESS, port)).ok().map(|held| (port, held)));
        let (found, listener) =
            free().with_context(|| format!("no port of {PORTS:?} is free on {ADDRESS}"))?;
        held.push(listener);
        *port = found;
    }
    Ok(ports)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes a message for each line by kcat, `KEY<tab>VALUE`.
    fn produce(kafka: &Kafka, topic: &str, lines: &str, more: &[&str]) {
        let file = kafka.path("lines");
        fs::write(&file, lines).unwrap();
        let mut command = kafka.installation.kcat(60);
        command.args(["-P", "-b", &kafka.bootstrap(), "-t", topic, "-K", "\\t", "-l"]).args(more);
        run(command.arg(&file)).unwrap();
    }

    /// By one of Kafka's own tools: Debian's librdkafka is older than 2.6.1, whose SCRAM Kafka 4 refuses.
    fn topics_by_tls(kafka: &Kafka, password: &str) -> Result<String> {
        let Secured { bootstrap, certificate_authority, user, .. } = kafka.secured();
        let login = "org.apache.kafka.common.security.scram.ScramLoginModule required";
        let properties = format!(
            "security.protocol=SASL_SSL\nsasl.mechanism=SCRAM-SHA-512\nssl.truststore.type=PEM\nssl.truststore.location={}\n\
             sasl.jaas.config={login} username=\"{user}\" password=\"{password}\";\n",
            certificate_authority.display()
        );
        let file = kafka.path("client.properties");
        fs::write(&file, properties).unwrap();
        let mut command = kafka.class("org.apache.kafka.tools.TopicCommand", "error");
        command.args(["--list", "--bootstrap-server", &bootstrap, "--command-config"]);
        run(command.arg(&file))
    }

    #[test]
    fn two_readers_see_what_was_written_also_after_a_kill_and_over_tls() {
        let begin = std::time::Instant::now();
        let mut kafka = Kafka::start().unwrap();
        println!("Kafka is ready after {:.1} s", begin.elapsed().as_secs_f64());
        kafka.create_topic("events", 3, &[("retention.ms", "-1")]).unwrap();
        assert!(kafka.create_topic("events", 3, &[]).is_err(), "it is there");
        assert_eq!(kafka.messages("events").unwrap(), []);
        produce(
            &kafka,
            "events",
            "one\t{\"a\":\"ü,:\"}\ntwo\tb\none\tc\n",
            &["-H", "ce_id=x/1", "-H", "odd=a,b:c"],
        );
        let seen = kafka.messages("events").unwrap();
        let value_of = |key: &str| {
            let of_key = seen.iter().filter(|message| message.key.as_deref() == Some(key));
            of_key.map(|message| message.value.as_str()).collect::<Vec<_>>()
        };
        assert_eq!((value_of("one"), value_of("two")), (vec!["{\"a\":\"ü,:\"}", "c"], vec!["b"]));
        assert!(seen.iter().all(|message| message.header("ce_id") == Some("x/1")), "{seen:?}");
        assert_eq!(kafka.messages_by_java("events").unwrap(), seen, "Kafka's own consumer");

        kafka.kill().unwrap();
        assert!(kafka.messages("events").is_err(), "it is away");
        assert!(kafka.stop().is_err() && kafka.kill().is_err());
        let begin = std::time::Instant::now();
        kafka.restart().unwrap();
        println!("Kafka is ready again after {:.1} s", begin.elapsed().as_secs_f64());
        assert_eq!(kafka.messages("events").unwrap(), seen, "what was acknowledged outlives a kill");

        let topics = topics_by_tls(&kafka, kafka.secured().password).unwrap();
        assert!(topics.lines().any(|topic| topic == "events"), "{topics}");
        let refused = format!("{:#}", topics_by_tls(&kafka, "wrong").unwrap_err());
        assert!(refused.contains("SaslAuthenticationException"), "{refused}");

        kafka.stop().unwrap();
        assert!(kafka.messages("events").is_err(), "it does not answer");
        kafka.cont().unwrap();
        assert_eq!(kafka.messages("events").unwrap(), seen);
        kafka.delete_topic("events").unwrap();
        assert!(kafka.messages("events").is_err());
    }
}
