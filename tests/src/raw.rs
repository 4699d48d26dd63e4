//! Raw frames on an interface, out and in.

use std::io;
use std::mem;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::{Frame, Host, IcmpError, Packet};

/// An interface's raw frames: sends any bytes, and sees every frame that arrives (not those that leave).
#[derive(Debug)]
pub struct RawSocket {
    socket: Socket,
    mac: [u8; 6],
    gateway: [u8; 6],
}

impl RawSocket {
    /// `gateway` is the hardware address that frames go to unless they say otherwise.
    pub fn open(host: &Host, interface: &str, gateway: [u8; 6]) -> Result<Self> {
        let index = host.index(interface)?;
        let socket = host
            .run(|| open(index))
            .with_context(|| format!("cannot open a packet socket at {interface} on {}", host.name()))?;
        Ok(Self { socket, mac: host.mac(interface)?, gateway })
    }

    /// Sends a frame; where it names no hardware addresses, from this interface to the gateway.
    pub fn send(&self, frame: &Frame) -> Result<()> {
        self.send_bytes(&frame.bytes(self.mac, self.gateway))
    }

    /// Sends these bytes as a frame, whatever they are.
    pub fn send_bytes(&self, frame: &[u8]) -> Result<()> {
        self.socket
            .send(frame)
            .with_context(|| format!("cannot send a raw frame of {} bytes", frame.len()))?;
        Ok(())
    }

    /// The frame that `frame` will be, to be spoiled before [`RawSocket::send_bytes`].
    pub fn bytes(&self, frame: &Frame) -> Vec<u8> {
        frame.bytes(self.mac, self.gateway)
    }

    /// The fragments that `frame` will be (see [`Frame::fragments`]).
    pub fn fragments(&self, frame: &Frame, length: u16) -> Vec<Vec<u8>> {
        frame.fragments(self.mac, self.gateway, length)
    }

    /// The first TCP or UDP packet to come that `wanted` likes; others are thrown away.
    pub fn receive(&self, limit: Duration, mut wanted: impl FnMut(&Packet) -> bool) -> Result<Packet> {
        let deadline = Instant::now() + limit;
        let mut others = Vec::new();
        while let Some(frame) = self.next_frame(deadline)? {
            match Packet::parse(&frame) {
                Some(packet) if wanted(&packet) => return Ok(packet),
                Some(packet) => others.push(packet.to_string()),
                None => {}
            }
        }
        bail!("the packet did not come within {limit:?}; what came: {others:?}")
    }

    /// The first ICMP error to come.
    pub fn receive_error(&self, limit: Duration) -> Result<IcmpError> {
        let deadline = Instant::now() + limit;
        while let Some(frame) = self.next_frame(deadline)? {
            if let Some(error) = IcmpError::parse(&frame) {
                return Ok(error);
            }
        }
        bail!("no ICMP error came within {limit:?}")
    }

    /// Every TCP and UDP packet to come, up to and without the first that `last` likes.
    pub fn receive_until(
        &self,
        limit: Duration,
        mut last: impl FnMut(&Packet) -> bool,
    ) -> Result<Vec<Packet>> {
        let mut before = Vec::new();
        self.receive(limit, |packet| {
            let done = last(packet);
            if !done {
                before.push(packet.clone());
            }
            done
        })?;
        Ok(before)
    }

    /// Every TCP and UDP packet that comes in this time.
    pub fn receive_for(&self, time: Duration) -> Result<Vec<Packet>> {
        let deadline = Instant::now() + time;
        let mut packets = Vec::new();
        while let Some(frame) = self.next_frame(deadline)? {
            packets.extend(Packet::parse(&frame));
        }
        Ok(packets)
    }

    /// The next frame of any kind, or nothing once the deadline has passed.
    pub fn next_frame(&self, deadline: Instant) -> Result<Option<Vec<u8>>> {
        use io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
        loop {
            let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
            else {
                return Ok(None);
            };
            self.socket.set_read_timeout(Some(left))?;
            // GRO may have joined several segments into one.
            let mut buffer = vec![0; 1 << 17];
            match io::Read::read(&mut &self.socket, &mut buffer) {
                Ok(length) => {
                    buffer.truncate(length);
                    return Ok(Some(buffer));
                }
                Err(error) if matches!(error.kind(), Interrupted | TimedOut | WouldBlock) => {}
                Err(error) => return Err(error).context("cannot receive raw frames"),
            }
        }
    }
}

/// Every protocol, as a packet socket wants it said.
const ALL_PROTOCOLS: u16 = (libc::ETH_P_ALL as u16).to_be();

fn open(index: u32) -> io::Result<Socket> {
    // Protocol 0 hears nothing until it is bound, so no frame of another interface slips in.
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0)))?;
    socket.set_recv_buffer_size(8 << 20)?;
    let on: libc::c_int = 1;
    // SAFETY: the option's value is one int, which is what the pointer and the length say.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_IGNORE_OUTGOING,
            (&raw const on).cast(),
            mem::size_of_val(&on) as libc::socklen_t,
        )
    };
    if set != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the storage is zeroed and larger than sockaddr_ll, whose fields and length are then set.
    let ((), address) = unsafe {
        SockAddr::try_init(|storage, length| {
            let address = storage.cast::<libc::sockaddr_ll>();
            (*address).sll_family = libc::AF_PACKET as u16;
            (*address).sll_protocol = ALL_PROTOCOLS;
            (*address).sll_ifindex = index as libc::c_int;
            *length = mem::size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            Ok(())
        })?
    };
    socket.bind(&address)?;
    Ok(socket)
}
