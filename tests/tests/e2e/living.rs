//! The controller's own life: starts, crashes, neighbours on the machine.

use std::io::{Read, Write};
use std::net::Ipv6Addr;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{fs, panic, thread};

use etherparse::{Icmpv6Type, PacketBuilder};
use serde_json::Value;
use testbed::{
    DEADLINE, Daemon, Datapath, Family, TcpServer, Testbed, UdpServer, connect, udp_ask, udp_socket,
    wait_until,
};

use crate::common::*;
use crate::foreign::{Kind, Tcx, load_and_pin, tcx_programs, xdp_program};

/// All programs at the router's interfaces.
fn attached(bed: &Testbed) -> Vec<(String, usize)> {
    let mut all = Vec::new();
    for interface in ["wan", "lan"] {
        for hook in [Tcx::Ingress, Tcx::Egress] {
            all.push((format!("{interface} {hook:?}"), tcx_programs(&bed.router, interface, hook).len()));
        }
        all.push((format!("{interface} XDP"), usize::from(xdp_program(&bed.router, interface).is_some())));
    }
    all
}

fn nothing_attached(bed: &Testbed) -> bool {
    attached(bed).iter().all(|(_, count)| *count == 0)
}

/// The kernel takes a program off a moment after the last pin of its link has gone.
fn assert_detached(bed: &Testbed) {
    wait_until("nothing is attached", Duration::from_secs(1), || nothing_attached(bed))
        .unwrap_or_else(|error| panic!("{error}: {:?}", attached(bed)));
}

/// Rules and flows, less what time changes.
fn kept(bed: &Testbed) -> (Vec<Value>, Vec<Value>) {
    let mut flows = flows(bed);
    for flow in &mut flows {
        let fields = flow.as_object_mut().unwrap();
        fields.retain(|name, _| !name.starts_with("age") && !name.starts_with("idle"));
    }
    (rules(bed), flows)
}

for_each_family! {
    /// Row 35.
    fn a_killed_controller_is_missed_by_no_packet(bed = Testbed::builder()) {
        add(bed, "tcp+udp 203.0.113.1:8080 10.0.0.10:80 --name web --owner me --lifetime 1h");
        let _tcp = TcpServer::echo(bed.server(), &bed.ip(TARGET)).unwrap();
        let _udp = UdpServer::echo(bed.server(), &bed.ip(TARGET), "server").unwrap();
        let (client, any, mapped) = (bed.client.clone(), bed.ip(ANY), bed.ip(W8080));
        let stop = AtomicBool::new(false);
        let asked = AtomicU64::new(0);
        let traffic = thread::scope(|scope| {
            let datagrams = scope.spawn(|| {
                let socket = udp_socket(&client, &any).unwrap();
                while !stop.load(Ordering::Relaxed) {
                    assert_eq!(udp_ask(&socket, &mapped, "x").unwrap(), "server x");
                    asked.fetch_add(1, Ordering::Relaxed);
                }
            });
            let stream = scope.spawn(|| {
                let mut stream = connect(&client, &mapped).unwrap();
                let mut answer = [0; 1000];
                while !stop.load(Ordering::Relaxed) {
                    stream.write_all(&[7; 1000]).unwrap();
                    stream.read_exact(&mut answer).unwrap();
                }
            });
            let more = |count: u64| {
                let goal = asked.load(Ordering::Relaxed) + count;
                wait_until("there is traffic", DEADLINE, || {
                    asked.load(Ordering::Relaxed) >= goal || datagrams.is_finished() || stream.is_finished()
                })
            };
            let mut steps = || {
                more(50)?;
                bed.daemon.kill();
                // With nobody there, old flows go on and new ones begin.
                more(200)?;
                let mut new = connect(&client, &mapped)?;
                new.write_all(b"new")?;
                new.read_exact(&mut [0; 3])?;
                bed.daemon.start()?;
                more(200)?;
                bed.daemon.terminate()?;
                more(200)?;
                bed.daemon.start()?;
                more(50)
            };
            let outcome = steps();
            stop.store(true, Ordering::Relaxed);
            [datagrams.join(), stream.join()].into_iter().for_each(|joined| {
                joined.unwrap_or_else(|panic| panic::resume_unwind(panic));
            });
            outcome
        });
        traffic.unwrap();
        let counters = &only_rule(bed)["counters"];
        let asked = asked.load(Ordering::Relaxed);
        assert!(counters["packets_in"].as_u64().unwrap() > asked, "{counters}");
        // One of UDP, two of TCP.
        assert_eq!(counters["sessions_total"], 3, "{counters}");
        assert_carried(bed);
    }
}

