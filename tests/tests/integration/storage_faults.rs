//! A journal that cannot be written: a full file system, one that the kernel made read-only, one that hangs.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use weir_common::event::{Channel, Event, Kind, Outcome};
use weir_tests::{Pod, PodSpec, agent::TrustSource, audit, command, wait_until};

use super::{
    DEADLINE, Scene,
    client::{Answer, Requests},
    shown, verify,
};

/// Most objects of 200 kB that it may take to fill a journal of some MiB.
const OBJECTS_MAX: usize = 100;

/// A file system that is there as long as this value.
pub(super) struct Mounted(PathBuf);

impl Mounted {
    #[track_caller]
    pub(super) fn new(arguments: &[&str], source: &Path, at: &Path) -> Self {
        std::fs::create_dir_all(at).unwrap();
        command::run(Command::new("mount").args(arguments).arg(source).arg(at)).unwrap();
        Self(at.to_owned())
    }

    #[track_caller]
    pub(super) fn remount(&self, options: &str) {
        command::run(Command::new("mount").arg("-o").arg(format!("remount,{options}")).arg(&self.0)).unwrap();
    }
}

impl Mounted {
    /// A new ext4 in a file of this name.
    #[track_caller]
    fn ext4(scene: &Scene, name: &str) -> Self {
        let image = scene.scratch.path().join(name);
        std::fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
        command::run(Command::new("mkfs.ext4").arg("-q").arg(&image)).unwrap();
        Self::new(&["-o", "loop"], &image, &scene.journal())
    }

    /// Lets nothing be written, and whoever writes wait, until what is returned goes: as a disk that does not answer.
    #[track_caller]
    fn freeze(&self) -> Frozen<'_> {
        command::run(Command::new("fsfreeze").arg("--freeze").arg(&self.0)).unwrap();
        Frozen(&self.0)
    }
}

struct Frozen<'a>(&'a Path);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let _ = command::output(Command::new("fsfreeze").arg("--unfreeze").arg(self.0));
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let unmounted = command::output(Command::new("umount").arg(&self.0));
        // Who was killed may hold a file of it for a moment longer.
        if !unmounted.is_ok_and(|output| output.status.success()) {
            let _ = command::output(Command::new("umount").arg("--lazy").arg(&self.0));
        }
    }
}

/// Checks that an answer is the `Status` of a journal that does not accept.
#[track_caller]
fn check_refused(answer: &Answer, reason: &str) {
    let status: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!((answer.status, status["kind"].as_str()), (503, Some("Status")), "{status}");
    assert_eq!(status["reason"], "ServiceUnavailable");
    let message = status["message"].as_str().unwrap();
    assert!(message.starts_with("the request cannot be recorded, so it is not forwarded: "), "{message}");
    assert!(message.contains(reason), "{message}");
}

/// The API server's own word on whether it got a request that changes this object's collection.
fn created(scene: &Scene, pod: &Pod<'_>) -> usize {
    let entries = audit::finished_by_pod(&scene.testbed.layout().audit_log(), &pod.uid).unwrap();
    entries.iter().filter(|entry| entry.verb == "create").count()
}

#[test]
fn a_full_file_system_refuses_requests_with_the_reason_until_there_is_room() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-full", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-full", "caller")).unwrap();
    let mounted = Mounted::new(&["-t", "tmpfs", "-o", "size=6m"], Path::new("none"), &scene.journal());
    let mut agent = scene.agent(TrustSource::ClusterSigner);
    let mut requests = Requests::new(&scene.testbed, &pod);
    let (mut accepted, mut kept_back) = (0, 0);
    let refused = loop {
        assert!(accepted < OBJECTS_MAX, "6 MiB took {accepted} objects");
        match requests.try_create(&format!("filler-{accepted}"), 200_000) {
            Some(answer) if answer.status != 201 => break answer,
            Some(_) => accepted += 1,
            // The request still fitted into the journal and was carried out; its answer did not, and is kept back.
            None => {
                kept_back += 1;
                assert_eq!(kept_back, 1, "the next one is refused");
                requests = Requests::new(&scene.testbed, &pod);
            }
        }
    };
    assert!(accepted > 0);
    check_refused(&refused, "no space left for the journal");
    check_refused(&requests.create("small", 10), "free space on its file system");
    // What cannot be recorded is not forwarded, reads neither.
    check_refused(&requests.read(), "no space left for the journal");
    assert_eq!(created(&scene, &pod), accepted + kept_back, "a refused request reached the API server");
    assert!(
        agent.log().unwrap().contains("recording stopped; requests are refused"),
        "{}",
        agent.last_lines()
    );
    // The last words of the segment say it, where they still found room.
    let stopped = |event: &Event| matches!(&event.kind, Kind::Gap { reason, .. } if reason.starts_with("recording stopped: no space left"));
    assert!(scene.events().iter().any(stopped));

    mounted.remount("size=16m");
    let answer = wait_until("requests to be accepted again", DEADLINE, || {
        let answer = requests.create("after", 10);
        Ok((answer.status != 503).then_some(answer))
    })
    .unwrap();
    assert_eq!(answer.status, 201, "{}", answer.head);
    assert_eq!(requests.read().status, 200);
    assert!(agent.log().unwrap().contains("recording goes on"), "{}", agent.last_lines());
    scene.event("a record of what was lost", |event| {
        matches!(&event.kind, Kind::Gap { reason, events: Some(_), .. } if reason.contains("could not be written"))
    });
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    let verified = verify(&scene.journal());
    assert!(verified.status.success(), "{:?}", shown(&verified));
}

