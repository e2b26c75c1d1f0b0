//! What the tests' Kafka is made of: its jars from Maven, held against a lock with hashes, in the cache; Java and kcat from
//! Debian. Starting it is [`super`]'s.
//!
//! A stamp (digest of pom.xml and of the lock) tells whether the jars are what this commit asks for. Installed where a test
//! first needs it, or by `cargo xtask testbed build`; the demo needs none of it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

use crate::command::{find_in_path, output, run};
use crate::components::{cache_folder, repository};
use crate::packages;
use crate::progress::Progress;

/// The oldest Java that Kafka's servers run on.
const JAVA_MAJOR_MIN: u32 = 17;

/// Commands and the Debian packages that have them.
const JAVA: (&str, &str) = ("java", "default-jre-headless");
const KCAT: (&str, &str) = ("kcat", "kcat");
const MAVEN: (&str, &str) = ("mvn", "maven");

/// A broker with some topics stays well below; the tools too.
const HEAP: &str = "-Xmx256m";

/// What is there to run.
#[derive(Clone, Debug)]
pub(super) struct Installation {
    java: PathBuf,
    kcat: PathBuf,
    jars: PathBuf,
}

/// What [`install`] would do; none when all is there.
///
/// # Errors
/// When the lock cannot be read or there is no place for the cache.
pub fn plan() -> Result<Option<String>> {
    let installed = is_installed(&folder()?)?;
    let packages = missing(installed);
    Ok(match (installed, packages.is_empty()) {
        (true, true) => None,
        (true, false) => Some(format!("install Debian packages: {} (about 1 min)", packages.join(" "))),
        (false, true) => Some("fetch with Maven: Kafka for the tests (about 15 s)".to_owned()),
        (false, false) => {
            let packages = packages.join(" ");
            Some(format!("install Debian packages: {packages}; fetch Kafka with Maven (about 2 min)"))
        }
    })
}

/// Installs what is missing of the tests' Kafka.
///
/// # Errors
/// When a package cannot be installed or a jar not be fetched, or when a jar is not the one of the lock.
pub fn install(progress: Progress) -> Result<()> {
    installed(progress).map(drop)
}

/// The same, to run it.
pub(super) fn installed(progress: Progress) -> Result<Installation> {
    let folder = folder()?;
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    // Tests of one binary run side by side, and so may two commands: who comes second finds it done.
    let lock = fs::File::open(&folder).context("cannot open the cache of Kafka")?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .context("cannot lock the cache of Kafka")?;
    let done = is_installed(&folder)?;
    let packages = missing(done);
    if !packages.is_empty() {
        progress.step(&format!("install {}", packages.join(" ")), || packages::install(&packages))?;
    }
    let path = |(name, package): (&str, &str)| {
        find_in_path(name).with_context(|| format!("{package} is installed, and {name} is not in PATH"))
    };
    let java = path(JAVA)?;
    check_java(&java)?;
    if !done {
        progress.step("fetch Kafka with Maven", || fetch(&path(MAVEN)?, &folder))?;
    }
    Ok(Installation { java, kcat: path(KCAT)?, jars: folder.join("jars") })
}

