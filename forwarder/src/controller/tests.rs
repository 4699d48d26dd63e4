use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use super::*;
use crate::datapath::fake::FakeDatapath;
use crate::datapath::{Count, FlowRecord};
use crate::network::Interface;
use crate::rule::{AllowList, State, Via};

/// A controller on a fake data path, with `wan` at 203.0.113.10 and `lan` at 10.0.0.1.
struct Bench {
    directory: tempfile::TempDir,
    fake: FakeDatapath,
    controller: Controller,
}

fn interface(index: u32, name: &str, addresses: &[&str]) -> Interface {
    Interface {
        index,
        name: name.into(),
        mac: None,
        is_bare: false,
        mtu: 1500,
        kind: None,
        sends_for_xdp: None,
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        temporary: Vec::new(),
    }
}

fn network(wan: &[&str]) -> Network {
    Network { interfaces: vec![interface(1, "wan", wan), interface(2, "lan", &["10.0.0.1"])] }
}

fn nobody(_: Ports) -> anyhow::Result<Vec<Listener>> {
    Ok(Vec::new())
}

fn somebody(_: Ports) -> anyhow::Result<Vec<Listener>> {
    let address = "0.0.0.0:22".parse().unwrap();
    Ok(vec![Listener { protocol: "tcp", address, process: Some(("sshd".into(), 812)) }])
}

fn leaving(targets: &BTreeSet<IpAddr>, egress: Egress) -> anyhow::Result<BTreeMap<IpAddr, Egress>> {
    Ok(targets.iter().map(|target| (*target, egress)).collect())
}

fn all_inside(targets: &BTreeSet<IpAddr>) -> anyhow::Result<BTreeMap<IpAddr, Egress>> {
    leaving(targets, Egress::Interface(2))
}

fn machine() -> Machine {
    Machine { find_listeners: nobody, find_egress: all_inside, net_settings: "/nowhere" }
}

fn settings() -> Settings {
    Settings { external: vec!["wan".into(), "ppp0".into()], internal: vec!["lan".into()] }
}

fn controller(directory: &Path, fake: &FakeDatapath, network: Network) -> Controller {
    let store = Store::open(directory).unwrap();
    Controller::new(store, Box::new(fake.clone()), network, settings(), machine()).unwrap()
}

fn bench() -> Bench {
    let directory = tempfile::tempdir().unwrap();
    let fake = FakeDatapath::with_capacity(16);
    let controller = controller(directory.path(), &fake, network(&["203.0.113.10"]));
    Bench { directory, fake, controller }
}

fn request(protocol: &str, external: &str, target: &str) -> Request {
    Request {
        protocol: Some(protocol.parse().unwrap()),
        external: Some(external.parse().unwrap()),
        target: Some(target.parse().unwrap()),
        ..Request::default()
    }
}

fn web() -> Request {
    Request { name: Some("web".into()), ..request("tcp+udp", "wan:8080", "10.0.0.10:80") }
}

fn lasting(seconds: u64) -> Option<Lifetime> {
    Some(Lifetime::For(Duration::from_secs(seconds)))
}

impl Bench {
    fn add(&mut self, request: &Request) -> Result<RuleView, Error> {
        self.controller.add(request, "alice").map(|added| added.rule)
    }

    fn refusal(&mut self, request: &Request) -> Error {
        let before = (self.controller.rules.clone(), self.fake.state().rules.clone());
        let error = self.add(request).unwrap_err();
        assert!(!error.to_string().contains('\n'), "{error}");
        assert_eq!(
            before,
            (self.controller.rules.clone(), self.fake.state().rules.clone()),
            "a refusal changes nothing"
        );
        error
    }

    fn conflict(&mut self, request: &Request) -> (String, Option<RuleId>) {
        match self.refusal(request) {
            Error::Conflict { message, rule } => (message, rule),
            other => panic!("{other:?} is no conflict"),
        }
    }

    fn set(&mut self, name: &str, request: Request) -> Result<RuleView, Error> {
        self.controller.set(&name.parse().unwrap(), &request, "alice")
    }

    fn kernel(&self, slot: u32) -> KernelRule {
        self.fake.state().rules[&slot].clone()
    }

    fn flow(&self, slot: u32, protocol: &'static str, client: &str) {
        let address: SocketAddr = "203.0.113.10:8080".parse().unwrap();
        self.fake.state().flows.push(FlowRecord {
            slot,
            protocol,
            client: client.parse().unwrap(),
            external: address,
            target: address,
            state: "established",
            age: Duration::ZERO,
            idle: Duration::ZERO,
            inward: Count::default(),
            outward: Count::default(),
        });
    }

    fn writes(&self) -> usize {
        self.fake.state().writes
    }

