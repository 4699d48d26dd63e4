//! The real API on a real socket, asked by the real client and by rude ones; the data path is a fake.

#![allow(clippy::unwrap_used, reason = "clippy knows the test functions, but not their helpers")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Parser;
use forwarder::api::{ApiSocket, Bounds, LONGEST_BODY, serve};
use forwarder::client::{Client, ClientError};
use forwarder::controller::{Controller, Machine, Settings, Shared};
use forwarder::ctl::args::Cli;
use forwarder::ctl::{Failure, Report, Terminal, run};
use forwarder::datapath::fake::FakeDatapath;
use forwarder::network::{Egress, Interface, Network};
use forwarder::rule::{Request, State};
use forwarder::store::Store;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

fn all_inside(targets: &BTreeSet<IpAddr>) -> anyhow::Result<BTreeMap<IpAddr, Egress>> {
    Ok(targets.iter().map(|target| (*target, Egress::Interface(2))).collect())
}

/// A daemon without the kernel: everything from the socket down to the data path.
struct Daemon {
    _directory: tempfile::TempDir,
    socket: PathBuf,
    fake: FakeDatapath,
    stop: Option<oneshot::Sender<()>>,
    api: JoinHandle<()>,
}

impl Daemon {
    fn start() -> Self {
        Self::start_with(Bounds::default())
    }

    fn start_with(bounds: Bounds) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("run/forwarder.sock");
        let fake = FakeDatapath::with_capacity(1024);
        let interface = |index: u32, name: &str, address: &str| Interface {
            index,
            name: name.into(),
            mac: None,
            is_bare: false,
            mtu: 1500,
            kind: None,
            sends_for_xdp: None,
            addresses: vec![address.parse().unwrap()],
            temporary: Vec::new(),
        };
        let network = Network {
            interfaces: vec![interface(1, "wan", "203.0.113.10"), interface(2, "lan", "10.0.0.1")],
        };
        let settings = Settings { external: vec!["wan".into()], internal: vec!["lan".into()] };
        let store = Store::open(directory.path()).unwrap();
        let machine =
            Machine { find_listeners: |_| Ok(Vec::new()), find_egress: all_inside, net_settings: "/nowhere" };
        let controller = Controller::new(store, Box::new(fake.clone()), network, settings, machine).unwrap();
        let (stop, stopped) = oneshot::channel();
        let bound = ApiSocket::bind(&socket).unwrap();
        let api = tokio::spawn(serve(bound, Shared::new(controller), bounds, async {
            let _ = stopped.await;
        }));
        Daemon { _directory: directory, socket, fake, stop: Some(stop), api }
    }

    fn client(&self) -> Client {
        Client::new(&self.socket)
    }

    /// Runs forwarderctl with these words.
    async fn ctl(&self, words: &str) -> Result<Report, Failure> {
        ctl(&self.socket, words).await
    }

    async fn json(&self, words: &str) -> Value {
        let report = self.ctl(&format!("--json {words}")).await.unwrap();
        serde_json::from_str(&report.text).unwrap()
    }

    /// Sends bytes as they are and reads until the other end closes.
    async fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = UnixStream::connect(&self.socket).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// Asks with any method, path and body; gives the status and the JSON of the answer.
    async fn ask(&self, method: &str, path: &str, kind: &str, body: &[u8]) -> (u16, Value) {
        let mut bytes = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: {kind}\r\n\
             content-length: {}\r\n\r\n",
            body.len()
        )
        .into_bytes();
        bytes.extend_from_slice(body);
        let answer = self.raw(&bytes).await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, serde_json::from_str(body).unwrap_or_else(|_| panic!("no JSON: {answer}")))
    }

    async fn post(&self, body: &str) -> (u16, Value) {
        self.ask("POST", "/v1/rules", "application/json", body.as_bytes()).await
    }
}

async fn ctl(socket: &Path, words: &str) -> Result<Report, Failure> {
    let socket = socket.to_str().unwrap();
    let cli = Cli::try_parse_from(["forwarderctl", "--socket", socket].into_iter().chain(words.split(' ')))
        .unwrap();
    run(&cli, Terminal::default()).await
}

fn web() -> Request {
    serde_json::from_value(
        json!({"name": "web", "protocol": "tcp", "external": "wan:8080", "target": "10.0.0.10:80"}),
    )
    .unwrap()
}

