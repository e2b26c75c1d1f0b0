//! The token that brokers are shown by SASL OAUTHBEARER, from a file that somebody renews (`weir.oauth.token.file` in the file of
//! `--kafka-config`).

use std::{
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use weir_common::bearer::{TOKEN_BYTES_MAX, expiry, is_token};

/// How long a token is taken for good that does not say when it ends.
const OPAQUE_LIFE_MS: i64 = 5 * 60 * 1000;

/// A token.
pub(crate) struct Token {
    pub(crate) text: String,
    /// When it ends, in milliseconds since the Unix epoch.
    pub(crate) end_unix_ms: i64,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TokenError {
    /// Nobody named a file.
    #[error("nothing says where the token is; set weir.oauth.token.file in the file of --kafka-config")]
    Unset,
    /// The file cannot be read.
    #[error("cannot read the token file {path}: {source}")]
    File { path: PathBuf, source: io::Error },
    /// It holds something else.
    #[error("{path} holds no token; is it the file that weir.oauth.token.file should name?")]
    NoToken { path: PathBuf },
    /// It holds an old one.
    #[error("the token in {path} ended {seconds} s ago; does somebody renew it?")]
    Ended { path: PathBuf, seconds: i64 },
}

/// The token that is in the file now.
///
/// # Errors
/// There is none, or it has ended.
pub(crate) fn token(path: Option<&Path>, now_unix_ms: i64) -> Result<Token, TokenError> {
    let path = path.ok_or(TokenError::Unset)?;
    let error = |source| TokenError::File { path: path.to_owned(), source };
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(TOKEN_BYTES_MAX as u64 + 2).read_to_string(&mut text))
        .map_err(error)?;
    let text = text.trim_end();
    if !is_token(text) {
        return Err(TokenError::NoToken { path: path.to_owned() });
    }
    let end_unix_ms = match expiry(text) {
        Some(end) => end.saturating_mul(1000),
        None => now_unix_ms.saturating_add(OPAQUE_LIFE_MS),
    };
    if end_unix_ms <= now_unix_ms {
        let seconds = now_unix_ms.saturating_sub(end_unix_ms) / 1000;
        return Err(TokenError::Ended { path: path.to_owned(), seconds });
    }
    Ok(Token { text: text.to_owned(), end_unix_ms })
}

#[cfg(test)]
mod tests {
    use super::token;

    #[test]
    fn a_file_is_read_anew_each_time_and_what_is_wrong_with_it_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let read = |now| token(Some(&path), now).map(|t| (t.text, t.end_unix_ms)).map_err(|e| e.to_string());
        assert!(read(0).unwrap_err().contains("cannot read the token file"));
        std::fs::write(&path, "opaque\n").unwrap();
        assert_eq!(read(1000), Ok(("opaque".to_owned(), 301_000)));
        // {"exp":60}
        std::fs::write(&path, "e30.eyJleHAiOjYwfQ.c2ln").unwrap();
        assert_eq!(read(1000), Ok(("e30.eyJleHAiOjYwfQ.c2ln".to_owned(), 60_000)));
        assert!(read(70_000).unwrap_err().contains("ended 10 s ago; does somebody renew it?"));
        std::fs::write(&path, "two words").unwrap();
        let said = read(0).unwrap_err();
        assert!(said.contains("holds no token") && !said.contains("two words"), "{said}");
        assert!(token(None, 0).is_err());
    }
}
