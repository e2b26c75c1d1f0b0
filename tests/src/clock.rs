//! A clock of its own for one process of a test: the machine's, and so much ahead of it or behind, while that process runs. The
//! machine's clock stays as it is.
//!
//! A time namespace shifts no `CLOCK_REALTIME`. `libfaketime` shifts what a process reads, but not to when it waits (C11's
//! `cnd_timedwait`, by which librdkafka waits): `clock/shifted.c` does both, as the kernel does when somebody sets the clock.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    process::Command,
};

use anyhow::{Context, Result};

use crate::command::run;

/// What is loaded into the process before all else.
const SHIFTED: &str = include_str!("clock/shifted.c");

/// See the module.
#[derive(Debug)]
pub struct ShiftedClock {
    folder: tempfile::TempDir,
    by: File,
}

impl ShiftedClock {
    /// One that is not shifted yet.
    ///
    /// # Errors
    /// There is no C compiler, or no room.
    pub fn new() -> Result<Self> {
        let folder = tempfile::tempdir().context("cannot make a scratch folder")?;
        let path = |name: &str| folder.path().join(name);
        fs::write(path("shifted.c"), SHIFTED).context("cannot write a scratch file")?;
        let mut compile = Command::new("cc");
        compile.args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"]);
        run(compile.arg(path("shifted.so")).arg(path("shifted.c")).arg("-ldl"))?;
        let by = File::create(path("by")).context("cannot write a scratch file")?;
        let this = Self { folder, by };
        this.set(0)?;
        Ok(this)
    }

    /// Sets it so many seconds ahead of the machine's clock; at once, in every process that has it.
    ///
    /// # Errors
    /// There is no room.
    pub fn set(&self, ahead_seconds: i64) -> Result<()> {
        let nanoseconds = ahead_seconds.saturating_mul(1_000_000_000);
        self.by.write_all_at(&nanoseconds.to_ne_bytes(), 0).context("cannot set a clock")
    }

    /// What a process must have in its environment to have this clock. Its children have it too.
    #[must_use]
    pub fn environment(&self) -> [(&'static str, String); 2] {
        let path = |name: &str| self.folder.path().join(name).display().to_string();
        [("LD_PRELOAD", path("shifted.so")), ("WEIR_TEST_CLOCK", path("by"))]
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead as _, BufReader, Write as _},
        process::Stdio,
        time::{Duration, Instant, SystemTime, UNIX_EPOCH},
    };

    use super::*;

    /// Says the time of each clock, then waits by C11 for a second from then, and says how that ended, for each line that it reads.
    const WAITS: &str = r#"
        #include <stdio.h>
        #include <sys/time.h>
        #include <threads.h>
        #include <time.h>
        int main(void) {
            char line[8];
            mtx_t mutex; cnd_t condition;
            mtx_init(&mutex, mtx_plain); cnd_init(&condition);
            while (fgets(line, sizeof line, stdin)) {
                struct timespec read, by_c11; struct timeval by_bsd;
                clock_gettime(CLOCK_REALTIME, &read);
                timespec_get(&by_c11, TIME_UTC);
                gettimeofday(&by_bsd, NULL);
                printf("%ld %ld %ld %ld\n", (long)read.tv_sec, (long)by_c11.tv_sec, (long)by_bsd.tv_sec, (long)time(NULL));
                fflush(stdout);
                read.tv_sec += 1;
                mtx_lock(&mutex);
                int ended = cnd_timedwait(&condition, &mutex, &read);
                mtx_unlock(&mutex);
                puts(ended == thrd_timedout ? "timed out" : "woken");
                fflush(stdout);
            }
        }"#;

    const DAY: i64 = 86_400;
    /// How often each case is tried at most.
    const TRIES: usize = 5;

    #[test]
    fn a_process_reads_and_waits_by_its_own_clock_also_when_that_is_set_meanwhile() {
        let clock = ShiftedClock::new().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let [source, program] = ["waits.c", "waits"].map(|name| folder.path().join(name));
        fs::write(&source, WAITS).unwrap();
        run(Command::new("cc").arg("-o").arg(&program).arg(&source)).unwrap();
        let mut command = Command::new(&program);
        command.envs(clock.environment()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut input = child.stdin.take().unwrap();
        let mut line = || lines.next().unwrap().unwrap();

        // Whether it reads and waits as it should, and what it did.
        let mut try_once = |before: i64, meanwhile: i64, waits: Duration| {
            clock.set(before).unwrap();
            input.write_all(b"\n").unwrap();
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
            let expected = i64::try_from(now.as_secs()).unwrap() + before;
            let read = line();
            let began = Instant::now();
            let reads = |time: &str| (0..=5).contains(&(time.parse::<i64>().unwrap() - expected));
            let reads_well = read.split(' ').all(reads);
            clock.set(meanwhile).unwrap();
            assert_eq!(line(), "timed out");
            let waited = began.elapsed();
            let (least, most) =
                (waits.saturating_sub(Duration::from_millis(300)), waits + Duration::from_millis(900));
            let is_as_told = reads_well && (least..most).contains(&waited);
            (
                is_as_told,
                format!("{before}, then {meanwhile}: {read:?} is to be {expected}, waited {waited:?}"),
            )
        };
        for (before, meanwhile, waits) in [
            (0, 0, Duration::from_secs(1)),
            (DAY, DAY, Duration::from_secs(1)),
            (-DAY, -DAY, Duration::from_secs(1)),
            // Set back by two seconds, it waits so much longer; forward, its time is over.
            (0, -2, Duration::from_secs(3)),
            (0, DAY, Duration::ZERO),
        ] {
            // A busy machine may stand still for a second at any place: one that does as it should is enough.
            let mut seen = Vec::new();
            let is_as_told = (0..TRIES).any(|_| {
                let (is_as_told, what) = try_once(before, meanwhile, waits);
                seen.push(what);
                is_as_told
            });
            assert!(is_as_told, "{seen:#?}");
        }
        drop(input);
        assert!(child.wait().unwrap().success());
    }
}
