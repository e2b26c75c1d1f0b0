//! How a body is shown: JSON indented, a Kubernetes Table as rows, text as lines, anything else as the text that
//! can be found in it, labelled as such.
//!
//! Pure: bytes in, escaped lines out. JSON is indented token by token and never through a map: key order, number
//! forms and repeated keys stay visible, since a caller may have sent them to mislead.

use serde::{Deserialize, de::IgnoredAny};
use serde_json::Value;

use crate::{
    moment::counted,
    terminal::{escaped, escaped_exactly, is_unsafe},
};

/// Shortest printable run that is picked out of raw bytes, its line end included.
const RUN_CHARS_MIN: usize = 3;
/// Most characters of a line, unless all is wanted.
const LINE_CHARS_MAX: usize = 240;
/// Most rows or columns of a Table that is shown as a table.
const TABLE_CELLS_MAX: usize = 100_000;

/// A body, ready to print: every line is escaped.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Shown {
    /// What the reader should know of the form.
    pub(crate) label: Option<String>,
    /// The lines.
    pub(crate) lines: Vec<String>,
}

/// How much of a body is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Detail {
    /// What a reader needs at first: Tables as rows, lines cut.
    Readable,
    /// Everything, reversibly escaped.
    Full,
}

/// Brings a body into lines.
pub(crate) fn show(bytes: &[u8], detail: Detail) -> Shown {
    let Ok(text) = std::str::from_utf8(bytes) else { return show_raw(bytes, detail) };
    if is_json(text) {
        if let (Detail::Readable, Some(lines)) = (detail, table(text)) {
            return Shown {
                label: Some("a Table, as rows".into()),
                lines: lines.iter().map(|line| line_text(line, detail)).collect(),
            };
        }
        let text = indented(text);
        let lines = text.lines().map(|line| line_text(line, detail)).collect();
        return Shown { label: None, lines: if detail == Detail::Readable { folded(lines) } else { lines } };
    }
    if text.contains('\0') {
        return show_raw(bytes, detail);
    }
    Shown { label: None, lines: text_lines(text, detail) }
}

/// Brings text into escaped lines.
fn text_lines(text: &str, detail: Detail) -> Vec<String> {
    match detail {
        Detail::Readable => {
            let lines = text.split_terminator('\n').map(|line| line.strip_suffix('\r').unwrap_or(line));
            lines.map(|line| line_text(line, detail)).collect()
        }
        Detail::Full => text.split_inclusive('\n').map(|line| escaped_exactly(line.as_bytes())).collect(),
    }
}

/// One line of what is shown at first: escaped, and cut.
pub(super) fn one_line(line: &str) -> String {
    line_text(line, Detail::Readable)
}

/// One line, escaped; cut (before escaping: a body may be one line of megabytes) unless all is wanted.
fn line_text(line: &str, detail: Detail) -> String {
    match line.char_indices().nth(LINE_CHARS_MAX) {
        Some((end, _)) if detail == Detail::Readable => {
            let more = line[end..].chars().count();
            format!("{}… ({more} more characters)", escaped(&line[..end]))
        }
        _ => escaped(line).into_owned(),
    }
}

/// Shows bytes that are not decoded.
pub(crate) fn show_raw(bytes: &[u8], detail: Detail) -> Shown {
    let form = match kubernetes_protobuf(bytes) {
        Some(what) => format!("Kubernetes protobuf of {what}, not decoded"),
        None => "raw, not decoded".into(),
    };
    match detail {
        Detail::Readable => Shown {
            label: Some(format!("{form}: the text found in it")),
            lines: printable_runs(bytes).iter().map(|run| line_text(run, detail)).collect(),
        },
        Detail::Full => Shown {
            label: Some(form),
            lines: bytes.split_inclusive(|byte| *byte == b'\n').map(escaped_exactly).collect(),
        },
    }
}

/// Shows what a process read or wrote: as a body where it is text, else every byte of it, escaped.
pub(crate) fn show_said(bytes: &[u8], detail: Detail) -> Shown {
    if detail == Detail::Full || std::str::from_utf8(bytes).is_ok_and(|text| !text.contains('\0')) {
        return Shown { label: None, ..show(bytes, detail) };
    }
    let line = |line: &[u8]| {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        let (shown, more) = line.split_at(line.len().min(LINE_CHARS_MAX));
        let more = if more.is_empty() { String::new() } else { format!("… ({} more bytes)", more.len()) };
        format!("{}{more}", escaped_exactly(shown))
    };
    Shown {
        label: Some("not all of it text".into()),
        lines: bytes.split_inclusive(|byte| *byte == b'\n').map(line).collect(),
    }
}

