//! Saying what happens while long work runs: one line per step, with its duration when it is over.
//!
//! Goes to standard error, so that standard output holds results only. No cursor movement: logs of CI read the
//! same as a terminal.

use std::io::Write;
use std::time::Instant;

use anyhow::Result;

/// Whether steps are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// On standard error.
    Shown,
    /// Not at all, as tests want it.
    Quiet,
}

impl Progress {
    /// Runs `work` as one step. Its duration is shown when it succeeds, its failure at once.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn step<T>(self, name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let start = Instant::now();
        self.say(&format!("  …  {name}"));
        let result = work();
        let mark = if result.is_ok() { "ok" } else { "failed" };
        self.say(&format!("  {mark} {name} ({:.1} s)", start.elapsed().as_secs_f64()));
        result
    }

    /// One line.
    pub fn say(self, line: &str) {
        if self == Self::Shown {
            // Nobody reads progress any more when standard error is closed; the work goes on.
            let _ = writeln!(std::io::stderr().lock(), "{line}");
        }
    }
}
