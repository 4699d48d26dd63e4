//! The programs in the kernel against the same core on the host: same bytes, same verdict, same
//! counters, same flows.
//!
//! Random frames of a random scenario go one by one through `BPF_PROG_TEST_RUN` and through the model.

#![allow(clippy::unwrap_used, reason = "what the kernel refuses here fails the test")]

mod kernel;
mod shots;

use std::time::{Duration, Instant};

use forwarder_common::{
    address::{Ipv4, Ipv6},
    family::Family,
    flow::Side,
    layout::{Hook, XDP_TARGET},
    model::{self, Counts, Frame, Machine, Tables, scenario::Router},
    pipeline::{self, Outcome},
    reason::Reason,
};
use kernel::Kernel;
use shots::{Random, Shot};

/// Frames between two clearings of the flow tables.
const ROUND: usize = 400;
/// Rounds for each program and its flags.
const ROUNDS: u64 = 40;
/// Rounds of the long form: more than a million frames in all.
const LONG_ROUNDS: u64 = 640;
/// A hop is asked anew after a second, on a clock that the model does not share.
const ROUND_LIMIT: Duration = Duration::from_millis(800);

#[test]
fn xdp_does_what_the_host_does() {
    compare(Hook::Xdp, XDP_TARGET);
}

#[test]
fn xdp_that_may_not_redirect_leaves_what_the_host_leaves() {
    compare(Hook::Xdp, 0);
}

#[test]
fn tc_ingress_does_what_the_host_does() {
    compare(Hook::TcIngress, XDP_TARGET);
}

#[test]
fn tc_egress_does_what_the_host_does() {
    compare(Hook::TcEgress, XDP_TARGET);
}

/// What the verifier has to walk through grows faster than the code: a change that makes it leap
/// shows here, long before the kernel's limit of a million.
#[test]
fn programs_stay_within_their_verifier_budget() {
    let mut kernel = Kernel::new(XDP_TARGET);
    for (hook, budget) in [(Hook::Xdp, 250_000), (Hook::TcIngress, 500_000), (Hook::TcEgress, 100_000)] {
        let instructions = kernel.verified_instructions(hook);
        println!("{}: {instructions} instructions verified, budget {budget}", hook.name());
        assert!(instructions <= budget, "{}: {instructions}", hook.name());
    }
}

#[test]
#[ignore = "takes minutes: cargo xtask test --long"]
fn a_million_frames_fare_alike() {
    for (hook, flags) in
        [(Hook::Xdp, XDP_TARGET), (Hook::Xdp, 0), (Hook::TcIngress, XDP_TARGET), (Hook::TcEgress, XDP_TARGET)]
    {
        // Other seeds than the short form's.
        compare_rounds(hook, flags, LONG_ROUNDS, 1 << 32);
        println!("{}: {} frames", hook.name(), LONG_ROUNDS * ROUND as u64);
    }
}

fn compare(hook: Hook, flags: u8) {
    compare_rounds(hook, flags, ROUNDS, 0);
}

fn compare_rounds(hook: Hook, flags: u8, rounds_wanted: u64, first_seed: u64) {
    let mut kernel = Kernel::new(flags);
    let (mut rounds, mut seed, mut reasons, mut releases) = (0, first_seed, Counts::default(), 0);
    while rounds < rounds_wanted {
        seed += 1;
        assert!(
            seed < first_seed + rounds_wanted * 4,
            "most rounds took longer than {ROUND_LIMIT:?}: is the machine overloaded?"
        );
        let start = Instant::now();
        let compared = round(&mut kernel, hook, seed);
        if start.elapsed() < ROUND_LIMIT {
            let (counts, released) =
                compared.unwrap_or_else(|difference| panic!("{hook:?}, round {seed}: {difference}"));
            releases += released;
            for (reason, count) in counts.reasons {
                reasons.reasons.entry(reason).or_default().0 += count.0;
            }
            rounds += 1;
        }
    }
    // What was compared is worth little if the frames never got far.
    for reason in must_occur(hook, flags) {
        assert!(
            reasons.reasons.contains_key(reason.name()),
            "no frame ended as {reason:?}: {:?}",
            reasons.reasons
        );
    }
    assert_eq!(releases > 0, hook != Hook::Xdp, "{releases} fragments were released");
}

