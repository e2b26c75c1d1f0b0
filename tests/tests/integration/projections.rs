//! What `weir events --format` makes of a real run, read by those whose format it is.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    process::Command,
};

use serde_json::Value;
use weir_tests::{Pod, agent, clients, command, components, progress::Progress, python};

use super::{Scene, shown};

/// All formats, of the journal of a scene in which a pod has used kubectl.
pub(super) fn check(scene: &Scene, pod: &Pod<'_>) {
    audit(scene, pod);
    cloudevents(scene);
    ocsf(scene);
    ecs(scene);
    by_kubectl(scene);
}

/// kubectl finds `weir` as its plugin by the name of a file, and it does the same then.
fn by_kubectl(scene: &Scene) {
    let weir = agent::built_binary("weir").unwrap();
    let folder = scene.scratch.path().join("plugins");
    std::fs::create_dir(&folder).unwrap();
    std::os::unix::fs::symlink(&weir, folder.join("kubectl-weir")).unwrap();
    let kubectl = |arguments: &[&str]| {
        // A plugin's name comes before any flag.
        let mut kubectl = Command::new(scene.testbed.components().binary("kubectl"));
        shown(&command::output(kubectl.env("PATH", &folder).args(arguments)).unwrap())
    };
    let (code, plugins, err) = kubectl(&["plugin", "list"]);
    assert!(code == Some(0) && plugins.contains("/plugins/kubectl-weir\n"), "{code:?} {plugins}{err}");
    let (code, help, _) = kubectl(&["weir", "--help"]);
    assert!(code == Some(0) && help.contains("Usage: kubectl weir <COMMAND>"), "{code:?} {help}");
    let (code, _, usage) = kubectl(&["weir", "sessions"]);
    assert!(code == Some(2) && usage.contains("Usage: kubectl weir sessions --from"), "{code:?} {usage}");
    let journal = scene.journal().display().to_string();
    let (code, _, hint) = kubectl(&["weir", "replay", "--from", &journal, "absent"]);
    assert!(code == Some(1) && hint.contains("`kubectl weir sessions --from "), "{code:?} {hint}");
    let directly = shown(&command::output(Command::new(&weir).arg("--version")).unwrap());
    assert_eq!(kubectl(&["weir", "--version"]), directly);
    let (code, sessions, err) = kubectl(&["weir", "sessions", "--json", "--from", &journal]);
    let is_one = |line: &str| serde_json::from_str::<Value>(line).is_ok_and(|session| session.is_object());
    assert!(
        code == Some(0) && !sessions.is_empty() && sessions.lines().all(is_one),
        "{code:?} {sessions}{err}"
    );
}

/// What a pod has put into a secret, in clear and as the API has it.
const CANARIES: [&str; 2] = ["canary-4711", "Y2FuYXJ5LTQ3MTE="];

