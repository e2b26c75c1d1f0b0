//! The keys of an issuer (RFC 7517), and whether a signature is of one of them. Sans-IO.
//!
//! `openidconnect` is imported here alone: it reads keys and checks signatures. How many keys and bytes there may be,
//! and how small a key, is decided here before.

use std::{collections::HashSet, fmt};

use openidconnect::{
    JsonWebKey as _, JsonWebKeyId,
    core::{CoreJsonWebKey, CoreJwsSigningAlgorithm},
};
use serde::Deserialize;
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

use super::token::{Algorithm, Token};

/// Longest key set that is read, in bytes.
pub const KEY_SET_BYTES_MAX: usize = 256 * 1024;
/// Most keys of an issuer. Those that rotate daily publish fewer than ten.
pub const KEYS_MAX: usize = 128;
/// Most keys that one signature is checked against, where a token does not say which.
const KEYS_TRIED_MAX: usize = 8;
/// Shortest modulus of an RSA key, in bytes: 2048 bits (RFC 7518, 3.3).
const RSA_BYTES_MIN: usize = 256;

/// Why a key set was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeysError {
    /// Over [`KEY_SET_BYTES_MAX`].
    #[error("the key set has {bytes} bytes, more than {KEY_SET_BYTES_MAX}")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// Over [`KEYS_MAX`].
    #[error("the key set has {keys} keys, more than {KEYS_MAX}")]
    TooMany {
        /// How many.
        keys: usize,
    },
    /// No JSON, or no set of keys.
    #[error("the key set is no JSON object with a list \"keys\"")]
    NoKeySet,
    /// None that could check a signature.
    #[error("the key set has no key for any accepted algorithm")]
    NoKey,
}

/// Why a signature was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SignatureError {
    /// No key of that id and kind.
    UnknownKey,
    /// Not of that key.
    Wrong,
}

/// What stands for one key, whatever set it is in: the SHA-256 of its JSON.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; 32]);

impl fmt::Debug for Fingerprint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Fingerprint({})", hex::encode(&self.0[..8]))
    }
}

/// The keys of an issuer at one time.
#[derive(Debug)]
pub struct KeySet {
    keys: Vec<(Fingerprint, CoreJsonWebKey)>,
    fingerprints: HashSet<Fingerprint>,
}

#[derive(Deserialize)]
struct RawKeySet {
    keys: Vec<Map<String, Value>>,
}

impl KeySet {
    /// Reads a key set. Keys of kinds that no accepted algorithm uses are left out, as RFC 7517 (5) wants.
    ///
    /// # Errors
    /// [`KeysError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, KeysError> {
        if bytes.len() > KEY_SET_BYTES_MAX {
            return Err(KeysError::TooLong { bytes: bytes.len() });
        }
        let raw: RawKeySet = serde_json::from_slice(bytes).map_err(|_| KeysError::NoKeySet)?;
        if raw.keys.len() > KEYS_MAX {
            return Err(KeysError::TooMany { keys: raw.keys.len() });
        }
        let keys: Vec<_> = raw.keys.into_iter().filter_map(usable).collect();
        if keys.is_empty() {
            return Err(KeysError::NoKey);
        }
        let fingerprints = keys.iter().map(|(fingerprint, _)| *fingerprint).collect();
        Ok(Self { keys, fingerprints })
    }

    /// How many there are.
    #[expect(clippy::len_without_is_empty, reason = "a set without a key is refused")]
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether a key is still published.
    pub fn contains(&self, fingerprint: &Fingerprint) -> bool {
        self.fingerprints.contains(fingerprint)
    }

    /// Checks the signature of `token`; says which key it is of.
    ///
    /// # Errors
    /// [`SignatureError`].
    pub fn verify(&self, token: &Token<'_>) -> Result<Fingerprint, SignatureError> {
        let wanted = token.key_id();
        // A key without an id may be the one (RFC 7515, 4.1.4: both are optional).
        let may_be = |id: Option<&JsonWebKeyId>| match (id, wanted) {
            (Some(id), Some(wanted)) => id.as_str() == wanted,
            _ => true,
        };
        let algorithm = library(token.algorithm());
        let mut refused = SignatureError::UnknownKey;
        let candidates =
            self.keys.iter().filter(|(_, key)| may_be(key.key_id()) && fits(key, token.algorithm()));
        for (fingerprint, key) in candidates.take(KEYS_TRIED_MAX) {
            match key.verify_signature(&algorithm, token.signed(), token.signature()) {
                Ok(()) => return Ok(*fingerprint),
                Err(_) => refused = SignatureError::Wrong,
            }
        }
        Err(refused)
    }
}