    /// The protocols of the flows that are left.
    fn flows(&self) -> Vec<&'static str> {
        self.fake.state().flows.iter().map(|flow| flow.protocol).collect()
    }

    /// A second controller on the same store and data path.
    fn restarted(self) -> Bench {
        let Bench { directory, fake, controller: old } = self;
        let network = old.network.clone();
        drop(old);
        let controller = controller(directory.path(), &fake, network);
        Bench { directory, fake, controller }
    }
}

#[test]
fn an_added_rule_reaches_store_and_data_path() {
    let mut bench = bench();
    let rule = bench.add(&web()).unwrap();
    assert_eq!((rule.id, rule.state, rule.created_by.as_str()), (1, State::Active, "alice"));
    assert_eq!(bench.kernel(0).externals, ["203.0.113.10".parse::<IpAddr>().unwrap()]);
    let mut bench = bench.restarted();
    assert_eq!(bench.controller.show(&"web".parse().unwrap()).unwrap().id, 1);
}

#[test]
fn an_overlap_is_refused_with_the_name_of_the_first() {
    let mut bench = bench();
    bench.add(&web()).unwrap();
    for (protocol, external) in [
        ("tcp", "wan:8080"),
        ("udp", "wan:8000-8080"),
        ("tcp+udp", "wan:8080-9000"),
        ("tcp", "203.0.113.10:8080"),
    ] {
        let (message, rule) = bench.conflict(&request(protocol, external, "10.0.0.11:80"));
        assert!(message.contains("rule 1 (web)"), "{message}");
        assert_eq!(rule, Some(1));
    }
    bench.add(&request("tcp", "wan:8081", "10.0.0.11:80")).unwrap();
    bench.add(&request("tcp", "203.0.113.11:8080", "10.0.0.11:80")).unwrap();
}

#[test]
fn tcp_and_udp_on_one_port_may_lead_to_different_hosts() {
    let mut bench = bench();
    bench.add(&request("tcp", "wan:53", "10.0.0.10:53")).unwrap();
    bench.add(&request("udp", "wan:53", "10.0.0.11:53")).unwrap();
}

#[test]
fn the_same_rule_twice_is_refused_and_with_replace_changes_nothing() {
    let mut bench = bench();
    let first = bench.add(&web()).unwrap();
    bench.conflict(&web());
    bench.flow(0, "tcp", "198.51.100.1:1");
    let writes = bench.writes();
    let again = bench.add(&Request { replace: true, ..web() }).unwrap();
    assert_eq!(again, RuleView { counters: again.counters.clone(), ..first });
    assert_eq!((bench.writes(), bench.flows()), (writes, vec!["tcp"]));
}

#[test]
fn a_name_belongs_to_one_rule() {
    let mut bench = bench();
    bench.add(&web()).unwrap();
    let namesake = Request { name: Some("web".into()), ..request("tcp", "wan:9000", "10.0.0.11:80") };
    assert_eq!(bench.conflict(&namesake).1, Some(1));
    bench.add(&request("tcp", "wan:9000", "10.0.0.11:80")).unwrap();
    assert!(matches!(
        bench.set("2", Request { name: Some("web".into()), ..Request::default() }),
        Err(Error::Conflict { rule: Some(1), .. })
    ));
}

#[test]
fn replace_takes_the_place_of_one_rule_and_only_one() {
    let mut bench = bench();
    let old = bench.add(&web()).unwrap();
    let replacing = Request { replace: true, ..request("tcp+udp", "wan:8080", "10.0.0.11:81") };
    let new = bench.add(&replacing).unwrap();
    assert_eq!((new.id, new.created_at, new.name), (old.id, old.created_at, old.name));
    assert_eq!(bench.kernel(0).target, "10.0.0.11".parse::<IpAddr>().unwrap());

    bench.add(&request("tcp", "wan:8081", "10.0.0.11:80")).unwrap();
    let both = Request { replace: true, ..request("tcp", "wan:8080-8081", "10.0.0.11:80") };
    assert!(bench.conflict(&both).0.contains("rule 1 (web) and rule 2"));
}

#[test]
fn replacing_a_rule_keeps_its_allow_list_and_says_what_changes() {
    let mut bench = bench();
    let guarded = Request {
        allow: Some(AllowList::parse(["192.0.2.0/24"]).unwrap()),
        ..request("udp", "wan:5300-5310", "10.0.0.10:5300-5310")
    };
    bench.add(&guarded).unwrap();
    let replacing = Request { replace: true, ..request("udp", "wan:5305", "10.0.0.11:53") };
    let added = bench.controller.add(&replacing, "alice").unwrap();
    assert!(added.replaced);
    assert_eq!(added.rule.allow.to_string(), "192.0.2.0/24");
    assert_eq!(bench.kernel(0).allow, added.rule.allow.networks());
    let said = added.rule.warnings.join("\n");
    assert!(said.contains("was udp wan:5300-5310 to 10.0.0.10:5300-5310"), "{said}");
    assert!(said.contains("keeps its allow list, 192.0.2.0/24"), "{said}");
    let open = Request { allow: Some(AllowList::default()), ..replacing };
    assert!(bench.add(&open).unwrap().allow.is_empty());
}

