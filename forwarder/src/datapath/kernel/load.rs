//! Loads the eBPF object over the pinned maps, or refuses to.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow, bail};
use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{Array, MapData, MapError},
    programs::{ProgramError, SchedClassifier, Xdp},
    sys::SyscallError,
    util::KernelVersion,
};
use forwarder_common::layout::{LAYOUT_VERSION, Settings};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use crate::datapath::{Options, TableSizes};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/forwarder-ebpf"));

/// Networks in all allow lists together.
pub const ALLOW_CAPACITY: u32 = 1 << 20;
/// Entries of the port map, which takes memory only for those in use.
pub const PORTS_CAPACITY: u32 = 1 << 18;

/// Addresses of the router itself.
const OWN_CAPACITY: u32 = 4096;

/// The eBPF object that is part of this program.
pub fn object() -> &'static [u8] {
    OBJECT
}

/// Names of the programs in the object.
const XDP: &str = "forwarder_xdp";
pub const TC_INGRESS: &str = "forwarder_ingress";
pub const TC_EGRESS: &str = "forwarder_egress";
/// Those for interfaces without Ethernet headers; loaded where there is one.
pub const TC_INGRESS_L3: &str = "forwarder_ingress_l3";
pub const TC_EGRESS_L3: &str = "forwarder_egress_l3";

/// The map of what the controller tells the programs; the first to be looked for.
pub const SETTINGS: &str = "SETTINGS";

/// Where the maps are pinned, by name.
pub fn maps_dir(pin_dir: &Path) -> PathBuf {
    pin_dir.join("maps")
}

/// Whether a controller has pinned its maps there.
pub fn has_maps(pin_dir: &Path) -> bool {
    maps_dir(pin_dir).join(SETTINGS).exists()
}

/// Whether this kernel is of a version or later.
pub fn kernel_is_at_least(major: u8, minor: u8) -> bool {
    KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(major, minor, 0))
}

/// Makes the maps; each program is loaded where it is needed first. Maps that are pinned already are used as they are, contents included.
pub fn load(options: &Options) -> Result<Ebpf> {
    let maps = maps_dir(&options.pin_dir);
    fs::create_dir_all(&maps).with_context(|| format!("cannot create {}", maps.display()))?;
    check_layout(&maps)?;

    let TableSizes { rules, flows, half_open, flows_ipv6, half_open_ipv6 } = options.tables;
    let sizes = [
        ("RULES", rules),
        ("PROBES", rules),
        ("RULE_COUNTERS", rules),
        ("DUE", rules),
        ("SESSIONS", flows.saturating_mul(2)),
        ("CORRECTIONS", flows.saturating_mul(2)),
        ("PORTS", PORTS_CAPACITY),
        ("ROLES", rules.saturating_mul(2).saturating_add(OWN_CAPACITY)),
        ("ALLOW", ALLOW_CAPACITY),
        ("FLOWS", flows.saturating_mul(2)),
        ("HALF_OPEN", half_open.saturating_mul(2)),
        ("FLOWS_IPV6", flows_ipv6.saturating_mul(2)),
        ("HALF_OPEN_IPV6", half_open_ipv6.saturating_mul(2)),
    ];
    let mut loader = EbpfLoader::new();
    for (name, wanted) in sizes {
        loader.map_max_entries(name, pinned_size(&maps, name).unwrap_or(wanted));
    }
    let coarse_clock = u8::from(kernel_is_at_least(5, 11));
    loader
        .default_map_pin_directory(&maps)
        .override_global("COARSE_CLOCK", &coarse_clock, true)
        .override_global("MARK", &options.mark, true)
        .load(object())
        .map_err(|error| match permission(&error) {
            true => anyhow!("the kernel refuses to load eBPF: run forwarderd as root"),
            false => anyhow!(error).context("cannot create the eBPF maps"),
        })
}

