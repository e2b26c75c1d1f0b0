//! Reads that a process can hold up: its arguments and environment may lie in memory that a server of its own has to fill
//! (FUSE, userfaultfd). Nothing ends a thread that hangs in one, so each has a place, of its pod and of all, until it
//! returns: what else needs such threads always finds some. What is read is not known here.

use std::{
    collections::HashMap,
    sync::{
        Arc, LazyLock, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout_at},
};

/// Most reads that are under way of one pod's processes.
pub(super) const OF_POD_MAX: usize = 4;
/// Most of all pods' processes: few of the 512 threads that the runtime has for what blocks.
pub(super) const OF_ALL_MAX: usize = 32;
/// From so many pods on those of whom nothing is read are forgotten before one more is told apart.
const PODS_KEPT: usize = 1024;

/// Those of this process, whose threads they bound.
pub(super) static READS: LazyLock<Reads> = LazyLock::new(Reads::default);

/// See the module.
#[derive(Debug)]
pub(super) struct Reads {
    all: Arc<Places>,
    /// By the id of the pod's cgroup.
    pods: Mutex<HashMap<u64, Arc<Places>>>,
}

impl Default for Reads {
    fn default() -> Self {
        Self { all: Arc::new(Places::new(OF_ALL_MAX)), pods: Mutex::default() }
    }
}

impl Reads {
    /// What `read` says of a process of this pod, on a thread for what blocks; none where that takes longer than `longest`, with the
    /// wait for a place. Where whatever has the places has been too long already, nobody waits.
    pub(super) async fn of<T: Send + 'static>(
        &self,
        pod: u64,
        longest: Duration,
        read: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let deadline = Instant::now() + longest;
        let places = [self.of_pod(pod), Arc::clone(&self.all)];
        if places.iter().any(|places| places.are_lost()) {
            return None;
        }
        // That of the pod first: only so many of its reads wait for one of all.
        let mut permits = Vec::new();
        for places in &places {
            permits.push(timeout_at(deadline, places.permit()).await.ok()??);
        }
        let late = Arc::new(Late { places, is: AtomicBool::new(false) });
        let waited_for = WaitedFor(Some(Arc::clone(&late)));
        let read = tokio::task::spawn_blocking(move || {
            // With the thread, whoever still waits for it. No place is free as long as it counts as late.
            let _held = (late, permits);
            read()
        });
        let read = timeout_at(deadline, read).await.ok()?;
        waited_for.until_it_returned();
        read.ok()
    }

    /// How many are under way.
    #[cfg(test)]
    pub(super) fn under_way(&self) -> usize {
        OF_ALL_MAX - self.all.free.available_permits()
    }

    fn of_pod(&self, pod: u64) -> Arc<Places> {
        let mut pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        if pods.len() >= PODS_KEPT && !pods.contains_key(&pod) {
            // A read under way, and who waits for a place, have a reference.
            pods.retain(|_, places| Arc::strong_count(places) > 1);
        }
        Arc::clone(pods.entry(pod).or_insert_with(|| Arc::new(Places::new(OF_POD_MAX))))
    }
}

/// Places of reads under way.
#[derive(Debug)]
struct Places {
    free: Arc<Semaphore>,
    max: usize,
    /// How many are held by reads that nobody waits for any more.
    late: AtomicUsize,
}

impl Places {
    fn new(max: usize) -> Self {
        Self { free: Arc::new(Semaphore::new(max)), max, late: AtomicUsize::new(0) }
    }

    fn are_lost(&self) -> bool {
        self.late.load(Ordering::Relaxed) >= self.max
    }

    /// None would say that the semaphore is closed, which it never is.
    async fn permit(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.free).acquire_owned().await.ok()
    }
}

/// Whether a read has been too long, as long as it has its places.
#[derive(Debug)]
struct Late {
    places: [Arc<Places>; 2],
    is: AtomicBool,
}

/// Of a read under way; one that is dropped before it returned is late.
#[derive(Debug)]
struct WaitedFor(Option<Arc<Late>>);

impl WaitedFor {
    fn until_it_returned(mut self) {
        self.0 = None;
    }
}

impl Drop for WaitedFor {
    fn drop(&mut self) {
        if let Some(late) = self.0.take() {
            late.set();
        }
    }
}

