//! `cargo xtask demo`: the whole story on this machine, from nothing to a verified record, and nothing left running.
//!
//! This file is the order of steps and what must hold at the end; what the agent pod does is in [`workload`], the
//! comparison with the API server's audit log in [`weir_tests::coverage`].

mod workload;

use std::fs;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use weir_tests::agent::{self, AgentProcess, ENROL_LABEL, TrustSource, built_binary};
use weir_tests::command::run as run_command;
use weir_tests::components::{self, Components};
use weir_tests::progress::Progress;
use weir_tests::testbed::AGENT_IMAGE;
use weir_tests::wait::{check_interrupted, interrupt_on_signals};
use weir_tests::{Coverage, Pod, PodSpec, Testbed, audit, wait_until};

use crate::{build_ebpf, native};

/// For one command in the pod; each takes seconds.
const COMMAND_SECONDS: u32 = 90;

/// The API server writes an audit entry when it has noticed the end of a request.
const AUDIT_DEADLINE: Duration = Duration::from_secs(15);

/// Most lines of one answer of `weir` that are shown; a whole session is some thousand.
const SHOWN_LINES_MAX: usize = 150;

/// Options of `cargo xtask demo`.
#[derive(Clone, Debug, Args)]
pub(crate) struct Arguments {
    /// Do not ask before installing, building and starting.
    #[arg(long)]
    yes: bool,
}

/// Runs the demo.
pub(crate) fn run(root: &Path, arguments: &Arguments) -> Result<()> {
    interrupt_on_signals()?;
    let begin = Instant::now();
    // Before anything is built: what cannot work is said now, not in half an hour.
    agent::refuse_beside_another()?;
    Testbed::check_machine(&Testbed::default_folder()?)?;
    show_plan(root)?;
    if !arguments.yes && std::io::stdin().is_terminal() && !confirmed()? {
        bail!("nothing was done");
    }
    let progress = Progress::Shown;
    build(root, progress)?;
    let folder = journal_folder()?;
    let outcome = story(&folder, progress);
    if outcome.is_err() {
        progress.say(&format!("the journal and the agent's log stay in {}", folder.display()));
    }
    let left = if outcome? { "nothing is left running" } else { "the testbed that was up before still is" };
    println!("\nthe journal stays for you: {}", folder.join("journal").display());
    println!("demo done in {:.0} s; {left}", begin.elapsed().as_secs_f64());
    Ok(())
}

fn show_plan(root: &Path) -> Result<()> {
    let mut missing = components::plan()?;
    missing.extend(build_ebpf::plan(root)?);
    missing.extend(native::plan());
    println!("The plan:");
    for line in &missing {
        println!("  - {line}");
    }
    if missing.is_empty() {
        println!("  - nothing to install, no Go component and no tool to build");
    }
    println!(
        "  - build the kernel programs and the Rust binaries (about 10 min if nothing is built, else seconds)"
    );
    println!(
        "  - start etcd, Kubernetes {}, containerd and a node here (15 s)",
        components::KUBERNETES_VERSION
    );
    println!("  - start weir-agent, then a pod whose kubectl does some work (30 s)");
    println!("  - show, replay and verify what was recorded, compare it with the API server's audit log");
    println!("  - stop and remove all of it");
    Ok(())
}

fn confirmed() -> Result<bool> {
    print!("Go ahead? [Y/n] ");
    std::io::stdout().flush().context("cannot write to the terminal")?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).context("cannot read from the terminal")?;
    Ok(matches!(answer.trim().to_lowercase().as_str(), "" | "y" | "yes"))
}

/// Go and Rust side by side: both use their caches, and neither keeps two cores busy all the time. A failure is said at
/// once, since the other side may take minutes yet.
fn build(root: &Path, progress: Progress) -> Result<()> {
    let tell = |side: &str, error: &anyhow::Error| {
        progress.say(&format!(
            "error: the {side} builds failed: {error:#}\nwaiting for the others to end (Ctrl-C ends them)"
        ));
    };
    std::thread::scope(|scope| {
        let go = scope.spawn(|| Components::build(progress).inspect_err(|error| tell("Go", error)));
        let rust = build_rust(root, progress).inspect_err(|error| tell("Rust", error));
        let go = go.join().map_err(|_| anyhow::anyhow!("the Go builds panicked"))?;
        rust?;
        go.map(|_| ())
    })?;
    check_interrupted()
}

fn build_rust(root: &Path, progress: Progress) -> Result<()> {
    progress.step("build the kernel programs", || {
        build_ebpf::run(root, build_ebpf::Options::default()).map(drop)
    })?;
    progress.step("build weir-agent and weir", || {
        native::install()?;
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        command.args(["build", "--locked", "-p", "weir-agent", "-p", "weir"]).current_dir(root);
        let status = command.status().context("cannot start cargo")?;
        ensure!(status.success(), "cargo build failed ({status})");
        Ok(())
    })
}

/// An empty folder for this run; that of the run before goes.
fn journal_folder() -> Result<PathBuf> {
    let folder = Testbed::default_folder()?.with_file_name("weir-demo");
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    Ok(folder)
}

/// Everything between the builds and the end; gives whether the testbed was ours and is gone. Guards take down what is
/// up, whatever fails.
fn story(folder: &Path, progress: Progress) -> Result<bool> {
    let testbed = Testbed::up(&Testbed::default_folder()?, progress)?.down_on_drop();
    let outcome = scenes(&testbed, folder, progress);
    // Our own testbed goes as a whole; one that was up before is left as it was.
    if !testbed.is_started_here() {
        progress.step("remove the demo's namespaces", || remove_namespaces(&testbed))?;
    }
    outcome.map(|()| testbed.is_started_here())
}