/// A key that can check signatures of an accepted algorithm.
fn usable(raw: Map<String, Value>) -> Option<(Fingerprint, CoreJsonWebKey)> {
    let kind = raw.get("kty")?.as_str()?;
    match kind {
        // Leading zeros are no strength.
        "RSA" => {
            let modulus = decoded(raw.get("n")?.as_str()?)?;
            let bytes = modulus.iter().skip_while(|byte| **byte == 0).count();
            if bytes < RSA_BYTES_MIN {
                return None;
            }
        }
        "EC" | "OKP" => {}
        // A symmetric key is no secret of an issuer that publishes it.
        _ => return None,
    }
    if raw.get("use").is_some_and(|usage| usage != "sig") {
        return None;
    }
    let value = Value::Object(raw);
    // Maps are sorted by key, so this is the same however the issuer orders them.
    let fingerprint = Fingerprint(Sha256::digest(value.to_string().as_bytes()).into());
    Some((fingerprint, serde_json::from_value(value).ok()?))
}

fn decoded(text: &str) -> Option<Vec<u8>> {
    use base64::Engine as _;
    base64::prelude::BASE64_URL_SAFE_NO_PAD.decode(text.trim_end_matches('=')).ok()
}

/// Whether a key is for signatures of `algorithm`. The library checks it again.
fn fits(key: &CoreJsonWebKey, algorithm: Algorithm) -> bool {
    use openidconnect::{JsonWebKeyAlgorithm, JwsSigningAlgorithm as _};
    let algorithm = library(algorithm);
    let kind = algorithm.key_type().as_ref() == Some(key.key_type());
    let allowed = match key.signing_alg() {
        JsonWebKeyAlgorithm::Unspecified => true,
        JsonWebKeyAlgorithm::Algorithm(own) => *own == algorithm,
        JsonWebKeyAlgorithm::Unsupported => false,
    };
    kind && allowed
}

