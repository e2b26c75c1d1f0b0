//! The token that brokers are shown by SASL OAUTHBEARER: from a file that somebody renews, or signed for Amazon MSK.
//!
//! librdkafka asks for one when a client is made, and again when four fifths of its life have passed; while it gets none it asks
//! every ten seconds. Nothing is kept here.

use std::{
    fs::File,
    io::Read as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use weir_common::bearer::{TOKEN_BYTES_MAX, expiry, is_token};
use zeroize::Zeroizing;

use crate::{
    aws::{self, StsError},
    config::OAuth,
};

/// How long a token is taken for good that does not say when it ends.
const OPAQUE_LIFE: Duration = Duration::from_mins(5);

/// A token; wiped when dropped, but for the copies that librdkafka has.
pub(super) struct Token {
    pub(super) text: Zeroizing<String>,
    /// When it ends, in milliseconds since the Unix epoch.
    pub(super) end_unix_ms: i64,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub(super) enum TokenError {
    /// Nobody said where tokens come from.
    #[error("nothing says where the token comes from; set kafka.oauth")]
    Unset,
    /// The file cannot be read.
    #[error("cannot read the token file {path}: {source}; is it mounted?")]
    File { path: PathBuf, source: std::io::Error },
    /// It holds something else.
    #[error("{path} holds no token; is it the file that kafka.oauth.tokenFile should name?")]
    NoToken { path: PathBuf },
    /// It holds an old one.
    #[error("the token in {path} ended {seconds} s ago; does somebody renew it?")]
    Ended { path: PathBuf, seconds: i64 },
    /// AWS.
    #[error("no token for Amazon MSK: {0}")]
    Aws(#[from] StsError),
    /// The process has no thread for it.
    #[error("no token for Amazon MSK: nothing can be asked of AWS; is the process limited in threads?")]
    Runtime,
}

/// The token that holds now. Blocks while AWS is asked, for about 20 seconds at most.
pub(super) fn token(oauth: Option<&OAuth>, now: SystemTime) -> Result<Token, TokenError> {
    match oauth {
        None => Err(TokenError::Unset),
        Some(OAuth::TokenFile(path)) => of_file(path, now),
        Some(OAuth::AwsMskIam { region, role_arn }) => of_aws(region, role_arn.as_ref()),
    }
}

fn of_file(path: &Path, now: SystemTime) -> Result<Token, TokenError> {
    let mut text = Zeroizing::new(String::new());
    let read =
        File::open(path).and_then(|file| file.take(TOKEN_BYTES_MAX as u64 + 2).read_to_string(&mut text));
    read.map_err(|source| TokenError::File { path: path.to_owned(), source })?;
    let length = text.trim_end().len();
    text.truncate(length);
    if !is_token(&text) {
        return Err(TokenError::NoToken { path: path.to_owned() });
    }
    let now = unix_ms(now);
    let end_unix_ms = match expiry(&text) {
        Some(end) => end.saturating_mul(1000),
        None => now.saturating_add(i64::try_from(OPAQUE_LIFE.as_millis()).unwrap_or(i64::MAX)),
    };
    if end_unix_ms <= now {
        return Err(TokenError::Ended {
            path: path.to_owned(),
            seconds: now.saturating_sub(end_unix_ms) / 1000,
        });
    }
    Ok(Token { text, end_unix_ms })
}

/// On a thread with a runtime of its own: who asks may be on either, and the publisher's thread has none.
fn of_aws(region: &str, role: Option<&aws::RoleArn>) -> Result<Token, TokenError> {
    let made = std::thread::scope(|scope| {
        let ask = || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.map_err(|_| TokenError::Runtime)?;
            Ok(runtime.block_on(aws::msk_token(region, role))?)
        };
        let thread = std::thread::Builder::new().name("weir-msk-token".to_owned()).spawn_scoped(scope, ask);
        thread.map_err(|_| TokenError::Runtime)?.join().map_err(|_| TokenError::Runtime)?
    });
    made.map(|token| Token { end_unix_ms: unix_ms(token.end), text: token.text })
}

fn unix_ms(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};

    use super::*;

    const NOW_S: u64 = 1_795_891_810;

    fn read(path: &Path) -> Result<(String, i64), String> {
        let now = UNIX_EPOCH + Duration::from_secs(NOW_S);
        let token = token(Some(&OAuth::TokenFile(path.to_owned())), now);
        token.map(|token| (token.text.to_string(), token.end_unix_ms)).map_err(|error| error.to_string())
    }

    #[test]
    fn a_file_is_read_anew_each_time_and_its_token_ends_when_it_says() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let shown = path.display();
        assert!(read(&path).unwrap_err().starts_with(&format!("cannot read the token file {shown}: ")));
        std::fs::write(&path, "opaque\n").unwrap();
        let opaque_end = (NOW_S as i64 + 300) * 1000;
        assert_eq!(read(&path), Ok(("opaque".to_owned(), opaque_end)));
        let jwt = |end: u64| format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(format!("{{\"exp\":{end}}}")));
        std::fs::write(&path, jwt(NOW_S + 60)).unwrap();
        assert_eq!(read(&path), Ok((jwt(NOW_S + 60), (NOW_S as i64 + 60) * 1000)));
        std::fs::write(&path, jwt(NOW_S - 60)).unwrap();
        let ended = format!("the token in {shown} ended 60 s ago; does somebody renew it?");
        assert_eq!(read(&path), Err(ended));
        for text in ["", "\n", "two words", "sp\u{1}lit"] {
            std::fs::write(&path, text).unwrap();
            assert!(read(&path).unwrap_err().starts_with(&format!("{shown} holds no token; ")));
        }
    }
}
