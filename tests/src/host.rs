//! A host: a network namespace, with a mount namespace that shows it as a machine of its own would.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{fs, io, panic};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid, getppid};

use crate::wait_until;

/// A machine of the test network.
///
/// It has a network namespace and a mount namespace of its own. The latter holds a fresh `/sys` (sysfs
/// shows the network that it was mounted in), a fresh bpffs at `/sys/fs/bpf`, so pins live exactly as
/// long as the host, and an empty `/run` for sockets, stores and whatever else shall leave no trace.
///
/// Clones are the same host; it goes when the last one does.
#[derive(Clone, Debug)]
pub struct Host {
    name: String,
    namespaces: Arc<Namespaces>,
}

#[derive(Debug)]
struct Namespaces {
    net: OwnedFd,
    mnt: OwnedFd,
}

impl Host {
    /// A host with nothing but its loopback interface, which is up. `name` is for messages only.
    pub fn new(name: &str) -> Result<Self> {
        ensure!(
            Uid::effective().is_root(),
            "network namespaces need root: run this as root (sudo -E cargo xtask test)"
        );
        let made = thread::spawn(Namespaces::new).join();
        let namespaces =
            made.map_err(|_| anyhow!("making the namespaces of {name} panicked"))?.with_context(|| {
                format!("cannot make the namespaces of {name}; does this container allow it?")
            })?;
        let host = Self { name: name.to_owned(), namespaces: Arc::new(namespaces) };
        // Duplicate address detection would keep IPv6 addresses unusable for a second.
        host.sysctl("net.ipv6.conf.all.accept_dad", "0")?;
        host.sysctl("net.ipv6.conf.default.accept_dad", "0")?;
        // As those of IPv4 do, IPv6 addresses stay while their interface is down.
        host.sysctl("net.ipv6.conf.all.keep_addr_on_down", "1")?;
        host.sysctl("net.ipv6.conf.default.keep_addr_on_down", "1")?;
        host.ip("link set lo up")?;
        Ok(host)
    }

    /// What messages call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `work` on a thread of this host and returns what it returns; a panic passes through.
    ///
    /// Sockets stay in the network they were made in, so only their making needs this.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                self.namespaces.enter_on_thread();
                work()
            });
            thread.join().unwrap_or_else(|panic| panic::resume_unwind(panic))
        })
    }

    /// Starts `work` on a thread of this host.
    pub fn spawn<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        let namespaces = Arc::clone(&self.namespaces);
        thread::spawn(move || {
            namespaces.enter_on_thread();
            work()
        })
    }

    /// A command that will run on this host. The kernel kills it when the thread that starts it ends;
    /// use [`Host::start`] for what shall live longer.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        let namespaces = Arc::clone(&self.namespaces);
        let parent = nix::unistd::getpid();
        // SAFETY: between fork and exec only system calls are made; nothing allocates or takes a lock.
        unsafe {
            command.pre_exec(move || {
                nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
                // The parent may have died before the line above.
                if getppid() != parent {
                    return Err(nix::Error::ESRCH.into());
                }
                namespaces.enter().map_err(io::Error::from)
            });
        }
        command
    }

    /// Starts a process of this host in the background; it ends with the returned guard.
    pub fn start(&self, mut command: Command) -> Result<Process> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let shown = format!("{:?} on {}", command.get_program(), self.name);
        Process::new(command).with_context(|| format!("cannot start {shown}"))
    }

    /// Runs a command of this host to its end; its output is an error unless it succeeds.
    pub fn output(&self, program: impl AsRef<Path>, arguments: &[&str]) -> Result<String> {
        let program = program.as_ref();
        let shown = format!("{} {} on {}", program.display(), arguments.join(" "), self.name);
        let output = self
            .command(program)
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("cannot run {shown}"))?;
        ensure!(
            output.status.success(),
            "{shown}: {}: {}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr),
            String::from_utf8_lossy(&output.stdout)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs lines of the `ip` command, such as `addr add 10.0.0.1/24 dev lan`.
    pub fn ip(&self, lines: &str) -> Result<()> {
        let mut child = self
            .command("ip")
            .args(["-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run `ip` (package iproute2)")?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(lines.as_bytes())?;
        }
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("ip on {}: {}in:\n{lines}", self.name, String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    }

    /// Adds an address with its prefix length to an interface that is up, and waits until it can be used: one of
    /// IPv6 becomes the host's own in the kernel's own time.
    pub fn add_address(&self, interface: &str, address: &str) -> Result<()> {
        self.ip(&format!("addr add {address} dev {interface}"))?;
        let (address, _) = address.split_once('/').context("the address has no prefix")?;
        let address: IpAddr = address.parse().with_context(|| format!("not an address: {address}"))?;
        wait_until("the address can be used", crate::DEADLINE, || {
            self.run(|| UdpSocket::bind((address, 0))).is_ok()
        })
    }

    /// Sets a kernel parameter, such as `net.ipv4.ip_forward`.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        self.run(|| fs::write(&path, value))
            .with_context(|| format!("cannot set {name} to {value} on {}", self.name))
    }

    /// Reads a file as this host sees it.
    pub fn read(&self, path: impl AsRef<Path>) -> Result<String> {
        let path = path.as_ref();
        self.run(|| fs::read_to_string(path))
            .with_context(|| format!("cannot read {} on {}", path.display(), self.name))
    }

    /// The hardware address of an interface.
    pub fn mac(&self, interface: &str) -> Result<[u8; 6]> {
        let text = self.read(format!("/sys/class/net/{interface}/address"))?;
        let mut mac = [0; 6];
        for (byte, digits) in mac.iter_mut().zip(text.trim().split(':')) {
            *byte = u8::from_str_radix(digits, 16).with_context(|| format!("no MAC address: {text}"))?;
        }
        Ok(mac)
    }

    /// The index of an interface.
    pub fn index(&self, interface: &str) -> Result<u32> {
        Ok(self.read(format!("/sys/class/net/{interface}/ifindex"))?.trim().parse()?)
    }

    /// A path by which other processes can name this host's network, as `ip link … netns PATH` wants it.
    pub(crate) fn net_path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.namespaces.net.as_raw_fd())
    }
}