impl Installation {
    /// A class of Kafka's, to add arguments to. Libraries for compression unpack themselves into `scratch`.
    pub(super) fn class(&self, name: &str, log_level: &str, scratch: &Path) -> Command {
        let mut command = Command::new(&self.java);
        // These programs live for seconds: the second compiler and parallel collectors only cost them.
        command.args([HEAP, "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]);
        command.arg(format!("-Dorg.slf4j.simpleLogger.defaultLogLevel={log_level}"));
        command.arg(format!("-Djava.io.tmpdir={}", scratch.display()));
        command.arg("-cp").arg(self.jars.join("*")).arg(name);
        command.env_remove("JAVA_TOOL_OPTIONS").env_remove("_JAVA_OPTIONS");
        command
    }

    /// kcat, to add arguments to; ended if it takes longer than `seconds`.
    pub(super) fn kcat(&self, seconds: u32) -> Command {
        let mut command = Command::new("timeout");
        command.arg(seconds.to_string()).arg(&self.kcat);
        // It reads ~/.config/kcat.conf otherwise.
        command.env("KCAT_CONFIG", "/dev/null");
        command
    }
}

fn folder() -> Result<PathBuf> {
    Ok(cache_folder()?.join("testbed/kafka"))
}

fn source(file: &str) -> PathBuf {
    repository().join("tests/testbed/kafka").join(file)
}

fn stamp() -> Result<String> {
    let mut content = Vec::new();
    for file in ["pom.xml", "jars.sha256"] {
        let path = source(file);
        content.extend(fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?);
    }
    Ok(hex::encode(Sha256::digest(&content)))
}

fn is_installed(folder: &Path) -> Result<bool> {
    Ok(fs::read_to_string(folder.join("jars/stamp")).unwrap_or_default() == stamp()?)
}

/// Packages that are missing; Maven is not once the jars are there.
fn missing(fetched: bool) -> Vec<&'static str> {
    let needed = [JAVA, KCAT].into_iter().chain((!fetched).then_some(MAVEN));
    needed.filter(|(name, _)| find_in_path(name).is_none()).map(|(_, package)| package).collect()
}

fn fetch(maven: &Path, folder: &Path) -> Result<()> {
    let [part, jars] = ["part", "jars"].map(|name| folder.join(name));
    for folder in [&part, &jars] {
        if folder.exists() {
            fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
        }
    }
    let repository = tempfile::tempdir_in(folder).context("cannot make a folder for Maven")?;
    let mut command = Command::new(maven);
    command.args(["--batch-mode", "--quiet", "--strict-checksums", "--file"]).arg(source("pom.xml"));
    // Its own repository holds the plug-ins too; none of it is needed once the jars are there.
    command.arg(format!("-Dmaven.repo.local={}", repository.path().display()));
    command.args(["dependency:copy-dependencies", "-DincludeScope=runtime"]);
    command.arg(format!("-DoutputDirectory={}", part.display()));
    run(&mut command)?;
    let lock = source("jars.sha256");
    let locked = fs::read_to_string(&lock).with_context(|| format!("cannot read {}", lock.display()))?;
    check(&part, &parse(&locked)?)?;
    fs::write(part.join("stamp"), stamp()?).context("cannot write the stamp of Kafka")?;
    // Only what is whole and checked has this name.
    fs::rename(&part, &jars).context("cannot put Kafka's jars in their place")
}

/// Names and hashes of a lock, as sha256sum writes it.
fn parse(lock: &str) -> Result<BTreeMap<String, String>> {
    let pair = |line: &str| {
        let (hash, name) = line.split_once("  ").with_context(|| format!("no hash and name: {line}"))?;
        Ok((name.to_owned(), hash.to_owned()))
    };
    lock.lines().map(pair).collect()
}

/// Checks that `folder` has the files of the lock, and no others.
fn check(folder: &Path, locked: &BTreeMap<String, String>) -> Result<()> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry.context("cannot read a folder")?.path();
        let content = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        found.insert(name, hex::encode(Sha256::digest(&content)));
    }
    let differ = |(name, hash): &(&String, &String)| locked.get(*name) != Some(*hash);
    if let Some((name, hash)) = found.iter().find(differ) {
        bail!("{name} has the hash {hash}, which is not that of tests/testbed/kafka/jars.sha256");
    }
    let absent = locked.keys().find(|name| !found.contains_key(*name));
    ensure!(absent.is_none(), "{} was not fetched", absent.map_or("", |name| name));
    Ok(())
}

fn check_java(java: &Path) -> Result<()> {
    let said = output(Command::new(java).arg("-version"))?;
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    let major = java_major(&said).with_context(|| format!("{} says {said:?}", java.display()))?;
    ensure!(
        major >= JAVA_MAJOR_MIN,
        "{} is Java {major}, and Kafka needs {JAVA_MAJOR_MIN} or newer; install one and put it into PATH",
        java.display()
    );
    Ok(())
}

/// 17 of `openjdk version "17.0.15" 2025-04-15`; old ones called themselves 1.8.
fn java_major(said: &str) -> Option<u32> {
    let version = said.lines().find_map(|line| line.split_once(" version \"")).map(|(_, rest)| rest)?;
    version.split(|character: char| !character.is_ascii_digit()).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_java_are_read() {
        for (said, major) in [
            ("openjdk version \"17.0.15\" 2025-04-15\nOpenJDK Runtime Environment\n", Some(17)),
            ("Picked up _JAVA_OPTIONS: -Xmx1g\njava version \"21\" 2023-09-19 LTS\n", Some(21)),
            ("openjdk version \"1.8.0_392\"\n", Some(1)),
            ("bash: java: not found\n", None),
        ] {
            assert_eq!(java_major(said), major, "{said}");
        }
    }

    #[test]
    fn a_jar_that_is_not_the_one_of_the_lock_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a.jar"), "abc").unwrap();
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let locked = |text: &str| parse(text).unwrap();
        check(folder.path(), &locked(&format!("{abc}  a.jar\n"))).unwrap();
        let error = |text: &str| check(folder.path(), &locked(text)).unwrap_err().to_string();
        assert!(error(&format!("{}  a.jar\n", abc.replace('b', "c"))).starts_with("a.jar has the hash ba78"));
        assert!(error("").starts_with("a.jar has the hash ba78"), "one that the lock does not know");
        assert_eq!(error(&format!("{abc}  a.jar\n{abc}  b.jar\n")), "b.jar was not fetched");
    }

    #[test]
    fn the_lock_has_the_version_that_the_project_asks_for() {
        let pom = fs::read_to_string(source("pom.xml")).unwrap();
        let version = pom.split("<kafka.version>").nth(1).unwrap().split('<').next().unwrap();
        let locked = parse(&fs::read_to_string(source("jars.sha256")).unwrap()).unwrap();
        for name in ["kafka_2.13", "kafka-clients", "kafka-tools"] {
            assert!(locked.contains_key(&format!("{name}-{version}.jar")), "{name} {version}");
        }
        assert!(locked.values().all(|hash| hash.len() == 64), "{locked:?}");
    }
}