#[tokio::test]
async fn a_rule_lives_through_all_commands() {
    let daemon = Daemon::start();
    let added =
        daemon.json("add tcp wan:8080 10.0.0.10:80 --name web --lifetime 12h --allow 198.51.100.0/24").await;
    for field in [
        "id",
        "name",
        "protocol",
        "external",
        "target",
        "allow",
        "limits",
        "hairpin",
        "via",
        "enabled",
        "owner",
        "purpose",
        "created_at",
        "created_by",
        "changed_at",
        "review_by",
        "expires_at",
        "state",
        "counters",
    ] {
        assert!(added.get(field).is_some(), "{field} is missing in {added}");
    }
    for counter in
        ["packets_in", "bytes_in", "packets_out", "bytes_out", "sessions_active", "sessions_total", "dropped"]
    {
        assert!(added["counters"].get(counter).is_some(), "{counter}");
    }
    let again = daemon.ctl("add tcp wan:8080 10.0.0.10:80 --replace").await.unwrap();
    assert!(again.text.starts_with("rule 1 (web) replaced"), "{}", again.text);
    assert_eq!(again.warnings.len(), 2, "the allow list and the end stay: {:?}", again.warnings);
    assert_eq!((&added["id"], &added["state"], &added["via"]), (&json!(1), &json!("active"), &json!("fast")));
    assert_eq!(daemon.json("list").await, json!([added]));
    assert_eq!(daemon.json("show tcp wan:8080").await["id"], 1);
    let changed = daemon.json("set web --target 10.0.0.11:81 --owner ops").await;
    assert_eq!((&changed["target"], &changed["owner"]), (&json!("10.0.0.11:81"), &json!("ops")));
    let renewed = daemon.json("renew 1 --lifetime 30d").await;
    assert!(renewed["expires_at"].as_str() > added["expires_at"].as_str());
    assert_eq!(daemon.json("flows web").await, json!([]));
    assert_eq!(daemon.json("stats").await["rules"][0]["id"], 1);
    assert_eq!(daemon.json("status").await["rules"]["active"], 1);
    assert_eq!(daemon.json("del web").await[0]["id"], 1);
    assert_eq!(daemon.json("list").await, json!([]));
    assert!(daemon.fake.state().rules.is_empty());
}

#[tokio::test]
async fn the_text_of_each_command_names_the_rule() {
    let daemon = Daemon::start();
    let added = daemon.ctl("add udp wan:53 10.0.0.10:53 --name dns").await.unwrap();
    assert_eq!(added.text, "rule 1 (dns) added: udp wan:53 to 10.0.0.10:53 [active]\n");
    let list = daemon.ctl("list").await.unwrap().text;
    assert!(list.starts_with("ID  NAME") && list.contains("dns") && list.contains("never"), "{list}");
    let renewed = daemon.ctl("renew dns --lifetime 1h").await.unwrap();
    assert!(renewed.warnings[0].contains("was permanent"));
    for words in ["show dns", "stats"] {
        assert!(daemon.ctl(words).await.unwrap().text.contains("dns"), "{words}");
    }
    assert!(daemon.ctl("status").await.unwrap().text.contains("1 active"));
    assert!(daemon.ctl("del dns --drain").await.unwrap().text.contains("drains"));
}

#[tokio::test]
async fn who_changes_is_written_down() {
    let daemon = Daemon::start();
    let rule = daemon.client().add(&web()).await.unwrap().rule;
    let user = nix::unistd::User::from_uid(nix::unistd::Uid::effective()).unwrap().unwrap();
    assert_eq!(rule.created_by, user.name);
}

#[tokio::test]
async fn refusals_have_their_exit_code_and_one_line() {
    let daemon = Daemon::start();
    daemon.client().add(&web()).await.unwrap();
    for words in [
        "add tcp wan:8080 10.0.0.11:80",
        "add tcp nowhere:80 10.0.0.11:80",
        "add tcp wan:81 10.0.0.1:80",
        "add tcp wan:81 10.0.0.11:80 --name web",
        "show nothing",
        "show tcp wan:1",
        "set nothing --cut",
        "set web --target 203.0.113.10:80",
        "renew web --lifetime never",
        "flows nothing",
        "del web nothing",
    ] {
        let failure = daemon.ctl(words).await.unwrap_err();
        assert_eq!(failure.exit_code(), 1, "{words}");
        assert!(!failure.to_string().contains('\n'), "{words}: {failure}");
    }
    assert_eq!(
        daemon.client().list().await.unwrap().len(),
        1,
        "del of several deletes none when one does not exist"
    );
}

#[tokio::test]
async fn without_a_controller_it_says_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("forwarder.sock");
    let failure = ctl(&socket, "list").await.unwrap_err();
    assert_eq!(failure.exit_code(), 3);
    assert!(failure.to_string().contains("start forwarderd"), "{failure}");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let failure = ctl(&socket, "list").await.unwrap_err();
    assert!(failure.exit_code() == 3 && failure.to_string().contains("is gone"), "{failure}");
    for no_socket in [directory.path(), tempfile::NamedTempFile::new().unwrap().path()] {
        let failure = ctl(no_socket, "list").await.unwrap_err();
        assert!(failure.exit_code() == 3 && failure.to_string().contains("no socket"), "{failure}");
    }
}

