//! The emergency switch: for a bounded time requests go on although their records cannot be made durable.
//!
//! It is the one way to open what fails closed, so it has four locks: the configuration must allow it, only root on the node
//! throws it, it ends by itself, and it is recorded, before it has an effect where the journal still takes anything. A
//! file says that it is on; no other way would keep out a pod that is root and has the host's `/run` (ADR 9). It is on tmpfs, so that it can be written when no disk can, and a restart of the agent does not
//! end it but a reboot does. Times in it are of the clock that nobody can set.

use std::{
    collections::VecDeque,
    fs::{DirBuilder, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{fcntl::OFlag, time::ClockId};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::{config::Recording, recording::Recorder};

/// Where the agent looks.
pub const STANDARD: &str = "/run/weir/emergency.json";
/// How often it does.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How long the record of the beginning may take before it begins all the same.
const RECORD_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest reason, in bytes.
const REASON_BYTES_MAX: usize = 256;
/// Longest file.
const FILE_BYTES_MAX: u64 = 4096;
/// Most findings that wait for a journal that takes nothing.
const OWED_MAX: usize = 16;
/// Changes with each boot of the machine.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Why the switch cannot be thrown or read.
#[derive(Debug, thiserror::Error)]
pub enum EmergencyError {
    /// The configuration does not allow it.
    #[error(
        "the configuration does not allow an emergency; set recording.emergency.secondsMax in it (the agent reads it again \
         while it runs), if requests without durable records are what you want"
    )]
    NotAllowed,
    /// Longer than the configuration allows.
    #[error(
        "an emergency may last {max_s} seconds by recording.emergency.secondsMax; ask for no more, or renew it"
    )]
    TooLong {
        /// What is allowed.
        max_s: u64,
    },
    /// Nobody could tell later why.
    #[error("--reason must be one line of 1 to {REASON_BYTES_MAX} bytes, without control characters")]
    Reason,
    /// The file cannot be read or written.
    #[error("cannot use {path}; is its folder writable, and is this root?")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Somebody else than root may have written it.
    #[error("{path} is not believed: {problem}; remove it, and use `weir-agent emergency on`")]
    NotBelieved {
        /// The file.
        path: PathBuf,
        /// Why.
        problem: &'static str,
    },
}

/// An emergency that somebody began.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Emergency {
    /// Why, in the words of who began it.
    pub reason: String,
    /// Who: the user that the process had, and what it claims to have come from.
    pub by: String,
    /// The boot of the machine that it belongs to.
    boot: String,
    since_boottime_ms: u64,
    until_boottime_ms: u64,
}

impl Emergency {
    /// How long it goes on, where none may last longer than `max`; none: it is over.
    pub fn left(&self, max: Duration) -> Option<Duration> {
        let max_ms = u64::try_from(max.as_millis()).unwrap_or(u64::MAX);
        let until = self.until_boottime_ms.min(self.since_boottime_ms.saturating_add(max_ms));
        let left = until.checked_sub(boottime_ms()?).filter(|left| *left > 0)?;
        // One that begins in the future was not written by the command.
        (self.since_boottime_ms <= boottime_ms()?).then_some(Duration::from_millis(left))
    }
}

fn boottime_ms() -> Option<u64> {
    let now = nix::time::clock_gettime(ClockId::CLOCK_BOOTTIME).ok()?;
    let (seconds, ns) = (u64::try_from(now.tv_sec()).ok()?, u64::try_from(now.tv_nsec()).ok()?);
    Some(seconds * 1000 + ns / 1_000_000)
}

fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string(BOOT_ID)?.trim().to_owned())
}