#[test]
fn a_file_system_that_turns_read_only_refuses_requests_and_says_what_to_do() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-read-only", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-read-only", "caller")).unwrap();
    let mounted = Mounted::ext4(&scene, "journal.ext4");
    let mut agent = scene.agent(TrustSource::ClusterSigner);
    let mut requests = Requests::new(&scene.testbed, &pod);
    assert_eq!(requests.create("before", 10).status, 201);
    // As ext4 does by itself when it finds its disk damaged.
    mounted.remount("abort");
    // A read may have been accepted before the journal knew; a mutation may not.
    check_refused(&requests.create("after", 10), "read-only file system; mount it writable");
    check_refused(&requests.read(), "read-only file system; mount it writable");
    assert_eq!(created(&scene, &pod), 1, "a refused request reached the API server");
    let log = agent.log().unwrap();
    assert!(log.contains("recording stopped; requests are refused"), "{}", agent.last_lines());
    assert!(log.contains("mount it writable"), "{}", agent.last_lines());
    assert!(!agent.terminate().unwrap().success(), "its last words are not on disk");

    // An aborted ext4 becomes writable by a new mount alone.
    drop(mounted);
    let image = scene.scratch.path().join("journal.ext4");
    let _mounted = Mounted::new(&["-o", "loop"], &image, &scene.journal());
    let _agent = scene.agent(TrustSource::ClusterSigner);
    assert_eq!(Requests::new(&scene.testbed, &pod).create("again", 10).status, 201);
    let verified = verify(&scene.journal());
    assert!(verified.status.success(), "{:?}", shown(&verified));
}

/// Waits until this holds in the pod, of the files in which the streams are shown.
#[track_caller]
fn shows(pod: &Pod<'_>, condition: &str) {
    let script = format!("cd /tmp; until {condition}; do sleep 0.1; done");
    let waited = pod.exec(&["timeout", "120", "sh", "-c", &script]).unwrap();
    let shown = pod.shell("cd /tmp; head answer shown watched followed 2>&1 || true").unwrap();
    assert!(waited.status.success(), "not so: {condition}\n{shown}");
}

/// A watch, a log and an exec of the pod's kubectl that stay open, each with what it has shown in a file of the pod.
#[track_caller]
fn open_streams(pod: &Pod<'_>) {
    let script = "cd /tmp; mkfifo keyboard; (sleep 1000 >keyboard) & \
        kubectl get configmaps -n it-hangs -w -o name >watched 2>&1 & \
        kubectl logs -f -n it-hangs caller >followed 2>&1 & \
        kubectl exec -i -n it-hangs caller -- sh -c 'echo begins; until [ -e /tmp/go ]; do sleep 0.05; done; echo said; \
        read it; echo heard $it >/tmp/heard; read it' <keyboard >shown 2>&1 & \
        echo first >/proc/1/fd/1";
    pod.shell(&format!("({script}) >/dev/null 2>&1")).unwrap();
    shows(pod, "grep -q begins shown && grep -q before watched && grep -q first followed");
}

/// What comes from the server arrives while nothing can be written, however long that takes: an answer, an event of a watch, a line of a
/// log, an exec's output.
#[track_caller]
fn what_is_read_arrives(scene: &Scene, pod: &Pod<'_>) {
    scene.testbed.kubectl(&["create", "configmap", "seen", "-n", "it-hangs"]).unwrap();
    let script = "cd /tmp; touch go; echo second >/proc/1/fd/1; \
        kubectl get --raw /api/v1/namespaces/default >answer 2>&1 &";
    pod.shell(&format!("({script}) >/dev/null 2>&1")).unwrap();
    shows(
        pod,
        "grep -q said shown && grep -q seen watched && grep -q second followed && grep -q default answer",
    );
}

