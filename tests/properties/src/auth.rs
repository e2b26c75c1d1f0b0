//! Properties of what decides who is calling: expressions of the configuration, tokens.

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use weir_agent::auth::{
    expression::{Expression, ExpressionError, SOURCE_BYTES_MAX, Value, Variables},
    keys::{KEYS_MAX, KeySet},
    token::{Algorithm, TOKEN_BYTES_MAX, Token},
};

/// The input is the source of an expression and, behind a NUL, claims in JSON. Whatever they are, the library neither
/// fails nor hangs, errors show nothing of the claims' values, and the same input gives the same answer.
pub fn expression(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let (source, claims) = text.split_once('\0').unwrap_or((text, "{\"sub\": \"a\", \"groups\": [\"b\"]}"));
    let expression = match Expression::compile(source, &["claims"]) {
        Ok(expression) => expression,
        Err(error) => {
            assert_ne!(error, ExpressionError::Failed, "compiling {source:?}");
            return;
        }
    };
    assert!(source.len() <= SOURCE_BYTES_MAX);
    let claims = serde_json::from_str(claims).unwrap_or_default();
    let Ok(claims) = Value::from_json(&claims) else { return };
    let variables = Variables::new().with("claims", &claims);
    let first = expression.evaluate(&variables).map(|value| value.to_json());
    assert_ne!(first, Err(ExpressionError::Failed), "evaluating {source:?}");
    assert_eq!(first, expression.evaluate(&variables).map(|value| value.to_json()));
    let boolean = expression.boolean(&variables);
    assert_eq!(boolean.is_ok(), matches!(first, Ok(Some(serde_json::Value::Bool(_)))), "{source:?}");
}

/// What is accepted is all of what was given, in the one way to write it; what is refused, and what is shown of either,
/// holds no part that could be used.
pub fn token(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let signature = text.rsplit_once('.').map_or("", |(_, signature)| signature);
    let shown = match Token::parse(text) {
        Ok(token) => {
            assert!(text.len() <= TOKEN_BYTES_MAX);
            let signed = std::str::from_utf8(token.signed()).expect("is a part of the text");
            assert_eq!(format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(token.signature())), text);
            assert!(!token.issuer().is_empty() && !token.signature().is_empty());
            format!("{token:?}")
        }
        Err(error) => {
            assert_eq!(error.status(), 401);
            format!("{error} {error:?}")
        }
    };
    // Shorter ones may stand in any text.
    assert!(signature.len() < 16 || !shown.contains(signature), "{shown}");
}

/// No key set, whatever is in it, bears out a signature that nobody has made; and what is accepted is bounded.
pub fn key_set(bytes: &[u8]) {
    let Ok(keys) = KeySet::parse(bytes) else { return };
    assert!((1..=KEYS_MAX).contains(&keys.len()));
    for algorithm in Algorithm::NAMES {
        for length in [64, 96, 256] {
            let header = BASE64_URL_SAFE_NO_PAD.encode(format!(r#"{{"alg":"{algorithm}"}}"#));
            let claims = BASE64_URL_SAFE_NO_PAD.encode(r#"{"iss":"https://issuer.test"}"#);
            let signature = BASE64_URL_SAFE_NO_PAD.encode(vec![0x5a; length]);
            let text = format!("{header}.{claims}.{signature}");
            let token = Token::parse(&text).expect("is well formed");
            assert!(keys.verify(&token).is_err(), "{algorithm} is borne out");
        }
    }
}
