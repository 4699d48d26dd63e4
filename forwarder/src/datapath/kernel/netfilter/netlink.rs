//! The little of netlink that netfilter is asked through (RFC 3549; include/uapi/linux/netfilter/nfnetlink.h).

use std::io;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

const NLM_F_REQUEST: u16 = 1;
/// `NLM_F_DUMP`: all there is.
pub const DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// Without `NLA_F_NESTED` and `NLA_F_NET_BYTEORDER`.
const KIND: u16 = 0x3fff;

/// `struct nlmsghdr`, and with `struct nfgenmsg`.
const HEADER: usize = 16;
const HEADERS: usize = HEADER + 4;

/// Asks a subsystem, and gives the attributes of each message of its answer to `take`.
pub fn ask(
    subsystem: u16,
    command: u16,
    flags: u16,
    family: u8,
    mut take: impl FnMut(&[u8]),
) -> io::Result<()> {
    let socket = Socket::new(NETLINK_NETFILTER)?;
    let mut request = [0; HEADERS];
    request[..4].copy_from_slice(&(HEADERS as u32).to_ne_bytes());
    request[4..6].copy_from_slice(&(subsystem << 8 | command).to_ne_bytes());
    request[6..8].copy_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
    request[HEADER] = family;
    socket.send_to(&request, &SocketAddr::new(0, 0), 0)?;
    let mut answer = vec![0; 1 << 16];
    loop {
        let length = socket.recv(&mut &mut answer[..], 0)?;
        if read(&answer[..length], &mut take)? || flags & DUMP == 0 {
            return Ok(());
        }
    }
}

/// Goes through a datagram's messages. Returns whether it held the last one.
fn read(mut messages: &[u8], take: &mut impl FnMut(&[u8])) -> io::Result<bool> {
    while let Some(length) = word(messages) {
        let message = messages.get(..length as usize).filter(|message| message.len() >= HEADER);
        let message = message.ok_or_else(|| io::Error::other("the kernel's answer is cut off"))?;
        match half(&message[4..]) {
            Some(NLMSG_DONE) => return Ok(true),
            Some(NLMSG_ERROR) => {
                let error = word(&message[HEADER..]).unwrap_or_default() as i32;
                return Err(io::Error::from_raw_os_error(error.wrapping_neg()));
            }
            _ => take(message.get(HEADERS..).unwrap_or_default()),
        }
        messages = messages.get((length as usize).next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

/// The value of an attribute among others.
pub fn attribute(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(half(attributes)?);
        let value = attributes.get(4..length)?;
        if half(&attributes[2..])? & KIND == wanted {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

fn word(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.first_chunk()?))
}

fn half(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_of_any_shape_are_read_or_refused() {
        let attributes = [8, 0, 2, 0, 1, 2, 3, 4, 5, 0, 1, 0x80, 9, 0, 0, 0];
        assert_eq!(attribute(&attributes, 2), Some(&[1, 2, 3, 4][..]));
        assert_eq!(attribute(&attributes, 1), Some(&[9][..]));
        assert_eq!(attribute(&attributes, 3), None);
        for length in 0..13 {
            assert_eq!(attribute(&attributes[..length], 1), None);
        }
        // A length that would never end.
        assert_eq!(attribute(&[0, 0, 2, 0], 1), None);
    }

    #[test]
    fn messages_of_any_shape_are_read_or_refused() {
        let message = |kind: u8, payload: &[u8]| {
            [&[16 + payload.len() as u8, 0, 0, 0, kind, 0], &[0; 10][..], payload].concat()
        };
        let mut taken = Vec::new();
        let mut take = |attributes: &[u8]| taken.push(attributes.to_vec());
        assert!(!read(&message(1, &[0, 0, 0, 0, 7]), &mut take).unwrap());
        assert!(read(&[message(1, &[0; 4]), message(3, &[0; 4])].concat(), &mut take).unwrap());
        let refused = read(&message(2, &(-1_i32).to_ne_bytes()), &mut take).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(1));
        assert!(read(&[200, 0, 0, 0, 1, 0], &mut take).is_err() && read(&[0; 20], &mut take).is_err());
        assert_eq!(taken, [vec![7], vec![]]);
    }
}