/// Version and kind, if the bytes are a `runtime.Unknown` as Kubernetes sends it: `k8s\0`, then field 1 (the type:
/// field 1 its version, field 2 its kind). Escaped. See k8s.io/apimachinery `pkg/runtime/generated.proto`.
fn kubernetes_protobuf(bytes: &[u8]) -> Option<String> {
    let (meta, _) = short_field(bytes.strip_prefix(b"k8s\0")?, 0x0a)?;
    let (version, rest) = short_field(meta, 0x0a)?;
    let (kind, _) = short_field(rest, 0x12)?;
    Some(format!(
        "{} {}",
        escaped(std::str::from_utf8(version).ok()?),
        escaped(std::str::from_utf8(kind).ok()?)
    ))
}

/// A field with this tag, shorter than 128 bytes, and what follows it.
fn short_field(bytes: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    match bytes {
        [first, length @ 0..0x80, rest @ ..] if *first == tag => rest.split_at_checked(usize::from(*length)),
        _ => None,
    }
}

/// Folds what the API server keeps for itself, as kubectl does: a note says how much that is.
fn folded(lines: Vec<String>) -> Vec<String> {
    let mut out = Vec::with_capacity(lines.len());
    let mut lines = lines.into_iter();
    while let Some(line) = lines.next() {
        let Some(indent) =
            line.strip_suffix("\"managedFields\": [").filter(|indent| indent.trim().is_empty())
        else {
            out.push(line);
            continue;
        };
        let end = format!("{indent}]");
        let mut folded = 0_u64;
        let last = lines.by_ref().inspect(|_| folded += 1).find(|line| line.trim_end_matches(',') == end);
        let comma = if last.is_some_and(|last| last.ends_with(',')) { "," } else { "" };
        out.push(format!("{line}… {}]{comma}", counted(folded.saturating_sub(1), "line")));
    }
    out
}

fn is_json(text: &str) -> bool {
    text.trim_start().starts_with(['{', '[']) && serde_json::from_str::<IgnoredAny>(text).is_ok()
}

/// Indents valid JSON without changing any token.
fn indented(text: &str) -> String {
    let mut out = String::with_capacity(text.len() * 2);
    let (mut depth, mut in_string, mut after_backslash) = (0_usize, false, false);
    let mut characters = text.chars().filter(|c| !c.is_ascii_control() || *c == ' ').peekable();
    while let Some(character) = characters.next() {
        if in_string {
            out.push(character);
            in_string = character != '"' || after_backslash;
            after_backslash = character == '\\' && !after_backslash;
            continue;
        }
        match character {
            ' ' => {}
            '"' => {
                in_string = true;
                out.push('"');
            }
            '{' | '[' => {
                out.push(character);
                while characters.next_if_eq(&' ').is_some() {}
                let close = if character == '{' { '}' } else { ']' };
                if characters.next_if_eq(&close).is_some() {
                    out.push(close);
                } else {
                    depth += 1;
                    new_line(&mut out, depth);
                }
            }
            '}' | ']' => {
                depth = depth.saturating_sub(1);
                new_line(&mut out, depth);
                out.push(character);
            }
            ',' => {
                out.push(',');
                new_line(&mut out, depth);
            }
            ':' => out.push_str(": "),
            other => out.push(other),
        }
    }
    out
}

fn new_line(out: &mut String, depth: usize) {
    out.push('\n');
    out.extend(std::iter::repeat_n("  ", depth));
}

