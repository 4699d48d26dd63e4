//! The maps, and the kernel's answers, as the core wants them.

use core::{ffi::c_void, marker::PhantomData};

use aya_ebpf::{
    EbpfContext, Global,
    bindings::{
        __sk_buff, BPF_F_NO_PREALLOC, BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_FWD_DISABLED,
        BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, BPF_NOEXIST, bpf_fib_lookup as FibLookup,
        bpf_sock_tuple as SocketTuple,
    },
    helpers::{bpf_fib_lookup, bpf_ktime_get_coarse_ns, bpf_ktime_get_ns},
    macros::map,
    maps::{
        Array, HashMap, LruHashMap, PerCpuArray,
        lpm_trie::{Key, LpmTrie},
    },
    programs::{TcContext, XdpContext},
};
use forwarder_common::{
    address::{Address as _, Ipv4, Ipv6, Macs},
    decide::Scratch,
    family::Family,
    flow::{Flow, FlowKey, Hop, Tuple},
    fragment::{FragmentKey, Held, HeldKey, Train},
    layout::{DEFAULT_MARK, Hook, Interface, Settings},
    pipeline::Seen,
    reason::Reason,
    rule::{AllowKey, Page, PageKey, Rule},
    sessions::{Sessions, SessionsKey},
    tables::{Flows, Refused, Route, RouteQuery, Stage, Surroundings, World},
};

use crate::{sessions, sockets};

pub const AF_INET: u32 = 2;
pub const AF_INET6: u32 = 10;

const EEXIST: i32 = -17;

// Sizes of 1 are set when the object is loaded.

#[map]
static SETTINGS: Array<Settings> = Array::pinned(1, 0);
#[map]
static INTERFACES: HashMap<u32, Interface> = HashMap::pinned(256, 0);
#[map]
static PORTS: HashMap<PageKey, Page> = HashMap::pinned(1, BPF_F_NO_PREALLOC);
/// What addresses, of either family, are to this router.
#[map]
static ROLES: HashMap<Ipv6, u8> = HashMap::pinned(1, BPF_F_NO_PREALLOC);
#[map]
static RULES: Array<Rule> = Array::pinned(1, 0);
#[map]
static ALLOW: LpmTrie<AllowKey, u8> = LpmTrie::pinned(1, 0);
#[map]
static FLOWS: HashMap<FlowKey<Ipv4>, Flow<Ipv4>> = HashMap::pinned(1, 0);
#[map]
static FLOWS_IPV6: HashMap<FlowKey<Ipv6>, Flow<Ipv6>> = HashMap::pinned(1, 0);
#[map]
static HALF_OPEN: LruHashMap<FlowKey<Ipv4>, Flow<Ipv4>> = LruHashMap::pinned(1, 0);
#[map]
static HALF_OPEN_IPV6: LruHashMap<FlowKey<Ipv6>, Flow<Ipv6>> = LruHashMap::pinned(1, 0);
/// Fragmented packets whose later parts may be on their way; a flood of others evicts them.
#[map]
static FRAGMENTS: LruHashMap<FragmentKey<Ipv4>, Train> = LruHashMap::pinned(16_384, 0);
#[map]
static FRAGMENTS_IPV6: LruHashMap<FragmentKey<Ipv6>, Train> = LruHashMap::pinned(4096, 0);
/// Fragments that wait for the first one of their packet; a flood of others evicts them.
#[map]
static HELD: LruHashMap<HeldKey<Ipv4>, Held> = LruHashMap::pinned(512, 0);
#[map]
static HELD_IPV6: LruHashMap<HeldKey<Ipv6>, Held> = LruHashMap::pinned(256, 0);
/// When the host was last seen to talk from a mapped port, under the key of the answers, of either family.
#[map]
static HOST_SESSIONS: LruHashMap<FlowKey<Ipv6>, u64> = LruHashMap::pinned(65_536, 0);
/// For each rule, when a packet of it last went to find out whether its neighbour still answers.
#[map]
static PROBES: Array<u64> = Array::pinned(1, 0);

/// What one packet needs and the 512 bytes of stack do not hold.
pub struct Workspace<A: Family> {
    pub seen: Seen<A>,
    pub scratch: Scratch<A>,
}

#[map]
static WORKSPACE: PerCpuArray<Workspace<Ipv4>> = PerCpuArray::with_max_entries(1, 0);
#[map]
static WORKSPACE_IPV6: PerCpuArray<Workspace<Ipv6>> = PerCpuArray::with_max_entries(1, 0);

