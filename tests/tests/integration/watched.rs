//! What watches told a client is what the record has of them: each event, in its order, and nothing else.
//!
//! The clients write down `TYPE NAME VERSION` of each event, in files that nobody recorded sees.

use weir_common::event::{Channel, Event, Kind};
use weir_tests::Pod;

use super::clients::contains;

/// A watch as it is on record.
pub(super) struct Watched {
    pub(super) uri: String,
    /// Type, name and version of each object that is named.
    named: Vec<[String; 3]>,
    /// What of its answer is on record.
    body: Vec<u8>,
    /// Media type of the answer; none: it came in messages of a WebSocket.
    media_type: Option<String>,
}

impl Watched {
    /// The watches of a resource whose path and query have a part, in their order.
    pub(super) fn find(events: &[Event], resource: &str, part: &str) -> Vec<Self> {
        let mut found = Vec::<(&str, Self)>::new();
        for event in events {
            let Some(id) = event.request.as_deref() else { continue };
            if let Kind::RequestOpened(opened) = &event.kind
                && (opened.attributes.verb.as_str(), opened.attributes.resource.as_str())
                    == ("watch", resource)
                && format!("{}&", opened.uri).contains(part)
            {
                let uri = opened.uri.clone();
                found.push((id, Self { uri, named: Vec::new(), body: Vec::new(), media_type: None }));
            }
            let Some((_, watched)) = found.iter_mut().find(|(of, _)| *of == id) else { continue };
            watched.add(&event.kind);
        }
        found.into_iter().map(|(_, watched)| watched).collect()
    }

    fn add(&mut self, kind: &Kind) {
        match kind {
            Kind::ObjectsNamed(named) if named.channel == Channel::ResponseBody => {
                assert_eq!(named.left_out, 0, "{}", self.uri);
                let named = named.objects.iter().map(|object| {
                    let event = object.event.clone().unwrap_or_default();
                    [event, object.name.clone(), object.resource_version.clone()]
                });
                self.named.extend(named);
            }
            Kind::Content(content) if content.channel == Channel::ResponseBody => {
                self.body.extend(content.bytes.to_vec().unwrap());
            }
            Kind::ResponseStarted { headers, .. } => {
                let media_type = headers.iter().find(|header| header.name == "content-type");
                self.media_type = media_type.map(|header| header.value.clone());
            }
            _ => {}
        }
    }

    /// The events as they stand in the body: lines of JSON, or protobuf with its length before it.
    fn pieces(&self) -> Vec<&[u8]> {
        let mut rest = &self.body[..];
        if rest.starts_with(b"{") {
            return rest.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).collect();
        }
        let mut pieces = Vec::new();
        while let Some((length, behind)) = rest.split_first_chunk() {
            let (piece, behind) = behind.split_at(u32::from_be_bytes(*length) as usize);
            pieces.push(piece);
            rest = behind;
        }
        pieces
    }

    /// These are its events but for bookmarks, by what the record names and by what the body has.
    #[track_caller]
    pub(super) fn has_told(&self, told: &[[String; 3]]) {
        let about = format!("{} in {:?}", self.uri, self.media_type);
        let pieces = self.pieces();
        assert_eq!(pieces.len(), self.named.len(), "{about}: {}", String::from_utf8_lossy(&self.body));
        for (piece, words) in pieces.iter().zip(&self.named) {
            let all = words.iter().all(|word| contains(piece, word.as_bytes()));
            assert!(all, "{about}: {words:?} in {}", String::from_utf8_lossy(piece));
        }
        let named: Vec<_> = self.named.iter().filter(|[event, ..]| event != "BOOKMARK").collect();
        assert_eq!(named.len(), told.len(), "{about}: {named:?} of {told:?}");
        for (named, told) in named.iter().zip(told) {
            // A table that kubectl prints has no version.
            let same = named.iter().zip(told).all(|(named, told)| named == told || told.is_empty());
            assert!(same, "{about}: {named:?} is not {told:?}");
        }
    }
}

/// What a client has written down of its watches of a resource.
pub(super) fn told(pod: &Pod<'_>, client: &str, resource: &str) -> Vec<[String; 3]> {
    let text = pod.shell(&format!("cat /tmp/told-{client}-{resource}")).unwrap();
    let line = |line: &str| {
        let mut words = line.split_whitespace().map(str::to_owned);
        [(); 3].map(|()| words.next().unwrap_or_default())
    };
    text.lines().map(line).collect()
}
