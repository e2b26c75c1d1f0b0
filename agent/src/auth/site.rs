//! An issuer's documents for tests, in memory: what answers, and what was asked for.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::StatusCode;
use serde_json::{Value, json};

use super::fetch::{Fetch, FetchError};

/// Where [`Site::issuer`] is.
pub(crate) const URL: &str = "https://issuer.test";
pub(crate) const DISCOVERY: &str = "https://issuer.test/.well-known/openid-configuration";
pub(crate) const KEYS: &str = "https://issuer.test/keys";

/// Documents by where they are. What is not there answers 404.
#[derive(Debug, Default)]
pub(crate) struct Site {
    documents: Mutex<HashMap<String, Bytes>>,
    pub(crate) asked: Mutex<Vec<String>>,
    /// Nothing is answered while somebody has it.
    pub(crate) gate: tokio::sync::Mutex<()>,
}

impl Site {
    /// The issuer at [`URL`] with these keys.
    pub(crate) fn issuer(keys: &[Value]) -> Arc<Self> {
        let site = Arc::new(Self::default());
        site.publish(DISCOVERY, &json!({"issuer": URL, "jwks_uri": KEYS}));
        site.publish(KEYS, &json!({ "keys": keys }));
        site
    }

    pub(crate) fn publish(&self, target: &str, document: &Value) {
        let document = Bytes::from(document.to_string());
        self.documents.lock().expect("is whole").insert(target.to_owned(), document);
    }

    pub(crate) fn withdraw(&self, target: &str) {
        self.documents.lock().expect("is whole").remove(target);
    }

    /// What was asked for since the last call.
    pub(crate) fn asked(&self) -> Vec<String> {
        std::mem::take(&mut *self.asked.lock().expect("is whole"))
    }
}

impl Fetch for Site {
    fn fetch<'a>(&'a self, target: &'a str) -> BoxFuture<'a, Result<Bytes, FetchError>> {
        Box::pin(async move {
            self.asked.lock().expect("is whole").push(target.to_owned());
            let _open = self.gate.lock().await;
            let document = self.documents.lock().expect("is whole").get(target).cloned();
            let status = StatusCode::NOT_FOUND;
            document.ok_or_else(|| FetchError::Status { url: target.to_owned(), status })
        })
    }
}
