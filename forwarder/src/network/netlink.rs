//! Reading and following through rtnetlink.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use futures_util::{StreamExt as _, TryStreamExt as _};
use netlink_packet_route::{
    address::{AddressAttribute, AddressFlags, AddressMessage},
    link::{InfoKind, LinkAttribute, LinkInfo, LinkLayerType, LinkMessage},
    route::{RouteAttribute, RouteType},
};
use nix::errno::Errno;
use rtnetlink::{Handle, MulticastGroup, RouteMessageBuilder};
use tokio::{runtime::Handle as Runtime, sync::mpsc, time::timeout};

use super::{Egress, Interface, Network, xdp_features};

/// Changes come in bursts: one snapshot serves all within this time of the first.
const SETTLE: Duration = Duration::from_millis(30);

/// A snapshot at least this often, in case the kernel dropped messages for want of buffers, and
/// for the properties that it sends no message about.
const RESYNC: Duration = Duration::from_secs(5);

/// The kernel answers at once, or something is wrong: netlink-proto would wait for ever.
const PATIENCE: Duration = Duration::from_secs(1);

/// Reads what the machine has now.
pub async fn snapshot() -> Result<Network> {
    let (connection, handle, _) = rtnetlink::new_connection().context("cannot open a netlink socket")?;
    let task = tokio::spawn(connection);
    let network = read(&handle).await;
    task.abort();
    network
}

/// Sends a snapshot after every change of a link, address, route, rule or neighbour, and now and
/// then without one. Ends when the receiver is dropped.
pub async fn watch() -> Result<mpsc::Receiver<Network>> {
    let groups = [
        MulticastGroup::Link,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Ifaddr,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
        MulticastGroup::Ipv4Rule,
        MulticastGroup::Ipv6Rule,
        MulticastGroup::Neigh,
    ];
    let (connection, handle, mut messages) =
        rtnetlink::new_multicast_connection(&groups).context("cannot follow netlink")?;
    tokio::spawn(connection);
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            if let Ok(None) = timeout(RESYNC, messages.next()).await {
                log::error!("netlink has closed; changes of interfaces and addresses are not seen any more");
                return;
            }
            tokio::time::sleep(SETTLE).await;
            while let Ok(Some(_)) = timeout(Duration::ZERO, messages.next()).await {}
            match read(&handle).await {
                Ok(network) => {
                    if sender.send(network).await.is_err() {
                        return;
                    }
                }
                Err(error) => log::warn!("{error:#}"),
            }
        }
    });
    Ok(receiver)
}

/// How packets to each of `addresses` leave.
///
/// Asks and waits, also where a task is not expected to (the start has two uplinks looked up).
pub fn find_egress(addresses: &BTreeSet<IpAddr>) -> Result<BTreeMap<IpAddr, Egress>> {
    let runtime = Runtime::try_current()?;
    let ask = async {
        let (connection, handle, _) = rtnetlink::new_connection().context("cannot open a netlink socket")?;
        let task = tokio::spawn(connection);
        let answers = async {
            let mut found = BTreeMap::new();
            for &address in addresses {
                found.insert(address, egress(&handle, address).await?);
            }
            Ok(found)
        };
        let found = timeout(PATIENCE, answers).await;
        task.abort();
        found.context("the kernel does not answer")?
    };
    tokio::task::block_in_place(|| runtime.block_on(ask))
}

async fn egress(handle: &Handle, address: IpAddr) -> Result<Egress> {
    let question = match address {
        IpAddr::V4(address) => RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(address, 32).build(),
        IpAddr::V6(address) => {
            RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(address, 128).build()
        }
    };
    let route = match handle.route().get(question).execute().try_next().await {
        Ok(Some(route)) => route,
        Ok(None) => bail!("the kernel has not answered"),
        Err(rtnetlink::Error::NetlinkError(answer)) if is_unreachable(&answer.to_io()) => {
            return Ok(Egress::NoRoute);
        }
        Err(error) => return Err(error).context("cannot ask for a route"),
    };
    if matches!(route.header.kind, RouteType::Broadcast | RouteType::Multicast | RouteType::Anycast) {
        return Ok(Egress::NoHost);
    }
    let index = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    });
    Ok(index.map_or(Egress::NoRoute, Egress::Interface))
}

