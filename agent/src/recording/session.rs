//! Sessions and invocations: which requests belong together.
//!
//! A session is a caller on a pod towards a cluster, until it has been idle for a time; an invocation is one process
//! within it (one `kubectl` run). Time comes in as a parameter; both tables are bounded.

use std::{
    cmp::Reverse,
    collections::HashMap,
    hash::Hash,
    sync::Arc,
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use http::{HeaderMap, header::AUTHORIZATION};
use uuid::Uuid;
use weir_common::event::Caller;

use super::encryption::SessionKeys;

/// Most sessions at a time; then one ends of the pod that has most.
const SESSIONS_MAX: usize = 4096;

/// Most sessions of one pod at a time; the one idle longest ends for a new one.
const SESSIONS_PER_POD_MAX: usize = 256;

/// Most invocations of a session at a time; the one idle longest ends for a new one.
const INVOCATIONS_MAX: usize = 256;

/// Most bytes of a claimed user name that are kept.
const USER_BYTES_MAX: usize = 256;

/// Most bytes of a JWT that is looked into for its subject.
const JWT_BYTES_MAX: usize = 16 * 1024;

/// The pod's UID, or the user id outside a pod.
type Subject = Result<String, u32>;

/// What makes a caller of a subject.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct CallerKey {
    /// The user that Weir has verified, or else the one that is claimed.
    user: Result<String, Option<String>>,
    cluster: usize,
}

/// A process, told from a later one with the same id by its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct ProcessKey {
    pid: u32,
    start_boottime_ns: u64,
}

#[derive(Debug)]
struct Session {
    keys: Arc<SessionKeys>,
    used: Instant,
    invocations: HashMap<ProcessKey, Invocation>,
}

#[derive(Debug)]
struct Invocation {
    id: Arc<str>,
    used: Instant,
}

/// The sessions of a recorder.
#[derive(Debug)]
pub(super) struct Sessions {
    /// Those of a subject together: one that begins many ends its own.
    open: HashMap<Subject, HashMap<CallerKey, Session>>,
    idle_timeout: Duration,
}

/// Where a request belongs, and what of it is new.
#[derive(Clone, Debug)]
pub(super) struct Belonging {
    pub(super) session: Arc<SessionKeys>,
    pub(super) session_is_new: bool,
    pub(super) invocation: Option<Arc<str>>,
    pub(super) invocation_is_new: bool,
}

/// A new id: UUIDv7, so that ids sort by time.
pub(super) fn new_id() -> Arc<str> {
    Uuid::now_v7().to_string().into()
}

impl Sessions {
    pub(super) fn new(idle_timeout: Duration) -> Self {
        Self { open: HashMap::new(), idle_timeout }
    }

    /// Finds or starts session and invocation of a request.
    pub(super) fn belonging(&mut self, caller: &Caller, cluster: usize, now: Instant) -> Belonging {
        let uid = caller.process.as_ref().map_or(u32::MAX, |process| process.uid);
        let subject = caller.pod.as_ref().map(|pod| pod.uid.clone()).ok_or(uid);
        let user = caller.user.clone().ok_or_else(|| caller.claimed_user.clone());
        let key = CallerKey { user, cluster };
        let alive = |session: &Session| now.saturating_duration_since(session.used) < self.idle_timeout;
        let known = self.open.get(&subject).and_then(|sessions| sessions.get(&key));
        let session_is_new = !known.is_some_and(alive);
        if session_is_new {
            self.make_room(&subject, &key);
        }
        let session = self.open.entry(subject).or_default().entry(key).or_insert_with(|| Session {
            keys: Arc::new(SessionKeys::new(new_id())),
            used: now,
            invocations: HashMap::new(),
        });
        session.used = now;
        let mut belonging = Belonging {
            session: Arc::clone(&session.keys),
            session_is_new,
            invocation: None,
            invocation_is_new: false,
        };
        if let Some(process) = &caller.process {
            let key = ProcessKey { pid: process.pid, start_boottime_ns: process.start_boottime_ns };
            belonging.invocation_is_new = !session.invocations.contains_key(&key);
            if belonging.invocation_is_new {
                evict(&mut session.invocations, INVOCATIONS_MAX, |invocation| invocation.used);
            }
            let invocation =
                session.invocations.entry(key).or_insert_with(|| Invocation { id: new_id(), used: now });
            invocation.used = now;
            belonging.invocation = Some(Arc::clone(&invocation.id));
        }
        belonging
    }