/// The text in bytes whose form is not known, like `strings`: printable runs of [`RUN_CHARS_MIN`] and more.
fn printable_runs(bytes: &[u8]) -> Vec<String> {
    let mut lines = Vec::new();
    let mut run = String::new();
    let mut flush = |run: &mut String, ended: bool| {
        if run.chars().count() + usize::from(ended) >= RUN_CHARS_MIN && !run.trim().is_empty() {
            lines.push(run.clone());
        }
        run.clear();
    };
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            match character {
                '\n' => flush(&mut run, true),
                '\r' => {}
                '\t' => run.push(' '),
                c if !is_unsafe(c) => run.push(c),
                _ => flush(&mut run, false),
            }
        }
        if !chunk.invalid().is_empty() {
            flush(&mut run, false);
        }
    }
    flush(&mut run, false);
    lines
}

/// `meta.k8s.io/v1` Table, as far as it is shown.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Table {
    kind: String,
    #[serde(default)]
    column_definitions: Vec<Column>,
    #[serde(default)]
    rows: Vec<Row>,
}

#[derive(Deserialize)]
struct Column {
    name: String,
    #[serde(default)]
    priority: i32,
}

#[derive(Deserialize)]
struct Row {
    #[serde(default)]
    cells: Vec<Value>,
}

/// The rows of a Table, as kubectl prints them (columns of priority 0); none if it is no Table.
fn table(text: &str) -> Option<Vec<String>> {
    let table: Table = serde_json::from_str(text).ok()?;
    let wide = table.column_definitions.len().max(1);
    if table.kind != "Table" || table.rows.len().saturating_mul(wide) > TABLE_CELLS_MAX {
        return None;
    }
    let shown: Vec<usize> =
        (0..table.column_definitions.len()).filter(|i| table.column_definitions[*i].priority == 0).collect();
    let head = shown.iter().map(|i| escaped(&table.column_definitions[*i].name.to_uppercase()).into_owned());
    let mut lines: Vec<Vec<String>> = vec![head.collect()];
    // In a watch only the first event has column definitions.
    let cell = |row: &Row, i: usize| row.cells.get(i).map(cell_text).unwrap_or_default();
    for row in &table.rows {
        lines.push(if shown.is_empty() {
            (0..row.cells.len()).map(|i| cell(row, i)).collect()
        } else {
            shown.iter().map(|i| cell(row, *i)).collect()
        });
    }
    if lines[0].is_empty() {
        lines.remove(0);
    }
    let columns = lines.iter().map(Vec::len).max().unwrap_or_default();
    let widths: Vec<usize> = (0..columns)
        .map(|i| {
            lines.iter().filter_map(|line| line.get(i)).map(|c| c.chars().count()).max().unwrap_or_default()
        })
        .collect();
    let line = |cells: &Vec<String>| {
        let cells: Vec<String> = cells.iter().zip(&widths).map(|(cell, w)| format!("{cell:<w$}")).collect();
        cells.join("   ").trim_end().to_owned()
    };
    Some(lines.iter().map(line).collect())
}

fn cell_text(cell: &Value) -> String {
    match cell {
        Value::String(text) => escaped(text).into_owned(),
        Value::Null => "<none>".into(),
        other => escaped(&other.to_string()).into_owned(),
    }
}