/// Begins an emergency of `duration`, where `recording` allows it; the agent takes it up within a second.
///
/// # Errors
/// It is not allowed, or the file cannot be written.
pub fn begin(
    path: &Path,
    recording: &Recording,
    reason: &str,
    by: String,
    duration: Duration,
) -> Result<Emergency, EmergencyError> {
    let max = recording.emergency_max.ok_or(EmergencyError::NotAllowed)?;
    if duration > max {
        return Err(EmergencyError::TooLong { max_s: max.as_secs() });
    }
    let reason = reason.trim();
    if reason.is_empty() || reason.len() > REASON_BYTES_MAX || reason.chars().any(char::is_control) {
        return Err(EmergencyError::Reason);
    }
    let failed = |source| EmergencyError::File { path: path.to_owned(), source };
    let since_boottime_ms = boottime_ms().ok_or_else(|| failed(io::ErrorKind::Unsupported.into()))?;
    let length_ms = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let emergency = Emergency {
        reason: reason.to_owned(),
        by,
        boot: boot_id().map_err(failed)?,
        since_boottime_ms,
        until_boottime_ms: since_boottime_ms.saturating_add(length_ms),
    };
    write(path, &emergency).map_err(failed)?;
    Ok(emergency)
}

fn write(path: &Path, emergency: &Emergency) -> io::Result<()> {
    if let Some(folder) = path.parent()
        && !folder.exists()
    {
        DirBuilder::new().mode(0o700).create(folder)?;
    }
    let temporary = path.with_extension("new");
    match std::fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    file.write_all(&serde_json::to_vec(emergency)?)?;
    std::fs::rename(&temporary, path)
}

/// Ends an emergency; returns whether there was one.
///
/// # Errors
/// The file cannot be removed.
pub fn end(path: &Path) -> Result<bool, EmergencyError> {
    match std::fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(EmergencyError::File { path: path.to_owned(), source }),
    }
}

/// The emergency that a file tells of; none if there is no file, or it is of another boot.
///
/// # Errors
/// It cannot be read, or not be believed.
pub fn read(path: &Path) -> Result<Option<Emergency>, EmergencyError> {
    let failed = |source| EmergencyError::File { path: path.to_owned(), source };
    let not_believed = |problem| EmergencyError::NotBelieved { path: path.to_owned(), problem };
    let opened =
        OpenOptions::new().read(true).custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits()).open(path);
    let file: File = match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(failed)?,
    };
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() || metadata.uid() != nix::unistd::geteuid().as_raw() {
        return Err(not_believed("it is not a file of the agent's user"));
    }
    if metadata.mode() & 0o077 != 0 {
        return Err(not_believed("others may read or write it"));
    }
    // Who may change the folder can put an old file back.
    let folder = std::fs::metadata(path.parent().unwrap_or(Path::new("/"))).map_err(failed)?;
    if folder.uid() != nix::unistd::geteuid().as_raw() || folder.mode() & 0o022 != 0 {
        return Err(not_believed("others may write its folder"));
    }
    let mut text = Vec::new();
    file.take(FILE_BYTES_MAX).read_to_end(&mut text).map_err(failed)?;
    let emergency: Emergency =
        serde_json::from_slice(&text).map_err(|_| not_believed("it is not what the command writes"))?;
    Ok((emergency.boot == boot_id().map_err(failed)?).then_some(emergency))
}

