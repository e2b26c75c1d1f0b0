//! Building for another architecture than this machine's, and running what was built: Debian's cross compiler, rustup's standard
//! library, the C library that nodes of that architecture would have from Debian, and qemu's emulation of one process.
//!
//! The C library that comes with the cross compiler is an older one than Debian's own of the same release, without its security updates. So
//! what goes into an image is taken from Debian's packages of that architecture; this machine's own apt is not changed for it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use weir_tests::{
    command::{command, find_in_path, run},
    image, packages,
};

use crate::sbom::Package;

/// Debian's packages of what the binaries are linked with.
const LIBRARIES: [&str; 2] = ["libc6", "libgcc-s1"];

/// What binaries are built for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Architecture {
    /// Intel's and AMD's.
    #[value(name = "x86_64")]
    X86_64,
    /// Arm's, as of AWS Graviton.
    Aarch64,
}

impl Architecture {
    /// This machine's.
    ///
    /// # Errors
    /// It is none of those.
    pub(crate) fn own() -> Result<Self> {
        match std::env::consts::ARCH {
            "x86_64" => Ok(Self::X86_64),
            "aarch64" => Ok(Self::Aarch64),
            other => bail!("nothing can be built on {other}; use an x86_64 or aarch64 machine"),
        }
    }

    /// As Rust, qemu and file names have it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// As Debian and OCI call it.
    pub(crate) fn debian(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::Aarch64 => "arm64",
        }
    }

    /// As Rust calls a target.
    pub(crate) fn target(self) -> String {
        format!("{}-unknown-linux-gnu", self.name())
    }

    /// A tool of GNU's for it.
    pub(crate) fn tool(self, name: &str) -> String {
        format!("{}-linux-gnu-{name}", self.name())
    }
}

/// What is needed to build for an architecture, and to run that.
#[derive(Debug)]
pub(crate) struct Cross {
    /// The architecture.
    pub(crate) architecture: Architecture,
    /// A folder with Debian's libraries as they lie below `/`.
    pub(crate) root: PathBuf,
    /// What they are of.
    pub(crate) packages: Vec<Package>,
    emulator: PathBuf,
}

impl Cross {
    /// Finds or installs compiler, standard library and emulator, and fetches libraries into `folder`.
    ///
    /// # Errors
    /// Something is missing that cannot be had here; the error has the mend.
    pub(crate) fn prepare(architecture: Architecture, folder: &Path) -> Result<Self> {
        if find_in_path(&architecture.tool("g++")).is_none() || emulator(architecture).is_none() {
            // Debian's names of packages have no underscore.
            let compiler = format!("g++-{}-linux-gnu", architecture.name().replace('_', "-"));
            packages::install(&[&compiler, "qemu-user"])?;
        }
        let emulator = emulator(architecture).context("qemu-user is installed, but not its emulator")?;
        standard_library(architecture)?;
        let (root, packages) = libraries(architecture, folder)?;
        Ok(Self { architecture, root, packages, emulator })
    }

    /// Has a cargo build for the architecture, and what C it needs with it. librdkafka's `configure` knows `CC` alone; what runs at build
    /// time is this machine's.
    pub(crate) fn builds(&self, cargo: &mut Command) -> Result<()> {
        let target = self.architecture.target();
        let own = Architecture::own()?.target().replace('-', "_");
        cargo.args(["--target", &target]);
        for (variable, tool, here) in [("CC", "gcc", "cc"), ("CXX", "g++", "c++"), ("AR", "ar", "ar")] {
            cargo.env(variable, self.architecture.tool(tool)).env(format!("{variable}_{own}"), here);
        }
        let linker = format!("CARGO_TARGET_{}_LINKER", target.replace('-', "_").to_uppercase());
        cargo.env(linker, self.architecture.tool("gcc"));
        // This machine's own libraries must not be found.
        cargo.env("PKG_CONFIG_LIBDIR", format!("/usr/lib/{}-linux-gnu/pkgconfig", self.architecture.name()));
        Ok(())
    }

