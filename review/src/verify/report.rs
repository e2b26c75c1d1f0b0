//! Prints a verification's report: totals first, then what was found, then the verdict.
//!
//! Everything that came from the journal is escaped.

use std::io::{self, Write};

use super::{EpochReport, Findings, KeySource, Report};
use crate::{
    moment::{counted, grouped, length},
    terminal::{Style, escaped, escaped_json},
};

/// Prints the report as one JSON object.
///
/// # Errors
/// The output cannot be written.
pub(crate) fn print_json(out: &mut dyn Write, report: &Report) -> io::Result<()> {
    writeln!(out, "{}", escaped_json(&serde_json::to_vec(report)?))
}

/// Prints the report for reading.
///
/// # Errors
/// The output cannot be written.
pub(crate) fn print(out: &mut dyn Write, style: Style, report: &Report) -> io::Result<()> {
    for epoch in report.epochs.iter().filter(|_| report.noun == "export") {
        let text = format!(
            "{} on {}: {}, checkpoint over {} events signed at {}",
            epoch.epoch,
            epoch.node,
            counted(epoch.events, "event"),
            grouped(epoch.covered),
            epoch.last_signed.as_deref().unwrap_or("a time that it does not say"),
        );
        writeln!(out, "{} {}", style.strong("epoch"), escaped(&text))?;
    }
    for epoch in report.epochs.iter().filter(|_| report.noun != "export") {
        let state = match epoch {
            EpochReport { stopped: true, .. } => "ended in order",
            EpochReport { segments: 0, .. } => "nothing is left",
            _ => "not ended: running, or crashed",
        };
        let text = format!(
            "{} on {}: {}, {}, {} ({} of {} events covered), {}, {state}",
            epoch.epoch,
            epoch.node,
            counted(epoch.segments, "segment"),
            counted(epoch.events, "event"),
            counted(epoch.checkpoints, "checkpoint"),
            grouped(epoch.covered),
            grouped(epoch.end),
            counted(epoch.open_requests, "open request"),
        );
        let text = match epoch.removed {
            0 => text,
            removed => format!("{text}; {} before them are not here any more", counted(removed, "event")),
        };
        writeln!(out, "{} {}", style.strong("epoch"), escaped(&text))?;
        let root = epoch.root.as_deref().unwrap_or(if report.sound {
            "not computable: events are gone"
        } else {
            "not computable: damage stands in the way"
        });
        writeln!(out, "      root {root}")?;
        silences(out, epoch)?;
    }
    if let Some(topic) = &report.topic {
        writeln!(
            out,
            "{} {} in {}, {} of them came again, {} of others",
            style.strong("topic"),
            counted(topic.messages, "message"),
            counted(topic.partitions, "partition"),
            grouped(topic.duplicates),
            grouped(topic.foreign),
        )?;
    }
    findings(out, &style.bad("damage"), &report.damage)?;
    findings(out, &style.warning("gap"), &report.gaps)?;
    findings(out, "note", &report.notes)?;
    if let Some(text) = &report.checkpoint {
        writeln!(out, "kept checkpoint: {}", escaped(text))?;
    }
    match report.key_source {
        KeySource::Given => writeln!(out, "signatures were verified with the given keys")?,
        KeySource::Journal => writeln!(
            out,
            "keys were taken from the {} itself: this proves consistency, not authorship; give --key FILE with \
             a verifier key that you have from elsewhere",
            report.noun
        )?,
    }
    verdict(out, style, report)
}

fn silences(out: &mut dyn Write, epoch: &EpochReport) -> io::Result<()> {
    let silences = &epoch.silences;
    if let Some(longest) = &silences.longest {
        let total = length(silences.seconds.saturating_mul(1_000_000));
        match silences.number {
            1 => writeln!(out, "      silent from {} to {} ({total}), proven", longest.from, longest.to)?,
            number => writeln!(
                out,
                "      silent {} times for {total} in all, proven; the longest from {} to {}",
                grouped(number),
                longest.from,
                longest.to
            )?,
        }
    }
    match (&epoch.last_signed, epoch.stopped) {
        (Some(time), false) => writeln!(out, "      its last checkpoint was signed at {time}"),
        _ => Ok(()),
    }
}

fn verdict(out: &mut dyn Write, style: Style, report: &Report) -> io::Result<()> {
    let name = escaped(&report.journal).into_owned();
    let gaps = counted(report.gaps.number(), "recorded gap");
    if report.sound {
        let whole = report.epochs.iter().all(|epoch| epoch.removed == 0);
        let is_proven = |epoch: &EpochReport| epoch.root.is_some() && epoch.unproven == 0;
        let verdict = match report.epochs.iter().all(is_proven) {
            true if whole => format!("{name} is whole and unchanged"),
            true => format!("what is left in {name} is whole and unchanged"),
            false => format!(
                "nothing is wrong with what is left in {name}, as far as that can be told (see notes)"
            ),
        };
        writeln!(out, "{} {verdict} ({gaps})", style.good("ok"))
    } else {
        let number = counted(report.damage.number(), "place");
        writeln!(out, "{} {name} is damaged in {number} ({gaps})", style.bad("damaged"))
    }
}

fn findings(out: &mut dyn Write, word: &str, findings: &Findings) -> io::Result<()> {
    for finding in &findings.listed {
        let mut place = finding.file.clone();
        if let Some(offset) = finding.offset {
            place.push_str(&format!(" offset {offset}"));
        }
        if let Some(sequence) = finding.sequence {
            place.push_str(&format!(" sequence {sequence}"));
        }
        writeln!(out, "{word} {}: {}", escaped(&place), escaped(&finding.what))?;
    }
    match findings.more {
        0 => Ok(()),
        more => writeln!(out, "{word} … and {} more", grouped(more)),
    }
}
