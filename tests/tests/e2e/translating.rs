//! What happens to a packet that is forwarded, and which are not.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::time::Instant;

use testbed::{
    DEADLINE, Datapath, Extension, Family, Frame, Packet, TcpFields, TcpServer, Testbed, UdpServer, bytes,
    connect, connect_from, download, udp_ask, udp_socket, wait_until,
};

use crate::common::*;

const SYN: u8 = TcpFields::SYN;
const ACK: u8 = TcpFields::ACK;

/// Asserts all that must not change, and what must.
fn assert_translated(bed: &Testbed, sent: &Frame, seen: &Packet, source: &str, destination: &str) {
    assert_eq!((seen.source, seen.destination), (bed.endpoint(source), bed.endpoint(destination)));
    assert_eq!(seen.ttl, sent.ttl - 1);
    assert_eq!((seen.dscp, seen.ecn, seen.id), (sent.dscp, sent.ecn, sent.id));
    assert_eq!((&seen.between, seen.tcp, &seen.payload), (&sent.between(), sent.tcp, &sent.payload));
    assert!(
        seen.checksums_right(),
        "{seen}: checksum {:#06x}, not {:#06x}",
        seen.checksum,
        seen.right_checksum
    );
}

fn marked(frame: Frame, number: u16) -> Frame {
    Frame { ttl: 9, dscp: 46, ecn: 1, id: 7000 + number, ..frame }
}

for_each_family! {
    /// Rows 1 and 9.
    fn packets_change_in_addresses_and_ttl_and_nothing_else(bed = Testbed::builder()) {
        add(bed, "tcp+udp 203.0.113.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        let (wan, lan) = (bed.router.mac("wan").unwrap(), bed.router.mac("lan").unwrap());
        for (number, length) in (0..).zip([0, 1, 2, 3, 31, 1000, 1452]) {
            let payload = bytes(length);
            let question = marked(bed.udp(STRANGER, W8080, &payload), number);
            let seen = ends.inward(&question);
            assert_translated(bed, &question, &seen, STRANGER, TARGET);
            assert_eq!((seen.source_mac, seen.destination_mac), (lan, bed.server().mac("eth0").unwrap()));

            let answer = marked(bed.udp(TARGET, STRANGER, &payload), number);
            let seen = ends.outward(&answer);
            assert_translated(bed, &answer, &seen, W8080, STRANGER);
            assert_eq!((seen.source_mac, seen.destination_mac), (wan, bed.client.mac("eth0").unwrap()));
        }

        let segment = |from, to, flags, sequence, acknowledgment, payload: &[u8]| {
            marked(bed.tcp(from, to, TcpFields::new(flags, sequence, acknowledgment), payload), 1)
        };
        let long = bytes(1440);
        for (inward, frame) in [
            (true, segment(STRANGER, W8080, SYN, 100, 0, b"")),
            (false, segment(TARGET, STRANGER, SYN | ACK, 500, 101, b"")),
            (true, segment(STRANGER, W8080, ACK, 101, 501, b"")),
            (true, segment(STRANGER, W8080, ACK | TcpFields::PSH, 101, 501, b"odd")),
            (false, segment(TARGET, STRANGER, ACK, 501, 104, &long)),
            (true, segment(STRANGER, W8080, ACK, 104, 1941, &long)),
        ] {
            if inward {
                assert_translated(bed, &frame, &ends.inward(&frame), STRANGER, TARGET);
            } else {
                assert_translated(bed, &frame, &ends.outward(&frame), W8080, STRANGER);
            }
        }
        assert_carried(bed);
    }
}

for_each_datapath! {
    /// Row 3.
    fn ip_options_move_the_ports(bed = Testbed::builder()) {
        add(bed, "tcp+udp 203.0.113.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        for words in [1, 2, 10] {
            // No-operations, then the end of the list.
            let mut options = vec![1; words * 4];
            *options.last_mut().unwrap() = 0;
            let question = Frame { options, ..marked(bed.udp(STRANGER, W8080, b"question"), 1) };
            assert_translated(bed, &question, &ends.inward(&question), STRANGER, TARGET);
            let syn = Frame { tcp: Some(TcpFields::new(SYN, 1, 0)), ..question };
            assert_translated(bed, &syn, &ends.inward(&syn), STRANGER, TARGET);
        }
    }
}

for_each_datapath! {
    /// Row 3.
    fn extension_headers_move_the_ports(bed = Testbed::builder().family(Family::Ipv6)) {
        add(bed, "tcp+udp 203.0.113.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        let chains = [
            vec![Extension::hop_by_hop(8)],
            vec![Extension::destination_options(16)],
            vec![Extension::routing(0)],
            vec![Extension::hop_by_hop(8), Extension::routing(0), Extension::destination_options(8)],
            // A whole packet in one fragment (RFC 6946).
            vec![Extension::destination_options(8), Extension::fragment(77, 0, false)],
        ];
        for extensions in chains {
            let question = Frame { extensions, ..marked(bed.udp(STRANGER, W8080, b"question"), 1) };
            assert_translated(bed, &question, &ends.inward(&question), STRANGER, TARGET);
            let syn = Frame { tcp: Some(TcpFields::new(SYN, 1, 0)), ..question };
            assert_translated(bed, &syn, &ends.inward(&syn), STRANGER, TARGET);
        }
    }
}

for_each_datapath! {
    /// Row 3: what is longer than the packet path looks through, and what is to go by way of somebody else,
    /// is the host's, which has no service there.
    fn extension_headers_that_cannot_be_followed_are_left_to_the_host(
        bed = Testbed::builder().family(Family::Ipv6)
    ) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        let frame = bed.udp(STRANGER, W8080, b"by detours");
        let chains = [vec![Extension::destination_options(8); 20], vec![Extension::routing(1)]];
        ends.assert_none_arrives(
            &chains.map(|extensions| ends.client.bytes(&Frame { extensions, ..frame.clone() })),
        );
        let stats = bed.stats().unwrap();
        assert!(stats.reason("extension-headers") >= 2 && stats.dropped() == 0, "{stats}");
    }
}