#[test]
fn a_rule_that_cannot_work_as_things_are_is_added_with_the_reason() {
    let mut bench = bench();
    let warned = |rule: RuleView, words: &str| {
        assert!(rule.warnings.iter().any(|line| line.contains(words)), "{words}: {:?}", rule.warnings);
    };
    let rule = bench.add(&request("tcp", "198.51.100.7:80", "10.0.0.10:80")).unwrap();
    warned(rule, "no interface of this router has 198.51.100.7");
    bench.controller.machine.find_egress = |targets| leaving(targets, Egress::NoRoute);
    warned(bench.add(&request("tcp", "wan:81", "10.0.0.10:80")).unwrap(), "no route to the target 10.0.0.10");
    bench.controller.machine.find_egress = |targets| leaving(targets, Egress::Interface(1));
    warned(bench.add(&request("tcp", "wan:82", "10.0.0.10:80")).unwrap(), "leaves by wan");
    warned(bench.controller.show(&RuleRef::Id(3)).unwrap(), "leaves by wan");
    let past = Request { review_by: Some("2020-01-01".into()), ..request("tcp", "wan:83", "10.0.0.10:80") };
    warned(bench.add(&past).unwrap(), "due on 2020-01-01");
    let marked: Vec<bool> =
        bench.controller.list().unwrap().iter().map(|rule| !rule.warnings.is_empty()).collect();
    assert_eq!(marked, [true; 4]);
    assert!(bench.controller.status().unwrap().warnings[0].starts_with("4 rules may not work"));
    bench.controller.machine.find_egress = |targets| leaving(targets, Egress::NoHost);
    let error = bench.refusal(&request("tcp", "wan:84", "10.0.0.255:80")).to_string();
    assert!(error.contains("one host"), "{error}");
}

#[test]
fn a_rule_of_an_interface_that_is_external_no_longer_waits_and_says_so() {
    let mut bench = bench();
    bench.add(&web()).unwrap();
    let Bench { directory, fake, controller } = bench;
    drop(controller);
    let settings = Settings { external: vec!["ppp0".into()], internal: vec!["lan".into()] };
    let store = Store::open(directory.path()).unwrap();
    let network = network(&["203.0.113.10"]);
    let mut controller =
        Controller::new(store, Box::new(fake.clone()), network, settings, machine()).unwrap();
    let rule = controller.show(&"web".parse().unwrap()).unwrap();
    assert_eq!(rule.state, State::Waiting);
    assert!(rule.state_reason.unwrap().contains("wan is not an external one"));
    assert!(fake.state().rules[&0].externals.is_empty());
}

#[test]
fn a_rule_that_is_opened_to_everyone_says_so() {
    let mut bench = bench();
    let guarded = Request { allow: Some(AllowList::parse(["192.0.2.0/24"]).unwrap()), ..web() };
    bench.add(&guarded).unwrap();
    let open = bench.set("web", Request { allow: Some(AllowList::default()), ..Request::default() }).unwrap();
    assert!(
        open.warnings[0].contains("open to everyone now; before, to 192.0.2.0/24"),
        "{:?}",
        open.warnings
    );
}

#[test]
fn who_names_no_rule_is_told_which_has_the_port() {
    let mut bench = bench();
    bench.add(&web()).unwrap();
    for which in ["tcp wan:8080", "udp 203.0.113.10:8080", "tcp+udp wan:8000-8100"] {
        let error = bench.controller.show(&which.parse().unwrap()).unwrap_err().to_string();
        assert!(error.contains("rule 1 is tcp+udp wan:8080"), "{error}");
    }
}

#[test]
fn a_rule_that_has_ended_is_not_renewed() {
    let mut bench = bench();
    let timed = bench.add(&Request { lifetime: lasting(60), ..web() }).unwrap();
    // Its end comes before the tick that would remove it.
    bench.controller.rules.get_mut(&timed.id).unwrap().expires_at = Some(now());
    let renewed =
        bench.controller.renew(&RuleRef::Id(timed.id), Lifetime::For(Duration::from_secs(60)), "alice");
    assert!(matches!(renewed, Err(Error::NotFound(_))), "{renewed:?}");
    assert!(bench.fake.state().rules.is_empty());
}

#[test]
fn replacing_a_timed_rule_keeps_its_end_unless_told() {
    let mut bench = bench();
    let timed = bench.add(&Request { lifetime: lasting(60), ..web() }).unwrap();
    let again = bench.add(&Request { replace: true, ..web() }).unwrap();
    assert_eq!(again.expires_at, timed.expires_at);
    assert!(again.warnings[0].contains("keeps its end"));
    let never = bench.add(&Request { replace: true, lifetime: Some(Lifetime::Never), ..web() }).unwrap();
    assert_eq!(never.expires_at, None);
}

