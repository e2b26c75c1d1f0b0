//! `weir-agent exec` against the testbed's API server, with the kinds of credentials that kubeconfigs have.

use std::{
    fs, io,
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Output},
    thread,
};

use serde_json::{Value, json};
use weir_common::event::{Channel, Kind};
use weir_tests::{agent, command};

use super::{Scene, shown};

/// The administrator's kubeconfig of the testbed, which has a client certificate, as JSON.
fn admin(scene: &Scene) -> Value {
    let text = scene.testbed.kubectl(&["config", "view", "--raw", "--flatten", "-o", "json"]).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn written(scene: &Scene, name: &str, kubeconfig: &Value) -> PathBuf {
    let path = scene.scratch.path().join(name);
    fs::write(&path, kubeconfig.to_string()).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    path
}

/// Runs a command under `exec` and, to compare, without it.
fn both(scene: &Scene, kubeconfig: &Path, arguments: &[&str]) -> (Output, Output) {
    let kubectl = scene.testbed.components().binary("kubectl");
    let binary = agent::built_binary("weir-agent").unwrap();
    let mut intercepted = Command::new(binary);
    intercepted
        .args(["exec", "--quiet", "--kubeconfig"])
        .arg(kubeconfig)
        .arg("--journal")
        .arg(scene.journal());
    intercepted.arg("--").arg(&kubectl).args(arguments);
    let mut direct = Command::new(&kubectl);
    direct.args(arguments);
    for command in [&mut intercepted, &mut direct] {
        command.env("KUBECONFIG", kubeconfig).env("HOME", scene.scratch.path());
    }
    (command::output(&mut intercepted).unwrap(), command::output(&mut direct).unwrap())
}

fn check(scene: &Scene, kubeconfig: &Path) {
    for arguments in [
        &["get", "namespace", "kube-system", "-o", "name"][..],
        &["get", "namespace", "absent"],
        &["auth", "whoami", "-o", "jsonpath={.status.userInfo.username}"],
    ] {
        let (intercepted, direct) = both(scene, kubeconfig, arguments);
        assert_eq!(shown(&intercepted), shown(&direct), "{arguments:?}");
    }
    let recorded = scene.events().into_iter().any(|event| {
        matches!(&event.kind, Kind::RequestOpened(opened) if opened.uri.starts_with("/api/v1/namespaces/absent"))
    });
    assert!(recorded, "the request is in the journal");
}

/// kubectl creates in protobuf: what it sends and gets is named and masked all the same.
fn check_protobuf(scene: &Scene, kubeconfig: &Path) {
    let value = "--from-literal=password=hunter-2";
    let (intercepted, direct) = both(
        scene,
        kubeconfig,
        &[
            "create",
            "secret",
            "generic",
            "hidden",
            value,
            "--dry-run=server",
            "-o",
            "jsonpath={.data.password}",
        ],
    );
    assert_eq!(shown(&intercepted), shown(&direct));
    let events = scene.events();
    for channel in [Channel::RequestBody, Channel::ResponseBody] {
        let named = events.iter().find_map(|event| match &event.kind {
            Kind::ObjectsNamed(named) if named.channel == channel => Some(&named.objects[..]),
            _ => None,
        });
        let [object] = named.unwrap_or_else(|| panic!("{channel:?} is not named")) else {
            panic!("{channel:?} has one object")
        };
        assert_eq!((&*object.api_version, &*object.kind, &*object.name), ("v1", "Secret", "hidden"));
        let masked = events.iter().any(|event| match &event.kind {
            Kind::Content(content) if content.channel == channel => {
                let bytes = content.bytes.to_vec().unwrap();
                let has = |text: &str| bytes.windows(text.len()).any(|part| part == text.as_bytes());
                assert!(!has("hunter-2"), "{channel:?} has the secret");
                has("k8s\0") && has("weir:masked:le8:")
            }
            _ => false,
        });
        assert!(masked, "{channel:?} is on record, masked");
    }
}

#[test]
fn a_client_certificate_works_and_its_key_stays_where_it_is() {
    let Some(scene) = Scene::new() else { return };
    let kubeconfig = written(&scene, "certificate.json", &admin(&scene));
    let before = fs::read(&kubeconfig).unwrap();
    check(&scene, &kubeconfig);
    check_protobuf(&scene, &kubeconfig);
    check_variable(&scene, &kubeconfig);
    assert_eq!(fs::read(&kubeconfig).unwrap(), before, "the file itself is not changed");
}

/// Serves at loopback what is served there, as long as the test runs.
fn relay(server: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            let upstream = TcpStream::connect(server).unwrap();
            for (mut from, mut to) in
                [(client.try_clone().unwrap(), upstream.try_clone().unwrap()), (upstream, client)]
            {
                thread::spawn(move || {
                    let _ = io::copy(&mut from, &mut to);
                    let _ = to.shutdown(Shutdown::Write);
                });
            }
        }
    });
    address
}