for_each_family! {
    /// Row 35.
    fn a_restarted_controller_finds_all_as_it_was(bed = Testbed::builder()) {
        let _tcp = TcpServer::echo(bed.server(), &bed.ip(TARGET)).unwrap();
        let _udp = UdpServer::echo(bed.server(), &bed.ip(TARGET), "server").unwrap();
        add(bed, "tcp 203.0.113.1:8080 10.0.0.10:80 --name web --owner me --purpose pages --lifetime 1h");
        add(bed, "udp wan:8080 10.0.0.10:80 --allow 203.0.113.0/24 --review-by 2031-01-02");
        add(bed, "tcp+udp 203.0.113.1:10000-20000 10.0.0.10:10000-20000 --disabled");
        let mut stream = connect(&bed.client, &bed.ip(W8080)).unwrap();
        stream.write_all(b"before").unwrap();
        stream.read_exact(&mut [0; 6]).unwrap();
        let socket = udp_socket(&bed.client, &bed.ip(ANY)).unwrap();
        for _ in 0..3 {
            udp_ask(&socket, &bed.ip(W8080), "x").unwrap();
        }
        // The last acknowledgements may still be on their way, and sessions are counted now and then.
        let mut before = kept(bed);
        wait_until("the traffic has calmed down", DEADLINE, || {
            thread::sleep(Duration::from_millis(200));
            let earlier = std::mem::replace(&mut before, kept(bed));
            earlier == before && before.0[0]["counters"]["sessions_active"] == 1
        })
        .unwrap();
        let programs = attached(bed);
        assert!(programs.iter().any(|(_, count)| *count == 1), "{programs:?}");

        for _ in 0..2 {
            bed.daemon.kill();
            assert_eq!(attached(bed), programs, "the programs stay");
            bed.daemon.start().unwrap();
            let after = kept(bed);
            assert_eq!(after.0, before.0);
            assert_eq!(after.1, before.1);
            assert_eq!(attached(bed), programs, "nothing is attached twice");
        }
        stream.write_all(b"after").unwrap();
        stream.read_exact(&mut [0; 5]).unwrap();
        udp_ask(&socket, &bed.ip(W8080), "x").unwrap();
        assert_eq!(flows(bed).len(), 2);
        assert_eq!(
            rules(bed)[0]["counters"]["sessions_total"],
            before.0[0]["counters"]["sessions_total"],
            "the connection went on as the same session"
        );
    }
}

/// Row 35: what another choice wants otherwise is changed over, under the same flow.
#[test]
fn a_restart_may_choose_another_data_path() {
    let mut bed = Testbed::builder().datapath(Datapath::NativeXdp).start().unwrap();
    add(&bed, "udp 203.0.113.1:8080 10.0.0.10:80");
    let _server = UdpServer::echo(bed.server(), &bed.ip(TARGET), "server").unwrap();
    let socket = udp_socket(&bed.client, &bed.ip(ANY)).unwrap();
    for datapath in
        [Datapath::Tc, Datapath::GenericXdp, Datapath::NativeXdp, Datapath::GenericXdp, Datapath::Tc]
    {
        udp_ask(&socket, &bed.ip(W8080), "x").unwrap();
        bed.daemon.terminate().unwrap();
        udp_ask(&socket, &bed.ip(W8080), "x").unwrap();
        bed.daemon.options.datapath = Some(datapath);
        bed.daemon.start().unwrap();
        for name in ["wan", "lan"] {
            wait_until("it is changed over", Duration::from_secs(1), || {
                xdp_program(&bed.router, name).is_some() == (datapath != Datapath::Tc)
            })
            .unwrap();
            assert_eq!(interface(&bed, name)["xdp"], datapath.shown());
            assert_eq!(tcx_programs(&bed.router, name, Tcx::Ingress).len(), 1);
        }
        assert_eq!(flows(&bed).len(), 1);
    }
}