#[test]
fn places_that_do_not_exist_are_refused_with_those_that_do() {
    let mut bench = bench();
    let error = bench.refusal(&request("tcp", "nowhere:80", "10.0.0.10:80")).to_string();
    assert!(error.contains("no interface nowhere") && error.contains("wan"), "{error}");
    let error = bench.refusal(&request("tcp", "lan:80", "10.0.0.10:80")).to_string();
    assert!(error.contains("not an external one"), "{error}");
    let error = bench.refusal(&request("tcp", "wan:80", "203.0.113.10:80")).to_string();
    assert!(error.contains("external address itself"), "{error}");
    let error = bench.refusal(&request("tcp", "wan:80", "10.0.0.1:80")).to_string();
    assert!(error.contains("address of this router"), "{error}");
}

#[test]
fn a_rule_too_many_is_refused() {
    let mut bench = bench();
    for port in 1..=16 {
        bench.add(&request("tcp", &format!("wan:{port}"), "10.0.0.10:80")).unwrap();
    }
    assert!(bench.conflict(&request("tcp", "wan:17", "10.0.0.10:80")).0.contains("16 rules already"));
    bench.controller.del(&RuleRef::Id(5), false, "alice").unwrap();
    let rule = bench.add(&request("tcp", "wan:17", "10.0.0.10:80")).unwrap();
    assert_eq!(rule.id, 17, "ids do not come back, slots do");
    assert_eq!(bench.controller.rules[&17].slot, 4);
}

#[test]
fn a_service_of_the_router_is_named_and_only_force_takes_its_port() {
    let mut bench = bench();
    bench.controller.machine.find_listeners = somebody;
    let (message, _) = bench.conflict(&request("tcp", "wan:22", "10.0.0.10:22"));
    assert!(message.contains("sshd (pid 812)") && message.contains("--force"), "{message}");
    let forced = bench.add(&Request { force: true, ..request("tcp", "wan:22", "10.0.0.10:22") }).unwrap();
    assert!(forced.warnings[0].contains("sshd"));
}

#[test]
fn a_refusal_of_the_data_path_leaves_everything_as_it_was() {
    let mut bench = bench();
    bench.add(&web()).unwrap();
    bench.fake.state().refusals = 1;
    assert!(matches!(bench.refusal(&request("tcp", "wan:9000", "10.0.0.10:80")), Error::Failed(_)));
    let before = bench.fake.state().rules.clone();
    bench.fake.state().refusals = 1;
    assert!(bench.set("web", Request { enabled: Some(false), ..Request::default() }).is_err());
    assert_eq!(bench.fake.state().rules, before);
    let bench = bench.restarted();
    assert_eq!(bench.controller.rules.len(), 1);
    assert!(bench.controller.rules[&1].spec.enabled);
}

#[test]
fn a_data_path_that_could_not_be_taken_back_is_mended_by_a_tick() {
    let mut bench = bench();
    bench.add(&web()).unwrap();
    let stray = KernelRule { slot: 9, ..bench.kernel(0) };
    bench.fake.state().refusals = 2;
    bench.add(&request("tcp", "wan:9000", "10.0.0.10:80")).unwrap_err();
    bench.fake.state().rules.insert(9, stray);
    bench.controller.tick(now());
    assert_eq!(bench.fake.state().rules.keys().copied().collect::<Vec<_>>(), [0]);
}

#[test]
fn another_target_moves_udp_and_leaves_tcp() {
    let mut bench = bench();
    bench.add(&web()).unwrap();
    bench.flow(0, "tcp", "198.51.100.1:1");
    bench.flow(0, "udp", "198.51.100.1:1");
    bench
        .set("web", Request { target: Some("10.0.0.11:80".parse().unwrap()), ..Request::default() })
        .unwrap();
    assert_eq!(bench.flows(), ["tcp"]);
    let cut = Request { target: Some("10.0.0.12:80".parse().unwrap()), cut: true, ..Request::default() };
    bench.set("web", cut).unwrap();
    assert_eq!(bench.flows(), [""; 0]);
}

#[test]
fn a_disabled_rule_loses_its_flows_and_keeps_its_place() {
    let mut bench = bench();
    bench.add(&web()).unwrap();
    bench.flow(0, "tcp", "198.51.100.1:1");
    let rule = bench.set("web", Request { enabled: Some(false), ..Request::default() }).unwrap();
    assert_eq!((rule.state, bench.flows().len()), (State::Disabled, 0));
    assert!(bench.kernel(0).externals.is_empty());
    bench.conflict(&request("tcp", "wan:8080", "10.0.0.11:80"));
    let rule = bench.set("web", Request { enabled: Some(true), ..Request::default() }).unwrap();
    assert_eq!((rule.state, bench.kernel(0).externals.len()), (State::Active, 1));
}

