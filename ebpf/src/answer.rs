//! `cgroup_skb/ingress`: what name servers tell pods. An address that a pod is told for a configured host name is held for an API
//! server's, for that pod, before the answer is the pod's; the agent says later what it is.
//!
//! The answer to a question for such a name that cannot be read, or whose addresses cannot be noted, is kept from the pod.

use core::ptr::{addr_of, addr_of_mut};

use aya_ebpf::{
    bindings::{__sk_buff, BPF_ANY, bpf_sock},
    cty::c_void,
    helpers::generated::{
        bpf_loop, bpf_sk_ancestor_cgroup_id, bpf_sk_cgroup_id, bpf_sk_fullsock, bpf_skb_load_bytes,
    },
};
use weir_common::{
    answer::{ADDRESSES_MAX, KeptAnswer, MESSAGE_BYTES_MAX, NAMES_MAX, Outcome, Reading, STEPS_MAX},
    kernel::{
        ApiEndpoint, Class, FlowRecord, NAME_ENDPOINTS_MAX, NoticeKind, STEP_SHIFT, STEPS_AHEAD_MAX,
        SUSPECTED_BY_POD_MAX, Suspect, Suspicion,
    },
    packet::{self, PORT_UNKNOWN, Payload},
};

use crate::{
    NAMES, PROCEED, READING, REJECT, SPENT, SUSPECTED, SUSPICIONS, class,
    guard::{Buffer, may_report},
    sieve, socket,
};

/// The port of name servers.
const DOMAIN: u16 = 53;
/// `IPPROTO_UDP`, `IPPROTO_TCP`.
const UDP: u32 = 17;
const TCP: u32 = 6;
/// The key that the map of names has if it has any other.
const ANY_NAME: u64 = 0;

/// What a step has of the program that takes it.
#[repr(C)]
struct Context {
    reading: *mut Reading,
    cgroup: u64,
    failed: u64,
}

/// What reading a pod's answers has cost and is not made good for; nobody is asked whose time it is on which they come in.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Spent {
    /// As of when, ns since boot, by the kernel's timer.
    at: u64,
    steps: u64,
}

/// Has the answers read that a socket gets which goes to this address and port; whether that is so, or nobody would read them.
#[inline(always)]
pub(crate) fn will_be_heard(sock: *mut c_void, address: [u32; 4], port: u32) -> bool {
    // SAFETY: an entry is written whole.
    if port != u32::from(DOMAIN) || unsafe { NAMES.get(&ANY_NAME) }.is_none() {
        return true;
    }
    // A pod could see to it that there is no room for the note (`net.core.optmem_max`): then it does not ask. What is not the
    // programs' own is no pod's, or one's in the host's network, and asks.
    // SAFETY: what the caller has of its hook.
    if unsafe { socket::asks(sock, socket::server(address)) || socket::storage(sock, None).is_none() } {
        return true;
    }
    let nearest = class::nearest(class::own());
    nearest.id == 0 || may_know(nearest.entry.class)
}

/// Whoever may go to an API server may know where it is.
#[inline(always)]
fn may_know(class: u32) -> bool {
    matches!(Class::from_number(class), Some(Class::Agent | Class::Unselected | Class::Observed))
}

/// Whether an answer is one to a question of this socket. A stranger could else have a pod told what it likes, and keep it from every
/// address.
#[inline(always)]
fn is_asked_for(sock: *mut bpf_sock, stream: bool) -> bool {
    // SAFETY: what the caller has of its hook.
    if unsafe { socket::asked(sock.cast()) }.is_some() {
        return true;
    }
    // Connections without a note may be accepted ones, which never ask.
    if stream {
        return false;
    }
    // Nor have notes what is of before the programs were attached, and of the host's network. Who is connected hears nobody else.
    // SAFETY: as above.
    unsafe { (*sock).dst_port == DOMAIN.to_be() || socket::storage(sock.cast(), None).is_none() }
}

/// Reports that a socket of the calling task does not get to a name server.
#[inline(always)]
pub(crate) fn report_unheard(original: ApiEndpoint, protocol: u32) {
    let cgroup = class::own();
    if let Some(now) = may_report(cgroup, NoticeKind::QuestionRefused) {
        let nearest = class::nearest(cgroup);
        let flow = class::record(original, 0, (cgroup, nearest.id), 0, now);
        class::report(NoticeKind::QuestionRefused, protocol, &flow);
    }
}

/// Whether a packet comes from the name server that its socket has gone to last. Others' have an account of their own: what strangers
/// send must not cost a pod the answers to its questions.
#[inline(always)]
fn is_from_who_was_asked(skb: *mut __sk_buff, sock: *mut bpf_sock) -> bool {
    // SAFETY: what the caller has of its hook.
    match (unsafe { socket::asked(sock.cast()) }, packet::source(&Buffer(skb))) {
        (Some(asked), Some(source)) => asked == socket::server(source),
        _ => false,
    }
}

