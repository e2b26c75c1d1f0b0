//! Programs of others that decide where connections of pods go, beside ours or before them.
//!
//! Ours stand at the root of the tree and at the roots of pods. At the cgroup of a pod or container the kernel runs another's
//! first, which may rewrite what Weir then judges; after ours it may rewrite what they have made of it. Neither leads past the
//! guards. That somebody does it must be known all the same.

use std::{
    collections::{BTreeSet, VecDeque},
    fs::{self, File},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use aya::programs::links::{FdLink, PinnedLink};
use tokio::{
    sync::oneshot::{self, error::TryRecvError},
    time::Instant,
};
use weir_common::kernel::programs;

use super::{
    bpf::{attach_kind, attached_programs},
    caller::Tenant,
    cgroup,
    cgroup_tree::Tree,
    pinned::pinned_links,
};
use crate::recording::Recorder;

/// The hooks that decide where something goes, whose programs are looked for at the cgroups of pods.
const DECIDING: [&str; 4] = [programs::CONNECT4, programs::CONNECT6, programs::SENDMSG4, programs::SENDMSG6];
/// Most cgroups of one pod that are looked at each time, the nearest to the pod's own first. That there are more is said as what
/// could be at them is.
const FOLDERS_MAX: usize = 512;
/// How often the cgroups of pods are looked at: half a dozen system calls for each.
const PODS_CHECK: Duration = Duration::from_secs(2);
/// Most programs that one finding names.
const NAMED_MAX: usize = 8;

/// Programs by their id, and where they are in words.
pub(super) type Programs = BTreeSet<(u32, String)>;

/// Those at each pod.
type OfPods = Vec<(Arc<Tenant>, Programs)>;

/// What was found and is reported.
#[derive(Debug, Default)]
pub(super) struct Foreign {
    at_roots: Programs,
    at_pods: Programs,
    /// What is found at pods, by a look that was begun beside what runs, and when that was.
    looking: Option<oneshot::Receiver<OfPods>>,
    looked_at: Option<Instant>,
}

impl Foreign {
    /// Reports which are new of those at the roots, and of those at the cgroups of pods. For these a look is begun here every
    /// [`PODS_CHECK`], and what it found is reported the next time.
    pub(super) fn report(
        &mut self,
        at_roots: Programs,
        pods: impl Iterator<Item = Arc<Tenant>>,
        recorder: &Recorder,
    ) {
        said(at_roots.difference(&self.at_roots), None, recorder);
        self.at_roots = at_roots;
        match self.looking.as_mut().map(oneshot::Receiver::try_recv) {
            Some(Err(TryRecvError::Empty)) => return,
            Some(Ok(found)) => self.found(found, recorder),
            // None was begun, or its thread has panicked: the next one tells.
            Some(Err(TryRecvError::Closed)) | None => {}
        }
        self.looking = None;
        if self.looked_at.is_some_and(|looked| looked.elapsed() < PODS_CHECK) {
            return;
        }
        self.looked_at = Some(Instant::now());
        let pods: Vec<_> = pods.collect();
        let (tell, looking) = oneshot::channel();
        tokio::task::spawn_blocking(move || {
            let look = |pod: Arc<Tenant>| {
                let found = in_pod(&pod.folder);
                (pod, found)
            };
            // The agent may have ended meanwhile.
            let _ = tell.send(pods.into_iter().map(look).collect());
        });
        self.looking = Some(looking);
    }

    fn found(&mut self, found: OfPods, recorder: &Recorder) {
        let mut at_pods = Programs::new();
        for (pod, found) in found {
            said(found.difference(&self.at_pods), Some(&pod), recorder);
            at_pods.extend(found);
        }
        self.at_pods = at_pods;
    }
}

/// Logs and records them, if there are any.
fn said<'a>(new: impl Iterator<Item = &'a (u32, String)>, pod: Option<&Tenant>, recorder: &Recorder) {
    let new: Vec<_> = new.map(|(_, place)| place.as_str()).collect();
    if new.is_empty() {
        return;
    }
    let mut programs = new[..new.len().min(NAMED_MAX)].join(", ");
    if new.len() > NAMED_MAX {
        programs = format!("{programs} and {} more", new.len() - NAMED_MAX);
    }
    tracing::warn!(event = "programs-of-others", programs, "programs of someone else are attached");
    let message = format!(
        "programs of someone else (see `bpftool prog show id ID`) are, or could be, attached: {programs}; they may refuse or rewrite connections before or after Weir does"
    );
    let caller = pod.map(|pod| pod.unproven(None));
    recorder.finding(None, caller.as_ref(), "foreignProgram", &message);
}

/// Those at a pod's cgroup and at the ones below, where none of ours is.
fn in_pod(folder: &Path) -> Programs {
    let mut found = Programs::new();
    let mut pending = VecDeque::from([folder.to_owned()]);
    for _ in 0..FOLDERS_MAX {
        let Some(folder) = pending.pop_front() else { return found };
        found.extend(at(&folder, &DECIDING, &BTreeSet::new()));
        let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
        let below = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        // One more than are looked at tells that there are more.
        let room = (FOLDERS_MAX + 1).saturating_sub(pending.len());
        pending.extend(below.map(|entry| entry.path()).take(room));
    }
    if !pending.is_empty() {
        found.insert((
            0,
            format!("perhaps some at the more than {FOLDERS_MAX} cgroups of {}", folder.display()),
        ));
    }
    found
}

/// Those of these kinds at one cgroup, but for `own`. A cgroup that is gone has none.
fn at(folder: &Path, kinds: &[&str], own: &BTreeSet<u32>) -> Programs {
    let Ok(opened) = File::open(folder) else { return Programs::new() };
    let of_kind = |kind: &&str| {
        let name = kind.trim_start_matches("weir_").to_owned();
        let attached = attached_programs(&opened, attach_kind(kind)).unwrap_or_default();
        let others = attached.into_iter().filter(|id| !own.contains(id));
        others.map(|id| (id, format!("{id} of {name} at {}", folder.display()))).collect::<Vec<_>>()
    };
    kinds.iter().flat_map(of_kind).collect()
}

/// All that are on this node now, in words, for `status` and `doctor`; whatever a pinned link of ours attaches is ours. None where
/// the tree cannot be read: both say so in other words.
pub fn on_node(pins: &Path) -> Vec<String> {
    let Ok(mount) = cgroup::mount_point() else { return Vec::new() };
    let Ok(tree) = Tree::read(&mount, |_| {}) else { return Vec::new() };
    let own = own_programs(pins);
    let roots = tree.roots.iter().map(|(root, _)| root.clone()).chain([mount]);
    let mut found: Programs = roots.flat_map(|root| at(&root, programs::GUARD_AND_HOOKS, &own)).collect();
    found.extend(tree.pods.iter().flat_map(|pod| in_pod(&pod.path)));
    found.into_iter().map(|(_, place)| place).collect()
}

/// The ids of the programs that are pinned, of whichever layout.
fn own_programs(pins: &Path) -> BTreeSet<u32> {
    let layouts = pins.parent().and_then(|parent| fs::read_dir(parent).ok()).into_iter().flatten().flatten();
    let links = layouts.map(|layout| layout.path()).flat_map(|layout| {
        let names = pinned_links(&layout).unwrap_or_default();
        names.into_iter().map(move |name| layout.join("links").join(name)).collect::<Vec<PathBuf>>()
    });
    let program = |pin: PathBuf| FdLink::from(PinnedLink::from_pin(pin).ok()?).info().ok();
    links.filter_map(program).map(|info| info.program_id()).collect()
}
