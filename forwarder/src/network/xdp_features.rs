//! What the drivers say of XDP: the generic netlink family `netdev`, Linux 6.3 and later
//! (include/uapi/linux/netdev.h).

use std::collections::HashMap;

use futures_util::TryStreamExt as _;
use genetlink::GenetlinkHandle;
use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload, NlasIterator,
    ParseableParametrized,
};
use netlink_packet_generic::{GenlFamily, GenlHeader, GenlMessage};

const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;
/// `NETDEV_XDP_ACT_NDO_XMIT`. veth sets and clears it as its peer becomes able to receive.
const NDO_XMIT: u64 = 4;

/// XDP features of one interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct XdpFeatures(u64);

impl XdpFeatures {
    /// Whether a frame that XDP redirects to it is sent.
    pub fn sends_frames(self) -> bool {
        self.0 & NDO_XMIT != 0
    }
}

/// By interface index, of those that the kernel tells about; none before 6.3.
pub async fn read(indices: &[u32]) -> HashMap<u32, XdpFeatures> {
    let mut features = HashMap::new();
    let Ok((connection, mut handle, _)) = genetlink::new_connection() else { return features };
    let task = tokio::spawn(connection);
    // One by one: the kernel's answers to a dump of this family lack the flag that says that more follow.
    for &index in indices {
        if let Some(device) = read_one(&mut handle, index).await {
            features.insert(device.ifindex, device.features);
        }
    }
    task.abort();
    features
}

async fn read_one(handle: &mut GenetlinkHandle, ifindex: u32) -> Option<Device> {
    let wanted = Device { ifindex, features: XdpFeatures::default() };
    let mut request = NetlinkMessage::from(GenlMessage::from_payload(wanted));
    request.header.flags = NLM_F_REQUEST;
    let mut answers = handle.request(request).await.ok()?;
    match answers.try_next().await.ok()??.payload {
        NetlinkPayload::InnerMessage(message) => Some(message.into_parts().1),
        _ => None,
    }
}

/// `NETDEV_CMD_DEV_GET`, request (by index) and answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Device {
    ifindex: u32,
    features: XdpFeatures,
}

impl GenlFamily for Device {
    fn family_name() -> &'static str {
        "netdev"
    }

    fn command(&self) -> u8 {
        NETDEV_CMD_DEV_GET
    }

    fn version(&self) -> u8 {
        1
    }
}

impl Device {
    fn request_attribute(&self) -> DefaultNla {
        DefaultNla::new(NETDEV_A_DEV_IFINDEX, self.ifindex.to_ne_bytes().to_vec())
    }
}

impl Emitable for Device {
    fn buffer_len(&self) -> usize {
        self.request_attribute().buffer_len()
    }

    fn emit(&self, buffer: &mut [u8]) {
        self.request_attribute().emit(buffer);
    }
}

impl ParseableParametrized<[u8], GenlHeader> for Device {
    fn parse_with_param(buffer: &[u8], _header: GenlHeader) -> Result<Self, DecodeError> {
        let mut device = Self::default();
        for attribute in NlasIterator::new(buffer) {
            let attribute = attribute?;
            match (attribute.kind(), attribute.value()) {
                (NETDEV_A_DEV_IFINDEX, value) => device.ifindex = number(value) as u32,
                (NETDEV_A_DEV_XDP_FEATURES, value) => device.features = XdpFeatures(number(value)),
                _ => {}
            }
        }
        Ok(device)
    }
}

/// An integer attribute of up to eight bytes, in the machine's byte order.
fn number(value: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    let len = value.len().min(8);
    if cfg!(target_endian = "big") {
        bytes[8 - len..].copy_from_slice(&value[..len]);
    } else {
        bytes[..len].copy_from_slice(&value[..len]);
    }
    u64::from_ne_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_of_four_and_eight_bytes_are_read() {
        assert_eq!(number(&7_u32.to_ne_bytes()), 7);
        assert_eq!(number(&0x1_0000_0004_u64.to_ne_bytes()), 0x1_0000_0004);
        assert_eq!(number(&[]), 0);
    }
}
