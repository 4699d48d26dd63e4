//! Attaches the programs to the interfaces, through links that outlive the controller.
//!
//! A link is pinned under the interface's index: the next controller finds it, and puts its own
//! program into it in one step, so that no packet meets a moment without one.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    Ebpf,
    programs::{
        ProgramError, SchedClassifier, TcAttachType, XdpMode,
        links::{FdLink, LinkOrder, PinnedLink},
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
    },
    sys::SyscallError,
};

use nix::fcntl::Flock;

use super::{
    detach_link::detach_link,
    load::{self, TC_EGRESS, TC_EGRESS_L3, TC_INGRESS, TC_INGRESS_L3, kernel_is_at_least},
    netfilter,
    owner::{self, Holder},
};
use crate::{datapath::Mode, network::Interface};

/// Of the filters on clsact (kernels before 6.6): early, and always the same place, so that the
/// next controller replaces its own filter and no other.
const PRIORITY: u16 = 41;
const HANDLE: TcHandle = TcHandle::new(0, 1);

/// What is attached to one interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    pub xdp: Option<XdpKind>,
    /// `TCX` or `clsact`.
    pub tc: &'static str,
    pub why: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XdpKind {
    Native,
    Generic,
}

impl XdpKind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "native XDP",
            Self::Generic => "generic XDP",
        }
    }

    fn pin_suffix(self) -> &'static str {
        match self {
            Self::Native => "xdp-native",
            Self::Generic => "xdp-generic",
        }
    }

    fn mode(self) -> XdpMode {
        match self {
            Self::Native => XdpMode::Driver,
            Self::Generic => XdpMode::Skb,
        }
    }
}

/// Why XDP is not attached to an interface.
enum NoXdp {
    /// Somebody else's program is there.
    Taken,
    /// The driver cannot, or the kernel says no.
    Refused(io::Error),
}

/// The pins of a controller, which holds their lock as long as it has this.
///
/// What it has made of them goes again with it, until [`Pins::keep`]: a start that fails leaves
/// what was there before.
pub struct Pins {
    pin_dir: PathBuf,
    /// Of the links.
    dir: PathBuf,
    /// Maps that were there before.
    found_maps: Vec<String>,
    /// Links that this process made, not found.
    new: Vec<PathBuf>,
    /// Filters on clsact that it made: interface, hook, program.
    new_filters: Vec<(String, TcAttachType, &'static str)>,
    kept: bool,
    _lock: Flock<File>,
}

impl Drop for Pins {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        release(&std::mem::take(&mut self.new));
        for (interface, hook, program) in self.new_filters.drain(..) {
            if let Err(error) = tc::qdisc_detach_program(&interface, hook, program) {
                log::warn!("cannot take {program} off {interface}: {error}");
            }
        }
        let maps = load::maps_dir(&self.pin_dir);
        let made = pins(&maps).into_iter().filter(|name| !self.found_maps.contains(name));
        made.for_each(|name| remove(&maps.join(name)));
        remove_empty(&self.pin_dir);
    }
}

impl Pins {
    /// Takes the pins in a directory for this process.
    pub fn take(pin_dir: &Path) -> Result<Self> {
        let lock = owner::lock(pin_dir)?;
        let dir = links_dir(pin_dir);
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        Ok(Self {
            pin_dir: pin_dir.to_owned(),
            dir,
            found_maps: pins(&load::maps_dir(pin_dir)),
            new: Vec::new(),
            new_filters: Vec::new(),
            kept: false,
            _lock: lock,
        })
    }

    /// Lets what was made outlive this process.
    pub fn keep(&mut self) {
        self.kept = true;
    }