for_each_family! {
    /// Row 36.
    fn detaching_takes_everything_off(bed = Testbed::builder()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let _server = UdpServer::echo(bed.server(), &bed.ip(TARGET), "server").unwrap();
        let socket = udp_socket(&bed.client, &bed.ip(ANY)).unwrap();
        let pins = bed.daemon.options.pin_dir.clone();
        let detach = || {
            bed.router
                .output(testbed::forwarderd(), &["detach", "--pin-dir", pins.to_str().unwrap()])
                .unwrap()
        };
        let pinned = || bed.router.run(|| fs::read_dir(&pins).map_or(0, Iterator::count));

        // Twice, the second time with nothing there.
        assert!(answers(&socket, &bed.ip(W8080)) && !nothing_attached(bed) && pinned() > 0);
        bed.daemon.kill();
        assert!(answers(&socket, &bed.ip(W8080)));
        for said in ["detached tc-egress from wan", "nothing to take off"] {
            let output = detach();
            assert!(output.contains(said), "{output}");
            assert_eq!(pinned(), 0);
            assert_detached(bed);
        }
        assert!(!answers(&socket, &bed.ip(W8080)));
        bed.daemon.start().unwrap();
        assert!(answers(&socket, &bed.ip(W8080)), "the rules are still there");
    }
}

/// Row 36: the controller that runs does not put it all back.
#[test]
fn detaching_holds_although_the_controller_runs() {
    let bed = Testbed::builder().datapath(Datapath::NativeXdp).start().unwrap();
    add(&bed, "udp 203.0.113.1:8080 10.0.0.10:80");
    let pid = bed.ctl_json(&["status"]).unwrap()["pid"].to_string();
    let said = bed.router.output(testbed::forwarderd(), &["detach"]).unwrap();
    assert!(said.contains(&format!("(pid {pid}) still runs")), "{said}");
    assert_detached(&bed);
    let detached = Instant::now();
    while detached.elapsed() < Duration::from_secs(3) {
        assert!(nothing_attached(&bed), "{:?}", attached(&bed));
        thread::sleep(Duration::from_millis(100));
    }
    let log = bed.daemon.log();
    assert_eq!(log.matches("the programs were taken off").count(), 1, "{log}");
    assert!(interface(&bed, "wan")["why"].as_str().unwrap().contains("detach"));
}

/// Interfaces' indices mean something else in another network namespace.
#[test]
fn pins_of_another_network_namespace_are_left_alone() {
    let bed = Testbed::builder().start().unwrap();
    let programs = attached(&bed);
    // The router's bpffs, seen from the client's network.
    let elsewhere = |program: &str, arguments: &[&str]| {
        let mut command = bed.router.command("nsenter");
        let network = format!("--net=/proc/{}/ns/net", std::process::id());
        command.args([network.as_str(), program]).args(arguments);
        refusal(&bed, command)
    };
    let forwarderd = testbed::forwarderd();
    let said = elsewhere(forwarderd.to_str().unwrap(), &["detach"]);
    assert!(said.contains("another network namespace"), "{said}");
    assert_eq!(attached(&bed), programs);
}

