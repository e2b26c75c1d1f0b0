//! Tokens and the credentials they are signed with, kept until shortly before they end: one call of STS for all who wait for
//! the same role, session and cluster.
//!
//! A hit takes one short lock and no await. A miss starts a *flight*, a task that everyone who asks meanwhile waits for; it goes
//! on when they give up. While an entry is in use it is renewed ahead, beside the requests; unused, it ends with its credentials.
//! A failure is kept for a while as well, so that a refused or throttled caller does not ask again for each request.

use std::{
    collections::HashMap,
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwapOption;
use futures::future::BoxFuture;
use tokio::sync::{Semaphore, watch};

use super::{
    Bearer,
    credentials::Credentials,
    eks_token::{self, TOKEN_LIFE},
    error::StsError,
    measures::Counters,
    request::{Key, Role, RoleRequest},
};

/// Most roles × sessions × clusters at a time; the one unused longest makes room.
const ENTRIES_MAX: usize = 4096;
/// Most flights at a time: STS is asked by every node of an account.
const FLIGHTS_MAX: usize = 32;
/// For one flight with all its calls and tries.
const FLIGHT_TIMEOUT: Duration = Duration::from_secs(20);
/// Before its end a token is used no more: the request must arrive, and clocks differ.
const TOKEN_END_MARGIN: Duration = Duration::from_mins(1);
/// Before its end of use a token that is in use is renewed.
const RENEW_AHEAD: Duration = Duration::from_mins(3);
/// Credentials that are still valid for so long may sign while STS cannot be asked for new ones.
const STOPGAP_MIN: Duration = Duration::from_mins(2);
/// For so long a failure is the answer for everyone, where STS did not say for how long.
const FAILURE_LIFE: Duration = Duration::from_secs(5);
/// A token that is younger is not forgotten.
const FORGET_AFTER: Duration = Duration::from_secs(30);
/// Between two looks for entries that have ended.
const SWEEP_INTERVAL: Duration = Duration::from_mins(1);

/// Who is asked for credentials.
pub(super) trait AssumesRoles: Send + Sync + 'static {
    /// Assumes `role` by way of the STS of `region`.
    fn assume<'a>(&'a self, region: &'a str, role: &'a Role) -> BoxFuture<'a, Result<Credentials, StsError>>;

    /// Host of the STS of `region`.
    fn host<'a>(&'a self, region: &'a str) -> BoxFuture<'a, Result<String, StsError>>;
}

/// The time of day.
pub(super) type Clock = Box<dyn Fn() -> SystemTime + Send + Sync>;

/// The cache; a clone is the same one.
#[derive(Clone)]
pub(super) struct Cache(Arc<Shared>);

struct Shared {
    sts: Box<dyn AssumesRoles>,
    clock: Clock,
    table: Mutex<Table>,
    flights: Semaphore,
    /// Counts requests: who has the smallest number is unused longest.
    uses: AtomicU64,
    counters: Counters,
}

struct Table {
    entries: HashMap<Key, Arc<Entry>>,
    swept: SystemTime,
}

struct Entry {
    request: RoleRequest,
    token: ArcSwapOption<Token>,
    last_use: AtomicU64,
    state: Mutex<State>,
}

struct Token {
    bearer: Bearer,
    signed: SystemTime,
    renew_at: SystemTime,
    end: SystemTime,
}

#[derive(Default)]
struct State {
    credentials: Option<Arc<Credentials>>,
    flight: Option<watch::Receiver<Option<Outcome>>>,
    /// The last failure, and from when until when it is the answer: not before it came, where the clock was set back since.
    failure: Option<(StsError, Range<SystemTime>)>,
}

impl Token {
    /// Whether the time has come for which it was signed: where it was signed by a clock that was ahead, nobody takes it yet.
    fn is_signed(&self, now: SystemTime) -> bool {
        self.signed <= now + TOKEN_END_MARGIN
    }
}

type Outcome = Result<Bearer, StsError>;

