//! `limits`: of the running agent.

use std::time::Duration;

use serde::Deserialize;

use super::{
    Limits,
    raw::{Invalid, invalid},
};
use crate::recording::{PodQuota, RESPONSE_BYTES_MAX, SESSION_IDLE_TIMEOUT};

/// Longest time to drain.
const DRAIN_SECONDS_MAX: u64 = 3600;
/// Shortest idle time of a session.
const SESSION_IDLE_TIMEOUT_SECONDS_MIN: u64 = 1;
/// Least bytes of records that a pod must be allowed: a few requests.
const POD_BYTES_MIN: u64 = 1024 * 1024;

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub(super) struct RawLimits {
    /// Seconds that open requests and streams may go on after SIGTERM.
    #[cfg_attr(test, schemars(range(max = DRAIN_SECONDS_MAX)))]
    drain_seconds: u64,
    /// Most bytes of a read's response that are recorded, per request; beyond it the length and a mark.
    response_bytes_max: usize,
    /// Seconds without a request after which a session ends.
    #[cfg_attr(test, schemars(range(min = SESSION_IDLE_TIMEOUT_SECONDS_MIN)))]
    session_idle_timeout_seconds: u64,
    /// Bytes of records that one pod may cause in a second, on and on; above it its requests wait, then are refused, and its
    /// streams are slowed down.
    #[cfg_attr(test, schemars(range(min = POD_BYTES_MIN)))]
    pod_bytes_per_second: u64,
    /// Bytes of records that one pod may cause at once.
    #[cfg_attr(test, schemars(range(min = POD_BYTES_MIN)))]
    pod_burst_bytes: u64,
    /// Per cent of the journal (or of `recording.backlog.bytesMax`) that one pod may fill, once the backlog is more than half
    /// of it.
    #[cfg_attr(test, schemars(range(min = 1, max = 100)))]
    pod_backlog_percent: u8,
}

impl Default for RawLimits {
    fn default() -> Self {
        Self {
            drain_seconds: 30,
            response_bytes_max: RESPONSE_BYTES_MAX,
            session_idle_timeout_seconds: SESSION_IDLE_TIMEOUT.as_secs(),
            pod_bytes_per_second: PodQuota::default().bytes_per_second,
            pod_burst_bytes: PodQuota::default().burst_bytes,
            pod_backlog_percent: PodQuota::default().backlog_percent,
        }
    }
}

impl RawLimits {
    pub(super) fn validate(self) -> Result<Limits, Invalid> {
        if self.drain_seconds > DRAIN_SECONDS_MAX {
            return invalid("limits.drainSeconds", format!("must be at most {DRAIN_SECONDS_MAX}"));
        }
        if self.session_idle_timeout_seconds < SESSION_IDLE_TIMEOUT_SECONDS_MIN {
            let problem = format!("must be at least {SESSION_IDLE_TIMEOUT_SECONDS_MIN}");
            return invalid("limits.sessionIdleTimeoutSeconds", problem);
        }
        for (key, bytes) in
            [("podBytesPerSecond", self.pod_bytes_per_second), ("podBurstBytes", self.pod_burst_bytes)]
        {
            if bytes < POD_BYTES_MIN {
                return invalid(format!("limits.{key}"), format!("must be at least {POD_BYTES_MIN}"));
            }
        }
        if !(1..=100).contains(&self.pod_backlog_percent) {
            return invalid("limits.podBacklogPercent", "must be from 1 to 100");
        }
        Ok(Limits {
            pod_quota: PodQuota {
                bytes_per_second: self.pod_bytes_per_second,
                burst_bytes: self.pod_burst_bytes,
                backlog_percent: self.pod_backlog_percent,
            },
            drain: Duration::from_secs(self.drain_seconds),
            response_bytes_max: self.response_bytes_max,
            session_idle_timeout: Duration::from_secs(self.session_idle_timeout_seconds),
        })
    }
}
