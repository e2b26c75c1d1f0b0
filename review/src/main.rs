//! `weir`: the reader's side. Lists sessions, prints events, replays a session, verifies a journal.
//!
//! Reads journals, and topics that agents published to; never writes to either. This file is the command line and the only place that picks exit codes:
//! 0, 1 for failure (and for damage that `verify` found), 2 for usage. A reader that closes the pipe is no failure.

mod events;
mod export;
#[cfg(test)]
mod fixture;
#[cfg(test)]
mod golden_tests;
mod invoked;
mod moment;
mod projection;
mod replay;
mod sessions;
mod source;
mod terminal;
mod verify;

use std::{
    io::{self, BufWriter, IsTerminal, Write},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use anyhow::Context as _;
use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

use moment::{Moment, Seek};
use projection::{Format, Projector};
use replay::{Pace, Subject};
use source::{
    Journal,
    address::Address,
    decryption::Reader,
    group::{Begin, Group},
    properties::Properties,
    topic::Reading,
};
use terminal::Style;
use weir_common::kms::KeyArn;

/// How often a followed journal is looked at.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(200);

/// Review what went through Weir to a Kubernetes API: sessions, events, replay, verification.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct From {
    /// Journal directory of an agent, or kafka://HOST:PORT[,HOST:PORT]/TOPIC[,TOPIC]; of `verify` also an export.
    ///
    /// Topics are read from their beginning to what they hold now, and spooled into TMPDIR meanwhile. Name the topic of
    /// checkpoints too, where the agent has one of its own.
    #[arg(long = "from", value_name = "SOURCE", value_parser = Address::parse)]
    address: Address,
    /// Properties of the Kafka client (librdkafka) for TLS and SASL, one name=value a line.
    #[arg(long, value_name = "FILE", env = "WEIR_KAFKA_CONFIG")]
    kafka_config: Option<PathBuf>,
}

impl From {
    fn open(&self, reading: Reading) -> anyhow::Result<Journal> {
        Ok(match &self.address {
            Address::Directory(path) => Journal::open(path)?,
            Address::Topics(topics) => {
                source::interrupted::watch().context("cannot wait for signals")?;
                Journal::of_topics(topics, &self.properties()?, reading)?
            }
        })
    }

    fn join(&self, name: &str, begin: Begin) -> anyhow::Result<Group> {
        let Address::Topics(topics) = &self.address else {
            anyhow::bail!("a group reads topics, not a journal; give --from kafka://HOST:PORT/TOPIC");
        };
        Ok(Group::join(topics, &self.properties()?, name, begin)?)
    }