impl Late {
    fn set(&self) {
        self.is.store(true, Ordering::Relaxed);
        for places in &self.places {
            places.late.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Late {
    fn drop(&mut self) {
        if *self.is.get_mut() {
            for places in &self.places {
                places.late.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }
}

/// A folder like `/proc`, in which processes may have entries that hang whoever reads them.
#[cfg(test)]
pub(super) mod hanging {
    use std::{cell::RefCell, fs, os::unix::fs::OpenOptionsExt as _, path::PathBuf, time::Duration};

    use nix::{sys::stat::Mode, unistd::mkfifo};
    use tempfile::TempDir;
    use tokio::runtime::Runtime;

    use super::super::process::Proc;

    /// As the agent's: threads for what blocks are as many as the runtime has by default.
    pub(crate) struct Hanging {
        runtime: Option<Runtime>,
        folder: TempDir,
        pipes: RefCell<Vec<PathBuf>>,
    }

    impl Hanging {
        pub(crate) fn new() -> Self {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
            Self {
                runtime: Some(runtime),
                folder: TempDir::new().expect("a folder"),
                pipes: RefCell::default(),
            }
        }

        pub(crate) fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
            self.runtime.as_ref().expect("is there").block_on(work)
        }

        pub(crate) fn proc(&self) -> Proc {
            Proc::at(self.folder.path())
        }

        /// A process that started with the machine, and what its entry `name` says; none: it hangs.
        pub(crate) fn process(&self, pid: u32, name: &str, says: Option<&str>) {
            let folder = self.folder.path().join(pid.to_string());
            fs::create_dir_all(&folder).expect("a folder");
            fs::write(folder.join("stat"), format!("{pid} (x) S{}", " 0".repeat(40))).expect("is written");
            let entry = folder.join(name);
            match says {
                Some(text) => fs::write(entry, text).expect("is written"),
                None => {
                    mkfifo(&entry, Mode::S_IRUSR | Mode::S_IWUSR).expect("a pipe that nobody writes to");
                    self.pipes.borrow_mut().push(entry);
                }
            }
        }

        /// Lets everything that hangs go on.
        pub(crate) fn release(&self) {
            for pipe in self.pipes.borrow_mut().drain(..) {
                // Open for a moment: who has opened it reads its end, and who comes later finds none.
                let writer = fs::OpenOptions::new()
                    .read(true)
                    .write(true)
                    .custom_flags(libc::O_NONBLOCK)
                    .open(&pipe)
                    .expect("is a pipe");
                fs::remove_file(&pipe).expect("is there");
                drop(writer);
            }
        }
    }

    impl Drop for Hanging {
        fn drop(&mut self) {
            self.release();
            if let Some(runtime) = self.runtime.take() {
                runtime.shutdown_timeout(Duration::from_secs(60));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Arc, Mutex, mpsc},
        time::Duration,
    };

    use super::{OF_ALL_MAX, OF_POD_MAX, PODS_KEPT, Reads};

    /// Longer than any test.
    const LONG: Duration = Duration::from_secs(600);
    const SHORT: Duration = Duration::from_millis(20);

    #[tokio::test]
    async fn what_hangs_keeps_its_places_until_it_returns() {
        let reads = Arc::new(Reads::default());
        let (release, held) = mpsc::channel::<()>();
        let held = Arc::new(Mutex::new(held));
        let pods = OF_ALL_MAX / OF_POD_MAX;
        for pod in 0..pods as u64 + 1 {
            for _ in 0..=OF_POD_MAX {
                let held = Arc::clone(&held);
                let read = move || held.lock().expect("is not poisoned").recv().is_err();
                assert_eq!(reads.of(pod, SHORT, read).await, None);
            }
        }
        assert_eq!(reads.under_way(), OF_ALL_MAX);
        // All of them are late: nobody waits for one.
        assert_eq!(reads.of(1000, LONG, || ()).await, None);
        drop(release);
        while reads.under_way() > 0 || reads.all.are_lost() {
            tokio::task::yield_now().await;
        }
        assert_eq!(reads.of(0, LONG, || 7).await, Some(7));
    }

    #[tokio::test]
    async fn who_comes_while_others_of_the_pod_read_waits_for_them() {
        let reads = Arc::new(Reads::default());
        let mut under_way = Vec::new();
        for _ in 0..OF_POD_MAX {
            let (release, held) = mpsc::channel::<()>();
            let reads = Arc::clone(&reads);
            let read = tokio::spawn(async move { reads.of(1, LONG, move || held.recv().is_err()).await });
            under_way.push((release, read));
        }
        while reads.under_way() < OF_POD_MAX {
            tokio::task::yield_now().await;
        }
        assert_eq!(reads.of(1, SHORT, || ()).await, None);
        assert_eq!(reads.of(2, LONG, || 2).await, Some(2), "another pod's");
        let one_more = {
            let reads = Arc::clone(&reads);
            tokio::spawn(async move { reads.of(1, LONG, || 1).await })
        };
        for (release, read) in under_way {
            drop(release);
            assert_eq!(read.await.expect("ends"), Some(true));
        }
        assert_eq!(one_more.await.expect("ends"), Some(1));
    }

    #[tokio::test]
    async fn pods_of_whom_nothing_is_read_are_forgotten() {
        let reads = Reads::default();
        for pod in 0..3 * PODS_KEPT as u64 {
            assert_eq!(reads.of(pod, LONG, move || pod).await, Some(pod));
        }
        assert!(reads.pods.lock().expect("is not poisoned").len() <= PODS_KEPT);
    }
}
