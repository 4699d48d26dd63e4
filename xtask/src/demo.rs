//! `cargo xtask demo`: the main job, before one's eyes.
//!
//! The network is the test bed's: namespaces that no name leads to and that go with this process,
//! however it ends, and so do the programs in them.

use std::{
    collections::HashMap,
    env,
    process::Output,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use testbed::{Datapath, TcpServer, Testbed, UdpServer, udp_ask, udp_socket};

use crate::{
    build, process,
    workspace::{Workspace, ensure_root},
};

const NETWORK: &str = "
    client 203.0.113.2 ──── wan 203.0.113.1 ┃ router ┃ lan 192.168.2.1 ──┬── 192.168.2.101 web server
                                                                         ├── 192.168.2.102 web server
                                                                         └── 192.168.2.103 web server
";

/// The router's address on the internet, where the mappings are.
const ROUTER: &str = "203.0.113.1";
const CLIENT: &str = "203.0.113.2";

/// The web servers behind the router, and the public port of each.
const SERVERS: [(&str, u16); 3] = [("192.168.2.101", 8080), ("192.168.2.102", 8090), ("192.168.2.103", 8091)];

const UDP_PORT: u16 = 5300;
const BRIEF_PORT: u16 = 8099;
const LIFETIME: Duration = Duration::from_secs(3);

/// Lifetimes are exact to this.
const SLACK: Duration = Duration::from_secs(1);

/// Builds the programs and shows them at work, once through TC and once through XDP.
pub fn run(workspace: &Workspace) -> Result<()> {
    ensure_root("the demo makes network namespaces and loads eBPF programs", "demo")?;
    let [forwarderd, forwarderctl] = build::programs(workspace);
    // SAFETY: nothing has started a thread so far, so nobody reads the environment meanwhile.
    unsafe {
        env::set_var("FORWARDERD", forwarderd);
        env::set_var("FORWARDERCTL", forwarderctl);
    }
    build::release(workspace)?;
    let begun = Instant::now();
    print!("{NETWORK}");
    let mut carried = Vec::new();
    for datapath in [Datapath::Tc, Datapath::NativeXdp] {
        carried.push(show(datapath)?);
    }
    println!();
    process::announce("all of it worked, and nothing is left behind");
    for line in carried {
        println!("    {line}");
    }
    println!("    The whole demo took {:.1} s.", begun.elapsed().as_secs_f32());
    Ok(())
}

/// The main job through one data path; returns what carried it.
fn show(datapath: Datapath) -> Result<String> {
    let argument = datapath.argument();
    println!();
    process::announce(&format!("forwarderd --external wan --internal lan --datapath {argument}"));
    let bed = Testbed::builder()
        .external("wan", &format!("{ROUTER}/24"), &[CLIENT])
        .internal("lan", "192.168.2.1/24", &SERVERS.map(|(address, _)| address))
        .datapath(datapath)
        .start()?;
    main_job(&bed, datapath).map_err(|error| {
        eprintln!("\n{}", bed.daemon.diagnosis());
        error.context(format!("the demo failed with --datapath {argument}"))
    })
}

fn main_job(bed: &Testbed, datapath: Datapath) -> Result<String> {
    let _servers = SERVERS.map(|(address, _)| serve(bed, address)).into_iter().collect::<Result<Vec<_>>>()?;
    web(bed)?;
    udp(bed)?;
    lifetime(bed)?;
    explain("what there is now");
    ctl(bed, &["list"])?;
    counted(bed)?;
    ctl(bed, &["status"])?;
    attached(bed, datapath)?;
    carried(bed, datapath)
}

fn serve(bed: &Testbed, address: &str) -> Result<TcpServer> {
    let pages = HashMap::from([("/".to_owned(), greeting(address).into_bytes())]);
    TcpServer::http(bed.at(address), &format!("{address}:80"), pages)
}

fn greeting(address: &str) -> String {
    format!("Hello from the web server {address}.\n")
}

/// A public port for each web server.
fn web(bed: &Testbed) -> Result<()> {
    explain("a public port for each web server");
    for (address, port) in SERVERS {
        ctl(bed, &["add", "tcp", &format!("wan:{port}"), &format!("{address}:80")])?;
    }
    for (address, port) in SERVERS {
        curl(bed, port, address)?;
    }
    Ok(())
}

/// A UDP mapping with real datagrams, the answers included.
fn udp(bed: &Testbed) -> Result<()> {
    explain("a UDP port, whose server answers every datagram");
    let (address, _) = SERVERS[0];
    let target = format!("{address}:53");
    let _server = UdpServer::echo(bed.at(address), &target, "answer to")?;
    ctl(bed, &["add", "udp", &format!("wan:{UDP_PORT}"), &target])?;
    let socket = udp_socket(&bed.client, &format!("{CLIENT}:0"))?;
    let public = format!("{ROUTER}:{UDP_PORT}");
    for number in 1..=3 {
        let question = format!("datagram {number}");
        let expected = format!("answer to {question}");
        println!("  client> {question} to {public}/udp");
        let answer =
            udp_ask(&socket, &public, &question).with_context(|| format!("expected {expected:?}"))?;
        println!("    {answer}");
        ensure!(answer == expected, "expected {expected:?}, got {answer:?}");
    }
    Ok(())
}

/// A mapping that ends by itself, on time, while the others go on.
fn lifetime(bed: &Testbed) -> Result<()> {
    explain("a mapping that ends by itself");
    let (server, port) = SERVERS[0];
    let (external, target) = (format!("wan:{BRIEF_PORT}"), format!("{server}:80"));
    let lifetime = format!("{}s", LIFETIME.as_secs());
    let begun = Instant::now();
    ctl(bed, &["add", "tcp", &external, &target, "--lifetime", &lifetime])?;
    // It was added at some moment in between.
    let latest = begun.elapsed() + LIFETIME + SLACK;
    curl(bed, BRIEF_PORT, server)?;
    println!("    … and once more when its {lifetime} are over:");
    // It has to work until shortly before its end.
    thread::sleep((LIFETIME - SLACK / 2).saturating_sub(begun.elapsed()));
    let (lasted, refusal) = loop {
        let asked = begun.elapsed();
        let answer = fetch(bed, BRIEF_PORT)?;
        if !answer.status.success() {
            break (begun.elapsed(), complaint(&answer));
        }
        ensure!(
            asked < latest,
            "expected the mapping to end after {lifetime}, but after {asked:.1?} it works"
        );
        thread::sleep(Duration::from_millis(50));
    };
    show_curl(BRIEF_PORT);
    println!("    {refusal}");
    println!("    (it worked for {lasted:.1?})");
    ensure!(lasted >= LIFETIME, "expected the mapping to work for {lifetime}, but it did for {lasted:.1?}");
    explain("the others go on");
    curl(bed, port, server)
}

/// Whether every mapping that should still be there has carried something, both ways.
fn counted(bed: &Testbed) -> Result<()> {
    let list = bed.ctl_json(&["list"])?;
    let rules = list.as_array().map(Vec::as_slice).unwrap_or_default();
    let expected = SERVERS.len() + 1;
    ensure!(rules.len() == expected, "expected {expected} mappings, got {}", rules.len());
    for rule in rules {
        let [packets_in, packets_out] =
            ["packets_in", "packets_out"].map(|name| rule["counters"][name].as_u64().unwrap_or_default());
        ensure!(
            packets_in > 0 && packets_out > 0,
            "expected {} to count packets, got {packets_in} in and {packets_out} out",
            rule["external"]
        );
    }
    Ok(())
}

/// Whether the interfaces have the XDP that was asked for, or none.
fn attached(bed: &Testbed, datapath: Datapath) -> Result<()> {
    let status = bed.ctl_json(&["status"])?;
    for interface in status["interfaces"].as_array().context("status lists no interfaces")? {
        let (name, xdp) = (&interface["name"], &interface["xdp"]);
        ensure!(xdp == datapath.shown(), "expected {:?} on {name}, got {xdp}", datapath.shown());
    }
    Ok(())
}

/// Which of the two ways the packets took, by the counters.
fn carried(bed: &Testbed, datapath: Datapath) -> Result<String> {
    // By rule they are in the list already.
    println!("  router$ forwarderctl stats | sed -n '/^PATH/,$p'");
    bed.ctl(&["stats"])?.lines().skip_while(|line| !line.starts_with("PATH")).for_each(show_line);
    let stats = bed.stats()?;
    let [xdp, tc] = ["xdp", "tc-ingress"].map(|path| stats.verdict(path, "forward"));
    let carried = format!("{xdp} packets forwarded by XDP, {tc} by TC");
    // While a neighbour is unknown, XDP leaves packets to TC.
    let right = match datapath {
        Datapath::Tc => xdp == 0 && tc > 0,
        Datapath::NativeXdp | Datapath::GenericXdp => xdp > tc,
    };
    ensure!(right, "expected {} to carry the traffic, got {carried}", datapath.path());
    Ok(format!("--datapath {}: {carried}", datapath.argument()))
}

/// Shows and runs a `forwarderctl` command on the router.
fn ctl(bed: &Testbed, arguments: &[&str]) -> Result<()> {
    println!("  router$ forwarderctl {}", arguments.join(" "));
    bed.ctl(arguments)?.lines().for_each(show_line);
    Ok(())
}

fn show_line(line: &str) {
    println!("{}", format!("    {line}").trim_end());
}

/// Shows and runs `curl` on the client; the answer must be this server's page.
fn curl(bed: &Testbed, port: u16, server: &str) -> Result<()> {
    show_curl(port);
    let answer = fetch(bed, port)?;
    let page = String::from_utf8_lossy(&answer.stdout);
    print!("    {page}");
    let expected = greeting(server);
    ensure!(
        answer.status.success(),
        "expected {expected:?} from {ROUTER}:{port}, but curl failed ({}): {}",
        answer.status,
        complaint(&answer)
    );
    ensure!(page == expected, "expected {expected:?} from {ROUTER}:{port}, got {page:?}");
    Ok(())
}

fn show_curl(port: u16) {
    println!("  client$ curl http://{ROUTER}:{port}/");
}

fn fetch(bed: &Testbed, port: u16) -> Result<Output> {
    let mut curl = bed.client.command("curl");
    // The machine's proxies and the user's .curlrc are none of this network's.
    curl.args(["--disable", "--noproxy", "*", "--silent", "--show-error", "--max-time", "2"]);
    curl.arg(format!("http://{ROUTER}:{port}/")).output().context("cannot run curl")
}

fn complaint(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).trim().to_owned()
}

fn explain(what: &str) {
    println!("\n  # {what}");
}
