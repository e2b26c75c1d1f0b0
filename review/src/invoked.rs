//! As what this program was started: as `weir`, or by kubectl, whose plugins are programs named `kubectl-NAME`.
//!
//! What it tells people to type next begins with that.

use std::{ffi::OsStr, path::Path, sync::LazyLock};

/// The file name by which kubectl finds it.
const PLUGIN: &str = "kubectl-weir";

/// What a user types before a command's name.
pub(crate) fn name() -> &'static str {
    static NAME: LazyLock<&str> = LazyLock::new(|| named(std::env::args_os().next().as_deref()));
    *NAME
}

fn named(program: Option<&OsStr>) -> &'static str {
    let file = program.and_then(|program| Path::new(program).file_name());
    if file.is_some_and(|file| file == PLUGIN) { "kubectl weir" } else { "weir" }
}

#[cfg(test)]
mod tests {
    use super::named;

    #[test]
    fn kubectl_finds_plugins_by_their_file_name_and_starts_them_by_their_path() {
        for (program, name) in [
            (Some("/usr/local/bin/kubectl-weir"), "kubectl weir"),
            (Some("kubectl-weir"), "kubectl weir"),
            (Some("/kubectl-weir/weir"), "weir"),
            (Some("weir"), "weir"),
            (None, "weir"),
        ] {
            assert_eq!(named(program.map(str::as_ref)), name, "{program:?}");
        }
    }
}