/// What comes of the wish for a new token.
enum Flight {
    /// It is there already.
    Landed(Bearer),
    /// It failed a moment ago.
    Refused(StsError),
    /// It is on its way.
    Awaited(watch::Receiver<Option<Outcome>>),
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these guard is whole between any two statements.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Cache {
    pub(super) fn new(sts: impl AssumesRoles, clock: Clock) -> Self {
        let table = Table { entries: HashMap::new(), swept: clock() };
        Self(Arc::new(Shared {
            sts: Box::new(sts),
            clock,
            table: Mutex::new(table),
            flights: Semaphore::new(FLIGHTS_MAX),
            uses: AtomicU64::new(0),
            counters: Counters::default(),
        }))
    }

    pub(super) fn counters(&self) -> &Counters {
        &self.0.counters
    }

    /// Entries at the moment.
    pub(super) fn len(&self) -> usize {
        locked(&self.0.table).entries.len()
    }

    pub(super) async fn bearer(&self, request: &RoleRequest) -> Outcome {
        let now = (self.0.clock)();
        let entry = self.0.entry(request, now)?;
        if let Some(bearer) = self.usable(&entry, now) {
            self.0.counters.hit();
            return Ok(bearer);
        }
        let mut flight = match self.flight(&entry, now) {
            Flight::Landed(bearer) => return Ok(bearer),
            Flight::Refused(error) => {
                self.0.counters.refused();
                return Err(error);
            }
            Flight::Awaited(flight) => flight,
        };
        self.0.counters.waited();
        let landed = flight.wait_for(Option::is_some).await.map_err(|_| StsError::Abandoned)?;
        landed.clone().unwrap_or(Err(StsError::Abandoned))
    }

    /// Whether a request whose token the cluster did not take can have another one. If that is what is kept, it is forgotten
    /// with its credentials; not if it is new: whoever is refused again and again must not have STS asked again and again.
    pub(super) fn forget(&self, request: &RoleRequest, refused: &Bearer) -> bool {
        let now = (self.0.clock)();
        let mut table = locked(&self.0.table);
        let Some(entry) = table.entries.get(&request.key()).cloned() else { return true };
        // Another request may have had it forgotten, and a new one may be there or on its way.
        let token = entry.token.load();
        let Some(token) = token.as_ref().filter(|token| token.bearer.is(refused)) else { return true };
        if token.is_signed(now) && now < token.signed + FORGET_AFTER {
            return false;
        }
        table.entries.remove(&request.key());
        self.0.counters.forgotten();
        true
    }

    fn usable(&self, entry: &Arc<Entry>, now: SystemTime) -> Option<Bearer> {
        let token = entry.token.load();
        let token = token.as_ref().filter(|token| token.is_signed(now) && now < token.end)?;
        if now >= token.renew_at {
            // Nobody waits for it; how it ends is seen when this token ends.
            let _beside = self.flight(entry, now);
        }
        Some(token.bearer.clone())
    }

    /// The flight that is on its way, or a new one if there is a reason for it.
    fn flight(&self, entry: &Arc<Entry>, now: SystemTime) -> Flight {
        let mut state = locked(&entry.state);
        if let Some(flight) = &state.flight {
            return Flight::Awaited(flight.clone());
        }
        // One may have landed since the caller looked.
        let is_landed = |token: &&Arc<Token>| token.is_signed(now) && now < token.renew_at;
        if let Some(token) = entry.token.load().as_ref().filter(is_landed) {
            return Flight::Landed(token.bearer.clone());
        }
        if let Some((failure, time)) = &state.failure
            && time.contains(&now)
        {
            return Flight::Refused(failure.clone());
        }
        let (landing, flight) = watch::channel(None);
        state.flight = Some(flight.clone());
        drop(state);
        let (shared, seat) = (self.0.clone(), Seat(entry.clone()));
        // Not joined: whoever waits sees by the channel how it ended, also if it panics.
        tokio::spawn(async move {
            let outcome = shared.fly(&seat.0).await;
            // In this order: who finds no flight any more must find what it brought.
            drop(seat);
            landing.send_replace(Some(outcome));
        });
        Flight::Awaited(flight)
    }
}

/// Takes the flight out of its entry when it ends, however it ends.
struct Seat(Arc<Entry>);

impl Drop for Seat {
    fn drop(&mut self) {
        locked(&self.0.state).flight = None;
    }
}

impl Shared {
    fn entry(&self, request: &RoleRequest, now: SystemTime) -> Result<Arc<Entry>, StsError> {
        let used = self.uses.fetch_add(1, Ordering::Relaxed);
        let mut table = locked(&self.table);
        if let Some(entry) = table.entries.get(&request.key()) {
            entry.last_use.store(used, Ordering::Relaxed);
            return Ok(entry.clone());
        }
        let is_due = now.duration_since(table.swept).map_or(true, |since| since >= SWEEP_INTERVAL);
        if is_due || table.entries.len() >= ENTRIES_MAX {
            table.sweep(now);
        }
        if table.entries.len() >= ENTRIES_MAX {
            table.evict()?;
            self.counters.evicted();
        }
        let entry = Arc::new(Entry {
            request: request.clone(),
            token: ArcSwapOption::empty(),
            last_use: AtomicU64::new(used),
            state: Mutex::default(),
        });
        table.entries.insert(request.key(), entry.clone());
        Ok(entry)
    }