    /// Ends what must end for a new session: its predecessor, one of the same pod, or one of the pod that has most.
    fn make_room(&mut self, subject: &Subject, key: &CallerKey) {
        if let Some(own) = self.open.get_mut(subject) {
            own.remove(key);
            evict(own, SESSIONS_PER_POD_MAX, |session| session.used);
        }
        self.open.retain(|_, sessions| !sessions.is_empty());
        if self.open.values().map(HashMap::len).sum::<usize>() >= SESSIONS_MAX
            && let Some(most) = self.open.values_mut().max_by_key(|sessions| {
                // Of those with as many: the one with what was idle longest.
                (sessions.len(), Reverse(sessions.values().map(|session| session.used).min()))
            })
        {
            evict(most, most.len(), |session| session.used);
        }
    }

    /// Ends all sessions: their beginnings may be among events that were lost.
    pub(super) fn forget(&mut self) {
        self.open.clear();
    }
}

/// Makes room for one more by removing what was used longest ago.
fn evict<K: Clone + Eq + Hash, V>(table: &mut HashMap<K, V>, most: usize, used: impl Fn(&V) -> Instant) {
    while table.len() >= most {
        let Some(oldest) = table.iter().min_by_key(|(_, value)| used(value)).map(|(key, _)| key.clone())
        else {
            return;
        };
        table.remove(&oldest);
    }
}

/// The subject that a bearer token claims. It is not verified: the API server does that.
pub(super) fn claimed_user(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("bearer") || token.len() > JWT_BYTES_MAX {
        return None;
    }
    let payload = URL_SAFE_NO_PAD.decode(token.trim().split('.').nth(1)?).ok()?;
    let claims: serde_json::Value = serde_json::from_slice(&payload).ok()?;
    let subject = claims.get("sub")?.as_str()?;
    let plain =
        !subject.is_empty() && subject.len() <= USER_BYTES_MAX && !subject.chars().any(char::is_control);
    plain.then(|| subject.to_owned())
}

#[cfg(test)]
mod tests {
    use std::{
        collections::HashMap,
        time::{Duration, Instant},
    };

    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
    use http::HeaderMap;
    use weir_common::event::{Caller, Pod, Process};

    use super::{INVOCATIONS_MAX, SESSIONS_MAX, SESSIONS_PER_POD_MAX, Sessions, claimed_user};

    fn caller(pod: &str, pid: u32, user: Option<&str>) -> Caller {
        Caller {
            pod: Some(Pod { uid: pod.into(), ..Pod::default() }),
            process: Some(Process { pid, start_boottime_ns: 1, ..Process::default() }),
            claimed_user: user.map(str::to_owned),
            ..Caller::default()
        }
    }

    fn count(sessions: &Sessions) -> usize {
        sessions.open.values().map(HashMap::len).sum()
    }

    #[test]
    fn a_session_is_a_caller_on_a_pod_towards_a_cluster_and_an_invocation_a_process() {
        let mut sessions = Sessions::new(Duration::from_secs(60));
        let now = Instant::now();
        let first = sessions.belonging(&caller("a", 1, None), 0, now);
        assert!(first.session_is_new && first.invocation_is_new);
        let again = sessions.belonging(&caller("a", 1, None), 0, now);
        assert_eq!((again.session.id(), &again.invocation), (first.session.id(), &first.invocation));
        assert!(!again.session_is_new && !again.invocation_is_new);
        let process = sessions.belonging(&caller("a", 2, None), 0, now);
        assert_eq!(process.session.id(), first.session.id());
        assert!(process.invocation_is_new);
        for (other, cluster) in
            [(caller("b", 1, None), 0), (caller("a", 1, Some("u")), 0), (caller("a", 1, None), 1)]
        {
            assert!(sessions.belonging(&other, cluster, now).session_is_new, "{other:?} {cluster}");
        }
    }

