//! What an expression of `recording.masks.patterns` finds is on record nowhere, whichever way it went; the client sees it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use serde_json::json;
use weir_common::event::{Channel, Event, Kind};
use weir_tests::{AgentProcess, Pod};

use super::{
    super::{Scene, commits},
    files, lanes, opened, run,
    terminals::Terminal,
};

const PATTERN: &str = "canary-[a-z]+-4711";
/// What it finds.
const CANARY: &str = "canary-hidden-4711";
/// The pod's own log has it; then it waits to be driven.
pub(super) const SCRIPT: &str = "echo visible-log; echo says canary-hidden-4711; trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done";

/// The pod's kubectl, over WebSocket or SPDY: in exec by each channel, letter by letter, in copies, ports and arguments.
fn say_it(scene: &Scene, pod: &Pod<'_>, websocket: &str) {
    let kubectl = format!(
        "export KUBECTL_REMOTE_COMMAND_WEBSOCKETS={websocket} KUBECTL_PORT_FORWARD_WEBSOCKETS={websocket}; cd /tmp; "
    );
    let seen = |script: &str| {
        let said = run(pod, &format!("{kubectl} {script}"));
        assert!(said.contains(CANARY), "over {websocket}: {script}: {said}");
    };
    seen(
        "kubectl exec -i -n it-streams caller -- sh -c 'cat; cat /tmp/canary >&2' <canary 2>err && cmp canary err",
    );
    seen("kubectl exec -n it-streams caller -- echo visible-argument $(cat canary)");
    seen(
        "kubectl cp /tmp/canary it-streams/caller:/tmp/canary-copied && \
         kubectl cp it-streams/caller:/tmp/canary-copied /tmp/canary-back && cmp canary canary-back && cat canary-back",
    );
    seen(
        "(timeout 120 nc -l -p 9000 <canary >asked) 2>/dev/null & \
         kubectl port-forward -n it-streams pod/caller 9001:9000 >forwarding 2>&1 & forward=$!; \
         until grep -q Forwarding forwarding; do sleep 0.1; done; \
         timeout 120 nc 127.0.0.1 9001 <canary >answered; until cmp canary asked; do sleep 0.1; done >/dev/null 2>&1; \
         kill $forward; rm forwarding; cat answered",
    );
    type_letter_by_letter(scene, websocket);
}

/// Each letter is a piece of its own, as a person's are, and so is its echo.
fn type_letter_by_letter(scene: &Scene, websocket: &str) {
    let kubectl = "kubectl exec -it -n it-streams caller -- sh -c \"echo ready; read it; echo said \\$it\"";
    let mut terminal = Terminal::run(scene, websocket, kubectl);
    terminal.shows("ready");
    for (index, letter) in CANARY.char_indices() {
        terminal.types(&letter.to_string());
        terminal.shows(&CANARY[..=index]);
    }
    terminal.types("\n");
    let shown = terminal.ended(0);
    assert!(shown.contains(&format!("said {CANARY}")), "{shown}");
}

/// The masks that stand for the whole of what was found.
fn masks(bytes: &[u8]) -> BTreeSet<String> {
    let text = String::from_utf8_lossy(bytes);
    let masks = text.split("weir:masked:le").skip(1).filter_map(|rest| {
        let (class, digits) = rest.split_once(':')?;
        let digits = digits.get(..16)?;
        digits.bytes().all(|digit| digit.is_ascii_hexdigit()).then(|| format!("{class}:{digits}"))
    });
    masks.collect()
}