    /// Puts the programs of `ebpf` on an interface, in place of those of an earlier controller.
    pub fn attach(
        &mut self,
        ebpf: &mut Ebpf,
        interface: &Interface,
        external: bool,
        mode: Mode,
    ) -> Result<Attached> {
        if !self.path(interface.index, "tc-ingress").exists() {
            owner::check_interface(&interface.name)?;
        }
        let (kind, why) = choose(interface, mode)?;
        let (ingress, egress) =
            if interface.is_bare { (TC_INGRESS_L3, TC_EGRESS_L3) } else { (TC_INGRESS, TC_EGRESS) };
        // TC first: it is complete by itself, XDP only speeds it up.
        let tc = self.attach_tc(ebpf, interface, ingress, TcAttachType::Ingress)?;
        if external {
            self.attach_tc(ebpf, interface, egress, TcAttachType::Egress)?;
        } else {
            // It may have been external before.
            let before = self.path(interface.index, "tc-egress");
            if before.exists() {
                release(&[before]);
            }
        }
        let Some(kind) = kind else {
            self.remove_xdp(interface.index, None);
            return Ok(Attached { xdp: None, tc, why });
        };
        self.remove_xdp(interface.index, Some(kind));
        match self.attach_xdp(ebpf, interface, kind) {
            Ok(()) => Ok(Attached { xdp: Some(kind), tc, why }),
            Err(NoXdp::Taken) => {
                let why = "another XDP program is attached here and stays; TC beside it".to_owned();
                Ok(Attached { xdp: None, tc, why })
            }
            Err(NoXdp::Refused(error)) if mode == Mode::Auto => {
                Ok(Attached { xdp: None, tc, why: format!("auto: no native XDP with this driver ({error})") })
            }
            Err(NoXdp::Refused(error)) => bail!(
                "{}: {} cannot be attached ({error}); use --datapath {}",
                interface.name,
                kind.name(),
                if kind == XdpKind::Native { "xdp-generic, tc or auto" } else { "tc or auto" },
            ),
        }
    }

    /// Whether the programs are still on an interface. (A filter on clsact has no pin to look at:
    /// it goes together with the maps.)
    pub fn is_attached(&self, index: u32) -> bool {
        match kernel_is_at_least(6, 6) {
            true => self.path(index, "tc-ingress").exists(),
            false => load::has_maps(&self.pin_dir),
        }
    }

    /// Forgets the links of all interfaces but these.
    pub fn retain(&self, indices: &BTreeSet<u32>) {
        let is_stale = |name: &String| {
            let index = name.split('-').next().and_then(|index| index.parse().ok());
            index.is_none_or(|index| !indices.contains(&index))
        };
        let stale: Vec<PathBuf> =
            pins(&self.dir).into_iter().filter(is_stale).map(|name| self.dir.join(name)).collect();
        release(&stale);
    }

    fn path(&self, index: u32, suffix: &str) -> PathBuf {
        // By index: bpffs allows no dots in names, interfaces do.
        self.dir.join(format!("{index}-{suffix}"))
    }

    fn remove_xdp(&self, index: u32, but: Option<XdpKind>) {
        let kinds = [XdpKind::Native, XdpKind::Generic].into_iter().filter(|kind| Some(*kind) != but);
        let paths = kinds.map(|kind| self.path(index, kind.pin_suffix()));
        let there: Vec<PathBuf> = paths.filter(|path| path.exists()).collect();
        release(&there);
    }

    fn attach_xdp(&mut self, ebpf: &mut Ebpf, interface: &Interface, kind: XdpKind) -> Result<(), NoXdp> {
        let other = |error: anyhow::Error| NoXdp::Refused(io::Error::other(error));
        let xdp = load::xdp(ebpf).map_err(other)?;
        let path = self.path(interface.index, kind.pin_suffix());
        if let Ok(pinned) = PinnedLink::from_pin(&path) {
            let adopted =
                FdLink::from(pinned).try_into().map_err(|error| other(anyhow::Error::new(error)))?;
            match xdp.attach_to_link(adopted).and_then(|id| xdp.take_link(id)) {
                // Dropping it here leaves the pinned one.
                Ok(_) => return Ok(()),
                // The link has lost its interface: a pinned link dies with it.
                Err(_) => remove(&path),
            }
        }
        let link = xdp
            .attach_to_if_index(interface.index, kind.mode())
            .and_then(|id| xdp.take_link(id))
            .map_err(|error| match io_error(&error) {
                Some(libc_error) if matches!(libc_error.raw_os_error(), Some(EBUSY | EEXIST)) => NoXdp::Taken,
                Some(libc_error) => {
                    NoXdp::Refused(io::Error::from_raw_os_error(libc_error.raw_os_error().unwrap_or(0)))
                }
                None => NoXdp::Refused(io::Error::other(error)),
            })?;
        let link: FdLink = link.try_into().map_err(|error| other(anyhow::Error::new(error)))?;
        link.pin(&path).map_err(|error| other(anyhow::Error::new(error)))?;
        self.new.push(path);
        Ok(())
    }

