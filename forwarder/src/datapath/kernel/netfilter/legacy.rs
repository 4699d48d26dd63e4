//! What of the old iptables concerns us: nftables does not show it.

use std::fs;

use super::run;

/// Tables that are in use.
const NAMES: &str = "/proc/net/ip_tables_names";

/// Names a forward chain whose policy is to drop, unless it accepts the mark.
pub fn warning(mark: u32) -> Option<String> {
    // Asking where there is no table would make one.
    if !fs::read_to_string(NAMES).ok()?.lines().any(|name| name == "filter") {
        return None;
    }
    of_rules(&run("iptables-legacy", &["-S", "FORWARD"], "").ok()?, mark)
}

fn of_rules(rules: &str, mark: u32) -> Option<String> {
    let accept = format!("FORWARD -m mark --mark {mark:#x}/{mark:#x} -j ACCEPT");
    let drops = rules.lines().any(|line| line == "-P FORWARD DROP");
    let accepts = rules.lines().any(|line| line.strip_prefix("-A ") == Some(&accept));
    (drops && !accepts).then(|| {
        format!(
            "the policy of iptables' FORWARD chain drops what has to be fragmented for a mapping: iptables-legacy -I {accept}"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_of_drop_is_named_until_the_mark_is_accepted() {
        let rules = "-P FORWARD DROP\n-A FORWARD -i lan -o wan -j ACCEPT\n";
        let said = of_rules(rules, 0x2000_0000).unwrap();
        let cure = said.split_once("iptables-legacy -I ").unwrap().1;
        assert_eq!(of_rules(&format!("{rules}-A {cure}\n"), 0x2000_0000), None);
        assert_eq!(of_rules("-P FORWARD ACCEPT\n", 0x2000_0000), None);
    }
}
