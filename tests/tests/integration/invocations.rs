//! Each kubectl is one invocation, with its arguments as they were typed but for what a mask hides, and with all its requests.

use weir_common::event::{Event, Kind};

use super::{APPLY, COMMANDS};

/// What stands in the place of a credential here, whatever its mask is.
const MASK: &str = "MASK";

/// The arguments of the kubectl in a script, as a shell has them.
fn typed(script: &str) -> Vec<String> {
    let command = script.rsplit(" | ").next().unwrap();
    let mut words = vec![String::new()];
    let mut quoted = false;
    for character in command.chars() {
        match character {
            '\'' => quoted = !quoted,
            ' ' if !quoted => words.push(String::new()),
            // Outside of single quotes a shell takes them away.
            '"' if !quoted => {}
            other => words.last_mut().unwrap().push(other),
        }
    }
    words.iter().map(|word| without_credential(word)).collect()
}

/// Of what follows a flag that speaks of a secret, a mask is on record.
fn without_credential(word: &str) -> String {
    for flag in ["--token=", "--from-literal="] {
        if word.starts_with(flag) {
            return format!("{flag}{MASK}");
        }
    }
    word.to_owned()
}

fn recorded(argv: &[String]) -> Vec<String> {
    let neutral = |word: &String| match word.split_once("weir:masked:") {
        Some((flag, _)) => format!("{flag}{MASK}"),
        None => word.clone(),
    };
    argv.iter().map(neutral).collect()
}

/// Verbs of the requests of an invocation about an object, in their order.
fn verbs(events: &[Event], invocation: &str) -> Vec<String> {
    let of = events.iter().filter(|event| event.invocation.as_deref() == Some(invocation));
    of.filter_map(|event| match &event.kind {
        Kind::RequestOpened(opened) if !opened.attributes.name.is_empty() => {
            Some(opened.attributes.verb.clone())
        }
        _ => None,
    })
    .collect()
}

#[track_caller]
pub(super) fn check(events: &[Event]) {
    let started = events.iter().filter_map(|event| match &event.kind {
        Kind::InvocationStarted { process, .. } => Some((event, process)),
        _ => None,
    });
    let started: Vec<_> = started.collect();
    let mut argv: Vec<_> = started.iter().map(|(_, process)| recorded(&process.argv)).collect();
    let mut expected: Vec<_> = COMMANDS.iter().map(|script| typed(script)).collect();
    argv.sort();
    expected.sort();
    assert_eq!(argv, expected, "each command is one invocation");
    assert!(started.iter().all(|(_, process)| process.executable == "/bin/kubectl"), "{started:?}");
    let applied = started.iter().find(|(_, process)| recorded(&process.argv) == typed(APPLY)).unwrap();
    assert_eq!(
        verbs(events, applied.0.invocation.as_deref().unwrap()),
        ["get", "patch"],
        "both are of one process"
    );
    // None is of no process.
    let alone = events
        .iter()
        .find(|event| matches!(event.kind, Kind::RequestOpened(_)) && event.invocation.is_none());
    assert!(alone.is_none(), "{alone:?}");
}
