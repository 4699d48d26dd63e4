//! HTTP/2 and WebSockets.

use std::net::TcpStream;
use std::process::Command;
use std::{fs, io};

use testbed::{DEADLINE, Host, Process, TcpServer, Testbed, bytes, connect};
use tungstenite::{Message, WebSocket};

use crate::common::{self, W, command};

const PAGE: usize = 3_000_000;

/// `nghttpd` with one page.
fn http2_server(server: &Host) -> Process {
    server.run(|| fs::create_dir("/run/htdocs")).unwrap();
    common::write(server, "/run/htdocs/page", bytes(PAGE));
    let mut nghttpd = command(server, "nghttpd", "nghttp2-server");
    nghttpd.args(["--no-tls", "--htdocs=/run/htdocs", "80"]);
    common::serve(server, "tcp", 80, nghttpd)
}

fn load(bed: &Testbed, options: &[&str]) -> String {
    let mut h2load: Command = command(&bed.client, "h2load", "nghttp2-client");
    h2load.args(options).arg(format!("http://{W}:8080/page"));
    String::from_utf8(common::output(h2load)).unwrap()
}

beside_changes! {
    /// Many streams on a few connections, each page as long as it is.
    fn http2_carries_many_streams_at_once(bed, ["tcp 203.0.113.1:8080 10.0.0.10:80"]) {
        let _server = http2_server(bed.server());
        let said = load(bed, &["--requests=40", "--clients=4", "--max-concurrent-streams=10"]);
        assert!(said.contains("40 succeeded, 0 failed, 0 errored"), "{said}");
        assert!(said.contains(&format!("({}) data", 40 * PAGE)), "{said}");
        let mut nghttp = command(&bed.client, "nghttp", "nghttp2-client");
        nghttp.arg(format!("http://{W}:8080/page"));
        assert!(common::output(nghttp) == bytes(PAGE), "the page is another");
    }
}

fn echo(stream: TcpStream) -> io::Result<()> {
    let mut socket = tungstenite::accept(stream).map_err(io::Error::other)?;
    while let Ok(message) = socket.read() {
        if message.is_text() || message.is_binary() {
            socket.send(message).map_err(io::Error::other)?;
        }
    }
    Ok(())
}

fn open(bed: &Testbed) -> WebSocket<TcpStream> {
    let stream = connect(&bed.client, &format!("{W}:8080")).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    tungstenite::client(format!("ws://{W}:8080/"), stream).unwrap().0
}

beside_changes! {
    /// The upgrade, short and long messages, a ping, and an orderly end.
    fn a_websocket_stays_open_and_whole(bed, ["tcp 203.0.113.1:8080 10.0.0.10:80"]) {
        let _server = TcpServer::start(bed.server(), "10.0.0.10:80", echo).unwrap();
        let mut socket = open(bed);
        for round in 0..200 {
            let message = Message::text(format!("message {round}"));
            socket.send(message.clone()).unwrap();
            assert_eq!(socket.read().unwrap(), message);
        }
        let long = Message::binary(bytes(1 << 20));
        socket.send(long.clone()).unwrap();
        assert!(socket.read().unwrap() == long);
        socket.send(Message::Ping("still there?".into())).unwrap();
        assert_eq!(socket.read().unwrap(), Message::Pong("still there?".into()));
        socket.close(None).unwrap();
        assert!(matches!(socket.read().unwrap(), Message::Close(_)));
    }
}
