//! `cargo xtask demo`: the main job, before one's eyes.
//!
//! The network is the test bed's: namespaces that no name leads to and that go with this process,
//! however it ends, and so do the programs in them.

use std::{
    collections::HashMap,
    env,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use testbed::{Datapath, TcpServer, Testbed, UdpServer, udp_ask, udp_socket};

use crate::{
    build, process,
    workspace::{Workspace, is_root},
};

/// The router's address on the internet, where the mappings are.
const ROUTER: &str = "203.0.113.1";
const CLIENT: &str = "203.0.113.2";

/// The web servers behind the router, and the public port of each.
const SERVERS: [(&str, u16); 3] = [("192.168.2.101", 8080), ("192.168.2.102", 8090), ("192.168.2.103", 8091)];

const UDP_PORT: u16 = 5300;
const BRIEF_PORT: u16 = 8099;
const LIFETIME: Duration = Duration::from_secs(3);

/// Builds the programs and shows them at work, once through TC and once through XDP.
pub fn run(workspace: &Workspace) -> Result<()> {
    ensure!(is_root(), "the demo makes network namespaces and loads eBPF programs: run it as root");
    let [forwarderd, forwarderctl] = build::programs(workspace);
    // SAFETY: nothing has started a thread so far, so nobody reads the environment meanwhile.
    unsafe {
        env::set_var("FORWARDERD", forwarderd);
        env::set_var("FORWARDERCTL", forwarderctl);
    }
    build::release(workspace)?;
    for datapath in [Datapath::Tc, Datapath::NativeXdp] {
        show(datapath)?;
    }
    println!("\nAll of it worked, and nothing is left behind.");
    Ok(())
}

fn show(datapath: Datapath) -> Result<()> {
    println!();
    process::announce(&format!(
        "forwarderd --external wan --internal lan --datapath {}",
        datapath.argument()
    ));
    println!("    client {CLIENT} ── wan {ROUTER} [router] 192.168.2.1 lan ── switch ┬ 192.168.2.101");
    println!("                                                                      ├ 192.168.2.102");
    println!("                                                                      └ 192.168.2.103");
    let bed = Testbed::builder()
        .external("wan", &format!("{ROUTER}/24"), &[CLIENT])
        .internal("lan", "192.168.2.1/24", &SERVERS.map(|(address, _)| address))
        .datapath(datapath)
        .start()?;
    main_job(&bed, datapath).map_err(|error| {
        println!("\n{}", bed.daemon.diagnosis());
        error.context(format!("the demo failed with --datapath {}", datapath.argument()))
    })
}

fn main_job(bed: &Testbed, datapath: Datapath) -> Result<()> {
    let _servers = SERVERS.map(|(address, _)| serve(bed, address)).into_iter().collect::<Result<Vec<_>>>()?;
    for (address, port) in SERVERS {
        ctl(bed, &["add", "tcp", &format!("wan:{port}"), &format!("{address}:80")])?;
    }
    for (address, port) in SERVERS {
        let page = curl(bed, port)?;
        print!("    {page}");
        ensure!(page == greeting(address), "expected {:?}, got {page:?}", greeting(address));
    }
    udp(bed)?;
    lifetime(bed)?;
    ctl(bed, &["list"])?;
    ctl(bed, &["status"])?;
    carried(bed, datapath)
}

fn serve(bed: &Testbed, address: &str) -> Result<TcpServer> {
    let pages = HashMap::from([("/".to_owned(), greeting(address).into_bytes())]);
    TcpServer::http(bed.at(address), &format!("{address}:80"), pages)
}

fn greeting(address: &str) -> String {
    format!("Hello from the web server {address}.\n")
}

/// A UDP mapping with real datagrams, the answers included.
fn udp(bed: &Testbed) -> Result<()> {
    let (address, _) = SERVERS[0];
    let target = format!("{address}:53");
    let _server = UdpServer::echo(bed.at(address), &target, "answer to")?;
    ctl(bed, &["add", "udp", &format!("wan:{UDP_PORT}"), &target])?;
    let socket = udp_socket(&bed.client, &format!("{CLIENT}:0"))?;
    for number in 1..=3 {
        let question = format!("datagram {number}");
        prompt("client", &format!("send {question:?} to {ROUTER}:{UDP_PORT}/udp"));
        let answer = udp_ask(&socket, &format!("{ROUTER}:{UDP_PORT}"), &question)?;
        println!("    {answer}");
        ensure!(
            answer == format!("answer to {question}"),
            "expected an answer to {question:?}, got {answer:?}"
        );
    }
    Ok(())
}

/// A mapping that ends by itself, on time, while the others go on.
fn lifetime(bed: &Testbed) -> Result<()> {
    let (address, port) = SERVERS[0];
    let lifetime = format!("{}s", LIFETIME.as_secs());
    let begun = Instant::now();
    ctl(
        bed,
        &["add", "tcp", &format!("wan:{BRIEF_PORT}"), &format!("{address}:80"), "--lifetime", &lifetime],
    )?;
    print!("    {}", curl(bed, BRIEF_PORT).context("the mapping with a lifetime does not work at all")?);
    println!("    … until its {lifetime} are over:");
    let limit = LIFETIME + Duration::from_secs(3);
    while fetch(bed, BRIEF_PORT).is_ok() {
        ensure!(begun.elapsed() < limit, "expected the mapping to end after {lifetime}, but it still works");
        std::thread::sleep(Duration::from_millis(100));
    }
    let lasted = begun.elapsed();
    ensure!(
        lasted + Duration::from_millis(500) >= LIFETIME,
        "expected the mapping to last {lifetime}, but it ended after {lasted:.1?}"
    );
    println!("    {ROUTER}:{BRIEF_PORT} answered for {lasted:.1?}, and no longer");
    print!("    {}", curl(bed, port).context("the other mappings should have gone on")?);
    Ok(())
}

/// Which of the two ways the packets took, by the counters.
fn carried(bed: &Testbed, datapath: Datapath) -> Result<()> {
    let stats = bed.stats()?;
    let [xdp, tc] = ["xdp", "tc-ingress"].map(|path| stats.verdict(path, "forward"));
    println!("    packets forwarded by XDP: {xdp}, by TC: {tc}");
    match datapath {
        Datapath::Tc if tc > 0 && xdp == 0 => Ok(()),
        Datapath::NativeXdp | Datapath::GenericXdp if xdp > tc => Ok(()),
        _ => bail!("expected {} to carry the traffic; it was XDP {xdp}, TC {tc}", datapath.path()),
    }
}

/// Shows and runs a `forwarderctl` command on the router.
fn ctl(bed: &Testbed, arguments: &[&str]) -> Result<()> {
    prompt("router", &format!("forwarderctl {}", arguments.join(" ")));
    for line in bed.ctl(arguments)?.lines() {
        println!("    {line}");
    }
    Ok(())
}

/// Shows and runs `curl` on the client, and returns the page.
fn curl(bed: &Testbed, port: u16) -> Result<String> {
    prompt("client", &format!("curl http://{ROUTER}:{port}/"));
    fetch(bed, port)
}

fn fetch(bed: &Testbed, port: u16) -> Result<String> {
    let url = format!("http://{ROUTER}:{port}/");
    bed.client.output("curl", &["--silent", "--show-error", "--noproxy", "*", "--max-time", "2", &url])
}

fn prompt(host: &str, command: &str) {
    println!("  {host}$ {command}");
}