/// Follows the switch for a recorder, until dropped.
pub async fn follow(recorder: Recorder, recording: watch::Receiver<Recording>, path: PathBuf) {
    let mut switch = Switch { recorder, now: State::Off, said: None, owed: VecDeque::new() };
    loop {
        let read = tokio::task::spawn_blocking({
            let path = path.clone();
            move || read(&path)
        });
        let max = recording.borrow().emergency_max;
        switch.turn(read.await.unwrap_or(Ok(None)), max).await;
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// Where the switch is, as the agent has taken it up.
#[derive(Debug, PartialEq)]
enum State {
    Off,
    /// On, and how many requests had gone on without a durable record before.
    On(Emergency, u64),
}

#[derive(Debug)]
struct Switch {
    recorder: Recorder,
    now: State,
    /// What was said of a file that has no effect: said once.
    said: Option<String>,
    /// Findings that the journal has not taken yet.
    owed: VecDeque<(&'static str, String)>,
}

impl Switch {
    async fn turn(&mut self, read: Result<Option<Emergency>, EmergencyError>, max: Option<Duration>) {
        let wanted = match (read, max) {
            (Ok(None), _) => None,
            (Ok(Some(emergency)), Some(max)) => emergency.left(max).map(|left| (emergency, left)),
            (Ok(Some(emergency)), None) => {
                self.refuse(format!(
                    "{} (asked for by {}: {})",
                    EmergencyError::NotAllowed,
                    emergency.by,
                    emergency.reason
                ));
                None
            }
            (Err(error), _) => {
                self.refuse(error.to_string());
                None
            }
        };
        match wanted {
            Some((emergency, left)) => {
                if !matches!(&self.now, State::On(on, _) if *on == emergency) {
                    self.end();
                    self.begin(emergency, left).await;
                }
                self.recorder.set_emergency(Some(left));
            }
            None => self.end(),
        }
        self.pay().await;
    }

    /// Recorded before it has an effect, if the journal takes it.
    async fn begin(&mut self, emergency: Emergency, left: Duration) {
        let message = format!(
            "for at most {} seconds requests go on although their records may be lost: {} (begun by {})",
            left.as_secs(),
            emergency.reason,
            emergency.by
        );
        tracing::error!(
            event = "emergency-began",
            detail = message,
            "requests go on although their records may be lost"
        );
        self.owe("emergencyBegan", message);
        self.pay().await;
        self.said = None;
        self.now = State::On(emergency, self.recorder.measured().emergency_requests);
    }

    fn end(&mut self) {
        if let State::On(emergency, before) = std::mem::replace(&mut self.now, State::Off) {
            self.recorder.set_emergency(None);
            let requests = self.recorder.measured().emergency_requests - before;
            let message = format!(
                "{requests} requests went on without waiting for their records; gaps say how many of those were lost; {} (begun by {})",
                emergency.reason, emergency.by
            );
            tracing::warn!(event = "emergency-ended", detail = message, "the emergency is over");
            self.owe("emergencyEnded", message);
        }
    }

    fn refuse(&mut self, problem: String) {
        if self.said.as_ref() != Some(&problem) {
            tracing::error!(
                event = "emergency-refused",
                problem,
                "an emergency was asked for and is not taken up"
            );
            self.owe("emergencyRefused", problem.clone());
            self.said = Some(problem);
        }
    }

    fn owe(&mut self, name: &'static str, message: String) {
        if self.owed.len() == OWED_MAX {
            self.owed.pop_front();
        }
        self.owed.push_back((name, message));
    }

    /// Records what is owed, as far as the journal takes it.
    async fn pay(&mut self) {
        while let Some((name, message)) = self.owed.front() {
            let recorded = tokio::time::timeout(RECORD_TIMEOUT, self.recorder.finding_durably(name, message));
            if !matches!(recorded.await, Ok(Ok(()))) {
                return;
            }
            self.owed.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt as _, path::PathBuf, time::Duration};

    use tempfile::TempDir;

    use super::{Emergency, EmergencyError, State, Switch, begin, boot_id, boottime_ms, end, read};
    use crate::{
        config::Recording,
        recording::{Recorder, RecorderOptions},
    };

    const HOUR: Duration = Duration::from_secs(3600);

    fn allowed() -> Recording {
        Recording { emergency_max: Some(HOUR), ..Recording::default() }
    }

    fn folder() -> (TempDir, PathBuf) {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("run").join("emergency.json");
        (folder, path)
    }

    fn emergency() -> Emergency {
        let now = boottime_ms().unwrap();
        Emergency {
            reason: "kafka is away".into(),
            by: "root".into(),
            boot: boot_id().unwrap(),
            since_boottime_ms: now,
            until_boottime_ms: now + 60_000,
        }
    }

    #[test]
    fn what_was_begun_is_read_until_it_is_ended() {
        let (_folder, path) = folder();
        assert!(read(&path).unwrap().is_none() && !end(&path).unwrap());
        let begun = begin(&path, &allowed(), " kafka is away ", "root".into(), HOUR / 2).unwrap();
        assert_eq!(read(&path).unwrap(), Some(begun.clone()));
        assert_eq!(begun.reason, "kafka is away");
        let left = begun.left(HOUR).unwrap();
        assert!(left <= HOUR / 2 && left > HOUR / 3, "{left:?}");
        assert!(end(&path).unwrap());
        assert!(read(&path).unwrap().is_none());
    }

    #[test]
    fn it_begins_only_where_and_as_long_as_the_configuration_allows_it_and_with_a_reason() {
        let (_folder, path) = folder();
        let begin = |recording: Recording, reason: &str, duration| {
            begin(&path, &recording, reason, "root".into(), duration)
        };
        assert!(matches!(begin(Recording::default(), "why", HOUR), Err(EmergencyError::NotAllowed)));
        assert!(matches!(begin(allowed(), "why", HOUR * 2), Err(EmergencyError::TooLong { max_s: 3600 })));
        for reason in ["", " ", "two\nlines", &"x".repeat(300)] {
            assert!(matches!(begin(allowed(), reason, HOUR), Err(EmergencyError::Reason)), "{reason:?}");
        }
        assert!(!path.exists());
    }

    #[test]
    fn a_file_that_others_could_have_written_is_not_believed() {
        let (folder, path) = folder();
        begin(&path, &allowed(), "why", "root".into(), HOUR).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(read(&path), Err(EmergencyError::NotBelieved { .. })));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert!(read(&path).unwrap().is_some());
        let run = path.parent().unwrap();
        std::fs::set_permissions(run, std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(read(&path), Err(EmergencyError::NotBelieved { .. })));
        std::fs::set_permissions(run, std::fs::Permissions::from_mode(0o700)).unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(read(&link).is_err());
        std::fs::write(&path, "{}").unwrap();
        assert!(matches!(read(&path), Err(EmergencyError::NotBelieved { .. })));
    }

    #[test]
    fn it_ends_by_itself_with_the_boot_and_by_the_shortest_of_its_limits() {
        let (_folder, path) = folder();
        let now = boottime_ms().unwrap();
        let over = Emergency { since_boottime_ms: 0, until_boottime_ms: now, ..emergency() };
        assert_eq!(over.left(Duration::MAX), None);
        let long = Emergency { since_boottime_ms: now - 1000, until_boottime_ms: u64::MAX, ..emergency() };
        assert!(long.left(Duration::from_secs(2)).unwrap() <= Duration::from_secs(1));
        let future =
            Emergency { since_boottime_ms: now + 600_000, until_boottime_ms: u64::MAX, ..emergency() };
        assert_eq!(future.left(HOUR), None);
        begin(&path, &allowed(), "why", "root".into(), HOUR).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace(&boot_id().unwrap(), "another")).unwrap();
        assert_eq!(read(&path).unwrap(), None, "of another boot");
    }

    #[tokio::test]
    async fn it_is_recorded_when_it_begins_ends_and_is_refused() {
        let folder = TempDir::new().unwrap();
        let options = RecorderOptions::new(folder.path().to_owned(), "node".into(), Vec::new());
        let recorder = Recorder::start(options).unwrap();
        let mut switch = Switch {
            recorder: recorder.clone(),
            now: State::Off,
            said: None,
            owed: std::collections::VecDeque::new(),
        };
        let is_on = || recorder.measured().emergency.is_some();
        for _ in 0..2 {
            switch.turn(Ok(Some(emergency())), None).await;
            assert!(!is_on(), "not where the configuration does not allow it");
        }
        for _ in 0..2 {
            let same = Emergency { since_boottime_ms: 1, until_boottime_ms: u64::MAX, ..emergency() };
            switch.turn(Ok(Some(same)), Some(Duration::from_secs(u64::MAX / 2000))).await;
            assert!(is_on());
        }
        // The configuration is changed meanwhile.
        switch.turn(Ok(Some(emergency())), None).await;
        assert!(!is_on());
        switch.turn(Ok(None), Some(HOUR)).await;
        let findings = recorder.measured().findings;
        let count = |name: &str| findings[name];
        assert_eq!((count("emergencyBegan"), count("emergencyEnded")), (1, 1));
        assert_eq!(count("emergencyRefused"), 2, "once before, and once again after it was on");
        recorder.stop("test").await.unwrap();
    }
}
