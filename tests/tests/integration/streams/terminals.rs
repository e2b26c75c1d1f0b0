//! Exec and attach with a terminal, whose size changes while they run.
//!
//! The terminal is one of the host, which the pod's kubectl has through an exec from outside; what that shows is waited for.

use std::{
    io::{Read as _, Write as _},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use weir_common::event::{Channel, Event, Kind};
use weir_tests::{command, testbed::AGENT_IMAGE};

use super::{
    super::{Scene, target},
    lanes, replayed,
};

/// Rows and columns: at first, and after a change.
const FIRST: [u16; 2] = [33, 101];
const LATER: [u16; 2] = [44, 122];

/// A terminal of the host in which the pod's kubectl runs.
pub(super) struct Terminal {
    child: Child,
    keyboard: ChildStdin,
    screen: ChildStdout,
    shown: Vec<u8>,
}

impl Terminal {
    pub(super) fn run(scene: &Scene, websocket: &str, kubectl: &str) -> Self {
        let script = format!("KUBECTL_REMOTE_COMMAND_WEBSOCKETS={websocket} {kubectl}");
        let mut outer = scene.testbed.kubectl_command();
        outer.args(["exec", "-it", "-n", "it-streams", "caller", "--", "sh", "-c", &script]);
        let words = std::iter::once(outer.get_program()).chain(outer.get_args());
        let words: Vec<String> = words.map(|word| format!("'{}'", word.to_str().unwrap())).collect();
        let [rows, columns] = FIRST;
        let words = format!("tty; stty rows {rows} cols {columns}; exec {}", words.join(" "));
        let mut terminal = Command::new("timeout");
        // Its exit code is kubectl's.
        terminal.args(["-k", "5", "120", "script", "-q", "-e", "-c", &words, "/dev/null"]);
        for (name, value) in outer.get_envs() {
            if let Some(value) = value {
                terminal.env(name, value);
            }
        }
        let mut child = terminal.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (keyboard, screen) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Self { child, keyboard, screen, shown: Vec::new() }
    }

    /// Waits until it shows a text that was not there before.
    #[track_caller]
    pub(super) fn shows(&mut self, text: &str) {
        let mut piece = [0; 256];
        while !String::from_utf8_lossy(&self.shown).contains(text) {
            let read = self.screen.read(&mut piece).unwrap();
            assert!(read > 0, "no {text:?} in {}", String::from_utf8_lossy(&self.shown));
            self.shown.extend_from_slice(&piece[..read]);
        }
    }

    pub(super) fn types(&mut self, text: &str) {
        self.keyboard.write_all(text.as_bytes()).unwrap();
    }

    fn resize(&self) {
        let shown = String::from_utf8_lossy(&self.shown);
        let device = shown.lines().find(|line| line.starts_with("/dev/")).unwrap().trim();
        let [rows, columns] = LATER.map(|size| size.to_string());
        command::run(Command::new("stty").args(["-F", device, "rows", &rows, "cols", &columns])).unwrap();
    }

    /// All that it has shown, once kubectl has ended with this code.
    #[track_caller]
    pub(super) fn ended(mut self, code: i32) -> String {
        self.screen.read_to_end(&mut self.shown).unwrap();
        let shown = String::from_utf8_lossy(&self.shown).into_owned();
        assert_eq!(self.child.wait().unwrap().code(), Some(code), "{shown}");
        shown
    }
}

/// Of a test that has failed nothing goes on running: `timeout` passes the signal on, and ends what does not heed it.
impl Drop for Terminal {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let pid = i32::try_from(self.child.id()).expect("a process id");
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
            let _ = self.child.wait();
        }
    }
}

/// What a process does that sees its terminal change, and then is typed into. Who attaches to one that runs already is seen by the size
/// that its terminal is given.
fn script(end: &str) -> String {
    let until = |[rows, columns]: [u16; 2]| {
        format!("until [ \"$(stty size)\" = \"{rows} {columns}\" ]; do sleep 0.1; done")
    };
    format!(
        "{}; stty -a >/dev/null && echo a terminal; {}; echo another size; read it; {end}",
        until(FIRST),
        until(LATER)
    )
}

/// The pod to attach to: a container for each protocol.
pub(super) fn run_target(scene: &Scene) {
    let script = script("echo got $it; read it");
    let containers = ["true", "false"]
        .map(|websocket| target::container(&format!("websocket-{websocket}"), true, &script));
    target::run(&scene.testbed, "it-streams", &containers);
}

