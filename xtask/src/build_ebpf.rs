//! `cargo xtask build-ebpf`: the kernel programs, with a toolchain that it finds or makes.
//!
//! The BPF target needs `core` from source (rust-src), nightly switches and `bpf-linker`. Preferred is a rustup
//! nightly with rust-src; else Debian's `rustc-web`, whose source package holds it. `bpf-linker` comes from PATH
//! or from our own cache, and is installed there if it is nowhere. What can be neither found nor made is named
//! with its mend. Nothing is built if no input has changed.

use std::{
    env,
    ffi::OsString,
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use weir_tests::packages;

use crate::cross::Architecture;

/// Name of the object below the target folder; `agent/build.rs` looks for it there.
const OBJECT: &str = "bpf/weir-ebpf.o";
/// The linker that is installed if there is none.
const BPF_LINKER_VERSION: &str = "0.13.0";
/// Debian packages with a compiler, its source, and the LLVM that bpf-linker is built with.
const DEBIAN_PACKAGES: [&str; 4] = ["rustc-web", "rust-web-src", "llvm-22-dev", "libpolly-22-dev"];
/// Where Debian puts that LLVM.
const DEBIAN_LLVM: &str = "/usr/lib/llvm-22";
/// What the object is made from, below the root of the workspace.
const INPUTS: [&str; 11] = [
    "ebpf/Cargo.toml",
    "ebpf/Cargo.lock",
    "ebpf/src",
    "common/Cargo.toml",
    "common/src/lib.rs",
    "common/src/answer.rs",
    "common/src/kernel.rs",
    "common/src/kernel/programs.rs",
    "common/src/packet.rs",
    "common/src/sieve.rs",
    "common/src/verdict.rs",
];

/// Options of `cargo xtask build-ebpf`.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub(crate) struct Options {
    /// Build with aya-log, so that the programs' verdicts appear in the agent's log.
    #[arg(long)]
    debug_log: bool,
    /// Build even if no input has changed.
    #[arg(long)]
    force: bool,
    /// The architecture of the nodes [default: this machine's]. Another one's object lies in a folder of its own.
    #[arg(long, value_name = "ARCHITECTURE")]
    arch: Option<Architecture>,
}

impl Options {
    /// For nodes of an architecture.
    pub(crate) fn of(architecture: Architecture) -> Self {
        Self { arch: Some(architecture), ..Self::default() }
    }

    fn arch(self) -> &'static str {
        self.arch.map_or(env::consts::ARCH, Architecture::name)
    }

    /// Name of the object below the target folder.
    fn object(self) -> String {
        match self.arch() {
            env::consts::ARCH => OBJECT.to_owned(),
            other => format!("bpf-{other}/weir-ebpf.o"),
        }
    }
}

/// How to call the compiler.
enum Toolchain {
    /// `rustup run nightly cargo`.
    RustupNightly,
    /// The cargo that runs us, with Debian's compiler.
    Debian,
}

/// Builds the kernel programs and returns the path of the object.
pub(crate) fn run(root: &Path, options: Options) -> Result<PathBuf> {
    let target = target(root);
    let object = target.join(options.object());
    let stamp = object.with_extension("inputs");
    let inputs = fingerprint(root, options)?;
    if !options.force && is_current(&object, &inputs) {
        eprintln!("kernel programs: unchanged, {}", object.display());
        return Ok(object);
    }
    let toolchain = toolchain()?;
    let linker = linker(&toolchain)?;
    let build = target.join("bpf-build");
    eprintln!("kernel programs: building with {} and {}", toolchain.name(), linker.display());
    let status = cargo(&toolchain, root, &linker, options)
        .env("CARGO_TARGET_DIR", &build)
        .status()
        .context("cannot start cargo for the kernel programs")?;
    ensure!(status.success(), "the kernel programs do not build ({status}); the compiler's output is above");
    let built = build.join("bpfel-unknown-none/release/weir-ebpf");
    if let Some(folder) = object.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    // Renamed into place, so that a build of the agent at the same time never reads half an object.
    let partial = object.with_extension("partial");
    fs::copy(&built, &partial)
        .with_context(|| format!("cannot copy {} to {}", built.display(), partial.display()))?;
    fs::rename(&partial, &object).with_context(|| format!("cannot write {}", object.display()))?;
    fs::write(&stamp, inputs).with_context(|| format!("cannot write {}", stamp.display()))?;
    eprintln!("kernel programs: {}", object.display());
    Ok(object)
}

