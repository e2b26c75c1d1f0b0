//! A bearer token as it arrives: its bounds, parts and header, before anybody vouches for it. Sans-IO.
//!
//! ```text
//! base64url(header) . base64url(claims) . base64url(signature)     RFC 7515, 7.1
//! ```
//!
//! What is read here is the caller's word. It chooses the issuer that is asked, and nothing else.

use std::fmt;

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

use super::error::{TokenError, repeated};

/// Longest token that is read, in bytes. Those of Kubernetes have some 1,200, those with many groups several thousand;
/// header and cookies of a request together are bounded by most servers at this size or below.
pub const TOKEN_BYTES_MAX: usize = 16 * 1024;
/// Longest header of a token, in bytes, once decoded.
const HEADER_BYTES_MAX: usize = 1024;

/// How a token may be signed: with a key of which its issuer alone has the private half. Not `none`, not HMAC, whose
/// key whoever checks would have too; and not ES512, which the library cannot check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// RSASSA-PKCS1-v1_5 with SHA-256.
    Rs256,
    /// RSASSA-PKCS1-v1_5 with SHA-384.
    Rs384,
    /// RSASSA-PKCS1-v1_5 with SHA-512.
    Rs512,
    /// RSASSA-PSS with SHA-256.
    Ps256,
    /// RSASSA-PSS with SHA-384.
    Ps384,
    /// RSASSA-PSS with SHA-512.
    Ps512,
    /// ECDSA with P-256 and SHA-256.
    Es256,
    /// ECDSA with P-384 and SHA-384.
    Es384,
    /// Ed25519.
    EdDsa,
}

impl Algorithm {
    /// All of them, as headers name them.
    pub const NAMES: [&'static str; 9] =
        ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA"];

    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "RS256" => Self::Rs256,
            "RS384" => Self::Rs384,
            "RS512" => Self::Rs512,
            "PS256" => Self::Ps256,
            "PS384" => Self::Ps384,
            "PS512" => Self::Ps512,
            "ES256" => Self::Es256,
            "ES384" => Self::Es384,
            "EdDSA" => Self::EdDsa,
            _ => return None,
        })
    }
}

/// The SHA-256 of a token: what a cache may keep of it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TokenDigest([u8; 32]);

impl TokenDigest {
    /// Of `token`, as it arrived.
    pub fn of(token: &str) -> Self {
        Self(Sha256::digest(token.as_bytes()).into())
    }
}

/// Shows nothing: who has guesses at a token could try them.
impl fmt::Debug for TokenDigest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("TokenDigest")
    }
}

/// A token's parts, none of them verified.
pub struct Token<'a> {
    algorithm: Algorithm,
    key_id: Option<String>,
    issuer: String,
    signed: &'a str,
    signature: Vec<u8>,
    claims: Map<String, Value>,
}

/// Shows what chooses issuer and key; neither signature nor claims.
impl fmt::Debug for Token<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = formatter.debug_struct("Token");
        shown.field("algorithm", &self.algorithm).field("key_id", &self.key_id).field("issuer", &self.issuer);
        shown.finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    /// Extensions that must be understood (RFC 7515, 4.1.11); none is.
    crit: Option<IgnoredAny>,
    /// How a payload is encoded (RFC 7797): only understood with `crit`.
    b64: Option<IgnoredAny>,
}

