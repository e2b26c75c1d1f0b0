//! What building the agent needs beside Rust: librdkafka and the OpenSSL inside it are built from source.

use anyhow::Result;
use weir_tests::{command::find_in_path, packages};

/// A program, and Debian's package with it. OpenSSL's `Configure` needs modules that `perl-base` lacks: the whole of Perl
/// is known by `prove`.
const NEEDED: [(&str, &str); 3] = [("g++", "g++"), ("make", "make"), ("prove", "perl")];

fn missing() -> Vec<&'static str> {
    let is_missing = |(program, _): &&(&str, &str)| find_in_path(program).is_none();
    NEEDED.iter().filter(is_missing).map(|(_, package)| *package).collect()
}

/// What would be installed.
pub(crate) fn plan() -> Vec<String> {
    match missing() {
        names if names.is_empty() => Vec::new(),
        names => vec![format!("install {} (for librdkafka)", names.join(", "))],
    }
}

/// Installs what is missing.
///
/// # Errors
/// It cannot be installed here; the error has the mend.
pub(crate) fn install() -> Result<()> {
    match missing() {
        names if names.is_empty() => Ok(()),
        names => packages::install(&names),
    }
}
