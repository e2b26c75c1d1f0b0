//! What the kernel's verifier says of a program that it refuses, as far as people are told.
//!
//! It writes a line for each instruction that it looks at, so its words may be megabytes; the reason stands at their end. They go into
//! an error's text, and with it into one line of a log.

/// How many characters are told of a program without which nothing is in force.
pub(super) const TOLD_MAX: usize = 4096;

/// The end of a verifier's log, in brackets and one line; empty where it says nothing.
pub(super) fn told(log: &str, told_max: usize) -> String {
    // From the end: of megabytes little is looked at.
    let mut lines = Vec::new();
    let mut length = 0;
    for line in log.lines().rev().map(str::trim).filter(|line| !line.is_empty()) {
        lines.push(line);
        length += line.chars().count() + "; ".len();
        if length > told_max {
            break;
        }
    }
    lines.reverse();
    let text = lines.join("; ");
    let skipped = text.chars().count().saturating_sub(told_max);
    match text.is_empty() {
        true => text,
        false => format!(" ({})", text.chars().skip(skipped).collect::<String>()),
    }
}

#[cfg(test)]
mod tests {
    use super::told;

    const MAX: usize = 1000;

    #[test]
    fn of_what_the_verifier_says_the_end_is_told() {
        assert_eq!(told("", MAX), "");
        assert_eq!(told("\n \n", MAX), "");
        assert_eq!(
            told("0: (b7) r0 = 0\nR1 invalid mem access\n", MAX),
            " (0: (b7) r0 = 0; R1 invalid mem access)"
        );
        for line in ["x".repeat(2 * MAX), "0: (b7) r0 = 0\n".repeat(2 * MAX)] {
            let long = told(&format!("{line}\nthe reason"), MAX);
            assert!(long.ends_with("; the reason)"), "{long}");
            assert_eq!(long.len(), MAX + " ()".len());
        }
    }
}
