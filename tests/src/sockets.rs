//! Servers and clients with real sockets of the hosts' own network stacks.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use socket2::{Domain, Socket, Type};

use crate::Host;

/// How long any single thing may take before a test gives up on it. Long: the machine may be busy.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// How often servers look whether they shall end.
const TICK: Duration = Duration::from_millis(50);

/// A TCP server that remembers who connected.
#[derive(Debug)]
pub struct TcpServer {
    peers: Arc<Mutex<Vec<SocketAddr>>>,
    stop: Arc<AtomicBool>,
    acceptor: Option<JoinHandle<()>>,
}

impl TcpServer {
    /// Sends back what it receives.
    pub fn echo(host: &Host, address: &str) -> Result<Self> {
        Self::start(host, address, |mut stream| {
            let mut buffer = [0; 1 << 16];
            loop {
                match stream.read(&mut buffer)? {
                    0 => return Ok(()),
                    length => stream.write_all(&buffer[..length])?,
                }
            }
        })
    }

    /// Says `greeting` to whoever connects, then sends back what it receives.
    pub fn greeting(host: &Host, address: &str, greeting: &str) -> Result<Self> {
        let greeting = greeting.to_owned();
        Self::start(host, address, move |mut stream| {
            writeln!(stream, "{greeting}")?;
            let mut buffer = [0; 1 << 16];
            loop {
                match stream.read(&mut buffer)? {
                    0 => return Ok(()),
                    length => stream.write_all(&buffer[..length])?,
                }
            }
        })
    }

    /// A web server whose pages are the given bodies by path, for any HTTP client.
    pub fn http(host: &Host, address: &str, pages: HashMap<String, Vec<u8>>) -> Result<Self> {
        let pages = Arc::new(pages);
        Self::start(host, address, move |mut stream| {
            let mut request = String::new();
            let mut reader = BufReader::new(stream.try_clone()?);
            reader.read_line(&mut request)?;
            let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
            while !matches!(request.as_str(), "" | "\n" | "\r\n") {
                request.clear();
                reader.read_line(&mut request)?;
            }
            let (status, body) = match pages.get(&path) {
                Some(body) => ("200 OK", body.as_slice()),
                None => ("404 Not Found", b"no such page\n".as_slice()),
            };
            write!(stream, "HTTP/1.0 {status}\r\nContent-Length: {}\r\n\r\n", body.len())?;
            stream.write_all(body)
        })
    }

    /// Runs `serve` on a thread for each connection.
    ///
    /// Reads end with an error when the server is dropped, so `serve` need not care about that.
    pub fn start(
        host: &Host,
        address: &str,
        serve: impl Fn(TcpStream) -> io::Result<()> + Send + Sync + 'static,
    ) -> Result<Self> {
        let listener = host
            .run(|| TcpListener::bind(address))
            .with_context(|| format!("cannot listen at {address} on {}", host.name()))?;
        listener.set_nonblocking(true)?;
        let peers = Arc::<Mutex<Vec<SocketAddr>>>::default();
        let stop = Arc::<AtomicBool>::default();
        let acceptor = thread::spawn({
            let (peers, stop) = (Arc::clone(&peers), Arc::clone(&stop));
            let serve = Arc::new(serve);
            move || {
                let mut connections = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let Ok((stream, peer)) = listener.accept() else {
                        thread::sleep(Duration::from_millis(1));
                        continue;
                    };
                    peers.lock().unwrap_or_else(PoisonError::into_inner).push(peer);
                    let serve = Arc::clone(&serve);
                    let copies = (stream.try_clone(), stream.try_clone());
                    if let (Ok(()), (Ok(to_wake), Ok(to_end))) = (stream.set_nonblocking(false), copies) {
                        connections.push(to_wake);
                        thread::spawn(move || {
                            // A connection that breaks is the client's to notice.
                            let _ = serve(stream);
                            // The copies would keep it open.
                            let _ = to_end.shutdown(Shutdown::Both);
                        });
                    }
                }
                for connection in connections {
                    // Wakes a thread that reads; fails where the connection has ended already.
                    let _ = connection.shutdown(Shutdown::Both);
                }
            }
        });
        Ok(Self { peers, stop, acceptor: Some(acceptor) })
    }

    /// Everyone who connected, in this order, as the server's own stack saw them.
    pub fn peers(&self) -> Vec<SocketAddr> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for TcpServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(acceptor) = self.acceptor.take() {
            // It cannot have panicked, and if it did the test has failed by itself.
            let _ = acceptor.join();
        }
    }
}