for_each_family! {
    /// Row 5.
    fn a_ttl_of_two_arrives_as_one_and_one_goes_no_further(bed = Testbed::builder()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        let last_hop = Frame { ttl: 2, ..bed.udp(STRANGER, W8080, b"two") };
        assert_translated(bed, &last_hop, &ends.inward(&last_hop), STRANGER, TARGET);
        let ended = [0, 1].map(|ttl| ends.client.bytes(&Frame { ttl, ..bed.udp(STRANGER, W8080, b"ended") }));
        ends.assert_none_arrives(&ended);
    }
}

for_each_family! {
    /// Row 1: the counters say what went, in bytes of IP packets.
    fn counters_are_exact(bed = Testbed::builder()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        let headers = if bed.family == Family::Ipv4 { 28 } else { 48 };
        for _ in 0..5 {
            ends.inward(&Frame { trailer: vec![7; 9], ..bed.udp(STRANGER, W8080, &[1; 100]) });
        }
        for _ in 0..3 {
            ends.outward(&bed.udp(TARGET, STRANGER, &[2; 200]));
        }
        let counters = &only_rule(bed)["counters"];
        assert_eq!(counters["sessions_active"], 0, "half-open flows are no sessions: {counters}");
        ends.inward(&bed.udp(STRANGER, W8080, b"established"));
        // Sessions are counted now and then, packets at once.
        wait_until("the session is counted", DEADLINE, || only_rule(bed)["counters"]["sessions_active"] == 1).unwrap();
        let counters = &only_rule(bed)["counters"];
        assert_eq!(counters["packets_in"], 6, "{counters}");
        assert_eq!(counters["bytes_in"], 5 * (headers + 100) + headers + 11, "{counters}");
        assert_eq!(counters["packets_out"], 3, "{counters}");
        assert_eq!(counters["bytes_out"], 3 * (headers + 200), "{counters}");
        assert_eq!(counters["sessions_total"], 1, "{counters}");
    }
}

