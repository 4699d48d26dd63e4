//! What is refused, and how.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Output;

use testbed::{TcpServer, Testbed};

use crate::common::*;

/// Asserts that a command is refused in one line that has the words in it.
fn assert_refused(output: &Output, arguments: &[&str], words: &[&str]) {
    let line = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {line}");
    assert_eq!(line.trim_end().lines().count(), 1, "{arguments:?}: {line}");
    assert!(output.stdout.is_empty(), "{arguments:?}");
    assert!(line.len() < 400, "{arguments:?}: {line}");
    assert!(words.iter().all(|word| line.contains(word)), "{arguments:?} should name {words:?}: {line}");
}

/// Rows 41 and 43.
#[test]
fn bad_rules_are_refused_in_one_line_and_change_nothing() {
    let bed = Testbed::builder().start().unwrap();
    add(&bed, "tcp 203.0.113.1:9000 10.0.0.10:80 --name taken");
    let before = rules(&bed);
    let long = "x".repeat(10_000);
    let cases: &[(&[&str], &[&str])] = &[
        (&["tcp", "203.0.113.1:0", TARGET], &["port", "1 to 65535"]),
        (&["tcp", "203.0.113.1:70000", TARGET], &["70000", "65535"]),
        (&["tcp", W8080, "10.0.0.10:0"], &["port"]),
        (&["tcp", W8080, "10.0.0.10:99999"], &["99999"]),
        (&["tcp", "203.0.113.1:-1", TARGET], &["port"]),
        (&["tcp", "203.0.113.1:80x", TARGET], &["80x"]),
        (&["tcp", "203.0.113.1", TARGET], &["port"]),
        (&["tcp", "203.0.113.1:200-100", TARGET], &["100-200"]),
        (&["tcp", "203.0.113.300:80", TARGET], &["203.0.113.300"]),
        (&["tcp", W8080, "10.0.0.256:80"], &["10.0.0.256"]),
        (&["tcp", W8080, "example.org:80"], &["example.org"]),
        (&["tcp", W8080, "10.0.0.10"], &["port"]),
        (&["tcp", "nosuch0:8080", TARGET], &["nosuch0", "wan"]),
        (&["tcp", "lan:8080", TARGET], &["lan", "wan"]),
        (&["tcp", W8080, "[2001:db8::1]:80"], &["IPv4"]),
        (&["tcp", W8080, "2001:db8::1:80"], &["IPv6"]),
        (&["tcp", "[2001:db8::1]:80", TARGET], &["IPv6", "IPv4", "one family"]),
        (&["tcp", "[2001:db8::1]:80", "[fe80::10]:80"], &["fe80::10", "link-local"]),
        (&["tcp", "[2001:db8::1]:80", "[fe80::10%lan]:80"], &["fe80::10%lan", "link"]),
        (&["tcp", "[fe80::1]:80", "[fd00::10]:80"], &["fe80::1", "link-local"]),
        (&["tcp", "[::ffff:203.0.113.1]:80", "[fd00::10]:80"], &["write it as 203.0.113.1"]),
        (&["tcp", "wan:8080", "[::1]:80"], &["::1", "loopback"]),
        (&["tcp", "wan:8080", "[ff02::1]:80"], &["ff02::1", "multicast"]),
        (&["tcp", "wan:8080", "[fd00::a:0:0:1]:80"], &["fd00::a:0:0:1", "router"]),
        (&["tcp", "wan:8080", "[2001:db8::cb:0:71:1]:80"], &["external address"]),
        (&["tcp", "wan:8080", "[fd00::10]:80", "--allow", "192.0.2.0/24"], &["no IPv6 network"]),
        (&["sctp", W8080, TARGET], &["sctp", "tcp+udp"]),
        (&["tcp", W8080, TARGET, "--lifetime", "0"], &["lifetime"]),
        (&["tcp", W8080, TARGET, "--lifetime", "0s"], &["lifetime"]),
        (&["tcp", W8080, TARGET, "--lifetime", "soon"], &["soon"]),
        (&["tcp", W8080, TARGET, "--lifetime", "99999999d"], &["lifetime"]),
        (&["tcp", "203.0.113.1:100-200", "10.0.0.10:100-150"], &["101", "51"]),
        (&["tcp", W8080, "10.0.0.10:80-90"], &["11"]),
        (&["tcp", W8080, "203.0.113.1:80"], &["external address"]),
        (&["tcp", W8080, "10.0.0.1:80"], &["10.0.0.1", "router"]),
        (&["tcp", "wan:8080", "203.0.113.1:80"], &["203.0.113.1"]),
        (&["tcp", W8080, TARGET, "--name", "taken"], &["taken"]),
        (&["tcp", "203.0.113.1:9000", TARGET], &["taken"]),
        (&["tcp", W8080, TARGET, "--name", &long], &["name"]),
        (&["tcp", W8080, TARGET, "--name", "two\nlines"], &["name"]),
        (&["tcp", W8080, TARGET, "--owner", "\u{1b}[31m"], &["owner"]),
        (&["tcp", W8080, TARGET, "--purpose", "bell\u{7}"], &["purpose"]),
        (&["tcp", W8080, TARGET, "--review-by", "tomorrow"], &["2026-12-31"]),
        (&["tcp", W8080, TARGET, "--allow", "everyone"], &["everyone"]),
        (&["tcp", W8080, TARGET, "--allow", "192.0.2.1/24"], &["192.0.2.0/24"]),
        (&["tcp", W8080, TARGET, "--allow", "192.0.2.0/33"], &["192.0.2.0/33"]),
        (&["tcp", W8080, "127.0.0.1:80"], &["127.0.0.1"]),
        (&["tcp", W8080, "224.0.0.1:80"], &["224.0.0.1"]),
        (&["tcp", W8080, "0.0.0.0:80"], &["0.0.0.0"]),
        (&["tcp", W8080, "255.255.255.255:80"], &["255.255.255.255"]),
        (&["tcp", "127.0.0.1:8080", TARGET], &["127.0.0.1"]),
        (&["tcp", "0.0.0.0:8080", TARGET], &["0.0.0.0"]),
        (&["tcp", W8080, TARGET, "--max-sessions", "0"], &["write 1 to", "none"]),
        (&["tcp", W8080, TARGET, "--max-sessions", "many"], &["many", "none"]),
        (&["tcp", "203.0.113.1:1-65535", "10.0.0.10:1-65535", "--dmz"], &["--review-by"]),
    ];
    for (arguments, words) in cases {
        let output = bed.ctl_output(&[&["add"], *arguments].concat()).unwrap();
        assert_refused(&output, arguments, words);
        assert_eq!(rules(&bed), before, "{arguments:?}");
    }
}