/// A family with its tables, and its words in the kernel's structures.
pub trait Tabled: Family {
    /// The address family's number.
    const AF: u32;

    fn established() -> &'static HashMap<FlowKey<Self>, Flow<Self>>;
    fn half_open() -> &'static LruHashMap<FlowKey<Self>, Flow<Self>>;
    fn fragments() -> &'static LruHashMap<FragmentKey<Self>, Train>;
    fn held() -> &'static LruHashMap<HeldKey<Self>, Held>;
    fn workspaces() -> &'static PerCpuArray<Workspace<Self>>;

    /// Writes a tuple in the form in which sockets are looked for; gives the form's length.
    fn seek(tuple: &Tuple<Self>, sought: &mut SocketTuple) -> u32;

    /// An address as the kernel's structures that hold either family have it.
    fn words(address: Self) -> [u32; 4];

    /// [`RouteQuery::class`] likewise.
    fn class(class: u32) -> u32;

    /// This CPU's workspace; always there.
    #[inline(always)]
    fn workspace() -> Option<&'static mut Workspace<Self>> {
        // SAFETY: this CPU's own element, and the hooks' programs do not interrupt each other on one
        // CPU: they run with bottom halves off. Zeroes, which it starts as, are a value of the type.
        Self::workspaces().get_ptr_mut(0).map(|workspace| unsafe { &mut *workspace })
    }
}

impl Tabled for Ipv4 {
    const AF: u32 = AF_INET;

    #[inline(always)]
    fn established() -> &'static HashMap<FlowKey<Self>, Flow<Self>> {
        &FLOWS
    }

    #[inline(always)]
    fn half_open() -> &'static LruHashMap<FlowKey<Self>, Flow<Self>> {
        &HALF_OPEN
    }

    #[inline(always)]
    fn fragments() -> &'static LruHashMap<FragmentKey<Self>, Train> {
        &FRAGMENTS
    }

    #[inline(always)]
    fn held() -> &'static LruHashMap<HeldKey<Self>, Held> {
        &HELD
    }

    #[inline(always)]
    fn workspaces() -> &'static PerCpuArray<Workspace<Self>> {
        &WORKSPACE
    }

    #[inline(always)]
    fn seek(tuple: &Tuple<Self>, sought: &mut SocketTuple) -> u32 {
        // SAFETY: all members of the union are plain integers.
        let ipv4 = unsafe { &mut sought.__bindgen_anon_1.ipv4 };
        (ipv4.saddr, ipv4.daddr) = (tuple.src.word(), tuple.dst.word());
        (ipv4.sport, ipv4.dport) = (tuple.src_port.word(), tuple.dst_port.word());
        size_of_val(ipv4) as u32
    }

    #[inline(always)]
    fn words(address: Self) -> [u32; 4] {
        [address.word(), 0, 0, 0]
    }

    /// A byte, the first.
    #[inline(always)]
    fn class(class: u32) -> u32 {
        u32::from_ne_bytes([class as u8, 0, 0, 0])
    }
}

impl Tabled for Ipv6 {
    const AF: u32 = AF_INET6;

    #[inline(always)]
    fn established() -> &'static HashMap<FlowKey<Self>, Flow<Self>> {
        &FLOWS_IPV6
    }

    #[inline(always)]
    fn half_open() -> &'static LruHashMap<FlowKey<Self>, Flow<Self>> {
        &HALF_OPEN_IPV6
    }

    #[inline(always)]
    fn fragments() -> &'static LruHashMap<FragmentKey<Self>, Train> {
        &FRAGMENTS_IPV6
    }

    #[inline(always)]
    fn held() -> &'static LruHashMap<HeldKey<Self>, Held> {
        &HELD_IPV6
    }

    #[inline(always)]
    fn workspaces() -> &'static PerCpuArray<Workspace<Self>> {
        &WORKSPACE_IPV6
    }

    #[inline(always)]
    fn seek(tuple: &Tuple<Self>, sought: &mut SocketTuple) -> u32 {
        // SAFETY: as of IPv4.
        let ipv6 = unsafe { &mut sought.__bindgen_anon_1.ipv6 };
        (ipv6.saddr, ipv6.daddr) = (tuple.src.words(), tuple.dst.words());
        (ipv6.sport, ipv6.dport) = (tuple.src_port.word(), tuple.dst_port.word());
        size_of_val(ipv6) as u32
    }

    #[inline(always)]
    fn words(address: Self) -> [u32; 4] {
        address.words()
    }

    #[inline(always)]
    fn class(class: u32) -> u32 {
        class
    }
}