#[test]
fn a_tighter_allow_list_cuts_whom_it_forbids() {
    let mut bench = bench();
    bench.add(&web()).unwrap();
    bench.flow(0, "tcp", "198.51.100.1:1");
    bench.flow(0, "udp", "192.0.2.1:1");
    let allow = Some(crate::rule::AllowList::parse(["192.0.2.0/24"]).unwrap());
    bench.set("web", Request { allow, ..Request::default() }).unwrap();
    assert_eq!(bench.flows(), ["udp"]);
    assert_eq!(bench.kernel(0).allow.len(), 1);
}

#[test]
fn words_about_a_rule_touch_no_flow() {
    let mut bench = bench();
    bench.add(&web()).unwrap();
    bench.flow(0, "tcp", "198.51.100.1:1");
    let writes = bench.writes();
    let words = Request { name: Some("shop".into()), owner: Some("ops".into()), ..Request::default() };
    bench.set("web", words).unwrap();
    assert_eq!((bench.flows(), bench.writes()), (vec!["tcp"], writes));
}

#[test]
fn a_rule_ends_at_its_end_and_not_before() {
    let mut bench = bench();
    let rule = bench.add(&Request { lifetime: lasting(60), ..web() }).unwrap();
    let end = rule.expires_at.unwrap();
    assert_eq!(bench.controller.next_expiry(), Some(end));
    assert_eq!(bench.kernel(0).expires_at, Some(end));
    assert_eq!(bench.controller.expire_due(end - Duration::from_millis(1)).unwrap(), [0; 0]);
    assert_eq!(bench.controller.expire_due(end).unwrap(), [1]);
    assert!(bench.fake.state().rules.is_empty());
    assert!(bench.restarted().controller.rules.is_empty());
}

#[test]
fn renewing_counts_from_now_and_is_said_where_the_rule_was_permanent() {
    let mut bench = bench();
    bench.add(&web()).unwrap();
    let web = "web".parse().unwrap();
    let before = now();
    let rule = bench.controller.renew(&web, "1h".parse().unwrap(), "alice").unwrap();
    let left = rule.expires_at.unwrap().duration_since(before).as_secs();
    assert!((3600..3605).contains(&left), "{left}");
    assert!(rule.warnings[0].contains("was permanent"));
    assert!(bench.controller.renew(&web, Lifetime::Never, "alice").is_err());
    let kept = bench.set("web", Request { owner: Some("ops".into()), ..Request::default() }).unwrap();
    assert_eq!(kept.expires_at, rule.expires_at, "a change does not make it permanent");
    let never = bench.set("web", Request { lifetime: Some(Lifetime::Never), ..Request::default() }).unwrap();
    assert_eq!(never.expires_at, None);
}

#[test]
fn deleting_cuts_and_draining_waits_for_the_last_flow() {
    let mut bench = bench();
    bench.add(&web()).unwrap();
    bench.flow(0, "tcp", "198.51.100.1:1");
    let web_ref = "web".parse().unwrap();
    let rule = bench.controller.del(&web_ref, true, "alice").unwrap();
    assert_eq!(rule.state, State::Draining);
    assert!(bench.kernel(0).externals.is_empty());
    assert_eq!(bench.flows(), ["tcp"]);
    bench.controller.tick(now());
    assert!(bench.set("web", Request { cut: true, ..Request::default() }).is_err(), "it is deleted already");

    let next = bench.add(&web()).unwrap();
    assert_eq!(bench.controller.show(&web_ref).unwrap().id, next.id, "name and port are free again");
    let mut bench = bench.restarted();
    assert_eq!(bench.controller.rules.len(), 2, "draining survives a restart");
    bench.fake.state().flows.clear();
    bench.controller.tick(now());
    assert_eq!(bench.controller.rules.keys().copied().collect::<Vec<_>>(), [next.id]);
    bench.controller.del(&web_ref, false, "alice").unwrap();
    assert!(bench.fake.state().rules.is_empty());
    assert!(matches!(bench.controller.show(&web_ref), Err(Error::NotFound(_))));
}

