//! Sockets that are there before the kernel programs are: made now, all of them, and used when a line comes.

use std::{
    process::ExitCode,
    sync::{Arc, Barrier},
    thread,
};

use crate::{act, said, sockets::Place};

/// Where every thread waits with its socket.
#[derive(Debug)]
pub(crate) struct Gate {
    made: Barrier,
    open: Barrier,
}

impl Gate {
    /// Has made its socket, and waits for all to be used.
    pub(crate) fn wait(&self) {
        self.made.wait();
        self.open.wait();
    }
}

/// Ways and targets in turn; says what came of each in a line of its own, behind its number.
#[expect(clippy::print_stdout, reason = "the verdict is what the program is for")]
pub(crate) fn run(words: &[&str]) -> ExitCode {
    let ways: Vec<[String; 2]> =
        words.chunks_exact(2).map(|pair| [pair[0].to_owned(), pair[1].to_owned()]).collect();
    let count = ways.len() + 1;
    let gate = Arc::new(Gate { made: Barrier::new(count), open: Barrier::new(count) });
    let threads: Vec<_> = ways
        .into_iter()
        .map(|[way, target]| {
            let place = Place { gate: Some(gate.clone()), ..Place::default() };
            thread::spawn(move || act(&[&way, &target], &place))
        })
        .collect();
    gate.made.wait();
    println!("made");
    let mut line = String::new();
    let is_read = std::io::stdin().read_line(&mut line).is_ok();
    gate.open.wait();
    for (number, outcome) in threads.into_iter().enumerate() {
        let outcome = outcome.join().unwrap_or(Err(nix::Error::EIO));
        println!("{number} {}", said(outcome).unwrap_or_default());
    }
    if is_read { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
