//! The expressions of the chart's admission policies, compiled as API servers of each version compile them.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use anyhow::{Context as _, Result, ensure};
use weir_tests::{components, progress::Progress};

use super::Rendered;

/// An expression of the policies, and what is wrong in its place: for which versions, and what is said then.
const KNOWN: &str = "size(variables.paths) == 0";
const WRONG: [(&str, &[&str], &str); 2] = [
    // Lists of 1.34, which an API server takes from 1.35 on.
    ("size(variables.paths.distinct()) == 0", &["1.33", "1.34"], "undeclared reference to 'distinct'"),
    ("size(variables.pahts) == 0", &["1.33", "1.34", "1.35", "1.36"], "undefined field 'pahts'"),
];

/// A server of a version takes in new policies what the one before it knows. The compiler is that of the newest version, with what older
/// ones declare: a defect of an older one is not seen by this.
pub(super) fn are_of_every_version(versions: &[Rendered]) -> Result<()> {
    let compiler = components::policies(Progress::Shown)?;
    let scratch = tempfile::tempdir().context("cannot make a scratch folder")?;
    for Rendered { version, objects } in versions {
        let mut compile = Command::new(&compiler);
        compile.arg(version);
        let mut count = 0;
        for (name, rendered) in objects {
            count += rendered.matches("AdmissionPolicy\nmetadata:").count();
            let file = scratch.path().join(format!("{name}.yaml"));
            fs::write(&file, rendered).context("cannot write policies")?;
            compile.arg(file);
        }
        let output = compile.output().context("cannot start the compiler")?;
        let (said, errors) = shown(&output);
        ensure!(output.status.success(), "Kubernetes {version} does not compile the policies: {errors}");
        ensure!(said.starts_with(&format!("{count} policies, ")), "of {count} policies: {said}");
        is_not_taken(&compiler, version, &objects["everything"])?;
    }
    Ok(())
}

/// What is too new for a version, or is nothing, is no policy of it.
fn is_not_taken(compiler: &Path, version: &str, rendered: &str) -> Result<()> {
    let file = tempfile::NamedTempFile::new().context("cannot make a scratch file")?;
    for (wrong, versions, why) in WRONG {
        let changed = rendered.replacen(KNOWN, wrong, 1);
        ensure!(changed != rendered, "no policy has {KNOWN}");
        fs::write(file.path(), changed).context("cannot write policies")?;
        let output = Command::new(compiler).arg(version).arg(file.path()).output();
        let output = output.context("cannot start the compiler")?;
        let (_, errors) = shown(&output);
        let refused = !output.status.success() && errors.contains(why);
        let taken = output.status.success() && errors.is_empty();
        let as_expected = if versions.contains(&version) { refused } else { taken };
        ensure!(as_expected, "{wrong}, as Kubernetes {version} compiles it: {}: {errors}", output.status);
    }
    Ok(())
}

fn shown(output: &Output) -> (String, String) {
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}
