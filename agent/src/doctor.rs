//! `weir-agent doctor`: what this node can and cannot do, each with the mend.
//!
//! Here are the report and its two forms; the checks are in the sub-modules, one noun each. A check changes
//! nothing on the node. One asks the cluster for a certificate, as the agent would, and takes the request back.

use std::{fmt, path::PathBuf};

use serde::Serialize;

use crate::{
    config::{self, Config},
    exec::invoker::Invoker,
};

pub mod clusters;
pub mod encryption;
pub mod kafka;
pub mod kernel;
pub mod nri;
pub mod pods;
pub mod storage;

/// Most characters of what was found: a verifier's log can have megabytes.
const FOUND_CHARS_MAX: usize = 1000;

/// What to look at.
#[derive(Clone, Debug, Default)]
pub struct DoctorOptions {
    /// Configuration of `run`; without one, what `exec` needs is looked at.
    pub config: Option<PathBuf>,
    /// Kubeconfig for `exec`; else `$KUBECONFIG`, else `~/.kube/config` of the invoking user.
    pub kubeconfig: Option<PathBuf>,
    /// Journal for `exec`.
    pub journal: Option<PathBuf>,
}

/// Whether Weir works without it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Need {
    /// No.
    Must,
    /// With a disadvantage that the mend names.
    Should,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Check {
    /// Stable name, for scripts.
    pub name: String,
    /// Whether Weir works without it.
    pub need: Need,
    /// Whether it is as it must or should be.
    pub ok: bool,
    /// What was found.
    pub found: String,
    /// What to do, where it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mend: Option<String>,
}

impl Check {
    /// As it must or should be.
    pub fn good(name: impl Into<String>, need: Need, found: impl Into<String>) -> Self {
        Self { name: name.into(), need, ok: true, found: found.into(), mend: None }
    }

    /// Not as it must or should be.
    pub fn bad(
        name: impl Into<String>,
        need: Need,
        found: impl Into<String>,
        mend: impl Into<String>,
    ) -> Self {
        Self { name: name.into(), need, ok: false, found: found.into(), mend: Some(mend.into()) }
    }

    /// Not as it must or should be, and the error says what to do after its semicolon.
    pub fn failed(name: impl Into<String>, need: Need, error: &dyn std::error::Error) -> Self {
        let text = error.to_string();
        let (found, mend) = match text.split_once("; ") {
            Some((found, mend)) => (found, Some(mend.to_owned())),
            None => (text.as_str(), None),
        };
        let causes = chain(error);
        let causes = causes.strip_prefix(&text).unwrap_or_default();
        let found: String = found.chars().chain(causes.chars()).take(FOUND_CHARS_MAX).collect();
        Self { name: name.into(), need, ok: false, found, mend }
    }
}

/// An error and its causes in one line, those left out that the text before has already.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

/// All that was looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Whether nothing is missing that must be there.
    pub ok: bool,
    /// The checks.
    pub checks: Vec<Check>,
}

impl Report {
    /// Of these checks.
    pub fn new(checks: Vec<Check>) -> Self {
        Self { ok: checks.iter().all(|check| check.ok || check.need == Need::Should), checks }
    }

    /// The exit code of `doctor`: 1 if a must is missing.
    pub fn exit_code(&self) -> u8 {
        u8::from(!self.ok)
    }

    /// For scripts.
    ///
    /// # Errors
    /// None that is known: all fields are text and booleans.
    pub fn json(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string_pretty(self)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
        for check in &self.checks {
            let mark = match (check.ok, check.need) {
                (true, _) => "ok      ",
                (false, Need::Must) => "MISSING ",
                (false, Need::Should) => "advice  ",
            };
            writeln!(formatter, "{mark} {:width$}  {}", check.name, check.found)?;
            if let Some(mend) = &check.mend {
                writeln!(formatter, "         {:width$}  -> {mend}", "")?;
            }
        }
        let verdict =
            if self.ok { "nothing that must be there is missing" } else { "something is missing: see above" };
        write!(formatter, "{verdict}")
    }
}

/// Looks at everything. Blocks; makes its own runtime for the checks that talk to clusters.
pub fn run(options: &DoctorOptions) -> Report {
    let environment = |name: &str| std::env::var(name).ok();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return Report::new(vec![Check::failed("runtime", Need::Must, &error)]),
    };
    let mut checks = kernel::checks(options.config.is_some());
    match &options.config {
        Some(path) => match Config::load(path, &config::default_node()) {
            Err(error) => checks.push(Check::failed("config", Need::Must, &error)),
            Ok(config) => {
                checks.push(Check::good("config", Need::Must, path.display().to_string()));
                checks.push(storage::check(&config.journal.directory, config.journal.bytes_max));
                checks.extend(encryption::recipients(&config));
                checks.extend(runtime.block_on(encryption::key_service(&config)));
                checks.push(nri::check(config.nri.as_deref()));
                checks.extend(runtime.block_on(clusters::configured(&config)));
                checks.extend(runtime.block_on(pods::checks(&config)));
                checks.extend(kafka::configured(&config));
            }
        },
        None => match Invoker::find(environment) {
            Err(error) => checks.push(Check::failed("user", Need::Must, &error)),
            Ok(invoker) => {
                let journal = options.journal.clone();
                let journal =
                    journal.unwrap_or_else(|| invoker.journal(environment("XDG_STATE_HOME").as_deref()));
                checks.push(storage::check(&journal, config::JOURNAL_BYTES_MIN));
                let kubeconfig =
                    clusters::of_kubeconfig(options.kubeconfig.as_deref(), &invoker, environment);
                checks.extend(runtime.block_on(kubeconfig));
            }
        },
    }
    Report::new(checks)
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn only_a_missing_must_fails_the_report() {
        let good = Check::good("kernel", Need::Must, "6.1");
        let advice = Check::bad("lsm", Need::Should, "no bpf", "add bpf");
        let missing = Check::bad("btf", Need::Must, "none", "another kernel");
        assert_eq!(Report::new(vec![good.clone(), advice.clone()]).exit_code(), 0);
        let report = Report::new(vec![good, advice, missing]);
        assert_eq!(report.exit_code(), 1);
        expect![[r#"
            ok       kernel  6.1
            advice   lsm     no bpf
                             -> add bpf
            MISSING  btf     none
                             -> another kernel
            something is missing: see above"#]]
        .assert_eq(&report.to_string());
        assert!(report.json().expect("serialises").contains("\"mend\": \"add bpf\""));
    }

    #[test]
    fn an_errors_mend_is_apart_from_its_causes() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot read /x; is it there?")]
        struct Failure(#[source] std::io::Error);

        let check = Check::failed("x", Need::Must, &Failure(std::io::Error::other("gone")));
        assert_eq!(
            (check.found.as_str(), check.mend.as_deref()),
            ("cannot read /x: gone", Some("is it there?"))
        );
    }

    #[test]
    fn a_look_at_this_machine_names_every_check_once() {
        let report =
            run(&DoctorOptions { kubeconfig: Some("/nonexistent".into()), ..DoctorOptions::default() });
        let mut names: Vec<_> = report.checks.iter().map(|check| check.name.clone()).collect();
        assert!(names.contains(&"kernel version".to_owned()) && names.contains(&"kubeconfig".to_owned()));
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
        assert!(!report.ok, "there is no kubeconfig");
    }
}
