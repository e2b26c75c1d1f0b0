//! What an image of another architecture does in emulation: its own files, unpacked from the archive, with the libraries that it has.
//!
//! qemu emulates a process, not a kernel: that the programs find their libraries, speak TLS, check signatures and read what they are given
//! is shown; what the agent does with eBPF is not.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use weir_tests::{
    IdentityProvider,
    command::output,
    identity_provider::{Client, User},
    image,
};

use super::{BINARIES, VERSION};
use crate::cross::Cross;

/// A journal as the tests of `weir` write it.
const JOURNAL: &str = "review/golden/journal";
/// The account of its one session.
const ACCOUNT: &str = "system:serviceaccount:ci:agent";
const CLIENT: Client = Client { id: "weir", lifetime_seconds: 300 };
const USER: User = User { id: "ada", email_verified: true, groups: &["platform"] };
/// Nothing listens there, and nobody is asked.
const KUBECONFIG: &str = r#"
apiVersion: v1
kind: Config
clusters: [{name: a, cluster: {server: "https://127.0.0.1:1"}}]
contexts: [{name: a, context: {cluster: a, user: a}}]
current-context: a
users: [{name: a, user: {token: none}}]
"#;

/// Runs both programs of the archive.
///
/// # Errors
/// One does not do what it does on this machine.
pub(super) fn run(root: &Path, cross: &Cross, archive: &Path) -> Result<()> {
    let scratch = tempfile::tempdir().context("cannot make a scratch folder")?;
    let image = scratch.path().join("image");
    let configuration = image::unpack(archive, cross.architecture.debian(), &image)?;
    ensure!(
        configuration["architecture"] == cross.architecture.debian(),
        "the image's configuration is of another architecture: {configuration}"
    );
    let binaries = BINARIES.map(|name| image.join("usr/bin").join(name));
    let libraries = cross.libraries_of(&image, &binaries)?;
    let emulated = Emulated { cross, image, scratch: scratch.path() };
    for program in BINARIES {
        emulated.says(program, &["--version"], 0, &[program, VERSION])?;
    }
    emulated.reads_journals(&root.join(JOURNAL))?;
    emulated.knows_users()?;
    println!(
        "{}: the image's programs, in emulation with its own {} libraries, verified a journal and refused a changed one, listed its \
         session, read a configuration, and over TLS let a user's token pass and refused a forged one",
        cross.architecture.name(),
        libraries.len()
    );
    Ok(())
}

struct Emulated<'a> {
    cross: &'a Cross,
    image: PathBuf,
    scratch: &'a Path,
}

impl Emulated<'_> {
    /// Runs a program of the image, which ends with this code and says these words.
    fn says(&self, program: &str, arguments: &[&str], code: i32, words: &[&str]) -> Result<()> {
        let ended = output(&mut self.cross.emulated(&self.image, program, arguments))?;
        let said =
            String::from_utf8_lossy(&ended.stdout).into_owned() + &String::from_utf8_lossy(&ended.stderr);
        let missing = words.iter().find(|word| !said.contains(**word));
        ensure!(
            ended.status.code() == Some(code) && missing.is_none(),
            "in emulation, {program} {arguments:?} ended with {}, and not with {code} and {words:?}:\n{said}",
            ended.status
        );
        Ok(())
    }

    /// Writes a file, and gives its path.
    fn file(&self, name: &str, text: &str) -> Result<String> {
        let path = self.scratch.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path.to_string_lossy().into_owned())
    }

    /// Checksums, the Merkle tree and signatures: of a journal as it is, and of one with a byte that was changed.
    fn reads_journals(&self, journal: &Path) -> Result<()> {
        let changed = self.scratch.join("journal");
        let mut segments = Vec::new();
        for epoch in fs::read_dir(journal).with_context(|| format!("cannot read {}", journal.display()))? {
            let epoch = epoch?;
            let copies = changed.join(epoch.file_name());
            fs::create_dir_all(&copies)?;
            for file in fs::read_dir(epoch.path())? {
                let (from, to) = (file?.path(), &copies);
                let to = to.join(from.file_name().context("a file has no name")?);
                fs::copy(&from, &to)?;
                if to.extension().is_some_and(|extension| extension == "seg") {
                    segments.push(to);
                }
            }
        }
        segments.sort();
        let segment = segments.first().with_context(|| format!("{} has no segment", journal.display()))?;
        let mut bytes = fs::read(segment)?;
        let middle = bytes.len() / 2;
        *bytes.get_mut(middle).context("a segment is empty")? ^= 1;
        fs::write(segment, bytes)?;
        let journal = journal.to_string_lossy();
        self.says("weir", &["verify", "--from", &journal], 0, &[])?;
        self.says("weir", &["sessions", "--from", &journal, "--json"], 0, &[ACCOUNT])?;
        self.says("weir", &["verify", "--from", &changed.to_string_lossy()], 1, &[])
    }

    /// A configuration with expressions, and a token of a provider whose keys are fetched over TLS; then one with another signature.
    fn knows_users(&self) -> Result<()> {
        let provider = IdentityProvider::start_alone(&[CLIENT], &[USER])?;
        let configuration = self.configuration(&provider)?;
        let configuration = self.file("agent.yaml", &configuration.to_string())?;
        let token = provider.login(USER.id, CLIENT.id)?;
        let (signed, signature) = token.rsplit_once('.').context("the provider's token has no signature")?;
        let other = if signature.starts_with('A') { "B" } else { "A" };
        let forged =
            format!("{signed}.{other}{}", signature.get(1..).context("the token's signature is empty")?);
        for (text, code, words) in
            [(&token, 0, ["corp:ada", "staff", "goes on"]), (&forged, 1, ["not established", "refused", ""])]
        {
            let token = self.file("token", text)?;
            self.says(
                "weir-agent",
                &["explain", "--config", &configuration, "--token", &token],
                code,
                &words,
            )?;
        }
        Ok(())
    }

    fn configuration(&self, provider: &IdentityProvider) -> Result<Value> {
        Ok(json!({
            "apiVersion": "weir.dev/v1alpha1",
            "kind": "AgentConfiguration",
            "node": "emulated",
            "journal": {"directory": "/nonexistent"},
            "clusters": [{
                "name": "emulated",
                "kubeconfig": self.file("kubeconfig", KUBECONFIG)?,
                // The image's own.
                "certificateAuthority": "/etc/ssl/certs/ca-certificates.crt",
                "trust": {"clusterSigner": {}},
                "authentication": {"jwt": [{
                    "issuer": {
                        "url": provider.issuer(),
                        "certificateAuthority": provider.certificate_authority()?,
                        "audiences": [CLIENT.id],
                    },
                    "claimMappings": {
                        "username": {"claim": "sub", "prefix": "corp:"},
                        "groups": {"expression": "claims.groups.filter(group, group != 'everyone')"},
                    },
                }]},
                "roles": [{"name": "staff", "when": "'platform' in groups", "impersonate": {}}],
            }],
            "enrolment": [{"mode": "enforce", "podSelector": {}, "namespaceSelector": {}}],
        }))
    }
}
