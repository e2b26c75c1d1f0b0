//! `cargo xtask fuzz`: runs the fuzz targets of `tests/fuzz` on the pinned toolchain.
//!
//! What libFuzzer needs of the compiler are LLVM's coverage passes, which stable passes through; only the sanitizers
//! need nightly, and code without `unsafe` has little use for them. What a run finds lies in
//! `tests/fuzz/artifacts/TARGET`; it belongs into `tests/fuzz/corpus/TARGET`, where `cargo test` replays it.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result, bail};
use clap::Args;

/// What cargo-fuzz passes as well, without the sanitizer.
const RUSTFLAGS: &str = "--cfg fuzzing -Ccodegen-units=1 -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares";

/// Which targets run, and how long.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// A folder of `tests/fuzz/corpus`; all of them if none is named.
    target: Option<String>,
    /// Seconds for each target.
    #[arg(long, default_value_t = 180)]
    seconds: u32,
}

/// Runs the targets one after the other.
///
/// # Errors
/// The targets cannot be built, there is none of this name, or a property does not hold.
pub(crate) fn run(root: &Path, arguments: &Arguments) -> Result<()> {
    let folder = root.join("tests/fuzz");
    let mut targets = Vec::new();
    for entry in fs::read_dir(folder.join("corpus")).context("cannot list tests/fuzz/corpus")? {
        targets.push(entry?.file_name().to_string_lossy().into_owned());
    }
    targets.sort();
    if let Some(target) = &arguments.target {
        if !targets.contains(target) {
            bail!("there is no fuzz target {target}; there are {}", targets.join(", "));
        }
        targets = vec![target.clone()];
    }
    // A target triple, even the host's, keeps the instrumentation out of build scripts and procedural macros.
    let host = host()?;
    let status = Command::new("cargo")
        .args(["build", "--release", "--locked", "--target", &host])
        .env("RUSTFLAGS", RUSTFLAGS)
        .current_dir(&folder)
        .status()?;
    if !status.success() {
        bail!("cannot build the fuzz targets; libFuzzer needs a C++ compiler");
    }
    for target in targets {
        println!("\n== {target} ==");
        // New inputs stay out of the committed corpus: libFuzzer writes to the first folder only.
        let found = folder.join("target/corpus").join(&target);
        let artifacts = folder.join("artifacts").join(&target);
        fs::create_dir_all(&found)?;
        fs::create_dir_all(&artifacts)?;
        let status = Command::new(folder.join("target").join(&host).join("release").join(&target))
            .arg(&found)
            .arg(folder.join("corpus").join(&target))
            .arg(format!("-max_total_time={}", arguments.seconds))
            .arg(format!("-artifact_prefix={}/", artifacts.display()))
            .arg("-print_final_stats=1")
            .status()
            .with_context(|| format!("cannot start the fuzz target {target}"))?;
        if !status.success() {
            bail!("{target}: a property does not hold; the input is in {}", artifacts.display());
        }
    }
    Ok(())
}

fn host() -> Result<String> {
    let output = Command::new("rustc").arg("-vV").output().context("cannot run rustc")?;
    let text = String::from_utf8(output.stdout)?;
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc -vV names no host")?.to_owned())
}
