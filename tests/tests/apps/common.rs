//! What these tests share: a bed whose other rules change all the time.

use std::fs;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};
use std::{env, thread};

use testbed::{Datapath, Host, Process, Testbed};

/// The router's external address.
pub const W: &str = "203.0.113.1";

/// How long an application may take for the whole of its test.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// Makes a test in TC and one in native XDP, on beds of their own, with these rules for the application
/// and others that are added and deleted beside it.
macro_rules! beside_changes {
    ($(#[$doc:meta])* fn $name:ident($bed:ident, $rules:expr) $body:block) => {
        $(#[$doc])*
        mod $name {
            use super::*;

            fn check($bed: &testbed::Testbed) $body

            #[test]
            fn tc() {
                $crate::common::run(testbed::Datapath::Tc, &$rules, check);
            }

            #[test]
            fn xdp() {
                $crate::common::run(testbed::Datapath::NativeXdp, &$rules, check);
            }
        }
    };
}

/// Runs `check` on a bed with these rules, while others come and go.
pub fn run(datapath: Datapath, rules: &[&str], check: fn(&Testbed)) {
    let bed = Testbed::builder().datapath(datapath).start().unwrap();
    for rule in rules {
        let arguments: Vec<&str> = ["add"].into_iter().chain(rule.split(' ')).collect();
        bed.ctl(&arguments).unwrap();
    }
    let (done, changes) = (AtomicBool::new(false), AtomicU32::new(0));
    thread::scope(|scope| {
        let changing = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                change_others(&bed);
                changes.fetch_add(1, Ordering::Relaxed);
            }
        });
        // So that a panic of the application ends the changes as well.
        let _ended = SetOnDrop(&done);
        check(&bed);
        // A short test is not over before there was a change beside it.
        let seen = changes.load(Ordering::Relaxed);
        testbed::wait_until("rules change beside the application", testbed::DEADLINE, || {
            changing.is_finished() || changes.load(Ordering::Relaxed) > seen
        })
        .unwrap();
    });
    assert_carried(&bed, datapath);
}

struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Neighbours of the application's own rules: the same target, and ports in the same pages of the maps.
fn change_others(bed: &Testbed) {
    const OTHERS: [[&str; 3]; 3] = [
        ["tcp+udp", "203.0.113.1:8079", "10.0.0.10:80"],
        ["udp", "203.0.113.1:19000-19999", "10.0.0.10:19000-19999"],
        ["tcp", "wan:2200-2221", "10.0.0.10:22"],
    ];
    for [protocol, external, target] in OTHERS {
        bed.ctl(&["add", protocol, external, target, "--allow", "198.51.100.0/24"]).unwrap();
    }
    for [protocol, external, _] in OTHERS {
        bed.ctl(&["del", &format!("{protocol} {external}")]).unwrap();
    }
}

/// The application's packets went by the path that was asked for.
fn assert_carried(bed: &Testbed, datapath: Datapath) {
    let stats = bed.stats().unwrap();
    let [xdp, tc] = ["xdp", "tc-ingress"].map(|path| stats.verdict(path, "forward"));
    match datapath {
        Datapath::Tc => assert!(xdp == 0 && tc > 0, "{stats}"),
        Datapath::NativeXdp | Datapath::GenericXdp => assert!(xdp > tc, "{stats}"),
    }
}

/// The application of this name, or a panic that says what to install.
pub fn command(host: &Host, program: &str, package: &str) -> Command {
    // Servers lie where an ordinary user's path does not lead.
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(Into::into))
        .map(|directory| directory.join(program))
        .find(|path| path.is_file());
    let program =
        found.unwrap_or_else(|| panic!("no {program} here: run `cargo xtask test`, or install {package}"));
    let mut command = host.command(program);
    // The mount namespace of a host has a `/run` of its own: nothing stays.
    command.current_dir("/");
    command
}

/// Runs a command to its end; it must succeed, and what it printed on stdout is returned.
pub fn output(mut command: Command) -> Vec<u8> {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}: {}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr),
        String::from_utf8_lossy(&output.stdout)
    );
    output.stdout
}

/// Waits for a process that has to succeed, and returns what it wrote.
pub fn finish(mut process: Process) -> String {
    let status = process.wait(PATIENCE).unwrap();
    let said = process.finish();
    assert!(status.success(), "{status}: {said}");
    said
}

/// Starts a server and waits until it listens at this port of the host.
pub fn serve(host: &Host, protocol: &str, port: u16, command: Command) -> Process {
    let mut process = host.start(command).unwrap();
    let begun = Instant::now();
    while !listens(host, protocol, port) {
        assert!(process.ended().unwrap().is_none(), "the server has ended: {}", process.finish());
        assert!(begun.elapsed() < PATIENCE, "the server does not listen: {}", process.finish());
        thread::sleep(Duration::from_millis(10));
    }
    process
}

/// Whether something on the host listens there, by the kernel's table of sockets.
fn listens(host: &Host, protocol: &str, port: u16) -> bool {
    let local = format!(":{port:04X} ");
    // Of TCP only listening sockets have no peer; those of UDP have none either.
    ["", "6"].iter().any(|family| {
        host.run(|| fs::read_to_string(format!("/proc/thread-self/net/{protocol}{family}")))
            .unwrap()
            .lines()
            .any(|line| line.split_once(&local).is_some_and(|(_, rest)| rest.contains(":0000 ")))
    })
}

/// Writes a file that only this host sees.
pub fn write(host: &Host, path: &str, content: impl AsRef<[u8]>) {
    let content = content.as_ref();
    host.run(|| fs::write(path, content)).unwrap();
}