for_each_datapath! {
    /// Row 2, which is about IPv4 alone.
    fn a_udp_checksum_of_zero_stays(bed = Testbed::builder()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        let none = Frame { checksum: Some(0), ..bed.udp(STRANGER, W8080, b"no checksum") };
        assert_eq!(ends.inward(&none).checksum, 0);
        let none = Frame { checksum: Some(0), ..bed.udp(TARGET, STRANGER, b"no checksum") };
        assert_eq!(ends.outward(&none).checksum, 0);
    }
}

for_each_family! {
    /// Row 2.
    fn a_udp_checksum_that_is_computed_as_zero_is_ffff(bed = Testbed::builder()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        ends.inward(&bed.udp(STRANGER, W8080, b"a flow"));
        // The two bytes are what the sum of all the rest of the translated packet lacks.
        let lacking = |from: &str, to: &str| {
            let frame = bed.udp(from, to, &[0, 0]).bytes([0; 6], [0; 6]);
            Packet::parse(&frame).unwrap().right_checksum.to_be_bytes()
        };
        let question = bed.udp(STRANGER, W8080, &lacking(STRANGER, TARGET));
        assert_eq!(ends.inward(&question).checksum, 0xffff);
        let answer = bed.udp(TARGET, STRANGER, &lacking(W8080, STRANGER));
        assert_eq!(ends.outward(&answer).checksum, 0xffff);
        // And one that came as 0xffff becomes what it should be.
        let question = bed.udp(STRANGER, W8080, &lacking(STRANGER, W8080));
        assert!(ends.inward(&question).checksums_right());
    }
}

for_each_family! {
    /// Row 4.
    fn bytes_behind_the_packet_are_not_trusted(bed = Testbed::builder()) {
        add(bed, "tcp+udp 203.0.113.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        for trailer in [vec![0; 18], vec![0xff; 17], b"\x12\x34\x56".to_vec()] {
            let question = Frame { trailer: trailer.clone(), ..bed.udp(STRANGER, W8080, b"x") };
            assert_translated(bed, &question, &ends.inward(&question), STRANGER, TARGET);
            let syn = Frame { trailer, ..bed.tcp(STRANGER, W8080, TcpFields::new(SYN, 1, 0), b"") };
            assert_translated(bed, &syn, &ends.inward(&syn), STRANGER, TARGET);
        }
    }
}

fn real_stacks_talk(bed: &Testbed) {
    add(bed, "tcp+udp 203.0.113.1:8080 10.0.0.10:80");
    let tcp = TcpServer::echo(bed.server(), &bed.ip(TARGET)).unwrap();
    let udp = UdpServer::echo(bed.server(), &bed.ip(TARGET), "server").unwrap();

    let mut stream =
        connect_from(&bed.client, &bed.ip("203.0.113.2:5000"), &bed.ip(W8080), DEADLINE).unwrap();
    let sent = bytes(3_000_001);
    let mut received = vec![0; sent.len()];
    std::thread::scope(|scope| {
        let mut writer = stream.try_clone().unwrap();
        let sent = &sent;
        scope.spawn(move || writer.write_all(sent).unwrap());
        stream.read_exact(&mut received).unwrap();
    });
    assert!(sent == received, "the echo differs");
    assert_eq!(tcp.peers(), [bed.endpoint("203.0.113.2:5000")], "the server sees the client's own address");

    let socket = udp_socket(&bed.client, &bed.ip("203.0.113.2:5001")).unwrap();
    for length in [0, 1, 100, 1400] {
        let question = "x".repeat(length);
        assert_eq!(udp_ask(&socket, &bed.ip(W8080), &question).unwrap(), format!("server {question}"));
    }
    assert!(udp.peers().iter().all(|peer| *peer == bed.endpoint("203.0.113.2:5001")));
}

for_each_family! {
    /// Rows 1 and 9.
    fn real_stacks_talk_with_whole_checksums(bed = Testbed::builder()) {
        real_stacks_talk(bed);
        assert_carried(bed);
    }
}

for_each_family! {
    /// Rows 1 and 9.
    fn real_stacks_talk_with_checksum_offload(bed = Testbed::builder().checksum_offload(true)) {
        real_stacks_talk(bed);
    }
}

