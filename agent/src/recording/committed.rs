//! What waits until a record is durable.

use std::pin::Pin;

use tokio::sync::oneshot;

use super::{admission::COMMIT_WAIT_MAX, entry::Waiter, error::RecordingError};

/// Ready when a record is durable: what it is about may go on then.
pub type Committed = Pin<Box<dyn Future<Output = Result<(), RecordingError>> + Send>>;

/// Somebody to be told that a record is durable, and what waits for it.
pub(super) fn committed() -> (Waiter, Committed) {
    let (waiter, result) = oneshot::channel();
    let waits = async {
        match tokio::time::timeout(COMMIT_WAIT_MAX, result).await {
            Ok(told) => told.unwrap_or(Err(RecordingError::Closed)),
            Err(_) => Err(RecordingError::TooSlow),
        }
    };
    (waiter, Box::pin(waits))
}