/// A slip in `--pin-dir` must not pass for success while the programs stay.
#[test]
fn detaching_where_nothing_is_pinned_names_whose_programs_stay() {
    let bed = Testbed::builder().start().unwrap();
    let programs = attached(&bed);
    let pid = bed.ctl_json(&["status"]).unwrap()["pid"].to_string();
    for (wrong, words) in
        [("/sys/fs/bpf/forwardr", [&pid, "--pin-dir"]), ("/run/forwarder", ["BPF file system", "--pin-dir"])]
    {
        let mut command = bed.router.command(testbed::forwarderd());
        command.args(["detach", "--pin-dir", wrong]);
        let said = refusal(&bed, command);
        assert!(words.iter().all(|word| said.contains(word)), "{said}");
    }
    assert_eq!(attached(&bed), programs);
}

/// What `status` says about an interface.
pub fn interface(bed: &Testbed, name: &str) -> Value {
    let status = bed.ctl_json(&["status"]).unwrap();
    let found = status["interfaces"].as_array().unwrap().iter().find(|interface| interface["name"] == name);
    found.unwrap_or_else(|| panic!("{name} is not in {status:#}")).clone()
}

for_each_datapath! {
    /// What carries packets is to be seen, and why.
    fn status_names_the_data_path(bed = Testbed::builder()) {
        let datapath = bed.daemon.options.datapath.unwrap();
        for (name, side) in [("wan", "external"), ("lan", "internal")] {
            let shown = interface(bed, name);
            assert_eq!(shown["side"], side, "{shown}");
            assert_eq!(shown["index"], bed.router.index(name).unwrap(), "{shown}");
            assert_eq!(shown["xdp"], datapath.shown(), "{shown}");
            assert_eq!(shown["tc"], "TCX", "{shown}");
            assert!(!shown["why"].as_str().unwrap().is_empty(), "{shown}");
            assert_eq!(xdp_program(&bed.router, name).is_some(), datapath != Datapath::Tc);
        }
        let status = bed.ctl_json(&["status"]).unwrap();
        assert!(status["version"].is_string() && status["uptime_seconds"].is_u64(), "{status:#}");
        assert_eq!(status["warnings"], Value::Array(Vec::new()), "{status:#}");
        let tables = status["tables"].as_array().unwrap();
        assert!(!tables.is_empty() && tables.iter().all(|table| table["capacity"].as_u64() > Some(0)), "{status:#}");
        let text = bed.ctl(&["status"]).unwrap();
        assert!(datapath == Datapath::Tc || text.contains(datapath.shown()), "{text}");
        assert!(!text.contains('\u{1b}'), "no colour in a pipe: {text:?}");
    }
}

/// On veth TC is what `auto` means.
#[test]
fn auto_takes_tc_on_veth() {
    let bed = Testbed::builder().start().unwrap();
    for name in ["wan", "lan"] {
        let shown = interface(&bed, name);
        assert_eq!((&shown["xdp"], &shown["tc"]), (&"none".into(), &"TCX".into()), "{shown}");
    }
}

/// Row 37.
#[test]
fn a_foreign_xdp_program_stays_and_tc_carries() {
    let mut bed = Testbed::builder().datapath(Datapath::NativeXdp).build().unwrap();
    load_and_pin(&bed.router, Kind::Xdp, "/sys/fs/bpf/foreign");
    bed.router.ip("link set dev wan xdpdrv pinned /sys/fs/bpf/foreign").unwrap();
    let foreign = xdp_program(&bed.router, "wan").unwrap();
    bed.daemon.start().unwrap();
    let shown = interface(&bed, "wan");
    assert_eq!((&shown["xdp"], &shown["tc"]), (&"none".into(), &"TCX".into()), "{shown}");
    assert!(shown["why"].as_str().unwrap().contains("XDP"), "{shown}");
    add(&bed, "udp 203.0.113.1:8080 10.0.0.10:80");
    let _server = UdpServer::echo(bed.server(), &bed.ip(TARGET), "server").unwrap();
    let socket = udp_socket(&bed.client, &bed.ip(ANY)).unwrap();
    assert!(answers(&socket, &bed.ip(W8080)));
    assert_eq!(xdp_program(&bed.router, "wan"), Some(foreign));
    bed.daemon.kill();
    bed.router.output(testbed::forwarderd(), &["detach", "--pin-dir", "/sys/fs/bpf/forwarder"]).unwrap();
    assert_eq!(xdp_program(&bed.router, "wan"), Some(foreign), "detaching takes only what is ours");
}