/// The XDP program, loaded if it is not yet: a start takes as long as the programs that it needs.
pub fn xdp(ebpf: &mut Ebpf) -> Result<&mut Xdp> {
    let xdp: &mut Xdp = program(ebpf, XDP)?;
    if xdp.fd().is_err() {
        xdp.load().map_err(refused)?;
    }
    Ok(xdp)
}

/// A TC program, loaded likewise.
pub fn classifier<'e>(ebpf: &'e mut Ebpf, name: &str) -> Result<&'e mut SchedClassifier> {
    let classifier: &mut SchedClassifier = program(ebpf, name)?;
    if classifier.fd().is_err() {
        classifier.load().map_err(refused)?;
    }
    Ok(classifier)
}

/// A pinned map keeps the size that it was made with, and what uses it has to know that one.
fn pinned_size(maps: &Path, name: &str) -> Option<u32> {
    Some(MapData::from_pin(maps.join(name)).ok()?.info().ok()?.max_entries())
}

/// A program of the object, by its name and type.
fn program<'e, P>(ebpf: &'e mut Ebpf, name: &str) -> Result<&'e mut P>
where
    &'e mut P: TryFrom<&'e mut aya::programs::Program, Error = ProgramError>,
{
    let program = ebpf.program_mut(name).with_context(|| format!("the eBPF object has no program {name}"))?;
    Ok(program.try_into()?)
}

fn refused(error: ProgramError) -> anyhow::Error {
    match &error {
        // The log is many screens long; its last lines say why.
        ProgramError::LoadError { io_error, verifier_log } => {
            let log = verifier_log.to_string();
            let lines: Vec<&str> = log.lines().collect();
            log::debug!("{log}");
            let tail = lines[lines.len().saturating_sub(4)..].join("; ");
            anyhow!("this kernel's verifier refuses a program ({io_error}): {tail}")
        }
        _ => anyhow!(error),
    }
}

fn permission(error: &EbpfError) -> bool {
    let EbpfError::MapError(
        MapError::CreateError { io_error, .. } | MapError::SyscallError(SyscallError { io_error, .. }),
    ) = error
    else {
        return false;
    };
    io_error.kind() == io::ErrorKind::PermissionDenied
}

/// Pins need a BPF file system: the nearest directory that exists has to be in one.
pub fn check_bpffs(pin_dir: &Path) -> Result<()> {
    let existing = pin_dir.ancestors().find(|dir| dir.is_dir()).unwrap_or(Path::new("/"));
    let is_bpffs = statfs(existing).is_ok_and(|stat| stat.filesystem_type() == BPF_FS_MAGIC);
    if !is_bpffs {
        bail!(
            "{} is not in a BPF file system: mount one (mount -t bpf bpf /sys/fs/bpf) or name a place in one with --pin-dir",
            pin_dir.display()
        );
    }
    Ok(())
}

/// Maps of another layout must not be misread.
fn check_layout(maps: &Path) -> Result<()> {
    let path = maps.join(SETTINGS);
    if !path.exists() {
        return Ok(());
    }
    let layout = read_settings(&path).map(|settings| settings.layout);
    // Layout 0: made, but never filled.
    if matches!(layout, Ok(0 | LAYOUT_VERSION)) {
        return Ok(());
    }
    bail!(
        "the maps in {} are of another version of forwarderd (layout {}, this one has {LAYOUT_VERSION}): \
         `forwarderd detach` removes them and ends all flows, then start again",
        maps.display(),
        layout.map_or_else(|_| "unknown".to_owned(), |layout| layout.to_string()),
    )
}

/// The settings in a pinned map.
pub fn read_settings(path: &Path) -> Result<Settings> {
    let map = MapData::from_pin(path)?;
    if map.info()?.value_size() as usize != size_of::<Settings>() {
        bail!("the settings have another size");
    }
    let settings: Array<_, Settings> = Array::try_from(aya::maps::Map::Array(map))?;
    Ok(settings.get(&0, 0)?)
}