impl<'a> Token<'a> {
    /// Reads the parts of `text`.
    ///
    /// # Errors
    /// [`TokenError`], of which nothing has been asked of anybody.
    pub fn parse(text: &'a str) -> Result<Self, TokenError> {
        if text.len() > TOKEN_BYTES_MAX {
            return Err(TokenError::TooLong { bytes: text.len() });
        }
        let (signed, signature) = text.rsplit_once('.').ok_or(TokenError::NotJwt)?;
        let (header, claims) = signed.split_once('.').ok_or(TokenError::NotJwt)?;
        if claims.contains('.') {
            return Err(TokenError::NotJwt);
        }
        let Ok(header) = BASE64_URL_SAFE_NO_PAD.decode(header) else { return Err(TokenError::NotJwt) };
        // A static token may have two dots, but no JSON object in front of them.
        if header.first() != Some(&b'{') {
            return Err(TokenError::NotJwt);
        }
        let malformed = |part, problem| TokenError::Malformed { part, problem };
        if header.len() > HEADER_BYTES_MAX {
            return Err(malformed("header", "is too long"));
        }
        let header: Header =
            serde_json::from_slice(&header).map_err(|_| malformed("header", "has no algorithm in JSON"))?;
        let Some(algorithm) = Algorithm::named(&header.alg) else {
            return Err(TokenError::Algorithm { found: repeated(&header.alg) });
        };
        if header.crit.is_some() || header.b64.is_some() {
            return Err(malformed("header", "asks for extensions that are not supported"));
        }
        let signature = BASE64_URL_SAFE_NO_PAD
            .decode(signature)
            .ok()
            .filter(|signature| !signature.is_empty())
            .ok_or_else(|| malformed("signature", "is missing or not base64url"))?;
        let claims =
            BASE64_URL_SAFE_NO_PAD.decode(claims).map_err(|_| malformed("claims", "are not base64url"))?;
        let claims: Map<String, Value> =
            serde_json::from_slice(&claims).map_err(|_| malformed("claims", "are not a JSON object"))?;
        let issuer = match claims.get("iss") {
            Some(Value::String(issuer)) if !issuer.is_empty() => issuer.clone(),
            _ => return Err(malformed("claims", "name no issuer (iss)")),
        };
        Ok(Self { algorithm, key_id: header.kid, issuer, signed, signature, claims })
    }

    /// How its signature is to be checked; never taken on trust alone, since a key says which algorithms it is for.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// The key that it says it is signed with.
    pub fn key_id(&self) -> Option<&str> {
        self.key_id.as_deref()
    }

    /// Who it says has issued it.
    pub fn issuer(&self) -> &str {
        &self.issuer
    }

    /// What the signature is of.
    pub fn signed(&self) -> &[u8] {
        self.signed.as_bytes()
    }

    /// The signature.
    pub fn signature(&self) -> &[u8] {
        &self.signature
    }

    /// Its claims, which are worth nothing before the signature was checked.
    pub(super) fn claims(&self) -> &Map<String, Value> {
        &self.claims
    }

    /// Its claims, once the signature was checked.
    pub(super) fn into_claims(self) -> Map<String, Value> {
        self.claims
    }
}

#[cfg(test)]
mod tests {
    use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
    use expect_test::{Expect, expect};

    use super::{TOKEN_BYTES_MAX, Token, TokenDigest};

    fn part(text: &str) -> String {
        BASE64_URL_SAFE_NO_PAD.encode(text)
    }

    fn token(header: &str, claims: &str) -> String {
        format!("{}.{}.{}", part(header), part(claims), part("signature"))
    }

    #[track_caller]
    fn refused(text: &str, expected: Expect) {
        let error = Token::parse(text).expect_err("is refused");
        assert_eq!(error.status(), 401);
        expected.assert_eq(&error.to_string());
    }

    const HEADER: &str = r#"{"alg":"RS256","kid":"k1","typ":"JWT"}"#;
    const CLAIMS: &str = r#"{"iss":"https://issuer.test","sub":"jane"}"#;

    #[test]
    fn what_chooses_issuer_and_key_is_read() {
        let text = token(HEADER, CLAIMS);
        let token = Token::parse(&text).expect("is well formed");
        assert_eq!((token.issuer(), token.key_id()), ("https://issuer.test", Some("k1")));
        assert_eq!(token.signature(), b"signature");
        assert_eq!(token.signed(), text.rsplit_once('.').expect("has dots").0.as_bytes());
        assert_eq!(token.into_claims()["sub"], "jane");
    }