/// A UDP server that answers every datagram with its name, a space and the datagram.
#[derive(Debug)]
pub struct UdpServer {
    peers: Arc<Mutex<Vec<SocketAddr>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl UdpServer {
    /// `name` tells servers apart.
    pub fn echo(host: &Host, address: &str, name: &str) -> Result<Self> {
        let socket = udp_socket(host, address)?;
        socket.set_read_timeout(Some(TICK))?;
        let peers = Arc::<Mutex<Vec<SocketAddr>>>::default();
        let stop = Arc::<AtomicBool>::default();
        let thread = thread::spawn({
            let (peers, stop, name) = (Arc::clone(&peers), Arc::clone(&stop), name.to_owned());
            move || {
                let mut buffer = [0; 1 << 16];
                while !stop.load(Ordering::Relaxed) {
                    let Ok((length, peer)) = socket.recv_from(&mut buffer) else { continue };
                    peers.lock().unwrap_or_else(PoisonError::into_inner).push(peer);
                    let answer = [name.as_bytes(), b" ", &buffer[..length]].concat();
                    // Unanswered is what a client sees if this fails, and it waits with a deadline.
                    let _ = socket.send_to(&answer, peer);
                }
            }
        });
        Ok(Self { peers, stop, thread: Some(thread) })
    }

    /// The sender of every datagram, in this order, as the server's own stack saw it.
    pub fn peers(&self) -> Vec<SocketAddr> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for UdpServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // As for the TCP server.
            let _ = thread.join();
        }
    }
}

/// A TCP connection from a host, with the usual deadline on it and on every read and write.
pub fn connect(host: &Host, to: &str) -> Result<TcpStream> {
    open(host, None, to, DEADLINE)
}

/// A TCP connection from this local address and port, given up after `limit`.
pub fn connect_from(host: &Host, from: &str, to: &str, limit: Duration) -> Result<TcpStream> {
    open(host, Some(from), to, limit)
}

fn open(host: &Host, from: Option<&str>, to: &str, limit: Duration) -> Result<TcpStream> {
    let address: SocketAddr = to.parse().with_context(|| format!("not an address and port: {to}"))?;
    let from: Option<SocketAddr> = from.map(str::parse).transpose().context("not an address and port")?;
    let connect = || {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        if let Some(from) = from {
            socket.set_reuse_address(true)?;
            socket.bind(&from.into())?;
        }
        socket.connect_timeout(&address.into(), limit)?;
        io::Result::Ok(TcpStream::from(socket))
    };
    let stream = host.run(connect).with_context(|| format!("{} cannot connect to {to}", host.name()))?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.set_write_timeout(Some(DEADLINE))?;
    Ok(stream)
}

/// A UDP socket of a host, with the usual deadline on reads.
pub fn udp_socket(host: &Host, local: &str) -> Result<UdpSocket> {
    let socket = host
        .run(|| UdpSocket::bind(local))
        .with_context(|| format!("cannot bind UDP {local} on {}", host.name()))?;
    socket.set_read_timeout(Some(DEADLINE))?;
    Ok(socket)
}

/// Sends one datagram and waits for the answer, which must come from where the question went.
pub fn udp_ask(socket: &UdpSocket, to: &str, question: &str) -> Result<String> {
    let to: SocketAddr = to.parse().with_context(|| format!("not an address and port: {to}"))?;
    socket.send_to(question.as_bytes(), to)?;
    let mut buffer = [0; 1 << 16];
    let (length, from) = socket.recv_from(&mut buffer).with_context(|| format!("no answer from {to}"))?;
    ensure!(from == to, "asked {to}, and {from} answered");
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

/// As many bytes, without a pattern that a lost, doubled or shifted segment could hide in.
pub fn bytes(length: usize) -> Vec<u8> {
    // Its length shares no divisor with any segment or page size.
    const BLOCK: usize = 1_000_003;
    let mut state = 0x9e37_79b9_u32;
    let block: Vec<u8> = (0..BLOCK.min(length))
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as u8
        })
        .collect();
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        let part = block.len().min(length - bytes.len());
        bytes.extend(&block[..part]);
    }
    bytes
}

/// Fetches a page by HTTP and returns its body.
pub fn download(host: &Host, from: &str, path: &str) -> Result<Vec<u8>> {
    let mut stream = connect(host, from)?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {from}\r\n\r\n")?;
    let mut reader = BufReader::with_capacity(1 << 16, stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    ensure!(line.starts_with("HTTP/1.0 200"), "{from}{path} answers {line:?}");
    let mut length = None;
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        match line.trim_end().split_once(": ") {
            Some(("Content-Length", value)) => length = Some(value.parse()?),
            Some(_) => {}
            None => break,
        }
    }
    let Some(length) = length else { bail!("{from}{path} does not say how long it is") };
    let mut body = vec![0; length];
    reader.read_exact(&mut body).with_context(|| format!("the download of {from}{path} broke off"))?;
    Ok(body)
}
