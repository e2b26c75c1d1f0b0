//! What the calling task is: the nearest classified cgroup at or above its own, its process, and counting and
//! reporting. No addresses here.

use core::{
    arch::asm,
    ptr::{addr_of, addr_of_mut},
};

use aya_ebpf::{
    cty::c_void,
    helpers::{
        bpf_get_current_pid_tgid, bpf_get_current_uid_gid,
        generated::{
            bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_jiffies64,
            bpf_ktime_get_boot_ns, bpf_loop,
        },
    },
};
use weir_common::{
    kernel::{
        ApiEndpoint, COUNTERS as COUNTERS_MAX, CgroupEntry, Counter, FlowRecord, NestedKey, Notice,
        NoticeKind, Settings,
    },
    sieve::{LEVELS_MAX, Walk, pod_slot},
};

use crate::{CGROUPS, COUNTERS, NESTED, NOTICES, POD_COUNTERS, POD_SLOTS, SETTINGS, TICK_NS, sieve};

/// The nearest classified cgroup of a task or socket. No `Option`: the verifier would look at both of its kinds twice.
#[derive(Clone, Copy)]
pub(crate) struct Classified {
    /// 0: there is none.
    pub(crate) id: u64,
    /// Of class 0 and without a listener if there is none.
    pub(crate) entry: CgroupEntry,
}

/// The cgroup of the calling task.
#[inline(always)]
pub(crate) fn own() -> u64 {
    // SAFETY: no arguments.
    unsafe { bpf_get_current_cgroup_id() }
}

/// The nearest one of the calling task, whose cgroup this is.
#[inline(always)]
pub(crate) fn nearest(own: u64) -> Classified {
    // SAFETY: takes a number only.
    nearest_of(own, |level| unsafe { bpf_get_current_ancestor_cgroup_id(level) })
}

/// That of a cgroup: what was found the last time, or what is found now. `ancestor` gives the id of the cgroup at a level, 0
/// below the last one.
#[inline(always)]
pub(crate) fn nearest_of(cgroup: u64, ancestor: impl Fn(i32) -> u64) -> Classified {
    let generation = sieve::generation();
    let (id, entry) = match sieve::kept(cgroup, generation) {
        Some(kept) => kept,
        None => {
            let found = walk(sieve::after(generation), ancestor);
            // Else the task was moved meanwhile, or lies too deep: what was found is not this cgroup's.
            if found.deepest == cgroup {
                sieve::keep(cgroup, generation, (found.id, found.entry));
            }
            (found.id, found.entry)
        }
    };
    Classified { id, entry }
}

/// What a step of a walk up the tree has.
#[repr(C)]
struct Walking<A> {
    walk: Walk,
    ancestor: A,
}

/// Unrolled, each level would double what the verifier has to look at behind it.
#[inline(always)]
fn walk<A: Fn(i32) -> u64>(after: u32, ancestor: A) -> Walk {
    let mut walking = Walking { walk: Walk::begin(after, &ancestor), ancestor };
    let context = core::ptr::from_mut(&mut walking);
    // SAFETY: the context lives longer than the loop, and is what the step expects.
    unsafe { bpf_loop(LEVELS_MAX, step::<A> as *mut c_void, context.cast(), 0) };
    // SAFETY: valid; the loop has written it.
    unsafe { addr_of!((*context).walk).read_volatile() }
}

/// One step; 1 ends the loop.
#[inline(never)]
unsafe extern "C" fn step<A: Fn(i32) -> u64>(index: u32, walking: *mut Walking<A>) -> i64 {
    // SAFETY: as `walk` has made it, and nobody else has it meanwhile.
    let Walking { walk, ancestor } = unsafe { &mut *walking };
    i64::from(walk.step(index as i32 + 1, &*ancestor, entry))
}

/// What is known of this very cgroup.
#[inline(always)]
pub(crate) fn entry(cgroup: u64) -> Option<CgroupEntry> {
    // SAFETY: entries are written whole by user space; one that is replaced while it is read belongs to the same
    // cgroup, whose verdict changes at this moment anyway.
    unsafe { CGROUPS.get(&cgroup) }.copied()
}

/// The port of the listener in a network namespace inside a pod; 0 if there is none.
#[inline(always)]
pub(crate) fn nested_listener(cgroup: u64, netns: u64) -> u32 {
    // SAFETY: values are single words.
    unsafe { NESTED.get(&NestedKey { cgroup, netns }) }.copied().unwrap_or(0)
}

/// The settings; the map always has them.
#[inline(always)]
pub(crate) fn settings() -> Option<&'static Settings> {
    SETTINGS.get(0)
}

/// The same number, of which the verifier knows nothing. What it knows, it follows: behind each number that is one of two it looks at
/// everything twice, behind an unknown one only at the next branch. These bits are never set, since the tree has few levels.
///
/// An instruction of the kernel's, and not the compiler's: that would put it off to where the number is compared, and keep what is known
/// until then.
#[inline(always)]
pub(crate) fn unknown(settings: &Settings, mut number: u64) -> u64 {
    // SAFETY: a reference is valid; whatever writes the map meanwhile sets none of these bits.
    let zero = u64::from(unsafe { addr_of!(settings.attach_levels).read_volatile() } >> 8);
    // SAFETY: two numbers, and nothing else.
    unsafe {
        asm!("{number} ^= {zero}", number = inout(reg) number, zero = in(reg) zero | zero << 32, options(nomem, nostack));
    }
    number
}

/// Whether this is the cookie of the host's network namespace; not if the host's is not known.
#[inline(always)]
pub(crate) fn in_host_netns(settings: Option<&Settings>, netns: u64) -> bool {
    match settings {
        Some(settings) => settings.host_netns != 0 && settings.host_netns == netns,
        None => false,
    }
}