/// No route, or one that says so (`unreachable`, `prohibit` and `blackhole` ones).
fn is_unreachable(error: &std::io::Error) -> bool {
    let says_so = [Errno::ENETUNREACH, Errno::EHOSTUNREACH, Errno::EACCES, Errno::EINVAL];
    error.raw_os_error().is_some_and(|code| says_so.contains(&Errno::from_raw(code)))
}

async fn read(handle: &Handle) -> Result<Network> {
    let links: Vec<LinkMessage> =
        handle.link().get().execute().try_collect().await.context("cannot list the interfaces")?;
    let mut interfaces: Vec<Interface> = links.into_iter().filter_map(interface).collect();

    let mut addresses = handle.address().get().execute();
    while let Some(address) = addresses.try_next().await.context("cannot list the addresses")? {
        let Some(interface) = interfaces.iter_mut().find(|interface| interface.index == address.header.index)
        else {
            continue;
        };
        add_address(interface, &address);
    }

    let indices: Vec<u32> = interfaces.iter().map(|interface| interface.index).collect();
    let features = xdp_features::read(&indices).await;
    for interface in &mut interfaces {
        interface.sends_for_xdp = features.get(&interface.index).map(|features| features.sends_frames());
        interface.addresses.sort();
    }
    Ok(Network { interfaces })
}

fn add_address(interface: &mut Interface, address: &AddressMessage) {
    let flags = flags(address);
    // Whoever may use it before it is known to be its own (optimistic DAD) has it.
    let tentative = flags.contains(AddressFlags::Tentative) && !flags.contains(AddressFlags::Optimistic);
    if tentative || flags.contains(AddressFlags::Dadfailed) {
        return;
    }
    // Of a point-to-point address LOCAL is the interface's own, ADDRESS the peer's.
    let local = address.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(own) => Some(*own),
        _ => None,
    });
    let Some(own) = local.or_else(|| {
        address.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(own) => Some(*own),
            _ => None,
        })
    }) else {
        return;
    };
    interface.addresses.push(own);
    // The same bit means "secondary" for IPv4.
    if own.is_ipv6() && flags.contains(AddressFlags::Secondary) {
        interface.temporary.push(own);
    }
}

/// The attribute has all flags, the header only those of the first eight bits.
fn flags(address: &AddressMessage) -> AddressFlags {
    let whole = address.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Flags(flags) => Some(*flags),
        _ => None,
    });
    whole.unwrap_or_else(|| AddressFlags::from_bits_retain(address.header.flags.bits().into()))
}

fn interface(link: LinkMessage) -> Option<Interface> {
    let mut interface = Interface {
        index: link.header.index,
        name: String::new(),
        mac: None,
        is_bare: is_bare(link.header.link_layer_type),
        mtu: 0,
        kind: None,
        addresses: Vec::new(),
        temporary: Vec::new(),
        sends_for_xdp: None,
    };
    for attribute in link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => interface.name = name,
            LinkAttribute::Mtu(mtu) => interface.mtu = mtu,
            LinkAttribute::Address(mac) if link.header.link_layer_type == LinkLayerType::Ether => {
                interface.mac = mac.try_into().ok();
            }
            LinkAttribute::LinkInfo(infos) => {
                interface.kind = infos.into_iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind_name(kind)),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    (!interface.name.is_empty()).then_some(interface)
}

/// What Linux takes for an interface without link-layer headers (`dev_is_mac_header_xmit`).
fn is_bare(kind: LinkLayerType) -> bool {
    use LinkLayerType::*;
    matches!(kind, Tunnel | Tunnel6 | Sit | Ipgre | Ip6gre | Void | None | Rawip | Ppp)
}

fn kind_name(kind: InfoKind) -> String {
    kind.to_string()
}