/// What is asked of the kernel's routing, and its answer: too much for the stack.
#[map]
static LOOKUP: PerCpuArray<FibLookup> = PerCpuArray::with_max_entries(1, 0);

/// This CPU's; always there.
#[inline(always)]
fn lookup() -> Option<&'static mut FibLookup> {
    // SAFETY: as in `Tabled::workspace`.
    LOOKUP.get_ptr_mut(0).map(|params| unsafe { &mut *params })
}

/// Bytes of a packet that are summed at once: the most that `bpf_csum_diff` takes.
pub const CHUNK_LEN: usize = 512;

/// Some of a packet's bytes, and room to fill up a word.
pub struct Chunk(pub [u8; CHUNK_LEN + 4]);

#[map]
static CHUNK: PerCpuArray<Chunk> = PerCpuArray::with_max_entries(1, 0);

/// This CPU's chunk; always there.
#[inline(always)]
pub fn chunk() -> Option<&'static mut Chunk> {
    // SAFETY: as in `Tabled::workspace`.
    CHUNK.get_ptr_mut(0).map(|chunk| unsafe { &mut *chunk })
}

/// Where a fragment that is to be held is put together.
#[map]
static HOLDING: PerCpuArray<Held> = PerCpuArray::with_max_entries(1, 0);

/// This CPU's fragment to be; always there.
#[inline(always)]
pub fn holding() -> Option<&'static mut Held> {
    // SAFETY: as in `Tabled::workspace`.
    HOLDING.get_ptr_mut(0).map(|held| unsafe { &mut *held })
}

/// A fragment that is held.
#[inline(always)]
pub fn held<A: Tabled>(key: &HeldKey<A>) -> Option<&'static Held> {
    // SAFETY: as in `FlowMaps::find`: the worst is that another fragment comes in, or bytes of two, whose
    // checksums do not fit.
    unsafe { A::held().get(key) }
}

/// 1 where the kernel has `bpf_ktime_get_coarse_ns` (5.11); the verifier removes the other branch.
#[unsafe(no_mangle)]
static COARSE_CLOCK: Global<u8> = Global::new(1);

/// See [`DEFAULT_MARK`].
#[unsafe(no_mangle)]
static MARK: Global<u32> = Global::new(DEFAULT_MARK);

/// The mark of what goes through the host's stack.
#[inline(always)]
pub fn mark() -> u32 {
    MARK.load()
}

const PROBE_INTERVAL: u64 = 1_000_000_000;

/// Where a program runs, at compile time.
pub trait Place {
    const HOOK: Hook;
}

pub struct AtXdp;
pub struct AtTcIngress;
pub struct AtTcEgress;

impl Place for AtXdp {
    const HOOK: Hook = Hook::Xdp;
}
impl Place for AtTcIngress {
    const HOOK: Hook = Hook::TcIngress;
}
impl Place for AtTcEgress {
    const HOOK: Hook = Hook::TcEgress;
}

/// The flow tables as BPF hash maps.
pub struct FlowMaps;

impl<A: Tabled> Flows<A> for FlowMaps {
    #[inline(always)]
    fn find(&mut self, stage: Stage, key: &FlowKey<A>) -> Option<&mut Flow<A>> {
        let flow = match stage {
            Stage::Established => A::established().get_ptr_mut(key),
            Stage::HalfOpen => A::half_open().get_ptr_mut(key),
        }?;
        // SAFETY: the kernel keeps the element's memory for as long as the program runs. Another
        // CPU may write its counters and hop at the same moment, or the element may be freed and
        // taken by another flow: all its fields are plain integers, none of them used as an
        // address, so the worst is one packet sent by the other flow's entry.
        Some(unsafe { &mut *flow })
    }

    #[inline(always)]
    fn insert_new(&mut self, stage: Stage, key: &FlowKey<A>, flow: &Flow<A>) -> Result<(), Refused> {
        let flags = u64::from(BPF_NOEXIST);
        match stage {
            Stage::Established => A::established().insert(key, flow, flags),
            Stage::HalfOpen => A::half_open().insert(key, flow, flags),
        }
        .map_err(|error| if error == EEXIST { Refused::Exists } else { Refused::Full })
    }