#[test]
fn an_interface_rule_follows_the_addresses_of_its_interface() {
    let mut bench = bench();
    bench.add(&web()).unwrap();
    bench.flow(0, "tcp", "198.51.100.1:1");
    bench.controller.network_changed(network(&["203.0.113.10", "203.0.113.11"]));
    assert_eq!(
        (bench.kernel(0).externals.len(), bench.flows().len()),
        (2, 1),
        "a further address cuts nothing"
    );

    bench.controller.network_changed(network(&["203.0.113.11"]));
    assert_eq!(
        (bench.kernel(0).externals.len(), bench.flows().len()),
        (1, 0),
        "flows to a lost address are cut"
    );

    bench.controller.network_changed(network(&[]));
    let rule = bench.controller.show(&RuleRef::Id(1)).unwrap();
    assert_eq!(rule.state, State::Waiting);
    assert_eq!(rule.state_reason.as_deref(), Some("interface wan has no IPv4 address"));
    bench.controller.network_changed(Network::default());
    let reason = bench.controller.show(&RuleRef::Id(1)).unwrap().state_reason;
    assert_eq!(reason.as_deref(), Some("interface wan does not exist"));
    bench.controller.network_changed(network(&["203.0.113.12"]));
    assert_eq!(bench.controller.show(&RuleRef::Id(1)).unwrap().state, State::Active);
}

/// `wan` with both families, and all that IPv6 brings beside lasting global addresses.
fn dual(wan: &[&str]) -> Network {
    let mut network = network(&[&["203.0.113.10", "fe80::1", "2001:db8::7e37"], wan].concat());
    network.interfaces[0].temporary = vec!["2001:db8::7e37".parse().unwrap()];
    network
}

fn web6() -> Request {
    request("tcp+udp", "wan:8080", "[fd00::10]:80")
}

#[test]
fn an_interface_rule_follows_the_addresses_of_its_targets_family() {
    let mut bench = bench();
    bench.controller.network_changed(dual(&["2001:db8::1"]));
    bench.add(&web()).unwrap();
    bench.add(&web6()).unwrap();
    let externals =
        |bench: &Bench| bench.kernel(1).externals.iter().map(IpAddr::to_string).collect::<Vec<_>>();
    assert_eq!(bench.kernel(0).externals, ["203.0.113.10".parse::<IpAddr>().unwrap()]);
    assert_eq!(externals(&bench), ["2001:db8::1"], "neither a link-local nor a temporary address");

    // The provider has given another prefix: the old one goes.
    bench.flow(0, "tcp", "198.51.100.1:1");
    bench.flow(1, "udp", "[2001:db8:f::1]:1");
    bench.controller.network_changed(dual(&["2001:db8::1", "2001:db8:2::1"]));
    assert_eq!((externals(&bench).len(), bench.flows().len()), (2, 2));
    bench.controller.network_changed(dual(&["2001:db8:2::1"]));
    assert_eq!(externals(&bench), ["2001:db8:2::1"]);
    assert_eq!(bench.flows(), ["tcp"], "the other family's rule has lost nothing");

    bench.controller.network_changed(dual(&[]));
    let waiting = bench.controller.show(&RuleRef::Id(2)).unwrap();
    assert_eq!(waiting.state, State::Waiting);
    assert_eq!(waiting.state_reason.as_deref(), Some("interface wan has no lasting global IPv6 address"));
    assert_eq!(bench.controller.show(&RuleRef::Id(1)).unwrap().state, State::Active);
}

#[test]
fn a_port_of_an_interface_may_have_a_rule_for_either_family() {
    let mut bench = bench();
    bench.controller.network_changed(dual(&["2001:db8::1"]));
    bench.add(&web()).unwrap();
    bench.add(&web6()).unwrap();
    assert_eq!(bench.conflict(&request("tcp", "wan:8080", "[fd00::11]:80")).1, Some(2));
    assert_eq!(bench.conflict(&request("udp", "[2001:db8::1]:8000-8100", "[fd00::11]:80")).1, Some(2));
    assert_eq!(bench.conflict(&request("udp", "203.0.113.10:8080", "10.0.0.11:80")).1, Some(1));
    bench.add(&request("udp", "[2001:db8::7e37]:8080", "[fd00::11]:80")).unwrap();

    // What would be said of both is said of neither.
    let both: RuleRef = "tcp+udp wan:8080".parse().unwrap();
    let error = bench.controller.del(&both, false, "alice").unwrap_err().to_string();
    assert!(error.contains("rule 1 (web) for IPv4 and rule 2 for IPv6"), "{error}");
    let replaced =
        bench.add(&Request { replace: true, ..request("tcp+udp", "wan:8080", "[fd00::12]:80") }).unwrap();
    assert_eq!(replaced.id, 2, "replacing concerns the rule of the same family");
    bench.controller.del(&RuleRef::Id(1), false, "alice").unwrap();
    assert_eq!(bench.controller.show(&both).unwrap().id, 2);
}

#[test]
fn a_namesake_of_the_other_family_that_is_replaced_loses_its_flows() {
    let mut bench = bench();
    bench.controller.network_changed(dual(&["2001:db8::1"]));
    bench.add(&web()).unwrap();
    bench.flow(0, "tcp", "198.51.100.1:1");
    let other = Request { name: Some("web".into()), replace: true, ..web6() };
    assert_eq!(bench.add(&other).unwrap().id, 1);
    assert_eq!(bench.flows(), [""; 0]);
    assert_eq!(bench.kernel(0).externals, ["2001:db8::1".parse::<IpAddr>().unwrap()]);
}

