//! What the binary says and returns where it cannot do what was asked: no cluster and no kernel programs are needed.
#![expect(clippy::unwrap_used, reason = "a test's set-up that fails is a failed test")]

use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::Path,
    process::{Command, Output},
};

/// Somebody without rights, where the tests run as root.
const NOBODY: u32 = 65534;

/// Runs a copy of the agent that everybody may execute; wherever the repository is, nobody need not reach it.
fn run_as_nobody(arguments: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let binary = folder.path().join("weir-agent");
    fs::copy(env!("CARGO_BIN_EXE_weir-agent"), &binary).unwrap();
    let mut command = Command::new(&binary);
    if nix::unistd::geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    command.current_dir("/").args(arguments).output().unwrap()
}

#[test]
fn what_reads_or_changes_pins_says_that_it_needs_root() {
    for arguments in [&["status"][..], &["quarantine", "default/pod"], &["uninstall"]] {
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
    let output = command.args(["run", "--log-json", "--config"]).arg(missing).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr);
    let last: serde_json::Value = serde_json::from_str(text.trim_end()).unwrap();
    assert_eq!(last["level"], "ERROR", "{text}");
    let message = last["fields"]["message"].as_str().unwrap_or_default();
    assert!(message.contains("cannot read configuration /nonexistent/agent.yaml"), "{text}");
}