/// Row 9. Native XDP is refused here, which living.rs sees to.
#[test]
fn frames_of_9000_bytes_are_carried_whole() {
    let families = [Family::Ipv4, Family::Ipv6];
    for (datapath, family) in
        families.into_iter().flat_map(|it| [(Datapath::Tc, it), (Datapath::GenericXdp, it)])
    {
        let builder = Testbed::builder().mtu(9000).checksum_offload(true);
        let bed = &builder.datapath(datapath).family(family).start().unwrap();
        real_stacks_talk(bed);
        let ends = Ends::new(bed);
        let longest = if family == Family::Ipv4 { 8972 } else { 8952 };
        let question = marked(bed.udp(STRANGER, W8080, &bytes(longest)), 1);
        assert_translated(bed, &question, &ends.inward(&question), STRANGER, TARGET);
        let answer = marked(bed.udp(TARGET, STRANGER, &bytes(longest)), 1);
        assert_translated(bed, &answer, &ends.outward(&answer), W8080, STRANGER);
    }
}

fn download_is_equal(bed: &Testbed) {
    add(bed, "tcp 203.0.113.1:8080 10.0.0.10:80");
    let body = bytes(100_000_000);
    let _server =
        TcpServer::http(bed.server(), &bed.ip(TARGET), HashMap::from([("/".to_owned(), body.clone())]))
            .unwrap();
    assert!(download(&bed.client, &bed.ip(W8080), "/").unwrap() == body, "the download differs");
    let counters = &only_rule(bed)["counters"];
    assert!(counters["bytes_out"].as_u64().unwrap() > 100_000_000, "{counters}");
}

for_each_family! {
    /// Row 9.
    fn a_download_of_100_mb_is_equal_with_whole_checksums(bed = Testbed::builder()) {
        download_is_equal(bed);
        assert_carried(bed);
    }
}

for_each_family! {
    /// Row 9.
    fn a_download_of_100_mb_is_equal_with_checksum_offload(bed = Testbed::builder().checksum_offload(true)) {
        download_is_equal(bed);
    }
}

for_each_family! {
    /// Row 10.
    fn a_priority_tag_does_not_hide_a_packet(bed = Testbed::builder()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let _server = UdpServer::echo(bed.server(), &bed.ip(TARGET), "server").unwrap();
        let client = bed.wire("203.0.113.2").unwrap();
        // Priority 5, VLAN 0.
        client.send(&Frame { vlan: Some(0xa000), ..bed.udp(STRANGER, W8080, b"tagged") }).unwrap();
        let answer = client.receive(DEADLINE, |packet| packet.payload == b"server tagged").unwrap();
        assert_eq!((answer.source, answer.destination), (bed.endpoint(W8080), bed.endpoint(STRANGER)));
    }
}

for_each_family! {
    /// Row 10.
    fn other_vlans_and_other_stations_frames_are_left_alone(bed = Testbed::builder()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        let frame = bed.udp(STRANGER, W8080, b"not for us");
        let to = |mac| Frame { destination_mac: Some(mac), ..frame.clone() };
        let frames = [
            Frame { vlan: Some(5), ..frame.clone() },
            Frame { vlan: Some(0xa005), ..frame.clone() },
            to([0xff; 6]),
            to([0x01, 0x00, 0x5e, 0, 0, 1]),
            to([0x02, 0x11, 0x22, 0x33, 0x44, 0x55]),
        ];
        ends.assert_none_arrives(&frames.map(|frame| ends.client.bytes(&frame)));
        let stats = bed.stats().unwrap();
        assert!(stats.reason("vlan") >= 2 && stats.reason("other-station") >= 3, "{stats}");
    }
}