    #[inline(always)]
    fn remove(&mut self, stage: Stage, key: &FlowKey<A>) {
        // Gone already is as good.
        let _ = match stage {
            Stage::Established => A::established().remove(key),
            Stage::HalfOpen => A::half_open().remove(key),
        };
    }

    /// Of two CPUs at once both may read 2 behind their steps, and none is the first: then the
    /// controller has to find out that the session is over.
    #[inline(always)]
    fn is_first_end(&mut self, inward: &FlowKey<A>) -> bool {
        let Some(flow) = A::established().get_ptr_mut(inward) else { return false };
        // SAFETY: as in `find`; the field is an aligned integer.
        unsafe {
            let ends = &raw mut (*flow).ends;
            if ends.read_volatile() != 0 {
                return false;
            }
            sessions::add_u32(ends, 1);
            ends.read_volatile() == 1
        }
    }

    #[inline(always)]
    fn train(&mut self, key: &FragmentKey<A>) -> Option<Train> {
        // SAFETY: as in `find`; what is copied are plain integers.
        unsafe { A::fragments().get(key).copied() }
    }

    #[inline(always)]
    fn remember(&mut self, key: &FragmentKey<A>, train: &Train) {
        // Without it the later fragments are not delivered, as if it had been evicted.
        let _ = A::fragments().insert(key, train, 0);
    }

    #[inline(always)]
    fn is_held(&mut self, key: &HeldKey<A>, now: u64) -> bool {
        held(key).is_some_and(|held| now < held.expires)
    }

    #[inline(always)]
    fn host_session(&mut self, key: &FlowKey<A>) -> Option<&mut u64> {
        // SAFETY: as in `find`.
        HOST_SESSIONS.get_ptr_mut(key.mapped()).map(|last_seen| unsafe { &mut *last_seen })
    }

    #[inline(always)]
    fn note_host_session(&mut self, key: &FlowKey<A>, now: u64) {
        // Its next packet tries again.
        let _ = HOST_SESSIONS.insert(key.mapped(), now, 0);
    }
}

impl Sessions for FlowMaps {
    #[inline(always)]
    fn sessions(&mut self, key: &SessionsKey) -> i64 {
        sessions::sessions(key)
    }

    #[inline(always)]
    fn count_sessions(&mut self, key: &SessionsKey, by: i64) -> Result<(), Refused> {
        sessions::count(key, by)
    }

    #[inline(always)]
    fn due(&mut self, slot: u32) -> u64 {
        sessions::due(slot)
    }

    #[inline(always)]
    fn set_due(&mut self, slot: u32, due: u64) {
        sessions::set_due(slot, due);
    }

    #[inline(always)]
    fn postpone(&mut self, slot: u32, by: u64) {
        sessions::postpone(slot, by);
    }
}

/// What this kernel knows, seen from one packet.
pub struct Kernel<H> {
    ctx: *mut c_void,
    ifindex: u32,
    segment_size: u32,
    place: PhantomData<H>,
}

impl Kernel<AtXdp> {
    #[inline(always)]
    pub fn of_xdp(ctx: &XdpContext) -> Self {
        Self { ctx: ctx.as_ptr(), ifindex: ctx.ingress_ifindex() as u32, segment_size: 0, place: PhantomData }
    }
}

impl<H: Place> Kernel<H> {
    #[inline(always)]
    pub fn of_skb(ctx: &TcContext) -> Self {
        // SAFETY: the verifier lets a program read these fields of its own context.
        let (ifindex, gso_size) = unsafe { ((*ctx.skb.skb).ifindex, (*ctx.skb.skb).gso_size) };
        Self { ctx: ctx.as_ptr(), ifindex, segment_size: gso_size, place: PhantomData }
    }

    /// `bpf_fib_lookup` as for a packet that came in by this interface: policy rules and VRFs count.
    #[inline(always)]
    fn fib<A: Tabled>(&self, query: &RouteQuery<'_, A>, params: &mut FibLookup) -> i64 {
        params.family = A::AF as u8;
        params.l4_protocol = query.protocol;
        params.sport = query.tuple.src_port.word();
        params.dport = query.tuple.dst_port.word();
        params.__bindgen_anon_1.tot_len = 0;
        params.ifindex = self.ifindex;
        params.__bindgen_anon_2.flowinfo = A::class(query.class);
        params.__bindgen_anon_3.ipv6_src = A::words(query.tuple.src);
        params.__bindgen_anon_4.ipv6_dst = A::words(query.tuple.dst);
        params.__bindgen_anon_5.tbid = 0;
        // SAFETY: the context is this program's own, the block is of the size given.
        unsafe { bpf_fib_lookup(self.ctx, &raw mut *params, size_of::<FibLookup>() as i32, 0) }
    }
}