/// What [`run`] would install first, one line each; empty when it has all it needs.
pub(crate) fn plan(root: &Path) -> Result<Vec<String>> {
    let inputs = fingerprint(root, Options::default())?;
    if is_current(&target(root).join(OBJECT), &inputs) {
        return Ok(Vec::new());
    }
    let toolchain = find_toolchain();
    let packages = match &toolchain {
        None => &DEBIAN_PACKAGES[..],
        Some(toolchain) if find_linker(toolchain)?.is_none() && !has_llvm() => &DEBIAN_PACKAGES[2..],
        Some(_) => &[],
    };
    let mut lines = Vec::new();
    if !packages.is_empty() {
        lines.push(format!("install Debian packages: {} (about 1.5 GB on disk)", packages.join(" ")));
    }
    if find_linker(&toolchain.unwrap_or(Toolchain::Debian))?.is_none() {
        lines.push(format!("build bpf-linker {BPF_LINKER_VERSION} (about 2 min)"));
    }
    Ok(lines)
}

fn target(root: &Path) -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |path| root.join(path))
}

/// Whether the object was made from `inputs`.
fn is_current(object: &Path, inputs: &str) -> bool {
    object.is_file() && fs::read_to_string(object.with_extension("inputs")).is_ok_and(|old| old == inputs)
}

impl Toolchain {
    fn name(&self) -> &'static str {
        match self {
            Self::RustupNightly => "rustup's nightly",
            Self::Debian => "Debian's /usr/bin/rustc",
        }
    }
}

fn cargo(toolchain: &Toolchain, root: &Path, linker: &Path, options: Options) -> Command {
    let mut command = match toolchain {
        Toolchain::RustupNightly => {
            let mut command = Command::new("rustup");
            command.args(["run", "nightly", "cargo"]);
            command
        }
        Toolchain::Debian => {
            let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
            // Debian's compiler is a stable one; this lets it take the switches that build `core`.
            command.env("RUSTC", "/usr/bin/rustc").env("RUSTC_BOOTSTRAP", "1");
            command
        }
    };
    let mut flags = OsString::from(format!("--cfg=bpf_target_arch=\"{}\"", options.arch()));
    for flag in ["-Cdebuginfo=2", "-Clink-arg=--btf"] {
        flags.push("\x1f");
        flags.push(flag);
    }
    flags.push("\x1f-Clinker=");
    flags.push(linker);
    command
        .current_dir(root.join("ebpf"))
        .args(["build", "--release", "--locked", "--target", "bpfel-unknown-none", "-Zbuild-std=core"])
        .env_remove("RUSTFLAGS")
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env("CARGO_ENCODED_RUSTFLAGS", flags);
    if options.debug_log {
        command.args(["--features", "debug-log"]);
    }
    command
}

/// A digest of every input; only compared with one of the same build of xtask, so any hash will do.
fn fingerprint(root: &Path, options: Options) -> Result<String> {
    let mut hasher = DefaultHasher::new();
    (options.debug_log, BPF_LINKER_VERSION, options.arch()).hash(&mut hasher);
    for input in INPUTS {
        hash_path(&root.join(input), &mut hasher)?;
    }
    Ok(format!("{:016x}", hasher.finish()))
}

fn hash_path(path: &Path, hasher: &mut DefaultHasher) -> Result<()> {
    if path.is_dir() {
        let mut entries = fs::read_dir(path)
            .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>())
            .with_context(|| format!("cannot list {}", path.display()))?;
        entries.sort();
        return entries.iter().try_for_each(|entry| hash_path(entry, hasher));
    }
    path.file_name().hash(hasher);
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))?.hash(hasher);
    Ok(())
}