for_each_family! {
    /// Row 10.
    fn impossible_sources_are_dropped(bed = Testbed::builder()) {
        add(bed, "tcp+udp 203.0.113.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        let of_family: &[&str] = match bed.family {
            Family::Ipv4 => &[
                "127.0.0.1:4000", "127.255.0.9:4000", "224.0.0.1:4000", "239.9.9.9:4000", "255.255.255.255:4000",
            ],
            Family::Ipv6 => &["[::1]:4000", "[ff02::1]:4000", "[ff0e::9]:4000", "[::ffff:192.0.2.7]:4000"],
        };
        let of_both = ["203.0.113.1:4000", "0.0.0.0:4000", "10.0.0.10:4000", "10.0.0.77:4000"];
        let sources = || of_family.iter().chain(&of_both);
        let frames: Vec<_> = sources()
            .flat_map(|source| {
                let syn = TcpFields::new(SYN, 1, 0);
                [bed.udp(source, W8080, b"spoofed"), bed.tcp(source, W8080, syn, b"")]
            })
            .map(|frame| ends.client.bytes(&frame))
            .collect();
        ends.assert_none_arrives(&frames);
        let stats = bed.stats().unwrap();
        assert_eq!(stats.reason("spoofed"), frames.len() as u64, "{stats}");
        let rule = only_rule(bed);
        assert_eq!(rule["counters"]["dropped"]["spoofed"], frames.len(), "{rule:#}");
        assert_eq!(flows(bed).len(), 1, "none of them has made a flow");
    }
}

