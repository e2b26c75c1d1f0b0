//! Takes out of text what must not leave the node: what looks like a credential, and what is known to be hidden.
//!
//! A belt to the braces: nothing that goes into a bundle should hold a secret. What is taken too much is a nuisance; what is taken too
//! little is a leak.

use std::collections::BTreeSet;

use regex::{Captures, Regex};
use serde_json::Value;

use crate::config::shown::HIDDEN;

/// Shortest text that is looked for elsewhere because it is hidden in the configuration: shorter ones are parts of other words.
const NEEDLE_BYTES_MIN: usize = 6;

/// What looks like a credential. Where a pattern has a group, that stays.
const PATTERNS: [&str; 7] = [
    // A private key, or a certificate, in PEM; to the end of the text if it is cut.
    r"(?s)-----BEGIN [A-Z0-9 ]+-----.*?(?:-----END [A-Z0-9 ]+-----|\z)",
    // User and password before a host.
    r#"(?i)(?:[a-z][a-z0-9+.-]*://|[^\s"'/]+:)[^\s"']*@"#,
    // What a URL asks with: presigned ones have their signature there.
    r#"([a-z][a-z0-9+.-]*://[^\s"'?]*\?)[^\s"']+"#,
    // JSON web tokens, and EKS' form of presigned URLs.
    r"eyJ[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*){0,2}|k8s-aws-v1\.[A-Za-z0-9_-]+",
    r"(?i)((?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{8,}",
    // Names of AWS keys.
    r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    // NAME=VALUE and NAME: VALUE.
    r#"(?i)((?:passw(?:or)?d|passphrase|secret|token|api[_-]?key|access[_-]?key|private[_-]?key|credential)[a-z0-9_.-]*["']?\s*[=:]\s*["']?)[^\s"',;})]{4,}"#,
];

/// See the module.
#[derive(Debug)]
pub(super) struct Scrub {
    patterns: Vec<Regex>,
    /// The longest first: one may be part of another.
    hidden: Vec<String>,
}

impl Scrub {
    /// That knows what credentials look like.
    ///
    /// # Errors
    /// None: the patterns are constant, and the tests compile them.
    pub(super) fn new() -> Result<Self, regex::Error> {
        let patterns = PATTERNS.into_iter().map(Regex::new).collect::<Result<_, _>>()?;
        Ok(Self { patterns, hidden: Vec::new() })
    }

    /// These must not show either.
    pub(super) fn also(&mut self, hidden: BTreeSet<String>) {
        let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        self.hidden
            .extend(hidden.into_iter().filter(|text| text.len() >= NEEDLE_BYTES_MIN && !is_number(text)));
        self.hidden.sort_by_key(|text| std::cmp::Reverse(text.len()));
    }

    pub(super) fn text(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for hidden in &self.hidden {
            if text.contains(hidden.as_str()) {
                text = text.replace(hidden.as_str(), HIDDEN);
            }
        }
        for pattern in &self.patterns {
            let replaced = pattern.replace_all(&text, |found: &Captures<'_>| {
                let kept = found.get(1).map(|kept| kept.as_str()).unwrap_or_default();
                let at = if found[0].ends_with('@') { "@" } else { "" };
                format!("{kept}{HIDDEN}{at}")
            });
            if let std::borrow::Cow::Owned(replaced) = replaced {
                text = replaced;
            }
        }
        text
    }

    /// The same of every text in a value, before it is written with escapes.
    pub(super) fn json(&self, value: &mut Value) {
        match value {
            Value::String(text) => *text = self.text(text),
            Value::Array(entries) => entries.iter_mut().for_each(|entry| self.json(entry)),
            Value::Object(entries) => entries.values_mut().for_each(|entry| self.json(entry)),
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn scrub() -> Scrub {
        Scrub::new().expect("the patterns are expressions")
    }

    #[test]
    fn what_looks_like_a_credential_is_taken_out() {
        for (text, expected) in [
            ("proxy https://u:p@proxy.test:3128/a", "proxy [hidden]@proxy.test:3128/a"),
            ("broker user:p/a@ss@kafka:9092", "broker [hidden]@kafka:9092"),
            ("https://token@git.test", "[hidden]@git.test"),
            ("GET https://sts.test/?X-Amz-Signature=abc end", "GET https://sts.test/?[hidden] end"),
            ("a eyJhbGciOiJSUzI1NiJ9.eyJhIjoxfQ.c2ln b", "a [hidden] b"),
            ("k8s-aws-v1.aHR0cHM6Ly9z", "[hidden]"),
            ("authorization: Bearer abcdefgh12345", "authorization: Bearer [hidden]"),
            ("key AKIAIOSFODNN7EXAMPLE.", "key [hidden]."),
            ("AWS_SECRET_ACCESS_KEY=wJalrXUtn/FEMI", "AWS_SECRET_ACCESS_KEY=[hidden]"),
            ("sasl.password: hunter2", "sasl.password: [hidden]"),
            ("{\"token\": \"hunter2\"}", "{\"token\": \"[hidden]\"}"),
            ("-----BEGIN PRIVATE KEY-----\nMC4\n-----END PRIVATE KEY-----\nx", "[hidden]\nx"),
            ("-----BEGIN PRIVATE KEY-----\nMC4", "[hidden]"),
        ] {
            assert_eq!(scrub().text(text), expected);
        }
    }

    #[test]
    fn what_helps_stays() {
        for text in [
            "cluster production: https://10.96.0.1:443 answers v1.36.3",
            "weir_role_tokens_total{role=\"a\",result=\"minted\"} 5",
            "system:serviceaccount:ci:runner, default/pod, 2026-11-29T02:00:00Z",
            "/var/lib/weir/journal/0190c6a4-7c3b-7000-8000-000000000000/00000001.seg 4096",
        ] {
            assert_eq!(scrub().text(text), text);
        }
    }

    #[test]
    fn what_is_hidden_elsewhere_is_taken_out_before_it_is_escaped() {
        let mut scrub = scrub();
        scrub.also(BTreeSet::from(["a \"secret\"".to_owned(), "443000".to_owned(), "weir".to_owned()]));
        let mut value = json!({"of": ["weir: a \"secret\" at 443000"]});
        scrub.json(&mut value);
        assert_eq!(value, json!({"of": ["weir: [hidden] at 443000"]}));
    }
}
