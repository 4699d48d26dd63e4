//! What about the machine would keep rules from working.

use std::fs;
use std::path::Path;

use super::Settings;

/// Looks at the machine's settings; every line says how to mend what it names.
pub fn of_machine(settings: &Settings) -> Vec<String> {
    of_sysctls(Path::new("/proc/sys/net/ipv4"), settings)
}

fn of_sysctls(ipv4: &Path, settings: &Settings) -> Vec<String> {
    let off = |path: &Path| fs::read_to_string(path).is_ok_and(|value| value.trim() == "0");
    if off(&ipv4.join("ip_forward")) {
        return vec![
            "IPv4 forwarding is off, so nothing is forwarded: sysctl -w net.ipv4.ip_forward=1".to_owned(),
        ];
    }
    let interfaces = settings.external.iter().chain(&settings.internal);
    interfaces
        .filter(|name| off(&ipv4.join("conf").join(name).join("forwarding")))
        .map(|name| {
            // A dot in an interface's name would end a part of the sysctl's name.
            let sysctl = format!("net/ipv4/conf/{name}/forwarding");
            format!("IPv4 forwarding is off on {name}, so nothing that enters there is forwarded: sysctl -w {sysctl}=1")
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(forward: &str, wan: &str) -> Vec<String> {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("conf/wan")).unwrap();
        fs::write(directory.path().join("ip_forward"), forward).unwrap();
        fs::write(directory.path().join("conf/wan/forwarding"), wan).unwrap();
        of_sysctls(
            directory.path(),
            &Settings { external: vec!["wan".into()], internal: vec!["gone".into()] },
        )
    }

    #[test]
    fn forwarding_that_is_off_is_named_with_its_cure() {
        assert!(machine("0\n", "0\n")[0].contains("sysctl -w net.ipv4.ip_forward=1"));
        assert!(machine("1\n", "0\n")[0].contains("sysctl -w net/ipv4/conf/wan/forwarding=1"));
        assert_eq!(machine("1\n", "1\n"), [""; 0]);
    }
}