/// Whether what was typed has arrived.
fn is_heard(pod: &Pod<'_>) -> bool {
    pod.exec(&["grep", "-q", "heard typed", "/tmp/heard"]).unwrap().status.success()
}

/// What was typed: on record in any case, whether or not it was forwarded.
#[track_caller]
fn typed(scene: &Scene) -> Event {
    scene.event("what was typed", |event| {
        matches!(&event.kind, Kind::Content(content)
            if content.channel == Channel::Stdin && content.bytes.to_vec().unwrap() == b"typed\n")
    })
}

/// The stream into which was typed has ended, and nothing of it went on.
#[track_caller]
fn is_cut_unheard(scene: &Scene, pod: &Pod<'_>, typed: &Event) {
    let closed = scene.event("the end of the exec", |event| {
        event.request == typed.request && matches!(event.kind, Kind::RequestClosed(_))
    });
    let Kind::RequestClosed(closed) = closed.kind else { unreachable!("chosen as such") };
    assert_eq!(closed.outcome, Outcome::Refused, "{closed:?}");
    assert!(!is_heard(pod), "it was typed in after the stream was cut");
}

/// How long the disk hangs, and with `WEIR_TEST_LONG`: longer than anybody waits for a record (30 s).
const HANGS: Duration = Duration::from_secs(3);
const HANGS_LONG: Duration = Duration::from_secs(35);

#[test]
fn while_the_disk_hangs_nothing_is_forwarded_and_a_slow_one_only_delays() {
    let Some(mut scene) = Scene::new() else { return };
    let is_long = std::env::var_os("WEIR_TEST_LONG").is_some();
    scene.namespace("it-hangs", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-hangs", "caller")).unwrap();
    let mounted = Mounted::ext4(&scene, "journal.ext4");
    let mut agent = scene.agent(TrustSource::ClusterSigner);
    let mut requests = Requests::new(&scene.testbed, &pod);
    assert_eq!(requests.create("before", 10).status, 201);
    open_streams(&pod);

    let frozen = mounted.freeze();
    what_is_read_arrives(&scene, &pod);
    // From here on the product's patience runs: nothing is waited for but that it stays as it is.
    let mut requests = Requests::new(&scene.testbed, &pod);
    let hangs = if is_long { HANGS_LONG } else { HANGS };
    let waiting = std::thread::scope(|scope| {
        let asked = scope.spawn(|| requests.create("while", 10));
        pod.shell("echo typed >/tmp/keyboard").unwrap();
        let since = Instant::now();
        wait_until("the disk to hang for a while", 2 * hangs, || {
            assert_eq!(created(&scene, &pod), 1, "what is not recorded was forwarded");
            Ok((since.elapsed() > hangs).then_some(()))
        })
        .unwrap();
        assert!(!is_heard(&pod), "it was typed in before it was recorded");
        assert!(is_long || !asked.is_finished(), "it was answered before its record was on disk");
        drop(frozen);
        asked.join().unwrap()
    });
    let typed = typed(&scene);
    let forwarded = if is_long {
        check_refused(&waiting, "the journal does not become durable in time");
        is_cut_unheard(&scene, &pod, &typed);
        1
    } else {
        assert_eq!(waiting.status, 201, "{}", waiting.head);
        wait_until("what was typed to arrive once it is recorded", DEADLINE, || {
            Ok(is_heard(&pod).then_some(()))
        })
        .unwrap();
        2
    };
    pod.shell("killall kubectl").unwrap();

    let mut requests = Requests::new(&scene.testbed, &pod);
    // A disk that answers three times a second.
    const CREATED: usize = 5;
    let slow = std::thread::scope(|scope| {
        let asked = scope.spawn(|| {
            let since = Instant::now();
            for number in 0..CREATED {
                let answer = requests.create(&format!("slow-{number}"), 10);
                assert_eq!(answer.status, 201, "{}", answer.head);
            }
            since.elapsed()
        });
        while !asked.is_finished() {
            let frozen = mounted.freeze();
            let until = Instant::now() + Duration::from_millis(300);
            while Instant::now() < until && !asked.is_finished() {
                std::thread::yield_now();
            }
            drop(frozen);
        }
        asked.join().unwrap()
    });
    println!("{CREATED} objects took {slow:?} on a disk that answers three times a second");
    assert_eq!(created(&scene, &pod), forwarded + CREATED);
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    let verified = verify(&scene.journal());
    assert!(verified.status.success(), "{:?}", shown(&verified));
}