/// Row 37.
#[test]
fn a_foreign_tc_filter_stays() {
    let mut bed = Testbed::builder().datapath(Datapath::Tc).build().unwrap();
    load_and_pin(&bed.router, Kind::Classifier, "/sys/fs/bpf/foreign");
    let tc = |arguments: &str| bed.router.output("tc", &arguments.split(' ').collect::<Vec<_>>()).unwrap();
    tc("qdisc add dev wan clsact");
    tc("filter add dev wan ingress pref 7 bpf da pinned /sys/fs/bpf/foreign");
    tc("filter add dev wan egress pref 7 bpf da pinned /sys/fs/bpf/foreign");
    let filters = || [tc("filter show dev wan ingress"), tc("filter show dev wan egress")];
    let before = filters();
    assert!(before.iter().all(|filter| filter.contains("pref 7")), "{before:?}");
    let mut daemon = Daemon::new(&bed.router, bed.daemon.options.clone());
    daemon.start().unwrap();
    daemon.ctl(&["add", "udp", W8080, TARGET]).unwrap();
    let _server = UdpServer::echo(bed.server(), &bed.ip(TARGET), "server").unwrap();
    let socket = udp_socket(&bed.client, &bed.ip(ANY)).unwrap();
    assert!(answers(&socket, &bed.ip(W8080)));
    assert_eq!(filters(), before);
    daemon.kill();
    bed.router.output(testbed::forwarderd(), &["detach", "--pin-dir", "/sys/fs/bpf/forwarder"]).unwrap();
    assert_eq!(filters(), before, "detaching takes only what is ours");
    bed.daemon.start().unwrap();
}

/// Starts a controller that must refuse, and returns what it says.
pub fn refusal(bed: &Testbed, command: Command) -> String {
    let mut process = bed.router.start(command).unwrap();
    let status = process.wait(DEADLINE).unwrap();
    let said = process.finish();
    assert!(!status.success() && !said.contains("panicked") && !said.is_empty(), "{status}: {said}");
    said
}

/// Row 43.
#[test]
fn a_second_controller_is_refused() {
    let bed = Testbed::builder().start().unwrap();
    add(&bed, "udp 203.0.113.1:8080 10.0.0.10:80");
    let programs = attached(&bed);

    let said = refusal(&bed, bed.daemon.command().unwrap());
    let first = bed.ctl_json(&["status"]).unwrap()["pid"].to_string();
    assert!(said.contains(&first), "it names the first, {first}: {said}");

    // Only one of the three places is the same; in the end none, but still the interfaces.
    for place in 0..4 {
        let mut options = bed.daemon.options.clone();
        let move_away = |number: usize, path: &mut PathBuf, to: &str| {
            if number != place {
                *path = to.into();
            }
        };
        move_away(0, &mut options.state_dir, "/run/second");
        move_away(1, &mut options.socket, "/run/second.sock");
        move_away(2, &mut options.pin_dir, "/sys/fs/bpf/second");
        refusal(&bed, Daemon::new(&bed.router, options).command().unwrap());
    }

    assert_eq!(attached(&bed), programs);
    assert!(!bed.router.run(|| fs::exists("/sys/fs/bpf/second")).unwrap(), "the refused leave nothing");
    let _server = UdpServer::echo(bed.server(), &bed.ip(TARGET), "server").unwrap();
    assert!(answers(&udp_socket(&bed.client, &bed.ip(ANY)).unwrap(), W8080));
    bed.ctl(&["list"]).unwrap();
}