/// A watch event in one line: type, kind, namespace and name; with the rows of a Table. None if it is no watch event.
pub(crate) fn watch_event(line: &str) -> Option<(String, Vec<String>)> {
    let event: Value = serde_json::from_str(line).ok()?;
    let text = |value: &Value| escaped(value.as_str().unwrap_or("?")).into_owned();
    let (kind, object) = (event.get("type")?, event.get("object")?);
    if object["kind"] == "Table" {
        return Some((text(kind), table(&object.to_string())?));
    }
    let metadata = &object["metadata"];
    let name = match (metadata["namespace"].as_str(), metadata["name"].as_str()) {
        (Some(namespace), Some(name)) => format!("{}/{}", escaped(namespace), escaped(name)),
        (None, Some(name)) => escaped(name).into_owned(),
        (_, None) => String::new(),
    };
    let mut summary = format!("{} {} {name}", text(kind), text(&object["kind"])).trim_end().to_owned();
    if let Some(version) = metadata["resourceVersion"].as_str() {
        summary.push_str(&format!(" (resourceVersion {})", escaped(version)));
    }
    if let Some(message) = object["message"].as_str() {
        summary.push_str(&format!(": {}", escaped(message)));
    }
    Some((summary, Vec::new()))
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::{Detail, indented, show, show_raw, watch_event};

    #[track_caller]
    fn check(bytes: &[u8], detail: Detail, expected: Expect) {
        let shown = show(bytes, detail);
        let label = shown.label.map(|label| format!("({label})\n")).unwrap_or_default();
        expected.assert_eq(&format!("{label}{}", shown.lines.join("\n")));
    }

    #[test]
    fn json_is_indented_and_no_token_changes() {
        check(
            br#" {"b":1.50e1,"a":[1,{},[ ],"x, {y}: \"z\""],"a":true} "#,
            Detail::Readable,
            expect![[r#"
                {
                  "b": 1.50e1,
                  "a": [
                    1,
                    {},
                    [],
                    "x, {y}: \"z\""
                  ],
                  "a": true
                }"#]],
        );
        assert_eq!(indented("{\n  \"a\": \"\\\\\"\r\n}"), "{\n  \"a\": \"\\\\\"\n}");
    }

    #[test]
    fn text_is_shown_as_lines_that_cannot_steer() {
        check(
            "one\r\ntwo \x1b[2J\u{202e}\n".as_bytes(),
            Detail::Readable,
            expect![[r"
            one
            two \x1b[2J\u{202e}"]],
        );
        check(b"{\"cut\": ", Detail::Readable, expect![[r#"{"cut": "#]]);
        check(b"", Detail::Readable, expect![[""]]);
    }

    #[test]
    fn bytes_that_are_no_text_are_labelled_raw() {
        check(
            b"k8s\0\n\x0c\n\x02v1\x12\x03Pod\xff\x00abc",
            Detail::Readable,
            expect![[r#"
                (Kubernetes protobuf of v1 Pod, not decoded: the text found in it)
                k8s
                Pod
                abc"#]],
        );
        check(
            b"\x82\x03\x01ok\nmore\\",
            Detail::Full,
            expect![[r"
            (raw, not decoded)
            \x82\x03\x01ok\n
            more\\"]],
        );
        assert_eq!(show_raw(b"\x82\x03\x01ok\n", Detail::Readable).lines, ["ok"]);
    }

    #[test]
    fn managed_fields_are_folded_and_counted() {
        let object = br#"{"metadata":{"managedFields":[{"a":[1]},{}],"name":"x"},"managedFields":[]}"#;
        check(
            object,
            Detail::Readable,
            expect![[r#"
            {
              "metadata": {
                "managedFields": [… 6 lines],
                "name": "x"
              },
              "managedFields": []
            }"#]],
        );
        assert_eq!(show(object, Detail::Full).lines.len(), 14);
    }

    #[test]
    fn a_table_is_shown_as_kubectl_prints_it() {
        let table = br#"{"kind":"Table","columnDefinitions":[{"name":"Name"},{"name":"Ready"},{"name":"IP","priority":1}],
            "rows":[{"cells":["web-1\u001b[2J","1/1","10.0.0.1"]},{"cells":["db",null,""]}]}"#;
        check(
            table,
            Detail::Readable,
            expect![[r#"
                (a Table, as rows)
                NAME           READY
                web-1\x1b[2J   1/1
                db             <none>"#]],
        );
        assert!(show(table, Detail::Full).lines.len() > 20);
    }

    #[test]
    fn long_lines_are_cut_and_say_so() {
        let shown = show("é".repeat(300).as_bytes(), Detail::Readable);
        assert!(shown.lines[0].ends_with("é… (60 more characters)"), "{}", shown.lines[0]);
    }

    #[test]
    fn a_watch_event_is_summed_up() {
        let pod = r#"{"type":"ADDED","object":{"kind":"Pod","metadata":{"name":"a\u001b","namespace":"n","resourceVersion":"7"}}}"#;
        assert_eq!(watch_event(pod).unwrap().0, r"ADDED Pod n/a\x1b (resourceVersion 7)");
        let error = r#"{"type":"ERROR","object":{"kind":"Status","message":"too old"}}"#;
        assert_eq!(watch_event(error).unwrap().0, "ERROR Status: too old");
        let rows = r#"{"type":"MODIFIED","object":{"kind":"Table","rows":[{"cells":["web",1]}]}}"#;
        assert_eq!(watch_event(rows).unwrap(), ("MODIFIED".into(), vec!["web   1".into()]));
        assert_eq!(watch_event("{}"), None);
    }
}
