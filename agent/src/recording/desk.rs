//! Where jobs wait for one thread, and how the thread rests when there are none.
//!
//! A thread that is woken for each job costs a system call, and switches of threads, which together are more than to mask a small answer. So one
//! that has just worked looks again after a moment by itself; only what somebody waits for, and many jobs, wake it before that.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    task::Wake,
    time::Duration,
};

use super::jobs::{Jobs, Turn};

/// A thread that has just worked looks again after this time without being woken.
const LINGER: Duration = Duration::from_millis(1);

/// So many jobs wake it before that.
const LINGER_JOBS_MAX: usize = 64;

/// See the module.
#[derive(Debug)]
pub(super) struct Desk<T> {
    state: Mutex<State<T>>,
    work: Condvar,
}

#[derive(Debug)]
struct State<T> {
    jobs: Jobs<T>,
    ends: bool,
    rest: Rest,
    /// Whether the thread has worked since it rested.
    has_worked: bool,
    /// Jobs that came while it rested.
    came: usize,
}

/// How the thread rests, if it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    /// It works.
    No,
    /// It looks by itself soon.
    Lingers,
    /// It must be woken.
    Waits,
}

// Not derived: that would ask the same of the jobs.
impl<T> Default for Desk<T> {
    fn default() -> Self {
        let (ends, rest, has_worked, came) = (false, Rest::No, false, 0);
        let state = State { jobs: Jobs::default(), ends, rest, has_worked, came };
        Self { state: Mutex::new(state), work: Condvar::new() }
    }
}

impl<T> Desk<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a job there; after the end it is dropped.
    pub(super) fn put(&self, lane: u64, job: T, is_awaited: bool) {
        let mut state = self.lock();
        if state.ends {
            return;
        }
        state.jobs.push(lane, job);
        state.came += 1;
        let wakes = match state.rest {
            Rest::No => false,
            Rest::Lingers => is_awaited || state.came == LINGER_JOBS_MAX,
            Rest::Waits => true,
        };
        // Without the lock, which the thread takes first of all.
        drop(state);
        if wakes {
            self.work.notify_one();
        }
    }

    /// The next job, when there is one; none: all is done, and nothing more comes.
    pub(super) fn next(&self) -> Option<(Turn, T)> {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.take() {
                state.has_worked = true;
                return Some(job);
            }
            if state.ends && state.jobs.is_empty() {
                return None;
            }
            state.came = 0;
            let lingers = std::mem::take(&mut state.has_worked) && !state.ends;
            state.rest = if lingers { Rest::Lingers } else { Rest::Waits };
            state = if lingers {
                self.work.wait_timeout(state, LINGER).unwrap_or_else(PoisonError::into_inner).0
            } else {
                self.work.wait(state).unwrap_or_else(PoisonError::into_inner)
            };
            state.rest = Rest::No;
        }
    }

    /// A job is done.
    pub(super) fn done(&self, turn: &Turn) {
        self.lock().jobs.done(turn);
    }

    /// What is left of a job found no room.
    pub(super) fn put_back(&self, turn: &Turn, rest: T) {
        self.lock().jobs.put_back(turn, rest);
    }

    /// Nothing more comes.
    pub(super) fn end(&self) {
        self.lock().ends = true;
        self.work.notify_one();
    }

    /// Jobs that wait.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.lock().jobs.len()
    }

    /// How many lanes are passed over, if all are.
    #[cfg(test)]
    pub(super) fn stuck(&self) -> Option<usize> {
        self.lock().jobs.stuck()
    }
}

impl<T: Send + 'static> Wake for Desk<T> {
    /// There is room before the writer.
    fn wake(self: Arc<Self>) {
        self.lock().jobs.resume();
        self.work.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, mpsc};

    use super::{Desk, LINGER_JOBS_MAX};

    /// None of them is lost, however the thread rests: it works, lingers, or waits.
    #[test]
    fn each_job_is_done_whether_or_not_its_thread_is_woken_for_it() {
        let desk = Arc::new(Desk::default());
        let (done, jobs) = mpsc::channel();
        let worker = Arc::clone(&desk);
        let thread = std::thread::spawn(move || {
            while let Some((turn, job)) = worker.next() {
                worker.done(&turn);
                done.send(job).unwrap();
            }
        });
        for number in 0..2000_usize {
            desk.put(number as u64 % 3, number, number % 7 == 0);
            if number % 5 == 0 {
                // It has nothing to do any more now, and rests.
                while jobs.recv().unwrap() != number {}
            }
        }
        for number in 0..2 * LINGER_JOBS_MAX {
            desk.put(0, number, false);
        }
        desk.end();
        thread.join().unwrap();
        assert_eq!(jobs.iter().last(), Some(2 * LINGER_JOBS_MAX - 1));
        desk.put(0, 0, true);
        assert_eq!(desk.waiting(), 0, "after the end nothing is taken in");
    }
}