#[test]
fn without_rights_it_says_what_it_needs() {
    let bed = Testbed::builder().build().unwrap();
    let command = bed.daemon.command().unwrap();
    let mut powerless = bed.router.command("setpriv");
    powerless.args(["--bounding-set", "-all", "--inh-caps", "-all", "--"]);
    powerless.arg(command.get_program()).args(command.get_args());
    let said = refusal(&bed, powerless);
    assert!(said.contains("root") || said.contains("CAP_"), "{said}");
}

#[test]
fn without_bpffs_it_says_how_to_mount_one() {
    let mut bed = Testbed::builder().build().unwrap();
    bed.daemon.options.pin_dir = "/run/pins".into();
    let said = refusal(&bed, bed.daemon.command().unwrap());
    assert!(said.contains("/run/pins") && said.contains("bpf"), "{said}");

    bed.daemon.options.pin_dir = "/sys/fs/bpf/forwarder".into();
    bed.router.output("umount", &["/sys/fs/bpf"]).unwrap();
    let said = refusal(&bed, bed.daemon.command().unwrap());
    assert!(said.contains("mount"), "{said}");
}

/// veth takes no XDP for frames of 9000 bytes.
#[test]
fn where_native_xdp_cannot_be_had_it_says_what_can() {
    let bed = Testbed::builder().mtu(9000).datapath(Datapath::NativeXdp).build().unwrap();
    let said = refusal(&bed, bed.daemon.command().unwrap());
    assert!(["wan", "native XDP", "xdp-generic"].iter().all(|word| said.contains(word)), "{said}");
    assert_detached(&bed);
    assert!(!bed.router.run(|| fs::exists("/sys/fs/bpf/forwarder")).unwrap(), "it leaves nothing");
}

/// A start that fails leaves what an earlier controller has made.
#[test]
fn a_start_that_fails_harms_nothing_that_forwards() {
    let mut bed = Testbed::builder().mtu(9000).datapath(Datapath::Tc).start().unwrap();
    add(&bed, "udp 203.0.113.1:8080 10.0.0.10:80");
    let _server = UdpServer::echo(bed.server(), &bed.ip(TARGET), "server").unwrap();
    let socket = udp_socket(&bed.client, &bed.ip(ANY)).unwrap();
    assert!(answers(&socket, &bed.ip(W8080)));
    let programs = attached(&bed);
    bed.daemon.kill();
    bed.daemon.options.datapath = Some(Datapath::NativeXdp);
    refusal(&bed, bed.daemon.command().unwrap());
    assert!(answers(&socket, &bed.ip(W8080)));
    assert_eq!(attached(&bed), programs);
    bed.daemon.options.datapath = Some(Datapath::Tc);
    bed.daemon.start().unwrap();
    assert_eq!(only_rule(&bed)["counters"]["packets_in"], 2, "the counters are as they were");
}

/// A start that fails late, over rules that do not fit, can be mended in the configuration alone.
#[test]
fn a_start_with_tables_too_small_leaves_no_small_tables() {
    let mut bed = Testbed::builder().start().unwrap();
    for port in 1..=3 {
        add(&bed, &format!("tcp 203.0.113.1:{port} 10.0.0.10:80"));
    }
    bed.daemon.terminate().unwrap();
    bed.router.output(testbed::forwarderd(), &["detach"]).unwrap();
    bed.daemon.options.config = "[tables]\nrules = 2\n".into();
    let said = refusal(&bed, bed.daemon.command().unwrap());
    assert!(said.contains("raise rules"), "{said}");
    assert_detached(&bed);
    bed.daemon.options.config = "[tables]\nrules = 3\n".into();
    bed.daemon.start().unwrap();
    assert_eq!(rules(&bed).len(), 3);
}