/// Row 41.
#[test]
fn commands_on_rules_that_cannot_be_are_refused() {
    let bed = Testbed::builder().start().unwrap();
    add(&bed, "tcp 203.0.113.1:9000 10.0.0.10:80 --name one --lifetime 1h");
    add(&bed, "tcp 203.0.113.1:9001 10.0.0.10:80 --name two");
    let before = rules(&bed);
    let cases: &[(&[&str], &[&str])] = &[
        (&["del", "nosuch"], &["nosuch"]),
        (&["del", "4711"], &["4711"]),
        (&["del", "one", "nosuch"], &["nosuch"]),
        (&["del", "tcp", "203.0.113.1:1"], &["203.0.113.1:1"]),
        (&["show", "nosuch"], &["nosuch"]),
        (&["flows", "nosuch"], &["nosuch"]),
        (&["set", "nosuch", "--target", TARGET], &["nosuch"]),
        (&["set", "one"], &["option"]),
        (&["set", "one", "--name", "two"], &["two"]),
        (&["set", "one", "--target", "10.0.0.10:1-5"], &[]),
        (&["set", "one", "--target", "203.0.113.1:80"], &["203.0.113.1"]),
        (&["set", "one", "--target", "[2001:db8::1]:80"], &["IPv4"]),
        (&["set", "one", "--allow", "nonsense"], &["nonsense"]),
        (&["renew", "one", "--lifetime", "0s"], &["lifetime"]),
        (&["renew", "one", "--lifetime", "never"], &["never"]),
        (&["renew", "nosuch", "--lifetime", "1h"], &["nosuch"]),
    ];
    for (arguments, words) in cases {
        let output = bed.ctl_output(arguments).unwrap();
        assert_refused(&output, arguments, words);
        assert_eq!(rules(&bed), before, "{arguments:?}");
    }
}

/// Row 41: a bounded number of rules.
#[test]
fn more_rules_than_there_is_room_for_are_refused() {
    let bed = Testbed::builder().config("[tables]\nrules = 2\n").start().unwrap();
    add(&bed, "tcp 203.0.113.1:1 10.0.0.10:80");
    add(&bed, "tcp 203.0.113.1:2 10.0.0.10:80");
    let third = ["add", "tcp", "203.0.113.1:3", TARGET];
    assert_refused(&bed.ctl_output(&third).unwrap(), &third, &["2 rules"]);
    assert_eq!(rules(&bed).len(), 2);
}

#[test]
fn wrong_usage_and_no_controller_have_their_own_exit_codes() {
    let mut bed = Testbed::builder().start().unwrap();
    let usages: &[&[&str]] = &[
        &[],
        &["dance"],
        &["add"],
        &["add", "tcp"],
        &["add", "tcp", W8080, TARGET, "--colour"],
        &["renew", "1"],
        &["del"],
        &["--json"],
    ];
    for arguments in usages {
        let output = bed.ctl_output(arguments).unwrap();
        assert_eq!(
            output.status.code(),
            Some(2),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(output.stdout.is_empty());
    }
    bed.daemon.kill();
    for arguments in [["status"], ["list"]] {
        let output = bed.ctl_output(&arguments).unwrap();
        let line = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), line.lines().count()), (Some(3), 1), "{line}");
    }
}

