//! What becomes of an agent that another one has followed: on the host it ends, in a pod it waits to be ended.
//!
//! A DaemonSet's pod whose process ends is started again, and would take over from its successor what it has just given it.

use std::time::Duration;

/// How often it is looked whether there is an agent.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How many times in a row there must be none: an agent that is just being followed, or started again, is missed for a while.
const ABSENT_MAX: u32 = 30;

/// Why it does not wait any longer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Over {
    /// Its pod ends.
    Ended,
    /// No agent has served this node for half a minute: the successor has failed, and whoever starts this pod's process
    /// again brings one back that has worked.
    SuccessorGone,
}

/// Waits for `ended`, or until an agent was looked for in vain, once every `interval`, for long enough.
pub(super) async fn wait<T>(
    ended: impl Future<Output = T>,
    interval: Duration,
    mut an_agent_runs: impl FnMut() -> bool,
) -> Over {
    let mut ended = std::pin::pin!(ended);
    let mut absent = 0;
    while absent < ABSENT_MAX {
        tokio::select! {
            _ = &mut ended => return Over::Ended,
            () = tokio::time::sleep(interval) => {}
        }
        absent = if an_agent_runs() { 0 } else { absent + 1 };
    }
    Over::SuccessorGone
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, future, time::Duration};

    use tokio::sync::oneshot;

    use super::{ABSENT_MAX, Over, wait};

    /// Looks are counted, not time.
    const AT_ONCE: Duration = Duration::from_millis(1);

    #[tokio::test]
    async fn a_followed_agent_waits_for_its_pods_end_as_long_as_there_is_an_agent() {
        let (end, ended) = oneshot::channel();
        let (mut end, looks) = (Some(end), Cell::new(0));
        let over = wait(ended, AT_ONCE, || {
            looks.set(looks.get() + 1);
            if looks.get() == 3 * ABSENT_MAX {
                end.take().expect("is sent once").send(()).expect("is waited for");
            }
            true
        });
        assert_eq!(over.await, Over::Ended);
        assert_eq!(looks.get(), 3 * ABSENT_MAX);
    }

    #[tokio::test]
    async fn it_comes_back_where_its_successor_is_gone_and_not_merely_being_followed() {
        let looks = Cell::new(0);
        let over = wait(future::pending::<()>(), AT_ONCE, || {
            looks.set(looks.get() + 1);
            looks.get() == ABSENT_MAX
        });
        assert_eq!(over.await, Over::SuccessorGone);
        assert_eq!(looks.get(), 2 * ABSENT_MAX);
    }
}
