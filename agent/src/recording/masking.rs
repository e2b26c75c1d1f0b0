//! Whose body of a request is masked next, where it is not small: that may take many times its length of memory, and long.
//! So few are at a time, and of one pod half of them at most: its others wait for each other, and for no longer than for the disk.

use std::{sync::Arc, time::Duration};

use tokio::sync::Semaphore;

use super::{RecordingError, share::Share};

/// Most bodies that are masked at a time.
const OF_ALL_MAX: usize = 4;
/// Most of one pod.
pub(super) const OF_POD_MAX: usize = 2;

/// See the module.
#[derive(Debug)]
pub(super) struct Masking {
    all: Arc<Semaphore>,
}

impl Default for Masking {
    fn default() -> Self {
        Self { all: Arc::new(Semaphore::new(OF_ALL_MAX)) }
    }
}

impl Masking {
    /// Does such work of a pod on a thread for what takes long, when it is its turn.
    ///
    /// # Errors
    /// It is not done within `longest`, or panicked. Work that has begun goes on, and has its turn until it ends.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        share: &Share,
        longest: Duration,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, RecordingError> {
        let done = async {
            let mut permits = Vec::new();
            // That of the pod first: only so many of its bodies wait for a turn of all.
            for turns in [&share.masking, &self.all] {
                // They are never closed.
                permits.push(Arc::clone(turns).acquire_owned().await.map_err(|_| RecordingError::Closed)?);
            }
            let work = tokio::task::spawn_blocking(move || {
                // With the thread, whoever still waits for it.
                let _permits = permits;
                work()
            });
            work.await.map_err(|_| RecordingError::Closed)
        };
        tokio::time::timeout(longest, done).await.unwrap_or(Err(RecordingError::TooSlow))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Arc, mpsc},
        time::{Duration, Instant},
    };

    use super::{
        super::{
            RecordingError,
            fixture::of_pod,
            share::{PodQuota, Shares},
        },
        Masking, OF_ALL_MAX, OF_POD_MAX,
    };

    /// Longer than any test.
    const LONG: Duration = Duration::from_secs(600);
    const SHORT: Duration = Duration::from_millis(20);

    #[tokio::test]
    async fn work_that_hangs_is_not_waited_for_and_keeps_its_turn_until_it_ends() {
        let masking = Masking::default();
        let share = Shares::new(PodQuota::UNLIMITED).of(&of_pod("a", None), Instant::now());
        let (release, held) = mpsc::channel::<()>();
        let hung = masking.run(&share, SHORT, move || held.recv().is_err());
        let hung = tokio::time::timeout(Duration::from_secs(60), hung).await.expect("is not waited for");
        assert!(matches!(hung, Err(RecordingError::TooSlow)), "{hung:?}");
        let free = || (share.masking.available_permits(), masking.all.available_permits());
        assert_eq!(free(), (OF_POD_MAX - 1, OF_ALL_MAX - 1));
        assert!(matches!(masking.run(&share, LONG, || 1).await, Ok(1)));
        drop(release);
        while free() != (OF_POD_MAX, OF_ALL_MAX) {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_pods_works_are_done_in_turn_when_they_are_more_than_its_own() {
        let masking = Arc::new(Masking::default());
        let share = Shares::new(PodQuota::UNLIMITED).of(&of_pod("a", None), Instant::now());
        let works = (0..50).map(|number| masking.run(&share, LONG, move || number));
        let done = futures::future::try_join_all(works).await.expect("all are done");
        assert_eq!(done, (0..50).collect::<Vec<_>>());
    }
}
