//! An STS and a clock in the hands of tests, in the place of AWS.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use futures::future::BoxFuture;
use tokio::sync::Semaphore;
use zeroize::Zeroizing;

use super::{
    Aws,
    cache::{AssumesRoles, Cache},
    credentials::Credentials,
    error::StsError,
    identifier::RoleArn,
    request::Role,
};

const START_S: u64 = 1_767_225_600;

/// An STS and a clock in the hands of a test.
#[derive(Clone)]
pub(crate) struct World(pub(super) Arc<Parts>);

pub(super) struct Parts {
    pub(super) calls: AtomicUsize,
    pub(super) now_s: AtomicU64,
    pub(super) life: Mutex<Duration>,
    pub(super) failure: Mutex<Option<StsError>>,
    /// A call takes one permit for good; the tests that hold calls back start with none.
    pub(super) permits: Semaphore,
    pub(super) panics: Mutex<bool>,
}

impl World {
    /// Of an STS that answers so many calls.
    pub(crate) fn new(permits: usize) -> Self {
        Self(Arc::new(Parts {
            calls: AtomicUsize::new(0),
            now_s: AtomicU64::new(START_S),
            life: Mutex::new(Duration::from_hours(1)),
            failure: Mutex::new(None),
            permits: Semaphore::new(permits),
            panics: Mutex::new(false),
        }))
    }

    /// Where its roles come from.
    pub(crate) fn aws(&self) -> Aws {
        Aws { cache: self.cache() }
    }

    pub(super) fn cache(&self) -> Cache {
        let world = self.clone();
        Cache::new(self.clone(), Box::new(move || world.now()))
    }

    pub(super) fn now(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(self.0.now_s.load(Ordering::Relaxed))
    }

    pub(crate) fn after(&self, minutes: u64) {
        self.0.now_s.fetch_add(minutes * 60, Ordering::Relaxed);
    }

    /// Somebody sets its clock back.
    pub(super) fn set_back(&self, days: u64) {
        self.0.now_s.fetch_sub(days * 86_400, Ordering::Relaxed);
    }

    pub(crate) fn calls(&self) -> usize {
        self.0.calls.load(Ordering::Relaxed)
    }

    pub(crate) fn fail(&self, error: impl Into<Option<StsError>>) {
        *self.0.failure.lock().unwrap() = error.into();
    }
}

impl AssumesRoles for World {
    fn assume<'a>(&'a self, _: &'a str, role: &'a Role) -> BoxFuture<'a, Result<Credentials, StsError>> {
        Box::pin(async move {
            let call = self.0.calls.fetch_add(1, Ordering::Relaxed) + 1;
            self.0.permits.acquire().await.unwrap().forget();
            assert!(!*self.0.panics.lock().unwrap(), "as the test wants it");
            if let Some(error) = self.0.failure.lock().unwrap().clone() {
                return Err(error);
            }
            Ok(Credentials {
                access_key_id: format!("ASIA{call}"),
                secret_access_key: Zeroizing::new("secret".to_owned()),
                session_token: Zeroizing::new("token".to_owned()),
                expires: self.now() + *self.0.life.lock().unwrap(),
                assumed_role_arn: format!("{}/{}", role.arn(), role.session_name().as_str()),
            })
        })
    }

    fn host<'a>(&'a self, region: &'a str) -> BoxFuture<'a, Result<String, StsError>> {
        Box::pin(async move { Ok(format!("sts.{region}.amazonaws.com")) })
    }
}

/// That AWS does not give a role.
pub(crate) fn denied() -> StsError {
    StsError::Denied {
        role: RoleArn::parse("arn:aws:iam::123456789012:role/deploy").unwrap(),
        message: "no".into(),
    }
}