#[inline(always)]
pub(crate) fn ingress(skb: *mut __sk_buff) -> i32 {
    let Some(payload) = packet::payload_from(&Buffer(skb), DOMAIN) else { return PROCEED };
    // SAFETY: an entry is written whole.
    if unsafe { NAMES.get(&ANY_NAME) }.is_none() {
        return PROCEED;
    }
    // SAFETY: the context is valid while the program runs; the helper takes null.
    let sock: *mut bpf_sock = unsafe {
        let sock = (*skb).__bindgen_anon_2.sk;
        if sock.is_null() { sock } else { bpf_sk_fullsock(sock) }
    };
    // The segments of a connection that is being opened or closed carry nothing.
    if sock.is_null() {
        return PROCEED;
    }
    // SAFETY: not null, and the verifier knows it for a full socket.
    let cgroup = unsafe { bpf_sk_cgroup_id(sock.cast()) };
    let nearest = class::nearest_of(cgroup, |level| {
        // SAFETY: as above.
        unsafe { bpf_sk_ancestor_cgroup_id(sock.cast(), level) }
    });
    if nearest.id == 0 {
        return PROCEED;
    }
    if may_know(nearest.entry.class) {
        return PROCEED;
    }
    let Some(reading) = READING.get_ptr_mut(0) else { return REJECT };
    let mut context = Context { reading, cgroup: nearest.id, failed: 0 };
    // Below a root of pods each that is not known yet has its own.
    let payer = if nearest.entry.class == Class::Container as u32 { cgroup } else { nearest.id };
    let account = payer << 1 | u64::from(is_from_who_was_asked(skb, sock));
    let why = match heard(skb, payload, &mut context, account, is_asked_for(sock, payload.stream)) {
        Ok(()) => return PROCEED,
        Err(why) => why,
    };
    if let Some(now) = may_report(cgroup, NoticeKind::AnswerRefused) {
        let flow = FlowRecord {
            original: match packet::source(&Buffer(skb)) {
                Some(source) => ApiEndpoint { address: socket::address(source), port: u32::from(DOMAIN) },
                None => socket::NO_ENDPOINT,
            },
            cluster: 0,
            cgroup,
            pod_cgroup: nearest.id,
            netns: 0,
            connected_boottime_ns: now,
            tgid: 0,
            uid: 0,
        };
        let protocol = why.with(if payload.stream { TCP } else { UDP });
        class::report(NoticeKind::AnswerRefused, protocol, &flow);
    }
    REJECT
}

/// Reads an answer, and notes what it tells; or why the pod may not have it. What it has not `asked` for it may not have, if it is
/// about a configured name: else one socket would ask and another one, at the same port, hear. The steps are taken at the `account`'s cost.
#[inline(always)]
fn heard(
    skb: *mut __sk_buff,
    payload: Payload,
    context: &mut Context,
    account: u64,
    asked: bool,
) -> Result<(), KeptAnswer> {
    // SAFETY: the context is valid while the program runs.
    let (whole, segments) = unsafe { ((*skb).len, (*skb).gso_segs) };
    if whole <= payload.offset {
        return Ok(());
    }
    let mut length = whole - payload.offset;
    if !payload.stream && (length > MESSAGE_BYTES_MAX as u32 || segments > 1) {
        // No name server's, or several datagrams in one, for a socket that asked for that.
        return Err(KeptAnswer::TooLong);
    }
    if length > MESSAGE_BYTES_MAX as u32 {
        length = MESSAGE_BYTES_MAX as u32;
    }
    if spent(account) > STEPS_AHEAD_MAX {
        return Err(KeptAnswer::TooMany);
    }
    let reading = context.reading;
    // SAFETY: this CPU's entry of the map, and nothing else of the kind runs on it meanwhile.
    unsafe {
        (*reading).begin(length, payload.stream);
        // Read back, so that the compiler knows nothing of it and the verifier all.
        let length = (addr_of!((*reading).length).read_volatile().wrapping_sub(1)
            & (MESSAGE_BYTES_MAX as u32 - 1))
            + 1;
        let bytes = addr_of_mut!((*reading).bytes).cast::<c_void>();
        // Here a packet begins with its network header. Not the helper that says so: it reads no further than the first page.
        if bpf_skb_load_bytes(skb.cast(), payload.offset, bytes, length) != 0 {
            return Err(KeptAnswer::Unreadable);
        }
        let context = core::ptr::from_mut(context).cast::<c_void>();
        let steps = bpf_loop(STEPS_MAX, step as *mut c_void, context, 0);
        spend(account, steps as u64);
    }
    // SAFETY: as above.
    match unsafe { (*reading).outcome() } {
        Outcome::Pass => Ok(()),
        Outcome::Refuse => Err(KeptAnswer::Unreadable),
        Outcome::Told if !asked => Err(KeptAnswer::NotAskedFor),
        Outcome::Told => {
            // SAFETY: as above.
            let told = unsafe { addr_of!((*reading).told).read_volatile() };
            let all = told * (NAMES_MAX * NAME_ENDPOINTS_MAX) as u32;
            spend(account, u64::from(all));
            // SAFETY: the context lives longer than the loop.
            unsafe { bpf_loop(all, note as *mut c_void, core::ptr::from_mut(context).cast(), 0) };
            // SAFETY: valid; the loop may have written it.
            let noted = unsafe { addr_of!((*context).failed).read_volatile() == 0 };
            if noted { Ok(()) } else { Err(KeptAnswer::NoRoom) }
        }
    }
}