    /// One flight: credentials if need be, then a token, both into the entry.
    async fn fly(&self, entry: &Entry) -> Outcome {
        let renewed = tokio::time::timeout(FLIGHT_TIMEOUT, self.renew(entry)).await;
        let outcome = renewed.unwrap_or_else(|_| {
            let region = entry.request.cluster().region().into();
            Err(StsError::Unreachable { region, cause: "no answer in time".into() })
        });
        let mut state = locked(&entry.state);
        match &outcome {
            Ok(_) => state.failure = None,
            Err(error) => {
                self.counters.failed(error);
                let life = error.retry_after().unwrap_or(FAILURE_LIFE);
                let now = (self.clock)();
                // Who waits for this read the clock before.
                state.failure = Some((error.clone(), now - TOKEN_END_MARGIN..now + life));
                let role = entry.request.role().arn();
                tracing::warn!(event = "no-role-credentials", %role, error = %error, detail = error.detail(), "no credentials for a role");
            }
        }
        outcome
    }

    async fn renew(&self, entry: &Entry) -> Outcome {
        let region = entry.request.cluster().region();
        let host = self.sts.host(region).await?;
        let held = locked(&entry.state).credentials.clone();
        let left = |credentials: &Credentials| {
            credentials.expires.duration_since((self.clock)()).unwrap_or(Duration::ZERO)
        };
        // A token cannot outlive the credentials that signed it.
        if let Some(held) = held.as_ref().filter(|held| left(held) >= TOKEN_LIFE) {
            return self.sign(entry, held, &host);
        }
        match self.assume(entry, region).await {
            Ok(credentials) => {
                let credentials = Arc::new(credentials);
                let bearer = self.sign(entry, &credentials, &host)?;
                locked(&entry.state).credentials = Some(credentials);
                Ok(bearer)
            }
            Err(error @ (StsError::Throttled { .. } | StsError::Unreachable { .. })) => {
                match held.filter(|held| left(held) >= STOPGAP_MIN) {
                    Some(held) if !self.has_time(entry) => self.sign(entry, &held, &host),
                    _ => Err(error),
                }
            }
            Err(error) => Err(error),
        }
    }

    /// Whether the entry's token can still be used without a stopgap.
    fn has_time(&self, entry: &Entry) -> bool {
        entry.token.load().as_ref().is_some_and(|token| (self.clock)() + FAILURE_LIFE < token.end)
    }

    async fn assume(&self, entry: &Entry, region: &str) -> Result<Credentials, StsError> {
        // Closed never; the limit is FLIGHT_TIMEOUT's.
        let _seat = self.flights.acquire().await.map_err(|_| StsError::Abandoned)?;
        self.counters.asked();
        self.sts.assume(region, entry.request.role()).await
    }

    fn sign(&self, entry: &Entry, credentials: &Credentials, host: &str) -> Outcome {
        let now = (self.clock)();
        let end = credentials.expires.min(now + TOKEN_LIFE);
        let Some(end) = end.checked_sub(TOKEN_END_MARGIN).filter(|end| *end > now) else {
            let message = "it gave credentials that have expired by this node's clock".into();
            return Err(StsError::ClockSkew { message });
        };
        let header = eks_token::authorization(credentials, entry.request.cluster(), host, now)?;
        let bearer = Bearer::new(header, credentials, entry.request.role(), end);
        let renew_at = end.checked_sub(RENEW_AHEAD).unwrap_or(now).max(now);
        entry.token.store(Some(Arc::new(Token { bearer: bearer.clone(), signed: now, renew_at, end })));
        self.counters.signed();
        Ok(bearer)
    }
}

impl Table {
    /// Drops what has ended, and with it credentials that nobody uses any more.
    fn sweep(&mut self, now: SystemTime) {
        self.swept = now;
        self.entries.retain(|_, entry| {
            let state = locked(&entry.state);
            state.flight.is_some()
                || state.credentials.as_ref().is_some_and(|held| now < held.expires)
                || state.failure.as_ref().is_some_and(|(_, time)| time.contains(&now))
                // Just made, and its flight not yet begun.
                || Arc::strong_count(entry) > 1
        });
    }

    /// Makes room by the entry that is unused longest; one that is waited for stays.
    fn evict(&mut self) -> Result<(), StsError> {
        let idle = self.entries.iter().filter(|(_, entry)| locked(&entry.state).flight.is_none());
        let oldest = idle.min_by_key(|(_, entry)| entry.last_use.load(Ordering::Relaxed));
        let key = oldest.map(|(key, _)| *key).ok_or(StsError::Busy)?;
        self.entries.remove(&key);
        Ok(())
    }
}