fn scenes(testbed: &Testbed, folder: &Path, progress: Progress) -> Result<()> {
    progress.step("prepare namespaces and rights", || {
        remove_namespaces(testbed)?;
        testbed.create_namespace(workload::AGENTS, &[ENROL_LABEL])?;
        testbed.create_namespace(workload::WORK, &[])?;
        testbed.apply(&workload::rights())?;
        testbed.run_pod(&PodSpec::idle(workload::WORK, workload::WORKER)).map(|_| ())
    })?;
    let journal = folder.join("journal");
    let mut agent = progress.step("start weir-agent", || {
        // Again: the builds may have taken minutes.
        agent::refuse_beside_another()?;
        let config = folder.join("agent.yaml");
        agent::write_configuration(
            &agent::configuration(testbed, &journal, TrustSource::ClusterSigner),
            &config,
        )?;
        AgentProcess::start(&config, &folder.join("agent.log"))
    })?;
    let pod = progress.step("start the agent pod", || {
        let spec = PodSpec::idle(workload::AGENTS, workload::AGENT);
        testbed.run_pod(&PodSpec { service_account: workload::AGENT, ..spec })
    })?;
    work(&pod)?;
    progress.step("stop weir-agent", || {
        let status = agent.terminate()?;
        ensure!(status.success(), "the agent ended with {status}\n{}", agent.last_lines());
        Ok(())
    })?;
    show_records(&journal)?;
    check_secret(&journal)?;
    let covered = check_coverage(testbed, &journal, &pod.uid);
    progress.step("remove weir-agent's pins", || agent.uninstall())?;
    covered
}

fn remove_namespaces(testbed: &Testbed) -> Result<()> {
    testbed.delete_namespace(workload::AGENTS)?;
    testbed.delete_namespace(workload::WORK)
}

/// The agent pod's commands, each with its output and duration.
fn work(pod: &Pod<'_>) -> Result<()> {
    for step in workload::steps(AGENT_IMAGE) {
        check_interrupted()?;
        println!("\n[pod {}/{}] {}", pod.namespace, pod.name, step.title);
        let begin = Instant::now();
        let limit = format!("{COMMAND_SECONDS}");
        let output = pod.exec(&["timeout", &limit, "sh", "-c", &step.script])?;
        for line in String::from_utf8_lossy(&output.stdout)
            .lines()
            .chain(String::from_utf8_lossy(&output.stderr).lines())
        {
            println!("    {line}");
        }
        println!("    ({}, {:.1} s)", output.status, begin.elapsed().as_secs_f64());
        ensure!(output.status.success(), "`{}` failed in the pod ({})", step.title, output.status);
    }
    Ok(())
}

/// Sessions, one request in full, the replay of each session, the verdict on the journal.
fn show_records(journal: &Path) -> Result<()> {
    let weir = built_binary("weir")?;
    let show = |title: &str, arguments: &[&str]| -> Result<()> {
        println!("\n$ weir {title}");
        let text = run_command(Command::new(&weir).args(arguments).arg("--from").arg(journal))?;
        for line in text.trim_end().lines().take(SHOWN_LINES_MAX) {
            println!("{line}");
        }
        let more = text.trim_end().lines().count().saturating_sub(SHOWN_LINES_MAX);
        if more > 0 {
            println!(
                "… {more} more lines: {} {} --from {}",
                weir.display(),
                arguments.join(" "),
                journal.display()
            );
        }
        Ok(())
    };
    show("sessions", &["sessions"])?;
    let events = agent::read_events(journal)?;
    let request =
        Coverage::find_request(&events, "POST", "/configmaps").context("the apply was not recorded")?;
    show(&format!("replay --request {request}"), &["replay", "--request", request])?;
    for session in Coverage::sessions(&events) {
        show(&format!("replay {session}"), &["replay", session])?;
    }
    show("verify", &["verify"])
}

/// The value of the Secret went through Weir both ways and must not be in the journal in any form.
fn check_secret(journal: &Path) -> Result<()> {
    let weir = built_binary("weir")?;
    let events = run_command(Command::new(weir).args(["events", "--format", "json", "--from"]).arg(journal))?;
    // base64 of the value as the API server returns it.
    const ENCODED: &str = "Y29ycmVjdC1ob3JzZS1iYXR0ZXJ5LXN0YXBsZQ";
    ensure!(
        !events.contains(workload::SECRET) && !events.contains(ENCODED),
        "the value of the Secret is in the journal"
    );
    println!("\nthe value of the Secret is in no record");
    Ok(())
}

/// Every request that the API server saw from the pod is recorded, and the other way round.
fn check_coverage(testbed: &Testbed, journal: &Path, uid: &str) -> Result<()> {
    let events = agent::read_events(journal)?;
    let compare = || -> Result<Coverage> {
        let entries = audit::finished_by_pod(&testbed.layout().audit_log(), uid)?;
        Ok(Coverage::compare(&entries, &events, uid))
    };
    let waited = wait_until("the audit log and the records to agree", AUDIT_DEADLINE, || {
        Ok(compare()?.is_complete().then_some(()))
    });
    let coverage = compare()?;
    println!("\nCoverage of pod {uid} against the API server's own audit log:\n{coverage}");
    if !coverage.is_complete() {
        waited?;
        bail!("records and audit log do not agree");
    }
    println!("complete: every request of the pod is recorded, every record is in the audit log");
    Ok(())
}