fn library(algorithm: Algorithm) -> CoreJwsSigningAlgorithm {
    match algorithm {
        Algorithm::Rs256 => CoreJwsSigningAlgorithm::RsaSsaPkcs1V15Sha256,
        Algorithm::Rs384 => CoreJwsSigningAlgorithm::RsaSsaPkcs1V15Sha384,
        Algorithm::Rs512 => CoreJwsSigningAlgorithm::RsaSsaPkcs1V15Sha512,
        Algorithm::Ps256 => CoreJwsSigningAlgorithm::RsaSsaPssSha256,
        Algorithm::Ps384 => CoreJwsSigningAlgorithm::RsaSsaPssSha384,
        Algorithm::Ps512 => CoreJwsSigningAlgorithm::RsaSsaPssSha512,
        Algorithm::Es256 => CoreJwsSigningAlgorithm::EcdsaP256Sha256,
        Algorithm::Es384 => CoreJwsSigningAlgorithm::EcdsaP384Sha384,
        Algorithm::EdDsa => CoreJwsSigningAlgorithm::EdDsa,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{KEY_SET_BYTES_MAX, KEYS_MAX, KeySet, KeysError, SignatureError};
    use crate::auth::{signer::Signer, token::Token};

    fn set(keys: &[serde_json::Value]) -> Vec<u8> {
        json!({ "keys": keys }).to_string().into_bytes()
    }

    #[test]
    fn signatures_of_every_accepted_algorithm_are_checked() {
        for signer in Signer::one_of_each() {
            let keys = KeySet::parse(&set(&[signer.public("k1")])).expect("is a key set");
            let text = signer.token("k1", &json!({"iss": "https://issuer.test"}));
            let token = Token::parse(&text).expect("is well formed");
            let fingerprint =
                keys.verify(&token).unwrap_or_else(|error| panic!("{error:?}: {}", signer.algorithm()));
            assert!(keys.contains(&fingerprint));
            // Any changed bit of the signature or what it is of.
            let changed = signer.token("k1", &json!({"iss": "https://issuer.test", "sub": "other"}));
            let (signed, _) = changed.rsplit_once('.').expect("has dots");
            let (_, signature) = text.rsplit_once('.').expect("has dots");
            let forged = format!("{signed}.{signature}");
            let token = Token::parse(&forged).expect("is well formed");
            assert_eq!(keys.verify(&token), Err(SignatureError::Wrong), "{token:?}");
        }
    }

    #[test]
    fn a_key_is_chosen_by_its_id_and_never_used_for_another_algorithm() {
        let signers = Signer::one_of_each();
        let (rsa, other) = (&signers[0], &Signer::one_of_each()[0]);
        let text = rsa.token("k1", &json!({"iss": "i"}));
        let token = Token::parse(&text).expect("is well formed");
        let keys = KeySet::parse(&set(&[other.public("k1")])).expect("is a key set");
        assert_eq!(keys.verify(&token), Err(SignatureError::Wrong));
        let keys = KeySet::parse(&set(&[rsa.public("k2")])).expect("is a key set");
        assert_eq!(keys.verify(&token), Err(SignatureError::UnknownKey));
        let keys = KeySet::parse(&set(&[other.public("k1"), rsa.public("k1")])).expect("is a key set");
        assert!(keys.verify(&token).is_ok(), "two keys may have one id");
        let mut own = rsa.public("k1");
        own["alg"] = json!("PS256");
        let keys = KeySet::parse(&set(&[own])).expect("is a key set");
        assert_eq!(keys.verify(&token), Err(SignatureError::UnknownKey));
        let mut unnamed = rsa.public("k1");
        unnamed.as_object_mut().expect("is an object").remove("kid");
        let keys = KeySet::parse(&set(&[unnamed])).expect("is a key set");
        assert!(keys.verify(&token).is_ok(), "keys need no id");
    }

    #[test]
    fn key_sets_that_are_too_large_or_of_no_use_are_refused() {
        let refused = |bytes: &[u8]| KeySet::parse(bytes).map(|_| ()).expect_err("is refused");
        let key = Signer::one_of_each()[0].public("k");
        let bytes = KEY_SET_BYTES_MAX + 1;
        assert_eq!(refused(&vec![b' '; bytes]), KeysError::TooLong { bytes });
        let many = set(&vec![json!({"kty": "OKP"}); 10_000]);
        assert_eq!(refused(&many), KeysError::TooMany { keys: 10_000 });
        assert!(KeySet::parse(&set(&vec![json!({"kty": "oct"}); KEYS_MAX - 1])).is_err());
        assert_eq!(refused(b"<html>"), KeysError::NoKeySet);
        assert_eq!(refused(b"{}"), KeysError::NoKeySet);
        assert_eq!(refused(&set(&[])), KeysError::NoKey);
        assert_eq!(refused(&set(&[json!({"kty": "oct", "k": "AAAA"})])), KeysError::NoKey);
        let mut encryption = key.clone();
        encryption["use"] = json!("enc");
        assert_eq!(refused(&set(&[encryption])), KeysError::NoKey);
        let mut short = key;
        let modulus = short["n"].as_str().expect("has a modulus").to_owned();
        short["n"] = json!(modulus[..171]);
        assert_eq!(refused(&set(&[short])), KeysError::NoKey);
    }
}