for_each_datapath! {
    /// Row 10: nobody could answer beyond its link.
    fn link_local_sources_are_not_forwarded(bed = Testbed::builder().family(Family::Ipv6)) {
        add(bed, "tcp+udp 203.0.113.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        let syn = TcpFields::new(SYN, 1, 0);
        let frames = [
            bed.udp("[fe80::99]:4000", W8080, b"from the link"),
            bed.tcp("[fe80::99]:4000", W8080, syn, b""),
        ];
        ends.assert_none_arrives(&frames.map(|frame| ends.client.bytes(&frame)));
        assert_eq!(bed.stats().unwrap().reason("spoofed"), 2, "{}", bed.stats().unwrap());
        assert_eq!(flows(bed).len(), 1, "none of them has made a flow");
    }
}

for_each_family! {
    /// Row 10.
    fn a_wrong_checksum_stays_wrong(bed = Testbed::builder()) {
        add(bed, "tcp+udp 203.0.113.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        let good = bed.udp(STRANGER, W8080, b"damaged on its way");
        let right = ends.inward(&good).checksum;
        for damage in [1, 0x0100, 0x7fff] {
            let checksum = Packet::parse(&ends.client.bytes(&good)).unwrap().checksum;
            let bad = Frame { checksum: Some(checksum.wrapping_add(damage)), ..good.clone() };
            let seen = ends.inward(&bad);
            assert!(!seen.checksums_right() && seen.checksum != right, "{seen}");

            let syn = Frame { tcp: Some(TcpFields::new(SYN, 1, 0)), ..good.clone() };
            let checksum = Packet::parse(&ends.client.bytes(&syn)).unwrap().checksum;
            assert!(!ends.inward(&Frame { checksum: Some(checksum.wrapping_add(damage)), ..syn }).checksums_right());
        }
    }
}

/// Sets the bytes at an offset of a frame.
fn put<const N: usize>(mut frame: Vec<u8>, offset: usize, bytes: [u8; N]) -> Vec<u8> {
    frame[offset..offset + N].copy_from_slice(&bytes);
    frame
}

/// Makes the IP header's checksum fit again, so that nothing but the fault under test is wrong.
fn with_ip_checksum(mut frame: Vec<u8>) -> Vec<u8> {
    frame[24..26].fill(0);
    let mut sum: u32 = frame[14..34].chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    put(frame, 24, (!(sum as u16)).to_be_bytes())
}

/// Sends malformed frames, each with the reasons as one of which it is to be counted.
fn assert_counted_and_not_forwarded(bed: &Testbed, ends: &Ends, faults: &[(&[&str], Vec<u8>)], round: u32) {
    for (reasons, frame) in faults {
        let count = || {
            let stats = bed.stats().unwrap();
            reasons.iter().map(|reason| stats.reason(reason)).sum::<u64>()
        };
        let before = count();
        ends.assert_none_arrives(std::slice::from_ref(frame));
        assert!(count() > before, "round {round}: not counted as {reasons:?}: {frame:02x?}");
    }
}

for_each_datapath! {
    /// Row 11.
    fn malformed_packets_are_counted_and_never_forwarded(bed = Testbed::builder()) {
        const IP_LENGTH: usize = 16;
        const L4: usize = 34;
        add(bed, "tcp+udp 203.0.113.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        let syn = bed.tcp(STRANGER, W8080, TcpFields::new(SYN, 1, 0), b"");
        // Once before there are flows for them, and once after.
        for round in 0..2 {
            let udp = ends.client.bytes(&bed.udp(STRANGER, W8080, b"malformed"));
            let tcp = ends.client.bytes(&Frame { payload: b"malformed".to_vec(), ..syn.clone() });
            let faults: Vec<(&[&str], Vec<u8>)> = vec![
                (&["bad-ip-header"], with_ip_checksum(put(udp.clone(), 14, [0x44]))),
                (&["bad-ip-header"], with_ip_checksum(put(udp.clone(), 14, [0x40]))),
                (&["bad-ip-header"], with_ip_checksum(put(udp.clone(), 14, [0x65]))),
                (&["bad-ip-header", "bad-ip-length", "short-frame"], put(udp[..40].to_vec(), 14, [0x4f])),
                (&["bad-ip-length"], with_ip_checksum(put(udp.clone(), IP_LENGTH, 500_u16.to_be_bytes()))),
                (&["bad-ip-length"], with_ip_checksum(put(udp.clone(), IP_LENGTH, 19_u16.to_be_bytes()))),
                (&["bad-ip-length"], udp[..36].to_vec()),
                (&["bad-ip-checksum"], put(udp.clone(), 24, [0x55, 0x55])),
                (&["cut-off"], with_ip_checksum(put(udp.clone(), IP_LENGTH, 22_u16.to_be_bytes()))),
                (&["cut-off"], with_ip_checksum(put(tcp.clone(), IP_LENGTH, 20_u16.to_be_bytes()))),
                (&["bad-l4-length"], with_ip_checksum(put(udp.clone(), IP_LENGTH, 26_u16.to_be_bytes()))),
                (&["bad-l4-length"], with_ip_checksum(put(tcp.clone(), IP_LENGTH, 38_u16.to_be_bytes()))),
                (&["bad-l4-length"], put(udp.clone(), L4 + 4, 500_u16.to_be_bytes())),
                (&["bad-l4-length"], put(udp.clone(), L4 + 4, 7_u16.to_be_bytes())),
                (&["bad-l4-length"], put(tcp.clone(), L4 + 12, [0xf0])),
                (&["bad-l4-length"], put(tcp.clone(), L4 + 12, [0x40])),
                (&["short-frame"], udp[..14].to_vec()),
                (&["short-frame"], udp[..33].to_vec()),
            ];
            assert_counted_and_not_forwarded(bed, &ends, &faults, round);
            ends.inward(&syn);
            ends.inward(&bed.udp(STRANGER, W8080, b"well-formed"));
        }
    }
}

for_each_datapath! {
    /// Row 11.
    fn malformed_packets_of_ipv6_are_counted_and_never_forwarded(bed = Testbed::builder().family(Family::Ipv6)) {
        const LENGTH: usize = 18;
        const L4: usize = 54;
        add(bed, "tcp+udp 203.0.113.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        let syn = bed.tcp(STRANGER, W8080, TcpFields::new(SYN, 1, 0), b"");
        let with = |extensions: Vec<Extension>| {
            ends.client.bytes(&Frame { extensions, ..bed.udp(STRANGER, W8080, b"malformed") })
        };
        let fragment = || Extension::fragment(1, 0, false);
        // Once before there are flows for them, and once after.
        for round in 0..2 {
            let udp = with(Vec::new());
            let tcp = ends.client.bytes(&Frame { payload: b"malformed".to_vec(), ..syn.clone() });
            let options = with(vec![Extension::destination_options(8)]);
            let faults: Vec<(&[&str], Vec<u8>)> = vec![
                (&["bad-ip-header"], put(udp.clone(), 14, [0x40])),
                (&["bad-ip-length"], put(udp.clone(), LENGTH, 500_u16.to_be_bytes())),
                (&["bad-ip-length"], put(udp.clone(), LENGTH, [0, 0])),
                (&["bad-ip-length"], udp[..58].to_vec()),
                (&["cut-off"], put(udp.clone(), LENGTH, 2_u16.to_be_bytes())),
                (&["cut-off"], put(tcp.clone(), LENGTH, 2_u16.to_be_bytes())),
                (&["bad-l4-length"], put(udp.clone(), LENGTH, 6_u16.to_be_bytes())),
                (&["bad-l4-length"], put(tcp.clone(), LENGTH, 18_u16.to_be_bytes())),
                (&["bad-l4-length"], put(udp.clone(), L4 + 4, 500_u16.to_be_bytes())),
                (&["bad-l4-length"], put(udp.clone(), L4 + 4, 7_u16.to_be_bytes())),
                (&["bad-l4-length"], put(tcp.clone(), L4 + 12, [0xf0])),
                (&["bad-l4-length"], put(tcp.clone(), L4 + 12, [0x40])),
                // Extension headers that go beyond the packet, or beyond all measure, or come twice.
                (&["cut-off"], put(options.clone(), L4 + 1, [10])),
                (&["extension-headers"], put(options.clone(), L4 + 1, [255])),
                (&["extension-headers"], with(vec![fragment(), fragment()])),
                (&["short-frame"], udp[..14].to_vec()),
                (&["short-frame", "bad-ip-length"], udp[..53].to_vec()),
            ];
            assert_counted_and_not_forwarded(bed, &ends, &faults, round);
            ends.inward(&syn);
            ends.inward(&bed.udp(STRANGER, W8080, b"well-formed"));
        }
    }
}

for_each_family! {
    /// Row 11.
    fn noise_does_no_harm(bed = Testbed::builder()) {
        add(bed, "tcp+udp 203.0.113.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        let noise = bytes(200_000);
        let mut noise = noise.chunks(97);
        for length in (14..200).chain([1000, 1514]) {
            // Noise all through, noise behind a good Ethernet header, and a good packet with one bad word.
            let random: Vec<u8> = noise.by_ref().take(length / 97 + 1).flatten().copied().take(length).collect();
            ends.client.send_bytes(&random).unwrap();
            let mut packet = ends.client.bytes(&bed.udp(STRANGER, W8080, &random[14..]));
            packet.truncate(1514);
            let from = 14 + length % 28;
            packet[from..from + 2].copy_from_slice(&random[..2]);
            ends.client.send_bytes(&packet).unwrap();
            let behind = [&packet[..14], &random[14..]].concat();
            ends.client.send_bytes(&behind).unwrap();
        }
        let good = bed.udp("192.0.2.9:77", W8080, b"after the noise");
        assert_translated(bed, &good, &ends.inward(&good), "192.0.2.9:77", TARGET);
        bed.ctl(&["status"]).unwrap();
    }
}

for_each_family! {
    /// Row 16.
    fn the_routers_own_traffic_is_untouched(bed = Testbed::builder()) {
        add(bed, "tcp+udp 203.0.113.1:8080 10.0.0.10:80");
        // As if it were ssh and DNS.
        let _ssh = TcpServer::greeting(&bed.router, &bed.ip("203.0.113.1:22"), "SSH-2.0").unwrap();
        let _dns = UdpServer::echo(&bed.router, &bed.ip("203.0.113.1:53"), "dns").unwrap();
        let mut banner = [0; 7];
        connect(&bed.client, &bed.ip("203.0.113.1:22")).unwrap().read_exact(&mut banner).unwrap();
        assert_eq!(&banner, b"SSH-2.0");
        let socket = udp_socket(&bed.client, &bed.ip(ANY)).unwrap();
        assert_eq!(udp_ask(&socket, &bed.ip("203.0.113.1:53"), "who?").unwrap(), "dns who?");
        // A closed port says so.
        assert!(connect(&bed.client, &bed.ip("203.0.113.1:8081")).unwrap_err().root_cause().to_string().contains("refused"));

        // The router as a client, on either side.
        for (host, address) in [(&bed.client, "203.0.113.2:99"), (bed.server(), "10.0.0.10:99")] {
            let address = &bed.ip(address);
            let _server = UdpServer::echo(host, address, "host").unwrap();
            let socket = udp_socket(&bed.router, &bed.ip(ANY)).unwrap();
            assert_eq!(udp_ask(&socket, address, "x").unwrap(), "host x");
            assert!(connect(&bed.router, address).is_err());
        }

        // Neighbours are found, both ways, and the router answers to ping.
        bed.client.ip("neigh flush dev eth0").unwrap();
        bed.router.ip("neigh flush dev wan\nneigh flush dev lan").unwrap();
        ping(bed);

        assert_eq!(bed.stats().unwrap().dropped(), 0);
    }
}

/// One echo request from the client to the router, answered.
fn ping(bed: &Testbed) {
    use socket2::{Domain, Protocol, Socket, Type};
    let (domain, protocol, request) = match bed.family {
        // The checksum of a single 8 in the first byte; that of IPv6 the kernel fills in.
        Family::Ipv4 => (Domain::IPV4, Protocol::ICMPV4, [8, 0, 0xf7, 0xff, 0, 0, 0, 0]),
        Family::Ipv6 => (Domain::IPV6, Protocol::ICMPV6, [128, 0, 0, 0, 0, 0, 0, 0]),
    };
    let socket = bed.client.run(|| Socket::new(domain, Type::RAW, Some(protocol))).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    socket.send_to(&request, &bed.endpoint("203.0.113.1:0").into()).unwrap();
    wait_until("the ping is answered", DEADLINE, || {
        let mut answer = [0; 64];
        let length = Read::read(&mut &socket, &mut answer).unwrap();
        match bed.family {
            Family::Ipv4 => (length, answer[20]) == (28, 0),
            // Neighbour discovery comes by the same socket.
            Family::Ipv6 => (length, answer[0]) == (8, 129),
        }
    })
    .unwrap();
}

for_each_family! {
    /// Row 8: real stacks cut up what is longer than the MTU, and put it together again.
    fn datagrams_in_fragments_are_delivered_both_ways(bed = Testbed::builder()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let _server = UdpServer::echo(bed.server(), &bed.ip(TARGET), "server").unwrap();
        let socket = udp_socket(&bed.client, &bed.ip(ANY)).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        for length in [1472, 1473, 4000, 60_000] {
            let question: String = bytes(length).iter().map(|byte| char::from(b'a' + byte % 26)).collect();
            assert_eq!(udp_ask(&socket, &bed.ip(W8080), &question).unwrap(), format!("server {question}"));
        }
        assert!(bed.stats().unwrap().reason("fragment") > 0 || bed.daemon.options.datapath == Some(Datapath::Tc));
        assert_eq!(bed.stats().unwrap().dropped(), 0);
    }
}

for_each_datapath! {
    /// Row 8: clients use the same identification at the same time; a last fragment whose first has not
    /// been seen goes nowhere.
    fn fragments_of_two_clients_are_kept_apart(bed = Testbed::builder()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        let pieces = |client: &str, letter: u8| {
            // The UDP header and 40 bytes, then the rest.
            ends.client.fragments(&bed.udp(client, W8080, &[letter; 64]), 48)
        };
        let (one, other) = (pieces("192.0.2.1:4000", b'1'), pieces("192.0.2.2:4000", b'2'));
        let stranger = pieces("192.0.2.3:4000", b'3');
        for piece in [&one[0], &other[0], &stranger[1], &other[1], &one[1]] {
            ends.client.send_bytes(piece).unwrap();
        }
        let deadline = Instant::now() + DEADLINE;
        let mut seen = Vec::new();
        while seen.len() < 4 {
            let frame = ends.server.next_frame(deadline).unwrap().expect("four fragments arrive");
            if frame[12..14] == [8, 0] && frame[23] == 17 && frame[30..34] == [10, 0, 0, 10] {
                seen.push((frame[29], frame[21], frame[34..].to_vec()));
            }
        }
        for (client, letter) in [(1, b'1'), (2, b'2')] {
            let of_client: Vec<_> = seen.iter().filter(|(source, ..)| *source == client).collect();
            let [(_, 0, first), (_, 6, last)] = of_client.as_slice() else { panic!("{seen:?}") };
            assert!(first[2..4] == 80_u16.to_be_bytes() && first[8..48].iter().all(|byte| *byte == letter));
            assert!(last[..24].iter().all(|byte| *byte == letter));
        }
    }
}