/// Row 44.
#[test]
fn a_port_that_the_router_itself_serves_is_refused_unless_forced() {
    let bed = Testbed::builder().start().unwrap();
    let _server = TcpServer::greeting(&bed.router, "0.0.0.0:8080", "the router's own").unwrap();
    let arguments = ["add", "tcp", W8080, TARGET];
    let program = std::env::current_exe().unwrap();
    // The kernel keeps 15 characters of a name.
    let name = program.file_name().unwrap().to_str().unwrap();
    assert_refused(
        &bed.ctl_output(&arguments).unwrap(),
        &arguments,
        &[&name[..name.len().min(15)], "--force"],
    );
    assert!(rules(&bed).is_empty());
    let rule = add(&bed, &format!("tcp {W8080} {TARGET} --force"));
    assert_eq!(rule["warnings"].as_array().unwrap().len(), 1, "{rule:#}");
    // UDP is free.
    add(&bed, &format!("udp {W8080} {TARGET}"));
}

/// Bad flags and files of the controller.
#[test]
fn a_controller_with_bad_settings_says_so_in_one_line() {
    let bed = Testbed::builder().build().unwrap();
    let cases: &[(&[&str], &str, &[&str])] = &[
        (&["--external", "wan"], "", &["--internal"]),
        (&["--internal", "lan"], "", &["--external"]),
        (&["--external", "wan", "--internal", "wan"], "", &["wan", "twice"]),
        (&["--external", "wan", "--internal", "a/b"], "", &["a/b"]),
        (&["--external", "wan", "--internal", "lan"], "colour = 1", &["colour"]),
        (&["--external", "wan", "--internal", "lan"], "[tables]\nrules = 0", &["rules"]),
        (&["--external", "wan", "--internal", "lan"], "[timeouts]\nudp-established = \"never\"", &["never"]),
        (&["--external", "wan", "--internal", "lan"], "not toml", &["line 1"]),
    ];
    for (arguments, config, words) in cases {
        bed.router.run(|| std::fs::write("/run/bad.toml", config)).unwrap();
        let mut command = bed.router.command(testbed::forwarderd());
        command.args(*arguments).args(["--config", "/run/bad.toml"]);
        let mut process = bed.router.start(command).unwrap();
        let status = process.wait(testbed::DEADLINE).unwrap();
        let said = process.finish();
        assert!(!status.success(), "{arguments:?} {config:?}");
        assert_eq!(said.trim_end().lines().count(), 1, "{arguments:?} {config:?}: {said}");
        assert!(
            words.iter().all(|word| said.contains(word)),
            "{arguments:?} {config:?} should name {words:?}: {said}"
        );
    }
}

/// Sends bytes to the API and returns all that comes back.
fn talk(bed: &Testbed, request: &[u8]) -> String {
    let mut stream = bed.router.run(|| UnixStream::connect(&bed.daemon.options.socket)).unwrap();
    stream.set_read_timeout(Some(testbed::DEADLINE)).unwrap();
    // It may hang up in the middle of a request that it will not have.
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn post(bed: &Testbed, body: &str) -> String {
    let length = body.len();
    let head = format!(
        "POST /v1/rules HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    talk(bed, format!("{head}{body}").as_bytes())
}

/// Bad API fields: an error that says so, and nothing changed.
#[test]
fn bad_api_requests_are_refused_with_an_error_in_json() {
    let bed = Testbed::builder().start().unwrap();
    let rule = |more: &str| {
        format!(r#"{{"protocol":"tcp","external":"203.0.113.1:8080","target":"10.0.0.10:80"{more}}}"#)
    };
    let bodies = [
        String::new(),
        "garbage".to_owned(),
        "[]".to_owned(),
        "{}".to_owned(),
        "{".to_owned(),
        rule(r#","colour":1"#),
        rule(r#","name":7"#),
        rule(r#","name":"a\u0000b""#),
        rule(r#","lifetime":-5"#),
        rule(r#","lifetime":"0s""#),
        rule(r#","allow":"192.0.2.1""#),
        rule(r#","allow":["nonsense"]"#),
        rule(r#","limits":{"max_sessions":-1}"#),
        rule(r#","via":"pigeon""#),
        r#"{"protocol":"tcp","external":"203.0.113.1:0","target":"10.0.0.10:80"}"#.to_owned(),
        r#"{"protocol":"tcp","external":8080,"target":"10.0.0.10:80"}"#.to_owned(),
    ];
    for body in bodies {
        let answer = post(&bed, &body);
        assert!(answer.starts_with("HTTP/1.1 4"), "{body}: {answer}");
        assert!(answer.contains(r#"{"error":""#), "{body}: {answer}");
    }
    for request in
        ["\0\0\0\0\r\n\r\n", "GET /nowhere HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "POST"]
    {
        let mut stream = bed.router.run(|| UnixStream::connect(&bed.daemon.options.socket)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
    }
    assert!(post(&bed, &"x".repeat(2 << 20)).starts_with("HTTP/1.1 4"));
    assert!(rules(&bed).is_empty());
    assert!(post(&bed, &rule("")).starts_with("HTTP/1.1 201"));
    assert_eq!(rules(&bed).len(), 1);
}
