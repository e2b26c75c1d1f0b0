//! Whether content is encrypted, and for whom.

use uuid::Uuid;
use weir_common::{
    encryption::{Recipient, kms_context},
    kms::Kms,
};

use super::{Check, Need};
use crate::{config::Config, recipients};

/// An agent whose recipients cannot be read does not start.
pub(super) fn recipients(config: &Config) -> Option<Check> {
    let files = &config.recording.recipient_files;
    if files.is_empty() {
        return None;
    }
    Some(match recipients::read_all(files) {
        Err(error) => Check::failed("encryption", Need::Must, &error),
        Ok(recipients) => {
            let names: Vec<_> = recipients.iter().map(Recipient::name).collect();
            let found = format!("content is encrypted for {}", names.join(", "));
            if names.len() == 1 && config.recording.kms.is_none() {
                let mend = "name a second recipient, whose identity lies in a safe: who loses the only one loses all content";
                return Some(Check::bad("encryption", Need::Should, found, mend));
            }
            Check::good("encryption", Need::Should, found)
        }
    })
}

/// The key service wraps a key of zeros, which is used for nothing. An agent starts without it, and refuses what has content.
pub(super) async fn key_service(config: &Config) -> Option<Check> {
    let key = config.recording.kms.clone()?;
    let found = format!("keys of content are wrapped with {}", key.arn.as_str());
    // In the form of all others, which a key policy may ask for.
    let context = kms_context(Uuid::nil(), 0, "doctor");
    Some(match Kms::new(key).wrap(&[0; 32], context).await {
        Ok(_) => Check::good("kms", Need::Must, found),
        Err(error) => Check::failed("kms", Need::Must, &error),
    })
}