fn resize_and_type(terminal: &mut Terminal) {
    terminal.shows("a terminal");
    terminal.resize();
    terminal.shows("another size");
    terminal.types("typed\n");
}

/// The same as one word of a shell.
fn word(process: &str) -> String {
    format!("\"{}\"", process.replace('\\', "\\\\").replace('"', "\\\"").replace('$', "\\$"))
}

pub(super) fn exec(scene: &Scene, websocket: &str) {
    let kubectl = format!("kubectl exec -it -n it-streams caller -- sh -c {}", word(&script("exit 3")));
    let mut terminal = Terminal::run(scene, websocket, &kubectl);
    resize_and_type(&mut terminal);
    terminal.ended(3);
}

/// By `kubectl attach`, and, to a container of its own, by `kubectl debug`.
pub(super) fn attach(scene: &Scene, websocket: &str) {
    let container = format!("websocket-{websocket}");
    let attach = format!("kubectl attach -it -n it-streams target -c {container}");
    let debug = format!(
        "kubectl debug -it -n it-streams target --image={AGENT_IMAGE} --image-pull-policy=Never --container=debug-{container} \
         -- sh -c {}",
        word(&script("echo got $it; read it"))
    );
    // What is attached to ends: there must be another one then.
    for kubectl in [debug, attach] {
        let mut terminal = Terminal::run(scene, websocket, &kubectl);
        resize_and_type(&mut terminal);
        // What a container says at its end may come too late for whoever is attached.
        terminal.shows("got typed");
        terminal.types("quit\n");
        terminal.ended(0);
    }
}

/// The first size and the one that it was changed to, in this order.
#[track_caller]
pub(super) fn sizes_are_on_record(resized: &[u8], spoken: &str) {
    let sizes = serde_json::Deserializer::from_slice(resized).into_iter::<Value>();
    let sizes: Vec<_> = sizes.map(|size| size.unwrap()).collect();
    let of = |[rows, columns]: [u16; 2]| json!({"Width": columns, "Height": rows});
    let first = sizes.iter().position(|size| *size == of(FIRST));
    assert!(first.is_some(), "{spoken}: {sizes:?}");
    assert_eq!(sizes.last(), Some(&of(LATER)), "{spoken}: {sizes:?}");
}

/// What was typed into and shown by the terminals that kubectl attached to.
#[track_caller]
pub(super) fn attached_are_on_record(events: &[Event], spoken: &str) {
    let mut containers = Vec::new();
    for event in events {
        let Kind::RequestOpened(opened) = &event.kind else { continue };
        let (Some(execution), Some(request)) = (&opened.execution, &event.request) else { continue };
        if opened.attributes.subresource != "attach" || opened.upgrade.as_deref() != Some(spoken) {
            continue;
        }
        assert!(execution.tty && execution.stdin && execution.command.is_empty(), "{spoken}: {execution:?}");
        containers.extend(execution.container.clone());
        let lanes = lanes(events, request);
        assert_eq!(lanes[&(Channel::Stdin, None)], b"typed\nquit\n", "{spoken}");
        let output = String::from_utf8_lossy(&lanes[&(Channel::Stdout, None)]).into_owned();
        assert!(output.contains("another size") && output.contains("typed\r\n"), "{spoken}: {output:?}");
        sizes_are_on_record(&lanes[&(Channel::Resize, None)], spoken);
    }
    let container = format!("websocket-{}", spoken == "websocket");
    assert_eq!(containers, [format!("debug-{container}"), container], "{spoken}");
}

/// What kubectl put into the pod, and what was typed there, is told in words.
#[track_caller]
pub(super) fn debug_is_replayed(scene: &Scene, events: &[Event], spoken: &str) {
    let container = format!("debug-websocket-{}", spoken == "websocket");
    let asked = |event: &&Event| matches!(&event.kind, Kind::RequestOpened(opened) if opened.attributes.subresource == "ephemeralcontainers");
    let told = events.iter().filter(asked).map(|event| {
        let request = event.request.as_ref().unwrap();
        replayed(scene, &["--request", request])
    });
    let told: Vec<_> = told.collect();
    let line = format!("debug container {container}: image {AGENT_IMAGE}, runs sh -c ");
    let found =
        told.iter().filter(|told| told.contains(&line) && told.contains(", with input and a terminal"));
    assert_eq!(found.count(), 1, "{line:?} in {told:#?}");
}