/// Row 38: an interface may come later; until then it is said that it is not there.
#[test]
fn an_interface_that_is_not_there_is_waited_for() {
    let mut bed = Testbed::builder().build().unwrap();
    bed.daemon.options.external.push("later".into());
    bed.daemon.start().unwrap();
    let shown = interface(&bed, "later");
    assert_eq!(
        (&shown["index"], &shown["xdp"], &shown["tc"]),
        (&Value::Null, &"none".into(), &"none".into())
    );
    assert!(bed.daemon.log().contains("later"), "{}", bed.daemon.log());
    bed.router.ip("link add later type veth peer name other").unwrap();
    bed.router.ip("link set later up\nlink set other up").unwrap();
    wait_until("it is attached to", Duration::from_secs(5), || interface(&bed, "later")["tc"] == "TCX")
        .unwrap();
}

/// Row 38.
#[test]
fn an_interface_that_goes_and_comes_back_carries_again() {
    let bed = Testbed::builder().datapath(Datapath::NativeXdp).start().unwrap();
    add(&bed, "udp wan:8080 10.0.0.10:80");
    let _server = UdpServer::echo(bed.server(), &bed.ip(TARGET), "server").unwrap();
    let ask = || answers(&udp_socket(&bed.client, &bed.ip(ANY)).unwrap(), W8080);
    assert!(ask());
    bed.router.ip("link del wan").unwrap();
    testbed::veth(
        &testbed::End::new(&bed.router, "wan").address("203.0.113.1/24"),
        &testbed::End::new(&bed.client, "eth0").address("203.0.113.2/24").checksum_offload(false),
    )
    .unwrap();
    bed.router.ip("route replace default via 203.0.113.2").unwrap();
    wait_until("it forwards again", Duration::from_secs(5), ask).unwrap();
    assert_eq!(interface(&bed, "wan")["xdp"], "native XDP");
}

for_each_family! {
    /// Row 15: a rule of an interface goes with its addresses.
    fn an_interface_rule_follows_the_address_within_a_second(bed = Testbed::builder()) {
        add(bed, "udp wan:8080 10.0.0.10:80");
        let _server = UdpServer::echo(bed.server(), &bed.ip(TARGET), "server").unwrap();
        let socket = udp_socket(&bed.client, &bed.ip(ANY)).unwrap();
        assert!(answers(&socket, &bed.ip(W8080)));
        let lines = "addr del 203.0.113.1/24 dev wan\naddr add 203.0.113.77/24 dev wan";
        bed.router.ip(&bed.ip(lines)).unwrap();
        let changed = Instant::now();
        let moved = bed.ip("203.0.113.77:8080");
        wait_until("the new address works", DEADLINE, || answers(&socket, &moved)).unwrap();
        assert!(changed.elapsed() < Duration::from_millis(1500), "after {:?}", changed.elapsed());
        assert!(flows(bed).iter().all(|flow| flow["external"] == moved), "{:#?}", flows(bed));
    }
}

/// Rows 15 and 16: an interface rule of IPv6 has those addresses that others can dial and will find again.
#[test]
fn only_lasting_global_addresses_of_an_interface_are_claimed() {
    let bed = Testbed::builder().family(Family::Ipv6).start().unwrap();
    let externals = || {
        let added = add(&bed, "udp wan:8080 10.0.0.10:80");
        bed.ctl(&["del", "udp", "wan:8080"]).unwrap();
        added["state"].clone()
    };
    assert_eq!(externals(), "active");
    bed.router.ip("addr flush dev wan scope global").unwrap();
    wait_until("a link-local address is not enough", DEADLINE, || externals() == "waiting").unwrap();

    // An address that may be somebody else's: the kernel asks for some seconds.
    bed.router.sysctl("net.ipv6.conf.wan.accept_dad", "1").unwrap();
    bed.router.sysctl("net.ipv6.conf.wan.dad_transmits", "3").unwrap();
    bed.router.ip(&bed.ip("addr add 203.0.113.1/24 dev wan")).unwrap();
    let asked = Instant::now();
    while asked.elapsed() < Duration::from_secs(1) {
        assert_eq!(externals(), "waiting", "after {:?}", asked.elapsed());
        thread::sleep(Duration::from_millis(100));
    }
    wait_until("the address is known to be its own", DEADLINE, || externals() == "active").unwrap();
}