#[tokio::test]
async fn names_with_any_character_can_be_asked_for() {
    let daemon = Daemon::start();
    for (port, name) in ["a b", "ä/ö", "50%", "q?x=1&y#z", "a+b"].into_iter().enumerate() {
        let request = Request {
            name: Some(name.into()),
            external: Some(format!("wan:{}", port + 1).parse().unwrap()),
            ..web()
        };
        daemon.client().add(&request).await.unwrap();
        let reference = name.parse().unwrap();
        assert_eq!(daemon.client().show(&reference).await.unwrap().name.as_deref(), Some(name));
        assert_eq!(daemon.client().flows(Some(&reference)).await.unwrap(), []);
    }
}

#[tokio::test]
async fn bad_fields_are_refused_and_change_nothing() {
    let daemon = Daemon::start();
    let good = json!({"protocol": "tcp", "external": "wan:80", "target": "10.0.0.10:80"});
    for (field, value, expected) in [
        ("protocol", json!("icmp"), "unknown"),
        ("protocol", json!(6), "invalid type"),
        ("protocol", Value::Null, "protocol: invalid type: null"),
        ("external", json!("wan:0"), "1 to 65535"),
        ("external", json!("wan:70000"), "1 to 65535"),
        ("external", json!("wan"), "wan:8080"),
        ("external", json!("nowhere:80"), "no interface"),
        ("external", json!("lan:80"), "not an external"),
        ("external", json!("127.0.0.1:80"), "loopback"),
        ("external", json!("224.0.0.1:80"), "multicast"),
        ("external", json!("0.0.0.0:80"), "unspecified"),
        ("external", json!("10.0.0.10:80"), "external address itself"),
        ("external", json!("wan:80-90"), ""),
        ("target", json!("10.0.0.10:80-81"), "equally long"),
        ("target", json!("[fe80::1]:80"), "link-local"),
        ("target", json!("255.255.255.255:80"), "broadcast"),
        ("target", json!("10.0.0.1:80"), "router"),
        ("target", json!("203.0.113.10:80"), "external address itself"),
        ("name", json!("12"), "id"),
        ("name", json!("x".repeat(10_000)), "64"),
        ("name", json!("a\u{1b}[31m"), "control"),
        ("name", json!(["web"]), "invalid type"),
        ("owner", json!("a\nb"), "control"),
        ("purpose", json!("x".repeat(300)), "256"),
        ("allow", json!("10.0.0.0/8"), "invalid type"),
        ("allow", json!(["10.0.0.1/8"]), "write 10.0.0.0/8"),
        ("allow", json!(["nobody"]), "not a network"),
        ("limits", json!({"max_sessions": 0}), "write 1 to"),
        ("limits", json!({"max": 5}), "unknown field"),
        ("hairpin", json!("no"), "invalid type"),
        ("via", json!("slow"), "unknown variant"),
        ("enabled", json!(1), "invalid type"),
        ("review_by", json!("soon"), "2026-12-31"),
        ("lifetime", json!("0s"), "shortest"),
        ("lifetime", json!("soon"), "90s"),
        ("lifetime", json!(60), "lifetime: invalid type"),
        ("lifetime", json!("10M"), "lifetime `10M` is not a duration: write 90s, 10m, 12h or 30d"),
        ("cut", json!(true), "change"),
        ("expires_at", json!("2030-01-01T00:00:00Z"), "unknown field `expires_at`"),
        ("colour", json!("red"), "unknown field `colour`"),
    ] {
        let mut body = good.clone();
        body[field] = value.clone();
        let (status, answer) = daemon.post(&body.to_string()).await;
        if expected.is_empty() {
            assert_eq!(status, 201, "{field} = {value}: {answer}");
            daemon.json("del 1").await;
            continue;
        }
        let error = answer["error"].as_str().unwrap();
        assert_eq!(status, 400, "{field} = {value}: {error}");
        assert!(error.contains(expected) && !error.contains('\n'), "{field} = {value}: {error}");
    }
    assert_eq!(daemon.client().list().await.unwrap(), []);
}

