//! Programs in Java for the tests: their jars from Maven, held against a lock with hashes, in the cache; Java and Maven from
//! Debian. What they are, and how they are started, is said where they are used ([`crate::kafka`], [`crate::opensearch`]).
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

/// The oldest Java that these programs run on.
const JAVA_MAJOR_MIN: u32 = 17;

/// A command and the Debian package that has it.
pub(crate) type Tool = (&'static str, &'static str);

const JAVA: Tool = ("java", "default-jre-headless");
const MAVEN: Tool = ("mvn", "maven");

/// A project of Maven's: a folder below `tests/testbed`, and the commands that it needs beside Java.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Project {
    /// Name of the folder.
    pub(crate) folder: &'static str,
    /// What people call it.
    pub(crate) name: &'static str,
    pub(crate) tools: &'static [Tool],
}

/// What is there to run.
#[derive(Clone, Debug)]
pub(crate) struct Installed {
    java: PathBuf,
    jars: PathBuf,
}

impl Project {
    /// What [`Self::install`] would do; none when all is there.
    ///
    /// # Errors
    /// When the lock cannot be read or there is no place for the cache.
    pub(crate) fn plan(&self) -> Result<Option<String>> {
        let installed = self.is_installed(&self.cache()?)?;
        let packages = self.missing(installed).join(" ");
        let name = self.name;
        Ok(match (installed, packages.is_empty()) {
            (true, true) => None,
            (true, false) => Some(format!("install Debian packages: {packages} (about 1 min)")),
            (false, true) => Some(format!("fetch with Maven: {name} for the tests (about 15 s)")),
            (false, false) => {
                Some(format!("install Debian packages: {packages}; fetch {name} with Maven (about 2 min)"))
            }
        })
    }

    /// Installs what is missing.
    ///
    /// # Errors
    /// When a package cannot be installed or a jar not be fetched, or when a jar is not the one of the lock.
    pub(crate) fn install(&self, progress: Progress) -> Result<Installed> {
        let folder = self.cache()?;
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        // Tests of one binary run side by side, and so may two commands: who comes second finds it done.
        let lock = fs::File::open(&folder).with_context(|| format!("cannot open {}", folder.display()))?;
        let _lock = Flock::lock(lock, FlockArg::LockExclusive)
            .map_err(|(_, error)| error)
            .with_context(|| format!("cannot lock {}", folder.display()))?;
        let done = self.is_installed(&folder)?;
        let packages = self.missing(done);
        if !packages.is_empty() {
            progress.step(&format!("install {}", packages.join(" ")), || packages::install(&packages))?;
        }
        let java = path(JAVA)?;
        check_java(&java)?;
        if !done {
            let maven = path(MAVEN)?;
            progress.step(&format!("fetch {} with Maven", self.name), || self.fetch(&maven, &folder))?;
        }
        Ok(Installed { java, jars: folder.join("jars") })
    }

    fn cache(&self) -> Result<PathBuf> {
        Ok(cache_folder()?.join("testbed").join(self.folder))
    }

    /// A file of the project.
    pub(crate) fn source(&self, file: &str) -> PathBuf {
        repository().join("tests/testbed").join(self.folder).join(file)
    }

    fn stamp(&self) -> Result<String> {
        let mut content = Vec::new();
        for file in ["pom.xml", "jars.sha256"] {
            let path = self.source(file);
            content.extend(fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?);
        }
        Ok(hex::encode(Sha256::digest(&content)))
    }

    fn is_installed(&self, folder: &Path) -> Result<bool> {
        Ok(fs::read_to_string(folder.join("jars/stamp")).unwrap_or_default() == self.stamp()?)
    }

    /// Packages that are missing; Maven is not once the jars are there.
    fn missing(&self, fetched: bool) -> Vec<&'static str> {
        let needed = self.tools.iter().copied().chain([JAVA]).chain((!fetched).then_some(MAVEN));
        needed.filter(|(name, _)| find_in_path(name).is_none()).map(|(_, package)| package).collect()
    }

    fn fetch(&self, maven: &Path, folder: &Path) -> Result<()> {
        let [part, jars] = ["part", "jars"].map(|name| folder.join(name));
        for folder in [&part, &jars] {
            if folder.exists() {
                fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
            }
        }
        let repository = tempfile::tempdir_in(folder).context("cannot make a folder for Maven")?;
        let mut command = Command::new(maven);
        command.args(["--batch-mode", "--quiet", "--strict-checksums", "--file"]).arg(self.source("pom.xml"));
        // Its own repository holds the plug-ins too; none of it is needed once the jars are there.
        command.arg(format!("-Dmaven.repo.local={}", repository.path().display()));
        command.args(["dependency:copy-dependencies", "-DincludeScope=runtime"]);
        command.arg(format!("-DoutputDirectory={}", part.display()));
        run(&mut command)?;
        check(&part, &self.locked()?)?;
        fs::write(part.join("stamp"), self.stamp()?).context("cannot write the stamp of the jars")?;
        // Only what is whole and checked has this name.
        fs::rename(&part, &jars).context("cannot put the jars in their place")
    }

    /// Names and hashes of its lock.
    pub(crate) fn locked(&self) -> Result<BTreeMap<String, String>> {
        let lock = self.source("jars.sha256");
        parse(&fs::read_to_string(&lock).with_context(|| format!("cannot read {}", lock.display()))?)
    }
}

impl Installed {
    /// Java itself.
    pub(crate) fn java(&self) -> &Path {
        &self.java
    }

    /// The folder of the jars.
    pub(crate) fn jars(&self) -> &Path {
        &self.jars
    }

    /// A class of it, to add arguments to; `options` are those of Java. What it unpacks goes into `scratch`.
    pub(crate) fn class(&self, name: &str, options: &[&str], scratch: &Path) -> Command {
        let mut command = Command::new(&self.java);
        // These programs live for seconds: the second compiler and parallel collectors only cost them.
        command.args(["-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]).args(options);
        command.arg(format!("-Djava.io.tmpdir={}", scratch.display()));
        command.arg("-cp").arg(self.jars.join("*")).arg(name);
        command.env_remove("JAVA_TOOL_OPTIONS").env_remove("_JAVA_OPTIONS").env_remove("JDK_JAVA_OPTIONS");
        command
    }
}

/// Where an installed command is.
pub(crate) fn path((name, package): Tool) -> Result<PathBuf> {
    find_in_path(name).with_context(|| format!("{package} is installed, and {name} is not in PATH"))
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
        bail!("{name} has the hash {hash}, which is not that of the lock jars.sha256");
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
        "{} is Java {major}, and the tests need {JAVA_MAJOR_MIN} or newer; install one and put it into PATH",
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
}