/// A flow record of the calling task, whose cgroup is known, with the destination that it dialled and the time, if that is of
/// interest: to read the clock is a good part of what a hook costs.
#[inline(always)]
pub(crate) fn record(
    original: ApiEndpoint,
    cluster: u32,
    (cgroup, pod_cgroup): (u64, u64),
    netns: u64,
    connected_boottime_ns: u64,
) -> FlowRecord {
    let (tgid, uid) = process();
    FlowRecord { original, cluster, cgroup, pod_cgroup, netns, connected_boottime_ns, tgid, uid }
}

/// Now, in ns since boot.
#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: no arguments.
    unsafe { bpf_ktime_get_boot_ns() }
}

/// Ticks of the kernel's timer since boot: a word of memory, where the clock is read in as much time as an address is judged.
#[inline(always)]
pub(crate) fn ticks() -> u64 {
    // SAFETY: no arguments.
    unsafe { bpf_jiffies64() }
}

/// Now, in ns since boot by the kernel's timer: no more than a tick behind.
#[inline(always)]
pub(crate) fn coarse_now() -> u64 {
    ticks() * tick_ns()
}

/// How long a tick is, ns.
#[inline(always)]
fn tick_ns() -> u64 {
    // SAFETY: a word that the agent sets before the programs are loaded, and nobody afterwards.
    unsafe { addr_of!(TICK_NS).read_volatile() }
}

/// When this tick was, in ns since boot, at most two ticks too late; never too early, as long as ticks do not get lost.
#[inline(always)]
pub(crate) fn time_of(tick: u64) -> u64 {
    let passed = ticks().saturating_sub(tick);
    // The present tick may have begun just now.
    now().saturating_sub(passed.saturating_sub(1) * tick_ns())
}

/// Thread group and user of the calling task.
#[inline(always)]
pub(crate) fn process() -> (u32, u32) {
    (thread_group(), bpf_get_current_uid_gid() as u32)
}

/// Thread group alone.
#[inline(always)]
pub(crate) fn thread_group() -> u32 {
    (bpf_get_current_pid_tgid() >> 32) as u32
}

/// Counts a connect that is redirected. Most of what is counted is that, so it has a place at hand.
#[inline(always)]
pub(crate) fn count_redirect(pod_cgroup: u64) {
    if let Some(slot) = POD_SLOTS.get_ptr_mut(pod_slot(pod_cgroup)) {
        // SAFETY: the map has this entry, and this CPU's value is written by this CPU alone; whose it is, the agent writes.
        unsafe {
            if (*slot).cgroup == pod_cgroup {
                (*slot).redirected = (*slot).redirected.wrapping_add(1);
                count_node(&[Counter::Seen, Counter::Redirected]);
                return;
            }
        }
    }
    count_all(&[Counter::Seen, Counter::Redirected], pod_cgroup);
}

/// Adds one to a counter, and to that of the pod if the agent has made one.
#[inline(always)]
pub(crate) fn count(counter: Counter, pod_cgroup: u64) {
    count_all(&[counter], pod_cgroup);
}

/// The same for several counters at once.
#[inline(always)]
pub(crate) fn count_all<const N: usize>(counters: &[Counter; N], pod_cgroup: u64) {
    count_node(counters);
    // What is of no pod has none: no look-up for it.
    if pod_cgroup != 0
        && let Some(values) = POD_COUNTERS.get_ptr_mut(&pod_cgroup)
    {
        for counter in counters {
            // SAFETY: the index is that of a counter, and so within the value, which is this CPU's own.
            unsafe {
                let value = addr_of_mut!((*values)[*counter as usize]);
                *value = (*value).wrapping_add(1);
            }
        }
    }
}

/// Counts what a hook has seen, and what has become of it by the counter's number. That is [unknown], lest the compiler find it another
/// way and the verifier not see that it was compared.
#[inline(always)]
pub(crate) fn count_number(settings: &Settings, counter: u32, pod_cgroup: u64) {
    for counter in [Counter::Seen as u32, counter] {
        if let Some(value) = COUNTERS.get_ptr_mut(counter) {
            // SAFETY: the map has this entry, and this CPU's value is written by this CPU alone.
            unsafe { *value = (*value).wrapping_add(1) };
        }
    }
    let counter = unknown(settings, u64::from(counter));
    if pod_cgroup != 0
        && let Some(values) = POD_COUNTERS.get_ptr_mut(&pod_cgroup)
        && counter < u64::from(COUNTERS_MAX)
    {
        for counter in [Counter::Seen as u64, counter] {
            // SAFETY: the index is within the value, which is this CPU's own.
            unsafe {
                let value = addr_of_mut!((*values)[counter as usize]);
                *value = (*value).wrapping_add(1);
            }
        }
    }
}

/// Adds one to counters of the node.
#[inline(always)]
fn count_node<const N: usize>(counters: &[Counter; N]) {
    for counter in counters {
        if let Some(value) = COUNTERS.get_ptr_mut(*counter as u32) {
            // SAFETY: the map has this entry, and this CPU's value is written by this CPU alone.
            unsafe { *value = (*value).wrapping_add(1) };
        }
    }
}

/// Puts a notice into the ring buffer, or counts that it did not fit.
#[inline(always)]
pub(crate) fn report(kind: NoticeKind, protocol: u32, flow: &FlowRecord) {
    report_whole(&Notice { flow: *flow, kind: kind as u32, protocol });
}

/// The same of one that is whole already.
#[inline(always)]
pub(crate) fn report_whole(notice: &Notice) {
    if NOTICES.output::<Notice>(notice, 0).is_err() {
        count(Counter::NoticesLost, notice.flow.pod_cgroup);
    }
}
