//! Reads encrypted content as whoever may read it does: with its wrapped key and the identity. For tests.

use std::{cell::RefCell, collections::HashMap, slice};

use weir_common::{
    encryption::{ContentKey, Identity, Place, WrappedKey},
    event::{Bytes, Event, Kind},
};

use crate::recipients::IDENTITY;

/// Whoever may read.
pub(super) struct Reader {
    identity: Identity,
    /// By what they are wrapped in.
    keys: RefCell<HashMap<Vec<u8>, ContentKey>>,
}

/// Number of the key that an event's content is encrypted with; none if it has none.
#[track_caller]
pub(super) fn key_of(event: &Event) -> Option<u64> {
    let Kind::Content(content) = &event.kind else { return None };
    let Bytes::Encrypted { key, .. } = content.bytes else { panic!("content in clear") };
    Some(key)
}

impl Reader {
    pub(super) fn new() -> Self {
        let identity = Identity::from_pem(IDENTITY.as_bytes()).unwrap();
        Self { identity, keys: RefCell::default() }
    }

    /// What an event's content says.
    #[track_caller]
    pub(super) fn text(&self, wrapped: &[u8], event: &Event) -> String {
        let Kind::Content(content) = &event.kind else { panic!("{event:?} has no content") };
        let place = Place { session: &event.session, request: event.request.as_deref().unwrap() };
        let mut keys = self.keys.borrow_mut();
        let key = keys.entry(wrapped.to_vec()).or_insert_with(|| {
            WrappedKey::decode(wrapped).unwrap().unwrap(slice::from_ref(&self.identity)).unwrap()
        });
        String::from_utf8(key.decrypt(place, content).unwrap().bytes.to_vec().unwrap()).unwrap()
    }
}