#[track_caller]
pub(super) fn what_a_pattern_finds_is_in_no_record(scene: &Scene, agent: &AgentProcess, pod: &Pod<'_>) {
    let mut configuration = serde_yaml_ng::from_str(&fs::read_to_string(agent.config()).unwrap()).unwrap();
    commits::change(agent, &mut configuration, json!({"masks": {"patterns": [PATTERN]}}));
    let earlier = scene.events().len();
    // By the host, of which nothing is recorded.
    pod.shell(&format!("echo {CANARY} >/tmp/canary")).unwrap();
    for websocket in ["true", "false"] {
        say_it(scene, pod, websocket);
    }
    let followed = run(
        pod,
        "kubectl logs -f -n it-streams caller >/tmp/followed 2>&1 & following=$!; \
         until grep -q 4711 /tmp/followed; do sleep 0.1; done; kill $following; cat /tmp/followed",
    );
    assert!(followed.contains(CANARY), "{followed}");
    let events = scene.ended(earlier, all_was_said);
    for event in &events {
        let said = serde_json::to_string(event).unwrap();
        assert!(!said.contains(CANARY), "{said}");
    }
    let requests: BTreeSet<_> = events.iter().filter_map(|event| event.request.as_deref()).collect();
    let mut found = BTreeMap::<Channel, BTreeSet<String>>::new();
    let mut visible = 0;
    for request in requests {
        for ((channel, _), bytes) in lanes(&events, request) {
            let text = String::from_utf8_lossy(&bytes);
            assert!(!text.contains(CANARY), "in {channel:?}: {text}");
            visible += text.matches("visible-").count();
            found.entry(channel).or_default().extend(masks(&bytes));
        }
        for file in files(&events, request) {
            assert_eq!(file.digest, None, "a digest of what is secret: {file:?}");
        }
    }
    assert!(visible >= 3, "what is no secret is on record");
    let said = |kind: fn(&Kind) -> bool| events.iter().filter(|event| kind(&event.kind)).count();
    assert_eq!(said(|kind| matches!(kind, Kind::FileCopied(_))), 4);
    // Equal secrets have equal masks, wherever they are.
    let of_it = found.get(&Channel::PortIn).and_then(|masks| masks.first()).expect("a mask").clone();
    for channel in [
        Channel::Stdin,
        Channel::Stdout,
        Channel::Stderr,
        Channel::PortIn,
        Channel::PortOut,
        Channel::ResponseBody,
    ] {
        assert!(found.get(&channel).is_some_and(|masks| masks.contains(&of_it)), "{channel:?}: {found:?}");
    }
    what_was_typed_and_run_has_masks(&events, &of_it);
}

/// Whether all that [`say_it`] does is there, over WebSocket and SPDY, and the log that was followed.
fn all_was_said(events: &[Event]) -> bool {
    let mut programs = BTreeMap::<&str, usize>::new();
    for event in events {
        if let Kind::RequestOpened(opened) = &event.kind
            && let Some(program) = opened.execution.as_ref().and_then(|execution| execution.command.first())
        {
            *programs.entry(program.as_str()).or_default() += 1;
        }
    }
    // Into each channel and letter by letter; as an argument; copies there and back.
    let run = [("sh", 4), ("echo", 2), ("tar", 4)];
    run.iter().all(|(program, times)| programs.get(program) >= Some(times))
        && opened(events, "/portforward").count() >= 2
        && opened(events, "/log?").count() >= 1
}

/// Letter by letter, and as an argument.
#[track_caller]
fn what_was_typed_and_run_has_masks(events: &[Event], of_it: &str) {
    let executions = events.iter().filter_map(|event| match &event.kind {
        Kind::RequestOpened(opened) => Some((event.request.as_deref()?, opened.execution.as_ref()?)),
        _ => None,
    });
    let (mut typed, mut argument) = (0, 0);
    for (request, execution) in executions {
        if execution.tty {
            let stdin = lanes(events, request).remove(&(Channel::Stdin, None)).unwrap();
            let stdin = String::from_utf8_lossy(&stdin);
            assert!(stdin.matches(":begun").count() > 5, "letter by letter: {stdin}");
            assert!(stdin.contains(&format!("weir:masked:le{of_it}")), "letter by letter: {stdin}");
            typed += 1;
        }
        argument += usize::from(masks(execution.command.concat().as_bytes()).contains(of_it));
    }
    assert_eq!((typed, argument), (2, 2), "over WebSocket and SPDY");
}
