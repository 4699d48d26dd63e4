//! ssh, and an FTP control connection that nobody meddles with.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::{fs, io, thread};

use testbed::{Host, Process, TcpServer, Testbed, bytes};

use crate::common::{self, W, command};

/// Makes a key of this host that leads into the server, and the server's own.
fn exchange_keys(bed: &Testbed) {
    for host in [&bed.client, bed.server()] {
        let mut keygen = command(host, "ssh-keygen", "openssh-client");
        keygen.args(["-q", "-t", "ed25519", "-N", "", "-f", "/run/key"]);
        common::output(keygen);
    }
    let public = bed.client.read("/run/key.pub").unwrap();
    common::write(bed.server(), "/run/authorized_keys", public);
    let known = format!("[{W}]:2222 {}", bed.server().read("/run/key.pub").unwrap());
    common::write(&bed.client, "/run/known_hosts", known);
}

fn ssh_server(server: &Host) -> Process {
    // Where it shuts its less trusted half in.
    server
        .run(|| {
            fs::create_dir("/run/sshd")?;
            fs::set_permissions("/run/sshd", fs::Permissions::from_mode(0o755))
        })
        .unwrap();
    let mut sshd = command(server, "sshd", "openssh-server");
    sshd.args(["-D", "-e", "-p", "22", "-f", "/dev/null", "-h", "/run/key"]);
    for option in [
        "AuthorizedKeysFile=/run/authorized_keys",
        "StrictModes=no",
        "PermitRootLogin=yes",
        "PidFile=none",
        "UsePAM=no",
    ] {
        sshd.args(["-o", option]);
    }
    common::serve(server, "tcp", 22, sshd)
}

beside_changes! {
    /// A command that carries a few megabytes each way; the host key is checked against the public name.
    fn ssh_carries_megabytes_both_ways(bed, ["tcp 203.0.113.1:2222 10.0.0.10:22"]) {
        exchange_keys(bed);
        let _server = ssh_server(bed.server());
        let data = bytes(5_000_000);
        let mut ssh = command(&bed.client, "ssh", "openssh-client");
        ssh.args(["-F", "/dev/null", "-i", "/run/key", "-p", "2222", "-o", "BatchMode=yes"]);
        ssh.args(["-o", "UserKnownHostsFile=/run/known_hosts", "-o", "StrictHostKeyChecking=yes"]);
        ssh.args([&format!("root@{W}"), "cat"]);
        let mut child =
            ssh.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut input = child.stdin.take().unwrap();
        let output = thread::scope(|scope| {
            scope.spawn(|| {
                input.write_all(&data).unwrap();
                drop(input);
            });
            child.wait_with_output().unwrap()
        });
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(output.stdout == data, "{} bytes came back", output.stdout.len());
    }
}

const FILE: usize = 2_000_000;

/// What a server with the private address says where passive connections go.
const PASSIVE: &str = "227 Entering Passive Mode (10,0,0,10,156,64).";

/// The port in [`PASSIVE`].
const PASSIVE_PORT: u16 = 156 * 256 + 64;

/// An FTP server that writes down every line it is sent, and takes passive connections alone.
fn ftp_server(host: &Host) -> (TcpServer, Arc<Mutex<Vec<String>>>) {
    let lines = Arc::<Mutex<Vec<String>>>::default();
    let listener = host.run(|| TcpListener::bind(("10.0.0.10", PASSIVE_PORT))).unwrap();
    let heard = Arc::clone(&lines);
    let server = TcpServer::start(host, "10.0.0.10:21", move |stream| converse(stream, &listener, &heard));
    (server.unwrap(), lines)
}

fn converse(stream: TcpStream, listener: &TcpListener, heard: &Mutex<Vec<String>>) -> io::Result<()> {
    let mut control = stream.try_clone()?;
    let mut say = |line: &str| write!(control, "{line}\r\n");
    say("220 ready")?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    let mut passive = false;
    while reader.read_line(&mut line)? > 0 {
        heard.lock().unwrap().push(line.clone());
        match line.split_whitespace().next().unwrap_or_default() {
            "USER" => say("331 password?")?,
            "PASS" => say("230 welcome")?,
            "PWD" => say("257 \"/\"")?,
            "PASV" => {
                passive = true;
                say(PASSIVE)?;
            }
            "PORT" | "TYPE" => say("200 done")?,
            "SIZE" => say(&format!("213 {FILE}"))?,
            "RETR" if passive => {
                let (mut data, _) = listener.accept()?;
                say("150 here it comes")?;
                data.write_all(&bytes(FILE))?;
                drop(data);
                say("226 done")?;
            }
            "RETR" => say("425 not that way")?,
            "QUIT" => say("221 bye")?,
            _ => say("502 not known")?,
        }
        line.clear();
    }
    Ok(())
}

/// `curl` as FTP client; its standard error tells the conversation.
fn ftp(bed: &Testbed, options: &[&str]) -> (Vec<u8>, String) {
    let mut curl = command(&bed.client, "curl", "curl");
    curl.args(["--disable", "--noproxy", "*", "--silent", "--verbose", "--max-time", "30"]);
    curl.args(options).arg(format!("ftp://{W}:2121/file"));
    let output = curl.output().unwrap();
    (output.stdout, String::from_utf8_lossy(&output.stderr).into_owned())
}

beside_changes! {
    /// Addresses in the payload are the ends' own business: PORT and the answer to PASV arrive as they were said.
    fn an_ftp_control_connection_is_left_alone(bed, [
        "tcp 203.0.113.1:2121 10.0.0.10:21",
        "tcp 203.0.113.1:40000-40010 10.0.0.10:40000-40010",
    ]) {
        let (_server, lines) = ftp_server(bed.server());
        let (file, said) = ftp(bed, &["--ftp-pasv", "--disable-epsv", "--ftp-skip-pasv-ip"]);
        assert!(said.contains(&format!("< {PASSIVE}\r\n")), "{said}");
        assert!(file == bytes(FILE), "{} bytes: {said}", file.len());

        // Its own address and port 5001.
        let (_, said) = ftp(bed, &["--ftp-port", "203.0.113.2:5001", "--disable-eprt"]);
        let lines = lines.lock().unwrap();
        assert!(lines.contains(&"PORT 203,0,113,2,19,137\r\n".to_owned()), "{lines:?}; {said}");
    }
}
