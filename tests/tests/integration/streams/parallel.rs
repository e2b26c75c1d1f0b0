//! Many kubectl at once, from one pod.

use std::collections::BTreeSet;

use weir_common::event::{Channel, Event, Kind};
use weir_tests::Pod;

use super::{super::Scene, exit_code, lanes, opened, run, sha256, upgrades};

/// How many: half of them run a command, half of them read.
const KUBECTL: usize = 40;
/// What each of the others reads, but for its number.
const READ: &str = "/api/v1/namespaces/it-streams?number=";

/// Each gets what it asks for, and each is on record with its bytes.
#[track_caller]
pub(super) fn many_at_once_are_on_record(scene: &Scene, pod: &Pod<'_>) {
    let earlier = scene.events().len();
    let each = KUBECTL / 2;
    let script = format!(
        "mkdir -p /tmp/many && cd /tmp/many || exit 1; for number in $(seq {each}); do \
         head -c 5000 /dev/urandom >sent-$number; \
         (kubectl exec -i -n it-streams caller -- sh -c 'cat; exit 6' <sent-$number >got-$number; echo $? >exec-$number) & \
         (kubectl get --raw \"{READ}$number\" >read-$number; echo $? >get-$number) & \
         done; wait; \
         for number in $(seq {each}); do cmp sent-$number got-$number && cat exec-$number get-$number && \
         grep -c it-streams read-$number; done | sort | uniq -c | tr -s ' '; sha256sum sent-* | cut -c 1-64"
    );
    let said = run(pod, &script);
    let (counts, digests): (Vec<&str>, Vec<&str>) = said.lines().partition(|line| line.len() < 64);
    assert_eq!(counts, [format!(" {each} 0"), format!(" {each} 1"), format!(" {each} 6")], "{said}");
    let expected: BTreeSet<String> = digests.into_iter().map(str::to_owned).collect();
    assert_eq!(expected.len(), each);
    let events =
        scene.ended(earlier, |events| upgrades(events).len() >= each && opened(events, READ).count() >= each);
    let streams = upgrades(&events);
    assert_eq!(streams.len(), each, "each exec is on record once: {streams:?}");
    for (id, ..) in &streams {
        assert_eq!(exit_code(&events, id), Some(6));
    }
    for channel in [Channel::Stdin, Channel::Stdout] {
        let found = streams.iter().map(|(id, ..)| sha256(&lanes(&events, id)[&(channel, None)]));
        assert_eq!(found.collect::<BTreeSet<_>>(), expected, "{channel:?}");
    }
    for number in 1..=each {
        let uri = format!("{READ}{number}");
        let read = events.iter().filter(|event| closed_ok(&events, event, &uri)).count();
        assert_eq!(read, 1, "each read is on record once: {uri}");
    }
}

/// Whether a request for this opens here, and was answered.
fn closed_ok(events: &[Event], event: &Event, uri: &str) -> bool {
    matches!(&event.kind, Kind::RequestOpened(opened) if opened.uri == uri)
        && events.iter().any(|other| {
            other.request == event.request
                && matches!(&other.kind, Kind::RequestClosed(closed) if closed.status == Some(200))
        })
}