impl<H: Place> Surroundings for Kernel<H> {
    const HOOK: Hook = H::HOOK;

    #[inline(always)]
    fn now(&self) -> u64 {
        // SAFETY: both helpers only return a number.
        unsafe { if COARSE_CLOCK.load() == 1 { bpf_ktime_get_coarse_ns() } else { bpf_ktime_get_ns() } }
    }

    #[inline(always)]
    fn generation(&self) -> u32 {
        SETTINGS.get(0).map_or(0, |settings| settings.generation)
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        self.ifindex
    }

    #[inline(always)]
    fn segment_size(&self) -> u32 {
        self.segment_size
    }

    #[inline(always)]
    fn is_marked(&self) -> bool {
        // SAFETY: at TC the context is an skb's, and the verifier lets a program read this field of it.
        H::HOOK != Hook::Xdp && unsafe { (*self.ctx.cast::<__sk_buff>()).mark } & mark() != 0
    }

    #[inline(always)]
    fn interface(&self, ifindex: u32) -> Option<&Interface> {
        // SAFETY: elements are replaced only by the controller, rarely; see `FlowMaps::find`.
        unsafe { INTERFACES.get(ifindex) }
    }

    #[inline(always)]
    fn rule(&self, slot: u32) -> Option<&Rule> {
        RULES.get(slot)
    }

    #[inline(always)]
    fn claim_probe(&self, slot: u32, now: u64) -> bool {
        let Some(last) = PROBES.get_ptr_mut(slot) else { return false };
        // SAFETY: an aligned u64 of an array that is never freed; a race makes one probe more.
        unsafe {
            if now.wrapping_sub(*last) < PROBE_INTERVAL {
                return false;
            }
            *last = now;
        }
        true
    }
}

impl<A: Tabled, H: Place> World<A> for Kernel<H> {
    #[inline(always)]
    fn rule_for(&self, address: A, protocol: u8, port: u16) -> Option<u32> {
        // SAFETY: as in `interface`; one slot is read, once.
        unsafe { PORTS.get(PageKey::new(address.mapped(), protocol, port)) }?.slot(port)
    }

    #[inline(always)]
    fn is_allowed(&self, list: u32, source: A) -> bool {
        let key = AllowKey { list: list.to_be_bytes(), source: source.mapped() };
        ALLOW.get(Key::new(8 * size_of::<AllowKey>() as u32, key)).is_some()
    }

    #[inline(always)]
    fn roles(&self, address: A) -> u8 {
        // SAFETY: one byte is read, once.
        unsafe { ROLES.get(address.mapped()) }.copied().unwrap_or(0)
    }

    #[inline(always)]
    fn has_socket(&self, tuple: &Tuple<A>, protocol: u8) -> bool {
        sockets::is_there(self.ctx, tuple, protocol)
    }

    #[inline(always)]
    fn route(&self, query: &RouteQuery<'_, A>) -> Route {
        let Some(params) = lookup() else { return Route::None(Reason::NoRoute) };
        let answer = self.fib(query, params);
        // SAFETY: the family says which of the union's members the kernel has written.
        let next_hop = unsafe {
            match params.family as u32 {
                AF_INET => Ipv4::from_word(params.__bindgen_anon_4.ipv4_dst).mapped(),
                _ => Ipv6::from_words(params.__bindgen_anon_4.ipv6_dst),
            }
        };
        let ifindex = params.ifindex;
        match u32::try_from(answer).unwrap_or(u32::MAX) {
            // The length is checked by the core against the interface's MTU.
            BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_FRAG_NEEDED => Route::Known {
                hop: Hop { macs: Macs::new(params.dmac, params.smac), ifindex, ..Hop::default() },
                next_hop,
            },
            BPF_FIB_LKUP_RET_NO_NEIGH => Route::Unresolved { ifindex, next_hop },
            BPF_FIB_LKUP_RET_FWD_DISABLED => Route::None(Reason::ForwardingOff),
            _ => Route::None(Reason::NoRoute),
        }
    }
}
