//! Names of what the agent logs. Every line of the levels error, warn and info has one (`event = "…"`), by which alerts and
//! searches find it, also when its words change; docs/logs.md has them all and is written from the source.
//!
//! `cargo xtask tidy` refuses a line without a name and a page that is not what the source says: no name goes, or comes, unseen.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

/// The page.
const PAGE: &str = "docs/logs.md";
/// Whose lines have names.
const LOGGING: &str = "agent/src/";
const LEVELS: [&str; 3] = ["error", "warn", "info"];

/// A line that may be logged.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Line {
    level: &'static str,
    says: String,
}

/// Names, each with the lines that have it.
type Names = BTreeMap<String, BTreeSet<Line>>;

/// What is not as it should be of the lines in these files, and of the page.
///
/// # Errors
/// A file cannot be read.
pub(crate) fn check(root: &Path, files: &[PathBuf], findings: &mut Vec<String>) -> Result<()> {
    let names = read(root, files, findings)?;
    let written = std::fs::read_to_string(root.join(PAGE)).unwrap_or_default();
    if written != page(&names) {
        findings.push(format!("{PAGE}: is not what {LOGGING} logs; `cargo xtask docs` writes it"));
    }
    Ok(())
}

/// Writes the page.
///
/// # Errors
/// A file cannot be read, or the page not be written.
pub(crate) fn write(root: &Path, files: &[PathBuf]) -> Result<()> {
    let names = read(root, files, &mut Vec::new())?;
    std::fs::write(root.join(PAGE), page(&names)).with_context(|| format!("cannot write {PAGE}"))
}

fn read(root: &Path, files: &[PathBuf], findings: &mut Vec<String>) -> Result<Names> {
    let mut names = Names::new();
    for path in files {
        let name = path.display().to_string();
        let logs = name.starts_with(LOGGING) && name.ends_with(".rs") && !name.ends_with("tests.rs");
        if logs {
            let text =
                std::fs::read_to_string(root.join(path)).with_context(|| format!("cannot read {name}"))?;
            of_file(&name, &text, &mut names, findings);
        }
    }
    Ok(names)
}

fn of_file(file: &str, text: &str, names: &mut Names, findings: &mut Vec<String>) {
    let production = text.split("\n#[cfg(test)]\nmod ").next().unwrap_or_default();
    for level in LEVELS {
        let call = format!("{level}!(");
        for (at, _) in production.match_indices(&call) {
            let before = &production[..at];
            let line = before.rsplit('\n').next().unwrap_or_default().trim_start();
            // `log_error!` is another macro, and a comment logs nothing.
            if line.starts_with("//") || before.ends_with(|last: char| last.is_alphanumeric() || last == '_')
            {
                continue;
            }
            let arguments = production[at + call.len()..].trim_start();
            let name = arguments.strip_prefix("event = \"").and_then(|rest| rest.split('"').next());
            let is_name = |name: &&str| {
                name.starts_with(|first: char| first.is_ascii_lowercase())
                    && name.chars().all(|character| {
                        character.is_ascii_lowercase() || character.is_ascii_digit() || character == '-'
                    })
            };
            match name.filter(is_name) {
                Some(name) => {
                    names
                        .entry(name.to_owned())
                        .or_default()
                        .insert(Line { level, says: message(arguments) });
                }
                None => {
                    let number = before.lines().count();
                    findings.push(format!("{file}:{number}: begin what is logged with `event = \"a-name\"`"));
                }
            }
        }
    }
}

/// The message among a macro's arguments: the last text that is an argument by itself.
fn message(arguments: &str) -> String {
    let (mut depth, mut last, mut found) = (0_u32, '(', String::new());
    let mut characters = arguments.chars();
    while let Some(character) = characters.next() {
        match character {
            '"' => {
                let mut text = String::new();
                while let Some(character) = characters.next().filter(|character| *character != '"') {
                    match character {
                        // What goes on in the next line is one text.
                        '\\' => text.extend(characters.next().filter(|escaped| *escaped != '\n')),
                        _ => text.push(character),
                    }
                }
                if depth == 0 && last == ',' {
                    found = text.split_whitespace().collect::<Vec<_>>().join(" ");
                }
            }
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' if depth == 0 => break,
            ')' | ']' | '}' => depth -= 1,
            _ => {}
        }
        if !character.is_whitespace() {
            last = character;
        }
    }
    found
}

fn page(names: &Names) -> String {
    let mut table = String::new();
    for (name, lines) in names {
        let joined = |parts: BTreeSet<&str>| {
            parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(", or: ")
        };
        let levels = joined(lines.iter().map(|line| line.level).collect());
        let says = joined(lines.iter().map(|line| line.says.as_str()).collect()).replace('|', "\\|");
        let _ = writeln!(table, "| `{name}` | {levels} | {says} |");
    }
    format!(
        "# What the agent logs\n\n\
         <!-- Written by `cargo xtask docs` from the agent's source; change it there. -->\n\n\
         On standard error; with `--log-json` (the chart's default) one JSON object a line. Each line of the agent's own of the levels error, \
         warn and info has a name in `fields.event`, which stays when the words change; one that goes is in the changelog. Match lines by it:\n\n\
         \x20   kubectl -n weir-system logs ds/weir-agent -c agent | jq -c 'select(.fields.event == \"certificate-not-renewed\")'\n\n\
         The other fields say of which pod, cluster or file; none is a secret. Lines of libraries have no name. What is to wake \
         somebody is better asked of [metrics](metrics.md), what happened to a pod of the [record](recording.md).\n\n\
         `{{…}}` stands for what is filled in. A line whose words are all filled in has none here.\n\n\
         | event | level | says |\n|---|---|---|\n{table}"
    )
}

#[cfg(test)]
mod tests {
    use super::{Names, message, of_file, page};

    #[test]
    fn a_line_has_a_name_or_is_found() {
        let (mut names, mut findings) = (Names::new(), Vec::new());
        let text = r#"
            tracing::warn!(event = "api-gone", why = f("x", 1), "the API \
                server (again) is {what}|gone",);
            info!(
                event = "api-back",
                "back"
            );
            // error!("in a comment")
            my_info!("of somebody else");
            error!(why, "nameless");
            tracing::error!(event = "Not a name", "x");
"#;
        of_file("a.rs", text, &mut names, &mut findings);
        let expected = "a.rs:10: begin what is logged with `event = \"a-name\"`";
        assert_eq!((findings.len(), findings[0].as_str()), (2, expected));
        let page = page(&names);
        let table = page.split("|---|---|---|\n").nth(1).unwrap_or_default();
        assert_eq!(
            table,
            "| `api-back` | info | back |\n| `api-gone` | warn | the API server (again) is {what}\\|gone |\n"
        );
    }

    #[test]
    fn the_message_is_the_last_text_that_stands_alone() {
        assert_eq!(message(r#"event = "a", "it {}", f("x"))"#), "it {}");
        assert_eq!(message(r#"event = "a", detail = "x", message)"#), "");
        assert_eq!(message(r#"event = "a", "says \"b\"") "later""#), "says \"b\"");
    }
}