    #[test]
    fn a_session_ends_when_it_has_been_idle() {
        let mut sessions = Sessions::new(Duration::from_secs(60));
        let start = Instant::now();
        let first = sessions.belonging(&caller("a", 1, None), 0, start);
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(sessions.belonging(&caller("a", 1, None), 0, at(59)).session.id(), first.session.id());
        assert_eq!(sessions.belonging(&caller("a", 1, None), 0, at(118)).session.id(), first.session.id());
        let later = sessions.belonging(&caller("a", 1, None), 0, at(178));
        assert!(later.session_is_new && later.invocation_is_new);
        assert_ne!(later.session.id(), first.session.id());
    }

    #[test]
    fn tables_stay_bounded_and_lose_what_is_idle_longest() {
        let mut sessions = Sessions::new(Duration::from_secs(60));
        let now = Instant::now();
        for n in 0..SESSIONS_MAX as u32 + 10 {
            sessions.belonging(&caller(&n.to_string(), 1, None), 0, now + Duration::from_micros(n.into()));
        }
        assert_eq!(count(&sessions), SESSIONS_MAX);
        assert!(sessions.belonging(&caller("0", 1, None), 0, now).session_is_new);
        for n in 0..INVOCATIONS_MAX as u32 + 10 {
            sessions.belonging(&caller("p", n, None), 0, now);
        }
        let mut all = sessions.open.values().flat_map(HashMap::values);
        assert!(all.all(|session| session.invocations.len() <= INVOCATIONS_MAX));
    }

    #[test]
    fn a_pod_that_begins_many_sessions_ends_its_own() {
        let mut sessions = Sessions::new(Duration::from_secs(60));
        let start = Instant::now();
        let quiet = sessions.belonging(&caller("quiet", 1, None), 0, start);
        for n in 1..=SESSIONS_MAX as u32 {
            let now = start + Duration::from_micros(n.into());
            sessions.belonging(&caller("greedy", 1, Some(&n.to_string())), 0, now);
        }
        assert_eq!(count(&sessions), SESSIONS_PER_POD_MAX + 1);
        // Pods that have many between them lose theirs first, too.
        for n in 0..SESSIONS_MAX as u32 + 10 {
            let now = start + Duration::from_millis(100) + Duration::from_micros(n.into());
            sessions.belonging(&caller(&format!("greedy-{}", n % 40), 1, Some(&n.to_string())), 0, now);
        }
        assert_eq!(count(&sessions), SESSIONS_MAX);
        let again = sessions.belonging(&caller("quiet", 1, None), 0, start + Duration::from_secs(1));
        assert_eq!((again.session_is_new, again.session.id()), (false, quiet.session.id()));
    }

    #[test]
    fn the_claimed_user_is_the_subject_of_a_bearer_jwt_and_nothing_else() {
        let with = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("authorization", value.parse().unwrap());
            claimed_user(&headers)
        };
        let payload = URL_SAFE_NO_PAD.encode(r#"{"sub":"system:serviceaccount:a:b"}"#);
        assert_eq!(with(&format!("Bearer h.{payload}.s")).as_deref(), Some("system:serviceaccount:a:b"));
        for value in ["Bearer opaque", "Basic dTpw", "Bearer a.!!!.c", "Bearer a.e30.c"] {
            assert_eq!(with(value), None, "{value}");
        }
        assert_eq!(claimed_user(&HeaderMap::new()), None);
    }
}