#[test]
fn targets_of_ipv6_that_are_the_router_itself_are_refused() {
    let mut bench = bench();
    bench.controller.network_changed(dual(&["2001:db8::1"]));
    let error = bench.refusal(&request("tcp", "wan:80", "[2001:db8::1]:80")).to_string();
    assert!(error.contains("external address itself"), "{error}");
    let error = bench.refusal(&request("tcp", "wan:80", "[2001:db8::7e37]:80")).to_string();
    assert!(error.contains("address of this router"), "{error}");
}

#[test]
fn an_address_lost_while_no_controller_ran_is_noticed() {
    let mut bench = bench();
    bench.add(&web()).unwrap();
    bench.flow(0, "tcp", "198.51.100.1:1");
    let Bench { directory, fake, controller: old } = bench;
    drop(old);
    let _second = controller(directory.path(), &fake, network(&["203.0.113.99"]));
    assert!(fake.state().flows.is_empty());
}

#[test]
fn a_restart_with_nothing_changed_writes_nothing() {
    let mut bench = bench();
    bench.add(&web()).unwrap();
    bench.flow(0, "tcp", "198.51.100.1:1");
    let writes = bench.writes();
    let bench = bench.restarted();
    assert_eq!((bench.writes(), bench.flows()), (writes, vec!["tcp"]));
}

#[test]
fn a_failed_start_leaves_what_an_earlier_controller_forwards() {
    let mut bench = bench();
    bench.add(&web()).unwrap();
    bench.add(&request("tcp", "ppp0:1", "10.0.0.10:80")).unwrap();
    let Bench { directory, fake, controller: old } = bench;
    drop(old);
    fake.state().refusals = 1;
    let store = Store::open(directory.path()).unwrap();
    let network = network(&["203.0.113.10"]);
    assert!(Controller::new(store, Box::new(fake.clone()), network, settings(), machine()).is_err());
    assert_eq!(fake.state().rules.len(), 2);
}

#[test]
fn an_address_rule_wins_over_an_interface_that_gets_its_address() {
    let mut bench = bench();
    bench.add(&web()).unwrap();
    bench
        .add(&Request { name: Some("fixed".into()), ..request("tcp", "203.0.113.11:8080", "10.0.0.11:80") })
        .unwrap();
    bench.controller.network_changed(network(&["203.0.113.11"]));
    let rule = bench.controller.show(&"web".parse().unwrap()).unwrap();
    assert_eq!(rule.state_reason.as_deref(), Some("rule 2 (fixed) has these ports of 203.0.113.11"));
    bench.controller.del(&"fixed".parse().unwrap(), false, "alice").unwrap();
    assert_eq!(bench.controller.show(&"web".parse().unwrap()).unwrap().state, State::Active);
}

#[test]
fn a_rule_may_wait_for_an_interface_that_is_configured_but_not_there_yet() {
    let mut bench = bench();
    let rule = bench.add(&request("tcp", "ppp0:80", "10.0.0.10:80")).unwrap();
    assert_eq!(rule.state, State::Waiting);
    let mut later = network(&["203.0.113.10"]);
    later.interfaces.push(interface(3, "ppp0", &["192.0.2.5", "2001:db8::5"]));
    bench.controller.network_changed(later);
    assert_eq!(bench.kernel(0).externals, ["192.0.2.5".parse::<IpAddr>().unwrap()]);
}

/// The host's connection tracking would take a running session's next packet for another one's.
#[test]
fn another_way_cuts_what_runs() {
    let mut bench = bench();
    bench.add(&web()).unwrap();
    let before = bench.kernel(0).epoch;
    let change = Request { via: Some(Via::Stack), ..Request::default() };
    bench.controller.set(&RuleRef::Id(1), &change, "alice").unwrap();
    let after = bench.kernel(0);
    assert!(after.via_stack && after.epoch.tcp > before.tcp && after.epoch.udp > before.udp);
}

#[test]
fn a_slot_used_again_has_a_greater_epoch() {
    let mut bench = bench();
    bench.add(&web()).unwrap();
    let before = bench.kernel(0).epoch;
    bench.controller.del(&RuleRef::Id(1), false, "alice").unwrap();
    let mut bench = bench.restarted();
    bench.add(&web()).unwrap();
    let after = bench.kernel(0).epoch;
    assert!(after.tcp > before.tcp.max(before.udp) && after.udp > before.tcp.max(before.udp));
}

#[test]
fn tables_that_became_too_small_are_refused_at_the_start() {
    let mut bench = bench();
    bench.add(&web()).unwrap();
    bench.add(&request("tcp", "wan:1", "10.0.0.10:80")).unwrap();
    bench.fake.state().capacity = 1;
    let store = Store::open(bench.directory.path()).unwrap();
    let network = network(&["203.0.113.10"]);
    let error =
        Controller::new(store, Box::new(bench.fake.clone()), network, settings(), machine()).err().unwrap();
    assert!(error.to_string().contains("[tables]"), "{error}");
}

