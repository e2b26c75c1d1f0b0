//! What the binary says and returns where it cannot do what was asked: no cluster and no kernel programs are needed.
#![expect(clippy::unwrap_used, reason = "a test's set-up that fails is a failed test")]

use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::Path,
    process::{Command, Output},
    sync::{Mutex, PoisonError},
};

/// Somebody without rights, where the tests run as root.
const NOBODY: u32 = 65534;

/// A process that is started while another thread writes a program has that open for writing for a moment, and then it
/// cannot be executed.
static STARTING: Mutex<()> = Mutex::new(());

fn run(command: &mut Command) -> std::io::Result<Output> {
    let _alone = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    command.output()
}

/// Runs a copy of the agent that everybody may execute; wherever the repository is, nobody need not reach it.
fn run_as_nobody(arguments: &[&str]) -> Output {
    let alone = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let binary = folder.path().join("weir-agent");
    fs::copy(env!("CARGO_BIN_EXE_weir-agent"), &binary).unwrap();
    drop(alone);
    let mut command = Command::new(&binary);
    if nix::unistd::geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    run(command.current_dir("/").args(arguments)).unwrap()
}

#[test]
fn what_reads_or_changes_pins_says_that_it_needs_root() {
    for arguments in
        [&["status"][..], &["support"], &["quarantine", "default/pod"], &["uninstall"], &["guard"]]
    {
        let output = run_as_nobody(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert_eq!(
            String::from_utf8_lossy(&output.stderr),
            format!("weir-agent: {} needs root to reach the kernel's pins; run it with sudo\n", arguments[0])
        );
        assert_eq!(String::from_utf8_lossy(&output.stdout), "");
    }
}

#[test]
fn an_agent_that_logs_json_gives_its_last_words_as_json() {
    let missing = Path::new("/nonexistent/agent.yaml");
    let mut command = Command::new(env!("CARGO_BIN_EXE_weir-agent"));
    let output = run(command.args(["run", "--log-json", "--config"]).arg(missing)).unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr);
    let last: serde_json::Value = serde_json::from_str(text.trim_end()).unwrap();
    assert_eq!(last["level"], "ERROR", "{text}");
    assert_eq!(last["fields"]["event"], "failed", "{text}");
    let message = last["fields"]["message"].as_str().unwrap_or_default();
    assert!(message.contains("cannot read configuration /nonexistent/agent.yaml"), "{text}");
}

/// The unit of the repository, on the agent that was built here.
fn unit(folder: &Path) -> std::path::PathBuf {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/systemd/weir-guard.service");
    let text = fs::read_to_string(shipped).unwrap();
    let start = "\nExecStart=/usr/local/bin/weir-agent guard\n";
    assert!(text.contains(start), "{text}");
    let path = folder.join("weir-guard.service");
    let built = format!("\nExecStart={} guard\n", env!("CARGO_BIN_EXE_weir-agent"));
    fs::write(&path, text.replace(start, &built)).unwrap();
    path
}

/// The one that the chart's init step writes, which starts a copy of the agent with its own libraries.
fn written_unit(folder: &Path) -> std::path::PathBuf {
    let root = folder.join("node");
    fs::create_dir_all(root.join("etc/systemd/system")).unwrap();
    let mut install = Command::new(env!("CARGO_BIN_EXE_weir-agent"));
    let installed = run(install.args(["guard-unit", "--root"]).arg(&root)).unwrap();
    assert!(installed.status.success(), "{}", String::from_utf8_lossy(&installed.stderr));
    let text = fs::read_to_string(root.join("etc/systemd/system/weir-guard.service")).unwrap();
    assert!(text.contains("\nExecStart=/opt/weir/"), "{text}");
    let path = folder.join("weir-guard-written.service");
    fs::write(&path, text.replace("/opt/weir/", &format!("{}/opt/weir/", root.display()))).unwrap();
    path
}

#[test]
fn systemd_has_nothing_to_say_against_the_unit_that_comes_before_the_kubelet() {
    let folder = tempfile::tempdir().unwrap();
    let mut verify = Command::new("systemd-analyze");
    verify.args(["verify", "--man=no"]).arg(unit(folder.path())).arg(written_unit(folder.path()));
    let verified = match run(&mut verify) {
        Err(error) => {
            assert!(std::env::var("CI").is_err(), "needs systemd-analyze: {error}");
            eprintln!("DID NOT RUN: systemd-analyze cannot be started: {error}");
            return;
        }
        Ok(verified) => verified,
    };
    // What it does not understand it only says.
    assert_eq!(String::from_utf8_lossy(&verified.stderr), "");
    assert!(verified.status.success());

    let root = tempfile::tempdir().unwrap();
    let units = root.path().join("etc/systemd/system");
    fs::create_dir_all(&units).unwrap();
    unit(&units);
    let mut enable = Command::new("systemctl");
    let root = format!("--root={}", root.path().display());
    let enabled = run(enable.args([&root, "enable", "weir-guard.service"])).unwrap();
    assert!(enabled.status.success(), "{}", String::from_utf8_lossy(&enabled.stderr));
    assert!(units.join("kubelet.service.requires/weir-guard.service").is_symlink());
}

#[test]
fn a_guard_whose_configuration_cannot_be_read_fails() {
    if !nix::unistd::geteuid().is_root() {
        assert!(std::env::var("CI").is_err(), "needs root");
        eprintln!("DID NOT RUN: needs root");
        return;
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_weir-agent"));
    let output = run(command.args(["guard", "--config", "/nonexistent/agent.yaml"])).unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("cannot read configuration /nonexistent/agent.yaml"), "{text}");
}
