//! What a million established sessions cost the controller. Long: `cargo xtask test --long`.

#![allow(clippy::unwrap_used, reason = "what the kernel refuses here fails the test")]

use std::{
    fs,
    time::{Duration, Instant},
};

use aya::maps::{Array, HashMap, Map, MapData};
use forwarder_common::{
    address::{Ipv4, Port},
    flow::{Flow, FlowKey, INWARD, OUTWARD, Side, Tuple},
    rule::Rule,
    wire::udp,
};
use testbed::{Host, Testbed, wait_until};

const SESSIONS: u32 = 1_000_000;
const MAPS: &str = "/sys/fs/bpf/forwarder/maps";

/// How long the controller is watched: several rounds at the interval that it chooses.
const WATCHED: Duration = Duration::from_secs(60);

/// Row 25: a round is paid for by the time between rounds.
#[test]
#[ignore = "takes minutes: cargo xtask test --long"]
fn a_million_sessions_take_a_twentieth_of_one_core() {
    let bed = Testbed::builder().config(&format!("[tables]\nflows = {SESSIONS}\n")).start().unwrap();
    bed.ctl(&["add", "udp", "203.0.113.1:8080", "10.0.0.10:80"]).unwrap();
    let memory = memory_of_flows(&bed.router);
    bed.router.run(|| fill().unwrap());
    wait_until("all of them are counted", Duration::from_secs(60), || sessions(&bed) == u64::from(SESSIONS))
        .unwrap();

    // (Asked for once: who asks the controller makes it look at its tables.)
    let pid = bed.ctl_json(&["status"]).unwrap()["pid"].as_u64().unwrap();
    let (start, before) = (Instant::now(), cpu_time(pid));
    std::thread::sleep(WATCHED);
    let (share, elapsed) = ((cpu_time(pid) - before).as_secs_f64(), start.elapsed().as_secs_f64());
    println!("{SESSIONS} sessions: {:.1} % of one core", 100.0 * share / elapsed);
    println!("the table: {} bytes for each session that it has room for", memory / u64::from(SESSIONS));
    assert!(share / elapsed < 0.06, "a look at the tables is to cost a twentieth, and the rest little");
    assert_eq!(sessions(&bed), u64::from(SESSIONS), "none is idle");
}

/// Sessions as packets would have made them, just now.
fn fill() -> anyhow::Result<()> {
    let lines: Array<_, Rule> = Array::try_from(Map::Array(MapData::from_pin(format!("{MAPS}/RULES"))?))?;
    let epoch = lines.get(&0, 0)?.udp_epoch;
    let map = Map::HashMap(MapData::from_pin(format!("{MAPS}/FLOWS"))?);
    let mut flows: HashMap<_, FlowKey<Ipv4>, Flow<Ipv4>> = HashMap::try_from(map)?;
    let (w, server) = (Ipv4::new([203, 0, 113, 1]), Ipv4::new([10, 0, 0, 10]));
    let now = Duration::from(nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?);
    for number in 0..SESSIONS {
        let client = Ipv4::new((0xc612_0000 + number / 16).to_be_bytes());
        let port = Port::new(40_000 + (number % 16) as u16);
        let inward = Tuple { src: client, dst: w, src_port: port, dst_port: Port::new(8080) };
        let to = Tuple { dst: server, dst_port: Port::new(80), ..inward };
        let entry = Flow { last_seen: now.as_nanos() as u64, created: 1, epoch, ..Flow::ZERO };
        let back = Flow { to: inward.reversed(), direction: OUTWARD, ..entry };
        flows.insert(FlowKey::new(to.reversed(), udp::NUMBER, Side::Internal), back, 0)?;
        let entry = Flow { to, direction: INWARD, ..entry };
        flows.insert(FlowKey::new(inward, udp::NUMBER, Side::External), entry, 0)?;
    }
    Ok(())
}

fn sessions(bed: &Testbed) -> u64 {
    let rules = bed.ctl_json(&["list"]).unwrap();
    rules[0]["counters"]["sessions_active"].as_u64().unwrap()
}

/// What the kernel has taken for the table, in bytes.
fn memory_of_flows(host: &Host) -> u64 {
    let fdinfo = host.run(|| {
        let map = MapData::from_pin(format!("{MAPS}/FLOWS")).unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&std::os::fd::AsFd::as_fd(map.fd()));
        fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap()
    });
    let memlock = fdinfo.lines().find_map(|line| line.strip_prefix("memlock:")).unwrap();
    memlock.trim().parse().unwrap()
}

/// User and system time of the controller.
fn cpu_time(pid: u64) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    // USER_HZ is 100 on every Linux.
    Duration::from_millis(ticks * 10)
}