#[tokio::test]
async fn every_kind_of_error_has_its_status() {
    let daemon = Daemon::start();
    daemon.client().add(&web()).await.unwrap();
    let json = "application/json";
    for (status, method, path, kind, body) in [
        (404, "GET", "/", json, ""),
        (404, "GET", "/v1/nothing", json, ""),
        (404, "GET", "/v1/rules/7", json, ""),
        (404, "DELETE", "/v1/rules/nothing", json, ""),
        (404, "GET", "/v1/flows?rule=nothing", json, ""),
        (405, "PUT", "/v1/rules", json, "{}"),
        (405, "DELETE", "/v1/status", json, ""),
        (415, "POST", "/v1/rules", "application/x-www-form-urlencoded", "{}"),
        (415, "PATCH", "/v1/rules/web", "", "{}"),
        (400, "POST", "/v1/rules", json, ""),
        (400, "POST", "/v1/rules", json, "{"),
        (400, "POST", "/v1/rules", json, "[]"),
        (400, "POST", "/v1/rules", json, "{\"protocol\": \"tcp\"}"),
        (400, "POST", "/v1/rules?dry=true", json, "{}"),
        (400, "PATCH", "/v1/rules/web", json, "{\"external\": \"wan:81\"}"),
        (400, "PATCH", "/v1/rules/web", json, "{\"replace\": true}"),
        (400, "POST", "/v1/rules/web/renew", json, "{}"),
        (400, "POST", "/v1/rules/web/renew", json, "{\"lifetime\": \"0s\"}"),
        (400, "DELETE", "/v1/rules/web?drain=maybe", json, ""),
        (400, "DELETE", "/v1/rules/web?drian=true", json, ""),
        (400, "GET", "/v1/rules/%ff", json, ""),
        (400, "GET", "/v1/rules/99999999999999999999", json, ""),
        (400, "GET", "/v1/rules/tcp%20wan", json, ""),
    ] {
        let (answered, answer) = daemon.ask(method, path, kind, body.as_bytes()).await;
        assert_eq!(answered, status, "{method} {path}: {answer}");
        assert!(!answer["error"].as_str().unwrap().contains('\n'), "{answer}");
    }
    let body = json!({"protocol": "tcp", "external": "wan:8000-8090", "target": "10.0.0.11:80"}).to_string();
    let (status, answer) = daemon.post(&body).await;
    assert_eq!((status, &answer["rule"]), (409, &json!(1)));
    daemon.fake.state().refusals = 1;
    let (status, _) = daemon.post(&body.replace("8000-8090", "1")).await;
    assert_eq!(status, 500);
    assert_eq!(daemon.client().list().await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_body_of_two_megabytes_is_refused_by_its_length() {
    let daemon = Daemon::start();
    let body = vec![b' '; 2 * LONGEST_BODY];
    let (status, answer) = daemon.ask("POST", "/v1/rules", "application/json", &body).await;
    assert_eq!(status, 413, "{answer}");
}

#[tokio::test]
async fn garbage_and_silence_are_cut() {
    let silence = Duration::from_millis(300);
    let daemon = Daemon::start_with(Bounds { silence, ..Bounds::default() });
    let body = "POST /v1/rules HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{";
    let idle = "GET /v1/rules HTTP/1.1\r\nhost: x\r\n\r\n";
    for rude in ["", "GET /v1/ru", "GET / HTTP/1.1\r\nhost:", body, idle, "\0\u{7f}garbage\r\n\r\n"] {
        let begun = Instant::now();
        let answer = daemon.raw(rude.as_bytes()).await;
        assert!(begun.elapsed() < 10 * silence, "{rude:?} held its connection");
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 "), "{answer}");
        if rude == body {
            assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
        }
    }
    assert_eq!(daemon.client().list().await.unwrap(), []);
}

#[tokio::test]
async fn a_thousand_connections_cost_no_more_than_those_that_have_a_place() {
    let silence = Duration::from_millis(300);
    let daemon = Daemon::start_with(Bounds { connections: 8, silence });
    let mut idle = Vec::new();
    for _ in 0..1000 {
        // The backlog may be full: a client that cannot even connect takes nothing.
        if let Ok(Ok(stream)) =
            tokio::time::timeout(Duration::from_millis(5), UnixStream::connect(&daemon.socket)).await
        {
            idle.push(stream);
        }
    }
    assert!(idle.len() > 100);
    idle.truncate(100);
    let added =
        tokio::time::timeout(Duration::from_secs(20), daemon.client().add(&web())).await.unwrap().unwrap();
    assert_eq!(added.rule.state, State::Active);
}

#[tokio::test]
async fn a_stopped_daemon_answers_what_is_under_way_and_takes_its_socket_away() {
    let mut daemon = Daemon::start();
    daemon.client().add(&web()).await.unwrap();
    let _idle = UnixStream::connect(&daemon.socket).await.unwrap();
    drop(daemon.stop.take());
    tokio::time::timeout(Duration::from_secs(5), &mut daemon.api).await.unwrap().unwrap();
    assert!(!daemon.socket.exists());
    assert!(matches!(daemon.client().list().await, Err(ClientError::Unreachable(_))));
    assert_eq!(daemon.fake.state().rules.len(), 1, "forwarding goes on");
}