/// What an account has spent and not made good for, in steps.
#[inline(always)]
fn spent(account: u64) -> u64 {
    // SAFETY: what several CPUs write at a time is a little too little.
    match unsafe { SPENT.get(&account) } {
        Some(spent) => {
            let made_good = class::coarse_now().saturating_sub(spent.at) >> STEP_SHIFT;
            spent.steps.saturating_sub(made_good)
        }
        None => 0,
    }
}

#[inline(always)]
fn spend(account: u64, steps: u64) {
    let new = Spent { at: class::coarse_now(), steps: spent(account) + steps };
    match SPENT.get_ptr_mut(&account) {
        // SAFETY: as above.
        Some(kept) => unsafe { *kept = new },
        // That it does not fit means that the next one costs nothing.
        None => _ = SPENT.insert(&account, &new, u64::from(BPF_ANY)),
    }
}

/// One step; 1 ends the loop.
#[inline(never)]
unsafe extern "C" fn step(_index: u32, context: *mut Context) -> i64 {
    // SAFETY: as `heard` has made it.
    let ended = unsafe {
        (*(*context).reading).step(|hash| {
            // The one key that is no name's.
            hash != ANY_NAME && NAMES.get(&hash).is_some()
        })
    };
    i64::from(ended)
}

/// Notes one address as one port of one name.
#[inline(never)]
unsafe extern "C" fn note(index: u32, context: *mut Context) -> i64 {
    let endpoint = index as usize % NAME_ENDPOINTS_MAX;
    let name = index as usize / NAME_ENDPOINTS_MAX % NAMES_MAX;
    let address = index as usize / (NAME_ENDPOINTS_MAX * NAMES_MAX) % ADDRESSES_MAX;
    // SAFETY: as `heard` has made it; the indices are within their arrays.
    let (hash, address, cgroup) = unsafe {
        let reading = (*context).reading;
        if name as u32 >= (*reading).named {
            return 0;
        }
        ((*reading).names[name], (*reading).addresses[address], (*context).cgroup)
    };
    // SAFETY: an entry is written whole.
    let Some(named) = (unsafe { NAMES.get(&hash) }) else { return 0 };
    let endpoint = named.endpoints[endpoint];
    if endpoint.port == 0 || sieve::api_set(&ApiEndpoint { address, port: endpoint.port }) != sieve::NONE {
        return 0;
    }
    let suspicion = Suspicion { name: hash, cluster: endpoint.cluster, filling: 0 };
    let known = Suspect { cgroup, address, port: endpoint.port, filling: 0 };
    let any = Suspect { port: PORT_UNKNOWN, ..known };
    // The guards look for the address first.
    if !sieve::doubt(address) || !suspect(&any, &suspicion) || !suspect(&known, &suspicion) {
        // SAFETY: as above.
        unsafe { addr_of_mut!((*context).failed).write_volatile(1) };
        return 1;
    }
    0
}

/// Notes it, if there is room for one more of this pod.
#[inline(always)]
fn suspect(key: &Suspect, suspicion: &Suspicion) -> bool {
    // SAFETY: an entry is written whole.
    if unsafe { SUSPECTED.get(key) }.is_some() {
        return true;
    }
    match SUSPICIONS.get_ptr_mut(&key.cgroup) {
        // SAFETY: a single word; where several CPUs count at a time, some more have room.
        Some(count) => unsafe {
            let counted = count.read_volatile();
            if counted >= SUSPECTED_BY_POD_MAX {
                return false;
            }
            count.write_volatile(counted + 1);
        },
        None if SUSPICIONS.insert(&key.cgroup, &1, u64::from(BPF_ANY)).is_err() => return false,
        None => {}
    }
    SUSPECTED.insert(key, suspicion, u64::from(BPF_ANY)).is_ok()
}