fn must_occur(hook: Hook, flags: u8) -> &'static [Reason] {
    match hook {
        Hook::Xdp if flags & XDP_TARGET == 0 => &[Reason::LeftToTc],
        Hook::Xdp => &[
            Reason::Forwarded,
            Reason::LeftUnresolved,
            Reason::NotAllowed,
            Reason::NoFlow,
            Reason::Spoofed,
            Reason::SourceLimit,
            Reason::RateLimit,
        ],
        Hook::TcIngress => {
            &[Reason::Forwarded, Reason::Resolving, Reason::TooBig, Reason::TranslatedForHost, Reason::Held]
        }
        Hook::TcEgress => &[Reason::TranslatedAtEgress],
    }
}

/// One round from empty tables: what it counted, and how many fragments were released. The error tells the
/// first difference.
fn round(kernel: &mut Kernel, hook: Hook, seed: u64) -> Result<(Counts, usize), String> {
    let mut random = Random::new(seed);
    let router = kernel.router();
    let machine = router.machine();
    let mut flows = Both {
        ipv4: Tables { capacity: 1 << 16, ..Tables::default() },
        ipv6: Tables { capacity: 1 << 16, ..Tables::default() },
    };
    let (mut counts, mut released) = (Counts::default(), 0);
    kernel.clear();
    for step in 0..ROUND {
        // Flows for the egress program are made by the one at ingress.
        let here = if hook == Hook::TcEgress && random.chance(2) { Hook::TcIngress } else { hook };
        let shot = match random.chance(2) {
            true => random.shot(&router, here, &flows.ipv4),
            false => random.shot(&router, here, &flows.ipv6),
        };
        let (outcome, bytes) = on_host(here, &shot, &router, &machine, &mut flows, &mut counts);
        released += usize::from(outcome == Outcome::Release);
        let Some((verdict, kernel_bytes)) = kernel.run(here, &shot) else {
            return Err(format!("step {step}: the kernel refuses to run {shot:02x?}"));
        };
        let expected = kernel::verdict(here, outcome);
        if verdict != expected || bytes != kernel_bytes {
            return Err(format!(
                "step {step}, {shot:02x?}\nhost:   {expected} ({:?}) {bytes:02x?}\nkernel: {verdict} {kernel_bytes:02x?}",
                counts.last
            ));
        }
    }
    kernel.compare_flows(&flows.ipv4)?;
    kernel.compare_flows(&flows.ipv6)?;
    kernel.compare_counts(hook, &counts)?;
    Ok((counts, released))
}

/// The flows of both families.
struct Both {
    ipv4: Tables<Ipv4>,
    ipv6: Tables<Ipv6>,
}

fn on_host(
    hook: Hook,
    shot: &Shot,
    router: &Router,
    machine: &Machine,
    flows: &mut Both,
    counts: &mut Counts,
) -> (Outcome, Vec<u8>) {
    match pipeline::is_ipv6(&Frame(shot.bytes.clone())) {
        true => on_host_of(hook, shot, router, machine, &mut flows.ipv6, counts),
        false => on_host_of(hook, shot, router, machine, &mut flows.ipv4, counts),
    }
}

fn on_host_of(
    hook: Hook,
    shot: &Shot,
    router: &Router,
    machine: &Machine,
    flows: &mut Tables<impl Family>,
    counts: &mut Counts,
) -> (Outcome, Vec<u8>) {
    let mut frame = Frame(shot.bytes.clone());
    let side = if hook == Hook::TcEgress { Side::External } else { shot.side };
    let (ifindex, _) = router.interface(side);
    let outcome = match hook {
        Hook::Xdp => model::process::<{ Hook::Xdp as usize }>(&mut frame, ifindex, machine, flows, counts),
        Hook::TcIngress => {
            model::process::<{ Hook::TcIngress as usize }>(&mut frame, ifindex, machine, flows, counts)
        }
        Hook::TcEgress => {
            model::process::<{ Hook::TcEgress as usize }>(&mut frame, ifindex, machine, flows, counts)
        }
    };
    (outcome, frame.0)
}
