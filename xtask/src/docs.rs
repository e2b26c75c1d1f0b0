//! `cargo xtask docs`: writes the documentation that is generated from types and source.
//!
//! The test that refuses a stale file is what writes it, so that both cannot differ.

use std::{path::Path, process::Command};

use anyhow::{Result, bail};

use crate::{logs, tidy};

/// Below which tests compare a generated file, as `cargo test` filters them.
const TESTS: &str = "::reference::";

/// Writes the files anew. What is logged is read from the source; no test of the agent could see it all.
///
/// # Errors
/// The agent's tests cannot be built, or a generated file cannot be written.
pub(crate) fn run(root: &Path) -> Result<()> {
    let status = Command::new("cargo")
        .args(["test", "--locked", "-p", "weir-agent", "--lib", TESTS])
        .env("UPDATE_EXPECT", "1")
        .current_dir(root)
        .status()?;
    if !status.success() {
        bail!("cannot write the generated documentation");
    }
    logs::write(root, &tidy::tracked(root)?)
}
