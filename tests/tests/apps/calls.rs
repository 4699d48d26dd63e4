//! A telephone call: SIP on one port, RTP on a mapped range.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use testbed::{Host, Packet, RawSocket, Testbed, bytes};

use crate::common::{self, W, command};

/// Packets of the caller's voice, one each 20 ms.
const PACKETS: usize = 150;

/// G.711 has a byte for each of 8000 samples a second.
const SAMPLES: usize = 160;

/// Calls, plays its voice, and hangs up.
const CALLING: &str = include_str!("calling.xml");

/// Answers calls. It gives the router's public address and a port of the mapped range for the voice:
/// its private address would be no use, and nobody on the way puts it right.
const ANSWERING: &str = include_str!("answering.xml");

/// The port that [`ANSWERING`] gives for the voice.
const VOICE_PORT: u16 = 10_040;

fn sipp(host: &Host, scenario: &str, address: &str) -> Command {
    common::write(host, "/run/scenario.xml", scenario);
    let mut sipp = command(host, "sipp", "sip-tester");
    sipp.args(["-sf", "/run/scenario.xml", "-i", address, "-p", "5060", "-nostdin"]);
    sipp.args(["-m", "1", "-timeout", "60", "-timeout_error"]);
    sipp
}

/// The voice that comes back to the caller: its packets by their RTP numbers.
fn voice(wire: &RawSocket, done: &AtomicBool) -> BTreeMap<u16, Vec<u8>> {
    let mut heard = BTreeMap::new();
    while !done.load(Ordering::Relaxed) {
        let is_voice = |packet: &Packet| packet.source.port() == VOICE_PORT;
        let Ok(packet) = wire.receive(Duration::from_millis(200), is_voice) else { continue };
        assert_eq!(packet.source.ip().to_string(), W);
        let (header, samples) = packet.payload.split_at(12);
        heard.insert(u16::from_be_bytes([header[2], header[3]]), samples.to_vec());
    }
    heard
}

fn call(bed: &Testbed) {
    common::write(&bed.client, "/run/voice.raw", bytes(PACKETS * SAMPLES));
    let mut caller = sipp(&bed.client, CALLING, "203.0.113.2");
    caller.args(["-mi", "203.0.113.2", &format!("{W}:5060")]);
    common::finish(bed.client.start(caller).unwrap());
}

beside_changes! {
    /// The call is set up, all of the voice comes back by the range, and both ends hang up in order.
    fn a_call_keeps_its_voice(bed, [
        "udp 203.0.113.1:5060 10.0.0.10:5060",
        "udp 203.0.113.1:10000-10100 10.0.0.10:10000-10100",
    ]) {
        let mut answering = sipp(bed.server(), ANSWERING, "10.0.0.10");
        answering.args(["-rtp_echo", "-mi", "10.0.0.10", "-mp", &VOICE_PORT.to_string()]);
        let answering = common::serve(bed.server(), "udp", 5060, answering);
        let wire = bed.wire("203.0.113.2").unwrap();
        let done = AtomicBool::new(false);
        let heard = thread::scope(|scope| {
            let listening = scope.spawn(|| voice(&wire, &done));
            call(bed);
            done.store(true, Ordering::Relaxed);
            listening.join().unwrap()
        });
        common::finish(answering);
        assert_eq!(heard.len(), PACKETS, "{:?}", heard.keys());
        // It begins with 0, and so the order of the numbers is that of the voice.
        assert!(heard.into_values().flatten().eq(bytes(PACKETS * SAMPLES)), "another voice");
    }
}
