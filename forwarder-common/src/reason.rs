//! Why a packet was forwarded, passed or dropped: at once the drop code, the counter's index and the word shown.

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Rewritten and sent on.
    Forward,
    /// Left to the host (in XDP: to TC), as it came.
    Pass,
    /// Kept, to be looked at again.
    Hold,
    /// Gone.
    Drop,
}

impl Verdict {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Pass => "pass",
            Self::Hold => "hold",
            Self::Drop => "drop",
        }
    }
}

macro_rules! reasons {
    ($($verdict:ident { $($variant:ident $name:literal $meaning:literal,)* })*) => {
        /// One value for each way in which a packet's handling can end.
        #[repr(u8)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Reason {
            $($(#[doc = $meaning] $variant,)*)*
        }

        impl Reason {
            /// All of them, in the order of their indices.
            pub const ALL: &'static [Self] = &[$($(Self::$variant,)*)*];

            /// The word that commands and metrics show.
            pub const fn name(self) -> &'static str {
                match self { $($(Self::$variant => $name,)*)* }
            }

            /// As they are declared, against which the order is checked.
            #[cfg(test)]
            const VERDICTS: &'static [Verdict] = &[$($({ let _ = $name; Verdict::$verdict },)*)*];
        }
    };
}

// In the order of their verdicts, drops last: a rule counts only those, indexed from FIRST_DROP.
reasons! {
    Forward {
        Forwarded "forwarded" "Rewritten and sent to a known next hop.",
        Resolving "resolving" "Rewritten and sent through the kernel's neighbour resolution.",
        TranslatedForHost "translated-for-host" "Rewritten and handed to the host's stack, which fragments it or tells the client why not; or which routes and filters it, where the rule says via stack.",
        TranslatedAtEgress "translated-at-egress" "A reply or ICMP error that came through the host's stack, rewritten as it left.",
    }
    Pass {
        NoMatch "no-match" "No rule and no flow is about it.",
        NotIp "not-ip" "Neither an IPv4 nor an IPv6 packet.",
        OtherProtocol "other-protocol" "Neither TCP nor UDP nor an ICMP error about these.",
        Vlan "vlan" "It carries another VLAN's tag.",
        OtherStation "other-station" "Its Ethernet destination is not this interface.",
        Fragment "fragment" "A fragment: in XDP left to TC, in TC one that no rule can be about, or too long to hold, while its packet's first is unknown.",
        HostSession "host-session" "It answers to a session that the router, or its NAT, has opened from a mapped port.",
        ShortFrame "short-frame" "The frame ends inside its IP header.",
        BadIpHeader "bad-ip-header" "The IP header's version or length is impossible.",
        BadIpLength "bad-ip-length" "The IP total length goes beyond the frame or ends inside the header.",
        BadIpChecksum "bad-ip-checksum" "The IP header's checksum is wrong.",
        ExtensionHeaders "extension-headers" "More IPv6 extension headers than are looked through, or one that sends the packet elsewhere first.",
        CutOff "cut-off" "The TCP or UDP header is cut off before its ports.",
        UnknownInterface "unknown-interface" "It came in on an interface that the controller has not described.",
        LeftToStack "left-to-stack" "A reply of a rule via the stack: the host routes and filters it, and it is translated as it leaves.",
        LeftToTc "left-to-tc" "XDP cannot finish it here; TC does.",
        LeftUnfinishedChecksum "left-unfinished-checksum" "Its checksum is still to be filled in by an offload; TC handles it.",
        LeftTooBig "left-too-big" "Longer than the egress MTU; TC or the host handles it.",
        LeftTtlExpired "left-ttl-expired" "Its TTL ends here; the host tells its sender.",
        LeftUnresolved "left-unresolved" "The next hop's address is not known yet; TC resolves it.",
        LeftToProbe "left-to-probe" "Once a second a rule's packet goes through the kernel, which checks that the neighbour still answers.",
    }
    Hold {
        Held "held" "A fragment that came before the first one of its packet; when that comes, it is handled, and counted again.",
    }
    Drop {
        BadL4Length "bad-l4-length" "The TCP or UDP header is impossible for the packet's length.",
        Spoofed "spoofed" "Its source cannot come from there.",
        NotAllowed "not-allowed" "The rule's allow list does not name its source.",
        NoFlow "no-flow" "A TCP segment that opens nothing and belongs to no flow.",
        Cut "cut" "It belongs to a flow whose rule was deleted, disabled, changed or has expired.",
        BadFragment "bad-fragment" "A fragment that reaches into the first one.",
        BadIcmpChecksum "bad-icmp-checksum" "An ICMP error with a wrong checksum.",
        TtlExpired "ttl-expired" "Its TTL ends here, and nobody can be told: an ICMP error, or a host inside that uses a mapping.",
        TooBig "too-big" "Longer than the egress MTU, and the host cannot help.",
        NoRoute "no-route" "The router has no route to the target.",
        ForwardingOff "forwarding-off" "The kernel's forwarding is off on the interface it came in on.",
        WrongEgress "wrong-egress" "The route to the target leaves by an interface that is not internal.",
        PortCollision "port-collision" "Other flows have all the source ports at the target that were tried for it.",
        Untranslated "untranslated" "It was left to the host's stack, and comes out of it as no packet of a flow.",
        SessionLimit "session-limit" "The rule has as many sessions as it may.",
        SourceLimit "source-limit" "Its source has as many sessions of the rule as it may.",
        RateLimit "rate-limit" "The rule has taken as many new sessions in this second as it may.",
        TableFull "table-full" "The flow table has no room.",
        Unwritable "unwritable" "The kernel refused to change the packet.",
    }
}

impl Reason {
    pub const COUNT: usize = Self::ALL.len();

    /// Index of the first pass.
    const FIRST_PASS: usize = Self::NoMatch as usize;
    /// Index of the first hold.
    const FIRST_HOLD: usize = Self::Held as usize;
    /// Index of the first drop; drops are contiguous up to the end.
    pub const FIRST_DROP: usize = Self::BadL4Length as usize;
    pub const DROP_COUNT: usize = Self::COUNT - Self::FIRST_DROP;

    #[inline(always)]
    pub const fn verdict(self) -> Verdict {
        match self as usize {
            index if index >= Self::FIRST_DROP => Verdict::Drop,
            index if index >= Self::FIRST_HOLD => Verdict::Hold,
            index if index >= Self::FIRST_PASS => Verdict::Pass,
            _ => Verdict::Forward,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reasons_index_tells_its_verdict() {
        for (index, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
            assert_eq!(reason.verdict(), Reason::VERDICTS[index], "{reason:?}");
        }
    }

    #[test]
    fn names_are_unique_words() {
        for (index, reason) in Reason::ALL.iter().enumerate() {
            assert!(reason.name().chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-'));
            assert!(Reason::ALL[..index].iter().all(|other| other.name() != reason.name()));
        }
    }
}