/// A router advertisement (RFC 4861) of this prefix of 64 bits, as a frame from this hardware address.
fn advertisement(mac: [u8; 6], prefix: Ipv6Addr) -> Vec<u8> {
    let (source, destination) =
        ("fe80::99".parse::<Ipv6Addr>().unwrap(), "ff02::1".parse::<Ipv6Addr>().unwrap());
    // Nothing about the router itself; then the prefix, on this link and for addresses of its hosts, for hours.
    let mut body = vec![0; 8];
    body.extend([3, 4, 64, 0xc0, 0, 0, 0x70, 0x80, 0, 0, 0x38, 0x40, 0, 0, 0, 0]);
    body.extend(prefix.octets());
    let kind = Icmpv6Type::Unknown { type_u8: 134, code_u8: 0, bytes5to8: [64, 0, 0, 0] };
    let all_nodes = [0x33, 0x33, 0, 0, 0, 1];
    let packet = PacketBuilder::ethernet2(mac, all_nodes).ipv6(source.octets(), destination.octets(), 255);
    let mut frame = Vec::new();
    packet.icmpv6(kind).write(&mut frame, &body).unwrap();
    frame
}

for_each_datapath! {
    /// Rows 15 and 16: what routers advertise gets through, and the address that the host makes of it is served.
    fn an_advertised_prefix_is_followed(bed = Testbed::builder().family(Family::Ipv6)) {
        add(bed, "udp wan:8080 10.0.0.10:80");
        let _server = UdpServer::echo(bed.server(), &bed.ip(TARGET), "server").unwrap();
        bed.router.sysctl("net.ipv6.conf.wan.accept_ra", "2").unwrap();
        bed.client.add_address("eth0", "2001:db8:f::2/64").unwrap();
        let provider = bed.wire("203.0.113.2").unwrap();
        let mac = bed.client.mac("eth0").unwrap();
        provider.send_bytes(&advertisement(mac, "2001:db8:f::".parse().unwrap())).unwrap();
        let advertised = Instant::now();
        // The interface's own part of an address (RFC 4291 appendix A).
        let [a, b, c, d, e, f] = bed.router.mac("wan").unwrap();
        let own = format!("[2001:db8:f:0:{:02x}{b:02x}:{c:02x}ff:fe{d:02x}:{e:02x}{f:02x}]:8080", a ^ 2);
        let socket = udp_socket(&bed.client, &bed.ip(ANY)).unwrap();
        wait_until("the new address works", DEADLINE, || answers(&socket, &own)).unwrap();
        assert!(advertised.elapsed() < Duration::from_millis(1500), "after {:?}", advertised.elapsed());
    }
}

/// It tells systemd when it is ready.
#[test]
fn readiness_is_told_to_systemd() {
    const NOTIFY: &str = "/run/notify.sock";
    let bed = Testbed::builder().build().unwrap();
    let socket = bed.router.run(|| UnixDatagram::bind(NOTIFY)).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut command = bed.daemon.command().unwrap();
    command.env("NOTIFY_SOCKET", NOTIFY);
    let _process = bed.router.start(command).unwrap();
    let mut message = [0; 1000];
    let length = socket.recv(&mut message).unwrap();
    assert!(message[..length].starts_with(b"READY=1"), "{}", String::from_utf8_lossy(&message[..length]));
    bed.ctl(&["status"]).unwrap();
    assert!(bed.router.run(|| Path::new("/run/forwarder/forwarder.sock").exists()));
}