    fn properties(&self) -> anyhow::Result<Properties> {
        Ok(match &self.kafka_config {
            Some(path) => Properties::read(path)?,
            None => Properties::default(),
        })
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List sessions: who (caller × pod × cluster), when, how much.
    Sessions(SessionsArgs),
    /// Print events as recorded or in the words of a SIEM, one JSON object a line, epoch by epoch.
    Events(EventsArgs),
    /// Print a session as it happened, or one request in full.
    ///
    /// Each line has the time since the session's start and [process.request]. Without --speed requests stand
    /// together, process by process; with it everything comes in the order it happened. What processes wrote is
    /// escaped (\x1b, \u{202e}), so it cannot act on your terminal. Exec, attach and port-forward streams are
    /// shown by channel and connection; what could not be decoded is marked raw, and --request shows every byte of it.
    Replay(ReplayArgs),
    /// Write one session with the proofs that its events are in their log, for someone who has no access to the rest.
    ///
    /// `weir verify --from DIR` checks it offline.
    Export(ExportArgs),
    /// Verify a journal, topic or export: frames, sequence, Merkle log, checkpoints; exit 1 on damage, naming the place.
    Verify(VerifyArgs),
}

#[derive(Debug, Args)]
struct SessionsArgs {
    #[command(flatten)]
    from: From,
    /// Only of this claimed user, for example system:serviceaccount:ci:agent.
    #[arg(long, value_name = "U")]
    user: Option<String>,
    /// Only to this cluster.
    #[arg(long, value_name = "C")]
    cluster: Option<String>,
    /// Only from a pod of this namespace, or with a request for it.
    #[arg(long, value_name = "N")]
    namespace: Option<String>,
    /// Only with an event at or after this: RFC 3339, or a length of time before now (30m, 2h, 1d12h).
    #[arg(long, value_name = "T", value_parser = moment)]
    since: Option<Moment>,
    /// Only with an event at or before this.
    #[arg(long, value_name = "T", value_parser = moment)]
    until: Option<Moment>,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct EventsArgs {
    #[command(flatten)]
    from: From,
    /// Only of this session (its whole id).
    #[arg(long, value_name = "ID")]
    session: Option<String>,
    /// json: the recorded bytes. Another one is made of them (docs/schema.md).
    ///
    /// audit: audit.k8s.io/v1; ocsf: OCSF 1.5.0; ecs: ECS 8.11; cloudevents: CloudEvents 1.0. Events that a format has no place for are left out; their number is told on standard error.
    #[arg(long, value_name = "FORMAT", default_value = "json", value_parser = format)]
    format: Printed,
    /// Go on with what the agent records from now on, until interrupted.
    #[arg(long)]
    follow: bool,
    /// Follow topics as a member of this consumer group: members share the partitions, and each goes on where the group was.
    ///
    /// At least once: what was written out is committed after it. An event may come again, after a member died or the
    /// partitions were shared out anew: keep the first of each {epoch, sequence}.
    #[arg(long, value_name = "NAME", requires = "follow", value_parser = Group::parse)]
    group: Option<String>,
    /// Where a group begins that was nowhere yet: earliest or latest.
    #[arg(long, value_name = "WHERE", requires = "group", conflicts_with = "since", value_parser = ["earliest", "latest"])]
    offset: Option<String>,
    /// Only what was recorded at or after this: RFC 3339, or a length of time before now (30m, 2h, 1d12h). A group that was
    /// somewhere goes on there, and passes over what is older.
    #[arg(long, value_name = "T", value_parser = moment)]
    since: Option<Moment>,
    /// Only what was recorded at or before this.
    #[arg(long, value_name = "T", value_parser = moment, conflicts_with = "follow")]
    until: Option<Moment>,
    /// Private key (X25519, PEM) to decrypt content with; may be repeated. Of topics name that of the wrapped keys too.
    #[arg(long, value_name = "FILE", conflicts_with = "group")]
    identity: Vec<PathBuf>,
    /// Key of AWS KMS to decrypt content with, by its ARN, with your own AWS credentials (kms:Decrypt). KMS is asked once for
    /// each session.
    #[arg(long, value_name = "ARN", value_parser = KeyArn::parse, conflicts_with = "group")]
    kms: Option<KeyArn>,
}

#[derive(Debug, Args)]
struct ReplayArgs {
    #[command(flatten)]
    from: From,
    /// Session to replay: its id or a unique beginning of it.
    #[arg(value_name = "ID", required_unless_present = "request")]
    session: Option<String>,
    /// Print this one request in full instead: its id (the Audit-ID) or a unique beginning of it.
    #[arg(long, value_name = "ID", conflicts_with = "session")]
    request: Option<String>,
    /// Wait as it happened, X times faster (1: real time). Without it nothing is waited for.
    #[arg(long, value_name = "X", value_parser = speed, group = "timed")]
    speed: Option<f64>,
    /// Wait no longer than this many seconds at once, with --speed or in the player of a --cast.
    #[arg(long, value_name = "SECONDS", value_parser = seconds, requires = "timed")]
    idle_limit: Option<Duration>,
    /// Begin here: a length of time since the session's start (90s, 1h30m), or RFC 3339. What came before is passed over; in a
    /// --cast it is there at once, so that the terminal looks as it did then.
    #[arg(long, value_name = "T", value_parser = Seek::parse, conflicts_with = "transcript")]
    seek: Option<Seek>,
    /// Write exec and attach streams as asciicast v2 instead: output, input and sizes of the terminal.
    /// Their bytes are not escaped: playing the file lets them act on your terminal.
    #[arg(long, value_name = "FILE", group = "timed")]
    cast: Option<PathBuf>,
    /// Print what was said in exec and attach streams instead, as plain text: a line of a channel at a time. What is no
    /// text is \xNN, a backslash is doubled.
    #[arg(long, conflicts_with = "timed")]
    transcript: bool,
    /// Print events as recorded instead, one JSON object a line: {"at": seconds since the first, "event": …}.
    #[arg(long, conflicts_with_all = ["timed", "transcript"])]
    json: bool,
    /// Private key (X25519, PEM) to decrypt content with; may be repeated. Of topics name that of the wrapped keys too.
    #[arg(long, value_name = "FILE")]
    identity: Vec<PathBuf>,
    /// Key of AWS KMS to decrypt content with, by its ARN, with your own AWS credentials (kms:Decrypt). KMS is asked once for
    /// each session.
    #[arg(long, value_name = "ARN", value_parser = KeyArn::parse)]
    kms: Option<KeyArn>,
}

#[derive(Debug, Args)]
struct ExportArgs {
    #[command(flatten)]
    from: From,
    /// Session to export (its whole id).
    #[arg(long, value_name = "ID")]
    session: String,
    /// Folder to make.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Verifier keys that the checkpoint must be signed with, as for `verify`.
    #[arg(long, value_name = "FILE")]
    key: Vec<PathBuf>,
}

#[derive(Debug, Args)]
struct VerifyArgs {
    #[command(flatten)]
    from: From,
    /// Verifier keys that checkpoints must be signed with, any of them: a file of C2SP note keys (NAME+HASH+KEY, one a
    /// line), or a public key in PEM, which verifies for every node. May be repeated. Without it keys are taken from
    /// the journal itself: that proves consistency, not authorship.
    #[arg(long, value_name = "FILE")]
    key: Vec<PathBuf>,
    /// A checkpoint that you kept from earlier: the journal must still contain all that it covers.
    #[arg(long, value_name = "FILE")]
    checkpoint: Option<PathBuf>,
    /// Accept that a topic's retention has removed its beginning, and verify what is left as far as possible.
    #[arg(long)]
    partial: bool,
    /// The report as one JSON object.
    #[arg(long)]
    json: bool,
}

fn moment(text: &str) -> Result<Moment, String> {
    Moment::parse(text, Moment::now())
}

/// What is printed of events: another format, or what was recorded.
type Printed = Option<Format>;

fn format(text: &str) -> Result<Printed, String> {
    let found = Format::ALL.into_iter().find(|format| format.name() == text);
    let names = || Format::ALL.map(Format::name).join(", ");
    if text == "json" || found.is_some() { Ok(found) } else { Err(format!("available: json, {}", names())) }
}

fn speed(text: &str) -> Result<f64, String> {
    text.parse::<f64>()
        .ok()
        .filter(|speed| speed.is_finite() && *speed > 0.0)
        .ok_or_else(|| "give a number above 0, for example 1 or 2.5".into())
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number = text.parse::<f64>().ok().filter(|seconds| *seconds > 0.0);
    let length = number.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    length.ok_or_else(|| "give a number of seconds above 0, for example 2 or 0.5".into())
}

fn main() -> ExitCode {
    // Usage says what was typed, which for a plugin of kubectl is not the name of a file.
    let matches = Cli::command().bin_name(invoked::name()).get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    match run(cli.command) {
        Ok(code) => code,
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody is left to be told if this fails.
            let _ = writeln!(io::stderr(), "weir: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let closed = |error: &io::Error| error.kind() == io::ErrorKind::BrokenPipe;
    error.chain().any(|cause| cause.downcast_ref::<io::Error>().is_some_and(closed))
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    let style = Style::for_stdout();
    let mut out = BufWriter::new(io::stdout().lock());
    let mut code = ExitCode::SUCCESS;
    match command {
        Command::Sessions(args) => list_sessions(&args, &mut out, style)?,
        Command::Events(args) => print_events(&args, &mut out)?,
        Command::Replay(args) => replay(args, &mut out, style)?,
        Command::Export(args) => export(&args, &mut out)?,
        Command::Verify(args) => code = verify(&args, &mut out, style)?,
    }
    out.flush().context("cannot write the output")?;
    Ok(code)
}

fn list_sessions(args: &SessionsArgs, out: &mut dyn Write, style: Style) -> anyhow::Result<()> {
    let filter = sessions::Filter {
        user: args.user.clone(),
        cluster: args.cluster.clone(),
        namespace: args.namespace.clone(),
        since: args.since,
        until: args.until,
    };
    let (mut journal, mut sessions) = read_sessions(args, args.since, &filter)?;
    // A topic was read from that time on: sessions that go on since before have their beginnings further back.
    if let Some(began) = sessions.earliest_beginning().filter(|_| journal.topic().is_some()) {
        (journal, sessions) = read_sessions(args, began, &filter)?;
    }
    let (list, outside) = sessions.finish(&filter);
    warn(&journal);
    let written = if args.json {
        sessions::print_json(out, &list)
    } else {
        sessions::print(out, style, &list, outside)
    };
    written.context("cannot write the output")
}

fn read_sessions(
    args: &SessionsArgs,
    since: Option<Moment>,
    filter: &sessions::Filter,
) -> anyhow::Result<(Journal, sessions::Sessions)> {
    let journal = args.from.open(Reading { since, ..Reading::default() })?;
    let mut sessions = sessions::Sessions::between(filter.since, filter.until);
    let mut progress = terminal::Progress::new("reading", journal.bytes());
    for record in journal.records() {
        let record = record?;
        progress.advance(record.frame_bytes);
        if let Some(event) = journal.event(&record) {
            sessions.add(&event);
        }
    }
    drop(progress);
    Ok((journal, sessions))
}

/// Tells what could not be read; nobody is left to be told if that fails.
fn warn(journal: &Journal) {
    let (warnings, more) = journal.warnings();
    for warning in &warnings {
        let _ = writeln!(io::stderr(), "weir: warning: {}", terminal::escaped(warning));
    }
    if !warnings.is_empty() {
        let more = if more > 0 { format!("{more} more; ") } else { String::new() };
        let _ = writeln!(
            io::stderr(),
            "weir: warning: {more}`{} verify --from {}` tells all",
            invoked::name(),
            journal.name()
        );
    }
}

fn print_events(args: &EventsArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    if let Some(group) = &args.group {
        let begin = match (args.since, args.offset.as_deref()) {
            (Some(since), _) => Begin::Since(since),
            (None, Some("latest")) => Begin::Latest,
            (None, _) => Begin::Earliest,
        };
        let mut group = args.from.join(group, begin)?;
        let lines = lines(args, out).between(args.since, None);
        return Ok(events::follow_group(&mut group, lines)?);
    }
    let decrypts = !args.identity.is_empty() || args.kms.is_some();
    if args.follow && decrypts && matches!(args.from.address, Address::Topics(_)) {
        anyhow::bail!(
            "topics that are followed are not decrypted; leave out --follow, or --identity and --kms"
        );
    }
    let reader = Reader::new(&args.identity, args.kms.as_ref())?;
    let reading = Reading { since: args.since, follow: args.follow, ..Reading::default() };
    let journal = args.from.open(reading)?.read_by(reader);
    let lines = lines(args, out).between(args.since, args.until);
    if args.follow {
        warn(&journal);
        let mut told = journal.warnings().0.len();
        let mut wait = || {
            let (warnings, _) = journal.warnings();
            for warning in warnings.iter().skip(told) {
                let _ = writeln!(io::stderr(), "weir: warning: {}", terminal::escaped(warning));
            }
            told = warnings.len();
            std::thread::park_timeout(FOLLOW_INTERVAL);
            true
        };
        return Ok(events::follow(&journal, lines, &mut wait)?);
    }
    let listed = events::list(&journal, lines);
    warn(&journal);
    if let Some(left_out) = listed? {
        let _ = writeln!(io::stderr(), "weir: {left_out}");
    }
    Ok(())
}

fn lines<'a>(args: &'a EventsArgs, out: &'a mut dyn Write) -> events::Lines<'a> {
    let lines = events::Lines::new(out, io::stdout().is_terminal(), args.session.as_deref());
    lines.projected(args.format.map(Projector::new))
}

fn replay(args: ReplayArgs, out: &mut dyn Write, style: Style) -> anyhow::Result<()> {
    let reader = Reader::new(&args.identity, args.kms.as_ref())?;
    let journal = args.from.open(Reading::default())?.read_by(reader);
    let subject = match (args.request, args.session) {
        (Some(request), _) => Subject::Request(request),
        (None, session) => Subject::Session(session.unwrap_or_default()),
    };
    let pace = args.speed.map(|speed| Pace { speed, idle_limit: args.idle_limit });
    let played = match args.cast {
        _ if args.transcript => replay::write_transcript(&journal, &subject, out),
        _ if args.json => replay::write_json(&journal, &subject, args.seek, out, io::stdout().is_terminal()),
        None => replay::play(&journal, &subject, pace, args.seek, out, style),
        Some(path) => replay::write_cast(&journal, &subject, &path, args.idle_limit, args.seek)
            .and_then(|text| Ok(writeln!(out, "{text}")?)),
    };
    warn(&journal);
    Ok(played?)
}

fn export(args: &ExportArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let journal = args.from.open(Reading::default())?;
    let keys = verify::Keys::load(&journal, &args.key)?;
    let manifest = export::export(&journal, &args.session, &keys, &args.out)?;
    warn(&journal);
    let folder = args.out.display();
    writeln!(out, "{} with proofs in {folder}", moment::counted(manifest.events, "event"))?;
    if manifest.left_out > 0 {
        writeln!(
            out,
            "{} of the session are not in it: no checkpoint that is here proves them (yet)",
            moment::counted(manifest.left_out, "event")
        )?;
    }
    Ok(())
}

fn verify(args: &VerifyArgs, out: &mut dyn Write, style: Style) -> anyhow::Result<ExitCode> {
    let options =
        verify::Options { keys: &args.key, checkpoint: args.checkpoint.as_deref(), partial: args.partial };
    let report = match &args.from.address {
        Address::Directory(path) if verify::export::is_export(path) => {
            verify::export::verify(path, &options)?
        }
        _ => verify::verify(&args.from.open(Reading::default())?, &options)?,
    };
    let written =
        if args.json { verify::print_json(out, &report) } else { verify::print(out, style, &report) };
    written.context("cannot write the output")?;
    Ok(if report.is_sound() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::Cli;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