#[test]
fn flows_are_told_by_rule() {
    let mut bench = bench();
    bench.add(&web()).unwrap();
    bench.add(&request("tcp", "wan:1", "10.0.0.10:80")).unwrap();
    bench.flow(0, "tcp", "198.51.100.1:1");
    bench.flow(1, "tcp", "198.51.100.1:2");
    bench.flow(7, "tcp", "198.51.100.1:3");
    assert_eq!(bench.controller.flows(None).unwrap().len(), 2);
    let flows = bench.controller.flows(Some(&"web".parse().unwrap())).unwrap();
    assert_eq!((flows.len(), flows[0].rule_name.as_deref()), (1, Some("web")));
    assert!(bench.controller.flows(Some(&"nothing".parse().unwrap())).is_err());
}

#[test]
fn status_counts_rules_by_state() {
    let mut bench = bench();
    bench.add(&web()).unwrap();
    bench.add(&request("tcp", "ppp0:1", "10.0.0.10:80")).unwrap();
    bench.add(&Request { enabled: Some(false), ..request("tcp", "wan:1", "10.0.0.10:80") }).unwrap();
    let status = bench.controller.status().unwrap();
    assert_eq!(status.rules, RuleCounts { active: 1, waiting: 1, disabled: 1, draining: 0 });
}

#[tokio::test]
async fn time_is_kept_to_the_second_also_for_rules_that_come_later() {
    let Bench { directory: _directory, fake, controller } = bench();
    let shared = Shared::new(controller);
    let time = tokio::spawn(shared.clone().keep_time());
    tokio::time::sleep(Duration::from_millis(300)).await;
    shared
        .run(|controller| controller.add(&Request { lifetime: lasting(1), ..web() }, "alice"))
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_millis(900)).await;
    assert_eq!(fake.state().rules.len(), 1, "it has not ended early");
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(fake.state().rules.len(), 0, "it has ended in its second");
    time.abort();
}

fn dmz() -> Request {
    let name = Some("dmz".into());
    let review_by = Some("2100-01-01".into());
    Request { name, review_by, dmz: true, ..request("tcp+udp", "wan:1-65535", "10.0.0.10:1-65535") }
}

#[test]
fn a_dmz_host_is_asked_for_with_a_review_date_or_by_force_and_warned_of() {
    let mut bench = bench();
    let careless = Request { review_by: None, ..dmz() };
    let refusal = bench.refusal(&careless).to_string();
    assert!(refusal.contains("every port of 10.0.0.10") && refusal.contains("--review-by"), "{refusal}");
    let rule = bench.add(&Request { force: true, ..careless }).unwrap();
    assert!(
        rule.dmz && rule.warnings[0].contains("exposes every port of 10.0.0.10 to everyone"),
        "{:?}",
        rule.warnings
    );
    let shown = bench.controller.show(&"dmz".parse().unwrap()).unwrap();
    assert_eq!(shown.warnings, [""; 0], "it works as it was meant");
    let (message, _) = bench.conflict(&Request { name: None, ..dmz() });
    assert!(message.contains("rule 1 (dmz)"), "{message}");
    for (external, target) in [("wan:1-1000", "10.0.0.10:1-1000"), ("wan:1-65535", "10.0.0.10:80")] {
        let refusal = bench.refusal(&Request { dmz: true, ..request("tcp", external, target) }).to_string();
        assert!(refusal.contains("wan:1-65535 10.0.0.10:1-65535"), "{refusal}");
    }
    let change = bench.set("dmz", Request { enabled: Some(false), ..Request::default() }).unwrap();
    assert!(change.dmz, "what is not said stays");
}

#[test]
fn other_rules_and_a_dmz_host_do_not_get_in_each_others_way() {
    let mut bench = bench();
    bench.add(&web()).unwrap();
    bench.add(&dmz()).unwrap();
    bench.add(&Request { replace: true, ..request("tcp", "wan:22", "10.0.0.11:22") }).unwrap();
    assert_eq!(bench.controller.rules.len(), 3);
    let wan: IpAddr = "203.0.113.10".parse().unwrap();
    for slot in 0..3 {
        assert_eq!(bench.kernel(slot).externals, [wan]);
        assert_eq!(bench.kernel(slot).dmz, slot == 1);
    }
}

#[test]
fn services_of_the_router_are_no_obstacle_to_a_dmz_host() {
    let mut bench = bench();
    bench.controller.machine.find_listeners = somebody;
    let rule = bench.add(&dmz()).unwrap();
    assert!(rule.warnings.iter().all(|warning| !warning.contains("sshd")), "{:?}", rule.warnings);
}