    fn attach_tc(
        &mut self,
        ebpf: &mut Ebpf,
        interface: &Interface,
        name: &'static str,
        hook: TcAttachType,
    ) -> Result<&'static str> {
        let classifier = load::classifier(ebpf, name)?;
        if kernel_is_at_least(6, 6) {
            let path = self
                .path(interface.index, if hook == TcAttachType::Egress { "tc-egress" } else { "tc-ingress" });
            let made = attach_tcx(classifier, interface, hook, &path)
                .with_context(|| format!("cannot attach to TC of {}", interface.name))?;
            if made {
                self.new.push(path);
            }
            return Ok("TCX");
        }
        let made = attach_clsact(classifier, interface, hook)
            .with_context(|| format!("cannot attach to TC of {}", interface.name))?;
        if made {
            self.new_filters.push((interface.name.clone(), hook, name));
        }
        Ok("clsact")
    }
}

const EBUSY: i32 = nix::errno::Errno::EBUSY as i32;
const EEXIST: i32 = nix::errno::Errno::EEXIST as i32;

fn links_dir(pin_dir: &Path) -> PathBuf {
    pin_dir.join("links")
}

/// Which XDP to try, and the sentence for `status`.
fn choose(interface: &Interface, mode: Mode) -> Result<(Option<XdpKind>, String)> {
    if interface.is_bare && mode != Mode::Tc {
        let kind = interface.kind.as_deref().unwrap_or("point-to-point");
        ensure!(
            mode != Mode::Xdp,
            "{}: a {kind} interface has no Ethernet headers, which XDP needs; use --datapath tc or auto",
            interface.name
        );
        return Ok((None, format!("TC on a {kind} interface: XDP needs Ethernet headers")));
    }
    Ok(match mode {
        Mode::Tc => (None, "TC alone, as configured".to_owned()),
        Mode::Xdp => (Some(XdpKind::Native), "native XDP, as configured; TC for what it leaves".to_owned()),
        Mode::XdpGeneric => {
            (Some(XdpKind::Generic), "generic XDP, as configured; TC for what it leaves".to_owned())
        }
        Mode::Auto => match interface.kind.as_deref() {
            None => {
                (Some(XdpKind::Native), "auto: the driver has native XDP; TC for what it leaves".to_owned())
            }
            Some("veth") => (None, "auto: on veth TC carries bulk TCP faster than XDP".to_owned()),
            Some(kind) => (None, format!("auto: TC on a {kind} interface")),
        },
    })
}

/// Returns whether the link is new.
fn attach_tcx(
    classifier: &mut SchedClassifier,
    interface: &Interface,
    hook: TcAttachType,
    path: &Path,
) -> Result<bool> {
    if let Ok(pinned) = PinnedLink::from_pin(path) {
        let adopted = FdLink::from(pinned).try_into()?;
        match classifier.attach_to_link(adopted).and_then(|id| classifier.take_link(id)) {
            Ok(_) => return Ok(false),
            Err(_) => remove(path),
        }
    }
    let order = TcAttachOptions::TcxOrder(LinkOrder::default());
    let id = classifier.attach_with_options(&interface.name, hook, order)?;
    let link: FdLink = classifier.take_link(id)?.try_into()?;
    link.pin(path)?;
    Ok(true)
}

/// Before 6.6 there is no TCX: a filter on the clsact qdisc, which stays without a pin. Returns
/// whether it is new.
fn attach_clsact(
    classifier: &mut SchedClassifier,
    interface: &Interface,
    hook: TcAttachType,
) -> Result<bool> {
    // It may be there already, ours or another's.
    let _ = tc::qdisc_add_clsact(&interface.name);
    let ours = SchedClassifierLink::attached(&interface.name, hook, PRIORITY, HANDLE, None)?;
    let (id, made) = match classifier.attach_to_link(ours) {
        Ok(id) => (id, false),
        Err(_) => {
            let options = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
            let options = TcAttachOptions::Netlink(options);
            (classifier.attach_with_options(&interface.name, hook, options)?, true)
        }
    };
    // Dropping the link would take the filter off.
    std::mem::forget(classifier.take_link(id)?);
    Ok(made)
}

fn io_error(error: &ProgramError) -> Option<&io::Error> {
    match error {
        ProgramError::SyscallError(SyscallError { io_error, .. }) => Some(io_error),
        _ => None,
    }
}

fn pins(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
}

fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        log::warn!("cannot remove {}: {error}", path.display());
    }
}

/// Takes links off their interfaces, and removes their pins.
fn release(paths: &[PathBuf]) {
    for path in paths {
        if let Err(error) = detach_link(path) {
            // Of an interface that is gone, for one: there is nothing to take it off from.
            log::debug!("{}: {error}", path.display());
        }
        remove(path);
    }
}

