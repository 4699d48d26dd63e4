//! A cable between interfaces without Ethernet headers.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{End, Host};

/// How often the cable looks whether it is to end, in milliseconds.
const TICK: u16 = 50;

/// Carries packets between two TUN interfaces, which go with it.
#[derive(Debug)]
pub struct TunCable {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Makes a TUN interface on each of two hosts and carries packets between them.
pub fn tun(a: &End, b: &End) -> Result<TunCable> {
    let ends = [open(a.host(), a.interface())?, open(b.host(), b.interface())?];
    a.configure()?;
    b.configure()?;
    let stop = Arc::<AtomicBool>::default();
    let thread = thread::spawn({
        let stop = Arc::clone(&stop);
        move || {
            while !stop.load(Ordering::Relaxed) {
                let [a, b] = &ends;
                let mut ready = [a, b].map(|end| PollFd::new(end.as_fd(), PollFlags::POLLIN));
                // It fails only where a signal interrupts it.
                let _ = poll(&mut ready, PollTimeout::from(TICK));
                carry(a, b);
                carry(b, a);
            }
        }
    });
    Ok(TunCable { stop, thread: Some(thread) })
}

impl Drop for TunCable {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It does not panic.
            let _ = thread.join();
        }
    }
}

/// Carries what is there, a packet at a time. What cannot be delivered is lost, as on any cable.
fn carry(mut from: &File, mut to: &File) {
    let mut packet = [0; 1 << 16];
    while let Ok(length) = from.read(&mut packet) {
        let _ = to.write(&packet[..length]);
    }
}

fn open(host: &Host, interface: &str) -> Result<File> {
    let make = || {
        let file =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
        // SAFETY: ifreq is plain data, for which all zeroes are valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes().take(libc::IFNAMSIZ - 1)) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as i16;
        // SAFETY: the request has a terminated name and flags, which is what TUNSETIFF reads.
        match unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) } {
            0 => Ok(file),
            _ => Err(io::Error::last_os_error()),
        }
    };
    host.run(make).with_context(|| format!("cannot make the TUN interface {interface} on {}", host.name()))
}
