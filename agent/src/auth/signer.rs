//! Keys that sign tokens for tests: another implementation than the one that is tested, so that they cannot agree on
//! the same mistake.

use aws_lc_rs::{
    rand::SystemRandom,
    rsa,
    signature::{
        self, ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair,
        KeyPair as _, RsaEncoding,
    },
};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use serde_json::{Value, json};

/// A private key and the algorithm that it is used with.
pub(crate) struct Signer {
    algorithm: &'static str,
    key: Key,
}

enum Key {
    Rsa(Box<rsa::KeyPair>, &'static dyn RsaEncoding),
    Ecdsa(Box<EcdsaKeyPair>, &'static str),
    Ed25519(Box<Ed25519KeyPair>),
}

/// As tokens encode bytes.
pub(crate) fn encoded(bytes: impl AsRef<[u8]>) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(bytes)
}

impl Signer {
    /// RS256, as most issuers use it.
    pub(crate) fn rs256() -> Self {
        Self::rsa("RS256", &signature::RSA_PKCS1_SHA256)
    }

    /// ES256, which is quicker to make.
    pub(crate) fn es256() -> Self {
        Self::ecdsa("ES256", &ECDSA_P256_SHA256_FIXED_SIGNING, "P-256")
    }

    /// One of each accepted algorithm, RS256 first.
    pub(crate) fn one_of_each() -> Vec<Self> {
        vec![
            Self::rs256(),
            Self::rsa("RS384", &signature::RSA_PKCS1_SHA384),
            Self::rsa("RS512", &signature::RSA_PKCS1_SHA512),
            Self::rsa("PS256", &signature::RSA_PSS_SHA256),
            Self::rsa("PS384", &signature::RSA_PSS_SHA384),
            Self::rsa("PS512", &signature::RSA_PSS_SHA512),
            Self::es256(),
            Self::ecdsa("ES384", &ECDSA_P384_SHA384_FIXED_SIGNING, "P-384"),
            Self {
                algorithm: "EdDSA",
                key: Key::Ed25519(Box::new(Ed25519KeyPair::generate().expect("a key"))),
            },
        ]
    }

    fn rsa(algorithm: &'static str, encoding: &'static dyn RsaEncoding) -> Self {
        let key = rsa::KeyPair::generate(rsa::KeySize::Rsa2048).expect("a key");
        Self { algorithm, key: Key::Rsa(Box::new(key), encoding) }
    }

    fn ecdsa(
        algorithm: &'static str,
        signing: &'static signature::EcdsaSigningAlgorithm,
        curve: &'static str,
    ) -> Self {
        let key = EcdsaKeyPair::generate(signing).expect("a key");
        Self { algorithm, key: Key::Ecdsa(Box::new(key), curve) }
    }

    /// What it signs with, as headers name it.
    pub(crate) fn algorithm(&self) -> &'static str {
        self.algorithm
    }

    /// The public half, as an issuer publishes it.
    pub(crate) fn public(&self, id: &str) -> Value {
        let mut key = match &self.key {
            Key::Rsa(key, _) => {
                let public = key.public_key();
                let part = |bytes: &[u8]| encoded(bytes);
                json!({
                    "kty": "RSA",
                    "n": part(public.modulus().big_endian_without_leading_zero()),
                    "e": part(public.exponent().big_endian_without_leading_zero()),
                })
            }
            Key::Ecdsa(key, curve) => {
                let point = &key.public_key().as_ref()[1..];
                let (x, y) = point.split_at(point.len() / 2);
                json!({"kty": "EC", "crv": curve, "x": encoded(x), "y": encoded(y)})
            }
            Key::Ed25519(key) => json!({"kty": "OKP", "crv": "Ed25519", "x": encoded(key.public_key())}),
        };
        key["kid"] = json!(id);
        key["use"] = json!("sig");
        key["alg"] = json!(self.algorithm);
        key
    }

    /// A token with these claims.
    pub(crate) fn token(&self, key_id: &str, claims: &Value) -> String {
        let header = json!({"alg": self.algorithm, "kid": key_id, "typ": "JWT"});
        let signed = format!("{}.{}", encoded(header.to_string()), encoded(claims.to_string()));
        let random = SystemRandom::new();
        let signature = match &self.key {
            Key::Rsa(key, encoding) => {
                let mut signature = vec![0; key.public_modulus_len()];
                key.sign(*encoding, &random, signed.as_bytes(), &mut signature).expect("signs");
                signature
            }
            Key::Ecdsa(key, _) => key.sign(&random, signed.as_bytes()).expect("signs").as_ref().to_vec(),
            Key::Ed25519(key) => key.sign(signed.as_bytes()).as_ref().to_vec(),
        };
        format!("{signed}.{}", encoded(signature))
    }
}
