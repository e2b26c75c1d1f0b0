//! Properties of what decides who is calling: expressions of the configuration, tokens.

use weir_agent::auth::expression::{Expression, ExpressionError, SOURCE_BYTES_MAX, Value, Variables};

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
