//! Whole networks inside one machine, to run the forwarder in: hosts are namespaces, links are veth pairs.
//!
//! ```no_run
//! use testbed::{Datapath, Testbed};
//!
//! # fn main() -> anyhow::Result<()> {
//! let bed = Testbed::builder().datapath(Datapath::NativeXdp).start()?;
//! bed.ctl(&["add", "tcp", "203.0.113.1:8080", "10.0.0.10:80"])?;
//! let server = testbed::TcpServer::echo(bed.server(), "10.0.0.10:80")?;
//! let connection = testbed::connect(&bed.client, "203.0.113.1:8080")?;
//! # drop((server, connection));
//! # Ok(())
//! # }
//! ```
//!
//! Nothing here has a name that two beds could share, and nothing outlives the process: namespaces are
//! held by file descriptors alone, files of the programs lie on file systems that only those namespaces
//! mount, and processes are killed by the kernel when ours ends, however it ends.

mod daemon;
mod family;
mod frame;
mod host;
mod icmp;
mod link;
mod raw;
mod sockets;
mod stats;
mod topology;
mod tun;
mod wait;

pub use daemon::{Daemon, DaemonOptions, Datapath, forwarderctl, forwarderd};
pub use family::Family;
pub use frame::{Extension, Frame, Packet, TcpFields};
pub use host::{Host, Process};
pub use icmp::IcmpError;
pub use link::{End, bridge, veth};
pub use raw::RawSocket;
pub use sockets::{
    DEADLINE, TcpServer, UdpServer, bytes, connect, connect_from, download, udp_ask, udp_socket,
};
pub use stats::Stats;
pub use topology::{Testbed, TestbedBuilder};
pub use tun::{TunCable, tun};
pub use wait::wait_until;