fn find_toolchain() -> Option<Toolchain> {
    let nightly = output(Command::new("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]));
    if nightly.is_some_and(|sysroot| has_core(&sysroot)) {
        return Some(Toolchain::RustupNightly);
    }
    debian_compiler().then_some(Toolchain::Debian)
}

fn toolchain() -> Result<Toolchain> {
    if let Some(found) = find_toolchain() {
        return Ok(found);
    }
    let packages = DEBIAN_PACKAGES.join(" ");
    if can_apt_get() {
        apt_get(&DEBIAN_PACKAGES)?;
        ensure!(
            debian_compiler(),
            "{packages} are installed, but /usr/bin/rustc still has no source of core"
        );
        return Ok(Toolchain::Debian);
    }
    bail!(
        "no toolchain for the kernel programs: neither a rustup nightly with rust-src nor Debian's rustc-web \
         with rust-web-src is here; install one of them:\n  \
         rustup toolchain install nightly --component rust-src\n  \
         sudo apt-get install {packages}    (Debian, Ubuntu; as root this command does it itself)"
    )
}

/// Debian's compiler, if it is new enough for edition 2024 and its source of `core` is there.
fn debian_compiler() -> bool {
    let version = output(Command::new("/usr/bin/rustc").arg("--version"));
    let minor = version.as_deref().and_then(|version| version.split('.').nth(1)?.parse::<u32>().ok());
    minor.is_some_and(|minor| minor >= 95)
        && output(Command::new("/usr/bin/rustc").args(["--print", "sysroot"]))
            .is_some_and(|sysroot| has_core(&sysroot))
}

fn has_core(sysroot: &str) -> bool {
    Path::new(sysroot).join("lib/rustlib/src/rust/library/core/Cargo.toml").is_file()
}

/// Ours, or with a nightly the one in PATH.
fn find_linker(toolchain: &Toolchain) -> Result<Option<PathBuf>> {
    let cached = cache()?.join("tools/bin/bpf-linker");
    if works(&cached) {
        return Ok(Some(cached));
    }
    let on_path = Path::new("bpf-linker");
    Ok((matches!(toolchain, Toolchain::RustupNightly) && works(on_path)).then(|| on_path.to_owned()))
}

fn works(program: &Path) -> bool {
    output(Command::new(program).arg("--version")).is_some()
}

fn has_llvm() -> bool {
    Path::new(DEBIAN_LLVM).join("bin/llvm-config").is_file()
}

/// Finds bpf-linker, or installs it into our cache.
fn linker(toolchain: &Toolchain) -> Result<PathBuf> {
    if let Some(found) = find_linker(toolchain)? {
        return Ok(found);
    }
    let tools = cache()?.join("tools");
    let cached = tools.join("bin/bpf-linker");
    if !has_llvm() {
        if !can_apt_get() {
            bail!(
                "bpf-linker is missing, and so is the LLVM to build it with; install one of them:\n  \
                 cargo install bpf-linker    (needs LLVM's development files)\n  \
                 sudo apt-get install {}",
                DEBIAN_PACKAGES[2..].join(" ")
            );
        }
        apt_get(&DEBIAN_PACKAGES[2..])?;
    }
    eprintln!("kernel programs: installing bpf-linker {BPF_LINKER_VERSION} (about two minutes, once)");
    let status = Command::new(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")))
        .args(["install", "bpf-linker", "--version", BPF_LINKER_VERSION, "--locked"])
        .args(["--no-default-features", "--features", "llvm-22", "--root"])
        .arg(&tools)
        // One for llvm-sys, one for bpf-linker itself, which else takes whatever llvm-config is in PATH, if any.
        .env("LLVM_SYS_221_PREFIX", DEBIAN_LLVM)
        .env("LLVM_PREFIX", DEBIAN_LLVM)
        .env("CARGO_TARGET_DIR", tools.join("build"))
        .status()
        .context("cannot start cargo to install bpf-linker")?;
    ensure!(status.success(), "bpf-linker {BPF_LINKER_VERSION} does not install ({status}); see above");
    let _ = fs::remove_dir_all(tools.join("build"));
    ensure!(works(&cached), "{} was installed but does not run", cached.display());
    Ok(cached)
}

/// `~/.cache/weir`, where built tools live, so that no checkout builds them twice.
fn cache() -> Result<PathBuf> {
    if let Some(cache) = env::var_os("XDG_CACHE_HOME") {
        return Ok(PathBuf::from(cache).join("weir"));
    }
    let home = env::var_os("HOME").context("HOME is not set: there is no place for built tools")?;
    Ok(PathBuf::from(home).join(".cache/weir"))
}

fn can_apt_get() -> bool {
    let root = output(Command::new("id").arg("-u")).is_some_and(|uid| uid == "0");
    root && output(Command::new("apt-get").arg("--version")).is_some()
}

fn apt_get(names: &[&str]) -> Result<()> {
    eprintln!("kernel programs: installing {} (once)", names.join(" "));
    packages::install(names)
}

/// What a command prints, if it succeeds.
fn output(command: &mut Command) -> Option<String> {
    let output = command.stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