#[test]
fn a_token_and_an_exec_plugin_work() {
    let Some(scene) = Scene::new() else { return };
    let token = scene.testbed.kubectl(&["create", "token", "default", "-n", "kube-system"]).unwrap();
    let mut kubeconfig = admin(&scene);
    kubeconfig["users"][0]["user"] = json!({"token": token.trim()});
    check(&scene, &written(&scene, "token.json", &kubeconfig));

    // As the kubeconfigs of kind and minikube have it.
    let cluster = &mut kubeconfig["clusters"][0]["cluster"];
    let server = cluster["server"].as_str().unwrap().trim_start_matches("https://").parse().unwrap();
    let direct = std::mem::replace(&mut cluster["server"], json!(format!("https://{}", relay(server))));
    let local = written(&scene, "loopback.json", &kubeconfig);
    let absent = ["get", "namespace", "absent-at-loopback"];
    let (intercepted, answered) = both(&scene, &local, &absent);
    assert_eq!(shown(&intercepted), shown(&answered));
    let recorded = scene.events().into_iter().any(|event| {
        matches!(&event.kind, Kind::RequestOpened(opened) if opened.uri.contains("absent-at-loopback"))
    });
    assert!(recorded, "a server at loopback is no way past the record");
    kubeconfig["clusters"][0]["cluster"]["server"] = direct;

    let plugin = scene.scratch.path().join("plugin.sh");
    let credential = json!({
        "apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": token.trim()},
    });
    fs::write(&plugin, format!("#!/bin/sh\necho '{credential}'\n")).unwrap();
    fs::set_permissions(&plugin, fs::Permissions::from_mode(0o755)).unwrap();
    kubeconfig["users"][0]["user"] = json!({"exec": {
        "apiVersion": "client.authentication.k8s.io/v1", "command": plugin, "interactiveMode": "Never",
    }});
    check(&scene, &written(&scene, "plugin.json", &kubeconfig));
    let journal = String::from_utf8_lossy(&everything(&scene.journal())).into_owned();
    assert!(!journal.contains(token.trim()), "the token is in no record");
}

#[test]
fn a_proxy_that_would_carry_the_requests_elsewhere_is_refused_by_name() {
    let Some(scene) = Scene::new() else { return };
    let mut kubeconfig = admin(&scene);
    kubeconfig["clusters"][0]["cluster"]["proxy-url"] = "http://proxy.invalid:3128".into();
    let path = written(&scene, "proxy.json", &kubeconfig);
    let (refused, _) = both(&scene, &path, &["version", "--client"]);
    let (code, out, err) = shown(&refused);
    assert_ne!(code, Some(0), "{err}");
    assert!(out.is_empty() && err.contains("proxy-url"), "{err}");
}

/// The value of a variable whose name speaks of a secret is masked without any configuration, in the body and in kubectl's arguments.
fn check_variable(scene: &Scene, kubeconfig: &Path) {
    let value = "--env=DB_PASSWORD=variable-4711";
    let path = "jsonpath={.spec.containers[0].env[0].value}";
    let arguments = ["run", "hidden", "--image=example.invalid/a", value, "--dry-run=server", "-o", path];
    let (intercepted, direct) = both(scene, kubeconfig, &arguments);
    assert_eq!(shown(&intercepted), shown(&direct));
    assert_eq!(shown(&direct).1, "variable-4711");
    let has = |bytes: &[u8], text: &str| bytes.windows(text.len()).any(|part| part == text.as_bytes());
    let mut masks = 0;
    for event in scene.events() {
        assert!(!has(&serde_json::to_vec(&event).unwrap(), "variable-4711"), "{event:?}");
        if let Kind::Content(content) = &event.kind {
            let bytes = content.bytes.to_vec().unwrap();
            assert!(!has(&bytes, "variable-4711"), "{:?} has the value", content.channel);
            masks += usize::from(has(&bytes, "DB_PASSWORD") && has(&bytes, "weir:masked:le16:"));
        }
    }
    assert_eq!(masks, 2, "what was asked and what was answered");
}

/// All bytes of all files below a folder.
fn everything(folder: &Path) -> Vec<u8> {
    fs::read_dir(folder)
        .unwrap()
        .flatten()
        .flat_map(|entry| {
            let path = entry.path();
            if path.is_dir() { everything(&path) } else { fs::read(&path).unwrap() }
        })
        .collect()
}