/// Lines of a format, with the file that they are in.
fn printed(scene: &Scene, format: &str) -> (std::path::PathBuf, Vec<Value>) {
    let weir = agent::built_binary("weir").unwrap();
    let mut events = Command::new(weir);
    let output = command::output(events.args(["events", "--format", format, "--from"]).arg(scene.journal()));
    let (code, out, err) = shown(&output.unwrap());
    assert_eq!(code, Some(0), "{err}");
    for canary in CANARIES {
        assert!(!out.contains(canary), "{canary} is in {format}");
    }
    let path = scene.scratch.path().join(format);
    std::fs::write(&path, &out).unwrap();
    (path, out.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
}

/// Kubernetes' own decoder takes every line, of the goldens too, and the API server's own log says the same of the same requests.
fn audit(scene: &Scene, pod: &Pod<'_>) {
    let decoder = components::audit_decoder(Progress::Shown).unwrap();
    let (path, lines) = printed(scene, "audit");
    let golden = components::repository().join("review/golden/audit.jsonl");
    let decoded = |path: &Path| shown(&command::output(Command::new(&decoder).arg(path)).unwrap());
    let (code, stages, err) = decoded(&golden);
    assert_eq!(code, Some(0), "{err}");
    assert_eq!(stages, "RequestReceived 10\nResponseStarted 4\nResponseComplete 9\nPanic 0\n");
    let (code, stages, err) = decoded(&path);
    assert_eq!(code, Some(0), "{err}");
    assert!(!stages.contains(" 0\nResponseComplete") && !stages.contains("Complete 0"), "{stages}");
    let odd = scene.scratch.path().join("odd");
    let mut strange = lines[0].clone();
    strange["stagetimestamp"] = strange["stageTimestamp"].clone();
    std::fs::write(&odd, format!("{strange}\n")).unwrap();
    assert_eq!(decoded(&odd).0, Some(1), "the decoder is strict");

    let complete = |lines: &[Value]| -> BTreeMap<String, Value> {
        let ends = lines.iter().filter(|line| line["stage"] == "ResponseComplete");
        ends.map(|line| (line["auditID"].as_str().unwrap().to_owned(), line.clone())).collect()
    };
    let log = std::fs::read_to_string(scene.testbed.layout().audit_log()).unwrap();
    let log: Vec<Value> = log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let (ours, theirs) = (complete(&lines), complete(&log));
    let mut same = 0;
    for (id, ours) in &ours {
        assert_eq!(ours["annotations"]["weir.dev/pod-uid"], pod.uid, "{ours}");
        let Some(theirs) = theirs.get(id) else { continue };
        same += 1;
        for field in ["requestURI", "verb", "userAgent", "user/username", "responseStatus/code"] {
            let of = |line: &Value| line.pointer(&format!("/{field}")).cloned();
            assert_eq!(of(ours), of(theirs), "{field}: {ours} {theirs}");
        }
        for field in ["resource", "namespace", "name", "apiGroup", "apiVersion", "subresource"] {
            assert_eq!(ours["objectRef"][field], theirs["objectRef"][field], "{field}: {ours} {theirs}");
        }
    }
    // A request with a wrong token has another stage in the API server's log.
    assert!(same + 2 >= ours.len() && same > 10, "{same} of {} are in the API server's log", ours.len());
    // kubectl says this one in protobuf, and that one in JSON.
    let created = |line: &&Value| line["verb"] == "create" && line["objectRef"]["resource"] == "configmaps";
    let created = ours.values().find(created).expect("a configmap was created");
    assert_eq!(created["annotations"]["weir.dev/request-object-omitted"], "not JSON", "{created}");
    let secret =
        ours.values().find(|line| line["verb"] == "create" && line["objectRef"]["resource"] == "secrets");
    let masked = secret.expect("a secret was created")["requestObject"]["stringData"]["a"].as_str();
    assert!(masked.is_some_and(|value| value.starts_with("weir:masked:le16:")), "{secret:?}");
}

/// One an event, with the recorded bytes.
fn cloudevents(scene: &Scene) {
    let (path, lines) = printed(scene, "cloudevents");
    let (_, recorded) = printed(scene, "json");
    assert_eq!(lines.len(), recorded.len());
    let text = std::fs::read_to_string(path).unwrap();
    let recorded = std::fs::read_to_string(scene.scratch.path().join("json")).unwrap();
    assert!(
        text.lines()
            .zip(recorded.lines())
            .all(|(line, event)| line.ends_with(&format!("\"data\":{event}}}")))
    );
    for line in &lines {
        let id = format!("{}/{}", line["data"]["epoch"].as_str().unwrap(), line["data"]["sequence"]);
        assert_eq!((line["id"].as_str(), line["specversion"].as_str()), (Some(id.as_str()), Some("1.0")));
    }
}

/// The published schema takes every line, of the goldens too; each request has an end.
fn ocsf(scene: &Scene) {
    let (path, lines) = printed(scene, "ocsf");
    let validate = |path: &Path| {
        let mut program = python::OCSF.program("validate.py", Progress::Shown).unwrap();
        shown(&command::output(program.arg(path)).unwrap())
    };
    let golden = components::repository().join("review/golden/ocsf.jsonl");
    assert_eq!(validate(&golden), (Some(0), "0 10\n1007 4\n6003 19\n".to_owned(), String::new()));
    let (code, classes, err) = validate(&path);
    assert_eq!(code, Some(0), "{err}");
    assert!(classes.contains("1007 ") && classes.contains("6003 "), "{classes}");
    let odd = scene.scratch.path().join("odd");
    for (field, value) in [("status_id", 7.into()), ("no_such_field", true.into()), ("time", Value::Null)] {
        let mut strange = lines[0].clone();
        strange[field] = value;
        std::fs::write(&odd, format!("{strange}\n")).unwrap();
        assert_eq!(validate(&odd).0, Some(1), "the schema has no such {field}");
    }
    let exits: Vec<_> = lines.iter().filter_map(|line| line["exit_code"].as_i64()).collect();
    assert!(exits.contains(&3) && exits.contains(&0), "{exits:?}");
}

/// The published fields have every one of a line, of the goldens too; each request has a beginning and an end, each line its
/// event's id.
fn ecs(scene: &Scene) {
    let (path, lines) = printed(scene, "ecs");
    let validate = |path: &Path| {
        let mut program = clients::ecs_validator(Progress::Shown).unwrap();
        shown(&command::output(program.arg(path)).unwrap())
    };
    let count = |path: &Path| std::fs::read_to_string(path).unwrap().lines().count();
    for path in [components::repository().join("review/golden/ecs.jsonl"), path] {
        let all = format!("{} documents\n", count(&path));
        assert_eq!(validate(&path), (Some(0), all, String::new()), "{}", path.display());
    }
    let odd = scene.scratch.path().join("odd");
    for (field, value) in [("/event/kind", "no-such-kind".into()), ("/message", 7.into())] {
        let mut strange = lines[0].clone();
        *strange.pointer_mut(field).unwrap() = value;
        std::fs::write(&odd, format!("{strange}\n")).unwrap();
        assert_eq!(validate(&odd).0, Some(1), "ECS has no such {field}");
    }
    let mut strange = lines[0].clone();
    strange["event"]["no_such_field"] = true.into();
    std::fs::write(&odd, format!("{strange}\n")).unwrap();
    assert_eq!(validate(&odd).0, Some(1), "ECS has no such field");
    let ids: BTreeSet<_> = lines.iter().filter_map(|line| line["event"]["id"].as_str()).collect();
    assert_eq!(ids.len(), lines.len());
    let of = |code: &str| lines.iter().filter(|line| line["event"]["code"] == code).collect::<Vec<_>>();
    let (opened, closed) = (of("requestOpened"), of("requestClosed"));
    assert_eq!(opened.len(), closed.len());
    assert!(closed.iter().all(|line| {
        let failed = line["http"]["response"]["status_code"].as_u64().is_none_or(|code| code >= 400);
        line["event"]["outcome"] == if failed { "failure" } else { "success" }
    }));
    let exits: Vec<_> = closed.iter().filter_map(|line| line["weir"]["exit-code"].as_str()).collect();
    assert!(exits.contains(&"3"), "{exits:?}");
}
