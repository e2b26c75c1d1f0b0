//! The programs of the workspace's tests, as cargo has built them, to be run as it would run them.
//!
//! Documentation is not tested by this: no library of the workspace has examples that run (`doctest = false`).

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use weir_tests::command::run as run_command;

/// All of them.
pub(super) struct Programs {
    root: PathBuf,
    /// In the order in which they run.
    programs: Vec<Program>,
}

/// One of them.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Program {
    /// The package's folder below the root.
    folder: PathBuf,
    executable: PathBuf,
}

impl Programs {
    /// Builds what is not built yet.
    ///
    /// # Errors
    /// Something cannot be built.
    pub(super) fn built(root: &Path) -> Result<Self> {
        let words =
            ["test", "--workspace", "--locked", "--no-run", "--message-format=json-render-diagnostics"];
        let messages = run_command(Command::new("cargo").args(words).current_dir(root))?;
        let mut programs = programs(root, &messages)?;
        ensure!(!programs.is_empty(), "cargo names no program of a test");
        programs.sort();
        Ok(Self { root: root.to_owned(), programs })
    }

    /// Those of some packages.
    pub(super) fn commands(&self, is_wanted: impl Fn(&str) -> bool) -> Vec<Command> {
        let of = |program: &&Program| is_wanted(&program.folder.to_string_lossy());
        self.programs.iter().filter(of).map(|program| program.command(&self.root)).collect()
    }
}

impl Program {
    /// In the folder and with the variables by which tests find what is theirs.
    fn command(&self, root: &Path) -> Command {
        let folder = root.join(&self.folder);
        let mut command = Command::new(&self.executable);
        command.env("CARGO", "cargo").env("CARGO_MANIFEST_DIR", &folder).current_dir(folder);
        command
    }
}

/// Those that cargo's messages name, a JSON object a line (cargo's reference, "External tools").
fn programs(root: &Path, messages: &str) -> Result<Vec<Program>> {
    let mut programs = Vec::new();
    for line in messages.lines() {
        let message: Value = serde_json::from_str(line).context("a message of cargo's is no JSON")?;
        let is_test = message["profile"]["test"] == true;
        let (Some(executable), true) = (message["executable"].as_str(), is_test) else { continue };
        let manifest = message["manifest_path"].as_str().map(Path::new);
        let folder = manifest.and_then(Path::parent).and_then(|folder| folder.strip_prefix(root).ok());
        let folder = folder.with_context(|| format!("{executable} is of no package of the workspace"))?;
        programs.push(Program { folder: folder.to_owned(), executable: executable.into() });
    }
    Ok(programs)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{Program, programs};

    const MESSAGES: &str = r#"{"reason":"compiler-artifact","manifest_path":"/w/agent/Cargo.toml","profile":{"test":true},"executable":"/w/target/debug/deps/kernel-1"}
{"reason":"compiler-artifact","manifest_path":"/w/agent/Cargo.toml","profile":{"test":false},"executable":"/w/target/debug/weir-agent"}
{"reason":"compiler-artifact","manifest_path":"/w/tests/Cargo.toml","profile":{"test":true},"executable":null}
{"reason":"compiler-artifact","manifest_path":"/w/tests/properties/Cargo.toml","profile":{"test":true},"executable":"/w/target/debug/deps/replay-2"}
{"reason":"build-finished","success":true}"#;

    #[test]
    fn programs_of_tests_are_found_with_their_packages_and_nothing_else_is() {
        let program =
            |folder: &str, executable: &str| Program { folder: folder.into(), executable: executable.into() };
        let expected = [
            program("agent", "/w/target/debug/deps/kernel-1"),
            program("tests/properties", "/w/target/debug/deps/replay-2"),
        ];
        assert_eq!(programs(Path::new("/w"), MESSAGES).unwrap(), expected);
        assert!(programs(Path::new("/elsewhere"), MESSAGES).is_err());
        assert!(programs(Path::new("/w"), "error: no JSON").is_err());
    }
}