impl Namespaces {
    /// Must run on a thread that ends afterwards: it moves the thread into the new namespaces.
    fn new() -> Result<Self> {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)?;
        // Else the mounts below would show on the real machine.
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
        for (kind, target) in [("sysfs", "/sys"), ("bpf", "/sys/fs/bpf"), ("tmpfs", "/run")] {
            mount(Some(kind), target, Some(kind), MsFlags::empty(), None::<&str>)
                .with_context(|| format!("cannot mount a {kind} at {target}"))?;
        }
        Ok(Self {
            net: File::open("/proc/thread-self/ns/net")?.into(),
            mnt: File::open("/proc/thread-self/ns/mnt")?.into(),
        })
    }

    fn enter(&self) -> nix::Result<()> {
        setns(self.net.as_fd(), CloneFlags::CLONE_NEWNET)?;
        setns(self.mnt.as_fd(), CloneFlags::CLONE_NEWNS)
    }

    fn enter_on_thread(&self) {
        // A mount namespace can be entered only by who shares root and working directory with nobody.
        unshare(CloneFlags::CLONE_FS)
            .and_then(|()| self.enter())
            .expect("cannot enter the host's namespaces");
    }
}

/// A process of a host, killed with this guard. What it writes is collected.
#[derive(Debug)]
pub struct Process {
    child: Child,
    output: Arc<Mutex<String>>,
    collectors: Vec<JoinHandle<()>>,
}

impl Process {
    fn new(command: Command) -> io::Result<Self> {
        let mut child = spawn_for_life(command)?;
        let output = Arc::default();
        let collectors = [
            child.stdout.take().map(|stream| collect(stream, &output)),
            child.stderr.take().map(|stream| collect(stream, &output)),
        ];
        Ok(Self { child, output, collectors: collectors.into_iter().flatten().collect() })
    }

    /// All that it has written to stdout and stderr so far.
    pub fn written(&self) -> String {
        lock(&self.output).clone()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let id = i32::try_from(self.child.id())?;
        kill(Pid::from_raw(id), signal).with_context(|| format!("cannot send {signal} to {id}"))
    }

    /// Its exit status, once it has ended.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits until it ends by itself; that it does not is an error.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            ensure!(
                Instant::now() < deadline,
                "it has not ended within {limit:?}; it wrote: {}",
                self.written()
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Kills it (SIGKILL) if it still runs, and returns all that it has written.
    pub fn finish(mut self) -> String {
        self.end();
        self.written()
    }

    fn end(&mut self) {
        // Both fail only where it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        for collector in self.collectors.drain(..) {
            let _ = collector.join();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

fn collect(mut stream: impl Read + Send + 'static, output: &Arc<Mutex<String>>) -> JoinHandle<()> {
    let output = Arc::clone(output);
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(length) = stream.read(&mut buffer) {
            if length == 0 {
                break;
            }
            lock(&output).push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
    })
}

/// A panic of somebody who held the lock does not make the text wrong.
fn lock(text: &Mutex<String>) -> MutexGuard<'_, String> {
    text.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Spawns from a thread that ends only with the process: the kernel's parent-death signal
/// comes when the *thread* that forked ends, and a test's threads come and go.
fn spawn_for_life(command: Command) -> io::Result<Child> {
    type Job = (Command, mpsc::Sender<io::Result<Child>>);
    static SPAWNER: LazyLock<mpsc::Sender<Job>> = LazyLock::new(|| {
        let (jobs, queue) = mpsc::channel::<Job>();
        thread::spawn(move || {
            for (mut command, answer) in queue {
                // Nobody listens when the asker has panicked; the child then must not stay.
                if let Err(mpsc::SendError(Ok(mut orphan))) = answer.send(command.spawn()) {
                    let _ = orphan.kill();
                    let _ = orphan.wait();
                }
            }
        });
        jobs
    });
    let (answer, answered) = mpsc::channel();
    SPAWNER.send((command, answer)).map_err(|_| io::Error::other("the spawning thread is gone"))?;
    answered.recv().map_err(|_| io::Error::other("the spawning thread is gone"))?
}