/// Takes programs and maps off the machine, whether or not a controller runs. Says what it did, a
/// line each.
pub fn detach(pin_dir: &Path) -> Result<Vec<String>> {
    load::check_bpffs(pin_dir)?;
    // Held meanwhile, so that no controller adopts what is about to go.
    let holder = owner::holder(pin_dir);
    if owner::is_of_another_namespace(pin_dir)? {
        bail!(
            "the pins in {} are of another network namespace: run this there (nsenter --net=…); if it is gone, \
             remove them: rm -r {}",
            pin_dir.display(),
            pin_dir.display()
        );
    }
    let mut done = take_off(pin_dir)?;
    let other = if done.is_empty() { other_programs() } else { None };
    // With nothing pinned it is left over, or that other one's.
    if other.is_none() && netfilter::remove()? {
        done.push(format!("removed the nftables table {}", netfilter::TABLE));
    }
    if !done.is_empty() {
        if let Holder::Controller(controller) = holder {
            done.push(format!(
                "{controller} still runs, and forwards nothing: stop it, or restart it to attach again"
            ));
        }
        return Ok(done);
    }
    if let Some((interface, controller)) = other {
        bail!(
            "nothing is pinned in {}, but {interface} has programs of {controller}: name its pins with --pin-dir",
            pin_dir.display()
        );
    }
    let mut said = vec![format!("nothing to take off: nothing is pinned in {}", pin_dir.display())];
    if !kernel_is_at_least(6, 6) {
        said.push("(a filter without pins would show in `tc filter show dev WAN ingress`)".to_owned());
    }
    Ok(said)
}

/// An interface that has programs of a forwarderd, whose pins are elsewhere, and that forwarderd.
fn other_programs() -> Option<(String, String)> {
    let interfaces = nix::net::if_::if_nameindex().ok()?;
    interfaces.iter().find_map(|interface| {
        let name = interface.name().to_str().ok()?;
        Some((name.to_owned(), owner::of_programs(name)?))
    })
}

fn take_off(pin_dir: &Path) -> Result<Vec<String>> {
    let mut done = Vec::new();
    let links = links_dir(pin_dir);
    let names = pins(&links);
    release(&names.iter().map(|name| links.join(name)).collect::<Vec<_>>());
    for name in names {
        ensure!(!links.join(&name).exists(), "cannot remove {}", links.join(&name).display());
        let (index, what) = name.split_once('-').unwrap_or((&name, "program"));
        let interface = interface_name(index).unwrap_or_else(|| format!("interface {index}, which is gone"));
        done.push(format!("detached {what} from {interface}"));
    }
    // Without maps the filters are another forwarderd's.
    if !kernel_is_at_least(6, 6) && load::has_maps(pin_dir) {
        done.extend(detach_clsact());
    }
    let maps = load::maps_dir(pin_dir);
    let names = pins(&maps);
    for name in &names {
        fs::remove_file(maps.join(name)).with_context(|| format!("cannot remove the map {name}"))?;
    }
    if !names.is_empty() {
        done.push(format!("removed {} maps, and all flows with them", names.len()));
    }
    remove_empty(pin_dir);
    Ok(done)
}

/// Removes the directories of pins in which nothing is left; somebody else's may be.
fn remove_empty(pin_dir: &Path) {
    for dir in [&links_dir(pin_dir), &load::maps_dir(pin_dir), &pin_dir.to_owned()] {
        let _ = fs::remove_dir(dir);
    }
}

fn interface_name(index: &str) -> Option<String> {
    let index = index.parse().ok()?;
    let name = nix::net::if_::if_indextoname(index).ok()?;
    name.into_string().ok()
}

/// The filters by our programs' names, on whatever interface.
fn detach_clsact() -> Vec<String> {
    let mut done = Vec::new();
    for interface in nix::net::if_::if_nameindex().iter().flat_map(|interfaces| interfaces.iter()) {
        let Ok(name) = interface.name().to_str() else { continue };
        for (hook, program, what) in [
            (TcAttachType::Ingress, TC_INGRESS, "tc-ingress"),
            (TcAttachType::Egress, TC_EGRESS, "tc-egress"),
            (TcAttachType::Ingress, TC_INGRESS_L3, "tc-ingress"),
            (TcAttachType::Egress, TC_EGRESS_L3, "tc-egress"),
        ] {
            if tc::qdisc_detach_program(name, hook, program).is_ok() {
                done.push(format!("detached {what} from {name}"));
            }
        }
    }
    done
}