    /// What binaries are linked with, each a file below `root`.
    ///
    /// # Errors
    /// A library is not there.
    pub(crate) fn libraries_of(&self, root: &Path, binaries: &[PathBuf]) -> Result<Vec<PathBuf>> {
        // What ldd does, too: the loader says what it would load.
        let ask = |binary: &Path| {
            let mut command = command(&self.emulator, &["-E", "LD_TRACE_LOADED_OBJECTS=1"]);
            command.arg("-L").arg(root).arg(binary);
            command
        };
        let found = image::libraries_of(binaries, ask)?;
        found
            .iter()
            .map(|path| {
                // The emulator takes from this machine what is not below the folder that it is given.
                let file = root.join(path.strip_prefix("/").unwrap_or(path));
                ensure!(
                    file.is_file(),
                    "{} is linked with, and in none of {LIBRARIES:?}; add its package",
                    path.display()
                );
                Ok(file)
            })
            .collect()
    }

    /// A program of an image whose files are below `root`.
    pub(crate) fn emulated(&self, root: &Path, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.emulator);
        command.arg("-L").arg(root).arg(root.join("usr/bin").join(program)).args(arguments);
        command
    }
}

fn emulator(architecture: Architecture) -> Option<PathBuf> {
    let name = format!("qemu-{}", architecture.name());
    find_in_path(&name).or_else(|| find_in_path(&format!("{name}-static")))
}

/// Rust's, by rustup, for the pinned toolchain.
fn standard_library(architecture: Architecture) -> Result<()> {
    let target = architecture.target();
    let folder = run(&mut command("rustc", &["--print", "target-libdir", "--target", &target]))?;
    if Path::new(folder.trim()).is_dir() {
        return Ok(());
    }
    run(&mut command("rustup", &["target", "add", &target])).map(drop).with_context(|| {
        format!("Rust's standard library for {target} is missing, and cannot be fetched; put it into the toolchain of rust-toolchain.toml")
    })
}

/// Fetches Debian's packages of the libraries, as new as they are, with lists of their own; gives the folder they are unpacked in.
fn libraries(architecture: Architecture, folder: &Path) -> Result<(PathBuf, Vec<Package>)> {
    let (state, fetched, root) = (folder.join("apt"), folder.join("packages"), folder.join("root"));
    for old in [&fetched, &root] {
        if old.exists() {
            fs::remove_dir_all(old).with_context(|| format!("cannot empty {}", old.display()))?;
        }
    }
    for folder in [&state.join("lists/partial"), &state.join("archives/partial"), &fetched, &root] {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let apt = |arguments: &[&str]| {
        let mut apt = Command::new("apt-get");
        let debian = architecture.debian();
        apt.arg(format!("-oAPT::Architecture={debian}")).arg(format!("-oAPT::Architectures::={debian}"));
        apt.arg(format!("-oDir::State::lists={}", state.join("lists").display()));
        apt.arg(format!("-oDir::Cache={}", state.display())).arg("-oDir::State::status=/dev/null");
        run(apt.args(arguments).current_dir(&fetched))
            .context("cannot fetch Debian's packages; is this a Debian?")
    };
    apt(&["update", "-q"])?;
    apt(&[&["download", "-q"], &LIBRARIES[..]].concat())?;
    let mut packages = Vec::new();
    for entry in fs::read_dir(&fetched).context("cannot list packages")? {
        let file = entry?.path();
        run(Command::new("dpkg-deb").arg("--extract").args([&file, &root]))?;
        let said = |field| run(Command::new("dpkg-deb").arg("--field").arg(&file).arg(field));
        let (name, version) = (said("Package")?.trim().to_owned(), said("Version")?.trim().to_owned());
        packages.push(Package { name, version, architecture: architecture.debian().to_owned() });
    }
    packages.sort();
    ensure!(packages.len() == LIBRARIES.len(), "apt fetched {packages:?} for {LIBRARIES:?}");
    Ok((root, packages))
}
