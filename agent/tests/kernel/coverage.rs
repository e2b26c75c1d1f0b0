//! What the record says of coverage.

use std::path::Path;

use weir_common::{
    event::{Coverage, Event, Kind, PodCoverage},
    frame::FrameType,
    segment::SegmentReader,
};

use crate::world::{DEADLINE, PACE};

/// What is recorded so far in a folder of segments.
fn recorded(folder: &Path) -> Vec<Coverage> {
    let segments = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut segments: Vec<_> =
        segments.filter(|path| path.extension().is_some_and(|extension| extension == "seg")).collect();
    segments.sort();
    let bytes = segments.iter().map(|path| std::fs::read(path).unwrap());
    let of_one = |bytes: Vec<u8>| {
        // The end of the one that is written may not be whole yet.
        let frames = SegmentReader::new(&bytes, None).unwrap().map_while(Result::ok);
        let events = frames.filter(|located| located.frame.frame_type == FrameType::Event);
        let kinds = events.map(|located| serde_json::from_slice::<Event>(located.frame.value).unwrap().kind);
        let coverage = kinds.filter_map(|kind| match kind {
            Kind::Coverage(coverage) => Some(*coverage),
            _ => None,
        });
        coverage.collect::<Vec<_>>()
    };
    bytes.flat_map(of_one).collect()
}

/// Waits until as many connections of pods are recorded as redirected and as proxied.
pub(crate) async fn covered(folder: &Path, redirected: u64) -> Vec<Coverage> {
    let total = |found: &[Coverage], of: fn(&PodCoverage) -> u64| {
        found.iter().flat_map(|one| &one.pods).map(of).sum::<u64>()
    };
    let found = async {
        loop {
            let found = recorded(folder);
            if total(&found, |pod| pod.redirected) >= redirected
                && total(&found, |pod| pod.proxied) == total(&found, |pod| pod.redirected)
            {
                return found;
            }
            tokio::time::sleep(PACE).await;
        }
    };
    tokio::time::timeout(DEADLINE, found).await.expect("coverage is recorded")
}