    #[test]
    fn debug_output_holds_no_part_that_could_be_used() {
        let text = token(HEADER, CLAIMS);
        let shown =
            format!("{:?} {:?}", Token::parse(&text).expect("is well formed"), TokenDigest::of(&text));
        assert!(!shown.contains("jane") && !shown.contains(&part("signature")), "{shown}");
        expect![[
            r#"Token { algorithm: Rs256, key_id: Some("k1"), issuer: "https://issuer.test", .. } TokenDigest"#
        ]]
        .assert_eq(&shown);
    }

    #[test]
    fn what_is_no_token_of_an_accepted_kind_is_refused_for_its_own_reason() {
        refused(
            "",
            expect![
                "the bearer token is no JSON Web Token, so no issuer can be asked for it; log in again for one that is"
            ],
        );
        refused(
            "static-token",
            expect![
                "the bearer token is no JSON Web Token, so no issuer can be asked for it; log in again for one that is"
            ],
        );
        refused(
            "a.b.c",
            expect![
                "the bearer token is no JSON Web Token, so no issuer can be asked for it; log in again for one that is"
            ],
        );
        refused(
            &format!("{}.x", token(HEADER, CLAIMS)),
            expect![
                "the bearer token is no JSON Web Token, so no issuer can be asked for it; log in again for one that is"
            ],
        );
        refused(
            &"a".repeat(1024 * 1024),
            expect!["the bearer token has 1048576 bytes; at most 16384 are read"],
        );
        refused(
            &token(r#"{"alg":"none"}"#, CLAIMS),
            expect![[
                r#"the bearer token is signed with algorithm "none"; accepted are RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, EdDSA"#
            ]],
        );
        refused(
            &token(r#"{"alg":"HS256"}"#, CLAIMS),
            expect![[
                r#"the bearer token is signed with algorithm "HS256"; accepted are RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, EdDSA"#
            ]],
        );
        refused(
            &token(r#"{"alg":"ES512"}"#, CLAIMS),
            expect![[
                r#"the bearer token is signed with algorithm "ES512"; accepted are RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, EdDSA"#
            ]],
        );
        refused(
            &token(r#"{"alg":"rs256"}"#, CLAIMS),
            expect![[
                r#"the bearer token is signed with algorithm "rs256"; accepted are RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, EdDSA"#
            ]],
        );
    }

    #[test]
    fn parts_that_cannot_be_read_are_named() {
        refused(
            &token(r#"{"kid":"k1"}"#, CLAIMS),
            expect!["the bearer token's header has no algorithm in JSON; log in again"],
        );
        refused(
            &token(r#"{"alg":"RS256","crit":["exp"]}"#, CLAIMS),
            expect!["the bearer token's header asks for extensions that are not supported; log in again"],
        );
        refused(
            &token(r#"{"alg":"RS256","b64":false}"#, CLAIMS),
            expect!["the bearer token's header asks for extensions that are not supported; log in again"],
        );
        refused(
            &token(r#"{"alg":"RS256","alg":"none"}"#, CLAIMS),
            expect!["the bearer token's header has no algorithm in JSON; log in again"],
        );
        refused(
            &token(&format!(r#"{{"alg":"RS256","kid":"{}"}}"#, "k".repeat(1024)), CLAIMS),
            expect!["the bearer token's header is too long; log in again"],
        );
        refused(
            &token(HEADER, "[]"),
            expect!["the bearer token's claims are not a JSON object; log in again"],
        );
        refused(
            &token(HEADER, r#"{"sub":"jane"}"#),
            expect!["the bearer token's claims name no issuer (iss); log in again"],
        );
        refused(
            &token(HEADER, r#"{"iss":7}"#),
            expect!["the bearer token's claims name no issuer (iss); log in again"],
        );
        let text = token(HEADER, CLAIMS);
        let (unsigned, _) = text.rsplit_once('.').expect("has dots");
        refused(
            &format!("{unsigned}."),
            expect!["the bearer token's signature is missing or not base64url; log in again"],
        );
        refused(
            &format!("{text}="),
            expect!["the bearer token's signature is missing or not base64url; log in again"],
        );
        refused(
            &"x".repeat(TOKEN_BYTES_MAX + 1),
            expect!["the bearer token has 16385 bytes; at most 16384 are read"],
        );
    }
}
